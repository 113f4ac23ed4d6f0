// Bench measures Shoal as a user would meet it: the built binary, three nodes
// of a lab on this machine, real traffic. Everything is a ratio within one run
// or a figure that stands beside its conditions; rounds of the variants are
// interleaved, and medians are reported with the spread.
//
//	go run ./internal/tools/bench -bin bin -data-path nft
//	go run ./internal/tools/bench -names
//	go run ./internal/tools/bench -scale 0,200,500,2000
//	go run ./internal/tools/bench -containers
//
// It prints Markdown for docs/PERFORMANCE.md. It needs root, iperf3, wrk and
// dnsperf (scripts/setup installs them).
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

type bench struct {
	bin, dataPath, lab string
	rounds             int
	seconds            int
}

func main() {
	b := &bench{lab: "bench"}
	flag.StringVar(&b.bin, "bin", "bin", "directory of shoal and whoami")
	flag.StringVar(&b.dataPath, "data-path", "nft", "ipvs or nft")
	flag.IntVar(&b.rounds, "rounds", 3, "rounds of each traffic variant")
	flag.IntVar(&b.seconds, "seconds", 2, "length of one measurement")
	onlyNames := flag.Bool("names", false, "measure the name server alone, beside CoreDNS if BIN/bench-coredns is there")
	scale := flag.String("scale", "", "measure one more service, and agents with nothing to do, with so many services there: 0,200,500,2000")
	onlyContainers := flag.Bool("containers", false, "measure containers alone, beside Docker's if dockerd is installed")
	// The two ends of -names, each a process of its own.
	serve := flag.String("serve", "", "serve the table of names at this address")
	ask := flag.String("ask", "", "ask the server at this address")
	prefix := flag.String("prefix", "", "with -ask: what comes before a service's name")
	rate := flag.Int("rate", 0, "with -ask: questions a second; 0: as many as are answered")
	flag.Parse()
	var err error
	switch b.bin, err = filepath.Abs(b.bin); {
	case err != nil:
	case *serve != "":
		err = serveNames(*serve)
	case *ask != "":
		var res asked
		if res, err = askNames(*ask, *prefix, *rate, b.seconds); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(res)
		}
	case *onlyNames:
		err = b.names(say)
	case *onlyContainers:
		err = b.containers()
	case *scale != "":
		var counts []int
		if err = json.Unmarshal([]byte("["+*scale+"]"), &counts); err != nil {
			err = fmt.Errorf("-scale %s: want numbers with commas between, like 0,200,500", *scale)
		} else {
			err = b.scale(counts)
		}
	default:
		err = b.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) shoal(args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(b.bin, "shoal"), args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("shoal %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out), nil
}

// on runs a command on a node.
func (b *bench) on(node string, args ...string) (string, error) {
	return b.shoal(append([]string{"lab", "exec", "--name", b.lab, node, "--"}, args...)...)
}

// in runs a command in a task, by way of node1.
func (b *bench) in(task string, args ...string) (string, error) {
	return b.on("node1", append([]string{"shoal", "exec", task}, args...)...)
}

// say tells how far the run is.
func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

func (b *bench) run() (err error) {
	say("lab up (%s)", b.dataPath)
	defer func() {
		_, derr := b.shoal("lab", "down", "--name", b.lab)
		err = errors.Join(err, derr)
	}()
	if _, err := b.shoal("lab", "up", "--name", b.lab, "--nodes", "3", "--data-path", b.dataPath); err != nil {
		return err
	}
	if _, err := b.on("node1", "shoal", "net", "create", "app"); err != nil {
		return err
	}
	whoami := filepath.Join(b.bin, "whoami")
	server := fmt.Sprintf("iperf3 -s >/dev/null & %s -http :80 -udp '' -tcp '' & exec %s -http :81 -udp '' -tcp ''", whoami, whoami)
	if _, err := b.on("node1", "shoal", "svc", "create", "-q", "--name", "srv", "--network", "app", "--constraint", "node.name==node2", "--", "sh", "-c", server); err != nil {
		return err
	}
	for i, node := range []string{"node1", "node2", "node3"} {
		if _, err := b.on(node, "shoal", "run", "-d", "--name", fmt.Sprintf("c%d", i+1), "--network", "app", "--", "sleep", "3600"); err != nil {
			return err
		}
	}
	// The bare underlay: the same servers in node2's own namespace. They end
	// with the lab, whose Down ends what runs in its namespaces.
	raw := exec.Command(filepath.Join(b.bin, "shoal"), "lab", "exec", "--name", b.lab, "node2", "--", "sh", "-c", server)
	if err := raw.Start(); err != nil {
		return err
	}
	defer func() {
		_ = raw.Process.Kill()
		_ = raw.Wait()
	}()

	addr, err := b.address("srv")
	if err != nil {
		return err
	}
	fmt.Printf("### Data path %s\n\n", b.dataPath)
	if err := b.traffic(say, addr); err != nil {
		return err
	}
	if err := b.ports(say); err != nil {
		return err
	}
	if err := b.dns(say); err != nil {
		return err
	}
	return b.control(say)
}

// address is where the only replica of a service is.
func (b *bench) address(svc string) (string, error) {
	ts, err := b.tasks(svc)
	if err != nil || len(ts) != 1 {
		return "", fmt.Errorf("service %s: %d tasks, want 1: %w", svc, len(ts), err)
	}
	return ts[0].Attachments[0].Addrs[0], nil
}

type task struct {
	Name        string
	Attachments []struct{ Addrs []string }
	Status      struct {
		State string
		PID   int
	}
	Desired  string
	NodeName string `json:"node_name"`
}

func (b *bench) tasks(svc string) ([]task, error) {
	out, err := b.on("node1", "shoal", "svc", "ps", "-o", "json", svc)
	if err != nil {
		return nil, err
	}
	var all []task
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(t task) bool { return t.Status.State != "running" || t.Desired != "running" }), nil
}

