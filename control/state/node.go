package state

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

func (s *State) upsertNode(c *UpsertNode) Result {
	in := c.Node.Clone()
	if in.ID == "" || len(in.ID) > 64 || strings.ContainsAny(in.ID, " \t\r\n/") {
		return Result{Err: s.checkID("node", in.ID)}
	}
	if err := spec.ValidateName("node", in.Name); err != nil {
		return Result{Err: failf(ErrInvalid, "%w", err)}
	}
	if !in.Addr.IsValid() || in.Addr.IsUnspecified() || in.Addr.IsMulticast() {
		return Result{Err: failf(ErrInvalid, "node %s: address %s can't be advertised", in.Name, in.Addr)}
	}
	if in.ControlPort < 1 || in.ControlPort > 65535 || in.GossipPort < 1 || in.GossipPort > 65535 {
		return Result{Err: failf(ErrInvalid, "node %s: ports %d and %d: use 1 to 65535", in.Name, in.ControlPort, in.GossipPort)}
	}
	for _, id := range s.nodeNames[in.Name] {
		if o := s.nodes[id]; id != in.ID && o.Status != spec.NodeDown {
			return Result{Err: failf(ErrExists, "node name %s is taken by node %s at %s: start the agent with another --node-name, or remove that node", in.Name, o.ID, o.Addr)}
		}
	}
	n := s.nodes[in.ID]
	if n == nil || n.Name != in.Name {
		if err := s.checkNodeName(in.Name, in.ID); err != nil {
			return Result{Err: err}
		}
	}
	if n != nil && n.expelled {
		return Result{Err: n.gone()}
	}
	if n != nil {
		if len(in.PublicKey) > 0 && !bytes.Equal(in.PublicKey, n.PublicKey) {
			return Result{Err: failf(ErrExists, "node %s is in the cluster with another key", n.ID)}
		}
		was := n.Node
		next := was
		next.Name, next.Addr, next.ControlPort, next.GossipPort = in.Name, in.Addr, in.ControlPort, in.GossipPort
		next.DataPath, next.Status, next.Message = in.DataPath, spec.NodeReady, ""
		next.Platform, next.Containers, next.ContainersWhy = in.Platform, in.Containers, in.ContainersWhy
		next.Level, next.Build = in.Level, in.Build
		next.NanoCPUs, next.Memory, next.EngineLabels = in.NanoCPUs, in.Memory, in.EngineLabels
		s.renameNode(n, next.Name)
		s.setNode(n, next)
		s.returned(n)
		out := n.Node
		return Result{Node: &out}
	}
	if err := s.checkID("node", in.ID); err != nil {
		return Result{Err: err}
	}
	if in.Role == "" {
		in.Role = spec.RoleWorker
	}
	if in.Availability == "" {
		in.Availability = spec.AvailabilityActive
	}
	if err := validateNode(in); err != nil {
		return Result{Err: err}
	}
	if err := s.tooOld(in, "join"); err != nil {
		return Result{Err: err}
	}
	number, ok := s.nextNumber()
	if !ok {
		return Result{Err: failf(ErrExhausted, "the cluster has %d nodes, the most it can: remove one", len(s.nodes))}
	}
	in.Number, in.Status, in.Message, in.Version = number, spec.NodeReady, "", s.index
	s.lastNumber = number
	s.event("node", "join", in.ID, in.Name, "role", in.Role)
	s.addNode(&node{Node: in, tasks: map[string]*task{}, changed: s.index})
	s.changed = s.index
	return Result{Node: &in}
}

// gone refuses what is meant for a node that was expelled.
func (n *node) gone() error {
	return failf(ErrInvalid, "node %s was lost when the cluster was made anew: remove it, and let it join as a new node", n.Name)
}

