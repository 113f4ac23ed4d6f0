package process

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// named is a task with a namespace whose name is as the agent gives it, on a Runtime
// that knows what those begin with.
func (f *fixture) named(command ...string) runtime.Task {
	f.t.Helper()
	f.Runtime.cfg.Instance = f.instance()
	k := f.task(command...)
	k.Netns = spec.TaskNetns(f.instance(), spec.Task{ID: k.ID, Name: k.Name})
	f.create(k)
	if err := f.Start(f.ctx(), k.ID); err != nil {
		f.t.Fatal(err)
	}
	return k
}

func (f *fixture) instance() string {
	return fmt.Sprintf("shoalown-%d-%s", os.Getpid(), filepath.Base(f.run))
}

// again is restart with the instance known.
func (f *fixture) again() []runtime.Status {
	f.t.Helper()
	f.Close()
	f.open()
	f.Runtime.cfg.Instance = f.instance()
	ss, err := f.List(f.ctx())
	if err != nil {
		f.t.Fatal(err)
	}
	return ss
}

func (f *fixture) shimPID(k runtime.Task) int {
	f.t.Helper()
	pid := f.findShims()[k.ID]
	if pid == 0 {
		f.t.Fatalf("no shim of %s", k.Name)
	}
	return pid
}

func alive(pid int) bool { st, _ := procStat(pid); return st != 0 && st != 'Z' }

var recordDamage = map[string]func(path string) error{
	"absent":    os.Remove,
	"empty":     func(p string) error { return os.Truncate(p, 0) },
	"cut":       func(p string) error { return os.Truncate(p, 20) },
	"garbage":   func(p string) error { return os.WriteFile(p, []byte("\x00garbage"), 0o600) },
	"no task":   func(p string) error { return os.WriteFile(p, []byte("{}"), 0o600) },
	"another's": func(p string) error { return os.WriteFile(p, []byte(`{"id":"zzzzzzzzzzzz","name":"x"}`), 0o600) },
	"all of it": func(p string) error { return os.RemoveAll(filepath.Dir(p)) },
}

// TestALostRecordIsTheShims: a task goes on whatever becomes of its record, which its
// shim still has: it is as it was, and so is what is done with it.
func TestALostRecordIsTheShims(t *testing.T) {
	for name, damage := range recordDamage {
		f := setup(t)
		k := f.named("sleep", "1000")
		pid := f.status(k).PID
		if err := damage(filepath.Join(f.taskDir(k.ID), taskFile)); err != nil {
			t.Fatal(err)
		}
		ss := f.again()
		if len(ss) != 1 || ss[0].State != runtime.Running || ss[0].PID != pid || ss[0].Name != k.Name || string(ss[0].Data) != string(k.Data) || ss[0].Sandbox.Netns != k.Netns {
			t.Errorf("%s: %+v", name, ss)
			continue
		}
		if out, code := f.sh(k, "hostname"); out != k.Hostname+"\n" || code != 0 {
			t.Errorf("%s: exec says %q, %d", name, out, code)
		}
		if again := f.again(); len(again) != 1 || again[0].PID != pid {
			t.Errorf("%s: once more: %+v", name, again)
		}
		if err := f.Remove(f.ctx(), k.ID); err != nil || alive(pid) {
			t.Errorf("%s: remove: %v", name, err)
		}
	}
}

// TestOwnFilesComeBack: a running task whose files for /etc are gone from its directory
// has its name changed in what it finds at /etc/hosts all the same.
func TestOwnFilesComeBack(t *testing.T) {
	for name, damage := range map[string]func(dir string) error{
		"all of it": os.RemoveAll,
		"hosts":     func(d string) error { return os.Remove(filepath.Join(d, "hosts")) },
		"a directory": func(d string) error {
			p := filepath.Join(d, "hosts")
			return errors.Join(os.Remove(p), os.Mkdir(p, 0o700))
		},
	} {
		f := setup(t)
		k := f.named("sleep", "1000")
		was := f.own(k)
		if err := damage(f.taskDir(k.ID)); err != nil {
			t.Fatal(err)
		}
		f.again()
		f.eventually(name+": the task has its own files", func() bool { return f.own(k) == was })
		if err := f.SetHosts(f.ctx(), k.ID, k.Hostname, []netip.Addr{netip.MustParseAddr("10.9.8.7")}); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		f.eventually(name+": the task finds its new address", func() bool { return strings.Contains(f.own(k), "10.9.8.7\t"+k.Hostname) })
	}
}

