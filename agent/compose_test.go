package agent

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/shoalnet/shoal/gossip"
	"github.com/shoalnet/shoal/spec"
)

func ep(task, net, node string, s spec.EndpointState) spec.Endpoint {
	return spec.Endpoint{Task: task, TaskName: task, Network: net, Node: node, State: s, Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.9")}}
}

func sources() inputs {
	return inputs{
		self: "n1", instance: "shoal", adopted: true,
		assigned: &assignment{
			Index:    1,
			Nodes:    []spec.Node{{ID: "n1"}, {ID: "n2"}, {ID: "n3"}},
			Networks: []spec.Network{{ID: "app", Name: "app"}, {ID: "db", Name: "db"}},
			Services: []spec.Service{
				{ID: "s1", Spec: spec.ServiceSpec{Name: "web", Networks: []spec.NetworkAttachment{{Network: "app"}}}},
				{ID: "s2", Spec: spec.ServiceSpec{Name: "pg", Networks: []spec.NetworkAttachment{{Network: "db"}}}},
			},
			Tasks: []spec.Task{{ID: "t1", Node: "n1", Desired: spec.DesiredRunning, Attachments: []spec.Attachment{{Network: "app"}}}},
		},
		gossip: &gossip.Snapshot{Synced: true,
			Members:   []gossip.Member{{Peer: spec.Peer{ID: "n1"}}, {Peer: spec.Peer{ID: "n2"}, Epoch: 7}, {Peer: spec.Peer{ID: "invented"}}},
			Endpoints: []spec.Endpoint{ep("t1", "app", "n1", spec.EndpointActive), ep("t2", "app", "n2", spec.EndpointDraining), ep("t3", "db", "n2", spec.EndpointActive)}},
	}
}

func TestComposeKeepsToTheNodesNetworks(t *testing.T) {
	v := compose(sources())
	if !v.Complete || len(v.Networks) != 1 || v.Networks[0].ID != "app" || len(v.Services) != 1 || v.Services[0].ID != "s1" || len(v.Endpoints) != 2 {
		t.Fatalf("view = %+v", v)
	}
	// Who is a node, the managers say; whether it lives, gossip.
	if len(v.Peers) != 3 || v.Peers[1].ID != "n2" || v.Peers[1].Liveness != spec.PeerAlive || v.Peers[2].ID != "n3" || v.Peers[2].Liveness != spec.PeerDead {
		t.Errorf("peers = %+v", v.Peers)
	}
}

func TestComposeNetworkStaysUntilTheLastSandboxIsGone(t *testing.T) {
	in := sources()
	in.assigned.Tasks[0].Desired = spec.DesiredShutdown
	in.sandboxes = []spec.Sandbox{{Task: "t1", Attachments: []spec.Attachment{{Network: "app"}}}}
	if v := compose(in); len(v.Networks) != 1 || len(v.Sandboxes) != 1 {
		t.Fatalf("with its sandbox: %+v", v)
	}
	in.sandboxes = nil
	if v := compose(in); len(v.Networks) != 0 || len(v.Endpoints) != 0 {
		t.Fatalf("without it: %+v", v)
	}
}

func TestComposeNetworkOfAPublishedPortIsOnEveryNode(t *testing.T) {
	for mode, want := range map[string]int{spec.PortIngress: 2, spec.PortLocal: 2, spec.PortHost: 1} {
		in := sources()
		s := &in.assigned.Services[1]
		s.Ingress, s.Ports = "db", []spec.Port{{Published: 5432, Target: 5432, Protocol: spec.TCP, Mode: mode}}
		if v := compose(in); len(v.Networks) != want || len(v.Services) != want || len(v.Endpoints) != want+1 {
			t.Errorf("%s: view = %+v", mode, v)
		}
		in.assigned.Networks[1].Node = "n2"
		if v := compose(in); len(v.Networks) != 1 {
			t.Errorf("%s: another node's bridge is here: %+v", mode, v.Networks)
		}
	}
}

func TestComposeIsIncompleteUntilEverySourceReported(t *testing.T) {
	for name, change := range map[string]func(*inputs){
		"no assignment":     func(in *inputs) { in.assigned = nil },
		"not assigned yet":  func(in *inputs) { in.assigned = &assignment{Trust: in.assigned.Trust} },
		"no gossip":         func(in *inputs) { in.gossip = nil },
		"gossip not synced": func(in *inputs) { s := *in.gossip; s.Synced = false; in.gossip = &s },
		"not adopted":       func(in *inputs) { in.adopted = false },
		"a node not met": func(in *inputs) {
			in.first = true
			in.assigned.Nodes = []spec.Node{{ID: "n1", Status: spec.NodeReady}, {ID: "n2", Status: spec.NodeReady}, {ID: "n3", Status: spec.NodeReady}}
		},
		"a node that has yet to say what it runs": func(in *inputs) {
			in.first = true
			in.assigned.Nodes = []spec.Node{{ID: "n1", Status: spec.NodeReady}, {ID: "n2", Status: spec.NodeReady}}
			s := *in.gossip
			s.Members = []gossip.Member{s.Members[0], {Peer: s.Members[1].Peer}}
			in.gossip = &s
		},
	} {
		in := sources()
		change(&in)
		if v := compose(in); v.Complete {
			t.Errorf("%s: complete", name)
		}
	}
}

// Who is down, or is met as dead, is not waited for, nor anybody once there was time.
func TestComposeWaitsForReadyNodesAtFirst(t *testing.T) {
	for name, change := range map[string]func(*inputs){
		"down": func(in *inputs) { in.assigned.Nodes[2].Status = spec.NodeDown },
		"met as dead": func(in *inputs) {
			s := *in.gossip
			s.Members = append(s.Members[:2:2], gossip.Member{Peer: spec.Peer{ID: "n3", Liveness: spec.PeerDead}})
			in.gossip = &s
		},
		"later": func(in *inputs) { in.first = false },
	} {
		in := sources()
		in.first = true
		in.assigned.Nodes = []spec.Node{{ID: "n1", Status: spec.NodeReady}, {ID: "n2", Status: spec.NodeReady}, {ID: "n3", Status: spec.NodeReady}}
		change(&in)
		if v := compose(in); !v.Complete {
			t.Errorf("%s: not complete", name)
		}
	}
}

// TestComposeAgentsOfAllNodes: what is to be kept from tasks isn't only what
// gossip knows, which may reach no other node.
func TestComposeAgentsOfAllNodes(t *testing.T) {
	in := sources()
	in.assigned.Nodes = []spec.Node{
		{ID: "n1", Addr: netip.MustParseAddr("192.0.2.1"), ControlPort: 2377, GossipPort: 7946},
		{ID: "n3", Addr: netip.MustParseAddr("192.0.2.3"), ControlPort: 2378},
		{ID: "n4", ControlPort: 2377},
	}
	if v := compose(in); fmt.Sprint(v.Agents) != "[192.0.2.1:2377 192.0.2.1:7946 192.0.2.3:2378]" {
		t.Errorf("agents %v", v.Agents)
	}
}

func TestComposeWaitsForTheNetworkOfASandbox(t *testing.T) {
	in := sources()
	in.sandboxes = []spec.Sandbox{{Task: "t9", Attachments: []spec.Attachment{{Network: "new"}}}}
	if v := compose(in); len(v.Sandboxes) != 0 {
		t.Fatalf("wires to an unknown network: %+v", v.Sandboxes)
	}
}

func TestHostname(t *testing.T) {
	for in, want := range map[string]string{
		"c1":                 "c1",
		"web.1.abcdefghijkl": "web-1-abcdefghijkl",
		"my_task":            "my-task",
	} {
		if got := hostname(spec.Task{Name: in}); got != want || spec.ValidateHostname(got) != nil {
			t.Errorf("%s → %s, want %s", in, got, want)
		}
	}
	long := spec.Task{Name: "a123456789012345678901234567890123456789012345678901234567890.12.abcdefghijkl"}
	if got := hostname(long); spec.ValidateHostname(got) != nil || len(got) > 63 {
		t.Errorf("%q is no host name", got)
	}
}

// TestComposeKeepsNothingTooLong: what the managers said is taken over once, and again when
// they say something else, or the node has other networks.
func TestComposeKeepsNothingTooLong(t *testing.T) {
	in := sources()
	in.managers = &managers{}
	first := compose(in)
	if again := compose(in); &again.Services[0] != &first.Services[0] {
		t.Error("services were copied again")
	}
	both := in
	both.sandboxes = []spec.Sandbox{{Task: "t9", Attachments: []spec.Attachment{{Network: "db"}}}}
	if v := compose(both); len(v.Networks) != 2 || len(v.Services) != 2 || len(first.Services) != 1 {
		t.Errorf("with another network: %+v, before: %+v", v, first)
	}
	next := *in.assigned
	next.Services = next.Services[1:]
	in.assigned = &next
	if v := compose(in); len(v.Services) != 0 || len(v.Networks) != 1 {
		t.Errorf("without the service: %+v", v)
	}
}

// TestHold: an endpoint is chosen only when the routes to it are made, whatever
// the order in which Views and passes come.
func TestHold(t *testing.T) {
	e := func(task, node string, s spec.EndpointState) spec.Endpoint {
		return spec.Endpoint{Task: task, Network: "n", Node: node, State: s, Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.9")}}
	}
	nets := []spec.Network{{ID: "n"}}
	first := &spec.View{Complete: true, Networks: nets, Endpoints: []spec.Endpoint{e("a", "1", spec.EndpointActive), e("d", "1", spec.EndpointDraining)}}
	p := newProgress()
	want := func(gen uint64, v *spec.View) {
		p.update(func(p *progress) { p.routesWanted(gen, v, spec.ChangedAll) })
	}
	want(1, &spec.View{})
	want(2, first)
	p.held = true
	if p.routesMade(1) || p.routed != nil {
		t.Error("a View that is not complete releases")
	}
	if !p.routesMade(2) || !p.routed[routeOf(first.Endpoints[0])] {
		t.Error("the first complete View does not release")
	}
	if v, n := hold(first, p.routed); n != 0 || v != first {
		t.Errorf("held %d of what is routed", n)
	}
	// a moves to another node, b is new: both wait; d stays as it is.
	second := &spec.View{Complete: true, Networks: nets, Endpoints: []spec.Endpoint{e("a", "2", spec.EndpointActive), e("b", "2", spec.EndpointActive), e("d", "1", spec.EndpointDraining)}}
	v, n := hold(second, p.routed)
	if n != 2 || v.Endpoints[0].State != spec.EndpointStarting || v.Endpoints[1].State != spec.EndpointStarting || v.Endpoints[2].State != spec.EndpointDraining {
		t.Errorf("held %d: %+v", n, v.Endpoints)
	}
	if second.Endpoints[0].State != spec.EndpointActive {
		t.Error("hold changed the View it was given")
	}
	want(3, second)
	p.held = true
	if p.routesMade(2) {
		t.Error("an older pass releases")
	}
	if !p.routesMade(3) {
		t.Error("its pass does not release")
	}
	if _, n := hold(second, p.routed); n != 0 {
		t.Errorf("%d are held after their pass", n)
	}
	// It goes and comes back before the overlay has seen either: whether its
	// routes are there is open until it has seen the last.
	want(4, &spec.View{Complete: true})
	want(5, second)
	for _, gen := range []uint64{3, 4} {
		p.held = true
		p.routesMade(gen)
		// The network goes and comes back as well.
		if v, n := hold(second, p.routed); n != 3 || len(v.Networks) != 0 || len(second.Networks) != 1 {
			t.Errorf("after pass %d: %d held, want 3; networks %v", gen, n, v.Networks)
		}
	}
	p.routesMade(5)
	if _, n := hold(second, p.routed); n != 0 {
		t.Errorf("%d are held after the last pass", n)
	}
	if p.routesMade(5) {
		t.Error("released with nothing held")
	}
}

// TestComposeAway: a node that is dead for want of an agent keeps its routes, and is in
// nothing else.
func TestComposeAway(t *testing.T) {
	in := sources()
	s := *in.gossip
	s.Members = []gossip.Member{{Peer: spec.Peer{ID: "n1"}}, {Peer: spec.Peer{ID: "n2", Liveness: spec.PeerDead, Away: true}, Epoch: 7}}
	s.Endpoints, s.Away = s.Endpoints[:1], s.Endpoints[1:]
	in.gossip = &s
	v := compose(in)
	if p, _ := v.Peer("n2"); !p.Away || !p.Routed() || len(v.Endpoints) != 1 || len(v.Away) != 1 || v.Away[0].Task != "t2" {
		t.Errorf("peers %+v, endpoints %+v, away %+v", v.Peers, v.Endpoints, v.Away)
	}
	in.refused = func(e spec.Endpoint) bool { return e.Task == "t2" }
	if v := compose(in); len(v.Away) > 0 {
		t.Errorf("what is refused is away: %+v", v.Away)
	}
}
