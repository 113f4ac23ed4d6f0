package chaos

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/shoalnet/shoal/internal/nl"
)

// Requests and questions are made by this process, from sockets in tasks'
// namespaces: they go the way that the task's own would.

// requestTime bounds a request of a quiet cluster: over TCP's first retransmission.
const requestTime = 2 * time.Second

var nameServer = netip.MustParseAddrPort("127.0.0.11:53")

// get asks a whoami server who it is.
func get(ctx context.Context, ns string, to netip.AddrPort) (host string, err error) {
	ctx, cancel := context.WithTimeout(ctx, scaled(requestTime))
	defer cancel()
	c, err := nl.Dial(ctx, ns, "tcp", to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	dl, _ := ctx.Deadline()
	_ = c.SetDeadline(dl)
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	var a struct{ Host string }
	err = json.NewDecoder(r.Body).Decode(&a)
	return a.Host, err
}

// ask asks the name server of a task for the addresses of a name. A name that is
// not known is none, and false.
func ask(ctx context.Context, ns, name string) (addrs []string, known bool, err error) {
	n, err := dnsmessage.NewName(name + ".")
	if err != nil {
		return nil, false, err
	}
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: 1, RecursionDesired: true}, Questions: []dnsmessage.Question{{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	b, err := q.Pack()
	if err != nil {
		return nil, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, scaled(requestTime))
	defer cancel()
	c, err := nl.Dial(ctx, ns, "udp", nameServer)
	if err != nil {
		return nil, false, err
	}
	defer c.Close()
	dl, _ := ctx.Deadline()
	_ = c.SetDeadline(dl)
	if _, err := c.Write(b); err != nil {
		return nil, false, err
	}
	buf := make([]byte, 4096)
	k, err := c.Read(buf)
	if err != nil {
		return nil, false, err
	}
	var m dnsmessage.Message
	if err := m.Unpack(buf[:k]); err != nil {
		return nil, false, err
	}
	switch m.RCode {
	case dnsmessage.RCodeNameError:
		return nil, false, nil
	case dnsmessage.RCodeSuccess:
	default:
		return nil, false, fmt.Errorf("%s", m.RCode)
	}
	for _, r := range m.Answers {
		if a, ok := r.Body.(*dnsmessage.AResource); ok {
			addrs = append(addrs, netip.AddrFrom4(a.A).String())
		}
	}
	slices.Sort(addrs)
	return addrs, true, nil
}

// client is a task of the driver's own on each node, on every network: where
// requests come from.
func (w *world) client(node string) string { return "client-" + node }

// findings are what some probes found wrong, by what was probed.
type findings struct {
	most int // what will do: each further request that gets no answer takes its time

	mu       sync.Mutex
	wrong    map[string]string
	requests int
}

func (f *findings) add(what, format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.wrong == nil {
		f.wrong = map[string]string{}
	}
	f.wrong[what] = fmt.Sprintf(format, args...)
}

func (f *findings) asked(n int) {
	f.mu.Lock()
	f.requests += n
	f.mu.Unlock()
}

// enough tells that what was found will do.
func (f *findings) enough() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.wrong) >= f.most
}

func (f *findings) err() error {
	var errs []error
	for _, k := range sorted(f.wrong) {
		if len(errs) == 12 {
			errs = append(errs, fmt.Errorf("and %d more", len(f.wrong)-12))
			break
		}
		errs = append(errs, fmt.Errorf("%s: %s", k, f.wrong[k]))
	}
	return errors.Join(errs...)
}

// balanced asks one address again and again, and wants each of some servers to
// answer, nobody else, and every request to be answered.
func (f *findings) balanced(ctx context.Context, what, ns string, to netip.AddrPort, hosts []string) {
	if f.enough() {
		return
	}
	if len(hosts) == 0 {
		f.asked(1)
		if h, err := get(ctx, ns, to); err == nil {
			f.add(what, "%s answers, and there is no server", h)
		} else if ctx.Err() == nil && !refusedNow(err) {
			f.add(what, "there is no server: want it refused at once, got %v", err)
		}
		return
	}
	seen := map[string]int{}
	tries := 3*len(hosts) + 1
	for i := range tries {
		f.asked(1)
		h, err := get(ctx, ns, to)
		if err != nil {
			f.add(what, "request %d of %d: %v", i+1, tries, err)
			return
		}
		seen[h]++
	}
	if got := slices.Sorted(maps.Keys(seen)); !slices.Equal(got, hosts) {
		f.add(what, "%d requests went to %v, want each of %v", tries, got, hosts)
	}
}

func refusedNow(err error) bool {
	return strings.Contains(err.Error(), "refused") || strings.Contains(err.Error(), "unreachable")
}

