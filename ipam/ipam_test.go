package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

var pfx = netip.MustParsePrefix
var ip = netip.MustParseAddr

// naive is the model: it looks at every address, one after another.
type naive struct {
	order  []netip.Addr // what next-fit may give, in order, reserved left out
	all    map[netip.Addr]string
	subnet netip.Prefix
	cursor netip.Addr
}

func newNaive(subnet netip.Prefix, ranges []netip.Prefix, reserved map[netip.Addr]string) *naive {
	m := &naive{all: map[netip.Addr]string{}, subnet: subnet}
	for a := subnet.Addr(); subnet.Contains(a); a = a.Next() {
		switch {
		case a == subnet.Addr():
			m.all[a] = "first"
		case subnet.Addr().Is4() && !subnet.Contains(a.Next()):
			m.all[a] = "broadcast"
		case reserved[a] != "":
			m.all[a] = reserved[a]
		}
		in := len(ranges) == 0
		for _, r := range ranges {
			in = in || r.Contains(a)
		}
		if in && m.all[a] == "" {
			m.order = append(m.order, a)
		}
	}
	return m
}

func (m *naive) next(holder string) (netip.Addr, bool) {
	after := slices.IndexFunc(m.order, func(a netip.Addr) bool { return m.cursor.IsValid() && m.cursor.Less(a) })
	if after < 0 {
		after = 0
	}
	for i := range m.order {
		if a := m.order[(after+i)%len(m.order)]; m.all[a] == "" {
			m.all[a], m.cursor = holder, a
			return a, true
		}
	}
	return netip.Addr{}, false
}

func TestSpaceAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var subnet netip.Prefix
		if rapid.Bool().Draw(t, "v6") {
			subnet = netip.PrefixFrom(ip("fd00:1::"), rapid.IntRange(115, 126).Draw(t, "bits")).Masked()
		} else {
			subnet = netip.PrefixFrom(ip("10.1.128.0"), rapid.IntRange(18, 30).Draw(t, "bits")).Masked()
		}
		host := subnet.Addr().BitLen() - subnet.Bits()
		any := rapid.Custom(func(t *rapid.T) netip.Addr {
			return add(subnet.Addr(), rapid.IntRange(0, 1<<host-1).Draw(t, "off"))
		})
		var ranges []netip.Prefix
		for range rapid.IntRange(0, 3).Draw(t, "ranges") {
			r := netip.PrefixFrom(any.Draw(t, "range"), subnet.Bits()+rapid.IntRange(1, host).Draw(t, "longer")).Masked()
			if !slices.ContainsFunc(ranges, r.Overlaps) {
				ranges = append(ranges, r)
			}
		}
		reserved := map[netip.Addr]string{any.Draw(t, "gateway"): "the gateway"}
		s, err := NewSpace(subnet, ranges, reserved)
		if err != nil {
			t.Fatal(err)
		}
		m := newNaive(subnet, ranges, reserved)
		given := map[netip.Addr]string{}
		var list []netip.Addr
		n := 0
		fill := rapid.IntRange(0, 40).Draw(t, "burst")
		t.Repeat(map[string]func(*rapid.T){
			"next": func(t *rapid.T) {
				for range fill + 1 {
					n++
					h := fmt.Sprint("h", n)
					got, err := s.Next(h)
					want, ok := m.next(h)
					if got != want || (err == nil) != ok {
						t.Fatalf("Next: got %v, %v; model %v, %v", got, err, want, ok)
					}
					if err != nil {
						var full *FullError
						if !errors.As(err, &full) || full.InUse != len(m.order) || s.Free() != 0 {
							t.Fatalf("full: %v (model has %d), %d free", err, len(m.order), s.Free())
						}
						return
					}
					given[got] = h
					list = append(list, got)
				}
			},
			"take": func(t *rapid.T) {
				a := any.Draw(t, "addr")
				n++
				h := fmt.Sprint("h", n)
				err := s.Take(a, h)
				if free := m.all[a] == ""; free != (err == nil) {
					t.Fatalf("Take(%s): %v; model says free: %v", a, err, free)
				}
				var taken *TakenError
				switch {
				case err == nil:
					m.all[a], given[a] = h, h
					list = append(list, a)
				case !errors.As(err, &taken):
					t.Fatal(err)
				case given[a] != "" && taken.Holder != given[a]:
					t.Fatalf("%v: want holder %s", err, given[a])
				}
			},
			"release": func(t *rapid.T) {
				for range fill {
					if len(list) == 0 {
						return
					}
					i := rapid.IntRange(0, len(list)-1).Draw(t, "which")
					a := list[i]
					if s.Release(a, "another") {
						t.Fatal("released for another holder")
					}
					if !s.Release(a, given[a]) {
						t.Fatal("not released")
					}
					delete(m.all, a)
					delete(given, a)
					list = slices.Delete(list, i, i+1)
				}
			},
			"restore": func(t *rapid.T) {
				r, err := NewSpace(subnet, ranges, reserved)
				if err != nil {
					t.Fatal(err)
				}
				for a, h := range given {
					if err := r.Take(a, h); err != nil {
						t.Fatal(err)
					}
				}
				r.SetCursor(s.Cursor())
				s = r
			},
			"": func(t *rapid.T) {
				if s.InUse() != len(given) {
					t.Fatalf("InUse %d, want %d", s.InUse(), len(given))
				}
				free := 0
				for _, a := range m.order {
					if m.all[a] == "" {
						free++
					}
				}
				if s.Free() != free {
					t.Fatalf("Free %d, want %d", s.Free(), free)
				}
			},
		})
	})
}

