package gossip

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// This file is the table's logic: pure, without locks, I/O or clock.

// change is one entry as it travels.
type change struct {
	seq  uint64
	gone bool          // a tombstone: only Task and Network are set
	ep   spec.Endpoint // Node is not carried; the receiver sets it
	raw  []byte        // ep as it came, with what this version doesn't know
	sum  [32]byte      // SHA-256 of raw
}

// delta takes a record of one node from prev to seq. A full delta is the whole
// set at seq and replaces; it holds no tombstones.
type delta struct {
	node       string
	epoch      uint64
	prev, seq  uint64
	full, left bool
	changes    []change // by seq
	// state is that of the record once this is applied, see stateOf, and sig the
	// node's signature over it (Gossip.recordText). They hold for the record at
	// seq, however the delta that leads there was cut, and by whom.
	state [32]byte
	sig   []byte
	key   crypto.PublicKey // that sig was found to be made with; not carried
}

// entry is a change as it is kept.
type entry struct {
	change
	at time.Time // when a tombstone came
}

// record is what one node says of itself.
type record struct {
	node       string
	epoch, seq uint64 // seq 0: nothing said in this epoch
	left       bool
	// horizon: changes from before it can't be told apart any more, because
	// tombstones were dropped.
	horizon uint64
	entries map[string]*entry
	tombs   int
	// state, sig and key are of the delta that led here.
	state [32]byte
	sig   []byte
	key   crypto.PublicKey
	// outdated: key is not the node's any more. Anything that it signs with
	// another replaces this.
	outdated bool

	rev     uint64    // of the first Snapshot that has this state
	touched time.Time // last change
	leftAt  time.Time
	// parked deltas wait for one that comes before them.
	parked    []*delta
	repairing bool
}

func newRecord(node string) *record {
	return &record{node: node, entries: map[string]*entry{}}
}

// newer tells whether (epoch, seq) is ahead of the record.
func (r *record) newer(epoch, seq uint64) bool {
	return r.outdated || epoch > r.epoch || epoch == r.epoch && seq > r.seq
}

type outcome int

const (
	stale   outcome = iota // known already
	gap                    // what comes before it is missing
	applied                // the record is now as the delta says
	broken                 // it does not lead to what its node signed
)

// apply brings the record up to d, whose signature the caller has checked. With
// force, a full d of the record's own epoch and sequence is taken too, to mend a
// record that differs.
func (r *record) apply(d *delta, now time.Time, force bool) outcome {
	if !r.newer(d.epoch, d.seq) && !(force && d.full && d.epoch == r.epoch && d.seq == r.seq) {
		return stale
	}
	if !d.full && (r.outdated || d.epoch > r.epoch || d.prev > r.seq) {
		return gap
	}
	if !d.full && len(r.entries)+len(d.changes) > 2*maxEntries || r.stateAfter(d) != d.state {
		return broken
	}
	r.take(d, now)
	r.state, r.sig, r.key, r.outdated = d.state, d.sig, d.key, false
	return applied
}

// take carries d out, unseen.
func (r *record) take(d *delta, now time.Time) {
	if d.full {
		r.entries, r.tombs = make(map[string]*entry, len(d.changes)), 0
		r.epoch, r.seq, r.horizon = d.epoch, 0, d.seq
	}
	for _, c := range d.changes {
		// Below r.seq everything is known, also what was deleted since and
		// whose tombstone is gone.
		if c.seq > r.seq || d.full {
			r.put(c, now)
		}
	}
	if d.left && !r.left {
		r.leftAt = now
	}
	r.seq, r.left, r.touched = d.seq, d.left, now
}

// put sets one entry, without regard to the record's seq.
func (r *record) put(c change, now time.Time) {
	key := c.ep.Key()
	old := r.entries[key]
	if old != nil && old.seq >= c.seq {
		return
	}
	if old != nil && old.gone {
		r.tombs--
	}
	c.ep.Node = r.node
	e := &entry{change: c}
	if c.gone {
		e.at = now
		r.tombs++
	}
	r.entries[key] = e
}

// stateAfter is the state of the record once d is applied.
func (r *record) stateAfter(d *delta) [32]byte {
	changed := make(map[string]change, len(d.changes))
	for _, c := range d.changes {
		if c.seq <= r.seq && !d.full {
			continue
		}
		key := c.ep.Key()
		if o, ok := changed[key]; !ok || o.seq < c.seq {
			changed[key] = c
		}
	}
	live := make([]stamp, 0, len(changed)+len(r.entries))
	for _, c := range changed {
		if !c.gone {
			live = append(live, stamp{c.seq, c.sum})
		}
	}
	if !d.full {
		for key, e := range r.entries {
			if _, ok := changed[key]; !ok && !e.gone {
				live = append(live, stamp{e.seq, e.sum})
			}
		}
	}
	return stateOf(live)
}

// stamp stands for a live entry.
type stamp struct {
	seq uint64
	sum [32]byte
}

// stateOf is the SHA-256 of all live entries in order of their sequence: what a
// node signs. Tombstones are not in it, as each node drops them in its own time.
func stateOf(live []stamp) (out [32]byte) {
	slices.SortFunc(live, func(a, b stamp) int {
		return cmp.Or(cmp.Compare(a.seq, b.seq), bytes.Compare(a.sum[:], b.sum[:]))
	})
	h := sha256.New()
	var seq [8]byte
	for _, s := range live {
		binary.BigEndian.PutUint64(seq[:], s.seq)
		h.Write(seq[:])
		h.Write(s.sum[:])
	}
	h.Sum(out[:0])
	return out
}

