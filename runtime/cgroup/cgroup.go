// Package cgroup gives each task a control group of its own, for limits, counting
// and the kernel's out-of-memory killer, with version 2 where the kernel has its
// controllers, else with version 1 (cgroups(7); Linux's
// Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/).
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// Root is where all of Shoal's groups are, below the hierarchy's root.
const Root = "/shoal"

const (
	mountpoint = "/sys/fs/cgroup"
	period     = 100_000 // microseconds of a CPU quota: the kernel's default, and Docker's
)

// controllers are what tasks need, by the names of cgroup v2.
var controllers = []string{"cpu", "memory", "pids"}

// Support is what the node's kernel, as far as this process sees it, can do.
type Support struct {
	Version int      // 1 or 2; 0: none
	Missing []string // of cpu, memory, pids
	Swap    bool     // memory and swap together can be limited
}

var support = sync.OnceValue(probe)

// Supported tells what this node can do.
func Supported() Support { return support() }

func probe() Support {
	s := Support{}
	switch cgroups.Mode() {
	case cgroups.Unified:
		s.Version = 2
		own := read(mountpoint, "cgroup.controllers")
		for _, c := range controllers {
			if !slices.Contains(strings.Fields(own), c) {
				s.Missing = append(s.Missing, c)
			}
		}
		s.Swap = true
		if len(s.Missing) == len(controllers) {
			s.Version = 0
		}
	case cgroups.Legacy, cgroups.Hybrid:
		s.Version = 1
		for _, c := range controllers {
			if _, err := os.Stat(filepath.Join(mountpoint, c, "tasks")); err != nil {
				s.Missing = append(s.Missing, c)
			}
		}
		_, err := os.Stat(filepath.Join(mountpoint, "memory", "memory.memsw.limit_in_bytes"))
		s.Swap = err == nil
		if len(s.Missing) == len(controllers) {
			s.Version = 0
		}
	default:
		s.Missing = slices.Clone(controllers)
	}
	if s.Version != 0 && unix.Access(mountpoint, unix.W_OK) != nil {
		s.Version, s.Missing = 0, slices.Clone(controllers)
	}
	return s
}

// String says it for a person.
func (s Support) String() string {
	switch {
	case s.Version == 0:
		return "none: the node's kernel or its surroundings offer no control groups to write to; limits have no effect"
	case len(s.Missing) > 0:
		return fmt.Sprintf("v%d, without %s: such limits have no effect", s.Version, strings.Join(s.Missing, ", "))
	}
	return fmt.Sprintf("v%d", s.Version)
}

// has tells whether there is a controller.
func (s Support) has(controller string) bool {
	return s.Version != 0 && !slices.Contains(s.Missing, controller)
}

// Lacks names the limits of r that have no effect on this node, by Docker's flags.
func (s Support) Lacks(r spec.Resources) []string {
	var out []string
	if (r.NanoCPUs > 0 || r.CPUShares > 0) && !s.has("cpu") {
		out = append(out, "CPU")
	}
	if (r.Memory > 0 || r.MemoryLow > 0) && !s.has("memory") {
		out = append(out, "memory")
	}
	if r.Pids > 0 && !s.has("pids") {
		out = append(out, "processes")
	}
	return out
}

// hierarchy is what of version 1 a task is in.
func hierarchy(cpuset bool) cgroup1.Hierarchy {
	return func() ([]cgroup1.Subsystem, error) {
		all, err := cgroup1.Default()
		if err != nil {
			return nil, err
		}
		return slices.DeleteFunc(all, func(s cgroup1.Subsystem) bool {
			switch s.Name() {
			case cgroup1.Cpu, cgroup1.Cpuacct, cgroup1.Memory, cgroup1.Pids, cgroup1.Blkio:
				return false
			case cgroup1.Cpuset:
				return !cpuset
			}
			return true
		}), nil
	}
}

