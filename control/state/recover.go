package state

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// generationBits: indices of one generation of a cluster have these low bits. A
// generation ends when the cluster is made anew from what one manager has
// ([State.Recover]): whatever lost managers went on to commit has a lower index than
// all of the next one. So no certificate that they still sign is newer than the node
// list of the survivor, and no assignment of theirs newer than its.
const generationBits = 40

// Recover begins another generation of the cluster with self as its only manager.
// All other managers are expelled: they are down, no longer managers, and on no
// node list, so that what they show is refused everywhere, until they are removed.
// It returns them, by name.
func (s *State) Recover(self string) ([]spec.Node, error) {
	me := s.nodes[self]
	switch {
	case s.cluster == nil:
		return nil, failf(ErrInvalid, "there is no cluster in it")
	case me == nil || me.expelled:
		return nil, failf(ErrInvalid, "node %s is not in the cluster", self)
	}
	s.index = (s.index>>generationBits + 1) << generationBits
	next := me.Node
	next.Role, next.Status, next.Message = spec.RoleManager, spec.NodeReady, ""
	s.setNode(me, next)
	var out []spec.Node
	for _, id := range slices.Sorted(maps.Keys(s.nodes)) {
		n := s.nodes[id]
		if id == self || n.Role != spec.RoleManager {
			continue
		}
		n.expelled = true
		next := n.Node
		next.Role, next.Status = spec.RoleWorker, spec.NodeDown
		next.Message = fmt.Sprintf("lost when the cluster was made anew from %s: remove it with 'shoal node rm', it can join again as a new node", me.Name)
		s.setNode(n, next)
		out = append(out, n.Node)
	}
	slices.SortFunc(out, func(a, b spec.Node) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	s.changed = s.index
	for _, n := range s.networks {
		n.changed = s.index
	}
	s.event("cluster", "recover", s.cluster.ID, s.cluster.ID, "manager", me.Name)
	return out, nil
}
