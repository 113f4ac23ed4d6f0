package dns

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// Zone is what names stand for at one moment. It is never changed once made.
type Zone struct {
	networks map[string]*network // by ID
	nodes    map[string]string   // name in lower case → ID
	suspect  map[string]bool     // node IDs

	units *table[unitKey, *unit]
	names *table[nameKey, []claim]
	addrs *table[addrKey, claim]

	services  []spec.Service  // of the View, by ID
	endpoints []spec.Endpoint // of the View, in order of compareEndpoints
}

type (
	unitKey struct{ id, network string } // id: of a service, or of a task without one
	nameKey struct{ network, name string }
	addrKey struct {
		network string
		addr    netip.Addr
	}
)

type network struct {
	name     string // lower case
	gateways []netip.Addr
	subnets  []netip.Prefix
}

// unit is a service on one network with its endpoints there, or a task without
// a service. It is never changed once made.
type unit struct {
	key     unitKey
	name    string // of the service, lower case; "" where it is unknown
	vips    []netip.Addr
	aliases []string // lower case
	eps     []*endpoint
}

type endpoint struct {
	task     string // ID
	name     string // lower case
	hostname string // lower case
	aliases  []string
	slot     int
	node     string
	addrs    []netip.Addr
	state    spec.EndpointState
}

// kind tells how a claim uses its unit.
type kind uint8

const (
	claimService  kind = iota // the VIP, or the replicas
	claimReplicas             // tasks.NAME: the replicas
	claimTask                 // one task by its name
	claimAlias                // one task by an alias
	claimWeak                 // one task by its ID or host name: only where no other claim is
	claimVIP                  // of an address
)

// claim is one thing that a name, or an address, stands for.
type claim struct {
	unit *unit
	ep   *endpoint // of claimTask, claimAlias, claimWeak
	kind kind
}

// ZoneOptions are what names need beside the View.
type ZoneOptions struct {
	Nodes []spec.Node // whose names may qualify others
}

var emptyZone = &Zone{units: newTable[unitKey, *unit](), names: newTable[nameKey, []claim](), addrs: newTable[addrKey, claim]()}

// NewZone indexes a View from scratch.
func NewZone(v *spec.View, o ZoneOptions) *Zone { return emptyZone.Update(v, o) }

// Update returns the Zone of a later View; z stays as it is. What it costs
// grows with what has changed between the two, apart from one comparison of
// each endpoint.
func (z *Zone) Update(v *spec.View, o ZoneOptions) *Zone {
	out := &Zone{networks: make(map[string]*network, len(v.Networks)), nodes: map[string]string{}, services: v.Services, endpoints: v.Endpoints}
	for _, n := range v.Networks {
		out.networks[n.ID] = &network{name: lower(n.Name), gateways: n.Gateways, subnets: n.Subnets}
	}
	for _, n := range o.Nodes {
		out.nodes[lower(n.Name)] = n.ID
	}
	for _, p := range v.Peers {
		out.nodes[lower(p.Name)] = p.ID
		if p.Liveness == spec.PeerSuspect {
			if out.suspect == nil {
				out.suspect = map[string]bool{}
			}
			out.suspect[p.ID] = true
		}
	}
	if !sorted(out.endpoints, compareEndpoints) {
		out.endpoints = slices.Clone(out.endpoints)
		slices.SortFunc(out.endpoints, func(a, b spec.Endpoint) int { return compareEndpoints(&a, &b) })
	}

	changes := map[unitKey]*unitChange{}
	touch := func(k unitKey) *unitChange {
		c := changes[k]
		if c == nil {
			c = &unitChange{}
			changes[k] = c
		}
		return c
	}
	merge(z.services, out.services, compareServices, equalServices, func(old, new *spec.Service) {
		for _, s := range []*spec.Service{old, new} {
			if s == nil {
				continue
			}
			for _, a := range s.Spec.Networks {
				touch(unitKey{s.ID, a.Network}).service = new
				touch(unitKey{s.ID, a.Network}).serviceChanged = true
			}
		}
	})
	merge(z.endpoints, out.endpoints, compareEndpoints, equalEndpoints, func(old, new *spec.Endpoint) {
		if old != nil {
			c := touch(unitOf(*old))
			c.remove = append(c.remove, old.Task)
		}
		if new != nil {
			c := touch(unitOf(*new))
			c.add = append(c.add, newEndpoint(*new))
		}
	})

	e := edits{
		units: edit[unitKey, *unit]{from: z.units},
		names: edit[nameKey, []claim]{from: z.names},
		addrs: edit[addrKey, claim]{from: z.addrs},
	}
	// Old claims go before new ones come, so that an address or a name that
	// moves from one unit to another does not end with neither.
	type swap struct{ old, new *unit }
	swaps := make([]swap, 0, len(changes))
	for k, c := range changes {
		old, _ := e.units.get(k)
		swaps = append(swaps, swap{old, c.apply(k, old)})
		e.withdraw(old)
	}
	for _, s := range swaps {
		e.claim(s.new)
		switch {
		case s.new != nil:
			e.units.set(s.new.key, s.new)
		case s.old != nil:
			e.units.del(s.old.key)
		}
	}
	out.units, out.names, out.addrs = e.units.done(), e.names.done(), e.addrs.done()
	return out
}

