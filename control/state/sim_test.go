package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/shoalnet/shoal/spec"
	"pgregory.net/rapid"
)

// tb is what testing.T and rapid.T share.
type tb interface {
	Helper()
	Fatalf(string, ...any)
	Errorf(string, ...any)
	Logf(string, ...any)
}

// cluster drives a State as leader and nodes would: every command goes through
// Encode and Decode, and is kept.
type cluster struct {
	tb
	s     *State
	log   [][]byte
	base  []byte // what the log goes on from; nil: a new cluster
	now   int64  // by the clock of who leads
	real  int64  // ms that have passed
	ids   int
	nodes map[string]*simNode
	// check invariants after each command, and that a refusal changed nothing
	strict bool
	level  int              // that commands are stamped with
	first  uint64           // index of base
	saved  []byte           // a snapshot from some time
	shown  map[string]shown // by node, when strict
	told   map[string]Delta // by node, as its messages make it, when strict
}

// checkTold wants what a node has, who was told of some changes only, to be its
// assignment.
func (c *cluster) checkTold() {
	c.Helper()
	maps.DeleteFunc(c.told, func(id string, _ Delta) bool { return c.s.nodes[id] == nil }) // its stream ends
	for id, n := range c.s.nodes {
		was, ok := c.told[id]
		if (int(c.s.Index())+n.Number)%3 == 0 || ok && was.Index == c.s.AssignmentIndex(id) {
			continue // a message tells of several commands, or there is none
		}
		whole, err := c.s.AssignmentFor(id)
		if errors.Is(err, ErrNotFound) {
			continue // expelled
		}
		if err != nil {
			c.Fatalf("%v", err)
		}
		networks := map[string]bool{}
		for _, n := range was.Networks {
			networks[n.ID] = true
		}
		is, err := c.s.AssignmentSince(id, was.Index, networks)
		if err != nil {
			c.Fatalf("%v", err)
		}
		if is.Since != 0 {
			gone := map[string]bool{}
			for _, id := range is.Gone {
				gone[id] = true
			}
			is.Tasks = Merge(was.Tasks, is.Tasks, gone, func(t spec.Task) string { return t.ID })
			is.Services = Merge(was.Services, is.Services, gone, func(v spec.Service) string { return v.ID })
			is.Nodes = Merge(was.Nodes, is.Nodes, gone, func(n spec.Node) string { return n.ID })
		}
		want, err := json.Marshal(whole)
		if err != nil {
			c.Fatalf("%v", err)
		}
		if have, err := json.Marshal(is.Assignment); err != nil || !bytes.Equal(have, want) {
			c.Fatalf("%s was told since %d of this, %v:\n%s\nand its assignment is\n%s", id, is.Since, err, have, want)
		}
		if c.told == nil {
			c.told = map[string]Delta{}
		}
		c.told[id] = is
	}
}

// shown is what a node was last told, without what it told itself.
type shown struct {
	index uint64
	body  []byte
}

// checkShown wants AssignmentIndex to grow with each change of an assignment.
func (c *cluster) checkShown() {
	c.Helper()
	now := map[string]shown{}
	for id, n := range c.s.nodes {
		if n.expelled {
			continue
		}
		a, err := c.s.AssignmentFor(id)
		if err != nil {
			c.Fatalf("%v", err)
		}
		x := shown{index: a.Index}
		a.Index = 0
		if a.Trust != nil { // nodes are told of roots and gossip's keys only (control.TrustInfo)
			a.Trust.Tokens, a.Trust.Unlock, a.Trust.UnlockGeneration, a.Trust.Exposed = nil, "", 0, 0
		}
		for i := range a.Nodes { // see certify
			a.Nodes[i].CertEnd, a.Nodes[i].CertRoot, a.Nodes[i].Version = 0, "", 0
		}
		for i := range a.Tasks {
			a.Tasks[i].Status, a.Tasks[i].Version = spec.TaskStatus{Released: a.Tasks[i].Status.Released}, 0
		}
		if x.body, err = json.Marshal(a); err != nil {
			c.Fatalf("%v", err)
		}
		if was, ok := c.shown[id]; ok && !bytes.Equal(was.body, x.body) && was.index >= x.index {
			c.Fatalf("the assignment of %s changed, its index is still %d\n%s\n%s", id, x.index, was.body, x.body)
		}
		now[id] = x
	}
	c.shown = now
}

