package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// schedule carries out what Plan decides, after each change and when Plan said
// it would have more to say.
func (m *Manager) schedule(ctx context.Context) {
	for ctx.Err() == nil {
		changed := m.fsm.next()
		now := time.Now().UnixMilli()
		var ops []state.ScheduleOp
		var next int64
		m.fsm.read(func(s *state.State) { ops, next = state.Plan(s, now) })
		if len(ops) > 0 {
			if _, err := m.Propose(ctx, state.Command{Schedule: &state.Schedule{Now: now, Ops: ops}}); err != nil {
				m.log.Warn("a schedule was not accepted; planning again", "error", err)
				sleep.For(ctx, 100*time.Millisecond)
			}
			continue
		}
		wait := time.Minute
		if next > 0 {
			wait = max(time.Until(time.UnixMilli(next)), time.Millisecond)
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-t.C:
		}
		t.Stop()
	}
}

// monitorInterval is how often silence is looked at.
const monitorInterval = 200 * time.Millisecond

// seen notes a sign of life of a node.
func (m *Manager) seen(id string) {
	m.mu.Lock()
	m.lastSeen[id] = time.Now()
	m.mu.Unlock()
}

// tells notes that a node has said how each of its tasks is.
func (m *Manager) tells(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.told != nil {
		m.told[id] = true
	}
}

// awaitReports waits until every node that is ready has said how its tasks are to this
// leader, for a moment after it was elected: if all machines were started anew, what the
// state says runs is of before. Its error is ctx's.
func (m *Manager) awaitReports(ctx context.Context) error {
	for {
		m.mu.Lock()
		over := m.leadership == nil || time.Since(m.began) > m.cfg.Tuning.FirstReports
		told := maps.Clone(m.told)
		m.mu.Unlock()
		if over {
			return nil
		}
		missing, live := false, m.cfg.Liveness()
		m.fsm.read(func(s *state.State) {
			missing = slices.ContainsFunc(s.Nodes(), func(n spec.Node) bool {
				return n.Status == spec.NodeReady && !told[n.ID] && live[n.ID] != spec.PeerDead
			})
		})
		if !missing {
			return nil
		}
		if !sleep.For(ctx, 20*time.Millisecond) {
			return ctx.Err()
		}
	}
}

// follows notes which assignment a node's kernel follows.
func (m *Manager) follows(id string, index uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if index > m.applied[id] {
		m.applied[id] = index
		m.tidings.ring()
	}
}

// news is closed when a node says something else than before of what its kernel follows,
// or can't do. Take it before reading that.
func (m *Manager) news() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tidings
}

// wake has whoever waits on ch, of size 1, look again. It never blocks.
func wake(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// halts notes whether a node says that its machine goes down.
func (m *Manager) halts(id string, does bool) {
	m.mu.Lock()
	was := m.halting[id]
	if does {
		if m.halting == nil {
			m.halting = map[string]bool{}
		}
		m.halting[id] = true
	} else {
		delete(m.halting, id)
	}
	m.mu.Unlock()
	if does && !was {
		wake(m.wakeNodes)
	}
}

// failing notes what a node says it can't do; it replaces what it said before.
func (m *Manager) failing(id string, faults []*shoalv1.ReportRequest_Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	same := slices.EqualFunc(m.faults[id], faults, func(a, b *shoalv1.ReportRequest_Fault) bool { return proto.Equal(a, b) })
	if len(faults) == 0 {
		delete(m.faults, id)
	} else if m.faults != nil {
		m.faults[id] = faults
	}
	if !same {
		m.tidings.ring()
	}
}

// darkens notes which nodes don't answer a node over VXLAN.
func (m *Manager) darkens(id string, peers []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(peers) == 0 {
		delete(m.dark, id)
	} else if m.faults != nil { // while this manager leads
		if m.dark == nil {
			m.dark = map[string][]string{}
		}
		m.dark[id] = peers[:min(len(peers), spec.MaxNodes)]
	}
}

// darkPaths lists by node the names of the others that it does not reach, or is not
// reached by, over the data path.
func (m *Manager) darkPaths(st *state.State) map[string][]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.dark) == 0 {
		return nil
	}
	names, others := map[string]string{}, map[string][]string{}
	for _, n := range st.Nodes() {
		if n.Status == spec.NodeReady {
			names[n.ID] = n.Name
		}
	}
	for id, peers := range m.dark {
		for _, p := range peers {
			if a, b := names[id], names[p]; a != "" && b != "" && id != p {
				others[id], others[p] = append(others[id], b), append(others[p], a)
			}
		}
	}
	for id, ns := range others {
		slices.Sort(ns)
		others[id] = slices.Compact(ns)
	}
	return others
}

