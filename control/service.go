package control

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/raft"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

// service is the Control service on the leader.
type service struct{ m *Manager }

func invalid(err error) error { return connect.NewError(connect.CodeInvalidArgument, err) }

// read answers from the state once leadership is sure.
func (s *service) read(fn func(*state.State) error) error {
	if err := s.m.verify(); err != nil {
		return err
	}
	var err error
	s.m.fsm.read(func(st *state.State) { err = fn(st) })
	if err != nil {
		return rpcError(err)
	}
	return nil
}

func (s *service) CreateNetwork(ctx context.Context, req *connect.Request[shoalv1.CreateNetworkRequest]) (*connect.Response[shoalv1.CreateNetworkResponse], error) {
	r := req.Msg
	n := spec.Network{ID: requestID(r.Id, req.Header()), Name: r.Name, Driver: r.Driver, Labels: r.Labels, MTU: int(r.Mtu), Internal: r.Internal, Options: r.Options, Node: r.Node, Created: time.Now().UnixMilli()}
	var err error
	if n.Subnets, err = api.Prefixes("subnet", r.Subnets); err != nil {
		return nil, invalid(err)
	}
	if n.Gateways, err = api.Addrs("gateway", r.Gateways); err != nil {
		return nil, invalid(err)
	}
	if n.IPRanges, err = api.Prefixes("ip range", r.IpRanges); err != nil {
		return nil, invalid(err)
	}
	res, err := s.m.Propose(ctx, state.Command{CreateNetwork: &state.CreateNetwork{Network: n, HostRoutes: s.m.cfg.HostRoutes()}})
	if err := s.unlessMade(err, func(st *state.State) bool {
		v, err := st.Network(n.ID)
		res.Network = &v
		return err == nil && v.ID == n.ID && v.Name == n.Name
	}); err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.CreateNetworkResponse{Network: api.Network(*res.Network)}), nil
}

// unlessMade is the error of a creation, unless an earlier try of the same call has
// made what it asks for: its answer was lost, or the leader with it.
func (s *service) unlessMade(err error, made func(*state.State) bool) error {
	if !errors.Is(err, state.ErrExists) {
		return err
	}
	was := false
	s.m.fsm.read(func(st *state.State) { was = made(st) })
	if was {
		return nil
	}
	return err
}

