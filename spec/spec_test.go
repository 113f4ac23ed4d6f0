package spec

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestNewIDFitsAnInterfaceName(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		id := NewID()
		if len(id) != IDLen || seen[id] || ValidateName("id", id) != nil {
			t.Fatalf("bad or repeated ID %q", id)
		}
		seen[id] = true
		if n := len("sho" + id); n > 15 {
			t.Fatalf("interface name of %d characters", n)
		}
	}
}

func TestValidateSubnet(t *testing.T) {
	for _, tc := range []struct{ in, err string }{
		{"10.1.0.0/24", ""},
		{"192.168.0.0/16", ""},
		{"fd00:1::/64", ""},
		{"10.1.0.5/24", "did you mean 10.1.0.0/24"},
		{"10.1.0.0/31", "from /8 to /30"},
		{"10.0.0.0/7", "from /8 to /30"},
		{"127.0.0.0/24", "reserved"},
		{"169.254.0.0/16", "reserved"},
		{"224.0.0.0/8", "reserved"},
		{"240.0.0.0/8", "reserved"},
		{"0.0.0.0/8", "reserved"},
	} {
		err := ValidateSubnet(netip.MustParsePrefix(tc.in))
		if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: %v, want %q", tc.in, err, tc.err)
		}
	}
}

func TestDerivedAddressesNeverMeet(t *testing.T) {
	metadata := netip.MustParseAddr("169.254.169.254")
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, MaxNodes).Draw(t, "number")
		v := rapid.Uint32Range(MinVNI, MaxVNI).Draw(t, "vni")
		r := RouterAddr(n)
		host, ovl := Network{VNI: v}.Egress()
		if !RouterPrefix.Contains(r) || r == LinkGateway || r == metadata {
			t.Fatalf("router address %s of node %d", r, n)
		}
		covered := false
		for _, p := range EgressPrefixes {
			covered = covered || p.Contains(host) && p.Contains(ovl)
			if p.Contains(r) || p.Contains(metadata) || p.Contains(LinkGateway) {
				t.Fatalf("egress space %s covers another's address", p)
			}
		}
		if !covered || host.Next() != ovl || host.As4()[3]%2 != 0 {
			t.Fatalf("egress pair %s, %s of VNI %d", host, ovl, v)
		}
	})
}

func TestVIPMarkIsInjective(t *testing.T) {
	n := Network{Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.168.4.0/22")}}
	rapid.Check(t, func(t *rapid.T) {
		draw := func(l string) netip.Addr {
			b := rapid.SliceOfN(rapid.Byte(), 3, 3).Draw(t, l)
			if rapid.Bool().Draw(t, l+"2") {
				return netip.AddrFrom4([4]byte{192, 168, 4 | b[1]&3, b[2]})
			}
			return netip.AddrFrom4([4]byte{10, b[0], b[1], b[2]})
		}
		a, b := draw("a"), draw("b")
		ma, oka := n.VIPMark(a)
		mb, okb := n.VIPMark(b)
		if !oka || !okb || (a == b) != (ma == mb) {
			t.Fatalf("%s→%#x, %s→%#x", a, ma, b, mb)
		}
		if ma&MarkKindMask != VIPMarkBase {
			t.Fatalf("mark %#x is outside of its kind", ma)
		}
	})
	if _, ok := n.VIPMark(netip.MustParseAddr("172.16.0.1")); ok {
		t.Error("a mark for a foreign address")
	}
}

func TestTaskStateText(t *testing.T) {
	for s := TaskNew; s <= TaskLost; s++ {
		b, err := json.Marshal(s)
		var back TaskState
		if err != nil || json.Unmarshal(b, &back) != nil || back != s {
			t.Errorf("%v → %s → %v (%v)", s, b, back, err)
		}
	}
	if _, err := ParseTaskState("sleeping"); err == nil {
		t.Error("an unknown state parses")
	}
}

func TestConstraint(t *testing.T) {
	n := Node{ID: "id1", Name: "node2", Role: RoleWorker, Platform: "linux/amd64", Labels: map[string]string{"disk": "ssd"}}
	for _, tc := range []struct {
		in    string
		match bool
		err   string
	}{
		{"node.name==node2", true, ""},
		{"node.hostname == node2", true, ""},
		{"node.name!=node2", false, ""},
		{"node.role==manager", false, ""},
		{"node.platform.os==linux", true, ""},
		{"node.platform.arch==x86_64", true, ""},
		{"node.platform.arch==amd64", true, ""},
		{"node.platform.arch!=arm64", true, ""},
		{"node.platform.arch==aarch64", false, ""},
		{"node.labels.disk==ssd", true, ""},
		{"node.labels.zone!=a", true, ""},
		{"node.labels.==x", false, "unknown"},
		{"node.name=node2", false, "want key==value"},
		{"name==x", false, "unknown"},
		{"node.id==", false, "empty"},
	} {
		c, err := ParseConstraint(tc.in)
		if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: %v, want %q", tc.in, err, tc.err)
			continue
		}
		if err == nil && c.Match(n) != tc.match {
			t.Errorf("%s matches: %t", tc.in, !tc.match)
		}
	}
}

