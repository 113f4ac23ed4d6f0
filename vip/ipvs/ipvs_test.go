package ipvs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/moby/ipvs"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/vip"
	"github.com/shoalnet/shoal/vip/viptest"
)

// needIPVS skips the test outside of the VM (vm/run), whose kernel is known to
// have IPVS: there, its absence is a failure.
func needIPVS(t *testing.T) {
	t.Helper()
	if os.Getenv("SHOAL_TEST_VM") != "1" {
		t.Skip("runs in the VM (needs IPVS)")
	}
	viptest.NeedRoot(t)
	if err := Probe(); err != nil {
		t.Fatalf("SHOAL_TEST_VM=1 and %v", err)
	}
}

func TestConformance(t *testing.T) {
	needIPVS(t)
	nft := func(cmd func(s vip.Server) string) func(testing.TB, string, vip.Server) {
		return func(tb testing.TB, ns string, s vip.Server) { viptest.In(tb, ns, "nft "+cmd(s)) }
	}
	adm := func(cmd func(s vip.Server) string) func(testing.TB, string, vip.Server) {
		return func(tb testing.TB, ns string, s vip.Server) { viptest.In(tb, ns, "ipvsadm "+cmd(s)) }
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
		Idle: func(tb testing.TB, ns string) map[string]time.Duration {
			out := viptest.ConntrackIdle(tb, ns)
			h, err := ipvs.New(nl.Path(ns))
			if err != nil {
				tb.Fatal(err)
			}
			defer h.Close()
			c, err := h.GetConfig()
			if err != nil {
				tb.Fatal(err)
			}
			out["IPVS's TCP timeout"] = c.TimeoutTCP
			return out
		},
		Foreign: func(tb testing.TB, ns string) func(testing.TB) {
			check := viptest.Foreign(tb, ns)
			viptest.In(tb, ns, "ipvsadm -A -f 7 -s wrr")
			viptest.In(tb, ns, "ipvsadm -a -f 7 -r 10.213.7.200:0 -m -w 3")
			viptest.In(tb, ns, "ipvsadm -A -t 10.213.7.77:80 -s lc")
			viptest.In(tb, ns, "ipvsadm -a -t 10.213.7.77:80 -r 10.213.7.201:8080 -m")
			before := viptest.In(tb, ns, "ipvsadm -S -n")
			return func(tb testing.TB) {
				check(tb)
				if after := viptest.In(tb, ns, "ipvsadm -S -n"); after != before {
					tb.Errorf("strangers' IPVS services were\n%s\nand are\n%s", before, after)
				}
			}
		},
		Breakages: []viptest.Breakage{
			{Name: "address", Do: func(tb testing.TB, ns string, s vip.Server) {
				viptest.Sh(tb, "ip -n "+ns+" addr del "+v(s)+"/32 dev lo")
			}},
			{Name: "all addresses", Do: func(tb testing.TB, ns string, s vip.Server) { viptest.Sh(tb, "ip -n "+ns+" addr flush dev lo") }},
			{Name: "table", Do: nft(func(vip.Server) string { return "delete table ip shoal-vip" })},
			{Name: "element", Do: nft(func(s vip.Server) string { return "delete element ip shoal-vip marks { " + v(s) + " }" })},
			{Name: "served", Do: nft(func(s vip.Server) string { return "delete element ip shoal-vip served { " + v(s) + " }" })},
			{Name: "hairpin", Do: nft(func(s vip.Server) string { return "flush map ip shoal-vip self" })},
			{Name: "hairpin back", Do: nft(func(s vip.Server) string { return "flush map ip shoal-vip back" })},
			{Name: "chain to-vip", Do: nft(func(s vip.Server) string { return "flush chain ip shoal-vip to-vip" })},
			{Name: "table dormant", Do: nft(func(vip.Server) string { return "add table ip shoal-vip { flags dormant ; }" })},
			{Name: "chain added", Do: nft(func(vip.Server) string {
				return "add chain ip shoal-vip odd { type filter hook prerouting priority -400 ; policy drop ; } ; add rule ip shoal-vip odd drop"
			})},
			{Name: "policy", Do: nft(func(vip.Server) string { return "chain ip shoal-vip postrouting { policy drop ; }" })},
			{Name: "prerouting", Do: nft(func(s vip.Server) string { return "flush chain ip shoal-vip prerouting" })},
			{Name: "postrouting", Do: nft(func(s vip.Server) string {
				return "flush chain ip shoal-vip postrouting ; delete chain ip shoal-vip postrouting"
			})},
			{Name: "other mark", Do: func(tb testing.TB, ns string, s vip.Server) {
				viptest.In(tb, ns, "nft delete element ip shoal-vip marks { "+v(s)+" } ; add element ip shoal-vip marks { "+v(s)+" : 5 }")
			}},
			{Name: "service", Do: adm(func(s vip.Server) string { return fmt.Sprintf("-D -f %d", s.Mark) })},
			{Name: "all services", Do: adm(func(s vip.Server) string { return "-C" })},
			{Name: "backend", Do: adm(func(s vip.Server) string { return fmt.Sprintf("-d -f %d -r %s:0", s.Mark, s.Backends[0].Addr) })},
			{Name: "draining backend", Do: adm(func(s vip.Server) string { return fmt.Sprintf("-d -f %d -r %s:0", s.Mark, s.Drains()[0]) })},
			{Name: "weight", Do: adm(func(s vip.Server) string {
				return fmt.Sprintf("-e -f %d -r %s:0 -m -w 5", s.Mark, s.Backends[0].Addr)
			})},
			{Name: "scheduler", Do: adm(func(s vip.Server) string { return fmt.Sprintf("-E -f %d -s wlc -p 60", s.Mark) })},
			{Name: "backend added", Do: adm(func(s vip.Server) string { return fmt.Sprintf("-a -f %d -r 10.213.7.199:0 -m -w 1", s.Mark) })},
			{Name: "backend of another method", Do: adm(func(s vip.Server) string { return fmt.Sprintf("-a -f %d -r 10.213.7.199:0 -g -w 1", s.Mark) })},
			{Name: "timeouts", Do: adm(func(s vip.Server) string { return "--set 900 60 60" })},
			{Name: "conntrack timeout", Do: func(tb testing.TB, ns string, s vip.Server) {
				viptest.In(tb, ns, "sysctl -q -w net.netfilter.nf_conntrack_tcp_timeout_established=7200")
			}},
			{Name: "sysctl", Do: func(tb testing.TB, ns string, s vip.Server) {
				viptest.In(tb, ns, "sysctl -q -w net.ipv4.vs.expire_nodest_conn=0")
			}},
		},
	})
}

