package nft

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/shoalnet/shoal/vip/internal/kern"
)

// flow names the tracked connections from any client to a VIP that go to one
// backend.
type flow struct{ vip, backend netip.Addr }

func (f flow) key() []byte { return slices.Concat(f.vip.AsSlice(), f.backend.AsSlice()) }

// rounds bounds the deleting of entries that keep appearing: a packet that was
// under way while the map changed can still make one.
const rounds = 5

// dropFlows deletes the conntrack entries of flows, and looks again until
// there are none left. conntrack(8) -D was seen to leave entries without an
// error when many ended meanwhile; here an entry that is gone already is what
// was asked for, and only an empty list ends the work.
func dropFlows(f kern.Family, flows []flow) error {
	if len(flows) == 0 {
		return nil
	}
	want := map[flow]bool{}
	for _, x := range flows {
		want[x] = true
	}
	for range rounds {
		left, err := kern.Flows(f, func(origDst, replySrc netip.Addr) bool { return want[flow{origDst, replySrc}] })
		if err != nil {
			return err
		}
		if len(left) == 0 {
			return nil
		}
		for _, x := range left {
			if err := x.Delete(); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("conntrack entries of %s at %s come back as fast as they are deleted", flows[0].vip, flows[0].backend)
}