// unitOf tells which unit an endpoint is of.
func unitOf(e spec.Endpoint) unitKey {
	return unitKey{cmp.Or(e.Service, e.Task), e.Network}
}

// unitChange is how a unit differs from what it was.
type unitChange struct {
	serviceChanged bool
	service        *spec.Service // as it is now, if serviceChanged; nil: gone
	remove         []string      // tasks
	add            []*endpoint
}

// apply returns the unit after the change; nil when nothing is left of it.
func (c *unitChange) apply(k unitKey, old *unit) *unit {
	u := &unit{key: k}
	if old != nil {
		*u = *old
	}
	if c.serviceChanged {
		u.name, u.vips, u.aliases = "", nil, nil
		if s := c.service; s != nil && s.On(k.network) {
			u.name, u.vips, u.aliases = lower(s.Spec.Name), s.VIPsOn(k.network), lowerAll(s.AliasesOn(k.network))
		}
	}
	if len(c.remove)+len(c.add) > 0 {
		u.eps = slices.DeleteFunc(slices.Clone(u.eps), func(e *endpoint) bool { return slices.Contains(c.remove, e.task) })
		u.eps = append(u.eps, c.add...)
		slices.SortFunc(u.eps, func(a, b *endpoint) int {
			return cmp.Or(cmp.Compare(a.slot, b.slot), strings.Compare(a.task, b.task))
		})
	}
	if u.name == "" && len(u.eps) == 0 {
		return nil
	}
	return u
}

func newEndpoint(e spec.Endpoint) *endpoint {
	return &endpoint{task: e.Task, name: lower(e.TaskName), hostname: lower(e.Hostname), aliases: lowerAll(e.Aliases),
		slot: e.Slot, node: e.Node, addrs: e.Addrs, state: e.State}
}

type edits struct {
	units edit[unitKey, *unit]
	names edit[nameKey, []claim]
	addrs edit[addrKey, claim]
}

// each calls fn with every name that a unit claims, once each.
func (u *unit) each(fn func(name string, c claim)) {
	if u.name != "" {
		fn(u.name, claim{u, nil, claimService})
		fn("tasks."+u.name, claim{u, nil, claimReplicas})
		for i, a := range u.aliases {
			if a != u.name && !slices.Contains(u.aliases[:i], a) {
				fn(a, claim{u, nil, claimService})
				fn("tasks."+a, claim{u, nil, claimReplicas})
			}
		}
	}
	for _, e := range u.eps {
		fn(e.name, claim{u, e, claimTask})
		if u.key.id == e.task {
			// Aliases of a replica are its service's, which answers for them.
			for i, a := range e.aliases {
				if a != e.name && !slices.Contains(e.aliases[:i], a) {
					fn(a, claim{u, e, claimAlias})
				}
			}
		}
		fn(e.task, claim{u, e, claimWeak})
		if e.hostname != "" && e.hostname != e.name && e.hostname != e.task {
			fn(e.hostname, claim{u, e, claimWeak})
		}
	}
}