// TestATornRecordLeaksNothing: of a task whose record is gone or damaged, and whose
// shim is dead, neither the program nor the namespace stays. Other instances' do.
func TestATornRecordLeaksNothing(t *testing.T) {
	for name, damage := range recordDamage {
		f := setup(t)
		k := f.named("sleep", "1000")
		other := "x" + k.Netns
		if err := nl.Create(other); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := nl.Remove(other); err != nil {
				t.Error(err)
			}
		}()
		pid, shim := f.status(k).PID, f.shimPID(k)
		f.Close()
		if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		f.eventually(name+": the program has ended", func() bool { return !alive(pid) && !alive(shim) })
		_ = os.Remove(filepath.Join(f.taskDir(k.ID), exitFile)) // the watcher may have seen the end
		if err := damage(filepath.Join(f.taskDir(k.ID), taskFile)); err != nil {
			t.Fatal(err)
		}
		if ss := f.again(); len(ss) != 0 {
			t.Errorf("%s: %v", name, ss)
		}
		if h, err := nl.Open(k.Netns); err == nil {
			h.Close()
			t.Errorf("%s: its namespace is still there", name)
		}
		if h, err := nl.Open(other); err != nil {
			t.Errorf("%s: another's namespace is gone: %v", name, err)
		} else {
			h.Close()
		}
		if es, _ := os.ReadDir(f.state); len(es) != 0 {
			t.Errorf("%s: left: %v", name, es)
		}
	}
}

// TestALostSocket: a shim whose socket is gone, from one moment to the next or while no
// agent ran, makes another; its task has not ended, and never did.
func TestALostSocket(t *testing.T) {
	for name, damage := range map[string]func(f *fixture, path string) error{
		"absent":     func(_ *fixture, p string) error { return os.Remove(p) },
		"all of run": func(f *fixture, _ string) error { return os.RemoveAll(f.run) },
		"a file":     func(_ *fixture, p string) error { _ = os.Remove(p); return os.WriteFile(p, []byte("x"), 0o600) },
	} {
		f := setup(t)
		k := f.named("sh", "-c", "trap 'exit 7' TERM; sleep 1000 & wait")
		f.eventually("it traps", func() bool {
			out, _ := f.sh(k, "ps -o args= || true")
			return strings.Contains(out, "sleep 1000") || out == ""
		})
		pid := f.status(k).PID
		if err := damage(f, f.socket(k.ID)); err != nil {
			t.Fatal(err)
		}
		// The agent runs on.
		pc, ln, err := f.DNSSockets(f.ctx(), k.ID)
		if err != nil {
			t.Errorf("%s: the name sockets: %v", name, err)
			continue
		}
		pc.Close()
		ln.Close()
		if err := damage(f, f.socket(k.ID)); err != nil {
			t.Fatal(err)
		}
		if ss := f.again(); len(ss) != 1 || ss[0].State != runtime.Running || ss[0].PID != pid || !alive(pid) {
			t.Errorf("%s: after a restart: %+v", name, ss)
		}
		if err := damage(f, f.socket(k.ID)); err != nil {
			t.Fatal(err)
		}
		if err := f.Stop(f.ctx(), k.ID, "SIGTERM", callTimeout); err != nil || f.status(k).ExitCode != 7 {
			t.Errorf("%s: stop: %v, %+v", name, err, f.status(k))
		}
	}
}

// TestOthersShimsAreTheirs: a Runtime with other directories does not find the task,
// nor ends it, even if its files are gone.
func TestOthersShimsAreTheirs(t *testing.T) {
	f, g := setup(t), setup(t)
	k := f.named("sleep", "1000")
	pid := f.status(k).PID
	if err := os.RemoveAll(f.taskDir(k.ID)); err != nil {
		t.Fatal(err)
	}
	g.Runtime.cfg.Instance = g.instance()
	if ss, err := g.List(g.ctx()); err != nil || len(ss) != 0 || !alive(pid) {
		t.Errorf("%v, %v", ss, err)
	}
	if ss := f.again(); len(ss) != 1 || ss[0].PID != pid {
		t.Errorf("its own does not: %v", ss)
	}
}

// TestParseStat: a program may have any name.
func TestParseStat(t *testing.T) {
	for _, c := range []struct {
		in     string
		state  byte
		parent int
	}{
		{"12 (sh) S 1 12 12 0 -1 4194304", 'S', 1},
		{"12 (a) T 7 (b) T 345 12 12", 'T', 345},
		{"12 () Z 0 ", 'Z', 0},
		{"12 (sh) R 99", 'R', 99},
		{"12 (sh) R", 'R', 0},
		{"12 (sh) ", 0, 0}, {"12 (sh)", 0, 0}, {"12 (sh)T 1", 0, 0}, {"12", 0, 0}, {"", 0, 0},
	} {
		if state, parent := parseStat([]byte(c.in)); state != c.state || parent != c.parent {
			t.Errorf("%q: state %q of parent %d, want %q of %d", c.in, state, parent, c.state, c.parent)
		}
	}
}
