package spec

import (
	"fmt"
	"math/big"
	"regexp"
	"strings"
)

// Resources bound what a task may take of its node (limits), and say what the
// scheduler keeps free for it (reservations). Zero is Docker's default: no limit,
// but for the number of processes, and nothing reserved.
type Resources struct {
	NanoCPUs int64 `json:"nano_cpus,omitempty"` // 1e9: the time of one CPU
	Memory   int64 `json:"memory,omitempty"`    // bytes
	// MemorySwap is memory and swap together, in bytes; 0: twice Memory, as in
	// Docker; -1: no limit.
	MemorySwap int64 `json:"memory_swap,omitempty"`
	// MemoryLow is what the task keeps when the node runs short, in bytes (Docker's
	// --memory-reservation).
	MemoryLow int64 `json:"memory_low,omitempty"`
	// Pids is the number of processes and threads; 0: DefaultPids, -1: no limit.
	Pids int64 `json:"pids,omitempty"`
	// CPUShares weighs the task against others when CPUs are short; 0: 1024.
	CPUShares  int64  `json:"cpu_shares,omitempty"`
	CpusetCPUs string `json:"cpuset_cpus,omitempty"` // like 0-2,5: cpuset(7), list format
	// OOMScoreAdj makes the kernel's choice of a victim more or less likely:
	// proc(5), /proc/PID/oom_score_adj.
	OOMScoreAdj int `json:"oom_score_adj,omitempty"`

	ReserveNanoCPUs int64 `json:"reserve_nano_cpus,omitempty"`
	ReserveMemory   int64 `json:"reserve_memory,omitempty"` // bytes
}

const (
	// DefaultPids bounds a task's processes and threads where nothing is said, so
	// that a fork bomb is its own task's trouble. Docker has no default; Podman has
	// 2,048, and Kubernetes' distributions have 1,024 to 4,096.
	DefaultPids = 4096
	// MinMemory is the smallest limit: with less no program starts. It is Docker's.
	MinMemory = 6 << 20
	// MinNanoCPUs is a hundredth of a CPU: below, the kernel's quota of a period
	// of 100 ms is less than what it takes (1 ms, cpu.cfs_quota_us).
	MinNanoCPUs = 1e7
	// maxNanoCPUs bounds it above: 8,192 CPUs, the kernel's NR_CPUS at its largest.
	maxNanoCPUs = 8192 * 1e9
	maxShares   = 262144 // the kernel's MAX_SHARES
	minShares   = 2      // MIN_SHARES
)

// PidsLimit is Pids with its default; -1 is no limit.
func (r Resources) PidsLimit() int64 {
	if r.Pids == 0 {
		return DefaultPids
	}
	return r.Pids
}

var cpuset = regexp.MustCompile(`^[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*$`)

// Validate reports the first thing wrong.
func (r Resources) Validate() error {
	for _, v := range []struct {
		what string
		n    int64
	}{{"CPU limit", r.NanoCPUs}, {"CPU reservation", r.ReserveNanoCPUs}} {
		if v.n != 0 && (v.n < MinNanoCPUs || v.n > maxNanoCPUs) {
			return fmt.Errorf("%s of %s is out of range: use 0.01 to 8192", v.what, FormatCPUs(v.n))
		}
	}
	if r.Memory != 0 && r.Memory < MinMemory {
		return fmt.Errorf("memory limit of %d bytes is too small: use at least 6m", r.Memory)
	}
	for _, v := range []struct {
		what string
		n    int64
	}{{"memory reservation", r.ReserveMemory}, {"soft memory limit", r.MemoryLow}} {
		if v.n < 0 {
			return fmt.Errorf("%s of %d bytes is negative", v.what, v.n)
		}
	}
	switch {
	case r.MemorySwap < -1:
		return fmt.Errorf("limit of memory and swap of %d: use a size, or -1 for no limit", r.MemorySwap)
	case r.MemorySwap > 0 && r.Memory == 0:
		return fmt.Errorf("a limit of memory and swap needs one of memory, too: add --memory")
	case r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return fmt.Errorf("the limit of memory and swap (%d bytes) is below that of memory (%d): it counts both", r.MemorySwap, r.Memory)
	case r.Memory > 0 && r.MemoryLow > r.Memory:
		return fmt.Errorf("soft memory limit of %d bytes is above the limit of %d", r.MemoryLow, r.Memory)
	case r.Memory > 0 && r.ReserveMemory > r.Memory:
		return fmt.Errorf("memory reservation of %d bytes is above the limit of %d", r.ReserveMemory, r.Memory)
	case r.NanoCPUs > 0 && r.ReserveNanoCPUs > r.NanoCPUs:
		return fmt.Errorf("CPU reservation of %s is above the limit of %s", FormatCPUs(r.ReserveNanoCPUs), FormatCPUs(r.NanoCPUs))
	case r.Pids < -1:
		return fmt.Errorf("limit of %d processes: use 1 and up, or -1 for no limit", r.Pids)
	case r.CPUShares != 0 && (r.CPUShares < minShares || r.CPUShares > maxShares):
		return fmt.Errorf("CPU shares of %d are out of range: use %d to %d", r.CPUShares, minShares, maxShares)
	case r.CpusetCPUs != "" && !cpuset.MatchString(r.CpusetCPUs):
		return fmt.Errorf("CPUs %q: want numbers and ranges, like 0-2,5", r.CpusetCPUs)
	case r.OOMScoreAdj < -1000 || r.OOMScoreAdj > 1000:
		return fmt.Errorf("OOM score adjustment of %d is out of range: use -1000 to 1000", r.OOMScoreAdj)
	}
	return nil
}

// ParseCPUs reads a number of CPUs, like 1.5, in units of 1e-9 of one.
func ParseCPUs(s string) (int64, error) {
	r, ok := new(big.Rat).SetString(s)
	if !ok || strings.ContainsAny(s, "/eExXpP_") {
		return 0, fmt.Errorf("%q is no number of CPUs: want one like 0.5 or 2", s)
	}
	n := r.Mul(r, big.NewRat(1e9, 1))
	if !n.IsInt() || !n.Num().IsInt64() {
		return 0, fmt.Errorf("%q CPUs: use 0.01 to 8192, with at most nine digits after the point", s)
	}
	return n.Num().Int64(), nil
}

// FormatCPUs is the inverse of ParseCPUs.
func FormatCPUs(n int64) string {
	s := big.NewRat(n, 1e9).FloatString(9)
	return strings.TrimSuffix(strings.TrimRight(s, "0"), ".")
}
