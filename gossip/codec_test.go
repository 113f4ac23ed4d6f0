package gossip

import (
	"bytes"
	"encoding/binary"
	"math"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/shoalnet/shoal/spec"
)

func drawEndpoint(t *rapid.T) spec.Endpoint {
	str := rapid.StringN(0, 20, 60)
	ep := spec.Endpoint{
		Task: str.Draw(t, "task"), TaskName: str.Draw(t, "name"), Hostname: str.Draw(t, "host"), Service: str.Draw(t, "service"),
		Slot: rapid.Int().Draw(t, "slot"), Network: str.Draw(t, "network"), State: spec.EndpointState(rapid.IntRange(0, 2).Draw(t, "state")),
	}
	for range rapid.IntRange(0, 3).Draw(t, "addrs") {
		if rapid.Bool().Draw(t, "v6") {
			ep.Addrs = append(ep.Addrs, netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "addr"))))
		} else {
			ep.Addrs = append(ep.Addrs, netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "addr"))))
		}
	}
	for range rapid.IntRange(0, 3).Draw(t, "aliases") {
		ep.Aliases = append(ep.Aliases, str.Draw(t, "alias"))
	}
	return ep
}

func drawDelta(t *rapid.T) *delta {
	d := &delta{node: rapid.StringN(1, 12, 60).Draw(t, "node"), epoch: rapid.Uint64Range(1, maxEpoch).Draw(t, "epoch"),
		prev: rapid.Uint64Max(1<<40).Draw(t, "prev"), left: rapid.Bool().Draw(t, "left"), full: rapid.Bool().Draw(t, "full")}
	if d.full {
		d.prev = 0
	}
	d.seq = d.prev
	for range rapid.IntRange(0, 4).Draw(t, "changes") {
		d.seq++
		ep, gone := drawEndpoint(t), !d.full && rapid.Bool().Draw(t, "gone")
		if gone {
			ep = spec.Endpoint{Task: ep.Task, Network: ep.Network}
		}
		d.changes = append(d.changes, newChange(d.seq, ep, gone))
	}
	d.seq++
	d.state = [32]byte(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "state"))
	d.sig = rapid.SliceOfN(rapid.Byte(), 1, maxSig).Draw(t, "sig")
	return d
}

func drawMessage(t *rapid.T) *message {
	m := &message{}
	m.typ = msgType(rapid.IntRange(int(msgDelta), int(msgMeta)).Draw(t, "type"))
	m.from, m.addr = "node01", netip.AddrPortFrom(nodeAddr(1).Addr(), rapid.Uint16().Draw(t, "port"))
	if m.typ != msgDelta && m.typ != msgState && m.typ != msgHave && m.typ != msgMeta {
		m.id = rapid.Uint64().Draw(t, "id")
	}
	switch m.typ {
	case msgDelta:
		m.deltas = []*delta{drawDelta(t)}
	case msgDigest, msgDigestRep, msgState, msgHave:
		for range rapid.IntRange(0, 4).Draw(t, "items") {
			m.digest = append(m.digest, digestItem{node: "n", epoch: rapid.Uint64Range(1, maxEpoch).Draw(t, "epoch"), seq: rapid.Uint64Range(1, maxSeq).Draw(t, "seq"), hash: rapid.Uint64().Draw(t, "hash")})
		}
		m.unknown = m.typ == msgDigestRep && rapid.Bool().Draw(t, "unknown")
	case msgDigestSum:
		m.count, m.sum = rapid.Uint64().Draw(t, "count"), rapid.Uint64().Draw(t, "sum")
	case msgMeta:
		m.meta = rapid.SliceOfN(rapid.Byte(), 1, maxMeta).Draw(t, "meta")
	case msgFetch:
		for range rapid.IntRange(0, 4).Draw(t, "wants") {
			m.wants = append(m.wants, want{node: "n", epoch: rapid.Uint64().Draw(t, "epoch"), seq: rapid.Uint64().Draw(t, "seq"), full: rapid.Bool().Draw(t, "full")})
		}
	case msgFetchReply:
		m.index, m.last = rapid.Uint64Max(maxChunks-1).Draw(t, "index"), rapid.Bool().Draw(t, "last")
		for range rapid.IntRange(0, 3).Draw(t, "deltas") {
			m.deltas = append(m.deltas, drawDelta(t))
		}
	case msgBarrier:
		m.epoch, m.seq = rapid.Uint64().Draw(t, "epoch"), rapid.Uint64().Draw(t, "seq")
	}
	return m
}

func TestCodecRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawMessage(t)
		b := m.encode()
		got, err := decode(b)
		if err != nil {
			t.Fatalf("decode: %v", err)
		}
		if !bytes.HasSuffix(b, got.body) || len(got.body) == 0 && m.typ != msgBarrierAck && len(b) > 20 {
			t.Fatalf("body is %d bytes of %d", len(got.body), len(b))
		}
		got.body = nil
		if !reflect.DeepEqual(m, got) {
			t.Fatalf("sent %+v, got %+v", m, got)
		}
		// Every message cut short is refused.
		cut := rapid.IntRange(0, len(b)-1).Draw(t, "cut")
		if _, err := decode(b[:cut]); err == nil {
			t.Fatalf("understood after %d of %d bytes", cut, len(b))
		}
		// What a later version adds is not in the way.
		if more, err := decode(append(b, "more"...)); err != nil || more.id != m.id || more.typ != m.typ {
			t.Fatalf("with a later version's bytes: %+v, %v", more, err)
		}
	})
}

func TestReplyChunks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var in []*delta
		for i := range rapid.IntRange(0, 5).Draw(t, "deltas") {
			d := drawDelta(t)
			d.node = nodeID(i)
			in = append(in, d)
		}
		size := rapid.IntRange(1, 2000).Draw(t, "size")
		var chunks [][]*delta
		msgs := cutReply(header{from: "x", addr: nodeAddr(1)}, 7, in, size)
		for i, b := range msgs {
			m, err := decode(b)
			if err != nil {
				t.Fatalf("chunk %d: %v", i, err)
			}
			if m.id != 7 || m.index != uint64(i) || m.last != (i == len(msgs)-1) {
				t.Fatalf("chunk %d is %+v", i, m)
			}
			chunks = append(chunks, m.deltas)
		}
		if out := joinReply(chunks); !reflect.DeepEqual(in, out) {
			t.Fatalf("sent %+v, got %+v", in, out)
		}
	})
}

func TestDecodeRefuses(t *testing.T) {
	h := header{typ: msgDelta, from: "a", addr: nodeAddr(1)}
	enc := func(d *delta) []byte { return appendDelta(appendHeader(nil, h), d) }
	good := newChange(2, endpoint(1, 1, spec.EndpointActive), false)
	bad := func(fn func(*change)) *delta {
		c := good
		fn(&c)
		c.raw = appendContent(nil, c.ep, c.gone)
		return &delta{node: "a", epoch: 1, prev: 1, seq: 2, changes: []change{c}}
	}
	for name, b := range map[string][]byte{
		"nothing":           {},
		"other version":     append([]byte{9}, enc(bad(func(*change) {}))[1:]...),
		"unknown type":      appendHeader(nil, header{typ: 99, from: "a", addr: nodeAddr(1)}),
		"no sender":         appendHeader(nil, header{typ: msgBarrierAck, addr: nodeAddr(1)}),
		"epoch 0":           enc(&delta{node: "a", seq: 1}),
		"backwards":         enc(&delta{node: "a", epoch: 1, prev: 2, seq: 2}),
		"full from 1":       enc(&delta{node: "a", epoch: 1, prev: 1, seq: 2, full: true}),
		"full, tombstone":   enc(&delta{node: "a", epoch: 1, seq: 2, full: true, changes: []change{newChange(1, spec.Endpoint{}, true)}}),
		"change too new":    enc(bad(func(c *change) { c.seq = 3 })),
		"change too old":    enc(bad(func(c *change) { c.seq = 1 })),
		"long string":       enc(bad(func(c *change) { c.ep.TaskName = strings.Repeat("x", maxString+1) })),
		"many aliases":      enc(bad(func(c *change) { c.ep.Aliases = make([]string, maxAliases+1) })),
		"invalid address":   enc(bad(func(c *change) { c.ep.Addrs = []netip.Addr{{}} })),
		"count of the moon": append(appendHeader(nil, header{typ: msgState, from: "a", addr: nodeAddr(1)}), 0xff, 0xff, 0xff, 0xff, 0x0f),
		"digest at 0":       (&message{header: header{typ: msgState, from: "a", addr: nodeAddr(1)}, digest: []digestItem{{node: "x"}}}).encode(),
	} {
		if m, err := decode(b); err == nil {
			t.Errorf("%s: understood as %+v", name, m)
		}
	}
	if _, err := decode(enc(bad(func(*change) {}))); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

func TestEncodableIsWhatDecodes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ep := drawEndpoint(t)
		switch rapid.IntRange(0, 5).Draw(t, "spoil") {
		case 0:
			ep.State = spec.EndpointState(rapid.IntRange(-1, 4).Draw(t, "state"))
		case 1:
			ep.Aliases = make([]string, rapid.IntRange(maxAliases-1, maxAliases+1).Draw(t, "n"))
		case 2:
			ep.Addrs = append(ep.Addrs, netip.Addr{})
		case 3:
			ep.Service = strings.Repeat("s", rapid.IntRange(maxString-1, maxString+1).Draw(t, "n"))
		}
		m := message{header: header{typ: msgDelta, from: "a", addr: nodeAddr(1)},
			deltas: []*delta{{node: "a", epoch: 1, seq: 1, full: true, changes: []change{newChange(1, ep, false)}}}}
		_, err := decode(m.encode())
		if ep.State < spec.EndpointStarting || int(ep.State) >= spec.EndpointStates {
			return // of a later version
		}
		if (err == nil) != (encodable(ep) == nil) {
			t.Fatalf("encodable: %v; decode: %v", encodable(ep), err)
		}
	})
}

