package gossip

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/internal/sleep"
)

// What the other nodes said last is kept in DataDir/gossip/records.json. Agents of two
// nodes may be away at once, after a bad package or a full disk: the one that is back
// first hears nothing of the other, whose tasks run on, connected to tasks here.

type recordsFile struct {
	Records []keptRecord `json:"records"`
}

// keptRecord is a node's record, as it travels: a full delta with the node's signature.
type keptRecord struct {
	Addr  netip.AddrPort `json:"addr"`
	MTU   int            `json:"mtu,omitempty"` // bytes, of the path to it; 0: not said
	Delta []byte         `json:"delta"`

	d *delta
}

// keepInterval and keepShare bound the time that writing takes: the file is written
// once in an interval, and no sooner than keepShare times as long as it last took.
const (
	keepInterval = time.Second
	keepShare    = 50
)

func loadRecords(dir string) (map[string]keptRecord, error) {
	var f recordsFile
	if err := load(dir, "records.json", "records", &f); err != nil {
		return nil, err
	}
	var err error
	out := make(map[string]keptRecord, len(f.Records))
	for _, k := range f.Records {
		r := reader{b: k.Delta}
		if k.d = r.delta(); r.err != nil || !k.d.full || k.MTU < 0 || k.MTU > maxMTU {
			err = fmt.Errorf("gossip: a record of %s in %s is damaged", k.Addr, filepath.Join(dir, "records.json"))
			continue
		}
		out[k.d.node] = k
	}
	return out, err
}

// keepLoop writes the records down as they change.
func (g *Gossip) keepLoop(ctx context.Context) {
	wait := keepInterval
	for sleep.For(ctx, jitter(wait)) {
		start := time.Now()
		g.keep()
		wait = max(keepInterval, keepShare*time.Since(start))
	}
}

// keep writes the records of the others, if they differ from the file's. A disk that
// takes nothing is asked again, and no reason for more than that: what is said here is
// of use for as long as its node can't be heard.
func (g *Gossip) keep() {
	g.saveMu.Lock()
	defer g.saveMu.Unlock()
	rev := g.revNow.Load()
	if rev == g.keptRev {
		return
	}
	g.mu.Lock()
	var list []keptRecord
	var items []digestItem
	add := func(k keptRecord, it digestItem) {
		it.hash ^= uint64(k.MTU)
		list, items = append(list, k), append(items, it)
	}
	for id, k := range g.remembered {
		if g.recs[id] == nil {
			add(k, digestItem{node: id, epoch: k.d.epoch, seq: k.d.seq, hash: short(k.d.state)})
		}
	}
	for id, r := range g.recs {
		if m := g.members[id]; id != g.cfg.NodeID && m != nil && m.shown() && !r.left && r.seq > 0 {
			add(keptRecord{Addr: m.addr, MTU: m.path.mtu}, r.digest())
		}
	}
	sum := digestSum(items)
	if sum == g.keptSum {
		g.mu.Unlock()
		g.keptRev = rev
		return
	}
	for i, it := range items {
		if list[i].d == nil {
			list[i].d = g.recs[it.node].since(0, 0, true)
		}
	}
	g.mu.Unlock()
	slices.SortFunc(list, func(a, b keptRecord) int { return strings.Compare(a.d.node, b.d.node) })
	for i, k := range list {
		list[i].Delta = appendDelta(nil, k.d)
	}
	b, err := json.Marshal(recordsFile{list})
	if err == nil {
		err = durable.MkdirAll(g.folder)
	}
	if err == nil {
		err = durable.Replace(filepath.Join(g.folder, "records.json"), b)
	}
	if err != nil {
		g.log.Debug("what other nodes said can't be kept", "error", err)
		return
	}
	g.keptRev, g.keptSum = rev, sum
}

// Recall takes what nodes said before this process began that it has not heard of since,
// for as long as their machines are there, and at most as for any node whose agent is
// away (Tuning.OrphanAge). Call it once there was time to hear of all, during Run.
func (g *Gossip) Recall() {
	if g.running() == nil {
		return
	}
	g.mu.Lock()
	kept := g.remembered
	g.remembered = nil
	dir := g.dir.Load()
	g.mu.Unlock()
	if dir == nil || g.cfg.Present == nil {
		return
	}
	for id, k := range kept {
		info, ok := dir.nodes[id]
		if !ok || g.judge(k.d) != valid {
			continue
		}
		g.mu.Lock()
		m, r := g.members[id], g.recs[id]
		if m != nil && !m.reachable() {
			g.mu.Unlock()
			continue
		}
		known := r != nil && r.seq > 0
		if !known {
			out, _ := g.accept(k.d, time.Now(), false)
			known = out == applied
		}
		if known && m == nil {
			m = &member{addr: info.at(), assigned: true, since: time.Now(), path: path{mtu: k.MTU}}
			g.members[id] = m
			g.orphan(id, m)
			g.count()
			g.bump()
		}
		g.mu.Unlock()
	}
}
