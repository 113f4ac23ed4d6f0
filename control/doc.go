// Package control is the managers' side: it replicates the state of package
// control/state with hashicorp/raft, serves the Control service, decides on the
// leader what control/state's Plan proposes, and carries calls from any node to
// the leader.
//
//	caller ─► Forwarder ─(TLS, see package peer)─► Forwarder of the leader ─► Manager
//	                                                                  │ propose
//	          agents ◄── Assignments, Report ──► leader loops ◄─ FSM ◄┴─ raft
//
// One TCP listener per node carries raft and the API, told apart by ALPN: see
// package peer, which also says who may call what.
//
// A node is down when it has sent no report for 3 s and the leader's own gossip
// holds it dead, or when it has sent none for 15 s. One witness is not enough
// for the short time, as rescheduling is dear; and when more than half of the
// nodes look dead at once, the leader rather suspects itself and waits the long
// time.
package control
