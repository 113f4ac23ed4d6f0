package gossip

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/shoalnet/shoal/spec"
)

func live(r *record) map[string]spec.Endpoint {
	out := map[string]spec.Endpoint{}
	for k, e := range r.entries {
		if !e.gone {
			out[k] = e.ep
		}
	}
	return out
}

// stateNow computes the state of a record from what is in it.
func stateNow(r *record) [32]byte {
	var all []stamp
	for _, e := range r.entries {
		if !e.gone {
			all = append(all, stamp{e.seq, sha256.Sum256(e.raw)})
		}
	}
	return stateOf(all)
}

func sameRecord(a, b *record) string {
	switch {
	case a.epoch != b.epoch || a.seq != b.seq:
		return fmt.Sprintf("at %d.%d and %d.%d", a.epoch, a.seq, b.epoch, b.seq)
	case !maps.EqualFunc(live(a), live(b), spec.Endpoint.Equal):
		return fmt.Sprintf("%v and %v", live(a), live(b))
	case a.state != b.state:
		return "the states differ though the contents don't"
	case a.left != b.left:
		return "one has left"
	}
	return ""
}

// A replica that gets any part of the deltas in any order, and fetches when it
// finds a gap, ends up equal to the owner; tombstones dropped on the way
// included. Each step keeps the counts and hashes right.
func TestRecordConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(0, 0)
		limit := rapid.IntRange(0, 4).Draw(t, "tombstones")
		owner := newRecord("owner")
		owner.epoch = 1
		replicas := []*record{newRecord("owner"), newRecord("owner"), newRecord("owner")}
		var sent []*delta
		check := func(r *record) {
			tombs := 0
			for _, e := range r.entries {
				if e.gone {
					tombs++
				}
			}
			if tombs != r.tombs || r.seq > 0 && stateNow(r) != r.state {
				t.Fatalf("record counts %d tombstones and is in state %x: %d and %x", r.tombs, r.state, tombs, stateNow(r))
			}
		}
		fetch := func(r, from *record) {
			if d := from.since(r.epoch, r.seq, false); d != nil {
				m := message{header: header{typ: msgDelta, from: "x", addr: nodeAddr(1)}, deltas: []*delta{d}}
				got, err := decode(m.encode())
				if err != nil {
					t.Fatalf("own delta is not understood: %v", err)
				}
				if out := r.apply(got.deltas[0], now, false); out != applied {
					t.Fatalf("fetched delta %+v on %d.%d: %d", d, r.epoch, r.seq, out)
				}
				r.unpark(now)
				r.prune(now, limit, time.Hour)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				want := map[string]spec.Endpoint{}
				for k := range rapid.IntRange(0, 6).Draw(t, "n") {
					ep := endpoint(1, k*rapid.IntRange(1, 2).Draw(t, "k"), spec.EndpointState(rapid.IntRange(0, 2).Draw(t, "state")))
					want[ep.Key()] = ep
				}
				first := owner.seq == 0
				d := owner.write(want, false, now)
				if d == nil {
					if first {
						t.Fatalf("the first write gave nothing")
					}
					return
				}
				if first != d.full {
					t.Fatalf("first write %v, full delta %v", first, d.full)
				}
				sent = append(sent, d)
				owner.prune(now, limit, time.Hour)
				if again := owner.write(want, false, now); again != nil {
					t.Fatalf("writing the same gave %+v", again)
				}
				for k, ep := range live(owner) {
					w := want[k]
					w.Node = "owner"
					if !ep.Equal(w) {
						t.Fatalf("owner has %v, not %v", ep, w)
					}
				}
			},
			"restart": func(*rapid.T) {
				epoch := owner.epoch + 1
				owner = newRecord("owner")
				owner.epoch = epoch
			},
			"deliver": func(t *rapid.T) {
				if len(sent) == 0 {
					return
				}
				r := rapid.SampledFrom(replicas).Draw(t, "to")
				d := sent[rapid.IntRange(0, len(sent)-1).Draw(t, "delta")]
				switch r.apply(d, now, false) {
				case applied:
					r.unpark(now)
				case gap:
					r.park(d)
				}
				r.prune(now, limit, time.Hour)
			},
			"fetch": func(t *rapid.T) {
				r := rapid.SampledFrom(replicas).Draw(t, "to")
				from := rapid.SampledFrom(append(replicas, owner)).Draw(t, "from")
				fetch(r, from)
			},
			"": func(*rapid.T) {
				check(owner)
				for _, r := range replicas {
					check(r)
					if r.epoch == owner.epoch && r.seq == owner.seq && owner.seq > 0 {
						if wrong := sameRecord(r, owner); wrong != "" {
							t.Fatalf("at the owner's sequence: %s", wrong)
						}
					}
				}
			},
		})
		if owner.seq == 0 {
			owner.write(nil, false, now)
		}
		for i, r := range replicas {
			fetch(r, owner)
			if wrong := sameRecord(r, owner); wrong != "" {
				t.Fatalf("replica %d: %s", i, wrong)
			}
		}
	})
}

func TestRecordForce(t *testing.T) {
	now := time.Now()
	a, b := newRecord("x"), newRecord("x")
	a.epoch, b.epoch = 1, 1
	one, two := endpoint(1, 1, spec.EndpointActive), endpoint(1, 2, spec.EndpointActive)
	a.write(map[string]spec.Endpoint{one.Key(): one}, false, now)
	b.write(map[string]spec.Endpoint{two.Key(): two}, false, now)
	if a.state == b.state {
		t.Fatal("different contents have one state")
	}
	d := a.since(1, 1, true)
	if out := b.apply(d, now, false); out != stale {
		t.Fatalf("taken without force: %d", out)
	}
	if out := b.apply(d, now, true); out != applied || sameRecord(a, b) != "" {
		t.Fatalf("not mended: %d, %s", out, sameRecord(a, b))
	}
}

func TestTombstonesAge(t *testing.T) {
	now := time.Now()
	r := newRecord("x")
	r.epoch = 1
	one := endpoint(1, 1, spec.EndpointActive)
	r.write(map[string]spec.Endpoint{one.Key(): one}, false, now)
	r.write(nil, false, now)
	if d := r.since(1, 1, false); d.full || len(d.changes) != 1 || !d.changes[0].gone {
		t.Fatalf("with its tombstone: %+v", d)
	}
	r.prune(now.Add(time.Minute), 10, time.Hour)
	if r.tombs != 1 {
		t.Fatal("a young tombstone was dropped")
	}
	r.prune(now.Add(time.Hour), 10, time.Hour)
	if r.tombs != 0 || len(r.entries) != 0 {
		t.Fatal("an old tombstone was kept")
	}
	if d := r.since(1, 1, false); !d.full || len(d.changes) != 0 {
		t.Fatalf("without its tombstone a delta can't tell: %+v", d)
	}
}

func TestParkedAreBounded(t *testing.T) {
	r := newRecord("x")
	for i := range uint64(3 * parkedMax) {
		r.park(&delta{node: "x", epoch: 1, prev: i + 1, seq: i + 2})
	}
	if len(r.parked) != parkedMax {
		t.Fatalf("%d deltas are parked", len(r.parked))
	}
}
