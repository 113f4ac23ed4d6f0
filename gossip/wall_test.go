package gossip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-msgpack/v2/codec"
	"pgregory.net/rapid"

	"github.com/shoalnet/shoal/gossip/gossiptest"
	"github.com/shoalnet/shoal/spec"
)

// What memberlist sends, as it names the fields.
type (
	wirePing struct {
		SeqNo      uint32
		Node       string
		SourceAddr []byte `codec:",omitempty"`
		SourcePort uint16 `codec:",omitempty"`
		SourceNode string `codec:",omitempty"`
	}
	wireIndirect struct {
		SeqNo      uint32
		Target     []byte
		Port       uint16
		Node       string
		Nack       bool
		SourceAddr []byte `codec:",omitempty"`
		SourcePort uint16 `codec:",omitempty"`
		SourceNode string `codec:",omitempty"`
	}
	wireAck struct {
		SeqNo   uint32
		Payload []byte
	}
	wireAccuse struct {
		Incarnation uint32
		Node, From  string
	}
	wireAlive struct {
		Incarnation uint32
		Node        string
		Addr        []byte
		Port        uint16
		Meta, Vsn   []byte
	}
	wireHead struct {
		Nodes, UserStateLen int
		Join                bool
	}
	wireState struct {
		Name        string
		Addr        []byte
		Port        uint16
		Meta        []byte
		Incarnation uint32
		State       int
		Vsn         []byte
	}
	wireUser struct{ UserMsgLen int }
)

var vsn = []byte{1, 5, 2, 0, 0, 0}

func wire(typ byte, vs ...any) []byte {
	b := bytes.NewBuffer([]byte{typ})
	e := codec.NewEncoder(b, &codec.MsgpackHandle{})
	for _, v := range vs {
		if err := e.Encode(v); err != nil {
			panic(err)
		}
	}
	return b.Bytes()
}

func compound(parts ...[]byte) []byte {
	b := []byte{mlCompound, byte(len(parts))}
	for _, p := range parts {
		b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
	}
	return append(b, bytes.Join(parts, nil)...)
}

// attacker is at the address of a node of the cluster, which is not running, and
// has its keys.
type attacker struct {
	*Gossip // gives keys and signatures; it does not run
	t       *testing.T
	tr      *gossiptest.Transport
	i       int
}

func (c *cluster) attacker(t *testing.T, i int) *attacker {
	c.assign(i, nodeAddr(i), c.signer(i).Public())
	tr, err := c.net.Bind(nodeAddr(i))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Shutdown() })
	g, err := Open(Config{NodeID: nodeID(i), Cluster: "testcluster", Addr: nodeAddr(i).Addr(), DataDir: t.TempDir(), Transport: tr, Keys: c.ring, Signer: c.signer(i), Log: c.log})
	if err != nil {
		t.Fatal(err)
	}
	return &attacker{g, t, tr, i}
}

func (a *attacker) packet(to int, b []byte) {
	if _, err := a.tr.WriteTo(a.sealer.sealFrame(nil, b, a.sealer.packet), nodeAddr(to).String()); err != nil {
		a.t.Fatal(err)
	}
}

// stream sends a message over a stream and returns what comes back.
func (a *attacker) stream(to int, b []byte) ([]byte, error) {
	conn, err := a.tr.DialTimeout(nodeAddr(to).String(), time.Second)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	tr := &tracked{conns: map[*trackedConn]struct{}{}}
	tc, err := tr.add(conn)
	if err != nil {
		return nil, err
	}
	s := &sealed{trackedConn: tc, w: a.wall, dialed: true}
	if _, err := s.Write(b); err != nil {
		return nil, err
	}
	return io.ReadAll(s)
}

func (a *attacker) user(m message) []byte {
	m.from, m.addr = nodeID(a.i), nodeAddr(a.i)
	return append([]byte{mlUser}, m.encode()...)
}

// record makes a delta that says it is node's, signed by the attacker.
func (a *attacker) record(node string, epoch, seq uint64) message {
	d := &delta{node: node, epoch: epoch, seq: seq, full: true}
	d.changes = append(d.changes, newChange(seq, endpoint(66, 1, spec.EndpointActive), false))
	d.state = newRecord(node).stateAfter(d)
	sig, err := sign(a.signer(), a.recordText(d))
	if err != nil {
		a.t.Fatal(err)
	}
	d.sig = sig
	return message{header: header{typ: msgDelta}, deltas: []*delta{d}}
}

