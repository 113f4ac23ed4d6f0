// Package chaos is a driver that does to a lab of real nodes what a long life
// does to a cluster: users' commands in random order, while agents are killed,
// machines lose their power, cables are cut and strangers change the kernel. It
// then holds the cluster against what Shoal promises.
//
// A run is rounds. In each, commands and faults come in an order that the seed
// gives; then, with the faults still there, the oracle is asked: traffic and names
// work, or doctor on some node says that something doesn't (oracle.go). Then all
// faults are healed, and at this quiet point everything must be as it was ordered
// (quiet.go): what was acknowledged exists, what was removed or refused does not,
// every service and task is reached from every node by its name, its VIP, its own
// address and its published ports, no address is held twice, and every doctor says
// ok. At the end everything is removed, and nothing may be left (left.go).
//
// What is right is known from what commands were answered (model.go), and measured
// by requests from inside tasks, not by what the agents say of themselves.
package chaos

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/lab"
)

// Options of Run.
type Options struct {
	Seed     uint64
	Duration time.Duration // rounds are begun until it is over
	Rounds   int           // at most; 0: as many as Duration has room for
	Bin      string        // directory of the binaries shoal and whoami
	Name     string        // of the lab
	Nodes    int           // 0: 5
	Faults   []string      // only these; empty: all that are enabled
	DataPath string        // of every agent; empty: its own choice
	Keep     bool          // leave the lab when something was found
	Out      io.Writer     // what is done, a line each
}

// Report is what a run did and found.
type Report struct {
	Rounds, Commands, Refused, Doubtful, Faults, Requests int
	// Problems are promises that were not kept, each with where and how.
	Problems []string
}

func (r Report) String() string {
	return fmt.Sprintf("%d rounds, %d commands (%d refused, %d left open), %d faults, %d requests checked: %d problems",
		r.Rounds, r.Commands, r.Refused, r.Doubtful, r.Faults, r.Requests, len(r.Problems))
}

// world is a run.
type world struct {
	o   Options
	lab *lab.Lab
	Report
	count  sync.Mutex // over the report, of commands that are given at once
	rng    *rand.Rand
	model  model
	faults []*fault // that last now
	logs   map[string]int64
	disks  []string // mounted, to be filled
	// storeless are managers that lost their store, and may not vote yet.
	storeless map[string]bool
	disasters map[string]bool // that were
	began     time.Time
	// caughtUp is a manager that has carried out all that was told before this quiet
	// point; "": none is known yet. marks are the labels that were set to find out.
	caughtUp string
	marks    int
}

