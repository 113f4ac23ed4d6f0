package vxlan

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/overlay/overlaytest"
	"github.com/shoalnet/shoal/spec"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// needKernel skips where a kernel test can't run, or fails if SHOAL_TEST_STRICT=1.
func needKernel(t *testing.T) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "needs root"
	}
	for _, tool := range []string{"ip", "nft", "ping", "bridge"} {
		if _, err := exec.LookPath(tool); why == "" && err != nil {
			why = "needs the program " + tool
		}
	}
	if why == "" {
		if err := Probe(); err != nil {
			why = err.Error()
		}
	}
	switch {
	case why == "":
	case os.Getenv("SHOAL_TEST_STRICT") == "1":
		t.Fatal(why)
	default:
		t.Skip(why)
	}
}

// try runs a command and returns its output.
func try(args ...string) (string, error) {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

func run(t testing.TB, line string, args ...any) string {
	t.Helper()
	out, err := try(strings.Fields(fmt.Sprintf(line, args...))...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// machine is a namespace that stands for a host, on a bridge with others.
type machine struct {
	t        testing.TB
	ns       string
	instance string
	under    spec.Underlay
	d        *Dataplane
	v6       bool
	vni      uint32
}

// machines makes n hosts, 192.0.2.1 and up, on one bridge. What they make is
// removed at the end, whatever happens.
func machines(t testing.TB, n int) []*machine {
	id := spec.NewID()[:5]
	bridge := "ovt" + id + "br"
	addNetns(t, bridge)
	run(t, "ip -n %s link add br0 type bridge", bridge)
	run(t, "ip -n %s link set br0 up", bridge)
	var out []*machine
	for i := range n {
		m := &machine{t: t, ns: fmt.Sprintf("ovt%sh%d", id, i+1), instance: fmt.Sprintf("ovt%sn%d", id, i+1),
			under: spec.Underlay{Addr: netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), VXLANPort: 4789}, vni: spec.MinVNI + 1}
		addNetns(t, m.ns)
		run(t, "ip -n %s link add u0 type veth peer p%d netns %s", m.ns, i+1, bridge)
		run(t, "ip -n %s addr add %s/24 dev u0", m.ns, m.under.Addr)
		run(t, "ip -n %s link set u0 up", m.ns)
		run(t, "ip -n %s link set p%d master br0 up", bridge, i+1)
		m.d = m.dataplane()
		t.Cleanup(func() {
			m.d.Close()
			d := m.dataplane()
			if err := d.Cleanup(); err != nil {
				t.Error(err)
			}
			for _, ns := range netnsLike(m.instance + "-") {
				if err := nl.Remove(ns); err != nil {
					t.Error(err)
				}
			}
		})
		out = append(out, m)
	}
	return out
}

func addNetns(t testing.TB, name string) {
	t.Helper()
	if err := nl.Create(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := nl.Remove(name); err != nil {
			t.Error(err)
		}
	})
}

func netnsLike(prefix string) []string {
	names, _ := nl.List(prefix)
	return names
}

func (m *machine) dataplane() *Dataplane {
	return New(Config{Instance: m.instance, HostNetns: m.ns})
}

// The World of the conformance suite.

type world struct{ *machine }

func (w world) Dataplane() overlay.Dataplane {
	d := w.dataplane()
	w.t.Cleanup(d.Close)
	return d
}

func (w world) View() *spec.View {
	return overlaytest.Sample(w.instance, w.under, w.vni, w.v6)
}

func (w world) AddSandbox(netns string) {
	w.t.Helper()
	if err := nl.Create(netns); err != nil {
		w.t.Fatal(err)
	}
}

func (w world) DelSandbox(netns string) {
	w.t.Helper()
	// Its devices go at once, not when the kernel gets to it.
	for _, dev := range []string{"eth0", "eth1"} {
		_, _ = try("ip", "-n", netns, "link", "del", dev)
	}
	if err := nl.Remove(netns); err != nil {
		w.t.Fatal(err)
	}
}

func (w world) AddForeign(netns, dev string) {
	run(w.t, "ip -n %s link add %s type bridge", w.d.real(netns), dev)
}
func (w world) DelForeign(netns, dev string) {
	run(w.t, "ip -n %s link del %s", w.d.real(netns), dev)
}

// Break deletes an object with the tools that a person would use.
func (w world) Break(o overlay.Object) bool {
	place, dev := overlay.Place(o)
	ns := w.d.real(place)
	fam := func(a netip.Addr) string {
		if a.Is6() {
			return "-6"
		}
		return "-4"
	}
	switch o := o.(type) {
	case overlay.Forwarding:
		run(w.t, "ip netns exec %s nft add table inet %s { flags dormant ; }", ns, o.Table)
	case overlay.Members:
		run(w.t, "ip netns exec %s nft flush set inet %s peers", ns, o.Table)
	case overlay.Namespace:
		run(w.t, "ip netns del %s", ns)
	case overlay.Sysctl:
		v := map[string]string{"0": "1", "1": "0"}[o.Value]
		if strings.Contains(o.Name, "disable_ipv6") && v == "1" && o.Dev == "" || o.Name == "net.ipv6.conf.all.forwarding" {
			// These take IPv6 addresses and other settings along.
			return false
		}
		run(w.t, "ip netns exec %s sysctl -q -w %s=%s", ns, o.Name, v)
	case overlay.Filter:
		run(w.t, "ip netns exec %s nft delete table inet %s", ns, overlay.FilterTable)
	case overlay.Redirect:
		run(w.t, "ip netns exec %s nft flush chain ip %s output", ns, overlay.TaskTable)
	case overlay.Guard:
		set := "guard"
		if o.Addr.Is6() {
			set = "guard6"
		}
		if _, err := try("ip", "netns", "exec", ns, "nft", "delete", "element", "inet", overlay.FilterTable, set, "{", `"`+o.Dev+`"`, ".", o.Addr.String(), "}"); err != nil {
			w.t.Fatal(err)
		}
	case overlay.VXLAN:
		run(w.t, "ip -n %s link del %s", ns, overlay.VXLANDev)
	case overlay.Egress:
		run(w.t, "ip -n %s link del %s", ns, overlay.OutDev)
	case overlay.Port:
		run(w.t, "ip -n %s link del %s", o.TaskNetns, o.Eth)
	case overlay.Addr:
		run(w.t, "ip -n %s addr del %s dev %s", ns, o.Prefix, dev)
	case overlay.Neigh:
		run(w.t, "ip -n %s neigh del %s dev %s", ns, o.Addr, dev)
	case overlay.FDB:
		run(w.t, "bridge -n %s fdb del %s dev vx dst %s self", ns, o.MAC, o.Dst)
	case overlay.Route:
		typ := o.Type
		run(w.t, "ip -n %s %s route del %s %s metric %d", ns, fam(o.Dst.Addr()), typ, o.Dst, o.Metric)
	default:
		return false
	}
	return true
}

func (w world) Empty(t *testing.T) {
	t.Helper()
	if left := netnsLike(w.instance + "-net-"); len(left) != 0 {
		t.Errorf("namespaces left: %v", left)
	}
	if links := run(t, "ip -n %s -o link", w.ns); strings.Contains(links, overlay.HostPrefix) || strings.Contains(links, overlay.TempPrefix) {
		t.Errorf("devices left on the host: %s", links)
	}
	if rules := run(t, "ip netns exec %s nft list ruleset", w.ns); strings.TrimSpace(rules) != "" {
		t.Errorf("nftables left on the host: %s", rules)
	}
}

func TestKernelConforms(t *testing.T) {
	needKernel(t)
	overlaytest.Run(t, func(t *testing.T, v6 bool) overlaytest.World {
		m := machines(t, 1)[0]
		m.v6 = v6
		w := world{m}
		for _, s := range w.View().Sandboxes {
			w.AddSandbox(s.Netns)
		}
		return w
	})
}