func TestServiceSpecValidate(t *testing.T) {
	ok := ServiceSpec{Name: "web", Replicas: 3, EndpointMode: EndpointModeVIP, Networks: []NetworkAttachment{{Network: "app"}}, Task: TaskSpec{Command: []string{"x"}}}
	if err := ok.Validate(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*ServiceSpec){
		"name is empty":         func(s *ServiceSpec) { s.Name = "" },
		"use letters":           func(s *ServiceSpec) { s.Name = "a b" },
		"out of range":          func(s *ServiceSpec) { s.Replicas = -1 },
		"65536 replicas":        func(s *ServiceSpec) { s.Replicas = 65536 },
		"endpoint mode":         func(s *ServiceSpec) { s.EndpointMode = "rr" },
		"given twice":           func(s *ServiceSpec) { s.Networks = append(s.Networks, s.Networks[0]) },
		"no command":            func(s *ServiceSpec) { s.Task.Command = nil },
		"want KEY=value":        func(s *ServiceSpec) { s.Task.Env = []string{"A"} },
		"want key==value":       func(s *ServiceSpec) { s.Constraints = []string{"x"} },
		"name server itself":    func(s *ServiceSpec) { s.Task.DNS = []netip.Addr{netip.MustParseAddr("::ffff:127.0.0.11")} },
		"each label is letters": func(s *ServiceSpec) { s.Task.Hostname = "a..b" },
	} {
		s := ok.Clone()
		change(&s)
		if err := s.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v", want, err)
		}
	}
}

func TestViewLookup(t *testing.T) {
	v := &View{Peers: []Peer{{ID: "c"}, {ID: "a"}}, Networks: []Network{{ID: "z"}, {ID: "b"}}}
	v.Sort()
	if p, ok := v.Peer("c"); !ok || p.ID != "c" {
		t.Error("peer c not found")
	}
	if _, ok := v.Peer("b"); ok {
		t.Error("peer b found")
	}
	if n, ok := v.Network("b"); !ok || n.ID != "b" {
		t.Error("network b not found")
	}
}

func TestNetnsNames(t *testing.T) {
	n := Network{ID: "abcdefghijkl", Name: "app"}
	if got := OverlayNetns("shoal", n); got != "shoal-net-app-abcdef" {
		t.Error(got)
	}
	if got := TaskNetns("shoal-node1", Task{ID: "abcdefghijkl", Name: "web.1.abcdefghijkl"}); got != "shoal-node1-task-web.1.abcdefghijkl" {
		t.Error(got)
	}
	if got := TaskNetns("shoal", Task{ID: "abcdefghijkl", Name: "c1"}); got != "shoal-task-c1-abcdef" {
		t.Error(got)
	}
}

func TestReadsAsAddress(t *testing.T) {
	for in, want := range map[string]string{
		"123": "0.0.0.123", "0": "0.0.0.0", "0x7f": "0.0.0.127", "0X7F": "0.0.0.127", "1.2": "1.0.0.2", "0177.1": "127.0.0.1",
		"127.1": "127.0.0.1", "1.2.3": "1.2.0.3", "1.2.3.4": "1.2.3.4", "4294967295": "255.255.255.255", "00": "0.0.0.0",
		"1.16777215": "1.255.255.255", "0x7f.0.0.1": "127.0.0.1", "010": "0.0.0.8",
		// Names.
		"": "", "web": "", "1a": "", "a1": "", "0x": "", "0xg": "", "08": "", "1.2.3.4.5": "", "256.1": "", "4294967296": "", "1.2.3.256": "",
		"1.16777216": "", "web.1": "", "1.web": "", "1_000": "", "1-2": "", "0x_1": "", "0b1": "", "0o7": "",
	} {
		got, ok := ReadsAsAddress(in)
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%q reads as %v, %v: want %q", in, got, ok, want)
		}
	}
}
