// Package spec holds Shoal's nouns as plain values: networks, services, tasks,
// nodes, endpoints, and the immutable [View] that combines them for one node.
//
// Everything that crosses a package border in Shoal is one of these values.
// They have no behaviour beyond validation, comparison and derivation (the
// addresses and names that follow from an ID or a number), import nothing of
// ours, and run no I/O, so that every consumer can be tested with a literal.
//
// Where a fact comes from matters more than its shape:
//
//   - intent and allocation (Network, Service, Task, Node) is kept by the
//     managers in raft;
//   - liveness and location (Peer, Endpoint) is gossiped by the node it is
//     about, which is its only writer;
//   - a View joins both and is what the data plane reconciles the kernel to.
package spec
