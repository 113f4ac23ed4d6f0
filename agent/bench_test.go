package agent

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/shoalnet/shoal/dns/dnstest"
	"github.com/shoalnet/shoal/gossip"
	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
)

// BenchmarkView is what one change costs before any kernel is looked at: a View
// of 10,000 services with ten replicas each, all on networks of this node, and
// what is wanted of each reconciler by it.
func BenchmarkView(b *testing.B) {
	large := dnstest.Large(dnstest.Services, dnstest.Replicas)
	in := inputs{self: "n1", adopted: true, underlay: spec.Underlay{Addr: netip.MustParseAddr("192.0.2.1"), VXLANPort: 4789},
		assigned: &assignment{Index: 1, Networks: large.Networks, Services: large.Services}, gossip: &gossip.Snapshot{Endpoints: large.Endpoints, Synced: true}}
	for i := range dnstest.Replicas {
		in.gossip.Members = append(in.gossip.Members, gossip.Member{Peer: spec.Peer{ID: fmt.Sprintf("n%d", i), Name: fmt.Sprintf("node%d", i), Number: i + 1,
			Addr: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}})
		m := in.gossip.Members[i]
		in.assigned.Nodes = append(in.assigned.Nodes, spec.Node{ID: m.Peer.ID, Name: m.Peer.Name, Number: m.Number, Addr: m.Addr})
	}
	for i := range large.Networks {
		large.Networks[i].VNI = uint32(4097 + i)
		in.sandboxes = append(in.sandboxes, spec.Sandbox{Task: "t", Attachments: []spec.Attachment{{Network: large.Networks[i].ID}}})
	}
	v := compose(in)
	if len(v.Endpoints) != len(large.Endpoints) || len(v.Services) != len(large.Services) {
		b.Fatalf("%d endpoints, %d services", len(v.Endpoints), len(v.Services))
	}
	made := routesOf(v)
	for name, fn := range map[string]func(){
		"compose": func() { compose(in) },
		"hold":    func() { hold(v, made) },
		"routes":  func() { routesOf(v) },
		"overlay": func() { overlay.Desired(v) },
		"vip":     func() { vip.Desired(v) },
		"ingress": func() { ingress.Desired(v) },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				fn()
			}
		})
	}
}
