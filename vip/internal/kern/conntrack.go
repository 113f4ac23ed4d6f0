package kern

import (
	"fmt"
	"net/netip"

	vnl "github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
)

// Attributes of a conntrack entry (linux/netfilter/nfnetlink_conntrack.h).
const (
	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaID         = 12
	ctaZone       = 18
	ctaTupleIP    = 1
)

// Flow is one tracked connection: as much of it as deleting it takes.
type Flow struct {
	f              Family
	orig, id, zone []byte
}

// Flows reads the tracked connections whose original destination and reply
// source match. The kernel walks every bucket of a table that all namespaces
// share, some 10 ms even for an empty answer, so a namespace without any is
// told by its counter.
func Flows(f Family, match func(origDst, replySrc netip.Addr) bool) ([]Flow, error) {
	if n, err := nl.Sysctl("net.netfilter.nf_conntrack_count"); err == nil && n == "0" {
		return nil, nil
	}
	return flows(f, match)
}

// ProbeFlows tells whether tracked connections can be read at all.
func ProbeFlows(f Family) error {
	_, err := flows(f, func(netip.Addr, netip.Addr) bool { return false })
	return err
}

func flows(f Family, match func(origDst, replySrc netip.Addr) bool) ([]Flow, error) {
	msgs, err := request(f, unix.NFNL_SUBSYS_CTNETLINK, vnl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP)
	if err != nil {
		return nil, fmt.Errorf("list conntrack entries: %w", err)
	}
	var out []Flow
	for _, m := range msgs {
		x := Flow{f: f}
		var dst, src netip.Addr
		attrs(m, func(t uint16, v []byte) {
			switch t {
			case ctaTupleOrig:
				x.orig = v
				_, dst = tupleAddrs(v)
			case ctaTupleReply:
				src, _ = tupleAddrs(v)
			case ctaID:
				x.id = v
			case ctaZone:
				x.zone = v
			}
		})
		if match(dst, src) {
			out = append(out, x)
		}
	}
	return out, nil
}

func tupleAddrs(b []byte) (src, dst netip.Addr) {
	attrs(b, func(t uint16, v []byte) {
		if t != ctaTupleIP {
			return
		}
		attrs(v, func(t uint16, v []byte) {
			a, ok := netip.AddrFromSlice(v)
			switch {
			case !ok:
			case t == vnl.CTA_IP_V4_SRC || t == vnl.CTA_IP_V6_SRC:
				src = a
			case t == vnl.CTA_IP_V4_DST || t == vnl.CTA_IP_V6_DST:
				dst = a
			}
		})
	})
	return src, dst
}

// Delete deletes the entry. It succeeds when the entry is gone, or another one
// has taken its place.
func (x Flow) Delete() error {
	as := []*vnl.RtAttr{vnl.NewRtAttr(unix.NLA_F_NESTED|ctaTupleOrig, x.orig)}
	if x.zone != nil {
		as = append(as, vnl.NewRtAttr(ctaZone, x.zone))
	}
	if x.id != nil {
		as = append(as, vnl.NewRtAttr(ctaID, x.id))
	}
	if _, err := request(x.f, unix.NFNL_SUBSYS_CTNETLINK, vnl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, as...); err != nil && !Absent(err) {
		return fmt.Errorf("delete conntrack entry: %w", err)
	}
	return nil
}