// variant is one way to the server.
type variant struct {
	name       string
	client     func(args ...string) (string, error)
	host, port string
}

func (b *bench) traffic(say func(string, ...any), addr string) error {
	task := func(args ...string) (string, error) { return b.in("c1", args...) }
	variants := []variant{
		{"bare underlay", func(args ...string) (string, error) { return b.on("node1", args...) }, "172.30.0.2", "80"},
		{"overlay, direct", task, addr, "81"}, // a port of its own: TIME_WAIT of one must not slow the other
		{"overlay, VIP", task, "srv", "80"},
	}
	metrics := []struct {
		name string
		get  func(variant) (float64, error)
	}{
		{"1 TCP stream, Gbit/s", func(v variant) (float64, error) { return b.iperf(v, 1) }},
		{"8 TCP streams, Gbit/s", func(v variant) (float64, error) { return b.iperf(v, 8) }},
		{"new connections/s", b.wrk},
	}
	got := map[string]map[string][]float64{}
	for r := range b.rounds {
		for _, m := range metrics {
			for _, v := range variants {
				x, err := m.get(v)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", v.name, m.name, err)
				}
				say("round %d: %s, %s: %.2f", r+1, v.name, m.name, x)
				if got[m.name] == nil {
					got[m.name] = map[string][]float64{}
				}
				got[m.name][v.name] = append(got[m.name][v.name], x)
			}
		}
	}
	fmt.Println("| | bare underlay | overlay direct | VIP | overlay/underlay | VIP/direct | spread |\n|---|---|---|---|---|---|---|")
	for _, m := range metrics {
		g := got[m.name]
		u, d, p := median(g["bare underlay"]), median(g["overlay, direct"]), median(g["overlay, VIP"])
		worst := 0.0
		for _, xs := range g {
			worst = math.Max(worst, spread(xs))
		}
		fmt.Printf("| %s | %.4g | %.4g | %.4g | %.2f | %.2f | ±%.0f %% |\n", m.name, u, d, p, d/u, p/d, worst*50)
	}
	fmt.Println()
	return nil
}

func (b *bench) iperf(v variant, streams int) (float64, error) {
	out, err := v.client("iperf3", "-J", "-c", v.host, "-t", strconv.Itoa(b.seconds), "-P", strconv.Itoa(streams))
	if err != nil {
		return 0, err
	}
	var r struct {
		End struct {
			SumReceived struct {
				BPS float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return 0, err
	}
	return r.End.SumReceived.BPS / 1e9, nil
}

var wrkRate = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)

func (b *bench) wrk(v variant) (float64, error) {
	out, err := v.client("wrk", "-t1", "-c16", fmt.Sprintf("-d%ds", b.seconds), "-H", "Connection: close", "http://"+v.host+":"+v.port+"/")
	if err != nil {
		return 0, err
	}
	m := wrkRate.FindStringSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("no rate in the output of wrk: %s", out)
	}
	return strconv.ParseFloat(m[1], 64)
}

var wrkP99 = regexp.MustCompile(`(?m)^\s+99%\s+([0-9.]+)(us|ms|s)`)

