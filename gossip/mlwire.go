package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// memberlist's messages, as far as they must be understood to say whether it may
// see them. It encodes structs as msgpack maps from field name to integer, byte
// string or boolean (net.go); nothing else is accepted here, so that nothing
// nested, and no count that isn't followed by what it counts, reaches its
// decoder. Types are numbered in its net.go, which only ever appends.
const (
	mlPing byte = iota
	mlIndirectPing
	mlAck
	mlSuspect
	mlAlive
	mlDead
	mlPushPull
	mlCompound
	mlUser
	mlCompress
	mlEncrypt
	mlNack
	mlCRC
	mlErr
)

// States in a push/pull (memberlist's state.go, NodeStateType).
const (
	mlStateAlive = iota
	mlStateSuspect
	mlStateDead
	mlStateLeft
)

// swim are the fields of any of the messages. Byte strings alias the input.
type swim struct {
	seq, inc       uint32
	node, from     []byte
	addr           []byte
	port           uint16
	meta, vsn      []byte
	state          int
	target         []byte
	sourceAddr     []byte
	sourcePort     uint16
	sourceNode     []byte
	payload        []byte
	count, length  int
	join, nack     bool
	hasNode, hasID bool
}

var errWire = errors.New("not one of memberlist's messages")

// raw is a msgpack byte string at the beginning of b, and what follows it.
func raw(b []byte) (s, rest []byte, ok bool) {
	if len(b) == 0 {
		return nil, nil, false
	}
	n, head := 0, 0
	switch c := b[0]; {
	case c >= 0xa0 && c <= 0xbf:
		n, head = int(c&0x1f), 1
	case (c == 0xc4 || c == 0xd9) && len(b) >= 2:
		n, head = int(b[1]), 2
	case (c == 0xc5 || c == 0xda) && len(b) >= 3:
		n, head = int(binary.BigEndian.Uint16(b[1:])), 3
	case (c == 0xc6 || c == 0xdb) && len(b) >= 5:
		v := binary.BigEndian.Uint32(b[1:])
		if uint64(v) > uint64(len(b)) {
			return nil, nil, false
		}
		n, head = int(v), 5
	default:
		return nil, nil, false
	}
	if n > len(b)-head {
		return nil, nil, false
	}
	return b[head : head+n], b[head+n:], true
}

// value is what a field may hold.
type value struct {
	num   uint64
	bytes []byte
	kind  byte // 'n', 's', 'b', or 0 for nil
}

func scalar(b []byte) (v value, rest []byte, ok bool) {
	if len(b) == 0 {
		return v, nil, false
	}
	num := func(size int, signed bool) (value, []byte, bool) {
		if len(b) < 1+size {
			return v, nil, false
		}
		n := uint64(0)
		for _, c := range b[1 : 1+size] {
			n = n<<8 | uint64(c)
		}
		if signed && n>>(8*size-1) != 0 { // negative: nothing of memberlist's is
			return v, nil, false
		}
		return value{num: n, kind: 'n'}, b[1+size:], true
	}
	switch c := b[0]; {
	case c < 0x80:
		return value{num: uint64(c), kind: 'n'}, b[1:], true
	case c == 0xc0:
		return value{}, b[1:], true
	case c == 0xc2, c == 0xc3:
		return value{num: uint64(c - 0xc2), kind: 'b'}, b[1:], true
	case c >= 0xcc && c <= 0xcf:
		return num(1<<(c-0xcc), false)
	case c >= 0xd0 && c <= 0xd3:
		return num(1<<(c-0xd0), true)
	}
	s, rest, ok := raw(b)
	return value{bytes: s, kind: 's'}, rest, ok
}

// parseSwim reads one struct and returns what follows it.
func parseSwim(b []byte) (m swim, rest []byte, err error) {
	if len(b) == 0 || b[0] < 0x80 || b[0] > 0x8f { // the largest has 8 fields
		return m, nil, errWire
	}
	n := int(b[0] & 0x0f)
	b = b[1:]
	var seen [16]string
	for i := range n {
		key, after, ok := raw(b)
		if !ok || len(key) > 32 {
			return m, nil, errWire
		}
		v, after, ok := scalar(after)
		if !ok {
			return m, nil, fmt.Errorf("%w: field %q", errWire, key)
		}
		b = after
		for _, k := range seen[:i] {
			if k == string(key) {
				return m, nil, fmt.Errorf("%w: field %q twice", errWire, key)
			}
		}
		seen[i] = string(key)
		if !m.set(seen[i], v) {
			return m, nil, fmt.Errorf("%w: field %q out of range", errWire, key)
		}
	}
	return m, b, nil
}

func (m *swim) set(key string, v value) bool {
	number := func(max uint64) (uint64, bool) { return v.num, v.kind == 'n' && v.num <= max }
	str := func(to *[]byte, max int) bool {
		*to = v.bytes
		return (v.kind == 's' || v.kind == 0) && len(v.bytes) <= max
	}
	switch key {
	case "Node", "Name":
		m.hasNode = true
		return str(&m.node, maxID)
	case "From":
		return str(&m.from, maxID)
	case "SourceNode":
		return str(&m.sourceNode, maxID)
	case "Addr":
		return str(&m.addr, 16)
	case "Target":
		return str(&m.target, 16)
	case "SourceAddr":
		return str(&m.sourceAddr, 16)
	case "Meta":
		return str(&m.meta, maxMeta)
	case "Vsn":
		return str(&m.vsn, 6)
	case "Payload":
		return str(&m.payload, 0) // no ping delegate is used
	case "SeqNo":
		n, ok := number(math.MaxUint32)
		m.seq, m.hasID = uint32(n), true
		return ok
	case "Incarnation":
		n, ok := number(math.MaxUint32)
		m.inc = uint32(n)
		return ok
	case "Port":
		n, ok := number(math.MaxUint16)
		m.port = uint16(n)
		return ok
	case "SourcePort":
		n, ok := number(math.MaxUint16)
		m.sourcePort = uint16(n)
		return ok
	case "State":
		n, ok := number(mlStateLeft)
		m.state = int(n)
		return ok
	case "Nodes":
		n, ok := number(maxStream)
		m.count = int(n)
		return ok
	case "UserStateLen", "UserMsgLen":
		n, ok := number(maxStream)
		m.length = int(n)
		return ok
	case "Join":
		m.join = v.num == 1
		return v.kind == 'b'
	case "Nack":
		m.nack = v.num == 1
		return v.kind == 'b'
	}
	return true // of a later memberlist; a scalar does no harm
}

// appendPushPull encodes the head of a push/pull as memberlist's decoder reads it.
func appendPushPull(b []byte, nodes, userLen int, join bool) []byte {
	str := func(s string) { b = append(append(b, 0xa0|byte(len(s))), s...) }
	num := func(n int) { b = binary.BigEndian.AppendUint32(append(b, 0xce), uint32(n)) }
	b = append(b, mlPushPull, 0x83)
	str("Nodes")
	num(nodes)
	str("UserStateLen")
	num(userLen)
	str("Join")
	if join {
		return append(b, 0xc3)
	}
	return append(b, 0xc2)
}

// suspectMessage encodes what memberlist says of a node that did not answer its probe.
func suspectMessage(inc uint32, node, from string) []byte {
	b := []byte{mlSuspect, 0x83}
	str := func(s string) { b = append(binary.BigEndian.AppendUint16(append(b, 0xda), uint16(len(s))), s...) }
	str("Incarnation")
	b = binary.BigEndian.AppendUint32(append(b, 0xce), inc)
	str("Node")
	str(node)
	str("From")
	str(from)
	return b
}
