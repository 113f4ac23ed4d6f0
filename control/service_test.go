package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

func svc(name string, replicas int, networks ...string) *shoalv1.CreateServiceRequest {
	sp := &shoalv1.ServiceSpec{Name: name, Replicas: int32(replicas), Task: &shoalv1.TaskSpec{Command: []string{"sleep", "1"}}}
	for _, n := range networks {
		sp.Networks = append(sp.Networks, &shoalv1.NetworkAttachment{Network: n})
	}
	return &shoalv1.CreateServiceRequest{Spec: sp}
}

func (n *simNode) createService(req *shoalv1.CreateServiceRequest) *shoalv1.Service {
	n.t.Helper()
	resp, err := n.ctl.CreateService(testCtx(n.t), connect.NewRequest(req))
	if err != nil {
		n.t.Fatal(err)
	}
	return resp.Msg.Service
}

// report tells the managers that all of a node's tasks are in a state.
func (n *simNode) report(node string, change func(t *shoalv1.Task) *shoalv1.TaskStatus) {
	n.t.Helper()
	ctx := testCtx(n.t)
	resp, err := n.ctl.ListTasks(ctx, connect.NewRequest(&shoalv1.ListTasksRequest{Node: node, All: true}))
	if err != nil {
		n.t.Fatal(err)
	}
	req := &shoalv1.ReportRequest{Node: node, Tasks: map[string]*shoalv1.TaskStatus{}}
	for _, t := range resp.Msg.Tasks {
		if st := change(t); st != nil {
			st.AtMs = time.Now().UnixMilli()
			req.Tasks[t.Id] = st
		}
	}
	if _, err := n.as(node, spec.RoleWorker).Report(ctx, connect.NewRequest(req)); err != nil {
		n.t.Fatal(err)
	}
}

func (n *simNode) running(want int) {
	n.t.Helper()
	n.awaitTasks(want, "")
	n.report(n.node.ID, func(*shoalv1.Task) *shoalv1.TaskStatus { return &shoalv1.TaskStatus{State: "running"} })
}

func (n *simNode) released() {
	n.t.Helper()
	n.report(n.node.ID, func(t *shoalv1.Task) *shoalv1.TaskStatus {
		if t.Desired == spec.DesiredRunning {
			return nil
		}
		return &shoalv1.TaskStatus{State: "shutdown", Released: true}
	})
}

// awaitTasks waits until so many tasks that have not ended are on a node.
func (n *simNode) awaitTasks(want int, service string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%d tasks", want), func() error {
		resp, err := n.ctl.ListTasks(testCtx(n.t), connect.NewRequest(&shoalv1.ListTasksRequest{Node: n.node.ID, Service: service}))
		if err != nil {
			return err
		}
		if len(resp.Msg.Tasks) != want {
			return fmt.Errorf("%d tasks", len(resp.Msg.Tasks))
		}
		return nil
	})
}

func (n *simNode) index() uint64 {
	var i uint64
	n.mgr.fsm.read(func(s *state.State) { i = s.Index() })
	return i
}

