package ipam

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
)

// Window is how far into a range next-fit looks: 2^24 addresses, a whole IPv4
// /8.
const Window = 1 << 24

const (
	pageBits  = 12
	pageSize  = 1 << pageBits // addresses
	pageWords = pageSize / 64
)

type page struct {
	words [pageWords]uint64
	n     int // bits set
}

// window is a range of addresses that next-fit searches, lo…hi inclusive.
type window struct {
	lo, hi netip.Addr
	size   int
	pages  map[int]*page // by offset/pageSize; absent: empty
	used   int           // bits set, reserved ones too
	kept   int           // of these, reserved
}

// Space is what is taken of one subnet. It is not safe for concurrent use. What
// was taken is not part of its durable state: whoever holds addresses is asked
// to take them again after a restore ([Space.Take]); only [Space.Cursor] is.
type Space struct {
	subnet  netip.Prefix
	ranges  []netip.Prefix
	windows []*window
	holders map[netip.Addr]string
	fixed   int        // of holders, reserved from the start
	cursor  netip.Addr // last address that next-fit gave out; invalid: none yet
}

// NewSpace makes the Space of a subnet with nothing taken but what is never
// given out: the first address (IPv4: the network's; IPv6: the Subnet-Router
// anycast address, RFC 4291 section 2.6.1), IPv4's broadcast address, and those
// of reserved, which maps addresses to what they are ("the gateway").
//
// With ranges, next-fit keeps to them; they must lie in the subnet and not
// overlap.
func NewSpace(subnet netip.Prefix, ranges []netip.Prefix, reserved map[netip.Addr]string) (*Space, error) {
	if !subnet.IsValid() || subnet != subnet.Masked() {
		return nil, fmt.Errorf("subnet %s is not a masked prefix", subnet)
	}
	s := &Space{subnet: subnet, ranges: slices.Clone(ranges), holders: map[netip.Addr]string{}}
	slices.SortFunc(s.ranges, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	for i, r := range s.ranges {
		if !r.IsValid() || r != r.Masked() {
			return nil, fmt.Errorf("ip range %s has host bits set: did you mean %s", r, r.Masked())
		}
		if !subnet.Contains(r.Addr()) || r.Bits() < subnet.Bits() {
			return nil, fmt.Errorf("ip range %s is not in subnet %s", r, subnet)
		}
		if i > 0 && r.Overlaps(s.ranges[i-1]) {
			return nil, fmt.Errorf("ip ranges %s and %s overlap", s.ranges[i-1], r)
		}
	}
	whole := s.ranges
	if len(whole) == 0 {
		whole = []netip.Prefix{subnet}
	}
	for _, r := range whole {
		w := &window{lo: r.Addr(), hi: Last(r), size: Window, pages: map[int]*page{}}
		if host := r.Addr().BitLen() - r.Bits(); host < 24 {
			w.size = 1 << host
		} else {
			w.hi = add(w.lo, Window-1)
		}
		s.windows = append(s.windows, w)
	}
	keep := func(a netip.Addr, what string) {
		if _, dup := s.holders[a]; !dup && subnet.Contains(a) {
			s.set(a, what)
			s.fixed++
			if w, _ := s.find(a); w != nil {
				w.kept++
			}
		}
	}
	if subnet.Addr().Is4() {
		keep(subnet.Addr(), "the network address")
		keep(Last(subnet), "the broadcast address")
	} else {
		keep(subnet.Addr(), "the subnet-router anycast address")
	}
	for a, what := range reserved {
		keep(a, what)
	}
	return s, nil
}

// Subnet returns the subnet.
func (s *Space) Subnet() netip.Prefix { return s.subnet }

// Cursor is the address that next-fit gave out last; the zero Addr before it
// did.
func (s *Space) Cursor() netip.Addr { return s.cursor }

// SetCursor puts a cursor back. One outside of the ranges starts the search at
// the next range.
func (s *Space) SetCursor(a netip.Addr) { s.cursor = a }

// InUse counts the addresses given out, asked for or next-fit.
func (s *Space) InUse() int { return len(s.holders) - s.fixed }

// Free counts the addresses that next-fit can still give out.
func (s *Space) Free() int {
	n := 0
	for _, w := range s.windows {
		n += w.size - w.used
	}
	return n
}

// Holder tells who has an address.
func (s *Space) Holder(a netip.Addr) (string, bool) {
	h, ok := s.holders[a]
	return h, ok
}

// Next gives out the next free address. Without one it returns a *[FullError].
func (s *Space) Next(holder string) (netip.Addr, error) {
	n := len(s.windows)
	start, off := 0, 0
	if s.cursor.IsValid() {
		// The first window that the cursor is not beyond the end of.
		start = slices.IndexFunc(s.windows, func(w *window) bool { return s.cursor.Less(w.hi) })
		if start < 0 {
			start = 0
		} else if o, ok := s.windows[start].offset(s.cursor); ok {
			off = o + 1
		}
	}
	for i := range n + 1 { // the first window twice: behind the cursor, and from its start
		w := s.windows[(start+i)%n]
		if o, ok := w.free(off); ok {
			a := add(w.lo, o)
			s.set(a, holder)
			s.cursor = a
			return a, nil
		}
		off = 0
	}
	used := 0
	for _, w := range s.windows {
		used += w.used - w.kept
	}
	return netip.Addr{}, &FullError{Subnet: s.subnet, Ranges: s.ranges, InUse: used}
}

// Take gives out the address a. It may lie outside of the ranges. It returns a
// *[TakenError] or an *[OutsideError].
func (s *Space) Take(a netip.Addr, holder string) error {
	if !s.subnet.Contains(a) {
		return &OutsideError{a, s.subnet}
	}
	if h, ok := s.holders[a]; ok {
		return &TakenError{a, h}
	}
	s.set(a, holder)
	return nil
}

// Release takes the address a back from holder, and tells whether holder had it.
func (s *Space) Release(a netip.Addr, holder string) bool {
	if h, ok := s.holders[a]; !ok || h != holder {
		return false
	}
	delete(s.holders, a)
	if w, o := s.find(a); w != nil {
		p := w.pages[o>>pageBits]
		p.words[o&(pageSize-1)>>6] &^= 1 << (o & 63)
		p.n--
		w.used--
		if p.n == 0 {
			delete(w.pages, o>>pageBits)
		}
	}
	return true
}

func (s *Space) set(a netip.Addr, holder string) {
	s.holders[a] = holder
	if w, o := s.find(a); w != nil {
		p := w.pages[o>>pageBits]
		if p == nil {
			p = &page{}
			w.pages[o>>pageBits] = p
		}
		p.words[o&(pageSize-1)>>6] |= 1 << (o & 63)
		p.n++
		w.used++
	}
}

// find returns the window that a lies in, and where; nil without one.
func (s *Space) find(a netip.Addr) (*window, int) {
	i, _ := slices.BinarySearchFunc(s.windows, a, func(w *window, a netip.Addr) int { return w.hi.Compare(a) })
	if i < len(s.windows) {
		if o, ok := s.windows[i].offset(a); ok {
			return s.windows[i], o
		}
	}
	return nil, 0
}

func (w *window) offset(a netip.Addr) (int, bool) {
	if a.BitLen() != w.lo.BitLen() || a.Less(w.lo) || w.hi.Less(a) {
		return 0, false
	}
	// The difference fits 24 bits, so that the low 32 tell it.
	return int(low32(a) - low32(w.lo)), true
}

// free returns the first offset from off on that is not taken.
func (w *window) free(off int) (int, bool) {
	for off < w.size {
		p := w.pages[off>>pageBits]
		if p == nil {
			return off, true
		}
		next := (off>>pageBits + 1) << pageBits
		if p.n == pageSize {
			off = next
			continue
		}
		for off < next && off < w.size {
			free := ^p.words[off&(pageSize-1)>>6] >> (off & 63)
			if free != 0 {
				off += bits.TrailingZeros64(free)
				// Words reach beyond the end of a window smaller than one.
				return off, off < w.size
			}
			off = (off>>6 + 1) << 6
		}
	}
	return 0, false
}

func low32(a netip.Addr) uint32 {
	b := a.As16()
	return uint32(b[12])<<24 | uint32(b[13])<<16 | uint32(b[14])<<8 | uint32(b[15])
}

// add returns the address n behind a, which must exist.
func add(a netip.Addr, n int) netip.Addr {
	b := a.AsSlice()
	for i := len(b) - 1; i >= 0 && n > 0; i-- {
		n += int(b[i])
		b[i] = byte(n)
		n >>= 8
	}
	out, _ := netip.AddrFromSlice(b)
	return out
}