// unreachedText says what darkPaths does of one node; "" for nothing.
func unreachedText(names []string, port int) string {
	if len(names) == 0 {
		return ""
	}
	return fmt.Sprintf("no data path to %s: open %d/udp between them", spec.Few(names), port)
}

// faultsByObject is what live nodes can't do, by the ID of the service or task that
// it is for; of each in the order of the nodes.
func (m *Manager) faultsByObject(st *state.State) map[string][]*shoalv1.NodeFault {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.faults) == 0 {
		return nil
	}
	out := map[string][]*shoalv1.NodeFault{}
	for _, n := range st.Nodes() {
		if n.Status != spec.NodeReady {
			continue
		}
		for _, f := range m.faults[n.ID] {
			out[f.Object] = append(out[f.Object], &shoalv1.NodeFault{Node: n.Name, Message: f.Message})
		}
	}
	return out
}

// behind names the nodes that a change made at an index concerns and that have
// not said yet that they follow it. Of those that are down nobody waits to hear.
func (m *Manager) behind(st *state.State, index uint64) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for _, n := range st.Nodes() {
		if n.Status == spec.NodeReady && st.AssignmentIndex(n.ID) >= index && m.applied[n.ID] < index {
			out = append(out, n.Name)
		}
	}
	return out
}

// monitor keeps the nodes' status as what was heard of them says.
func (m *Manager) monitor(ctx context.Context, since time.Time) {
	t := time.NewTicker(monitorInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.wakeNodes:
		case <-t.C:
		}
		var nodes []spec.Node
		m.fsm.read(func(s *state.State) { nodes = s.Nodes() })
		m.mu.Lock()
		seen := func(id string) time.Time {
			if t, ok := m.lastSeen[id]; ok {
				return t
			}
			return since
		}
		changes := judge(nodes, m.cfg.Node.ID, seen, m.cfg.Liveness(), m.halting, time.Now(), m.cfg.Tuning)
		m.mu.Unlock()
		if len(changes) == 0 {
			continue
		}
		for _, c := range changes {
			m.log.Info("node status", "id", c.ID, "status", c.Status, "message", c.Message)
		}
		if _, err := m.Propose(ctx, state.Command{SetNodeStatus: &state.SetNodeStatus{Nodes: changes}}); err != nil && ctx.Err() == nil {
			m.log.Warn("a node's status was not accepted; trying again", "error", err)
		}
	}
}

// judge decides which nodes' status is another now. It is pure.
func judge(nodes []spec.Node, self string, seen func(string) time.Time, live map[string]spec.Liveness, halting map[string]bool, now time.Time, t Tuning) []state.NodeStatus {
	type verdict struct {
		n      spec.Node
		silent time.Duration
		dead   bool
	}
	var vs []verdict
	dead := 0
	for _, n := range nodes {
		v := verdict{n: n, silent: now.Sub(seen(n.ID))}
		v.dead = n.ID != self && (v.silent > t.DownAfter && live[n.ID] == spec.PeerDead || v.silent > t.DownRegardless)
		if v.dead {
			dead++
		}
		vs = append(vs, v)
	}
	// When most others look dead it is more likely that this node is cut off.
	doubt := len(nodes) > 3 && 2*dead > len(nodes)
	var out []state.NodeStatus
	for _, v := range vs {
		status, msg := v.n.Status, v.n.Message
		switch {
		case v.n.ID == self:
			status, msg = spec.NodeReady, ""
		case halting[v.n.ID]:
			status, msg = spec.NodeDown, "its machine goes down"
		case v.dead && !(doubt && v.silent <= t.DownRegardless):
			// Only a report of its own makes it ready again.
			status, msg = spec.NodeDown, "not heard from since "+seen(v.n.ID).UTC().Format(time.RFC3339)
		}
		if status != v.n.Status {
			out = append(out, state.NodeStatus{ID: v.n.ID, Status: status, Message: msg})
		}
	}
	return out
}

