// Package container runs tasks from images, by containerd (its namespace is the
// agent's own) in sandboxes that the task's shim holds: the network namespace, the
// name server's sockets and the other ends of the program's streams are the
// shim's, everything else is containerd's and runc's.
//
// What it makes it labels, and names after the task: the container and its
// snapshot. So an agent finds again what an earlier one left, at whatever point
// that was killed, and Remove takes it away.
package container

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"

	"github.com/shoalnet/shoal/internal/proc"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/runtime/volume"
)

// DefaultAddress is containerd's socket where nothing else is said.
const DefaultAddress = "/run/containerd/containerd.sock"

// Config of an Executor.
type Config struct {
	Address   string // of containerd's socket
	Namespace string // of containerd; everything in it is this agent's
	Instance  string // labels what is made
	Node      string // of volumes and templates, for people
	// Snapshotter of containerd; empty: overlayfs.
	Snapshotter string
	// Runtime is containerd's name of what runs a container; empty: runc's.
	Runtime string
	RunDir  string         // FIFOs of exec; need not survive
	Volumes *volume.Store  // of the node
	Hidden  []string       // directories of the node that containers may not see
	Pull    RegistryConfig // where images come from
	Log     *slog.Logger
}

// Executor implements runtime.Executor.
type Executor struct {
	cfg Config
	log *slog.Logger

	began time.Time // what has a lease from before is half made

	mu     sync.Mutex
	client *client.Client
	looked map[string]*looking // by task, whose files are mounted for somebody

	pulls flights
}

// Labels of containers and images.
const (
	labelInstance = "net.shoal.instance"
	labelTask     = "net.shoal.task"
	labelBy       = "net.shoal.by"      // of an image: "task" when nobody asked for it but a task
	labelUsed     = "net.shoal.used"    // of an image: when a task last began, Unix seconds
	labelVolumes  = "net.shoal.volumes" // of a container: names of the volumes in it, by commas
	labelKeep     = "net.shoal.keep"    // of a container: its files stay when its program has ended
)

const (
	dialTimeout  = 5 * time.Second
	rpcTimeout   = 30 * time.Second // of calls that only look or change a record
	startTimeout = 2 * time.Minute  // of making and starting a container, on a busy disk
	defaultRun   = "io.containerd.runc.v2"
	// lease keeps what is half made from containerd's garbage collection; if the
	// agent is killed the next one ends it, or it ends by itself.
	leaseTime = time.Hour
)

// New makes an Executor. containerd need not answer yet, nor all the time.
func New(cfg Config) *Executor {
	if cfg.Snapshotter == "" {
		cfg.Snapshotter = "overlayfs"
	}
	if cfg.Runtime == "" {
		cfg.Runtime = defaultRun
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Pull.defaults()
	e := &Executor{cfg: cfg, log: cfg.Log, began: time.Now()}
	if err := e.ownMounts(); err != nil {
		e.log.Warn("what an earlier agent had mounted can't be cleared away", "error", err)
	}
	return e
}

// Close ends the connection. Containers go on.
func (e *Executor) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client == nil {
		return nil
	}
	err := e.client.Close()
	e.client = nil
	return err
}

// conn connects to containerd, or returns the connection that is there, with a
// context for calls over it.
func (e *Executor) conn(ctx context.Context) (*client.Client, context.Context, error) {
	ctx = namespaces.WithNamespace(ctx, e.cfg.Namespace)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client != nil {
		return e.client, ctx, nil
	}
	// Its own connecting tries for long where nobody listens.
	if fi, err := os.Stat(e.cfg.Address); err != nil || fi.Mode()&os.ModeSocket == 0 {
		return nil, ctx, fmt.Errorf("%w: containerd is not at %s: install it (Debian: apt-get install containerd runc), or name its socket with --containerd", runtime.ErrUnavailable, e.cfg.Address)
	}
	c, err := client.New(e.cfg.Address, client.WithDefaultNamespace(e.cfg.Namespace), client.WithTimeout(dialTimeout))
	if err != nil {
		return nil, ctx, fmt.Errorf("%w: containerd at %s: %w", runtime.ErrUnavailable, e.cfg.Address, err)
	}
	e.client = c
	return c, ctx, nil
}

