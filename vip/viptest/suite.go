package viptest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
)

// Breakage deletes or spoils one kind of object behind the data plane's back.
type Breakage struct {
	Name string
	Do   func(tb testing.TB, ns string, s vip.Server)
}

// Harness is what the suite needs of an implementation.
type Harness struct {
	// New makes another data plane over the same kernel, as a restarted agent
	// does.
	New func(tb testing.TB) vip.Dataplane
	// AddNamespace and RemoveNamespace make and remove a namespace.
	AddNamespace, RemoveNamespace func(tb testing.TB, name string)
	Breakages                     []Breakage
	// Foreign puts objects of strangers into the namespace and returns a check
	// that they are as they were. May be nil.
	Foreign func(tb testing.TB, ns string) (check func(tb testing.TB))
	// Kernel: packets really flow, so that the traffic tests run too.
	Kernel bool
	Scale  int // services of the scale test; 0: none
	// PerService is the backends of each of them; 0: 3.
	PerService int
	// Idle reads, from the kernel, for how long an idle TCP connection is known
	// in a namespace, by name of the setting. May be nil.
	Idle func(tb testing.TB, ns string) map[string]time.Duration
	// Native: not emulated, so that limits of time mean something.
	Native bool
}

// Skip skips a test, naming what is missing, or fails it when
// SHOAL_TEST_STRICT=1.
func Skip(tb testing.TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv("SHOAL_TEST_STRICT") == "1" {
		tb.Fatalf("SHOAL_TEST_STRICT=1 and "+format, args...)
	}
	tb.Skipf(format, args...)
}

// keepalive is when Linux sends the first keepalive of an idle TCP connection
// by default (tcp_keepalive_time, tcp(7)).
const keepalive = 7200 * time.Second

// Subnet of the suite's network; its gateway is .1, VIPs are below .100.
var subnet = netip.MustParsePrefix("10.213.7.0/24")

func addr(n int) netip.Addr {
	b := subnet.Addr().As4()
	b[3] += byte(n)
	return netip.AddrFrom4(b)
}

// The suite's IPv6 subnet; hosts are numbered as in the other.
var subnet6 = netip.MustParsePrefix("fd00:213:7::/64")

func addr6(n int) netip.Addr {
	b := subnet6.Addr().As16()
	b[15] = byte(n)
	return netip.AddrFrom16(b)
}

// uniq makes names of namespaces that no other run uses.
func uniq() string { return "vt" + strings.ToLower(spec.NewID()[:6]) }

// world is one network of the suite in its own namespace.
type world struct {
	tb   testing.TB
	h    Harness
	net  spec.Network
	view spec.View
	dp   vip.Dataplane
	v6   bool // tests talk IPv6; the network is always of both families then
}

// at is an address of the network, of the family that is tested.
func (w *world) at(n int) netip.Addr {
	if w.v6 {
		return addr6(n)
	}
	return addr(n)
}

// dual makes the network one of both families, and IPv6 the tested one.
func (w *world) dual() *world {
	w.v6 = true
	w.net.Subnets, w.net.Gateways = []netip.Prefix{subnet, subnet6}, []netip.Addr{addr(1), addr6(1)}
	w.view.Networks = []spec.Network{w.net}
	return w
}

func newWorld(tb testing.TB, h Harness) *world {
	id := uniq()
	w := &world{tb: tb, h: h, net: spec.Network{ID: id, Name: "app", Driver: spec.DriverOverlay,
		Subnets: []netip.Prefix{subnet}, Gateways: []netip.Addr{addr(1)}, VNI: spec.MinVNI}}
	w.view = spec.View{Self: "n1", Instance: id, Complete: true,
		Peers:    []spec.Peer{{ID: "n1"}, {ID: "n2"}},
		Networks: []spec.Network{w.net}}
	w.dp = h.New(tb)
	return w
}

func (w *world) ns() string { return spec.OverlayNetns(w.view.Instance, w.net) }

func (w *world) up() {
	w.h.AddNamespace(w.tb, w.ns())
	w.tb.Cleanup(func() { w.h.RemoveNamespace(w.tb, w.ns()) })
}

