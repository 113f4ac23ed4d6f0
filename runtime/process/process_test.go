package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

func TestMain(m *testing.M) {
	// This test binary is the shim, too.
	if handled, code := Dispatch(os.Args); handled {
		os.Exit(code)
	}
	goleak.VerifyTestMain(m)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("SHOAL_TEST_STRICT") == "1" {
		t.Fatal("needs root, for namespaces")
	}
	t.Skip("needs root, for namespaces")
}

type fixture struct {
	t          testing.TB
	state, run string
	hidden     []string
	*Runtime
	n int
}

func setup(t testing.TB) *fixture {
	needRoot(t)
	run, err := os.MkdirTemp("/run", "shoal-rt") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, state: t.TempDir(), run: run}
	f.open()
	t.Cleanup(func() {
		ss, _ := f.List(context.Background())
		for _, s := range ss {
			if err := f.Remove(context.Background(), s.ID); err != nil {
				t.Errorf("remove %s: %v", s.ID, err)
			}
		}
		f.Close()
		os.RemoveAll(run)
		if left, _ := nl.List("shoaltest-" + strconv.Itoa(os.Getpid())); len(left) > 0 {
			t.Errorf("namespaces left: %v", left)
		}
		if left, _ := nl.List(f.instance()); len(left) > 0 {
			t.Errorf("namespaces left: %v", left)
		}
	})
	return f
}

// open makes a Runtime on the same directories, as a restarted agent does.
func (f *fixture) open() {
	f.t.Helper()
	rt, err := New(Config{StateDir: f.state, RunDir: f.run, Hidden: f.hidden, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.t.Fatal(err)
	}
	f.Runtime = rt
}

func (f *fixture) restart() {
	f.t.Helper()
	f.Close()
	f.open()
	if _, err := f.List(f.ctx()); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) ctx() context.Context { return context.Background() }

func (f *fixture) task(command ...string) runtime.Task {
	f.n++
	id := spec.NewID()
	return runtime.Task{ID: id, Name: fmt.Sprintf("t%d", f.n), Netns: fmt.Sprintf("shoaltest-%d-%s", os.Getpid(), id), Hostname: fmt.Sprintf("host%d", f.n),
		Spec: spec.TaskSpec{Command: command}, ResolvConf: []byte("nameserver 127.0.0.11\n"), Hosts: []byte("10.1.2.3\tme\n"), Data: []byte("data-" + id)}
}

func (f *fixture) create(t runtime.Task) runtime.Task {
	f.t.Helper()
	sb, err := f.Create(f.ctx(), t)
	if err != nil {
		f.t.Fatal(err)
	}
	if sb.Netns != t.Netns || sb.DNSPort == 0 {
		f.t.Fatalf("sandbox %+v", sb)
	}
	return t
}

func (f *fixture) running(command ...string) runtime.Task {
	f.t.Helper()
	t := f.create(f.task(command...))
	if err := f.Start(f.ctx(), t.ID); err != nil {
		f.t.Fatal(err)
	}
	return t
}

func (f *fixture) status(t runtime.Task) runtime.Status {
	f.t.Helper()
	st, err := f.Status(f.ctx(), t.ID)
	if err != nil {
		f.t.Fatal(err)
	}
	return st
}

func (f *fixture) eventually(what string, cond func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if cond() {
			return
		}
	}
	f.t.Fatalf("never: %s", what)
}

func (f *fixture) exited(t runtime.Task) runtime.Status {
	f.t.Helper()
	f.eventually(t.Name+" exits", func() bool { return f.status(t).State == runtime.Exited })
	return f.status(t)
}

func (f *fixture) output(t runtime.Task) string {
	f.t.Helper()
	var b strings.Builder
	for l, err := range f.Logs(f.ctx(), t.ID, runtime.LogOptions{}) {
		if err != nil {
			f.t.Fatal(err)
		}
		if l.Stderr {
			b.WriteString("E:")
		}
		b.Write(l.Line)
		b.WriteByte('\n')
	}
	return b.String()
}

