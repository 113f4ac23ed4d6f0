package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/shoalnet/shoal/spec"
)

// The wire format: a version byte, a type byte, the sender (ID, address, port),
// and a body of unsigned varints and length-prefixed strings. Everything that
// is decoded is bounded before it is allocated. A byte that is not understood
// makes a message malformed: it is counted and dropped, never guessed at.

const wireVersion = 1

type msgType byte

const (
	msgDelta      msgType = iota + 1 // body: delta
	msgDigest                        // body: id, all records in short; answered by msgDigestReply
	msgDigestSum                     // body: id, count, sum; answered by msgDigestReply, or by msgDigest if it differs
	msgDigestRep                     // body: id, flags, records of which the asker has less
	msgFetch                         // body: id, wants
	msgFetchReply                    // body: id, index, last, deltas
	msgBarrier                       // body: id, epoch, seq
	msgBarrierAck                    // body: id
	msgState                         // body: all records in short; in memberlist's push/pull
	msgHave                          // body: some records in short
)

func (t msgType) String() string {
	if t < msgDelta || t > msgHave {
		return fmt.Sprintf("type(%d)", byte(t))
	}
	return [...]string{"delta", "digest", "digest sum", "digest reply", "fetch", "fetch reply", "barrier", "barrier ack", "state", "have"}[t-1]
}

// Bounds of decoded values.
const (
	maxID      = 64
	maxString  = 1024
	maxAddrs   = 64
	maxAliases = 256
	// chunkSize is where a fetch reply is cut; a chunk exceeds it by at most
	// one entry.
	chunkSize = 256 << 10
	// maxChunks bounds one fetch reply.
	maxChunks = 1024
)

type header struct {
	typ  msgType
	from string
	addr netip.AddrPort // where the sender listens
}

// want asks for a record from (epoch, seq) on, or all of it.
type want struct {
	node       string
	epoch, seq uint64
	full       bool
}

// message is a decoded message; which fields are set depends on typ.
type message struct {
	header
	body    []byte // aliases the input
	id      uint64
	epoch   uint64
	seq     uint64
	count   uint64
	sum     uint64
	index   uint64
	last    bool
	unknown bool
	digest  []digestItem
	wants   []want
	deltas  []*delta
}

// ---- encoding ----

func appendString(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func appendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

func appendAddr(b []byte, a netip.Addr) []byte {
	s := a.AsSlice()
	b = append(b, byte(len(s)))
	return append(b, s...)
}

func appendHeader(b []byte, h header) []byte {
	b = append(b, wireVersion, byte(h.typ))
	b = appendString(b, h.from)
	b = appendAddr(b, h.addr.Addr())
	return binary.AppendUvarint(b, uint64(h.addr.Port()))
}

func appendChange(b []byte, c change) []byte {
	b = binary.AppendUvarint(b, c.seq)
	b = appendBool(b, c.gone)
	b = appendString(b, c.ep.Task)
	b = appendString(b, c.ep.Network)
	if c.gone {
		return b
	}
	b = appendString(b, c.ep.TaskName)
	b = appendString(b, c.ep.Hostname)
	b = appendString(b, c.ep.Service)
	b = binary.AppendVarint(b, int64(c.ep.Slot))
	b = append(b, byte(c.ep.State))
	b = binary.AppendUvarint(b, uint64(len(c.ep.Addrs)))
	for _, a := range c.ep.Addrs {
		b = appendAddr(b, a)
	}
	b = binary.AppendUvarint(b, uint64(len(c.ep.Aliases)))
	for _, a := range c.ep.Aliases {
		b = appendString(b, a)
	}
	return b
}

func appendDeltaHead(b []byte, d *delta, changes int) []byte {
	b = appendString(b, d.node)
	b = binary.AppendUvarint(b, d.epoch)
	b = binary.AppendUvarint(b, d.prev)
	b = binary.AppendUvarint(b, d.seq)
	var flags byte
	if d.full {
		flags |= 1
	}
	if d.left {
		flags |= 2
	}
	b = append(b, flags)
	return binary.AppendUvarint(b, uint64(changes))
}

func appendDelta(b []byte, d *delta) []byte {
	b = appendDeltaHead(b, d, len(d.changes))
	for _, c := range d.changes {
		b = appendChange(b, c)
	}
	return b
}

func appendDigestItem(b []byte, it digestItem) []byte {
	b = appendString(b, it.node)
	b = binary.AppendUvarint(b, it.epoch)
	b = binary.AppendUvarint(b, it.seq)
	return binary.BigEndian.AppendUint64(b, it.hash)
}

func appendDigest(b []byte, items []digestItem) []byte {
	b = binary.AppendUvarint(b, uint64(len(items)))
	for _, it := range items {
		b = appendDigestItem(b, it)
	}
	return b
}

func appendWants(b []byte, ws []want) []byte {
	b = binary.AppendUvarint(b, uint64(len(ws)))
	for _, w := range ws {
		b = appendString(b, w.node)
		b = binary.AppendUvarint(b, w.epoch)
		b = binary.AppendUvarint(b, w.seq)
		b = appendBool(b, w.full)
	}
	return b
}

// encode is the inverse of decode.
func (m *message) encode() []byte {
	b := appendHeader(make([]byte, 0, 256), m.header)
	switch m.typ {
	case msgDelta:
		return appendDelta(b, m.deltas[0])
	case msgState, msgHave:
		return appendDigest(b, m.digest)
	}
	b = binary.AppendUvarint(b, m.id)
	switch m.typ {
	case msgDigest:
		b = appendDigest(b, m.digest)
	case msgDigestSum:
		b = binary.AppendUvarint(b, m.count)
		b = binary.BigEndian.AppendUint64(b, m.sum)
	case msgDigestRep:
		b = appendBool(b, m.unknown)
		b = appendDigest(b, m.digest)
	case msgFetch:
		b = appendWants(b, m.wants)
	case msgFetchReply:
		b = binary.AppendUvarint(b, m.index)
		b = appendBool(b, m.last)
		b = binary.AppendUvarint(b, uint64(len(m.deltas)))
		for _, d := range m.deltas {
			b = appendDelta(b, d)
		}
	case msgBarrier:
		b = binary.AppendUvarint(b, m.epoch)
		b = binary.AppendUvarint(b, m.seq)
	}
	return b
}

// ---- decoding ----

var errShort = errors.New("message ends early")

// reader takes values off a buffer; after the first error it returns zeros.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.b = nil
}