func TestSpaceErrors(t *testing.T) {
	s, err := NewSpace(pfx("10.0.1.0/30"), nil, map[netip.Addr]string{ip("10.0.1.1"): "the gateway"})
	if err != nil {
		t.Fatal(err)
	}
	if a, err := s.Next("task c1"); err != nil || a != ip("10.0.1.2") {
		t.Fatal(a, err)
	}
	r, err := NewSpace(pfx("10.0.2.0/24"), []netip.Prefix{pfx("10.0.2.8/32")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Next("x"); err != nil {
		t.Fatal(err)
	}
	_, full := s.Next("task c2")
	_, fullRange := r.Next("y")
	for _, c := range []struct {
		err  error
		want string
	}{
		{full, "subnet 10.0.1.0/30 has no free address: all 1 are in use: remove tasks or services from the network, or create one with a larger subnet"},
		{fullRange, "ip range 10.0.2.8/32 of subnet 10.0.2.0/24 has no free address: all 1 are in use: remove tasks or services from the network, or create one with a larger subnet"},
		{s.Take(ip("10.0.1.2"), "task c2"), "address 10.0.1.2 is taken by task c1"},
		{s.Take(ip("10.0.1.1"), "task c2"), "address 10.0.1.1 is taken by the gateway"},
		{s.Take(ip("10.0.1.0"), "task c2"), "address 10.0.1.0 is taken by the network address"},
		{s.Take(ip("10.0.1.3"), "task c2"), "address 10.0.1.3 is taken by the broadcast address"},
		{s.Take(ip("10.0.2.3"), "task c2"), "address 10.0.2.3 is not in subnet 10.0.1.0/30"},
		{newSpaceErr(pfx("10.0.1.0/24"), pfx("10.0.2.0/28")), "ip range 10.0.2.0/28 is not in subnet 10.0.1.0/24"},
		{newSpaceErr(pfx("10.0.1.0/24"), pfx("10.0.1.3/28")), "ip range 10.0.1.3/28 has host bits set: did you mean 10.0.1.0/28"},
		{newSpaceErr(pfx("10.0.1.0/24"), pfx("10.0.1.0/25"), pfx("10.0.1.64/26")), "ip ranges 10.0.1.0/25 and 10.0.1.64/26 overlap"},
	} {
		if c.err == nil || c.err.Error() != c.want {
			t.Errorf("got  %v\nwant %s", c.err, c.want)
		}
	}
}

func newSpaceErr(s netip.Prefix, ranges ...netip.Prefix) error {
	_, err := NewSpace(s, ranges, nil)
	return err
}

// An IPv6 /64 has more addresses than an int counts; next-fit keeps to its
// window, and an address beyond can be asked for.
func TestSpaceHuge(t *testing.T) {
	s, err := NewSpace(pfx("fd00::/64"), nil, map[netip.Addr]string{ip("fd00::1"): "the gateway"})
	if err != nil {
		t.Fatal(err)
	}
	if a, _ := s.Next("a"); a != ip("fd00::2") {
		t.Fatal(a)
	}
	far := ip("fd00::ffff:ffff:ffff:fffe")
	if err := s.Take(far, "b"); err != nil {
		t.Fatal(err)
	}
	if err := s.Take(far, "c"); err == nil {
		t.Fatal("given twice")
	}
	if !s.Release(far, "b") || s.InUse() != 1 {
		t.Fatal(s.InUse())
	}
	s.SetCursor(ip("fd00::ff:fffe"))
	a, _ := s.Next("d")
	b, _ := s.Next("e")
	if a != ip("fd00::ff:ffff") || b != ip("fd00::3") {
		t.Fatal(a, b)
	}
}

func naiveSubnet(pools []netip.Prefix, bits int, last netip.Prefix, taken []Block) (netip.Prefix, bool) {
	var all []netip.Prefix
	for _, p := range pools {
		b := bitsFor(p, bits)
		for a := p.Addr(); a.IsValid() && p.Contains(a); {
			s := netip.PrefixFrom(a, b)
			all = append(all, s)
			a = Last(s).Next()
		}
	}
	start := 0
	for pi, p := range pools {
		if last.IsValid() && p.Contains(last.Addr()) {
			start = len(all) // behind the pool's last: the next pool
			for i, s := range all {
				poolOf := slices.IndexFunc(pools, func(q netip.Prefix) bool { return q.Contains(s.Addr()) })
				if poolOf > pi || (poolOf == pi && Last(last).Less(s.Addr())) {
					start = i
					break
				}
			}
			break
		}
	}
	for i := range all {
		s := all[(start+i)%len(all)]
		if !slices.ContainsFunc(taken, func(t Block) bool { return t.Prefix.Overlaps(s) }) {
			return s, true
		}
	}
	return netip.Prefix{}, false
}

func checkNextSubnet(t interface{ Fatalf(string, ...any) }, pools []netip.Prefix, bits int, last netip.Prefix, taken []Block) {
	got, err := NextSubnet(pools, bits, last, taken)
	want, ok := naiveSubnet(pools, bits, last, taken)
	if got != want || (err == nil) != ok {
		t.Fatalf("NextSubnet(%v, %d, %v, %v) = %v, %v; model %v, %v", pools, bits, last, taken, got, err, want, ok)
	}
	if err == nil {
		if e := CheckSubnet(got, taken); e != nil {
			t.Fatalf("%v", e)
		}
	}
}

func TestNextSubnetAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pools := []netip.Prefix{pfx("10.1.0.0/20"), pfx("10.0.240.0/21"), pfx("fd00::/60"), pfx("255.255.252.0/22")}
		pools = pools[:rapid.IntRange(1, len(pools)).Draw(t, "pools")]
		bits := rapid.IntRange(22, 26).Draw(t, "bits")
		draw := func(label string, minBits int) netip.Prefix {
			p := pools[rapid.IntRange(0, len(pools)-1).Draw(t, label+" pool")]
			host := p.Addr().BitLen() - p.Bits()
			off := rapid.Uint64().Draw(t, label+" off")
			b := p.Addr().As16()
			for i := range min(host, 64) {
				if off>>i&1 == 1 {
					b[15-i/8] |= 1 << (i % 8)
				}
			}
			a := netip.AddrFrom16(b)
			if p.Addr().Is4() {
				a = a.Unmap()
			}
			return netip.PrefixFrom(a, rapid.IntRange(max(0, p.Bits()+minBits), min(a.BitLen(), p.Bits()+8)).Draw(t, label+" bits")).Masked()
		}
		var taken []Block
		for range rapid.IntRange(0, 60).Draw(t, "taken") {
			taken = append(taken, Block{Prefix: draw("taken", -1)})
		}
		var last netip.Prefix
		if rapid.Bool().Draw(t, "has last") {
			last = draw("last", 0)
		}
		checkNextSubnet(t, pools, bits, last, taken)
	})
}