func (n *node) refused(r reason) uint64 { return n.wall.refused[r].Load() }

// Whatever somebody at a node's address, with that node's keys, says of others:
// nobody believes it, and everybody serves on.
func TestWithANodesKeysNobodySpeaksForAnother(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	a := c.attacker(t, 9)
	victim := c.node(2)
	victim.Gossip.mu.Lock()
	victimMeta := bytes.Clone(victim.metaRaw)
	victim.Gossip.mu.Unlock()
	ip := func(i int) []byte { return nodeAddr(i).Addr().AsSlice() }
	invented := wireAlive{1, "nobody", []byte{10, 0, 0, 99}, 7946, a.metaRaw, vsn}

	for _, tc := range []struct {
		name string
		b    []byte
		why  reason
	}{
		{"an invented member", wire(mlAlive, invented), refusedStranger},
		{"the same in a compound", compound(wire(mlAlive, invented)), refusedStranger},
		{"a member elsewhere", wire(mlAlive, wireAlive{99, nodeID(2), ip(9), 7946, victimMeta, vsn}), refusedStranger},
		{"a member with others' metadata", wire(mlAlive, wireAlive{99, nodeID(2), ip(2), 7946, a.metaRaw, vsn}), refusedForged},
		{"the last incarnation", wire(mlAlive, wireAlive{math.MaxUint32, nodeID(2), ip(2), 7946, victimMeta, vsn}), refusedClaim},
		{"versions nobody speaks", wire(mlAlive, wireAlive{2, nodeID(2), ip(2), 7946, victimMeta, []byte{9, 9, 9, 0, 0, 0}}), refusedShape},
		{"dead in the last incarnation", wire(mlDead, wireAccuse{math.MaxUint32, nodeID(2), nodeID(9)}), refusedClaim},
		{"suspect in the last incarnation", wire(mlSuspect, wireAccuse{math.MaxUint32, nodeID(2), nodeID(9)}), refusedClaim},
		{"accused by nobody", wire(mlDead, wireAccuse{1, nodeID(2), "nobody"}), refusedStranger},
		{"compressed", append([]byte{mlCompress}, make([]byte, 100)...), refusedKind},
		{"encrypted", append([]byte{mlEncrypt}, make([]byte, 100)...), refusedKind},
		{"a compound in a compound", compound(compound(wire(mlAck, wireAck{}))), refusedKind},
		{"a ping on another's behalf", wire(mlPing, wirePing{1, nodeID(1), []byte{192, 0, 2, 1}, 53, "x"}), refusedStranger},
		{"a ping to a stranger", wire(mlIndirectPing, wireIndirect{SeqNo: 1, Target: []byte{192, 0, 2, 1}, Port: 53, Node: "x"}), refusedStranger},
		{"nested", append([]byte{mlAlive}, bytes.Repeat([]byte{0x91}, 900)...), refusedShape},
		{"empty", []byte{}, refusedShape},
	} {
		before := c.node(1).refused(tc.why)
		a.packet(1, tc.b)
		c.eventually(5*time.Second, tc.name+" is refused", func() string {
			if c.node(1).refused(tc.why) == before {
				return fmt.Sprint(c.node(1).Stats().Refused)
			}
			return ""
		})
	}

	// Records.
	n := c.node(1)
	for name, tc := range map[string]struct {
		m     message
		count func(Stats) uint64
	}{
		"another's record":        {a.record(nodeID(2), 1000, 1), func(s Stats) uint64 { return s.Forged }},
		"of nobody":               {a.record("nobody", 1, 1), func(s Stats) uint64 { return s.Unassigned }},
		"of an epoch to come":     {a.record(nodeID(9), epochLimit(time.Now())+60, 1), func(s Stats) uint64 { return s.Future }},
		"of the last epoch":       {a.record(nodeID(9), math.MaxUint64, 1), func(s Stats) uint64 { return s.Malformed }},
		"of node 1, to itself":    {a.record(nodeID(1), 1000, 1), func(s Stats) uint64 { return s.Forged }},
		"of the last sequence":    {a.record(nodeID(9), 1, math.MaxUint64), func(s Stats) uint64 { return s.Malformed }},
		"digest of a later epoch": {message{header: header{typ: msgHave}, digest: []digestItem{{nodeID(1), 1 << 61, 1, 1}}}, func(s Stats) uint64 { return s.Future }},
	} {
		before := tc.count(n.Stats())
		a.packet(1, a.user(tc.m))
		c.eventually(5*time.Second, name+" is refused", func() string {
			if tc.count(n.Stats()) == before {
				return fmt.Sprintf("%+v", n.Stats())
			}
			return ""
		})
	}
	// A record whose content is not what was signed.
	m := a.record(nodeID(9), 2, 5)
	m.deltas[0].changes[0] = newChange(5, endpoint(66, 2, spec.EndpointActive), false)
	before := n.Stats().Forged
	a.packet(1, a.user(m))
	c.eventually(5*time.Second, "other content is refused", func() string {
		if n.Stats().Forged == before {
			return "no"
		}
		return ""
	})

	// Streams.
	states := func(s ...any) []byte { return wire(mlPushPull, append([]any{wireHead{len(s), 0, false}}, s...)...) }
	for name, b := range map[string][]byte{
		"a million nodes":      wire(mlPushPull, wireHead{1 << 20, 0, true}),
		"20 MB of state":       wire(mlPushPull, wireHead{0, 20 << 20, true}),
		"20 MB of message":     wire(mlUser, wireUser{20 << 20}),
		"less than nothing":    wire(mlUser, wireUser{-1}),
		"compressed":           append([]byte{mlCompress}, make([]byte, 31<<10)...),
		"nothing":              {},
		"an error":             append([]byte{mlErr}, 0x80),
		"versions of one byte": states(wireState{nodeID(2), ip(2), 7946, victimMeta, 1, mlStateAlive, []byte{1}}),
		"an invented member":   states(wireState{"nobody", []byte{10, 0, 0, 99}, 7946, a.metaRaw, 1, mlStateAlive, vsn}),
		"the last incarnation": states(wireState{nodeID(2), ip(2), 7946, victimMeta, math.MaxUint32, mlStateLeft, vsn}),
	} {
		before := n.wall.total()
		a.stream(1, b)
		c.eventually(5*time.Second, name+" is refused", func() string {
			if n.wall.total() == before {
				return fmt.Sprintf("%+v", n.Stats().Refused)
			}
			return ""
		})
	}
	c.unassign(9)
	c.eventually(10*time.Second, "all as before", c.agreed)
}

