package api

import (
	"testing"

	"google.golang.org/protobuf/proto"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/internal/filled"
	"github.com/shoalnet/shoal/spec"
)

// wire sends a message through its bytes.
func wire[M proto.Message](t *testing.T, in, out M) M {
	t.Helper()
	b, err := proto.Marshal(in)
	if err == nil {
		err = proto.Unmarshal(b, out)
	}
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestEveryField: what goes over the wire comes back with every field that it has: one
// that a conversion forgets is lost for whoever is told by the managers.
func TestEveryField(t *testing.T) {
	check := func(what string, want, got any, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		} else if d := filled.Differ(want, got); d != "" {
			t.Errorf("%s%s", what, d)
		}
	}
	network := filled.Value[spec.Network]()
	n, err := ToNetwork(wire(t, Network(network), &shoalv1.Network{}))
	check("network", network, n, err)
	service := filled.Value[spec.Service]()
	v, err := ToService(wire(t, Service(service, 1), &shoalv1.Service{}))
	check("service", service, v, err)
	task := filled.Value[spec.Task]()
	x, err := ToTask(wire(t, Task(task), &shoalv1.Task{}))
	check("task", task, x, err)
	node := filled.Value[spec.Node]()
	d, err := ToNode(wire(t, Node(node), &shoalv1.NodeInfo{}))
	check("node", node, d, err)
	status := filled.Value[spec.TaskStatus]()
	s, err := ToTaskStatus(wire(t, TaskStatus(status), &shoalv1.TaskStatus{}))
	check("status", status, s, err)
}