func FuzzNextSubnet(f *testing.F) {
	f.Add([]byte{10, 0, 0, 0, 9, 10, 1, 2, 0, 24}, uint16(5))
	f.Fuzz(func(t *testing.T, b []byte, last uint16) {
		var taken []Block
		for ; len(b) >= 5 && len(taken) < 64; b = b[5:] {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, b[1] & 15, b[2], b[3]}), int(b[4]%33)).Masked()
			taken = append(taken, Block{Prefix: p, Reason: Reason(b[0] % 3)})
		}
		from := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(last>>8) & 31, byte(last), 0}), 24)
		checkNextSubnet(t, []netip.Prefix{pfx("10.0.0.0/12"), pfx("10.16.0.0/14")}, 24, from, taken)
	})
}

func FuzzSpace(f *testing.F) {
	f.Add([]byte("nnnnrn\x00tn"))
	f.Fuzz(func(t *testing.T, ops []byte) {
		sub := pfx("10.0.0.0/25")
		ranges := []netip.Prefix{pfx("10.0.0.96/28"), pfx("10.0.0.32/27")}
		res := map[netip.Addr]string{ip("10.0.0.33"): "the gateway"}
		s, err := NewSpace(sub, ranges, res)
		if err != nil {
			t.Fatal(err)
		}
		m := newNaive(sub, ranges, res)
		for i, op := range ops {
			a := netip.AddrFrom4([4]byte{10, 0, 0, op & 127})
			h := fmt.Sprint(i)
			switch op >> 6 {
			case 0, 1:
				got, err := s.Next(h)
				want, ok := m.next(h)
				if got != want || ok != (err == nil) {
					t.Fatalf("op %d: %v %v, model %v", i, got, err, want)
				}
			case 2:
				if err := s.Take(a, h); (err == nil) != (m.all[a] == "") {
					t.Fatal(i, a, err)
				} else if err == nil {
					m.all[a] = h
				}
			case 3:
				if s.Release(a, m.all[a]) && a != sub.Addr() {
					delete(m.all, a)
				}
			}
		}
	})
}

