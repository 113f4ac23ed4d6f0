// Package process runs tasks as process trees in namespaces of their own, on the
// node's own file system.
//
//	agent ──unix socket──► shim ──► task-init (PID 1) ──► program
//	                        │        mount, PID, UTS, IPC namespaces of the task
//	                        └ network namespace of the task
//
// The shim (one per task, this same binary) is not the agent's to lose: it has
// a session of its own, keeps the task's output, exit status, stop timer and
// name server sockets, and serves them on a unix socket to whichever agent
// comes. task-init sets the namespaces up, runs the program as its child (a
// program that is PID 1 itself ignores SIGTERM unless it says otherwise), reaps
// what the program leaves, and ends with its exit status; the kernel then kills
// the rest of the PID namespace. A shim that dies takes its task with it
// (PR_SET_PDEATHSIG), so nothing runs that nobody watches.
//
// On disk, StateDir/ID has task.json (what to run; written first), exit.json
// (how it ended; written last) and the output; RunDir/ID.sock is the shim. With
// these a new process finds everything again, whenever the old one was killed.
//
// Tried and dropped: the shim as a child that the agent must wait for (an agent
// that is killed then leaves zombies to whoever is init); sockets for names in
// the agent only (every restart of the agent failed the lookups of that moment).
package process