func validateNode(n spec.Node) error {
	switch n.Role {
	case spec.RoleManager, spec.RoleWorker:
	default:
		return failf(ErrInvalid, "node %s: role %q: use %s or %s", n.Name, n.Role, spec.RoleManager, spec.RoleWorker)
	}
	switch n.Availability {
	case spec.AvailabilityActive, spec.AvailabilityPause, spec.AvailabilityDrain:
	default:
		return failf(ErrInvalid, "node %s: availability %q: use %s, %s or %s", n.Name, n.Availability,
			spec.AvailabilityActive, spec.AvailabilityPause, spec.AvailabilityDrain)
	}
	for k := range n.Labels {
		if err := spec.ValidateLabelKey(k); err != nil {
			return failf(ErrInvalid, "node %s: %w", n.Name, err)
		}
	}
	return nil
}

func (s *State) addNode(n *node) {
	s.nodes[n.ID] = n
	s.numbers[n.Number] = n.ID
	s.nameNode(n.Name, n.ID)
}

func (s *State) nameNode(name, id string) {
	ids := append(slices.Clone(s.nodeNames[name]), id)
	slices.Sort(ids)
	s.nodeNames[name] = ids
}

func (s *State) unnameNode(name, id string) {
	ids := slices.DeleteFunc(slices.Clone(s.nodeNames[name]), func(x string) bool { return x == id })
	if s.nodeNames[name] = ids; len(ids) == 0 {
		delete(s.nodeNames, name)
	}
}

func (s *State) renameNode(n *node, name string) {
	if n.Name != name {
		s.unnameNode(n.Name, n.ID)
		s.nameNode(name, n.ID)
	}
}

// setNode replaces a node's record, if that changes anything.
func (s *State) setNode(n *node, next spec.Node) {
	was := n.Node
	same := was.Name == next.Name && was.Role == next.Role && was.Availability == next.Availability && was.Status == next.Status &&
		was.Message == next.Message && was.SameOfItself(next) && maps.Equal(was.Labels, next.Labels)
	if same {
		return
	}
	next.Version = s.index
	switch {
	case was.Status != next.Status:
		s.event("node", next.Status, n.ID, next.Name, "message", next.Message)
	default:
		s.event("node", "update", n.ID, next.Name, "availability", next.Availability, "role", next.Role)
	}
	n.Node = next
	s.changed = s.index
}

func (s *State) nextNumber() (int, bool) {
	for i := range spec.MaxNodes {
		k := (s.lastNumber+i)%spec.MaxNodes + 1
		if _, used := s.numbers[k]; !used {
			return k, true
		}
	}
	return 0, false
}

// returned takes back the tasks that were lost with a node and have no
// successor: as far as anyone knows they are as they were, and its reports will
// tell otherwise.
func (s *State) returned(n *node) {
	for _, t := range n.tasks { // independent of each other: of one slot's tasks only one can be revived, see below
		if t.Status.State == spec.TaskLost && !t.Status.Released && s.revivable(t) && !s.rival(t) {
			t.Status.State, t.Status.Message = max(t.was, spec.TaskAssigned), ""
			t.ended = 0
			s.touchTask(t)
		}
	}
}

// rival tells whether a slot has another lost task that is newer: that one is
// the slot's.
func (s *State) rival(t *task) bool {
	v := s.services[t.Service]
	return v != nil && slices.ContainsFunc(v.slot(t.Slot), func(o *task) bool {
		return o.seq > t.seq && o.Status.State == spec.TaskLost && o.Desired == spec.DesiredRunning
	})
}

func (s *State) updateNode(c *UpdateNode) Result {
	n, err := s.node(c.Ref)
	if err != nil {
		return Result{Err: err}
	}
	if n.expelled {
		return Result{Err: n.gone()}
	}
	next := n.Node.Clone()
	if c.Name != nil && *c.Name != n.Name {
		if err := s.nodeNameFree(n, *c.Name); err != nil {
			return Result{Err: err}
		}
		next.Name = *c.Name
	}
	if c.Role != nil {
		next.Role = *c.Role
	}
	if c.Availability != nil {
		next.Availability = *c.Availability
	}
	for _, k := range c.RemoveLabels {
		delete(next.Labels, k)
	}
	if len(c.SetLabels) > 0 && next.Labels == nil {
		next.Labels = map[string]string{}
	}
	maps.Copy(next.Labels, c.SetLabels)
	if err := validateNode(next); err != nil {
		return Result{Err: err}
	}
	if n.Role != spec.RoleManager && next.Role == spec.RoleManager {
		if err := s.tooOld(next, "be made a manager"); err != nil {
			return Result{Err: err}
		}
	}
	if n.Role == spec.RoleManager && next.Role != spec.RoleManager {
		if err := s.notLastManager(n, "made a worker"); err != nil {
			return Result{Err: err}
		}
	}
	s.renameNode(n, next.Name)
	s.setNode(n, next)
	out := n.Node
	return Result{Node: &out}
}

