package dns

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"

	mdns "github.com/miekg/dns"
)

// scratch is what one goroutine answers questions with, one after the other.
type scratch struct {
	name    [255]byte // RFC 1035 section 2.3.4
	out     [maxUDP]byte
	targets []target
}

// Offsets and flags of a message (RFC 1035 section 4.1.1).
const (
	headerLen = 12
	qrAA      = 0x84 // in the third octet
	rd        = 0x01
	ra        = 0x80 // in the fourth
	adCD      = 0x30
	cd        = 0x10
	optLen    = 11 // an OPT record without options
)

// quick answers a question for the addresses of a name that exists: nearly all
// that tasks ask. It goes from the bytes of the one to those of the other with
// hardly an allocation, so that the garbage collector, which has a large table
// to look through, rarely runs. It returns nil for all else, what doesn't fit
// and whatever looks unusual, which [Server.answer] is for. The result is valid
// until s is used again.
func (z *Zone) quick(a *Asker, in []byte, s *scratch) []byte {
	if len(in) < headerLen || in[2]&^rd != 0 || in[3]&^adCD != 0 ||
		// One question, no records but one of EDNS0.
		binary.BigEndian.Uint64(in[4:])&^1 != 1<<48 {
		return nil
	}
	name, off := s.question(in)
	if name == nil || off+4 > len(in) {
		return nil
	}
	qtype := binary.BigEndian.Uint16(in[off:])
	if qtype != mdns.TypeA && qtype != mdns.TypeAAAA || binary.BigEndian.Uint16(in[off+2:]) != mdns.ClassINET {
		return nil
	}
	off += 4
	size, edns, do := minUDP, in[11] == 1, byte(0)
	if edns {
		// RFC 6891 section 6.1.2: root, type, size, extended rcode, version, flags, length of the options.
		opt := in[off:]
		if len(opt) != optLen || opt[0] != 0 || binary.BigEndian.Uint16(opt[1:]) != mdns.TypeOPT || opt[5]|opt[6]|opt[9]|opt[10] != 0 {
			return nil
		}
		size = min(max(int(binary.BigEndian.Uint16(opt[3:])), minUDP), maxUDP)
		do = opt[7] & 0x80
	} else if off != len(in) {
		return nil
	}

	targets, exists := z.find(a, string(name), s.targets[:0])
	if cap(targets) > cap(s.targets) {
		s.targets = targets
	}
	if !exists {
		return nil
	}
	out := append(s.out[:0], in[:off]...)
	out[2], out[3] = qrAA|in[2]&rd, ra|in[3]&cd
	for i := 6; i < headerLen; i++ {
		out[i] = 0
	}
	// Each record's name is a pointer to the question's (section 4.1.4).
	head := []byte{0xc0, headerLen, 0, byte(qtype), 0, mdns.ClassINET, 0, 0, 0, TTL, 0, 4}
	if qtype == mdns.TypeAAAA {
		head[11] = 16
	}
	record := len(head) + int(head[11])
	n := 0
	for _, t := range targets {
		for _, ip := range t.addrs {
			if !isOfType(ip, qtype) {
				continue
			}
			if len(out)+record+optLen > size {
				return nil
			}
			// In random order: the new one takes a random place, whose record
			// moves to the end.
			at := off + record*rand.IntN(n+1)
			out = append(out, out[at:min(at+record, len(out))]...)
			if len(out) < off+record*(n+1) {
				out = out[:off+record*(n+1)]
			}
			copy(out[at:], head)
			if qtype == mdns.TypeA {
				b := ip.As4()
				copy(out[at+len(head):], b[:])
			} else {
				b := ip.As16()
				copy(out[at+len(head):], b[:])
			}
			n++
		}
	}
	binary.BigEndian.PutUint16(out[6:], uint16(n))
	if n == 0 {
		out = append(out, 0xc0, headerLen, 0, byte(mdns.TypeSOA), 0, mdns.ClassINET, 0, 0, 0, TTL, 0, byte(len(soaData)))
		out = append(out, soaData...)
		out[9] = 1
	}
	if edns {
		out = append(out, 0, 0, byte(mdns.TypeOPT), advertisedUDP>>8, advertisedUDP&0xff, 0, 0, do, 0, 0, 0)
		out[11] = 1
	}
	if len(out) > size {
		return nil
	}
	return out
}

// soaData is the data of the SOA record in negative answers.
var soaData = func() []byte {
	m := &mdns.Msg{Ns: []mdns.RR{soa(".")}}
	b, err := m.Pack()
	if err != nil {
		panic(err) // constant
	}
	return slices.Clip(b[headerLen+1+10:]) // after the root's name, type, class, TTL and length
}()

// question reads the name of the first question: in lower case, as text without
// the last dot, and in s. It returns nil for a name with anything but letters,
// digits, hyphens and underscores, or with a pointer. off is that of its type.
func (s *scratch) question(in []byte) (name []byte, off int) {
	name, off = s.name[:0], headerLen
	for {
		if off >= len(in) {
			return nil, 0
		}
		n := int(in[off])
		off++
		if n == 0 {
			break
		}
		if n > 63 || off+n > len(in) || len(name)+1+n > len(s.name)-2 {
			return nil, 0
		}
		if len(name) > 0 {
			name = append(name, '.')
		}
		for _, c := range in[off : off+n] {
			switch {
			case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
			case c >= 'A' && c <= 'Z':
				c |= 0x20
			default:
				return nil, 0
			}
			name = append(name, c)
		}
		off += n
	}
	if len(name) == 0 {
		return nil, 0
	}
	return name, off
}

func isOfType(ip netip.Addr, qtype uint16) bool {
	if qtype == mdns.TypeA {
		return ip.Is4()
	}
	return ip.Is6() && !ip.Is4In6()
}
