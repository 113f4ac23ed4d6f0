// Package lab makes several nodes on one machine: for people to try Shoal, for
// the demo, and for every test above unit level.
//
//	      underlay namespace: bridge br0, 172.30.0.254/24 ("the outside")
//	       │ node1        │ node2        │ node3        (veth ports)
//	┌──────┴─────┐ ┌──────┴─────┐ ┌──────┴─────┐
//	│ eth0 .1    │ │ eth0 .2    │ │ eth0 .3    │        namespaces shoal-node1, …
//	│ shoal agent│ │ shoal agent│ │ shoal agent│        the real binary, own state
//	└────────────┘ └────────────┘ └────────────┘
//
// A node's agent is told its instance name, so that the namespaces it makes
// (shoal-node1-net-…, shoal-node1-task-…) can stand beside the others' in
// /run/netns. What a lab is made of is written to lab.json before it is made,
// so that Down removes also what a crash left half-made.
package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/internal/proc"
	"github.com/shoalnet/shoal/runtime/cgroup"
)

// MaxNodes is what the underlay's /24 has room for.
const MaxNodes = 250

// Underlay is the network that the nodes are on; Outside is the address of the
// underlay namespace, which is every node's default gateway.
var (
	Underlay = netip.MustParsePrefix("172.30.0.0/24")
	Outside  = netip.MustParseAddr("172.30.0.254")
)

// Options of Up. The zero value of a field is its default.
type Options struct {
	Name      string   // "": "lab". Tells labs of one machine apart
	Nodes     int      // 3
	Managers  int      // 3, or 1 with fewer nodes
	Binary    string   // this program
	Dir       string   // /run/shoal-lab[-NAME]
	AgentArgs []string // further arguments of every agent
	AgentEnv  []string // NAME=VALUE further, of every agent
	DataPath  string   // --data-path of every agent
	LogLevel  string   // of every agent; "info"
	MTU       int      // of the underlay, bytes; 1500
	NoInit    bool     // agents only, no cluster
	// Containers: where containerd is installed, one of the lab's own runs tasks
	// from images on all nodes.
	Containers bool
	Progress   io.Writer // what is being done, a line each; nil: nowhere
}

// Node is one node of a lab.
type Node struct {
	Name   string     `json:"name"`
	Netns  string     `json:"netns"`
	Addr   netip.Addr `json:"addr"`
	Socket string     `json:"socket"`
	Dir    string     `json:"dir"` // data/, run/ and agent.log
	PID    int        `json:"pid"` // of its agent; 0: not running
}

// Lab is a lab that is up, or was.
type Lab struct {
	Name     string   `json:"name"`
	Dir      string   `json:"dir"`
	Binary   string   `json:"binary"`
	Args     []string `json:"args"` // of every agent
	Env      []string `json:"env,omitempty"`
	MTU      int      `json:"mtu"`
	NodeList []Node   `json:"nodes"`
	// Containerd is the process ID of the lab's containerd; 0: it has none.
	Containerd int `json:"containerd,omitempty"`

	progress io.Writer
}

const defaultName = "lab"

var nameRE = regexp.MustCompile(`^[a-z][a-z0-9]{0,15}$`)

func badName(name string) error {
	return fmt.Errorf("lab name %q: use a letter, then up to 15 letters and digits, all small", name)
}

// MTU of the underlay, bytes: room for RFC 791's 576 octets inside of VXLAN's
// 50, and what a veth takes at most.
const (
	minMTU = 576 + 50
	maxMTU = 65535
)

func dirOf(name string) string {
	if name == defaultName {
		return "/run/shoal-lab"
	}
	return "/run/shoal-lab-" + name
}

// prefix begins the names of the lab's namespaces.
func (l *Lab) prefix() string {
	if l.Name == defaultName {
		return "shoal"
	}
	return "shoal-" + l.Name
}

func (l *Lab) underlay() string { return l.prefix() + "-underlay" }