// Run does it. The error is for what kept it from being done, like a lab that does
// not come up; what is wrong with Shoal is in the report.
func Run(ctx context.Context, o Options) (_ Report, err error) {
	if o.Nodes == 0 {
		o.Nodes = 5
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
	w := &world{o: o, logs: map[string]int64{}, storeless: map[string]bool{}, disasters: map[string]bool{}, began: time.Now()}
	w.say("seed %d, %s, %d nodes", o.Seed, o.Duration, o.Nodes)
	if err := w.up(ctx); err != nil {
		return w.Report, err
	}
	defer func() {
		if o.Keep && len(w.Problems) > 0 {
			w.say("the lab stays: shoal lab exec --name %s node1 -- shoal doctor; shoal lab down --name %s", o.Name, o.Name)
			return
		}
		w.unmount()
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if derr := w.lab.Down(dctx); derr != nil {
			w.problem("lab down: %v", derr)
		}
		w.checkNothingLeft()
	}()
	end := time.Now().Add(o.Duration)
	for r := 1; (o.Rounds == 0 || r <= o.Rounds) && time.Now().Before(end) && ctx.Err() == nil; r++ {
		w.Rounds = r
		// Of each round by itself: how the one before ended does not change it.
		w.rng = rand.New(rand.NewPCG(o.Seed, uint64(r)))
		w.say("round %d", r)
		w.round(ctx)
		if len(w.Problems) == 0 && ctx.Err() == nil {
			w.disaster(ctx)
		}
		if len(w.Problems) > 0 {
			w.explain(ctx)
			break // what follows from it would hide it
		}
	}
	if len(w.Problems) == 0 && ctx.Err() == nil {
		w.say("removing everything")
		w.checkRemoval(ctx)
		if len(w.Problems) > 0 {
			w.explain(ctx)
		}
	}
	return w.Report, ctx.Err()
}

func (w *world) say(format string, args ...any) {
	fmt.Fprintf(w.o.Out, "%6.1f  %s\n", time.Since(w.began).Seconds(), fmt.Sprintf(format, args...))
}

func (w *world) problem(format string, args ...any) {
	p := fmt.Sprintf(format, args...)
	w.Problems = append(w.Problems, p)
	w.say("PROBLEM: %s", p)
}

// up makes the lab, each node's data on a small disk of its own that can be filled.
func (w *world) up(ctx context.Context) error {
	dir := "/run/shoal-lab-" + w.o.Name
	for i := range w.o.Nodes {
		d := filepath.Join(dir, "node"+strconv.Itoa(i+1), "data")
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
		if err := mountDisk(d); err != nil {
			w.unmount()
			return err
		}
		w.disks = append(w.disks, d)
	}
	uctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	l, err := lab.Up(uctx, lab.Options{Name: w.o.Name, Dir: dir, Nodes: w.o.Nodes, Managers: 3, Binary: filepath.Join(w.o.Bin, "shoal"), DataPath: w.o.DataPath})
	if err != nil {
		w.unmount()
		_ = os.RemoveAll(dir)
		return fmt.Errorf("lab up: %w", err)
	}
	w.lab = l
	w.model = newModel(w.o.Nodes)
	return nil
}

// scaled stretches a wait by how busy the machine is: a promise of two seconds is
// one of twenty where ten programs want each processor.
func scaled(d time.Duration) time.Duration {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return d
	}
	load, err := strconv.ParseFloat(strings.Fields(string(b))[0], 64)
	if err != nil {
		return d
	}
	return time.Duration(float64(d) * min(max(1, load/float64(runtime.NumCPU())), 6))
}

// Bounds of a round. The settled time is how long after the last command and fault
// the oracle is asked: longer than a dead node needs to be noticed (3 s) and its
// tasks to be made anew.
//
// Where no majority of the managers is left each command takes its time to be
// refused: the steps have a bound, too.
const (
	stepsTime = 40 * time.Second
	settled   = 12 * time.Second
	quietTime = 90 * time.Second
)

func (w *world) round(ctx context.Context) {
	steps := 6 + w.rng.IntN(6)
	start := time.Now()
	for range steps {
		if ctx.Err() != nil {
			return
		}
		if time.Since(start) > stepsTime {
			break
		}
		switch {
		case len(w.faults) < 2 && w.rng.IntN(3) == 0:
			w.injectOne(ctx)
		case len(w.faults) > 0 && w.rng.IntN(8) == 0:
			w.heal(ctx, w.faults[w.rng.IntN(len(w.faults))])
		default:
			w.command(ctx)
		}
		sleep.For(ctx, time.Duration(w.rng.IntN(1500))*time.Millisecond)
	}
	if len(w.faults) == 0 {
		w.injectOne(ctx)
	}
	if len(w.faults) > 0 && w.rng.IntN(2) == 0 {
		w.askOracle(ctx)
	}
	for len(w.faults) > 0 && ctx.Err() == nil {
		w.heal(ctx, w.faults[0])
	}
	w.checkQuiet(ctx)
}

// explain shows how things are where something was found.
func (w *world) explain(ctx context.Context) {
	for _, c := range [][]string{{"node", "ls"}, {"net", "ls"}, {"svc", "ls"}, {"ps", "-a", "--no-trunc"}} {
		for _, n := range w.lab.NodeList {
			if out, err := w.lab.Run(ctx, n.Name, append([]string{w.lab.Binary}, c...)...); err == nil {
				w.say("%s: shoal %s\n%s", n.Name, strings.Join(c, " "), out)
				break
			}
		}
	}
	for _, n := range w.lab.NodeList {
		out, _ := w.lab.Run(ctx, n.Name, w.lab.Binary, "doctor")
		w.say("%s: shoal doctor\n%s", n.Name, out)
		if b, err := os.ReadFile(filepath.Join(n.Dir, "agent.log")); err == nil {
			w.say("%s: end of agent.log\n%s", n.Name, b[max(0, len(b)-5000):])
		}
	}
}
