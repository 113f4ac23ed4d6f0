package agent

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// pathSim is nodes that answer or don't, as one node's paths see them.
type pathSim struct {
	t       *testing.T
	p       *paths
	now     time.Time
	loses   func(to netip.Addr) bool
	rtt     time.Duration
	flights []flight
	sent    int
	most    int // in one second
	second  int
	changes int
}

type flight struct {
	at time.Time
	probe
}

func newPathSim(t *testing.T, nodes int) *pathSim {
	s := &pathSim{t: t, p: newPaths(), now: time.Unix(1000, 0), loses: func(netip.Addr) bool { return false }, rtt: time.Millisecond}
	s.p.follow(pathView(nodes))
	return s
}

// pathView is of n0, which shares a network with n1, n2, …, and none with another.
func pathView(nodes int) *spec.View {
	v := &spec.View{Self: "n0", Networks: []spec.Network{{ID: "app", Driver: spec.DriverOverlay}, {ID: "here", Driver: spec.DriverBridge}}}
	for i := range nodes + 1 {
		id := fmt.Sprintf("n%d", i)
		v.Peers = append(v.Peers, spec.Peer{ID: id, Name: "node" + id, Number: i + 1, Answers: true})
		v.Endpoints = append(v.Endpoints, spec.Endpoint{Node: id, Network: "app", Task: id})
	}
	return v
}

// run lets time pass, in ticks of step.
func (s *pathSim) run(d, step time.Duration) {
	for end := s.now.Add(d); s.now.Before(end); {
		s.now = s.now.Add(step)
		s.flights = slices.DeleteFunc(s.flights, func(f flight) bool {
			if f.at.After(s.now) {
				return false
			}
			if s.p.answer(f.to, f.seq, s.now) {
				s.changes++
			}
			return true
		})
		out, changed := s.p.tick(s.now)
		if changed {
			s.changes++
		}
		for _, x := range out {
			s.sent++
			s.second++
			if !s.loses(x.to) {
				s.flights = append(s.flights, flight{s.now.Add(s.rtt), x})
			}
		}
		if s.now.Nanosecond() < int(step) {
			s.most, s.second = max(s.most, s.second), 0
		}
	}
}

func (s *pathSim) dark() (ids []string) {
	list, _ := s.p.dark()
	for _, d := range list {
		ids = append(ids, d.id)
	}
	return ids
}

func (s *pathSim) want(what string, ids ...string) {
	s.t.Helper()
	if got := s.dark(); !slices.Equal(got, ids) {
		s.t.Errorf("%s: dead are %q, not %q", what, got, ids)
	}
}

func TestPathsDieAndComeBack(t *testing.T) {
	s := newPathSim(t, 3)
	s.run(10*time.Second, pathTick)
	s.want("all answer")
	two := spec.RouterAddr(3)
	s.loses = func(to netip.Addr) bool { return to == two }
	s.run(time.Second, pathTick)
	s.want("a second is too soon")
	s.run(1500*time.Millisecond, pathTick)
	s.want("after 2.5 s", "n2")
	s.run(time.Minute, pathTick)
	s.want("for good", "n2")
	s.loses = func(netip.Addr) bool { return false }
	s.run(2*time.Second, pathTick)
	s.want("2 s after it is back")
	if s.changes != 2 {
		t.Errorf("%d changes, want 2", s.changes)
	}
	// Who has gone from the View is not asked any more, nor told of.
	s.loses = func(netip.Addr) bool { return true }
	s.run(5*time.Second, pathTick)
	s.want("all are dead", "n1", "n2", "n3")
	v := pathView(3)
	v.Peers[1].Liveness, v.Peers[2].Answers, v.Endpoints[3].Network = spec.PeerDead, false, "here"
	s.p.follow(v)
	s.want("none shares anything")
	s.sent = 0
	s.run(5*time.Second, pathTick)
	if s.sent > 0 {
		t.Errorf("%d probes of nodes that have nothing to do with this one", s.sent)
	}
}

// TestPathsUnderLoad: what makes probes late, or loses a few, makes no path dead.
func TestPathsUnderLoad(t *testing.T) {
	for name, c := range map[string]struct {
		step, rtt time.Duration
		lost      float64
	}{
		"this process is starved":         {step: 3 * time.Second, rtt: 600 * time.Millisecond},
		"and each time but a little":      {step: 600 * time.Millisecond, rtt: 590 * time.Millisecond},
		"the other machine is slow":       {step: pathTick, rtt: 900 * time.Millisecond},
		"a tenth of all packets are lost": {step: pathTick, rtt: time.Millisecond, lost: 0.05},
	} {
		t.Run(name, func(t *testing.T) {
			s := newPathSim(t, 3)
			r := rand.New(rand.NewPCG(1, 2))
			s.rtt, s.loses = c.rtt, func(netip.Addr) bool { return r.Float64() < c.lost }
			s.run(5*time.Minute, c.step)
			if s.changes > 0 {
				t.Errorf("%d changes", s.changes)
			}
			if s.sent < 50 {
				t.Errorf("only %d probes", s.sent)
			}
		})
	}
}

// TestPathsFlap: a path that loses most of what it carries is not taken up again
// every few seconds.
func TestPathsFlap(t *testing.T) {
	s := newPathSim(t, 1)
	r := rand.New(rand.NewPCG(1, 2))
	s.loses = func(netip.Addr) bool { return r.Float64() < 0.5 }
	s.run(10*time.Minute, pathTick)
	if s.changes > 60 {
		t.Errorf("%d changes in ten minutes", s.changes)
	}
	s.loses = func(netip.Addr) bool { return false }
	s.run(15*time.Second, pathTick)
	s.want("it is whole again")
}

// TestPathsOfMany: with 1,000 nodes the probes of one stay few, whatever happens.
func TestPathsOfMany(t *testing.T) {
	s := newPathSim(t, 1000)
	s.run(time.Minute, pathTick)
	s.want("all answer")
	if s.most > 2*pathRate {
		t.Errorf("%d probes in a second", s.most)
	}
	if s.sent < 60*pathRate/2 {
		t.Errorf("only %d probes in a minute", s.sent)
	}
	two := spec.RouterAddr(3)
	s.loses = func(to netip.Addr) bool { return to == two }
	s.run(20*time.Second, pathTick)
	s.want("one is dead", "n2")
	s.most = 0
	s.loses = func(netip.Addr) bool { return true }
	s.run(time.Minute, pathTick)
	if n := len(s.dark()); n != 1000 {
		t.Errorf("%d of 1000 are dead", n)
	}
	if s.most > pathBurst*10 {
		t.Errorf("%d probes in a second", s.most)
	}
	s.loses = func(netip.Addr) bool { return false }
	s.run(40*time.Second, pathTick)
	s.want("all are back")
}

// TestDarken: only who is dead is marked.
func TestDarken(t *testing.T) {
	s := newPathSim(t, 2)
	s.loses = func(to netip.Addr) bool { return to == spec.RouterAddr(2) }
	s.run(5*time.Second, pathTick)
	v := pathView(2)
	s.p.darken(v)
	for _, p := range v.Peers {
		if p.Dark != (p.ID == "n1") {
			t.Errorf("%s: dark is %v", p.ID, p.Dark)
		}
	}
}