func (f *fixture) sh(t runtime.Task, script string) (string, int) {
	f.t.Helper()
	var out together
	p, err := f.Exec(f.ctx(), t.ID, runtime.ExecSpec{Command: []string{"sh", "-c", script}, Stdout: &out, Stderr: &out})
	if err != nil {
		f.t.Fatal(err)
	}
	code, err := p.Wait()
	if err != nil {
		f.t.Fatal(err)
	}
	return out.String(), code
}

func TestLifeAndOutput(t *testing.T) {
	f := setup(t)
	k := f.running("sh", "-c", "echo out; echo err >&2; exit 3")
	st := f.exited(k)
	if st.ExitCode != 3 || st.Err != "" || string(st.Data) != string(k.Data) {
		t.Errorf("status %+v", st)
	}
	if got := f.output(k); !strings.Contains(got, "out\n") || !strings.Contains(got, "E:err\n") {
		t.Errorf("output %q", got)
	}
	// Released: the sandbox is gone, the output is not.
	if err := f.Release(f.ctx(), k.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := nl.Open(k.Netns); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("namespace after release: %v", err)
	}
	if got := f.output(k); !strings.Contains(got, "out\n") {
		t.Errorf("output after release %q", got)
	}
	if err := f.Remove(f.ctx(), k.ID); err != nil {
		t.Fatal(err)
	}
	if err := f.Remove(f.ctx(), k.ID); err != nil {
		t.Errorf("second remove: %v", err)
	}
	if es, _ := os.ReadDir(f.state); len(es) > 0 {
		t.Errorf("left in the state directory: %v", es)
	}
	if es, _ := os.ReadDir(f.run); len(es) > 0 {
		t.Errorf("left in the run directory: %v", es)
	}
}

// TestRenew: a task that has ended is made anew under its ID, and its output goes on.
func TestRenew(t *testing.T) {
	f := setup(t)
	k := f.running("sh", "-c", "echo run; exit 3")
	if err := f.Renew(f.ctx(), "nosuchtask"); err != nil {
		t.Errorf("of none: %v", err)
	}
	f.exited(k)
	for i := range 2 {
		if err := f.Release(f.ctx(), k.ID); err != nil {
			t.Fatal(err)
		}
		if err := f.Renew(f.ctx(), k.ID); err != nil {
			t.Fatal(err)
		}
		if i == 1 { // the agent ends before it has made it anew
			f.restart()
			if st := f.exited(k); st.ExitCode != 137 || st.Err == "" {
				t.Errorf("between two runs: %+v", st)
			}
			if err := errors.Join(f.Release(f.ctx(), k.ID), f.Renew(f.ctx(), k.ID)); err != nil {
				t.Fatal(err)
			}
		}
		// What the run before left may have become anything.
		for _, name := range []string{taskFile, "hostname", "hosts", "resolv.conf", "cgroup"} {
			p := filepath.Join(f.taskDir(k.ID), name)
			if err := errors.Join(os.RemoveAll(p), os.MkdirAll(filepath.Join(p, "x"), 0o700)); err != nil {
				t.Fatal(err)
			}
		}
		f.create(k)
		if err := f.Renew(f.ctx(), k.ID); err == nil || !strings.Contains(err.Error(), "created") {
			t.Errorf("of one that is there: %v", err)
		}
		if err := f.Start(f.ctx(), k.ID); err != nil {
			t.Fatal(err)
		}
		if st := f.exited(k); st.ExitCode != 3 || st.Err != "" {
			t.Errorf("run %d: %+v", i+2, st)
		}
	}
	if got := strings.Count(f.output(k), "run\n"); got != 3 {
		t.Errorf("%d lines of three runs: %q", got, f.output(k))
	}
}

