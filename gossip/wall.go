package gossip

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// The wall stands between the network and memberlist. What passes it comes from
// the address of a node that the managers know, was sealed with a key of the
// cluster, is of a size and kind that memberlist needs, and makes no claim that
// it has not been checked for:
//
//   - "alive" only of an assigned node, at its assigned address, with metadata
//     that it signed, in an incarnation that it vouched for;
//   - "suspect" and "dead" only of and by assigned nodes, in an incarnation that
//     the accused vouched for. Accusations can't be signed (memberlist passes on
//     its own encoding of them), so whoever has the key can make them: the
//     accused refutes them, the others ask it themselves before they believe it
//     (member.answers), and managers go by its reports. Without the bound an
//     accusation in the last incarnation, 2^32-1, would make the accused wrap to
//     0, which nobody believes;
//   - no compressed frames, which memberlist unpacks 1,000-fold into memory, and
//     no encrypted ones;
//   - nothing that would have this node send to an address that is no node's.
//
// What is refused is counted by reason (Stats), never logged one by one.

// Bounds.
const (
	// maxStream bounds one message over a stream: memberlist's push/pull is the
	// largest, some 220 bytes a node of at most spec.MaxNodes.
	maxStream = 4 << 20
	// maxFrame is the text of one sealed frame of it.
	maxFrame = 64 << 10
	// streamsMax are read or handled at a time; streamBytesMax are buffered.
	streamsMax     = 32
	streamBytesMax = 32 << 20
	// openMax connections are there at a time; openPerPeer of one address. One
	// node makes reliableParallel at most, and a few for memberlist.
	openMax     = 256
	openPerPeer = 24
	// A peer's budget. A node that tells of a change 1,000 times a second sends
	// a tenth of the packets; a whole table of 100,000 endpoints is some 40 MB.
	packetRate, packetBurst = 10_000, 20_000     // packets, a second and at once
	byteRate, byteBurst     = 16 << 20, 64 << 20 // bytes of packets and streams
	// replays are remembered up to twice as many packets.
	replayMax = 16 << 10
	// vouched is how many incarnations a node vouches for ahead, and vouchAgain
	// how many before that it vouches anew.
	vouched, vouchAgain = 16, 8
)

// reason why something was refused; the index of wall.refused.
type reason int

const (
	refusedSource   reason = iota // not from a node's address
	refusedSeal                   // not sealed, or with no key of ours
	refusedReplay                 // the same packet again
	refusedRate                   // over the peer's budget
	refusedStreams                // too many connections, or bytes in them
	refusedKind                   // compressed, encrypted, nested or unknown
	refusedShape                  // does not decode, or numbers out of range
	refusedStranger               // of a node that is not assigned, or elsewhere
	refusedForged                 // metadata that its node did not sign
	refusedStale                  // metadata older than what is known
	refusedClaim                  // an incarnation that the node did not vouch for
	reasons
)

var reasonNames = [reasons]string{"source", "seal", "replay", "rate", "streams", "kind", "shape", "stranger", "forged", "stale", "claim"}

type wall struct {
	g *Gossip

	refused [reasons]atomic.Uint64
	told    atomic.Uint64 // of refused, when it was last logged

	streamBytes atomic.Int64
	tokens      chan struct{} // of streams being read or handled

	mu      sync.Mutex
	budgets map[netip.Addr]*budget
	seen    [2]map[[12]byte]struct{} // nonces of packets, the older ones second
	heard   map[string]voucher
	// own incarnation, as memberlist counts it: see accused.
	inc, bound uint32
}

// voucher is what a node last signed of itself.
type voucher struct {
	raw        []byte
	epoch, seq uint64
	maxInc     uint32
	inc        uint32 // the highest that was let in, of those it vouched for
	path       path
	told       time.Time // when the node itself was last told of it
}

// metaTellEvery bounds what those who say something old can have a node sent.
const metaTellEvery = time.Second

type budget struct {
	packets, bytes float64
	at             time.Time
	open           int // connections
}

func newWall(g *Gossip) *wall {
	return &wall{g: g, tokens: make(chan struct{}, streamsMax), budgets: map[netip.Addr]*budget{}, heard: map[string]voucher{}, inc: 1, bound: vouched,
		seen: [2]map[[12]byte]struct{}{{}, {}}}
}

