package state

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/internal/versionstest"
	"github.com/shoalnet/shoal/spec"
)

// TestOldestAndNewest: of a log with every kind of command that the oldest build with a
// feature level knows, as that build writes it, the oldest and this one make the same,
// each entry, and in every order of upgrade: to any entry by one and on by the other,
// from the other's snapshot.
func TestOldestAndNewest(t *testing.T) {
	replay := versionstest.Oldest(t, "../..", "replay", "testdata/replay.go")
	c := &cluster{tb: t, s: New(), now: 1_000_000, nodes: map[string]*simNode{}, strict: true, level: 1}
	everyKind(c)

	var in struct {
		Log       [][]byte
		Snapshots map[int][]byte
	}
	in.Log, in.Snapshots = c.log, map[int][]byte{}
	var states [][]byte
	var refused []bool
	s := New()
	for i, b := range c.log {
		r := applyLog(t, s, i, b)
		snap, err := s.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		states, refused = append(states, snap), append(refused, r.Err != nil)
		in.Snapshots[i+1] = snap
	}
	stdin, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd := exec.Command(replay)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(stdin), &errs
	b, err := cmd.Output()
	if err != nil {
		t.Fatalf("the oldest build: %v\n%s", err, errs.Bytes())
	}
	var out struct {
		Log, States [][]byte
		Refused     []string
		Ends        map[int][]byte
	}
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	// same compares states by what this build reads and writes of them.
	same := func(what string, n int, got, want []byte) {
		t.Helper()
		s, err := Restore(got)
		if err != nil {
			t.Fatalf("%s %d: %v\n%s", what, n, err, got)
		}
		if b, err := s.Snapshot(); err != nil || !bytes.Equal(b, want) {
			t.Fatalf("%s %d the state is another (%v):\n%s\nwant\n%s", what, n, err, b, want)
		}
	}
	end := states[len(states)-1]
	for i := range c.log {
		if (out.Refused[i] != "") != refused[i] {
			t.Errorf("entry %d, %s: this build refuses it: %t, the oldest says %q", i+1, c.log[i], refused[i], out.Refused[i])
		}
		same("after entry", i+1, out.States[i], states[i])
		same("newest, then oldest from entry", i+1, out.Ends[i+1], end)
		s, err := Restore(out.States[i])
		if err != nil {
			t.Fatal(err)
		}
		for k := i + 1; k < len(c.log); k++ {
			applyLog(t, s, k, out.Log[k])
		}
		got, err := s.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		same("oldest, then newest from entry", i+1, got, end)
	}
	t.Logf("%d entries", len(c.log))
}

func applyLog(t *testing.T, s *State, i int, b []byte) Result {
	t.Helper()
	cmd, err := Decode(b)
	if err != nil {
		t.Fatalf("entry %d, %s: %v", i+1, b, err)
	}
	return s.Apply(uint64(i+1), cmd)
}

