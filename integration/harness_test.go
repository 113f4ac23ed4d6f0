// Package integration tests the built binary as a user meets it: on several
// nodes of a lab, by its command line, with real traffic.
//
// Most tests share one lab of three nodes and remove what they made; those that
// break nodes have a lab of their own. SHOAL_BIN names a directory with the
// binaries (make build); without it they are built. SHOAL_TEST_VM=1 says that
// the tests run in the virtual machine, on IPVS, where everything is slower and
// only what depends on the data path is run.
package integration

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

var (
	bin    string // directory of the binaries
	inVM   = os.Getenv("SHOAL_TEST_VM") != ""
	repo   string
	labsMu sync.Mutex
	labs   []*lab.Lab // to be removed at the end
)

// slow stretches deadlines for the emulated machine.
func slow(d time.Duration) time.Duration {
	if inVM {
		return 8 * d
	}
	return d
}

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if what := os.Getenv("SHOAL_ATTACK"); what != "" {
		return attack(what)
	}
	_, file, _, _ := runtime.Caller(0)
	repo = filepath.Dir(filepath.Dir(file))
	if wd, err := os.Getwd(); err == nil { // -trimpath, and the VM
		repo = filepath.Dir(wd)
	}
	if os.Geteuid() != 0 {
		if os.Getenv("SHOAL_TEST_STRICT") != "" {
			fmt.Fprintln(os.Stderr, "integration: not root")
			return 1
		}
		fmt.Println("integration: skipped: needs root")
		return 0
	}
	if bin = os.Getenv("SHOAL_BIN"); bin == "" {
		tmp, err := os.MkdirTemp("", "shoal-bin.")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(tmp)
		bin = tmp
		for name, pkg := range map[string]string{"shoal": "./cmd/shoal", "whoami": "./internal/tools/whoami", "load": "./internal/tools/load"} {
			cmd := exec.Command("go", "build", "-o", filepath.Join(bin, name), pkg)
			cmd.Dir, cmd.Env = repo, append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "build %s: %v\n%s", name, err, out)
				return 1
			}
		}
	}
	var err error
	if bin, err = filepath.Abs(bin); err != nil {
		panic(err)
	}
	defer func() {
		for _, l := range labs {
			if err := l.Down(context.Background()); err != nil {
				fmt.Fprintln(os.Stderr, "lab down:", err)
			}
		}
	}()
	return m.Run()
}

// onlyNative skips what does not depend on the data path in the VM.
func onlyNative(t *testing.T) {
	if inVM {
		t.Skip("does not depend on the data path: runs natively")
	}
}

// site is a lab under test.
type site struct {
	*testing.T
	*lab.Lab
}

func up(t *testing.T, o lab.Options) site {
	t.Helper()
	o.Binary = cmp.Or(o.Binary, filepath.Join(bin, "shoal"))
	if inVM {
		o.DataPath = "ipvs"
	}
	ctx, cancel := context.WithTimeout(context.Background(), slow(time.Minute))
	defer cancel()
	l, err := lab.Up(ctx, o)
	if err != nil {
		t.Fatalf("lab up: %v", err)
	}
	s := site{t, l}
	t.Cleanup(s.explain)
	return s
}

// own makes a lab for one test.
func own(t *testing.T, name string, o lab.Options) site {
	t.Helper()
	o.Name = labName(name)
	var s site
	t.Cleanup(func() { // before up's, which runs first then and can still look
		if s.Lab == nil {
			return
		}
		if err := s.Down(context.Background()); err != nil {
			t.Errorf("lab down: %v", err)
		}
	})
	s = up(t, o)
	return s
}

// labName tells the labs of this run from those of another.
func labName(name string) string { return fmt.Sprintf("%s%d", name, os.Getpid()%1_000_000) }

var theLab = sync.OnceValues(func() (*lab.Lab, error) {
	o := lab.Options{Name: labName("it"), Binary: filepath.Join(bin, "shoal")}
	if inVM {
		o.DataPath = "ipvs"
	}
	ctx, cancel := context.WithTimeout(context.Background(), slow(time.Minute))
	defer cancel()
	l, err := lab.Up(ctx, o)
	if err == nil {
		labsMu.Lock()
		labs = append(labs, l)
		labsMu.Unlock()
	}
	return l, err
})