// TestBadInput: each call with one thing wrong is refused with a code that says
// whose fault it is and an error that names it; and nothing changes.
func TestBadInput(t *testing.T) {
	n := newCluster(t, 1)[0]
	if err := createNetwork(n, "app"); err != nil {
		t.Fatal(err)
	}
	n.createService(svc("web", 0, "app"))
	other := newNode(t, "other", spec.RoleWorker)
	other.start()
	gone := listen(t)
	gone.Close()
	ctx := testCtx(t)
	newNet := func(r *shoalv1.CreateNetworkRequest) func() error {
		return func() error { _, err := n.ctl.CreateNetwork(ctx, connect.NewRequest(r)); return err }
	}
	newSvc := func(change func(*shoalv1.ServiceSpec)) func() error {
		return func() error {
			r := svc("new", 1, "app")
			change(r.Spec)
			_, err := n.ctl.CreateService(ctx, connect.NewRequest(r))
			return err
		}
	}
	newTask := func(r *shoalv1.CreateTaskRequest) func() error {
		return func() error {
			if r.Spec == nil {
				r.Spec = &shoalv1.TaskSpec{Command: []string{"x"}}
			}
			_, err := n.ctl.CreateTask(ctx, connect.NewRequest(r))
			return err
		}
	}
	joins := func(change func(*shoalv1.NodeInfo), cluster string) func() error {
		return func() error {
			r := other.joinRequest()
			change(r.Node)
			r.Cluster = cluster
			_, err := other.joiner(n).JoinNode(ctx, connect.NewRequest(r))
			return err
		}
	}
	str := func(s string) *string { return &s }
	updNode := func(r *shoalv1.UpdateNodeRequest) func() error {
		return func() error { _, err := n.ctl.UpdateNode(ctx, connect.NewRequest(r)); return err }
	}
	const (
		invalid = connect.CodeInvalidArgument
		absent  = connect.CodeNotFound
		exists  = connect.CodeAlreadyExists
		precond = connect.CodeFailedPrecondition
	)
	before := n.snapshot()
	for name, k := range map[string]struct {
		call func() error
		code connect.Code
		want string
	}{
		"network without name": {newNet(&shoalv1.CreateNetworkRequest{}), invalid, "name is empty"},
		"network name":         {newNet(&shoalv1.CreateNetworkRequest{Name: "a b"}), invalid, `"a b"`},
		"network exists":       {newNet(&shoalv1.CreateNetworkRequest{Name: "app"}), exists, "app"},
		"subnet no prefix":     {newNet(&shoalv1.CreateNetworkRequest{Name: "x", Subnets: []string{"10.1.0.0"}}), invalid, "10.1.0.0"},
		"subnet host bits":     {newNet(&shoalv1.CreateNetworkRequest{Name: "x", Subnets: []string{"10.1.0.1/24"}}), invalid, "did you mean 10.1.0.0/24"},
		"subnet reserved":      {newNet(&shoalv1.CreateNetworkRequest{Name: "x", Subnets: []string{"127.0.0.0/24"}}), invalid, "reserved"},
		"gateway":              {newNet(&shoalv1.CreateNetworkRequest{Name: "x", Subnets: []string{"10.1.0.0/24"}, Gateways: []string{"g"}}), invalid, `"g"`},
		"gateway outside":      {newNet(&shoalv1.CreateNetworkRequest{Name: "x", Subnets: []string{"10.1.0.0/24"}, Gateways: []string{"10.2.0.1"}}), invalid, "10.2.0.1"},
		"ip range":             {newNet(&shoalv1.CreateNetworkRequest{Name: "x", IpRanges: []string{"r"}}), invalid, `"r"`},
		"driver":               {newNet(&shoalv1.CreateNetworkRequest{Name: "x", Driver: "macvlan"}), invalid, "macvlan"},
		"mtu":                  {newNet(&shoalv1.CreateNetworkRequest{Name: "x", Mtu: 1}), invalid, "MTU 1"},
		"option":               {newNet(&shoalv1.CreateNetworkRequest{Name: "x", Options: map[string]string{"colour": "red"}}), invalid, "colour"},
		"bridge without node":  {newNet(&shoalv1.CreateNetworkRequest{Name: "x", Driver: "bridge"}), invalid, "node"},
		"no such network": {func() error {
			_, err := n.ctl.RemoveNetwork(ctx, connect.NewRequest(&shoalv1.RemoveNetworkRequest{Ref: "nix"}))
			return err
		}, absent, "no such network: nix"},
		"list no such network": {func() error {
			_, err := n.ctl.ListNetworks(ctx, connect.NewRequest(&shoalv1.ListNetworksRequest{Refs: []string{"nix"}}))
			return err
		}, absent, "no such network: nix"},
		"network in use": {func() error {
			_, err := n.ctl.RemoveNetwork(ctx, connect.NewRequest(&shoalv1.RemoveNetworkRequest{Ref: "app"}))
			return err
		}, precond, "service web"},
		"default network": {func() error {
			_, err := n.ctl.RemoveNetwork(ctx, connect.NewRequest(&shoalv1.RemoveNetworkRequest{Ref: "default"}))
			return err
		}, invalid, "default"},
		"connect nothing": {func() error {
			_, err := n.ctl.ConnectNetwork(ctx, connect.NewRequest(&shoalv1.ConnectNetworkRequest{Network: "app", Target: "nix"}))
			return err
		}, absent, "nix"},
		"connect address": {func() error {
			_, err := n.ctl.ConnectNetwork(ctx, connect.NewRequest(&shoalv1.ConnectNetworkRequest{Network: "app", Target: "web", Addrs: []string{"a"}}))
			return err
		}, invalid, `"a"`},
		"disconnect nothing": {func() error {
			_, err := n.ctl.DisconnectNetwork(ctx, connect.NewRequest(&shoalv1.DisconnectNetworkRequest{Network: "app", Target: "nix"}))
			return err
		}, absent, "nix"},
		"service without spec": {func() error {
			_, err := n.ctl.CreateService(ctx, connect.NewRequest(&shoalv1.CreateServiceRequest{}))
			return err
		}, invalid, "name is empty"},
		"service exists":          {newSvc(func(s *shoalv1.ServiceSpec) { s.Name = "web" }), exists, "web"},
		"replicas":                {newSvc(func(s *shoalv1.ServiceSpec) { s.Replicas = -1 }), invalid, "-1"},
		"endpoint mode":           {newSvc(func(s *shoalv1.ServiceSpec) { s.EndpointMode = "rr" }), invalid, "rr"},
		"no command":              {newSvc(func(s *shoalv1.ServiceSpec) { s.Task.Command = nil }), invalid, "no command"},
		"service's network":       {newSvc(func(s *shoalv1.ServiceSpec) { s.Networks[0].Network = "nix" }), invalid, "no such network: nix"},
		"service's VIP":           {newSvc(func(s *shoalv1.ServiceSpec) { s.Networks[0].Addrs = []string{"x"} }), invalid, `"x"`},
		"service's VIP elsewhere": {newSvc(func(s *shoalv1.ServiceSpec) { s.Networks[0].Addrs = []string{"192.0.2.1"} }), invalid, "192.0.2.1"},
		"constraint":              {newSvc(func(s *shoalv1.ServiceSpec) { s.Constraints = []string{"x"} }), invalid, `"x"`},
		"port":                    {newSvc(func(s *shoalv1.ServiceSpec) { s.Ports = []*shoalv1.Port{{Target: 70000}} }), invalid, "70000"},
		"port protocol": {newSvc(func(s *shoalv1.ServiceSpec) {
			s.Ports = []*shoalv1.Port{{Target: 80, Protocol: "icmp", Mode: "ingress"}}
		}), invalid, "icmp"},
		"restart delay": {newSvc(func(s *shoalv1.ServiceSpec) { s.RestartDelayMs = -1 }), invalid, "negative"},
		"update nothing": {func() error {
			_, err := n.ctl.UpdateService(ctx, connect.NewRequest(&shoalv1.UpdateServiceRequest{Ref: "web"}))
			return err
		}, invalid, "neither"},
		"update no such service": {func() error {
			r := int32(1)
			_, err := n.ctl.UpdateService(ctx, connect.NewRequest(&shoalv1.UpdateServiceRequest{Ref: "nix", Replicas: &r}))
			return err
		}, absent, "nix"},
		"update of an old version": {func() error {
			r := int32(1)
			_, err := n.ctl.UpdateService(ctx, connect.NewRequest(&shoalv1.UpdateServiceRequest{Ref: "web", Replicas: &r, Version: 1}))
			return err
		}, connect.CodeAborted, "web"},
		"update replicas": {func() error {
			r := int32(-1)
			_, err := n.ctl.UpdateService(ctx, connect.NewRequest(&shoalv1.UpdateServiceRequest{Ref: "web", Replicas: &r}))
			return err
		}, invalid, "-1"},
		"remove no such service": {func() error {
			_, err := n.ctl.RemoveService(ctx, connect.NewRequest(&shoalv1.RemoveServiceRequest{Ref: "nix"}))
			return err
		}, absent, "no such service: nix"},
		"list no such service": {func() error {
			_, err := n.ctl.ListServices(ctx, connect.NewRequest(&shoalv1.ListServicesRequest{Refs: []string{"nix"}}))
			return err
		}, absent, "no such service: nix"},
		"task without command": {newTask(&shoalv1.CreateTaskRequest{Spec: &shoalv1.TaskSpec{}}), invalid, "no command"},
		"task name":            {newTask(&shoalv1.CreateTaskRequest{Name: "a b"}), invalid, `"a b"`},
		"task's node":          {newTask(&shoalv1.CreateTaskRequest{Node: "nix"}), absent, "nix"},
		"task's network":       {newTask(&shoalv1.CreateTaskRequest{Networks: []*shoalv1.NetworkAttachment{{Network: "nix"}}}), absent, "nix"},
		"task's address":       {newTask(&shoalv1.CreateTaskRequest{Networks: []*shoalv1.NetworkAttachment{{Network: "app", Addrs: []string{"x"}}}}), invalid, `"x"`},
		"task's DNS":           {newTask(&shoalv1.CreateTaskRequest{Spec: &shoalv1.TaskSpec{Command: []string{"x"}, Dns: []string{"d"}}}), invalid, `"d"`},
		"task's port":          {newTask(&shoalv1.CreateTaskRequest{Ports: []*shoalv1.Port{{Target: 80, Published: 65536}}}), invalid, "65536"},
		"stop no such task": {func() error {
			_, err := n.ctl.StopTask(ctx, connect.NewRequest(&shoalv1.StopTaskRequest{Ref: "nix"}))
			return err
		}, absent, "no such task: nix"},
		"list tasks of no service": {func() error {
			_, err := n.ctl.ListTasks(ctx, connect.NewRequest(&shoalv1.ListTasksRequest{Service: "nix"}))
			return err
		}, absent, "no such service: nix"},
		"list tasks of no node": {func() error {
			_, err := n.ctl.ListTasks(ctx, connect.NewRequest(&shoalv1.ListTasksRequest{Node: "nix"}))
			return err
		}, absent, "no such node: nix"},
		"update no such node":        {updNode(&shoalv1.UpdateNodeRequest{Ref: "nix", Availability: str("drain")}), absent, "no such node: nix"},
		"make no such node a worker": {updNode(&shoalv1.UpdateNodeRequest{Ref: "nix", Role: str("worker")}), absent, "no such node: nix"},
		"role":                       {updNode(&shoalv1.UpdateNodeRequest{Ref: "node1", Role: str("boss")}), invalid, "boss"},
		"availability":               {updNode(&shoalv1.UpdateNodeRequest{Ref: "node1", Availability: str("off")}), invalid, "off"},
		"label":                      {updNode(&shoalv1.UpdateNodeRequest{Ref: "node1", SetLabels: map[string]string{"a=b": "c"}}), invalid, "a=b"},
		"remove no such node": {func() error {
			_, err := n.ctl.RemoveNode(ctx, connect.NewRequest(&shoalv1.RemoveNodeRequest{Ref: "nix"}))
			return err
		}, absent, "no such node: nix"},
		"join without address":    {joins(func(i *shoalv1.NodeInfo) { i.Addr = "" }, ""), invalid, "address"},
		"join with a bad address": {joins(func(i *shoalv1.NodeInfo) { i.Addr = "here" }, ""), invalid, "here"},
		"join from anywhere":      {joins(func(i *shoalv1.NodeInfo) { i.Addr = "0.0.0.0" }, ""), invalid, "0.0.0.0"},
		"join without port":       {joins(func(i *shoalv1.NodeInfo) { i.ControlPort = 0 }, ""), invalid, "control port 0"},
		"join with a high port":   {joins(func(i *shoalv1.NodeInfo) { i.GossipPort = 70000 }, ""), invalid, "gossip port 70000"},
		"join without name":       {joins(func(i *shoalv1.NodeInfo) { i.Name = "" }, ""), invalid, "name is empty"},
		"join without ID":         {joins(func(i *shoalv1.NodeInfo) { i.Id = "" }, ""), invalid, "ID"},
		"join with a taken name":  {joins(func(i *shoalv1.NodeInfo) { i.Name = "node1" }, ""), exists, "--node-name"},
		"join as a boss":          {joins(func(i *shoalv1.NodeInfo) { i.Role = "boss" }, ""), invalid, "boss"},
		"join of another cluster": {joins(func(*shoalv1.NodeInfo) {}, "another"), precond, "another"},
		"join out of reach":       {joins(func(i *shoalv1.NodeInfo) { i.ControlPort = int32(portOf(gone.Addr())) }, ""), precond, "--advertise-addr"},
		"report of a stranger": {func() error {
			_, err := n.as("nix", spec.RoleWorker).Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: "nix"}))
			return err
		}, absent, "no such node: nix"},
		"report of a bad address": {func() error {
			_, err := n.ctl.Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: n.node.ID, Addr: "x"}))
			return err
		}, invalid, `"x"`},
		"report of no port": {func() error {
			_, err := n.ctl.Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: n.node.ID, Addr: "127.0.0.1"}))
			return err
		}, invalid, "1 to 65535"},
		"report of a bad state": {func() error {
			_, err := n.ctl.Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: n.node.ID, Tasks: map[string]*shoalv1.TaskStatus{"x": {State: "bored"}}}))
			return err
		}, invalid, "bored"},
		"assignments of a stranger": {func() error {
			s, err := n.as("nix", spec.RoleWorker).Assignments(ctx, connect.NewRequest(&shoalv1.AssignmentsRequest{Node: "nix"}))
			if err != nil {
				return err
			}
			defer s.Close()
			for s.Receive() {
			}
			return s.Err()
		}, absent, "no such node: nix"},
	} {
		t.Run(name, func(t *testing.T) {
			err := k.call()
			var ce *connect.Error
			if !errors.As(err, &ce) {
				t.Fatalf("got %v, want an API error", err)
			}
			if ce.Code() != k.code || !strings.Contains(ce.Message(), k.want) {
				t.Errorf("%s: %q\nwant %s, with %q in it", ce.Code(), ce.Message(), k.code, k.want)
			}
			if strings.Contains(ce.Message(), "\n") {
				t.Errorf("more than one line: %q", ce.Message())
			}
		})
	}
	if after := n.snapshot(); !sameButIndex(before, after) {
		t.Errorf("refused calls changed the state:\n%s\n%s", before, after)
	}
}

