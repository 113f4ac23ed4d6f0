package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// wipe removes all that a node has on its disk.
func (w *world) wipe(n string) error {
	es, err := os.ReadDir(w.data(n))
	for _, e := range es {
		err = errors.Join(err, os.RemoveAll(filepath.Join(w.data(n), e.Name())))
	}
	return err
}

// lostDisk loses all that a node has, who is replaced as docs/recovery.md has it: the
// managers forget it, and it joins as a new node of the same name.
func (w *world) lostDisk(ctx context.Context) (*fault, error) {
	ns, err := w.mayLose(ctx)
	if err != nil {
		return nil, err
	}
	n, whole := pick(w, ns), w.rng.IntN(3) > 0
	role := w.model.nodes[n].role
	// It may be there, in no cluster, before it is removed, or only after.
	early, demote := w.rng.IntN(2) == 0, role == "manager" && w.rng.IntN(3) == 0
	w.say("  fault: %s, a %s, loses its %s, and its disk", n, role, how(whole))
	f, err := w.fell(ctx, n, whole)
	if err != nil {
		return nil, err
	}
	w.lost(n)
	if err := w.wipe(n); err != nil {
		return nil, err
	}
	f.heal = func(ctx context.Context) error {
		if early {
			if err := w.lab.Start(ctx, n); err != nil {
				return err
			}
		}
		if demote {
			_ = w.persist(ctx, f, func(m string) error { return w.did(ctx, m, "", "node", "demote", n) })
		}
		if err := w.persist(ctx, f, func(m string) error { return w.did(ctx, m, "no such node", "node", "rm", "--force", n) }); err != nil {
			return err
		}
		w.forget(n)
		if !early {
			if err := w.lab.Start(ctx, n); err != nil {
				return err
			}
		}
		return w.persist(ctx, f, func(m string) error { return w.join(ctx, n, m, role) })
	}
	return f, nil
}

// did gives a command, and holds one that is refused for the reason given for done.
func (w *world) did(ctx context.Context, node, reason string, args ...string) error {
	if v, text := w.shoalOn(ctx, node, args...); v != done && (reason == "" || !strings.Contains(text, reason)) {
		return fmt.Errorf("%s: shoal %s: %s", node, strings.Join(args, " "), text)
	}
	return nil
}

// persist has a manager do something to heal a fault. Where other faults keep it from
// being done, they are healed first.
func (w *world) persist(ctx context.Context, f *fault, do func(manager string) error) error {
	try := func() error { return do(w.manager()) }
	if until(ctx, scaled(15*time.Second), try) == nil {
		return nil
	}
	for _, o := range slices.Clone(w.faults) {
		if o != f {
			w.heal(ctx, o)
		}
	}
	return until(ctx, scaled(quietTime), try)
}

// forget is what becomes of a node that is removed: its tasks are nowhere else.
func (w *world) forget(n string) {
	for _, t := range sorted(w.model.tasks) {
		if x := w.model.tasks[t]; x.node == n && !x.doubt {
			delete(w.model.tasks, t)
		}
	}
}

// join has a node that is in no cluster join by a manager, as one that was there before
// would: the model has it still.
func (w *world) join(ctx context.Context, n, manager, role string) error {
	actx, cancel := context.WithTimeout(ctx, scaled(askTime))
	defer cancel()
	token, err := w.lab.Run(actx, manager, w.lab.Binary, "token", "show", "-q", role)
	if err != nil {
		return err
	}
	if err := w.did(ctx, n, "already in cluster", "join", "--token", strings.TrimSpace(token), "--advertise-addr", w.addr(n), w.addr(manager)); err != nil {
		return err
	}
	x := w.model.nodes[n]
	x.role, x.availability = role, "active"
	w.lost(n) // it has a manager's log to get, before the next one may lose its
	return nil
}

func (w *world) addr(n string) string { return w.labNode(n).Addr.String() }

// lostMajority loses all managers but one for good, who goes on alone and gets others.
func (w *world) lostMajority(ctx context.Context) (*fault, error) {
	ms := w.model.managers()
	one := pick(w, ms)
	lost := slices.DeleteFunc(slices.Clone(ms), func(n string) bool { return n == one })
	if err := w.replicated(ctx, one); err != nil {
		return nil, err
	}
	w.say("  fault: %s lose their power for good, %s is the only manager that is left", strings.Join(lost, ","), one)
	if err := w.without(ctx, lost); err != nil {
		return nil, err
	}
	if err := until(ctx, scaled(quietTime), func() error {
		return w.did(ctx, one, "have a leader ("+one, "init", "--force-new-cluster")
	}); err != nil {
		return nil, err
	}
	return nil, w.successors(ctx, one, lost)
}