func (l *Lab) say(format string, args ...any) {
	if l.progress != nil {
		fmt.Fprintf(l.progress, format+"\n", args...)
	}
}

// change makes a change to a lab that others may be changing at the same time:
// what is on disk counts, not what was read some time ago.
func (l *Lab) change(fn func() error) error {
	f, err := os.OpenFile(filepath.Join(l.Dir, "lab.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close() // and with it the lock
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	b, err := os.ReadFile(filepath.Join(l.Dir, "lab.json"))
	if err != nil {
		return fmt.Errorf("lab %s: %w", l.Name, err)
	}
	var now Lab
	if err := json.Unmarshal(b, &now); err != nil {
		return fmt.Errorf("lab %s: %s is damaged: %w", l.Name, filepath.Join(l.Dir, "lab.json"), err)
	}
	for i := range l.NodeList {
		if i < len(now.NodeList) {
			l.NodeList[i].PID = now.NodeList[i].PID
		}
	}
	l.Containerd = now.Containerd
	if err := fn(); err != nil {
		return err
	}
	return l.save()
}

func (l *Lab) save() error {
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(l.Dir, "lab.json"), append(b, '\n'))
}

// Open finds a lab by its name ("" is the default one).
func Open(name string) (*Lab, error) {
	if name == "" {
		name = defaultName
	}
	if !nameRE.MatchString(name) {
		return nil, badName(name)
	}
	b, err := os.ReadFile(filepath.Join(dirOf(name), "lab.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("lab %s is not up: run 'shoal lab up%s'", name, nameFlag(name))
	}
	if err != nil {
		return nil, fmt.Errorf("lab %s: %w", name, err)
	}
	l := &Lab{}
	if err := json.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("lab %s: %s is damaged: %w", name, filepath.Join(dirOf(name), "lab.json"), err)
	}
	return l, nil
}

func nameFlag(name string) string {
	if name == defaultName {
		return ""
	}
	return " --name " + name
}

// Up makes a lab. When it fails nothing of the lab is left.
func Up(ctx context.Context, o Options) (_ *Lab, err error) {
	if o.Name == "" {
		o.Name = defaultName
	}
	if o.Nodes == 0 {
		o.Nodes = 3
	}
	if o.Managers == 0 {
		o.Managers = 1
		if o.Nodes >= 3 {
			o.Managers = 3
		}
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	switch {
	case os.Geteuid() != 0:
		return nil, errors.New("a lab needs root, for network namespaces: run it as root")
	case !nameRE.MatchString(o.Name):
		return nil, badName(o.Name)
	case o.MTU < minMTU || o.MTU > maxMTU:
		return nil, fmt.Errorf("MTU %d is out of range: use %d to %d bytes", o.MTU, minMTU, maxMTU)
	case o.Nodes < 1 || o.Nodes > MaxNodes:
		return nil, fmt.Errorf("%d nodes is out of range: use 1 to %d", o.Nodes, MaxNodes)
	case o.Managers < 1 || o.Managers > o.Nodes:
		return nil, fmt.Errorf("%d managers is out of range: use 1 to the number of nodes, %d", o.Managers, o.Nodes)
	}
	if o.Binary == "" {
		if o.Binary, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("own executable: %w", err)
		}
	}
	if o.Binary, err = filepath.Abs(o.Binary); err != nil {
		return nil, err
	}
	dir := o.Dir
	if dir == "" {
		dir = dirOf(o.Name)
	}
	if _, err := os.Stat(filepath.Join(dir, "lab.json")); err == nil {
		return nil, fmt.Errorf("lab %s is up already: use it, or run 'shoal lab down%s' first", o.Name, nameFlag(o.Name))
	}
	l := &Lab{Name: o.Name, Dir: dir, Binary: o.Binary, MTU: o.MTU, progress: o.Progress}
	if o.DataPath != "" {
		l.Args = append(l.Args, "--data-path", o.DataPath)
	}
	if o.LogLevel != "" {
		l.Args = append(l.Args, "--log-level", o.LogLevel)
	}
	l.Args, l.Env = append(l.Args, o.AgentArgs...), o.AgentEnv
	for i := 1; i <= o.Nodes; i++ {
		l.NodeList = append(l.NodeList, l.node(i))
	}
	if _, err := nl.Open(l.underlay()); err == nil {
		return nil, fmt.Errorf("namespace %s exists, but no lab of that name does: remove it with 'ip netns del %s', or use another --name", l.underlay(), l.underlay())
	}
	if err := os.MkdirAll(l.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("lab directory: %w", err)
	}
	if err := l.save(); err != nil {
		return nil, fmt.Errorf("lab directory: %w", err)
	}
	defer func() {
		if err != nil {
			dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			defer cancel()
			if derr := l.Down(dctx); derr != nil {
				err = fmt.Errorf("%w (and not all of it could be removed: %w)", err, derr)
			}
		}
	}()
	l.say("underlay %s, bridge br0, %s", l.underlay(), Underlay)
	if err := l.makeUnderlay(); err != nil {
		return nil, err
	}
	if o.Containers && hasContainerd() {
		l.say("containerd, in %s", l.containerdDir())
		if err := l.StartContainerd(ctx); err != nil {
			return nil, err
		}
	}
	for i := range l.NodeList {
		n := &l.NodeList[i]
		l.say("%s: namespace %s, %s, agent", n.Name, n.Netns, n.Addr)
		if err := l.makeNode(n); err != nil {
			return nil, err
		}
		if err := l.startAgent(n); err != nil {
			return nil, err
		}
	}
	for i := range l.NodeList {
		if err := l.awaitAgent(ctx, &l.NodeList[i]); err != nil {
			return nil, err
		}
	}
	if o.NoInit {
		return l, nil
	}
	l.say("node1: shoal init --advertise-addr %s", l.NodeList[0].Addr)
	if _, err := l.Run(ctx, "node1", l.Binary, "init", "--advertise-addr", l.NodeList[0].Addr.String()); err != nil {
		return nil, err
	}
	for i := range l.NodeList[1:] {
		if err := l.Join(ctx, &l.NodeList[i+1], i+1 < o.Managers); err != nil {
			return nil, err
		}
	}
	return l, l.awaitReady(ctx)
}

// Join joins a node that is in no cluster by way of node1, as people do it: with
// the token that node1 shows.
func (l *Lab) Join(ctx context.Context, n *Node, manager bool) error {
	role := "worker"
	if manager {
		role = "manager"
	}
	token, err := l.Run(ctx, l.NodeList[0].Name, l.Binary, "token", "show", "-q", role)
	if err != nil {
		return err
	}
	token = strings.TrimSpace(token)
	l.say("%s: shoal join --token %s… --advertise-addr %s %s    (a %s's)", n.Name, token[:min(14, len(token))], n.Addr, l.NodeList[0].Addr, role)
	_, err = l.Run(ctx, n.Name, l.Binary, "join", "--token", token, "--advertise-addr", n.Addr.String(), l.NodeList[0].Addr.String())
	return err
}

func (l *Lab) node(i int) Node {
	name := "node" + strconv.Itoa(i)
	a := Underlay.Addr().As4()
	a[3] = byte(i)
	dir := filepath.Join(l.Dir, name)
	return Node{Name: name, Netns: l.prefix() + "-" + name, Addr: netip.AddrFrom4(a), Dir: dir, Socket: filepath.Join(dir, "shoal.sock")}
}

// patience bounds the waits for agents: a few seconds are usual, an emulated
// machine that is busy takes a minute.
const patience = 2 * time.Minute

// awaitReady waits until the managers hold every node ready.
func (l *Lab) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	l.say("waiting until all nodes are ready")
	for {
		out, err := l.Run(ctx, l.NodeList[0].Name, l.Binary, "node", "ls", "-o", "json")
		var nodes []struct{ Status string }
		if err == nil && json.Unmarshal([]byte(out), &nodes) == nil && len(nodes) == len(l.NodeList) &&
			!slices.ContainsFunc(nodes, func(n struct{ Status string }) bool { return n.Status != "ready" }) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the nodes are not ready after %s (%d are known: %s): see %s/*/agent.log: %w", patience, len(nodes), strings.TrimSpace(out), l.Dir, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// containerdAddress is what agents are told; empty where there is none.
func (l *Lab) containerdAddress() string {
	if l.Containerd == 0 {
		return ""
	}
	return l.containerdSocket()
}

// startAgent starts a node's agent as a daemon.
func (l *Lab) startAgent(n *Node) error {
	for _, d := range []string{"data", "run"} {
		if err := os.MkdirAll(filepath.Join(n.Dir, d), 0o755); err != nil {
			return err
		}
	}
	log, err := os.OpenFile(filepath.Join(n.Dir, "agent.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args := append([]string{"agent", "--node-name", n.Name, "--data-dir", filepath.Join(n.Dir, "data"), "--run-dir", filepath.Join(n.Dir, "run"),
		"--hide", l.Dir, "--socket", n.Socket, "--instance", n.Netns, "--advertise-addr", n.Addr.String(), "--containerd", l.containerdAddress()}, l.Args...)
	cmd := exec.Command(l.Binary, args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), l.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return l.change(func() error {
		if n.Running() {
			return fmt.Errorf("%s runs already", n.Name)
		}
		if err := nl.Do(n.Netns, cmd.Start); err != nil {
			return fmt.Errorf("%s: start agent: %w", n.Name, err)
		}
		n.PID = cmd.Process.Pid
		go func() { _ = cmd.Wait() }() // ends with the agent; a lab of another process has init do it
		return nil
	})
}

// awaitAgent waits until the agent answers on its socket.
func (l *Lab) awaitAgent(ctx context.Context, n *Node) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		c, err := net.Dial("unix", n.Socket)
		if err == nil {
			return c.Close()
		}
		if !alive(n.PID) {
			return fmt.Errorf("%s: the agent ended at once: %s", n.Name, lastLine(filepath.Join(n.Dir, "agent.log")))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: the agent does not answer: %w: see %s", n.Name, err, filepath.Join(n.Dir, "agent.log"))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// alive tells whether a process runs; a zombie does not.
func alive(pid int) bool {
	if pid <= 0 {
		return false
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	i := strings.LastIndexByte(string(b), ')')
	return i < 0 || !strings.HasPrefix(string(b[i+1:]), " Z")
}

// Running tells whether the node's agent runs. Once it has ended another process
// may get its ID, but not in the node's namespace.
func (n *Node) Running() bool {
	if !alive(n.PID) {
		return false
	}
	var node, thread syscall.Stat_t
	if err := syscall.Stat(nl.Path(n.Netns), &node); err != nil {
		return false
	}
	// Any of its threads: the agent takes single ones to other namespaces.
	threads, _ := filepath.Glob("/proc/" + strconv.Itoa(n.PID) + "/task/*/ns/net")
	return slices.ContainsFunc(threads, func(f string) bool { return syscall.Stat(f, &thread) == nil && thread.Ino == node.Ino })
}

func lastLine(path string) string {
	b, _ := os.ReadFile(path)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}

// Nodes lists the lab's nodes.
func (l *Lab) Nodes() []Node { return slices.Clone(l.NodeList) }

func (l *Lab) find(name string) (*Node, error) {
	for i := range l.NodeList {
		if l.NodeList[i].Name == name {
			return &l.NodeList[i], nil
		}
	}
	var names []string
	for _, n := range l.NodeList {
		names = append(names, n.Name)
	}
	return nil, fmt.Errorf("no such node: %s: lab %s has %s", name, l.Name, strings.Join(names, ", "))
}

// Command prepares a command to run on a node; start it with Start. Its
// environment names the node's agent and has shoal on the PATH.
func (l *Lab) Command(ctx context.Context, node string, argv ...string) (*exec.Cmd, string, error) {
	n, err := l.find(node)
	if err != nil {
		return nil, "", err
	}
	if len(argv) == 0 {
		return nil, "", errors.New("no command")
	}
	path := filepath.Dir(l.Binary) + ":" + os.Getenv("PATH")
	file := argv[0]
	if !strings.Contains(file, "/") {
		if file, err = lookPath(file, path); err != nil {
			return nil, "", err
		}
	}
	cmd := exec.CommandContext(ctx, file, argv[1:]...)
	cmd.Args[0] = argv[0]
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "PATH=") || strings.HasPrefix(e, "SHOAL_SOCKET=") }),
		"PATH="+path, "SHOAL_SOCKET="+n.Socket)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	return cmd, n.Netns, nil
}