// pick lists all objects, or those that refs name.
func pick[T any](refs []string, all func() []T, one func(string) (T, error)) ([]T, error) {
	if len(refs) == 0 {
		return all(), nil
	}
	var out []T
	for _, ref := range refs {
		v, err := one(ref)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

func (s *service) ListNetworks(_ context.Context, req *connect.Request[shoalv1.ListNetworksRequest]) (*connect.Response[shoalv1.ListNetworksResponse], error) {
	resp := &shoalv1.ListNetworksResponse{}
	err := s.read(func(st *state.State) error {
		ns, err := pick(req.Msg.Refs, st.Networks, st.Network)
		for _, n := range ns {
			resp.Networks = append(resp.Networks, api.Network(n))
		}
		return err
	})
	return connect.NewResponse(resp), err
}

func (s *service) RemoveNetwork(ctx context.Context, req *connect.Request[shoalv1.RemoveNetworkRequest]) (*connect.Response[shoalv1.RemoveNetworkResponse], error) {
	_, err := s.proposeWhenFree(ctx, state.Command{RemoveNetwork: &state.RemoveNetwork{Ref: req.Msg.Ref}})
	return connect.NewResponse(&shoalv1.RemoveNetworkResponse{}), err
}

func (s *service) ConnectNetwork(ctx context.Context, req *connect.Request[shoalv1.ConnectNetworkRequest]) (*connect.Response[shoalv1.ConnectNetworkResponse], error) {
	addrs, err := api.Addrs("address", req.Msg.Addrs)
	if err != nil {
		return nil, invalid(err)
	}
	res, err := s.m.Propose(ctx, state.Command{ConnectNetwork: &state.ConnectNetwork{Network: req.Msg.Network, Target: req.Msg.Target, Aliases: req.Msg.Aliases, Addrs: addrs}})
	if err != nil {
		return nil, err
	}
	task, svc := rewired(res)
	return connect.NewResponse(&shoalv1.ConnectNetworkResponse{Task: task, Service: svc}), nil
}

func (s *service) DisconnectNetwork(ctx context.Context, req *connect.Request[shoalv1.DisconnectNetworkRequest]) (*connect.Response[shoalv1.DisconnectNetworkResponse], error) {
	res, err := s.m.Propose(ctx, state.Command{DisconnectNetwork: &state.DisconnectNetwork{Network: req.Msg.Network, Target: req.Msg.Target}})
	if err != nil {
		return nil, err
	}
	task, svc := rewired(res)
	return connect.NewResponse(&shoalv1.DisconnectNetworkResponse{Task: task, Service: svc}), nil
}

// rewired is what a connect or disconnect was done to.
func rewired(r state.Result) (task *shoalv1.Task, svc *shoalv1.Service) {
	if r.Task != nil {
		task = api.Task(*r.Task)
	}
	if r.Service != nil {
		svc = api.Service(*r.Service, 0)
	}
	return task, svc
}

// nameTimeout bounds the wait for a name whose last owner is on its way out: it
// drains for 2 s and has 10 s to end, by default.
const nameTimeout = 20 * time.Second

// proposeWhenFree proposes again while what is asked for is still in the hands
// of something that is being removed: "svc rm web; svc create --name web" is
// what people type.
func (s *service) proposeWhenFree(ctx context.Context, cmd state.Command) (state.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, nameTimeout)
	defer cancel()
	for {
		changed := s.m.fsm.next()
		res, err := s.m.Propose(ctx, cmd)
		if !errors.Is(err, state.ErrEnding) {
			return res, err
		}
		select {
		case <-ctx.Done():
			return res, err
		case <-changed:
		}
	}
}

func (s *service) CreateService(ctx context.Context, req *connect.Request[shoalv1.CreateServiceRequest]) (*connect.Response[shoalv1.CreateServiceResponse], error) {
	sp, err := api.ToServiceSpec(req.Msg.Spec)
	if err != nil {
		return nil, invalid(err)
	}
	if sp.EndpointMode == "" {
		sp.EndpointMode = spec.EndpointModeVIP
	}
	id := requestID(req.Msg.Id, req.Header())
	res, err := s.proposeWhenFree(ctx, state.Command{CreateService: &state.CreateService{ID: id, Spec: sp, Created: time.Now().UnixMilli()}})
	if err := s.unlessMade(err, func(st *state.State) bool {
		v, err := st.Service(id)
		res.Service = &v
		return err == nil && v.ID == id && v.Spec.Name == sp.Name
	}); err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.CreateServiceResponse{Service: api.Service(*res.Service, 0)}), nil
}

func (s *service) UpdateService(ctx context.Context, req *connect.Request[shoalv1.UpdateServiceRequest]) (*connect.Response[shoalv1.UpdateServiceResponse], error) {
	cmd := &state.UpdateService{Ref: req.Msg.Ref, Version: req.Msg.Version}
	if req.Msg.Spec != nil {
		sp, err := api.ToServiceSpec(req.Msg.Spec)
		if err != nil {
			return nil, invalid(err)
		}
		cmd.Spec = &sp
	}
	if req.Msg.Replicas != nil {
		n := int(*req.Msg.Replicas)
		cmd.Replicas = &n
	}
	if cmd.Rollback = req.Msg.Rollback; cmd.Rollback && (cmd.Spec != nil || cmd.Replicas != nil) {
		return nil, invalid(errors.New("rollback of a service: a spec or replicas are given, too"))
	}
	if cmd.Rebalance = req.Msg.Rebalance; cmd.Rebalance && (cmd.Spec != nil || cmd.Replicas != nil || cmd.Rollback) {
		return nil, invalid(errors.New("rebalancing a service: a change of it is given, too"))
	}
	if cmd.Spec == nil && cmd.Replicas == nil && !cmd.Rollback && !cmd.Rebalance {
		return nil, invalid(errors.New("update of a service: neither a spec nor replicas are given"))
	}
	if s.m.level() >= 2 { // managers of before don't know the field
		cmd.Now = time.Now().UnixMilli()
	}
	res, err := s.m.Propose(ctx, state.Command{UpdateService: cmd})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.UpdateServiceResponse{Service: api.Service(*res.Service, 0)}), nil
}

