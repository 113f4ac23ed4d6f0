package state

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// The rules that a command is judged by are those of the cluster's level at its time
// ([Level]). A log is replayed by them: what was accepted then, and is not now, must
// not be lost when its entries are read again, and every manager must make the same
// of an entry, whatever else its build knows.
//
//	0  names differ by case; a name goes before an ID; any name may be an address
//	1  names are the same in upper and lower case, as they are to a resolver, and
//	   none reads as an address; a service and a task can't have one name on one
//	   network; a full ID goes before a name

// Stamped is c to be judged by the rules of a level. Who proposes a command stamps it
// with the cluster's.
func (c Command) Stamped(level int) Command {
	c.Rules = max(level, 1) // rules 1 are older than levels
	return c
}

// idFirst tells whether a full ID counts although something has it as its name.
func (s *State) idFirst(isName bool) bool { return !isName || s.rules >= 1 }

func (s *State) sameName(a, b string) bool {
	return a == b || s.rules >= 1 && strings.EqualFold(a, b)
}

func (s *State) nameTask(t *task) {
	if _, ok := s.taskNames[t.Name]; !ok {
		s.taskFolds[strings.ToLower(t.Name)]++
	}
	s.taskNames[t.Name] = t.ID
}

func (s *State) unnameTask(t *task) {
	if s.taskNames[t.Name] != t.ID {
		return
	}
	delete(s.taskNames, t.Name)
	low := strings.ToLower(t.Name)
	if s.taskFolds[low]--; s.taskFolds[low] == 0 {
		delete(s.taskFolds, low)
	}
}

// newName refuses a name that reads as an address or that one of taken has but
// for its case.
func (s *State) newName(kind, name string, taken func(string) (other string)) error {
	if s.rules < 1 {
		return nil
	}
	if err := spec.ValidateNewName(kind, name); err != nil {
		return failf(ErrInvalid, "%w", err)
	}
	if o := taken(name); o != "" {
		return failf(ErrExists, "name %s is taken by %s %s: names are the same in upper and lower case", name, kind, o)
	}
	return nil
}

// folded is the least key of m that is name but for its case.
func folded[V any](m map[string]V, name string) string {
	out := ""
	for k := range m {
		if strings.EqualFold(k, name) && (out == "" || k < out) {
			out = k
		}
	}
	return out
}

func (s *State) checkServiceName(name string) error {
	// Also by the rules of before, but not of what a cluster has from before these.
	if err := spec.ValidateServiceName(name); err != nil && (s.rules >= 1 || strings.Contains(name, ".")) {
		return failf(ErrInvalid, "%w", err)
	}
	return s.newName("service", name, func(name string) string { return folded(s.svcNames, name) })
}

func (s *State) checkNetworkName(name string) error {
	return s.newName("network", name, func(name string) string { return folded(s.netNames, name) })
}

func (s *State) checkTaskName(name string) error {
	return s.newName("task", name, func(name string) string {
		if s.taskFolds[strings.ToLower(name)] == 0 {
			return ""
		}
		return folded(s.taskNames, name)
	})
}

// checkNodeName refuses a new name of the node with an ID.
func (s *State) checkNodeName(name, id string) error {
	return s.newName("node", name, func(name string) string {
		out := ""
		for _, n := range s.nodes {
			// A node that is down may share its name with its successor.
			if n.ID != id && n.Status != spec.NodeDown && strings.EqualFold(n.Name, name) && (out == "" || n.Name < out) {
				out = n.Name
			}
		}
		return out
	})
}

// checkNames refuses names that read as an address, but for those that were there
// before.
func (s *State) checkNames(names, before []spec.NewName) error {
	if s.rules < 1 {
		return nil
	}
	for _, n := range names {
		if slices.Contains(before, n) {
			continue
		}
		if err := n.Validate(); err != nil {
			return failf(ErrInvalid, "%w", err)
		}
	}
	return nil
}

// clash returns a name that a service and a task of its own would both have on a
// network, "" if there is none. To share an alias is what aliases are for; a name
// that either has for itself must lead to it and nowhere else.
func clash(service string, aliases []string, task string, taskAliases []string) string {
	is := func(names []string, name string) bool {
		return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, name) })
	}
	// own are the names that are made of the service's: see dns.
	own := func(name string) bool {
		if strings.EqualFold(name, service) {
			return true
		}
		if first, rest, ok := strings.Cut(name, "."); ok && strings.EqualFold(first, "tasks") && (strings.EqualFold(rest, service) || is(aliases, rest)) {
			return true
		}
		i := strings.LastIndexByte(name, '.')
		return i > 0 && strings.EqualFold(name[:i], service) && strings.Trim(name[i+1:], "0123456789") == ""
	}
	if own(task) || is(aliases, task) {
		return task
	}
	for _, a := range taskAliases {
		if own(a) {
			return a
		}
	}
	return ""
}