// nodeNameFree tells why a node can't take a name: nothing else that a reference to a
// node may mean has it, down or not.
func (s *State) nodeNameFree(n *node, name string) error {
	if err := spec.ValidateName("node", name); err != nil {
		return failf(ErrInvalid, "%w", err)
	}
	for _, o := range s.nodes {
		if o != n && strings.EqualFold(o.Name, name) {
			return failf(ErrExists, "node name %s is taken by node %s at %s: choose another, or remove that node", name, o.ID, o.Addr)
		}
		if o != n && o.ID == name {
			return failf(ErrExists, "node name %s is the ID of node %s: choose another", name, o.Name)
		}
	}
	return nil
}

func (s *State) notLastManager(n *node, what string) error {
	for _, o := range s.nodes {
		if o != n && o.Role == spec.RoleManager {
			return nil
		}
	}
	return failf(ErrInvalid, "node %s is the last manager and can't be %s: make another node a manager first", n.Name, what)
}

func (s *State) setNodeStatus(c *SetNodeStatus) Result {
	for _, st := range c.Nodes {
		switch st.Status {
		case spec.NodeReady, spec.NodeDown, spec.NodeUnknown:
		default:
			return Result{Err: failf(ErrInvalid, "node status %q: use %s, %s or %s", st.Status, spec.NodeReady, spec.NodeDown, spec.NodeUnknown)}
		}
	}
	var out *spec.Node
	for _, st := range c.Nodes {
		n := s.nodes[st.ID]
		if n == nil || n.expelled {
			continue
		}
		next := n.Node
		next.Status, next.Message = st.Status, st.Message
		if len(next.Message) > maxMessage {
			next.Message = strings.ToValidUTF8(next.Message[:maxMessage], "")
		}
		s.setNode(n, next)
		if st.Status == spec.NodeReady {
			s.returned(n)
		}
		v := n.Node
		out = &v
	}
	return Result{Node: out}
}

func (s *State) removeNode(c *RemoveNode) Result {
	n, err := s.node(c.Ref)
	if err != nil {
		return Result{Err: err}
	}
	if n.Status != spec.NodeDown && !c.Force {
		return Result{Err: failf(ErrInUse, "node %s is %s, not down: stop its agent or let it leave first, or use --force", n.Name, n.Status)}
	}
	if n.Role == spec.RoleManager {
		if err := s.notLastManager(n, "removed"); err != nil {
			return Result{Err: err}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(n.tasks)) {
		t := n.tasks[id]
		if t == nil {
			continue // forgotten with one before it: a slot keeps only its last tasks
		}
		if t.holds() {
			if !t.Status.State.Ended() {
				t.was, t.Status.State = t.Status.State, spec.TaskLost
				t.Status.Message = fmt.Sprintf("node %s was removed from the cluster", n.Name)
			}
			if t.Service == "" {
				t.Desired = spec.DesiredRemove // there is nobody left to ask about it
			}
			s.free(t)
		} else if t.Service == "" {
			s.forget(t)
		}
	}
	if t := s.trust.clone(); t != nil && len(t.Gossip) > 0 {
		// What it has seen is no secret any more: the leader changes the keys.
		t.Exposed = t.Gossip[len(t.Gossip)-1].Generation
		s.trust = t
	}
	delete(s.nodes, n.ID)
	s.depart(n.ID)
	delete(s.numbers, n.Number)
	s.unnameNode(n.Name, n.ID)
	s.changed = s.index
	s.event("node", "remove", n.ID, n.Name)
	out := n.Node
	return Result{Node: &out}
}