func (s *service) ListServices(ctx context.Context, req *connect.Request[shoalv1.ListServicesRequest]) (*connect.Response[shoalv1.ListServicesResponse], error) {
	if err := s.m.awaitReports(ctx); err != nil {
		return nil, err
	}
	resp := &shoalv1.ListServicesResponse{}
	err := s.read(func(st *state.State) error {
		ss, err := pick(req.Msg.Refs, st.Services, st.Service)
		faults := s.m.faultsByObject(st)
		for _, v := range ss {
			resp.Services = append(resp.Services, s.serviceInfo(st, v, faults))
		}
		return err
	})
	return connect.NewResponse(resp), err
}

// serviceInfo is a service with how far it is.
func (s *service) serviceInfo(st *state.State, v spec.Service, faults map[string][]*shoalv1.NodeFault) *shoalv1.Service {
	w := api.Service(v, st.Running(v.ID))
	w.Desired = int32(st.Desired(v.ID))
	done, total := st.Completed(v.ID)
	w.Completed, w.ToComplete = int32(done), int32(total)
	w.Stale, w.Behind, w.Faults = int32(st.Stale(v.ID)), s.m.behind(st, v.Version), faults[v.ID]
	return w
}

func (s *service) RemoveService(ctx context.Context, req *connect.Request[shoalv1.RemoveServiceRequest]) (*connect.Response[shoalv1.RemoveServiceResponse], error) {
	_, err := s.m.Propose(ctx, state.Command{RemoveService: &state.RemoveService{Ref: req.Msg.Ref}})
	return connect.NewResponse(&shoalv1.RemoveServiceResponse{}), err
}

func (s *service) CreateTask(ctx context.Context, req *connect.Request[shoalv1.CreateTaskRequest]) (*connect.Response[shoalv1.CreateTaskResponse], error) {
	nets, err := api.ToNetworkAttachments(req.Msg.Networks)
	if err != nil {
		return nil, invalid(err)
	}
	ts, err := api.ToTaskSpec(req.Msg.Spec)
	if err != nil {
		return nil, invalid(err)
	}
	ports, err := api.ToPorts(req.Msg.Ports)
	if err != nil {
		return nil, invalid(err)
	}
	id := requestID(req.Msg.Id, req.Header())
	name := req.Msg.Name
	if name == "" {
		name = "task-" + id[:6]
	}
	res, err := s.m.Propose(ctx, state.Command{CreateTask: &state.CreateTask{
		ID: id, Name: name, Node: req.Msg.Node, Spec: ts, Networks: nets, Ports: ports, Created: time.Now().UnixMilli()}})
	if err := s.unlessMade(err, func(st *state.State) bool {
		v, err := st.Task(id)
		res.Task = &v
		return err == nil && v.ID == id && v.Name == name
	}); err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.CreateTaskResponse{Task: api.Task(*res.Task)}), nil
}

func (s *service) ListTasks(ctx context.Context, req *connect.Request[shoalv1.ListTasksRequest]) (*connect.Response[shoalv1.ListTasksResponse], error) {
	if err := s.m.awaitReports(ctx); err != nil {
		return nil, err
	}
	resp := &shoalv1.ListTasksResponse{}
	r := req.Msg
	err := s.read(func(st *state.State) error {
		f := state.TaskFilter{All: r.All}
		if r.Service != "" {
			v, err := st.Service(r.Service)
			if err != nil {
				return err
			}
			f.Service = v.ID
		}
		if r.Node != "" {
			v, err := st.Node(r.Node)
			if err != nil {
				return err
			}
			f.Node = v.ID
		}
		ts, err := pick(r.Refs, func() []spec.Task { return st.Tasks(f) }, st.Task)
		faults := s.m.faultsByObject(st)
		for _, t := range ts {
			resp.Tasks = append(resp.Tasks, taskInfo(t, faults))
		}
		return err
	})
	return connect.NewResponse(resp), err
}

