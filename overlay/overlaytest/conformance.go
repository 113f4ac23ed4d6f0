package overlaytest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
)

// World is a machine that a Dataplane works on, as the suite needs it.
type World interface {
	// Dataplane makes a new Dataplane, as a restarted agent has.
	Dataplane() overlay.Dataplane
	// View is a [Sample] for the machine, whose sandboxes exist.
	View() *spec.View
	// AddSandbox and DelSandbox make and delete a task's namespace.
	AddSandbox(netns string)
	DelSandbox(netns string)
	// Break removes an object behind the Dataplane's back. It returns false
	// for what can't be broken.
	Break(o overlay.Object) bool
	// AddForeign makes a device that is not ours; DelForeign deletes it.
	AddForeign(netns, dev string)
	DelForeign(netns, dev string)
	// Empty fails the test if anything of ours is left.
	Empty(t *testing.T)
}

// Converge runs passes until one finds nothing to do, and returns the
// operations of the first. It fails the test on an error or after ten passes.
func Converge(t *testing.T, d overlay.Dataplane, want overlay.State) []overlay.Op {
	t.Helper()
	var first []overlay.Op
	for i := range 10 {
		ops, err := Pass(t, d, want)
		if err != nil {
			t.Fatalf("pass %d: %v", i+1, err)
		}
		if i == 0 {
			first = ops
		}
		if len(ops) == 0 {
			return first
		}
		if i > 0 {
			t.Logf("pass %d still did %d operations: %v", i+1, len(ops), ops[0])
		}
	}
	t.Fatal("no convergence in ten passes")
	return nil
}

// Pass observes, diffs and applies once. The error is of the operations that
// failed.
func Pass(t *testing.T, d overlay.Dataplane, want overlay.State) ([]overlay.Op, error) {
	t.Helper()
	ctx := context.Background()
	ops := Plan(t, d, want)
	var errs []string
	for _, op := range ops {
		if err := d.Apply(ctx, op); err != nil {
			errs = append(errs, fmt.Sprintf("%s: %v", op, err))
		}
	}
	if errs != nil {
		return ops, fmt.Errorf("%s", strings.Join(errs, "\n"))
	}
	return ops, nil
}

// Plan observes and diffs, and leaves out what is only told of.
func Plan(t *testing.T, d overlay.Dataplane, want overlay.State) []overlay.Op {
	t.Helper()
	have, err := d.Observe(context.Background(), want)
	if err != nil {
		t.Fatalf("observe: %v", err)
	}
	rops, _ := overlay.Diff(want, have, time.Now())
	var ops []overlay.Op
	for _, op := range rops {
		if op := op.(overlay.Op); op.Verb != overlay.Report {
			ops = append(ops, op)
		}
	}
	return ops
}

// Run runs the conformance suite. Each subtest gets a World of its own.
func Run(t *testing.T, world func(t *testing.T, v6 bool) World) {
	for _, v6 := range []bool{false, true} {
		name := map[bool]string{false: "v4", true: "dual"}[v6]
		t.Run(name+"/converge", func(t *testing.T) { converge(t, world(t, v6)) })
		t.Run(name+"/repair", func(t *testing.T) { repair(t, world(t, v6)) })
	}
	t.Run("incomplete", func(t *testing.T) { incomplete(t, world(t, false)) })
	t.Run("move", func(t *testing.T) { move(t, world(t, false)) })
	t.Run("path MTU", func(t *testing.T) { pathMTU(t, world(t, false)) })
	t.Run("path MTU, both families", func(t *testing.T) { pathMTU(t, world(t, true)) })
	t.Run("replace", func(t *testing.T) { replace(t, world(t, false)) })
	t.Run("sandbox", func(t *testing.T) { sandbox(t, world(t, false)) })
	t.Run("foreign", func(t *testing.T) { foreign(t, world(t, false)) })
	t.Run("idempotent", func(t *testing.T) { idempotent(t, world(t, false)) })
	t.Run("prefixes", func(t *testing.T) { anyPrefix(t, world(t, false)) })
}

// converge: one pass makes everything; a restart finds nothing to do; an empty
// View removes everything.
func converge(t *testing.T, w World) {
	v := w.View()
	want := overlay.Desired(v)
	d := w.Dataplane()
	if _, err := Pass(t, d, want); err != nil {
		t.Fatal(err)
	}
	if ops := Plan(t, d, want); len(ops) != 0 {
		t.Fatalf("after one pass: %d operations left, such as %s (had %v)", len(ops), ops[0], ops[0].Have)
	}
	if ops := Plan(t, w.Dataplane(), want); len(ops) != 0 {
		t.Fatalf("after a restart: %d operations, such as %s", len(ops), ops[0])
	}
	v.Networks, v.Services, v.Endpoints, v.Sandboxes = nil, nil, nil, nil
	if _, err := Pass(t, d, overlay.Desired(v)); err != nil {
		t.Fatal(err)
	}
	if ops := Plan(t, d, overlay.Desired(v)); len(ops) != 0 {
		t.Fatalf("after removal: %d operations left, such as %s", len(ops), ops[0])
	}
	w.Empty(t)
}

