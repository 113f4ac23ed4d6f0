package chaos

import (
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// verdict is what the answer to a command says of the change.
type verdict int

const (
	done     verdict = iota
	refused          // an error that does not leave it open: nothing was changed
	doubtful         // an error that says that it may have been
)

// commandTime is how long a command may take: the longest wait of a command that
// does not wait for replicas is the one for a name that becomes free, 20 s.
const commandTime = 40 * time.Second

// leftOpen are errors that say that a change may have been made. All others say
// that it was not, and are held to that.
var leftOpen = regexp.MustCompile(`may or may not|whether the change was made|may have been made|connection reset|unexpected EOF|broken pipe|http2: |stream error|confirmed it`)

// shoal runs a command, by a node that is not known to be dead.
func (w *world) shoal(ctx context.Context, args ...string) verdict {
	v, _ := w.shoalOn(ctx, w.manager(), args...)
	return v
}

func (w *world) shoalOn(ctx context.Context, node string, args ...string) (verdict, string) {
	w.count.Lock()
	w.Commands++
	w.count.Unlock()
	cctx, cancel := context.WithTimeout(ctx, scaled(commandTime))
	defer cancel()
	var out, errs strings.Builder
	start := time.Now()
	code, err := w.lab.Exec(cctx, node, append([]string{w.lab.Binary}, args...), nil, &out, &errs)
	line := node + ": shoal " + strings.ReplaceAll(strings.Join(args, " "), w.o.Bin+"/", "")
	took := time.Since(start).Round(10 * time.Millisecond)
	w.count.Lock()
	defer w.count.Unlock()
	switch text := strings.TrimSpace(errs.String()); {
	case err == nil && code == 0:
		w.say("  %s (%s)", line, took)
		return done, out.String()
	case cctx.Err() != nil, code >= 128:
		w.say("  %s: ended by us after %s: left open", line, took)
		w.Doubtful++
		return doubtful, text
	case leftOpen.MatchString(text):
		w.say("  %s (%s): left open: %s", line, took, text)
		w.Doubtful++
		return doubtful, text
	default:
		w.say("  %s (%s): refused: %s %v", line, took, text, orNothing(err))
		w.Refused++
		return refused, text
	}
}

func orNothing(err error) any {
	if err == nil {
		return ""
	}
	return err
}

// manager is a node to give commands to: a manager that no fault concerns, or any,
// if there is none.
func (w *world) manager() string {
	ms := w.model.managers()
	well := slices.DeleteFunc(slices.Clone(ms), func(n string) bool {
		return slices.ContainsFunc(w.faults, func(f *fault) bool { return slices.Contains(f.nodes, n) })
	})
	if len(well) > 0 {
		ms = well
	}
	return ms[w.rng.IntN(len(ms))]
}

func pick[T any](w *world, of []T) T { return of[w.rng.IntN(len(of))] }

// command gives the next command.
func (w *world) command(ctx context.Context) {
	m := &w.model
	if len(m.usable()) == 0 {
		w.netCreate(ctx)
		return
	}
	if len(m.svcs) == 0 {
		w.svcCreate(ctx, 1)
		return
	}
	for {
		kind := w.rng.IntN(100)
		switch {
		case kind < 6 && len(m.nets) < 3:
			w.netCreate(ctx)
		case kind < 10 && len(m.usable()) > 1:
			w.netRemove(ctx, pick(w, m.usable()))
		case kind < 24 && len(m.svcs) < 6:
			w.svcCreate(ctx, 1)
		case kind < 28 && len(m.svcs) < 4:
			w.svcCreate(ctx, 3)
		case kind < 44 && len(m.sureServices()) > 0:
			w.svcScale(ctx, pick(w, m.sureServices()))
		case kind < 60 && len(m.sureServices()) > 0:
			w.svcUpdate(ctx, pick(w, m.sureServices()))
		case kind < 67 && len(m.sureServices()) > 1:
			w.svcRemove(ctx, pick(w, m.sureServices()))
		case kind < 75 && len(m.tasks) < 4:
			w.run(ctx)
		case kind < 79 && len(m.sureTasks()) > 0:
			w.taskRemove(ctx, pick(w, m.sureTasks()))
		case kind < 86 && len(m.sureTasks()) > 0:
			w.taskConnect(ctx, pick(w, m.sureTasks()))
		case kind < 93:
			w.nodeAvailability(ctx)
		case kind < 97:
			w.nodeRole(ctx)
		case kind < 100:
			w.shoal(ctx, "token", "rotate", pick(w, []string{"worker", "manager"}))
		default:
			continue
		}
		return
	}
}

func (w *world) whoami() string { return filepath.Join(w.o.Bin, "whoami") }

func (w *world) netCreate(ctx context.Context) {
	name := w.model.name("net")
	if v := w.shoal(ctx, "net", "create", name); v != refused {
		w.model.nets[name] = &network{doubt: v == doubtful}
	}
}

// netRemove takes everything off a network, and removes it.
func (w *world) netRemove(ctx context.Context, name string) {
	for _, s := range sorted(w.model.svcs) {
		if slices.Contains(w.model.svcs[s].nets, name) {
			if w.model.svcs[s].doubt {
				return
			}
			if w.svcRemove(ctx, s); w.model.svcs[s] != nil {
				return
			}
		}
	}
	for _, t := range sorted(w.model.tasks) {
		if slices.Contains(w.model.tasks[t].nets, name) {
			if w.model.tasks[t].doubt {
				return
			}
			if w.taskRemove(ctx, t); w.model.tasks[t] != nil {
				return
			}
		}
	}
	for _, n := range sorted(w.model.nodes) {
		w.shoal(ctx, "net", "disconnect", name, w.client(n)) // which may be on it
	}
	switch w.shoal(ctx, "net", "rm", name) {
	case done:
		delete(w.model.nets, name)
	case doubtful:
		w.model.nets[name].doubt = true
	}
}

// svcCreate makes services, several at once.
func (w *world) svcCreate(ctx context.Context, n int) {
	var wg sync.WaitGroup
	made := map[string]*service{}
	for range n {
		s := &service{replicas: 1 + w.rng.IntN(4), nets: []string{pick(w, w.model.usable())}}
		if other := pick(w, w.model.usable()); other != s.nets[0] && w.rng.IntN(3) == 0 {
			s.nets = append(s.nets, other)
		}
		name := w.model.name("svc")
		args := []string{"svc", "create", "-d", "--name", name, "--replicas", fmt.Sprint(s.replicas)}
		for _, net := range s.nets {
			args = append(args, "--network", net)
		}
		switch w.rng.IntN(4) {
		case 0:
			s.dnsrr = true
			args = append(args, "--endpoint-mode", "dnsrr")
		case 1, 2:
			s.port = 8000 + w.model.next
			args = append(args, "--publish", fmt.Sprintf("%d:80", s.port))
		}
		args = append(args, "--stop-grace-period", "2s", "--", w.whoami())
		made[name] = s
		node := w.manager()
		wg.Go(func() {
			v, _ := w.shoalOn(ctx, node, args...)
			if v == refused {
				s.gone = true
			}
			s.doubt = v == doubtful
		})
	}
	wg.Wait()
	for name, s := range made {
		if !s.gone {
			w.model.svcs[name] = s
		}
	}
}

func (w *world) svcScale(ctx context.Context, name string) {
	s := w.model.svcs[name]
	n := w.rng.IntN(6)
	switch w.shoal(ctx, "svc", "scale", "-d", fmt.Sprintf("%s=%d", name, n)) {
	case done:
		s.replicas = n
	case doubtful:
		s.open = true
	}
}

// svcUpdate replaces the replicas, or changes a port or a network of theirs.
func (w *world) svcUpdate(ctx context.Context, name string) {
	s := w.model.svcs[name]
	args := []string{"svc", "update", "-d"}
	was := *s
	now := was
	now.nets = slices.Clone(was.nets)
	others := slices.DeleteFunc(w.model.usable(), func(n string) bool { return slices.Contains(s.nets, n) })
	switch k := w.rng.IntN(4); {
	case k == 0 && s.port != 0:
		args = append(args, "--publish-rm", fmt.Sprintf("%d:80", s.port))
		now.port = 0
	case k == 0 && !s.dnsrr:
		w.model.next++
		now.port = 8000 + w.model.next
		args = append(args, "--publish-add", fmt.Sprintf("%d:80", now.port))
	case k == 1 && len(others) > 0:
		now.nets = append(now.nets, pick(w, others))
		args = append(args, "--network-add", now.nets[len(now.nets)-1])
	case k == 1 && len(s.nets) > 1 && s.port == 0:
		args = append(args, "--network-rm", now.nets[1])
		now.nets = now.nets[:1]
	default:
		w.model.next++
		args = append(args, "--env-add", fmt.Sprintf("GENERATION=%d", w.model.next))
	}
	switch w.shoal(ctx, append(args, name)...) {
	case done:
		*s = now
	case doubtful:
		s.open = true
	}
}

func (w *world) svcRemove(ctx context.Context, name string) {
	switch w.shoal(ctx, "svc", "rm", name) {
	case done:
		w.model.gone(name)
		delete(w.model.svcs, name)
	case doubtful:
		w.model.svcs[name].doubt = true
	}
}

func (w *world) run(ctx context.Context) {
	name := w.model.name("task")
	t := &task{node: pick(w, sorted(w.model.nodes)), nets: []string{pick(w, w.model.usable())}}
	// A drained or dead node takes none: that is an answer, too.
	v := w.shoal(ctx, "run", "-d", "--name", name, "--node", t.node, "--network", t.nets[0], "--", w.whoami())
	switch v {
	case done:
		w.model.tasks[name] = t
	default:
		// The answer is about the program as much as about the task: an agent that dies
		// while it starts the task leaves a task that was made.
		t.doubt = true
		w.model.tasks[name] = t
	}
}

func (w *world) taskRemove(ctx context.Context, name string) {
	switch w.shoal(ctx, "rm", "-f", name) {
	case done:
		delete(w.model.tasks, name)
	case doubtful:
		w.model.tasks[name].doubt, w.model.tasks[name].going = true, true
	}
}

func (w *world) taskConnect(ctx context.Context, name string) {
	t := w.model.tasks[name]
	if t.ended {
		w.taskRemove(ctx, name)
		return
	}
	others := slices.DeleteFunc(w.model.usable(), func(n string) bool { return slices.Contains(t.nets, n) })
	now := slices.Clone(t.nets)
	var v verdict
	switch {
	case len(others) > 0:
		now = append(now, pick(w, others))
		v = w.shoal(ctx, "net", "connect", now[len(now)-1], name)
	case len(t.nets) > 1:
		v = w.shoal(ctx, "net", "disconnect", now[1], name)
		now = slices.Delete(now, 1, 2)
	default:
		return
	}
	switch v {
	case done:
		t.nets = now
	case doubtful:
		t.open = true
	}
}

// nodeAvailability drains a node, or takes it back; two stay active.
func (w *world) nodeAvailability(ctx context.Context) {
	name := pick(w, sorted(w.model.nodes))
	n := w.model.nodes[name]
	to := "active"
	if n.availability == "active" && len(w.model.active()) > 2 {
		to = pick(w, []string{"drain", "pause"})
	}
	switch w.shoal(ctx, "node", "update", "--availability", to, name) {
	case done:
		n.availability = to
	case doubtful:
		n.open = true
	}
}

// nodeRole promotes a node, or makes one a worker; three stay managers.
func (w *world) nodeRole(ctx context.Context) {
	ms := w.model.managers()
	workers := w.model.nodesThat(func(n *node) bool { return n.role != "manager" })
	name, verb, to := "", "demote", "worker"
	if len(ms) <= 3 || len(ms) < 5 && w.rng.IntN(2) == 0 {
		name, verb, to = pick(w, workers), "promote", "manager"
	} else {
		name = pick(w, ms)
	}
	v, text := w.shoalOn(ctx, w.manager(), "node", verb, name)
	if v == refused && strings.Contains(text, "is to be a manager") {
		v = done // and it says why the node does not vote yet
	}
	switch v {
	case done:
		w.model.nodes[name].role = to
	case doubtful:
		w.model.nodes[name].open = true
	}
}
