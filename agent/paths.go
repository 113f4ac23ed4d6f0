package agent

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
)

// How the data path to other nodes is probed. A node asks for echoes those that have
// an endpoint on a network that it has, too: all of them in turn, up to 64 a second,
// however many there are (packets of some 100 bytes, which the other's kernel answers
// by itself, also while its agent is being replaced). One that misses an answer is
// asked again at once. So a path that is dead is known after some two seconds where
// there are up to 32 such nodes, after 17 where there are 1,000, and works again
// after one or two.
//
// An echo has to get there and back, as what is sent by a VIP has to: a path of which
// one direction is dead is dead for both ends.
const (
	pathTick     = 100 * time.Millisecond
	pathIdle     = 500 * time.Millisecond // between looks, while there is nobody to probe
	pathInterval = 500 * time.Millisecond // between probes of one node, where there are few
	pathRate     = 64                     // probes per second of nodes in no doubt, and as many of dark ones
	pathBurst    = 32                     // probes per tick at most
	pathWait     = 500 * time.Millisecond // for an answer
	pathMisses   = 3                      // in a row, until a path is held for dead
	pathAgain    = 200 * time.Millisecond // between probes of a dead path that begins to answer
	pathDark     = time.Second            // between probes of a dead path, where there are few
	pathGood     = 2                      // answers in a row, until it is held for well
	// One that is dead again so soon has to answer twice as often in a row as the
	// last time, up to pathGoodMax: nobody is helped by a path that comes and goes.
	pathSoon    = 30 * time.Second
	pathGoodMax = 32
	pathLate    = 250 * time.Millisecond // of this process: what it could not hear meanwhile says nothing
)

// Prober asks other nodes for echoes over the data path, and does not wait for them.
type Prober interface {
	// Check returns an error once the namespace is another: the Prober must be closed.
	Check() error
	Send(to netip.Addr, seq uint16) error
	// Read tells of the answers that have come.
	Read(echoed func(from netip.Addr, seq uint16)) error
	Close() error
}

// paths is what is known of the data path to other nodes. It is pure: without
// sockets and clock.
type paths struct {
	mu    sync.Mutex
	peers map[string]*pathPeer // by node ID
	last  time.Time            // tick
}

type pathPeer struct {
	name       string
	to         netip.Addr // its RouterAddr
	addr       netip.Addr // on the underlay
	sent       time.Time
	seq, heard uint16 // of the last probe, and of the newest that was answered
	awaiting   bool
	late       bool // while awaiting, an answer came to an earlier probe
	misses     int  // in a row
	good       int  // answers in a row
	need       int  // of these, for a dead path to be well
	dark       bool
	since      time.Time // of the last change of dark
	unmeasured bool      // it was not asked yet
}

func newPaths() *paths { return &paths{peers: map[string]*pathPeer{}} }

