package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/spec"
)

// leaderless is how long a cluster that is to be made anew is looked at for a
// leader: one that has just died is known for a moment longer.
const leaderless = 5 * time.Second

// recoverCluster makes this manager's cluster anew, without the other managers.
// Tasks and network go on meanwhile. a.mu is held.
func (a *localAPI) recoverCluster(ctx context.Context) (*shoalv1.InitResponse, error) {
	m := a.current()
	if m == nil {
		if a.ident.Cluster.ID == "" {
			return nil, precondition("this node is in no cluster: there is none to make anew; 'shoal snapshot restore' makes one from a snapshot, 'shoal init' a new one")
		}
		return nil, a.noMember()
	}
	if m.role() != spec.RoleManager {
		return nil, precondition("this node is a worker and has not the cluster's state: run it on a manager that is left; if none is, 'shoal snapshot restore' on a node that left makes the cluster from a snapshot")
	}
	if err := m.awaitNoLeader(ctx); err != nil {
		return nil, err
	}
	var r control.Recovered
	if err := m.remake(ctx, func(cfg control.ManagerConfig) (err error) {
		r, err = control.Recover(cfg)
		return err
	}); err != nil {
		return nil, err
	}
	resp := &shoalv1.InitResponse{Cluster: m.ident.Cluster.ID, Node: api.Node(m.node(spec.RoleManager)), Index: r.Index}
	for _, n := range r.Lost {
		a.log.Warn("the cluster was made anew without a manager", "lost", n.Name, "id", n.ID)
		resp.Lost = append(resp.Lost, api.Node(n))
	}
	return resp, nil
}

// awaitNoLeader makes sure that the managers have no leader: one that has, needs
// no recovery.
func (m *member) awaitNoLeader(ctx context.Context) error {
	for end := time.Now().Add(leaderless); ; {
		mgr := m.fsm.Load()
		if mgr == nil {
			// It can't work: what is on its disk decides, and others may well lead.
			if id := m.leader(); id == "" {
				return nil
			}
		} else if id, _ := mgr.Leader(); id == "" {
			return nil
		}
		if time.Now().After(end) {
			return precondition("the managers have a leader (%s): nothing has to be made anew; managers that are lost are removed with 'shoal node rm --force'", m.nodeName(m.leader()))
		}
		if !sleep(ctx, 50*time.Millisecond) {
			return ctx.Err()
		}
	}
}

// nodeName is the name of a node as this one knows it, or its ID.
func (m *member) nodeName(id string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.assigned != nil {
		for _, n := range m.assigned.Nodes {
			if n.ID == id {
				return n.Name
			}
		}
	}
	return id
}

// remake stops this node's manager, has its store replaced, and starts it again. It
// returns once the manager leads, as the only one.
func (m *member) remake(ctx context.Context, replace func(control.ManagerConfig) error) error {
	m.mu.Lock()
	m.remaking = true
	mgr, stop, done := m.manager, m.stopMgr, m.mgrDone
	m.manager = nil
	m.mu.Unlock()
	if mgr != nil {
		m.fwd.SetManager(nil)
		m.fsm.Store(nil)
		stop()
		<-done
	}
	m.mu.Lock()
	cfg, err := m.managerConfig(false)
	if err == nil {
		err = replace(cfg)
	}
	m.remaking = false
	m.mu.Unlock()
	if err != nil {
		m.keepManager()
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("the cluster can't be made anew from this node: %w", err))
	}
	m.keepManager()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), managerWait)
	defer cancel()
	for {
		if mgr := m.fsm.Load(); mgr != nil && mgr.IsLeader() {
			wake(m.reportWake)
			return nil
		}
		if !sleep(ctx, 20*time.Millisecond) {
			return connect.NewError(connect.CodeUnavailable, fmt.Errorf("the cluster is made anew, but this node does not lead it after %s: see the agent's log", managerWait))
		}
	}
}

var errRemaking = errors.New("this node's part of the managers is being made anew")