// simNode runs tasks: at each step it moves each of its tasks on.
type simNode struct {
	id     string
	up     bool
	tasks  map[string]spec.TaskStatus
	fate   func(spec.Task) spec.TaskState // what a started task becomes; nil: running
	frozen bool                           // takes no step
	clock  int64                          // how far it is ahead of the first leader's, ms
}

func newCluster(t tb, pools ...string) *cluster { return newClusterOf(t, 24, pools...) }

func newClusterOf(t tb, bits int, pools ...string) *cluster {
	c := &cluster{tb: t, s: New(), now: firstClock, nodes: map[string]*simNode{}, strict: true, level: Level}
	var ps []netip.Prefix
	for _, p := range pools {
		ps = append(ps, netip.MustParsePrefix(p))
	}
	c.must(Command{InitCluster: &InitCluster{Cluster: Cluster{ID: "clusteraaaaa", Pools: ps, SubnetSize: bits, Created: c.now}, DefaultNetwork: c.id("net")}})
	return c
}

func (c *cluster) id(kind string) string {
	c.ids++
	return fmt.Sprintf("%s%09d", kind[:3], c.ids)
}

func (c *cluster) apply(cmd Command) Result {
	c.Helper()
	if u := cmd.UpdateService; u != nil && u.Now == 0 && c.level >= 2 {
		u.Now = c.now
	}
	b, err := Encode(cmd.Stamped(c.level))
	if err != nil {
		c.Fatalf("encode: %v", err)
	}
	cmd, err = Decode(b)
	if err != nil {
		c.Fatalf("decode: %v", err)
	}
	var before []byte
	if c.strict {
		before = c.snapshot()
	}
	c.log = append(c.log, b)
	r := c.s.Apply(c.first+uint64(len(c.log)), cmd)
	if c.strict {
		if r.Err != nil {
			c.s.index--
			if after := c.snapshot(); !bytes.Equal(before, after) {
				c.Fatalf("%s was refused (%v) and changed\n%s\nto\n%s", b, r.Err, before, after)
			}
			c.s.index++
		}
		checkInvariants(c, c.s)
		c.checkShown()
		c.checkTold()
	}
	return r
}

func (c *cluster) snapshot() []byte {
	c.Helper()
	b, err := c.s.Snapshot()
	if err != nil {
		c.Fatalf("snapshot: %v", err)
	}
	return b
}

func (c *cluster) must(cmd Command) Result {
	c.Helper()
	r := c.apply(cmd)
	if r.Err != nil {
		c.Fatalf("%s: %v", cmd.Kind(), r.Err)
	}
	return r
}

func (c *cluster) join(name string) *simNode {
	c.Helper()
	n := &simNode{id: c.id("node"), up: true, tasks: map[string]spec.TaskStatus{}}
	role := spec.RoleWorker
	if len(c.nodes) == 0 {
		role = spec.RoleManager
	}
	x := simSpec(n.id, name, role, len(c.nodes)+1)
	x.Level = c.level
	c.must(Command{UpsertNode: &UpsertNode{Node: x}})
	c.nodes[n.id] = n
	return n
}

func simSpec(id, name, role string, k int) spec.Node {
	return spec.Node{ID: id, Name: name, Role: role, Addr: netip.AddrFrom4([4]byte{192, 168, byte(k >> 8), byte(k)}), ControlPort: 7373, GossipPort: 7946, Level: Level}
}

func (c *cluster) joinAll(n int) []*simNode {
	c.Helper()
	var out []*simNode
	for i := range n {
		out = append(out, c.join(fmt.Sprintf("n%d", i+1)))
	}
	return out
}