// unavailable marks errors of a containerd that does not answer.
func (e *Executor) unavailable(err error) error {
	if err == nil {
		return nil
	}
	if errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "error reading from server") || strings.Contains(err.Error(), "transport is closing") {
		return fmt.Errorf("%w: containerd at %s does not answer: %w", runtime.ErrUnavailable, e.cfg.Address, err)
	}
	return err
}

// Health tells whether containers can run here: nil, or why not, in words for a
// person; and containerd's version.
func (e *Executor) Health(ctx context.Context) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return "", err
	}
	v, err := c.Version(ctx)
	if err != nil {
		return "", e.unavailable(err)
	}
	return "containerd " + strings.TrimPrefix(v.Version, "v"), nil
}

// How long what fails for want of containerd is tried again, and how often.
const (
	awayTime = 20 * time.Second
	awayPoll = 250 * time.Millisecond
)

// bundleExists is how containerd says that there is a directory of a container's task.
var bundleExists = regexp.MustCompile(`(/[^ ]*/io\.containerd\.runtime\.[^ ]*): file exists`)

// bundleTime is for how long such a directory may be that of a task that containerd is at
// making, for somebody who was killed meanwhile.
const bundleTime = 2 * time.Second

// clearBundle removes what is left of a task of ours in containerd's own directory, whose
// name is in err: a containerd that was killed while it removed that has made half of it
// hidden, and from then on never removes the directory, nor makes a task of that name. It
// leaves what a shim is still behind.
func (e *Executor) clearBundle(id string, err error) error {
	m := bundleExists.FindStringSubmatch(err.Error())
	if m == nil || m[1] != filepath.Clean(m[1]) || filepath.Base(m[1]) != id || filepath.Base(filepath.Dir(m[1])) != e.cfg.Namespace {
		return nil
	}
	bundle, hidden := m[1], filepath.Join(filepath.Dir(m[1]), "."+id)
	if _, err := os.Stat(hidden); err != nil {
		return nil // it is there for another reason, or not to be seen from here
	}
	pids, err := proc.PIDs()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		args := proc.Args(pid)
		if len(args) > 0 && strings.HasPrefix(filepath.Base(args[0]), "containerd-shim") && slices.Contains(args, id) && slices.Contains(args, e.cfg.Namespace) {
			return nil
		}
	}
	e.log.Info("clearing away what a containerd that was killed has left, and is in its way", "task", id, "directory", bundle)
	if err := mount.UnmountAll(filepath.Join(bundle, "rootfs"), 0); err != nil {
		return fmt.Errorf("unmount the root of a container that is gone: %w", err)
	}
	return errors.Join(os.RemoveAll(hidden), os.RemoveAll(bundle))
}

// persist calls fn again while containerd does not answer, as it does while it is started
// anew, or still makes what somebody asked for who was killed meanwhile; told hears of the
// first failure. Where there is no containerd at all nobody waits.
func (e *Executor) persist(ctx context.Context, told func(error), fn func() error) error {
	for end := time.Now().Add(awayTime); ; {
		err := fn()
		again := errors.Is(err, runtime.ErrUnavailable) || errdefs.IsAlreadyExists(err) || err != nil && bundleExists.MatchString(err.Error())
		if _, serr := os.Stat(e.cfg.Address); !again || serr != nil || time.Now().After(end) {
			return err
		}
		if told != nil {
			told(err)
			told = nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(awayPoll):
		}
	}
}

func (e *Executor) snapshotKey(id string) string { return "shoal-" + id }

func (e *Executor) load(ctx context.Context, id string) (client.Container, error) {
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return nil, err
	}
	ctr, err := c.LoadContainer(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("%w: container of task %s", runtime.ErrNotFound, id)
	}
	return ctr, e.unavailable(err)
}

