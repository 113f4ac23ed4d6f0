package state

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/ipam"
	"github.com/shoalnet/shoal/spec"
)

// State is all that raft replicates. Make one with New or Restore.
type State struct {
	rules      int    // that the command at hand is judged by; else the newest
	level      int    // the cluster's, see Level
	index      uint64 // of the last command
	cluster    *Cluster
	trust      *Trust
	defaultNet string // ID
	networks   map[string]*network
	services   map[string]*service // also those that wait for their last task
	tasks      map[string]*task
	nodes      map[string]*node
	blobs      map[string]*spec.Blob // secrets and configs

	// Next-fit cursors.
	lastSubnet netip.Prefix
	lastVNI    uint32
	lastNumber int
	seq        uint64 // of tasks

	// Indices; not part of a snapshot.
	netNames  map[string]string   // name → ID
	svcNames  map[string]string   // without removed services
	removed   map[string]*service // those that wait for their last task
	taskNames map[string]string   // without standalone tasks that are being removed
	taskFolds map[string]int      // how many of taskNames are this one in lower case
	nodeNames map[string][]string // a node that is down may share its name with its successor
	vnis      map[uint32]string
	numbers   map[int]string
	published map[string]*service // those with ports that every node answers
	events    []Event             // not taken yet
	changed   uint64              // index of the last change to what every assignment shows
	gone      []departed          // the newest services, tasks and nodes that are no more, oldest first
	goneFrom  uint64              // gone tells all of the time after this index
}

type network struct {
	spec.Network
	spaces  []*ipam.Space // one per subnet
	changed uint64        // index of the last change to its services
}

type service struct {
	spec.Service
	removed bool
	rev     uint64  // index of the last change of what its tasks are made from
	prevRev uint64  // rev of Previous
	tasks   []*task // by slot, then age
}

type task struct {
	spec.Task
	seq     uint64         // age
	rev     uint64         // the service's when it was made
	started int64          // when it was first seen running; Unix milliseconds, leader's clock; 0: never
	ended   int64          // when it was seen to have ended
	was     spec.TaskState // before it was lost; 0: never, or its node has said since that it lives
	heard   uint64         // index at which its node's word was the newer one of its runs; not in a snapshot, after which all is told anew
}

type node struct {
	spec.Node
	tasks   map[string]*task // assigned to it, by ID
	changed uint64
	// expelled: it was a manager, and the cluster was made anew without it. It is
	// still listed for people, and counts nowhere.
	expelled bool
}

// Result of a command. The object is the one made, changed or removed, as it is
// then.
type Result struct {
	Err     error
	Cluster *Cluster
	Network *spec.Network
	Service *spec.Service
	Task    *spec.Task
	Node    *spec.Node
	Blob    *spec.Blob
	Applied int // of Schedule: operations carried out
	Skipped int // of Schedule: operations whose precondition no longer held
}

// New returns the state before init.
func New() *State {
	return &State{
		rules:    Level,
		networks: map[string]*network{}, services: map[string]*service{}, tasks: map[string]*task{}, nodes: map[string]*node{}, blobs: map[string]*spec.Blob{},
		netNames: map[string]string{}, svcNames: map[string]string{}, removed: map[string]*service{},
		taskNames: map[string]string{}, taskFolds: map[string]int{}, nodeNames: map[string][]string{}, vnis: map[uint32]string{}, numbers: map[int]string{},
		published: map[string]*service{},
	}
}

// Index is that of the last command applied, refused ones included.
func (s *State) Index() uint64 { return s.index }

// Cluster returns what was fixed at init; false before.
func (s *State) Cluster() (Cluster, bool) {
	if s.cluster == nil {
		return Cluster{}, false
	}
	return *s.cluster, true
}