func svcSpec(name string, replicas int, nets ...string) spec.ServiceSpec {
	sp := spec.ServiceSpec{Name: name, Replicas: replicas, Task: spec.TaskSpec{Command: []string{"serve"}}}
	for _, n := range nets {
		sp.Networks = append(sp.Networks, spec.NetworkAttachment{Network: n})
	}
	return sp
}

func (c *cluster) service(sp spec.ServiceSpec) spec.Service {
	c.Helper()
	return *c.must(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: sp, Created: c.now}}).Service
}

func (c *cluster) network(name, subnet string) spec.Network {
	c.Helper()
	n := spec.Network{ID: c.id("net"), Name: name, Created: c.now}
	if subnet != "" {
		n.Subnets = []netip.Prefix{netip.MustParsePrefix(subnet)}
	}
	return *c.must(Command{CreateNetwork: &CreateNetwork{Network: n}}).Network
}

func (c *cluster) scale(ref string, n int) {
	c.Helper()
	c.must(Command{UpdateService: &UpdateService{Ref: ref, Replicas: &n}})
}

// plan plans and applies once; nothing came between, so that nothing may be
// skipped.
func (c *cluster) plan() (ops []ScheduleOp, next int64) {
	c.Helper()
	ops, next = Plan(c.s, c.now)
	again, next2 := Plan(c.s, c.now)
	if !reflect.DeepEqual(ops, again) || next != next2 {
		c.Fatalf("Plan is not deterministic:\n%v\n%v", ops, again)
	}
	if next != 0 && next < c.now {
		c.Fatalf("next %d is in the past of %d", next, c.now)
	}
	if len(ops) > 0 {
		r := c.must(Command{Schedule: &Schedule{Now: c.now, Ops: ops}})
		if r.Skipped > 0 || r.Applied != len(ops) {
			c.Fatalf("%d of %v were skipped", r.Skipped, ops)
		}
	}
	return ops, next
}

// step moves every task of a node one state on, and reports.
func (c *cluster) step(n *simNode) bool {
	c.Helper()
	if !n.up || n.frozen {
		return false
	}
	a, err := c.s.AssignmentFor(n.id)
	if err != nil {
		return false
	}
	rep := map[string]spec.TaskStatus{}
	known := map[string]bool{}
	for _, t := range a.Tasks {
		known[t.ID] = true
		st, have := n.tasks[t.ID]
		was := st
		switch {
		case t.Run > st.Run && (!have || st.State.Ended()):
			st = spec.TaskStatus{Run: t.Run, State: spec.TaskPreparing}
		case t.Run > st.Run && st.State < spec.TaskStopping:
			st.State = spec.TaskStopping
		case st.Released || (!have && t.Status.Released):
			continue
		case st.State.Ended():
			st.Released = true
		case t.Desired != spec.DesiredRunning && st.State < spec.TaskStopping:
			st.State = spec.TaskStopping
		case st.State == spec.TaskStopping:
			st.State = spec.TaskShutdown
		case st.State < spec.TaskPreparing:
			st.State = spec.TaskPreparing
		case st.State == spec.TaskPreparing:
			st.State = spec.TaskStarting
		default:
			to := spec.TaskRunning
			if n.fate != nil {
				to = n.fate(t)
			}
			st.State = to
		}
		for _, a := range t.Attachments {
			st.Wired = max(st.Wired, a.Leaving, a.Joined)
		}
		if st != was {
			st.At = c.real + n.clock
			n.tasks[t.ID], rep[t.ID] = st, st
		}
	}
	maps.DeleteFunc(n.tasks, func(id string, _ spec.TaskStatus) bool { return !known[id] })
	if len(rep) == 0 {
		return false
	}
	c.must(Command{ReportTasks: &ReportTasks{Node: n.id, Tasks: rep, Now: c.now}})
	return true
}

// reportAll repeats everything, as after a new stream.
func (c *cluster) reportAll(n *simNode) {
	c.Helper()
	c.must(Command{ReportTasks: &ReportTasks{Node: n.id, Tasks: n.tasks, Now: c.now}})
}