func (w *wall) refuse(r reason) { w.refused[r].Add(1) }

// total of what was refused, without replays: a network may well make two of one.
func (w *wall) total() (n uint64) {
	for r := range w.refused {
		if reason(r) != refusedReplay && reason(r) != refusedStale {
			n += w.refused[r].Load()
		}
	}
	return n
}

// tellEvery bounds how often what was refused is logged.
const tellEvery = time.Minute

// tell logs what was refused since the last time, in one line; false if that is
// nothing.
func (w *wall) tell() bool {
	n := w.total()
	if n == w.told.Load() {
		return false
	}
	args := []any{"since_last", n - w.told.Swap(n)}
	for r, name := range reasonNames {
		if v := w.refused[r].Load(); v > 0 {
			args = append(args, name, v)
		}
	}
	w.g.log.Warn("gossip that was not let in; the numbers are of all since the start, by reason", args...)
	return true
}

// forget drops what is of nodes no longer in the directory.
func (w *wall) forget(d *directory) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for id := range w.heard {
		if _, ok := d.nodes[id]; !ok && id != w.g.cfg.NodeID {
			delete(w.heard, id)
		}
	}
	for ip, b := range w.budgets {
		if !d.ips[ip] && b.open == 0 {
			delete(w.budgets, ip)
		}
	}
}

func ipOf(a net.Addr) netip.Addr {
	switch a := a.(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap().WithZone("")
	case *net.TCPAddr:
		return a.AddrPort().Addr().Unmap().WithZone("")
	}
	return netip.Addr{}
}

// known tells whether an address is a node's.
func (w *wall) known(ip netip.Addr) bool {
	d := w.g.dir.Load()
	return d != nil && d.ips[ip]
}

// budget of an address, filled up to now. Under mu.
func (w *wall) budget(ip netip.Addr, now time.Time) *budget {
	b := w.budgets[ip]
	if b == nil {
		b = &budget{packets: packetBurst, bytes: byteBurst, at: now}
		w.budgets[ip] = b
	}
	// A clock that is set back must not take anything away.
	dt := max(0, now.Sub(b.at).Seconds())
	b.at = now
	b.packets = min(packetBurst, b.packets+dt*packetRate)
	b.bytes = min(byteBurst, b.bytes+dt*byteRate)
	return b
}

// spend takes from an address's budget.
func (w *wall) spend(ip netip.Addr, packets, n int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.budget(ip, time.Now())
	if b.packets < float64(packets) || b.bytes < float64(n) {
		return false
	}
	b.packets -= float64(packets)
	b.bytes -= float64(n)
	return true
}

// replayed notes a packet by its nonce, and tells whether it was seen before.
// The list is short: it keeps a recorded packet, sent again and again with a
// forged source, from using up that node's budget. What is told again after that
// is told in vain by its sequence.
func (w *wall) replayed(nonce [12]byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.seen {
		if _, ok := s[nonce]; ok {
			return true
		}
	}
	if len(w.seen[0]) >= replayMax {
		w.seen[0], w.seen[1] = w.seen[1], w.seen[0]
		clear(w.seen[0])
	}
	w.seen[0][nonce] = struct{}{}
	return false
}

