// Package agent is the process that runs on every node: it joins what the
// managers want (control), what the nodes say of themselves (gossip) and what
// runs here (runtime) into one [spec.View], and hands that View to the
// reconcilers of overlay, vip and ingress and to the name server.
//
//	assignment stream ─┐
//	gossip snapshot ───┼─► composer ─► View ─► overlay loop ─► kernel
//	task runners ──────┘      │              ├► vip loop ────► kernel
//	     ▲                    │              ├► ingress loop ► kernel
//	     │                    │              └► dns zone
//	     └── wired, drained ◄─┴── passes of the loops ──► gossip.Applied
//
// Who owns what:
//
//   - [Agent] owns the unix socket, the data directory's lock and at most one
//     member; it serves init, join and leave.
//   - a member is the node's life in one cluster: gossip, the control listener,
//     the Manager where the node is one, the loops, the runners. Ending it ends
//     all of its goroutines and leaves tasks and kernel state as they are,
//     which is what a restart of the agent wants; leaving also removes both.
//   - one runner per task moves it through its states and alone decides what
//     this node says of it in gossip and to the managers.
//
// The agent imports interfaces and pure packages only. What touches the kernel
// is chosen in cmd/shoal and passed in with [Config].
package agent
