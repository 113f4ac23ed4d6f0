package runtime

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// ExecutorContainer is the name of the executor of tasks that come from an image.
const ExecutorContainer = "container"

// ExecutorOf names what runs a task: "" is a process of the sandbox's own maker,
// a program of the node's file system.
func ExecutorOf(t spec.TaskSpec) string {
	if t.Image != "" {
		return ExecutorContainer
	}
	return ""
}

// ErrUnavailable answers what an executor can't do now, because what it needs (a
// daemon) does not answer. What it has started goes on meanwhile.
var ErrUnavailable = errors.New("not available now")

// Box is a sandbox as an executor sees it: what somebody else has made, and goes
// on holding, for a program to run in.
type Box struct {
	Task
	Dir string // holds the files hosts, resolv.conf and hostname; of this task alone
	// Streams of the program: paths of FIFOs, of which somebody reads or writes the
	// other end for as long as the box is there. Stdin may be empty: no input. With
	// a terminal there is no Stderr.
	Stdin, Stdout, Stderr string
	// Blobs is a directory in memory with the contents of the task's secrets and
	// configs (BlobFile); empty: it has none.
	Blobs string
	// Cgroup is where the task's control group goes, below the hierarchy's root.
	Cgroup string
}

// BlobFile names the file of a task's secret or config, by its place in the spec.
func BlobFile(kind spec.BlobKind, i int) string { return fmt.Sprintf("%s-%d", kind, i) }

// BlobMount is a secret or a config in a task: a file, and where it goes.
type BlobMount struct{ File, Path string }

// BlobMounts are those of a task whose files are in dir.
func BlobMounts(t spec.TaskSpec, dir string) []BlobMount {
	var out []BlobMount
	for i, r := range t.Secrets {
		out = append(out, BlobMount{filepath.Join(dir, BlobFile(spec.KindSecret, i)), r.Path(spec.KindSecret, t.Image != "")})
	}
	for i, r := range t.Configs {
		out = append(out, BlobMount{filepath.Join(dir, BlobFile(spec.KindConfig, i)), r.Path(spec.KindConfig, t.Image != "")})
	}
	return out
}

// Outcome is how far the program of a box is.
type Outcome struct {
	PID     int // as the node numbers it; 0: ended
	Code    int // 128+N after signal N
	Err     string
	Started time.Time
	At      time.Time // of the end
}

// Executor runs programs in boxes. What it runs outlives it, and is found again
// by task ID. Calls for one task come one at a time, but for Wait, Exec and
// Signal; calls for different tasks at once.
type Executor interface {
	// Prepare fetches what Start will need, an image for instance, and returns
	// what the task is as far as that says: Spec with the image's own defaults
	// where the user said nothing. It tells of its progress in words for a person.
	Prepare(ctx context.Context, t Task, progress func(string)) (spec.TaskSpec, error)
	// Start runs the program and returns its pid. One that runs already is left as
	// it is. Its error is one line for a person; nothing is left behind with it.
	Start(ctx context.Context, b Box) (pid int, err error)
	// Wait returns when the program has ended: ErrNotFound when it is not there,
	// ErrUnavailable when that can't be said now.
	Wait(ctx context.Context, id string) (Outcome, error)
	// Signal signals the program, or with all every process of the task.
	Signal(ctx context.Context, id string, sig syscall.Signal, all bool) error
	// Resize is for a task with a terminal.
	Resize(ctx context.Context, id string, rows, cols uint16) error
	// CloseInput tells the program that no input follows.
	CloseInput(ctx context.Context, id string) error
	// Files has do see the files of a task whose program has ended, as they were for it, in
	// a directory, until the context that it gets ends: the task is started again.
	// ErrNotFound: they are not kept.
	Files(ctx context.Context, b Box, do func(ctx context.Context, root string) error) error
	// Release ends what runs, and keeps of a task that says so (Keep) the files that are
	// its own, for another Start. Absence is no error.
	Release(ctx context.Context, id string) error
	// Remove ends what runs and removes all that the executor made for the task.
	// Absence is no error.
	Remove(ctx context.Context, id string) error
	// Sweep clears away what an earlier process left half made that is of no task. It is
	// called once, when it can be.
	Sweep(ctx context.Context) error
	// List names the tasks of which something is there, so that what nobody knows
	// any more can be removed.
	List(ctx context.Context) ([]string, error)
}
