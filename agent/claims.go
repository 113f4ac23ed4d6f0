package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// A node signs what it says it runs, and so says no more than that it is the one who
// says it: with its key somebody could say that it has another task's address, or a
// replica of any service. So the managers are asked whether they gave it that. An
// endpoint of which they have not said so yet is left out of the View: it takes a
// round trip, and the endpoint is told of before its program starts. Where they have not
// answered for longer than they take to elect a leader, and for what comes with a network
// that is new here, it counts until they do: a VIP is not to miss what is alive for want
// of a manager. But never against what they have given: an address of that is not taken
// from its task by who says that it has it, too.
//
// What they have given is kept in given.json, for an agent that starts while no manager
// answers: nobody is given an address then, so who had it last still has.
//
// Tried and dropped: the managers' signature on each task in its node's record. It is
// worth as much after the address has gone to another task, and a node that knows
// nothing of it could not be told from one that leaves it out.

// Bounds of questions about claims.
const (
	claimTimeout = time.Second     // of one
	claimAgain   = 2 * time.Second // between those about what was given before
	claimGrace   = aloneAfter      // of managers that have answered before, and don't
	claimBatch   = 1000            // claims in one
	claimPerNode = 100             // of them, of one node: none keeps the others waiting
	claimOld     = 50              // of those that are asked about again
)

// claims are the endpoints of other nodes, and what the managers say of them.
type claims struct {
	wake chan struct{} // size 1
	self string
	log  *slog.Logger

	mu        sync.Mutex
	networks  map[string]bool // on this node, at the last View
	known     map[claimKey]*claim
	again     []claimKey           // given ones, the longest not asked about first
	holders   map[holding]claimKey // who was given an address last, of those in known
	answering bool                 // the managers have answered a question within claimGrace
	answer    time.Time            // when they last did
	look      uint64               // number of the View that is being made, or was made last
	made      uint64               // of the one that was made last
	warned    map[string]time.Time
	news      bool // what is given is not what was taken to be kept last
}

type claimKey struct{ node, task, network string }

type holding struct {
	network string
	addr    netip.Addr
}

type claim struct {
	e       spec.Endpoint
	verdict verdict
	early   bool   // it counts before there is a verdict
	doubted bool   // it was given, and the managers deny it now: a rename is on its way
	queued  bool   // it is in claims.again
	kept    bool   // it is known from given.json, and no manager has answered since
	look    uint64 // View that it was last in
}

type verdict int

const (
	pending verdict = iota
	given
	wrong
)

func newClaims(self string, log *slog.Logger) *claims {
	return &claims{wake: make(chan struct{}, 1), self: self, log: log, networks: map[string]bool{}, known: map[claimKey]*claim{}, holders: map[holding]claimKey{}, warned: map[string]time.Time{}}
}

// refused tells whether an endpoint is to be left out of the View that is being made.
func (c *claims) refused(e spec.Endpoint) bool {
	if e.Node == c.self {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	k := claimKey{e.Node, e.Task, e.Network}
	x := c.known[k]
	switch {
	case x == nil:
		x = &claim{e: e, early: !c.networks[e.Network]}
		c.known[k] = x
	case !sameClaim(x.e, e):
		// Another name of what was given counts meanwhile: its connections go on.
		x.early = x.verdict == given && x.e.Service == e.Service && slices.Equal(x.e.Addrs, e.Addrs)
		c.release(k, x)
		x.e, x.verdict, x.doubted = e, pending, false
	}
	x.look = c.look
	if x.verdict == pending {
		wake(c.wake)
		return c.answering && !x.early || c.held(k, x)
	}
	return x.verdict == wrong
}

// held tells whether another has been given an address that k claims.
func (c *claims) held(k claimKey, x *claim) bool {
	for _, a := range x.e.Addrs {
		h, ok := c.holders[holding{k.network, a}]
		if !ok || h == k {
			continue
		}
		if y := c.known[h]; y != nil && y.verdict == given && (y.look >= c.made || y.kept) && slices.Contains(y.e.Addrs, a) {
			return true
		}
	}
	return false
}

// holds notes that k was given what it claims.
func (c *claims) holds(k claimKey, x *claim) {
	for _, a := range x.e.Addrs {
		c.holders[holding{k.network, a}] = k
	}
}

// given are the claims that the managers have said to be right, in order, if those are
// others than at the last call.
func (c *claims) given() (out []spec.Endpoint, news bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.news {
		return nil, false
	}
	c.news = false
	for _, x := range c.known {
		if x.verdict == given {
			out = append(out, x.e)
		}
	}
	slices.SortFunc(out, func(a, b spec.Endpoint) int {
		return cmp.Or(strings.Compare(a.Task, b.Task), strings.Compare(a.Network, b.Network))
	})
	return out, true
}

// remember takes what given was, of an agent before this one.
func (c *claims) remember(eps []spec.Endpoint) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range eps {
		k := claimKey{e.Node, e.Task, e.Network}
		if c.known[k] == nil && e.Node != c.self {
			x := &claim{e: e, verdict: given, queued: true, kept: true}
			c.known[k] = x
			c.again = append(c.again, k)
			c.holds(k, x)
		}
	}
}

