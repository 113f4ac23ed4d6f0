package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"

	"github.com/shoalnet/shoal/spec"
)

// MaxCommand bounds an encoded command, in bytes. [Plan] stays far below it.
const MaxCommand = 4 << 20

// Command is one entry of the log: exactly one field is set. Whatever is random
// or read from a clock is in it, put there by its proposer.
//
// A field called Ref takes an ID, an exact name, or a unique prefix of an ID;
// it is resolved when the command is applied, so that a command means what the
// cluster is then, not what its proposer last saw.
type Command struct {
	// Rules are those that the command is judged by, see [Command.Stamped].
	Rules int `json:"rules,omitempty"`

	InitCluster   *InitCluster   `json:"init_cluster,omitempty"`
	CreateNetwork *CreateNetwork `json:"create_network,omitempty"`
	RemoveNetwork *RemoveNetwork `json:"remove_network,omitempty"`

	ConnectNetwork    *ConnectNetwork    `json:"connect_network,omitempty"`
	DisconnectNetwork *DisconnectNetwork `json:"disconnect_network,omitempty"`

	CreateService *CreateService `json:"create_service,omitempty"`
	UpdateService *UpdateService `json:"update_service,omitempty"`
	RemoveService *RemoveService `json:"remove_service,omitempty"`
	CreateTask    *CreateTask    `json:"create_task,omitempty"`
	StopTask      *StopTask      `json:"stop_task,omitempty"`
	UpsertNode    *UpsertNode    `json:"upsert_node,omitempty"`
	UpdateNode    *UpdateNode    `json:"update_node,omitempty"`
	SetNodeStatus *SetNodeStatus `json:"set_node_status,omitempty"`
	RemoveNode    *RemoveNode    `json:"remove_node,omitempty"`
	ReportTasks   *ReportTasks   `json:"report_tasks,omitempty"`
	Schedule      *Schedule      `json:"schedule,omitempty"`

	RotateToken   *RotateToken   `json:"rotate_token,omitempty"`
	RotateRoot    *RotateRoot    `json:"rotate_root,omitempty"`
	DropRoot      *DropRoot      `json:"drop_root,omitempty"`
	Certify       *Certify       `json:"certify,omitempty"`
	SetGossipKeys *SetGossipKeys `json:"set_gossip_keys,omitempty"`
	RotateUnlock  *RotateUnlock  `json:"rotate_unlock,omitempty"`
	RaiseLevel    *RaiseLevel    `json:"raise_level,omitempty" level:"1"`

	CreateBlob *CreateBlob `json:"create_blob,omitempty" level:"2"`
	UpdateBlob *UpdateBlob `json:"update_blob,omitempty" level:"2"`
	RemoveBlob *RemoveBlob `json:"remove_blob,omitempty" level:"2"`

	StartTask  *StartTask  `json:"start_task,omitempty" level:"3"`
	RenameTask *RenameTask `json:"rename_task,omitempty" level:"3"`
}

// Cluster is what is fixed at init.
type Cluster struct {
	ID           string         `json:"id"`
	Pools        []netip.Prefix `json:"pools"`          // empty: ipam.DefaultPool
	SubnetSize   int            `json:"subnet_size"`    // prefix length of IPv4 subnets cut from Pools; 0: 24. IPv6 subnets are /64.
	DataPathPort int            `json:"data_path_port"` // UDP port of VXLAN; 0: 4789
	Created      int64          `json:"created"`        // Unix milliseconds
}

// InitCluster makes the cluster and its default network. It is refused when
// there is one.
type InitCluster struct {
	Cluster        Cluster        `json:"cluster"`
	DefaultNetwork string         `json:"default_network"`       // ID for it
	HostRoutes     []netip.Prefix `json:"host_routes,omitempty"` // see CreateNetwork
	Trust          *Trust         `json:"trust,omitempty"`
	// Level is the proposer's, and the cluster's from the start.
	Level int `json:"level,omitempty" level:"1"`
}

// CreateNetwork makes a network. Of Network, ID, Name and Created must be set;
// Driver, Subnets, Gateways and VNI are filled in where empty. Several subnets
// may be given, of either family.
type CreateNetwork struct {
	Network spec.Network `json:"network"`
	// HostRoutes are the prefixes that the proposer's host routes elsewhere: no
	// subnet may overlap one. Default routes among them are ignored.
	HostRoutes []netip.Prefix `json:"host_routes,omitempty"`
}