// Linux is r as an OCI runtime takes it, less what this node can't do.
func Linux(r spec.Resources) *specs.LinuxResources {
	s := Supported()
	out := &specs.LinuxResources{}
	if s.has("cpu") && (r.NanoCPUs > 0 || r.CPUShares > 0) || r.CpusetCPUs != "" {
		out.CPU = &specs.LinuxCPU{Cpus: r.CpusetCPUs}
		if r.NanoCPUs > 0 && s.has("cpu") {
			// Rounded up: 1 ms, the smallest quota, is what MinNanoCPUs comes to.
			quota, p := (r.NanoCPUs*period+1e9-1)/1e9, uint64(period)
			out.CPU.Quota, out.CPU.Period = &quota, &p
		}
		if r.CPUShares > 0 && s.has("cpu") {
			n := uint64(r.CPUShares)
			out.CPU.Shares = &n
		}
	}
	if s.has("memory") && (r.Memory > 0 || r.MemoryLow > 0) {
		out.Memory = &specs.LinuxMemory{}
		if r.Memory > 0 {
			limit := r.Memory
			out.Memory.Limit = &limit
			if s.Swap {
				swap := r.MemorySwap
				if swap == 0 {
					swap = 2 * limit // Docker's
				}
				out.Memory.Swap = &swap
			}
		}
		if r.MemoryLow > 0 {
			low := r.MemoryLow
			out.Memory.Reservation = &low
		}
	}
	if n := r.PidsLimit(); n > 0 && s.has("pids") {
		out.Pids = &specs.LinuxPids{Limit: &n}
	}
	return out
}

// Create makes a group, or sets the limits of one that is there. On a node without
// control groups it does nothing. Errors name what was refused.
func Create(path string, r spec.Resources) error {
	s := Supported()
	if s.Version == 0 || path == "" {
		return nil
	}
	res := Linux(r)
	if s.Version == 1 {
		_, err := cgroup1.New(cgroup1.StaticPath(path), res, cgroup1.WithHierarchy(hierarchy(r.CpusetCPUs != "")))
		if err != nil {
			return fmt.Errorf("control group %s: %w", path, errors.Join(err, Remove(path)))
		}
		return nil
	}
	v2 := cgroup2.ToResources(res)
	if v2.Memory != nil && r.Memory > 0 && r.MemorySwap == -1 {
		v2.Memory.Swap = nil // no limit is what a new group has
	}
	swap := (*int64)(nil)
	if v2.Memory != nil {
		swap, v2.Memory.Swap = v2.Memory.Swap, nil
	}
	if err := enable(path); err != nil {
		return fmt.Errorf("control group %s: %w", path, err)
	}
	m, err := cgroup2.NewManager(mountpoint, path, v2)
	if err != nil {
		return fmt.Errorf("control group %s: %w", path, err)
	}
	if swap != nil {
		// A kernel without swap accounting has no such file.
		err := m.Update(&cgroup2.Resources{Memory: &cgroup2.Memory{Swap: swap}})
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("control group %s: %w", path, errors.Join(err, Remove(path)))
		}
	}
	return nil
}

// Prepare makes the way to a group that somebody else, an OCI runtime, will make.
func Prepare(path string) error {
	if Supported().Version != 2 {
		return nil
	}
	if err := enable(path); err != nil {
		return fmt.Errorf("control group %s: %w", path, err)
	}
	return nil
}

// enable hands the controllers down to a group's parent. The root of a container's
// own view of the hierarchy has processes, and with them can't do that ("no internal
// processes", cgroup-v2.rst): they move into a group beside ours, as Docker's own
// image for Docker in Docker does.
func enable(path string) error {
	want := slices.DeleteFunc(slices.Clone(controllers), func(c string) bool { return slices.Contains(Supported().Missing, c) })
	have := strings.Fields(read(mountpoint, "cgroup.controllers"))
	for _, c := range []string{"io", "cpuset"} {
		if slices.Contains(have, c) {
			want = append(want, c)
		}
	}
	d := mountpoint
	for _, part := range strings.Split(strings.Trim(filepath.Dir(path), "/"), "/") {
		if err := subtree(d, want); errors.Is(err, unix.EBUSY) && d == mountpoint {
			if err := vacate(); err != nil {
				return err
			}
			if err := subtree(d, want); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		d = filepath.Join(d, part)
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return subtree(d, want)
}

func subtree(dir string, want []string) error {
	have := strings.Fields(read(dir, "cgroup.subtree_control"))
	for _, c := range want {
		if !slices.Contains(have, c) {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
				if c == "io" || c == "cpuset" {
					continue
				}
				return fmt.Errorf("enable the %s controller in %s: %w", c, dir, err)
			}
		}
	}
	return nil
}

func vacate() error {
	d := filepath.Join(mountpoint, "init")
	if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	for range 10 { // whoever is forked meanwhile
		pids := strings.Fields(read(mountpoint, "cgroup.procs"))
		if len(pids) == 0 {
			return nil
		}
		for _, p := range pids {
			if err := os.WriteFile(filepath.Join(d, "cgroup.procs"), []byte(p), 0); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("move process %s to %s: %w", p, d, err)
			}
		}
	}
	return nil
}

// reaped bounds the wait for the end of what was killed in a group.
const reaped = 5 * time.Second