func (r *reader) byte() byte {
	if len(r.b) == 0 {
		r.fail(errShort)
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}

func (r *reader) bool() bool {
	v := r.byte()
	if v > 1 {
		r.fail(fmt.Errorf("boolean is %d", v))
	}
	return v == 1
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.fail(errShort)
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	if n <= 0 {
		r.fail(errShort)
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) u64() uint64 {
	if len(r.b) < 8 {
		r.fail(errShort)
		return 0
	}
	v := binary.BigEndian.Uint64(r.b)
	r.b = r.b[8:]
	return v
}

// string reads a string of at most max bytes. It is a copy.
func (r *reader) string(max int) string {
	n := r.uvarint()
	if n > uint64(max) {
		r.fail(fmt.Errorf("string of %d bytes: at most %d are allowed", n, max))
		return ""
	}
	if n > uint64(len(r.b)) {
		r.fail(errShort)
		return ""
	}
	s := string(r.b[:n])
	r.b = r.b[n:]
	return s
}

func (r *reader) id() string {
	s := r.string(maxID)
	if s == "" {
		r.fail(errors.New("empty ID"))
	}
	return s
}

// count reads a count of things that take at least size bytes each, so that
// what is allocated for them is bounded by what was received.
func (r *reader) count(max uint64, size int) int {
	n := r.uvarint()
	if n > max || n > uint64(len(r.b)/size) {
		r.fail(fmt.Errorf("count of %d is more than can follow", n))
		return 0
	}
	return int(n)
}

func (r *reader) addr() netip.Addr {
	n := int(r.byte())
	if n != 4 && n != 16 {
		r.fail(fmt.Errorf("address of %d bytes", n))
		return netip.Addr{}
	}
	if len(r.b) < n {
		r.fail(errShort)
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(r.b[:n])
	r.b = r.b[n:]
	return a
}

func (r *reader) change() (c change) {
	c.seq = r.uvarint()
	c.gone = r.bool()
	c.ep.Task = r.string(maxString)
	c.ep.Network = r.string(maxString)
	if c.gone || r.err != nil {
		return c
	}
	c.ep.TaskName = r.string(maxString)
	c.ep.Hostname = r.string(maxString)
	c.ep.Service = r.string(maxString)
	slot := r.varint()
	if slot != int64(int(slot)) {
		r.fail(fmt.Errorf("slot %d is out of range", slot))
	}
	c.ep.Slot = int(slot)
	st := r.byte()
	if st > byte(spec.EndpointDraining) {
		r.fail(fmt.Errorf("endpoint state %d is unknown", st))
	}
	c.ep.State = spec.EndpointState(st)
	if n := r.count(maxAddrs, 5); n > 0 {
		c.ep.Addrs = make([]netip.Addr, n)
		for i := range c.ep.Addrs {
			c.ep.Addrs[i] = r.addr()
		}
	}
	if n := r.count(maxAliases, 1); n > 0 {
		c.ep.Aliases = make([]string, n)
		for i := range c.ep.Aliases {
			c.ep.Aliases[i] = r.string(maxString)
		}
	}
	return c
}

func (r *reader) delta() *delta {
	d := &delta{node: r.id(), epoch: r.uvarint(), prev: r.uvarint(), seq: r.uvarint()}
	flags := r.byte()
	if flags > 3 {
		r.fail(fmt.Errorf("delta flags %#x are unknown", flags))
	}
	d.full, d.left = flags&1 != 0, flags&2 != 0
	if d.epoch == 0 || d.epoch > maxEpoch || d.seq > maxSeq || d.seq <= d.prev || d.full && d.prev != 0 {
		r.fail(fmt.Errorf("delta of epoch %d from %d to %d", d.epoch, d.prev, d.seq))
	}
	n := r.count(1<<32, 4)
	for i := 0; i < n && r.err == nil; i++ {
		c := r.change()
		if r.err == nil && (c.seq <= d.prev || c.seq > d.seq || d.full && c.gone) {
			r.fail(fmt.Errorf("change %d does not belong into a delta from %d to %d", c.seq, d.prev, d.seq))
		}
		d.changes = append(d.changes, c)
	}
	return d
}

func (r *reader) digest() []digestItem {
	n := r.count(1<<32, 12)
	var items []digestItem
	if n > 0 {
		items = make([]digestItem, 0, n)
	}
	for i := 0; i < n && r.err == nil; i++ {
		it := digestItem{node: r.id(), epoch: r.uvarint(), seq: r.uvarint(), hash: r.u64()}
		if it.epoch == 0 || it.epoch > maxEpoch || it.seq == 0 || it.seq > maxSeq {
			r.fail(fmt.Errorf("digest of %s is at epoch %d, sequence %d", it.node, it.epoch, it.seq))
		}
		items = append(items, it)
	}
	return items
}

// decode reads a message. It keeps no reference to b except in body.
func decode(b []byte) (*message, error) {
	r := &reader{b: b}
	if v := r.byte(); r.err == nil && v != wireVersion {
		return nil, fmt.Errorf("gossip message of version %d: this node speaks %d", v, wireVersion)
	}
	m := &message{}
	m.typ = msgType(r.byte())
	m.from = r.id()
	addr := r.addr()
	port := r.uvarint()
	if port > 65535 {
		r.fail(fmt.Errorf("port %d", port))
	}
	m.addr = netip.AddrPortFrom(addr.Unmap(), uint16(port))
	m.body = r.b
	switch m.typ {
	case msgDelta:
		m.deltas = []*delta{r.delta()}
	case msgState, msgHave:
		m.digest = r.digest()
	case msgDigest, msgDigestSum, msgDigestRep, msgFetch, msgFetchReply, msgBarrier, msgBarrierAck:
		m.id = r.uvarint()
	default:
		r.fail(errors.New("unknown type"))
	}
	switch m.typ {
	case msgDigest:
		m.digest = r.digest()
	case msgDigestSum:
		m.count, m.sum = r.uvarint(), r.u64()
	case msgDigestRep:
		m.unknown = r.bool()
		m.digest = r.digest()
	case msgFetch:
		n := r.count(1<<32, 5)
		for i := 0; i < n && r.err == nil; i++ {
			m.wants = append(m.wants, want{node: r.id(), epoch: r.uvarint(), seq: r.uvarint(), full: r.bool()})
		}
	case msgFetchReply:
		m.index = r.uvarint()
		m.last = r.bool()
		n := r.count(1<<32, 7)
		for i := 0; i < n && r.err == nil; i++ {
			m.deltas = append(m.deltas, r.delta())
		}
		if m.index >= maxChunks {
			r.fail(fmt.Errorf("chunk %d", m.index))
		}
	case msgBarrier:
		m.epoch, m.seq = r.uvarint(), r.uvarint()
	}
	if r.err == nil && len(r.b) > 0 {
		r.fail(fmt.Errorf("%d bytes too many", len(r.b)))
	}
	if r.err != nil {
		return nil, fmt.Errorf("gossip message (%s): %w", m.typ, r.err)
	}
	return m, nil
}

// cutReply packs deltas into fetch reply chunks of about size bytes each. A
// delta cut in two repeats its head; the receiver joins them again.
func cutReply(h header, id uint64, deltas []*delta, size int) [][]byte {
	var chunks [][]*delta
	var cur []*delta
	used := 0
	for _, d := range deltas {
		part := *d
		part.changes = nil
		head := len(appendDeltaHead(nil, d, len(d.changes)))
		used += head
		for _, c := range d.changes {
			n := len(appendChange(nil, c))
			if used+n > size && (len(cur) > 0 || len(part.changes) > 0) {
				p := part
				chunks = append(chunks, append(cur, &p))
				cur, used, part.changes = nil, head, nil
			}
			part.changes = append(part.changes, c)
			used += n
		}
		cur = append(cur, &part)
	}
	chunks = append(chunks, cur)
	out := make([][]byte, len(chunks))
	h.typ = msgFetchReply
	for i, ds := range chunks {
		m := message{header: h, id: id, index: uint64(i), last: i == len(chunks)-1, deltas: ds}
		out[i] = m.encode()
	}
	return out
}

// joinReply puts the deltas of a reply's chunks together again.
func joinReply(chunks [][]*delta) []*delta {
	var out []*delta
	for _, ds := range chunks {
		for _, d := range ds {
			if n := len(out); n > 0 {
				if p := out[n-1]; p.node == d.node && p.epoch == d.epoch && p.prev == d.prev && p.seq == d.seq && p.full == d.full && p.left == d.left {
					p.changes = append(p.changes, d.changes...)
					continue
				}
			}
			out = append(out, d)
		}
	}
	return out
}

// encodable tells why an endpoint can't travel.
func encodable(ep spec.Endpoint) error {
	for _, s := range []string{ep.Task, ep.Network, ep.TaskName, ep.Hostname, ep.Service} {
		if len(s) > maxString {
			return fmt.Errorf("endpoint %s: a field is %d bytes long: at most %d are allowed", ep.Key(), len(s), maxString)
		}
	}
	if len(ep.Addrs) > maxAddrs || len(ep.Aliases) > maxAliases {
		return fmt.Errorf("endpoint %s: %d addresses and %d aliases: at most %d and %d are allowed", ep.Key(), len(ep.Addrs), len(ep.Aliases), maxAddrs, maxAliases)
	}
	for _, a := range ep.Addrs {
		if !a.IsValid() || a.Zone() != "" {
			return fmt.Errorf("endpoint %s: address %q is not a plain IP address", ep.Key(), a)
		}
	}
	for _, a := range ep.Aliases {
		if len(a) > maxString {
			return fmt.Errorf("endpoint %s: an alias is %d bytes long: at most %d are allowed", ep.Key(), len(a), maxString)
		}
	}
	if ep.State < spec.EndpointStarting || ep.State > spec.EndpointDraining {
		return fmt.Errorf("endpoint %s: state %d is unknown", ep.Key(), int(ep.State))
	}
	return nil
}

// ---- node metadata ----

// meta is what memberlist carries with each member.
type meta struct {
	name        string
	role        string
	number      int
	controlPort int
}

func (m meta) encode() []byte {
	b := []byte{wireVersion}
	b = appendString(b, m.name)
	b = appendString(b, m.role)
	b = binary.AppendUvarint(b, uint64(m.number))
	return binary.AppendUvarint(b, uint64(m.controlPort))
}

// decodeMeta ignores what follows, so that later versions may add to it.
func decodeMeta(b []byte) (m meta, err error) {
	r := &reader{b: b}
	if v := r.byte(); r.err == nil && v != wireVersion {
		return m, fmt.Errorf("node metadata of version %d: this node speaks %d", v, wireVersion)
	}
	m.name, m.role = r.string(spec.MaxNameLen), r.string(maxID)
	number, port := r.uvarint(), r.uvarint()
	if number > spec.MaxNodes || port > 65535 {
		r.fail(fmt.Errorf("number %d, control port %d", number, port))
	}
	m.number, m.controlPort = int(number), int(port)
	if r.err != nil {
		return meta{}, fmt.Errorf("node metadata: %w", r.err)
	}
	return m, nil
}
