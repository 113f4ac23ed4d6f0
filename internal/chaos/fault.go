package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/lab"
)

// fault is one that lasts.
type fault struct {
	kind  string
	nodes []string // that it concerns
	heal  func(context.Context) error
	lossy bool // single requests may be lost, and nobody can say so
	off   bool // the nodes have no power
	mute  bool // the nodes' agents don't answer
}

// kind is a way to break something.
type kind struct {
	name string
	// why it is left out until Shoal stands it; empty: it is used.
	why string
	// do breaks it. A nil fault was over at once.
	do func(*world, context.Context) (*fault, error)
	// quiet: it is done at quiet points only, and do heals it, too.
	quiet bool
}

// Kinds are the names of all faults; of those that are left out with the reason.
func Kinds() (names []string, left map[string]string) {
	left = map[string]string{}
	for _, k := range kinds {
		if k.why != "" {
			left[k.name] = k.why
		} else {
			names = append(names, k.name)
		}
	}
	return names, left
}

var kinds = []kind{
	{name: "kill-agent", do: (*world).killAgent},
	{name: "power-loss", do: (*world).powerLoss},
	{name: "stop-agent", do: (*world).stopAgent},
	{name: "partition", do: (*world).partition},
	{name: "kill-program", do: (*world).killProgram},
	{name: "kill-shim", do: (*world).killShim},
	{name: "kernel", do: (*world).kernel},
	{name: "full-disk", do: (*world).fullDisk},
	{name: "loss", do: (*world).loss},
	{name: "data-path", do: (*world).dataPath},
	{name: "lost-store", do: (*world).lostStore},
	{name: "torn-file", do: (*world).tornFile},
	{name: "lost-disk", do: (*world).lostDisk},
	{name: "lost-majority", do: (*world).lostMajority, quiet: true},
	{name: "lost-managers", do: (*world).lostManagers, quiet: true},
}

func (w *world) enabled(quiet bool) []kind {
	return slices.DeleteFunc(slices.Clone(kinds), func(k kind) bool {
		if k.quiet != quiet {
			return true
		}
		if len(w.o.Faults) > 0 {
			return !slices.Contains(w.o.Faults, k.name)
		}
		return k.why != ""
	})
}

func (w *world) injectOne(ctx context.Context) {
	ks := w.enabled(false)
	if len(ks) == 0 {
		return
	}
	k := pick(w, ks)
	if slices.ContainsFunc(w.faults, func(f *fault) bool { return f.kind == k.name }) {
		return
	}
	w.Faults++
	f, err := k.do(w, ctx)
	if err != nil {
		w.say("  fault %s: not made: %v", k.name, err)
		return
	}
	if f != nil {
		f.kind = k.name
		w.faults = append(w.faults, f)
	}
}

// disasterAfter is how long a run has to be for disasters, if it was not asked for them:
// a short one has commands and faults to give, and these take half a minute together.
const disasterAfter = 4 * time.Minute

// disaster does at a quiet point what can be done only there, at times, and each but
// once where nobody asked for it.
func (w *world) disaster(ctx context.Context) {
	ks := w.enabled(true)
	often := 2
	if len(w.o.Faults) == 0 {
		ks = slices.DeleteFunc(ks, func(k kind) bool { return w.o.Duration < disasterAfter || w.disasters[k.name] })
		often = 4
	}
	if len(ks) == 0 || w.rng.IntN(often) > 0 {
		return
	}
	k := pick(w, ks)
	w.disasters[k.name] = true
	w.Faults++
	if _, err := k.do(w, ctx); err != nil && ctx.Err() == nil {
		w.problem("%s: %v", k.name, err)
		return
	}
	w.checkQuiet(ctx)
}

func (w *world) heal(ctx context.Context, f *fault) {
	w.say("  healed: %s %s", f.kind, strings.Join(f.nodes, " "))
	if err := f.heal(ctx); err != nil && ctx.Err() == nil {
		w.problem("%s of %s can't be undone: %v", f.kind, strings.Join(f.nodes, " "), err)
	}
	w.faults = slices.DeleteFunc(w.faults, func(o *fault) bool { return o == f })
}

// well are nodes that no fault concerns.
func (w *world) well() []string {
	return slices.DeleteFunc(sorted(w.model.nodes), func(n string) bool {
		return slices.ContainsFunc(w.faults, func(f *fault) bool { return slices.Contains(f.nodes, n) })
	})
}

var errNobody = errors.New("there is nobody to do it to")

