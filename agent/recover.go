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
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/peer"
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

// RestoreSnapshot makes the cluster of a snapshot, with this node as its manager.
func (a *localAPI) RestoreSnapshot(ctx context.Context, req *connect.Request[shoalv1.RestoreSnapshotRequest]) (*connect.Response[shoalv1.InitResponse], error) {
	info, st, err := control.ReadSnapshot(req.Msg.Snapshot)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := a.enter(ctx); err != nil {
		return nil, err
	}
	defer a.mu.Unlock()
	var resp *shoalv1.InitResponse
	if a.ident.Cluster.ID != "" {
		resp, err = a.restoreHere(ctx, req.Msg, info, st)
	} else {
		resp, err = a.restoreNew(req.Msg.AdvertiseAddr, st)
	}
	if err != nil {
		return nil, err
	}
	for _, n := range resp.Lost {
		a.log.Warn("the cluster was made from a snapshot without a manager", "lost", n.Name, "id", n.Id)
	}
	return connect.NewResponse(resp), nil
}

// restoreHere replaces the state of the cluster that this node is the only manager
// of. a.mu is held.
func (a *localAPI) restoreHere(ctx context.Context, req *shoalv1.RestoreSnapshotRequest, info control.SnapshotInfo, st *state.State) (*shoalv1.InitResponse, error) {
	m := a.current()
	switch {
	case m == nil:
		return nil, a.noMember()
	case info.Cluster != m.ident.Cluster.ID:
		return nil, precondition("the snapshot is of cluster %s, and this node is in cluster %s: restore it on a node that is in none ('shoal leave')", info.Cluster, m.ident.Cluster.ID)
	case m.role() != spec.RoleManager:
		return nil, precondition("this node is a worker of the cluster: restore the snapshot on a manager that is left, or on a node that is in no cluster")
	case req.AdvertiseAddr != "":
		return nil, invalid("this node is in the cluster already, at %s: another address can't be given", m.ident.Addr)
	case !req.Force:
		return nil, precondition("this node is in the cluster already: with --force what was changed since %s, when the snapshot was saved, is given up", info.Saved.UTC().Format(time.RFC3339))
	}
	if mgr := m.fsm.Load(); mgr == nil || !mgr.Alone() {
		if err := m.awaitNoLeader(ctx); err != nil {
			return nil, err
		}
	}
	var r control.Recovered
	if err := m.remake(ctx, func(cfg control.ManagerConfig) (err error) {
		cfg.Node.PublicKey = m.creds.PublicKey()
		r, _, err = control.Restore(cfg, st)
		return err
	}); err != nil {
		return nil, err
	}
	return a.restored(m, r, st), nil
}

func (a *localAPI) restored(m *member, r control.Recovered, st *state.State) *shoalv1.InitResponse {
	tr := st.Trust()
	resp := &shoalv1.InitResponse{Cluster: m.ident.Cluster.ID, Node: api.Node(m.node(spec.RoleManager)), Index: r.Index,
		WorkerToken: control.Tokens(tr, spec.RoleWorker).String(), ManagerToken: control.Tokens(tr, spec.RoleManager).String(), UnlockKey: tr.Unlock}
	for _, n := range r.Lost {
		resp.Lost = append(resp.Lost, api.Node(n))
	}
	return resp
}

// restoreNew makes the cluster of a snapshot of a node that is in none. a.mu is held.
func (a *localAPI) restoreNew(advertise string, st *state.State) (*shoalv1.InitResponse, error) {
	cluster, _ := st.Cluster()
	tr := st.Trust()
	root, err := control.Signer(tr)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("the snapshot: %w", err))
	}
	ident, err := a.newIdentity(advertise, spec.RoleManager)
	if err != nil {
		return nil, err
	}
	ident.Cluster, ident.CA = cluster, root.Digest()
	if err := a.checkPorts(ident); err != nil {
		return nil, err
	}
	creds, err := peer.NewCredentials()
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	m, err := a.newMember(ident, creds)
	if err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	var r control.Recovered
	err = func() error {
		if tr.Unlock != "" {
			if err := m.takeLock(&shoalv1.Lock{Key: tr.Unlock, Generation: tr.UnlockGeneration}); err != nil {
				return err
			}
		}
		m.mu.Lock()
		cfg, err := m.managerConfig(false)
		m.mu.Unlock()
		if err != nil {
			return err
		}
		now := time.Now()
		cfg.Node.PublicKey, cfg.Node.Created = creds.PublicKey(), now.UnixMilli()
		cfg.Node.CertEnd, cfg.Node.CertRoot = now.Add(peer.CertificateLife).UnixMilli(), root.Digest()
		var n spec.Node
		if r, n, err = control.Restore(cfg, st); err != nil {
			return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("the cluster can't be made from the snapshot: %w", err))
		}
		ident.Number = n.Number
		// Newer than every node list of before.
		if err := certify(creds, root, ident, st.Index()); err != nil {
			return err
		}
		m.assigned = &assignment{Trust: toTrust(control.TrustInfo(tr))}
		if err := errors.Join(creds.Save(peer.Path(a.cfg.DataDir)), ident.save(a.cfg.DataDir)); err != nil {
			return err
		}
		m.serve(a.handler(false))
		mgr, err := m.startManager(false)
		if err != nil {
			return err
		}
		for end := time.Now().Add(managerWait); !mgr.IsLeader(); {
			if time.Now().After(end) || !sleep.For(m.ctx, 20*time.Millisecond) {
				return connect.NewError(connect.CodeUnavailable, fmt.Errorf("this node does not lead the cluster of the snapshot after %s: see the agent's log", managerWait))
			}
		}
		return m.start()
	}()
	if err != nil {
		a.abandon(m)
		return nil, err
	}
	a.setIdentity(ident)
	a.setMember(m)
	return a.restored(m, r, st), nil
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
		if !sleep.For(ctx, 50*time.Millisecond) {
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
		if !sleep.For(ctx, 20*time.Millisecond) {
			return connect.NewError(connect.CodeUnavailable, fmt.Errorf("the cluster is made anew, but this node does not lead it after %s: see the agent's log", managerWait))
		}
	}
}

var errRemaking = errors.New("this node's part of the managers is being made anew")
