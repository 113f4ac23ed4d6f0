// Package vip turns a [spec.View] into virtual servers: for every service in
// endpoint mode "vip", one address per network that spreads new connections
// over the service's replicas.
//
// # Where balancing happens
//
// Every overlay namespace (ovns) of a network has every VIP of that network as
// a local address, and balances for the clients on its own node. Both
// directions of a connection pass the client's ovns, because the overlay is
// routed, so there is no source NAT: servers see who calls them. Docker Swarm
// bridges instead, must source-NAT at its balancer, and loses the client's
// address; that is the one thing its users complain about most.
//
// # The three steps
//
//   - [Desired] is pure: View in, [State] out. It decides who is a backend and
//     with which weight; nothing else does.
//   - [Diff] is pure: wanted and observed State in, ordered operations out,
//     one per VIP, so that status and backoff are per VIP.
//   - A [Dataplane] observes and applies. There are three: vip/ipvs (the
//     kernel's IPVS), vip/nft (nftables NAT, on any kernel since 5.4), and
//     the strict fake in vip/viptest, which also holds the conformance suite
//     that all three pass.
//
// [Target] joins Diff and a Dataplane for [reconcile.New].
//
// # Weights
//
// A backend has weight 1 (takes new connections) or 0 (keeps those it has).
// Weight 0 is how a drain is expressed: the owner of an endpoint gossips it as
// draining, waits, and then withdraws it. A backend that leaves the State is
// removed at once, and what is still connected to it is reset: there is no
// timer and no side list here, and the "now" that [Diff] is given has nothing
// to decide. Backends on a node that gossip only suspects get weight 0 as long
// as another backend remains, and stay where none does: a VIP is never emptied
// on gossip alone.
//
// Which backend gets which connection is round robin, for each VIP by itself,
// from a random one on.
//
// # Time
//
// An idle TCP connection through a VIP is known for longer than it takes Linux
// to send the first keepalive (7200 s by default). A UDP flow is forgotten after
// minutes of silence (IPVS: 300 s; nftables: conntrack's 120 s, or 30 s when
// nobody answered), and its next datagram may reach another backend.
//
// # A VIP without a backend
//
// keeps its address and its name, answers ping, and refuses connections at
// once, because the address is local and nothing listens: TCP with a reset, UDP
// with ICMP "port unreachable", SCTP with an abort or "protocol unreachable". So
// does a VIP that has only draining backends, while the connections they still
// hold go on.
package vip