func taskInfo(t spec.Task, faults map[string][]*shoalv1.NodeFault) *shoalv1.Task {
	w := api.Task(t)
	w.Faults = faults[t.ID]
	return w
}

func (s *service) StopTask(ctx context.Context, req *connect.Request[shoalv1.StopTaskRequest]) (*connect.Response[shoalv1.StopTaskResponse], error) {
	_, err := s.m.Propose(ctx, state.Command{StopTask: &state.StopTask{Ref: req.Msg.Ref, Remove: req.Msg.Remove, Stopping: api.ToStopping(req.Msg.Stopping)}})
	return connect.NewResponse(&shoalv1.StopTaskResponse{}), err
}

func (s *service) StartTask(ctx context.Context, req *connect.Request[shoalv1.StartTaskRequest]) (*connect.Response[shoalv1.StartTaskResponse], error) {
	r := req.Msg
	res, err := s.m.Propose(ctx, state.Command{StartTask: &state.StartTask{Ref: r.Ref, Run: int(r.Run), Restart: r.Restart, Attach: r.Attach,
		Stopping: api.ToStopping(r.Stopping), Now: time.Now().UnixMilli()}})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.StartTaskResponse{Task: api.Task(*res.Task)}), nil
}

func (s *service) RenameTask(ctx context.Context, req *connect.Request[shoalv1.RenameTaskRequest]) (*connect.Response[shoalv1.RenameTaskResponse], error) {
	res, err := s.m.Propose(ctx, state.Command{RenameTask: &state.RenameTask{Ref: req.Msg.Ref, Name: req.Msg.Name}})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.RenameTaskResponse{Task: api.Task(*res.Task)}), nil
}

func (s *service) ListNodes(_ context.Context, req *connect.Request[shoalv1.ListNodesRequest]) (*connect.Response[shoalv1.ListNodesResponse], error) {
	resp := &shoalv1.ListNodesResponse{}
	err := s.read(func(st *state.State) error {
		ns, err := pick(req.Msg.Refs, st.Nodes, st.Node)
		dark, port := s.m.darkPaths(st), 0
		if c, ok := st.Cluster(); ok {
			port = c.DataPathPort
		}
		for _, n := range ns {
			info := s.nodeInfo(n)
			if d := dark[n.ID]; len(d) > 0 {
				info.Unreached = d
				info.Message = strings.TrimPrefix(info.Message+"; "+unreachedText(d, port), "; ")
			}
			resp.Nodes = append(resp.Nodes, info)
		}
		return err
	})
	return connect.NewResponse(resp), err
}

func (s *service) nodeInfo(n spec.Node) *shoalv1.NodeInfo {
	info := api.Node(n)
	info.Leader = n.ID == s.m.cfg.Node.ID // only the leader answers
	info.Voter = n.Role == spec.RoleManager && s.m.Counted(n.ID)
	return info
}

func (s *service) UpdateNode(ctx context.Context, req *connect.Request[shoalv1.UpdateNodeRequest]) (*connect.Response[shoalv1.UpdateNodeResponse], error) {
	r := req.Msg
	if r.Role != nil && *r.Role == spec.RoleWorker {
		if err := s.read(func(st *state.State) error { return lastManager(st, r.Ref, "made a worker") }); err != nil {
			return nil, err
		}
		if err := s.retire(r.Ref); err != nil {
			return nil, err
		}
	}
	res, err := s.m.Propose(ctx, state.Command{UpdateNode: &state.UpdateNode{Ref: r.Ref, Name: r.Name, Role: r.Role, Availability: r.Availability, SetLabels: r.SetLabels, RemoveLabels: r.RemoveLabels}})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.UpdateNodeResponse{Node: s.nodeInfo(*res.Node)}), nil
}