// ports measures published ports from outside of the cluster, in turns. Each way
// has a server of its own, because what tells connections apart there is the
// client's port alone: those of one way that the server still remembers
// (TIME_WAIT) would slow the next.
func (b *bench) ports(say func(string, ...any)) error {
	ways := []struct{ name, publish, url string }{
		{"host mode, at the task's node", "published=8080,target=80,mode=host", "http://172.30.0.2:8080/"},
		{"ingress, at the task's node", "published=8081,target=80", "http://172.30.0.2:8081/"},
		{"ingress, at another node", "published=8082,target=80", "http://172.30.0.1:8082/"},
		{"ingress with nat=true, at another node", "published=8083,target=80,nat=true", "http://172.30.0.1:8083/"},
	}
	for i, w := range ways {
		if _, err := b.on("node1", "shoal", "svc", "create", "-q", "--name", fmt.Sprintf("pub%d", i), "--network", "app", "--constraint", "node.name==node2",
			"-p", w.publish, "--", filepath.Join(b.bin, "whoami"), "-udp", "", "-tcp", ""); err != nil {
			return err
		}
	}
	rates, tails := make([][]float64, len(ways)), make([][]float64, len(ways))
	for r := range b.rounds {
		for i, w := range ways {
			x, y, err := b.wrkTail(w.url)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			say("round %d: %s: %.0f/s, p99 %.2f ms", r+1, w.name, x, y)
			rates[i], tails[i] = append(rates[i], x), append(tails[i], y)
		}
	}
	fmt.Println("| published port, short connections | requests/s | spread | p99, ms | spread | requests to host mode's |\n|---|---|---|---|---|---|")
	for i, w := range ways {
		fmt.Printf("| %s | %.0f | ±%.0f %% | %.2f | ±%.0f %% | %.2f |\n", w.name, median(rates[i]), spread(rates[i])*50,
			median(tails[i]), spread(tails[i])*50, median(rates[i])/median(rates[0]))
	}
	fmt.Printf("\nSource kept to nat=true, at another node: requests %.2f, p99 %.2f.\n\n", median(rates[2])/median(rates[3]), median(tails[2])/median(tails[3]))
	return nil
}

// wrkTail asks from outside, and returns requests a second and the 99th
// percentile of latency in ms. Requests that fail are an error: refusals are
// quicker than answers.
func (b *bench) wrkTail(url string) (rate, p99 float64, err error) {
	out, err := exec.Command("ip", "netns", "exec", "shoal-"+b.lab+"-underlay", "wrk", "-t1", "-c16", fmt.Sprintf("-d%ds", b.seconds),
		"--latency", "-H", "Connection: close", url).CombinedOutput()
	if err != nil {
		return 0, 0, fmt.Errorf("wrk %s: %w: %s", url, err, out)
	}
	x, y := wrkRate.FindSubmatch(out), wrkP99.FindSubmatch(out)
	if x == nil || y == nil || wrkFailed.Match(out) {
		return 0, 0, fmt.Errorf("wrk %s: no figures, or failures: %s", url, out)
	}
	rate, _ = strconv.ParseFloat(string(x[1]), 64)
	p99, _ = strconv.ParseFloat(string(y[1]), 64)
	return rate, p99 * map[string]float64{"us": 1e-3, "ms": 1, "s": 1e3}[string(y[2])], nil
}

// wrkFailed finds answers other than 200, and connections that could not be
// made, in what wrk prints.
var wrkFailed = regexp.MustCompile(`Non-2xx|Socket errors: connect [1-9]`)

var qps = regexp.MustCompile(`Queries per second:\s+([0-9.]+)`)

func (b *bench) dns(say func(string, ...any)) error {
	say("dns")
	// A file, which a task sees, too: dnsperf reads its input over and over.
	questions, err := os.CreateTemp("", "shoal-bench-questions")
	if err != nil {
		return err
	}
	defer os.Remove(questions.Name())
	_, err = questions.WriteString("srv A\ntasks.srv A\nc2 A\n")
	if err := errors.Join(err, questions.Close()); err != nil {
		return err
	}
	// One run for the rate, one with a line for each answer for the latencies.
	dnsperf := []string{"dnsperf", "-d", questions.Name(), "-s", "127.0.0.11", "-c", "4", "-l", strconv.Itoa(b.seconds)}
	out, err := b.in("c1", append(dnsperf, "-q", "50")...)
	if err != nil {
		return err
	}
	m := qps.FindStringSubmatch(out)
	if m == nil {
		return fmt.Errorf("no rate in the output of dnsperf: %s", out)
	}
	rate, _ := strconv.ParseFloat(m[1], 64)
	out, err = b.in("c1", append(dnsperf, "-v", "-q", "10", "-Q", "2000")...)
	if err != nil {
		return err
	}
	var lat []float64
	for l := range strings.Lines(out) {
		f := strings.Fields(l)
		if len(f) >= 5 && f[0] == ">" && f[1] == "NOERROR" {
			if x, err := strconv.ParseFloat(f[len(f)-1], 64); err == nil {
				lat = append(lat, x*1000)
			}
		}
	}
	if len(lat) == 0 {
		return fmt.Errorf("no latencies in the output of dnsperf -v: %.300s", out)
	}
	slices.Sort(lat)
	fmt.Printf("| names | |\n|---|---|\n| answers a second (dnsperf -c 4 -q 50, in a task) | %.0f |\n| latency at 2,000/s: median, p99 | %.2f ms, %.2f ms (%d answers) |\n\n",
		rate, lat[len(lat)/2], lat[len(lat)*99/100], len(lat))
	return nil
}