func (e *Executor) task(ctx context.Context, id string) (client.Task, error) {
	ctr, err := e.load(ctx, id)
	if err != nil {
		return nil, err
	}
	t, err := ctr.Task(namespaces.WithNamespace(ctx, e.cfg.Namespace), nil)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("%w: program of task %s", runtime.ErrNotFound, id)
	}
	return t, e.unavailable(err)
}

// streams implements cio.IO over FIFOs whose other ends somebody else has.
type streams struct{ cfg cio.Config }

func (s streams) Config() cio.Config { return s.cfg }
func (streams) Cancel()              {}
func (streams) Wait()                {}
func (streams) Close() error         { return nil }

// StartError tells why a program did not start, and the exit status that shells
// and Docker give to that.
type StartError struct {
	Code int
	Err  error
}

func (e *StartError) Error() string { return e.Err.Error() }
func (e *StartError) Unwrap() error { return e.Err }

// ExitCode is 127 for a program that is not found, 126 for one that can't be
// executed, 125 for anything else.
func (e *StartError) ExitCode() int { return e.Code }

// startError makes runc's words ones for a person.
func startError(err error) error {
	if err == nil || errors.Is(err, runtime.ErrUnavailable) || errdefs.IsAlreadyExists(err) {
		return err // no matter of the program
	}
	msg := err.Error()
	for _, cut := range []string{"OCI runtime create failed: ", "OCI runtime exec failed: ", "OCI runtime start failed: ", "runc create failed: ", "unable to start container process: ", "error during container init: ",
		"exec failed: ", "failed to create shim task: ", "failed to start shim: "} {
		if i := strings.Index(msg, cut); i >= 0 {
			msg = msg[:i] + msg[i+len(cut):]
		}
	}
	msg = strings.TrimSuffix(strings.TrimSpace(msg), ": unknown")
	code := 125
	switch {
	case strings.Contains(msg, "executable file not found"), strings.Contains(msg, "no such file or directory") && strings.Contains(msg, "exec"):
		code = 127
	case strings.Contains(msg, "permission denied") && strings.Contains(msg, "exec"), strings.Contains(msg, "is a directory"), strings.Contains(msg, "exec format error"):
		code = 126
	}
	if code != 125 {
		msg += ": check the command"
	}
	return &StartError{Code: code, Err: errors.New(msg)}
}

