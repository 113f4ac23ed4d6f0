package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/runtime/cgroup"
	"github.com/shoalnet/shoal/spec"
)

// leader is the ID of the managers' leader as far as this node knows.
func (m *member) leader() string {
	m.mu.Lock()
	mgr := m.manager
	m.mu.Unlock()
	if mgr == nil {
		return ""
	}
	id, _ := mgr.Leader()
	return id
}

// depart asks the managers to forget this node. The last manager has nobody to
// ask and takes the cluster with it.
func (m *member) depart(ctx context.Context, force bool) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	resp, err := m.client.ListNodes(ctx, connect.NewRequest(&shoalv1.ListNodesRequest{}))
	if err != nil {
		if force {
			return nil
		}
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("the managers can't be told: %w: run 'shoal leave --force' to leave all the same", err))
	}
	managers, others := 0, 0
	for _, n := range resp.Msg.Nodes {
		if n.Id != m.ident.NodeID {
			others++
			if n.Role == spec.RoleManager {
				managers++
			}
		}
	}
	if m.role() == spec.RoleManager && managers == 0 {
		if !force {
			if others == 0 {
				return precondition("this node is the last of its cluster: leaving ends the cluster with all its services and networks: run 'shoal leave --force' to do so")
			}
			return precondition("this node is the last manager: leaving ends the cluster for the %d other nodes, too: promote one first, or run 'shoal leave --force'", others)
		}
		return nil
	}
	_, err = m.client.LeaveNode(ctx, connect.NewRequest(&shoalv1.LeaveNodeRequest{Node: m.ident.NodeID}))
	return err
}

// clashes are names that the cluster has from before they were refused.
func (m *member) clashes(ctx context.Context) ([]string, error) {
	nodes, err := m.client.ListNodes(ctx, connect.NewRequest(&shoalv1.ListNodesRequest{}))
	if err != nil {
		return nil, err
	}
	nets, err := m.client.ListNetworks(ctx, connect.NewRequest(&shoalv1.ListNetworksRequest{}))
	if err != nil {
		return nil, err
	}
	svcs, err := m.client.ListServices(ctx, connect.NewRequest(&shoalv1.ListServicesRequest{}))
	if err != nil {
		return nil, err
	}
	tasks, err := m.client.ListTasks(ctx, connect.NewRequest(&shoalv1.ListTasksRequest{All: true}))
	if err != nil {
		return nil, err
	}
	a, err := toAssignment(&shoalv1.AssignmentsResponse{Nodes: nodes.Msg.Nodes, Networks: nets.Msg.Networks, Services: svcs.Msg.Services, Tasks: tasks.Msg.Tasks}, nil)
	if err != nil {
		return nil, err
	}
	return state.Clashes(a.Nodes, a.Networks, a.Services, a.Tasks), nil
}

