// Package dnstest makes tables of names to measure with.
package dnstest

import (
	"fmt"
	"net/netip"

	"github.com/shoalnet/shoal/spec"
)

// Services and Replicas are the size of the table that the figures of
// docs/PERFORMANCE.md are of.
const Services, Replicas = 10_000, 10

// Network is the ID and the name of the only network of Large.
const Network = "net"

// Service is the name of a service of Large.
func Service(i int) string { return fmt.Sprintf("svc%d", i) }

// Large is a View of so many services of so many active replicas each.
func Large(services, replicas int) *spec.View {
	v := &spec.View{Networks: []spec.Network{{ID: Network, Name: Network, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}}
	n := uint32(1)
	addr := func() []netip.Addr {
		n++
		return []netip.Addr{netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})}
	}
	for i := range services {
		name := Service(i)
		s := spec.Service{ID: fmt.Sprintf("s%011d", i), Spec: spec.ServiceSpec{Name: name, Networks: []spec.NetworkAttachment{{Network: Network}}},
			VIPs: []spec.VIPs{{Network: Network, Addrs: addr()}}}
		v.Services = append(v.Services, s)
		for k := range replicas {
			id := fmt.Sprintf("t%07d%04d", i, k)
			v.Endpoints = append(v.Endpoints, spec.Endpoint{Task: id, TaskName: fmt.Sprintf("%s.%d.%s", name, k+1, id), Hostname: fmt.Sprintf("%s-%d-%s", name, k+1, id),
				Service: s.ID, Slot: k + 1, Network: Network, Node: fmt.Sprintf("n%d", k), Addrs: addr(), State: spec.EndpointActive})
		}
	}
	v.Sort()
	return v
}