func (c *cluster) sorted() []*simNode {
	var out []*simNode
	for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
		out = append(out, c.nodes[id])
	}
	return out
}

// round is one plan and one step of all nodes; it tells whether anything
// happened or will.
func (c *cluster) round() bool {
	c.Helper()
	ops, next := c.plan()
	busy := len(ops) > 0
	for _, n := range c.sorted() {
		busy = c.step(n) || busy
	}
	if busy {
		c.pass(20)
	} else if next != 0 {
		c.pass(max(next-c.now, 1))
		busy = true
	}
	return busy
}

// pass lets time pass.
func (c *cluster) pass(ms int64) { c.now, c.real = c.now+ms, c.real+ms }

// wrongClocks are how far clocks are off, ms.
var wrongClocks = []int64{-24 * 3600_000, -3600_000, -60_000, -1000, 0, 0, 1000, 60_000, 3600_000, 24 * 3600_000}

// otherLeader has another manager lead from now on, whose clock is off.
func (c *cluster) otherLeader(off int64) { c.now = firstClock + c.real + off }

// firstClock is what the first leader's clock says at the start, ms.
const firstClock = 100 * 24 * 3600_000

// patience is how long a cluster may take to come to rest, ms that pass: more than all
// rules of its services, monitors, delays and pauses one after the other, ask for, and
// less than an hour, by which clocks are off.
const patience = 30 * 60_000

// clocks has another manager lead, or a node's clock be set, either of which may be off.
func (c *cluster) clocks(t *rapid.T) {
	off := rapid.SampledFrom(wrongClocks).Draw(t, "off")
	if ns := c.sorted(); len(ns) > 0 && rapid.Bool().Draw(t, "node's") {
		rapid.SampledFrom(ns).Draw(t, "whose").clock = off
	} else {
		c.otherLeader(off)
	}
}

// save keeps a snapshot, for anew.
func (c *cluster) save(*rapid.T) { c.saved = c.snapshot() }

// anew loses all managers but one, or all of them: the cluster goes on from what that one
// has, or from a snapshot that may be old, on a node that may be new.
func (c *cluster) anew(t *rapid.T) {
	c.Helper()
	b := c.snapshot()
	if c.saved != nil && rapid.Bool().Draw(t, "old") {
		b = c.saved
	}
	s, err := Restore(b)
	if err != nil {
		c.Fatalf("restore: %v\n%s", err, b)
	}
	self := spec.Node{}
	var managers []spec.Node
	for _, n := range s.Nodes() {
		if x := s.nodes[n.ID]; n.Role == spec.RoleManager && !x.expelled {
			managers = append(managers, n)
			if c.nodes[n.ID] != nil {
				self = n
			}
		}
	}
	fresh := self.ID == "" || rapid.Bool().Draw(t, "new machine")
	if fresh {
		name := fmt.Sprintf("r%d", c.ids)
		if len(managers) > 0 && rapid.Bool().Draw(t, "same name") {
			name = rapid.SampledFrom(managers).Draw(t, "name").Name
		}
		self = simSpec(c.id("node"), name, spec.RoleManager, 99)
	}
	was, index := slices.Clone(s.Services()), c.s.Index()
	c.pass(1000) // generations are told apart by seconds
	if _, err := s.Recover(self, generationEpoch.Add(time.Duration(c.real)*time.Millisecond+10*365*24*time.Hour), 0); errors.Is(err, ErrExists) && fresh {
		return // another has its name by now
	} else if err != nil {
		c.Fatalf("recover by %s: %v", self.Name, err)
	}
	if s.Index() <= index {
		c.Fatalf("the cluster made anew is at index %d, and was at %d", s.Index(), index)
	}
	for i, v := range s.Services() {
		if i >= len(was) || !reflect.DeepEqual(v.Spec, was[i].Spec) {
			c.Fatalf("service %s is %+v, and was %+v", v.ID, v.Spec, was)
		}
	}
	c.s = s
	c.base, c.first, c.log, c.told = c.snapshot(), s.Index(), nil, nil // each node's stream begins anew
	checkInvariants(c, s)
	if fresh {
		c.nodes[self.ID] = &simNode{id: self.ID, up: true, tasks: map[string]spec.TaskStatus{}}
	}
	for _, n := range c.sorted() {
		if x := s.nodes[n.id]; x == nil || x.expelled {
			delete(c.nodes, n.id) // told so, it leaves
			continue
		}
		if c.status(n, spec.NodeReady); !n.up {
			c.status(n, spec.NodeDown)
		}
		c.reportAll(n)
	}
	for _, n := range s.Nodes() {
		if c.nodes[n.ID] == nil { // it was removed after that snapshot: nobody hears of it
			c.must(Command{SetNodeStatus: &SetNodeStatus{Nodes: []NodeStatus{{ID: n.ID, Status: spec.NodeDown}}}})
		}
	}
}

