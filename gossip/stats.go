package gossip

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalnet/shoal/spec"
)

// counters are the live ones behind Stats.
type counters struct {
	received, malformed, stray, dropped, oversize, rejected, sendErrors                   atomic.Uint64
	ownChanges, deltas, stale, gaps, repairs, rumours                                     atomic.Uint64
	digests, mismatches, fetches, fetched, fetchErrors, served, epochBumps, held, accused atomic.Uint64
	foreign, unassigned, future, forged, verified                                         atomic.Uint64
	pings, pingsLost, rejoins                                                             atomic.Uint64
}

// Stats counts since Open; what says so is a momentary number.
type Stats struct {
	Members, Suspect, Dead int // now; Members are all but the dead, with this node
	Endpoints              int // now, in the Snapshot
	OwnQueue, RelayQueue   int // now: rumours queued
	ReliableQueue          int // now: messages for TCP waiting or under way
	Waiters                int // now: barriers of others that this node has not passed
	Health                 int // now: memberlist's Lifeguard score; 0 is healthy

	Received   uint64 // messages understood
	Malformed  uint64 // messages dropped as not understood
	Foreign    uint64 // messages of another version of the wire format, or of a type not known
	Stray      uint64 // answers nobody waited for
	Dropped    uint64 // messages not sent or not handled because of a bound; repaired later
	Oversize   uint64 // deltas that did not fit a packet
	Rejected   uint64 // own endpoints that can't be encoded
	SendErrors uint64

	OwnChanges uint64 // entries changed by SetEndpoints
	Deltas     uint64 // deltas of others applied
	Stale      uint64 // deltas known already
	Gaps       uint64 // deltas that came before what they build on
	Repairs    uint64 // fetches made for gaps and barriers
	Rumours    uint64 // rumours sent

	Digests     uint64 // digests received
	Mismatches  uint64 // records that differed at the same sequence
	Fetches     uint64 // fetches made
	Fetched     uint64 // records changed by them
	FetchErrors uint64
	Served      uint64 // fetches answered
	EpochBumps  uint64 // times this node met a newer record of itself
	Held        uint64 // nodes declared dead that still answered this one
	Accused     uint64 // nodes of which this one told memberlist that they are silent

	// Refused counts what never got as far as being understood, by reason:
	// "source" (not from a node's address), "seal" (not sealed with a key of this
	// cluster), "replay", "rate" and "streams" (over a bound), "kind" (compressed,
	// for one), "shape" (not decodable, or numbers out of range), "stranger" (about
	// a node that is none, or elsewhere), "forged" (not signed by its node),
	// "stale", "claim" (an incarnation that the node did not vouch for).
	Refused map[string]uint64
	// Unassigned, Future and Forged count records dropped: of a node that the
	// managers don't know, of an epoch that can't be, not signed by their node.
	Unassigned, Future, Forged uint64
	Verified                   uint64   // signatures verified
	Keys                       []uint32 // now: IDs of the keys held, the one in use first

	Pings, PingsLost uint64
	Rejoins          uint64 // attempts at addresses of the peer list
}

// Stats returns the counters.
func (g *Gossip) Stats() Stats {
	c := &g.stats
	s := Stats{
		OwnQueue: g.own.NumQueued(), RelayQueue: g.relay.NumQueued(), ReliableQueue: int(g.waiting.Load()),
		Received: c.received.Load(), Malformed: c.malformed.Load(), Stray: c.stray.Load(), Dropped: c.dropped.Load(),
		Oversize: c.oversize.Load(), Rejected: c.rejected.Load(), SendErrors: c.sendErrors.Load(),
		OwnChanges: c.ownChanges.Load(), Deltas: c.deltas.Load(), Stale: c.stale.Load(), Gaps: c.gaps.Load(),
		Repairs: c.repairs.Load(), Rumours: c.rumours.Load(),
		Digests: c.digests.Load(), Mismatches: c.mismatches.Load(), Fetches: c.fetches.Load(), Fetched: c.fetched.Load(),
		FetchErrors: c.fetchErrors.Load(), Served: c.served.Load(), EpochBumps: c.epochBumps.Load(), Held: c.held.Load(), Accused: c.accused.Load(),
		Foreign: c.foreign.Load(), Unassigned: c.unassigned.Load(), Future: c.future.Load(), Forged: c.forged.Load(), Verified: c.verified.Load(),
		Refused: make(map[string]uint64, reasons), Keys: g.KeyIDs(),
		Pings: c.pings.Load(), PingsLost: c.pingsLost.Load(), Rejoins: c.rejoins.Load(),
	}
	if ml := g.ml.Load(); ml != nil {
		s.Health = ml.GetHealthScore()
	}
	for r, name := range reasonNames {
		s.Refused[name] = g.wall.refused[r].Load()
	}
	snap := g.Snapshot()
	s.Endpoints = len(snap.Endpoints)
	for _, m := range snap.Members {
		switch m.Liveness {
		case spec.PeerDead:
			s.Dead++
			continue
		case spec.PeerSuspect:
			s.Suspect++
		}
		s.Members++
	}
	g.mu.Lock()
	s.Waiters = len(g.waiters)
	g.mu.Unlock()
	return s
}