// named wants a name to have some addresses.
func (f *findings) named(ctx context.Context, node, ns, name string, want []string) {
	if f.enough() {
		return
	}
	f.asked(1)
	slices.Sort(want)
	got, known, err := ask(ctx, ns, name)
	what := fmt.Sprintf("%s: name %s", node, name)
	switch {
	case err != nil:
		f.add(what, "%v", err)
	case !known:
		f.add(what, "unknown, want %v", want)
	case !slices.Equal(got, want):
		f.add(what, "%v, want %v", got, want)
	}
}

// probe asks from the client on each of some nodes, for all that it may reach.
func (w *world) probe(ctx context.Context, l lists, nodes []string, most int) *findings {
	f := &findings{most: most}
	running := map[string][]taskInfo{} // by service's ID
	for _, t := range l.tasks {
		if t.runs() {
			running[t.Service] = append(running[t.Service], t)
		}
	}
	var wg sync.WaitGroup
	for _, n := range nodes {
		i := slices.IndexFunc(l.tasks, func(t taskInfo) bool { return t.Name == w.client(n) && t.runs() })
		if i < 0 {
			f.add(n+": client", "does not run")
			continue
		}
		_, _, netns := w.node(n)
		c := l.tasks[i]
		names, err := nl.List(netns + "-task-" + c.Name + "-")
		if err != nil || len(names) != 1 {
			f.add(n+": client", "has namespaces %v, want one: %v", names, orNothing(err))
			continue
		}
		wg.Go(func() { w.probeFrom(ctx, f, n, names[0], c, l, running) })
	}
	wg.Go(func() { w.probeOutside(ctx, f, l, nodes, running) })
	wg.Wait()
	w.Requests += f.requests
	return f
}

func (w *world) probeFrom(ctx context.Context, f *findings, n, ns string, c taskInfo, l lists, running map[string][]taskInfo) {
	for _, s := range l.svcs {
		var hosts []string
		for _, t := range running[s.ID] {
			hosts = append(hosts, t.host())
		}
		slices.Sort(hosts)
		for _, on := range s.Spec.Networks {
			net := on.NetworkName
			if _, ok := addrOn(c.Attachments, net); !ok {
				continue
			}
			var addrs []string
			for _, t := range running[s.ID] {
				if a, ok := addrOn(t.Attachments, net); ok {
					addrs = append(addrs, a)
					w.direct(ctx, f, n, ns, t.Name, a)
				}
			}
			f.named(ctx, n, ns, "tasks."+s.Spec.Name+"."+net, addrs)
			vip, ok := addrOn(s.VIPs, net)
			if !ok {
				f.named(ctx, n, ns, s.Spec.Name+"."+net, addrs)
				continue
			}
			f.named(ctx, n, ns, s.Spec.Name+"."+net, []string{vip})
			f.balanced(ctx, fmt.Sprintf("%s: VIP %s of %s on %s", n, vip, s.Spec.Name, net), ns, netip.AddrPortFrom(netip.MustParseAddr(vip), 80), hosts)
		}
	}
	for _, t := range running[""] {
		for _, a := range t.Attachments {
			if _, ok := addrOn(c.Attachments, a.NetworkName); !ok || len(a.Addrs) == 0 {
				continue
			}
			f.named(ctx, n, ns, t.Name+"."+a.NetworkName, slices.Clone(a.Addrs))
			w.direct(ctx, f, n, ns, t.Name, a.Addrs[0])
		}
	}
	for _, name := range w.model.removed {
		if f.enough() {
			return
		}
		f.asked(1)
		if got, known, err := ask(ctx, ns, name); err == nil && known {
			f.add(fmt.Sprintf("%s: name %s", n, name), "%v, and it was removed", got)
		}
	}
}

func (w *world) direct(ctx context.Context, f *findings, n, ns, task, addr string) {
	if f.enough() {
		return
	}
	f.asked(1)
	what := fmt.Sprintf("%s: %s at %s", n, task, addr)
	if h, err := get(ctx, ns, netip.AddrPortFrom(netip.MustParseAddr(addr), 80)); err != nil {
		f.add(what, "%v", err)
	} else if h != (taskInfo{Name: task}).host() {
		f.add(what, "%s answers", h)
	}
}

// probeOutside asks published ports of each node from outside.
func (w *world) probeOutside(ctx context.Context, f *findings, l lists, nodes []string, running map[string][]taskInfo) {
	ns := "shoal-" + w.o.Name + "-underlay"
	for _, s := range l.svcs {
		var hosts []string
		for _, t := range running[s.ID] {
			hosts = append(hosts, t.host())
		}
		slices.Sort(hosts)
		for _, p := range s.Ports {
			for _, n := range w.lab.NodeList {
				if slices.Contains(nodes, n.Name) {
					f.balanced(ctx, fmt.Sprintf("port %d of %s at %s", p.Published, s.Spec.Name, n.Name), ns, netip.AddrPortFrom(n.Addr, uint16(p.Published)), hosts)
				}
			}
		}
	}
}