// settle runs rounds until nothing is left to do.
func (c *cluster) settle() {
	c.Helper()
	begun := c.real
	for range 3000 {
		if !c.round() {
			if took := c.real - begun; took > patience {
				c.Fatalf("at rest after %s", time.Duration(took)*time.Millisecond)
			}
			return
		}
	}
	ops, _ := Plan(c.s, c.now)
	c.Fatalf("no rest after 3000 rounds; next: %v\n%s", ops, c.dump())
}

func (c *cluster) status(n *simNode, st string) {
	c.Helper()
	c.must(Command{SetNodeStatus: &SetNodeStatus{Nodes: []NodeStatus{{ID: n.id, Status: st}}}})
}

func (c *cluster) down(n *simNode) { c.Helper(); n.up = false; c.status(n, spec.NodeDown) }
func (c *cluster) back(n *simNode) { c.Helper(); n.up = true; c.status(n, spec.NodeReady) }
func (c *cluster) avail(n *simNode, a string) {
	c.Helper()
	c.must(Command{UpdateNode: &UpdateNode{Ref: n.id, Availability: &a}})
}

// live lists a service's tasks that are desired to run and run, by slot.
func (c *cluster) live(svc string) []spec.Task {
	var out []spec.Task
	for _, t := range c.s.Tasks(TaskFilter{Service: svc}) {
		if t.Desired == spec.DesiredRunning && t.Status.State == spec.TaskRunning {
			out = append(out, t)
		}
	}
	return out
}

// spread counts a service's live tasks by node name.
func (c *cluster) spread(svc string) map[string]int {
	out := map[string]int{}
	for _, t := range c.live(svc) {
		out[c.s.nodes[t.Node].Name]++
	}
	return out
}

func (c *cluster) dump() string {
	out := ""
	for _, t := range c.s.Tasks(TaskFilter{All: true}) {
		out += fmt.Sprintf("%s slot %d on %s: %s desired %s released %v attempt %d %q\n", t.Name, t.Slot, t.Node, t.Status.State, t.Desired, t.Status.Released, t.Attempt, t.Status.Message)
	}
	return out
}