// RemoveNetwork removes a network that nothing uses.
type RemoveNetwork struct {
	Ref string `json:"ref"`
}

// ConnectNetwork attaches a standalone task or a service that runs, with all of
// its tasks, to a further network. Nothing is restarted.
type ConnectNetwork struct {
	Network string       `json:"network"` // ref
	Target  string       `json:"target"`  // ref of a service or a task
	Aliases []string     `json:"aliases,omitempty"`
	Addrs   []netip.Addr `json:"addrs,omitempty"` // of the task, or VIPs
}

// DisconnectNetwork takes a task or a service off a network.
type DisconnectNetwork struct {
	Network string `json:"network"`
	Target  string `json:"target"`
}

// CreateService makes a service. Networks in the spec are refs; none means the
// default network. Addrs of an attachment are VIPs asked for.
type CreateService struct {
	ID      string           `json:"id"`
	Spec    spec.ServiceSpec `json:"spec"`
	Created int64            `json:"created"` // Unix milliseconds
}

// UpdateService changes a service: its whole spec, or its count of replicas.
// With both, Replicas wins.
type UpdateService struct {
	Ref      string            `json:"ref"`
	Version  uint64            `json:"version,omitempty"` // refuse with ErrConflict if it is another; 0: any
	Spec     *spec.ServiceSpec `json:"spec,omitempty"`
	Replicas *int              `json:"replicas,omitempty"`
	Rollback bool              `json:"rollback,omitempty" level:"2"` // to its previous spec, instead of Spec
	Now      int64             `json:"now,omitempty" level:"2"`      // Unix milliseconds, the leader's clock
	// Rebalance has replicas replaced, instead of all else, until the service is spread
	// as one that is made anew.
	Rebalance bool `json:"rebalance,omitempty" level:"2"`
}

// RemoveService removes a service at once for readers; its VIPs stay reserved
// until its last task is released.
type RemoveService struct {
	Ref string `json:"ref"`
}

// CreateTask makes a standalone task on a node and gives it its addresses.
type CreateTask struct {
	ID       string                   `json:"id"`
	Name     string                   `json:"name"` // not empty: the proposer makes one up
	Node     string                   `json:"node"` // ref; empty: the least loaded one that is ready
	Spec     spec.TaskSpec            `json:"spec"`
	Networks []spec.NetworkAttachment `json:"networks,omitempty"` // refs; empty: the default network
	Ports    []spec.Port              `json:"ports,omitempty"`    // on its node
	Created  int64                    `json:"created"`            // Unix milliseconds
}

// StopTask asks for the end of a task. A service's task is replaced by another,
// a standalone one stays stopped.
type StopTask struct {
	Ref    string `json:"ref"`
	Remove bool   `json:"remove,omitempty"` // and forget it, once its node has released it
	// Stopping is how; nil: as the task's spec has it.
	Stopping *spec.Stopping `json:"stopping,omitempty" level:"3"`
}

// StartTask has a standalone task run again under its ID: with its addresses, where
// these are still free or were asked for, and otherwise others. One that runs is
// stopped first with Restart, and left as it is without.
type StartTask struct {
	Ref string `json:"ref,omitempty" level:"3"`
	// Run is the task's Run plus one, as its proposer knows it: of two that ask for the
	// same one the second changes nothing.
	Run      int            `json:"run,omitempty" level:"3"`
	Restart  bool           `json:"restart,omitempty" level:"3"`
	Attach   bool           `json:"attach,omitempty" level:"3"` // somebody waits for its output
	Stopping *spec.Stopping `json:"stopping,omitempty" level:"3"`
	Now      int64          `json:"now,omitempty" level:"3"` // Unix milliseconds, the leader's clock
}

// RenameTask gives a standalone task another name.
type RenameTask struct {
	Ref  string `json:"ref,omitempty" level:"3"`
	Name string `json:"name,omitempty" level:"3"`
}

// UpsertNode makes a node known, or takes up the address, ports and data path
// with which a known one came back. A new node's Number is allocated
// (Node.Number is ignored), its Role and Labels are taken, Availability is
// active unless set; a known node keeps these four, as managers own them. Its
// PublicKey is its own for ever: another node of the same ID is refused. Either
// way its Status becomes ready.
type UpsertNode struct {
	Node spec.Node `json:"node"`
}