// follow sets whom to probe, from a View: nodes that live, answer probes, and have
// an endpoint on a network that is here. Where a published port leads, that is so on
// every node.
func (p *paths) follow(v *spec.View) {
	here := map[string]bool{}
	for _, n := range v.Networks {
		here[n.ID] = n.Driver != spec.DriverBridge
	}
	shares := map[string]bool{}
	for i := range v.Endpoints {
		if e := &v.Endpoints[i]; e.Node != v.Self && here[e.Network] {
			shares[e.Node] = true
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := map[string]bool{}
	for _, x := range v.Peers {
		if x.ID == v.Self || x.Liveness == spec.PeerDead || !x.Answers || x.Number < 1 || x.Number > spec.MaxNodes || !shares[x.ID] {
			continue
		}
		seen[x.ID] = true
		to := spec.RouterAddr(x.Number)
		if o := p.peers[x.ID]; o == nil || o.to != to || o.addr != x.Addr {
			p.peers[x.ID] = &pathPeer{to: to, addr: x.Addr, need: pathGood, unmeasured: true}
		}
		p.peers[x.ID].name = x.Name
	}
	for id := range p.peers {
		if !seen[id] {
			delete(p.peers, id)
		}
	}
}

// probe is an echo to be asked for.
type probe struct {
	to  netip.Addr
	seq uint16
}

// few tells how often each of n is probed, where that is every so often if there are
// few of them.
func few(every time.Duration, n int) time.Duration {
	return max(every, time.Duration(n)*time.Second/pathRate)
}

// tick tells whom to ask now. It has to be told first what has come (answer).
// changed: a path went dead.
func (p *paths) tick(now time.Time) (out []probe, changed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	late := now.Sub(p.last)
	stalled := !p.last.IsZero() && late > pathLate
	p.last = now
	dark := 0
	for _, x := range p.peers {
		if x.dark {
			dark++
		}
	}
	well, dead := few(pathInterval, len(p.peers)-dark), few(pathDark, dark)
	// In the order of a map, which is another each time: who comes last has no
	// place in a burst.
	for _, x := range p.peers {
		if x.unmeasured {
			x.unmeasured = false
			// Spread, so that nodes that learn of each other at once don't ask at once.
			x.sent = now.Add(-time.Duration(rand.Int64N(int64(well))))
		}
		if x.awaiting && stalled {
			x.sent = x.sent.Add(late)
		}
		if x.awaiting && now.Sub(x.sent) >= pathWait {
			x.awaiting = false
			if x.late {
				// The way is slow, and not dead.
				x.late = false
			} else {
				x.good = 0
				x.misses++
				if x.misses >= pathMisses && !x.dark {
					if now.Sub(x.since) < pathSoon && !x.since.IsZero() {
						x.need = min(2*x.need, pathGoodMax)
					} else {
						x.need = pathGood
					}
					x.dark, x.since, changed = true, now, true
				}
			}
		}
		due := well
		switch {
		case x.awaiting:
			continue
		case x.dark && x.good > 0:
			due = pathAgain
		case x.dark:
			due = dead
		case x.misses > 0:
			due = 0
		}
		if now.Sub(x.sent) >= due && len(out) < pathBurst {
			x.seq++
			x.sent, x.awaiting, x.late = now, true, false
			out = append(out, probe{x.to, x.seq})
		}
	}
	return out, changed
}

// answer notes one. changed: a path is well again.
func (p *paths) answer(from netip.Addr, seq uint16, now time.Time) (changed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, x := range p.peers {
		// A late answer counts, but not one from long ago, and none twice.
		if x.to != from || x.seq-seq > pathMisses || int16(seq-x.heard) <= 0 {
			continue
		}
		x.heard = seq
		if seq == x.seq {
			x.awaiting = false
		} else {
			x.late = x.awaiting
		}
		x.good++
		if !x.dark {
			x.misses = 0
		} else if x.good >= x.need {
			x.dark, x.misses, x.since, changed = false, 0, now, true
		}
		return changed
	}
	return false
}

// darkPath is a node whose data path is dead.
type darkPath struct {
	id, name string
	addr     netip.Addr
	since    time.Time
}

// dark lists them, by ID, and tells how many nodes are probed.
func (p *paths) dark() (out []darkPath, probed int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, x := range p.peers {
		if x.dark {
			out = append(out, darkPath{id, x.name, x.addr, x.since})
		}
	}
	slices.SortFunc(out, func(a, b darkPath) int { return strings.Compare(a.id, b.id) })
	return out, len(p.peers)
}

// darken marks the peers of a View whose data path is dead.
func (p *paths) darken(v *spec.View) {
	dark, _ := p.dark()
	for _, d := range dark {
		for i := range v.Peers {
			if v.Peers[i].ID == d.id {
				v.Peers[i].Dark = true
			}
		}
	}
}

// pathLoop probes, while there is a namespace to probe from, and tells the others
// of this node's end of the data path.
func (m *member) pathLoop() {
	netns := spec.OverlayNetns(m.cfg.Instance, spec.PathNetwork)
	var conn Prober
	shut := func() {
		if conn != nil {
			conn.Close()
			conn = nil
		}
	}
	defer shut()
	var tried time.Time
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-timer.C:
		}
		m.tellPath()
		changed := false
		if conn != nil {
			err := conn.Check()
			if err == nil {
				err = conn.Read(func(from netip.Addr, seq uint16) {
					changed = m.paths.answer(from, seq, time.Now()) || changed
				})
			}
			if err != nil {
				m.log.Debug("probes of the data path", "error", err)
				shut()
			}
		}
		_, probed := m.paths.dark()
		if probed == 0 || m.cfg.OpenProber == nil {
			shut()
			timer.Reset(pathIdle)
			continue
		}
		timer.Reset(pathTick)
		if conn == nil {
			// While there is none, nothing is known: of what was asked before neither.
			if time.Since(tried) < pathIdle {
				continue
			}
			tried = time.Now()
			var err error
			if conn, err = m.cfg.OpenProber(netns); err != nil {
				conn = nil
				m.log.Debug("the data path can't be probed", "error", err)
				continue
			}
		}
		probes, dead := m.paths.tick(time.Now())
		for _, x := range probes {
			if err := conn.Send(x.to, x.seq); err != nil {
				m.log.Debug("probe of the data path", "to", x.to, "error", err)
			}
		}
		if changed || dead {
			m.pathsChanged()
		}
	}
}

