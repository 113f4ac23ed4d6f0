package proc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Files of a task's directory.
const (
	lockFile    = "lock"
	taskFile    = "task.json"
	shimFile    = "shim.json"
	runFile     = "run.json"
	exitFile    = "exit.json"
	logFile     = "output"
	shimLogFile = "shim.log"
)

// shimRecord is shim.json.
type shimRecord struct {
	Shim    procID `json:"shim"`
	DNSPort uint16 `json:"dns_port"`
}

// runRecord is run.json.
type runRecord struct {
	Init procID `json:"init"`
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// writeJSON replaces a file whole or not at all.
func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// maxSocketPath is the longest path of a unix socket (unix(7): 108 bytes with
// the final NUL).
const maxSocketPath = 107

// withShortPath calls fn with a path for the same file that fits a unix socket
// address. A longer one goes through a descriptor of its directory.
func withShortPath(path string, fn func(string) error) error {
	if len(path) <= maxSocketPath {
		return fn(path)
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return fn(fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), filepath.Base(path)))
}

// openLock opens a task's lock file.
func openLock(dir string) (*os.File, error) {
	return os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
}

// lockHeld tells whether a shim holds the lock of a task's directory. One that
// can't be asked about counts as held: the answer decides what is killed and
// removed.
func lockHeld(dir string) bool {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR, 0)
	if err != nil {
		return !errors.Is(err, os.ErrNotExist)
	}
	defer f.Close()
	// Shared, so that two who ask don't answer each other.
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil
}

// lockFree waits until the lock is free.
func lockFree(dir string, timeout time.Duration) bool {
	for deadline, wait := time.Now().Add(timeout), time.Millisecond; lockHeld(dir); wait = min(2*wait, 20*time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(wait)
	}
	return true
}

// procID is a process for longer than its pid is: pids are used again.
type procID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // ticks since boot, proc_pid_stat(5) field 22
	Boot  string `json:"boot"`
}

// bootID is another after each boot (random(4)).
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(bytes.TrimSpace(b))
}

// identify returns the process that has the pid now.
func identify(pid int) (procID, error) {
	st, err := readStat(pid)
	if err != nil {
		return procID{}, err
	}
	return procID{PID: pid, Start: st.start, Boot: bootID()}, nil
}

// procStat is what is used of /proc/PID/stat.
type procStat struct {
	state         byte
	ppid, session int
	start         uint64
}

func readStat(pid int) (procStat, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procStat{}, err
	}
	return parseStat(b)
}

// parseStat reads proc_pid_stat(5). The second field is a name in parentheses,
// which may hold anything.
func parseStat(b []byte) (st procStat, err error) {
	i := bytes.LastIndexByte(b, ')')
	f := bytes.Fields(b[i+1:])
	if i < 0 || len(f) < 20 || len(f[0]) != 1 {
		return st, errors.New("/proc/PID/stat is not as expected")
	}
	st.state = f[0][0]
	var errs [3]error
	st.ppid, errs[0] = strconv.Atoi(string(f[1]))
	st.session, errs[1] = strconv.Atoi(string(f[3]))
	st.start, errs[2] = strconv.ParseUint(string(f[19]), 10, 64)
	return st, errors.Join(errs[:]...)
}

// open returns a pidfd (pidfd_open(2), Linux 5.3) of the process, or an error
// when it is gone.
func (p procID) open() (int, error) {
	if p.PID <= 0 || p.Boot != bootID() {
		return -1, unix.ESRCH
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return -1, err
	}
	// Checked after the open: from here on fd is the one that is looked at.
	if st, err := readStat(p.PID); err != nil || st.start != p.Start {
		unix.Close(fd)
		return -1, unix.ESRCH
	}
	return fd, nil
}

// kill sends SIGKILL and waits until the process is a zombie, at least. For
// PID 1 of a namespace that means that the namespace is empty. A process that
// is gone already is no error.
func (p procID) kill(timeout time.Duration) error {
	fd, err := p.open()
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	deadline := time.Now().Add(timeout)
	for {
		left := time.Until(deadline)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(left, 0).Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for process %d: %w", p.PID, err)
		case n > 0:
			return nil
		default:
			return fmt.Errorf("process %d does not end after SIGKILL", p.PID)
		}
	}
}