// prune drops tombstones past limit or older than age.
func (r *record) prune(now time.Time, limit int, age time.Duration) {
	if r.tombs == 0 {
		return
	}
	var tombs []*entry
	for _, e := range r.entries {
		if e.gone {
			tombs = append(tombs, e)
		}
	}
	slices.SortFunc(tombs, func(a, b *entry) int { return cmp.Compare(a.seq, b.seq) })
	for i, e := range tombs {
		if len(tombs)-i <= limit && now.Sub(e.at) < age {
			break
		}
		r.horizon = max(r.horizon, e.seq)
		delete(r.entries, e.ep.Key())
		r.tombs--
	}
}

// since returns what takes a reader from (epoch, seq) to now, or everything if
// full is set or asked for too long ago; nil when there is nothing newer.
func (r *record) since(epoch, seq uint64, full bool) *delta {
	if r.seq == 0 || !full && !(r.epoch > epoch || r.epoch == epoch && r.seq > seq) {
		return nil
	}
	d := &delta{node: r.node, epoch: r.epoch, prev: seq, seq: r.seq, left: r.left, state: r.state, sig: r.sig, key: r.key,
		full: full || epoch != r.epoch || seq < r.horizon || seq == 0}
	if d.full {
		d.prev = 0
	}
	for _, e := range r.entries {
		if d.full && !e.gone || !d.full && e.seq > seq {
			d.changes = append(d.changes, e.change)
		}
	}
	slices.SortFunc(d.changes, func(a, b change) int { return cmp.Compare(a.seq, b.seq) })
	return d
}

// park keeps a delta for later; the oldest goes when there are too many.
func (r *record) park(d *delta) {
	if slices.ContainsFunc(r.parked, func(p *delta) bool { return p.epoch == d.epoch && p.seq == d.seq && p.prev == d.prev }) {
		return
	}
	if len(r.parked) >= parkedMax {
		r.parked = r.parked[1:]
	}
	r.parked = append(r.parked, d)
}

// unpark applies parked deltas that fit now and drops those overtaken. It
// returns those that were applied.
func (r *record) unpark(now time.Time) (done []*delta) {
	slices.SortStableFunc(r.parked, func(a, b *delta) int {
		return cmp.Or(cmp.Compare(a.epoch, b.epoch), cmp.Compare(a.seq, b.seq))
	})
	kept := r.parked[:0]
	for _, d := range r.parked {
		switch r.apply(d, now, false) {
		case applied:
			done = append(done, d)
		case gap:
			kept = append(kept, d)
		}
	}
	clear(r.parked[len(kept):])
	r.parked = kept
	return done
}

// write makes the record, which is this node's own, hold exactly want, and
// returns the delta that does the same elsewhere, not signed yet; nil if nothing
// changed. The first write of an epoch always gives a delta, a full one.
func (r *record) write(want map[string]spec.Endpoint, left bool, now time.Time) *delta {
	d := &delta{node: r.node, epoch: r.epoch, prev: r.seq, left: left}
	seq := r.seq
	for _, key := range slices.Sorted(maps.Keys(want)) {
		ep := want[key]
		ep.Node = r.node
		if old := r.entries[key]; old == nil || old.gone || !old.ep.Equal(ep) {
			seq++
			d.changes = append(d.changes, newChange(seq, cloneEndpoint(ep), false))
		}
	}
	var gone []string
	for key, e := range r.entries {
		if _, ok := want[key]; !ok && !e.gone {
			gone = append(gone, key)
		}
	}
	slices.Sort(gone)
	for _, key := range gone {
		seq++
		old := r.entries[key].ep
		d.changes = append(d.changes, newChange(seq, spec.Endpoint{Task: old.Task, Network: old.Network}, true))
	}
	if seq == r.seq {
		if r.seq > 0 && left == r.left {
			return nil
		}
		seq++
	}
	d.seq = seq
	d.full = r.seq == 0
	if d.full {
		d.changes = slices.DeleteFunc(d.changes, func(c change) bool { return c.gone })
	}
	d.state = r.stateAfter(d)
	r.take(d, now)
	r.state = d.state
	return d
}

func cloneEndpoint(ep spec.Endpoint) spec.Endpoint {
	ep.Addrs, ep.Aliases = slices.Clone(ep.Addrs), slices.Clone(ep.Aliases)
	return ep
}

// digestItem is one record in short.
type digestItem struct {
	node             string
	epoch, seq, hash uint64
}

func (r *record) digest() digestItem {
	return digestItem{node: r.node, epoch: r.epoch, seq: r.seq, hash: short(r.state)}
}

func sortDigest(items []digestItem) {
	slices.SortFunc(items, func(a, b digestItem) int { return strings.Compare(a.node, b.node) })
}

// FNV-1a, 64 bit (draft-eastlake-fnv), with a finaliser (MurmurHash3's) since
// the hashes of entries are combined by exclusive or. It guards against
// divergence by mistake, not by malice.
func fnv(b []byte) uint64 {
	h := uint64(0xcbf29ce484222325)
	for _, c := range b {
		h = (h ^ uint64(c)) * 0x100000001b3
	}
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	h = (h ^ h>>33) * 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// short is enough of a state to see that two are not the same.
func short(state [32]byte) uint64 { return binary.BigEndian.Uint64(state[:]) }

// digestSum is one number for a whole digest.
func digestSum(items []digestItem) (sum uint64) {
	for _, it := range items {
		sum ^= fnv(appendDigestItem(nil, it))
	}
	return sum
}
