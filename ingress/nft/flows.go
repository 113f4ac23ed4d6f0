package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/spec"
)

// match chooses tracked connections; it is a netlink.CustomConntrackFilter.
type match func(f *netlink.ConntrackFlow) bool

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (m match) MatchConntrackFlow(f *netlink.ConntrackFlow) bool { return m(f) }

// dropFlows deletes tracked connections. The next packet of a TCP connection is
// then refused, that of a UDP flow goes where a new one would.
func dropFlows(m match) error {
	// The kernel walks every bucket of a table that all namespaces share, so
	// a namespace without any connection is told by its counter.
	if n, err := nl.Sysctl("net.netfilter.nf_conntrack_count"); err == nil && n == "0" {
		return nil
	}
	var err error
	for range 10 {
		_, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, m)
		// An entry that was gone before it was deleted: look again.
		if err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete conntrack entries: %w", err)
	}
	return nil
}

// portsBy sorts ports by protocol number and published port.
func portsBy(os []ingress.Port) map[[2]uint16][]ingress.Port {
	out := map[[2]uint16][]ingress.Port{}
	for _, o := range os {
		k := [2]uint16{uint16(protoNum(o.Protocol)), o.Published}
		out[k] = append(out[k], o)
	}
	return out
}

func portOf(f *netlink.ConntrackFlow) [2]uint16 {
	return [2]uint16{uint16(f.Forward.Protocol), f.Forward.DstPort}
}

// dropPort resets what is connected by published ports.
func dropPort(os ...ingress.Port) error {
	if len(os) == 0 {
		return nil
	}
	by := portsBy(os)
	return dropFlows(func(f *netlink.ConntrackFlow) bool {
		return slices.ContainsFunc(by[portOf(f)], func(o ingress.Port) bool {
			return (!o.Addr.IsValid() || addrOf(f.Forward.DstIP) == o.Addr) &&
				addrOf(f.Reverse.SrcIP) == o.To.Addr() && f.Reverse.SrcPort == o.To.Port()
		})
	})
}

// dropUntranslated deletes the entries of what was sent to ports of this
// machine before they led to where they lead now. Without that, a UDP client
// that keeps sending would be refused for ever.
func dropUntranslated(os ...ingress.Port) error {
	if len(os) == 0 {
		return nil
	}
	as, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	local := map[netip.Addr]bool{}
	for _, a := range as {
		local[addrOf(a.IP)] = true
	}
	by := portsBy(os)
	return dropFlows(func(f *netlink.ConntrackFlow) bool {
		to := addrOf(f.Forward.DstIP)
		return slices.ContainsFunc(by[portOf(f)], func(o ingress.Port) bool {
			return (to == o.Addr || !o.Addr.IsValid() && local[to]) &&
				(o.Protocol != spec.TCP || addrOf(f.Reverse.SrcIP) != to) &&
				(addrOf(f.Reverse.SrcIP) != o.To.Addr() || f.Reverse.SrcPort != o.To.Port())
		})
	})
}

// dropLocal resets what a balancer connected to tasks that are not in keep;
// within the ovns.
func dropLocal(o ingress.Local, keep map[netip.Addr]bool) error {
	return dropFlows(func(f *netlink.ConntrackFlow) bool {
		dst := addrOf(f.Forward.DstIP)
		return f.Forward.Protocol == protoNum(o.Protocol) && f.Forward.DstPort == o.Slot && isOut(dst) &&
			addrOf(f.Reverse.SrcIP) != dst && !keep[addrOf(f.Reverse.SrcIP)]
	})
}

// isOut tells whether a is the end of some way out.
func isOut(a netip.Addr) bool {
	for _, p := range spec.EgressPrefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}
