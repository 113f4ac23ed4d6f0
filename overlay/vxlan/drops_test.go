package vxlan

import (
	"context"
	"testing"

	"github.com/google/nftables/expr"

	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/overlay/overlaytest"
)

// What a rule drops is counted under its reason, where it was dropped, and every
// rule that drops or refuses has a reason.
func TestDropsAreCounted(t *testing.T) {
	needKernel(t)
	m := machines(t, 1)[0]
	w := world{m}
	v := w.View()
	for _, s := range v.Sandboxes {
		w.AddSandbox(s.Netns)
	}
	want := overlay.Desired(v)
	overlaytest.Converge(t, m.d, want)
	count := func(reason string) (n uint64) {
		t.Helper()
		drops, err := m.d.Drops(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range drops {
			if d.Reason == reason {
				n += d.Packets
			}
		}
		return n
	}
	if n := count(whySpoofed); n != 0 {
		t.Fatalf("%d packets before any was sent", n)
	}
	ns := v.Sandboxes[0].Netns
	run(t, "ip -n %s addr add 203.0.113.7/32 dev lo", ns)
	for range 3 {
		_, _ = try("ip", "netns", "exec", ns, "ping", "-c1", "-W1", "-I", "203.0.113.7", v.Networks[0].Gateways[0].String())
	}
	if n := count(whySpoofed); n != 3 {
		t.Errorf("3 packets with a source that is not the task's: %d counted", n)
	}
	for _, rs := range []ruleset{filterRules(overlay.Filter{Subnets: "10.0.0.0/24", Out: true, Alone: "10.0.0.1/32"}), membersRules(overlay.Members{Peers: "192.0.2.1"}), hostRules("x", &[]string{"eth0"})} {
		for _, c := range rs.chains {
			for _, x := range c.rules {
				for _, e := range x.exprs {
					if drops(e) && x.why == "" {
						t.Errorf("chain %s: %q has no reason", c.name, x.text)
					}
				}
			}
		}
	}
}

func drops(e expr.Any) bool {
	switch e := e.(type) {
	case *expr.Verdict:
		return e.Kind == expr.VerdictDrop
	case *expr.Reject:
		return true
	}
	return false
}