// shared is the lab of the tests that leave nodes alone. Tests that use it don't
// run in parallel, and have it to themselves.
func shared(t *testing.T) site {
	t.Helper()
	l, err := theLab()
	if err != nil {
		t.Fatalf("lab up: %v", err)
	}
	s := site{t, l}
	t.Cleanup(s.reset)
	t.Cleanup(s.explain)
	return s
}

// reset removes what a test made.
func (s site) reset() {
	s.Helper()
	for _, c := range []struct{ list, rm []string }{
		{[]string{"svc", "ls", "-q"}, []string{"svc", "rm"}},
		{[]string{"ps", "-aq"}, []string{"rm", "-f"}},
	} {
		if ids := strings.Fields(s.on("node1", append([]string{"shoal"}, c.list...)...).out); len(ids) > 0 {
			s.on("node1", append(append([]string{"shoal"}, c.rm...), ids...)...)
		}
	}
	s.eventually(slow(20*time.Second), func() error {
		r := s.on("node1", "shoal", "net", "prune", "--force")
		left := s.on("node1", "shoal", "net", "ls", "--filter", "type=custom", "-q").out
		if r.code != 0 || left != "" {
			return fmt.Errorf("networks are left: %s: %s", left, r.err)
		}
		return nil
	})
	s.eventually(slow(10*time.Second), func() error {
		if out := s.on("node1", "shoal", "ps", "-aq").out; out != "" {
			return fmt.Errorf("tasks are left: %s", out)
		}
		return nil
	})
}

// explain shows the state of things after a failure.
func (s site) explain() {
	if dir := os.Getenv("SHOAL_TEST_LOGS"); dir != "" { // whole, for who looks into it
		for _, n := range s.Nodes() {
			if b, err := os.ReadFile(filepath.Join(n.Dir, "agent.log")); err == nil {
				_ = os.WriteFile(filepath.Join(dir, s.Name+"-"+n.Name+".log"), b, 0o600)
			}
		}
	}
	if !s.Failed() {
		return
	}
	for _, c := range [][]string{{"shoal", "node", "ls", "-o", "wide"}, {"shoal", "net", "ls"}, {"shoal", "svc", "ls"}, {"shoal", "ps", "-a", "-o", "wide"}} {
		r := s.on("node1", c...)
		s.Logf("%s:\n%s%s", strings.Join(c, " "), r.out, r.err)
	}
	for _, n := range s.Nodes() {
		r := s.on(n.Name, "shoal", "doctor")
		s.Logf("%s: shoal doctor:\n%s%s", n.Name, r.out, r.err)
		if b, err := os.ReadFile(filepath.Join(n.Dir, "agent.log")); err == nil {
			s.Logf("%s: end of agent.log:\n%s", n.Name, b[max(0, len(b)-3000):])
		}
	}
	if b, err := os.ReadFile(filepath.Join(s.Dir, "containerd/log")); err == nil {
		s.Logf("end of containerd's log:\n%s", b[max(0, len(b)-3000):])
	}
}

type result struct {
	out, err string
	code     int
}

// in runs a command on a node with input.
func (s site) in(stdin, node string, args ...string) result {
	s.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), slow(2*time.Minute))
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "shoal"), append([]string{"lab", "exec", "--name", s.Name, node, "--"}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	r := result{out.String(), errs.String(), 0}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		r.code = exit.ExitCode()
	} else if err != nil {
		s.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
	return r
}

// on runs a command on a node.
func (s site) on(node string, args ...string) result { s.Helper(); return s.in("", node, args...) }

// ok runs a shell-like line on a node that must succeed, and returns what it
// printed, trimmed. Words are split at spaces; 'quoted words' keep theirs.
func (s site) ok(node, line string, args ...any) string {
	s.Helper()
	line = fmt.Sprintf(line, args...)
	r := s.on(node, words(line)...)
	if r.code != 0 {
		s.Fatalf("%s: %s: exit status %d\n%s%s", node, line, r.code, r.out, r.err)
	}
	return strings.TrimSpace(r.out)
}

