package spec

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// TaskState is how far a task has come. The order is the order of life, as in
// Docker Swarm; a task only moves forward.
type TaskState int

const (
	TaskNew       TaskState = iota // created, no node yet
	TaskPending                    // waiting for a node that fits
	TaskAssigned                   // has a node and addresses
	TaskPreparing                  // the node makes its sandbox and network
	TaskStarting                   // its program was started and is not ready yet
	TaskRunning                    // ready: its endpoints take traffic
	TaskStopping                   // draining, then being stopped
	TaskComplete                   // its program ended with status 0
	TaskShutdown                   // ended because it was asked to
	TaskFailed                     // its program ended with another status, or could not start
	TaskRejected                   // the node can't run it
	TaskLost                       // its node was declared dead
)

var taskStates = []string{"new", "pending", "assigned", "preparing", "starting", "running", "stopping", "complete", "shutdown", "failed", "rejected", "lost"}

func (s TaskState) String() string {
	if s < 0 || int(s) >= len(taskStates) {
		return fmt.Sprintf("state(%d)", int(s))
	}
	return taskStates[s]
}

// TaskStates are the names of all states.
func TaskStates() []string { return slices.Clone(taskStates) }

// ParseTaskState is the inverse of String.
func ParseTaskState(s string) (TaskState, error) {
	if i := slices.Index(taskStates, s); i >= 0 {
		return TaskState(i), nil
	}
	return 0, fmt.Errorf("task state %q is unknown: use one of %v", s, taskStates)
}

// MarshalText implements encoding.TextMarshaler.
func (s TaskState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *TaskState) UnmarshalText(b []byte) (err error) {
	*s, err = ParseTaskState(string(b))
	return err
}

// Ended tells whether the program no longer runs as far as its node, or, for
// TaskLost, the managers know.
func (s TaskState) Ended() bool { return s >= TaskComplete }

// Desired states of a task.
const (
	DesiredRunning  = "running"
	DesiredShutdown = "shutdown" // stop it, keep its record
	DesiredRemove   = "remove"   // stop it, then forget it
)

// TaskStatus is what a task's node last reported.
type TaskStatus struct {
	State    TaskState `json:"state"`
	Message  string    `json:"message,omitempty"`
	ExitCode int       `json:"exit_code,omitempty"` // 128+N for a program ended by signal N
	PID      int       `json:"pid,omitempty"`       // of the program, in the node's PID namespace
	At       int64     `json:"at"`                  // Unix milliseconds, the node's clock
	// Released: the node has torn the sandbox down and withdrawn the
	// endpoints; the addresses may be given to another.
	Released bool `json:"released,omitempty"`
	// Wired is the version of the task whose attachments the node has carried
	// out: what left the task before it is off the network, and what joined it
	// is on it.
	Wired uint64 `json:"wired,omitempty"`
	// Listened: its program has listened where others reach it.
	Listened bool `json:"listened,omitempty" level:"2"`
	// Run is the task's that this is of.
	Run int `json:"run,omitempty" level:"3"`
	// Health is what its health check says, in Docker's words; empty without one.
	Health string `json:"health,omitempty" level:"4"`
}

// Stopping is how a task is to be stopped, where who stops it says so: the other fields
// stay the spec's.
type Stopping struct {
	Signal string         `json:"signal,omitempty" level:"3"`
	Grace  *time.Duration `json:"grace,omitempty" level:"3"` // before SIGKILL; negative: for ever
}

// Validate reports the first thing wrong.
func (s Stopping) Validate() error {
	if _, err := ParseSignal(s.Signal); err != nil {
		return err
	}
	return nil
}

// Clone returns a deep copy; nil of nil.
func (s *Stopping) Clone() *Stopping {
	if s == nil {
		return nil
	}
	c := *s
	if s.Grace != nil {
		g := *s.Grace
		c.Grace = &g
	}
	return &c
}

// ParseSignal reads SIGTERM, TERM or 15; nothing is SIGTERM.
func ParseSignal(s string) (syscall.Signal, error) {
	if s == "" {
		return syscall.SIGTERM, nil
	}
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n < 65 {
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return n, nil
	}
	return 0, fmt.Errorf("signal %q is unknown: use a name like SIGTERM or a number", s)
}

// stopForever is the time before the kill of who waits for the program for ever.
const stopForever = 365 * 24 * time.Hour