// retire takes a manager that is to be a worker out of raft. It comes first: the node
// stops its raft as soon as it hears of its new role, and a majority must not count
// on it then. The leader hands over, and the next one does it.
func (s *service) retire(ref string) error {
	var n spec.Node
	if err := s.read(func(st *state.State) (err error) { n, err = st.Node(ref); return err }); err != nil {
		return err
	}
	if n.Role != spec.RoleManager {
		return nil
	}
	if n.ID == s.m.cfg.Node.ID {
		if err := s.m.raft.LeadershipTransfer().Error(); err != nil {
			return connect.NewError(connect.CodeUnavailable, fmt.Errorf("node %s leads the managers, and no other can take over now: %w", n.Name, err))
		}
		return errNotLeader()
	}
	s.m.managing(n.ID, false) // not to be added again meanwhile
	if err := s.m.raft.RemoveServer(raft.ServerID(n.ID), 0, proposeTimeout).Error(); err != nil {
		return connect.NewError(connect.CodeUnavailable, fmt.Errorf("take node %s out of the managers: %w", n.Name, err))
	}
	return nil
}

// errLastManager refuses what would leave nobody to decide anything.
type errLastManager struct{ error }

// Is makes it an ErrInUse.
func (errLastManager) Is(target error) bool { return target == state.ErrInUse }

func lastManager(st *state.State, ref, what string) error {
	n, err := st.Node(ref)
	if err != nil {
		return err
	}
	ready := 0
	for _, o := range st.Nodes() {
		if o.ID != n.ID && o.Role == spec.RoleManager && o.Status != spec.NodeDown {
			ready++
		}
	}
	if n.Role == spec.RoleManager && ready == 0 {
		return errLastManager{fmt.Errorf("node %s is the last manager that works and can't be %s: make another one a manager first, with 'shoal node update --role manager NODE'", n.Name, what)}
	}
	return nil
}

func (s *service) RemoveNode(ctx context.Context, req *connect.Request[shoalv1.RemoveNodeRequest]) (*connect.Response[shoalv1.RemoveNodeResponse], error) {
	var n spec.Node
	err := s.read(func(st *state.State) (err error) {
		if n, err = st.Node(req.Msg.Ref); err != nil {
			return err
		}
		return lastManager(st, n.ID, "removed")
	})
	if err != nil {
		return nil, err
	}
	// The state first: it can refuse. Raft's voters follow at once, or by
	// keepVoters if this manager ends in between.
	if _, err := s.m.Propose(ctx, state.Command{RemoveNode: &state.RemoveNode{Ref: n.ID, Force: req.Msg.Force}}); err != nil {
		return nil, err
	}
	if n.Role == spec.RoleManager {
		if err := s.m.raft.RemoveServer(raft.ServerID(n.ID), 0, proposeTimeout).Error(); err != nil {
			s.m.log.Warn("a removed manager is still a voter; trying again", "node", n.Name, "error", err)
		}
	}
	return connect.NewResponse(&shoalv1.RemoveNodeResponse{}), nil
}