// Networks returns all networks, by name.
func (s *State) Networks() []spec.Network {
	out := make([]spec.Network, 0, len(s.networks))
	for _, n := range s.networks {
		out = append(out, n.Network)
	}
	slices.SortFunc(out, func(a, b spec.Network) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Network finds a network by ref.
func (s *State) Network(ref string) (spec.Network, error) {
	n, err := s.network(ref)
	if err != nil {
		return spec.Network{}, err
	}
	return n.Network, nil
}

func (s *State) network(ref string) (*network, error) {
	if n := s.networks[ref]; n != nil && s.idFirst(s.netNames[ref] != "") {
		return n, nil
	}
	if id, ok := s.netNames[ref]; ok {
		return s.networks[id], nil
	}
	return byPrefix("network", ref, s.networks, nil)
}

// Services returns all services, by name. Removed ones are gone at once.
func (s *State) Services() []spec.Service {
	out := make([]spec.Service, 0, len(s.services))
	for _, v := range s.services {
		if !v.removed {
			out = append(out, v.Service)
		}
	}
	slices.SortFunc(out, func(a, b spec.Service) int { return cmp.Compare(a.Spec.Name, b.Spec.Name) })
	return out
}

// Service finds a service by ref.
func (s *State) Service(ref string) (spec.Service, error) {
	v, err := s.service(ref)
	if err != nil {
		return spec.Service{}, err
	}
	return v.Service, nil
}

func (s *State) service(ref string) (*service, error) {
	if v := s.services[ref]; v != nil && !v.removed && s.idFirst(s.svcNames[ref] != "") {
		return v, nil
	}
	if id, ok := s.svcNames[ref]; ok {
		return s.services[id], nil
	}
	return byPrefix("service", ref, s.services, func(v *service) bool { return !v.removed })
}

// TaskStates counts the tasks that are kept, by their state.
func (s *State) TaskStates() map[spec.TaskState]int {
	out := map[spec.TaskState]int{}
	for _, t := range s.tasks {
		out[t.Status.State]++
	}
	return out
}

// Running counts the replicas of a service that run and are meant to.
func (s *State) Running(serviceID string) int {
	v, n := s.services[serviceID], 0
	if v != nil {
		for _, t := range v.tasks {
			if t.Desired == spec.DesiredRunning && t.Status.State == spec.TaskRunning {
				n++
			}
		}
	}
	return n
}

// Stale counts the tasks of a service that are to be replaced, as the service
// has been changed since they were made.
func (s *State) Stale(serviceID string) int {
	v, n := s.services[serviceID], 0
	if v != nil {
		for _, t := range v.tasks {
			if t.Live() && t.rev != v.rev {
				n++
			}
		}
	}
	return n
}

// TaskFilter selects tasks; its zero value takes those that live or are meant to.
type TaskFilter struct {
	Service string // ID; empty: any
	Node    string // ID; empty: any
	// All: also tasks that have ended, or are to end. Without it, a task is
	// listed while it is desired to run and its program runs or will, and
	// while it is being stopped.
	All bool
}

// Tasks returns the tasks that f selects: by name of their service or their own
// name, then slot, newest first.
func (s *State) Tasks(f TaskFilter) []spec.Task {
	var out []*task
	add := func(t *task) {
		if (f.Service == "" || t.Service == f.Service) && (f.Node == "" || t.Node == f.Node) && (f.All || !t.Status.State.Ended()) {
			out = append(out, t)
		}
	}
	switch {
	case f.Service != "":
		if v := s.services[f.Service]; v != nil {
			for _, t := range v.tasks {
				add(t)
			}
		}
	case f.Node != "":
		if n := s.nodes[f.Node]; n != nil {
			for _, t := range n.tasks {
				add(t)
			}
		}
	default:
		for _, t := range s.tasks {
			add(t)
		}
	}
	return s.sorted(out)
}

func (s *State) sorted(ts []*task) []spec.Task {
	key := func(t *task) string {
		if v := s.services[t.Service]; v != nil {
			return v.Spec.Name
		}
		return t.Name
	}
	slices.SortFunc(ts, func(a, b *task) int {
		if a.Service != b.Service || a.Service == "" {
			if c := cmp.Or(cmp.Compare(key(a), key(b)), cmp.Compare(a.Service, b.Service)); c != 0 {
				return c
			}
		}
		return cmp.Or(cmp.Compare(a.Slot, b.Slot), cmp.Compare(b.seq, a.seq))
	})
	out := make([]spec.Task, len(ts))
	for i, t := range ts {
		out[i] = t.Task
	}
	return out
}

// Task finds a task by ref.
func (s *State) Task(ref string) (spec.Task, error) {
	t, err := s.task(ref)
	if err != nil {
		return spec.Task{}, err
	}
	return t.Task, nil
}

func (s *State) task(ref string) (*task, error) {
	if t := s.tasks[ref]; t != nil && s.idFirst(s.taskNames[ref] != "") {
		return t, nil
	}
	if id, ok := s.taskNames[ref]; ok {
		return s.tasks[id], nil
	}
	return byPrefix("task", ref, s.tasks, nil)
}

// Nodes returns all nodes, by name, then ID.
func (s *State) Nodes() []spec.Node {
	out := make([]spec.Node, 0, len(s.nodes))
	for _, n := range s.nodes {
		out = append(out, n.Node)
	}
	slices.SortFunc(out, func(a, b spec.Node) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out
}

// HasNodes tells whether there is any node.
func (s *State) HasNodes() bool { return len(s.nodes) > 0 }

// Node finds a node by ref. Of several nodes of one name, one that is not down
// is meant.
func (s *State) Node(ref string) (spec.Node, error) {
	n, err := s.node(ref)
	if err != nil {
		return spec.Node{}, err
	}
	return n.Node, nil
}

func (s *State) node(ref string) (*node, error) {
	ids := s.nodeNames[ref]
	if n := s.nodes[ref]; n != nil && s.idFirst(len(ids) > 0) {
		return n, nil
	}
	if len(ids) == 0 {
		return byPrefix("node", ref, s.nodes, nil)
	}
	up := slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return s.nodes[id].Status == spec.NodeDown })
	if len(up) > 0 {
		ids = up
	}
	if len(ids) > 1 {
		return nil, ambiguous("node", ref, slices.Values(ids))
	}
	return s.nodes[ids[0]], nil
}

// RunsOn tells whether there is a task of that ID on a node.
func (s *State) RunsOn(task, node string) bool {
	t := s.tasks[task]
	return t != nil && t.Node == node
}

// TasksOfNode returns every task assigned to a node, in the order of Tasks.
func (s *State) TasksOfNode(id string) []spec.Task { return s.Tasks(TaskFilter{Node: id, All: true}) }

// byPrefix finds an object by a unique prefix of its ID.
func byPrefix[T any](kind, ref string, all map[string]*T, visible func(*T) bool) (*T, error) {
	var hits []string
	if ref != "" && len(ref) < spec.IDLen {
		for id, v := range all {
			if strings.HasPrefix(id, ref) && (visible == nil || visible(v)) {
				hits = append(hits, id)
			}
		}
	}
	switch len(hits) {
	case 0:
		return nil, &NotFoundError{kind, ref}
	case 1:
		return all[hits[0]], nil
	}
	return nil, ambiguous(kind, ref, slices.Values(hits))
}

func ambiguous(kind, ref string, ids iter.Seq[string]) error {
	m := slices.Sorted(ids)
	return &AmbiguousError{kind, ref, m[:min(len(m), 10)]}
}

// Assignment is everything a node needs to be told.
type Assignment struct {
	Index   uint64 // of the last change to it
	Cluster Cluster
	// Tasks are all tasks of the node that the managers remember, by ID:
	// released ones too, whose output the node keeps as long as they are here.
	Tasks    []spec.Task
	Networks []spec.Network // of the tasks that are not released, and those that published ports lead to, by ID
	Services []spec.Service // on Networks, by ID
	Nodes    []spec.Node    // all, by ID
	Trust    *Trust         // nil: none
	Level    int            // the cluster's
}

// RoleOf is a node's role by its ID; "" of one that is not in the cluster.
func (s *State) RoleOf(id string) string {
	if n := s.nodes[id]; n != nil && !n.expelled {
		return n.Role
	}
	return ""
}

// AssignmentIndex is the raft index of the last change to what AssignmentFor
// shows of a node; 0 for an unknown one. It is cheap: ask it after each command,
// and build an Assignment when it has grown.
func (s *State) AssignmentIndex(nodeID string) uint64 {
	n := s.nodes[nodeID]
	if n == nil {
		return 0
	}
	idx := max(s.changed, n.changed)
	for _, t := range n.tasks {
		if t.holds() {
			for _, a := range t.Attachments {
				if w := s.networks[a.Network]; w != nil {
					idx = max(idx, w.changed)
				}
			}
		}
	}
	for _, v := range s.published {
		if w := s.networks[v.Ingress]; w != nil {
			idx = max(idx, w.changed)
		}
	}
	return idx
}

// AssignmentFor returns a node's assignment.
func (s *State) AssignmentFor(nodeID string) (Assignment, error) {
	d, err := s.AssignmentSince(nodeID, 0, nil)
	return d.Assignment, err
}

// Delta is how an assignment differs from an earlier one of the same node.
type Delta struct {
	// Assignment is as it is now, but of Tasks, Services and Nodes only what is new or
	// changed. Its Index is never less than Since.
	Assignment
	Since uint64 // index of the earlier one; 0: this is whole, whatever was before
	// Gone are IDs of what the earlier one may have had of these, and this one has not:
	// the services and tasks of others that ended since then are among them.
	Gone []string
}

// AssignmentSince returns what changed in a node's assignment since the one of an
// index, 0 for none, which had networks (IDs). Where too much has gone since then for
// the state to remember, it is whole. [Merge] is the inverse.
func (s *State) AssignmentSince(nodeID string, since uint64, networks map[string]bool) (Delta, error) {
	n := s.nodes[nodeID]
	if n == nil || n.expelled || s.cluster == nil {
		return Delta{}, &NotFoundError{"node", nodeID}
	}
	if since < s.goneFrom {
		since, networks = 0, nil
	}
	a := Delta{Assignment: Assignment{Index: s.AssignmentIndex(nodeID), Cluster: *s.cluster, Trust: s.trust.clone(), Level: s.level}, Since: since}
	nets := map[string]bool{}
	for _, id := range slices.Sorted(maps.Keys(n.tasks)) {
		t := n.tasks[id]
		if since == 0 || max(t.Version, t.heard) > since {
			a.Tasks = append(a.Tasks, t.Task)
		}
		if t.holds() {
			for _, at := range t.Attachments {
				nets[at.Network] = true
			}
		}
	}
	for _, v := range s.published {
		nets[v.Ingress] = true
	}
	for _, id := range slices.Sorted(maps.Keys(nets)) {
		a.Networks = append(a.Networks, s.networks[id].Network)
	}
	on := func(v *service, nets map[string]bool) bool {
		return slices.ContainsFunc(v.Spec.Networks, func(at spec.NetworkAttachment) bool { return nets[at.Network] })
	}
	for _, v := range s.services {
		switch shown := !v.removed && on(v, nets); {
		case shown && (since == 0 || v.Version > since || !on(v, networks)):
			told := v.Service
			told.Previous, told.Update = nil, nil
			a.Services = append(a.Services, told)
		case !shown && since > 0 && (v.Version > since || on(v, networks)):
			a.Gone = append(a.Gone, v.ID)
		}
	}
	slices.SortFunc(a.Services, func(x, y spec.Service) int { return cmp.Compare(x.ID, y.ID) })
	for _, id := range slices.Sorted(maps.Keys(s.nodes)) {
		if n := s.nodes[id]; !n.expelled && (since == 0 || n.Version > since) {
			a.Nodes = append(a.Nodes, n.Node)
		}
	}
	if since > 0 {
		for i := len(s.gone) - 1; i >= 0 && s.gone[i].index > since; i-- {
			a.Gone = append(a.Gone, s.gone[i].id)
		}
	}
	slices.Sort(a.Gone)
	return a, nil
}

// departed is a service, a task or a node that is no more, since a raft index.
type departed struct {
	index uint64
	id    string
}

// maxGone is how many of these are remembered: a node that was told of the last of
// them is told of what changed, one that was not is told all anew.
const maxGone = 4096

// depart notes that something is in no assignment any more.
func (s *State) depart(id string) {
	if len(s.gone) >= 2*maxGone {
		s.goneFrom = s.gone[maxGone-1].index
		s.gone = slices.Delete(s.gone, 0, maxGone)
	}
	s.gone = append(s.gone, departed{s.index, id})
}

// Merge brings a list of what an assignment had, by ID, up to date: with what changed,
// by ID, and without what has gone. What has gone and come again is there. The lists
// stay as they are; where nothing changes, have itself is returned.
func Merge[T any](have, changed []T, gone map[string]bool, id func(T) string) []T {
	if len(changed) == 0 && !slices.ContainsFunc(have, func(x T) bool { return gone[id(x)] }) {
		return have
	}
	out := slices.Grow([]T(nil), len(have)+len(changed))
	for len(have) > 0 || len(changed) > 0 {
		switch {
		case len(have) == 0 || len(changed) > 0 && id(changed[0]) < id(have[0]):
			out, changed = append(out, changed[0]), changed[1:]
		case len(changed) > 0 && id(changed[0]) == id(have[0]):
			out, changed, have = append(out, changed[0]), changed[1:], have[1:]
		case gone[id(have[0])]:
			have = have[1:]
		default:
			out, have = append(out, have[0]), have[1:]
		}
	}
	if len(out) == 0 {
		return nil // as a whole one's
	}
	return out
}

// holds tells whether the task has addresses that nobody else may get.
func (t *task) holds() bool { return t.Node != "" && !t.Status.Released }

func (t *task) holder() string { return "task " + t.Name }

func (v *service) holder() string { return "service " + v.Spec.Name }

// Apply carries one command out. It never panics; a command that is refused
// changes nothing but Index. The index must grow with each call.
func (s *State) Apply(index uint64, c Command) Result {
	s.index, s.rules = index, c.Rules
	defer func() { s.rules = Level }()
	if err := c.check(); err != nil {
		return Result{Err: err}
	}
	if s.cluster == nil && c.InitCluster == nil {
		return Result{Err: failf(ErrInvalid, "there is no cluster yet: make one with shoal init")}
	}
	switch {
	case c.InitCluster != nil:
		return s.initCluster(c.InitCluster)
	case c.CreateNetwork != nil:
		return s.createNetwork(c.CreateNetwork)
	case c.RemoveNetwork != nil:
		return s.removeNetwork(c.RemoveNetwork)
	case c.ConnectNetwork != nil:
		return s.connectNetwork(c.ConnectNetwork)
	case c.DisconnectNetwork != nil:
		return s.disconnectNetwork(c.DisconnectNetwork)
	case c.CreateService != nil:
		return s.createService(c.CreateService)
	case c.UpdateService != nil:
		return s.updateService(c.UpdateService)
	case c.RemoveService != nil:
		return s.removeService(c.RemoveService)
	case c.CreateTask != nil:
		return s.createTask(c.CreateTask)
	case c.StopTask != nil:
		return s.stopTask(c.StopTask)
	case c.StartTask != nil:
		return s.startTask(c.StartTask)
	case c.RenameTask != nil:
		return s.renameTask(c.RenameTask)
	case c.UpsertNode != nil:
		return s.upsertNode(c.UpsertNode)
	case c.UpdateNode != nil:
		return s.updateNode(c.UpdateNode)
	case c.SetNodeStatus != nil:
		return s.setNodeStatus(c.SetNodeStatus)
	case c.RemoveNode != nil:
		return s.removeNode(c.RemoveNode)
	case c.ReportTasks != nil:
		return s.reportTasks(c.ReportTasks)
	case c.RotateToken != nil:
		return s.rotateToken(c.RotateToken)
	case c.RotateRoot != nil:
		return s.rotateRoot(c.RotateRoot)
	case c.DropRoot != nil:
		return s.dropRoot(c.DropRoot)
	case c.Certify != nil:
		return s.certify(c.Certify)
	case c.RotateUnlock != nil:
		return s.rotateUnlock(c.RotateUnlock)
	case c.CreateBlob != nil:
		return s.createBlob(c.CreateBlob)
	case c.UpdateBlob != nil:
		return s.updateBlob(c.UpdateBlob)
	case c.RemoveBlob != nil:
		return s.removeBlob(c.RemoveBlob)
	case c.SetGossipKeys != nil:
		return s.setGossipKeys(c.SetGossipKeys)
	case c.RaiseLevel != nil:
		return s.raiseLevel(c.RaiseLevel)
	default:
		return s.schedule(c.Schedule)
	}
}

// checkID refuses an ID that can't be a key or is taken by any object.
func (s *State) checkID(kind, id string) error {
	if id == "" || len(id) > 64 || strings.ContainsAny(id, " \t\r\n/") {
		return failf(ErrInvalid, "%s ID %q: use 1 to 64 characters without spaces and slashes", kind, id)
	}
	taken := ""
	if _, ok := s.networks[id]; ok {
		taken = "network"
	} else if _, ok := s.services[id]; ok {
		taken = "service"
	} else if _, ok := s.tasks[id]; ok {
		taken = "task"
	} else if b, ok := s.blobs[id]; ok {
		taken = string(b.Kind)
	} else if _, ok := s.nodes[id]; ok && kind != "node" {
		taken = "node"
	}
	if taken != "" {
		return failf(ErrExists, "ID %s is taken by a %s", id, taken)
	}
	return nil
}

// undo reverts what a command did before it was refused, newest first.
type undo []func()

func (u *undo) add(f func()) { *u = append(*u, f) }

func (u undo) run() {
	for _, f := range slices.Backward(u) {
		f()
	}
}
