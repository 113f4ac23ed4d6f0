// Package runtime is what the agent asks of whatever runs tasks: make a sandbox
// with a network namespace, run a program in it, tell when it ends, keep its
// output, and be found again by the next agent.
//
// The steps are apart because the network comes in between: Create makes the
// namespace and everything that must exist before the program, the overlay
// wires it, and only then Start runs the program. Release takes the sandbox
// away and keeps what a person may still ask for (output, exit status); Remove
// takes that, too.
//
// Package process implements it with processes in namespaces on the node's own
// file system. Containers' images will come as another implementation.
package runtime

import (
	"context"
	"errors"
	"io"
	"iter"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/spec"
)

// ErrNotFound answers a call for a task that the runtime does not have.
var ErrNotFound = errors.New("no such task")

// ErrNoImage is that no image of the node has a name.
var ErrNoImage = errors.New("no such image")

// ErrClosing ends what waits for a task when the process that waits for it ends.
var ErrClosing = errors.New("the node's agent ends; the task goes on")

// Task is what is to be run.
type Task struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// Netns is a name below spec.NetnsDir, made by Create. Empty: the task is in
	// the node's own namespace, with the node's resolv.conf and hosts files.
	Netns string        `json:"netns"`
	Spec  spec.TaskSpec `json:"spec"`
	// Executor names what runs the program in the sandbox (ExecutorOf); empty: the
	// runtime itself, as a process of the node.
	Executor   string `json:"executor,omitempty"`
	Hostname   string `json:"hostname"`
	ResolvConf []byte `json:"resolv_conf"`
	Hosts      []byte `json:"hosts"`
	// Data is kept for the caller and comes back in Status.
	Data []byte `json:"data,omitempty"`
	// Keep: it may be started again (Renew), and goes on with the files that it has of
	// its own, as a container in Docker does. They stay until Remove.
	Keep bool `json:"keep,omitempty"`
	// Files are the contents of Spec's secrets, then of its configs, in their order.
	// They are in memory only.
	Files [][]byte `json:"-"`
}

// Sandbox is where a task's network goes.
type Sandbox struct {
	Netns string `json:"netns"`
	// DNSPort is the port on 127.0.0.11 of the sockets of DNSSockets.
	DNSPort uint16 `json:"dns_port"`
}

// State of a task's program.
type State string

// States.
const (
	Created State = "created" // the sandbox is there, the program was not started
	Running State = "running"
	Exited  State = "exited"
)

// Status of a task.
type Status struct {
	ID       string `json:"id"`
	Name     string `json:"name"`
	State    State  `json:"state"`
	PID      int    `json:"pid,omitempty"`       // of the program, as the host numbers it
	ExitCode int    `json:"exit_code,omitempty"` // 128+N after signal N
	Err      string `json:"err,omitempty"`       // why it ended, when that is not its exit status
	// Note is what a person should know of a task for as long as it lasts: that its output
	// can't be kept.
	Note      string    `json:"note,omitempty"`
	StartedAt time.Time `json:"started_at,omitzero"`
	// Booted is how long the machine had been up then (CLOCK_BOOTTIME, clock_gettime(2)),
	// 0 where that is not known. The clock of StartedAt may have been set since.
	Booted   time.Duration `json:"booted,omitempty"`
	ExitedAt time.Time     `json:"exited_at,omitzero"`
	Sandbox  Sandbox       `json:"sandbox"`
	Data     []byte        `json:"data,omitempty"`
}

// Begin notes that the program starts now.
func (s *Status) Begin() { s.StartedAt, s.Booted = time.Now(), uptime() }

// Age is for how long a program that runs has, 0 where that is not known.
func (s Status) Age() time.Duration {
	switch {
	case s.Booted > 0:
		return max(0, uptime()-s.Booted)
	case s.StartedAt.IsZero():
		return 0
	}
	return max(0, time.Since(s.StartedAt))
}

