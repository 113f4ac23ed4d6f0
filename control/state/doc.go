// Package state is the cluster's desired state and allocation as a pure state
// machine: what raft replicates. [State.Apply] takes one command after another
// and knows no clock, no randomness, no I/O and no map order, so that the same
// log gives the same bytes on every manager ([State.Snapshot]). IDs and
// timestamps come in commands; the IDs of tasks made by the scheduler are a hash
// of what they are for and the log index they were planned at.
//
//	command ──► Apply ──► State ──► reads (assignments, lists)
//	   ▲                    │
//	   └── Schedule ◄── Plan (pure; on the leader, after each change and at "next")
//
// # Commands and refusals
//
// A command is applied whole or, with Result.Err set, not at all. A [Schedule] is
// the exception: each of its operations stands alone and is skipped when the task
// or service it was decided on has changed since (Version). [Plan] decides again.
//
// # Addresses
//
// Everything that must never be given twice is given here: subnets and VNIs of
// networks, VIPs, task addresses, node numbers; all next-fit (package ipam says
// why). A task has addresses from its assignment to a node until that node says
// it is released, or the node is removed from the cluster. Nothing else frees
// them: not the task's end, not its node being down, for a node that is cut off
// may go on running it. A removed service's VIPs are reserved until its last task
// is released, as others may hold connections to them.
//
// # Life of a replica
//
// A service has slots, each with the tasks that ran in it, oldest first. A slot is
// active while one of its tasks is desired to run. [Plan] keeps as many slots
// active as there should be replicas and one task that runs in each:
//
//   - an ended task is replaced after a delay (100 ms doubling to 30 s, from
//     the start again after a run of 10 s). The delay is counted with the
//     leader's clock: the replacement is pending until then, and a node whose
//     clock is wrong does not matter. It then goes where there is room, not
//     necessarily where it was.
//   - a task on a node that is down is lost, and replaced at once. If the node
//     returns before the replacement found a place, the task is revived;
//     else the node is told to stop it. What the node says later of how such a
//     task ended is no failure of the service: it neither counts as a restart nor
//     against the node.
//   - a task of an older template, on a node being drained, or on one that no
//     longer meets the constraints, is replaced start-first: the old one is
//     stopped when the new one runs. Of older templates as many slots at a
//     time as the service's policy allows, in its order; failures end that
//     (updater.go).
//     Where starting first is impossible (no other node fits, or no address
//     is free) the old one is stopped first.
//
// Which slots there are is the mode's (mode.go): as many as replicas, or one for each
// node, numbered as the node is. A job's (job.go) are run to their end, once for each
// template. Where a task goes is place.go's, for all of them, and what marks tasks to be
// moved is rebalance.go.
//
// Tried and dropped: delays that the node waits out (clock skew turns 100 ms
// into minutes), moving tasks to nodes that join by itself (Swarm does not either: it
// interrupts for cosmetics; who wants it asks for it), a budget of one for drains
// (slow, and start-first loses no capacity anyway).
//
// # Sharing
//
// A State is not safe for concurrent use. What its readers return shares slices
// and maps with it, which are replaced and never written again: it may be kept
// and read without a lock for ever, and must not be written to.
package state