// packet opens one UDP packet and returns what memberlist may see of it; nil if
// nothing.
func (w *wall) packet(b []byte, from net.Addr) []byte {
	ip := ipOf(from)
	if !w.known(ip) {
		w.refuse(refusedSource)
		return nil
	}
	var nonce [12]byte
	if len(b) >= sealOverhead {
		copy(nonce[:], b[5:sealHeader])
	}
	n := len(b)
	b, err := w.g.sealer.openFrame(b, w.g.sealer.packet)
	if err != nil {
		w.refuse(refusedSeal)
		return nil
	}
	if w.replayed(nonce) {
		w.refuse(refusedReplay)
		return nil
	}
	if !w.spend(ip, 1, n) {
		w.refuse(refusedRate)
		return nil
	}
	// The checksum says nothing that the seal does not.
	if len(b) >= 5 && b[0] == mlCRC {
		b = b[5:]
	}
	if len(b) == 0 {
		w.refuse(refusedShape)
		return nil
	}
	if b[0] != mlCompound {
		if !w.command(b) {
			return nil
		}
		return b
	}
	if len(b) < 2 || len(b) < 2+2*int(b[1]) {
		w.refuse(refusedShape)
		return nil
	}
	count := int(b[1])
	lens, rest := b[2:2+2*count], b[2+2*count:]
	var good [][]byte
	for i := range count {
		size := int(binary.BigEndian.Uint16(lens[2*i:]))
		if size == 0 || size > len(rest) {
			w.refuse(refusedShape)
			break
		}
		if part := rest[:size]; w.command(part) {
			good = append(good, part)
		}
		rest = rest[size:]
	}
	switch {
	case len(good) == 0:
		return nil
	case len(good) == count:
		return b
	}
	out := append(make([]byte, 0, len(b)), mlCompound, byte(len(good)))
	for _, p := range good {
		out = binary.BigEndian.AppendUint16(out, uint16(len(p)))
	}
	for _, p := range good {
		out = append(out, p...)
	}
	return out
}

// command tells whether memberlist may see one message of a packet.
func (w *wall) command(b []byte) bool {
	typ, body := b[0], b[1:]
	switch typ {
	case mlUser:
		return true // receive checks it
	case mlPing, mlIndirectPing, mlAck, mlNack, mlSuspect, mlAlive, mlDead:
	default:
		w.refuse(refusedKind)
		return false
	}
	m, _, err := parseSwim(body)
	if err != nil {
		w.refuse(refusedShape)
		return false
	}
	switch typ {
	case mlPing, mlIndirectPing:
		ok := w.replyTo(m.sourceAddr, m.sourcePort)
		if typ == mlIndirectPing {
			ok = ok && w.isNode(m.target, m.port)
		}
		if !ok {
			w.refuse(refusedStranger)
		}
		return ok
	case mlAlive:
		return w.alive(m)
	case mlSuspect, mlDead:
		if !w.g.assigned(string(m.from)) {
			w.refuse(refusedStranger)
			return false
		}
		return w.accused(m)
	}
	return true
}

func toAddrPort(addr []byte, port uint16) (netip.AddrPort, bool) {
	ip, ok := netip.AddrFromSlice(addr)
	return netip.AddrPortFrom(ip.Unmap(), port), ok
}

// replyTo tells whether an answer may be sent there; without an address it goes
// where the packet came from.
func (w *wall) replyTo(addr []byte, port uint16) bool {
	return len(addr) == 0 && port == 0 || w.isNode(addr, port)
}

func (w *wall) isNode(addr []byte, port uint16) bool {
	at, ok := toAddrPort(addr, port)
	d := w.g.dir.Load()
	return ok && d != nil && (d.ats[at] != "" || at == w.g.addr)
}

// alive judges what is said of a living node.
func (w *wall) alive(m swim) bool {
	id := string(m.node)
	at, ok := toAddrPort(m.addr, m.port)
	if !ok || m.inc == 0 || !goodVersions(m.vsn) {
		w.refuse(refusedShape)
		return false
	}
	if id == w.g.cfg.NodeID {
		if at != w.g.addr {
			// Of a former life elsewhere, perhaps; in any case not of this one. The
			// others forget it when the managers tell them where this node is now.
			w.refuse(refusedStranger)
			return false
		}
	} else if d := w.g.dir.Load(); d == nil || d.ats[at] != id {
		w.refuse(refusedStranger)
		return false
	}
	w.mu.Lock()
	v, known := w.heard[id]
	w.mu.Unlock()
	if !known || !bytes.Equal(v.raw, m.meta) {
		n, err := w.g.openMeta(id, m.meta)
		switch {
		case err != nil:
			w.refuse(refusedForged)
			return false
		case known && id != w.g.cfg.NodeID && (n.epoch < v.epoch || n.epoch == v.epoch && n.seq < v.seq) && w.stillSigned(id, v):
			// A former one, told again; of this node that is how it hears which
			// incarnation its former life has reached.
			w.refuse(refusedStale)
			w.tellNode(id, at)
			return false
		}
		v = voucher{raw: bytes.Clone(m.meta), epoch: n.epoch, seq: n.seq, maxInc: n.maxInc, inc: v.inc, path: n.path}
		w.mu.Lock()
		w.heard[id] = v
		w.mu.Unlock()
	}
	if m.inc > v.maxInc {
		w.refuse(refusedClaim)
		return false
	}
	w.reached(id, m.inc)
	if id == w.g.cfg.NodeID {
		w.g.outgrowMeta(v.epoch, v.seq)
		w.outgrow(m.inc)
	}
	return true
}

