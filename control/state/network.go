package state

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"

	"github.com/shoalnet/shoal/ipam"
	"github.com/shoalnet/shoal/spec"
)

// maxSubnets is what the subnet's index in a VIP's mark can count
// (spec.Network.VIPMark).
const maxSubnets = 16

// defaultPort is VXLAN's, RFC 7348 section 8.
const defaultPort = 4789

// linkLocal is where router, gateway and way-out addresses of nodes lie (spec).
var linkLocal = netip.MustParsePrefix("169.254.0.0/16")

func (s *State) initCluster(c *InitCluster) Result {
	if s.cluster != nil {
		return Result{Err: failf(ErrExists, "there is a cluster already: %s", s.cluster.ID)}
	}
	cl := c.Cluster
	if cl.ID == "" {
		return Result{Err: failf(ErrInvalid, "cluster ID is empty")}
	}
	cl.Pools = slices.Clone(cl.Pools)
	if len(cl.Pools) == 0 {
		cl.Pools = []netip.Prefix{ipam.DefaultPool}
	}
	if cl.SubnetSize == 0 {
		cl.SubnetSize = ipam.DefaultBits
	}
	if cl.DataPathPort == 0 {
		cl.DataPathPort = defaultPort
	}
	if cl.DataPathPort < 1 || cl.DataPathPort > 65535 {
		return Result{Err: failf(ErrInvalid, "data path port %d: use 1 to 65535", cl.DataPathPort)}
	}
	if err := ipam.ValidatePools(cl.Pools, cl.SubnetSize); err != nil {
		return Result{Err: failf(ErrInvalid, "%w", err)}
	}
	if err := c.Trust.check(); err != nil {
		return Result{Err: err}
	}
	s.cluster, s.trust, s.level = &cl, c.Trust.clone(), c.Level
	r := s.createNetwork(&CreateNetwork{HostRoutes: c.HostRoutes,
		Network: spec.Network{ID: c.DefaultNetwork, Name: spec.DefaultNetwork, Created: cl.Created}})
	if r.Err != nil {
		s.cluster, s.trust = nil, nil
		return Result{Err: r.Err}
	}
	s.defaultNet = r.Network.ID
	for name, driver := range map[string]string{spec.HostNetwork: spec.DriverHost, spec.NoneNetwork: spec.DriverNull} {
		s.addNetwork(&network{Network: spec.Network{ID: name, Name: name, Driver: driver, Version: s.index, Created: cl.Created}})
	}
	s.changed = s.index
	out := cl
	return Result{Cluster: &out, Network: r.Network}
}