func (b *bench) control(say func(string, ...any)) error {
	var toAll, toFirst, toProgrammed []float64
	for r := range b.rounds {
		say("round %d: service from nothing", r+1)
		name := fmt.Sprintf("s%d", r)
		var wg sync.WaitGroup
		var first float64
		var firstErr error
		start := time.Now()
		wg.Go(func() {
			_, firstErr = b.in("c1", "timeout", "60", "sh", "-c", "until curl -sf -m 1 http://"+name+"/ >/dev/null; do sleep 0.01; done")
			first = time.Since(start).Seconds()
		})
		_, err := b.on("node1", "shoal", "svc", "create", "-q", "--name", name, "--replicas", "3", "--network", "app", "--", filepath.Join(b.bin, "whoami"), "-http", ":80", "-udp", "", "-tcp", "")
		all := time.Since(start).Seconds()
		wg.Wait()
		if err := errors.Join(err, firstErr); err != nil {
			return err
		}
		toAll, toFirst = append(toAll, all), append(toFirst, first)
		x, err := b.endpointGone(name)
		if err != nil {
			return err
		}
		toProgrammed = append(toProgrammed, x)
		if _, err := b.on("node1", "shoal", "svc", "rm", name); err != nil {
			return err
		}
	}
	fmt.Printf("| control | median of %d |\n|---|---|\n", b.rounds)
	fmt.Printf("| svc create to 3/3 running | %.2f s |\n| svc create to the first right answer by name | %.2f s |\n", median(toAll), median(toFirst))
	fmt.Printf("| a replica's program killed to out of the VIP in every node's kernel | %.3f s |\n\n", median(toProgrammed))
	return nil
}

// endpointGone kills a replica's program and returns the seconds until no
// node's kernel has its address among the backends.
func (b *bench) endpointGone(svc string) (float64, error) {
	ts, err := b.tasks(svc)
	if err != nil || len(ts) != 3 {
		return 0, fmt.Errorf("service %s: %d tasks run, want 3: %w", svc, len(ts), err)
	}
	victim := ts[0]
	addr := victim.Attachments[0].Addrs[0]
	holds := func(node int) (bool, error) {
		ns, err := filepath.Glob(fmt.Sprintf("/run/netns/shoal-%s-node%d-net-app-*", b.lab, node))
		if err != nil || len(ns) != 1 {
			return false, fmt.Errorf("overlay namespace of node%d: found %d: %w", node, len(ns), err)
		}
		list := []string{"nft", "list", "table", "ip", "shoal-vip"}
		if b.dataPath == "ipvs" {
			list = []string{"ipvsadm", "-Ln"}
		}
		out, err := exec.Command("ip", append([]string{"netns", "exec", filepath.Base(ns[0])}, list...)...).CombinedOutput()
		if err != nil {
			return false, fmt.Errorf("%v: %w: %s", list, err, out)
		}
		return regexp.MustCompile(regexp.QuoteMeta(addr) + `[^0-9]`).Match(out), nil
	}
	for n := 1; n <= 3; n++ {
		if in, err := holds(n); err != nil || !in {
			return 0, fmt.Errorf("node%d does not have backend %s before it is killed: %w", n, addr, err)
		}
	}
	start := time.Now()
	if out, err := exec.Command("kill", "-9", strconv.Itoa(victim.Status.PID)).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("kill %d: %w: %s", victim.Status.PID, err, out)
	}
	var wg sync.WaitGroup
	took := make([]float64, 4)
	errs := make([]error, 4)
	for n := 1; n <= 3; n++ {
		wg.Go(func() {
			for time.Since(start) < 30*time.Second {
				in, err := holds(n)
				if err != nil {
					errs[n] = err
					return
				}
				if !in {
					took[n] = time.Since(start).Seconds()
					return
				}
			}
			errs[n] = fmt.Errorf("node%d still has backend %s after 30 s", n, addr)
		})
	}
	wg.Wait()
	return slices.Max(took), errors.Join(errs...)
}

// spread is of all values to the median.
func spread(xs []float64) float64 { return (slices.Max(xs) - slices.Min(xs)) / median(xs) }

func median(xs []float64) float64 {
	s := slices.Sorted(slices.Values(xs))
	if len(s) == 0 {
		return math.NaN()
	}
	return s[len(s)/2]
}