// tellPath tells the other nodes of this node's end of the data path.
func (m *member) tellPath() {
	mtu := 0
	if m.cfg.UnderlayMTU != nil {
		mtu = m.cfg.UnderlayMTU()
	}
	m.g.SetPath(mtu, m.answersProbes())
}

// answersProbes tells whether the namespace that does is made.
func (m *member) answersProbes() bool {
	v := m.view.Load()
	if v == nil || !slices.ContainsFunc(v.Networks, func(n spec.Network) bool { return n.Driver != spec.DriverBridge }) {
		return false
	}
	// A network of the View that is shown has been made (see hold), and the
	// namespace of the probes with it, if nothing was in its way.
	for _, o := range m.overlay.Failed() {
		if strings.HasPrefix(o.Object, overlay.PathOwner+": ") {
			return false
		}
	}
	return true
}

// pathsChanged says so, and has balancers and managers follow.
func (m *member) pathsChanged() {
	if dark, _ := m.paths.dark(); len(dark) == 0 {
		m.log.Info("the data path to every node works")
	} else {
		var names []string
		for _, d := range dark {
			names = append(names, fmt.Sprintf("%s (%s)", d.name, d.addr))
		}
		m.log.Warn("no answer over the data path", "nodes", strings.Join(names, ", "), "open", m.pathPort())
	}
	wake(m.composeWake)
	wake(m.reportWake)
}

// pathPort is what the underlay has to let pass.
func (m *member) pathPort() string { return fmt.Sprintf("%d/udp", m.ident.Cluster.DataPathPort) }

// doctorPaths is doctor's check. told are nodes that do not reach this one, as they
// told the managers: this one may have no reason to ask them.
func (m *member) doctorPaths(told []string, check func(name, status, msg, hint string)) {
	dark, n := m.paths.dark()
	told = slices.DeleteFunc(slices.Clone(told), func(name string) bool {
		return slices.ContainsFunc(dark, func(d darkPath) bool { return d.name == name })
	})
	if len(dark)+len(told) == 0 {
		check("paths", "ok", fmt.Sprintf("%d other nodes on networks of this one are probed over VXLAN, and answer", n), "")
		return
	}
	for _, name := range told {
		check("paths", "error", fmt.Sprintf("%s gets no answer from %s (%s) over VXLAN: what is sent between them is lost, there or back", name, m.ident.Name, m.ident.Addr),
			fmt.Sprintf("let %s pass both ways between them, in the firewalls of both nodes and of what is between", m.pathPort()))
	}
	for _, d := range dark {
		check("paths", "error",
			fmt.Sprintf("%s (%s) does not answer %s (%s) over VXLAN, for %s: what is sent between them is lost, there or back",
				d.name, d.addr, m.ident.Name, m.ident.Addr, time.Since(d.since).Round(time.Second)),
			fmt.Sprintf("let %s pass both ways between %s and %s, in the firewalls of both nodes and of what is between", m.pathPort(), m.ident.Addr, d.addr))
	}
}
