package nl

import (
	"net/netip"
	"os/exec"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLoAddrs(t *testing.T) {
	ns := testSpace(t)
	for _, line := range []string{
		"ip link set lo up",
		"ip link add d0 type bridge", "ip addr add 192.0.2.1/24 dev d0", // of another device
		"ip addr add 10.0.0.2/32 dev lo label lo:vip", "ip addr add 10.0.0.3/31 dev lo", "ip addr add 10.0.0.4 peer 10.0.0.5/32 dev lo",
		"ip addr add fd00::2/128 dev lo nodad",
	} {
		if out, err := exec.Command("sh", "-c", "ip netns exec "+ns+" "+line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	a := func(s, label string) Addr { return Addr{netip.MustParsePrefix(s), label} }
	v4 := []Addr{a("127.0.0.1/8", "lo"), a("10.0.0.2/32", "lo:vip"), a("10.0.0.3/31", "lo"), a("10.0.0.4/32", "lo")}
	v6 := []Addr{a("::1/128", ""), a("fd00::2/128", "")}
	for family, want := range map[int][]Addr{unix.AF_INET: v4, unix.AF_INET6: v6, unix.AF_UNSPEC: append(slices.Clone(v4), v6...)} {
		var got []Addr
		if err := Do(ns, func() (err error) { got, err = LoAddrs(family); return err }); err != nil {
			t.Fatal(err)
		}
		order := func(x, y Addr) int { return x.Addr().Compare(y.Addr()) }
		slices.SortFunc(got, order)
		slices.SortFunc(want, order)
		if !slices.Equal(got, want) {
			t.Errorf("family %d: got %v, want %v", family, got, want)
		}
	}
}