func TestMeta(t *testing.T) {
	m := meta{epoch: math.MaxUint64, seq: maxSeq, maxInc: math.MaxUint32, path: path{mtu: maxMTU, answers: true}}
	b := m.encode()
	for _, b := range [][]byte{b, append(b, "more"...)} {
		if got, err := decodeMeta(b); err != nil || got != m {
			t.Fatalf("got %+v, %v", got, err)
		}
	}
	old := m
	old.path = path{}
	short := len(old.encode()) - 2 // as versions before the path's fields wrote it
	for i := range b {
		got, err := decodeMeta(b[:i])
		switch {
		case i == short && (err != nil || got != old):
			t.Fatalf("of an older version: %+v, %v", got, err)
		case i != short && err == nil:
			t.Fatalf("%d bytes are understood as %+v", i, got)
		}
	}
	m.seq++ // which nobody could go past
	if got, err := decodeMeta(m.encode()); err == nil {
		t.Fatalf("understood as %+v", got)
	}
	// What can't be a link's MTU is as if it was not said.
	for _, mtu := range []uint64{maxMTU + 1, math.MaxUint32, math.MaxUint64} {
		b := append(binary.AppendUvarint(b[:short:short], mtu), 1)
		if got, err := decodeMeta(b); err != nil || got.mtu != 0 || !got.answers {
			t.Fatalf("MTU %d: %+v, %v", mtu, got, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for i := range 40 {
		f.Add(rapid.Custom(drawMessage).Example(i).encode())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		// What is understood means the same when sent on.
		again, err := decode(m.encode())
		if err != nil {
			t.Fatalf("%+v: %v", m, err)
		}
		m.body, again.body = nil, nil
		if !reflect.DeepEqual(m, again) {
			t.Fatalf("%+v became %+v", m, again)
		}
	})
}

func FuzzMeta(f *testing.F) {
	f.Add(meta{3, 4, 5, path{1300, true}}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := decodeMeta(b); err == nil {
			if got, err := decodeMeta(m.encode()); err != nil || got != m {
				t.Fatalf("%+v became %+v, %v", m, got, err)
			}
		}
	})
}

// FuzzApply feeds understood deltas to a record: nothing panics, and counts
// and hashes stay right.
func FuzzReceive(f *testing.F) {
	for i := range 40 {
		f.Add(rapid.Custom(drawMessage).Example(i).encode(), rapid.Custom(drawMessage).Example(100+i).encode())
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		g := lone(t)
		g.receive(a)
		g.receive(b)
		g.receive(a)
		g.Snapshot()
		for id, r := range g.recs {
			tombs := 0
			for _, e := range r.entries {
				if e.gone {
					tombs++
				}
			}
			if tombs != r.tombs || r.seq > 0 && stateNow(r) != r.state {
				t.Fatalf("record of %s is inconsistent", id)
			}
		}
	})
}