// Ran is for how long a program that has ended had run, as far as the clock tells.
func (s Status) Ran() time.Duration {
	if s.StartedAt.IsZero() || s.ExitedAt.IsZero() {
		return 0
	}
	return max(0, s.ExitedAt.Sub(s.StartedAt))
}

// uptime is how long the machine has been up, 0 where it does not say so.
func uptime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// Usage is what a task has used of its node, as its control group counts.
type Usage struct {
	CPU         time.Duration // processor time
	Memory      uint64        // bytes, without the file pages that the kernel can take back at once
	MemoryLimit uint64        // 0: none of its own
	Pids        uint64        // processes and threads
	PidsLimit   uint64        // 0: none
	ReadBytes   uint64        // from block devices
	WriteBytes  uint64
	OOMKills    uint64
}

// Sockets are those of a task that accept traffic on more than loopback.
type Sockets struct {
	// Serves counts those that only servers have: such a one listens (TCP, SCTP), or is
	// bound and not connected (UDP), at a port that the kernel does not choose for
	// clients.
	Serves int
	// Maybe are the UDP ports of sockets that are bound and not connected, at ports
	// that the kernel chooses for clients: a client's that has sent something, a
	// question to a name server for instance, looks like this as well. Ascending.
	Maybe []uint16
}

// Event tells that a task's Status changed.
type Event struct{ ID string }

// Runtime runs tasks. Calls for one task come one at a time, but for Exec, Copy,
// Logs, Status and Listening; calls for different tasks at once.
type Runtime interface {
	// Prepare fetches what the task needs beside a sandbox, an image for instance,
	// which may take minutes; progress is told in words for a person. It returns
	// what the task is as far as that says: the image's defaults filled in.
	Prepare(ctx context.Context, t Task, progress func(string)) (spec.TaskSpec, error)
	// Create makes the sandbox. Nothing is left behind when it fails.
	Create(ctx context.Context, t Task) (Sandbox, error)
	// Start runs the program. Its error is one line for a person.
	Start(ctx context.Context, id string) error
	// SetHosts makes name, in the hosts file of a task with a namespace, stand
	// for these addresses only. Other lines stay.
	SetHosts(ctx context.Context, id, name string, addrs []netip.Addr) error
	// Stop sends the signal ("SIGTERM" or a number), and SIGKILL to the whole
	// task after grace. It returns when the program has ended; one that has
	// ended already, or never started, is no error.
	Stop(ctx context.Context, id, signal string, grace time.Duration) error
	// Halt is Stop of a task whose machine goes down: its end counts as lost with that
	// (an Err, see Status), whatever exit status its program makes of the signal.
	Halt(ctx context.Context, id, signal string, grace time.Duration) error
	// Signal sends a signal ("SIGHUP" or a number) to the task's program. ErrNotFound is
	// of a task that is not there; one that does not run is an error, too.
	Signal(ctx context.Context, id, signal string) error
	// Release ends whatever still runs and removes the sandbox. Output and
	// status stay. It is idempotent.
	Release(ctx context.Context, id string) error
	// Renew has a released task forget its end, for Create to make it anew with its output
	// going on behind what there is. Absence is no error.
	Renew(ctx context.Context, id string) error
	// Remove releases the task and forgets it. Absence is no error.
	Remove(ctx context.Context, id string) error
	// List finds every task, those of an earlier process included.
	List(ctx context.Context) ([]Status, error)
	// Status returns ErrNotFound for a task that is not there.
	Status(ctx context.Context, id string) (Status, error)
	// Events tells of changes until ctx ends. One caller at a time.
	Events(ctx context.Context) <-chan Event
	// Exec runs a command inside a running task.
	Exec(ctx context.Context, id string, s ExecSpec) (Process, error)
	// Attach connects to a task's program, which may be yet to start: one with
	// Spec.Attach waits for that, for a moment. What the program says goes to
	// the task's output as well. The end of ctx only ends the connection.
	Attach(ctx context.Context, id string, s AttachSpec) (Process, error)
	// Copy moves files between a running task's file system and an archive.
	Copy(ctx context.Context, id string, s CopySpec) error
	// Logs yields the task's output, oldest first; with Follow until the task
	// has ended.
	Logs(ctx context.Context, id string, o LogOptions) iter.Seq2[LogLine, error]
	// DNSSockets returns a UDP and a TCP socket on 127.0.0.11 in the task's
	// namespace. They are duplicates: closing them ends nothing, and what was
	// sent to them while nobody read is still there. A task in the node's own
	// namespace has none.
	DNSSockets(ctx context.Context, id string) (net.PacketConn, net.Listener, error)
	// Listening tells what traffic the task accepts; nothing while its program is
	// stopped (SIGSTOP). Without all, some that Serves are as good as all, and cost
	// less.
	Listening(ctx context.Context, id string, all bool) (Sockets, error)
	// Reset ends the TCP connections that the task has at or to some addresses: it and who
	// is at their other ends hear of a reset.
	Reset(ctx context.Context, id string, addrs []netip.Addr) error
	// Faults tells, by the names of running tasks, what is wrong with what a task
	// sees of the machine, such as a file of its own that the node's took the
	// place of. What can be mended is no fault.
	Faults() map[string]string
	// Usage tells what a task has used of the node: os.ErrNotExist where that is not
	// counted, or the task has ended.
	Usage(ctx context.Context, id string) (Usage, error)
	// Close ends this process's part. Tasks go on.
	Close() error
}