// checkInvariants recomputes everything that the state keeps twice, and what
// must never be.
func checkInvariants(t tb, s *State) {
	t.Helper()
	owner := map[string]string{} // network/address → holder
	count := map[string]int{}
	give := func(network string, a netip.Addr, holder string) {
		n := s.networks[network]
		if n == nil {
			t.Fatalf("%s holds %s on a network that does not exist", holder, a)
		}
		if !n.Contains(a) || n.IsGateway(a) {
			t.Fatalf("%s holds %s of network %s %v with gateway %v", holder, a, n.Name, n.Subnets, n.Gateways)
		}
		k := network + "/" + a.String()
		if o, ok := owner[k]; ok {
			t.Fatalf("%s is held by %s and %s", k, o, holder)
		}
		owner[k] = holder
		count[network]++
		for _, sp := range n.spaces {
			if sp.Subnet().Contains(a) {
				if h, _ := sp.Holder(a); h != holder {
					t.Fatalf("%s is held by %q, not by %s", k, h, holder)
				}
			}
		}
	}
	wired := func(as []spec.NetworkAttachment) bool { return s.networks[as[0].Network].Wired() }
	published, ports := map[string]*service{}, []spec.Port{}
	names, removed, svcNames := map[string]string{}, map[string]*service{}, map[string]string{}
	for id, v := range s.services {
		for _, a := range v.VIPs {
			for _, ip := range a.Addrs {
				give(a.Network, ip, v.holder())
			}
		}
		if v.removed {
			removed[id] = v
			if len(v.tasks) == 0 {
				t.Fatalf("removed service %s has no task and is still there", id)
			}
		} else {
			svcNames[v.Spec.Name] = id
			if v.Ingress != "" {
				published[id] = v
				if n := s.networks[v.Ingress]; n == nil || n.Internal || !v.On(v.Ingress) {
					t.Fatalf("service %s: its ports lead to network %s", v.Spec.Name, v.Ingress)
				}
			}
			for i, p := range v.Ports {
				if p.Published == 0 || (v.Spec.Ports[i].Published != 0 && p != v.Spec.Ports[i]) {
					t.Fatalf("service %s has ports %v, asked for %v", v.Spec.Name, v.Ports, v.Spec.Ports)
				}
				for _, q := range ports {
					if p.Clashes(q) && (p.Mode != spec.PortHost || q.Mode != spec.PortHost) {
						t.Fatalf("port %v is published twice", p)
					}
				}
				ports = append(ports, p)
			}
			if vip := v.Spec.EndpointMode == spec.EndpointModeVIP; vip != (len(v.VIPs) > 0) && wired(v.Spec.Networks) || (vip && wired(v.Spec.Networks) && len(v.VIPs) != len(v.Spec.Networks)) {
				t.Fatalf("service %s mode %s has VIPs %v", v.Spec.Name, v.Spec.EndpointMode, v.VIPs)
			}
		}
		var want []*task
		for _, x := range s.tasks {
			if x.Service == id {
				want = append(want, x)
			}
		}
		slices.SortFunc(want, func(a, b *task) int {
			if a.Slot != b.Slot {
				return a.Slot - b.Slot
			}
			return int(a.seq) - int(b.seq)
		})
		if !slices.Equal(want, v.tasks) {
			t.Fatalf("service %s: index of tasks is wrong", id)
		}
		bySlot := map[int]int{}
		for _, x := range want {
			if x.Status.State.Ended() && !x.holds() {
				if bySlot[x.Slot]++; bySlot[x.Slot] > history {
					t.Fatalf("service %s slot %d: more than %d ended tasks are kept", id, x.Slot, history)
				}
			}
		}
	}
	for id, x := range s.tasks {
		if x.ID != id || x.seq > s.seq {
			t.Fatalf("task %s is filed under %s", x.ID, id)
		}
		if x.holds() {
			if s.nodes[x.Node] == nil {
				t.Fatalf("task %s is held by a node that does not exist", id)
			}
			if len(x.Attachments) == 0 && x.Service != "" {
				t.Fatalf("task %s has a node and no network", id)
			}
			for _, a := range x.Attachments {
				if n := s.networks[a.Network]; n == nil || n.Wired() != (a.Iface != "") {
					t.Fatalf("task %s has interface %q on %s", id, a.Iface, a.Network)
				}
				for _, b := range x.Attachments {
					if a.Network != b.Network && a.Iface == b.Iface {
						t.Fatalf("task %s has two interfaces %q", id, a.Iface)
					}
				}
				if len(a.Addrs) == 0 && a.Iface != "" {
					t.Fatalf("task %s has no address on %s", id, a.Network)
				}
				for _, ip := range a.Addrs {
					give(a.Network, ip, x.holder())
				}
			}
		} else if x.Desired == spec.DesiredRemove {
			t.Fatalf("task %s is released, is to be removed and still there", id)
		}
		if x.Service != "" || x.Desired != spec.DesiredRemove {
			if names[x.Name] != "" {
				t.Fatalf("task name %s is there twice", x.Name)
			}
			names[x.Name] = id
		}
		if x.Service != "" && s.services[x.Service] == nil {
			t.Fatalf("task %s has lost its service", id)
		}
	}
	netNames, vnis, nodeNames, numbers := map[string]string{}, map[uint32]string{}, map[string][]string{}, map[int]string{}
	var subnets []netip.Prefix
	for id, n := range s.networks {
		netNames[n.Name] = id
		if n.Wired() {
			vnis[n.VNI] = id
		}
		for _, p := range n.Subnets {
			if slices.ContainsFunc(subnets, p.Overlaps) {
				t.Fatalf("subnet %s overlaps another", p)
			}
			subnets = append(subnets, p)
		}
		in := 0
		for _, sp := range n.spaces {
			in += sp.InUse()
		}
		if in != count[id] {
			t.Fatalf("network %s has %d addresses in use, %d are held", n.Name, in, count[id])
		}
	}
	for id, n := range s.nodes {
		nodeNames[n.Name] = append(nodeNames[n.Name], id)
		slices.Sort(nodeNames[n.Name])
		if numbers[n.Number] != "" {
			t.Fatalf("node number %d is there twice", n.Number)
		}
		numbers[n.Number] = id
		want := map[string]*task{}
		for _, x := range s.tasks {
			if x.Node == id {
				want[x.ID] = x
			}
		}
		if !maps.Equal(want, n.tasks) {
			t.Fatalf("node %s: index of tasks is wrong", id)
		}
	}
	for what, ok := range map[string]bool{
		"task names": maps.Equal(names, s.taskNames), "folded task names": maps.Equal(folds(names), s.taskFolds), "removed": maps.Equal(removed, s.removed), "service names": maps.Equal(svcNames, s.svcNames),
		"network names": maps.Equal(netNames, s.netNames), "VNIs": maps.Equal(vnis, s.vnis), "numbers": maps.Equal(numbers, s.numbers),
		"published ports": maps.Equal(published, s.published), "node names": maps.EqualFunc(nodeNames, s.nodeNames, slices.Equal[[]string]),
	} {
		if !ok {
			t.Fatalf("index of %s is wrong", what)
		}
	}
}

