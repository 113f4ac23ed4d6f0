// Package ingress turns a [spec.View] into the routing mesh of published ports:
// every node answers on a published port, whether or not it runs a replica, and
// the server sees the client's own address.
//
// # One connection's way
//
//	client ──► host's namespace of node A      ovns on A                  ovns on B
//	           table INSTANCE-ingress:         package vip: VIP:80 ─►     vx ─► task
//	           A:8080 ─dnat─► VIP:80, route ─► a backend, here or by ───► (remembers
//	           to the VIP by the way out       vx                          that A sent it)
//	client ◄── A:8080 ◄─────────────────────── VIP:80 ◄────────────────── reply to A
//
// Nothing on this way rewrites the client's address, so B would answer the
// client by its own way out. Table shoal-ingress in the ovns prevents that: a
// connection that comes by vx from an address outside of the network gets the
// number of the entry node (told by the MAC of its vxlan device) as connection
// mark; replies get it as packet mark; and a rule and a table for each node send
// marked packets there.
//
// One client may use one source port for connections to two entry nodes. At B
// both look alike, so each entry node has a conntrack zone for the original
// direction, and the kernel moves the port of the second. IPVS does not track
// what it balances, so that B would not see a clash with a connection that
// entered at B itself: what A's IPVS sends to another node therefore has one
// bit of the client's port flipped, statelessly (package vip/ipvs does so for
// connections inside of the network, and why is told there).
//
// # Modes
//
//   - ingress leads to the VIP on every node.
//   - local leads to table shoal-ingress on the same node, which balances over the
//     local replicas, and refuses at once when there is none.
//   - host is local with one task.
//
// For the last two the host sends to its ovns's own end of the way out, so that
// tasks' addresses need no routes on the host.
//
// # What else may reach a VIP
//
// The host's table lets the host's own programs reach a VIP by a published port
// only, as package overlay's does for what is forwarded. Ports that a program of
// the host has are not taken from it: see [Holder].
//
// # Priorities
//
// Address translation on the host is five before the usual priority, so that
// a port of ours wins against Docker's and firewalld's tables. The client's
// address is pinned on the way out (a translation to itself), because another
// table may masquerade everything.
//
// IPv4 only, so far.
package ingress