// Attachment is one network interface of a task.
type Attachment struct {
	Network string       `json:"network"` // ID
	Addrs   []netip.Addr `json:"addrs"`
	Aliases []string     `json:"aliases,omitempty"`
	// Iface is its name in the task: eth0, eth1, …; empty on the networks that
	// have none. It stays when others come and go.
	Iface string `json:"iface,omitempty"`
	// Joined is the task's version at which it was connected, 0 if it was from
	// the start. TaskStatus.Wired tells when that is carried out.
	Joined uint64 `json:"joined,omitempty"`
	// Leaving is the task's version at which it was disconnected, 0 while it is
	// connected. The address is kept until the node has taken it off.
	Leaving uint64 `json:"leaving,omitempty"`
	// Fixed: the addresses of a task of its own were asked for, and no others do.
	Fixed bool `json:"fixed,omitempty" level:"3"`
}

// Task is one run of a program on one node: a replica of a service, or on its
// own (shoal run).
type Task struct {
	ID          string       `json:"id"`
	Name        string       `json:"name"`              // web.1.k3v9x2m1p0qa, or the name given to shoal run
	Service     string       `json:"service,omitempty"` // ID
	Slot        int          `json:"slot,omitempty"`    // 1…replicas
	Node        string       `json:"node,omitempty"`    // ID
	Spec        TaskSpec     `json:"spec"`
	Attachments []Attachment `json:"attachments"`
	Ports       []Port       `json:"ports,omitempty"` // published on the task's node (PortHost)
	Desired     string       `json:"desired"`
	Status      TaskStatus   `json:"status"`
	Version     uint64       `json:"version"`
	Created     int64        `json:"created"` // Unix milliseconds
	// NotBefore delays the start: Unix milliseconds; restart backoff.
	NotBefore int64 `json:"not_before,omitempty"`
	// Attempt counts the runs of this slot since its last long run.
	Attempt int `json:"attempt,omitempty"`
	// ListenWithin is set of a task that takes the place of one that listens: it is
	// running only when it listens, too, and has failed if it does not within this
	// time of its start.
	ListenWithin time.Duration `json:"listen_within,omitempty" level:"2"`
	// Run counts the starts that were asked for after the first (shoal start, restart).
	// A task of its own has one ID, and as many runs.
	Run int `json:"run,omitempty" level:"3"`
	// Stopping is of the stop that Desired, or a new Run, asks for; nil: by Spec.
	Stopping *Stopping `json:"stopping,omitempty" level:"3"`
}

// StopWith are the signal and the time of the task's stop.
func (t Task) StopWith() (signal string, grace time.Duration) {
	signal, grace = cmp.Or(t.Spec.StopSignal, "SIGTERM"), t.Spec.Grace()
	if s := t.Stopping; s != nil {
		signal = cmp.Or(s.Signal, signal)
		if s.Grace != nil {
			if grace = *s.Grace; grace < 0 {
				grace = stopForever
			}
		}
	}
	return signal, grace
}

// Clone returns a deep copy.
func (t Task) Clone() Task {
	t.Spec = t.Spec.Clone()
	t.Attachments, t.Ports = CloneAttachments(t.Attachments), slices.Clone(t.Ports)
	t.Stopping = t.Stopping.Clone()
	return t
}

// CloneAttachments returns a deep copy.
func CloneAttachments(in []Attachment) []Attachment {
	out := slices.Clone(in)
	for i := range out {
		out[i].Addrs, out[i].Aliases = slices.Clone(out[i].Addrs), slices.Clone(out[i].Aliases)
	}
	return out
}

// Live tells whether the task is meant to run and has not ended.
func (t Task) Live() bool { return t.Desired == DesiredRunning && !t.Status.State.Ended() }

// Roles and availability of a node, in Docker's words.
const (
	RoleManager = "manager"
	RoleWorker  = "worker"

	AvailabilityActive = "active"
	AvailabilityPause  = "pause" // takes no new tasks
	AvailabilityDrain  = "drain" // and gives its service tasks away
)

// Node statuses, as managers see them.
const (
	NodeReady   = "ready"
	NodeDown    = "down"
	NodeUnknown = "unknown" // not heard since the leader changed
)