// checkServiceNames refuses what a service is to be called: names that read as
// addresses, and those that a task of its own has on one of its networks. What
// was so before, in old, stays.
func (s *State) checkServiceNames(sp, old spec.ServiceSpec) error {
	if s.rules < 1 {
		return nil
	}
	if err := s.checkNames(sp.Names(), old.Names()); err != nil {
		return failf(ErrInvalid, "service %s: %w", sp.Name, err)
	}
	aliases := func(sp spec.ServiceSpec, network string) ([]string, bool) {
		i := slices.IndexFunc(sp.Networks, func(a spec.NetworkAttachment) bool { return a.Network == network })
		if i < 0 {
			return nil, false
		}
		return sp.Networks[i].Aliases, true
	}
	var hit *task
	var name, on string
	for _, t := range s.tasks {
		if t.Service != "" || !t.holds() || (hit != nil && t.seq > hit.seq) {
			continue
		}
		for _, a := range t.wants() {
			as, ok := aliases(sp, a.Network)
			if w := s.networks[a.Network]; !ok || !w.Wired() {
				continue
			}
			n := clash(sp.Name, as, t.Name, a.Aliases)
			if was, ok := aliases(old, a.Network); n == "" || ok && clash(old.Name, was, t.Name, a.Aliases) != "" {
				continue
			}
			hit, name, on = t, n, s.networks[a.Network].Name
			break
		}
	}
	if hit == nil {
		return nil
	}
	if !hit.Live() && hit.Status.State != spec.TaskLost {
		return failf(ErrEnding, "service %s: task %s, which is ending, has the name %s on network %s: try again in a moment", sp.Name, hit.Name, name, on)
	}
	return failf(ErrExists, "service %s: task %s has the name %s on network %s: choose another name, or remove the task with 'shoal rm -f %s'", sp.Name, hit.Name, name, on, hit.Name)
}

// checkTaskClash refuses to give a task names that a service has on one of nets.
func (s *State) checkTaskClash(task string, nets []spec.NetworkAttachment) error {
	if s.rules < 1 {
		return nil
	}
	for _, a := range nets {
		w := s.networks[a.Network]
		if !w.Wired() {
			continue
		}
		if err := s.checkNames(a.Names(), nil); err != nil {
			return err
		}
		var hit *service
		var name string
		for _, v := range s.services {
			if v.removed || !v.On(w.ID) || (hit != nil && v.Spec.Name > hit.Spec.Name) {
				continue
			}
			if n := clash(v.Spec.Name, v.AliasesOn(w.ID), task, a.Aliases); n != "" {
				hit, name = v, n
			}
		}
		if hit != nil {
			return failf(ErrExists, "service %s has the name %s on network %s: choose another", hit.Spec.Name, name, w.Name)
		}
	}
	return nil
}

// Clashes tells of names that would be refused today: a cluster may have them from
// before. All tasks are given, ended ones too.
func Clashes(nodes []spec.Node, networks []spec.Network, services []spec.Service, tasks []spec.Task) []string {
	var out []string
	owners := map[string][]string{} // kind and folded name
	add := func(kind, name string) {
		k := kind + " " + strings.ToLower(name)
		owners[k] = append(owners[k], name)
		if a, ok := spec.ReadsAsAddress(name); ok {
			out = append(out, fmt.Sprintf("the name of %s %s is the address %s to programs", kind, name, a))
		}
	}
	for _, n := range nodes {
		if n.Status != spec.NodeDown {
			add("node", n.Name)
		}
	}
	names := map[string]string{}
	for _, n := range networks {
		add("network", n.Name)
		names[n.ID] = n.Name
	}
	for _, v := range services {
		add("service", v.Spec.Name)
	}
	for _, t := range tasks {
		if t.Service != "" {
			continue
		}
		add("task", t.Name)
		if !t.Live() {
			continue
		}
		for _, a := range t.Attachments {
			for _, v := range services {
				if a.Leaving == 0 && a.Iface != "" && v.On(a.Network) {
					if n := clash(v.Spec.Name, v.AliasesOn(a.Network), t.Name, a.Aliases); n != "" {
						out = append(out, fmt.Sprintf("service %s and task %s both have the name %s on network %s", v.Spec.Name, t.Name, n, cmp.Or(names[a.Network], a.Network)))
					}
				}
			}
		}
	}
	for _, k := range slices.Sorted(maps.Keys(owners)) {
		if who := owners[k]; len(who) > 1 {
			kind, _, _ := strings.Cut(k, " ")
			slices.Sort(who)
			out = append(out, fmt.Sprintf("%ss %s have one name but for upper and lower case: each gives all of them", kind, strings.Join(who, " and ")))
		}
	}
	slices.Sort(out)
	return out
}