// repair: whatever is deleted by hand is back after one pass, with all that
// went with it.
func repair(t *testing.T, w World) {
	want := overlay.Desired(w.View())
	d := w.Dataplane()
	Converge(t, d, want)
	broken := map[string]int{}
	for _, o := range want.Objects() {
		kind := fmt.Sprintf("%T", o)
		if !w.Break(o) {
			continue
		}
		broken[kind]++
		ops, err := Pass(t, d, want)
		if err != nil {
			t.Fatalf("%s deleted: %v", o, err)
		}
		if !slices.ContainsFunc(ops, func(op overlay.Op) bool { return op.Target.Key() == o.Key() && op.Verb == overlay.Put }) {
			t.Fatalf("%s deleted: not among the %d operations", o, len(ops))
		}
		if ops := Plan(t, d, want); len(ops) != 0 {
			t.Fatalf("%s deleted: one pass leaves %s", o, ops[0])
		}
	}
	for _, kind := range []string{"Forwarding", "Members", "Namespace", "Sysctl", "Filter", "Guard", "VXLAN", "Egress", "Port", "Addr", "Neigh", "FDB", "Route", "Redirect"} {
		if broken["overlay."+kind] == 0 {
			t.Errorf("no %s was broken", kind)
		}
	}
	t.Logf("broken and repaired: %v", broken)
}

// incomplete: nothing is removed while the View is not complete.
func incomplete(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	Converge(t, d, overlay.Desired(v))
	v.Complete = false
	v.Networks, v.Services, v.Endpoints, v.Sandboxes = nil, nil, nil, nil
	if ops := Plan(t, d, overlay.Desired(v)); len(ops) != 0 {
		t.Fatalf("an incomplete view: %s", ops[0])
	}
	v.Complete, v.Peers = true, nil
	if ops := Plan(t, d, overlay.Desired(v)); len(ops) != 0 {
		t.Fatalf("a view without this node: %s", ops[0])
	}
}

// move: an endpoint that goes from node to node, or comes here, is one route
// change, and never without a route.
func move(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	Converge(t, d, overlay.Desired(v))
	e := &v.Endpoints[slices.IndexFunc(v.Endpoints, func(e spec.Endpoint) bool { return e.Task == "taskb2222222" })]
	e.Node = PeerC
	ops, err := Pass(t, d, overlay.Desired(v))
	if err != nil {
		t.Fatal(err)
	}
	if len(ops) != 1 || ops[0].Verb != overlay.Put || ops[0].Have == nil {
		t.Fatalf("moving an endpoint: want one replaced route, got %v", ops)
	}
	// The job leaves this node and appears on another with its address.
	i := slices.IndexFunc(v.Sandboxes, func(s spec.Sandbox) bool { return s.Task == TaskJob })
	job := v.Sandboxes[i]
	v.Sandboxes = slices.Delete(slices.Clone(v.Sandboxes), i, i+1)
	v.Endpoints = append(v.Endpoints, spec.Endpoint{Task: "taskjob44444", Network: NetApp, Addrs: job.Attachments[0].Addrs, Node: PeerB})
	v.Sort()
	ops = Converge(t, d, overlay.Desired(v))
	for _, op := range ops {
		if r, ok := op.Target.(overlay.Route); ok && op.Verb == overlay.Delete {
			t.Errorf("a route was deleted: %s", r)
		}
	}
	// And back.
	v = w.View()
	Converge(t, d, overlay.Desired(v))
}

// replace: what can't be changed in place is made anew, with all it carries,
// in one pass; what can, is changed in place.
func replace(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	Converge(t, d, overlay.Desired(v))
	v.Networks = slices.Clone(v.Networks)
	v.Networks[0].VNI += 8
	if _, err := Pass(t, d, overlay.Desired(v)); err != nil {
		t.Fatal(err)
	}
	if ops := Plan(t, d, overlay.Desired(v)); len(ops) != 0 {
		t.Fatalf("another VNI: one pass leaves %d operations, such as %s", len(ops), ops[0])
	}
	v.Networks[0].MTU = 1280
	ops, err := Pass(t, d, overlay.Desired(v))
	if err != nil {
		t.Fatal(err)
	}
	for _, op := range ops {
		// The MTU of the way to a node may be the smaller one only now.
		_, route := op.Target.(overlay.Route)
		if op.Replace || op.Verb != overlay.Put || !route && len(overlay.Devices(op.Target)) == 0 {
			t.Errorf("another MTU: %s", op)
		}
	}
	if ops := Plan(t, d, overlay.Desired(v)); len(ops) != 0 {
		t.Fatalf("another MTU: one pass leaves %d operations, such as %s", len(ops), ops[0])
	}
}