func (s *State) createNetwork(c *CreateNetwork) Result {
	n := c.Network.Clone()
	if err := s.checkID("network", n.ID); err != nil {
		return Result{Err: err}
	}
	if err := spec.ValidateName("network", n.Name); err != nil {
		return Result{Err: failf(ErrInvalid, "%w", err)}
	}
	if _, ok := s.netNames[n.Name]; ok {
		return Result{Err: failf(ErrExists, "network %s exists already", n.Name)}
	}
	if err := s.checkNetworkName(n.Name); err != nil {
		return Result{Err: err}
	}
	if n.Driver == "" {
		n.Driver = spec.DriverOverlay
	}
	if !n.Wired() {
		return Result{Err: failf(ErrInvalid, "network %s: driver %q is unknown: use %s or %s", n.Name, n.Driver, spec.DriverOverlay, spec.DriverBridge)}
	}
	fail := func(kind, err error) Result {
		return Result{Err: failf(kind, "network %s: %w", n.Name, err)}
	}
	if n.Driver == spec.DriverBridge {
		on, err := s.node(n.Node)
		if err != nil {
			return fail(ErrInvalid, fmt.Errorf("driver %s is for one node: %w", n.Driver, err))
		}
		n.Node = on.ID
	} else {
		n.Node = ""
	}
	if err := spec.ValidateOptions(n.Options); err != nil {
		return fail(ErrInvalid, err)
	}
	for _, k := range []string{spec.OptMTUDocker, spec.OptMTU} {
		if v, ok := n.Options[k]; ok && c.Network.MTU == 0 {
			n.MTU, _ = strconv.Atoi(v) // validated
		}
	}
	if len(n.Subnets) > maxSubnets {
		return fail(ErrInvalid, fmt.Errorf("%d subnets: the most allowed is %d", len(n.Subnets), maxSubnets))
	}
	taken := s.blocks(c.HostRoutes)
	fromPool := len(n.Subnets) == 0
	if fromPool {
		if len(n.Gateways) > 0 {
			return fail(ErrInvalid, errors.New("a gateway needs a subnet: give --subnet"))
		}
		// IPv4, or what the cluster has instead.
		pools := slices.DeleteFunc(slices.Clone(s.cluster.Pools), func(p netip.Prefix) bool { return !p.Addr().Is4() })
		if len(pools) == 0 {
			pools = s.cluster.Pools
		}
		sub, err := ipam.NextSubnet(pools, s.cluster.SubnetSize, s.lastSubnet, taken)
		if err != nil {
			return fail(ErrExhausted, err)
		}
		n.Subnets = []netip.Prefix{sub}
	}
	if len(n.Gateways) > len(n.Subnets) {
		return fail(ErrInvalid, fmt.Errorf("%d gateways for %d subnets", len(n.Gateways), len(n.Subnets)))
	}
	gws := make([]netip.Addr, len(n.Subnets))
	copy(gws, n.Gateways)
	n.Gateways = gws
	for i, sub := range n.Subnets {
		if err := spec.ValidateSubnet(sub); err != nil {
			return fail(ErrInvalid, err)
		}
		if !gws[i].IsValid() {
			gws[i] = sub.Addr().Next()
		}
		if gws[i] == sub.Addr() || (sub.Addr().Is4() && gws[i] == ipam.Last(sub)) {
			return fail(ErrInvalid, fmt.Errorf("gateway %s is the network or broadcast address of %s", gws[i], sub))
		}
		if err := ipam.CheckSubnet(sub, taken); err != nil {
			return fail(ErrInvalid, err)
		}
	}
	vni, ok := n.VNI, true
	if vni == 0 {
		vni, ok = s.nextVNI()
	}
	if !ok {
		return fail(ErrExhausted, fmt.Errorf("all %d network numbers are in use: remove networks", len(s.vnis)))
	}
	n.VNI = vni
	if other, dup := s.vnis[vni]; dup {
		return fail(ErrInUse, fmt.Errorf("VNI %d is taken by network %s", vni, s.networks[other].Name))
	}
	n.Version = s.index
	if err := n.Validate(); err != nil {
		return Result{Err: failf(ErrInvalid, "%w", err)}
	}
	w, err := newNetwork(n)
	if err != nil {
		return fail(ErrInvalid, err)
	}
	s.addNetwork(w)
	w.changed = s.index
	if fromPool {
		s.lastSubnet = n.Subnets[0]
	}
	if c.Network.VNI == 0 {
		s.lastVNI = vni
	}
	s.event("network", "create", n.ID, n.Name, "driver", n.Driver)
	return Result{Network: &n}
}

// newNetwork makes the address spaces of n.
func newNetwork(n spec.Network) (*network, error) {
	w := &network{Network: n}
	in := 0
	for i, sub := range n.Subnets {
		var ranges []netip.Prefix
		for _, r := range n.IPRanges {
			if r.IsValid() && sub.Contains(r.Addr()) && r.Bits() >= sub.Bits() {
				ranges = append(ranges, r)
			}
		}
		in += len(ranges)
		sp, err := ipam.NewSpace(sub, ranges, map[netip.Addr]string{n.Gateways[i]: "the gateway"})
		if err != nil {
			return nil, err
		}
		w.spaces = append(w.spaces, sp)
	}
	if in != len(n.IPRanges) {
		return nil, fmt.Errorf("ip ranges %v: each must lie in one of the subnets %v", n.IPRanges, n.Subnets)
	}
	return w, nil
}

func (s *State) addNetwork(w *network) {
	s.networks[w.ID] = w
	s.netNames[w.Name] = w.ID
	if w.Wired() {
		s.vnis[w.VNI] = w.ID
	}
}

