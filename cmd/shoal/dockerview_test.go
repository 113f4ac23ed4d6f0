package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

// Templates of people's scripts, with Docker's fields, go on; ours count first.
func TestDockersFields(t *testing.T) {
	nets := []*shoalv1.Network{{Id: "netnetnetnet", Name: "app", Driver: "overlay", Subnets: []string{"10.0.1.0/24"}, Gateways: []string{"10.0.1.1"}}}
	svc := &shoalv1.Service{Id: "svcsvcsvcsvc", Version: 7, Running: 2, Desired: 3, Vips: []*shoalv1.VIPs{{Network: "netnetnetnet", Addrs: []string{"10.0.1.2"}}},
		Ports: []*shoalv1.Port{{Published: 8080, Target: 80, Protocol: "tcp", Mode: "ingress"}},
		Spec: &shoalv1.ServiceSpec{Name: "web", Replicas: 3, EndpointMode: "vip", Labels: map[string]string{"tier": "front"}, Networks: []*shoalv1.NetworkAttachment{{Network: "netnetnetnet"}},
			Task: &shoalv1.TaskSpec{Env: []string{"A=1"}, Container: &shoalv1.Container{Image: "nginx"}, Resources: &shoalv1.Resources{Memory: 64 << 20, NanoCpus: 5e8}}},
		UpdateStatus: &shoalv1.UpdateStatus{State: "paused", Message: "update paused due to failure"}}
	node := &shoalv1.NodeInfo{Id: "nodenodenode", Name: "node1", Role: "manager", Availability: "active", Status: "ready", Addr: "172.30.0.1", ControlPort: 2377, Platform: "linux/amd64", Leader: true, Labels: map[string]string{"disk": "ssd"}}
	task := &shoalv1.Task{Id: "tasktasktask", Name: "web.1.x", Service: "svcsvcsvcsvc", Slot: 1, Node: "nodenodenode", Desired: "running", Spec: svc.Spec.Task,
		Status: &shoalv1.TaskStatus{State: "running", Pid: 42}, Attachments: []*shoalv1.Attachment{{Network: "netnetnetnet", Addrs: []string{"10.0.1.3"}}}}
	ids := names{"netnetnetnet": "app", "nodenodenode": "node1"}
	show := func(format string, v any, docker func(int) (object, error)) string {
		t.Helper()
		var out bytes.Buffer
		c := &cli{out: &out}
		cmd := &cobra.Command{}
		c.inspectFlags(cmd)
		_ = cmd.Flags().Set("format", format)
		if err := inspected(c, cmd, []any{v}, docker); err != nil {
			return "error: " + err.Error()
		}
		return strings.TrimSuffix(out.String(), "\n")
	}
	js, err := toServiceJSON(svc, ids)
	if err != nil {
		t.Fatal(err)
	}
	jn, err := toNodeJSON(node)
	if err != nil {
		t.Fatal(err)
	}
	jt, err := toTaskJSON(task, ids, ids)
	if err != nil {
		t.Fatal(err)
	}
	jw, err := toNetworkJSON(nets[0])
	if err != nil {
		t.Fatal(err)
	}
	service := func(int) (object, error) { return dockerService(svc, nets) }
	of := func(int) (object, error) { return dockerNode(node) }
	container := func(int) (object, error) { return dockerTask(task, ids, ids) }
	network := func(int) (object, error) { return dockerNetwork(nets[0], []*shoalv1.Task{task}) }
	for _, tc := range []struct {
		v            any
		docker       func(int) (object, error)
		format, want string
	}{
		{js, service, "{{.Spec.Name}} {{.ID}}", "web svcsvcsvcsvc"},
		{js, service, "{{.Spec.Replicas}}", "3"}, // ours
		{js, service, "{{.Spec.Mode.Replicated.Replicas}}", "3"},
		{js, service, "{{.Spec.TaskTemplate.ContainerSpec.Image}}", "nginx"},
		{js, service, "{{range .Endpoint.VirtualIPs}}{{.Addr}} {{.NetworkID}}{{end}}", "10.0.1.2/24 netnetnetnet"},
		{js, service, "{{(index .Endpoint.Ports 0).PublishedPort}}", "8080"},
		{js, service, "{{.UpdateStatus.State}}: {{.UpdateStatus.Message}}", "paused: update paused due to failure"},
		{js, service, "{{.Spec.UpdateConfig.Order}} {{.Spec.UpdateConfig.Parallelism}}", "start-first 1"},
		{js, service, "{{.Spec.TaskTemplate.Resources.Limits.MemoryBytes}}", "67108864"},
		{js, service, `{{index .Spec.Labels "tier"}}`, "front"},
		{js, service, "{{json .Spec.EndpointSpec.Mode}}", `"vip"`},
		{jn, of, "{{.Status.State}} {{.Status.Addr}} {{.Spec.Role}}", "ready 172.30.0.1 manager"},
		{jn, of, "{{.Description.Hostname}} {{.Description.Platform.Architecture}}", "node1 x86_64"},
		{jn, of, "{{.ManagerStatus.Leader}} {{.ManagerStatus.Reachability}} {{.ManagerStatus.Addr}}", "true reachable 172.30.0.1:2377"},
		{jn, of, "{{.Spec.Labels.disk}}", "ssd"},
		{jt, container, "{{.State.Status}} {{.State.Running}} {{.State.Pid}}", "running true 42"},
		{jt, container, "{{range $k, $v := .NetworkSettings.Networks}}{{$k}}={{$v.IPAddress}}{{end}}", "app=10.0.1.3"},
		{jt, container, "{{.Config.Image}} {{.HostConfig.Memory}}", "nginx 67108864"},
		{jt, container, "{{.Status.ContainerStatus.PID}} {{.DesiredState}}", "42 running"},
		{jw, network, "{{range .IPAM.Config}}{{.Subnet}} {{.Gateway}}{{end}}", "10.0.1.0/24 10.0.1.1"},
		{jw, network, "{{range .Containers}}{{.Name}} {{.IPv4Address}}{{end}}", "web.1.x 10.0.1.3/24"},
	} {
		if got := show(tc.format, tc.v, tc.docker); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.format, got, tc.want)
		}
	}
	svc.UpdateStatus = nil
	if got := show("{{if .UpdateStatus}}updated{{else}}as created{{end}} {{json .PreviousSpec}}", js, service); got != "as created null" {
		t.Errorf("a service that was never updated: %q", got)
	}
	svc.UpdateStatus = &shoalv1.UpdateStatus{State: "paused", Message: "update paused due to failure"}
	if got := show("{{.Nothing.There}}", js, service); !strings.Contains(got, "error: ") {
		t.Errorf("a field of nobody's: %q", got)
	}
	var out bytes.Buffer
	if err := prettyService(&out, svc, ids); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Name:                web\n", " Replicas:           3 (2 running)\n", " State:              paused\n", " Update order:       start-first\n", " Image:              nginx\n", "CPU 0.5, memory 64MiB", "Networks:            app\n",
		"10.0.1.2 on app", " PublishedPort = 8080\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("pretty lacks %q:\n%s", want, out.String())
		}
	}
	out.Reset()
	if err := prettyNode(&out, node); err != nil || !strings.Contains(out.String(), " Leader:             Yes\n") || !strings.Contains(out.String(), " disk=ssd\n") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

// TestLabelsThatAreNotThere: a label that one thing has and another has not is no mistake
// in a template; a field that nothing has is.
func TestLabelsThatAreNotThere(t *testing.T) {
	v := object{"Spec": object{"Name": "web", "Labels": map[string]string{"a": "b"}}}
	for format, want := range map[string]string{
		"{{.Spec.Labels.a}}":                  "b",
		"{{.Spec.Name}}: {{.Spec.Labels.no}}": "web: <no value>",
		"{{index .Spec.Labels \"no\"}}.":      ".",
		"{{.Spec.Nmae}}":                      "",
		"{{.Labels.a}}":                       "",
	} {
		tmpl, err := newTemplate(format)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := fill(tmpl, v); got != want && want != "" || (err != nil) != (want == "") {
			t.Errorf("%s: %q, %v; want %q", format, got, err, want)
		}
	}
}
