package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	units "github.com/docker/go-units"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/runtime/cgroup"
	"github.com/shoalnet/shoal/spec"
)

// cgroup is a task's control group, or "".
func (r *Runtime) cgroup(id string) string {
	if r.cfg.Cgroup == "" {
		return ""
	}
	return r.cfg.Cgroup + "/" + id
}

// makeCgroup makes a task's control group. What an executor runs is put into one by
// that; only the way there is made for it.
func (r *Runtime) makeCgroup(t runtime.Task) error {
	path := r.cgroup(t.ID)
	if path == "" {
		return nil
	}
	if lacks := cgroup.Supported().Lacks(t.Spec.Resources); len(lacks) > 0 {
		r.log.Warn("limits of a task have no effect on this node", "task", t.Name, "limits", lacks, "cgroups", cgroup.Supported().String())
	}
	var err error
	if t.Executor != "" {
		err = cgroup.Prepare(path)
	} else {
		err = cgroup.Create(path, t.Spec.Resources)
	}
	if err != nil && t.Spec.Resources == (spec.Resources{}) {
		r.log.Warn("a task has no control group of its own: what it takes is not counted, nor bounded", "task", t.Name, "error", err)
		return nil
	}
	return err
}

func (r *Runtime) removeCgroup(id string) error {
	if path := r.cgroup(id); path != "" {
		return cgroup.Remove(path)
	}
	return nil
}

// sweepCgroups removes the groups of tasks that no record names. One in which
// something runs stays.
func (r *Runtime) sweepCgroups() {
	if r.cfg.Cgroup == "" {
		return
	}
	for _, id := range cgroup.List(r.cfg.Cgroup) {
		if validID(id) == nil && exists(filepath.Join(r.taskDir(id), taskFile)) {
			continue
		}
		if u, err := cgroup.Read(r.cgroup(id)); err == nil && u.Pids > 0 {
			continue
		}
		if err := r.removeCgroup(id); err != nil && !errors.Is(err, syscall.EBUSY) {
			r.log.Warn("the control group of an earlier task can't be removed", "group", id, "error", err)
		}
	}
}

// Usage implements runtime.Runtime.
func (r *Runtime) Usage(_ context.Context, id string) (runtime.Usage, error) {
	return cgroup.Read(r.cgroup(id))
}

// setOOMScore sets by how much the kernel prefers this process, and what it starts,
// as the victim when memory is short: proc(5), /proc/PID/oom_score_adj. A task does
// not inherit the protection of the agent and its shim.
func setOOMScore(n int) error {
	const file = "/proc/self/oom_score_adj"
	err := os.WriteFile(file, []byte(strconv.Itoa(n)), 0)
	if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("OOM score adjustment %d: it is lower than the agent's own, for which the agent needs CAP_SYS_RESOURCE", n)
	}
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.EROFS) {
		return nil
	}
	return err
}

// outOfMemory is why a program ended with a status, if the kernel killed it, or one
// of its processes, for want of memory; else "".
func outOfMemory(group string, code int) string {
	if group == "" || code == 0 {
		return ""
	}
	u, err := cgroup.Read(group)
	if err != nil || u.OOMKills == 0 {
		return ""
	}
	limit := "the node had none left"
	if u.MemoryLimit > 0 {
		limit = "its limit is " + units.BytesSize(float64(u.MemoryLimit))
	}
	if code == 128+int(syscall.SIGKILL) {
		return fmt.Sprintf("out of memory: the kernel killed it; %s (exit status %d)", limit, code)
	}
	return fmt.Sprintf("exit status %d; out of memory: the kernel killed %d of its processes; %s", code, u.OOMKills, limit)
}
