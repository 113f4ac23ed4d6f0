// Package overlay turns a [spec.View] into the links, routes and filters that
// carry a network's packets: inside a node between tasks, between nodes in
// VXLAN, and out of the cluster.
//
// # A routed overlay
//
// Each network a node takes part in has one namespace there, called ovns:
//
//	task's namespace          ovns of network "app"                 host's namespace
//	┌────────────────┐   ┌──────────────────────────────┐   ┌──────────────────────┐
//	│ eth0 10.0.1.10 ├───┤ shpTASK     lo: gateways     │   │                      │
//	└────────────────┘   │ 169.254.1.1     (and VIPs)   │   │ (UDP socket of vx) ──┼─► other nodes
//	┌────────────────┐   │                           vx │   │                      │
//	│ eth0 10.0.1.11 ├───┤ shpTASK                  out ├───┤ shoNETWORK ── masq ──┼─► outside
//	└────────────────┘   └──────────────────────────────┘   └──────────────────────┘
//
// There is no bridge. Each endpoint is a host route: to a veth when it is
// here, via another node's router address when it is there. So moving an
// endpoint is one route change, ARP and broadcasts never cross the underlay,
// and a node costs one neighbour and one forwarding entry, not one of each for
// every endpoint. Docker Swarm bridges instead, and must then source-NAT at
// its balancer (see package vip).
//
// What is not known is unreachable at once: each subnet has an unreachable
// route below the endpoints' own, so that a connection to an endpoint that is
// gone fails rather than hangs.
//
// # The vxlan device
//
// It is made by a netlink socket of the host's namespace with the ovns as its
// destination. A vxlan device keeps its UDP socket in the namespace it was made
// from, so packets leave by the host's routes while the device is in the ovns.
// Making it in the host's namespace and moving it there (as flannel and the
// first prototype did) comes to the same, but leaves a half-made device in the
// host's namespace when the agent dies at the wrong moment.
//
// # No ARP
//
// Both ends of each veth have permanent neighbours, and so have the routers of
// the other nodes. A namespace inherits arp_ignore, arp_announce and rp_filter
// from the host (Documentation/networking/ip-sysctl, devconf_inherit_init_net),
// and hosts that balance with LVS set them so that 169.254.1.1 would not be
// answered for; a neighbour that is known need not be asked for. What a task
// asks is not answered, so that it can't fill the neighbour table.
//
// # The way out
//
// Unless the network is internal, its ovns has a veth to the host's namespace.
// The ovns masquerades to its own address on it, so that the host needs no
// route to any endpoint, and two networks can't meet there; the host
// masquerades once more. Both take ports from 32768 on: a task's own choice could
// be a port where the node, or something published, is spoken to. What comes from
// outside is forwarded only in reply, or when the host's own DNAT (of a published
// port) sent it.
//
// # The three steps
//
//   - [Desired] is pure: View in, [State] out.
//   - [Diff] is pure: wanted and observed State in, ordered operations out.
//   - A [Dataplane] observes and applies: overlay/vxlan in the kernel, the strict
//     fake in overlay/overlaytest, which also holds the conformance suite both pass.
//
// A State is a set of [Object] values, each a plain comparable struct: a route,
// an address, a veth pair. Desired says which there are to be, Observe which
// there are, and Diff compares them one by one, knowing only three things more:
// the order in which kinds need each other; that what was on a device is gone
// when the device must be made anew; and that nothing is removed before the View
// is complete.
package overlay