// pathMTU: what one node's underlay carries changes the routes to it, and only these.
func pathMTU(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	Converge(t, d, overlay.Desired(v))
	for _, mtu := range []int{1300, 1, 65535, 1400} {
		v.Peers[1].MTU = mtu
		ops, err := Pass(t, d, overlay.Desired(v))
		if err != nil {
			t.Fatal(err)
		}
		for _, op := range ops {
			if r, ok := op.Target.(overlay.Route); !ok || op.Verb != overlay.Put || r.Via != spec.RouterAddr(2) && r.Via.Is4() {
				t.Errorf("underlay of %d bytes: %s", mtu, op)
			}
		}
		if len(ops) == 0 {
			t.Errorf("underlay of %d bytes: nothing changes", mtu)
		}
		if ops := Plan(t, d, overlay.Desired(v)); len(ops) != 0 {
			t.Fatalf("underlay of %d bytes: one pass leaves %d operations, such as %s", mtu, len(ops), ops[0])
		}
	}
}

// sandbox: a task without a namespace is one failed object, and the others go
// on; it is wired once the namespace is there.
func sandbox(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	want := overlay.Desired(v)
	ns := v.Sandboxes[slices.IndexFunc(v.Sandboxes, func(s spec.Sandbox) bool { return s.Task == TaskJob })].Netns
	w.DelSandbox(ns)
	ops := Plan(t, d, want)
	failed := 0
	for _, op := range ops {
		if err := d.Apply(context.Background(), op); err != nil {
			failed++
			if !strings.HasPrefix(op.Object(), "task job: ") || !strings.Contains(err.Error(), ns) {
				t.Errorf("%s failed: %v", op.Object(), err)
			}
		}
	}
	if failed != 1 {
		t.Errorf("%d operations failed, want 1", failed)
	}
	if ops := Plan(t, d, want); len(ops) != 1 {
		t.Errorf("then %d operations: %v", len(ops), ops)
	}
	w.AddSandbox(ns)
	Converge(t, d, want)
	// A running task's namespace goes.
	w.DelSandbox(ns)
	if ops := Plan(t, d, want); len(ops) != 1 {
		t.Errorf("after the namespace went: %v", ops)
	}
	w.AddSandbox(ns)
	Converge(t, d, want)
}

// foreign: a device of another's in the way is an error that names it, and
// stays; the rest goes on.
func foreign(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	want := overlay.Desired(v)
	ns := v.Sandboxes[slices.IndexFunc(v.Sandboxes, func(s spec.Sandbox) bool { return s.Task == TaskJob })].Netns
	w.AddForeign(ns, "eth0")
	for range 2 {
		_, err := Pass(t, d, want)
		if err == nil || !strings.Contains(err.Error(), "eth0") {
			t.Fatalf("a foreign eth0: %v", err)
		}
		for _, op := range Plan(t, d, want) {
			if !strings.HasPrefix(op.Object(), "task job: ") {
				t.Errorf("not done because of a foreign device: %s", op)
			}
		}
	}
	w.DelForeign(ns, "eth0")
	Converge(t, d, want)
}

// idempotent: doing everything again changes nothing; deleting what is absent
// succeeds.
func idempotent(t *testing.T, w World) {
	v := w.View()
	d := w.Dataplane()
	want := overlay.Desired(v)
	ops := Converge(t, d, want)
	for _, op := range ops {
		if err := d.Apply(context.Background(), op); err != nil {
			t.Errorf("again: %s: %v", op, err)
		}
	}
	if ops := Plan(t, d, want); len(ops) != 0 {
		t.Fatalf("after doing everything again: %s", ops[0])
	}
	v.Networks, v.Services, v.Endpoints, v.Sandboxes = nil, nil, nil, nil
	gone := Converge(t, d, overlay.Desired(v))
	for _, op := range append(ops, gone...) {
		switch op.Target.(type) {
		case overlay.Sandbox, overlay.Underlay:
			continue
		}
		op.Verb = overlay.Delete
		if err := d.Apply(context.Background(), op); err != nil {
			t.Errorf("absent: %s: %v", op, err)
		}
	}
	w.Empty(t)
}

// anyPrefix: an agent that dies in the middle of a pass is followed by one that
// completes it.
func anyPrefix(t *testing.T, w World) {
	full := w.View()
	empty := *full
	empty.Networks, empty.Services, empty.Endpoints, empty.Sandboxes = nil, nil, nil, nil
	cuts := []float64{0.1, 0.35, 0.6, 0.85}
	for _, cut := range cuts {
		for _, v := range []*spec.View{full, &empty} {
			want := overlay.Desired(v)
			d := w.Dataplane()
			ops := Plan(t, d, want)
			for _, op := range ops[:int(cut*float64(len(ops)))] {
				if err := d.Apply(context.Background(), op); err != nil {
					t.Fatalf("%s: %v", op, err)
				}
			}
			Converge(t, w.Dataplane(), want)
		}
	}
	w.Empty(t)
}
