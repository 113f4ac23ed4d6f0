package vxlan

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
)

// Why rules drop or refuse. Each rule that does has a counter, and its reason at the
// end of its comment.
const (
	whySpoofed   = "spoofed-source"   // a task's packet with an address that is not its own
	whyNeighbour = "link-local"       // a task's packet from or to a link-local IPv6 address
	whyAlone     = "icc-off"          // from task to task on a network with icc=false
	whyForeign   = "foreign-source"   // another node's packet with an address that is none of the network's
	whyForward   = "not-forwarded"    // what has no business to cross the network's namespace
	whyTooBig    = "packet-too-big"   // says to the namespace itself that a packet was too big
	whyLeak      = "untranslated"     // would leave with a task's own address
	whyTaskVXLAN = "vxlan-from-task"  // a task's packet to the VXLAN port
	whyNoMember  = "vxlan-not-member" // VXLAN of ours from who is no node
	whyAgent     = "agent-port"       // a task's packet to a node's agent
	whyNetworks  = "between-networks" // from one network's way out to another's
	whyNoReply   = "not-a-reply"      // from outside into a way out
	whyNoRouter  = "no-router"        // between devices that the host did not route between before
)

const reasonMark = " for "

// because makes a verdict counted, under a reason.
func because(why string, verdict rule) rule {
	return rule{text: "counter " + verdict.text + reasonMark + why, why: why,
		exprs: append([]expr.Any{&expr.Counter{}}, verdict.exprs...)}
}

// Drops reads how much each rule has dropped or refused: by namespace and reason,
// of this node since the table was last written. It may be called from any
// goroutine.
func (d *Dataplane) Drops(ctx context.Context) ([]overlay.Drop, error) {
	names, err := nl.List(d.netnsPrefix())
	if err != nil {
		return nil, err
	}
	var out []overlay.Drop
	for _, ns := range append([]string{""}, names...) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		tables := []string{overlay.FilterTable}
		if ns == "" {
			tables = []string{overlay.HostTable(d.cfg.Instance), overlay.MembersTable(d.cfg.Instance)}
		}
		err := d.do(ns, func() error {
			for _, t := range tables {
				ds, err := dropsOf(ns, t)
				if err != nil {
					return err
				}
				out = append(out, ds...)
			}
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	slices.SortFunc(out, func(a, b overlay.Drop) int {
		return cmp.Or(strings.Compare(a.Netns, b.Netns), strings.Compare(a.Reason, b.Reason))
	})
	return out, nil
}

// dropsOf reads one table's counters; within do.
func dropsOf(ns, name string) ([]overlay.Drop, error) {
	rules, err := nl.Rules(unix.NFPROTO_INET, name, "")
	if err != nil {
		return nil, err
	}
	by := map[string]overlay.Drop{}
	for _, as := range rules {
		why, of := "", ""
		var packets, bytes uint64
		for _, a := range as {
			switch a.Type {
			case unix.NFTA_RULE_TABLE:
				of = strings.TrimRight(string(a.Data), "\x00")
			case unix.NFTA_RULE_USERDATA:
				says, _ := userdata.GetString(a.Data, userdata.TypeComment)
				_, why, _ = strings.Cut(says, reasonMark)
			case unix.NFTA_RULE_EXPRESSIONS:
				if packets, bytes, err = counter(a.Data); err != nil {
					return nil, fmt.Errorf("read a counter of nftables table %s: %w", name, err)
				}
			}
		}
		if of != name || why == "" {
			continue
		}
		x := by[why]
		x.Netns, x.Reason = ns, why
		x.Packets, x.Bytes = x.Packets+packets, x.Bytes+bytes
		by[why] = x
	}
	var out []overlay.Drop
	for _, x := range by {
		out = append(out, x)
	}
	return out, nil
}

// counter reads the first counter among a rule's expressions.
func counter(list []byte) (packets, bytes uint64, err error) {
	exprs, err := netlink.UnmarshalAttributes(list)
	if err != nil {
		return 0, 0, err
	}
	for _, e := range exprs {
		parts, err := netlink.UnmarshalAttributes(e.Data)
		if err != nil {
			return 0, 0, err
		}
		name := ""
		for _, p := range parts {
			switch p.Type & nl.AttrTypeMask {
			case unix.NFTA_EXPR_NAME:
				name = strings.TrimRight(string(p.Data), "\x00")
			case unix.NFTA_EXPR_DATA:
				if name != "counter" {
					continue
				}
				vals, err := netlink.UnmarshalAttributes(p.Data)
				if err != nil {
					return 0, 0, err
				}
				for _, v := range vals {
					if len(v.Data) != 8 {
						continue
					}
					switch v.Type & nl.AttrTypeMask {
					case unix.NFTA_COUNTER_PACKETS:
						packets = binary.BigEndian.Uint64(v.Data)
					case unix.NFTA_COUNTER_BYTES:
						bytes = binary.BigEndian.Uint64(v.Data)
					}
				}
				return packets, bytes, nil
			}
		}
	}
	return 0, 0, nil
}