// service makes or replaces a service with VIP addr(v); backends are written
// as numbers, negative ones draining.
func (w *world) service(v int, backends ...int) {
	name := fmt.Sprintf("svc%d", v)
	w.remove(v)
	w.view.Services = append(slices.Clone(w.view.Services), spec.Service{ID: name,
		Spec: spec.ServiceSpec{Name: name, EndpointMode: spec.EndpointModeVIP, Networks: []spec.NetworkAttachment{{Network: w.net.ID}}},
		VIPs: []spec.VIPs{{Network: w.net.ID, Addrs: w.both(v)}}})
	for _, b := range backends {
		e := spec.Endpoint{Network: w.net.ID, Service: name, Node: "n1", State: spec.EndpointActive}
		if b < 0 {
			b, e.State = -b, spec.EndpointDraining
		}
		e.Task = fmt.Sprintf("%s.%d", name, b)
		e.Addrs = w.both(b)
		w.view.Endpoints = append(slices.Clone(w.view.Endpoints), e)
	}
	w.view.Sort()
}

func (w *world) both(n int) []netip.Addr {
	if w.v6 {
		return []netip.Addr{addr(n), addr6(n)}
	}
	return []netip.Addr{addr(n)}
}

func (w *world) remove(v int) {
	name := fmt.Sprintf("svc%d", v)
	w.view.Services = slices.DeleteFunc(slices.Clone(w.view.Services), func(s spec.Service) bool { return s.ID == name })
	w.view.Endpoints = slices.DeleteFunc(slices.Clone(w.view.Endpoints), func(e spec.Endpoint) bool { return e.Service == name })
}

func (w *world) want() vip.State { v := w.view; return vip.Desired(&v) }

// ops is what one pass would do.
func (w *world) ops() []reconcile.Op {
	w.tb.Helper()
	have, err := w.dp.Observe(context.Background(), w.want())
	if err != nil {
		w.tb.Fatalf("observe: %v", err)
	}
	ops, next := vip.Diff(w.want(), have, time.Now())
	if !next.IsZero() {
		w.tb.Errorf("Diff wants to be called at %v", next)
	}
	return ops
}

// pass runs one pass, in which nothing may fail, and returns the operations.
func (w *world) pass() []reconcile.Op {
	w.tb.Helper()
	ops := w.ops()
	for i, err := range (vip.Target{Dataplane: w.dp}).ApplyAll(context.Background(), ops) {
		if err != nil {
			w.tb.Fatalf("%s: %v", ops[i], err)
		}
	}
	return ops
}

// converge runs one pass and demands that it sufficed.
func (w *world) converge() {
	w.tb.Helper()
	w.pass()
	w.settled()
}

// settled demands that nothing is left to do.
func (w *world) settled() {
	w.tb.Helper()
	for _, op := range w.ops() {
		w.tb.Errorf("left to do: %s", op)
	}
	if w.tb.Failed() {
		w.tb.FailNow()
	}
}

// Run runs the suite. With -test.short, which is meant for an emulated machine,
// the traffic tests run over IPv6 only where balance is concerned, and the
// scale test is left out.
func Run(t *testing.T, h Harness) {
	t.Run("state", func(t *testing.T) { runState(t, h) })
	if h.Kernel {
		t.Run("traffic", func(t *testing.T) { runTraffic(t, h) })
	}
	if h.Scale > 0 && !testing.Short() {
		t.Run("scale", func(t *testing.T) { runScale(t, h) })
	}
}