func (u *unit) eachAddr(fn func(netip.Addr, claim)) {
	for _, a := range u.vips {
		fn(a, claim{u, nil, claimVIP})
	}
	for _, e := range u.eps {
		for _, a := range e.addrs {
			fn(a, claim{u, e, claimTask})
		}
	}
}

func (e *edits) claim(u *unit) {
	if u == nil {
		return
	}
	u.each(func(name string, c claim) {
		k := nameKey{u.key.network, name}
		have, _ := e.names.get(k)
		// Never in place: the old slice is in the last Zone.
		e.names.set(k, append(slices.Clip(have), c))
	})
	u.eachAddr(func(a netip.Addr, c claim) { e.addrs.set(addrKey{u.key.network, a}, c) })
}

func (e *edits) withdraw(u *unit) {
	if u == nil {
		return
	}
	u.each(func(name string, _ claim) {
		k := nameKey{u.key.network, name}
		have, _ := e.names.get(k)
		left := slices.DeleteFunc(slices.Clone(have), func(c claim) bool { return c.unit == u })
		if len(left) == 0 {
			e.names.del(k)
		} else {
			e.names.set(k, left)
		}
	})
	u.eachAddr(func(a netip.Addr, _ claim) {
		k := addrKey{u.key.network, a}
		if c, ok := e.addrs.get(k); ok && c.unit == u {
			e.addrs.del(k)
		}
	})
}

// merge walks two sorted lists and tells of each element that is in one only or
// that differs. Of elements that compare as equal only the first counts. There
// are very many and they are large: they are not copied.
func merge[T any](old, new []T, compare func(a, b *T) int, equal func(a, b *T) bool, fn func(old, new *T)) {
	for i, j := 0, 0; i < len(old) || j < len(new); {
		c := 0
		switch {
		case i == len(old):
			c = 1
		case j == len(new):
			c = -1
		default:
			c = compare(&old[i], &new[j])
		}
		switch {
		case c < 0:
			fn(&old[i], nil)
			i = next(old, i, compare)
		case c > 0:
			fn(nil, &new[j])
			j = next(new, j, compare)
		default:
			if !equal(&old[i], &new[j]) {
				fn(&old[i], &new[j])
			}
			i, j = next(old, i, compare), next(new, j, compare)
		}
	}
}

// next is the index of the first element after i that is another.
func next[T any](s []T, i int, compare func(a, b *T) int) int {
	k := i + 1
	for k < len(s) && compare(&s[i], &s[k]) == 0 {
		k++
	}
	return k
}

func sorted[T any](s []T, compare func(a, b *T) int) bool {
	for i := 1; i < len(s); i++ {
		if compare(&s[i-1], &s[i]) > 0 {
			return false
		}
	}
	return true
}

func compareServices(a, b *spec.Service) int { return strings.Compare(a.ID, b.ID) }

// equalServices compares what names depend on.
func equalServices(a, b *spec.Service) bool {
	return a.Spec.Name == b.Spec.Name &&
		slices.EqualFunc(a.VIPs, b.VIPs, func(x, y spec.VIPs) bool {
			return x.Network == y.Network && slices.Equal(x.Addrs, y.Addrs)
		}) &&
		slices.EqualFunc(a.Spec.Networks, b.Spec.Networks, func(x, y spec.NetworkAttachment) bool {
			return x.Network == y.Network && slices.Equal(x.Aliases, y.Aliases)
		})
}

func compareEndpoints(a, b *spec.Endpoint) int {
	if c := strings.Compare(a.Task, b.Task); c != 0 {
		return c
	}
	return strings.Compare(a.Network, b.Network)
}

func equalEndpoints(a, b *spec.Endpoint) bool { return a.Equal(*b) }

// lower is RFC 4343's folding: ASCII only, which is all that names have.
func lower(s string) string { return strings.ToLower(s) }

func lowerAll(in []string) []string {
	if len(in) == 0 {
		return nil
	}
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = lower(s)
	}
	return out
}