func lookPath(name, path string) (string, error) {
	for _, d := range filepath.SplitList(path) {
		f := filepath.Join(d, name)
		if fi, err := os.Stat(f); err == nil && !fi.IsDir() && fi.Mode()&0o111 != 0 {
			return f, nil
		}
	}
	return "", fmt.Errorf("exec %s: %w", name, exec.ErrNotFound)
}

// Exec runs a command on a node and returns its exit status: 128+N after signal
// N, 127 for a command that is not found.
func (l *Lab) Exec(ctx context.Context, node string, argv []string, in io.Reader, out, errOut io.Writer) (int, error) {
	cmd, netns, err := l.Command(ctx, node, argv...)
	if errors.Is(err, exec.ErrNotFound) {
		return 127, err
	}
	if err != nil {
		return 1, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, errOut
	if err := nl.Do(netns, cmd.Start); err != nil {
		return 126, err
	}
	err = cmd.Wait()
	var ee *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &ee):
		if ws := ee.Sys().(syscall.WaitStatus); ws.Signaled() {
			return 128 + int(ws.Signal()), nil
		}
		return ee.ExitCode(), nil
	}
	return 1, err
}

// Run runs a command on a node and returns its output; an exit status that is
// not 0 is an error with what the command said.
func (l *Lab) Run(ctx context.Context, node string, argv ...string) (string, error) {
	var out, errOut strings.Builder
	code, err := l.Exec(ctx, node, argv, nil, &out, &errOut)
	if err == nil && code != 0 {
		err = fmt.Errorf("exit status %d", code)
	}
	if err != nil {
		return out.String(), fmt.Errorf("%s: %s: %w: %s", node, strings.Join(argv, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

// Kill is a node's sudden death: its agent and all of its tasks get SIGKILL,
// and its link goes down.
func (l *Lab) Kill(ctx context.Context, node string) error {
	n, err := l.find(node)
	if err != nil {
		return err
	}
	// The cable first: a node that loses its power says no goodbye.
	if err := l.setLink(n, false); err != nil {
		return err
	}
	if err := l.killAll(ctx, n); err != nil {
		return fmt.Errorf("%s: %w", n.Name, err)
	}
	return l.change(func() error {
		n.PID = 0
		return nil
	})
}

// KillAgent kills a node's agent only.
func (l *Lab) KillAgent(node string) error {
	n, err := l.find(node)
	if err != nil {
		return err
	}
	if !n.Running() {
		return fmt.Errorf("%s: its agent is not running", node)
	}
	if err := syscall.Kill(n.PID, syscall.SIGKILL); err != nil {
		return fmt.Errorf("%s: kill agent: %w", node, err)
	}
	for alive(n.PID) {
		time.Sleep(time.Millisecond)
	}
	return l.change(func() error {
		n.PID = 0
		return nil
	})
}

// Start brings a node back: its link, its agent, and the lab's containerd if it had one.
func (l *Lab) Start(ctx context.Context, node string) error {
	n, err := l.find(node)
	if err != nil {
		return err
	}
	if n.Running() {
		return fmt.Errorf("%s runs already", node)
	}
	if err := l.setLink(n, true); err != nil {
		return err
	}
	if l.Containerd != 0 {
		if err := l.StartContainerd(ctx); err != nil {
			return err
		}
	}
	if err := l.startAgent(n); err != nil {
		return err
	}
	return l.awaitAgent(ctx, n)
}

// Link pulls or plugs a node's cable.
func (l *Lab) Link(node string, up bool) error {
	n, err := l.find(node)
	if err != nil {
		return err
	}
	return l.setLink(n, up)
}

// namespaces are those that a node's agent has made.
func (l *Lab) namespaces(n *Node) []string {
	var out []string
	for _, kind := range []string{"-net-", "-task-"} {
		names, _ := nl.List(n.Netns + kind)
		out = append(out, names...)
	}
	return out
}

// killAll kills every process of some nodes: those in their namespaces, also ones
// that an agent makes while it dies, and shims whose namespace has no name any more.
func (l *Lab) killAll(ctx context.Context, nodes ...*Node) error {
	for {
		inodes := map[string]bool{}
		for _, n := range nodes {
			for _, ns := range append(l.namespaces(n), n.Netns) {
				var st syscall.Stat_t
				if err := syscall.Stat(nl.Path(ns), &st); err == nil {
					inodes[fmt.Sprintf("net:[%d]", st.Ino)] = true
				}
			}
		}
		var found []int
		procs, err := filepath.Glob("/proc/[0-9]*/ns/net")
		if err != nil {
			return err
		}
		for _, p := range procs {
			pid, err := strconv.Atoi(strings.Split(p, "/")[2])
			if err != nil || pid == os.Getpid() || !alive(pid) {
				continue
			}
			link, err := os.Readlink(p)
			if err == nil && inodes[link] || slices.ContainsFunc(nodes, func(n *Node) bool { return l.works(pid, n.Dir) }) {
				found = append(found, pid)
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		if len(found) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes don't end: %v: %w", found, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// works tells whether a process is this program, at work in a node's directory.
func (l *Lab) works(pid int, dir string) bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil || strings.TrimSuffix(exe, " (deleted)") != l.Binary {
		return false
	}
	return slices.ContainsFunc(proc.Args(pid), func(arg string) bool {
		return arg == dir || strings.HasPrefix(arg, dir+"/")
	})
}

// PowerOff is what a loss of power is to all of the lab's machines: every process ends,
// and what is in memory only is gone: namespaces, mounts, run directories, control groups.
func (l *Lab) PowerOff(ctx context.Context) error {
	if err := l.powerOff(ctx); err != nil {
		return err
	}
	return l.change(func() error {
		for i := range l.NodeList {
			l.NodeList[i].PID = 0
		}
		return nil
	})
}

func (l *Lab) powerOff(ctx context.Context) error {
	var nodes []*Node
	for i := range l.NodeList {
		nodes = append(nodes, &l.NodeList[i])
	}
	errs := []error{l.killAll(ctx, nodes...), l.endContainerd()}
	for _, n := range nodes { // whoever could make more is dead
		for _, ns := range l.namespaces(n) {
			errs = append(errs, nl.Remove(ns))
		}
		errs = append(errs, cgroup.Clear(cgroup.Root+"/"+n.Netns))
	}
	errs = append(errs, unmountBelow(l.Dir)) // what containers, and tasks that were killed, had
	for _, n := range nodes {
		errs = append(errs, os.RemoveAll(filepath.Join(n.Dir, "run")))
	}
	errs = append(errs, os.RemoveAll(filepath.Join(l.containerdDir(), "state")))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("lab %s: %w", l.Name, err)
	}
	return nil
}

// Down removes all of a lab, also of one that is only half there.
func (l *Lab) Down(ctx context.Context) error {
	errs := []error{l.powerOff(ctx)}
	for _, n := range l.NodeList {
		errs = append(errs, nl.Remove(n.Netns))
	}
	if err := errors.Join(append(errs, nl.Remove(l.underlay()))...); err != nil {
		return err
	}
	if err := os.RemoveAll(l.Dir); err != nil {
		return fmt.Errorf("lab %s: %w", l.Name, err)
	}
	return nil
}
