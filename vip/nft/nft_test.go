package nft

import (
	"strings"
	"testing"

	"github.com/shoalnet/shoal/vip"
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
		New:             func(testing.TB) vip.Dataplane { return New(Config{}) },
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
