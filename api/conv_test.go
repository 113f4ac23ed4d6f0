package api

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

func addr(t *rapid.T, label string) netip.Addr {
	if rapid.Bool().Draw(t, label+"6") {
		return netip.AddrFrom16([16]byte(append([]byte{0xfd}, rapid.SliceOfN(rapid.Byte(), 15, 15).Draw(t, label)...)))
	}
	return netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, label)))
}

func addrs(t *rapid.T, label string) []netip.Addr {
	var out []netip.Addr
	for range rapid.IntRange(0, 3).Draw(t, label+"n") {
		out = append(out, addr(t, label))
	}
	return out
}

func strs(t *rapid.T, label string) []string {
	if s := rapid.SliceOfN(rapid.StringN(0, 8, 16), 0, 3).Draw(t, label); len(s) > 0 {
		return s
	}
	return nil
}

func labels(t *rapid.T) map[string]string {
	if m := rapid.MapOfN(rapid.StringN(1, 5, 9), rapid.StringN(0, 5, 9), 0, 3).Draw(t, "labels"); len(m) > 0 {
		return m
	}
	return nil
}

func health(t *rapid.T) *spec.HealthCheck {
	if !rapid.Bool().Draw(t, "has health check") {
		return nil
	}
	ms := func(what string) time.Duration {
		return time.Duration(rapid.IntRange(0, 99999).Draw(t, what)) * time.Millisecond
	}
	return &spec.HealthCheck{Command: rapid.String().Draw(t, "health command"), Interval: ms("interval"), Timeout: ms("timeout"),
		StartPeriod: ms("start period"), StartInterval: ms("start interval"), Retries: rapid.IntRange(0, 9).Draw(t, "retries")}
}

func taskSpec(t *rapid.T) spec.TaskSpec {
	return spec.TaskSpec{Command: strs(t, "command"), Env: strs(t, "env"), Dir: "/d", User: "u", Hostname: "h", Labels: labels(t), StopSignal: "SIGINT", Health: health(t),
		StopGrace: time.Duration(rapid.IntRange(0, 99999).Draw(t, "grace")) * time.Millisecond}
}

func TestRoundTrips(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := spec.Network{ID: "i", Name: "n", Driver: "overlay", Labels: labels(t), Gateways: addrs(t, "gw"), VNI: rapid.Uint32().Draw(t, "vni"), MTU: 1400, Internal: true,
			Options: labels(t), Version: 7, Created: 9, Subnets: []netip.Prefix{netip.PrefixFrom(addr(t, "subnet"), 24)}}
		if got, err := ToNetwork(Network(n)); err != nil || !reflect.DeepEqual(got, n) {
			t.Fatalf("network %+v → %+v, %v", n, got, err)
		}
		s := spec.Service{ID: "i", Version: 3, Created: 4, VIPs: []spec.VIPs{{Network: "x", Addrs: addrs(t, "vip")}},
			Spec: spec.ServiceSpec{Name: "web", Labels: labels(t), Replicas: 5, EndpointMode: "vip", Constraints: strs(t, "constraints"), Task: taskSpec(t),
				RestartDelay: time.Second, RestartMax: 2, Networks: []spec.NetworkAttachment{{Network: "x", Aliases: strs(t, "aliases"), Addrs: addrs(t, "addrs")}}}}
		if got, err := ToService(Service(s, 1)); err != nil || !reflect.DeepEqual(got, s) {
			t.Fatalf("service %+v → %+v, %v", s, got, err)
		}
		k := spec.Task{ID: "i", Name: "t", Service: "s", Slot: 1, Node: "n", Spec: taskSpec(t), Desired: "running", Version: 1, Created: 2, NotBefore: 3, Attempt: 4,
			Attachments: []spec.Attachment{{Network: "x", Addrs: addrs(t, "a"), Aliases: strs(t, "al")}},
			Status:      spec.TaskStatus{State: spec.TaskState(rapid.IntRange(0, int(spec.TaskLost)).Draw(t, "state")), Message: "m", ExitCode: 3, PID: 4, At: 5, Released: true}}
		if got, err := ToTask(Task(k)); err != nil || !reflect.DeepEqual(got, k) {
			t.Fatalf("task %+v → %+v, %v", k, got, err)
		}
		o := spec.Node{ID: "i", Name: "n", Number: 3, Role: "manager", Availability: "active", Labels: labels(t), Addr: addr(t, "addr"), ControlPort: 1, GossipPort: 2,
			Status: "ready", Message: "m", Version: 1, Created: 2, DataPath: "nft"}
		if got, err := ToNode(Node(o)); err != nil || !reflect.DeepEqual(got, o) {
			t.Fatalf("node %+v → %+v, %v", o, got, err)
		}
	})
}

func TestBadTextIsNamed(t *testing.T) {
	_, err1 := ToNetwork(&shoalv1.Network{Subnets: []string{"10.0.0.0"}})
	_, err2 := ToTask(&shoalv1.Task{Name: "c1", Status: &shoalv1.TaskStatus{State: "asleep"}})
	_, err3 := ToNode(&shoalv1.NodeInfo{Name: "n1", Addr: "here"})
	_, err4 := ToServiceSpec(&shoalv1.ServiceSpec{Networks: []*shoalv1.NetworkAttachment{{Network: "app", Addrs: []string{"x"}}}})
	for want, err := range map[string]error{"subnet: \"10.0.0.0\"": err1, "asleep": err2, "node n1: \"here\"": err3, "network app: \"x\"": err4} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
	// nil messages are the zero value, never a panic.
	if _, err := ToService(nil); err != nil {
		t.Error(err)
	}
	_, _ = ToTask(nil)
}