// Remove removes a group in which nothing runs any more: for what is just ending it
// waits. Absence is no error.
func Remove(path string) error {
	if !strings.HasPrefix(path, Root+"/") {
		return fmt.Errorf("control group %q is not ours", path)
	}
	var errs []error
	limit := time.Now().Add(reaped)
	for _, d := range dirs(path) {
		// What was in it may not be reaped yet: rmdir(2), EBUSY.
		err := os.Remove(d)
		for wait := time.Millisecond; errors.Is(err, unix.EBUSY) && time.Now().Before(limit); wait = min(2*wait, 100*time.Millisecond) {
			time.Sleep(wait)
			err = os.Remove(d)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Clear removes the groups below a parent in which nothing runs, the parent and,
// when no other is in it, Root.
func Clear(parent string) error {
	var errs []error
	for _, name := range List(parent) {
		errs = append(errs, Remove(parent+"/"+name))
	}
	errs = append(errs, Remove(parent))
	for _, d := range dirs(Root) {
		_ = os.Remove(d) // another instance's parent may be in it
	}
	return errors.Join(errs...)
}

// dirs are the directories of a group, one for each hierarchy.
func dirs(path string) []string {
	switch s := Supported(); s.Version {
	case 2:
		return []string{filepath.Join(mountpoint, path)}
	case 1:
		var out []string
		all, err := os.ReadDir(mountpoint)
		if err != nil {
			return nil
		}
		seen := map[string]bool{}
		for _, e := range all {
			d, err := filepath.EvalSymlinks(filepath.Join(mountpoint, e.Name())) // cpu is a link to cpu,cpuacct where they are one
			if err == nil && !seen[d] {
				seen[d] = true
				out = append(out, filepath.Join(d, path))
			}
		}
		return out
	}
	return nil
}

// List names the groups below a parent.
func List(parent string) []string {
	seen := map[string]bool{}
	for _, d := range dirs(parent) {
		es, err := os.ReadDir(d)
		if err != nil {
			continue
		}
		for _, e := range es {
			if e.IsDir() {
				seen[e.Name()] = true
			}
		}
	}
	var out []string
	for n := range seen {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// Read returns what a group has used: os.ErrNotExist where there is none.
func Read(path string) (runtime.Usage, error) {
	var u runtime.Usage
	switch Supported().Version {
	case 2:
		d := filepath.Join(mountpoint, path)
		if _, err := os.Stat(d); err != nil {
			return u, err
		}
		u.CPU = time.Duration(keyed(d, "cpu.stat", "usage_usec")) * time.Microsecond
		u.Memory = sub(number(d, "memory.current"), keyed(d, "memory.stat", "inactive_file"))
		u.MemoryLimit = number(d, "memory.max")
		u.Pids, u.PidsLimit = number(d, "pids.current"), number(d, "pids.max")
		u.OOMKills = keyed(d, "memory.events", "oom_kill")
		for line := range strings.Lines(read(d, "io.stat")) {
			for _, f := range strings.Fields(line) {
				k, v, _ := strings.Cut(f, "=")
				n, _ := strconv.ParseUint(v, 10, 64)
				switch k {
				case "rbytes":
					u.ReadBytes += n
				case "wbytes":
					u.WriteBytes += n
				}
			}
		}
	case 1:
		mem := filepath.Join(mountpoint, "memory", path)
		pids := filepath.Join(mountpoint, "pids", path)
		_, err1 := os.Stat(mem)
		_, err2 := os.Stat(pids)
		if err1 != nil && err2 != nil {
			return u, err1
		}
		u.CPU = time.Duration(number(filepath.Join(mountpoint, "cpuacct", path), "cpuacct.usage"))
		u.Memory = sub(number(mem, "memory.usage_in_bytes"), keyed(mem, "memory.stat", "total_inactive_file"))
		if u.MemoryLimit = number(mem, "memory.limit_in_bytes"); u.MemoryLimit >= 1<<60 { // PAGE_COUNTER_MAX: none
			u.MemoryLimit = 0
		}
		u.Pids, u.PidsLimit = number(pids, "pids.current"), number(pids, "pids.max")
		u.OOMKills = keyed(mem, "memory.oom_control", "oom_kill")
		for line := range strings.Lines(read(filepath.Join(mountpoint, "blkio", path), "blkio.throttle.io_service_bytes")) {
			f := strings.Fields(line)
			if len(f) != 3 {
				continue
			}
			n, _ := strconv.ParseUint(f[2], 10, 64)
			switch f[1] {
			case "Read":
				u.ReadBytes += n
			case "Write":
				u.WriteBytes += n
			}
		}
	default:
		return u, os.ErrNotExist
	}
	return u, nil
}

func sub(a, b uint64) uint64 { return a - min(a, b) }

func read(dir, file string) string {
	b, _ := os.ReadFile(filepath.Join(dir, file))
	return string(b)
}

// number reads a file of one number; "max", or no file, is 0.
func number(dir, file string) uint64 {
	n, _ := strconv.ParseUint(strings.TrimSpace(read(dir, file)), 10, 64)
	return n
}

// keyed reads one value of a file of lines KEY VALUE.
func keyed(dir, file, key string) uint64 {
	sc := bufio.NewScanner(strings.NewReader(read(dir, file)))
	for sc.Scan() {
		if k, v, ok := strings.Cut(sc.Text(), " "); ok && k == key {
			n, _ := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			return n
		}
	}
	return 0
}

// Group is a group for processes to be born in.
type Group struct {
	version int
	files   []*os.File // v2: the directory; v1: a tasks file of each hierarchy
	back    []*os.File // v1: those that this process is in
}

// Open opens a group. Nil, without an error, where the node has none.
func Open(path string) (*Group, error) {
	g := &Group{version: Supported().Version}
	if g.version == 0 || path == "" {
		return nil, nil
	}
	if g.version == 2 {
		f, err := os.OpenFile(filepath.Join(mountpoint, path), unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return nil, fmt.Errorf("control group: %w", err)
		}
		g.files = []*os.File{f}
		return g, nil
	}
	own, _, err := cgroups.ParseCgroupFileUnified("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("control group: %w", err)
	}
	seen := map[string]bool{}
	for _, c := range []string{"cpu", "cpuacct", "memory", "pids", "blkio", "cpuset"} {
		d, err := filepath.EvalSymlinks(filepath.Join(mountpoint, c))
		if err != nil || seen[d] {
			continue
		}
		seen[d] = true
		f, err := os.OpenFile(filepath.Join(d, path, "tasks"), os.O_WRONLY, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			g.Close()
			return nil, fmt.Errorf("control group: %w", err)
		}
		g.files = append(g.files, f)
		if f, err := os.OpenFile(filepath.Join(d, own[c], "tasks"), os.O_WRONLY, 0); err == nil {
			g.back = append(g.back, f)
		}
	}
	return g, nil
}

// Close closes the files.
func (g *Group) Close() {
	if g == nil {
		return
	}
	for _, f := range append(slices.Clone(g.files), g.back...) {
		f.Close()
	}
}

// Opened are what Restore needs, for a process that this one starts: own of them are
// the group itself, the others behind them.
func (g *Group) Opened() (files []*os.File, own int) {
	if g == nil {
		return nil, 0
	}
	return append(slices.Clone(g.files), g.back...), len(g.files)
}

// Restore is Open for a process that was started with what one has Opened, from file
// descriptor first on: all of them, of which n are the group itself.
func Restore(version, first, all, n int) *Group {
	if all == 0 {
		return nil
	}
	g := &Group{version: version}
	for i := range all {
		unix.CloseOnExec(first + i)
		f := os.NewFile(uintptr(first+i), "cgroup")
		if i < n {
			g.files = append(g.files, f)
		} else {
			g.back = append(g.back, f)
		}
	}
	return g
}

// Version of the hierarchy; 0: none.
func (g *Group) Version() int {
	if g == nil {
		return 0
	}
	return g.version
}

// Fork starts a process that is in the group from its birth. The caller's goroutine
// is locked to its thread (runtime.LockOSThread): with version 1 the thread is in the
// group for the moment of the fork, without a lock that would wait for all others,
// as a thread that moves itself needs none (cgroup_procs_write_start in
// kernel/cgroup/cgroup.c).
func (g *Group) Fork(path string, argv []string, attr *syscall.ProcAttr) (pid int, err error) {
	if g == nil || len(g.files) == 0 {
		return syscall.ForkExec(path, argv, attr)
	}
	if g.version == 2 {
		sys := *attr.Sys
		sys.UseCgroupFD, sys.CgroupFD = true, int(g.files[0].Fd())
		a := *attr
		a.Sys = &sys
		return syscall.ForkExec(path, argv, &a)
	}
	defer func() {
		for _, f := range g.back {
			_, _ = f.WriteAt([]byte("0"), 0)
		}
	}()
	for _, f := range g.files {
		if _, err := f.WriteAt([]byte("0"), 0); err != nil {
			return 0, fmt.Errorf("enter the task's control group: %w", err)
		}
	}
	return syscall.ForkExec(path, argv, attr)
}
