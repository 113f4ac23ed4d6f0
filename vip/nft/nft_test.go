package nft

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/vip"
	"github.com/shoalnet/shoal/vip/internal/kern"
	"github.com/shoalnet/shoal/vip/viptest"
)

func TestConformance(t *testing.T) {
	viptest.NeedRoot(t)
	if err := Probe(); err != nil {
		viptest.Skip(t, "missing: %v", err)
	}
	nft := func(cmd func(s vip.Server) string) func(testing.TB, string, vip.Server) {
		return func(tb testing.TB, ns string, s vip.Server) { viptest.In(tb, ns, "nft "+cmd(s)) }
	}
	v := func(s vip.Server) string { return s.VIP.String() }
	scale := 2000
	if !viptest.Native() {
		scale = 100
	}
	viptest.Run(t, viptest.Harness{
		New: func(t testing.TB) vip.Dataplane {
			n, err := nl.Listen("", kern.Label)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(n.Close)
			return New(Config{Notices: n})
		},
		AddNamespace:    viptest.AddNamespace,
		RemoveNamespace: viptest.RemoveNamespace,
		Kernel:          true,
		Native:          viptest.Native(),
		Scale:           scale,
		PerService:      10,
		Idle:            viptest.ConntrackIdle,
		Foreign:         viptest.Foreign,
		Breakages: []viptest.Breakage{
			{Name: "address", Do: func(tb testing.TB, ns string, s vip.Server) {
				viptest.Sh(tb, "ip -n "+ns+" addr del "+v(s)+"/32 dev lo")
			}},
			{Name: "all addresses", Do: func(tb testing.TB, ns string, s vip.Server) { viptest.Sh(tb, "ip -n "+ns+" addr flush dev lo") }},
			{Name: "table", Do: nft(func(vip.Server) string { return "delete table ip shoal-vip" })},
			{Name: "ruleset", Do: nft(func(vip.Server) string { return "flush ruleset" })},
			{Name: "element", Do: nft(func(s vip.Server) string { return "delete element ip shoal-vip vips { " + v(s) + " }" })},
			{Name: "elements", Do: nft(func(vip.Server) string { return "flush map ip shoal-vip vips" })},
			{Name: "hairpin", Do: nft(func(s vip.Server) string { return "flush set ip shoal-vip hairpin" })},
			{Name: "hairpin of two", Do: nft(func(s vip.Server) string {
				return "add element ip shoal-vip hairpin { 10.77.0.1 . 10.77.0.2 }"
			})},
			{Name: "set leaving", Do: nft(func(s vip.Server) string { return "delete set ip shoal-vip leaving" })},
			{Name: "draining backend", Do: nft(func(s vip.Server) string {
				return "delete element ip shoal-vip leaving { " + v(s) + " . " + s.Drains()[0].String() + " }"
			})},
			{Name: "chain emptied", Do: nft(func(s vip.Server) string { return "flush chain ip shoal-vip " + chainOf(s.VIP) })},
			{Name: "chain deleted", Do: func(tb testing.TB, ns string, s vip.Server) {
				viptest.In(tb, ns, "nft delete element ip shoal-vip vips { "+v(s)+" } ; flush chain ip shoal-vip "+chainOf(s.VIP)+
					" ; delete chain ip shoal-vip "+chainOf(s.VIP))
			}},
			{Name: "rule added", Do: nft(func(s vip.Server) string { return "insert rule ip shoal-vip " + chainOf(s.VIP) + " accept" })},
			{Name: "element elsewhere", Do: func(tb testing.TB, ns string, s vip.Server) {
				viptest.In(tb, ns, "nft delete element ip shoal-vip vips { "+v(s)+" } ; add element ip shoal-vip vips { "+v(s)+" : accept }")
			}},
			{Name: "idle timeout", Do: func(tb testing.TB, ns string, s vip.Server) {
				viptest.In(tb, ns, "sysctl -q -w net.netfilter.nf_conntrack_tcp_timeout_established=7200")
			}},
			{Name: "table dormant", Do: nft(func(vip.Server) string { return "add table ip shoal-vip { flags dormant ; }" })},
			{Name: "chain added", Do: nft(func(vip.Server) string {
				return "add chain ip shoal-vip odd { type filter hook prerouting priority -400 ; policy drop ; } ; add rule ip shoal-vip odd drop"
			})},
			{Name: "policy", Do: nft(func(vip.Server) string { return "chain ip shoal-vip postrouting { policy drop ; }" })},
			{Name: "prerouting emptied", Do: nft(func(s vip.Server) string { return "flush chain ip shoal-vip prerouting" })},
			{Name: "postrouting deleted", Do: nft(func(s vip.Server) string {
				return "flush chain ip shoal-vip postrouting ; delete chain ip shoal-vip postrouting"
			})},
			{Name: "other form", Do: func(tb testing.TB, ns string, s vip.Server) {
				viptest.In(tb, ns, "nft delete table ip shoal-vip ; add table ip shoal-vip ; add map ip shoal-vip vips { type ipv4_addr : mark ; }")
			}},
		},
	})
}

func TestProbe(t *testing.T) {
	viptest.NeedRoot(t)
	if err := Probe(); err != nil {
		t.Logf("not here: %v", err)
		if !strings.Contains(err.Error(), "kernel lacks") {
			t.Errorf("the reason does not name what is missing: %v", err)
		}
	}
}

// TestChainsOfAnotherType: what another version's table has with another hook
// priority is replaced without losing a VIP on the way.
func TestChainsOfAnotherType(t *testing.T) {
	if err := Probe(); err != nil {
		t.Skip(err)
	}
	const ns = "shoalnft-other"
	if err := nl.Create(ns); err != nil {
		t.Fatal(err)
	}
	defer nl.Remove(ns)
	n := vip.Network{ID: "n", Name: "n", Namespace: ns, Subnets: []netip.Prefix{netip.MustParsePrefix("10.213.7.0/24")},
		Gateways: []netip.Addr{netip.MustParseAddr("10.213.7.1")},
		Servers:  []vip.Server{{VIP: netip.MustParseAddr("10.213.7.2"), Name: "web", Backends: []vip.Backend{{Addr: netip.MustParseAddr("10.213.7.9"), Weight: 1}}}}}
	d := New(Config{})
	if err := d.Apply(t.Context(), vip.SetNetwork{Want: n}); err != nil {
		t.Fatal(err)
	}
	sh := func(cmd string) string {
		t.Helper()
		out, err := exec.Command("ip", "netns", "exec", ns, "sh", "-c", cmd).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", cmd, err, out)
		}
		return string(out)
	}
	sh("nft flush chain ip shoal-vip input; nft delete chain ip shoal-vip input; nft 'add chain ip shoal-vip input { type filter hook input priority -7; }'")
	n.Servers = nil // as in the operation that mends what the servers share
	if err := d.Apply(t.Context(), vip.SetNetwork{Want: n, Why: "another version"}); err != nil {
		t.Fatal(err)
	}
	have := sh("nft list table ip shoal-vip")
	for _, x := range []string{"10.213.7.2 : goto vip-10.213.7.2", "10.213.7.9", "hook input priority filter"} {
		if !strings.Contains(have, x) {
			t.Errorf("%q is missing in\n%s", x, have)
		}
	}
}