// checkReplay replays the log, with a restore from a snapshot at each of cuts, and
// wants the same bytes and the same plan.
func (c *cluster) checkReplay(cuts ...int) {
	c.Helper()
	want := c.snapshot()
	for _, cut := range append([]int{-1}, cuts...) {
		s := New()
		if c.base != nil {
			var err error
			if s, err = Restore(c.base); err != nil {
				c.Fatalf("restore: %v\n%s", err, c.base)
			}
		}
		for i, b := range c.log {
			if i == cut {
				snap, err := s.Snapshot()
				if err != nil {
					c.Fatalf("%v", err)
				}
				if s, err = Restore(snap); err != nil {
					c.Fatalf("restore at %d: %v\n%s", i, err, snap)
				}
				checkInvariants(c, s)
			}
			cmd, err := Decode(b)
			if err != nil {
				c.Fatalf("%v", err)
			}
			s.Apply(c.first+uint64(i+1), cmd)
		}
		got, err := s.Snapshot()
		if err != nil || !bytes.Equal(got, want) {
			c.Fatalf("replay with restore at %d differs (%v):\n%s\nwant\n%s", cut, err, got, want)
		}
		ops, next := Plan(s, c.now)
		ops2, next2 := Plan(c.s, c.now)
		if !reflect.DeepEqual(ops, ops2) || next != next2 {
			c.Fatalf("replay with restore at %d plans otherwise", cut)
		}
	}
}

func folds(names map[string]string) map[string]int {
	out := map[string]int{}
	for n := range names {
		out[strings.ToLower(n)]++
	}
	return out
}
