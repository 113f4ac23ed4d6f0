package dns

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// Domain is the cluster's own.
const Domain = "shoal"

// hostDomain is what spec.HostName is in.
const hostDomain = "shoal.internal"

// gatewayName is what a network's gateway addresses are called in the domain.
const gatewayName = "gateway"

// Asker is a task that asks, and decides what it sees. It is never changed once
// it is given to a Server.
type Asker struct {
	Task     string   // ID
	Networks []string // IDs, in the order of its interfaces
	// NoForward: the task has no way out, so none of its questions leaves the
	// node by way of the node's own resolvers.
	NoForward bool
	// Upstreams are the task's own resolvers, asked in its namespace (Netns)
	// instead of the node's.
	Upstreams []netip.AddrPort
	Netns     string
	// Links are names of the asker's own: alias → name.
	Links map[string]string
	// Host is the address of the node, for [spec.HostName].
	Host netip.Addr
	// NDots: the task set the resolver option ndots to 1 or more, which asks for
	// single labels with a search domain first: a bare one that no network knows
	// is for nobody else (as in Docker).
	NDots bool
}

// target is one thing that an answer names: a virtual IP or a task.
type target struct {
	name    string // within its network
	network string // ID
	addrs   []netip.Addr
}

// find returns what a name (lower case, without the last dot) stands for, and
// whether it exists at all: a service without a replica does, and has none.
//
// Of several networks that know the name, the first that has something to show
// is taken, in the order of the asker's interfaces. The targets may be in buf,
// which must be empty and may be nil.
func (z *Zone) find(a *Asker, name string, buf []target) (targets []target, exists bool) {
	if to, ok := a.Links[name]; ok {
		name = lower(to)
	}
	name, own := cutDomain(name)
	for _, id := range a.Networks {
		if z.networks[id] == nil {
			continue
		}
		t, ok := z.on(buf, id, name, "")
		if len(t) > 0 {
			return t, true
		}
		exists = exists || ok
	}
	if exists {
		return nil, true
	}
	// The name may be qualified: NAME.NETWORK, NAME.NODE, NAME.NODE.NETWORK.
	// Names may hold dots themselves, so each is tried.
	for i := len(name) - 1; i > 0; i-- {
		if name[i] != '.' {
			continue
		}
		base, by := name[:i], name[i+1:]
		for _, id := range a.Networks {
			n := z.networks[id]
			if n == nil {
				continue
			}
			var t []target
			var ok bool
			if n.name == by {
				if t, ok = z.on(buf, id, base, ""); !ok {
					t, ok = z.onNode(buf, id, base)
				}
				if !ok && own && base == gatewayName {
					t, ok = []target{{gatewayName, id, n.gateways}}, true
				}
			} else if node, known := z.nodes[by]; known {
				t, ok = z.on(buf, id, base, node)
			}
			if len(t) > 0 {
				return t, true
			}
			exists = exists || ok
		}
	}
	return nil, exists
}

// onNode is on for NAME.NODE.
func (z *Zone) onNode(buf []target, network, name string) ([]target, bool) {
	for i := len(name) - 1; i > 0; i-- {
		if name[i] != '.' {
			continue
		}
		if node, ok := z.nodes[name[i+1:]]; ok {
			if t, ok := z.on(buf, network, name[:i], node); ok {
				return t, true
			}
		}
	}
	return nil, false
}

// named appends the replicas that a service's name stands for; with a node, what is
// there, with a slot, that one. Those that run and listen nowhere, as workers do,
// count only where no other is.
func (u *unit) named(out []target, network, node string, slot int) []target {
	had := len(out)
	for _, state := range [...]spec.EndpointState{spec.EndpointActive, spec.EndpointIdle} {
		for _, e := range u.eps {
			if e.state == state && (node == "" || e.node == node) && (slot == 0 || e.slot == slot) {
				out = append(out, target{e.name, network, e.addrs})
			}
		}
		if len(out) > had {
			break
		}
	}
	return out
}

