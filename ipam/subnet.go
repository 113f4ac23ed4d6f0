package ipam

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// DefaultPool and DefaultBits are Docker Swarm's: a /24 per network out of
// 10.0.0.0/8.
var DefaultPool = netip.MustParsePrefix("10.0.0.0/8")

const (
	DefaultBits = 24
	// Bits6 is the prefix length of subnets cut from IPv6 pools, the one length
	// that every IPv6 host expects (RFC 7421).
	Bits6 = 64
)

// Block is a prefix that can't be given out, and why.
type Block struct {
	Prefix netip.Prefix
	Reason Reason
	Holder string // the network's name, or what the range is reserved for
}

// ValidatePools reports the first thing wrong with the pools of a cluster whose
// IPv4 subnets have the prefix length bits.
func ValidatePools(pools []netip.Prefix, bits int) error {
	if len(pools) == 0 {
		return fmt.Errorf("no address pool")
	}
	if bits < 8 || bits > 30 {
		return fmt.Errorf("subnet size %d: use a prefix length from 8 to 30", bits)
	}
	for i, p := range pools {
		if !p.IsValid() {
			return fmt.Errorf("address pool is not an address and a prefix length like 10.0.0.0/8")
		}
		if p != p.Masked() {
			return fmt.Errorf("address pool %s has host bits set: did you mean %s", p, p.Masked())
		}
		if p.Addr().Is4() && p.Bits() < 8 {
			return fmt.Errorf("address pool %s holds reserved address space: use a prefix length of 8 or more", p)
		}
		b := bitsFor(p, bits)
		if p.Bits() > b {
			return fmt.Errorf("address pool %s is smaller than one subnet of size /%d", p, b)
		}
		// A /24 at the start of the pool stands for all of its subnets.
		if err := spec.ValidateSubnet(netip.PrefixFrom(p.Addr(), b)); err != nil {
			return fmt.Errorf("address pool %s: %w", p, err)
		}
		for _, q := range pools[:i] {
			if p.Overlaps(q) {
				return fmt.Errorf("address pools %s and %s overlap", q, p)
			}
		}
	}
	return nil
}

func bitsFor(pool netip.Prefix, bits int) int {
	if pool.Addr().Is4() {
		return bits
	}
	return Bits6
}

// CheckSubnet returns an *[OverlapError] naming the first block (by address)
// that p overlaps.
func CheckSubnet(p netip.Prefix, taken []Block) error {
	var hit *Block
	for i := range taken {
		if t := &taken[i]; t.Prefix.Overlaps(p) && (hit == nil || compareBlocks(*t, *hit) < 0) {
			hit = t
		}
	}
	if hit != nil {
		return &OverlapError{p, *hit}
	}
	return nil
}

func compareBlocks(a, b Block) int {
	return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()),
		cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Holder, b.Holder))
}

// interval is an inclusive range of addresses of one family.
type interval struct{ lo, hi netip.Addr }

// NextSubnet returns the first free subnet behind the subnet last, going
// through the pools in their order and round to the start; the zero last starts
// at the first pool. Subnets have the prefix length bits in IPv4 pools and
// [Bits6] in IPv6 pools, and overlap no block of taken. Without one it returns a
// *[NoSubnetError].
func NextSubnet(pools []netip.Prefix, bits int, last netip.Prefix, taken []Block) (netip.Prefix, error) {
	busy := make([]interval, 0, len(taken))
	for _, t := range taken {
		if t.Prefix.IsValid() {
			p := t.Prefix.Masked()
			busy = append(busy, interval{p.Addr(), Last(p)})
		}
	}
	slices.SortFunc(busy, func(a, b interval) int { return cmp.Or(a.lo.Compare(b.lo), a.hi.Compare(b.hi)) })
	// Merge, so that the end of an interval grows with its start.
	merged := busy[:0]
	for _, iv := range busy {
		if n := len(merged); n > 0 && merged[n-1].hi.BitLen() == iv.lo.BitLen() && merged[n-1].hi.Compare(iv.lo) >= 0 {
			if iv.hi.Compare(merged[n-1].hi) > 0 {
				merged[n-1].hi = iv.hi
			}
			continue
		}
		merged = append(merged, iv)
	}

	start := 0
	var behind netip.Addr // search the starting pool from here; invalid: from its start
	if last.IsValid() {
		for i, p := range pools {
			if p.Contains(last.Addr()) {
				start = i
				if next := Last(last).Next(); next.IsValid() && p.Contains(next) {
					behind = next
				} else {
					start = (i + 1) % len(pools)
				}
				break
			}
		}
	}
	for i := range pools {
		p := pools[(start+i)%len(pools)].Masked()
		from := p.Addr()
		if i == 0 && behind.IsValid() {
			from = behind
		}
		if s, ok := firstFree(p, bitsFor(p, bits), from, merged); ok {
			return s, nil
		}
	}
	if len(pools) > 0 && behind.IsValid() {
		p := pools[start].Masked()
		if s, ok := firstFree(p, bitsFor(p, bits), p.Addr(), merged); ok {
			return s, nil
		}
	}
	e := &NoSubnetError{Pools: slices.Clone(pools), Bits: bits}
	if len(pools) > 0 {
		e.Bits = bitsFor(pools[0], bits)
	}
	for _, t := range taken {
		if !slices.ContainsFunc(pools, t.Prefix.Overlaps) {
			continue
		}
		if t.Reason == ByNetwork {
			e.Networks++
		} else {
			e.Routes++
		}
	}
	return netip.Prefix{}, e
}

// firstFree returns the lowest subnet of pool that begins at or behind from.
func firstFree(pool netip.Prefix, bits int, from netip.Addr, busy []interval) (netip.Prefix, bool) {
	end := Last(pool)
	for from.IsValid() && from.Compare(end) <= 0 {
		s := netip.PrefixFrom(from, bits).Masked()
		if s.Addr() != from { // round up
			from = Last(s).Next()
			continue
		}
		last := Last(s)
		if last.Compare(end) > 0 {
			return netip.Prefix{}, false
		}
		// The first interval that ends at or behind the subnet's start is the
		// only one, or the first of those, that can overlap it.
		i, _ := slices.BinarySearchFunc(busy, s.Addr(), func(iv interval, a netip.Addr) int { return iv.hi.Compare(a) })
		if i == len(busy) || busy[i].lo.Compare(last) > 0 {
			return s, true
		}
		from = busy[i].hi.Next()
	}
	return netip.Prefix{}, false
}

// Last returns the highest address of p.
func Last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := range b {
		switch keep := p.Bits() - 8*i; {
		case keep <= 0:
			b[i] = 0xff
		case keep < 8:
			b[i] |= 0xff >> keep
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
