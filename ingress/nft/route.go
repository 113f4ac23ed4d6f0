package nft

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/spec"
)

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// ours lists our routes of all tables.
func ours(table int) ([]netlink.Route, error) {
	rs, err := nl.Dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: table, Protocol: ingress.RouteProtocol},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return rs, nil
}

// observeRoutes reads the host's routes to VIPs. One is there if both it and
// the one that it falls back to are.
func observeRoutes(want ingress.State, have *ingress.State) error {
	rs, err := ours(unix.RT_TABLE_MAIN)
	if err != nil || len(rs) == 0 {
		return err
	}
	devs := map[int]string{}
	for _, w := range want.Ways {
		if l, err := netlink.LinkByName(w.Dev); err == nil {
			devs[l.Attrs().Index] = w.Dev
		}
	}
	found := map[netip.Addr]ingress.Route{}
	fallback := map[netip.Addr]bool{}
	for _, r := range rs {
		if r.Dst == nil {
			continue
		}
		a := addrOf(r.Dst.IP)
		o := found[a]
		o.Addr = a
		if r.Type == unix.RTN_UNREACHABLE {
			fallback[a] = true
		} else {
			o.Via, o.Dev = addrOf(r.Gw), devs[r.LinkIndex]
		}
		found[a] = o
	}
	for a, o := range found {
		if !fallback[a] {
			o.Dev = ""
		}
		have.Add(o)
	}
	return nil
}

func putRoute(o ingress.Route) error {
	unreachable := &netlink.Route{Dst: hostNet(o.Addr), Type: unix.RTN_UNREACHABLE, Priority: ingress.MetricUnreachable,
		Protocol: ingress.RouteProtocol, Table: unix.RT_TABLE_MAIN}
	if err := netlink.RouteReplace(unreachable); err != nil {
		return fmt.Errorf("add unreachable route to %s: %w", o.Addr, err)
	}
	l, err := netlink.LinkByName(o.Dev)
	if err != nil {
		return fmt.Errorf("route to %s: device %s: %w", o.Addr, o.Dev, err)
	}
	r := &netlink.Route{Dst: hostNet(o.Addr), Gw: o.Via.AsSlice(), LinkIndex: l.Attrs().Index, Protocol: ingress.RouteProtocol, Table: unix.RT_TABLE_MAIN}
	err = netlink.RouteAdd(r)
	if nl.Exists(err) {
		rs, lerr := ours(unix.RT_TABLE_MAIN)
		if lerr != nil {
			return lerr
		}
		for _, x := range rs {
			if x.Dst != nil && addrOf(x.Dst.IP) == o.Addr && x.Type != unix.RTN_UNREACHABLE {
				err = netlink.RouteReplace(r)
				break
			}
		}
		if nl.Exists(err) {
			return fmt.Errorf("the host has a route to %s that is not Shoal's: remove it with 'ip route del %s', or give the network another subnet", o.Addr, o.Addr)
		}
	}
	if err != nil {
		return fmt.Errorf("add route to %s via %s dev %s: %w", o.Addr, o.Via, o.Dev, err)
	}
	return nil
}

func delRoute(o ingress.Route) error {
	rs, err := ours(unix.RT_TABLE_MAIN)
	if err != nil {
		return err
	}
	for _, r := range rs {
		if r.Dst != nil && addrOf(r.Dst.IP) == o.Addr {
			if err := netlink.RouteDel(&r); err != nil && !nl.Absent(err) {
				return fmt.Errorf("delete route to %s: %w", o.Addr, err)
			}
		}
	}
	return nil
}

// delRoutes deletes all of the host's routes to VIPs.
func delRoutes() error {
	rs, err := ours(unix.RT_TABLE_MAIN)
	if err != nil {
		return err
	}
	for _, r := range rs {
		if err := netlink.RouteDel(&r); err != nil && !nl.Absent(err) {
			return fmt.Errorf("delete route to %s: %w", r.Dst, err)
		}
	}
	return nil
}

// ---- ovns ----

func nodeTable(number int) int { return ingress.TableBase + number }

func nodeRule(number int) *netlink.Rule {
	r := netlink.NewRule()
	mask := uint32(0xffffffff)
	r.Family, r.Priority, r.Protocol = netlink.FAMILY_V4, ingress.RulePriority, ingress.RouteProtocol
	r.Mark, r.Mask, r.Table = nodeMark(number), &mask, nodeTable(number)
	return r
}

const (
	partRoute = "route only"
	partRule  = "rule only"
)

// routeParts counts the parts that observeNodeRoutes found.
func routeParts(o ingress.Node) int {
	if o.Fault == "" {
		return 2
	}
	return 1
}

// observeNodeRoutes reads rules and routes of nodes; Fault tells if one of the
// two is missing.
func observeNodeRoutes(ns string, have *ingress.State) error {
	rules, err := nl.Dump(func() ([]netlink.Rule, error) { return netlink.RuleList(netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	found, mtus := map[int]string{}, map[int]int{}
	for _, r := range rules {
		number := r.Table - ingress.TableBase
		if r.Protocol != ingress.RouteProtocol || number < 1 || number > spec.MaxNodes || r.Mark != nodeMark(number) || r.Priority != ingress.RulePriority {
			continue
		}
		found[number] = partRule
	}
	vx, err := netlink.LinkByName(ingress.VXLANDev)
	if err == nil {
		rs, err := ours(unix.RT_TABLE_UNSPEC)
		if err != nil {
			return err
		}
		for _, r := range rs {
			number := r.Table - ingress.TableBase
			if number < 1 || number > spec.MaxNodes || r.LinkIndex != vx.Attrs().Index || addrOf(r.Gw) != spec.RouterAddr(number) {
				continue
			}
			if found[number] == partRule {
				found[number] = ""
			} else {
				found[number] = partRoute
			}
			mtus[number] = r.MTU
		}
	}
	for number, f := range found {
		have.Add(ingress.Node{Netns: ns, Number: number, MTU: mtus[number], Fault: f})
	}
	return nil
}

func defaultNet() *net.IPNet { return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)} }

func putNode(o ingress.Node) error {
	vx, err := netlink.LinkByName(ingress.VXLANDev)
	if err != nil {
		return fmt.Errorf("%s: device %s: %w", o, ingress.VXLANDev, err)
	}
	err = netlink.RouteReplace(&netlink.Route{Dst: defaultNet(), Gw: spec.RouterAddr(o.Number).AsSlice(), LinkIndex: vx.Attrs().Index,
		Flags: int(netlink.FLAG_ONLINK), Table: nodeTable(o.Number), Protocol: ingress.RouteProtocol, MTU: o.MTU, MTULock: o.MTU > 0})
	if err != nil {
		return fmt.Errorf("%s: set route: %w", o, err)
	}
	if err := netlink.RuleAdd(nodeRule(o.Number)); err != nil && !nl.Exists(err) {
		return fmt.Errorf("%s: add rule: %w", o, err)
	}
	return nil
}

func delNode(o ingress.Node) error {
	if err := netlink.RuleDel(nodeRule(o.Number)); err != nil && !nl.Absent(err) {
		return fmt.Errorf("%s: delete rule: %w", o, err)
	}
	err := netlink.RouteDel(&netlink.Route{Dst: defaultNet(), Table: nodeTable(o.Number), Protocol: ingress.RouteProtocol})
	if err != nil && !nl.Absent(err) {
		return fmt.Errorf("%s: delete route: %w", o, err)
	}
	return nil
}