func TestSubnetErrors(t *testing.T) {
	taken := []Block{
		{pfx("10.0.1.0/24"), ByNetwork, "app"},
		{pfx("10.0.2.0/23"), ByHostRoute, ""},
		{pfx("10.0.0.5/32"), ByReserved, "address of node n1"},
	}
	_, none := NextSubnet([]netip.Prefix{pfx("10.0.0.0/22")}, 24, netip.Prefix{}, taken)
	_, nopool := NextSubnet(nil, 24, netip.Prefix{}, taken)
	for _, c := range []struct {
		err  error
		want string
	}{
		{none, "no free /24 subnet in pool 10.0.0.0/22: 1 are taken by networks, and 2 host routes or reserved ranges lie in it: remove networks, or give a --subnet outside of the pool"},
		{nopool, "no address pool of this family: give --subnet"},
		{CheckSubnet(pfx("10.0.1.128/25"), taken), "subnet 10.0.1.128/25 overlaps 10.0.1.0/24 of network app: choose another with --subnet, or leave it out to have one chosen"},
		{CheckSubnet(pfx("10.0.3.0/24"), taken), "subnet 10.0.3.0/24 overlaps the host's route to 10.0.2.0/23: tasks would cut the host off from it: choose another with --subnet, or leave it out to have one chosen"},
		{CheckSubnet(pfx("10.0.0.0/16"), taken), "subnet 10.0.0.0/16 overlaps 10.0.0.5/32, which is reserved (address of node n1): choose another"},
		{ValidatePools(nil, 24), "no address pool"},
		{ValidatePools([]netip.Prefix{pfx("10.1.2.3/8")}, 24), "address pool 10.1.2.3/8 has host bits set: did you mean 10.0.0.0/8"},
		{ValidatePools([]netip.Prefix{pfx("10.0.0.0/25")}, 24), "address pool 10.0.0.0/25 is smaller than one subnet of size /24"},
		{ValidatePools([]netip.Prefix{pfx("10.0.0.0/8"), pfx("10.3.0.0/16")}, 24), "address pools 10.0.0.0/8 and 10.3.0.0/16 overlap"},
		{ValidatePools([]netip.Prefix{pfx("10.0.0.0/8")}, 31), "subnet size 31: use a prefix length from 8 to 30"},
		{ValidatePools([]netip.Prefix{pfx("128.0.0.0/1")}, 24), "address pool 128.0.0.0/1 holds reserved address space: use a prefix length of 8 or more"},
	} {
		if c.err == nil || c.err.Error() != c.want {
			t.Errorf("got  %v\nwant %s", c.err, c.want)
		}
	}
	if err := ValidatePools([]netip.Prefix{DefaultPool, pfx("fd00::/48")}, DefaultBits); err != nil {
		t.Error(err)
	}
	if err := CheckSubnet(pfx("10.0.4.0/24"), taken); err != nil {
		t.Error(err)
	}
}

// BenchmarkSpaceFull gives the only free address of a /16 again and again: the
// worst case of next-fit, a whole round each.
func BenchmarkSpaceFull(b *testing.B) {
	s, _ := NewSpace(pfx("10.1.0.0/16"), nil, nil)
	var last netip.Addr
	for {
		a, err := s.Next("x")
		if err != nil {
			break
		}
		last = a
	}
	b.ReportMetric(float64(s.InUse()), "in-use")
	for b.Loop() {
		s.Release(last, "x")
		if _, err := s.Next("x"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSpaceFill16(b *testing.B) {
	for b.Loop() {
		s, _ := NewSpace(pfx("10.1.0.0/16"), nil, nil)
		for {
			if _, err := s.Next("x"); err != nil {
				break
			}
		}
	}
}

func BenchmarkNextSubnet10k(b *testing.B) {
	var taken []Block
	for i := range 10000 {
		taken = append(taken, Block{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)})
	}
	for b.Loop() {
		if _, err := NextSubnet([]netip.Prefix{DefaultPool}, 24, netip.Prefix{}, taken); err != nil {
			b.Fatal(err)
		}
	}
}
