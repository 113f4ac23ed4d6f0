package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/internal/proc"
	"github.com/shoalnet/shoal/runtime"
)

// Kill sends a signal to a task's program.
func (a *nodeAPI) Kill(ctx context.Context, req *connect.Request[shoalv1.KillRequest]) (*connect.Response[shoalv1.KillResponse], error) {
	m, t, err := a.task(ctx, req.Msg.Task)
	if err != nil {
		return nil, err
	}
	err = m.cfg.Runtime.Signal(ctx, t.ID, req.Msg.Signal)
	if errors.Is(err, runtime.ErrNotFound) {
		err = errors.New("its program does not run")
	}
	if err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("kill task %s: %w", t.Name, err))
	}
	return connect.NewResponse(&shoalv1.KillResponse{}), nil
}

// psTimeout bounds a run of ps(1), which reads /proc once.
const psTimeout = 10 * time.Second

// Top lists the processes of a task.
func (a *nodeAPI) Top(ctx context.Context, req *connect.Request[shoalv1.TopRequest]) (*connect.Response[shoalv1.TopResponse], error) {
	m, t, err := a.task(ctx, req.Msg.Task)
	if err != nil {
		return nil, err
	}
	_, st, _ := m.tasks.find(t.ID)
	fail := func(err error) (*connect.Response[shoalv1.TopResponse], error) {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("top of task %s: %w", t.Name, err))
	}
	if st.PID == 0 {
		return fail(errors.New("its program does not run"))
	}
	ps, err := exec.LookPath("ps")
	if err != nil {
		return fail(fmt.Errorf("node %s has no ps: install procps there", m.name()))
	}
	args := req.Msg.Args
	if len(args) == 0 {
		args = []string{"-ef"}
	}
	ctx, cancel := context.WithTimeout(ctx, psTimeout)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, ps, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(errs.String()), "\n")
		return fail(fmt.Errorf("ps %s: %w: %s", strings.Join(args, " "), err, first))
	}
	lines, err := ofProcesses(out.String(), pidsBeside(st.PID))
	if err != nil {
		return fail(err)
	}
	return connect.NewResponse(&shoalv1.TopResponse{Lines: lines}), nil
}

// ofProcesses keeps the lines of ps that are of some processes, and the first, which
// tells which column is the process's ID.
func ofProcesses(ps string, pids []int) ([]string, error) {
	lines := strings.Split(strings.TrimRight(ps, "\n"), "\n")
	at := slices.Index(strings.Fields(lines[0]), "PID")
	if at < 0 {
		return nil, fmt.Errorf("ps shows no column PID: it shows %q", lines[0])
	}
	out := lines[:1:1]
	for _, l := range lines[1:] {
		f := strings.Fields(l)
		if len(f) <= at {
			continue
		}
		if pid, err := strconv.Atoi(f[at]); err == nil && slices.Contains(pids, pid) {
			out = append(out, l)
		}
	}
	return out, nil
}

// pidsBeside are the processes in the PID namespace of one (pid_namespaces(7)), the
// task's own init process included; none if it has just ended.
func pidsBeside(pid int) []int {
	ns := func(p int) string {
		l, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", p))
		return l
	}
	own := ns(pid)
	pids, err := proc.PIDs()
	if own == "" || err != nil {
		return nil
	}
	return slices.DeleteFunc(pids, func(p int) bool { return ns(p) != own })
}
