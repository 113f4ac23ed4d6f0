package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/dns"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// TestMain looks for goroutines left behind.
func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		var err error
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if err = goleak.Find(); err == nil {
				break
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left behind:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// bench is a node's runners between a fake runtime and a fake rest of the agent,
// which both write what happens into one trace, a line each.
type bench struct {
	*tasks
	t      *testing.T
	cancel context.CancelFunc

	bmu      sync.Mutex
	trace    []string
	said     map[string]string        // by task: what publish last found
	have     map[string]*fakeTask     // of the runtime
	gates    map[string]chan struct{} // by trace line: it waits there until this is closed
	fails    map[string]error         // by trace line: what it returns
	hosts    map[string]bool          // networks that are the node's own
	others   bool                     // other replicas take connections
	deserted atomic.Bool              // by the managers
	delay    time.Duration            // that the service has its replicas wait
}

type fakeTask struct {
	runtime.Status
	released  bool
	listening bool
	opening   int // so many sockets are still to be opened, one between two looks
	maybe     []uint16
	looks     int    // at whether it listens
	sick      string // what the health check says; "": it passes
	hosts     string // its own name and addresses in its hosts file
}

// newBench makes one; have is what the runtime still has of an earlier agent.
func newBench(t *testing.T, have ...runtime.Status) *bench {
	ctx, cancel := context.WithCancel(context.Background())
	b := &bench{t: t, cancel: cancel, said: map[string]string{}, have: map[string]*fakeTask{}, gates: map[string]chan struct{}{}, fails: map[string]error{}, hosts: map[string]bool{}}
	log := slog.New(slog.DiscardHandler)
	b.tasks = &tasks{rt: b, plumbing: b, instance: "shoal", search: func() []string { return nil }, log: log, runners: map[string]*runner{},
		dns: dns.NewServer(dns.Config{Upstreams: func() []netip.AddrPort { return nil }, Log: log})}
	b.begin(ctx)
	for _, s := range have {
		b.have[s.ID] = &fakeTask{Status: s}
	}
	t.Cleanup(func() {
		cancel()
		b.wait()
	})
	return b
}

// do notes one step, and does what the test wants of it.
func (b *bench) do(ctx context.Context, line string) error {
	b.bmu.Lock()
	b.trace = append(b.trace, line)
	gate, err := b.gates[line], b.fails[line]
	b.bmu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err != nil {
		return err
	}
	return ctx.Err()
}

// gate makes a step wait; call what it returns to let it go on.
func (b *bench) gate(line string) (open func()) {
	ch := make(chan struct{})
	b.bmu.Lock()
	b.gates[line] = ch
	b.bmu.Unlock()
	return sync.OnceFunc(func() { close(ch) })
}

func (b *bench) fail(line string, err error) {
	b.bmu.Lock()
	b.fails[line] = err
	b.bmu.Unlock()
}

func (b *bench) lines() []string {
	b.bmu.Lock()
	defer b.bmu.Unlock()
	return slices.Clone(b.trace)
}

func (b *bench) forget() {
	b.bmu.Lock()
	b.trace = nil
	b.bmu.Unlock()
}

// await waits for a line of the trace.
func (b *bench) await(line string) {
	b.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if slices.Contains(b.lines(), line) {
			return
		}
	}
	b.t.Fatalf("%q does not happen. What does:\n%s", line, strings.Join(b.lines(), "\n"))
}