// release forgets that k was given what it has claimed.
func (c *claims) release(k claimKey, x *claim) {
	c.news = c.news || x.verdict == given
	for _, a := range x.e.Addrs {
		if h := (holding{k.network, a}); c.holders[h] == k {
			delete(c.holders, h)
		}
	}
}

// sameClaim tells whether two endpoints say the same of what the managers gave.
func sameClaim(a, b spec.Endpoint) bool {
	return a.TaskName == b.TaskName && a.Service == b.Service && slices.Equal(a.Addrs, b.Addrs) && slices.Equal(a.Aliases, b.Aliases)
}

// begin and end are before and after a View is made.
func (c *claims) begin() {
	c.mu.Lock()
	c.look++
	c.mu.Unlock()
}

func (c *claims) end(v *spec.View) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.made = c.look
	clear(c.networks)
	for _, n := range v.Networks {
		c.networks[n.ID] = true
	}
}

// take returns what is to be asked: what has no verdict yet, and some of the rest if
// old is set, when also what is in no View any more is forgotten.
func (c *claims) take(old bool) (keys []claimKey, eps []spec.Endpoint) {
	c.mu.Lock()
	defer c.mu.Unlock()
	add := func(k claimKey, x *claim) { keys, eps = append(keys, k), append(eps, x.e) }
	perNode := map[string]int{}
	for k, x := range c.known {
		switch {
		case old && x.look < c.made && !x.kept: // the newest View may be half made
			delete(c.known, k)
			c.release(k, x)
		case len(keys) < claimBatch && perNode[k.node] < claimPerNode && (x.verdict == pending || old && (x.verdict == wrong || x.doubted)):
			perNode[k.node]++
			add(k, x)
		}
	}
	for n := 0; old && n < claimOld && len(c.again) > 0; {
		k := c.again[0]
		c.again = c.again[1:]
		if x := c.known[k]; x != nil && x.queued && x.verdict == given {
			if x.queued = false; !x.doubted { // or it is there already
				add(k, x)
				n++
			}
		}
	}
	return keys, eps
}

// answered notes what the managers said, or with an error that they did not. It tells
// whether there is another View for that.
func (c *claims) answered(keys []claimKey, eps []spec.Endpoint, no map[uint32]bool, err error, now time.Time) (changed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.answering
	if err == nil {
		c.answering, c.answer = true, now
	} else {
		c.answering = c.answering && now.Sub(c.answer) < claimGrace
	}
	if changed = was != c.answering; changed && c.answering {
		for _, x := range c.known { // they have counted up to now
			x.early, x.kept = true, false
		}
	}
	for i, k := range keys {
		x := c.known[k]
		if x == nil || !sameClaim(x.e, eps[i]) {
			continue
		}
		was := x.verdict
		switch {
		case err != nil:
		case no[uint32(i)] && was == given && !x.doubted:
			x.doubted = true
		case no[uint32(i)]:
			x.verdict, x.doubted = wrong, false
		default:
			x.verdict, x.doubted = given, false
		}
		if c.news = c.news || (was == given) != (x.verdict == given); x.verdict == given {
			c.holds(k, x)
		}
		if x.verdict == given && !x.queued {
			x.queued = true
			c.again = append(c.again, k)
		}
		if changed = changed || was != x.verdict; x.verdict == wrong && was != wrong && time.Since(c.warned[k.node]) > time.Minute {
			c.warned[k.node] = time.Now()
			c.log.Warn("a node says that it has what the managers did not give it; it is left out", "node", k.node, "task", k.task, "network", k.network, "addrs", x.e.Addrs)
		}
	}
	return changed
}

// wrongs are how many claims of each node the managers deny.
func (c *claims) wrongs() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[string]int{}
	for k, x := range c.known {
		if x.verdict == wrong && x.look >= c.made {
			out[k.node]++
		}
	}
	return out
}

// claimLoop asks the managers.
func (m *member) claimLoop() {
	t := time.NewTicker(claimAgain)
	defer t.Stop()
	for {
		old := false
		select {
		case <-m.ctx.Done():
			return
		case <-m.claims.wake:
		case <-t.C:
			old = true
		}
		keys, eps := m.claims.take(old)
		if len(keys) == 0 {
			continue
		}
		no, err := m.askClaims(eps)
		if m.ctx.Err() != nil {
			return
		}
		if m.claims.answered(keys, eps, no, err, time.Now()) {
			wake(m.composeWake) // which asks about what is left
		}
		if err != nil {
			m.log.Debug("the managers don't say whose endpoints these are", "endpoints", len(eps), "error", err)
			sleep.For(m.ctx, 100*time.Millisecond)
			wake(m.claims.wake)
		}
	}
}

