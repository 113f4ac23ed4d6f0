package gossip

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// The wire format: a version byte, a type byte, the sender (ID, address, port),
// and a body of unsigned varints and length-prefixed strings. Everything that
// is decoded is bounded before it is allocated.
//
// How it grows without a day on which all nodes change at once:
//
//   - a field is added at the end of a message, of an endpoint, of an item of a
//     list or of a node's metadata, each of which is preceded by its length (a
//     message by its packet's). Who does not know it skips it;
//   - what is signed (the content of an endpoint, a node's metadata) is kept and
//     passed on as it came, with the fields that are not understood, so that a
//     node of an older version in between takes nothing away;
//   - a state of endpoints that is not known counts as "starting": routed and
//     named, without a share of any service's traffic;
//   - a message of a type that is not known is dropped. The upper half of a
//     delta's flags is for what may be overlooked, an unknown flag of the lower
//     half has the delta dropped;
//   - only a change that none of this can bear takes another version, which the
//     managers' feature level must allow before anybody speaks it.
//
// What is known and does not make sense makes a message malformed: it is counted
// and dropped, never guessed at.

const wireVersion = 2

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
	msgMeta                          // body: the metadata last heard of the node that this is for
)

func (t msgType) String() string {
	if t < msgDelta || t > msgMeta {
		return fmt.Sprintf("type(%d)", byte(t))
	}
	return [...]string{"delta", "digest", "digest sum", "digest reply", "fetch", "fetch reply", "barrier", "barrier ack", "state", "have", "metadata"}[t-1]
}

// Bounds of decoded values.
const (
	maxMTU     = 1 << 16 // no link of Linux has a larger one (ETH_MAX_MTU)
	maxID      = 64
	maxString  = 1024
	maxAddrs   = 64
	maxAliases = 256
	// chunkSize is where a fetch reply is cut; a chunk exceeds it by at most
	// one entry.
	chunkSize = 256 << 10
	// maxChunks bounds one fetch reply; a table of 100,000 endpoints takes some
	// 160.
	maxChunks = 256
	// maxContent bounds the encoding of one endpoint, maxItem of any other item.
	maxContent = 64 << 10
	maxItem    = 1 << 10
	// maxEntries bounds the endpoints of one node.
	maxEntries = 16 << 10
	// maxMeta is the most that memberlist takes as metadata (MetaMaxSize).
	maxMeta = 512
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
	meta    []byte // sealed
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

// appendBlob appends what may grow, preceded by its length.
func appendBlob(b, blob []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(blob)))
	return append(b, blob...)
}

// appendContent encodes an endpoint; of one that is gone only its key.
func appendContent(b []byte, ep spec.Endpoint, gone bool) []byte {
	b = appendString(b, ep.Task)
	b = appendString(b, ep.Network)
	if gone {
		return b
	}
	b = appendString(b, ep.TaskName)
	b = appendString(b, ep.Hostname)
	b = appendString(b, ep.Service)
	b = binary.AppendVarint(b, int64(ep.Slot))
	b = append(b, byte(ep.State))
	b = binary.AppendUvarint(b, uint64(len(ep.Addrs)))
	for _, a := range ep.Addrs {
		b = appendAddr(b, a)
	}
	b = binary.AppendUvarint(b, uint64(len(ep.Aliases)))
	for _, a := range ep.Aliases {
		b = appendString(b, a)
	}
	return b
}

// newChange is an endpoint as it is to travel.
func newChange(seq uint64, ep spec.Endpoint, gone bool) change {
	c := change{seq: seq, gone: gone, ep: ep, raw: appendContent(nil, ep, gone)}
	c.sum = sha256.Sum256(c.raw)
	return c
}

func appendChange(b []byte, c change) []byte {
	in := binary.AppendUvarint(make([]byte, 0, len(c.raw)+16), c.seq)
	in = appendBool(in, c.gone)
	in = appendBlob(in, c.raw)
	return appendBlob(b, in)
}

// Flags of a delta.
const (
	flagFull = 1 << iota
	flagLeft
	// flagsCritical are those that must be understood.
	flagsCritical = 0x0f
)

