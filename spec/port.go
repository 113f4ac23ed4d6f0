package spec

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Modes of a published port, the first two in Docker's words.
const (
	PortIngress = "ingress" // every node answers, and balances over all replicas
	PortHost    = "host"    // the task's node answers, for that task
	PortLocal   = "local"   // nodes with a replica answer, and balance over theirs
)

// Protocols of a published port.
const (
	TCP  = "tcp"
	UDP  = "udp"
	SCTP = "sctp"
)

// Dynamic ports: where a published port of 0 gets its number, as in Docker
// Swarm.
const (
	MinDynamicPort = 30000
	MaxDynamicPort = 32767
)

// Port is one published port.
type Port struct {
	Published uint16     `json:"published"` // on the node; 0: one from the dynamic ports
	Target    uint16     `json:"target"`    // in the task
	Protocol  string     `json:"protocol"`
	Mode      string     `json:"mode"`
	Addr      netip.Addr `json:"addr,omitzero"` // only this address of the node; zero: all
	// NAT lets servers see the node instead of the client.
	NAT bool `json:"nat,omitempty"`
}

// String is the port as "docker ps" shows it: "127.0.0.1:8080->80/tcp".
func (p Port) String() string {
	host := ""
	if p.Addr.IsValid() {
		host = netip.AddrPortFrom(p.Addr, p.Published).String()
	} else {
		host = fmt.Sprintf("*:%d", p.Published)
	}
	s := fmt.Sprintf("%s->%d/%s", host, p.Target, p.Protocol)
	if p.Mode != PortIngress {
		s += " (" + p.Mode + ")"
	}
	return s
}

// Clashes tells whether p and o can't both be published on one node.
func (p Port) Clashes(o Port) bool {
	return p.Published != 0 && p.Published == o.Published && p.Protocol == o.Protocol &&
		(!p.Addr.IsValid() || !o.Addr.IsValid() || p.Addr == o.Addr)
}

// Validate reports the first thing wrong.
func (p Port) Validate() error {
	switch {
	case p.Target == 0:
		return fmt.Errorf("published port %d: the target port is missing: use 1 to 65535", p.Published)
	case !slices.Contains([]string{TCP, UDP, SCTP}, p.Protocol):
		return fmt.Errorf("published port %d: protocol %q is unknown: use tcp, udp or sctp", p.Published, p.Protocol)
	case !slices.Contains([]string{PortIngress, PortHost, PortLocal}, p.Mode):
		return fmt.Errorf("published port %d: mode %q is unknown: use ingress, host or local", p.Published, p.Mode)
	case p.Addr.IsValid() && (p.Addr.IsUnspecified() || p.Addr.IsMulticast()):
		return fmt.Errorf("published port %d: address %s is not one of a node", p.Published, p.Addr)
	case p.Addr.IsValid() && p.Addr.Is6():
		return fmt.Errorf("published port %d: address %s: IPv6 is not supported yet", p.Published, p.Addr)
	}
	return nil
}

// MaxPorts is how many ports one service or task may publish.
const MaxPorts = 16384

// ValidatePorts reports the first port that is wrong or given twice.
func ValidatePorts(ports []Port) error {
	if len(ports) > MaxPorts {
		return fmt.Errorf("%d published ports are too many: publish at most %d", len(ports), MaxPorts)
	}
	type number struct {
		published uint16
		protocol  string
	}
	seen := map[number][]Port{}
	for _, p := range ports {
		if err := p.Validate(); err != nil {
			return err
		}
		k := number{p.Published, p.Protocol}
		if slices.ContainsFunc(seen[k], p.Clashes) {
			return fmt.Errorf("port %d/%s is published twice", p.Published, p.Protocol)
		}
		if p.Published != 0 {
			seen[k] = append(seen[k], p)
		}
	}
	return nil
}

// ComparePorts orders ports.
func ComparePorts(a, b Port) int {
	return cmp.Or(cmp.Compare(a.Published, b.Published), strings.Compare(a.Protocol, b.Protocol),
		a.Addr.Compare(b.Addr), cmp.Compare(a.Target, b.Target))
}
