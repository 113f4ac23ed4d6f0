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

	"github.com/shoalnet/shoal/lab"
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

func (w *world) addr(n string) string {
	i := slices.IndexFunc(w.lab.NodeList, func(o lab.Node) bool { return o.Name == n })
	return w.lab.NodeList[i].Addr.String()
}
