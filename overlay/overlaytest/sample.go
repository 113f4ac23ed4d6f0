package overlaytest

import (
	"net/netip"

	"github.com/shoalnet/shoal/spec"
)

// IDs of the objects in [Sample].
const (
	SelfID, PeerB, PeerC = "nodeaaaaaaaa", "nodebbbbbbbb", "nodecccccccc"
	NetApp, NetDB        = "netapp222222", "netdb3333333"
	TaskWeb, TaskJob     = "taskweb22222", "taskjob33333"
)

// Sample is a View with everything in it: a network with a way out and one
// without, a task on both and one on the first, endpoints on two other nodes, a
// service. Its networks have subnets of both families if v6 is set. VNIs count
// from vni, task namespaces begin with the instance.
func Sample(instance string, under spec.Underlay, vni uint32, v6 bool) *spec.View {
	v := &spec.View{Self: SelfID, Instance: instance, Complete: true, Underlay: under}
	third := under.Addr.Next().Next()
	v.Peers = []spec.Peer{
		{ID: SelfID, Name: "node1", Number: 1, Addr: under.Addr, ControlPort: 2377, GossipPort: 7946, MTU: 1500},
		{ID: PeerB, Name: "node2", Number: 2, Addr: under.Addr.Next(), ControlPort: 2378, GossipPort: 7946},
		{ID: PeerC, Name: "node3", Number: 3, Addr: third, Liveness: spec.PeerSuspect, MTU: 1340},
	}
	app := spec.Network{ID: NetApp, Name: "app", Driver: spec.DriverOverlay, VNI: vni,
		Subnets: prefixes("10.91.1.0/24"), Gateways: Addrs("10.91.1.1")}
	db := spec.Network{ID: NetDB, Name: "db", Driver: spec.DriverOverlay, VNI: vni + 1, MTU: 1300, Internal: true,
		Subnets: prefixes("10.91.2.0/24"), Gateways: Addrs("10.91.2.1")}
	webApp, webDB, job := Addrs("10.91.1.10"), Addrs("10.91.2.10"), Addrs("10.91.1.11")
	if v6 {
		app.Subnets, app.Gateways = append(app.Subnets, prefixes("fd91:1::/64")...), append(app.Gateways, Addrs("fd91:1::1")...)
		webApp, job = append(webApp, Addrs("fd91:1::10")...), append(job, Addrs("fd91:1::11")...)
	}
	v.Networks = []spec.Network{app, db}
	v.Services = []spec.Service{{ID: "svcweb222222", Spec: spec.ServiceSpec{Name: "web", EndpointMode: spec.EndpointModeVIP,
		Networks: []spec.NetworkAttachment{{Network: NetApp}}}, VIPs: []spec.VIPs{{Network: NetApp, Addrs: Addrs("10.91.1.2")}}}}
	v.Sandboxes = []spec.Sandbox{
		{Task: TaskWeb, Name: "web.1", Netns: instance + "-task-web.1", DNSPort: 10053,
			Attachments: []spec.Attachment{{Network: NetDB, Addrs: webDB}, {Network: NetApp, Addrs: webApp}}},
		{Task: TaskJob, Name: "job", Netns: instance + "-task-job",
			Attachments: []spec.Attachment{{Network: NetApp, Addrs: job}}},
	}
	v.Endpoints = []spec.Endpoint{
		{Task: TaskWeb, Network: NetApp, Addrs: webApp, Node: SelfID, State: spec.EndpointActive},
		{Task: "taskb2222222", Network: NetApp, Addrs: Addrs("10.91.1.20"), Node: PeerB, State: spec.EndpointActive},
		{Task: "taskb3333333", Network: NetApp, Addrs: Addrs("10.91.1.21"), Node: PeerB, State: spec.EndpointStarting},
		{Task: "taskc2222222", Network: NetApp, Addrs: Addrs("10.91.1.30"), Node: PeerC, State: spec.EndpointDraining},
		{Task: "taskc2222222", Network: NetDB, Addrs: Addrs("10.91.2.30"), Node: PeerC, State: spec.EndpointActive},
	}
	if v6 {
		v.Endpoints[1].Addrs = append(v.Endpoints[1].Addrs, Addrs("fd91:1::20")...)
	}
	v.Sort()
	return v
}

// Addrs parses addresses; it panics on what is none.
func Addrs(ss ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range ss {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(ss ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