// MaxNodes bounds a cluster: node numbers become router addresses in
// 169.254.64.0/18.
const MaxNodes = 16382

// Node is a member of the cluster: intent and allocation, kept in raft.
type Node struct {
	ID           string            `json:"id"`
	Name         string            `json:"name"`
	Number       int               `json:"number"` // 1…MaxNodes, unique, allocated at join
	Role         string            `json:"role"`
	Availability string            `json:"availability"`
	Labels       map[string]string `json:"labels,omitempty"`
	Addr         netip.Addr        `json:"addr"`         // advertised: control, gossip and VXLAN
	ControlPort  int               `json:"control_port"` // TCP
	GossipPort   int               `json:"gossip_port"`  // TCP and UDP
	Status       string            `json:"status"`
	Message      string            `json:"message,omitempty"`
	Version      uint64            `json:"version"`
	Created      int64             `json:"created"` // Unix milliseconds
	// DataPath is the VIP data path the node chose: "ipvs" or "nft".
	DataPath string `json:"data_path,omitempty"`
	// PublicKey is of the node's certificate (PKIX, DER), the same for its whole
	// life in the cluster: what it signs can be checked by it.
	PublicKey []byte `json:"public_key,omitempty"`
	// CertEnd is when the certificate that the managers signed last for the node
	// ends, Unix milliseconds; CertRoot the digest of the root that signed it.
	CertEnd  int64  `json:"cert_end,omitempty"`
	CertRoot string `json:"cert_root,omitempty"`
	// Platform is what it runs, as images name it: linux/amd64.
	Platform string `json:"platform,omitempty"`
	// Containers: it can run tasks from images; else ContainersWhy says why not.
	Containers    bool   `json:"containers,omitempty"`
	ContainersWhy string `json:"containers_why,omitempty"`
	// Level is the feature level of its build (state.Level), Build the version.
	Level int    `json:"level,omitempty" level:"1"`
	Build string `json:"build,omitempty" level:"1"`
	// NanoCPUs and Memory (bytes) are what the node has; 0: not known.
	NanoCPUs int64 `json:"nano_cpus,omitempty" level:"2"`
	Memory   int64 `json:"memory,omitempty" level:"2"`
	// EngineLabels are those that its agent was started with: what the node says of
	// itself, and nobody vouches for.
	EngineLabels map[string]string `json:"engine_labels,omitempty" level:"2"`
}

// Bounds of what a node says of its labels.
const (
	MaxEngineLabels     = 64
	maxEngineLabelBytes = 4096 // keys and values of all
)

// ValidateEngineLabels checks the labels that an agent is started with.
func ValidateEngineLabels(l map[string]string) error {
	if len(l) > MaxEngineLabels {
		return fmt.Errorf("%d labels: use %d at most", len(l), MaxEngineLabels)
	}
	size := 0
	for k, v := range l {
		if err := ValidateLabelKey(k); err != nil {
			return err
		}
		size += len(k) + len(v)
	}
	if size > maxEngineLabelBytes {
		return fmt.Errorf("labels of %d bytes: use %d at most", size, maxEngineLabelBytes)
	}
	return nil
}

// ValidateLabelKey checks the key of a node's label: constraints have to be able to name
// it.
func ValidateLabelKey(k string) error {
	if k == "" || strings.ContainsAny(k, "=! \t\n") {
		return fmt.Errorf("label key %q: use a word without '=', '!' and spaces", k)
	}
	return nil
}

// SameOfItself tells whether two records of a node have the same of what the node says
// of itself: where it is, what it is and what it has.
func (n Node) SameOfItself(o Node) bool {
	return n.Addr == o.Addr && n.ControlPort == o.ControlPort && n.GossipPort == o.GossipPort && n.DataPath == o.DataPath &&
		n.Platform == o.Platform && n.Containers == o.Containers && n.ContainersWhy == o.ContainersWhy &&
		n.Level == o.Level && n.Build == o.Build && n.NanoCPUs == o.NanoCPUs && n.Memory == o.Memory &&
		maps.Equal(n.EngineLabels, o.EngineLabels)
}

// Clone returns a deep copy.
func (n Node) Clone() Node {
	n.Labels, n.EngineLabels = maps.Clone(n.Labels), maps.Clone(n.EngineLabels)
	n.PublicKey = slices.Clone(n.PublicKey)
	return n
}
