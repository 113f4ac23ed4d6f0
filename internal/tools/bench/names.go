package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	mdns "github.com/miekg/dns"
	"golang.org/x/net/ipv4"

	"github.com/shoalnet/shoal/dns"
	"github.com/shoalnet/shoal/dns/dnstest"
)

// names measures name servers by a UDP socket, with the table of 10,000
// services of 10 replicas: Shoal's, and CoreDNS with the same names, if it was
// built. Server and client have a core each; the server is given one only.
func (b *bench) names(say func(string, ...any)) error {
	dir, err := os.MkdirTemp("", "shoal-bench-names")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	servers := []nameServer{{name: "Shoal", run: func(addr string) ([]string, error) { return []string{self, "-serve", addr}, nil }}}
	if coredns := filepath.Join(b.bin, "bench-coredns"); isFile(coredns) {
		if err := writeTables(dir); err != nil {
			return err
		}
		for _, plugin := range []string{"hosts", "file"} {
			servers = append(servers, nameServer{name: "CoreDNS, " + plugin, run: func(addr string) ([]string, error) {
				host, port, _ := net.SplitHostPort(addr)
				conf := filepath.Join(dir, plugin+".conf")
				text := fmt.Sprintf("shoal:%s {\n  bind %s\n  %s %s%s\n}\n", port, host, plugin, filepath.Join(dir, plugin),
					map[string]string{"hosts": " {\n    ttl 1\n  }", "file": ""}[plugin])
				return []string{coredns, "-quiet", "-conf", conf}, os.WriteFile(conf, []byte(text), 0o600)
			}})
		}
	} else {
		say("names: %s is not there: CoreDNS is left out", coredns)
	}
	questions := []struct{ name, prefix string }{{"the virtual IP", ""}, {"10 replicas", "tasks."}}
	rates, tails, paced := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	for r := range b.rounds {
		for _, s := range servers {
			err := s.with(func(addr string, pid int) error {
				for _, q := range questions {
					key := s.name + q.name
					free, cpu, err := b.measure(self, addr, pid, q.prefix, 0)
					if err != nil {
						return err
					}
					at50k, _, err := b.measure(self, addr, pid, q.prefix, 50_000)
					if err != nil {
						return err
					}
					perCore := float64(free.Answers) / cpu
					say("round %d: %s, %s: %.0f answers/s, %.0f per second of CPU, p99 %.0f µs; at %.0f/s p99 %.0f µs; lost %d and %d",
						r+1, s.name, q.name, free.Rate, perCore, free.P99, at50k.Rate, at50k.P99, free.Lost, at50k.Lost)
					rates[key], tails[key] = append(rates[key], perCore), append(tails[key], free.P99)
					if at50k.Rate > 49_000 && at50k.Lost == 0 {
						paced[key] = append(paced[key], at50k.P99)
					}
				}
				return nil
			})
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	fmt.Println("| question, server | answers per second of one core | Shoal's to it | p99 with 64 askers, µs | p99 at 50,000/s, µs |\n|---|---|---|---|---|")
	for _, q := range questions {
		for _, s := range servers {
			key := s.name + q.name
			at50k := "does not reach it"
			if 2*len(paced[key]) > b.rounds {
				at50k = fmt.Sprintf("%.0f", median(paced[key]))
			}
			fmt.Printf("| %s, %s | %.0f | %.1f | %.0f | %s |\n", q.name, s.name, median(rates[key]), median(rates["Shoal"+q.name])/median(rates[key]), median(tails[key]), at50k)
		}
	}
	fmt.Println()
	return nil
}

func isFile(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular()
}

// writeTables writes the names of the table as CoreDNS reads them.
func writeTables(dir string) (err error) {
	hosts, err := os.Create(filepath.Join(dir, "hosts"))
	if err != nil {
		return err
	}
	zone, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		return err
	}
	h, z := bufio.NewWriter(hosts), bufio.NewWriter(zone)
	fmt.Fprintln(z, "$TTL 1\nshoal. SOA ns.shoal. hostmaster.shoal. 1 3600 600 86400 1\nshoal. NS ns.shoal.\nns.shoal. A 127.0.0.1")
	line := func(name string, addr fmt.Stringer) {
		fmt.Fprintf(h, "%s %s\n", addr, name)
		fmt.Fprintf(z, "%s. A %s\n", name, addr)
	}
	v := dnstest.Large(dnstest.Services, dnstest.Replicas)
	names := map[string]string{}
	for _, s := range v.Services {
		names[s.ID] = s.Spec.Name + "." + dnstest.Network + "." + dns.Domain
		line(names[s.ID], s.VIPs[0].Addrs[0])
	}
	for _, e := range v.Endpoints {
		line("tasks."+names[e.Service], e.Addrs[0])
	}
	return errors.Join(h.Flush(), z.Flush(), hosts.Close(), zone.Close())
}

type nameServer struct {
	name string
	run  func(addr string) (args []string, err error)
}

// pinned gives a command one core of its own, where there are several, and
// precedence over what else runs there: their time slices would be the p99.
func pinned(core int, args []string) *exec.Cmd {
	args = append([]string{"chrt", "--rr", "1"}, args...)
	if runtime.NumCPU() > 1 {
		args = append([]string{"taskset", "-c", strconv.Itoa(core)}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	return cmd
}

// with runs the server while fn does.
func (s nameServer) with(fn func(addr string, pid int) error) error {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	addr := pc.LocalAddr().String()
	pc.Close()
	args, err := s.run(addr)
	if err != nil {
		return err
	}
	cmd := pinned(0, args)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	q := new(mdns.Msg).SetQuestion(dnstest.Service(dnstest.Services-1)+"."+dnstest.Network+"."+dns.Domain+".", mdns.TypeA)
	c := mdns.Client{Timeout: 200 * time.Millisecond}
	for deadline := time.Now().Add(60 * time.Second); ; {
		if r, _, err := c.Exchange(q, addr); err == nil && len(r.Answer) == 1 {
			return fn(addr, cmd.Process.Pid)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no answer in 60 s: %s", stderr.String())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// measure asks from another process, and returns what it saw and the seconds of
// CPU that the server took.
func (b *bench) measure(self, addr string, pid int, prefix string, rate int) (res asked, cpu float64, err error) {
	before, err := cpuTime(pid)
	if err != nil {
		return res, 0, err
	}
	cmd := pinned(1, []string{self, "-ask", addr, "-prefix", prefix, "-rate", strconv.Itoa(rate), "-seconds", strconv.Itoa(b.seconds)})
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return res, 0, fmt.Errorf("asking: %w", err)
	}
	after, err := cpuTime(pid)
	if err != nil {
		return res, 0, err
	}
	return res, after - before, json.Unmarshal(out, &res)
}

// cpuTime is the CPU time that a process has had, in seconds (proc(5): utime
// and stime, the 14th and 15th field of stat, in hundredths).
func cpuTime(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, b)
	}
	u, err1 := strconv.Atoi(f[11])
	s, err2 := strconv.Atoi(f[12])
	return float64(u+s) / 100, errors.Join(err1, err2)
}

// serveNames is the server of Shoal's side, until it is killed.
func serveNames(addr string) error {
	s := dns.NewServer(dns.Config{})
	s.SetZone(dns.NewZone(dnstest.Large(dnstest.Services, dnstest.Replicas), dns.ZoneOptions{}))
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	a := &dns.Asker{Networks: []string{dnstest.Network}}
	return s.Serve(context.Background(), func() *dns.Asker { return a }, pc, ln)
}

// asked is what an asking process saw.
type asked struct {
	Answers, Lost int
	Rate          float64 // answers per second
	P99           float64 // µs
}

const (
	askers  = 64 // that each wait for their answer, without a rate
	batched = 16 // questions in one system call
)

// askNames asks for services at random: as fast as answers come, or at a rate.
func askNames(addr, prefix string, rate, seconds int) (asked, error) {
	var res asked
	c, err := net.Dial("udp", addr)
	if err != nil {
		return res, err
	}
	defer c.Close()
	if err := c.(*net.UDPConn).SetReadBuffer(4 << 20); err != nil {
		return res, err
	}
	questions := make([][]byte, 8192)
	for i := range questions {
		name := prefix + dnstest.Service(rand.IntN(dnstest.Services)) + "." + dnstest.Network + "." + dns.Domain + "."
		if questions[i], err = new(mdns.Msg).SetQuestion(name, mdns.TypeA).SetEdns0(1232, false).Pack(); err != nil {
			return res, err
		}
	}
	pc := ipv4.NewPacketConn(c.(*net.UDPConn))
	out, in := make([]ipv4.Message, batched), make([]ipv4.Message, batched)
	for i := range in {
		in[i].Buffers = [][]byte{make([]byte, 2048)}
		out[i].Buffers = [][]byte{nil}
	}
	sent := make([]time.Time, 1<<16)
	next := uint16(0)
	send := func(n int) error {
		now := time.Now()
		for n > 0 {
			k := min(n, len(out))
			for i := range k {
				next++
				q := questions[int(next)%len(questions)]
				q[0], q[1] = byte(next>>8), byte(next)
				out[i].Buffers[0] = q
				if !sent[next].IsZero() {
					res.Lost++
				}
				sent[next] = now
			}
			for at := 0; at < k; {
				m, err := pc.WriteBatch(out[at:k], 0)
				if err != nil {
					return err
				}
				at += m
			}
			n -= k
		}
		return nil
	}
	took := make([]time.Duration, 0, 1<<20)
	// receive waits until d for answers.
	receive := func(d time.Time) (int, error) {
		if err := c.SetReadDeadline(d); err != nil {
			return 0, err
		}
		n, err := pc.ReadBatch(in, 0)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return 0, nil
		}
		if err != nil {
			return 0, err
		}
		now := time.Now()
		for _, m := range in[:n] {
			b := m.Buffers[0][:m.N]
			if len(b) < 12 || b[3]&0xf != 0 || b[7] == 0 {
				return 0, fmt.Errorf("answered with %x", b)
			}
			id := uint16(b[0])<<8 | uint16(b[1])
			if !sent[id].IsZero() {
				took = append(took, now.Sub(sent[id]))
				sent[id] = time.Time{}
			}
		}
		return n, nil
	}
	start := time.Now()
	end := start.Add(time.Duration(seconds) * time.Second)
	if rate == 0 {
		if err := send(askers); err != nil {
			return res, err
		}
	}
	// Once, though it may be short of answers at the end.
	for total := 0; time.Now().Before(end); {
		if rate > 0 {
			due := int(time.Since(start).Seconds()*float64(rate)) - total
			// A machine that stood still is not the server's fault.
			due = min(due, 4*batched)
			if err := send(due); err != nil {
				return res, err
			}
			total += due
			if _, err := receive(time.Now().Add(100 * time.Microsecond)); err != nil {
				return res, err
			}
			continue
		}
		n, err := receive(time.Now().Add(200 * time.Millisecond))
		if err != nil {
			return res, err
		}
		if n == 0 { // all lost
			n = askers
		}
		if err := send(n); err != nil {
			return res, err
		}
	}
	res.Answers, res.Rate = len(took), float64(len(took))/time.Since(start).Seconds()
	if len(took) == 0 {
		return res, errors.New("no answer")
	}
	slices.Sort(took)
	res.P99 = float64(took[len(took)*99/100].Nanoseconds()) / 1000
	return res, nil
}