// AdmitManager lets a manager that has no store, or has lost it, begin anew.
func (s *service) AdmitManager(_ context.Context, req *connect.Request[shoalv1.AdmitManagerRequest]) (*connect.Response[shoalv1.AdmitManagerResponse], error) {
	err := s.read(func(st *state.State) error {
		ns := st.Nodes()
		i := slices.IndexFunc(ns, func(n spec.Node) bool { return n.ID == req.Msg.Node })
		if i < 0 {
			return &state.NotFoundError{Kind: "node", Ref: req.Msg.Node}
		}
		if ns[i].Role != spec.RoleManager {
			return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("node %s is no manager", ns[i].Name))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	a, err := s.m.readmit(req.Msg.Node)
	if err != nil {
		var ce *connect.Error
		if errors.As(err, &ce) {
			return nil, err
		}
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	return connect.NewResponse(&shoalv1.AdmitManagerResponse{Term: a.Term, Leader: a.Leader}), nil
}

func clusterInfo(c state.Cluster) *shoalv1.Cluster {
	out := &shoalv1.Cluster{Id: c.ID, SubnetSize: int32(c.SubnetSize), DataPathPort: int32(c.DataPathPort)}
	for _, p := range c.Pools {
		out.AddressPools = append(out.AddressPools, p.String())
	}
	return out
}

// Assignments streams a node's assignment while this manager leads.
func (s *service) Assignments(ctx context.Context, req *connect.Request[shoalv1.AssignmentsRequest], stream *connect.ServerStream[shoalv1.AssignmentsResponse]) error {
	term, err := s.m.sureTerm()
	if err != nil {
		return err
	}
	alive := time.NewTicker(s.m.cfg.Tuning.Alive)
	defer alive.Stop()
	var sent uint64              // index of the last message
	var networks map[string]bool // that it had
	for first := true; ; first = false {
		changed := s.m.fsm.next()
		var a state.Delta
		var index uint64
		var err error
		s.m.fsm.read(func(st *state.State) {
			// Nothing of this node's has changed: most changes are others'.
			if index = st.AssignmentIndex(req.Msg.Node); first || index != sent {
				since := sent
				if !req.Msg.Deltas {
					since = 0
				}
				a, err = st.AssignmentSince(req.Msg.Node, since, networks)
			}
		})
		if err != nil {
			return rpcError(err)
		}
		if first || index != sent {
			if err := stream.Send(assignment(a)); err != nil {
				return err
			}
			sent, networks = index, make(map[string]bool, len(a.Networks))
			for _, n := range a.Networks {
				networks[n.ID] = true
			}
		}
	wait:
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-term.Done():
				return errNotLeader()
			case <-changed:
				break wait
			case <-alive.C:
				if err := stream.Send(&shoalv1.AssignmentsResponse{Index: sent, Unchanged: true}); err != nil {
					return err
				}
			}
		}
	}
}

func assignment(a state.Delta) *shoalv1.AssignmentsResponse {
	out := &shoalv1.AssignmentsResponse{Index: a.Index, Since: a.Since, Gone: a.Gone, Cluster: clusterInfo(a.Cluster)}
	for _, t := range a.Tasks {
		out.Tasks = append(out.Tasks, api.Task(t))
	}
	for _, n := range a.Networks {
		out.Networks = append(out.Networks, api.Network(n))
	}
	for _, v := range a.Services {
		out.Services = append(out.Services, api.Service(v, 0))
	}
	for _, n := range a.Nodes {
		out.Nodes = append(out.Nodes, api.Node(n))
	}
	out.Trust, out.Level = TrustInfo(a.Trust), int32(a.Level)
	return out
}

// Bounds of what a node may have the leader keep of what it says it can't do.
const (
	maxFaults = 1000
	maxFault  = 2 << 10 // bytes of one
)

func bounded(fs []*shoalv1.ReportRequest_Fault) []*shoalv1.ReportRequest_Fault {
	fs = fs[:min(len(fs), maxFaults)]
	for _, f := range fs {
		f.Object = f.Object[:min(len(f.Object), maxFault)]
		f.Message = clip(f.Message, maxFault)
	}
	return fs
}

// Report takes a node's sign of life and its tasks' statuses.
func (s *service) Report(ctx context.Context, req *connect.Request[shoalv1.ReportRequest]) (*connect.Response[shoalv1.ReportResponse], error) {
	r := req.Msg
	if !s.m.IsLeader() {
		return nil, errNotLeader()
	}
	var known spec.Node
	var err error
	s.m.fsm.read(func(st *state.State) {
		ns := st.Nodes()
		if i := slices.IndexFunc(ns, func(n spec.Node) bool { return n.ID == r.Node }); i >= 0 {
			known = ns[i]
		} else {
			err = &state.NotFoundError{Kind: "node", Ref: r.Node}
		}
	})
	if err != nil {
		// A deposed leader may not know of a node that joined since.
		if verr := s.m.verify(); verr != nil {
			return nil, verr
		}
		return nil, rpcError(err)
	}
	bound(r)
	s.m.seen(r.Node)
	s.m.halts(r.Node, r.Halting)
	s.m.follows(r.Node, r.Applied)
	s.m.failing(r.Node, bounded(r.Faults))
	s.m.managing(r.Node, r.ManagerReady)
	s.m.showing(r.Node, r.CertificateRoot)
	s.m.runs(r.Node, int(r.Level))
	s.m.sees(r.Node, gossipSeen{newest: r.GossipKey, used: r.GossipKeyUsed})
	s.m.darkens(r.Node, r.DarkPeers)
	now := known
	if r.Addr != "" {
		if now.Addr, err = netip.ParseAddr(r.Addr); err != nil {
			return nil, invalid(fmt.Errorf("address of node %s: %q is not an IP address", known.Name, r.Addr))
		}
		now.ControlPort, now.GossipPort, now.DataPath = int(r.ControlPort), int(r.GossipPort), r.DataPath
		now.Platform, now.Containers, now.ContainersWhy = r.Platform, r.Containers, r.ContainersWhy
		now = s.m.withLevel(now, r.Level, r.Build)
		now = s.m.withCapacity(now, r.NanoCpus, r.Memory, r.EngineLabels)
	}
	if known.Status != spec.NodeReady && !r.Wiring && !r.Halting || !now.SameOfItself(known) {
		if err := s.m.spend(ctx, r.Node); err != nil {
			return nil, err
		}
		if _, err := s.m.Propose(ctx, state.Command{UpsertNode: &state.UpsertNode{Node: now}}); err != nil {
			return nil, err
		}
	}
	if len(r.Tasks) > 0 {
		cmd := &state.ReportTasks{Node: r.Node, Now: time.Now().UnixMilli(), Tasks: map[string]spec.TaskStatus{}}
		for id, t := range r.Tasks {
			st, err := api.ToTaskStatus(t)
			if err != nil {
				return nil, invalid(fmt.Errorf("task %s: %w", id, err))
			}
			cmd.Tasks[id] = st
		}
		if s.m.ownTasks(cmd); len(cmd.Tasks) > 0 {
			if err := s.m.spend(ctx, r.Node); err != nil {
				return nil, err
			}
			if _, err := s.m.Propose(ctx, state.Command{ReportTasks: cmd}); err != nil {
				return nil, err
			}
		}
	}
	if r.TasksKnown {
		s.m.tells(r.Node)
	}
	return connect.NewResponse(&shoalv1.ReportResponse{}), nil
}

// CheckEndpoints tells a node what the managers did not give of what others say they
// have.
func (s *service) CheckEndpoints(_ context.Context, req *connect.Request[shoalv1.CheckEndpointsRequest]) (*connect.Response[shoalv1.CheckEndpointsResponse], error) {
	var eps []spec.Endpoint
	for _, c := range req.Msg.Claims {
		e := spec.Endpoint{Node: c.GetNode(), Task: c.GetTask(), TaskName: c.GetTaskName(), Service: c.GetService(), Network: c.GetNetwork(), Aliases: c.GetAliases()}
		var err error
		if e.Addrs, err = api.Addrs("address", c.GetAddrs()); err != nil {
			return nil, invalid(fmt.Errorf("endpoint of task %s: %w", e.Task, err))
		}
		eps = append(eps, e)
	}
	resp := &shoalv1.CheckEndpointsResponse{}
	err := s.read(func(st *state.State) error {
		for i, e := range eps {
			if !st.Gave(e) {
				resp.Wrong = append(resp.Wrong, uint32(i))
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(resp), nil
}
