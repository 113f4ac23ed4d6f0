package ingresstest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/spec"
)

// World is a machine that a Dataplane works on, as the suite needs it. The ways
// out of the [Sample]'s networks exist.
type World interface {
	// Dataplane makes a new Dataplane, as a restarted agent has.
	Dataplane() ingress.Dataplane
	// View is a [Sample] for the machine.
	View() *spec.View
	// Break removes an object behind the Dataplane's back. It returns false
	// for what can't be broken.
	Break(o ingress.Object) bool
	// Hold lets a program of the machine listen on a port, until release.
	Hold(port uint16, protocol string) (release func())
	// Empty fails the test if anything of ours is left.
	Empty(t *testing.T)
}

// IDs of the objects in [Sample].
const (
	SelfID, PeerB, PeerC = "nodeaaaaaaaa", "nodebbbbbbbb", "nodecccccccc"
	NetApp, NetDB        = "netapp444444", "netdb5555555"
)

// Sample is a View with everything in it: a network with a way out and one
// without, a service with ports of every kind and a task with a port of its
// own.
func Sample(instance string, under spec.Underlay, vni uint32) *spec.View {
	a := netip.MustParseAddr
	v := &spec.View{Self: SelfID, Instance: instance, Complete: true, Underlay: under}
	v.Peers = []spec.Peer{
		{ID: SelfID, Name: "node1", Number: 1, Addr: under.Addr, MTU: 1500},
		{ID: PeerB, Name: "node2", Number: 2, Addr: under.Addr.Next()},
		{ID: PeerC, Name: "node3", Number: 300, Addr: under.Addr.Next().Next(), Liveness: spec.PeerSuspect, MTU: 1400},
		{ID: "nodedddddddd", Name: "node4", Number: 4, Addr: under.Addr.Next().Next(), Liveness: spec.PeerDead},
	}
	v.Networks = []spec.Network{
		{ID: NetApp, Name: "app", Driver: spec.DriverOverlay, VNI: vni,
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.93.1.0/24")}, Gateways: []netip.Addr{a("10.93.1.1")}},
		{ID: NetDB, Name: "db", Driver: spec.DriverOverlay, VNI: vni + 1, Internal: true,
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.93.2.0/24")}, Gateways: []netip.Addr{a("10.93.2.1")}},
	}
	v.Services = []spec.Service{{ID: "svcweb444444", Ingress: NetApp,
		Spec: spec.ServiceSpec{Name: "web", EndpointMode: spec.EndpointModeVIP},
		VIPs: []spec.VIPs{{Network: NetDB, Addrs: []netip.Addr{a("10.93.2.2")}}, {Network: NetApp, Addrs: []netip.Addr{a("10.93.1.2")}}},
		Ports: []spec.Port{
			{Published: 8080, Target: 80, Protocol: spec.TCP, Mode: spec.PortIngress},
			{Published: 8080, Target: 80, Protocol: spec.UDP, Mode: spec.PortIngress},
			{Published: 8081, Target: 81, Protocol: spec.SCTP, Mode: spec.PortIngress, NAT: true},
			{Published: 8082, Target: 82, Protocol: spec.TCP, Mode: spec.PortIngress, NAT: true, Addr: a("127.0.0.1")},
			{Published: 8083, Target: 83, Protocol: spec.TCP, Mode: spec.PortLocal},
			{Published: 8084, Target: 84, Protocol: spec.TCP, Mode: spec.PortHost}, // is in Sandbox.Ports
		}}}
	ep := func(task, node string, last byte, st spec.EndpointState) spec.Endpoint {
		return spec.Endpoint{Task: task, Service: "svcweb444444", Network: NetApp, Node: node, State: st,
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 93, 1, last})}}
	}
	v.Endpoints = []spec.Endpoint{
		ep("taskweb44441", SelfID, 10, spec.EndpointActive),
		ep("taskweb44442", SelfID, 11, spec.EndpointActive),
		ep("taskweb44443", SelfID, 12, spec.EndpointDraining),
		ep("taskweb44444", SelfID, 13, spec.EndpointStarting),
		ep("taskweb44445", PeerB, 14, spec.EndpointActive),
	}
	v.Sandboxes = []spec.Sandbox{{Task: "taskweb44441", Name: "web.1", Netns: instance + "-task-web.1",
		Attachments: []spec.Attachment{
			{Network: NetDB, Addrs: []netip.Addr{a("10.93.2.10")}},
			{Network: NetApp, Addrs: []netip.Addr{a("10.93.1.10")}},
		},
		Ports: []spec.Port{{Published: 8084, Target: 84, Protocol: spec.TCP, Mode: spec.PortHost}}}}
	v.Sort()
	return v
}

