package ipam

import (
	"fmt"
	"net/netip"
	"strings"
)

// TakenError tells who holds an address that was asked for.
type TakenError struct {
	Addr   netip.Addr
	Holder string // such as "task web.1.k3v9x2m1p0qa"
}

func (e *TakenError) Error() string {
	return fmt.Sprintf("address %s is taken by %s", e.Addr, e.Holder)
}

// OutsideError tells that an address that was asked for is not in the subnet.
type OutsideError struct {
	Addr   netip.Addr
	Subnet netip.Prefix
}

func (e *OutsideError) Error() string {
	return fmt.Sprintf("address %s is not in subnet %s", e.Addr, e.Subnet)
}

// FullError tells that a subnet has no address left.
type FullError struct {
	Subnet netip.Prefix
	Ranges []netip.Prefix // empty: the whole subnet
	InUse  int            // addresses given out within the ranges
}

func (e *FullError) Error() string {
	where := "subnet " + e.Subnet.String()
	if len(e.Ranges) > 0 {
		where = fmt.Sprintf("ip range %s of subnet %s", joinPrefixes(e.Ranges), e.Subnet)
	}
	return fmt.Sprintf("%s has no free address: all %d are in use: remove tasks or services from the network, or create one with a larger subnet", where, e.InUse)
}

// Reason tells why a block of addresses can't be given out.
type Reason int

// Reasons.
const (
	ByNetwork   Reason = iota // another network has it
	ByHostRoute               // a host routes it elsewhere
	ByReserved                // the cluster needs it itself
)

// OverlapError tells what a subnet that was asked for collides with.
type OverlapError struct {
	Subnet netip.Prefix
	With   Block
}

func (e *OverlapError) Error() string {
	switch e.With.Reason {
	case ByNetwork:
		return fmt.Sprintf("subnet %s overlaps %s of network %s: choose another with --subnet, or leave it out to have one chosen", e.Subnet, e.With.Prefix, e.With.Holder)
	case ByHostRoute:
		return fmt.Sprintf("subnet %s overlaps the host's route to %s: tasks would cut the host off from it: choose another with --subnet, or leave it out to have one chosen", e.Subnet, e.With.Prefix)
	default:
		return fmt.Sprintf("subnet %s overlaps %s, which is reserved (%s): choose another", e.Subnet, e.With.Prefix, e.With.Holder)
	}
}

// NoSubnetError tells that the pools have no free subnet.
type NoSubnetError struct {
	Pools    []netip.Prefix
	Bits     int // prefix length of IPv4 subnets
	Networks int // blocks that networks have in the pools
	Routes   int // blocks that host routes and reservations take in the pools
}

func (e *NoSubnetError) Error() string {
	if len(e.Pools) == 0 {
		return "no address pool of this family: give --subnet"
	}
	return fmt.Sprintf("no free /%d subnet in pool %s: %d are taken by networks, and %d host routes or reserved ranges lie in it: remove networks, or give a --subnet outside of the pool", e.Bits, joinPrefixes(e.Pools), e.Networks, e.Routes)
}

func joinPrefixes(ps []netip.Prefix) string {
	var s []string
	for _, p := range ps {
		s = append(s, p.String())
	}
	return strings.Join(s, ", ")
}