// blocks are the prefixes that a new subnet must stay clear of.
func (s *State) blocks(hostRoutes []netip.Prefix) []ipam.Block {
	out := []ipam.Block{{Prefix: linkLocal, Reason: ipam.ByReserved, Holder: "link-local addresses"}}
	for _, n := range s.networks {
		for _, sub := range n.Subnets {
			out = append(out, ipam.Block{Prefix: sub, Reason: ipam.ByNetwork, Holder: n.Name})
		}
	}
	for _, n := range s.nodes {
		if n.Addr.IsValid() {
			out = append(out, ipam.Block{Prefix: netip.PrefixFrom(n.Addr, n.Addr.BitLen()), Reason: ipam.ByReserved, Holder: "address of node " + n.Name})
		}
	}
	for _, p := range hostRoutes {
		if p.IsValid() && p.Bits() > 0 {
			out = append(out, ipam.Block{Prefix: p.Masked(), Reason: ipam.ByHostRoute})
		}
	}
	return out
}

func (s *State) nextVNI() (uint32, bool) {
	const n = spec.MaxVNI - spec.MinVNI + 1
	start := uint32(0)
	if s.lastVNI != 0 {
		start = s.lastVNI - spec.MinVNI + 1
	}
	for i := range uint32(n) {
		v := spec.MinVNI + (start+i)%n
		if _, used := s.vnis[v]; !used {
			return v, true
		}
	}
	return 0, false
}

func (s *State) removeNetwork(c *RemoveNetwork) Result {
	n, err := s.network(c.Ref)
	if err != nil {
		return Result{Err: err}
	}
	if !n.Wired() {
		return Result{Err: failf(ErrInvalid, "network %s is built in and can't be removed", n.Name)}
	}
	if n.ID == s.defaultNet {
		return Result{Err: failf(ErrInvalid, "network %s is the cluster's default network and can't be removed", n.Name)}
	}
	on := func(as []spec.Attachment) bool {
		return slices.ContainsFunc(as, func(a spec.Attachment) bool { return a.Network == n.ID })
	}
	var users []string
	for _, id := range slices.Sorted(maps.Keys(s.svcNames)) {
		if s.services[s.svcNames[id]].On(n.ID) {
			users = append(users, "service "+id)
		}
	}
	var tasks, ending []string
	for _, t := range s.tasks {
		v := s.services[t.Service]
		switch {
		case !t.holds() || !on(t.Attachments):
		case v != nil && !v.removed && v.On(n.ID) && t.Desired == spec.DesiredRunning:
			// named by its service
		case t.Desired == spec.DesiredRunning && !t.Status.State.Ended():
			tasks = append(tasks, "task "+t.Name)
		default:
			ending = append(ending, "task "+t.Name+" (ending)")
		}
	}
	slices.Sort(tasks)
	slices.Sort(ending)
	if len(users)+len(tasks) == 0 && len(ending) > 0 {
		return Result{Err: failf(ErrEnding, "network %s is used by %s: try again when these have ended", n.Name, spec.Few(ending))}
	}
	if users = append(append(users, tasks...), ending...); len(users) > 0 {
		return Result{Err: failf(ErrInUse, "network %s is used by %s: remove these first", n.Name, spec.Few(users))}
	}
	for _, id := range slices.Sorted(maps.Keys(s.removed)) {
		if v := s.removed[id]; len(v.VIPsOn(n.ID)) > 0 {
			return Result{Err: failf(ErrEnding, "network %s is used by service %s, which is being removed: try again when its tasks have ended", n.Name, v.Spec.Name)}
		}
	}
	delete(s.networks, n.ID)
	delete(s.netNames, n.Name)
	delete(s.vnis, n.VNI)
	s.event("network", "remove", n.ID, n.Name)
	out := n.Network
	return Result{Network: &out}
}

