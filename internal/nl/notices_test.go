package nl

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// testSpace is a namespace of the test's own.
func testSpace(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	ns := "t-" + spec.NewID()
	if err := Create(ns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Remove(ns) })
	return ns
}

// TestNotices: what changes in a namespace differs in the next stamp, as its kind
// and of its table, and nothing else does; also when the name has come to stand
// for another namespace.
func TestNotices(t *testing.T) {
	host, ns := testSpace(t), testSpace(t)
	n, err := Listen(host, "lo:vip")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	woken := make(chan []Change, 100)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx, func(c []Change) { woken <- c }) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	at := func(ns string) Stamp {
		s, ok := n.At(ns, "shoal-t")
		if !ok {
			t.Fatalf("no stamp of %s", ns)
		}
		return s
	}
	run := func(line string) {
		t.Helper()
		line = strings.NewReplacer("NS", ns, "HOST", host).Replace(line)
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	nft := func(s string) string { return "ip netns exec NS nft '" + s + "'" }
	// Without an address of the link's own, which comes when the kernel gets round to it.
	run("ip -n NS link add d0 type bridge && ip -n NS link set d0 addrgenmode none up && ip -n NS link set lo up")
	run(nft("table inet shoal-t { set a { type ipv4_addr; }; set b { type ipv4_addr; }; chain c { }; chain d { }; }"))
	run(nft("table inet other { chain c { }; }"))
	if at(ns).Since(Stamp{}) != AllKinds || !at(ns).Table(Stamp{}) {
		t.Error("nothing changed since the zero stamp")
	}
	type what struct {
		kinds       Kind
		table, form bool
		chain, set  string
	}
	for _, c := range []struct {
		do   string
		want what
	}{
		{"true", what{}},
		{"ip -n NS addr add 192.0.2.1/24 dev d0", what{kinds: Addrs | Routes}}, // the connected one
		{"ip -n NS route add 198.51.100.0/24 via 192.0.2.2", what{kinds: Routes}},
		{"ip -n NS route add unreachable 198.51.101.0/24 table 77", what{kinds: Routes}},
		{"ip -n NS addr add 192.0.2.9/32 dev lo scope host label lo:vip", what{kinds: VIPs}}, // with its entry in table local
		{"ip -n NS addr add 192.0.2.10/32 dev lo scope host label lo:other", what{kinds: Addrs | Routes}},
		{"ip -n NS addr add 192.0.2.11/32 dev lo label lo:vip", what{kinds: Addrs | Routes}}, // of another scope
		{"ip -n NS route del local 192.0.2.9 dev lo table local", what{kinds: Routes}},
		{"ip -n NS route add local 192.0.2.12 dev lo table local proto kernel scope host", what{kinds: Routes}},
		{"ip -n NS addr del 192.0.2.9/32 dev lo label lo:vip", what{kinds: Addrs}}, // its entry was gone
		{"ip -n NS neigh add 192.0.2.3 lladdr 02:00:00:00:00:01 dev d0", what{kinds: Neighs}},
		{"ip -n NS rule add fwmark 1 lookup 77", what{kinds: Policies}},
		{"ip -n NS link set d0 mtu 1400", what{kinds: Links}},
		{"ip -n NS link set d0 alias 'shoal x'", what{kinds: Links}},
		{"ip netns exec NS sysctl -qw net.ipv4.conf.d0.forwarding=1", what{kinds: Netconf}},
		{nft("add element inet shoal-t a { 10.0.0.1 }"), what{table: true, set: "a"}},
		{nft("add rule inet shoal-t c accept"), what{table: true, chain: "c"}},
		{nft("add chain inet shoal-t e"), what{table: true, form: true}},
		{nft("add table inet shoal-t { flags dormant ; }"), what{table: true, form: true}},
		{nft("add rule inet other c accept"), what{}},
		{nft("flush ruleset"), what{table: true, form: true}},
		{"ip netns exec HOST ip link add h0 type bridge", what{}},
	} {
		before := at(ns)
		run(c.do)
		s := at(ns)
		got := what{s.Since(before), s.Table(before), s.TableForm(before), "", ""}
		for _, x := range []string{"c", "d"} {
			if s.Rules(before, x) {
				got.chain += x
			}
		}
		for _, x := range []string{"a", "b"} {
			if s.Elems(before, x) {
				got.set += x
			}
		}
		if c.want.form { // says nothing of the parts
			got.chain, got.set = "", ""
		}
		// A device that is changed has its qdiscs and settings told of as well.
		if c.want.kinds != 0 {
			got.kinds &^= (Netconf | Qdiscs | Links) &^ c.want.kinds
		}
		if got != c.want {
			t.Errorf("%s: noticed %+v, want %+v", c.do, got, c.want)
		}
	}
	if s := at(""); s.Since(Stamp{}) != AllKinds {
		t.Error("the host is not followed")
	}
	before := at("")
	run("ip -n HOST link del h0")
	if at("").Since(before)&Links == 0 {
		t.Error("a change of the host was not noticed")
	}
	heard := map[Change]bool{}
	wanted := []Change{{ns, ""}, {ns, "shoal-t"}, {ns, "other"}, {"", ""}}
	lacks := func(c Change) bool { return !heard[c] }
	for limit := time.After(10 * time.Second); slices.ContainsFunc(wanted, lacks); {
		select {
		case changes := <-woken:
			for _, c := range changes {
				heard[c] = true
			}
		case <-limit:
			t.Fatalf("Run has told of changes in %v, want %v", heard, wanted)
		}
	}

	before = at(ns)
	run("ip netns del NS && ip netns add NS")
	if s := at(ns); s.Since(before) != AllKinds || !s.Table(before) {
		t.Error("another namespace of the same name was taken for the old one")
	}
	before = at(ns)
	run("ip -n NS link set lo up")
	if at(ns).Since(before)&Links == 0 {
		t.Error("a change of the new namespace was not noticed")
	}
	if _, ok := n.At("t-absent", ""); ok {
		t.Error("a stamp of a namespace that does not exist")
	}
	var none *Notices
	if _, ok := none.At(ns, ""); ok {
		t.Error("no Notices give stamps")
	}
}

// TestNoticesLost: when more happened than the socket holds, everything counts as
// changed.
func TestNoticesLost(t *testing.T) {
	ns := testSpace(t)
	n, err := Listen(ns, "")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	before, _ := n.At(ns, "x")
	var b strings.Builder
	for i := range 60000 {
		fmt.Fprintf(&b, "route add unreachable 10.%d.%d.%d/32\n", i>>16, i>>8&255, i&255)
	}
	cmd := exec.Command("ip", "-n", ns, "-batch", "-")
	cmd.Stdin = strings.NewReader(b.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %.300s", err, out)
	}
	if s, _ := n.At(ns, "x"); s.Since(before) != AllKinds || !s.Table(before) {
		t.Errorf("notices were lost, and only %b changed", s.Since(before))
	}
}
