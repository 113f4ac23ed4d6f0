package state

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/shoalnet/shoal/internal/filled"
	"github.com/shoalnet/shoal/spec"
)

// TestCommandRoundTrip: every field of every kind of command comes out of the log as
// it went in.
func TestCommandRoundTrip(t *testing.T) {
	all := filled.Value[Command]()
	v := reflect.ValueOf(all)
	kinds := 0
	for i := range v.NumField() {
		if v.Field(i).Kind() != reflect.Pointer {
			continue
		}
		kinds++
		c := Command{Rules: Level}
		reflect.ValueOf(&c).Elem().Field(i).Set(v.Field(i))
		if c.RaiseLevel != nil {
			c.RaiseLevel.Level = Level
		}
		if c.InitCluster != nil {
			c.InitCluster.Level = Level
		}
		b, err := Encode(c)
		if err != nil {
			t.Errorf("%s: %v", c.Kind(), err)
			continue
		}
		got, err := Decode(b)
		if err != nil {
			t.Errorf("%s: %v", c.Kind(), err)
		} else if d := filled.Differ(c, got); d != "" {
			t.Errorf("%s%s", c.Kind(), d)
		}
		// Nothing of a command that nobody has filled is in the log: else a level's
		// field would stop older managers though nobody uses it.
		empty := Command{}
		reflect.ValueOf(&empty).Elem().Field(i).Set(reflect.New(v.Field(i).Type().Elem()))
		if level, what := empty.Need(); level > 0 && what != jsonName(v.Type().Field(i)) {
			t.Errorf("an empty %s needs level %d for %s", empty.Kind(), level, what)
		}
	}
	if kinds < 20 {
		t.Errorf("only %d kinds", kinds)
	}
}

func jsonName(f reflect.StructField) string {
	name := f.Tag.Get("json")
	for i, c := range name {
		if c == ',' {
			return name[:i]
		}
	}
	return name
}

// TestSnapshotRoundTrip: every field of a snapshot is read as it was written, and what
// a state holds of networks, services, tasks and nodes is all in it.
func TestSnapshotRoundTrip(t *testing.T) {
	want := filled.Value[snapshot]()
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got snapshot
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if d := filled.Differ(want, got); d != "" {
		t.Error(d)
	}

	// Whatever a state keeps in these is spec's, and all of it comes back.
	s := New()
	tr := filled.Value[Trust]()
	tr.Roots = tr.Roots[:2]
	tr.Tokens = map[string]JoinToken{spec.RoleManager: filled.Value[JoinToken](), spec.RoleWorker: filled.Value[JoinToken]()}
	cl := filled.Value[Cluster]()
	s.cluster, s.trust, s.level, s.index, s.seq, s.lastVNI, s.lastNumber, s.lastSubnet = &cl, &tr, Level, 77, 99, 5000, 7, filled.Value[snapshot]().LastSubnet
	net := filled.Value[spec.Network]()
	net.Driver, net.VNI, net.MTU, net.Name, net.Options = spec.DriverOverlay, spec.MinVNI+1, 1400, "app", map[string]string{"icc": "false"}
	net.Subnets, net.IPRanges = net.Subnets[:1], nil
	net.Gateways = net.Gateways[:1]
	net.Gateways[0] = net.Subnets[0].Addr().Next()
	w, err := newNetwork(net)
	if err != nil {
		t.Fatal(err)
	}
	s.addNetwork(w)
	s.defaultNet = net.ID
	nd := filled.Value[spec.Node]()
	nd.Number, nd.Name = 3, "node1"
	s.addNode(&node{Node: nd, tasks: map[string]*task{}, expelled: true})
	tk := filled.Value[spec.Task]()
	tk.Service, tk.Node, tk.Name, tk.Status.Released = "", nd.ID, "one", true
	s.put(&task{Task: tk, seq: 1, rev: 2, started: 3, ended: 4, was: spec.TaskRunning})
	b, err = s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	r, err := Restore(b)
	if err != nil {
		t.Fatal(err)
	}
	for what, d := range map[string]string{
		"cluster": filled.Differ(*s.cluster, *r.cluster), "trust": filled.Differ(*s.trust, *r.trust), "network": filled.Differ(net, r.networks[net.ID].Network),
		"node": filled.Differ(nd, r.nodes[nd.ID].Node), "task": filled.Differ(tk, r.tasks[tk.ID].Task),
	} {
		if d != "" {
			t.Errorf("%s%s", what, d)
		}
	}
	if rt := r.tasks[tk.ID]; rt.seq != 1 || rt.rev != 2 || rt.started != 3 || rt.ended != 4 || rt.was != spec.TaskRunning || !r.nodes[nd.ID].expelled || r.level != Level || r.seq != 99 || r.lastVNI != 5000 || r.lastNumber != 7 || r.lastSubnet != s.lastSubnet || r.index != 77 {
		t.Errorf("%+v\n%+v", rt, r)
	}
}

// TestCloneRoundTrip: a deep copy forgets nothing.
func TestCloneRoundTrip(t *testing.T) {
	tr := filled.Value[Trust]()
	if d := filled.Differ(&tr, tr.clone()); d != "" {
		t.Errorf("trust%s", d)
	}
	n, v, x, w := filled.Value[spec.Node](), filled.Value[spec.Service](), filled.Value[spec.Task](), filled.Value[spec.Network]()
	for what, d := range map[string]string{"node": filled.Differ(n, n.Clone()), "service": filled.Differ(v, v.Clone()), "task": filled.Differ(x, x.Clone()), "network": filled.Differ(w, w.Clone())} {
		if d != "" {
			t.Errorf("%s%s", what, d)
		}
	}
}