// fails runs a line that must fail with one clear line that contains want.
func (s site) fails(node, want, line string, args ...any) {
	s.Helper()
	line = fmt.Sprintf(line, args...)
	r := s.on(node, words(line)...)
	first, _, _ := strings.Cut(r.err, "\n")
	if r.code == 0 || !strings.Contains(r.err, want) || !strings.HasPrefix(first, "shoal: ") {
		s.Errorf("%s: %s: exit status %d, %q, want a failure with %q", node, line, r.code, r.err, want)
	}
}

var wordRE = regexp.MustCompile(`'([^']*)'|(\S+)`)

func words(line string) []string {
	var out []string
	for _, m := range wordRE.FindAllStringSubmatch(line, -1) {
		if m[2] == "" {
			out = append(out, m[1])
		} else {
			out = append(out, m[2])
		}
	}
	return out
}

// eventually waits until fn has nothing to say.
func (s site) eventually(d time.Duration, fn func() error) {
	s.Helper()
	deadline := time.Now().Add(d)
	for {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.Fatalf("after %s: %v", d, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// load is what internal/tools/load prints.
type load struct {
	Requests, OK, Failed int
	Hosts, Clients       map[string]int
	Errors               map[string]int
	LastFailure          float64   `json:"last_failure"`
	Failures             []float64 // seconds after Started at which what failed began
	Started              time.Time
}

func (s site) parseLoad(text string) load {
	s.Helper()
	var l load
	if err := json.Unmarshal([]byte(text), &l); err != nil {
		s.Fatalf("load printed %q: %v", text, err)
	}
	return l
}

// inTask asks from inside a task.
func (s site) inTask(task, args string, a ...any) load {
	s.Helper()
	return s.parseLoad(s.ok("node1", "shoal exec %s %s/load %s", task, bin, fmt.Sprintf(args, a...)))
}

// fair wants no failure, and each of n servers to have had its share: max/min at
// most 1.3.
func (s site) fair(what string, l load, n int) {
	s.Helper()
	if l.Failed > 0 || l.OK == 0 || len(l.Hosts) != n {
		s.Errorf("%s: %d of %d failed (%v), %d servers of %d: %v", what, l.Failed, l.Requests, l.Errors, len(l.Hosts), n, l.Hosts)
		return
	}
	lo, hi := l.OK, 0
	for _, c := range l.Hosts {
		lo, hi = min(lo, c), max(hi, c)
	}
	if float64(hi) > 1.3*float64(lo) {
		s.Errorf("%s: unfair shares: %v", what, l.Hosts)
	}
}

// tasks of a service: those that run.
type task struct {
	ID, Name, Service string
	NodeName          string `json:"node_name"`
	Slot              int
	Desired           string
	Attachments       []struct {
		Network, Iface string
		Addrs          []string
	}
	Status struct {
		State, Message string
		PID            int
	}
}

// tasks are those of a service, ended ones that are still known included.
func (s site) tasks(service string) []task {
	s.Helper()
	var ts []task
	if err := json.Unmarshal([]byte(s.ok("node1", "shoal svc ps -o json %s", service)), &ts); err != nil {
		s.Fatal(err)
	}
	return ts
}

func (s site) running(service string) []task {
	s.Helper()
	return slices.DeleteFunc(s.tasks(service), func(t task) bool { return t.Desired != "running" || t.Status.State != "running" })
}

func (s site) task(name string) task {
	s.Helper()
	var ts []task
	if err := json.Unmarshal([]byte(s.ok("node1", "shoal ps -a -o json")), &ts); err != nil {
		s.Fatal(err)
	}
	for _, t := range ts {
		if t.Name == name {
			return t
		}
	}
	s.Fatalf("no task %s", name)
	return task{}
}

// whoami is a service of the test server.
func (s site) whoami(name string, replicas int, flags string) {
	s.Helper()
	s.ok("node1", "shoal svc create --name %s --replicas %d %s -- %s/whoami", name, replicas, flags, bin)
}

// labOptions are those of a lab of three nodes and managers.
func labOptions() lab.Options { return lab.Options{Nodes: 3} }
