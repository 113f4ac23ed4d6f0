// Package proc runs tasks as process trees in namespaces of their own, on the
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
// the rest of the PID namespace (pid_namespaces(7)). A shim that dies takes its
// task with it, so nothing runs that nobody watches.
//
// # On disk
//
// StateDir/ID, in the order in which the files come:
//
//	lock                 locked (flock(2)) by the shim for as long as it lives
//	task.json            what to run; names everything that is made after it
//	shim.json            Create is complete; without it the task never was
//	run.json             task-init was forked: its process
//	output.N             the program's output
//	exit.json            how it ended
//	resolv.conf, hosts, hostname    are mounted in the task's /etc
//	shim.log             what a shim that crashed had to say
//
// RunDir/ID.sock is the shim. A new process finds everything again, whenever the
// old one was killed: a directory without shim.json is swept away (its shim, if
// one was started, ends by itself when it loses whoever started it); otherwise
// the lock says whether the shim lives, and a task whose shim does not, and
// which has no exit.json, was lost to kill -9 or a reboot. A pid from disk is
// trusted only together with the process's start time and the boot it was in.
//
// # What holds a task together
//
// That the task dies with its shim is ensured four times, because each way has
// a hole: PR_SET_PDEATHSIG (does not exist yet in the moment after the fork),
// the end of the socket between shim and task-init (needs task-init to be
// scheduled), run.json with which the agent kills what is left (needs an
// agent), and, where cgroup v2 is mounted, cgroup.kill of shoal/ID.
//
// An agent run by systemd needs KillMode=process: otherwise stopping the agent
// stops every task, too, on machines without cgroup v2.
//
// # The files in /etc
//
// resolv.conf, hosts and hostname are bind mounts onto the name itself, also
// when that is a symbolic link (move_mount(2) does not follow it), so a link
// that leads nowhere does no harm. When the node replaces such a file by a
// rename, as every DHCP client does, the kernel detaches what is mounted on it
// in every mount namespace, and the task would see the node's resolvers.
// task-init watches its mount table and /etc for that, and mounts anew.
//
// # Tried and dropped
//
// The shim as a child that the agent must wait for (an agent that is killed
// then leaves zombies to whoever is init); sockets for names in the agent only
// (every restart of the agent failed the lookups of that moment); pid files
// without start times (pids are used again); the socket as the sign of life (a
// shim that is only starting has none yet); /proc/PID/net of task-init for the
// readiness probe (the pid may be another's by the time it is read); numbered
// output files that move along at each rotation (a reader can't tell which is
// the one after its own).
package proc