// on returns what an unqualified name stands for on one network; with a node,
// only what is there.
func (z *Zone) on(buf []target, network, name, node string) ([]target, bool) {
	claims, _ := z.names.get(nameKey{network, name})
	if len(claims) == 0 {
		return z.slot(buf, network, name, node)
	}
	strong := slices.ContainsFunc(claims, func(c claim) bool { return c.kind != claimWeak })
	out := buf
	var starting []target
	here := node == ""
	for _, c := range claims {
		if c.kind == claimWeak && strong {
			continue
		}
		switch c.kind {
		case claimService, claimReplicas:
			if c.kind == claimService && node == "" && len(c.unit.vips) > 0 {
				out = append(out, target{c.unit.name, network, c.unit.vips})
				continue
			}
			here = true // a service is on every node, with or without a replica
			out = c.unit.named(out, network, node, 0)
		default:
			if node != "" && c.ep.node != node {
				continue
			}
			here = true
			t := target{c.ep.name, network, c.ep.addrs}
			// A task's own name is its address for as long as it has one. An
			// alias chooses among those that take new connections.
			switch {
			case c.kind != claimAlias || c.ep.state == spec.EndpointActive:
				out = append(out, t)
			case c.ep.state == spec.EndpointStarting || c.ep.state == spec.EndpointIdle:
				starting = append(starting, t)
			}
		}
	}
	if len(out) == 0 {
		out = starting
	}
	return z.trusted(network, out), here
}

// slot is on for NAME.N, the replica in slot N.
func (z *Zone) slot(buf []target, network, name, node string) ([]target, bool) {
	i := strings.LastIndexByte(name, '.')
	if i < 1 {
		return nil, false
	}
	n, err := strconv.Atoi(name[i+1:])
	if err != nil || n < 1 || name[i+1] == '0' || name[i+1] == '+' {
		return nil, false
	}
	claims, _ := z.names.get(nameKey{network, name[:i]})
	out := buf
	for _, c := range claims {
		if c.kind != claimService || c.unit.name != name[:i] {
			continue
		}
		// Of a replica and the one that follows it, the one that runs.
		out = c.unit.named(out, network, node, n)
	}
	return out, len(out) > 0
}

// trusted leaves out what is on nodes that are suspected to be dead, unless
// nothing else is there.
func (z *Zone) trusted(network string, in []target) []target {
	if len(z.suspect) == 0 || len(in) < 2 {
		return in
	}
	out := slices.DeleteFunc(slices.Clone(in), func(t target) bool {
		c, ok := z.addrs.get(addrKey{network, t.addrs[0]})
		return ok && c.ep != nil && z.suspect[c.ep.node]
	})
	if len(out) == 0 {
		return in
	}
	return out
}

// below tells whether a name that does not exist would be part of one that does:
// a replica that a service does not have, what is on a node where it is not, a
// port without a number. Nobody else can know such a name. Of what is below a
// name otherwise nothing is said: a service may be called like a top-level domain.
func (z *Zone) below(a *Asker, name string) bool {
	known := func(s string) bool {
		_, ok := z.find(a, s, nil)
		return ok
	}
	if rest, ok := strings.CutPrefix(name, "tasks."); ok && known(rest) {
		return true
	}
	// _PORT._PROTOCOL.NAME, and what is between it and NAME (RFC 8020).
	for rest, n := name, 0; n < 2 && strings.HasPrefix(rest, "_"); n++ {
		var label string
		label, rest, _ = strings.Cut(rest, ".")
		if isProtocol(label) && known(rest) {
			return true
		}
	}
	qualified := []string{name}
	for _, id := range a.Networks {
		if n := z.networks[id]; n != nil {
			if base, ok := strings.CutSuffix(name, "."+n.name); ok {
				qualified = append(qualified, base)
			}
		}
	}
	number := func(s string) bool {
		i := strings.LastIndexByte(s, '.')
		return i > 0 && isNumber(s[i+1:]) && known(s[:i])
	}
	for _, name := range qualified {
		if number(name) {
			return true
		}
		for i := len(name) - 1; i > 0; i-- {
			if name[i] == '.' {
				if _, ok := z.nodes[name[i+1:]]; ok && (known(name[:i]) || number(name[:i])) {
					return true
				}
			}
		}
	}
	return false
}

func isNumber(s string) bool {
	return s != "" && strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' }) < 0
}

// cutDomain takes the cluster's domain off a name and tells whether it was there.
func cutDomain(name string) (string, bool) {
	return strings.CutSuffix(name, "."+Domain)
}

// inDomain tells whether a name is in the cluster's own domain, or in that of
// its host name.
func inDomain(name string) bool {
	for _, d := range [...]string{Domain, hostDomain} {
		if name == d || strings.HasSuffix(name, "."+d) {
			return true
		}
	}
	return false
}

