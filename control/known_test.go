package control

import (
	"strings"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

// ofTheFuture puts a field that no version has into a message.
func ofTheFuture(m protoreflect.Message) {
	m.SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 9999, protowire.BytesType), "x"))
}

// TestUnknownFields: what a newer command line asks for and this manager can't do is
// refused, by name, and nothing of it is done; what a newer agent tells beside the
// rest is overlooked.
func TestUnknownFields(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	leader(t, []*simNode{n})
	create := &shoalv1.CreateServiceRequest{Spec: &shoalv1.ServiceSpec{Name: "web", Replicas: 1, Task: &shoalv1.TaskSpec{Command: []string{"x"}}}}
	ofTheFuture(create.Spec.Task.ProtoReflect())
	_, err := n.ctl.CreateService(testCtx(t), connect.NewRequest(create))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "the leading manager node1") || !strings.Contains(err.Error(), "(spec.task.field 9999): upgrade shoal on the managers first") {
		t.Errorf("%v", err)
	}
	net := &shoalv1.CreateNetworkRequest{Name: "app"}
	ofTheFuture(net.ProtoReflect())
	if _, err := n.ctl.CreateNetwork(testCtx(t), connect.NewRequest(net)); err == nil || !strings.Contains(err.Error(), "(field 9999)") {
		t.Errorf("%v", err)
	}
	resp, err := n.ctl.ListServices(testCtx(t), connect.NewRequest(&shoalv1.ListServicesRequest{}))
	if err != nil || len(resp.Msg.Services) != 0 {
		t.Errorf("%v, %v", resp, err)
	}
	report := &shoalv1.ReportRequest{Node: n.node.ID}
	ofTheFuture(report.ProtoReflect())
	if _, err := n.as(n.node.ID, n.node.Role).Report(testCtx(t), connect.NewRequest(report)); err != nil {
		t.Errorf("a report of a newer agent: %v", err)
	}
}
