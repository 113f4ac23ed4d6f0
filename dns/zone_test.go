package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/shoalnet/shoal/spec"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// sample is two networks with a bit of everything.
func sample() *spec.View {
	v := &spec.View{
		Self: "n1",
		Peers: []spec.Peer{
			{ID: "n1", Name: "node1", Number: 1}, {ID: "n2", Name: "Node2", Number: 2}, {ID: "n3", Name: "node3.example.com", Number: 3},
		},
		Networks: []spec.Network{
			{ID: "netA", Name: "app", Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24")}, Gateways: []netip.Addr{ip("10.0.1.1")}},
			{ID: "netB", Name: "back", Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24")}, Gateways: []netip.Addr{ip("10.0.2.1")}},
			{ID: "netC", Name: "other", Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.3.0/24")}, Gateways: []netip.Addr{ip("10.0.3.1")}},
		},
		Services: []spec.Service{
			{ID: "s1", Spec: spec.ServiceSpec{Name: "Web", Networks: []spec.NetworkAttachment{{Network: "netA", Aliases: []string{"www", "shared"}}, {Network: "netB"}}},
				VIPs: []spec.VIPs{{Network: "netA", Addrs: []netip.Addr{ip("10.0.1.100")}}, {Network: "netB", Addrs: []netip.Addr{ip("10.0.2.100")}}}},
			{ID: "s2", Spec: spec.ServiceSpec{Name: "rr", EndpointMode: spec.EndpointModeDNSRR, Networks: []spec.NetworkAttachment{{Network: "netA"}}}},
			{ID: "s3", Spec: spec.ServiceSpec{Name: "empty", EndpointMode: spec.EndpointModeDNSRR, Networks: []spec.NetworkAttachment{{Network: "netA"}}}},
			{ID: "s4", Spec: spec.ServiceSpec{Name: "secret", Networks: []spec.NetworkAttachment{{Network: "netC"}}},
				VIPs: []spec.VIPs{{Network: "netC", Addrs: []netip.Addr{ip("10.0.3.100")}}}},
		},
		Endpoints: []spec.Endpoint{
			{Task: "t1aaaaaaaaaa", TaskName: "Web.1.t1aaaaaaaaaa", Hostname: "Web-1-t1", Service: "s1", Slot: 1, Network: "netA", Node: "n1", Addrs: []netip.Addr{ip("10.0.1.11")}, Aliases: []string{"www", "shared"}, State: spec.EndpointActive},
			{Task: "t1aaaaaaaaaa", TaskName: "Web.1.t1aaaaaaaaaa", Hostname: "Web-1-t1", Service: "s1", Slot: 1, Network: "netB", Node: "n1", Addrs: []netip.Addr{ip("10.0.2.11")}, State: spec.EndpointActive},
			{Task: "t2aaaaaaaaaa", TaskName: "Web.2.t2aaaaaaaaaa", Service: "s1", Slot: 2, Network: "netA", Node: "n2", Addrs: []netip.Addr{ip("10.0.1.12")}, State: spec.EndpointActive},
			{Task: "t3aaaaaaaaaa", TaskName: "Web.3.t3aaaaaaaaaa", Service: "s1", Slot: 3, Network: "netA", Node: "n2", Addrs: []netip.Addr{ip("10.0.1.13")}, State: spec.EndpointDraining},
			{Task: "t4aaaaaaaaaa", TaskName: "rr.1.t4aaaaaaaaaa", Service: "s2", Slot: 1, Network: "netA", Node: "n1", Addrs: []netip.Addr{ip("10.0.1.14")}, State: spec.EndpointActive},
			{Task: "t5aaaaaaaaaa", TaskName: "rr.2.t5aaaaaaaaaa", Service: "s2", Slot: 2, Network: "netA", Node: "n3", Addrs: []netip.Addr{ip("10.0.1.15")}, State: spec.EndpointActive},
			{Task: "t6aaaaaaaaaa", TaskName: "rr.3.t6aaaaaaaaaa", Service: "s2", Slot: 3, Network: "netA", Node: "n3", Addrs: []netip.Addr{ip("10.0.1.16")}, State: spec.EndpointStarting},
			{Task: "t7aaaaaaaaaa", TaskName: "c1", Hostname: "box", Network: "netA", Node: "n1", Addrs: []netip.Addr{ip("10.0.1.17")}, Aliases: []string{"db", "Shared"}, State: spec.EndpointActive},
			{Task: "t8aaaaaaaaaa", TaskName: "c2", Hostname: "web", Network: "netA", Node: "n2", Addrs: []netip.Addr{ip("10.0.1.18")}, Aliases: []string{"db"}, State: spec.EndpointActive},
			{Task: "t9aaaaaaaaaa", TaskName: "c3", Hostname: "c3", Network: "netB", Node: "n2", Addrs: []netip.Addr{ip("10.0.2.19")}, Aliases: []string{"only"}, State: spec.EndpointDraining},
		},
	}
	v.Sort()
	return v
}

var both = &Asker{Task: "t7aaaaaaaaaa", Networks: []string{"netA", "netB"}, Links: map[string]string{"database": "db"}}

// found is a lookup in one line: addresses in order, "-" for a name that exists
// and has none, "" for one that does not.
func found(z *Zone, a *Asker, name string) string {
	targets, exists := z.find(a, strings.ToLower(name), nil)
	var out []string
	for _, t := range targets {
		for _, ip := range t.addrs {
			out = append(out, ip.String())
		}
	}
	slices.SortFunc(out, func(a, b string) int { return ip(a).Compare(ip(b)) })
	if len(out) == 0 && exists {
		return "-"
	}
	return strings.Join(out, " ")
}

func TestNames(t *testing.T) {
	z := NewZone(sample(), ZoneOptions{})
	for name, want := range map[string]string{
		"web":                      "10.0.1.100",
		"WEB":                      "10.0.1.100",
		"web.app":                  "10.0.1.100",
		"web.back":                 "10.0.2.100",
		"web.shoal":                "10.0.1.100",
		"web.back.shoal":           "10.0.2.100",
		"web.other":                "", // not on it, and no network of the asker's
		"secret":                   "",
		"secret.other":             "",
		"secret.other.shoal":       "",
		"tasks.web":                "10.0.1.11 10.0.1.12",
		"tasks.web.app":            "10.0.1.11 10.0.1.12",
		"tasks.web.back.shoal":     "10.0.2.11",
		"www":                      "10.0.1.100",
		"tasks.www":                "10.0.1.11 10.0.1.12",
		"shared":                   "10.0.1.17 10.0.1.100", // a service and a task have it
		"rr":                       "10.0.1.14 10.0.1.15",
		"tasks.rr":                 "10.0.1.14 10.0.1.15",
		"empty":                    "-",
		"tasks.empty":              "-",
		"db":                       "10.0.1.17 10.0.1.18",
		"database":                 "10.0.1.17 10.0.1.18", // a link
		"c1":                       "10.0.1.17",
		"c1.app":                   "10.0.1.17",
		"c1.back":                  "",
		"box":                      "10.0.1.17",
		"t7aaaaaaaaaa":             "10.0.1.17",
		"web.1":                    "10.0.1.11",
		"web.3":                    "", // drains: the slot has no replica that takes anything
		"web.01":                   "",
		"web.4":                    "",
		"web.2.t2aaaaaaaaaa":       "10.0.1.12",
		"web.3.t3aaaaaaaaaa":       "10.0.1.13", // its own name, as long as it has the address
		"rr.3.t6aaaaaaaaaa":        "10.0.1.16",
		"web.2.t2aaaaaaaaaa.app":   "10.0.1.12",
		"web-1-t1":                 "10.0.1.11",
		"web.node1":                "10.0.1.11",
		"web.node2":                "10.0.1.12",
		"web.node2.app":            "10.0.1.12",
		"web.node2.shoal":          "10.0.1.12",
		"web.node1.back.shoal":     "10.0.2.11",
		"web.2.node2":              "10.0.1.12",
		"rr.node3.example.com":     "10.0.1.15",
		"rr.node3.example.com.app": "10.0.1.15",
		"web.node3.example.com":    "-", // a service is on every node, with or without a replica
		"c1.node1":                 "10.0.1.17",
		"c1.node2":                 "",
		"c3":                       "10.0.2.19",
		"only":                     "-",
		"gateway.app.shoal":        "10.0.1.1",
		"gateway.app":              "",
		"gateway":                  "",
		"nosuch":                   "",
		"app":                      "",
		"shoal":                    "",
		"web..app":                 "",
		".":                        "",
		"":                         "",
		".web":                     "",
		"web.":                     "",
	} {
		if got := found(z, both, name); got != want {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
	// In the order of the asker's interfaces.
	if got := found(z, &Asker{Networks: []string{"netB", "netA"}}, "web"); got != "10.0.2.100" {
		t.Errorf("web, back first: %s", got)
	}
	if got := found(z, &Asker{Networks: []string{"netC"}}, "web"); got != "" {
		t.Errorf("web from another network: %s", got)
	}
	if got := found(z, &Asker{}, "web"); got != "" {
		t.Errorf("web from no network: %s", got)
	}
}

func TestSuspectedNodesAreLeftOutWhereOthersAre(t *testing.T) {
	v := sample()
	v.Peers[1].Liveness = spec.PeerSuspect // n2
	z := NewZone(v, ZoneOptions{})
	for name, want := range map[string]string{
		"tasks.web": "10.0.1.11", "db": "10.0.1.17", "web": "10.0.1.100", "web.2.t2aaaaaaaaaa": "10.0.1.12", "c2": "10.0.1.18", "web.node2": "10.0.1.12",
	} {
		if got := found(z, both, name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	v = sample()
	v.Peers[0].Liveness, v.Peers[1].Liveness = spec.PeerSuspect, spec.PeerSuspect
	if got := found(NewZone(v, ZoneOptions{}), both, "tasks.web"); got != "10.0.1.11 10.0.1.12" {
		t.Errorf("all suspected: %q", got)
	}
}

func TestReverse(t *testing.T) {
	z := NewZone(sample(), ZoneOptions{})
	for name, want := range map[string]string{
		"100.1.0.10.in-addr.arpa":             "web.app.shoal. true",
		"100.2.0.10.in-addr.arpa":             "web.back.shoal. true",
		"11.1.0.10.in-addr.arpa":              "web.1.t1aaaaaaaaaa.app.shoal. true",
		"17.1.0.10.in-addr.arpa":              "c1.app.shoal. true",
		"1.1.0.10.in-addr.arpa":               "gateway.app.shoal. true",
		"200.1.0.10.in-addr.arpa":             " true",
		"100.3.0.10.in-addr.arpa":             " true", // a network of the node, but not of the asker
		"1.0.10.in-addr.arpa":                 " true",
		"0.10.in-addr.arpa":                   " false",
		"8.8.8.8.in-addr.arpa":                " false",
		"256.1.0.10.in-addr.arpa":             " false",
		"01.1.0.10.in-addr.arpa":              " false",
		"1.1.1.0.10.in-addr.arpa":             " false",
		"in-addr.arpa":                        " false",
		".in-addr.arpa":                       " false",
		"a.b.c.d.in-addr.arpa":                " false",
		"1.0.0.0.ip6.arpa":                    " false",
		strings.Repeat("0.", 33) + "ip6.arpa": " false",
	} {
		owner, ours := z.reverse(both, name)
		if got := fmt.Sprint(owner, " ", ours); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// TestUpdateIsNewZone: whatever happened before, a Zone says what one made from
// nothing says, and the ones before it say what they said.
func TestUpdateIsNewZone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		z := emptyZone
		type past struct {
			z    *Zone
			said map[string]string
		}
		var history []past
		for range rapid.IntRange(1, 6).Draw(t, "steps") {
			v := randomView(t)
			opts := ZoneOptions{Nodes: []spec.Node{{ID: "n1", Name: "node1"}}}
			z = z.Update(v, opts)
			fresh := NewZone(v, opts)
			said := everything(z)
			for k, want := range everything(fresh) {
				if said[k] != want {
					t.Fatalf("%s: updated says %q, new says %q\n%+v", k, said[k], want, v)
				}
			}
			if z.names.size != fresh.names.size || z.addrs.size != fresh.addrs.size || z.units.size != fresh.units.size {
				t.Fatalf("sizes %d %d %d, want %d %d %d", z.names.size, z.addrs.size, z.units.size, fresh.names.size, fresh.addrs.size, fresh.units.size)
			}
			history = append(history, past{z, said})
		}
		for i, p := range history {
			for k, now := range everything(p.z) {
				if p.said[k] != now {
					t.Fatalf("zone %d said %q of %s, and now %q", i, p.said[k], k, now)
				}
			}
		}
	})
}

var (
	someNames = []string{"a", "b", "c", "a.1", "tasks.a"}
	someNets  = []string{"x", "y"}
)

func everything(z *Zone) map[string]string {
	out := map[string]string{}
	for _, nets := range [][]string{{"x"}, {"y"}, {"x", "y"}} {
		a := &Asker{Networks: nets}
		for _, n := range someNames {
			for _, pre := range []string{"", "tasks."} {
				for _, suf := range []string{"", ".netx", ".node1", ".1"} {
					out[fmt.Sprint(nets, pre, n, suf)] = found(z, a, pre+n+suf)
				}
			}
		}
		for i := range 8 {
			owner, ours := z.reverse(a, fmt.Sprintf("%d.0.0.10.in-addr.arpa", i))
			out[fmt.Sprint(nets, "ptr", i)] = fmt.Sprint(owner, ours)
		}
	}
	return out
}

func randomView(t *rapid.T) *spec.View {
	v := &spec.View{}
	for _, n := range someNets {
		if rapid.IntRange(0, 9).Draw(t, "present") > 0 {
			v.Networks = append(v.Networks, spec.Network{ID: n, Name: "net" + n, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}})
		}
	}
	// An address is one thing's on a network at a time; managers see to it.
	free := map[string][]int{}
	for _, n := range someNets {
		free[n] = rapid.Permutation([]int{0, 1, 2, 3, 4, 5, 6, 7}).Draw(t, "addrs")
	}
	addr := func(n string) []netip.Addr {
		i := free[n][0]
		free[n] = free[n][1:]
		return []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}
	}
	name := rapid.SampledFrom(someNames)
	for _, id := range []string{"s1", "s2"} {
		if !rapid.Bool().Draw(t, "service") {
			continue
		}
		s := spec.Service{ID: id, Spec: spec.ServiceSpec{Name: name.Draw(t, "name")}}
		for _, n := range someNets {
			if rapid.Bool().Draw(t, "on") {
				s.Spec.Networks = append(s.Spec.Networks, spec.NetworkAttachment{Network: n, Aliases: rapid.SliceOfN(name, 0, 2).Draw(t, "aliases")})
				if rapid.Bool().Draw(t, "vip") {
					s.VIPs = append(s.VIPs, spec.VIPs{Network: n, Addrs: addr(n)})
				}
			}
		}
		v.Services = append(v.Services, s)
	}
	for _, id := range []string{"t1", "t2", "t3"} {
		svc := rapid.SampledFrom([]string{"", "s1", "s2", "s9"}).Draw(t, "of")
		tname := rapid.SampledFrom(someNames).Draw(t, "task")
		for _, n := range someNets {
			if rapid.Bool().Draw(t, "here") {
				v.Endpoints = append(v.Endpoints, spec.Endpoint{Task: id, TaskName: tname, Hostname: name.Draw(t, "host"), Service: svc, Slot: rapid.IntRange(0, 1).Draw(t, "slot"),
					Network: n, Addrs: addr(n), Aliases: rapid.SliceOfN(name, 0, 2).Draw(t, "al"), Node: rapid.SampledFrom([]string{"n1", "n2"}).Draw(t, "node"),
					State: spec.EndpointState(rapid.IntRange(0, 2).Draw(t, "state"))})
			}
		}
	}
	v.Sort()
	return v
}

func TestParseSRV(t *testing.T) {
	for in, want := range map[string]string{
		"_80._tcp.web":        "80 web true",
		"_53._udp.a.b":        "53 a.b true",
		"_http._tcp.web":      "80 web true",
		"_0._tcp.web":         "0  false",
		"_65536._tcp.web":     "0  false",
		"_80._foo.web":        "0  false",
		"_80._tcp.":           "0  false",
		"_._tcp.web":          "0  false",
		"80._tcp.web":         "0  false",
		"_nosuchsvc._tcp.web": "0  false",
	} {
		p, base, ok := parseSRV(in)
		if got := fmt.Sprint(p, " ", base, " ", ok); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

// TestIdleReplicasAreNamedWhereNoOtherIs: the name of workers, which listen nowhere,
// gives their addresses; that of a server gives those where it listens.
func TestIdleReplicasAreNamedWhereNoOtherIs(t *testing.T) {
	idle := func(tasks ...string) *Zone {
		v := sample()
		for i := range v.Endpoints {
			if slices.ContainsFunc(tasks, func(id string) bool { return strings.HasPrefix(v.Endpoints[i].Task, id) }) {
				v.Endpoints[i].State = spec.EndpointIdle
			}
		}
		return NewZone(v, ZoneOptions{})
	}
	for _, k := range []struct {
		z    *Zone
		want map[string]string
	}{
		{idle("t1", "t4"), map[string]string{"web": "10.0.1.100", "tasks.web.app": "10.0.1.12", "rr": "10.0.1.15", "tasks.rr": "10.0.1.15",
			"web.1": "10.0.1.11", "rr.1": "10.0.1.14", "web.1.t1aaaaaaaaaa.app": "10.0.1.11", "web.node1.app": "10.0.1.11"}},
		{idle("t1", "t2", "t4", "t5"), map[string]string{"web": "10.0.1.100", "tasks.web.app": "10.0.1.11 10.0.1.12", "rr": "10.0.1.14 10.0.1.15", "tasks.web.back": "10.0.2.11"}},
	} {
		for name, want := range k.want {
			if got := found(k.z, both, name); got != want {
				t.Errorf("%s: %s, want %s", name, got, want)
			}
		}
	}
}