func (w *world) victim() (string, error) {
	if ns := w.well(); len(ns) > 1 {
		return pick(w, ns), nil
	}
	return "", errNobody
}

func (w *world) node(name string) (pid int, dir, netns string) {
	n := w.labNode(name)
	return n.PID, n.Dir, n.Netns
}

// labNode is zero where there is none of the name.
func (w *world) labNode(name string) lab.Node {
	for _, n := range w.lab.NodeList {
		if n.Name == name {
			return n
		}
	}
	return lab.Node{}
}

func (w *world) killAgent(ctx context.Context) (*fault, error) {
	n, err := w.victim()
	if err != nil {
		return nil, err
	}
	w.say("  fault: kill -9 of %s's agent", n)
	return w.fell(ctx, n, false)
}

func (w *world) powerLoss(ctx context.Context) (*fault, error) {
	n, err := w.victim()
	if err != nil {
		return nil, err
	}
	w.say("  fault: %s loses its power", n)
	return w.fell(ctx, n, true)
}

// fell ends a node's agent, or with whole all that runs on it.
func (w *world) fell(ctx context.Context, n string, whole bool) (*fault, error) {
	f := &fault{nodes: []string{n}, off: whole, mute: !whole, heal: func(ctx context.Context) error { return w.lab.Start(ctx, n) }}
	if !whole {
		return f, w.lab.KillAgent(n)
	}
	for _, t := range w.model.tasks {
		if t.node == n {
			t.ended = true
		}
	}
	kctx, cancel := context.WithTimeout(ctx, scaled(30*time.Second))
	defer cancel()
	return f, w.lab.Kill(kctx, n)
}

func (w *world) stopAgent(context.Context) (*fault, error) {
	n, err := w.victim()
	if err != nil {
		return nil, err
	}
	pid, _, _ := w.node(n)
	w.say("  fault: %s's agent is stopped (SIGSTOP)", n)
	return &fault{nodes: []string{n}, mute: true, heal: func(context.Context) error { return syscall.Kill(pid, syscall.SIGCONT) }}, syscall.Kill(pid, syscall.SIGSTOP)
}

func (w *world) partition(context.Context) (*fault, error) {
	all := sorted(w.model.nodes)
	w.rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	n := 1 + w.rng.IntN(2)
	a, b := all[:n], all[n:]
	slices.Sort(a)
	slices.Sort(b)
	w.say("  fault: %s cut off from %s", strings.Join(a, ","), strings.Join(b, ","))
	return &fault{nodes: a, heal: func(context.Context) error { return w.lab.Heal() }}, w.lab.Partition(a, b)
}

// replicas are running tasks of services, by what the managers say.
func (w *world) replicas(ctx context.Context) ([]taskInfo, error) {
	ts, err := w.listTasks(ctx, w.manager())
	ts = slices.DeleteFunc(ts, func(t taskInfo) bool {
		return t.Service == "" || t.Status.State != "running" || t.Status.PID == 0
	})
	if err == nil && len(ts) == 0 {
		err = errNobody
	}
	return ts, err
}

func (w *world) killProgram(ctx context.Context) (*fault, error) {
	ts, err := w.replicas(ctx)
	if err != nil {
		return nil, err
	}
	t := pick(w, ts)
	w.say("  fault: kill -9 of the program of %s", t.Name)
	return nil, syscall.Kill(t.Status.PID, syscall.SIGKILL)
}

