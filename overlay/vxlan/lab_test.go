package vxlan

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

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
	n, err := nl.Listen(m.ns, overlay.VIPLabel)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(n.Close)
	return New(Config{Instance: m.instance, HostNetns: m.ns, Notices: n})
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
		v := map[string]string{"0": "1", "1": "0", "8": "0"}[o.Value]
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
	// The kernel clears a namespace away later, and the host's end of its devices
	// with it (netns(7): a workqueue).
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		links := run(t, "ip -n %s -o link", w.ns)
		if !strings.Contains(links, overlay.HostPrefix) && !strings.Contains(links, overlay.TempPrefix) {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("devices left on the host: %s", links)
			break
		}
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

// converged gives a machine all that its View asks for, by a Dataplane of its own.
func converged(t *testing.T, m *machine) (*machine, *Dataplane, overlay.State) {
	t.Helper()
	w := world{m}
	v := w.View()
	for _, s := range v.Sandboxes {
		w.AddSandbox(s.Netns)
	}
	want, d := overlay.Desired(v), m.dataplane()
	t.Cleanup(d.Close)
	overlaytest.Converge(t, d, want)
	return m, d, want
}

// TestCorrupted: what is changed by hand rather than deleted is as it was after
// one pass, and so is what the kernel has on our account.
func TestCorrupted(t *testing.T) {
	needKernel(t)
	m, d, want := converged(t, machines(t, 1)[0])
	var (
		ovns, task, host, eth, port, out string
		remote                           overlay.Route
		fdb                              overlay.FDB
		guard                            overlay.Guard
		metric                           int
	)
	for _, o := range want.Objects() {
		switch o := o.(type) {
		case overlay.Port:
			if o.Network == overlaytest.NetApp {
				ovns, task, eth, port = o.Netns, o.TaskNetns, o.Eth, o.Dev
			}
		case overlay.Egress:
			out = o.Dev
		}
	}
	for _, o := range want.Objects() {
		switch o := o.(type) {
		case overlay.Route:
			if o.Netns == ovns && o.Dev == overlay.VXLANDev {
				remote = o
			}
			if o.Netns == task && o.Dst.Bits() == 0 {
				metric = o.Metric
			}
		case overlay.FDB:
			if o.Netns == ovns {
				fdb = o
			}
		case overlay.Guard:
			if o.Netns == ovns && o.Dev == port {
				guard = o
			}
		}
	}
	host = m.ns
	volatile := regexp.MustCompile(`^\d+: |@if\d+|link-netnsid \d+|^(sho|out)\S* .*`)
	whole := func() string {
		var b strings.Builder
		for _, ns := range []string{host, ovns, task} {
			x, _ := try("ip", "netns", "exec", ns, "sh", "-c", "ip -o -4 addr; ip route; ip neigh show nud permanent; bridge fdb show dev vx; ip -br link; nft list ruleset")
			ls := strings.Split(x, "\n")
			for i := range ls { // without indexes, random MAC addresses and columns
				ls[i] = volatile.ReplaceAllString(strings.Join(strings.Fields(ls[i]), " "), "")
			}
			slices.Sort(ls)
			b.WriteString(ns + "\n" + strings.Join(ls, "\n") + "\n")
		}
		return b.String()
	}
	before := whole()
	for _, line := range []string{
		"ip -n OVNS route replace REMOTE via 169.254.64.99 dev vx onlink", // and not ours any more
		"ip -n OVNS route replace REMOTE via 169.254.64.99 dev vx onlink proto 83",
		"ip -n OVNS route replace blackhole REMOTE proto 83",
		"ip -n OVNS route flush table main",
		"ip -n HOST route flush dev OUT",
		"ip -n TASK route replace default dev ETH metric METRIC",
		"ip -n TASK route flush table main",
		"ip -n TASK link set lo down",
		"ip -n TASK addr flush dev lo",
		"ip -n TASK link set ETH down name foo",
		"ip -n OVNS link set vx down name foo",
		"ip -n OVNS link set vx netns HOST",
		"ip -n OVNS link set out down name foo",
		"ip -n OVNS link set PORT down name foo",
		"ip -n HOST link set OUT down name foo",
		"bridge -n OVNS fdb replace MAC dev vx dst 192.0.2.99 self permanent",
		"bridge -n OVNS fdb replace MAC dev vx dst DST vni 77 self permanent",
		"ip netns exec OVNS nft add element inet shoal-overlay guard {PORT . 192.0.2.1}",
		"ip netns exec OVNS nft add element inet shoal-overlay locals {192.0.2.1}",
		"ip netns exec OVNS nft delete element inet shoal-overlay locals {GUARD}",
		"ip netns exec OVNS nft insert rule inet shoal-overlay forward drop",
		"ip netns exec OVNS nft add table inet shoal-overlay {flags dormant;}",
		"ip netns exec TASK nft add table ip shoal {flags dormant;}",
	} {
		line = strings.NewReplacer("OVNS", ovns, "TASK", task, "HOST", host, "REMOTE", remote.Dst.Addr().String(), "ETH", eth, "PORT", port,
			"OUT", out, "MAC", fdb.MAC, "DST", fdb.Dst.String(), "METRIC", fmt.Sprint(metric), "GUARD", guard.Addr.String()).Replace(line)
		run(t, "%s", line)
		if ops, err := overlaytest.Pass(t, d, want); err != nil || len(ops) == 0 {
			t.Errorf("%s: %v: %v", line, ops, err)
		}
		if ops := overlaytest.Plan(t, d, want); len(ops) != 0 {
			t.Errorf("%s: one pass leaves %v", line, ops)
		}
		if now := whole(); now != before {
			t.Errorf("%s: missing %q, new %q", line, lacking(before, now), lacking(now, before))
			before = now
		}
	}
}

