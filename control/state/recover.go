package state

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// A generation of a cluster ends when it is made anew from what one manager, or a
// snapshot, has ([State.Recover]). The next one's indices begin with the seconds
// since generationEpoch, and have generationBits below them: so, as nobody commits a
// million entries a second, they are beyond whatever lost managers go on to commit,
// and beyond what another generation from the same snapshot came to. No certificate
// that lost managers still sign is newer than the node list of the survivor then, and
// no assignment of theirs newer than its. Numbers stay below 2^53, which is as far as
// other readers of JSON count exactly, for 270 years.
const generationBits = 20

var generationEpoch = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// Recover begins another generation of the cluster with self, by ID, as its only
// manager. A self that the cluster does not know yet is taken in, in the place of a
// lost manager of its name. The index goes beyond the one given, too.
//
// All other managers are expelled: they are down, no longer managers, and on no
// node list, so that what they show is refused everywhere, until they are removed.
// It returns them, by name.
func (s *State) Recover(self spec.Node, now time.Time, beyond uint64) ([]spec.Node, error) {
	if s.cluster == nil {
		return nil, failf(ErrInvalid, "there is no cluster in it")
	}
	me := s.nodes[self.ID]
	if me != nil && me.expelled {
		return nil, me.gone()
	}
	by := uint64(max(now.Unix()-generationEpoch.Unix(), 0))
	s.index = max(by, max(s.index, beyond)>>generationBits+1) << generationBits
	var out []spec.Node
	for _, id := range slices.Sorted(maps.Keys(s.nodes)) {
		n := s.nodes[id]
		if id == self.ID || n.Role != spec.RoleManager {
			continue
		}
		n.expelled = true
		s.depart(n.ID)
		next := n.Node
		next.Role, next.Status = spec.RoleWorker, spec.NodeDown
		next.Message = fmt.Sprintf("lost when the cluster was made anew from %s: remove it with 'shoal node rm', it can join again as a new node", self.Name)
		s.setNode(n, next)
		out = append(out, n.Node)
	}
	if me == nil {
		self.Role = spec.RoleManager
		if r := s.upsertNode(&UpsertNode{Node: self}); r.Err != nil {
			return nil, r.Err
		}
		me = s.nodes[self.ID]
		for _, n := range out {
			if strings.EqualFold(n.Name, self.Name) {
				if r := s.removeNode(&RemoveNode{Ref: n.ID}); r.Err != nil {
					return nil, r.Err
				}
			}
		}
	} else {
		next := me.Node
		next.Role, next.Status, next.Message = spec.RoleManager, spec.NodeReady, ""
		next.Addr, next.ControlPort, next.GossipPort = self.Addr, self.ControlPort, self.GossipPort
		s.setNode(me, next)
	}
	slices.SortFunc(out, func(a, b spec.Node) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	s.changed = s.index
	for _, n := range s.networks {
		n.changed = s.index
	}
	s.event("cluster", "recover", s.cluster.ID, s.cluster.ID, "manager", me.Name)
	return out, nil
}