// Plan observes and diffs.
func Plan(t *testing.T, d ingress.Dataplane, want ingress.State) []ingress.Op {
	t.Helper()
	have, err := d.Observe(context.Background(), want)
	if err != nil {
		t.Fatalf("observe: %v", err)
	}
	rops, _ := ingress.Diff(want, have, time.Now())
	ops := make([]ingress.Op, len(rops))
	for i := range rops {
		ops[i] = rops[i].(ingress.Op)
	}
	return ops
}

// Pass observes, diffs and applies once. The error is of the operations that
// failed.
func Pass(t *testing.T, d ingress.Dataplane, want ingress.State) ([]ingress.Op, error) {
	t.Helper()
	ops := Plan(t, d, want)
	var errs []error
	for _, op := range ops {
		if err := d.Apply(context.Background(), op); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", op, err))
		}
	}
	return ops, errors.Join(errs...)
}

// Run runs the conformance suite. Each subtest gets a World of its own.
func Run(t *testing.T, world func(t *testing.T) World) {
	t.Run("converge", func(t *testing.T) { converge(t, world(t)) })
	t.Run("repair", func(t *testing.T) { repair(t, world(t)) })
	t.Run("incomplete", func(t *testing.T) { incomplete(t, world(t)) })
	t.Run("change", func(t *testing.T) { change(t, world(t)) })
	t.Run("held", func(t *testing.T) { held(t, world(t)) })
	t.Run("idempotent", func(t *testing.T) { idempotent(t, world(t)) })
	t.Run("prefixes", func(t *testing.T) { prefixes(t, world(t)) })
	t.Run("absent", func(t *testing.T) { absent(t, world(t)) })
}

func mustPass(t *testing.T, d ingress.Dataplane, want ingress.State) {
	t.Helper()
	if _, err := Pass(t, d, want); err != nil {
		t.Fatal(err)
	}
	if ops := Plan(t, d, want); len(ops) != 0 {
		t.Fatalf("after one pass %d operations are left, such as %s (had %v)", len(ops), ops[0], ops[0].Have)
	}
}

// converge: one pass makes everything; a restart finds nothing to do; a View
// without ports removes everything.
func converge(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	mustPass(t, d, ingress.Desired(v))
	if ops := Plan(t, w.Dataplane(), ingress.Desired(v)); len(ops) != 0 {
		t.Fatalf("after a restart: %d operations, such as %s", len(ops), ops[0])
	}
	v.Services, v.Sandboxes = nil, nil
	mustPass(t, d, ingress.Desired(v))
	w.Empty(t)
}

// repair: whatever is deleted by hand is back after one pass, with all that
// went with it.
func repair(t *testing.T, w World) {
	want := ingress.Desired(w.View())
	d := w.Dataplane()
	mustPass(t, d, want)
	broken := map[string]bool{}
	for _, o := range want.Objects() {
		if !w.Break(o) {
			continue
		}
		broken[fmt.Sprintf("%T", o)] = true
		ops, err := Pass(t, d, want)
		if err != nil {
			t.Fatalf("%s deleted: %v", o, err)
		}
		if !slices.ContainsFunc(ops, func(op ingress.Op) bool { return op.Target.Key() == o.Key() && op.Verb == ingress.Put }) {
			t.Fatalf("%s deleted: not among the %d operations", o, len(ops))
		}
		if ops := Plan(t, d, want); len(ops) != 0 {
			t.Fatalf("%s deleted: one pass leaves %s", o, ops[0])
		}
	}
	for _, kind := range []string{"HostTable", "Localnet", "Route", "Private", "Port", "Table", "Node", "Entry", "Local"} {
		if !broken["ingress."+kind] {
			t.Errorf("no %s was broken", kind)
		}
	}
}

// incomplete: while the View is not complete, nothing goes.
func incomplete(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	mustPass(t, d, ingress.Desired(v))
	v.Services, v.Sandboxes, v.Complete = nil, nil, false
	if ops := Plan(t, d, ingress.Desired(v)); len(ops) != 0 {
		t.Errorf("%d operations, such as %s", len(ops), ops[0])
	}
}

