package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/shoalnet/shoal/lab"
)

// Of the services that are there already this many have a replica that runs, which is a
// shim and a program on one of the three nodes; the others have none.
const scaleTasks = 200

// scale measures what one more service costs, and what agents cost that have nothing to
// do, with so many services there.
func (b *bench) scale(counts []int) (err error) {
	say("lab up (%s)", b.dataPath)
	defer func() {
		_, derr := b.shoal("lab", "down", "--name", b.lab)
		err = errors.Join(err, derr)
	}()
	if _, err := b.shoal("lab", "up", "--name", b.lab, "--nodes", "3", "--data-path", b.dataPath, "--no-containers"); err != nil {
		return err
	}
	if _, err := b.on("node1", "shoal", "net", "create", "--subnet", "10.8.0.0/16", "app"); err != nil {
		return err
	}
	nodes, err := b.nodes()
	if err != nil {
		return err
	}
	fmt.Printf("| services, tasks | one more, to 1/1 running, s | to its acknowledgement (0 replicas), s | its CPU of each agent, s | idle agents, %% of a core | leader, %% | memory of an agent, MB |\n|---|---|---|---|---|---|---|\n")
	have := 0
	for _, n := range counts {
		if err := b.fill(have, n); err != nil {
			return err
		}
		have = max(have, n)
		if err := b.scaleRow(n, nodes); err != nil {
			return err
		}
	}
	fmt.Println()
	return nil
}

// nodes are the lab's, the leader (node1, which made the cluster) first.
func (b *bench) nodes() ([]lab.Node, error) {
	l, err := lab.Open(b.lab)
	if err != nil {
		return nil, err
	}
	if nodes := l.Nodes(); len(nodes) == 3 {
		return nodes, nil
	}
	return nil, fmt.Errorf("lab %s has %d agents, want 3", b.lab, len(l.Nodes()))
}

// fill makes services until there are n.
func (b *bench) fill(have, n int) error {
	if n <= have {
		return nil
	}
	say("services %d to %d", have, n)
	work := make(chan int)
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range work {
				replicas := "0"
				if i < scaleTasks {
					replicas = "1"
				}
				if _, err := b.on("node1", b.create(fmt.Sprintf("s%d", i), replicas, "-d")...); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			}
		})
	}
	for i := have; i < n; i++ {
		work <- i
	}
	close(work)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	want := strconv.Itoa(min(n, scaleTasks))
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(time.Second) {
		out, err := b.on("node1", "shoal", "ps", "-q", "--filter", "state=running")
		if got := len(strings.Fields(out)); err != nil || strconv.Itoa(got) == want {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("of %s tasks not all run after 5 minutes", want)
		}
	}
}

func (b *bench) create(name, replicas string, flags ...string) []string {
	return append(append([]string{"shoal", "svc", "create", "-q", "--name", name, "--replicas", replicas, "--network", "app"}, flags...),
		"--", filepath.Join(b.bin, "whoami"), "-http", ":80", "-udp", "", "-tcp", "")
}

func (b *bench) scaleRow(n int, nodes []lab.Node) error {
	var pids []int
	for _, n := range nodes {
		pids = append(pids, n.PID)
	}
	// As on a node of its own: `lab exec` is a process more, and takes 14 ms.
	typed := func(args []string) error {
		_, err := b.shoal(append([]string{"--socket", nodes[0].Socket}, args[1:]...)...)
		return err
	}
	time.Sleep(5 * time.Second) // what the last changes brought is over
	begin, err := cpuTimes(pids)
	if err != nil {
		return err
	}
	at := time.Now()
	time.Sleep(time.Duration(5*b.seconds) * time.Second)
	wall := time.Since(at).Seconds()
	end, err := cpuTimes(pids)
	if err != nil {
		return err
	}
	var idle []float64
	for i, c := range end {
		idle = append(idle, 100*(c-begin[i])/wall)
	}
	var running, told, cpu []float64
	for r := range 2*b.rounds + 1 {
		say("%d services: one more, round %d", n, r+1)
		before, err := cpuTimes(pids)
		if err != nil {
			return err
		}
		start := time.Now()
		if err := typed(b.create("more", "1")); err != nil {
			return err
		}
		running = append(running, time.Since(start).Seconds())
		time.Sleep(time.Second)
		after, err := cpuTimes(pids)
		if err != nil {
			return err
		}
		each := 0.0
		for i := range after {
			each += (after[i] - before[i]) / float64(len(pids))
		}
		cpu = append(cpu, each)
		start = time.Now()
		if err := typed(b.create("none", "0")); err != nil {
			return err
		}
		told = append(told, time.Since(start).Seconds())
		if _, err := b.on("node1", "shoal", "svc", "rm", "more", "none"); err != nil {
			return err
		}
		time.Sleep(time.Second)
	}
	mem := 0.0
	for _, pid := range pids {
		mem = max(mem, float64(rss(pid))/1e6)
	}
	fmt.Printf("| %d, %d | %.2f | %.2f | %.3f | %.1f, %.1f | %.1f | %.0f |\n", n, min(n, scaleTasks), median(running), median(told), median(cpu), idle[1], idle[2], idle[0], mem)
	return nil
}

// cpuTimes are those of processes.
func cpuTimes(pids []int) ([]float64, error) {
	var out []float64
	for _, pid := range pids {
		t, err := cpuTime(pid)
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, nil
}

// rss is the memory of a process that is in RAM, bytes (proc(5): the second field of
// statm, pages).
func rss(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if f := strings.Fields(string(b)); len(f) > 1 {
		pages, _ := strconv.Atoi(f[1])
		return pages * os.Getpagesize()
	}
	return 0
}
