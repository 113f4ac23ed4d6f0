package state

// TEMPORARY: signatures that others build on; replaced by the real files in minutes.

import "github.com/shoalnet/shoal/spec"

type State struct{}
type Result struct {
	Err     error
	Cluster *Cluster
	Network *spec.Network
	Service *spec.Service
	Task    *spec.Task
	Node    *spec.Node
	Applied int // of Schedule: operations carried out
	Skipped int // of Schedule: operations whose precondition no longer held
}
type TaskFilter struct {
	Service string // ID; empty: any
	Node    string // ID; empty: any
	All     bool   // also tasks that have ended or are meant to end
}
type Assignment struct {
	Index    uint64 // see AssignmentIndex
	Cluster  Cluster
	Tasks    []spec.Task
	Networks []spec.Network
	Services []spec.Service
	Nodes    []spec.Node
}

func New() *State                                                { return &State{} }
func Restore(b []byte) (*State, error)                           { return New(), nil }
func (s *State) Snapshot() ([]byte, error)                       { return nil, nil }
func (s *State) Apply(index uint64, c Command) Result            { return Result{} }
func (s *State) Index() uint64                                   { return 0 }
func (s *State) Cluster() (Cluster, bool)                        { return Cluster{}, false }
func (s *State) Networks() []spec.Network                        { return nil }
func (s *State) Network(ref string) (spec.Network, error)        { return spec.Network{}, nil }
func (s *State) Services() []spec.Service                        { return nil }
func (s *State) Service(ref string) (spec.Service, error)        { return spec.Service{}, nil }
func (s *State) Running(serviceID string) int                    { return 0 } // replicas now running
func (s *State) Tasks(f TaskFilter) []spec.Task                  { return nil }
func (s *State) Task(ref string) (spec.Task, error)              { return spec.Task{}, nil }
func (s *State) Nodes() []spec.Node                              { return nil }
func (s *State) Node(ref string) (spec.Node, error)              { return spec.Node{}, nil }
func (s *State) TasksOfNode(id string) []spec.Task               { return nil }
func (s *State) AssignmentFor(nodeID string) (Assignment, error) { return Assignment{}, nil }

// AssignmentIndex: raft index of the last change that AssignmentFor(nodeID)
// shows; 0 for an unknown node. Cheap: compare before building an Assignment.
func (s *State) AssignmentIndex(nodeID string) uint64 { return 0 }

// Plan: next is Unix ms when it would say more though nothing changed; 0: never.
func Plan(s *State, now int64) (ops []ScheduleOp, next int64) { return nil, 0 }

type ScheduleOp struct{}