// lacking are the lines of a that b has not.
func lacking(a, b string) (out []string) {
	have := strings.Split(b, "\n")
	for l := range strings.SplitSeq(a, "\n") {
		if !slices.Contains(have, l) {
			out = append(out, l)
		}
	}
	return out
}

// TestNothingNew: what was read of a kernel in which nothing happened is what it was, and
// whatever happens there makes it another.
func TestNothingNew(t *testing.T) {
	needKernel(t)
	m, d, want := converged(t, machines(t, 1)[0])
	look := func() overlay.State {
		t.Helper()
		have, err := d.Observe(t.Context(), want)
		if err != nil {
			t.Fatal(err)
		}
		return have
	}
	// The kernel tells of some things later, such as of IPv6 addresses.
	settled := func() (have overlay.State) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if was := have; look().Is(was) {
				return was
			}
			if have = look(); time.Now().After(end) {
				t.Fatal("always another, though nothing happens")
			}
		}
	}
	have := settled()
	if ops, _ := overlay.Diff(want, have, time.Now()); len(ops) > 0 {
		t.Fatalf("left to do: %v", ops)
	}
	var ovns, task string
	for _, o := range want.Objects() {
		if p, ok := o.(overlay.Port); ok {
			ovns, task = p.Netns, p.TaskNetns
		}
	}
	for _, line := range []string{
		"ip -n " + ovns + " addr add 10.99.0.1/32 dev lo",
		"ip netns exec " + ovns + " sysctl -q -w net.ipv4.conf.all.rp_filter=2", // of which there is no notice
		"ip netns exec " + m.ns + " sysctl -q -w net.ipv4.ip_forward=0",
		"ip -n " + task + " link set lo down",
		"ip netns del " + ovns,
	} {
		run(t, "%s", line)
		if now := look(); now.Is(have) || now.Alike(have) {
			t.Errorf("%s: nothing new", line)
		}
		overlaytest.Converge(t, d, want)
		have = settled()
	}
}
