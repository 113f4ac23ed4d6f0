package agent

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// claimSim is a node that looks at what others claim.
type claimSim struct {
	*testing.T
	c   *claims
	v   *spec.View
	now time.Time
}

func newClaimSim(t *testing.T) *claimSim {
	return &claimSim{t, newClaims("self", slog.New(slog.DiscardHandler)), &spec.View{Networks: []spec.Network{{ID: "net"}}}, time.Unix(1e9, 0)}
}

func claimOf(node, task string) spec.Endpoint {
	n, _ := strconv.Atoi(task)
	return spec.Endpoint{Node: node, Task: task, TaskName: "web." + task, Service: "svc", Network: "net", Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)})}, State: spec.EndpointActive}
}

// shows makes a View and tells which of the endpoints are in it.
func (s *claimSim) shows(eps ...spec.Endpoint) (out []string) {
	s.c.begin()
	for _, e := range eps {
		if !s.c.refused(e) {
			out = append(out, e.Node+"/"+e.Task)
		}
	}
	s.c.end(s.v)
	return out
}

// ask has the managers asked, who deny what no says.
func (s *claimSim) ask(old bool, err error, no ...string) (asked []string, changed bool) {
	keys, eps := s.c.take(old)
	deny := map[uint32]bool{}
	for i, k := range keys {
		asked = append(asked, k.node+"/"+k.task)
		for _, x := range no {
			deny[uint32(i)] = deny[uint32(i)] || x == k.node+"/"+k.task
		}
	}
	return asked, s.c.answered(keys, eps, deny, err, s.now)
}

func (s *claimSim) want(what string, got []string, want ...string) {
	s.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		s.Errorf("%s: %v, want %v", what, got, want)
	}
}

// TestClaimsThatEnd: a claim that was withdrawn is no fault any more, though nothing else
// changes after it.
func TestClaimsThatEnd(t *testing.T) {
	s := newClaimSim(t)
	evil := claimOf("b", "2")
	s.shows(evil)
	s.ask(false, nil, "b/2")
	s.shows(evil)
	if got := s.c.wrongs(); got["b"] != 1 {
		t.Errorf("wrong claims: %v", got)
	}
	s.shows()
	if got := s.c.wrongs(); len(got) != 0 {
		t.Errorf("wrong claims of what nobody says any more: %v", got)
	}
	// While a View is made, the last one counts.
	s.shows(evil)
	s.ask(false, nil, "b/2")
	s.c.begin()
	if got := s.c.wrongs(); got["b"] != 1 {
		t.Errorf("wrong claims while a View is made: %v", got)
	}
}

// TestClaims: what the managers have not given is left out, from the first moment on
// where they answer; where they don't, nothing is missed.
func TestClaims(t *testing.T) {
	s := newClaimSim(t)
	web, evil, own := claimOf("a", "1"), claimOf("b", "2"), claimOf("self", "3")
	s.want("at the start", s.shows(web, evil, own), "a/1", "b/2", "self/3")
	if asked, changed := s.ask(false, nil, "b/2"); len(asked) != 2 || !changed {
		t.Errorf("asked of %v, changed %t", asked, changed)
	}
	s.want("once they have answered", s.shows(web, evil, own), "a/1", "self/3")
	if got := s.c.wrongs(); len(got) != 1 || got["b"] != 1 {
		t.Errorf("wrong are %v", got)
	}

	late := claimOf("a", "4")
	s.want("before the answer", s.shows(web, late), "a/1")
	s.want("of the new one only", first(s.ask(false, nil)), "a/4")
	s.want("after it", s.shows(web, late), "a/1", "a/4")

	// Other content is another claim; another state is not.
	late.State = spec.EndpointDraining
	s.want("draining", s.shows(late), "a/4")
	late.Addrs = []netip.Addr{netip.MustParseAddr("10.0.1.8")}
	s.want("elsewhere", s.shows(late))
	s.ask(false, nil, "a/4")
	s.want("elsewhere, after the answer", s.shows(late))

	// What was given is asked about again, and may be no more.
	s.shows(web, late)
	s.shows(web, late)
	s.ask(true, nil, "a/1", "a/4")
	s.want("denied once, as in a rename", s.shows(web, late), "a/1")
	if asked, _ := s.ask(true, nil, "a/1", "a/4"); len(asked) != 2 {
		t.Errorf("of that next time: asked of %v", asked)
	}
	s.want("no longer given", s.shows(web, late))
	s.ask(true, nil, "a/4")
	s.want("given after all", s.shows(web, late), "a/1")

	// Another name of what was given is no reason to cut its connections.
	web.TaskName = "renamed"
	s.want("renamed", s.shows(web, late), "a/1")
	s.ask(false, nil, "a/1")
	s.want("renamed by itself", s.shows(web, late))
	s.ask(true, nil, "a/4")
	s.want("by the managers, too", s.shows(web, late), "a/1")

	// Without an answer for some time all counts that is not known to be wrong, also when
	// they are back, until they have said so; but not who says that he has what another
	// was given.
	noLeader := errors.New("no manager leads")
	other, more, thief, twin := claimOf("c", "5"), claimOf("c", "6"), claimOf("d", "7"), web
	thief.Addrs, twin.Node = web.Addrs, "d"
	s.now = s.now.Add(claimGrace - 1)
	s.ask(true, noLeader)
	s.want("while they elect a leader", s.shows(web, late, other, more, thief, twin), "a/1")
	s.now = s.now.Add(1)
	if _, changed := s.ask(false, noLeader); !changed {
		t.Error("no other View without managers")
	}
	s.want("without managers", s.shows(web, late, other, more, thief, twin), "a/1", "c/5", "c/6")
	s.want("an address whose task is gone", s.shows(other, more, thief), "c/5", "c/6")
	s.want("and has been", s.shows(other, more, thief), "c/5", "c/6", "d/7")
	s.shows(web, other, more)
	s.shows(web, other, more)
	keys, eps := s.c.take(false)
	s.c.answered(keys[:1], eps[:1], nil, nil, s.now)
	if got := s.shows(web, other, more); len(got) != 3 {
		t.Errorf("with the managers back: %v", got)
	}

	// A network that is new here brings what it has.
	s.ask(false, nil)
	far := claimOf("a", "7")
	far.Network = "other"
	s.want("of a new network", s.shows(far), "a/7")
	s.v.Networks = append(s.v.Networks, spec.Network{ID: "other"})
	s.shows(far)
	farther := claimOf("a", "8")
	farther.Network = "other"
	s.want("of one that is there", s.shows(far, farther), "a/7")
}