func runState(t *testing.T, h Harness) {
	t.Run("namespace", func(t *testing.T) {
		w := newWorld(t, h)
		w.service(2, 100, 101)
		ops := w.ops()
		if len(ops) != 1 {
			t.Fatalf("operations while the namespace is missing: %v", ops)
		}
		if !strings.HasPrefix(ops[0].Object(), "network app: ") {
			t.Errorf("object %q", ops[0].Object())
		}
		if err := w.dp.Apply(t.Context(), ops[0]); !errors.Is(err, vip.ErrNoNamespace) || !strings.Contains(err.Error(), w.ns()) && h.Kernel {
			t.Errorf("apply without a namespace: %v", err)
		}
		hdr := w.want().Networks[0]
		srv := hdr.Servers[0]
		hdr.Servers = nil
		if err := w.dp.Apply(t.Context(), vip.SetServer{Network: hdr, Want: srv}); !errors.Is(err, vip.ErrNoNamespace) {
			t.Errorf("set server without a namespace: %v", err)
		}
		if err := w.dp.Apply(t.Context(), vip.DelServer{Network: hdr, Have: srv}); err != nil {
			t.Errorf("deleting from a namespace that is gone: %v", err)
		}
		w.up()
		// The operation of the time before builds everything.
		if err := w.dp.Apply(t.Context(), ops[0]); err != nil {
			t.Fatal(err)
		}
		w.settled()
	})

	t.Run("ipv6", func(t *testing.T) {
		w := newWorld(t, h).dual()
		w.up()
		w.service(3, 110)
		for _, bs := range [][]int{{100}, {100, -101, 102}, {-100}, {}, {101, 102}} {
			w.service(2, bs...)
			w.converge()
			w.dp = h.New(t)
			w.settled()
		}
		w.remove(2)
		w.converge()
	})

	t.Run("transitions", func(t *testing.T) {
		w := newWorld(t, h)
		w.up()
		w.converge()
		w.service(3, 110)
		for _, bs := range [][]int{{100}, {100, 101}, {100, 101, 102}, {100, -101, 102}, {100, 102}, {-100, -102}, {-100}, {}, {101, 102},
			{-101, 102}, {101, 102}, {103, 104}, {-103, -104}, {103, -104}, {}} {
			w.service(2, bs...)
			before := w.ops()
			w.converge()
			// The same again is no error, and changes nothing.
			for _, op := range before {
				if err := w.dp.Apply(t.Context(), op); err != nil {
					t.Fatalf("%v: %s again: %v", bs, op, err)
				}
			}
			w.settled()
			w.dp = h.New(t)
			w.settled()
		}
		w.remove(2)
		ops := w.pass()
		if len(ops) != 1 || ops[0].Object() != "network app: vip "+addr(2).String() {
			t.Errorf("operations to remove a service: %v", ops)
		}
		if err := w.dp.Apply(t.Context(), ops[0]); err != nil {
			t.Errorf("%s again: %v", ops[0], err)
		}
		w.settled()
		w.remove(3)
		w.converge()
	})

	t.Run("incomplete", func(t *testing.T) {
		w := newWorld(t, h)
		w.up()
		w.service(2, 100, 101)
		w.service(3, 102)
		w.converge()
		full := w.view
		w.view.Complete = false
		w.remove(3)
		w.service(2, -100)
		w.pass()
		have, err := w.dp.Observe(t.Context(), w.want())
		if err != nil {
			t.Fatal(err)
		}
		n := have.Networks[0]
		if s, ok := n.Server(addr(3)); !ok || !s.Open {
			t.Errorf("a server that an incomplete view lacks was removed: %+v", n.Servers)
		}
		s, _ := n.Server(addr(2))
		if want := []vip.Backend{{Addr: addr(100)}, {Addr: addr(101), Weight: 1}}; !slices.Equal(s.Backends, want) {
			t.Errorf("backends after an incomplete view: %v, want %v", s.Backends, want)
		}
		if len(n.Locals) != 3 {
			t.Errorf("hairpin after an incomplete view: %v", n.Locals)
		}
		w.view = full
		w.converge()
	})

	t.Run("repair", func(t *testing.T) {
		w := newWorld(t, h)
		w.up()
		w.service(2, 100, 101, -102)
		w.service(3, 103)
		w.service(4, -104)
		w.service(5)
		w.converge()
		s, _ := w.want().Networks[0].Server(addr(2))
		for _, b := range h.Breakages {
			t.Run(strings.ReplaceAll(b.Name, " ", "_"), func(t *testing.T) {
				w := *w
				w.tb = t
				b.Do(t, w.ns(), s)
				if len(w.ops()) == 0 {
					t.Fatal("the damage isn't noticed")
				}
				w.converge()
			})
		}
	})

	if h.Idle != nil {
		t.Run("idle", func(t *testing.T) {
			w := newWorld(t, h)
			w.up()
			w.service(2, 100)
			w.converge()
			idle := h.Idle(t, w.ns())
			for what, d := range idle {
				if d <= keepalive {
					t.Errorf("%s is %v: an idle connection is forgotten before its first keepalive, which comes after %v", what, d, keepalive)
				}
			}
			t.Logf("%v", idle)
			if len(idle) == 0 {
				t.Error("no timeout was read")
			}
			for what, d := range conntrackTime(t, w.ns(), "close_wait") {
				if d < time.Hour {
					t.Errorf("%s is %v: a connection that one side has closed is forgotten while the other still works on its answer", what, d)
				}
			}
		})
	}

	if h.Foreign != nil {
		t.Run("foreign", func(t *testing.T) {
			w := newWorld(t, h)
			w.up()
			check := h.Foreign(t, w.ns())
			w.settledExceptTable()
			w.service(2, 100, 101)
			w.converge()
			w.service(2, 100)
			w.converge()
			w.remove(2)
			w.converge()
			check(t)
		})
	}
}