// TestServiceNameComesFree: a name whose last owner is on its way out can be
// taken once it is, and the wait does not flood raft.
func TestServiceNameComesFree(t *testing.T) {
	n := newCluster(t, 1)[0]
	first := n.createService(svc("web", 1))
	n.running(1)
	ctx := testCtx(t)
	if _, err := n.ctl.RemoveService(ctx, connect.NewRequest(&shoalv1.RemoveServiceRequest{Ref: "web"})); err != nil {
		t.Fatal(err)
	}
	// One with less patience gets to know why.
	short, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	before := n.index()
	if _, err := n.ctl.CreateService(short, connect.NewRequest(svc("web", 1))); err == nil {
		t.Error("the name is taken while its last owner's task runs")
	}
	if k := n.index() - before; k > 10 {
		t.Errorf("waiting for half a second took %d entries of the log", k)
	}
	second := make(chan error, 1)
	go func() {
		resp, err := n.ctl.CreateService(ctx, connect.NewRequest(svc("web", 1)))
		if err == nil && resp.Msg.Service.Id == first.Id {
			err = errors.New("it is the old one")
		}
		second <- err
	}()
	select {
	case err := <-second:
		t.Fatalf("before the old one's task was released: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	n.released()
	if err := <-second; err != nil {
		t.Errorf("after the old one's task was released: %v", err)
	}
}

// TestRemoveNetworkWaitsForEnding is the same for a network.
func TestRemoveNetworkWaitsForEnding(t *testing.T) {
	n := newCluster(t, 1)[0]
	if err := createNetwork(n, "app"); err != nil {
		t.Fatal(err)
	}
	n.createService(svc("web", 2, "app"))
	n.running(2)
	ctx := testCtx(t)
	if _, err := n.ctl.RemoveService(ctx, connect.NewRequest(&shoalv1.RemoveServiceRequest{Ref: "web"})); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := n.ctl.RemoveNetwork(ctx, connect.NewRequest(&shoalv1.RemoveNetworkRequest{Ref: "app"}))
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("before the tasks were released: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	n.released()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestProposeWhenFreeIsBounded: nothing that is being removed holds up a caller
// for longer than nameTimeout, and then the answer tells what does.
func TestProposeWhenFreeIsBounded(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	n.createService(svc("web", 1))
	n.running(1)
	if _, err := n.ctl.RemoveService(testCtx(t), connect.NewRequest(&shoalv1.RemoveServiceRequest{Ref: "web"})); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	start := time.Now()
	_, err := (&service{n.mgr}).CreateService(ctx, connect.NewRequest(svc("web", 1)))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "web is being removed") {
		t.Errorf("got %v", err)
	}
	if d := time.Since(start); d < time.Second || d > 10*time.Second {
		t.Errorf("it took %s", d)
	}
}

// TestAssignmentStream: a node hears of its own tasks, of their networks and of
// the services on these, and of nothing else; of each change; and of the end of
// its membership.
func TestAssignmentStream(t *testing.T) {
	n, w := withWorker(t)
	w.sees = []string{n.addr()}
	for _, name := range []string{"mine", "theirs"} {
		if err := createNetwork(n, name); err != nil {
			t.Fatal(err)
		}
	}
	on := func(r *shoalv1.CreateServiceRequest, node string) *shoalv1.CreateServiceRequest {
		r.Spec.Constraints = []string{"node.name==" + node}
		return r
	}
	n.createService(on(svc("elsewhere", 1, "theirs"), "node1"))
	n.createService(on(svc("neighbour", 1, "mine"), "node1")) // on a network of the worker's: it needs the VIP
	ctx, cancel := context.WithCancel(testCtx(t))
	defer cancel()
	stream, err := w.ctl.Assignments(ctx, connect.NewRequest(&shoalv1.AssignmentsRequest{Node: w.node.ID}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	text := func(a *shoalv1.AssignmentsResponse) string {
		var tasks, nets, svcs, nodes []string
		for _, t := range a.Tasks {
			tasks = append(tasks, strings.Join(strings.Split(t.Name, ".")[:2], "."))
		}
		for _, n := range a.Networks {
			nets = append(nets, n.Name)
		}
		for _, v := range a.Services {
			svcs = append(svcs, v.Spec.Name)
		}
		for _, v := range a.Nodes {
			nodes = append(nodes, v.Name)
		}
		for _, s := range [][]string{tasks, nets, svcs, nodes} {
			slices.Sort(s)
		}
		return fmt.Sprintf("tasks %v networks %v services %v nodes %v", tasks, nets, svcs, nodes)
	}
	alive := 0
	var last *shoalv1.AssignmentsResponse
	await := func(want string) {
		t.Helper()
		for stream.Receive() {
			if stream.Msg().Unchanged {
				alive++
				continue
			}
			if m := stream.Msg(); last != nil && m.Index <= last.Index {
				t.Errorf("index %d after %d", m.Index, last.Index)
			}
			last = stream.Msg()
			if text(last) == want {
				return
			}
		}
		t.Fatalf("stream ended: %v; last %s\nwant %s", stream.Err(), text(last), want)
	}
	await("tasks [] networks [] services [] nodes [node1 worker]")
	if last.Cluster.GetId() != testCluster.ID || last.Cluster.GetDataPathPort() != 4789 {
		t.Errorf("cluster %v", last.Cluster)
	}
	n.createService(on(svc("web", 1, "mine"), "worker"))
	await("tasks [web.1] networks [mine] services [neighbour web] nodes [node1 worker]")
	if len(last.Services[0].Vips) == 0 || len(last.Tasks[0].Attachments) != 1 || len(last.Tasks[0].Attachments[0].Addrs) == 0 {
		t.Errorf("without addresses: %v", last)
	}
	// What is another's does not wake it: the stream only shows that it lives.
	n.createService(on(svc("elsewhere2", 1, "theirs"), "node1"))
	for end := alive + 3; alive < end; {
		if !stream.Receive() {
			t.Fatal(stream.Err())
		}
		if !stream.Msg().Unchanged {
			t.Fatalf("sent for another's sake: %s", text(stream.Msg()))
		}
		alive++
	}
	// A second stream begins with the whole.
	again, err := w.ctl.Assignments(ctx, connect.NewRequest(&shoalv1.AssignmentsRequest{Node: w.node.ID}))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if !again.Receive() || text(again.Msg()) != text(last) {
		t.Errorf("a new stream begins with %v, %v", again.Msg(), again.Err())
	}
	// Who can take it is told the whole first, then only what changed.
	deltas, err := w.ctl.Assignments(ctx, connect.NewRequest(&shoalv1.AssignmentsRequest{Node: w.node.ID, Deltas: true}))
	if err != nil {
		t.Fatal(err)
	}
	defer deltas.Close()
	if !deltas.Receive() || deltas.Msg().Since != 0 || text(deltas.Msg()) != text(last) {
		t.Fatalf("a stream of deltas begins with %v, %v", deltas.Msg(), deltas.Err())
	}
	index := deltas.Msg().Index
	id := n.createService(on(svc("other", 0, "mine"), "worker")).Id
	for deltas.Receive() && deltas.Msg().Unchanged {
	}
	if m := deltas.Msg(); deltas.Err() != nil || text(m) != "tasks [] networks [mine] services [other] nodes []" || m.Since != index || slices.Contains(m.Gone, id) {
		t.Errorf("of one more service: %v, %v; want it alone, since %d", m, deltas.Err(), index)
	}
	index = deltas.Msg().Index
	if _, err := n.ctl.RemoveService(ctx, connect.NewRequest(&shoalv1.RemoveServiceRequest{Ref: "other"})); err != nil {
		t.Fatal(err)
	}
	for deltas.Receive() && deltas.Msg().Unchanged {
	}
	if m := deltas.Msg(); deltas.Err() != nil || text(m) != "tasks [] networks [mine] services [] nodes []" || m.Since != index || !slices.Contains(m.Gone, id) {
		t.Errorf("of a removed service: %v, %v; want it gone, since %d", m, deltas.Err(), index)
	}
	if _, err := n.ctl.RemoveNode(ctx, connect.NewRequest(&shoalv1.RemoveNodeRequest{Ref: "worker", Force: true})); err != nil {
		t.Fatal(err)
	}
	for stream.Receive() {
	}
	if connect.CodeOf(stream.Err()) != connect.CodeNotFound {
		t.Errorf("a removed node's stream ends with %v, want not found", stream.Err())
	}
}

// TestStreamsEndWithTheTerm: nobody follows a manager that no longer leads; the
// next stream goes to the one that does, and continues.
func TestStreamsEndWithTheTerm(t *testing.T) {
	nodes := newCluster(t, 3)
	l := leader(t, nodes)
	f := without(nodes, l)[0]
	ctx := testCtx(t)
	as, err := f.ctl.Assignments(ctx, connect.NewRequest(&shoalv1.AssignmentsRequest{Node: f.node.ID}))
	if err != nil {
		t.Fatal(err)
	}
	defer as.Close()
	ev, err := f.ctl.Events(ctx, connect.NewRequest(&shoalv1.EventsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	defer ev.Close()
	if !as.Receive() {
		t.Fatal(as.Err())
	}
	if err := l.mgr.raft.LeadershipTransfer().Error(); err != nil {
		t.Fatal(err)
	}
	for as.Receive() {
	}
	for ev.Receive() {
	}
	if a, e := connect.CodeOf(as.Err()), connect.CodeOf(ev.Err()); a != connect.CodeUnavailable || e != connect.CodeUnavailable {
		t.Errorf("streams of an old leader end with %v and %v", as.Err(), ev.Err())
	}
	as2, err := f.ctl.Assignments(ctx, connect.NewRequest(&shoalv1.AssignmentsRequest{Node: f.node.ID}))
	if err != nil {
		t.Fatal(err)
	}
	defer as2.Close()
	if !as2.Receive() || len(as2.Msg().Nodes) != 3 {
		t.Errorf("the next stream: %v, %v", as2.Msg(), as2.Err())
	}
}

func TestEventStream(t *testing.T) {
	n := newCluster(t, 1)[0]
	start := time.Now().UnixMilli()
	if err := createNetwork(n, "before"); err != nil {
		t.Fatal(err)
	}
	// One that has an end ends, with what was before it and without an error.
	past, err := n.ctl.Events(testCtx(t), connect.NewRequest(&shoalv1.EventsRequest{SinceMs: start, UntilMs: time.Now().UnixMilli()}))
	if err != nil {
		t.Fatal(err)
	}
	defer past.Close()
	found := false
	for past.Receive() {
		found = found || past.Msg().Name == "before"
	}
	if !found || past.Err() != nil {
		t.Errorf("events until now: found %t, %v", found, past.Err())
	}
	ctx, cancel := context.WithCancel(testCtx(t))
	defer cancel()
	open := func(since int64) *connect.ServerStreamForClient[shoalv1.Event] {
		t.Helper()
		s, err := n.ctl.Events(ctx, connect.NewRequest(&shoalv1.EventsRequest{SinceMs: since}))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	await := func(s *connect.ServerStreamForClient[shoalv1.Event], typ, action, name string) *shoalv1.Event {
		t.Helper()
		if !s.Receive() {
			t.Fatalf("stream ended before %s %s %s: %v", typ, action, name, s.Err())
		}
		e := s.Msg()
		if e.Type != typ || e.Action != action || e.Name != name || e.AtMs < start {
			t.Errorf("event %v, want %s %s %s", e, typ, action, name)
		}
		return e
	}
	fromNow, all := open(0), open(start)
	defer fromNow.Close()
	defer all.Close()
	for all.Receive() && all.Msg().Name != "before" { // of the same millisecond
		if at := all.Msg().AtMs; at < start {
			t.Errorf("an event of %d, before %d", at, start)
		}
	}
	if err := createNetwork(n, "app"); err != nil {
		t.Fatal(err)
	}
	await(all, "network", "create", "app")
	await(fromNow, "network", "create", "app")
	if err := createNetwork(n, "app"); err == nil { // refused: no event
		t.Fatal("app was made twice")
	}
	n.createService(svc("web", 0, "app"))
	await(fromNow, "service", "create", "web")
	if _, err := n.ctl.RemoveService(ctx, connect.NewRequest(&shoalv1.RemoveServiceRequest{Ref: "web"})); err != nil {
		t.Fatal(err)
	}
	await(fromNow, "service", "remove", "web")
	cancel()
	for fromNow.Receive() {
	}
}

// TestEventLogForgets: the log keeps the last ones, and numbers them through.
func TestEventLogForgets(t *testing.T) {
	l := newEventLog()
	for i := range eventMemory + 10 {
		l.add(time.UnixMilli(int64(i)), []state.Event{{Name: fmt.Sprint(i)}})
	}
	got, next, changed := l.from(0)
	if len(got) != eventMemory || got[0].Name != "10" || next != eventMemory+10 {
		t.Errorf("%d events from %s, next %d", len(got), got[0].Name, next)
	}
	if got, _, _ := l.from(next + 5); len(got) != 0 {
		t.Errorf("%d events of the future", len(got))
	}
	l.add(time.UnixMilli(1), nil)
	select {
	case <-changed:
		t.Error("woken by nothing")
	default:
	}
	l.add(time.UnixMilli(1), []state.Event{{Name: "last"}})
	<-changed
	if got, _, _ := l.from(next); len(got) != 1 || got[0].Name != "last" {
		t.Errorf("events %v", got)
	}
}

// withWorker is a cluster of one manager and a worker.
func withWorker(t *testing.T) (n, w *simNode) {
	n = newCluster(t, 1)[0]
	w = newNode(t, "worker", spec.RoleWorker)
	w.start()
	join(t, n, w)
	return n, w
}

// TestReportsKeepNodesReady: silence makes a node down, its next report ready.
func TestReportsKeepNodesReady(t *testing.T) {
	n, w := withWorker(t)
	n.stop()
	n.tune.DownRegardless = time.Second
	n.start()
	leader(t, []*simNode{n})
	status := func() string {
		resp, err := n.ctl.ListNodes(testCtx(t), connect.NewRequest(&shoalv1.ListNodesRequest{Refs: []string{"worker"}}))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Msg.Nodes[0].Status
	}
	is := func(want string) {
		t.Helper()
		eventually(t, "the worker is "+want, func() error {
			if s := status(); s != want {
				return errors.New(s)
			}
			return nil
		})
	}
	is(spec.NodeDown)
	// What was down is not ready before its kernel follows the cluster.
	_, err := n.as(w.node.ID, spec.RoleWorker).Report(testCtx(t), connect.NewRequest(&shoalv1.ReportRequest{Node: w.node.ID, Wiring: true}))
	if err != nil || status() != spec.NodeDown {
		t.Errorf("while its kernel does not follow: %s, %v", status(), err)
	}
	// With another address, as a laptop comes back.
	_, err = n.as(w.node.ID, spec.RoleWorker).Report(testCtx(t), connect.NewRequest(&shoalv1.ReportRequest{Node: w.node.ID, Addr: "127.0.0.9", ControlPort: 1, GossipPort: 2, DataPath: "nft"}))
	if err != nil {
		t.Fatal(err)
	}
	var got spec.Node
	n.mgr.fsm.read(func(s *state.State) { got, err = s.Node("worker") })
	if err != nil || got.Status != spec.NodeReady || got.Addr.String() != "127.0.0.9" || got.ControlPort != 1 || got.GossipPort != 2 || got.DataPath != "nft" {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestWhatRanBeforeIsNotSaidToRun: after everything was started anew a leader knows how
// tasks are only when every node that is ready has said so.
func TestWhatRanBeforeIsNotSaidToRun(t *testing.T) {
	n, w := withWorker(t)
	if err := createNetwork(n, "app"); err != nil {
		t.Fatal(err)
	}
	req := svc("web", 1, "app")
	req.Spec.Constraints = []string{"node.name==node1"}
	n.createService(req)
	n.awaitTasks(1, "web")
	n.report(n.node.ID, func(*shoalv1.Task) *shoalv1.TaskStatus { return &shoalv1.TaskStatus{State: "running", Pid: 4711} })
	task := func(ctx context.Context) (*shoalv1.Task, error) {
		resp, err := n.ctl.ListTasks(ctx, connect.NewRequest(&shoalv1.ListTasksRequest{Service: "web"}))
		if err != nil {
			return nil, err
		}
		return resp.Msg.Tasks[0], nil
	}
	ran, err := task(testCtx(t))
	if err != nil || ran.Status.State != "running" {
		t.Fatalf("%v, %v", ran, err)
	}
	n.stop()
	n.tune.FirstReports = time.Hour
	n.start()
	leader(t, []*simNode{n})
	unknown := func(after string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if x, err := task(ctx); err == nil {
			t.Errorf("after %s: %v", after, x.Status)
		}
		if resp, err := n.ctl.ListServices(ctx, connect.NewRequest(&shoalv1.ListServicesRequest{})); err == nil {
			t.Errorf("after %s: %v", after, resp.Msg.Services)
		}
	}
	says := func(id string, known bool, tasks map[string]*shoalv1.TaskStatus) {
		t.Helper()
		if _, err := n.as(id, spec.RoleWorker).Report(testCtx(t), connect.NewRequest(&shoalv1.ReportRequest{Node: id, Tasks: tasks, TasksKnown: known})); err != nil {
			t.Fatal(err)
		}
	}
	unknown("the start")
	says(w.node.ID, true, nil)
	unknown("the other node's report")
	says(n.node.ID, false, nil)
	unknown("a report of the node that has not looked yet")
	says(n.node.ID, true, map[string]*shoalv1.TaskStatus{ran.Id: {State: "preparing", AtMs: time.Now().UnixMilli()}})
	if x, err := task(testCtx(t)); err != nil || x.Status.State != "preparing" {
		t.Errorf("%v, %v", x, err)
	}
	resp, err := n.ctl.ListServices(testCtx(t), connect.NewRequest(&shoalv1.ListServicesRequest{}))
	if err != nil || resp.Msg.Services[0].Running != 0 {
		t.Errorf("%v, %v", resp, err)
	}
}

// TestServiceIsBehindUntilNodesFollow: a node that a change concerns is waited
// for until it says so, and one that is down is not.
func TestServiceIsBehindUntilNodesFollow(t *testing.T) {
	n, w := withWorker(t)
	if err := createNetwork(n, "app"); err != nil {
		t.Fatal(err)
	}
	n.createService(svc("quiet", 0, "app")) // on no node: it concerns none
	req := svc("web", 0, "app")
	req.Spec.Ports = []*shoalv1.Port{{Published: 8080, Target: 80, Protocol: spec.TCP, Mode: spec.PortIngress}}
	n.createService(req)
	service := func(name string) *shoalv1.Service {
		t.Helper()
		resp, err := n.ctl.ListServices(testCtx(t), connect.NewRequest(&shoalv1.ListServicesRequest{Refs: []string{name}}))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Msg.Services[0]
	}
	says := func(id string, index uint64) {
		t.Helper()
		if _, err := n.as(id, spec.RoleWorker).Report(testCtx(t), connect.NewRequest(&shoalv1.ReportRequest{Node: id, Applied: index})); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(name string, want ...string) {
		t.Helper()
		if got := service(name).Behind; !slices.Equal(got, want) {
			t.Errorf("behind with %s: %v, want %v", name, got, want)
		}
	}
	version := service("web").Version
	expect("web", "node1", "worker")
	down := &state.SetNodeStatus{Nodes: []state.NodeStatus{{ID: w.node.ID, Status: spec.NodeDown}}}
	if _, err := n.mgr.Propose(testCtx(t), state.Command{SetNodeStatus: down}); err != nil {
		t.Fatal(err)
	}
	expect("web", "node1")
	says(w.node.ID, version-1) // it is back
	expect("web", "node1", "worker")
	says(w.node.ID, version)
	expect("web", "node1")
	says(w.node.ID, 1) // late
	expect("web", "node1")
}

// TestFaults: what a node says it can't do is shown with what it can't do it for,
// until the node says otherwise or is down.
func TestFaults(t *testing.T) {
	n, w := withWorker(t)
	n.createService(svc("other", 0))
	id := n.createService(svc("web", 0)).Id
	says := func(fs ...*shoalv1.ReportRequest_Fault) {
		t.Helper()
		if _, err := n.as(w.node.ID, spec.RoleWorker).Report(testCtx(t), connect.NewRequest(&shoalv1.ReportRequest{Node: w.node.ID, Faults: fs})); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want string) {
		t.Helper()
		resp, err := n.ctl.ListServices(testCtx(t), connect.NewRequest(&shoalv1.ListServicesRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range resp.Msg.Services {
			for _, f := range s.Faults {
				got = append(got, s.Spec.Name+" "+f.Node+" "+f.Message)
			}
		}
		if strings.Join(got, ", ") != want {
			t.Errorf("faults %q, want %q", got, want)
		}
	}
	says(&shoalv1.ReportRequest_Fault{Object: id, Message: "port is held"}, &shoalv1.ReportRequest_Fault{Object: "none", Message: "x"})
	expect("web worker port is held")
	says(&shoalv1.ReportRequest_Fault{Object: id, Message: "another"})
	expect("web worker another")
	down := &state.SetNodeStatus{Nodes: []state.NodeStatus{{ID: w.node.ID, Status: spec.NodeDown}}}
	if _, err := n.mgr.Propose(testCtx(t), state.Command{SetNodeStatus: down}); err != nil {
		t.Fatal(err)
	}
	expect("")
	says()
	expect("")
}

func portOf(a net.Addr) int { return a.(*net.TCPAddr).Port }

// sameButIndex compares two snapshots apart from the index of the last command,
// which refused ones move on, too.
func sameButIndex(a, b []byte) bool {
	var x, y map[string]any
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		return false
	}
	delete(x, "index")
	delete(y, "index")
	return reflect.DeepEqual(x, y)
}