// Start implements runtime.Executor.
func (e *Executor) Start(ctx context.Context, b runtime.Box) (pid int, err error) {
	began := time.Now()
	err = e.persist(ctx, func(err error) { e.log.Info("trying again to start a container", "task", b.Name, "error", err) }, func() error {
		if pid, err = e.start(ctx, b); err != nil && time.Since(began) > bundleTime {
			if cerr := e.clearBundle(b.ID, err); cerr != nil {
				err = fmt.Errorf("%w (and what is left of it can't be cleared away: %w)", err, cerr)
			}
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("node %s: image %s: %w", e.cfg.Node, shown(b.Spec.Image), err)
	}
	return pid, err
}

func (e *Executor) start(ctx context.Context, b runtime.Box) (_ int, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return 0, err
	}
	if t, err := e.task(ctx, b.ID); err == nil {
		st, err := t.Status(ctx)
		if err != nil {
			return 0, e.unavailable(err)
		}
		if st.Status == client.Running || st.Status == client.Stopped {
			return int(t.Pid()), nil // an earlier agent has started it; Wait tells how it ended
		}
	} else if !errors.Is(err, runtime.ErrNotFound) {
		return 0, err
	}
	kept, err := e.kept(ctx, c, b.ID)
	if err != nil {
		return 0, err
	}
	undo := e.Remove // whatever else is there was left half made
	if kept != nil {
		undo = func(ctx context.Context, _ string) error { return e.end(ctx, kept) }
	}
	if err := undo(ctx, b.ID); err != nil {
		return 0, err
	}
	// Nobody mounts anything in there while the program may change what is where.
	if err := e.lookAway(ctx, b.ID); err != nil {
		return 0, err
	}
	img, err := e.find(ctx, c, b.Spec.Image)
	if err != nil {
		return 0, fmt.Errorf("it is not there any more: %w", err)
	}
	ctx, done, err := e.lease(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { done(err != nil) }()
	defer func() {
		if err != nil {
			rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rpcTimeout)
			defer cancel()
			if rerr := undo(rctx, b.ID); rerr != nil {
				err = fmt.Errorf("%w (and not all of it could be undone: %w)", err, rerr)
			}
		}
	}()
	ok, err := img.IsUnpacked(ctx, e.cfg.Snapshotter)
	if err == nil && !ok {
		err = img.Unpack(ctx, e.cfg.Snapshotter)
	}
	if err != nil {
		return 0, fmt.Errorf("unpack it: %w", err)
	}
	mounts, vols, err := e.mounts(ctx, c, img, b)
	if err != nil {
		return 0, err
	}
	labels := map[string]string{labelInstance: e.cfg.Instance, labelTask: b.Name}
	if len(vols) > 0 {
		labels[labelVolumes] = strings.Join(vols, ",")
	}
	if b.Keep {
		labels[labelKeep] = "true"
	}
	ctr := kept
	if kept != nil {
		err = kept.Update(ctx, withSpec(labels, specOpts(b, img, mounts)))
	} else {
		ctr, err = c.NewContainer(ctx, b.ID,
			client.WithImage(img),
			client.WithContainerLabels(labels),
			client.WithSnapshotter(e.cfg.Snapshotter),
			client.WithNewSnapshot(e.snapshotKey(b.ID), img),
			client.WithRuntime(e.cfg.Runtime, nil),
			client.WithNewSpec(specOpts(b, img, mounts)...))
	}
	if err != nil {
		return 0, fmt.Errorf("make a container of it: %w", e.unavailable(err))
	}
	// The streams' other ends are the shim's; ours may come and go.
	t, err := ctr.NewTask(ctx, func(string) (cio.IO, error) {
		return streams{cio.Config{Terminal: b.Spec.TTY, Stdin: b.Stdin, Stdout: b.Stdout, Stderr: b.Stderr}}, nil
	})
	if err != nil {
		return 0, startError(e.unavailable(err))
	}
	if err := t.Start(ctx); err != nil {
		return 0, startError(e.unavailable(err))
	}
	return int(t.Pid()), nil
}

// kept is the container of a task that ran before and is to go on with its files; nil if
// there is none.
func (e *Executor) kept(ctx context.Context, c *client.Client, id string) (client.Container, error) {
	ctr, err := c.LoadContainer(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, e.unavailable(err)
	}
	labels, err := ctr.Labels(ctx)
	if err != nil {
		return nil, e.unavailable(err)
	}
	if labels[labelKeep] == "" {
		return nil, nil
	}
	switch _, err := c.SnapshotService(e.cfg.Snapshotter).Stat(ctx, e.snapshotKey(id)); {
	case errdefs.IsNotFound(err):
		return nil, nil // somebody has taken the files away
	case err != nil:
		return nil, e.unavailable(err)
	}
	return ctr, nil
}

// withSpec makes a container that there is one of other labels and another spec.
func withSpec(labels map[string]string, opts []oci.SpecOpts) client.UpdateContainerOpts {
	return func(ctx context.Context, c *client.Client, ctr *containers.Container) error {
		s, err := oci.GenerateSpec(ctx, c, ctr, opts...)
		if err != nil {
			return err
		}
		ctr.Labels = labels
		ctr.Spec, err = typeurl.MarshalAny(s)
		return err
	}
}

// Wait implements runtime.Executor.
func (e *Executor) Wait(ctx context.Context, id string) (runtime.Outcome, error) {
	t, err := e.task(ctx, id)
	if err != nil {
		return runtime.Outcome{}, err
	}
	ctx = namespaces.WithNamespace(ctx, e.cfg.Namespace)
	ch, err := t.Wait(ctx)
	if err != nil {
		return runtime.Outcome{}, e.unavailable(err)
	}
	select {
	case <-ctx.Done():
		return runtime.Outcome{}, ctx.Err()
	case st := <-ch:
		code, at, err := st.Result()
		if err != nil {
			if errdefs.IsNotFound(err) {
				return runtime.Outcome{}, fmt.Errorf("%w: program of task %s", runtime.ErrNotFound, id)
			}
			return runtime.Outcome{}, fmt.Errorf("%w: %w", runtime.ErrUnavailable, err)
		}
		return runtime.Outcome{Code: int(code), At: at}, nil
	}
}

// Signal implements runtime.Executor.
func (e *Executor) Signal(ctx context.Context, id string, sig syscall.Signal, all bool) error {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	t, err := e.task(ctx, id)
	if err != nil {
		return err
	}
	var opts []client.KillOpts
	if all {
		opts = append(opts, client.WithKillAll)
	}
	err = t.Kill(namespaces.WithNamespace(ctx, e.cfg.Namespace), sig, opts...)
	if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
		return nil // it has ended
	}
	return e.unavailable(err)
}