// settledExceptTable: before anything was made, only the table is missing.
func (w *world) settledExceptTable() {
	w.tb.Helper()
	for _, op := range w.ops() {
		if _, ok := op.(vip.SetNetwork); !ok {
			w.tb.Errorf("%s although nothing is ours", op)
		}
	}
}

func runScale(t *testing.T, h Harness) {
	w := newWorld(t, h)
	w.net.Subnets[0] = netip.MustParsePrefix("10.213.0.0/16")
	w.up()
	w.service(2)
	w.converge() // so that the load below is one operation per VIP
	w.remove(2)
	per := h.PerService
	if per == 0 {
		per = 3
	}
	at := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 213, byte(n >> 8), byte(n)}) }
	for i := range h.Scale {
		name := fmt.Sprintf("svc%d", i)
		w.view.Services = append(w.view.Services, spec.Service{ID: name,
			Spec: spec.ServiceSpec{Name: name, EndpointMode: spec.EndpointModeVIP},
			VIPs: []spec.VIPs{{Network: w.net.ID, Addrs: []netip.Addr{at(10 + i)}}}})
		for k := range per {
			w.view.Endpoints = append(w.view.Endpoints, spec.Endpoint{Task: fmt.Sprintf("%s.%d", name, k), Network: w.net.ID,
				Service: name, Node: "n2", State: spec.EndpointActive, Addrs: []netip.Addr{at(20000 + per*i + k)}})
		}
	}
	w.view.Sort()
	// Limits are there to notice what grows with the square of the services, not
	// to measure: the machine is shared, and the race detector costs a factor.
	const slack = 10 * time.Second
	timed := func(what string, limit time.Duration, fn func()) {
		t.Helper()
		start := time.Now()
		fn()
		d := time.Since(start)
		t.Logf("%d services of %d backends: %s: %v", h.Scale, per, what, d.Round(10*time.Microsecond))
		if h.Native && d > limit {
			t.Errorf("%s took %v, more than %v", what, d, limit)
		}
	}
	timed("load", time.Minute, func() { w.pass() })
	observe := func() { w.settled() }
	timed("observe and diff (first)", slack, observe)
	timed("observe and diff", slack, observe)
	full := w.view.Endpoints
	w.view.Endpoints = slices.Clone(full[1:])
	var ops []reconcile.Op
	timed("one backend removed (observe, diff, apply)", slack, func() { ops = w.pass() })
	if len(ops) != 1 {
		t.Errorf("%d operations for one backend", len(ops))
	}
	timed("apply of that operation alone", slack, func() {
		if err := w.dp.Apply(t.Context(), ops[0]); err != nil {
			t.Error(err)
		}
	})
	w.settled()
	w.view.Endpoints = full
	ops = w.ops()
	if len(ops) != 1 {
		t.Fatalf("%d operations for one backend", len(ops))
	}
	timed("one backend added (apply)", slack, func() {
		if err := w.dp.Apply(t.Context(), ops[0]); err != nil {
			t.Error(err)
		}
	})
	w.settled()
	// A node dies that had a task of each service, and comes back.
	w.view.Endpoints = slices.DeleteFunc(slices.Clone(full), func(e spec.Endpoint) bool { return strings.HasSuffix(e.Task, ".0") })
	timed("one backend of each removed", time.Minute, func() { ops = w.pass() })
	if len(ops) < h.Scale-1 { // one VIP may be the gateway, which is not served
		t.Errorf("%d operations for a backend of each of %d services", len(ops), h.Scale)
	}
	w.settled()
	w.view.Endpoints = full
	timed("one backend of each added", time.Minute, func() { w.pass() })
	w.settled()
	// The same into an empty namespace, as at the start of an agent.
	w.h.RemoveNamespace(t, w.ns())
	w.h.AddNamespace(t, w.ns())
	timed("load into an empty namespace", time.Minute, func() { w.pass() })
	w.settled()
	w.view.Services, w.view.Endpoints = nil, nil
	timed("remove all, one by one", 3*time.Minute, func() { w.pass() })
	w.settled()
}