// ExecSpec is a command to run inside a task, with the task's environment, to
// which Env is added. Stdin nil is empty input.
type ExecSpec struct {
	Command        []string
	Env            []string
	Dir, User      string
	TTY            bool // Stdout carries both streams
	Rows, Cols     uint16
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Detach leaves the command running in the task, with no streams; Process
	// ends, with status 0, once it is started.
	Detach bool
}

// CopySpec is what Copy moves: into the task with In, else out of it. Archives are tar's,
// not compressed.
type CopySpec struct {
	Path   string // in the task
	Follow bool   // out: what a symbolic link at Path leads to, rather than the link
	// In is an archive of Source, and Path where a copy of that is to be; without a
	// Source, of anything, to be extracted in the directory Path.
	In     io.Reader
	Source *CopySource
	Owners bool // in: users and groups are the archive's by number, rather than root
	// Found tells what is there before anything is written to Out.
	Found func(CopySource) error
	Out   io.Writer
}

// CopySource is what an archive is of.
type CopySource struct {
	Path   string `json:"path"`
	Dir    bool   `json:"dir,omitempty"`
	Rebase string `json:"rebase,omitempty"` // what it is called in the archive, instead of Path's last element
}

// AttachSpec is what Attach connects to the program. Stdin is used only of a
// task with Spec.Stdin; of one with Spec.TTY, Stdout carries both streams.
type AttachSpec struct {
	Rows, Cols     uint16
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// Process is a command that Exec started, which is killed when Exec's context
// ends, unless it was detached by then; or a program that Attach is connected to.
type Process interface {
	// Wait returns the exit status: 127 for a command that was not found, 126
	// for one that can't be executed, 128+N for one ended by signal N.
	Wait() (int, error)
	Resize(rows, cols uint16) error
	Signal(sig int) error
}

// LogOptions choose what Logs yields.
type LogOptions struct {
	Follow bool
	Tail   int // only the last lines; 0: all, -1: none
	// Since and Until are the moments of the first line and, with Follow, of the
	// end; zero: any.
	Since, Until time.Time
}

// LogLine is one line of output, without its newline. Lines beyond 16 KiB come
// in pieces.
type LogLine struct {
	Time   time.Time
	Stderr bool
	Line   []byte
	// Note is no line, but what is to be said of the output: that part of it is
	// damaged, or gone.
	Note string
}