// doctor reports the health of this node: what it can see for itself.
func (a *Agent) doctor(ctx context.Context) *shoalv1.DoctorResponse {
	resp := &shoalv1.DoctorResponse{}
	check := func(name, status, msg, hint string) {
		resp.Checks = append(resp.Checks, &shoalv1.DoctorResponse_Check{Name: name, Status: status, Message: msg, Hint: hint})
	}
	check("data path", "ok", fmt.Sprintf("%s: %s", a.cfg.VIP.Name(), a.cfg.VIPReason), "")
	// Without containers a node is one that runs programs of its own only, which is
	// nothing wrong.
	if ok, what := a.containers(ctx); ok {
		check("containers", "ok", what, "")
	} else {
		check("containers", "ok", "none: "+what, "")
	}
	if s := cgroup.Supported(); s.Version == 0 || len(s.Missing) > 0 {
		check("limits", "warn", "control groups: "+s.String(), "boot with the controllers (cgroup_enable=memory), or let the agent write to /sys/fs/cgroup")
	} else {
		check("limits", "ok", "control groups "+s.String(), "")
	}
	m := a.current()
	if m == nil {
		a.memberR.RLock()
		unfit := a.unfit
		a.memberR.RUnlock()
		var lost *lostIdentity
		var newer *newerIdentity
		if errors.As(unfit, &lost) || errors.As(unfit, &newer) {
			check("identity", "error", unfit.Error(), "")
		} else if unfit != nil {
			check("certificate", "error", unfit.Error(), "shoal leave --force, then shoal init or shoal join")
		} else if names := a.strays(ctx); len(names) > 0 {
			check("tasks", "error", straysMessage(names), straysHint)
		} else {
			check("cluster", "warn", "this node is in no cluster", "shoal init, or shoal join")
		}
		return resp
	}
	check("cluster", "ok", fmt.Sprintf("%s, as %s", m.ident.Cluster.ID, m.role()), "")

	for _, c := range m.certificateChecks(time.Now()) {
		check("certificate", c.status, c.message, c.hint)
	}
	info := &shoalv1.InfoResponse{}
	switch m.levels(info); {
	case int(info.ClusterLevel) > state.Level:
		check("version", "error", fmt.Sprintf("the cluster is at feature level %d, and this node's shoal has level %d", info.ClusterLevel, state.Level), "upgrade shoal on this node: what it does not understand is not done here")
	case len(info.Waiting) > 0:
		check("version", "warn", fmt.Sprintf("the cluster is at feature level %d, and at %d once all managers have it: %s", info.ClusterLevel, state.Level, strings.Join(info.Waiting, ", ")),
			"upgrade shoal there, or remove managers that don't come back")
	default:
		check("version", "ok", fmt.Sprintf("%s, feature level %d", a.cfg.Version, state.Level), "")
	}
	lctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var told []string // nodes that do not reach this one
	if nodes, err := m.client.ListNodes(lctx, connect.NewRequest(&shoalv1.ListNodesRequest{Refs: []string{m.ident.NodeID}})); err != nil {
		check("managers", "error", "no manager answers: "+err.Error(), "running tasks, VIPs and names go on; bring a majority of the managers back")
	} else {
		check("managers", "ok", "the leader answers", "")
		for _, n := range nodes.Msg.Nodes {
			told = append(told, n.Unreached...)
		}
	}
	if clashes, err := m.clashes(lctx); err == nil {
		for _, c := range clashes {
			check("names", "warn", c, "make it anew under another name")
		}
		if len(clashes) == 0 {
			check("names", "ok", "no two things have one name", "")
		}
	}
	faults := m.diskFaults()
	for _, f := range faults {
		check(f.name, "error", f.message, f.hint)
	}
	if len(faults) == 0 {
		check("disk", "ok", "what this node has to remember is kept in "+a.cfg.DataDir, "")
	}
	snap := m.g.Snapshot()
	var bad []string
	for _, p := range snap.Members {
		if p.Liveness != spec.PeerAlive {
			bad = append(bad, fmt.Sprintf("%s is %s", p.Name, p.Liveness))
		}
	}
	switch {
	case len(bad) > 0:
		check("gossip", "warn", strings.Join(bad, ", "), fmt.Sprintf("see whether they run, and reach them on port %d/tcp and /udp", m.ident.GossipPort))
	case !snap.Synced:
		check("gossip", "warn", "no other node has answered yet", "")
	default:
		check("gossip", "ok", fmt.Sprintf("%d nodes, %d endpoints", len(snap.Members), len(snap.Endpoints)), "")
	}
	m.doctorPaths(told, check)
	m.doctorClaims(check)
	loops := []struct {
		name   string
		status []reconcile.ObjectStatus
		last   reconcile.Pass
	}{{"overlay", m.overlay.Status(), m.overlay.Last()}, {"vip", m.vip.Status(), m.vip.Last()}, {"ingress", m.ingress.Status(), m.ingress.Last()}}
	for _, l := range loops {
		failed := 0
		for _, o := range l.status {
			if o.Phase == reconcile.Failed {
				failed++
			}
			resp.Objects = append(resp.Objects, &shoalv1.DoctorResponse_Object{Reconciler: l.name, Object: o.Object, Phase: string(o.Phase),
				Op: o.Op, SinceMs: o.Since.UnixMilli(), Error: o.Err, Tries: int32(o.Tries)})
		}
		if failed > 0 {
			check(l.name, "error", fmt.Sprintf("%d objects can't be set up: see below", failed), "")
		} else {
			check(l.name, "ok", fmt.Sprintf("as wanted; last pass took %s", l.last.Elapsed.Round(time.Microsecond)), "")
		}
	}
	if a.cfg.Drops != nil {
		if drops, err := a.cfg.Drops(ctx); err != nil {
			check("drops", "warn", "the rules' counters can't be read: "+err.Error(), "")
		} else {
			check("drops", "ok", dropsText(drops), "")
		}
	}
	for _, r := range m.overlay.Remarks() {
		check("kernel", "error", r, "")
	}
	if faults := a.cfg.Runtime.Faults(); len(faults) > 0 {
		for _, name := range slices.Sorted(maps.Keys(faults)) {
			check("tasks", "error", "task "+name+": "+faults[name], "")
		}
	} else {
		check("tasks", "ok", "those that run here have all that is theirs", "")
	}
	if a.cfg.Blocked != nil {
		texts, err := a.cfg.Blocked(ctx)
		if err != nil {
			check("firewall", "warn", "the host's firewall can't be read: "+err.Error(), "")
		}
		for _, t := range texts {
			check("firewall", "warn", t, "")
		}
		if err == nil && len(texts) == 0 {
			check("firewall", "ok", "no table of the host seems to be in the way", "")
		}
	}
	return resp
}

// dropsText lists how many packets were dropped, by reason.
func dropsText(drops []overlay.Drop) string {
	by := map[string]uint64{}
	for _, d := range drops {
		if d.Packets > 0 {
			by[d.Reason] += d.Packets
		}
	}
	if len(by) == 0 {
		return "no packet was against the rules"
	}
	var out []string
	for _, why := range slices.Sorted(maps.Keys(by)) {
		out = append(out, fmt.Sprintf("%s %d", why, by[why]))
	}
	return "packets against the rules: " + strings.Join(out, ", ")
}