func appendDeltaHead(b []byte, d *delta, changes int) []byte {
	in := appendString(make([]byte, 0, 192), d.node)
	in = binary.AppendUvarint(in, d.epoch)
	in = binary.AppendUvarint(in, d.prev)
	in = binary.AppendUvarint(in, d.seq)
	var flags byte
	if d.full {
		flags |= flagFull
	}
	if d.left {
		flags |= flagLeft
	}
	in = append(in, flags)
	in = append(in, d.state[:]...)
	in = appendBlob(in, d.sig)
	b = appendBlob(b, in)
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
	in := appendString(make([]byte, 0, 64), it.node)
	in = binary.AppendUvarint(in, it.epoch)
	in = binary.AppendUvarint(in, it.seq)
	in = binary.BigEndian.AppendUint64(in, it.hash)
	return appendBlob(b, in)
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
		in := appendString(make([]byte, 0, 64), w.node)
		in = binary.AppendUvarint(in, w.epoch)
		in = binary.AppendUvarint(in, w.seq)
		b = appendBlob(b, appendBool(in, w.full))
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
	case msgMeta:
		return appendBlob(b, m.meta)
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

// bytes takes n bytes, without a copy.
func (r *reader) bytes(n int) []byte {
	if n > len(r.b) {
		r.fail(errShort)
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

// blob takes what is preceded by its length, of at most max bytes, without a
// copy.
func (r *reader) blob(max int) []byte {
	n := r.uvarint()
	if n > uint64(max) {
		r.fail(fmt.Errorf("item of %d bytes: at most %d are allowed", n, max))
		return nil
	}
	return r.bytes(int(n))
}

// item reads what is preceded by its length with fn, which may leave some.
func (r *reader) item(max int, fn func(*reader)) {
	in := &reader{b: r.blob(max)}
	if r.err != nil {
		return
	}
	if fn(in); in.err != nil {
		r.fail(in.err)
	}
}

func (r *reader) content(gone bool) (ep spec.Endpoint) {
	ep.Task = r.string(maxString)
	ep.Network = r.string(maxString)
	if gone || r.err != nil {
		return ep
	}
	ep.TaskName = r.string(maxString)
	ep.Hostname = r.string(maxString)
	ep.Service = r.string(maxString)
	slot := r.varint()
	if slot != int64(int(slot)) {
		r.fail(fmt.Errorf("slot %d is out of range", slot))
	}
	ep.Slot = int(slot)
	if ep.State = spec.EndpointState(r.byte()); int(ep.State) >= spec.EndpointStates {
		ep.State = spec.EndpointStarting
	}
	if n := r.count(maxAddrs, 5); n > 0 {
		ep.Addrs = make([]netip.Addr, n)
		for i := range ep.Addrs {
			ep.Addrs[i] = r.addr()
		}
	}
	if n := r.count(maxAliases, 1); n > 0 {
		ep.Aliases = make([]string, n)
		for i := range ep.Aliases {
			ep.Aliases[i] = r.string(maxString)
		}
	}
	return ep
}

func (r *reader) change() (c change) {
	r.item(maxContent+maxItem, func(r *reader) {
		c.seq = r.uvarint()
		c.gone = r.bool()
		raw := r.blob(maxContent)
		if r.err != nil {
			return
		}
		c.raw = append([]byte(nil), raw...)
		c.sum = sha256.Sum256(c.raw)
		in := &reader{b: c.raw}
		if c.ep = in.content(c.gone); in.err != nil {
			r.fail(in.err)
		}
	})
	return c
}

func (r *reader) delta() *delta {
	d := &delta{}
	var flags byte
	r.item(maxItem, func(r *reader) {
		d.node, d.epoch, d.prev, d.seq = r.id(), r.uvarint(), r.uvarint(), r.uvarint()
		flags = r.byte()
		copy(d.state[:], r.bytes(len(d.state)))
		d.sig = append([]byte(nil), r.blob(maxSig)...)
	})
	if flags&flagsCritical > flagFull|flagLeft {
		r.fail(fmt.Errorf("delta flags %#x are unknown", flags))
	}
	d.full, d.left = flags&flagFull != 0, flags&flagLeft != 0
	if d.epoch == 0 || d.epoch > maxEpoch || d.seq > maxSeq || d.seq <= d.prev || d.full && d.prev != 0 {
		r.fail(fmt.Errorf("delta of epoch %d from %d to %d", d.epoch, d.prev, d.seq))
	}
	n := r.count(maxEntries+1<<10, 6)
	for i := 0; i < n && r.err == nil; i++ {
		c := r.change()
		if r.err == nil && (c.seq <= d.prev || c.seq > d.seq || d.full && c.gone) {
			r.fail(fmt.Errorf("change %d does not belong into a delta from %d to %d", c.seq, d.prev, d.seq))
		}
		d.changes = append(d.changes, c)
	}
	return d
}

// maxNodes bounds lists of nodes.
const maxNodes = spec.MaxNodes + strangersMax

func (r *reader) digest() []digestItem {
	n := r.count(maxNodes, 13)
	var items []digestItem
	if n > 0 {
		items = make([]digestItem, 0, n)
	}
	for i := 0; i < n && r.err == nil; i++ {
		var it digestItem
		r.item(maxItem, func(r *reader) {
			it = digestItem{node: r.id(), epoch: r.uvarint(), seq: r.uvarint(), hash: r.u64()}
		})
		if r.err == nil && (it.epoch == 0 || it.epoch > maxEpoch || it.seq == 0 || it.seq > maxSeq) {
			r.fail(fmt.Errorf("digest of %s is at epoch %d, sequence %d", it.node, it.epoch, it.seq))
		}
		items = append(items, it)
	}
	return items
}

// errForeign is of what a later version sent.
var errForeign = errors.New("this node does not speak it")

// decode reads a message. It keeps no reference to b except in body.
func decode(b []byte) (*message, error) {
	r := &reader{b: b}
	if v := r.byte(); r.err == nil && v != wireVersion {
		return nil, fmt.Errorf("gossip message of version %d: %w", v, errForeign)
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
	case msgMeta:
		m.meta = bytes.Clone(r.blob(maxMeta))
	case msgDigest, msgDigestSum, msgDigestRep, msgFetch, msgFetchReply, msgBarrier, msgBarrierAck:
		m.id = r.uvarint()
	default:
		r.fail(errForeign)
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
		n := r.count(maxNodes, 6)
		for i := 0; i < n && r.err == nil; i++ {
			var w want
			r.item(maxItem, func(r *reader) { w = want{node: r.id(), epoch: r.uvarint(), seq: r.uvarint(), full: r.bool()} })
			m.wants = append(m.wants, w)
		}
	case msgFetchReply:
		m.index = r.uvarint()
		m.last = r.bool()
		n := r.count(maxNodes, 40)
		for i := 0; i < n && r.err == nil; i++ {
			m.deltas = append(m.deltas, r.delta())
		}
		if m.index >= maxChunks {
			r.fail(fmt.Errorf("chunk %d", m.index))
		}
	case msgBarrier:
		m.epoch, m.seq = r.uvarint(), r.uvarint()
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
	if n := len(appendContent(nil, ep, false)); n > maxContent {
		return fmt.Errorf("endpoint %s: its encoding has %d bytes: at most %d are allowed", ep.Key(), n, maxContent)
	}
	if ep.State < spec.EndpointStarting || int(ep.State) >= spec.EndpointStates {
		return fmt.Errorf("endpoint %s: state %d is unknown", ep.Key(), int(ep.State))
	}
	return nil
}

// ---- node metadata ----

// meta is what a node says of itself with each memberlist message that tells of
// it. Who it is and where, the managers say (Directory).
type meta struct {
	// epoch and seq order what one node says.
	epoch, seq uint64
	// maxInc is the last of memberlist's incarnations that this may be told with.
	maxInc uint32
	path
}

// path is a node's end of the data path: see spec.Peer's MTU and Answers. A node
// of a version before these says neither.
type path struct {
	mtu     int
	answers bool
}

func (m meta) encode() []byte {
	b := binary.AppendUvarint(nil, m.epoch)
	b = binary.AppendUvarint(b, m.seq)
	b = binary.AppendUvarint(b, uint64(m.maxInc))
	b = binary.AppendUvarint(b, uint64(m.mtu))
	return appendBool(b, m.answers)
}

// decodeMeta ignores what follows, so that later versions may add to it.
func decodeMeta(b []byte) (m meta, err error) {
	r := &reader{b: b}
	m.epoch, m.seq = r.uvarint(), r.uvarint()
	inc := r.uvarint()
	if r.err == nil && (inc > math.MaxUint32 || m.epoch == 0 || m.seq > maxSeq) {
		r.fail(fmt.Errorf("epoch %d, sequence %d, incarnation %d", m.epoch, m.seq, inc))
	}
	m.maxInc = uint32(inc)
	if r.err == nil && len(r.b) > 0 { // an older node says no more
		if mtu := r.uvarint(); mtu <= maxMTU {
			m.mtu = int(mtu)
		}
		m.answers = r.byte() == 1
	}
	if r.err != nil {
		return meta{}, fmt.Errorf("node metadata: %w", r.err)
	}
	return m, nil
}

// sealMeta signs the metadata of this node: a version byte, the fields, the
// signature.
func (g *Gossip) sealMeta(m meta) ([]byte, error) {
	body := m.encode()
	sig, err := sign(g.signer(), g.metaText(g.cfg.NodeID, body))
	if err != nil {
		return nil, err
	}
	return appendBlob(appendBlob([]byte{wireVersion}, body), sig), nil
}

// openMeta reads a node's metadata, and checks that it is the node's.
func (g *Gossip) openMeta(node string, b []byte) (meta, error) {
	r := &reader{b: b}
	if v := r.byte(); r.err == nil && v != wireVersion {
		return meta{}, fmt.Errorf("node metadata of version %d: %w", v, errForeign)
	}
	body, sig := r.blob(maxMeta), r.blob(maxSig)
	if r.err != nil {
		return meta{}, fmt.Errorf("node metadata: %w", r.err)
	}
	m, err := decodeMeta(body)
	if err != nil {
		return meta{}, err
	}
	if m.epoch > epochLimit(time.Now()) {
		g.stats.future.Add(1)
		return meta{}, fmt.Errorf("node metadata of epoch %d, which can't be", m.epoch)
	}
	g.stats.verified.Add(1)
	if _, ok := verified(g.keysOf(node), g.metaText(node, body), sig); !ok {
		return meta{}, errors.New("node metadata that its node did not sign")
	}
	return m, nil
}
