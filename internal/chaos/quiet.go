package chaos

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/internal/sleep"
)

// checkQuiet waits until all is as it must be, and says what is not.
func (w *world) checkQuiet(ctx context.Context) {
	start := time.Now()
	told := start
	var err error
	w.caughtUp = ""
	for {
		if err = w.quiet(ctx); err == nil || ctx.Err() != nil {
			break
		}
		if time.Since(told) > 10*time.Second {
			told = time.Now()
			w.say("  not yet: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
		}
		if limit := scaled(quietTime); time.Since(start) > limit {
			w.problem("%s after all faults were healed:\n%v", limit.Round(time.Second), err)
			break
		}
		sleep.For(ctx, 300*time.Millisecond)
	}
	if ctx.Err() == nil {
		w.say("  quiet after %s", time.Since(start).Round(100*time.Millisecond))
		w.checkLogs()
	}
}

// quiet looks once. Cheap questions come first, and what depends on them only when
// they are answered.
func (w *world) quiet(ctx context.Context) error {
	managers := w.model.managers()
	if i := slices.IndexFunc(sorted(w.model.nodes), func(n string) bool { return w.model.nodes[n].open }); i >= 0 {
		managers = []string{"node1", "node2", "node3"} // some of which are
	}
	if err := w.catchUp(ctx, managers); err != nil {
		return err
	}
	l, err := w.lists(ctx, w.caughtUp)
	if err != nil {
		return err
	}
	if err := w.checkNodes(l.nodes); err != nil {
		return err
	}
	if err := w.checkObjects(l); err != nil {
		return err
	}
	if err := w.counts(ctx); err != nil {
		return err
	}
	if err := w.keepClients(ctx, l); err != nil {
		return err
	}
	if err := w.checkTasks(l); err != nil {
		return err
	}
	// Each manager shows the same.
	for _, n := range w.model.managers() {
		ns, err := list[nodeInfo](ctx, w, n, "node", "ls")
		if err != nil {
			return err
		}
		if !slices.Equal(ns, l.nodes) {
			return fmt.Errorf("node ls: %v at one manager, %v at %s", l.nodes, ns, n)
		}
	}
	if err := w.probe(ctx, l, sorted(w.model.nodes), 20).err(); err != nil {
		return err
	}
	return w.checkDoctors(ctx)
}

// catchUp waits until a manager has carried out all that the managers were told, also
// what they had not agreed on when its answer was given up: a leader without a majority
// keeps it, and carries it out once it has one again. A label behind it tells.
func (w *world) catchUp(ctx context.Context, managers []string) error {
	if w.caughtUp != "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, scaled(commandTime))
	defer cancel()
	var errs []error
	for _, n := range managers {
		w.marks++
		mark := fmt.Sprint(w.marks)
		_, err := w.lab.Run(ctx, n, w.lab.Binary, "node", "update", "--label-add", "chaos="+mark, "node1")
		if err == nil {
			var got string
			if got, err = w.lab.Run(ctx, n, w.lab.Binary, "node", "inspect", "--format", `{{index .Labels "chaos"}}`, "node1"); err == nil {
				if strings.TrimSpace(got) == mark {
					w.caughtUp = n
					return nil
				}
				err = fmt.Errorf("%s shows label chaos=%s of node1, and acknowledged %s", n, strings.TrimSpace(got), mark)
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (w *world) anyLists(ctx context.Context, from []string) (l lists, err error) {
	var errs []error
	for _, n := range from {
		if l, err = w.lists(ctx, n); err == nil {
			return l, nil
		}
		errs = append(errs, err)
	}
	return l, errors.Join(errs...)
}

func (w *world) checkNodes(ns []nodeInfo) error {
	if len(ns) != len(w.model.nodes) {
		return fmt.Errorf("node ls shows %d nodes, want %d", len(ns), len(w.model.nodes))
	}
	leaders := 0
	for _, n := range ns {
		want := w.model.nodes[n.Name]
		switch {
		case want == nil:
			return fmt.Errorf("node ls shows a node %s", n.Name)
		case want.open:
			want.availability, want.role, want.open = n.Availability, n.Role, false
		case n.Status != "ready" || n.Availability != want.availability || n.Role != want.role:
			return fmt.Errorf("node %s is %s, %s, %s, want ready, %s, %s", n.Name, n.Status, n.Availability, n.Role, want.availability, want.role)
		}
		if n.Leader {
			leaders++
		}
	}
	if leaders != 1 {
		return fmt.Errorf("%d leaders", leaders)
	}
	return nil
}

// checkObjects holds what exists against what was acknowledged. What was left open
// is taken as it is found.
func (w *world) checkObjects(l lists) error {
	m := &w.model
	var errs []error
	missing := func(kind, name string, doubt bool, forget func()) {
		if doubt {
			forget()
		} else {
			errs = append(errs, fmt.Errorf("%s %s was acknowledged, and does not exist", kind, name))
		}
	}
	extra := func(kind, name string) {
		errs = append(errs, fmt.Errorf("%s %s exists, and was removed or never acknowledged", kind, name))
	}
	have := map[string]bool{}
	for _, n := range l.nets {
		if slices.Contains([]string{"default", "host", "none"}, n.Name) {
			continue
		}
		have[n.Name] = true
		if x := m.nets[n.Name]; x == nil {
			extra("network", n.Name)
		} else {
			x.doubt = false
		}
	}
	for _, n := range sorted(m.nets) {
		if !have[n] {
			missing("network", n, m.nets[n].doubt, func() { delete(m.nets, n) })
		}
	}
	have = map[string]bool{}
	for _, s := range l.svcs {
		have[s.Spec.Name] = true
		x := m.svcs[s.Spec.Name]
		if x == nil {
			extra("service", s.Spec.Name)
			continue
		}
		x.doubt = false
		var nets []string
		for _, n := range s.Spec.Networks {
			nets = append(nets, n.NetworkName)
		}
		port := 0
		if len(s.Ports) > 0 {
			port = s.Ports[0].Published
		}
		if x.open {
			x.replicas, x.nets, x.port, x.open = s.Spec.Replicas, nets, port, false
		}
		if s.Spec.Replicas != x.replicas || !slices.Equal(nets, x.nets) || port != x.port {
			errs = append(errs, fmt.Errorf("service %s has %d replicas, networks %v, port %d, want %d, %v, %d", s.Spec.Name, s.Spec.Replicas, nets, port, x.replicas, x.nets, x.port))
		}
	}
	for _, n := range sorted(m.svcs) {
		if !have[n] {
			missing("service", n, m.svcs[n].doubt, func() { delete(m.svcs, n) })
		}
	}
	have = map[string]bool{}
	for _, t := range l.tasks {
		if t.Service != "" || strings.HasPrefix(t.Name, "client-") {
			continue
		}
		have[t.Name] = true
		x := m.tasks[t.Name]
		if x == nil {
			extra("task", t.Name)
			continue
		}
		var nets []string
		for _, a := range t.Attachments {
			nets = append(nets, a.NetworkName)
		}
		if x.doubt || x.open {
			x.nets, x.ended, x.doubt, x.open = nets, x.ended || t.ended(), x.going, false
		}
		if slices.Sort(nets); !slices.Equal(nets, slices.Sorted(slices.Values(x.nets))) {
			errs = append(errs, fmt.Errorf("task %s is on %v, want %v", t.Name, nets, x.nets))
		}
	}
	for _, n := range sorted(m.tasks) {
		if !have[n] {
			missing("task", n, m.tasks[n].doubt, func() { delete(m.tasks, n) })
		}
	}
	return errors.Join(errs...)
}

// checkTasks wants as many replicas as were ordered, where they may be, no address
// twice, and on each node the namespaces of its tasks and no others.
func (w *world) checkTasks(l lists) error {
	var errs []error
	held := map[string]string{} // by network and address
	hold := func(net, addr, who string) {
		if other, ok := held[net+" "+addr]; ok {
			errs = append(errs, fmt.Errorf("address %s of network %s is held by %s and by %s", addr, net, other, who))
		}
		held[net+" "+addr] = who
	}
	there := map[string][]string{} // tasks, by node
	for _, s := range l.svcs {
		n := 0
		for _, v := range s.VIPs {
			for _, a := range v.Addrs {
				hold(v.NetworkName, a, "service "+s.Spec.Name)
			}
		}
		for _, t := range l.tasks {
			if t.Service != s.ID {
				continue
			}
			if t.runs() {
				n++
				if w.model.nodes[t.NodeName].availability == "drain" {
					errs = append(errs, fmt.Errorf("%s runs on %s, which is drained", t.Name, t.NodeName))
				}
			} else if t.Desired == "running" || !t.ended() {
				errs = append(errs, fmt.Errorf("%s on %s is %s, wanted %s: %s", t.Name, t.NodeName, t.Status.State, t.Desired, t.Status.Message))
			}
		}
		if n != s.Spec.Replicas || s.Running != n {
			errs = append(errs, fmt.Errorf("service %s has %d replicas that run, shows %d, want %d", s.Spec.Name, n, s.Running, s.Spec.Replicas))
		}
	}
	for _, t := range l.tasks {
		if t.ended() {
			continue
		}
		there[t.NodeName] = append(there[t.NodeName], t.Name)
		for _, a := range t.Attachments {
			for _, addr := range a.Addrs {
				hold(a.NetworkName, addr, "task "+t.Name)
			}
		}
		if t.Service != "" && !slices.ContainsFunc(l.svcs, func(s svcInfo) bool { return s.ID == t.Service }) {
			errs = append(errs, fmt.Errorf("%s on %s is %s, and its service is gone", t.Name, t.NodeName, t.Status.State))
		}
		if x := w.model.tasks[t.Name]; x != nil && x.ended {
			errs = append(errs, fmt.Errorf("task %s is %s, want it ended", t.Name, t.Status.State))
		}
		if t.runs() {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", t.Status.PID)); err != nil {
				errs = append(errs, fmt.Errorf("%s is shown as running, and its program %d is not", t.Name, t.Status.PID))
			}
		}
	}
	for name, x := range w.model.tasks {
		if !x.ended && !slices.ContainsFunc(l.tasks, func(t taskInfo) bool { return t.Name == name && t.runs() }) {
			errs = append(errs, fmt.Errorf("task %s does not run", name))
		}
	}
	for _, n := range w.lab.NodeList {
		names, err := nl.List(n.Netns + "-task-")
		if err != nil {
			return err
		}
		if len(names) != len(there[n.Name]) {
			errs = append(errs, fmt.Errorf("%s has namespaces of tasks %v, want those of %v", n.Name, names, there[n.Name]))
		}
	}
	return errors.Join(errs...)
}

// keepClients makes the clients that are missing, on every network.
func (w *world) keepClients(ctx context.Context, l lists) error {
	var wg sync.WaitGroup
	errs := make([]error, len(w.lab.NodeList))
	changed := false
	for i, n := range w.lab.NodeList {
		name := w.client(n.Name)
		k := slices.IndexFunc(l.tasks, func(t taskInfo) bool { return t.Name == name })
		var cmds [][]string
		if k < 0 || !l.tasks[k].runs() {
			if k >= 0 {
				cmds = append(cmds, []string{"rm", "-f", name})
			}
			cmds = append(cmds, []string{"run", "-d", "--name", name, "--node", n.Name, "--network", "default", "--", w.whoami()})
		}
		for _, net := range sorted(w.model.nets) {
			if k < 0 || !l.tasks[k].runs() || !slices.ContainsFunc(l.tasks[k].Attachments, func(a onNet) bool { return a.NetworkName == net }) {
				cmds = append(cmds, []string{"net", "connect", net, name})
			}
		}
		if len(cmds) == 0 {
			continue
		}
		changed = true
		node := w.manager()
		wg.Go(func() {
			for _, c := range cmds {
				if v, text := w.shoalOn(ctx, node, c...); v != done {
					errs[i] = fmt.Errorf("client of %s: %s", n.Name, text)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if changed {
		return errors.New("clients were made") // and are in the next lists
	}
	return nil
}

func (w *world) checkDoctors(ctx context.Context) error {
	var errs []error
	for _, n := range w.lab.NodeList {
		cs, err := w.doctor(ctx, n.Name)
		if err != nil {
			errs = append(errs, err)
		}
		for _, c := range cs {
			errs = append(errs, fmt.Errorf("%s: doctor: %s: %s: %s", n.Name, c.Name, c.Status, c.Message))
		}
	}
	return errors.Join(errs...)
}

// askOracle wants, while faults last, that traffic and names work, or that doctor on
// some node says what doesn't.
func (w *world) askOracle(ctx context.Context) {
	if slices.ContainsFunc(w.faults, func(f *fault) bool { return f.lossy }) {
		return
	}
	start := time.Now()
	for {
		asked := time.Since(start) // what is wrong may take a while to be found, and has been said by then
		said, wrong := w.oracle(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case wrong == nil:
			w.say("  oracle: all works, after %s", time.Since(start).Round(100*time.Millisecond))
			return
		case said != "" && time.Since(start) > 5*time.Second:
			w.say("  oracle: said: %s; of %s", said, strings.SplitN(wrong.Error(), "\n", 2)[0])
			return
		case asked < scaled(settled):
			sleep.For(ctx, time.Second)
		default:
			var fs []string
			for _, f := range w.faults {
				fs = append(fs, f.kind+" "+strings.Join(f.nodes, ","))
			}
			w.problem("with %s, %s after the last command, every doctor says ok, and yet:\n%v", strings.Join(fs, "; "), time.Since(start).Round(time.Second), wrong)
			return
		}
	}
}

// oracle finds what does not work, and what doctors say.
func (w *world) oracle(ctx context.Context) (said string, wrong error) {
	var alive []string
	var wg sync.WaitGroup
	says := make([]string, len(w.lab.NodeList))
	for i, n := range w.lab.NodeList {
		has := func(which func(*fault) bool) bool {
			return slices.ContainsFunc(w.faults, func(f *fault) bool { return which(f) && slices.Contains(f.nodes, n.Name) })
		}
		if has(func(f *fault) bool { return f.off }) {
			continue
		}
		alive = append(alive, n.Name)
		if has(func(f *fault) bool { return f.mute }) {
			continue
		}
		wg.Go(func() {
			cs, err := w.doctor(ctx, n.Name)
			if err != nil {
				w.say("  %v", err)
			}
			for _, c := range cs {
				says[i] = fmt.Sprintf("%s: %s: %s", n.Name, c.Name, c.Message)
			}
		})
	}
	wg.Wait()
	for _, s := range says {
		said = cmp.Or(said, s)
	}
	l, err := w.anyLists(ctx, w.model.managers())
	if err != nil {
		return said, err
	}
	return said, w.probe(ctx, l, alive, 3).err()
}

// bad are lines of a log that must not be there.
var bad = regexp.MustCompile(`level=ERROR|^panic:|^fatal error:|WARNING: DATA RACE|^goroutine \d+ \[running\]`)

// forgiven are ERROR lines that are for a person to act on: of a fault that one would
// have to act on.
var forgiven = regexp.MustCompile(`no space left on device|the managers' log \S+ of this node is lost|this node is in no cluster, yet tasks of one run here`)

func (w *world) checkLogs() {
	for _, n := range w.lab.NodeList {
		b, err := os.ReadFile(filepath.Join(n.Dir, "agent.log"))
		if err != nil {
			w.problem("%s: %v", n.Name, err)
			continue
		}
		from := w.logs[n.Name]
		w.logs[n.Name] = int64(len(b))
		for line := range bytes.Lines(b[min(from, int64(len(b))):]) {
			if bad.Match(line) && !forgiven.Match(line) {
				w.problem("%s: its log says: %s", n.Name, bytes.TrimSpace(line))
			}
		}
	}
}