// keptGiven is given.json: claims that the managers said to be right, and who asked.
type keptGiven struct {
	Cluster string      `json:"cluster"`
	Node    string      `json:"node"`
	Given   []keptClaim `json:"given"`
	Sum     string      `json:"sum,omitempty"` // see compactSum
}

type keptClaim struct {
	On string `json:"on"` // node's ID
	spec.Endpoint
}

func encodeGiven(eps []spec.Endpoint, cluster, node string) ([]byte, error) {
	k := keptGiven{Cluster: cluster, Node: node, Given: []keptClaim{}}
	for _, e := range eps {
		k.Given = append(k.Given, keptClaim{e.Node, e})
	}
	b, err := json.Marshal(k)
	if err != nil {
		return nil, err
	}
	return compactSum.add(b), nil
}

func decodeGiven(b []byte, cluster, node string) ([]spec.Endpoint, error) {
	var k keptGiven
	if err := json.Unmarshal(b, &k); err != nil {
		return nil, fmt.Errorf("damaged: %w", err)
	}
	if err := compactSum.check(b, k.Sum); err != nil {
		return nil, err
	}
	if k.Cluster != cluster || k.Node != node {
		return nil, fmt.Errorf("not this node's: it is of node %s in cluster %s", k.Node, k.Cluster)
	}
	var out []spec.Endpoint
	for _, c := range k.Given {
		c.Endpoint.Node = c.On
		out = append(out, c.Endpoint)
	}
	return out, nil
}

func givenPath(dataDir string) string { return filepath.Join(dataDir, "given.json") }

func (m *member) givenPath() string { return givenPath(m.cfg.DataDir) }

// loadGiven takes what an agent before this one was told of claims. Without it nobody is
// known to have what he says, until a manager answers.
func (m *member) loadGiven() {
	b, err := os.ReadFile(m.givenPath())
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var eps []spec.Endpoint
	if err == nil {
		eps, err = decodeGiven(b, m.ident.Cluster.ID, m.ident.NodeID)
	}
	if err != nil {
		m.log.Warn("whose address is whose is not known before a manager answers", "file", m.givenPath(), "error", err)
		return
	}
	m.claims.remember(eps)
}

// keepGiven keeps what the managers said of claims, and at the end what they said last. It
// costs what there is, not what changed: less than a twentieth of the time goes into it.
func (m *member) keepGiven() {
	const every, share = 2 * time.Second, 20
	defer m.saveGiven()
	for wait := every; sleep.For(m.ctx, wait); {
		began := time.Now()
		m.saveGiven()
		wait = max(every, share*time.Since(began))
	}
}

func (m *member) saveGiven() {
	eps, news := m.claims.given()
	if !news {
		return
	}
	m.mu.Lock()
	cluster, node := m.ident.Cluster.ID, m.ident.NodeID
	m.mu.Unlock()
	b, err := encodeGiven(eps, cluster, node)
	if err == nil {
		err = durable.WriteFile(m.givenPath(), b)
	}
	if m.kept.note("what the managers gave to whom", err); err != nil {
		m.claims.keepAgain()
	}
}

// keepAgain has given tell everything again.
func (c *claims) keepAgain() {
	c.mu.Lock()
	c.news = true
	c.mu.Unlock()
}

func (m *member) askClaims(eps []spec.Endpoint) (no map[uint32]bool, err error) {
	req := &shoalv1.CheckEndpointsRequest{Node: m.ident.NodeID}
	for _, e := range eps {
		x := &shoalv1.CheckEndpointsRequest_Claim{Node: e.Node, Task: e.Task, TaskName: e.TaskName, Service: e.Service, Network: e.Network, Aliases: e.Aliases}
		for _, a := range e.Addrs {
			x.Addrs = append(x.Addrs, a.String())
		}
		req.Claims = append(req.Claims, x)
	}
	ctx, cancel := context.WithTimeout(m.ctx, claimTimeout)
	defer cancel()
	resp, err := m.client.CheckEndpoints(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	no = make(map[uint32]bool, len(resp.Msg.Wrong))
	for _, i := range resp.Msg.Wrong {
		no[i] = true
	}
	return no, nil
}

// doctorClaims is doctor's check.
func (m *member) doctorClaims(check func(name, status, msg, hint string)) {
	names := map[string]string{}
	if v := m.view.Load(); v != nil {
		for _, p := range v.Peers {
			names[p.ID] = p.Name
		}
	}
	var out []string
	for id, n := range m.claims.wrongs() {
		if names[id] != "" {
			id = names[id]
		}
		out = append(out, fmt.Sprintf("%s (%d)", id, n))
	}
	if len(out) == 0 {
		return
	}
	slices.Sort(out)
	check("endpoints", "error", "these nodes say that they have addresses or replicas which the managers did not give them, and are not heard in that: "+strings.Join(out, ", "),
		"if it does not end, somebody else may have the node's key: shoal node rm")
}
