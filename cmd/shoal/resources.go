package main

import (
	"fmt"

	"github.com/spf13/pflag"

	"github.com/shoalnet/shoal/spec"
)

// resourceFlags are Docker's flags for what a task may take of its node, of run, or
// of a service.
type resourceFlags struct {
	cpus, memory, memorySwap, memoryLow string
	reserveCPU, reserveMemory           string
	cpuset                              string
	pids, shares                        int64
	oomScore                            int
	set                                 *pflag.FlagSet
}

func (r *resourceFlags) add(f *pflag.FlagSet, service bool) {
	r.set = f
	if service {
		f.StringVar(&r.cpus, "limit-cpu", "", "CPU time a replica may use, in CPUs, like 0.5 (0: no limit)")
		f.StringVar(&r.memory, "limit-memory", "", "memory a replica may use, like 512m (0: no limit)")
		f.Int64Var(&r.pids, "limit-pids", 0, fmt.Sprintf("processes and threads a replica may have (0: %d; -1: no limit)", spec.DefaultPids))
		f.StringVar(&r.reserveCPU, "reserve-cpu", "", "CPUs that the scheduler keeps for each replica on its node")
		f.StringVar(&r.reserveMemory, "reserve-memory", "", "memory that the scheduler keeps for each replica on its node")
		f.IntVar(&r.oomScore, "oom-score-adj", 0, "preference of the kernel's out-of-memory killer, -1000 to 1000")
		return
	}
	f.StringVar(&r.cpus, "cpus", "", "CPU time it may use, in CPUs, like 0.5 (0: no limit)")
	f.Int64VarP(&r.shares, "cpu-shares", "c", 0, "its weight against other tasks when CPUs are short (0: 1024)")
	f.StringVar(&r.cpuset, "cpuset-cpus", "", "CPUs it may run on, like 0-2,5")
	f.StringVarP(&r.memory, "memory", "m", "", "memory it may use, like 512m (0: no limit)")
	f.StringVar(&r.memorySwap, "memory-swap", "", "memory and swap together (default: twice --memory; -1: no limit)")
	f.StringVar(&r.memoryLow, "memory-reservation", "", "memory it keeps when the node runs short")
	f.Int64Var(&r.pids, "pids-limit", 0, fmt.Sprintf("processes and threads it may have (0: %d; -1: no limit)", spec.DefaultPids))
	f.IntVar(&r.oomScore, "oom-score-adj", 0, "preference of the kernel's out-of-memory killer, -1000 to 1000")
}

// apply changes r by the flags that were given, and checks the whole.
func (f *resourceFlags) apply(r spec.Resources) (spec.Resources, error) {
	cpus := func(flag, v string, to *int64) error {
		if f.set.Changed(flag) {
			n, err := spec.ParseCPUs(v)
			if err != nil {
				return fmt.Errorf("--%s: %w", flag, err)
			}
			*to = n
		}
		return nil
	}
	bytes := func(flag, v string, to *int64) error {
		if !f.set.Changed(flag) {
			return nil
		}
		if flag == "memory-swap" && v == "-1" {
			*to = -1
			return nil
		}
		n, err := spec.ParseBytes(v)
		if err != nil {
			return fmt.Errorf("--%s: %w", flag, err)
		}
		*to = n
		return nil
	}
	for _, err := range []error{
		cpus("cpus", f.cpus, &r.NanoCPUs), cpus("limit-cpu", f.cpus, &r.NanoCPUs), cpus("reserve-cpu", f.reserveCPU, &r.ReserveNanoCPUs),
		bytes("memory", f.memory, &r.Memory), bytes("limit-memory", f.memory, &r.Memory), bytes("memory-swap", f.memorySwap, &r.MemorySwap),
		bytes("memory-reservation", f.memoryLow, &r.MemoryLow), bytes("reserve-memory", f.reserveMemory, &r.ReserveMemory),
	} {
		if err != nil {
			return r, err
		}
	}
	if f.set.Changed("pids-limit") || f.set.Changed("limit-pids") {
		r.Pids = f.pids
	}
	if f.set.Changed("cpu-shares") {
		r.CPUShares = f.shares
	}
	if f.set.Changed("cpuset-cpus") {
		r.CpusetCPUs = f.cpuset
	}
	if f.set.Changed("oom-score-adj") {
		r.OOMScoreAdj = f.oomScore
	}
	return r, r.Validate()
}
