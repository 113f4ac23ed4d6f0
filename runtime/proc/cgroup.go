package proc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups puts each task into a control group of its own, shoal/ID, where
// cgroup v2 is mounted and writable, be it beside v1. The group accounts for
// the task, and its cgroup.kill (cgroups(7), Linux 5.14) ends what a dead shim
// may have left. All of it is help, nothing depends on it: "" has none.
type cgroups string

// findCgroups looks where cgroup v2 usually is.
func findCgroups() cgroups {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(root, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC && unix.Access(root, unix.W_OK) == nil {
			return cgroups(root)
		}
	}
	return ""
}

func (c cgroups) path(id string) string {
	if c == "" {
		return ""
	}
	return filepath.Join(string(c), "shoal", id)
}

// enter moves a process, whose children will follow, into a task's group.
func (c cgroups) enter(id string, pid int) error {
	if c == "" {
		return nil
	}
	if err := os.MkdirAll(c.path(id), 0o755); err != nil {
		return err
	}
	return joinCgroup(c.path(id), pid)
}

// joinCgroup moves a process; pid 0 is this one.
func joinCgroup(path string, pid int) error {
	return os.WriteFile(filepath.Join(path, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

// remove kills what is left in a task's group and removes it.
func (c cgroups) remove(id string) error {
	if c == "" {
		return nil
	}
	path := c.path(id)
	for deadline, wait := time.Now().Add(5*time.Second), time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		err := unix.Rmdir(path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			break
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove control group %s: %w", path, err)
		}
		_ = os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
		time.Sleep(wait)
	}
	// The last one takes the parent along.
	_ = unix.Rmdir(filepath.Dir(path))
	return nil
}
