package state

import (
	"fmt"

	"github.com/shoalnet/shoal/spec"
)

// rule is one thing that a node must be to have a task. Which nodes a task fits is
// decided by its rules alone, here: both by [Plan], which looks for a node, and by
// what carries a plan out, which may find that things have changed.
type rule struct {
	name string // as people wrote it, or would
	fits func(spec.Node) bool
	// lapses: a node may stop to meet it without harm to what runs there. It is only
	// for the planner to know, which then has nothing to propose.
	lapses bool
}

// taskRules are those of tasks with these constraints on these networks, of an image
// or (image empty) of a program of the node, that need a feature level of their node
// (0: none).
func (s *State) taskRules(constraints []string, nets []spec.NetworkAttachment, image string, level int) []rule {
	pins := s.pinned(nets)
	if len(constraints)+len(pins) == 0 && image == "" && level == 0 {
		return nil
	}
	out := make([]rule, 0, len(constraints)+len(pins)+2)
	if level > 0 {
		out = append(out, rule{name: fmt.Sprintf("a shoal of feature level %d or newer on the node", level), fits: func(n spec.Node) bool { return n.Level >= level }})
	}
	if image != "" {
		// A containerd that is gone for a while leaves its containers running.
		out = append(out, rule{name: containerRule, fits: func(n spec.Node) bool { return n.Containers }, lapses: true})
	}
	for _, c := range constraints {
		if pc, err := spec.ParseConstraint(c); err == nil { // validated when the service was made
			out = append(out, rule{name: c, fits: pc.Match})
		}
	}
	for _, w := range pins {
		out = append(out, rule{name: fmt.Sprintf("node.name==%s of bridge network %s", s.nodeName(w.Node), w.Name),
			fits: func(n spec.Node) bool { return n.ID == w.Node }})
	}
	return out
}

// rulesOf are those of a service's tasks.
func (s *State) rulesOf(v *service) []rule {
	return s.taskRules(v.Spec.Constraints, v.Spec.Networks, v.Spec.Task.Image, specLevel(v.Spec))
}

// specLevel is the level that a node must have for the tasks of a service.
func specLevel(sp spec.ServiceSpec) int {
	// These only the managers look at.
	sp.Update, sp.Rollback, sp.ForceUpdate = nil, nil, 0
	sp.Mode, sp.Spread, sp.MaxPerNode, sp.RestartCondition, sp.RestartWindow, sp.MaxConcurrent = "", nil, 0, "", 0, 0
	level, _ := NeedOf(sp)
	return level
}

// containerRule is the name of the rule that images bring.
const containerRule = "a container runtime"

// allow tells whether a node meets all rules.
func allow(rules []rule, n spec.Node) bool {
	for _, r := range rules {
		if !r.fits(n) {
			return false
		}
	}
	return true
}

// keeps tells whether a node may keep the tasks that it has, as far as it is not for
// their rules to say.
func keeps(n *node) bool { return n != nil && n.Availability != spec.AvailabilityDrain }

// assignable tells whether a node takes new tasks, as far as it is not for their rules
// to say.
func assignable(n *node) bool {
	return n != nil && n.Status == spec.NodeReady && n.Availability == spec.AvailabilityActive
}

// stays tells whether a task may stay where it is.
func (s *State) stays(v *service, t *task) bool {
	if t.Node == "" {
		return true
	}
	n := s.nodes[t.Node]
	return keeps(n) && allow(s.rulesOf(v), n.Node)
}