// UpdateNode changes what managers own of a node; nil leaves a field.
type UpdateNode struct {
	Ref          string            `json:"ref"`
	Name         *string           `json:"name,omitempty"`
	Role         *string           `json:"role,omitempty"`
	Availability *string           `json:"availability,omitempty"`
	SetLabels    map[string]string `json:"set_labels,omitempty"`
	RemoveLabels []string          `json:"remove_labels,omitempty"`
}

// SetNodeStatus notes what the managers found of nodes.
type SetNodeStatus struct {
	Nodes []NodeStatus `json:"nodes"` // unknown IDs are skipped
}

// NodeStatus is one node's.
type NodeStatus struct {
	ID      string `json:"id"`
	Status  string `json:"status"` // spec.NodeReady, NodeDown, NodeUnknown
	Message string `json:"message,omitempty"`
}

// RemoveNode forgets a node and frees all that its tasks held: whoever proposes
// it vouches that the node is gone for good, or has stopped its tasks.
type RemoveNode struct {
	Ref   string `json:"ref"`
	Force bool   `json:"force,omitempty"` // also one that is not down
}

// ReportTasks is what a node says of its tasks, by task ID. Tasks that are
// unknown, or another node's, are skipped.
type ReportTasks struct {
	Node  string                     `json:"node"` // ID
	Tasks map[string]spec.TaskStatus `json:"tasks"`
	Now   int64                      `json:"now"` // Unix milliseconds, the leader's clock: restart delays count from it
}

// Schedule carries out what [Plan] decided. Each operation checks that what it
// was decided on still holds, and is skipped otherwise.
type Schedule struct {
	Now int64        `json:"now"` // Unix milliseconds, the leader's clock
	Ops []ScheduleOp `json:"ops"`
}

// Encode is Decode's inverse. It refuses what Decode would.
func Encode(c Command) ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	b, err := json.Marshal(c)
	var none *json.UnsupportedValueError
	if errors.As(err, &none) { // of the caller's: the only one that has is a ratio
		return nil, failf(ErrInvalid, "command %s has the number %s: use a finite one", c.Kind(), none.Str)
	}
	if err != nil {
		return nil, fmt.Errorf("encode command %s: %w", c.Kind(), err)
	}
	if len(b) > MaxCommand {
		return nil, failf(ErrInvalid, "command %s is %d bytes long: the longest allowed is %d", c.Kind(), len(b), MaxCommand)
	}
	return b, nil
}

// Decode reads a command: at most [MaxCommand] bytes, exactly one kind set, no
// unknown fields. What it can't read is of a newer Shoal, and must not be half
// applied: managers would part without a word. The feature level keeps such entries
// out of the log until every manager reads them.
func Decode(b []byte) (Command, error) {
	var c Command
	if len(b) > MaxCommand {
		return c, failf(ErrInvalid, "command is %d bytes long: the longest allowed is %d", len(b), MaxCommand)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return Command{}, failf(ErrInvalid, "decode command: %v", err)
	}
	if dec.More() {
		return Command{}, failf(ErrInvalid, "decode command: data after its end")
	}
	if err := c.check(); err != nil {
		return Command{}, err
	}
	if c.Rules > Level {
		return Command{}, failf(ErrLevel, "command %s is to be judged by rules %d, and this Shoal knows those up to %d", c.Kind(), c.Rules, Level)
	}
	if r := c.RaiseLevel; r != nil && r.Level > Level {
		return Command{}, failf(ErrLevel, "the cluster went to feature level %d, and this Shoal has level %d", r.Level, Level)
	}
	if i := c.InitCluster; i != nil && i.Level > Level {
		return Command{}, failf(ErrLevel, "the cluster is at feature level %d, and this Shoal has level %d", i.Level, Level)
	}
	return c, nil
}

// Kind names the kind of command that is set, like "CreateNetwork"; "" when
// none or more than one is.
func (c Command) Kind() string {
	v, kind := reflect.ValueOf(c), ""
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.Pointer && !f.IsNil() {
			if kind != "" {
				return ""
			}
			kind = v.Type().Field(i).Name
		}
	}
	return kind
}

func (c Command) check() error {
	if c.Kind() == "" {
		return failf(ErrInvalid, "command: want exactly one kind")
	}
	return nil
}