type metric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(Stats) float64
}

type collector struct {
	g       *Gossip
	metrics []metric
	refused *prometheus.Desc
}

// Collector exports the Stats as shoal_gossip_… metrics.
func (g *Gossip) Collector() prometheus.Collector {
	c := &collector{g: g}
	add := func(kind prometheus.ValueType, name, help string, value func(Stats) float64) {
		c.metrics = append(c.metrics, metric{prometheus.NewDesc("shoal_gossip_"+name, help, nil, nil), kind, value})
	}
	gauge := func(name, help string, v func(Stats) int) {
		add(prometheus.GaugeValue, name, help, func(s Stats) float64 { return float64(v(s)) })
	}
	counter := func(name, help string, v func(Stats) uint64) {
		add(prometheus.CounterValue, name+"_total", help, func(s Stats) float64 { return float64(v(s)) })
	}
	gauge("members", "Nodes that are not dead, this one included.", func(s Stats) int { return s.Members })
	gauge("suspect", "Nodes that don't answer pings.", func(s Stats) int { return s.Suspect })
	gauge("dead", "Nodes held for dead and not forgotten.", func(s Stats) int { return s.Dead })
	gauge("endpoints", "Endpoints known.", func(s Stats) int { return s.Endpoints })
	gauge("own_queue", "Own rumours queued.", func(s Stats) int { return s.OwnQueue })
	gauge("relay_queue", "Relayed rumours queued.", func(s Stats) int { return s.RelayQueue })
	gauge("reliable_queue", "Messages waiting for TCP.", func(s Stats) int { return s.ReliableQueue })
	gauge("health_score", "Lifeguard score of this node; 0 is healthy.", func(s Stats) int { return s.Health })
	counter("received", "Messages understood.", func(s Stats) uint64 { return s.Received })
	counter("malformed", "Messages not understood.", func(s Stats) uint64 { return s.Malformed })
	counter("dropped", "Messages dropped because of a bound.", func(s Stats) uint64 { return s.Dropped })
	counter("oversize", "Deltas too large for a packet.", func(s Stats) uint64 { return s.Oversize })
	counter("send_errors", "Messages that could not be sent.", func(s Stats) uint64 { return s.SendErrors })
	counter("own_changes", "Changes of own endpoints.", func(s Stats) uint64 { return s.OwnChanges })
	counter("deltas", "Deltas of others applied.", func(s Stats) uint64 { return s.Deltas })
	counter("gaps", "Deltas that came too early.", func(s Stats) uint64 { return s.Gaps })
	counter("repairs", "Fetches made for gaps and barriers.", func(s Stats) uint64 { return s.Repairs })
	counter("fetches", "Fetches made.", func(s Stats) uint64 { return s.Fetches })
	counter("fetch_errors", "Fetches that failed.", func(s Stats) uint64 { return s.FetchErrors })
	counter("mismatches", "Records that differed at the same sequence.", func(s Stats) uint64 { return s.Mismatches })
	counter("epoch_bumps", "Newer records of this node met.", func(s Stats) uint64 { return s.EpochBumps })
	counter("accused", "Nodes that answered no ping of this one, and were suspected for it.", func(s Stats) uint64 { return s.Accused })
	counter("held", "Nodes declared dead that still answered.", func(s Stats) uint64 { return s.Held })
	counter("pings_lost", "Pings without an answer in time.", func(s Stats) uint64 { return s.PingsLost })
	counter("rejoins", "Attempts to join a lost peer.", func(s Stats) uint64 { return s.Rejoins })
	counter("unassigned", "Records and messages of nodes that the managers don't know.", func(s Stats) uint64 { return s.Unassigned })
	counter("forged", "Records that their node did not sign.", func(s Stats) uint64 { return s.Forged })
	counter("future", "Records of an epoch that can't be.", func(s Stats) uint64 { return s.Future })
	counter("verified", "Signatures verified.", func(s Stats) uint64 { return s.Verified })
	counter("foreign", "Messages of another version or an unknown type.", func(s Stats) uint64 { return s.Foreign })
	c.refused = prometheus.NewDesc("shoal_gossip_refused_total", "Frames and messages that were not let in, by reason.", []string{"reason"}, nil)
	return c
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range c.metrics {
		ch <- m.desc
	}
	ch <- c.refused
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	s := c.g.Stats()
	for _, m := range c.metrics {
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(s))
	}
	for reason, n := range s.Refused {
		ch <- prometheus.MustNewConstMetric(c.refused, prometheus.CounterValue, float64(n), reason)
	}
}