func first(keys []string, _ bool) []string { return keys }

// TestClaimsAreBounded: one node's many claims keep nobody waiting, what is in no View
// any more is forgotten, and what is given is asked about in turn.
func TestClaimsAreBounded(t *testing.T) {
	s := newClaimSim(t)
	s.ask(false, nil)
	s.shows()
	var eps []spec.Endpoint
	for i := range 5000 {
		eps = append(eps, claimOf("evil", fmt.Sprint(i)))
	}
	eps = append(eps, claimOf("a", "1"))
	s.want("before the answer", s.shows(eps...))
	asked, _ := s.ask(false, nil)
	if len(asked) != claimPerNode+1 {
		t.Errorf("%d are asked about at once", len(asked))
	}
	if got := s.shows(eps...); len(got) != claimPerNode+1 {
		t.Errorf("%d are shown", len(got))
	}
	for range 50 {
		s.ask(false, nil)
	}
	if got := s.shows(eps...); len(got) != len(eps) {
		t.Errorf("%d of %d are shown", len(got), len(eps))
	}
	seen := map[string]bool{}
	for range len(eps)/claimOld + 1 {
		keys, _ := s.ask(true, nil)
		if len(keys) > claimOld {
			t.Fatalf("%d are asked about again at once", len(keys))
		}
		for _, k := range keys {
			seen[k] = true
		}
	}
	if len(seen) != len(eps) {
		t.Errorf("%d of %d were asked about again", len(seen), len(eps))
	}
	s.shows()
	s.shows()
	s.ask(true, nil)
	for range len(eps) / claimOld {
		s.ask(true, nil)
	}
	if len(s.c.known) != 0 || len(s.c.holders) != 0 || len(s.c.again) > claimOld {
		t.Errorf("%d and %d are kept of what is gone", len(s.c.known), len(s.c.again))
	}
}

// TestClaimsOutlastTheAgent: an agent that starts while no manager answers knows what
// they gave, and to whom; once one answers that is only what it was before.
func TestClaimsOutlastTheAgent(t *testing.T) {
	before := newClaimSim(t)
	web, gone, named := claimOf("a", "1"), claimOf("a", "5"), claimOf("a", "6")
	before.shows(web, gone, named)
	before.ask(false, nil)
	eps, news := before.c.given()
	if len(eps) != 3 || !news {
		t.Fatalf("given: %v, %t", eps, news)
	}
	if _, news := before.c.given(); news {
		t.Error("nothing is new")
	}
	b, err := encodeGiven(eps, "c", "self")
	if err != nil {
		t.Fatal(err)
	}
	eps, err = decodeGiven(b, "c", "self")
	if err != nil || len(eps) != 3 || eps[0].Node != "a" || !sameClaim(eps[0], web) {
		t.Fatalf("%v, %v", eps, err)
	}
	body := b[:bytes.LastIndex(b, []byte(compactSum.member))]
	for name, bad := range map[string][]byte{"empty": nil, "cut": b[:len(b)-3], "other": bytes.Replace(b, []byte("web.1"), []byte("web.2"), 1), "no sum": append(slices.Clone(body), '}')} {
		if got, err := decodeGiven(bad, "c", "self"); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
	for _, whose := range [][2]string{{"d", "self"}, {"c", "other"}} {
		if got, err := decodeGiven(b, whose[0], whose[1]); err == nil {
			t.Errorf("of node %s in cluster %s: %v", whose[1], whose[0], got)
		}
	}

	s := newClaimSim(t)
	s.c.remember(eps)
	thief := claimOf("b", "7")
	thief.Addrs = web.Addrs
	fresh := claimOf("b", "8")
	silent := errors.New("no manager")
	s.want("before gossip has brought the holder", s.shows(thief, fresh), "b/8")
	s.ask(true, silent)
	s.want("with the holder", s.shows(web, thief, fresh), "a/1", "b/8")
	s.ask(true, silent)
	renamed := named
	renamed.TaskName = "other"
	s.want("renamed meanwhile", s.shows(web, thief, fresh, renamed), "a/1", "b/8", "a/6")
	// The managers answer: the address was given to another by now.
	s.ask(false, nil, "a/1")
	s.want("after the answer", s.shows(web, thief, fresh, renamed), "a/1", "b/7", "b/8", "a/6")
	s.ask(true, nil, "a/1")
	s.ask(true, nil, "a/1")
	s.want("the one that had it", s.shows(web, thief, fresh, renamed), "b/7", "b/8", "a/6")
	if _, ok := s.c.known[claimKey{"a", "5", "net"}]; ok {
		t.Error("what nobody claims any more is remembered")
	}
}