// Resize implements runtime.Executor.
func (e *Executor) Resize(ctx context.Context, id string, rows, cols uint16) error {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	t, err := e.task(ctx, id)
	if err != nil {
		return err
	}
	return e.unavailable(t.Resize(namespaces.WithNamespace(ctx, e.cfg.Namespace), uint32(cols), uint32(rows)))
}

// CloseInput implements runtime.Executor.
func (e *Executor) CloseInput(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	t, err := e.task(ctx, id)
	if errors.Is(err, runtime.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	err = t.CloseIO(namespaces.WithNamespace(ctx, e.cfg.Namespace), client.WithStdinCloser)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return e.unavailable(err)
}

// Release implements runtime.Executor.
func (e *Executor) Release(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return err
	}
	ctr, err := e.kept(ctx, c, id)
	if err != nil {
		return err
	}
	if ctr == nil {
		return e.Remove(ctx, id)
	}
	return e.end(ctx, ctr)
}

// end ends a container's program, and everything that it has started.
func (e *Executor) end(ctx context.Context, ctr client.Container) error {
	t, err := ctr.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		// It may be that its shim alone has forgotten it: whoever asked for its end before,
		// or containerd, was killed at it. To containerd the task is there then, and in the
		// way of the next, until it is asked for its end again.
		c, ctx, err := e.conn(ctx)
		if err != nil {
			return err
		}
		if _, err := c.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: ctr.ID()}); err != nil {
			if err := errgrpc.ToNative(err); !errdefs.IsNotFound(err) {
				return fmt.Errorf("end the shim of task %s: %w", ctr.ID(), e.unavailable(err))
			}
		}
		return nil
	}
	if err != nil {
		return e.unavailable(err)
	}
	// WithProcessKill waits for the end, too.
	if _, err := t.Delete(ctx, client.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("end the container of task %s: %w", ctr.ID(), e.unavailable(err))
	}
	return nil
}

// Remove implements runtime.Executor.
func (e *Executor) Remove(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return err
	}
	anonymous, err := e.volumesOf(id)
	if err != nil {
		return err
	}
	ctr, err := c.LoadContainer(ctx, id)
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return e.unavailable(err)
	default:
		if labels, err := ctr.Labels(ctx); err == nil { // those of earlier versions
			anonymous = append(anonymous, volumeNames(labels)...)
		}
		if err := e.end(ctx, ctr); err != nil {
			return err
		}
		if img, err := ctr.Image(ctx); err == nil {
			e.used(ctx, c, img)
		}
		if err := ctr.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove the container of task %s: %w", id, e.unavailable(err))
		}
	}
	if err := c.SnapshotService(e.cfg.Snapshotter).Remove(ctx, e.snapshotKey(id)); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove the file system of task %s: %w", id, e.unavailable(err))
	}
	for _, name := range anonymous {
		if v, err := e.cfg.Volumes.Get(name); err == nil && v.Anonymous {
			if err := e.cfg.Volumes.Remove(name); err != nil && !errors.Is(err, volume.ErrNotFound) {
				return err
			}
		}
	}
	return nil
}