// tellNode lets a node know what was heard of it, if what is said of it now is older:
// where it has lost what it had signed, it can only hear so that it must sign more.
func (w *wall) tellNode(id string, at netip.AddrPort) {
	w.mu.Lock()
	v, now := w.heard[id], time.Now()
	due := now.Sub(v.told) >= metaTellEvery
	if due {
		v.told = now
		w.heard[id] = v
	}
	w.mu.Unlock()
	if due {
		m := message{header: w.g.header(msgMeta), meta: v.raw}
		w.g.packet(id, at, m.encode())
	}
}

// said is what a node says of its end of the data path, in metadata that passed
// alive.
func (w *wall) said(id string, raw []byte) path {
	w.mu.Lock()
	v, known := w.heard[id]
	w.mu.Unlock()
	if known && bytes.Equal(v.raw, raw) {
		return v.path
	}
	m, err := w.g.openMeta(id, raw)
	if err != nil {
		return path{}
	}
	return m.path
}

// stillSigned tells whether a voucher was signed with a key that is the node's.
func (w *wall) stillSigned(id string, v voucher) bool {
	_, err := w.g.openMeta(id, v.raw)
	return err == nil
}

// goodVersions: memberlist refuses to merge anything with a cluster in which one
// node claims versions that the others don't understand (state.go,
// verifyProtocol). It speaks 2 and understands 1 to 5; our delegate says 0.
func goodVersions(v []byte) bool {
	return len(v) == 6 && v[0] >= 1 && v[0] <= 2 && v[1] >= 2 && v[2] == 2 && v[3] == 0 && v[5] == 0
}

// accused judges what is said of a node that does not answer.
func (w *wall) accused(m swim) bool {
	id := string(m.node)
	if !w.g.assigned(id) {
		w.refuse(refusedStranger)
		return false
	}
	w.mu.Lock()
	bound := w.heard[id].maxInc
	if id == w.g.cfg.NodeID {
		bound = w.bound
	}
	w.mu.Unlock()
	if id == w.g.cfg.NodeID && len(m.meta) > 0 {
		// A former life of this node died, for the peer: with what it had signed.
		if n, err := w.g.openMeta(id, m.meta); err == nil {
			bound = max(bound, n.maxInc)
			w.g.outgrowMeta(n.epoch, n.seq)
		}
	}
	if m.inc > bound {
		w.refuse(refusedClaim)
		return false
	}
	w.reached(id, m.inc)
	if id == w.g.cfg.NodeID {
		w.outgrow(m.inc)
	}
	return true
}

// reached notes the incarnation in which a node was last spoken of.
func (w *wall) reached(id string, inc uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if v, ok := w.heard[id]; ok && inc > v.inc {
		v.inc = inc
		w.heard[id] = v
	}
}

// accuse has memberlist suspect a node that has left this one's pings unanswered.
// memberlist probes one node after the other, and with more time for each the more of
// them are silent: where many have died at once it finds them one every two seconds.
// What follows is as after its own probe: the others confirm it, and the accused, if it
// hears of it, refutes.
func (w *wall) accuse(id string) {
	w.mu.Lock()
	v, ok := w.heard[id]
	w.mu.Unlock()
	if tr := w.g.tr.Load(); ok && tr != nil {
		w.g.stats.accused.Add(1)
		tr.inject(suspectMessage(min(v.inc, v.maxInc), id, w.g.cfg.NodeID))
	}
}

// outgrow follows memberlist's refutation of what is said of this node: its
// incarnation goes past that (state.go, refute). When it nears what this node has
// vouched for, it vouches for more.
func (w *wall) outgrow(inc uint32) {
	w.mu.Lock()
	if inc >= w.inc && inc < math.MaxUint32 {
		w.inc = inc + 1
	}
	near := w.bound-min(w.bound, w.inc) < vouchAgain
	w.mu.Unlock()
	if near {
		w.g.renewMeta()
	}
}