func (w *world) killShim(ctx context.Context) (*fault, error) {
	ts, err := w.replicas(ctx)
	if err != nil {
		return nil, err
	}
	t := pick(w, ts)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", t.Status.PID))
	if err != nil {
		return nil, err
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	shim, err := strconv.Atoi(f[1])
	if err != nil || shim <= 1 {
		return nil, fmt.Errorf("the shim of %s is not known: parent is %s", t.Name, f[1])
	}
	w.say("  fault: kill -9 of the shim of %s", t.Name)
	return nil, syscall.Kill(shim, syscall.SIGKILL)
}

// foreign are changes that programs of others make, by what they are made in:
// "net" a network's namespace, "task" a task's, "host" the node's.
var foreign = []struct {
	in    string
	lines []string
}{
	{"net", []string{"ip rule flush"}},
	{"net", []string{"nft flush ruleset"}},
	{"net", []string{"ip route flush table main"}},
	{"net", []string{"ip addr flush dev lo"}},
	{"net", []string{"ip link set vx down"}},
	{"net", []string{"ip link del vx"}},
	{"net", []string{"bridge fdb flush dev vx"}},
	{"net", []string{"ip neigh flush all nud permanent"}},
	{"net", []string{"nft add table inet stranger", "nft add chain inet stranger c { type filter hook forward priority 0; policy drop; }"}},
	{"net", []string{"ip rule add prio 10 unreachable"}},
	{"net", []string{"ip route add blackhole default metric 0 table local"}},
	{"task", []string{"ip link set eth0 down"}},
	{"task", []string{"ip addr flush dev eth0"}},
	{"task", []string{"ip rule flush"}},
	{"task", []string{"ip route flush table main"}},
	{"task", []string{"nft flush ruleset"}},
	{"task", []string{"ip link set lo down"}},
	{"host", []string{"nft flush ruleset"}},
}

func (w *world) kernel(ctx context.Context) (*fault, error) {
	n, err := w.victim()
	if err != nil {
		return nil, err
	}
	_, _, ns := w.node(n)
	c := pick(w, foreign)
	in := ns
	if c.in != "host" {
		names, err := nl.List(ns + "-" + c.in + "-")
		if err != nil || len(names) == 0 {
			return nil, errNobody
		}
		slices.Sort(names)
		in = pick(w, names)
	}
	for _, l := range c.lines {
		w.say("  fault: in %s: %s", in, l)
		if err := inNetns(ctx, in, strings.Fields(l)...); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func inNetns(ctx context.Context, ns string, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := nl.Do(ns, cmd.Start); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("in %s: %s: %w: %s", ns, strings.Join(argv, " "), err, strings.TrimSpace(out.String()))
	}
	return nil
}

// diskBytes is the size of each node's disk: raft's files and what tasks say.
const diskBytes = 64 << 20

func mountDisk(dir string) error {
	if err := syscall.Mount("shoal-chaos", dir, "tmpfs", 0, "size="+strconv.Itoa(diskBytes)); err != nil {
		return fmt.Errorf("mount a disk at %s: %w", dir, err)
	}
	return nil
}

func (w *world) unmount() {
	for _, d := range w.disks {
		_ = syscall.Unmount(d, syscall.MNT_DETACH)
	}
	w.disks = nil
}

func (w *world) fullDisk(context.Context) (*fault, error) {
	n, err := w.victim()
	if err != nil {
		return nil, err
	}
	_, dir, _ := w.node(n)
	file := filepath.Join(dir, "data", "ballast")
	w.say("  fault: %s's disk is full", n)
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for size := 1 << 20; size > 0; { // until not a byte more goes in
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 4
		}
	}
	return &fault{nodes: []string{n}, heal: func(context.Context) error { return os.Remove(file) }}, nil
}

// onTheWay adds rules to what the underlay forwards between nodes.
func (w *world) onTheWay(ctx context.Context, chain string, rules ...string) (func(context.Context) error, error) {
	ns := "shoal-" + w.o.Name + "-underlay"
	lines := append([]string{"add table bridge " + chain, "add chain bridge " + chain + " forward { type filter hook forward priority 1; }"}, rules...)
	undo := func(ctx context.Context) error {
		return inNetns(ctx, ns, "nft", "delete", "table", "bridge", chain)
	}
	return undo, inNetns(ctx, ns, "nft", strings.Join(lines, "; "))
}

func (w *world) loss(ctx context.Context) (*fault, error) {
	n, err := w.victim()
	if err != nil {
		return nil, err
	}
	percent := 3 + w.rng.IntN(10)
	w.say("  fault: %d %% of what %s sends and gets is lost", percent, n)
	heal, err := w.onTheWay(ctx, "loss",
		fmt.Sprintf("add rule bridge loss forward iifname %s numgen random mod 100 < %d drop", n, percent),
		fmt.Sprintf("add rule bridge loss forward oifname %s numgen random mod 100 < %d drop", n, percent))
	return &fault{nodes: []string{n}, heal: heal, lossy: true}, err
}

func (w *world) dataPath(ctx context.Context) (*fault, error) {
	ns := w.well()
	if len(ns) < 2 {
		return nil, errNobody
	}
	a := pick(w, ns)
	b := pick(w, slices.DeleteFunc(ns, func(n string) bool { return n == a }))
	w.say("  fault: 4789/udp is dropped between %s and %s", a, b)
	heal, err := w.onTheWay(ctx, "path",
		fmt.Sprintf("add rule bridge path forward iifname %s oifname %s udp dport 4789 drop", a, b),
		fmt.Sprintf("add rule bridge path forward iifname %s oifname %s udp dport 4789 drop", b, a))
	return &fault{nodes: []string{a, b}, heal: heal}, err
}