// lostManagers loses all managers with their disks. The cluster is made from a snapshot,
// and is as it was then.
func (w *world) lostManagers(ctx context.Context) (*fault, error) {
	ms := w.model.managers()
	one := pick(w, ms) // whose machine is there again at first
	file := filepath.Join(w.lab.Dir, "cluster.snap")
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := w.did(ctx, pick(w, ms), "", "snapshot", "save", file); err != nil {
		return nil, err
	}
	was := w.model.clone()
	for range w.rng.IntN(3) { // what comes after it is not in it
		if w.rng.IntN(2) == 0 || len(w.model.usable()) == 0 {
			w.netCreate(ctx)
		} else {
			w.svcCreate(ctx, 1)
		}
	}
	w.say("  fault: %s lose their power and their disks: no manager is left", strings.Join(ms, ","))
	was.next = w.model.next
	later := slices.DeleteFunc(sorted(w.model.svcs), func(s string) bool { return was.svcs[s] != nil })
	w.model = was
	if err := w.without(ctx, ms); err != nil {
		return nil, err
	}
	for _, s := range later {
		w.model.gone(s)
	}
	for _, n := range ms {
		if err := w.wipe(n); err != nil {
			return nil, err
		}
	}
	if err := w.lab.Start(ctx, one); err != nil {
		return nil, err
	}
	if err := until(ctx, scaled(quietTime), func() error {
		return w.did(ctx, one, "in the cluster already", "snapshot", "restore", "--advertise-addr", w.addr(one), file)
	}); err != nil {
		return nil, err
	}
	w.forget(one) // the one of before: another has its name
	w.model.nodes[one].availability = "active"
	return nil, w.successors(ctx, one, slices.DeleteFunc(slices.Clone(ms), func(n string) bool { return n == one }))
}

// replicated waits until a manager has all that any of them has: what was acknowledged
// a moment before a loss may be with others only, as docs/recovery.md says.
func (w *world) replicated(ctx context.Context, one string) error {
	var want float64
	for _, n := range w.model.managers() {
		r, err := w.raftOf(ctx, n)
		if err != nil {
			return err
		}
		want = max(want, r["commit_index"])
	}
	return until(ctx, scaled(askTime), func() error {
		r, err := w.raftOf(ctx, one)
		if err == nil && r["last_index"] < want {
			err = fmt.Errorf("%s has the managers' log up to %g, want %g", one, r["last_index"], want)
		}
		return err
	})
}

// without has nodes lose their power at once, and wants what was there before to be
// served by what is left of it, though no manager leads.
func (w *world) without(ctx context.Context, lost []string) error {
	gone := func(n string) bool { return slices.Contains(lost, n) }
	l, err := w.lists(ctx, w.caughtUp)
	if err != nil {
		return err
	}
	for _, n := range lost { // the cables first: nothing is agreed on by those that go last
		if err := w.lab.Link(n, false); err != nil {
			return err
		}
	}
	for _, n := range lost {
		if _, err := w.fell(ctx, n, true); err != nil {
			return err
		}
	}
	// What was begun after the last quiet point is nobody's to know yet.
	l.svcs = slices.DeleteFunc(l.svcs, func(s svcInfo) bool { return w.model.svcs[s.Spec.Name] == nil })
	l.tasks = slices.DeleteFunc(l.tasks, func(t taskInfo) bool { return gone(t.NodeName) })
	left := slices.DeleteFunc(sorted(w.model.nodes), gone)
	if err := until(ctx, scaled(settled), func() error { return w.probe(ctx, l, left, 20).err() }); err != nil {
		return fmt.Errorf("without the managers %s:\n%w", strings.Join(lost, ", "), err)
	}
	w.say("  what is left serves, without managers")
	return nil
}

// successors wants everything that was acknowledged to be there with the only manager
// that is left, and has the lost ones replaced.
func (w *world) successors(ctx context.Context, one string, lost []string) error {
	if err := until(ctx, scaled(commandTime), func() error {
		l, err := w.lists(ctx, one)
		if err == nil {
			err = w.checkObjects(l)
		}
		return err
	}); err != nil {
		return fmt.Errorf("%s is the only manager:\n%w", one, err)
	}
	for _, n := range lost {
		// One of three is found again as it was. It must not count, and leaves.
		kept := w.rng.IntN(3) == 0
		es, err := os.ReadDir(w.data(n))
		if kept = kept && len(es) > 0; !kept && err == nil {
			err = w.wipe(n)
		}
		if err != nil {
			return err
		}
		if kept {
			w.say("  %s comes back with its disk", n)
			if err := w.lab.Start(ctx, n); err != nil {
				return err
			}
		}
		if err := until(ctx, scaled(quietTime), func() error { return w.did(ctx, one, "no such node", "node", "rm", n) }); err != nil {
			return err
		}
		w.forget(n)
		if kept {
			err = until(ctx, scaled(quietTime), func() error {
				actx, cancel := context.WithTimeout(ctx, scaled(askTime))
				defer cancel()
				if _, err := w.lab.Run(actx, n, w.lab.Binary, "net", "ls"); err == nil || !strings.Contains(err.Error(), "in no cluster") {
					return fmt.Errorf("%s, which counts no more, does not leave: %v", n, orNothing(err))
				}
				return nil
			})
		} else {
			err = w.lab.Start(ctx, n)
		}
		if err != nil {
			return err
		}
		if err := until(ctx, scaled(quietTime), func() error { return w.join(ctx, n, one, "manager") }); err != nil {
			return err
		}
	}
	return nil
}