func TestTheTasksViewOfTheMachine(t *testing.T) {
	f := setup(t)
	k := f.running("sleep", "1000")
	for script, want := range map[string]string{
		"hostname":                     k.Hostname,
		"cat /etc/resolv.conf":         "nameserver 127.0.0.11",
		"cat /etc/hosts":               "10.1.2.3\tme",
		"echo $HOSTNAME":               k.Hostname,
		"ls /sys/class/net":            "lo",
		"cat /proc/1/comm | head -c 4": "",
		"ps ax 2>/dev/null | grep -c 'sleep 1000' || true": "",
		"echo x > /proc/sys/kernel/hostname 2>&1; echo $?": "",
		"cat /proc/self/status | grep CapBnd":              "00000000a80425fb", // Docker's default set
	} {
		if got, _ := f.sh(k, script); !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	if got, _ := f.sh(k, "kill -0 1 && ls /proc | grep -c '^[0-9]'"); strings.TrimSpace(got) > "6" && len(strings.TrimSpace(got)) > 1 {
		t.Errorf("the task sees %s processes", strings.TrimSpace(got))
	}
	if _, code := f.sh(k, "echo 1 > /proc/sys/kernel/panic_on_oops"); code == 0 {
		t.Error("a task may write the machine's sysctls")
	}
	if _, code := f.sh(k, "mkdir $(find /sys/fs/cgroup -name cgroup.procs -printf '%h\n' | head -1)/shoaltest"); code == 0 {
		t.Error("a task may change the machine's control groups")
	}
	if _, code := f.sh(k, "ip link add x type dummy 2>/dev/null || ip link set lo down"); code == 0 {
		t.Error("a task may change its network")
	}
	if host, _ := os.Hostname(); host == k.Hostname {
		t.Error("the host's name was changed")
	}
}

// What the agent keeps is not the tasks': who reaches its socket rules the
// cluster, and the shims' sockets take no questions about who asks.
func TestHiddenDirectories(t *testing.T) {
	f := setup(t)
	own := t.TempDir()
	if err := os.WriteFile(filepath.Join(own, "secret"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	f.hidden = []string{f.state, f.run, own, filepath.Join(own, "none")}
	f.restart()
	onHost := f.task("sleep", "1000")
	onHost.Netns = ""
	if _, err := f.Create(f.ctx(), onHost); err != nil {
		t.Fatal(err)
	}
	if err := f.Start(f.ctx(), onHost.ID); err != nil {
		t.Fatal(err)
	}
	for _, k := range []runtime.Task{f.running("sleep", "1000"), onHost} {
		for _, d := range []string{f.state, f.run, own} {
			if got, code := f.sh(k, "ls -A "+d); code != 0 || got != "" {
				t.Errorf("a task finds in %s: %q (exit status %d)", d, got, code)
			}
			if _, code := f.sh(k, "touch "+d+"/x || umount "+d); code == 0 {
				t.Errorf("a task may write in %s, or uncover it", d)
			}
		}
		if _, err := os.Stat(filepath.Join(own, "secret")); err != nil {
			t.Errorf("the node itself: %v", err)
		}
		// Its files are among what is hidden, and still its own.
		if got, code := f.sh(k, "cat /etc/hostname"); code != 0 || strings.TrimSpace(got) != k.Hostname {
			t.Errorf("/etc/hostname: %q (exit status %d)", got, code)
		}
	}
}

func TestStopGraceAndKill(t *testing.T) {
	f := setup(t)
	polite := f.running("sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done")
	f.eventually("the trap is set", func() bool { return f.output(polite) == "ready\n" })
	if err := f.Stop(f.ctx(), polite.ID, "SIGTERM", 20*time.Second); err != nil {
		t.Fatal(err)
	}
	if st := f.status(polite); st.State != runtime.Exited || st.ExitCode != 7 {
		t.Errorf("polite: %+v", st)
	}
	stubborn := f.running("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.01; done")
	f.eventually("the trap is set", func() bool { return f.output(stubborn) == "ready\n" })
	if err := f.Stop(f.ctx(), stubborn.ID, "TERM", 100*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if st := f.status(stubborn); st.State != runtime.Exited || st.ExitCode != 137 {
		t.Errorf("stubborn: %+v", st)
	}
	// A plain program ends by SIGTERM although it would be PID 1 in a container.
	plain := f.running("sleep", "1000")
	if err := f.Stop(f.ctx(), plain.ID, "15", 20*time.Second); err != nil {
		t.Fatal(err)
	}
	if st := f.status(plain); st.ExitCode != 143 {
		t.Errorf("plain: %+v", st)
	}
	if err := f.Stop(f.ctx(), plain.ID, "SIGWHAT", 0); err == nil {
		t.Error("an unknown signal is accepted")
	}
}

// TestHaltIsNoEndOfItsOwn: a program that makes an orderly end of it because the machine
// goes down has not completed what it was to do; that is found by the next agent, too.
func TestHaltIsNoEndOfItsOwn(t *testing.T) {
	f := setup(t)
	polite := f.running("sh", "-c", "trap 'exit 0' USR1; echo ready; while :; do sleep 0.01; done")
	f.eventually("the trap is set", func() bool { return f.output(polite) == "ready\n" })
	if err := f.Halt(f.ctx(), polite.ID, "SIGUSR1", 20*time.Second); err != nil {
		t.Fatal(err)
	}
	want := func(st runtime.Status) {
		t.Helper()
		if st.State != runtime.Exited || st.ExitCode != 0 || st.Err != "stopped with its machine" {
			t.Errorf("%+v", st)
		}
	}
	want(f.status(polite))
	var kept runtime.Status
	if err := readJSON(filepath.Join(f.taskDir(polite.ID), exitFile), &kept); err != nil {
		t.Error(err)
	}
	want(kept)
	if err := f.Halt(f.ctx(), polite.ID, "SIGUSR1", 20*time.Second); err != nil {
		t.Errorf("of one that has ended: %v", err)
	}
	if err := f.Halt(f.ctx(), "nonononono", "SIGTERM", time.Second); !errors.Is(err, runtime.ErrNotFound) {
		t.Errorf("of none: %v", err)
	}
}

func TestTheProgramsChildrenEndWithIt(t *testing.T) {
	f := setup(t)
	mark := "7" + strconv.Itoa(os.Getpid()) + "1"
	k := f.running("sh", "-c", "setsid sleep "+mark+" & exit 0")
	f.exited(k)
	f.eventually("the orphan is gone", func() bool { return exec.Command("pgrep", "-f", "sleep "+mark).Run() != nil })
}

func TestKilledProgramIsReportedAtOnce(t *testing.T) {
	f := setup(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events := f.Events(ctx)
	k := f.running("sleep", "1000")
	pid := f.status(k).PID
	if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); strings.TrimSpace(string(comm)) != "sleep" {
		t.Fatalf("pid %d is %q", pid, comm)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.After(10 * time.Second); f.status(k).State != runtime.Exited; {
		select {
		case <-events:
		case <-deadline:
			t.Fatal("no event told of the end")
		}
	}
	if st := f.status(k); st.ExitCode != 137 {
		t.Errorf("%+v", st)
	}
	cancel()
	for range events {
	}
}

func TestStartErrors(t *testing.T) {
	f := setup(t)
	for want, s := range map[string]spec.TaskSpec{
		"exec no-such-program: executable file not found in $PATH": {Command: []string{"no-such-program"}},
		"exec /etc/passwd: permission denied":                      {Command: []string{"/etc/passwd"}},
		"user \"nobody-such\" is not known":                        {Command: []string{"true"}, User: "nobody-such"},
		"working directory /no/such is not there":                  {Command: []string{"true"}, Dir: "/no/such"},
	} {
		k := f.task()
		k.Spec = s
		f.create(k)
		err := f.Start(f.ctx(), k.ID)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v: got %v", s, err)
		}
		// At once, for the agent to tell which of Docker's exit statuses it was.
		codes := map[string]int{"no-such-program": 127, "/etc/passwd": 126, "true": 125}
		if st := f.status(k); st.State != runtime.Exited || st.ExitCode != codes[s.Command[0]] {
			t.Errorf("%v: %s, exit status %d", s, st.State, st.ExitCode)
		}
	}
}

func TestUserDirAndEnvironment(t *testing.T) {
	f := setup(t)
	k := f.task("sh", "-c", "id -u; id -g; pwd; echo $A-$HOME")
	k.Spec.User, k.Spec.Dir, k.Spec.Env = "65534:65534", "/tmp", []string{"A=1", "A=2"}
	f.create(k)
	if err := f.Start(f.ctx(), k.ID); err != nil {
		t.Fatal(err)
	}
	f.exited(k)
	if got := f.output(k); !strings.HasPrefix(got, "65534\n65534\n/tmp\n2-") {
		t.Errorf("%q", got)
	}
}

func TestExec(t *testing.T) {
	f := setup(t)
	k := f.running("sleep", "1000")
	if _, code := f.sh(k, "exit 42"); code != 42 {
		t.Errorf("exit status %d", code)
	}
	if out, code := f.sh(k, "kill -9 $$"); code != 137 {
		t.Errorf("killed: %d %q", code, out)
	}
	run := func(s runtime.ExecSpec) (string, int) {
		t.Helper()
		var out together
		s.Stdout, s.Stderr = &out, &out
		p, err := f.Exec(f.ctx(), k.ID, s)
		if err != nil {
			t.Fatal(err)
		}
		code, err := p.Wait()
		if err != nil {
			t.Fatal(err)
		}
		return out.String(), code
	}
	big := strings.Repeat("0123456789abcdef", 64<<10)
	if out, code := run(runtime.ExecSpec{Command: []string{"cat"}, Stdin: strings.NewReader(big)}); code != 0 || out != big {
		t.Errorf("1 MiB through cat: %d bytes, status %d", len(out), code)
	}
	if out, code := run(runtime.ExecSpec{Command: []string{"cat"}}); code != 0 || out != "" {
		t.Errorf("no input: %q, %d", out, code)
	}
	if out, code := run(runtime.ExecSpec{Command: []string{"no-such"}}); code != 127 || !strings.Contains(out, "not found") {
		t.Errorf("not found: %q, %d", out, code)
	}
	if _, code := run(runtime.ExecSpec{Command: []string{"/etc/passwd"}}); code != 126 {
		t.Errorf("not executable: %d", code)
	}
	if out, _ := run(runtime.ExecSpec{Command: []string{"sh", "-c", "tty; stty size"}, TTY: true, Rows: 33, Cols: 99}); !strings.Contains(out, "33 99") {
		t.Errorf("terminal: %q", out)
	}
	if out, _ := run(runtime.ExecSpec{Command: []string{"sh", "-c", "hostname; readlink /proc/self/ns/net"}}); !strings.HasPrefix(out, k.Hostname) {
		t.Errorf("namespaces: %q", out)
	}
	// A detached one stays, and has the task's init as its parent.
	dctx, dcancel := context.WithCancel(t.Context())
	d, err := f.Exec(dctx, k.ID, runtime.ExecSpec{Command: []string{"sh", "-c", "exec sleep 4321"}, Detach: true, TTY: true})
	if err != nil {
		t.Fatal(err)
	}
	if code, err := d.Wait(); code != 0 || err != nil {
		t.Errorf("detached: status %d, %v", code, err)
	}
	dcancel()
	if out, code := run(runtime.ExecSpec{Command: []string{"no-such"}, Detach: true}); code != 127 || !strings.Contains(out, "not found") {
		t.Errorf("detached, not found: %q, %d", out, code)
	}
	f.eventually("the detached command is the task's own", func() bool {
		out, _ := f.sh(k, `for p in /proc/[0-9]*; do tr '\0' ' ' < $p/cmdline; awk '/^PPid/ {print $2}' $p/status; done`)
		return strings.Contains(out, "sleep 4321 1\n")
	})
	// The command goes with the caller's context.
	ctx, cancel := context.WithCancel(t.Context())
	p, err := f.Exec(ctx, k.ID, runtime.ExecSpec{Command: []string{"sleep", "1234"}})
	if err != nil {
		t.Fatal(err)
	}
	f.eventually("the command runs", func() bool {
		out, _ := f.sh(k, "cat /proc/*/cmdline | tr '\\0' ' '")
		return strings.Contains(out, "sleep 1234")
	})
	cancel()
	_, _ = p.Wait()
	f.eventually("the command is gone", func() bool {
		out, _ := f.sh(k, "cat /proc/*/cmdline | tr '\\0' ' '")
		return !strings.Contains(out, "sleep 1234")
	})
	if st := f.status(k); st.State != runtime.Running {
		t.Errorf("the task is %s", st.State)
	}
}

// together is where both streams of a command go.
type together struct {
	mu sync.Mutex
	bytes.Buffer
}

func (w *together) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.Buffer.Write(b)
}

// slowWriter is a receiver that stops for a while at the first byte.
type slowWriter struct {
	bytes.Buffer
	after <-chan struct{}
}

func (w *slowWriter) Write(b []byte) (int, error) {
	<-w.after
	return w.Buffer.Write(b)
}

// TestExecForASlowReceiver: the end of a command does not cut its output off.
func TestExecForASlowReceiver(t *testing.T) {
	f := setup(t)
	k := f.running("sleep", "1000")
	after := make(chan struct{})
	w := &slowWriter{after: after}
	p, err := f.Exec(f.ctx(), k.ID, runtime.ExecSpec{Command: []string{"sh", "-c", "head -c 90000 /dev/zero; sleep 1000 & :"}, Stdout: w, Stderr: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(leftBehind+300*time.Millisecond, func() { close(after) })
	if code, err := p.Wait(); code != 0 || err != nil || w.Len() != 90000 {
		t.Errorf("%d bytes of 90000, status %d, %v", w.Len(), code, err)
	}
}

// TestAttach: a program starts when somebody is attached, and gets and gives
// every byte.
func TestAttach(t *testing.T) {
	f := setup(t)
	type result struct {
		out, err string
		code     int
		fault    error
	}
	attach := func(k runtime.Task, stdin string) (runtime.Process, func() result) {
		t.Helper()
		var out, errs bytes.Buffer
		p, err := f.Attach(f.ctx(), k.ID, runtime.AttachSpec{Rows: 33, Cols: 99, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errs})
		if err != nil {
			t.Fatal(err)
		}
		return p, func() result {
			code, err := p.Wait()
			return result{out.String(), errs.String(), code, err}
		}
	}
	create := func(set func(*spec.TaskSpec), command ...string) runtime.Task {
		k := f.task(command...)
		k.Spec.Attach = true
		set(&k.Spec)
		return f.create(k)
	}
	start := func(k runtime.Task) error { return f.Start(f.ctx(), k.ID) }
	big := strings.Repeat("0123456789abcde\x00", 1<<16) + "no newline"

	k := create(func(s *spec.TaskSpec) { s.Stdin = true }, "sh", "-c", "cat; printf err >&2; exit 7")
	started := make(chan error, 1)
	go func() { started <- start(k) }()
	_, wait := attach(k, big)
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	if r := wait(); r.out != big || r.err != "err" || r.code != 7 || r.fault != nil {
		t.Errorf("%d bytes out of %d, %q, status %d, %v", len(r.out), len(big), r.err, r.code, r.fault)
	}

	k = create(func(s *spec.TaskSpec) { s.TTY = true }, "sh", "-c", "tty; stty size")
	_, wait = attach(k, "")
	if err := start(k); err != nil {
		t.Fatal(err)
	}
	if r := wait(); !strings.HasPrefix(r.out, "/dev/pts/") || !strings.HasSuffix(r.out, "33 99\r\n") {
		t.Errorf("terminal: %q", r.out)
	}

	// A signal before the start is not lost.
	k = create(func(*spec.TaskSpec) {}, "sleep", "1000")
	p, wait := attach(k, "")
	if err := p.Signal(int(syscall.SIGTERM)); err != nil {
		t.Fatal(err)
	}
	if err := start(k); err != nil {
		t.Fatal(err)
	}
	if r := wait(); r.code != 143 {
		t.Errorf("status %d after SIGTERM", r.code)
	}

	k = create(func(*spec.TaskSpec) {}, "no-such")
	_, wait = attach(k, "")
	if err := start(k); err == nil {
		t.Error("no-such starts")
	}
	if r := wait(); r.code != 127 || r.fault == nil || !strings.Contains(r.fault.Error(), "not found") {
		t.Errorf("no-such: %+v", r)
	}

	// One that is slow holds up neither the end nor what is kept, and loses
	// nothing.
	k = create(func(*spec.TaskSpec) {}, "head", "-c", "120000", "/dev/zero")
	after := make(chan struct{})
	w := &slowWriter{after: after}
	p, err := f.Attach(f.ctx(), k.ID, runtime.AttachSpec{Stdout: w, Stderr: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	if err := start(k); err != nil {
		t.Fatal(err)
	}
	f.exited(k)
	close(after)
	if code, err := p.Wait(); code != 0 || err != nil || w.Len() != 120000 {
		t.Errorf("%d bytes of 120000, status %d, %v", w.Len(), code, err)
	}

	// Who is gone holds up nothing.
	k = create(func(s *spec.TaskSpec) { s.Stdin = true }, "sh", "-c", "cat; head -c 1000000 /dev/zero")
	ctx, cancel := context.WithCancel(f.ctx())
	r, _ := net.Pipe() // gives nothing
	defer r.Close()
	p, err = f.Attach(ctx, k.ID, runtime.AttachSpec{Stdin: r, Stdout: io.Discard, Stderr: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	if err := start(k); err != nil {
		t.Fatal(err)
	}
	cancel()
	_, _ = p.Wait()
	if st := f.exited(k); st.ExitCode != 0 {
		t.Errorf("left alone it ends with %d", st.ExitCode)
	}
}

func TestAdoption(t *testing.T) {
	f := setup(t)
	k := f.running("sleep", "1000")
	created := f.create(f.task("true"))
	done := f.running("sh", "-c", "echo hello; exit 5")
	f.exited(done)
	pc, ln, err := f.DNSSockets(f.ctx(), k.ID)
	if err != nil {
		t.Fatal(err)
	}
	addr := pc.LocalAddr().String()
	pc.Close()
	ln.Close()
	pid := f.status(k).PID
	f.restart()
	if st := f.status(k); st.State != runtime.Running || st.PID != pid || string(st.Data) != string(k.Data) || st.Sandbox.DNSPort == 0 {
		t.Errorf("running task: %+v", st)
	}
	if st := f.status(created); st.State != runtime.Created {
		t.Errorf("created task: %+v", st)
	}
	if st := f.status(done); st.State != runtime.Exited || st.ExitCode != 5 {
		t.Errorf("ended task: %+v", st)
	}
	if got := f.output(done); got != "hello\n" {
		t.Errorf("output %q", got)
	}
	// A query that came while no agent was there is still in the socket.
	err = nl.Do(k.Netns, func() error {
		c, err := net.Dial("udp", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("query"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	pc, ln, err = f.DNSSockets(f.ctx(), k.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	defer ln.Close()
	_ = pc.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 16)
	if n, _, err := pc.ReadFrom(buf); err != nil || string(buf[:n]) != "query" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	// And the end of an adopted task is noticed.
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if st := f.exited(k); st.ExitCode != 143 {
		t.Errorf("%+v", st)
	}
}

func TestShimKilled(t *testing.T) {
	f := setup(t)
	k := f.running("sleep", "1000")
	pid := f.status(k).PID
	resp, err := f.peek(k.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(resp.ShimPID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	st := f.exited(k)
	if !strings.Contains(st.Err, "shim is gone") {
		t.Errorf("%+v", st)
	}
	f.eventually("the program went with its shim", func() bool { return syscall.Kill(pid, 0) != nil })
	// The same after a restart, when it happened meanwhile.
	k2 := f.running("sleep", "1000")
	if resp, err = f.peek(k2.ID); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := syscall.Kill(resp.ShimPID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	f.open()
	if _, err := f.List(f.ctx()); err != nil {
		t.Fatal(err)
	}
	if st := f.status(k2); st.State != runtime.Exited {
		t.Errorf("%+v", st)
	}
}

func TestHalfMadeTaskIsClearedAway(t *testing.T) {
	f := setup(t)
	k := f.task("true")
	// As a kill between the record and the shim leaves it.
	if err := os.Mkdir(f.taskDir(k.ID), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeJSON(filepath.Join(f.taskDir(k.ID), taskFile), k); err != nil {
		t.Fatal(err)
	}
	if err := nl.Create(k.Netns); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(f.taskDir("abcdefghijkl"), 0o700); err != nil { // and before the record
		t.Fatal(err)
	}
	if ss, err := f.List(f.ctx()); err != nil || len(ss) != 0 {
		t.Errorf("%v, %v", ss, err)
	}
	if es, _ := os.ReadDir(f.state); len(es) != 0 {
		t.Errorf("left: %v", es)
	}
	if _, err := nl.Open(k.Netns); err == nil {
		t.Error("its namespace is still there")
	}
}

func TestListening(t *testing.T) {
	f := setup(t)
	k := f.running("sleep", "1000")
	listening := func() bool {
		t.Helper()
		up, err := f.Listening(f.ctx(), k.ID, false)
		if err != nil {
			t.Fatal(err)
		}
		return up.Serves > 0
	}
	if listening() {
		t.Fatal("the name server's sockets count")
	}
	for _, tc := range []struct {
		network, addr string
		want          bool
	}{{"tcp", "127.0.0.1:80", false}, {"tcp", "[::1]:80", false}, {"tcp4", "0.0.0.0:80", true}, {"tcp", "[::]:80", true}, {"udp4", "0.0.0.0:53", true}, {"udp4", "127.0.0.1:53", false}} {
		var c interface{ Close() error }
		err := nl.Do(k.Netns, func() (err error) {
			if strings.HasPrefix(tc.network, "udp") {
				c, err = net.ListenPacket(tc.network, tc.addr)
			} else {
				c, err = net.Listen(tc.network, tc.addr)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := listening(); got != tc.want {
			t.Errorf("%s %s: %t", tc.network, tc.addr, got)
		}
		c.Close()
	}
}

func TestLogsRotateFollowAndTail(t *testing.T) {
	f := setup(t)
	const lines = 160_000 // of 100 bytes and more: into the second file
	k := f.running("sh", "-c", "read x; awk 'BEGIN{for(i=0;i<"+strconv.Itoa(lines)+";i++) printf \"%07d %090d\\n\", i, 0}'; echo last")
	_ = k
	// sh reads end of input from /dev/null and goes on.
	n, bad := 0, 0
	var last string
	for l, err := range f.Logs(f.ctx(), k.ID, runtime.LogOptions{Follow: true}) {
		if err != nil {
			t.Fatal(err)
		}
		if last = string(l.Line); last == "last" {
			break
		}
		if want := fmt.Sprintf("%07d", n); !strings.HasPrefix(last, want) {
			bad++
		}
		n++
	}
	if n != lines || bad > 0 || last != "last" {
		t.Errorf("%d lines, %d out of order, last %q", n, bad, last)
	}
	f.exited(k)
	if !exists(filepath.Join(f.taskDir(k.ID), logFile+".1")) {
		t.Error("the output was not rotated")
	}
	var tail []string
	for l, err := range f.Logs(f.ctx(), k.ID, runtime.LogOptions{Tail: 2}) {
		if err != nil {
			t.Fatal(err)
		}
		tail = append(tail, string(l.Line))
	}
	if len(tail) != 2 || tail[1] != "last" {
		t.Errorf("tail %q", tail)
	}
}

func BenchmarkTask(b *testing.B) {
	f := setup(b)
	for b.Loop() {
		k := f.running("sleep", "1000")
		if err := f.Remove(f.ctx(), k.ID); err != nil {
			b.Fatal(err)
		}
	}
}

// TestAStoppedProgramDoesNotListen: the kernel still takes connections for it,
// which nobody answers.
func TestAStoppedProgramDoesNotListen(t *testing.T) {
	f := setup(t)
	k := f.running("sh", "-c", "sleep 1000 & exec nc -lk 0.0.0.0 80")
	await := func(want bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			up, err := f.Listening(f.ctx(), k.ID, false)
			if err != nil {
				t.Fatal(err)
			}
			if up.Serves > 0 == want {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("listening stays %d", up.Serves)
			}
		}
	}
	await(true)
	st, err := f.Status(f.ctx(), k.ID)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", st.PID, st.PID))
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		pid  int
		sig  syscall.Signal
		want bool
	}{{st.PID, syscall.SIGSTOP, true}, {child, syscall.SIGSTOP, false}, {st.PID, syscall.SIGCONT, true}} {
		if err := syscall.Kill(step.pid, step.sig); err != nil {
			t.Fatal(err)
		}
		await(step.want)
	}
}