const votersInterval = time.Second

// keepVoters makes the voters of raft those nodes that are managers: a node's
// role is what the state says, and raft follows.
func (m *Manager) keepVoters(ctx context.Context) {
	for {
		t := time.NewTimer(votersInterval)
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-m.wakeVoters:
		}
		t.Stop()
		if ctx.Err() != nil {
			return
		}
		m.raiseLevel(ctx)
		if err := m.fixVoters(); err != nil && ctx.Err() == nil {
			m.log.Warn("raft's voters can't be brought in line with the managers; trying again", "error", err)
		}
	}
}

func (m *Manager) fixVoters() error {
	f := m.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return err
	}
	var nodes []spec.Node
	var level int
	m.fsm.read(func(s *state.State) { nodes, level = s.Nodes(), s.Level() })
	servers := f.Configuration().Servers
	var errs []error
	for _, n := range nodes {
		if n.Role != spec.RoleManager || n.Status == spec.NodeDown {
			continue
		}
		i := slices.IndexFunc(servers, func(s raft.Server) bool { return string(s.ID) == n.ID })
		if i < 0 && !m.isReady(n.ID) {
			// It is on its way: counted on before it answers, it could leave the
			// others without a majority.
			continue
		}
		if i < 0 && n.Level < level {
			// It could not read the log. Its agent says so; an upgrade makes it a voter.
			continue
		}
		if i < 0 || servers[i].Address != raftAddress(n) {
			m.log.Info("adding a manager to raft", "node", n.Name, "addr", raftAddress(n))
			errs = append(errs, m.addVoter(n))
		}
	}
	for _, s := range servers {
		// Its own removal, too: raft steps down once that is committed.
		i := slices.IndexFunc(nodes, func(n spec.Node) bool { return n.ID == string(s.ID) })
		if i < 0 || nodes[i].Role != spec.RoleManager {
			m.log.Info("removing a manager from raft", "id", s.ID)
			errs = append(errs, m.raft.RemoveServer(s.ID, 0, proposeTimeout).Error())
		}
	}
	return errors.Join(errs...)
}

// isReady tells whether a node has said that its raft runs.
func (m *Manager) isReady(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ready[id]
}

// showing notes by which root the certificate is that a node shows.
func (m *Manager) showing(id, root string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shows != nil {
		m.shows[id] = root
	}
}

// add notes whom keepVoters adds now; empty: nobody.
func (m *Manager) add(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.adding = id
}

// managing notes whether a node's raft runs.
func (m *Manager) managing(id string, ready bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ready == nil || m.ready[id] == ready {
		return
	}
	m.ready[id] = ready
	wake(m.wakeVoters)
}

// readmit takes a manager that has lost its store out of raft, and tells it from
// where on it may begin anew; see store.go.
func (m *Manager) readmit(id string) (Admission, error) {
	if id == m.cfg.Node.ID {
		return Admission{}, fmt.Errorf("node %s leads the managers: it has its store", id)
	}
	term := m.raft.CurrentTerm()
	if !m.IsLeader() {
		return Admission{}, errNotLeader()
	}
	m.managing(id, false)
	f := m.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return Admission{}, err
	}
	if slices.ContainsFunc(f.Configuration().Servers, func(s raft.Server) bool { return string(s.ID) == id }) {
		m.log.Warn("a manager has lost its store: taking it out of raft, to be added anew", "id", id)
		if err := m.raft.RemoveServer(raft.ServerID(id), 0, proposeTimeout).Error(); err != nil {
			return Admission{}, fmt.Errorf("take the manager out of raft: %w", err)
		}
	}
	// Confirmed by a majority, in which that one is not.
	if err := m.raft.VerifyLeader().Error(); err != nil || m.raft.CurrentTerm() != term {
		return Admission{}, errNotLeader()
	}
	return Admission{Term: term, Leader: string(m.address())}, nil
}

// addVoter returns once the node's vote is committed, or this manager leads no more.
func (m *Manager) addVoter(n spec.Node) error {
	m.add(n.ID)
	defer m.add("")
	if err := m.raft.AddVoter(raft.ServerID(n.ID), raftAddress(n), 0, proposeTimeout).Error(); err != nil {
		return fmt.Errorf("add manager %s at %s: %w", n.Name, raftAddress(n), err)
	}
	return nil
}
