package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/shoalnet/shoal/internal/proc"
)

// A lab has a containerd of its own where that is installed, for all nodes, each
// of which has a namespace in it. Its files are below the lab's directory.

// containerdConfig is version 2 of containerd's configuration, which all in use
// understand. CRI is Kubernetes'.
const containerdConfig = `version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = %q
`

func (l *Lab) containerdDir() string    { return filepath.Join(l.Dir, "containerd") }
func (l *Lab) containerdSocket() string { return filepath.Join(l.containerdDir(), "sock") }

// hasContainerd tells whether containers can be had on this machine.
func hasContainerd() bool {
	for _, p := range []string{"containerd", "runc", "containerd-shim-runc-v2"} {
		if _, err := exec.LookPath(p); err != nil {
			return false
		}
	}
	return true
}

// StartContainerd starts the lab's containerd, if it does not run, and waits until
// it answers.
func (l *Lab) StartContainerd(ctx context.Context) error {
	dir := l.containerdDir()
	for _, d := range []string{"root", "state"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o711); err != nil {
			return err
		}
	}
	conf := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf(containerdConfig, filepath.Join(dir, "root"), filepath.Join(dir, "state"), l.containerdSocket())
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("containerd", "-c", conf)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = l.change(func() error {
		if alive(l.Containerd) {
			return nil
		}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("start containerd: %w", err)
		}
		l.Containerd = cmd.Process.Pid
		go func() { _ = cmd.Wait() }() // ends with containerd
		return nil
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		c, err := net.Dial("unix", l.containerdSocket())
		if err == nil {
			return c.Close()
		}
		if !alive(l.Containerd) {
			return fmt.Errorf("containerd ended at once: %s", lastLine(filepath.Join(dir, "log")))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("containerd does not answer: %w: see %s", err, filepath.Join(dir, "log"))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// KillContainerd is the sudden death of the lab's containerd. Containers go on, held by
// its shims.
func (l *Lab) KillContainerd() error {
	if !alive(l.Containerd) {
		return errors.New("the lab's containerd does not run")
	}
	if err := syscall.Kill(l.Containerd, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill containerd: %w", err)
	}
	for alive(l.Containerd) {
		time.Sleep(time.Millisecond)
	}
	return nil
}

// endContainerd ends the lab's containerd, its shims and every container that is left,
// and removes what runc knows of them. What they had mounted stays.
func (l *Lab) endContainerd() error {
	if _, err := os.Stat(l.containerdDir()); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var errs []error
	if alive(l.Containerd) {
		errs = append(errs, l.KillContainerd())
	}
	// containerd's shims name its socket, and their containers go with them.
	for _, pid := range l.containerdShims() {
		for _, child := range childrenOf(pid) {
			_ = syscall.Kill(child, syscall.SIGKILL)
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	for limit := time.Now().Add(5 * time.Second); len(l.containerdShims()) > 0 && time.Now().Before(limit); {
		time.Sleep(10 * time.Millisecond)
	}
	// A shim that is killed leaves its socket, whose name is in the container's bundle.
	bundles, _ := filepath.Glob(filepath.Join(l.containerdDir(), "state/io.containerd.runtime.v2.task/*/*/address"))
	for _, b := range bundles {
		if text, err := os.ReadFile(b); err == nil {
			if socket, ok := strings.CutPrefix(strings.TrimSpace(string(text)), "unix://"); ok {
				_ = os.Remove(socket)
			}
		}
	}
	for _, n := range l.NodeList {
		errs = append(errs, os.RemoveAll(filepath.Join(runcDir, n.Netns)))
	}
	return errors.Join(errs...)
}

// runcDir is where runc keeps what runs, by containerd's namespaces, when containerd
// starts it.
const runcDir = "/run/containerd/runc"

// unmountBelow unmounts what is mounted below a directory, the inner mounts first.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	errs := []error{err}
	lines := strings.Split(string(b), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		// proc(5): the fifth field is the mount point.
		if f := strings.Fields(lines[i]); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			if err := syscall.Unmount(f[4], syscall.MNT_DETACH); err != nil {
				errs = append(errs, fmt.Errorf("unmount %s: %w", f[4], err))
			}
		}
	}
	return errors.Join(errs...)
}

// containerdShims are the processes that hold containers of this lab.
func (l *Lab) containerdShims() (out []int) {
	pids, err := proc.PIDs()
	if err != nil {
		return nil
	}
	for _, pid := range pids {
		cmd := strings.Join(proc.Args(pid), " ")
		if strings.Contains(cmd, "containerd-shim") && strings.Contains(cmd, l.containerdSocket()) {
			out = append(out, pid)
		}
	}
	return out
}

func childrenOf(pid int) (out []int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil
	}
	for _, f := range strings.Fields(string(b)) {
		n := 0
		if _, err := fmt.Sscanf(f, "%d", &n); err == nil {
			out = append(out, n)
		}
	}
	return out
}