// everyKind has every kind of command of the cluster's level in the log, taken and, where
// that can be, refused.
func everyKind(c *cluster) {
	c.Helper()
	root := func(n string) Root {
		return Root{Cert: []byte("cert" + n), Key: []byte("key" + n), Cross: []byte("cross" + n), Digest: "digest" + n, Created: c.now}
	}
	key := func(n string) []byte { return []byte(strings.Repeat(n, 16)) }
	c.must(Command{InitCluster: &InitCluster{Cluster: Cluster{ID: "clusteraaaaa", Created: c.now}, DefaultNetwork: c.id("net"), Level: c.level,
		Trust: &Trust{Roots: []Root{root("1")}, Tokens: map[string]JoinToken{spec.RoleManager: {Secret: "m"}, spec.RoleWorker: {Secret: "w"}},
			Gossip: []GossipKey{{Generation: 1, Key: key("k1"), Primary: true}}, Unlock: "u", UnlockGeneration: 1}}})
	refuse := func(cmd Command) {
		c.Helper()
		if r := c.apply(cmd); r.Err == nil {
			c.Fatalf("%s was taken", c.log[len(c.log)-1])
		}
	}
	refuse(Command{RaiseLevel: &RaiseLevel{Level: c.level}})
	ns := c.joinAll(4)
	app := c.network("app", "10.9.0.0/24")
	c.network("six", "fd00:9::/64")
	c.must(Command{CreateNetwork: &CreateNetwork{Network: spec.Network{ID: c.id("net"), Name: "inside", Internal: true, Options: map[string]string{"icc": "false"}, Labels: map[string]string{"a": "b"}}}})
	refuse(Command{CreateNetwork: &CreateNetwork{Network: spec.Network{ID: c.id("net"), Name: "app"}}})
	c.must(Command{UpdateNode: &UpdateNode{Ref: ns[1].id, SetLabels: map[string]string{"rack": "1"}}})
	web := svcSpec("web", 3, "app", "six")
	web.Task.Env = []string{"A=1"}
	web.Ports = []spec.Port{{Protocol: "tcp", Target: 80, Published: 8080, Mode: spec.PortIngress}}
	web.Constraints = []string{"node.labels.rack!=9"}
	svc := c.service(web)
	c.settle()
	refuse(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: web}})
	c.scale("web", 5)
	c.settle()
	web.Replicas, web.Task.Env = 4, []string{"A=2"}
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &web}})
	c.settle()
	refuse(Command{UpdateService: &UpdateService{Ref: "web", Version: 1, Spec: &web}})
	if r := c.run("one", "n2", spec.NetworkAttachment{Network: "app", Aliases: []string{"db"}}); r.Err != nil {
		c.Fatalf("%v", r.Err)
	}
	c.settle()
	c.must(Command{ConnectNetwork: &ConnectNetwork{Network: "inside", Target: "one"}})
	c.must(Command{ConnectNetwork: &ConnectNetwork{Network: "inside", Target: "web"}})
	c.settle()
	c.must(Command{DisconnectNetwork: &DisconnectNetwork{Network: "app", Target: "one"}})
	c.settle()
	refuse(Command{RemoveNetwork: &RemoveNetwork{Ref: "app"}})
	c.down(ns[2])
	c.settle()
	c.back(ns[2])
	c.avail(ns[1], spec.AvailabilityDrain)
	c.settle()
	// Replicas crash and are replaced; on a node that stays: see TestNodeRemovedWithHistory.
	ns[0].fate = func(spec.Task) spec.TaskState { return spec.TaskFailed }
	for range 20 {
		c.round()
	}
	ns[0].fate = nil
	c.settle()
	manager := spec.RoleManager
	c.must(Command{UpdateNode: &UpdateNode{Ref: "n2", Role: &manager}})
	c.must(Command{Certify: &Certify{Node: ns[1].id, Role: manager, Root: "digest1", End: c.now + 1000}})
	refuse(Command{Certify: &Certify{Node: ns[1].id, Role: spec.RoleWorker, Root: "digest1"}})
	c.must(Command{RotateToken: &RotateToken{Role: spec.RoleWorker, Secret: "w2", OldHash: []byte("h"), Now: c.now}})
	c.must(Command{RotateRoot: &RotateRoot{Root: root("2")}})
	c.must(Command{DropRoot: &DropRoot{Digest: "digest1"}})
	c.must(Command{SetGossipKeys: &SetGossipKeys{Was: 1, Keys: []GossipKey{{Generation: 1, Key: key("k1"), Primary: true}, {Generation: 2, Key: key("k2")}}}})
	refuse(Command{SetGossipKeys: &SetGossipKeys{Was: 7, Keys: []GossipKey{{Generation: 8, Key: key("k8"), Primary: true}}}})
	c.must(Command{RotateUnlock: &RotateUnlock{Key: "u2", Was: 1}})
	c.must(Command{StopTask: &StopTask{Ref: "one", Remove: true}})
	c.settle()
	c.down(ns[3])
	c.must(Command{RemoveNode: &RemoveNode{Ref: ns[3].id, Force: true}})
	c.settle()
	c.must(Command{RemoveService: &RemoveService{Ref: svc.ID}})
	c.settle()
	c.must(Command{RemoveNetwork: &RemoveNetwork{Ref: app.Name}})

	v := reflect.TypeFor[Command]()
	for i := range v.NumField() {
		f := v.Field(i)
		if f.Type.Kind() != reflect.Pointer || f.Tag.Get("level") > "1" {
			continue
		}
		name := jsonName(f)
		found := false
		for _, b := range c.log {
			found = found || strings.Contains(string(b), `"`+name+`":`)
		}
		if !found {
			c.Errorf("no %s is in the log", name)
		}
	}
}