// lease keeps what is made with the context that it returns until done is called, which
// with failed has what is half made removed at once: a disk may be full of it.
func (e *Executor) lease(ctx context.Context) (_ context.Context, done func(failed bool), err error) {
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return ctx, nil, err
	}
	l, err := c.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseTime), leases.WithLabel(labelInstance, e.cfg.Instance))
	if err != nil {
		return ctx, nil, e.unavailable(err)
	}
	return leases.WithLease(ctx, l.ID), func(failed bool) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rpcTimeout)
		defer cancel()
		var opts []leases.DeleteOpt
		if failed {
			opts = append(opts, leases.SynchronousDelete)
		}
		if err := c.LeasesService().Delete(ctx, l, opts...); err != nil {
			e.log.Debug("a lease can't be ended: it ends by itself", "lease", l.ID, "error", err)
		}
	}, nil
}

// Sweep implements runtime.Executor: it removes the leases of an earlier agent that was
// killed while it fetched an image or made a container, and with them what they kept
// from containerd's garbage collection.
func (e *Executor) Sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return err
	}
	all, err := c.LeasesService().List(ctx)
	if err != nil {
		return e.unavailable(err)
	}
	for _, l := range all {
		if !l.CreatedAt.Before(e.began) {
			continue
		}
		e.log.Info("clearing away what was half made", "lease", l.ID, "since", l.CreatedAt)
		if err := c.LeasesService().Delete(ctx, l, leases.SynchronousDelete); err != nil && !errdefs.IsNotFound(err) {
			return e.unavailable(err)
		}
	}
	return nil
}

func volumeNames(labels map[string]string) []string {
	if labels[labelVolumes] == "" {
		return nil
	}
	return strings.Split(labels[labelVolumes], ",")
}

// List implements runtime.Executor.
func (e *Executor) List(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return nil, err
	}
	ours := map[string]bool{}
	cs, err := c.ContainerService().List(ctx, fmt.Sprintf("labels.%q==%q", labelInstance, e.cfg.Instance))
	if err != nil {
		return nil, e.unavailable(err)
	}
	for _, x := range cs {
		ours[x.ID] = true
	}
	prefix := e.snapshotKey("")
	err = c.SnapshotService(e.cfg.Snapshotter).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if id, ok := strings.CutPrefix(i.Name, prefix); ok && i.Kind == snapshots.KindActive {
			ours[id] = true
		}
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, e.unavailable(err)
	}
	if e.cfg.Volumes != nil {
		vs, err := e.cfg.Volumes.List()
		if err != nil {
			return nil, err
		}
		for _, v := range vs {
			if v.Task != "" {
				ours[v.Task] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(ours)), nil
}

// volumesOf names the volumes that were made for a task alone.
func (e *Executor) volumesOf(task string) (out []string, err error) {
	if e.cfg.Volumes == nil {
		return nil, nil
	}
	vs, err := e.cfg.Volumes.List()
	for _, v := range vs {
		if v.Task == task {
			out = append(out, v.Name)
		}
	}
	return out, err
}

// VolumesInUse tells which volumes are in a container, and in whose.
func (e *Executor) VolumesInUse(ctx context.Context) (map[string][]string, error) {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return nil, err
	}
	cs, err := c.ContainerService().List(ctx, fmt.Sprintf("labels.%q==%q", labelInstance, e.cfg.Instance))
	if err != nil {
		return nil, e.unavailable(err)
	}
	out := map[string][]string{}
	for _, x := range cs {
		for _, v := range volumeNames(x.Labels) {
			out[v] = append(out[v], x.Labels[labelTask])
		}
	}
	return out, nil
}

// ownMounts has what is mounted for a moment (populate) be below RunDir, which
// tasks don't see, and unmounts what an earlier agent had there when it was killed.
func (e *Executor) ownMounts() error {
	if err := mount.SetTempMountLocation(filepath.Join(e.cfg.RunDir, "mounts")); err != nil {
		return err
	}
	warnings, err := mount.CleanupTempMounts(0)
	return errors.Join(append(warnings, err)...)
}

var _ runtime.Executor = (*Executor)(nil)