// expect waits for the last of the lines and compares all.
func (b *bench) expect(lines ...string) {
	b.t.Helper()
	b.await(lines[len(lines)-1])
	if got := b.lines(); !slices.Equal(got, lines) {
		b.t.Errorf("what happens:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(lines, "\n"))
	}
}

// never fails when one of the steps happened.
func (b *bench) never(lines ...string) {
	b.t.Helper()
	for _, l := range lines {
		if slices.Contains(b.lines(), l) {
			b.t.Errorf("%q happened:\n%s", l, strings.Join(b.lines(), "\n"))
		}
	}
}

// ---- plumbing ----

// publish notes what is new in what the runners say.
func (b *bench) publish() {
	eps, sts := map[string][]string{}, b.statuses()
	for _, e := range b.endpoints() {
		eps[e.Task] = append(eps[e.Task], e.Network+" "+e.State.String())
	}
	b.bmu.Lock()
	defer b.bmu.Unlock()
	now := map[string]string{}
	say := func(key, v string) {
		if now[key] = v; b.said[key] != v {
			b.trace = append(b.trace, strings.TrimSpace(key+": "+v))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(sts)) {
		st := sts[id]
		text := ""
		if st.At != 0 {
			text = strings.TrimSpace(st.State.String() + " " + st.Message)
		}
		if st.Released {
			text += " released"
		}
		if st.Wired != 0 {
			text += fmt.Sprintf(" wired %d", st.Wired)
		}
		say(id, text)
		say(id+" endpoint", strings.Join(eps[id], ", "))
	}
	for _, id := range slices.Sorted(maps.Keys(b.said)) {
		if _, ok := now[id]; !ok && !strings.HasSuffix(id, "endpoint") {
			b.trace = append(b.trace, id+" gone")
		}
	}
	b.said = now
}

func (b *bench) wired(ctx context.Context, t spec.Task) error { return b.do(ctx, "wired "+t.ID) }

func (b *bench) served(spec.Task) bool { return b.others }

func (b *bench) alone(spec.Task, spec.TaskStatus) (time.Duration, bool) {
	return b.delay, b.deserted.Load()
}

func (b *bench) settled(ctx context.Context) error { return b.do(ctx, "settled") }

func (b *bench) blobs(_ context.Context, ids []string) (out [][]byte, err error) {
	for _, id := range ids {
		out = append(out, []byte(id))
	}
	return out, nil
}

func (b *bench) templateContext(t spec.Task) (spec.TemplateContext, error) {
	return spec.NewTemplateContext(spec.Service{ID: t.Service}, spec.Node{Name: "here"}, t), nil
}

func (b *bench) network(id string) (spec.Network, bool) {
	if b.hosts[id] {
		return spec.Network{ID: id, Driver: spec.DriverHost}, true
	}
	return spec.Network{ID: id, Driver: spec.DriverOverlay}, true
}

// ---- runtime ----

func (b *bench) task(id string, fn func(*fakeTask)) error {
	b.bmu.Lock()
	defer b.bmu.Unlock()
	t := b.have[id]
	if t == nil {
		return runtime.ErrNotFound
	}
	fn(t)
	return nil
}

func (b *bench) Prepare(_ context.Context, t runtime.Task, _ func(string)) (spec.TaskSpec, error) {
	return t.Spec, nil
}

func (b *bench) Create(ctx context.Context, t runtime.Task) (runtime.Sandbox, error) {
	if err := b.do(ctx, "create "+t.ID); err != nil {
		return runtime.Sandbox{}, err
	}
	sb := runtime.Sandbox{Netns: t.Netns, DNSPort: 53}
	b.bmu.Lock()
	defer b.bmu.Unlock()
	if b.have[t.ID] != nil {
		b.t.Errorf("task %s is created twice", t.ID)
	}
	b.have[t.ID] = &fakeTask{Status: runtime.Status{ID: t.ID, Name: t.Name, State: runtime.Created, Sandbox: sb, Data: t.Data}}
	return sb, nil
}

func (b *bench) Start(ctx context.Context, id string) error {
	if err := b.do(ctx, "start "+id); err != nil {
		return err
	}
	return b.task(id, func(t *fakeTask) {
		if t.State != runtime.Created {
			b.t.Errorf("task %s is started while it is %s", id, t.State)
		}
		t.State, t.PID = runtime.Running, 4711
	})
}

// exit ends a program by itself.
func (b *bench) exit(id string, code int, err string) {
	if e := b.task(id, func(t *fakeTask) { t.State, t.ExitCode, t.Err, t.PID = runtime.Exited, code, err, 0 }); e != nil {
		b.t.Error(e)
	}
	b.event(id)
}

func (b *bench) Stop(ctx context.Context, id, signal string, grace time.Duration) error {
	if err := b.do(ctx, fmt.Sprintf("stop %s %s %s", id, signal, grace)); err != nil {
		return err
	}
	return b.task(id, func(t *fakeTask) {
		if t.State == runtime.Running {
			t.ExitCode = 143
		}
		t.State, t.PID = runtime.Exited, 0
	})
}

func (b *bench) Halt(ctx context.Context, id, signal string, grace time.Duration) error {
	return b.do(ctx, fmt.Sprintf("halt %s %s %s", id, signal, grace))
}

func (b *bench) Release(ctx context.Context, id string) error {
	if err := b.do(ctx, "release "+id); err != nil {
		return err
	}
	_ = b.task(id, func(t *fakeTask) { t.released = true })
	return nil
}

func (b *bench) Renew(ctx context.Context, id string) error {
	if err := b.do(ctx, "renew "+id); err != nil {
		return err
	}
	b.bmu.Lock()
	defer b.bmu.Unlock()
	if t := b.have[id]; t != nil && !t.released {
		b.t.Errorf("task %s is made anew before it was released", id)
	}
	delete(b.have, id)
	return nil
}

func (b *bench) Remove(ctx context.Context, id string) error {
	if err := b.do(ctx, "remove "+id); err != nil {
		return err
	}
	b.bmu.Lock()
	delete(b.have, id)
	b.bmu.Unlock()
	return nil
}

func (b *bench) List(ctx context.Context) ([]runtime.Status, error) {
	b.bmu.Lock()
	defer b.bmu.Unlock()
	var out []runtime.Status
	for _, id := range slices.Sorted(maps.Keys(b.have)) {
		out = append(out, b.have[id].Status)
	}
	return out, b.fails["list"]
}

func (b *bench) Status(_ context.Context, id string) (st runtime.Status, err error) {
	err = b.task(id, func(t *fakeTask) { st = t.Status })
	return st, err
}

func (b *bench) DNSSockets(ctx context.Context, id string) (net.PacketConn, net.Listener, error) {
	if err := b.do(ctx, "dns "+id); err != nil {
		return nil, nil, err
	}
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		pc.Close()
		return nil, nil, err
	}
	return pc, ln, nil
}

func (b *bench) SetHosts(_ context.Context, id, name string, addrs []netip.Addr) error {
	return b.task(id, func(t *fakeTask) { t.hosts = fmt.Sprint(name, " ", addrs) })
}

// hostsFile is what a task's hosts file says of itself.
func (b *bench) hostsFile(id string) (s string) {
	_ = b.task(id, func(f *fakeTask) { s = f.hosts })
	return s
}

func (b *bench) Signal(_ context.Context, id, signal string) error {
	return b.do(context.Background(), "signal "+id+" "+signal)
}

func (b *bench) Usage(context.Context, string) (runtime.Usage, error) {
	return runtime.Usage{}, os.ErrNotExist
}
func (b *bench) Reset(ctx context.Context, id string, addrs []netip.Addr) error {
	return b.do(ctx, fmt.Sprint("reset ", id, " ", addrs))
}

func (b *bench) Faults() map[string]string { return nil }

func (b *bench) Listening(_ context.Context, id string, all bool) (up runtime.Sockets, err error) {
	err = b.task(id, func(t *fakeTask) {
		t.looks++
		up = runtime.Sockets{Maybe: t.maybe}
		if t.listening {
			up.Serves = 1
		}
		if all && t.opening > 0 {
			t.opening--
			up.Serves += t.opening
		}
	})
	return up, err
}

func (b *bench) Events(context.Context) <-chan runtime.Event { return nil }

func (b *bench) Attach(context.Context, string, runtime.AttachSpec) (runtime.Process, error) {
	return nil, errors.New("no attach")
}

// Exec runs nothing but health checks.
func (b *bench) Exec(_ context.Context, id string, s runtime.ExecSpec) (p runtime.Process, err error) {
	if err := b.task(id, func(t *fakeTask) {
		if t.State != runtime.Running {
			err = errors.New("not running")
		}
		p = checked{t.sick != ""}
		_, _ = io.WriteString(s.Stdout, t.sick)
	}); err != nil {
		return nil, err
	}
	return p, err
}

// checked is a health check that has ended.
type checked struct{ failed bool }

func (c checked) Wait() (int, error) {
	if c.failed {
		return 1, nil
	}
	return 0, nil
}
func (checked) Resize(uint16, uint16) error { return nil }
func (checked) Signal(int) error            { return nil }

func (b *bench) Copy(context.Context, string, runtime.CopySpec) error { return errors.New("no copy") }

func (b *bench) Logs(context.Context, string, runtime.LogOptions) iter.Seq2[runtime.LogLine, error] {
	return func(func(runtime.LogLine, error) bool) {}
}

func (b *bench) Close() error { return nil }

// ---- tasks ----

// newTask is a task of node n1 on network app.
func newTask(id string, change ...func(*spec.Task)) spec.Task {
	t := spec.Task{ID: id, Name: id, Node: "n1", Desired: spec.DesiredRunning, Spec: spec.TaskSpec{Command: []string{"x"}},
		Attachments: []spec.Attachment{{Network: "app", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.5")}, Iface: "eth0"}}}
	for _, c := range change {
		c(&t)
	}
	return t
}

func unwantedTask(t spec.Task) spec.Task {
	t.Desired = spec.DesiredShutdown
	return t
}

// found is what a runtime still has of a task.
func found(t spec.Task, state runtime.State, code int) runtime.Status {
	st := runtime.Status{ID: t.ID, Name: t.Name, State: state, ExitCode: code, Sandbox: runtime.Sandbox{Netns: "shoal-task-" + t.ID, DNSPort: 53}, Data: encodeTask(t)}
	if state == runtime.Running {
		st.PID = 4711
	}
	return st
}

func (b *bench) give(fresh bool, ts ...spec.Task) { b.assign("n1", ts, fresh) }

// up are the steps of a task until it runs.
var up = []string{"t1: preparing", "create t1", "dns t1", "t1 endpoint: app starting", "wired t1", "settled", "t1: starting", "start t1", "t1 endpoint: app active", "settled", "t1: running"}

// TestRestartPolicy: a task of its own is started again in its place, for as long as its
// policy and the user have it; the managers hear that it is made anew, not that it ended.
func TestRestartPolicy(t *testing.T) {
	restarting := func(policy string) spec.Task {
		return newTask("t1", func(t *spec.Task) { t.Spec.Restart, t.Spec.Attach = policy, true })
	}
	t.Run("until its attempts are used up", func(t *testing.T) {
		b := newBench(t)
		b.give(true, restarting("on-failure:1"))
		b.await("t1: running")
		b.forget()
		b.exit("t1", 3, "")
		b.expect(append([]string{"t1 endpoint:", "t1: preparing exit status 3; restart 1 in 100ms", "release t1", "renew t1"}, up...)...)
		_ = b.task("t1", func(f *fakeTask) {
			var kept spec.Task
			if err := json.Unmarshal(f.Data, &kept); err != nil || kept.Attempt != 1 || kept.Spec.Attach {
				t.Errorf("the next agent finds %+v, %v", kept, err)
			}
		})
		b.forget()
		b.exit("t1", 4, "")
		b.expect("t1 endpoint:", "t1: failed exit status 4", "release t1", "t1: failed exit status 4 released")
	})
	t.Run("not after success", func(t *testing.T) {
		b := newBench(t)
		b.give(true, restarting("on-failure"))
		b.await("t1: running")
		b.exit("t1", 0, "")
		b.await("t1: complete released")
		b.never("renew t1")
	})
	t.Run("not when it is stopped", func(t *testing.T) {
		b := newBench(t)
		b.give(true, restarting("always"))
		b.await("t1: running")
		b.give(true, unwantedTask(restarting("always")))
		b.await("t1: shutdown released")
		b.never("renew t1")
	})
	t.Run("not when it is stopped while it waits", func(t *testing.T) {
		b := newBench(t)
		open := b.gate("release t1")
		b.give(true, restarting("always"))
		b.await("t1: running")
		b.exit("t1", 0, "")
		b.await("release t1")
		b.give(true, unwantedTask(restarting("always")))
		open()
		b.await("t1: shutdown stopped before it started again released")
		if n := strings.Count(strings.Join(b.lines(), "\n"), "create t1"); n != 1 {
			t.Errorf("created %d times", n)
		}
	})
	t.Run("also when it can't be made", func(t *testing.T) {
		b := newBench(t)
		b.fail("create t1", errors.New("the disk is full"))
		b.give(true, restarting("always"))
		b.await("t1: failed the disk is full released") // whoever wants it is told
		b = newBench(t)
		b.give(true, restarting("on-failure:3"))
		b.await("t1: running")
		b.fail("create t1", errors.New("the disk is full"))
		b.exit("t1", 1, "")
		b.await("t1: preparing the disk is full; restart 2 in 200ms")
		b.fail("create t1", nil)
		b.forget()
		b.await("t1: running")
		b.fail("start t1", errors.New("no such program"))
		b.exit("t1", 1, "")
		b.await("t1: failed no such program released") // that was the last attempt
	})
	t.Run("also when the disk takes nothing", func(t *testing.T) {
		b := newBench(t)
		b.give(true, restarting("always"))
		b.await("t1: running")
		b.fail("renew t1", errors.New("read-only file system"))
		b.exit("t1", 1, "")
		b.await("t1: preparing read-only file system; tried again in 200ms")
		b.forget()
		b.fail("renew t1", nil)
		b.await("t1: running")
	})
	t.Run("after a reboot", func(t *testing.T) {
		b := newBench(t, found(restarting("unless-stopped"), runtime.Exited, 137))
		if err := b.adopt(b.ctx, nil); err != nil {
			t.Fatal(err)
		}
		b.await("renew t1")
		b.await("t1: running")
	})
}

// TestStartOnRequest: a further run that the managers ask for is made when the one before
// has ended, under its name and addresses, whatever state the task is in.
func TestStartOnRequest(t *testing.T) {
	second := func(change ...func(*spec.Task)) spec.Task {
		n := newTask("t1", change...)
		n.Run, n.Status = 1, spec.TaskStatus{State: spec.TaskAssigned, Run: 1}
		return n
	}
	elsewhere := func(t *spec.Task) { t.Attachments[0].Addrs = []netip.Addr{netip.MustParseAddr("10.0.0.9")} }
	runOf := func(b *bench) int { return b.statuses()["t1"].Run }
	t.Run("of one that was stopped", func(t *testing.T) {
		b := newBench(t)
		b.give(true, newTask("t1"))
		b.await("t1: running")
		b.give(true, unwantedTask(newTask("t1")))
		b.await("t1: shutdown released")
		b.forget()
		b.give(true, second(elsewhere, func(t *spec.Task) { t.Name = "t2" }))
		b.await("t1: running")
		if got := b.endpoints(); runOf(b) != 1 || len(got) != 1 || got[0].Addrs[0].String() != "10.0.0.9" || got[0].TaskName != "t2" {
			t.Errorf("run %d with %+v", runOf(b), got)
		}
		// The same again is nothing new, and it is stopped as any other.
		b.give(true, second(elsewhere, func(t *spec.Task) { t.Name = "t2" }))
		b.give(true, unwantedTask(second(elsewhere)))
		b.await("t1: shutdown released")
		if n := strings.Count(strings.Join(b.lines(), "\n"), "create t1"); n != 1 {
			t.Errorf("created %d times", n)
		}
	})
	t.Run("of one that runs", func(t *testing.T) {
		b := newBench(t)
		b.give(true, newTask("t1", func(t *spec.Task) { t.Spec.Restart = "always" }))
		b.await("t1: running")
		b.forget()
		grace := 3 * time.Second
		b.give(true, second(func(t *spec.Task) { t.Stopping = &spec.Stopping{Signal: "INT", Grace: &grace} }))
		b.await("stop t1 INT 3s")
		b.await("renew t1")
		b.await("t1: running")
		if runOf(b) != 1 {
			t.Errorf("run %d", runOf(b))
		}
	})
	t.Run("of one that is being made", func(t *testing.T) {
		b := newBench(t)
		open := b.gate("wired t1")
		b.give(true, newTask("t1"))
		b.await("wired t1")
		b.give(true, second())
		open()
		b.await("renew t1")
		b.await("t1: running")
	})
	t.Run("of one that an agent before stopped", func(t *testing.T) {
		b := newBench(t, found(unwantedTask(newTask("t1")), runtime.Exited, 0))
		if err := b.adopt(b.ctx, nil); err != nil {
			t.Fatal(err)
		}
		b.give(true, second())
		b.await("renew t1")
		b.await("t1: running")
	})
	t.Run("of one that can't be made anew", func(t *testing.T) {
		b := newBench(t)
		b.give(true, newTask("t1"))
		b.await("t1: running")
		b.fails["renew t1"] = errors.New("no room")
		b.give(true, second())
		b.await("t1: failed no room released")
		if runOf(b) != 1 {
			t.Errorf("run %d", runOf(b))
		}
	})
	t.Run("of one that has another name", func(t *testing.T) {
		b := newBench(t)
		b.give(true, newTask("t1"))
		b.await("t1: running")
		b.give(true, newTask("t1", func(t *spec.Task) { t.Name = "t2" }))
		for end := time.Now().Add(10 * time.Second); b.hostsFile("t1") != "t2 [10.0.0.5]"; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("hosts file: %s", b.hostsFile("t1"))
			}
		}
		if got := b.endpoints(); got[0].TaskName != "t2" || b.runners["t1"].asker.Load().Netns != "shoal-task-t1" {
			t.Errorf("%+v, asks from %s", got, b.runners["t1"].asker.Load().Netns)
		}
	})
}

// TestAReplicaIsStartedAgainByItsNode when no manager is there to have it replaced.
func TestAReplicaIsStartedAgainByItsNode(t *testing.T) {
	b := newBench(t)
	b.give(true, replica(nil))
	b.await("start t1")
	b.listens("t1", true)
	b.await("t1: running")
	b.exit("t1", 1, "")
	b.await("t1: failed exit status 1 released")
	b.forget()
	b.delay = 300 * time.Millisecond
	b.deserted.Store(true)
	b.await("t1: preparing exit status 1; restart 1 in 300ms")
	b.await("create t1")
	b.await("start t1")
	b.deserted.Store(false)
	b.listens("t1", true)
	b.await("t1: running")
	b.await("t1 endpoint: app active")
	// The managers are back, and have replaced it.
	b.give(true, unwantedTask(replica(nil)))
	b.await("t1: shutdown released")
}

// TestAReplicaIsNotStartedAgain that the managers, who are back, have replaced meanwhile:
// they hear that its addresses are free.
func TestAReplicaIsNotStartedAgain(t *testing.T) {
	b := newBench(t)
	b.give(true, replica(nil))
	b.await("start t1")
	b.exit("t1", 1, "")
	b.await("t1: failed exit status 1 released")
	b.forget()
	open := b.gate("renew t1")
	b.deserted.Store(true)
	b.await("renew t1")
	b.give(true, unwantedTask(replica(nil)))
	open()
	b.await("t1: shutdown stopped before it started again released")
	b.never("create t1")
}

func TestTaskUpAndDown(t *testing.T) {
	b := newBench(t)
	task := newTask("t1", func(t *spec.Task) { t.Spec.StopSignal, t.Spec.StopGrace = "SIGINT", 3*time.Second })
	b.give(true, task)
	b.expect(up...)
	if sb, _ := b.sandboxes(); len(sb) != 1 || sb[0].Netns != "shoal-task-t1" || sb[0].DNSPort != 53 || len(sb[0].Attachments) != 1 {
		t.Errorf("sandboxes %+v", sb)
	}
	if st := b.statuses()["t1"]; st.PID != 4711 {
		t.Errorf("status %+v", st)
	}
	if _, st, ok := b.find("t1"); !ok || st.State != spec.TaskRunning {
		t.Errorf("found %v, %v", st, ok)
	}

	b.forget()
	b.give(true, unwantedTask(task))
	b.expect("t1 endpoint: app draining", "t1: stopping draining", "settled", "t1: stopping", "stop t1 SIGINT 3s",
		"t1 endpoint:", "t1: shutdown", "release t1", "t1: shutdown released")
	if sb, _ := b.sandboxes(); len(sb) != 0 {
		t.Errorf("sandboxes %+v", sb)
	}
	if st := b.statuses()["t1"]; st.PID != 0 || st.ExitCode != 143 {
		t.Errorf("status %+v", st)
	}
	// Its output stays until the managers forget it.
	b.forget()
	b.give(true)
	b.expect("remove t1", "t1 gone")
	if _, _, ok := b.find("t1"); ok {
		t.Error("it is still there")
	}
}

// TestTaskOfServiceWaitsUntilItListens: a replica takes traffic when it can
// answer.
func TestTaskOfServiceWaitsUntilItListens(t *testing.T) {
	b := newBench(t)
	b.give(true, newTask("t1", func(t *spec.Task) { t.Service, t.Slot = "web", 1 }))
	b.await("start t1")
	b.never("t1 endpoint: app active", "t1: running")
	_ = b.task("t1", func(t *fakeTask) { t.listening = true })
	b.expect(up...)
}

func TestTaskOnTheHostNetwork(t *testing.T) {
	b := newBench(t)
	b.hosts["host"] = true
	b.give(true, newTask("t1", func(t *spec.Task) { t.Attachments = []spec.Attachment{{Network: "host"}} }))
	b.expect("t1: preparing", "create t1", "wired t1", "settled", "t1: starting", "start t1", "settled", "t1: running")
	if sb, _ := b.sandboxes(); len(sb) != 0 {
		t.Errorf("sandboxes %+v", sb)
	}
}

func TestProgramExits(t *testing.T) {
	for _, k := range []struct {
		name string
		code int
		err  string
		want string
	}{
		{"in order", 0, "", "t1: complete"},
		{"with a status", 3, "", "t1: failed exit status 3"},
		{"for another reason", 0, "the shim was killed", "t1: failed the shim was killed"},
	} {
		t.Run(k.name, func(t *testing.T) {
			b := newBench(t)
			b.give(true, newTask("t1"))
			b.await("t1: running")
			b.forget()
			b.exit("t1", k.code, k.err)
			b.expect("t1 endpoint:", k.want, "release t1", k.want+" released")
			if st := b.statuses()["t1"]; st.ExitCode != k.code || st.PID != 0 {
				t.Errorf("status %+v", st)
			}
		})
	}
}

// TestTaskCantStart: whatever step fails, the task has failed, says why, and
// holds nothing.
func TestTaskCantStart(t *testing.T) {
	boom := errors.New("boom")
	for _, k := range []struct {
		step string
		err  string
		want []string // from the step on
	}{
		{"create t1", "boom", nil},
		{"dns t1", "name server of task t1: boom", nil},
		{"wired t1", "boom", []string{"t1 endpoint:"}},
		{"start t1", "boom", []string{"t1 endpoint:"}},
	} {
		t.Run(k.step, func(t *testing.T) {
			b := newBench(t)
			b.fail(k.step, boom)
			b.give(true, newTask("t1"))
			i := slices.Index(up, k.step)
			want := append(slices.Clone(up[:i+1]), "t1: failed "+k.err)
			want = append(append(want, k.want...), "release t1", "t1: failed "+k.err+" released")
			b.expect(want...)
			if sb, _ := b.sandboxes(); len(sb) != 0 || len(b.endpoints()) != 0 {
				t.Errorf("left: %v %v", sb, b.endpoints())
			}
		})
	}
}

// TestNotEveryoneSettles: others that don't answer hold up nobody.
func TestNotEveryoneSettles(t *testing.T) {
	b := newBench(t)
	b.fail("settled", errors.New("node n9 does not answer"))
	b.give(true, newTask("t1"))
	b.expect(up...)
	b.give(true, unwantedTask(newTask("t1")))
	b.await("t1: shutdown released")
}

// TestUnwantedBeforeItStarted: a program that is not wanted any more is not
// started, wherever its task is on its way up.
func TestUnwantedBeforeItStarted(t *testing.T) {
	task := newTask("t1")
	for _, step := range []string{"create t1", "dns t1", "wired t1", "settled"} {
		t.Run(step, func(t *testing.T) {
			b := newBench(t)
			open := b.gate(step)
			defer open()
			b.give(true, task)
			b.await(step)
			b.give(true, unwantedTask(task))
			if step == "create t1" || step == "dns t1" {
				open() // short steps, which are not broken off
			}
			b.await("t1: shutdown stopped before it started released")
			b.never("start t1")
		})
	}
	t.Run("in its restart delay", func(t *testing.T) {
		b := newBench(t)
		later := newTask("t1", func(t *spec.Task) { t.NotBefore = time.Now().Add(time.Hour).UnixMilli() })
		b.give(true, later)
		b.await("settled")
		b.give(true, unwantedTask(later))
		b.await("t1: shutdown stopped before it started released")
		b.never("start t1")
	})
	t.Run("from the beginning", func(t *testing.T) {
		b := newBench(t)
		b.give(true, unwantedTask(task))
		b.expect("t1: shutdown stopped before it started", "release t1", "t1: shutdown stopped before it started released")
	})
	t.Run("while it does not listen", func(t *testing.T) {
		b := newBench(t)
		deaf := newTask("t1", func(t *spec.Task) { t.Service = "web" })
		b.give(true, deaf)
		b.await("start t1")
		b.give(true, unwantedTask(deaf))
		b.await("t1: shutdown released")
		b.never("t1 endpoint: app active")
	})
}

// TestEndedTaskIsNotRunAgain: of a task that the managers hold to have ended,
// and that the runtime has lost (the machine was rebooted), only the release is
// left to tell.
func TestEndedTaskIsNotRunAgain(t *testing.T) {
	for _, s := range []spec.TaskState{spec.TaskComplete, spec.TaskFailed, spec.TaskShutdown} {
		t.Run(s.String(), func(t *testing.T) {
			b := newBench(t)
			b.give(true, newTask("t1", func(t *spec.Task) { t.Status = spec.TaskStatus{State: s, Message: "as it was", ExitCode: 7, At: 1} }))
			b.await("t1: " + s.String() + " as it was released")
			b.never("create t1", "start t1")
			if st := b.statuses()["t1"]; st.ExitCode != 7 {
				t.Errorf("status %+v", st)
			}
		})
	}
	t.Run("released", func(t *testing.T) {
		b := newBench(t)
		b.give(true, newTask("t1", func(t *spec.Task) { t.Status = spec.TaskStatus{State: spec.TaskFailed, At: 1, Released: true} }))
		if _, _, ok := b.find("t1"); ok {
			t.Error("a released task has a runner")
		}
	})
	t.Run("running", func(t *testing.T) { // as far as anybody knows: it runs again
		b := newBench(t)
		b.give(true, newTask("t1", func(t *spec.Task) { t.Status = spec.TaskStatus{State: spec.TaskRunning, At: 1} }))
		b.expect(up...)
	})
}

func TestAdopt(t *testing.T) {
	task := newTask("t1")
	adopt := func(t *testing.T, st runtime.Status, known ...spec.Task) *bench {
		b := newBench(t, st)
		if _, adopted := b.sandboxes(); adopted {
			t.Error("adopted before adopt")
		}
		if err := b.adopt(context.Background(), known); err != nil {
			t.Fatal(err)
		}
		if !b.hasAdopted() {
			t.Error("not adopted after adopt")
		}
		for deadline := time.Now().Add(20 * time.Second); !b.whole(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the tasks that were found never became whole")
			}
		}
		return b
	}
	t.Run("running", func(t *testing.T) {
		b := adopt(t, found(task, runtime.Running, 0), task)
		b.expect("dns t1", "t1 endpoint: app active", "t1: running")
		if sb, _ := b.sandboxes(); len(sb) != 1 || sb[0].Netns != "shoal-task-t1" {
			t.Errorf("sandboxes %+v", sb)
		}
	})
	t.Run("running, and known is that an earlier run was wanted down", func(t *testing.T) {
		again := task
		again.Run = 1
		b := adopt(t, found(again, runtime.Running, 0), unwantedTask(task))
		b.give(false, unwantedTask(task))
		b.expect("dns t1", "t1 endpoint: app active", "t1: running")
		down := unwantedTask(again)
		b.give(false, down)
		b.expect("dns t1", "t1 endpoint: app active", "t1: running",
			"t1 endpoint: app draining", "t1: stopping draining", "settled", "t1: stopping", "stop t1 SIGTERM 10s",
			"t1 endpoint:", "t1: shutdown", "release t1", "t1: shutdown released")
	})
	t.Run("created", func(t *testing.T) {
		b := adopt(t, found(task, runtime.Created, 0), task)
		b.expect(slices.DeleteFunc(slices.Clone(up), func(l string) bool { return l == "create t1" })...)
	})
	t.Run("exited", func(t *testing.T) {
		b := adopt(t, found(task, runtime.Exited, 2), task)
		b.expect("t1: failed exit status 2", "release t1", "t1: failed exit status 2 released")
	})
	t.Run("exited, wanted down", func(t *testing.T) {
		b := adopt(t, found(task, runtime.Exited, 143), unwantedTask(task))
		b.expect("t1: shutdown", "release t1", "t1: shutdown released")
	})
	t.Run("created, wanted down", func(t *testing.T) {
		b := adopt(t, found(task, runtime.Created, 0), unwantedTask(task))
		b.await("t1: shutdown stopped before it started released")
		b.never("start t1")
	})
	t.Run("running, wanted down", func(t *testing.T) {
		b := adopt(t, found(task, runtime.Running, 0), unwantedTask(task))
		b.await("t1: shutdown released")
	})
	t.Run("on other networks than it began on", func(t *testing.T) {
		moved := newTask("t1", func(t *spec.Task) {
			t.Attachments = append(t.Attachments, spec.Attachment{Network: "db", Addrs: []netip.Addr{netip.MustParseAddr("10.0.1.5")}, Iface: "eth1"})
		})
		b := adopt(t, found(task, runtime.Running, 0), moved)
		b.expect("dns t1", "t1 endpoint: app active, db active", "t1: running")
	})
	t.Run("with a record that can't be read", func(t *testing.T) {
		st := found(task, runtime.Running, 0)
		st.Data = []byte("{")
		b := adopt(t, st, task)
		b.expect("remove t1")
	})
	t.Run("with another's record", func(t *testing.T) {
		st := found(newTask("t2"), runtime.Running, 0)
		st.ID = "t1"
		b := adopt(t, st, task)
		b.expect("remove t1")
	})
	t.Run("a runtime that fails", func(t *testing.T) {
		b := newBench(t)
		b.fail("list", errors.New("boom"))
		if err := b.adopt(context.Background(), nil); err == nil || !strings.Contains(err.Error(), "boom") {
			t.Errorf("got %v", err)
		}
	})
}

// TestForgottenTasks: only what the managers say now may end what they don't
// name; and what names other nodes' tasks ends and starts nothing here.
func TestForgottenTasks(t *testing.T) {
	b := newBench(t, found(newTask("t1"), runtime.Running, 0))
	if err := b.adopt(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	b.await("t1: running")
	b.give(false) // the cache, of before the task was made
	b.give(true, newTask("t1"), newTask("t2", func(t *spec.Task) { t.Node = "n2" }))
	time.Sleep(20 * time.Millisecond) // nothing is to happen, which can only be seen by waiting
	b.never("t1: stopping draining", "t2: preparing", "create t2")
	b.give(true)
	b.await("t1 gone")
	if got := b.lines(); slices.Index(got, "t1 endpoint: app draining") > slices.Index(got, "stop t1 SIGTERM 10s") {
		t.Errorf("it was not drained first: %v", got)
	}
}

// connected is a task on app and db, in the given version.
func connected(version uint64, leaving uint64) spec.Task {
	return newTask("t1", func(t *spec.Task) {
		t.Version = version
		t.Attachments = append(t.Attachments, spec.Attachment{Network: "db", Addrs: []netip.Addr{netip.MustParseAddr("10.0.1.5")}, Iface: "eth1", Leaving: leaving})
	})
}

// TestDetach: a network is left in order, while the task runs.
func TestDetach(t *testing.T) {
	b := newBench(t)
	b.give(true, connected(1, 0))
	b.await("t1: running")
	b.forget()
	b.give(true, connected(2, 2))
	b.expect("t1 endpoint: app active, db draining", "settled", "reset t1 [10.0.1.5]", "t1 endpoint: app active", "wired t1", "t1: running wired 2")
	if sb, _ := b.sandboxes(); len(sb) != 1 || len(sb[0].Attachments) != 1 || sb[0].Attachments[0].Network != "app" {
		t.Errorf("sandboxes %+v", sb)
	}
	hosts := func() string { return b.hostsFile("t1") }
	if want := "t1 [10.0.0.5]"; hosts() != want {
		t.Errorf("hosts file: %s, want %s", hosts(), want)
	}
	// It comes back, with another address: the managers hear when it is there.
	b.forget()
	again := connected(4, 0)
	again.Attachments[1].Addrs, again.Attachments[1].Joined = []netip.Addr{netip.MustParseAddr("10.0.1.6")}, 4
	b.give(true, again)
	b.expect("t1 endpoint: app active, db active", "wired t1", "settled", "t1: running wired 4")
	if want := "t1 [10.0.0.5 10.0.1.6]"; hosts() != want {
		t.Errorf("hosts file: %s, want %s", hosts(), want)
	}
	// Off one network and onto another in one change.
	b.forget()
	both := connected(6, 6)
	both.Attachments[1].Addrs = []netip.Addr{netip.MustParseAddr("10.0.1.6")}
	both.Attachments = append(both.Attachments, spec.Attachment{Network: "third", Addrs: []netip.Addr{netip.MustParseAddr("10.0.2.6")}, Iface: "eth2", Joined: 6})
	b.give(true, both)
	b.await("t1: running wired 6")
	if want := "t1 [10.0.0.5 10.0.2.6]"; hosts() != want {
		t.Errorf("hosts file: %s, want %s", hosts(), want)
	}
}

// TestDetachThatFailsHoldsUpNothing: a task that can't be taken off a network
// can end, and be stopped.
func TestDetachThatFailsHoldsUpNothing(t *testing.T) {
	for name, end := range map[string]func(*bench){
		"stopped": func(b *bench) { b.give(true, unwantedTask(connected(2, 2))) },
		"removed": func(b *bench) { b.give(true) },
		"exits":   func(b *bench) { b.exit("t1", 0, "") },
	} {
		for fault, set := range map[string]func(*bench){
			"fails": func(b *bench) { b.fail("wired t1", errors.New("boom")) },
			"hangs": func(b *bench) { b.gate("wired t1") },
		} {
			t.Run(name+" while it "+fault, func(t *testing.T) {
				b := newBench(t)
				b.give(true, connected(1, 0))
				b.await("t1: running")
				b.forget()
				set(b)
				b.give(true, connected(2, 2))
				b.await("wired t1")
				end(b)
				b.await("release t1")
				if k := len(b.lines()); k > 60 {
					t.Errorf("%d steps: it does not pause between its tries", k)
				}
			})
		}
	}
}

// TestContextEndLeavesTasks: the agent's end is none of the tasks'.
func TestContextEndLeavesTasks(t *testing.T) {
	for _, step := range []string{"", "create t1", "wired t1", "settled", "start t1"} {
		t.Run(cmp.Or(step, "running"), func(t *testing.T) {
			b := newBench(t)
			if step != "" {
				b.gate(step)
			}
			b.give(true, newTask("t1"))
			b.await(cmp.Or(step, "t1: running"))
			b.cancel()
			b.wait()
			b.never("stop t1 SIGTERM 10s", "release t1", "remove t1", "t1 endpoint: app draining")
			b.give(true, newTask("t2")) // too late: no runner
			if _, _, ok := b.find("t2"); ok {
				t.Error("a task is started after the end")
			}
		})
	}
	t.Run("while it drains", func(t *testing.T) {
		b := newBench(t)
		b.give(true, newTask("t1"))
		b.await("t1: running")
		b.gate("settled")
		b.give(true, unwantedTask(newTask("t1")))
		b.await("t1: stopping draining")
		b.cancel()
		b.wait()
		b.never("release t1", "remove t1")
	})
}

// TestHalt: when the machine goes down its tasks are out of the balancers before their
// programs hear of it, each by its own signal; nobody is told that any has ended, nor is one
// started again.
func TestHalt(t *testing.T) {
	b := newBench(t)
	b.give(true, newTask("t1"))
	b.await("t1: running")
	b.give(true, newTask("t1"), newTask("t2", func(t *spec.Task) {
		t.Service = ""
		t.Spec.StopSignal, t.Spec.Restart = "SIGQUIT", "always"
	}))
	b.await("t2: running")
	b.await("t2 endpoint: app active")
	b.forget()
	settle := b.gate("settled")
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.halt(context.Background())
	}()
	b.await("settled")
	b.never("halt t1 SIGTERM 10s", "halt t2 SIGQUIT 10s")
	settle()
	<-done
	lines := b.lines()
	slices.Sort(lines)
	if want := []string{"halt t1 SIGTERM 10s", "halt t2 SIGQUIT 10s", "settled", "t1 endpoint: app draining", "t2 endpoint: app draining"}; !slices.Equal(lines, want) {
		t.Errorf("what happens: %q, want %q", lines, want)
	}
}

// TestEndWhileItDrains: for who has ended no balancer is waited.
func TestEndWhileItDrains(t *testing.T) {
	b := newBench(t)
	b.give(true, newTask("t1"))
	b.await("t1: running")
	defer b.gate("settled")()
	b.give(true, unwantedTask(newTask("t1")))
	b.await("t1: stopping draining")
	begun := time.Now()
	b.exit("t1", 0, "")
	b.await("t1: shutdown released")
	if d := time.Since(begun); d > drainTimeout/2 {
		t.Errorf("took %s", d)
	}
}

// TestReleaseIsTriedAgain: addresses are not free before the sandbox is gone.
func TestReleaseIsTriedAgain(t *testing.T) {
	b := newBench(t)
	b.give(true, newTask("t1"))
	b.await("t1: running")
	b.fail("release t1", errors.New("busy"))
	b.exit("t1", 0, "")
	b.await("release t1")
	b.never("t1: complete released")
	b.fail("release t1", nil)
	b.await("t1: complete released")
}

func TestStopAll(t *testing.T) {
	b := newBench(t)
	b.give(true, newTask("t1"), newTask("t2"))
	b.await("t1: running")
	b.await("t2: running")
	if err := b.stopAll(context.Background()); err != nil {
		t.Error(err)
	}
	if len(b.have) != 0 || len(b.statuses()) != 0 {
		t.Errorf("left: %v %v", b.have, b.statuses())
	}
	b.give(true, newTask("t3"))
	b.await("t3: running")
	b.gate("stop t3 SIGTERM 10s")
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := b.stopAll(ctx); err == nil || !strings.Contains(err.Error(), "t3") {
		t.Errorf("a task that does not end: %v", err)
	}
}

// Of a node that has left nobody hears that its tasks drain: they end all the same,
// well within the time that leave gives them.
func TestStopAllUnheard(t *testing.T) {
	b := newBench(t)
	b.give(true, newTask("t1"))
	b.await("t1: running")
	b.gate("settled")
	ctx, cancel := context.WithTimeout(context.Background(), spec.DefaultStopGrace)
	defer cancel()
	if err := b.stopAll(ctx); err != nil {
		t.Error(err)
	}
}

func TestEndpointsOfTasks(t *testing.T) {
	b := newBench(t)
	b.give(true, newTask("t1", func(t *spec.Task) {
		t.Name, t.Service, t.Slot = "web.1.t1", "web", 1
		t.Attachments[0].Aliases = []string{"w"}
		t.Attachments = append(t.Attachments, spec.Attachment{Network: "later"}) // no address yet
	}))
	b.await("start t1")
	want := spec.Endpoint{Task: "t1", TaskName: "web.1.t1", Hostname: "web-1-t1", Service: "web", Slot: 1, Network: "app",
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.5")}, Aliases: []string{"w"}, State: spec.EndpointStarting}
	if got := b.endpoints(); len(got) != 1 || !got[0].Equal(want) {
		t.Errorf("endpoints %+v\nwant %+v", got, want)
	}
}

func TestHostnameIsValid(t *testing.T) {
	for _, k := range []struct{ name, asked, want string }{
		{"web.1.k3v9x2m1p0qa", "", "web-1-k3v9x2m1p0qa"},
		{"a_b", "", "a-b"},
		{"x", "db.example", "db.example"},
		{strings.Repeat("x", 60) + ".1.k3v9", "", strings.Repeat("x", 56) + "-1-k3v9"},
		{strings.Repeat("x", 10) + "." + strings.Repeat("y", 62), "", strings.Repeat("y", 62)},
	} {
		got := hostname(spec.Task{Name: k.name, Spec: spec.TaskSpec{Hostname: k.asked}})
		if got != k.want {
			t.Errorf("%s: %s, want %s", k.name, got, k.want)
		}
		if err := spec.ValidateHostname(got); err != nil {
			t.Error(err)
		}
	}
}

func TestResolvConf(t *testing.T) {
	const head = "# made by shoal: names of the task's networks, then the node's own resolvers\n"
	for name, k := range map[string]struct {
		spec   spec.TaskSpec
		search []string
		want   string
	}{
		"nothing asked for":  {spec.TaskSpec{}, nil, "nameserver 127.0.0.11\noptions ndots:0\n"},
		"the node's domains": {spec.TaskSpec{}, []string{"a.example", "b.example"}, "search a.example b.example\nnameserver 127.0.0.11\noptions ndots:0\n"},
		"its own domains":    {spec.TaskSpec{DNSSearch: []string{"c.example"}}, []string{"a.example"}, "search c.example\nnameserver 127.0.0.11\noptions ndots:0\n"},
		"no domains":         {spec.TaskSpec{DNSSearch: []string{"."}}, []string{"a.example"}, "nameserver 127.0.0.11\noptions ndots:0\n"},
		"options":            {spec.TaskSpec{DNSOptions: []string{"rotate", "timeout:1"}}, nil, "nameserver 127.0.0.11\noptions rotate timeout:1 ndots:0\n"},
		"its own ndots":      {spec.TaskSpec{DNSOptions: []string{"ndots:2"}}, nil, "nameserver 127.0.0.11\noptions ndots:2\n"},
		"its own resolvers are asked by ours": {spec.TaskSpec{DNS: []netip.Addr{netip.MustParseAddr("192.0.2.53")}}, nil,
			"nameserver 127.0.0.11\noptions ndots:0\n"},
	} {
		if got := string(resolvConf(k.spec, k.search)); got != head+k.want {
			t.Errorf("%s:\n%s\nwant\n%s", name, got, head+k.want)
		}
	}
}

func TestHosts(t *testing.T) {
	const head = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
	node := netip.MustParseAddr("192.0.2.7")
	for name, k := range map[string]struct {
		task spec.Task
		node netip.Addr
		want string
	}{
		"one network": {newTask("t1"), node, "192.0.2.7\thost.shoal.internal\n10.0.0.5\tt1\n"},
		"no node":     {newTask("t1"), netip.Addr{}, "10.0.0.5\tt1\n"},
		"two networks and a host name": {newTask("t1", func(t *spec.Task) {
			t.Spec.Hostname = "db"
			t.Attachments = append(t.Attachments, spec.Attachment{Network: "b", Addrs: []netip.Addr{netip.MustParseAddr("10.0.1.5"), netip.MustParseAddr("fd00::5")}})
		}), node, "192.0.2.7\thost.shoal.internal\n10.0.0.5\tdb\n10.0.1.5\tdb\nfd00::5\tdb\n"},
		"extra hosts": {newTask("t1", func(t *spec.Task) {
			t.Spec.ExtraHosts = []string{"a:192.0.2.1", "b=[2001:db8::1]", "me:host-gateway", "nonsense"}
		}), node, "192.0.2.7\thost.shoal.internal\n192.0.2.1\ta\n2001:db8::1\tb\n192.0.2.7\tme\n10.0.0.5\tt1\n"},
		"extra hosts without a node": {newTask("t1", func(t *spec.Task) { t.Spec.ExtraHosts = []string{"me:host-gateway"} }), netip.Addr{}, "10.0.0.5\tt1\n"},
	} {
		if got := string(hosts(k.task, k.node)); got != head+k.want {
			t.Errorf("%s:\n%s\nwant\n%s", name, got, head+k.want)
		}
	}
}

// TestDeltas: what the managers say of an assignment is all of it, or what changed.
func TestDeltas(t *testing.T) {
	task := func(id string, version uint64) *shoalv1.Task {
		return &shoalv1.Task{Id: id, Name: id, Version: version, Status: &shoalv1.TaskStatus{State: "running"}}
	}
	node := func(id, addr string) *shoalv1.NodeInfo { return &shoalv1.NodeInfo{Id: id, Name: id, Addr: addr} }
	text := func(a *assignment) (s string) {
		for _, t := range a.Tasks {
			s += fmt.Sprintf("%s:%d ", t.ID, t.Version)
		}
		for _, n := range a.Nodes {
			s += n.ID + "@" + n.Addr.String() + " "
		}
		return s
	}
	first := &shoalv1.AssignmentsResponse{Index: 7, Tasks: []*shoalv1.Task{task("a", 1), task("c", 2), task("d", 3)}, Nodes: []*shoalv1.NodeInfo{node("n", "10.0.0.1")}}
	a, err := toAssignment(first, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := toAssignment(&shoalv1.AssignmentsResponse{Index: 9, Since: 7, Tasks: []*shoalv1.Task{task("b", 8), task("d", 9)}, Gone: []string{"c", "never"}}, a)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := text(b), "a:1 b:8 d:9 n@10.0.0.1 "; got != want || b.Index != 9 {
		t.Errorf("index %d: %s, want 9: %s", b.Index, got, want)
	}
	if got, want := text(a), "a:1 c:2 d:3 n@10.0.0.1 "; got != want {
		t.Errorf("the one before became %s, and was %s", got, want)
	}
	if &b.Nodes[0] != &a.Nodes[0] {
		t.Error("nodes that did not change were copied")
	}
	// Gone and come again within one message.
	c, err := toAssignment(&shoalv1.AssignmentsResponse{Index: 11, Since: 9, Nodes: []*shoalv1.NodeInfo{node("n", "10.0.0.2")}, Gone: []string{"n", "a"}}, b)
	if err != nil || text(c) != "b:8 d:9 n@10.0.0.2 " {
		t.Errorf("%v, %v", c, err)
	}
	if d, err := toAssignment(first, c); err != nil || text(d) != text(a) {
		t.Errorf("a whole one after others: %v, %v", d, err)
	}
	for _, before := range []*assignment{nil, a} {
		if _, err := toAssignment(&shoalv1.AssignmentsResponse{Index: 12, Since: 11}, before); err == nil || !strings.Contains(err.Error(), "since index 11") {
			t.Errorf("what builds on an index that was never told: %v", err)
		}
	}
}

// TestUntilWired: a fault is given up after a while, slowness is waited for.
func TestUntilWired(t *testing.T) {
	const patience = 100 * time.Millisecond
	slow := func(until time.Time) func(context.Context) error {
		return func(ctx context.Context) error {
			if !sleep.For(ctx, time.Until(until)) {
				return ctx.Err()
			}
			return nil
		}
	}
	none := func() error { return nil }
	long := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		t.Cleanup(cancel)
		return ctx
	}
	if err := untilWired(long(), patience, slow(time.Now()), none); err != nil {
		t.Errorf("at once: %v", err)
	}
	if err := untilWired(long(), patience, slow(time.Now().Add(5*patience)), none); err != nil {
		t.Errorf("after five times the patience: %v", err)
	}
	fault := errors.New("no such device")
	err := untilWired(long(), patience, slow(time.Now()), func() error { return fault })
	if !errors.Is(err, fault) {
		t.Errorf("a fault that stays: %v", err)
	}
	n := 0
	if err := untilWired(long(), patience, slow(time.Now()), func() error {
		if n++; n < 2 {
			return fault
		}
		return nil
	}); err != nil {
		t.Errorf("a fault that goes: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	if err := untilWired(ctx, patience, slow(time.Now().Add(time.Hour)), none); err == nil || !strings.Contains(err.Error(), "behind with its work") {
		t.Errorf("never: %v", err)
	}
}
