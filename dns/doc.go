// Package dns answers names inside tasks, at 127.0.0.11 (the address that
// Docker uses, so that habits and images work unchanged).
//
// A [Zone] is an immutable index of one [spec.View]: from a network and a name
// to what the name stands for, and from an address back to its name. A new View
// makes a new Zone that shares with the last one all that did not change: an
// endpoint that changed costs microseconds, one that did not a comparison. A
// query never waits for a lock.
//
// A [Server] has one Zone at a time and serves any number of tasks, each by its
// own sockets and for its own [Asker], who sees the names of its networks and
// no others. What no network of the asker knows is forwarded to the resolvers
// of the node, or to those of the task: several are raced, answers are cached
// (RFC 2308 for negative ones), and what looks forged is asked again over TCP.
//
// # Names
//
// Names are case-insensitive (RFC 4343) and each may be followed by ".NETWORK",
// ".shoal" or ".NETWORK.shoal":
//
//	web             the service's virtual IP; its active replicas with endpoint mode dnsrr
//	tasks.web       the active replicas
//	db              an alias: all services and tasks that have it
//	c1              a task by its name; its ID and host name, where nothing else has that name
//	web.2           the replica in slot 2
//	web.node2       the replicas on one node; any name above may be qualified so
//	_80._tcp.web    SRV
//
// The domain shoal. is the cluster's own (DNS has no reserved name for it, and
// no such top-level domain exists): none of it is ever forwarded, nor is a name
// that exists, for any type of record, nor the reverse of an address of a
// network of this node.
package dns