// vouch returns the incarnations that this node's next metadata vouches for.
func (w *wall) vouch() uint32 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.inc < math.MaxUint32-vouched-1 {
		w.bound = max(w.bound, w.inc+1+vouched)
	}
	return w.bound
}

// advanced: memberlist took up another incarnation to spread this node's
// metadata (memberlist.go, UpdateNode).
func (w *wall) advanced() {
	w.mu.Lock()
	w.inc++
	w.mu.Unlock()
}

// message judges a whole message of a stream; dialed tells whether this node
// asked for it.
func (w *wall) message(b []byte, dialed bool) ([]byte, error) {
	if len(b) == 0 {
		w.refuse(refusedShape)
		return nil, errors.New("empty message")
	}
	typ, body := b[0], b[1:]
	switch {
	case typ == mlPushPull:
		return w.pushPull(body)
	case typ == mlUser && !dialed:
		m, rest, err := parseSwim(body)
		if err != nil || m.length != len(rest) {
			w.refuse(refusedShape)
			return nil, fmt.Errorf("user message: %w", cmpErr(err))
		}
		return b, nil
	case typ == mlPing && !dialed, typ == mlAck && dialed:
		if _, rest, err := parseSwim(body); err != nil || len(rest) > 0 {
			w.refuse(refusedShape)
			return nil, fmt.Errorf("ping over a stream: %w", cmpErr(err))
		}
		return b, nil
	}
	w.refuse(refusedKind)
	return nil, fmt.Errorf("message of type %d does not belong on a stream", typ)
}

func cmpErr(err error) error {
	if err == nil {
		return errWire
	}
	return err
}

// pushPull takes out of all that a peer knows of the members what is not to be
// believed.
func (w *wall) pushPull(b []byte) ([]byte, error) {
	head, rest, err := parseSwim(b)
	if err != nil || head.count > len(rest) {
		w.refuse(refusedShape)
		return nil, fmt.Errorf("push/pull: %w", cmpErr(err))
	}
	states, kept := make([]byte, 0, len(rest)), 0
	for range head.count {
		m, after, err := parseSwim(rest)
		if err != nil {
			w.refuse(refusedShape)
			return nil, fmt.Errorf("push/pull: %w", err)
		}
		if m.state == mlStateAlive && w.alive(m) || m.state != mlStateAlive && w.accused(m) {
			states = append(states, rest[:len(rest)-len(after)]...)
			kept++
		}
		rest = after
	}
	if head.length != len(rest) {
		w.refuse(refusedShape)
		return nil, fmt.Errorf("push/pull: %w", errWire)
	}
	out := appendPushPull(make([]byte, 0, len(b)+64), kept, len(rest), head.join)
	return append(append(out, states...), rest...), nil
}

// ---- streams ----

// A stream begins with 16 random bytes of whoever opens it, which are in the
// additional data of all its frames, with their direction, number, and whether
// one is the last of its message: no frame stands for another, on this stream or
// the next. A frame is preceded by its length, the highest bit of which marks the
// last one.
const (
	streamID  = 16
	lastFrame = 1 << 31
)

// enter counts a connection that was accepted.
func (w *wall) enter(ip netip.Addr, open int) bool {
	if !w.known(ip) {
		w.refuse(refusedSource)
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.budget(ip, time.Now())
	if open >= openMax || b.open >= openPerPeer {
		w.refuse(refusedStreams)
		return false
	}
	b.open++
	return true
}

func (w *wall) exit(ip netip.Addr) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if b := w.budgets[ip]; b != nil && b.open > 0 {
		b.open--
	}
}

// sealed is a stream of which memberlist sees whole messages, opened and judged.
// It is used by one goroutine at a time, as memberlist does.
type sealed struct {
	*trackedConn
	w      *wall
	dialed bool
	id     []byte // nil: not known yet
	out    uint32 // frames written
	in     uint32 // frames read
	text   []byte // of a message, not read yet
	bytes  int64  // buffered, of wall.streamBytes
	token  bool
	err    error
	once   sync.Once
}