// change: another target, mode, NAT, backends, node.
func change(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	mustPass(t, d, ingress.Desired(v))
	steps := []func(){
		func() { v.Services[0].Ports[0].Target = 8000 },
		func() { v.Services[0].Ports[0].NAT = true },
		func() { v.Services[0].Ports[0].NAT = false },
		func() { v.Services[0].Ports[0].Mode = spec.PortLocal },
		func() { v.Services[0].Ports[0].Published = 9000 },
		func() { v.Endpoints[0].State = spec.EndpointDraining },
		func() { v.Endpoints = v.Endpoints[3:] },
		func() { v.Peers[2].MTU = 1300 },
		func() { v.Peers[2].MTU = 1200 },
		func() { v.Peers[2].MTU = 0 },
		func() { v.Peers[1].Liveness = spec.PeerDead },
		func() { v.Services[0].VIPs[1].Addrs = []netip.Addr{netip.MustParseAddr("10.93.1.3")} },
		func() { v.Services[0].Ports = v.Services[0].Ports[:2] },
		func() { v.Sandboxes = nil },
		// A range of ports, changed and removed as one.
		func() {
			for i := range uint16(100) {
				v.Services[0].Ports = append(v.Services[0].Ports, spec.Port{Published: 20000 + i, Target: 1000 + i, Protocol: spec.UDP, Mode: spec.PortIngress})
			}
		},
		func() {
			for i := range v.Services[0].Ports {
				v.Services[0].Ports[i].NAT = true
			}
		},
		func() {
			for i := range v.Services[0].Ports {
				v.Services[0].Ports[i].NAT = false
				v.Services[0].Ports[i].Target++
			}
		},
		func() { v.Services[0].Ports = v.Services[0].Ports[:2] },
	}
	for i, step := range steps {
		step()
		if n := len(Plan(t, d, ingress.Desired(v))); n == 0 {
			t.Errorf("step %d changes nothing", i)
		} else if n > 40 {
			t.Errorf("step %d takes %d operations", i, n)
		}
		mustPass(t, d, ingress.Desired(v))
	}
}

// held: what another program holds is taken back and said to be held; the rest
// goes on.
func held(t *testing.T, w World) {
	want := ingress.Desired(w.View())
	d := w.Dataplane()
	release := w.Hold(8080, spec.TCP)
	defer func() { release() }()
	check := func() {
		t.Helper()
		_, err := Pass(t, d, want)
		if err == nil || !strings.Contains(err.Error(), "port 8080/tcp is held by ") {
			t.Fatalf("held: %v", err)
		}
		ops := Plan(t, d, want)
		if len(ops) != 1 || ops[0].Verb != ingress.Refuse || ops[0].Object() != "service web: port 8080/tcp is free" {
			t.Fatalf("held: left are %v", ops)
		}
	}
	check()
	release()
	mustPass(t, d, want)
}

// idempotent: each operation can be applied twice.
func idempotent(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	twice := func() {
		t.Helper()
		for _, op := range Plan(t, d, ingress.Desired(v)) {
			for i := range 2 {
				if err := d.Apply(context.Background(), op); err != nil {
					t.Fatalf("%s, time %d: %v", op, i+1, err)
				}
			}
		}
		if ops := Plan(t, d, ingress.Desired(v)); len(ops) != 0 {
			t.Fatalf("left: %s", ops[0])
		}
	}
	twice()
	v.Services, v.Sandboxes = nil, nil
	twice()
	w.Empty(t)
}

// prefixes: an agent that dies at any point is completed by the next.
func prefixes(t *testing.T, w World) {
	v := w.View()
	want := ingress.Desired(v)
	v.Services, v.Sandboxes = nil, nil
	none := ingress.Desired(v)
	n := len(Plan(t, w.Dataplane(), want))
	for i := 1; i < n; i += 3 {
		d := w.Dataplane()
		for _, op := range Plan(t, d, want)[:i] {
			if err := d.Apply(context.Background(), op); err != nil {
				t.Fatal(err)
			}
		}
		mustPass(t, w.Dataplane(), want)
		ops := Plan(t, d, none)
		for _, op := range ops[:min(i, len(ops))] {
			if err := d.Apply(context.Background(), op); err != nil {
				t.Fatal(err)
			}
		}
		mustPass(t, w.Dataplane(), none)
		w.Empty(t)
	}
}

// absent: where the overlay has not made a network yet, its objects fail, and
// nothing else does; deletions succeed.
func absent(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	v.Networks[0].Name = "other" // has another ovns
	v.Networks[0].ID = "netother4444"
	v.Services[0].Ingress = v.Networks[0].ID
	v.Services[0].VIPs[1].Network = v.Networks[0].ID
	want := ingress.Desired(v)
	if _, err := Pass(t, d, want); err == nil {
		t.Error("no error")
	}
	for _, o := range want.Objects() {
		if err := d.Apply(context.Background(), ingress.Op{Verb: ingress.Delete, Target: o}); err != nil {
			t.Errorf("delete %s: %v", o, err)
		}
	}
	w.Empty(t)
}