// resolve turns refs of attachments into IDs; none means the default network.
func (s *State) resolve(in []spec.NetworkAttachment) ([]spec.NetworkAttachment, error) {
	if len(in) == 0 {
		return []spec.NetworkAttachment{{Network: s.defaultNet}}, nil
	}
	out := make([]spec.NetworkAttachment, 0, len(in))
	for _, a := range in {
		n, err := s.network(a.Network)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(out, func(o spec.NetworkAttachment) bool { return o.Network == n.ID }) {
			return nil, failf(ErrInvalid, "network %s is given twice", n.Name)
		}
		for _, al := range a.Aliases {
			if err := spec.ValidateName("alias", al); err != nil {
				return nil, failf(ErrInvalid, "%w", err)
			}
		}
		if !n.Wired() && (len(in) > 1 || len(a.Aliases)+len(a.Addrs) > 0) {
			return nil, failf(ErrInvalid, "network %s can't be combined with other networks, aliases or addresses", n.Name)
		}
		out = append(out, spec.NetworkAttachment{Network: n.ID, Aliases: slices.Clone(a.Aliases), Addrs: slices.Clone(a.Addrs)})
	}
	return out, nil
}

// allocate gives holder the addresses asked for, and one of each further family
// that the network has. What it did is in u, also after an error.
func (n *network) allocate(asked []netip.Addr, holder string, u *undo) ([]netip.Addr, error) {
	var out []netip.Addr
	have := map[bool]bool{} // by Is4
	for _, a := range asked {
		i := slices.IndexFunc(n.Subnets, func(p netip.Prefix) bool { return p.Contains(a) })
		if i < 0 {
			return nil, failf(ErrInvalid, "network %s: address %s is not in its subnets (%s)", n.Name, a, joinPrefixes(n.Subnets))
		}
		if have[a.Is4()] {
			return nil, failf(ErrInvalid, "network %s: address %s: only one of each family can be asked for", n.Name, a)
		}
		have[a.Is4()] = true
		if err := n.take(i, a, holder, u); err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	for _, sub := range n.Subnets {
		is4 := sub.Addr().Is4()
		if have[is4] {
			continue
		}
		have[is4] = true
		a, err := n.next(is4, holder, u)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

func (n *network) take(i int, a netip.Addr, holder string, u *undo) error {
	sp := n.spaces[i]
	if err := sp.Take(a, holder); err != nil {
		return failf(ErrInUse, "network %s: %w", n.Name, err)
	}
	u.add(func() { sp.Release(a, holder) })
	return nil
}

// next allocates next-fit in the first subnet of the family that has room.
func (n *network) next(is4 bool, holder string, u *undo) (netip.Addr, error) {
	var first error
	for _, sp := range n.spaces {
		if sp.Subnet().Addr().Is4() != is4 {
			continue
		}
		cursor := sp.Cursor()
		a, err := sp.Next(holder)
		if err == nil {
			u.add(func() {
				sp.Release(a, holder)
				sp.SetCursor(cursor)
			})
			return a, nil
		}
		if first == nil {
			first = err
		}
	}
	return netip.Addr{}, failf(ErrExhausted, "network %s: %w", n.Name, first)
}

// room counts how many more tasks the network has addresses for, and tells why
// none when there are none.
func (n *network) room() (int, error) {
	if !n.Wired() {
		return math.MaxInt, nil
	}
	free := map[bool]int{}
	for _, sp := range n.spaces {
		free[sp.Subnet().Addr().Is4()] += sp.Free()
	}
	least, fam, set := 0, false, false
	for _, f := range []bool{true, false} {
		if k, ok := free[f]; ok && (!set || k < least) {
			least, fam, set = k, f, true
		}
	}
	if least > 0 {
		return least, nil
	}
	var u undo
	_, err := n.next(fam, "", &u)
	return 0, err
}

// release gives addresses back.
func (s *State) release(network string, addrs []netip.Addr, holder string) {
	n := s.networks[network]
	if n == nil {
		return
	}
	for _, a := range addrs {
		for _, sp := range n.spaces {
			if sp.Subnet().Contains(a) {
				sp.Release(a, holder)
			}
		}
	}
}

func joinPrefixes(ps []netip.Prefix) string {
	out := ""
	for i, p := range ps {
		if i > 0 {
			out += ", "
		}
		out += p.String()
	}
	return out
}
