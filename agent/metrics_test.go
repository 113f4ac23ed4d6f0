package agent

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
)

func TestFlowsAreOfServicesNotOfTasks(t *testing.T) {
	var f flows
	rx := func(task, label string, n float64) taskFlow {
		return taskFlow{task, label, flow{rxBytes: n, now: 1}}
	}
	for i, step := range []struct {
		tasks []taskFlow
		want  map[string]float64
	}{
		{[]taskFlow{rx("a", "web", 10), rx("b", "web", 5), rx("c", noService, 1)}, map[string]float64{"web": 15, noService: 1}},
		{[]taskFlow{rx("a", "web", 12), rx("b", "web", 5), rx("c", noService, 1)}, map[string]float64{"web": 17, noService: 1}},
		{[]taskFlow{rx("b", "web", 6), rx("d", "web", 3)}, map[string]float64{"web": 21}}, // a was replaced by d: what it had stays
		{[]taskFlow{rx("b", "web", 2), rx("d", "web", 3)}, map[string]float64{"web": 23}}, // b has a new namespace
		{nil, map[string]float64{}},
		{[]taskFlow{rx("e", "web", 4)}, map[string]float64{"web": 4}},
	} {
		got := f.add(step.tasks)
		if len(got) != len(step.want) {
			t.Errorf("step %d: %v, want %v", i, got, step.want)
		}
		for label, want := range step.want {
			if got[label].rxBytes != want {
				t.Errorf("step %d: %s has %v, want %v", i, label, got[label].rxBytes, want)
			}
		}
		if i < 2 && got["web"].now != 2 {
			t.Errorf("step %d: %v connections, want 2", i, got["web"].now)
		}
	}
}

// fixed is a Collector of what fn emits.
type fixed func(emit)

func (fixed) Describe(chan<- *prometheus.Desc)      {}
func (f fixed) Collect(ch chan<- prometheus.Metric) { f(emit{ch}) }

func TestVIPMetrics(t *testing.T) {
	a := netip.MustParseAddr
	v := &spec.View{Networks: []spec.Network{{ID: "n1", Name: "app"}},
		Services: []spec.Service{{ID: "s1", Spec: spec.ServiceSpec{Name: "web"}, VIPs: []spec.VIPs{{Network: "n1", Addrs: []netip.Addr{a("10.0.1.2"), a("fd00::2")}}}},
			{ID: "s2", Spec: spec.ServiceSpec{Name: "db"}, VIPs: []spec.VIPs{{Network: "n1", Addrs: []netip.Addr{a("10.0.1.3")}}}}}}
	s := vip.State{Networks: []vip.Network{{ID: "n1", Servers: []vip.Server{
		{VIP: a("10.0.1.2"), Open: true, Backends: []vip.Backend{{Addr: a("10.0.1.5"), Weight: 1}, {Addr: a("10.0.1.6"), Weight: 1}, {Addr: a("10.0.1.7")}}},
		{VIP: a("10.0.1.3"), Fault: "not on lo"},
		{VIP: a("10.0.1.9"), Open: true, Backends: []vip.Backend{{Addr: a("10.0.1.5"), Weight: 1}}}, // of a service that is gone
		{VIP: a("fd00::2"), Open: true, Backends: []vip.Backend{{Addr: a("fd00::5"), Weight: 1}, {Addr: a("fd00::6"), Weight: 1}}},
	}}}}
	want := `
# HELP shoal_vip_backends Backends of virtual IPs as this node's kernel has them.
# TYPE shoal_vip_backends gauge
shoal_vip_backends{state="active"} 5
shoal_vip_backends{state="draining"} 1
# HELP shoal_vip_faults Virtual IPs and networks whose state in the kernel is not as it should be.
# TYPE shoal_vip_faults gauge
shoal_vip_faults 1
# HELP shoal_vip_servers Virtual IPs as this node's kernel has them: open ones balance, others refuse.
# TYPE shoal_vip_servers gauge
shoal_vip_servers{state="open"} 3
shoal_vip_servers{state="refusing"} 1
# HELP shoal_vip_service_backends Backends of a service that take new connections, as this node's kernel has them.
# TYPE shoal_vip_service_backends gauge
shoal_vip_service_backends{network="app",service="db"} 0
shoal_vip_service_backends{network="app",service="web"} 2
`
	reg := prometheus.NewRegistry()
	reg.MustRegister(fixed(func(out emit) { collectVIPs(out, v, s) }))
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want)); err != nil {
		t.Error(err)
	}

	// However many services there are, their series have a bound, and the sum is whole.
	v, s = &spec.View{Networks: v.Networks}, vip.State{Networks: []vip.Network{{ID: "n1"}}}
	const n = control.MaxServiceSeries + 500
	for i := range n {
		ip := netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
		v.Services = append(v.Services, spec.Service{Spec: spec.ServiceSpec{Name: fmt.Sprintf("s%05d", i)}, VIPs: []spec.VIPs{{Network: "n1", Addrs: []netip.Addr{ip}}}})
		s.Networks[0].Servers = append(s.Networks[0].Servers, vip.Server{VIP: ip, Open: true, Backends: []vip.Backend{{Addr: ip, Weight: 1}}})
	}
	reg = prometheus.NewRegistry()
	reg.MustRegister(fixed(func(out emit) { collectVIPs(out, v, s) }))
	fams, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum, series := 0.0, 0
	for _, f := range fams {
		if f.GetName() == "shoal_vip_service_backends" {
			series = len(f.Metric)
			for _, m := range f.Metric {
				sum += m.GetGauge().GetValue()
			}
		}
	}
	if series != control.MaxServiceSeries+1 || sum != n {
		t.Errorf("%d services: %d series, sum %v", n, series, sum)
	}
}

func TestMetricsAddr(t *testing.T) {
	for addr, says := range map[string]string{
		"": "", ":9947": "", "127.0.0.1:9947": "", "[::1]:9947": "", "localhost:9947": "",
		"9947": "no port", "127.0.0.1": "no port", "::1:9947:x": "no port", "web:9947": "no IP address", "127.0.0.1:": "1 to 65535",
		"127.0.0.1:0": "1 to 65535", "127.0.0.1:70000": "1 to 65535", "127.0.0.1:http": "1 to 65535", ":2377": "--control-port", ":7946": "--gossip-port",
	} {
		err := Config{MetricsAddr: addr, ControlPort: 2377, GossipPort: 7946}.validateMetricsAddr()
		if says == "" && err != nil || says != "" && (err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "--metrics-addr")) {
			t.Errorf("%q: %v, want %q", addr, err, says)
		}
	}
}