// An accusation that can't be told from a true one is refuted, and meanwhile
// those who hear the accused believe their own ears.
func TestFalseAccusationsDoNotMatter(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	a := c.attacker(t, 9)
	c.eventually(5*time.Second, "pinged", func() string {
		for _, n := range c.all() {
			if n.Stats().Pings < 8 {
				return "not yet"
			}
		}
		return ""
	})
	stop := time.Now().Add(3 * time.Second)
	worst := 0
	for k := uint32(1); time.Now().Before(stop); k++ {
		for to := 1; to <= 3; to++ {
			for _, from := range []string{nodeID(9), nodeID(2), nodeID(1)} {
				a.packet(to, wire(mlDead, wireAccuse{k % 40, nodeID(2), from}))
				a.packet(to, wire(mlSuspect, wireAccuse{k % 40, nodeID(2), from}))
			}
		}
		for _, i := range []int{1, 3} {
			if got := endpointsOf(c.node(i), 2); got != 1 {
				t.Fatalf("node %d has %d endpoints of the accused", i, got)
			}
			if liveness(c.node(i), 2) != "alive" {
				worst++
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("%d of 600 looks found it not alive", worst)
	if worst > 60 {
		t.Errorf("%d of some 600 looks found the accused not alive", worst)
	}
	c.unassign(9)
	c.eventually(10*time.Second, "agreed", c.agreed)
}

// Who is driven through incarnations vouches for more, and is heard on.
func TestIncarnationsAreOutgrown(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	a := c.attacker(t, 9)
	n := c.node(2)
	deadline := time.Now().Add(20 * time.Second)
	for n.bound() < 200 && time.Now().Before(deadline) {
		a.packet(2, wire(mlSuspect, wireAccuse{n.bound(), nodeID(2), nodeID(9)}))
		time.Sleep(5 * time.Millisecond)
	}
	if b := n.bound(); b < 200 {
		t.Fatalf("it vouches for %d", b)
	}
	c.unassign(9)
	c.eventually(10*time.Second, "heard in the new incarnation", func() string {
		for _, o := range c.all() {
			if o == n {
				continue
			}
			o.wall.mu.Lock()
			inc := o.wall.heard[nodeID(2)].maxInc
			o.wall.mu.Unlock()
			if inc < n.bound() {
				return fmt.Sprintf("%s has heard of %d", nodeID(o.i), inc)
			}
		}
		return c.agreed()
	})
}

func (n *node) bound() uint32 {
	n.wall.mu.Lock()
	defer n.wall.mu.Unlock()
	return n.wall.bound
}

// Recorded packets, sent again, and what has no key or is not from a node's
// address.
func TestReplaysAndStrangers(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(2)
	a := c.attacker(t, 9)
	n := c.node(1)
	p := a.sealer.sealFrame(nil, wire(mlAck, wireAck{SeqNo: 1}), a.sealer.packet)
	for range 100 {
		a.tr.WriteTo(p, nodeAddr(1).String())
	}
	for range 100 {
		a.tr.WriteTo(wire(mlAlive, wireAlive{1, "nobody", []byte{10, 0, 0, 99}, 7946, nil, vsn}), nodeAddr(1).String())
		a.tr.WriteTo(bytes.Repeat([]byte{sealForm, 0, 0, 0, 1}, 20), nodeAddr(1).String())
	}
	c.eventually(5*time.Second, "refused", func() string {
		if n.refused(refusedReplay) != 99 || n.refused(refusedSeal) != 200 {
			return fmt.Sprint(n.Stats().Refused)
		}
		return ""
	})
	c.unassign(9)
	a.packet(1, wire(mlAck, wireAck{SeqNo: 2}))
	if _, err := a.stream(1, wire(mlPushPull, wireHead{})); err == nil && n.refused(refusedSource) == 0 {
		t.Error("a stream of a node that was removed")
	}
	c.eventually(5*time.Second, "a removed node is out", func() string {
		if n.refused(refusedSource) < 2 {
			return fmt.Sprint(n.Stats().Refused)
		}
		return ""
	})
	c.eventually(5*time.Second, "agreed", c.agreed)
}

// The budget of one peer is not that of others, and it fills again.
func TestBudget(t *testing.T) {
	g := lone(t)
	ip := nodeAddr(5).Addr()
	n := 0
	for g.wall.spend(ip, 1, 100) {
		n++
	}
	if n < packetBurst || n > packetBurst+packetRate {
		t.Errorf("%d packets at once", n)
	}
	if !g.wall.spend(nodeAddr(6).Addr(), 1, 100) {
		t.Error("another peer has no budget left")
	}
	g.wall.budgets[ip].at = time.Now().Add(-time.Second)
	if !g.wall.spend(ip, 1, 100) {
		t.Error("the budget does not fill again")
	}
	g.wall.budgets[ip].at = time.Now().Add(time.Hour) // the clock was set back
	if !g.wall.spend(ip, 1, 100) {
		t.Error("no budget after the clock was set back")
	}
}

// Streams that say nothing, little, or very much.
func TestStreamsAreBounded(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(2)
	a := c.attacker(t, 9)
	n := c.node(1)
	var open []net.Conn
	for range 3 * openPerPeer {
		conn, err := a.tr.DialTimeout(nodeAddr(1).String(), time.Second)
		if err != nil {
			break
		}
		open = append(open, conn)
	}
	c.eventually(5*time.Second, "too many", func() string {
		if n.refused(refusedStreams) != 2*openPerPeer {
			return fmt.Sprint(n.refused(refusedStreams))
		}
		return ""
	})
	// The others are served meanwhile.
	c.node(2).put(5, 6)
	c.eventually(5*time.Second, "served", func() string {
		if got := endpointsOf(n, 2); got != 2 {
			return fmt.Sprint(got)
		}
		return ""
	})
	for _, conn := range open {
		conn.Close()
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	c.eventually(10*time.Second, "closed", func() string {
		n.wall.mu.Lock()
		defer n.wall.mu.Unlock()
		if o := n.wall.budgets[nodeAddr(9).Addr()].open; o != 0 {
			return fmt.Sprint(o, " are open")
		}
		return ""
	})
	// A 31 KB stream that unpacks to 90 MB, 32 at a time.
	done := make(chan struct{})
	for range 32 {
		go func() {
			a.stream(1, append([]byte{mlCompress}, make([]byte, 31<<10)...))
			done <- struct{}{}
		}()
	}
	for range 32 {
		<-done
	}
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > 64<<20 {
		t.Errorf("the heap grew by %d MB", grown>>20)
	}
	if n.wall.streamBytes.Load() != 0 {
		c.eventually(5*time.Second, "bytes given back", func() string {
			if v := n.wall.streamBytes.Load(); v != 0 {
				return fmt.Sprint(v)
			}
			return ""
		})
	}
	c.unassign(9)
	c.eventually(10*time.Second, "agreed", c.agreed)
}

// Every number that a peer sends is drawn from the ends of its range: nothing
// panics, and what memberlist may see is what it would send itself.
func TestNumbersOfPeers(t *testing.T) {
	g := lone(t)
	other := newSigner()
	g.SetDirectory(Directory{Nodes: map[string]NodeInfo{
		"self":    {Addr: nodeAddr(1).Addr(), GossipPort: 7946},
		nodeID(2): {Addr: nodeAddr(2).Addr(), GossipPort: 7946, Keys: append(NodeInfo{}.Keys, other.Public())},
	}})
	from := net.UDPAddrFromAddrPort(nodeAddr(2))
	rapid.Check(t, func(t *rapid.T) {
		u32 := rapid.SampledFrom([]uint32{0, 1, math.MaxUint32 - 1, math.MaxUint32})
		u16 := rapid.SampledFrom([]uint16{0, 1, math.MaxUint16 - 1, math.MaxUint16, 7946})
		num := rapid.SampledFrom([]int{math.MinInt, -1, 0, 1, math.MaxInt32, math.MaxInt - 1, math.MaxInt})
		id := rapid.SampledFrom([]string{"", "self", nodeID(2), "nobody", strings.Repeat("x", 65)})
		addr := rapid.SampledFrom([][]byte{nil, {1}, nodeAddr(1).Addr().AsSlice(), nodeAddr(2).Addr().AsSlice(), make([]byte, 16), make([]byte, 17)})
		vs := rapid.SampledFrom([][]byte{nil, {1}, {1, 5}, vsn, {0, 0, 0, 0, 0, 0}, {255, 255, 255, 255, 255, 255}, make([]byte, 7)})
		mt := rapid.SampledFrom([][]byte{nil, g.metaRaw, {wireVersion}, make([]byte, 513)})
		b := [][]byte{
			wire(mlPing, wirePing{u32.Draw(t, "seq"), id.Draw(t, "node"), addr.Draw(t, "addr"), u16.Draw(t, "port"), id.Draw(t, "source")}),
			wire(mlIndirectPing, wireIndirect{u32.Draw(t, "seq"), addr.Draw(t, "target"), u16.Draw(t, "port"), id.Draw(t, "node"), true, addr.Draw(t, "addr"), u16.Draw(t, "port"), id.Draw(t, "source")}),
			wire(mlAck, wireAck{u32.Draw(t, "seq"), mt.Draw(t, "payload")}),
			wire(mlNack, wireAck{SeqNo: u32.Draw(t, "seq")}),
			wire(mlSuspect, wireAccuse{u32.Draw(t, "inc"), id.Draw(t, "node"), id.Draw(t, "from")}),
			wire(mlDead, wireAccuse{u32.Draw(t, "inc"), id.Draw(t, "node"), id.Draw(t, "from")}),
			wire(mlAlive, wireAlive{u32.Draw(t, "inc"), id.Draw(t, "node"), addr.Draw(t, "addr"), u16.Draw(t, "port"), mt.Draw(t, "meta"), vs.Draw(t, "vsn")}),
		}
		var head, size byte = byte(rapid.SampledFrom([]int{0, 1, 254, 255}).Draw(t, "parts")), 0
		all := compound(b...)
		cut := rapid.IntRange(0, len(all)).Draw(t, "cut")
		broken := append([]byte{mlCompound, head}, all[2:]...)
		for _, p := range append(b, all, all[:cut], broken, []byte{mlCompound}, []byte{mlCompound, head, size}, []byte{mlCRC, 0, 0, 0, 0}) {
			sealedPacket := g.sealer.sealFrame(nil, p, g.sealer.packet)
			g.wall.packet(sealedPacket, from)
		}
		nodes, length := num.Draw(t, "nodes"), num.Draw(t, "length")
		state := wireState{id.Draw(t, "name"), addr.Draw(t, "addr"), u16.Draw(t, "port"), mt.Draw(t, "meta"), u32.Draw(t, "inc"), num.Draw(t, "state"), vs.Draw(t, "vsn")}
		for _, s := range [][]byte{
			wire(mlPushPull, wireHead{nodes, length, true}, state), wire(mlUser, wireUser{length}), wire(mlUser, wireUser{length}, state),
			wire(mlPing, wirePing{SeqNo: u32.Draw(t, "seq")}), wire(mlAck, wireAck{}),
		} {
			for _, dialed := range []bool{false, true} {
				out, err := g.wall.message(s, dialed)
				if err == nil && len(out) > len(s)+64 {
					t.Fatalf("%d bytes became %d", len(s), len(out))
				}
			}
		}
		g.wall.mu.Lock()
		defer g.wall.mu.Unlock()
		if g.wall.inc < 1 || g.wall.inc > g.wall.bound+1 {
			t.Fatalf("the incarnation is %d, vouched for are %d", g.wall.inc, g.wall.bound)
		}
		if len(g.wall.heard) > 2 {
			t.Fatalf("heard of %d", len(g.wall.heard))
		}
	})
}

// The same of our own messages.
func TestNumbersInRecords(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g, err := Open(Config{NodeID: "self", Cluster: "c", Addr: nodeAddr(1).Addr(), DataDir: tempDir(t), Transport: nowhere{}, Keys: testRing, Signer: newSigner(), Log: discard})
		if err != nil {
			t.Fatal(err)
		}
		other := newSigner()
		g.SetDirectory(Directory{Nodes: map[string]NodeInfo{
			"self":    {Addr: nodeAddr(1).Addr(), GossipPort: 7946},
			nodeID(2): {Addr: nodeAddr(2).Addr(), GossipPort: 7946, Keys: append(NodeInfo{}.Keys, other.Public())},
		}})
		g.SetEndpoints(nil)
		was := g.Snapshot().Members[0].Epoch
		u64 := rapid.SampledFrom([]uint64{0, 1, 2, 1 << 40, maxEpoch, math.MaxUint64 - 1, math.MaxUint64})
		node := rapid.SampledFrom([]string{"self", nodeID(2)})
		for range 6 {
			m := message{header: header{typ: msgType(rapid.IntRange(0, 20).Draw(t, "type")), from: nodeID(2), addr: nodeAddr(2)}, id: u64.Draw(t, "id"), epoch: u64.Draw(t, "epoch"), seq: u64.Draw(t, "seq"),
				count: u64.Draw(t, "count"), sum: u64.Draw(t, "sum"), index: u64.Draw(t, "index"), last: true}
			d := &delta{node: node.Draw(t, "node"), epoch: u64.Draw(t, "epoch"), prev: u64.Draw(t, "prev"), seq: u64.Draw(t, "seq"), full: rapid.Bool().Draw(t, "full")}
			d.changes = append(d.changes, newChange(u64.Draw(t, "change"), endpoint(1, 1, spec.EndpointActive), false))
			d.state = newRecord(d.node).stateAfter(d)
			d.sig, _ = sign(other, g.recordText(d))
			m.deltas = []*delta{d}
			m.digest = []digestItem{{d.node, u64.Draw(t, "epoch"), u64.Draw(t, "seq"), u64.Draw(t, "hash")}}
			m.wants = []want{{d.node, u64.Draw(t, "epoch"), u64.Draw(t, "seq"), d.full}}
			g.receive(m.encode())
		}
		if s := g.Snapshot(); s.Members[0].Epoch != was {
			t.Fatalf("others moved this node's epoch to %d", s.Members[0].Epoch)
		}
		for id, r := range g.recs {
			if r.epoch > epochLimit(time.Now()) || r.seq > maxSeq {
				t.Fatalf("%s is at %d.%d", id, r.epoch, r.seq)
			}
		}
		g.SetEndpoints([]spec.Endpoint{endpoint(1, 1, spec.EndpointActive)})
	})
}

func FuzzWall(f *testing.F) {
	f.Add(wire(mlAlive, wireAlive{1, nodeID(2), nodeAddr(2).Addr().AsSlice(), 7946, nil, vsn}), false)
	f.Add(wire(mlPushPull, wireHead{1, 0, true}, wireState{Name: nodeID(2), Vsn: vsn}), true)
	f.Add(compound(wire(mlSuspect, wireAccuse{1, nodeID(2), "self"}), wire(mlPing, wirePing{SeqNo: 1})), false)
	f.Fuzz(func(t *testing.T, b []byte, dialed bool) {
		g := lone(t)
		g.SetDirectory(Directory{Nodes: map[string]NodeInfo{nodeID(2): {Addr: nodeAddr(2).Addr(), GossipPort: 7946}}})
		g.wall.message(b, dialed)
		g.wall.packet(g.sealer.sealFrame(nil, b, g.sealer.packet), net.UDPAddrFromAddrPort(nodeAddr(2)))
	})
}

// What the wall lets through decodes in memberlist, and means the same.
func TestWallReadsAsMemberlistDoes(t *testing.T) {
	a := wireAlive{77, nodeID(2), nodeAddr(2).Addr().AsSlice(), 7946, bytes.Repeat([]byte{3}, 300), vsn}
	m, rest, err := parseSwim(wire(mlAlive, a)[1:])
	if err != nil || len(rest) != 0 || m.inc != a.Incarnation || string(m.node) != a.Node || !bytes.Equal(m.addr, a.Addr) || m.port != a.Port || !bytes.Equal(m.meta, a.Meta) || !bytes.Equal(m.vsn, vsn) {
		t.Errorf("%+v, %v", m, err)
	}
	head := appendPushPull(nil, 70000, 80000, true)
	var h wireHead
	if err := codec.NewDecoderBytes(head[1:], &codec.MsgpackHandle{}).Decode(&h); err != nil || h != (wireHead{70000, 80000, true}) || head[0] != mlPushPull {
		t.Errorf("%+v, %v", h, err)
	}
}

// Two clusters with the same key don't open each other's frames, and a frame says
// nothing readable.
func TestSeal(t *testing.T) {
	a, _ := newSealer("one", testRing)
	b, _ := newSealer("two", testRing)
	f := a.sealFrame(nil, []byte("hello hello hello"), a.packet)
	if bytes.Contains(f, []byte("hello")) || bytes.Contains(f, []byte("one")) {
		t.Error("it can be read")
	}
	if _, err := b.openFrame(bytes.Clone(f), b.packet); !errors.Is(err, errSealOpen) {
		t.Errorf("another cluster: %v", err)
	}
	if _, err := a.openFrame(bytes.Clone(f), a.stream); !errors.Is(err, errSealOpen) {
		t.Errorf("a packet as a stream: %v", err)
	}
	for i := range f {
		g := bytes.Clone(f)
		g[i] ^= 1
		if _, err := a.openFrame(g, a.packet); err == nil {
			t.Errorf("opens with byte %d changed", i)
		}
		if _, err := a.openFrame(bytes.Clone(f[:i]), a.packet); err == nil {
			t.Errorf("opens with %d bytes", i)
		}
	}
	if got, err := a.openFrame(f, a.packet); err != nil || string(got) != "hello hello hello" {
		t.Errorf("%q, %v", got, err)
	}
}
