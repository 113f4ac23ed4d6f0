package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/internal/proc"
	"github.com/shoalnet/shoal/internal/sleep"
)

// checkRemoval removes everything, and wants nothing to be left on any node.
func (w *world) checkRemoval(ctx context.Context) {
	start := time.Now()
	var err error
	for {
		if err = w.removeAll(ctx); err == nil || ctx.Err() != nil {
			break
		}
		if limit := scaled(quietTime); time.Since(start) > limit {
			w.problem("%s after all was to be removed:\n%v", limit.Round(time.Second), err)
			return
		}
		sleep.For(ctx, 500*time.Millisecond)
	}
	if ctx.Err() == nil {
		w.say("  nothing is left, after %s", time.Since(start).Round(100*time.Millisecond))
		w.checkLogs()
	}
}

func (w *world) removeAll(ctx context.Context) error {
	l, err := w.anyLists(ctx, w.model.managers())
	if err != nil {
		return err
	}
	var rest []string
	node := w.manager()
	rm := func(names []string, args ...string) {
		if len(names) > 0 {
			rest = append(rest, names...)
			w.shoalOn(ctx, node, append(args, names...)...)
		}
	}
	var svcs, tasks, nets []string
	for _, s := range l.svcs {
		svcs = append(svcs, s.Spec.Name)
	}
	for _, t := range l.tasks {
		if t.Service == "" {
			tasks = append(tasks, t.Name)
		} else {
			rest = append(rest, t.Name)
		}
	}
	for _, n := range l.nets {
		if n.Name != "default" && n.Name != "host" && n.Name != "none" {
			nets = append(nets, n.Name)
		}
	}
	rm(svcs, "svc", "rm")
	rm(tasks, "rm", "-f")
	rm(nets, "net", "rm")
	if len(rest) > 0 {
		return fmt.Errorf("still there: %v", rest)
	}
	var errs []error
	for _, n := range w.lab.NodeList {
		for _, kind := range []string{"-task-", "-net-"} {
			names, err := nl.List(n.Netns + kind)
			if err != nil || len(names) > 0 {
				errs = append(errs, fmt.Errorf("%s has namespaces %v: %v", n.Name, names, orNothing(err)))
			}
		}
		var out strings.Builder
		if _, err := w.lab.Exec(ctx, n.Name, []string{"ip", "-br", "link"}, nil, &out, &out); err != nil {
			return err
		}
		for line := range strings.Lines(out.String()) {
			if dev, _, _ := strings.Cut(line, " "); strings.HasPrefix(dev, "sh") {
				errs = append(errs, fmt.Errorf("%s has a device %s", n.Name, dev))
			}
		}
	}
	return errors.Join(errs...)
}

// checkNothingLeft looks what a lab has left on the machine when it is down.
func (w *world) checkNothingLeft() {
	names, err := nl.List("shoal-" + w.o.Name + "-")
	if err != nil || len(names) > 0 {
		w.problem("after lab down there are namespaces %v: %v", names, orNothing(err))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		w.problem("%v", err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, w.lab.Dir+"/") {
			w.problem("after lab down there is a mount: %s", strings.TrimSpace(line))
		}
	}
	if _, err := os.Stat(w.lab.Dir); err == nil {
		w.problem("after lab down there is %s", w.lab.Dir)
	}
	pids, _ := proc.PIDs()
	for _, pid := range pids {
		if cmd := strings.Join(proc.Args(pid), " "); strings.Contains(cmd, w.lab.Dir+"/") {
			w.problem("after lab down there is process %d: %s", pid, cmd)
		}
	}
}