func TestProbe(t *testing.T) {
	viptest.NeedRoot(t)
	if err := Probe(); err != nil {
		t.Logf("not here: %v", err)
		oneLine(t, err)
	}
}

// oneLine demands that an error says what is missing and what to do, in a line.
func oneLine(t *testing.T, err error) {
	t.Helper()
	s := err.Error()
	if strings.Contains(s, "\n") || !strings.HasPrefix(s, "no IPVS in this kernel") || !strings.Contains(s, "to use IPVS: ") || !strings.Contains(s, "modprobe ip_vs") {
		t.Errorf("the error is not one line of what is missing and what to do: %q", s)
	}
}

func TestNoIPVS(t *testing.T) {
	fails := errors.New("exit status 1")
	for _, x := range []struct {
		out, want string
		err       error
	}{
		{"modprobe: WARNING: Module ip_vs not found in directory /lib/modules/6.18\nmodprobe: WARNING: Module ip_vs_rr not found in directory /lib/modules/6.18\n",
			"(ip_vs module not found)", fails},
		{"modprobe: ERROR: could not insert 'ip_vs': Operation not permitted\n", "not permitted", fails},
		{"", "no modprobe here", fmt.Errorf("exec: %w", exec.ErrNotFound)},
		{"modprobe: ERROR: could not insert\n 'ip_vs': Key was rejected by service\n", "Key was rejected by service", fails},
		{"", "exit status 1", fails},
		{"", "/net/ip_vs", nil},
	} {
		err := noIPVS(x.out, x.err)
		oneLine(t, err)
		if !strings.Contains(err.Error(), x.want) {
			t.Errorf("modprobe said %q, %v: %q does not contain %q", x.out, x.err, err, x.want)
		}
	}
}
