package lab

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
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
)

func TestMain(m *testing.M) {
	if os.Getenv("LAB_TEST_AGENT") != "" {
		fakeAgent()
	}
	goleak.VerifyTestMain(m)
}

// testLab is a lab on paper.
func testLab(nodes int) *Lab {
	l := &Lab{Name: "paper", Dir: "/nonexistent", Binary: "/bin/true"}
	for i := 1; i <= nodes; i++ {
		l.NodeList = append(l.NodeList, l.node(i))
	}
	return l
}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a lab needs root")
	}
}

func TestUpRefusals(t *testing.T) {
	needRoot(t)
	for name, k := range map[string]struct {
		o    Options
		want string
	}{
		"capital":         {Options{Name: "Lab"}, `lab name "Lab": use a letter`},
		"digit first":     {Options{Name: "1a"}, `lab name "1a"`},
		"dash":            {Options{Name: "a-b"}, `lab name "a-b"`},
		"path":            {Options{Name: "../x"}, `lab name "../x"`},
		"long":            {Options{Name: "abcdefghijklmnopq"}, `lab name "abcdefghijklmnopq"`},
		"no nodes":        {Options{Name: "nope", Nodes: -1}, "-1 nodes is out of range: use 1 to 250"},
		"many nodes":      {Options{Name: "nope", Nodes: 251}, "251 nodes is out of range"},
		"many managers":   {Options{Name: "nope", Nodes: 2, Managers: 3}, "3 managers is out of range"},
		"no managers":     {Options{Name: "nope", Nodes: 2, Managers: -1}, "-1 managers is out of range"},
		"small MTU":       {Options{Name: "nope", MTU: 10}, "MTU 10 is out of range"},
		"great MTU":       {Options{Name: "nope", MTU: 70000}, "MTU 70000 is out of range"},
		"its own program": {Options{Name: "nope", Nodes: 1, Dir: filepath.Join(t.TempDir(), "lab"), Binary: "/nonexistent/shoal"}, "node1: start agent"},
	} {
		t.Run(name, func(t *testing.T) {
			if l, err := Up(context.Background(), k.o); err == nil || !strings.Contains(err.Error(), k.want) {
				t.Errorf("%v, %v, want %q", l, err, k.want)
			}
			if left, _ := nl.List("shoal-nope"); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestOpenRefusals(t *testing.T) {
	for name, want := range map[string]string{
		"nosuchlab": "lab nosuchlab is not up: run 'shoal lab up --name nosuchlab'",
		"../x":      `lab name "../x"`,
		"A":         `lab name "A"`,
	} {
		if _, err := Open(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
}

// TestNodeRefusals: each call with a node that the lab does not have says which
// it has, and touches nothing (the lab is on paper).
func TestNodeRefusals(t *testing.T) {
	l := testLab(2)
	ctx := context.Background()
	for name, call := range map[string]func() error{
		"kill":                func() error { return l.Kill(ctx, "node9") },
		"kill agent":          func() error { return l.KillAgent("node9") },
		"start":               func() error { return l.Start(ctx, "node9") },
		"link":                func() error { return l.Link("node9", false) },
		"partition, first":    func() error { return l.Partition([]string{"node9"}, []string{"node1"}) },
		"partition, second":   func() error { return l.Partition([]string{"node1"}, []string{"node2", "node9"}) },
		"exec":                func() error { _, err := l.Run(ctx, "node9", "true"); return err },
		"command":             func() error { _, _, err := l.Command(ctx, "node9", "true"); return err },
		"partition of nobody": func() error { return l.Partition([]string{"node1"}, []string{""}) },
	} {
		if err := call(); err == nil || !strings.Contains(err.Error(), "no such node: ") || !strings.Contains(err.Error(), "lab paper has node1, node2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := l.Partition([]string{"node1", "node2"}, []string{"node2"}); err == nil || !strings.Contains(err.Error(), "node2 is on both sides") {
		t.Errorf("a node on both sides: %v", err)
	}
	for _, k := range [][2][]string{{nil, {"node1"}}, {{"node1"}, nil}} {
		if err := l.Partition(k[0], k[1]); err == nil || !strings.Contains(err.Error(), "two groups") {
			t.Errorf("an empty side: %v", err)
		}
	}
	if err := l.KillAgent("node1"); err == nil || !strings.Contains(err.Error(), "its agent is not running") {
		t.Errorf("an agent that does not run: %v", err)
	}
	if _, _, err := l.Command(ctx, "node1"); err == nil {
		t.Error("no command is taken")
	}
	if code, err := l.Exec(ctx, "node1", []string{"nosuchcommand"}, nil, nil, nil); code != 127 || err == nil {
		t.Errorf("a command that is not there: %d, %v", code, err)
	}
}

// TestKillAgentSparesStrangers: a lab whose agent is gone must not kill whoever
// has its process ID now.
func TestKillAgentSparesStrangers(t *testing.T) {
	needRoot(t)
	l := testLab(1)
	l.NodeList[0].PID = os.Getpid() // not in that node's namespace
	if err := l.KillAgent("node1"); err == nil || !strings.Contains(err.Error(), "its agent is not running") {
		t.Errorf("got %v", err)
	}
}

func TestNames(t *testing.T) {
	l := testLab(250)
	seen := map[netip.Addr]bool{Outside: true}
	for _, n := range l.NodeList {
		if seen[n.Addr] || !Underlay.Contains(n.Addr) {
			t.Errorf("%s has address %s", n.Name, n.Addr)
		}
		seen[n.Addr] = true
		if !strings.HasPrefix(n.Netns, "shoal-paper-node") || len(n.Name) > 15 {
			t.Errorf("node %+v", n)
		}
	}
	l.Name = defaultName
	if l.underlay() != "shoal-underlay" || dirOf(defaultName) != "/run/shoal-lab" || dirOf("x") != "/run/shoal-lab-x" {
		t.Error("names of the default lab")
	}
	for name, want := range map[string]string{"node1": "node1\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"} {
		if got := string(ifname(name)); got != want {
			t.Errorf("%q", got)
		}
	}
}

// fakeAgent stands for shoal agent where the lab itself is what is tested.
func fakeAgent() {
	ln, err := listenSocket(os.Args)
	if err != nil {
		println(err.Error())
		os.Exit(1)
	}
	for {
		c, err := ln.Accept()
		if err != nil {
			os.Exit(0)
		}
		c.Close()
	}
}

// TestUpAndDown makes a lab of real namespaces and stand-ins for the agents, cuts
// it, kills in it, and removes it with all there is of it.
func TestUpAndDown(t *testing.T) {
	needRoot(t)
	t.Setenv("LAB_TEST_AGENT", "1")

	name := "wunit" + strconv.Itoa(os.Getpid())
	dir := filepath.Join(t.TempDir(), "lab")
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	var said bytes.Buffer
	l, err := Up(ctx, Options{Name: name, Nodes: 2, Dir: dir, NoInit: true, Progress: &said})
	if err != nil {
		t.Fatal(err)
	}
	down := func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(down)
	if _, err := Up(ctx, Options{Name: name, Nodes: 1, Dir: dir, NoInit: true}); err == nil || !strings.Contains(err.Error(), "is up already") {
		t.Errorf("a second one: %v", err)
	}
	if !strings.Contains(said.String(), "node2: namespace shoal-"+name+"-node2") {
		t.Errorf("progress: %s", said.String())
	}
	reaches := func() bool {
		_, err := l.Run(ctx, "node1", "ping", "-c1", "-W1", l.Nodes()[1].Addr.String())
		return err == nil
	}
	if out, err := l.Run(ctx, "node1", "sh", "-c", "echo $SHOAL_SOCKET"); err != nil || strings.TrimSpace(out) != l.Nodes()[0].Socket {
		t.Errorf("socket of node1: %q, %v", out, err)
	}
	if code, err := l.Exec(ctx, "node1", []string{"sh", "-c", "exit 7"}, nil, nil, nil); code != 7 || err != nil {
		t.Errorf("exit status %d, %v", code, err)
	}
	if code, err := l.Exec(ctx, "node1", []string{"sh", "-c", "kill -9 $$"}, nil, nil, nil); code != 137 || err != nil {
		t.Errorf("exit status %d, %v", code, err)
	}
	if _, err := l.Run(ctx, "node1", "sh", "-c", "echo why >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "exit status 3: why") {
		t.Errorf("got %v", err)
	}
	ping := true
	if _, err := lookPath("ping", os.Getenv("PATH")); err != nil {
		ping = false
	}
	if ping && !reaches() {
		t.Error("node1 does not reach node2")
	}
	if err := l.Partition([]string{"node1"}, []string{"node2"}); err != nil {
		t.Error(err)
	} else if ping && reaches() {
		t.Error("a partition lets pass")
	}
	if err := l.Heal(); err != nil {
		t.Error(err)
	}
	if err := l.Heal(); err != nil { // nothing to heal is fine
		t.Error(err)
	}
	if ping && !reaches() {
		t.Error("a healed lab lets nothing pass")
	}
	if err := l.Start(ctx, "node1"); err == nil || !strings.Contains(err.Error(), "node1 runs already") {
		t.Errorf("start of what runs: %v", err)
	}
	if err := l.Kill(ctx, "node2"); err != nil {
		t.Error(err)
	}
	if ping && reaches() {
		t.Error("a dead node answers")
	}
	if err := l.Start(ctx, "node2"); err != nil {
		t.Error(err)
	}
	if err := l.KillAgent("node1"); err != nil {
		t.Error(err)
	}
	pids := []int{l.Nodes()[1].PID}
	down()
	for _, pid := range pids {
		if alive(pid) {
			t.Errorf("process %d is left", pid)
		}
	}
	if left, _ := nl.List("shoal-" + name); len(left) > 0 {
		t.Errorf("namespaces are left: %v", left)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the directory is left: %v", err)
	}
}

// listenSocket opens the socket that an agent's arguments name.
func listenSocket(args []string) (net.Listener, error) {
	for i, a := range args {
		if a == "--socket" && i+1 < len(args) {
			_ = os.Remove(args[i+1]) // of one that was killed
			return net.Listen("unix", args[i+1])
		}
	}
	return nil, errors.New("no --socket")
}

// TestStartTogether: nodes that several commands start at once are all known to
// run, and one node is started once; what runs in a node's directory ends with the
// lab, whatever namespace it is in.
func TestStartTogether(t *testing.T) {
	needRoot(t)
	t.Setenv("LAB_TEST_AGENT", "1")
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	o := Options{Name: "wtog" + strconv.Itoa(os.Getpid()), Nodes: 3, Dir: filepath.Join(t.TempDir(), "lab"), NoInit: true}
	l, err := Up(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	for _, n := range l.Nodes() {
		if err := l.Kill(ctx, n.Name); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	errs := make([]error, 6)
	for i := range errs {
		mine := *l // as another process has read it
		mine.NodeList = l.Nodes()
		wg.Go(func() { errs[i] = mine.Start(ctx, "node"+strconv.Itoa(i%3+1)) })
	}
	wg.Wait()
	for i := range 3 {
		if (errs[i] == nil) == (errs[i+3] == nil) {
			t.Errorf("node%d, started twice at once: %v, %v", i+1, errs[i], errs[i+3])
		}
	}
	if err := l.change(func() error { return nil }); err != nil { // reads
		t.Fatal(err)
	}
	for _, n := range l.Nodes() {
		if !n.Running() {
			t.Errorf("%s is not known to run: %d", n.Name, n.PID)
		}
	}
	shim := exec.Command(l.Binary, "task-shim", filepath.Join(l.NodeList[0].Dir, "data", "x"), "--socket", filepath.Join(l.NodeList[0].Dir, "x.sock"))
	shim.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := shim.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- shim.Wait() }()
	for up := false; !up && ctx.Err() == nil; _, err = os.Stat(filepath.Join(l.NodeList[0].Dir, "x.sock")) {
		up = err == nil
		time.Sleep(time.Millisecond)
	}
	if err := l.Down(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("a shim outlives the lab")
		_ = shim.Process.Kill()
		<-ended
	}
}