// fqdn is the canonical name of a target.
func (z *Zone) fqdn(t target) string {
	return t.name + "." + z.networks[t.network].name + "." + Domain + "."
}

// reverse answers for a name of in-addr.arpa or ip6.arpa (RFC 1035 section 3.5,
// RFC 3596 section 2.5). ours tells that it is of a network of this node, and
// not to be asked elsewhere; owner, with its last dot, is "" where the address
// is nobody's.
func (z *Zone) reverse(a *Asker, name string) (owner string, ours bool) {
	p, ok := parseReverse(name)
	if !ok {
		return "", false
	}
	for _, n := range z.networks {
		ours = ours || slices.ContainsFunc(n.subnets, func(s netip.Prefix) bool { return p.Bits() >= s.Bits() && s.Contains(p.Addr()) })
	}
	if !ours || !p.IsSingleIP() {
		return "", ours
	}
	for _, id := range a.Networks {
		n := z.networks[id]
		if n == nil {
			continue
		}
		if slices.Contains(n.gateways, p.Addr()) {
			return z.fqdn(target{name: gatewayName, network: id}), true
		}
		if c, ok := z.addrs.get(addrKey{id, p.Addr()}); ok {
			t := target{name: c.unit.name, network: id}
			if c.ep != nil {
				t.name = c.ep.name
			}
			return z.fqdn(t), true
		}
	}
	return "", true
}

// parseReverse returns the prefix that a name of the reverse tree stands for:
// a single address, or the part of the tree at an octet (IPv4) or nibble (IPv6).
func parseReverse(name string) (netip.Prefix, bool) {
	var b [16]byte
	if s, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		labels := strings.Split(s, ".")
		if len(labels) > 4 {
			return netip.Prefix{}, false
		}
		for i, l := range labels {
			n, err := strconv.ParseUint(l, 10, 8)
			if err != nil || strconv.FormatUint(n, 10) != l {
				return netip.Prefix{}, false
			}
			b[len(labels)-1-i] = byte(n)
		}
		return netip.PrefixFrom(netip.AddrFrom4([4]byte(b[:4])), 8*len(labels)), true
	}
	if s, ok := strings.CutSuffix(name, ".ip6.arpa"); ok {
		labels := strings.Split(s, ".")
		if len(labels) > 32 {
			return netip.Prefix{}, false
		}
		for i, l := range labels {
			n, err := strconv.ParseUint(l, 16, 4)
			if err != nil || len(l) != 1 {
				return netip.Prefix{}, false
			}
			k := len(labels) - 1 - i
			b[k/2] |= byte(n) << (4 - 4*(k%2))
		}
		return netip.PrefixFrom(netip.AddrFrom16(b), 4*len(labels)), true
	}
	return netip.Prefix{}, false
}

// parseSRV splits _PORT._PROTOCOL.NAME (RFC 2782). The port may be a number or
// a service's name in /etc/services (services(5)).
func parseSRV(name string) (port uint16, base string, ok bool) {
	svc, rest, ok1 := strings.Cut(name, ".")
	proto, base, ok2 := strings.Cut(rest, ".")
	if !ok1 || !ok2 || len(svc) < 2 || svc[0] != '_' || base == "" {
		return 0, "", false
	}
	if !isProtocol(proto) {
		return 0, "", false
	}
	if n, err := strconv.ParseUint(svc[1:], 10, 16); err == nil && n > 0 {
		return uint16(n), base, true
	}
	network := proto[1:]
	if network == "sctp" {
		network = "tcp" // net knows no other; numbers are registered for all alike (RFC 6335)
	}
	if n, err := net.LookupPort(network, svc[1:]); err == nil && n > 0 {
		return uint16(n), base, true
	}
	return 0, "", false
}

func isProtocol(label string) bool {
	return label == "_tcp" || label == "_udp" || label == "_sctp"
}

// loopback answers for localhost, its subdomains and the addresses of
// 127.0.0.0/8 and ::1, which a resolver must not ask anyone for (RFC 6761
// section 6.3, RFC 6303 section 4).
func loopback(name string) (addrs []netip.Addr, owner string, ok bool) {
	if name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}, "", true
	}
	if p, isReverse := parseReverse(name); isReverse && p.IsSingleIP() && p.Addr().IsLoopback() {
		return nil, "localhost.", true
	}
	return nil, "", false
}