func (c *sealed) aad(fromDialer bool, n uint32, last bool) []byte {
	b := append(make([]byte, 0, 64), c.w.g.sealer.stream...)
	b = append(b, c.id...)
	b = appendBool(b, fromDialer)
	b = binary.BigEndian.AppendUint32(b, n)
	return appendBool(b, last)
}

// Write sends one message: memberlist writes each in one call.
func (c *sealed) Write(b []byte) (int, error) {
	if len(b) > maxStream {
		return 0, fmt.Errorf("gossip: message of %d bytes: the longest allowed is %d", len(b), maxStream)
	}
	var out []byte
	if c.id == nil {
		if !c.dialed {
			return 0, errors.New("gossip: an answer before the question")
		}
		c.id = randomBytes(streamID)
		out = append(out, c.id...)
	}
	for rest := b; ; {
		text := rest[:min(len(rest), maxFrame)]
		rest = rest[len(text):]
		head := uint32(len(text) + sealOverhead)
		if len(rest) == 0 {
			head |= lastFrame
		}
		out = binary.BigEndian.AppendUint32(out, head)
		out = c.w.g.sealer.sealFrame(out, text, c.aad(c.dialed, c.out, len(rest) == 0))
		c.out++
		if len(rest) == 0 {
			break
		}
	}
	if _, err := c.trackedConn.Write(out); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Read gives the next message, bit by bit.
func (c *sealed) Read(p []byte) (int, error) {
	for len(c.text) == 0 {
		if c.err != nil {
			return 0, c.err
		}
		text, err := c.next()
		if err == nil {
			text, err = c.w.message(text, c.dialed)
		}
		if err != nil {
			// memberlist would tell the peer why; a stranger is told nothing.
			c.err = io.EOF
			c.trackedConn.SetDeadline(time.Now())
			return 0, c.err
		}
		c.text = text
	}
	n := copy(p, c.text)
	c.text = c.text[n:]
	return n, nil
}

// next reads one message.
func (c *sealed) next() ([]byte, error) {
	if c.id == nil {
		if c.dialed {
			return nil, errors.New("gossip: an answer before the question")
		}
		id := make([]byte, streamID)
		if _, err := io.ReadFull(c.trackedConn, id); err != nil {
			return nil, err
		}
		c.id = id
	}
	ip := ipOf(c.RemoteAddr())
	var text []byte
	for {
		var head [4]byte
		if _, err := io.ReadFull(c.trackedConn, head[:]); err != nil {
			return nil, err
		}
		v := binary.BigEndian.Uint32(head[:])
		last, size := v&lastFrame != 0, int(v&^lastFrame)
		if size < sealOverhead || size > maxFrame+sealOverhead {
			c.w.refuse(refusedSeal)
			return nil, errSealForm
		}
		if len(text)+size > maxStream+2*sealOverhead {
			c.w.refuse(refusedShape)
			return nil, errWire
		}
		if c.bytes += int64(size); c.w.streamBytes.Add(int64(size)) > streamBytesMax {
			c.w.refuse(refusedStreams)
			return nil, errors.New("gossip: too much in streams at a time")
		}
		frame := make([]byte, size)
		if _, err := io.ReadFull(c.trackedConn, frame); err != nil {
			return nil, err
		}
		open, err := c.w.g.sealer.openFrame(frame, c.aad(!c.dialed, c.in, last))
		if err != nil {
			c.w.refuse(refusedSeal)
			return nil, err
		}
		c.in++
		if !c.w.spend(ip, 0, size) {
			c.w.refuse(refusedRate)
			return nil, errors.New("gossip: the peer is over its budget")
		}
		// Who can seal is one of us: only such wait for a place.
		if !c.dialed && !c.token {
			select {
			case c.w.tokens <- struct{}{}:
				c.token = true
			case <-time.After(streamTimeout):
				c.w.refuse(refusedStreams)
				return nil, errors.New("gossip: too many streams at a time")
			}
		}
		if text = append(text, open...); last {
			return text, nil
		}
	}
}

func (c *sealed) Close() error {
	c.once.Do(func() {
		c.w.streamBytes.Add(-c.bytes)
		if c.token {
			<-c.w.tokens
		}
		if !c.dialed {
			c.w.exit(ipOf(c.RemoteAddr()))
		}
	})
	return c.trackedConn.Close()
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails (crypto/rand)
	return b
}
