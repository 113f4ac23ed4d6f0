package agent

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/spec"
)

func TestFaultsOf(t *testing.T) {
	a := &assignment{
		Networks: []spec.Network{{ID: "n1", Name: "app"}, {ID: "n2", Name: "back"}},
		Services: []spec.Service{{ID: "s1", Spec: spec.ServiceSpec{Name: "web"},
			VIPs: []spec.VIPs{{Network: "n1", Addrs: []netip.Addr{netip.MustParseAddr("10.0.1.2")}}}}},
		Tasks: []spec.Task{{ID: "t1", Name: "web.1.x", Service: "s1"}, {ID: "t2", Name: "c1"}},
	}
	for object, want := range map[string]string{
		"service web: port 8080/tcp":             "s1",
		"service web: port 8080/tcp and 12 more": "s1",
		"service gone: port 8080/tcp":            "",
		"task web.1.x: port 8080/tcp is free":    "s1",
		"task c1: port 8080/tcp is free":         "t2",
		"task c2: port 8080/tcp is free":         "",
		"network app: vip 10.0.1.2":              "s1",
		"network app: vip 10.0.1.3":              "",
		"network back: vip 10.0.1.2":             "",
		"network app: vip table":                 "",
		"network app: host route 10.0.1.2":       "",
		"node: ingress table":                    "",
		"":                                       "",
	} {
		fs := faultsOf(a, []reconcile.ObjectStatus{{Object: object, Phase: reconcile.Failed, Err: "no"}})
		got := ""
		if len(fs) == 1 {
			got = fs[0].Object
		}
		if got != want || len(fs) > 1 {
			t.Errorf("%q: %v, want %q", object, fs, want)
		}
	}
	many := make([]reconcile.ObjectStatus, 1000)
	for i := range many {
		many[i] = reconcile.ObjectStatus{Object: "service web: x", Err: strings.Repeat("é", 1000)}
	}
	fs := faultsOf(a, many)
	if len(fs) != maxFaults || len(fs[0].Message) > maxFaultBytes || strings.Trim(fs[0].Message, "é") != "" {
		t.Errorf("%d faults, the first %q", len(fs), fs[0].Message)
	}
	if faultsOf(nil, many) != nil {
		t.Error("faults before the first assignment")
	}
}
