package spec

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Service endpoint modes, in Docker's words.
const (
	EndpointModeVIP   = "vip"
	EndpointModeDNSRR = "dnsrr"
)

// Service modes, in Docker's words.
const (
	ModeReplicated = "replicated" // as many tasks as replicas, wherever there is room
	ModeGlobal     = "global"     // one task on each node that the service's tasks may be on
	// Jobs' tasks run to their end.
	ModeReplicatedJob = "replicated-job" // as many times as replicas
	ModeGlobalJob     = "global-job"     // once on each node
)

// Restart conditions, in Docker's words: of which ends of its program a task is
// replaced. One that was lost with its node is replaced as one that has failed.
const (
	RestartAny       = "any"
	RestartOnFailure = "on-failure"
	RestartNone      = "none"
)

// MaxReplicas bounds a service: 2^16 replicas fit one /16.
const MaxReplicas = 65535

// TaskSpec is what a task runs.
type TaskSpec struct {
	Command    []string          `json:"command"`
	Env        []string          `json:"env,omitempty"` // KEY=value
	Dir        string            `json:"dir,omitempty"`
	User       string            `json:"user,omitempty"`     // user[:group], names or numbers
	Hostname   string            `json:"hostname,omitempty"` // of services a template, see Expand; empty: the task's short name
	Labels     map[string]string `json:"labels,omitempty"`
	StopSignal string            `json:"stop_signal,omitempty"` // name or number; empty: SIGTERM
	StopGrace  time.Duration     `json:"stop_grace,omitempty"`  // 0: DefaultStopGrace

	DNS        []netip.Addr `json:"dns,omitempty"`         // asked instead of the node's resolvers
	DNSSearch  []string     `json:"dns_search,omitempty"`  // instead of the node's; "." alone: none
	DNSOptions []string     `json:"dns_options,omitempty"` // resolv.conf(5) options, such as ndots:2
	Links      []string     `json:"links,omitempty"`       // TARGET:ALIAS, a name that only this task knows
	Expose     []string     `json:"expose,omitempty"`      // PORT/PROTO that it serves, for those that link to it
	ExtraHosts []string     `json:"extra_hosts,omitempty"` // NAME:ADDRESS lines of /etc/hosts; ADDRESS may be host-gateway

	Health *HealthCheck `json:"health,omitempty"`

	Container

	Resources Resources `json:"resources,omitzero"`

	Secrets []BlobRef `json:"secrets,omitempty" level:"2"`
	Configs []BlobRef `json:"configs,omitempty" level:"2"`

	Log LogConfig `json:"log,omitzero" level:"3"`

	// Of tasks of their own (shoal run) only:
	Attach     bool `json:"attach,omitempty"`      // somebody is about to attach: the program waits for them, for a moment
	Stdin      bool `json:"stdin,omitempty"`       // keep standard input open, for who attaches
	TTY        bool `json:"tty,omitempty"`         // a terminal rather than pipes
	AutoRemove bool `json:"auto_remove,omitempty"` // forget the task when it has ended
	// Restart is the policy, see ParseRestart. The node follows it without the managers.
	Restart string `json:"restart,omitempty" level:"2"`
}

// DefaultStopGrace is the time between the stop signal and SIGKILL, Docker's
// default for --stop-grace-period.
const DefaultStopGrace = 10 * time.Second

// Clone returns a deep copy.
func (t TaskSpec) Clone() TaskSpec {
	t.Command, t.Env, t.Labels = slices.Clone(t.Command), slices.Clone(t.Env), maps.Clone(t.Labels)
	t.DNS, t.DNSSearch = slices.Clone(t.DNS), slices.Clone(t.DNSSearch)
	t.DNSOptions, t.ExtraHosts = slices.Clone(t.DNSOptions), slices.Clone(t.ExtraHosts)
	t.Links, t.Expose = slices.Clone(t.Links), slices.Clone(t.Expose)
	t.Container = t.Container.clone()
	t.Secrets, t.Configs = slices.Clone(t.Secrets), slices.Clone(t.Configs)
	if t.Health != nil {
		h := *t.Health
		t.Health = &h
	}
	return t
}

// Grace is StopGrace with its default applied.
func (t TaskSpec) Grace() time.Duration {
	if t.StopGrace <= 0 {
		return DefaultStopGrace
	}
	return t.StopGrace
}

// Validate reports the first thing wrong.
func (t TaskSpec) Validate() error {
	if err := t.Log.Validate(); err != nil {
		return err
	}
	if t.Image == "" && (len(t.Command) == 0 || t.Command[0] == "") {
		return fmt.Errorf("no command: give it after --, like: -- python3 -m http.server 80")
	}
	for _, e := range t.Env {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" {
			return fmt.Errorf("environment %q: want KEY=value", e)
		}
		if strings.ContainsRune(e, 0) {
			return fmt.Errorf("environment %q: holds a NUL byte", e)
		}
	}
	for _, c := range t.Command {
		if strings.ContainsRune(c, 0) {
			return fmt.Errorf("command argument %q: holds a NUL byte", c)
		}
	}
	if t.Hostname != "" && !strings.Contains(t.Hostname, "{{") {
		if err := ValidateHostname(t.Hostname); err != nil {
			return err
		}
	}
	if t.StopGrace < 0 {
		return fmt.Errorf("stop grace period %s is negative", t.StopGrace)
	}
	if t.Health != nil {
		if err := t.Health.Validate(); err != nil {
			return err
		}
	}
	policy, _, err := ParseRestart(t.Restart)
	if err != nil {
		return err
	}
	if t.AutoRemove && policy != "" && policy != RestartNo {
		return fmt.Errorf("conflicting options: --restart %s and --rm: what is removed at its end is not started again", t.Restart)
	}
	if err := t.Container.validate(); err != nil {
		return err
	}
	if err := t.Resources.Validate(); err != nil {
		return err
	}
	if err := t.validateBlobs(); err != nil {
		return err
	}
	return t.validateDNS()
}

// NetworkAttachment asks for one network.
type NetworkAttachment struct {
	Network string       `json:"network"` // ID (the API also takes a name and resolves it)
	Aliases []string     `json:"aliases,omitempty"`
	Addrs   []netip.Addr `json:"addrs,omitempty"` // static addresses (tasks) or VIPs (services); empty: allocated
}

// ServiceSpec is what the user asked for.
type ServiceSpec struct {
	Name         string              `json:"name"`
	Labels       map[string]string   `json:"labels,omitempty"`
	Replicas     int                 `json:"replicas"`
	EndpointMode string              `json:"endpoint_mode"` // EndpointModeVIP or EndpointModeDNSRR
	Networks     []NetworkAttachment `json:"networks"`
	Constraints  []string            `json:"constraints,omitempty"` // node.id|name|role==x, != , node.labels.k==v
	Task         TaskSpec            `json:"task"`
	RestartDelay time.Duration       `json:"restart_delay,omitempty"` // first delay; doubles to 30 s; 0: 100 ms
	RestartMax   int                 `json:"restart_max,omitempty"`   // attempts per slot; 0: no limit
	Ports        []Port              `json:"ports,omitempty"`
	// ListenTimeout is how long a replica that takes the place of one that listens
	// may take to listen; 0: DefaultListenTimeout; NoListenTimeout: it need not.
	ListenTimeout time.Duration `json:"listen_timeout,omitempty" level:"2"`

	Update   *UpdateConfig `json:"update,omitempty" level:"2"`   // nil: the defaults, here and below
	Rollback *UpdateConfig `json:"rollback,omitempty" level:"2"` // FailureRollback is not for it
	Mode     string        `json:"mode,omitempty" level:"2"`     // empty: ModeReplicated
	// Spread are the node labels (node.labels.KEY) over whose values replicas are spread
	// evenly, the first before the second. A node without the label counts as one with
	// an empty value.
	Spread []string `json:"spread,omitempty" level:"2"`
	// MaxPerNode is the most replicas on one node; 0: no limit.
	MaxPerNode       int    `json:"max_per_node,omitempty" level:"2"`
	RestartCondition string `json:"restart_condition,omitempty" level:"2"` // empty: RestartAny; of jobs RestartOnFailure
	// MaxConcurrent is how many tasks of a replicated job run at once; 0: all.
	MaxConcurrent int `json:"max_concurrent,omitempty" level:"2"`
	// RestartWindow is how long a run lasts that counts as a success, after which
	// attempts are counted anew; 0: 10 s.
	RestartWindow time.Duration `json:"restart_window,omitempty" level:"2"`
	// ForceUpdate grows with each update that is to replace all tasks, changed or not.
	ForceUpdate uint64 `json:"force_update,omitempty" level:"2"`
}

// DefaultListenTimeout is enough for servers that load much before they listen.
const DefaultListenTimeout = 2 * time.Minute

// NoListenTimeout is a ListenTimeout: a replica that takes the place of one that
// listens runs as others do, listening or not.
const NoListenTimeout = -time.Millisecond

// ListenWithin is ListenTimeout with its default applied, and at least the time that
// a health check gives; 0: the replica need not listen.
func (s ServiceSpec) ListenWithin() time.Duration {
	within := s.ListenTimeout
	switch {
	case within < 0:
		return 0
	case within == 0:
		within = DefaultListenTimeout
	}
	if h := s.Task.Health; h != nil {
		within = max(within, h.WithDefaults().Patience())
	}
	return within
}

// Restarts tells whether a task that ended in a state is replaced.
func (s ServiceSpec) Restarts(ended TaskState) bool {
	switch {
	case s.RestartCondition == RestartNone:
		return false
	case s.RestartCondition == RestartOnFailure || s.Job():
		return ended != TaskComplete
	}
	return true
}

// The waits between the starts of a slot where its service says nothing else: the first,
// and the most that doubling makes of it.
const (
	restartFirst = 100 * time.Millisecond
	restartMost  = 30 * time.Second
)

// RestartWait is the time from an end of a slot's task to the start of its next attempt.
func (s ServiceSpec) RestartWait(attempt int) time.Duration {
	delay := s.RestartDelay
	if delay <= 0 {
		delay = restartFirst
	}
	for i := 1; i < attempt && delay < restartMost; i++ {
		delay = min(2*delay, restartMost)
	}
	return delay
}

// Global tells whether there is a task on each node.
func (s ServiceSpec) Global() bool { return s.Mode == ModeGlobal || s.Mode == ModeGlobalJob }

// Job tells whether tasks run to their end, once.
func (s ServiceSpec) Job() bool { return s.Mode == ModeReplicatedJob || s.Mode == ModeGlobalJob }

// Clone returns a deep copy.
func (s ServiceSpec) Clone() ServiceSpec {
	s.Spread = slices.Clone(s.Spread)
	s.Labels, s.Constraints, s.Task = maps.Clone(s.Labels), slices.Clone(s.Constraints), s.Task.Clone()
	s.Networks, s.Ports = cloneAttachments(s.Networks), slices.Clone(s.Ports)
	s.Update, s.Rollback = s.Update.clone(), s.Rollback.clone()
	return s
}

func cloneAttachments(in []NetworkAttachment) []NetworkAttachment {
	out := slices.Clone(in)
	for i := range out {
		out[i].Aliases, out[i].Addrs = slices.Clone(out[i].Aliases), slices.Clone(out[i].Addrs)
	}
	return out
}

// Validate reports the first thing wrong with what does not need other objects
// to be known.
func (s ServiceSpec) Validate() error {
	if err := ValidateName("service", s.Name); err != nil {
		return err
	}
	if s.Replicas < 0 || s.Replicas > MaxReplicas {
		return fmt.Errorf("service %s: %d replicas is out of range: use 0 to %d", s.Name, s.Replicas, MaxReplicas)
	}
	if err := s.validatePlacement(); err != nil {
		return fmt.Errorf("service %s: %w", s.Name, err)
	}
	if s.EndpointMode != EndpointModeVIP && s.EndpointMode != EndpointModeDNSRR {
		return fmt.Errorf("service %s: endpoint mode %q: use %q or %q", s.Name, s.EndpointMode, EndpointModeVIP, EndpointModeDNSRR)
	}
	if (s.ListenTimeout < 0 && s.ListenTimeout != NoListenTimeout) || s.ListenTimeout%time.Millisecond != 0 {
		return fmt.Errorf("service %s: listen timeout %s: use a whole number of milliseconds, like 90s", s.Name, s.ListenTimeout)
	}
	for _, c := range s.Constraints {
		if _, err := ParseConstraint(c); err != nil {
			return fmt.Errorf("service %s: %w", s.Name, err)
		}
	}
	if err := validateAttachments(s.Networks); err != nil {
		return fmt.Errorf("service %s: %w", s.Name, err)
	}
	if err := s.Task.Validate(); err != nil {
		return fmt.Errorf("service %s: %w", s.Name, err)
	}
	if s.Task.Restart != "" {
		return fmt.Errorf("service %s: restart policy %s is of tasks of their own: use a restart condition", s.Name, s.Task.Restart)
	}
	if err := s.validateTemplates(); err != nil {
		return fmt.Errorf("service %s: %w", s.Name, err)
	}
	if err := ValidatePorts(s.Ports); err != nil {
		return fmt.Errorf("service %s: %w", s.Name, err)
	}
	if err := cmp.Or(s.Update.validate("update"), s.Rollback.validate("rollback")); err != nil {
		return fmt.Errorf("service %s: %w", s.Name, err)
	}
	if s.EndpointMode == EndpointModeDNSRR && slices.ContainsFunc(s.Ports, func(p Port) bool { return p.Mode != PortHost }) {
		return fmt.Errorf("service %s: endpoint mode dnsrr has no virtual IP for ports to go to: publish with mode=host, or use endpoint mode vip", s.Name)
	}
	return nil
}

func (s ServiceSpec) validatePlacement() error {
	switch s.Mode {
	case "", ModeReplicated, ModeGlobal, ModeReplicatedJob, ModeGlobalJob:
	default:
		return fmt.Errorf("mode %q: use %s, %s, %s or %s", s.Mode, ModeReplicated, ModeGlobal, ModeReplicatedJob, ModeGlobalJob)
	}
	switch {
	case s.Global() && s.Replicas != 0:
		return fmt.Errorf("%d replicas: a service of mode %s has one task on each node, and no number of replicas", s.Replicas, s.Mode)
	case s.Global() && s.MaxPerNode != 0:
		return fmt.Errorf("most replicas per node: a service of mode %s has one on each", s.Mode)
	case s.MaxConcurrent < 0 || s.MaxConcurrent > MaxReplicas:
		return fmt.Errorf("most at once: %d is out of range: use 0 to %d", s.MaxConcurrent, MaxReplicas)
	case s.MaxConcurrent != 0 && s.Mode != ModeReplicatedJob:
		return fmt.Errorf("most at once is for mode %s", ModeReplicatedJob)
	case s.Job() && s.RestartCondition == RestartAny:
		return fmt.Errorf("restart condition %s: the tasks of a job run to their end: use %s or %s", RestartAny, RestartOnFailure, RestartNone)
	case s.Job() && (s.Update != nil || s.Rollback != nil):
		return fmt.Errorf("a policy for updates or rollbacks: a job begins anew with each change of what it runs, all at once")
	}
	if s.MaxPerNode < 0 {
		return fmt.Errorf("most replicas per node: %d is negative: use 0 for no limit", s.MaxPerNode)
	}
	if len(s.Spread) > maxSpread {
		return fmt.Errorf("%d placement preferences: use %d at most", len(s.Spread), maxSpread)
	}
	for _, d := range s.Spread {
		if err := ValidateSpread(d); err != nil {
			return err
		}
	}
	switch s.RestartCondition {
	case "", RestartAny, RestartOnFailure, RestartNone:
	default:
		return fmt.Errorf("restart condition %q: use %s, %s or %s", s.RestartCondition, RestartAny, RestartOnFailure, RestartNone)
	}
	if s.RestartWindow < 0 || s.RestartWindow%time.Millisecond != 0 {
		return fmt.Errorf("restart window %s: use a whole number of milliseconds, like 2m", s.RestartWindow)
	}
	return nil
}

// maxSpread is more than anybody nests: region, zone, rack, host.
const maxSpread = 10

// ValidateSpread checks a spread descriptor.
func ValidateSpread(d string) error {
	if !isLabel(d) {
		return fmt.Errorf("placement preference spread=%s: use a label of the nodes, like spread=node.labels.zone, or of their agents, like spread=engine.labels.zone", d)
	}
	return nil
}

// Where labels of nodes are: those that the managers keep, and those that a node's agent
// was started with.
const (
	nodeLabels   = "node.labels."
	engineLabels = "engine.labels."
)

// isLabel tells whether a key names a label of nodes.
func isLabel(key string) bool {
	return len(key) > len(nodeLabels) && strings.HasPrefix(key, nodeLabels) || len(key) > len(engineLabels) && strings.HasPrefix(key, engineLabels)
}

// Label is what a node has of a label named as in constraints, "" if nothing.
func (n Node) Label(key string) string {
	if k, ok := strings.CutPrefix(key, engineLabels); ok {
		return n.EngineLabels[k]
	}
	return n.Labels[strings.TrimPrefix(key, nodeLabels)]
}

func validateAttachments(as []NetworkAttachment) error {
	seen := map[string]bool{}
	for _, a := range as {
		if a.Network == "" {
			return fmt.Errorf("network name is empty")
		}
		if seen[a.Network] {
			return fmt.Errorf("network %s is given twice", a.Network)
		}
		seen[a.Network] = true
		for _, al := range a.Aliases {
			if err := ValidateName("alias", al); err != nil {
				return err
			}
		}
	}
	return nil
}

// Constraint is one parsed placement constraint.
type Constraint struct {
	Key   string // node.id, node.name (also node.hostname), node.role, node.platform.os, node.platform.arch, node.labels.KEY, engine.labels.KEY
	Equal bool   // == or !=
	Value string
}

// ParseConstraint parses "key==value" or "key!=value".
func ParseConstraint(s string) (Constraint, error) {
	for _, op := range []string{"==", "!="} {
		if k, v, ok := strings.Cut(s, op); ok {
			c := Constraint{strings.TrimSpace(k), op == "==", strings.TrimSpace(v)}
			switch {
			case c.Key == "node.hostname":
				c.Key = "node.name"
			case c.Key == "node.id", c.Key == "node.name", c.Key == "node.role", c.Key == "node.platform.os", c.Key == "node.platform.arch":
			case isLabel(c.Key):
			default:
				return c, fmt.Errorf("constraint %q: key %q is unknown: use node.id, node.name, node.role, node.platform.os, node.platform.arch, node.labels.KEY or engine.labels.KEY", s, c.Key)
			}
			if c.Value == "" {
				return c, fmt.Errorf("constraint %q: the value is empty", s)
			}
			return c, nil
		}
	}
	return Constraint{}, fmt.Errorf("constraint %q: want key==value or key!=value, like node.name==node2", s)
}

// Match tells whether n satisfies the constraint.
func (c Constraint) Match(n Node) bool {
	var v string
	switch c.Key {
	case "node.id":
		v = n.ID
	case "node.name":
		v = n.Name
	case "node.role":
		v = n.Role
	case "node.platform.os":
		v, _, _ = strings.Cut(n.Platform, "/")
	case "node.platform.arch":
		_, v, _ = strings.Cut(n.Platform, "/")
		return archName(v) == archName(c.Value) == c.Equal
	default:
		v = n.Label(c.Key)
	}
	return (v == c.Value) == c.Equal
}

// archName is the name that images give a machine's architecture, whose own (uname(2))
// Docker takes, too.
func archName(s string) string {
	switch s {
	case "x86_64":
		return "amd64"
	case "aarch64":
		return "arm64"
	}
	return s
}

// VIPs are a service's virtual addresses on one network.
type VIPs struct {
	Network string       `json:"network"`
	Addrs   []netip.Addr `json:"addrs"`
}

// Service is a service with what was allocated to it.
type Service struct {
	ID   string      `json:"id"`
	Spec ServiceSpec `json:"spec"`
	VIPs []VIPs      `json:"vips,omitempty"`
	// Ports are Spec.Ports with the numbers that were allocated, in its order.
	Ports []Port `json:"ports,omitempty"`
	// Ingress is the network (ID) whose VIP published ports lead to: the first
	// that has a way out, as the tasks' default route is on it.
	Ingress string `json:"ingress,omitempty"`
	Version uint64 `json:"version"`
	Created int64  `json:"created"` // Unix milliseconds
	// Previous is the spec before the last change; nodes are not told of it, nor of
	// Update.
	Previous *ServiceSpec  `json:"previous_spec,omitempty" level:"2"`
	Update   *UpdateStatus `json:"update_status,omitempty" level:"2"`
}

// Clone returns a deep copy.
func (s Service) Clone() Service {
	s.Spec = s.Spec.Clone()
	if s.Previous != nil {
		p := s.Previous.Clone()
		s.Previous = &p
	}
	if s.Update != nil {
		u := *s.Update
		s.Update = &u
	}
	s.VIPs, s.Ports = slices.Clone(s.VIPs), slices.Clone(s.Ports)
	for i := range s.VIPs {
		s.VIPs[i].Addrs = slices.Clone(s.VIPs[i].Addrs)
	}
	return s
}

// VIPsOn returns the service's virtual addresses on a network; none when it is
// not attached to it or its endpoint mode is dnsrr.
func (s Service) VIPsOn(network string) []netip.Addr {
	for _, v := range s.VIPs {
		if v.Network == network {
			return v.Addrs
		}
	}
	return nil
}

// AliasesOn returns the service's further names on a network.
func (s Service) AliasesOn(network string) []string {
	for _, a := range s.Spec.Networks {
		if a.Network == network {
			return a.Aliases
		}
	}
	return nil
}

// On tells whether the service is attached to a network.
func (s Service) On(network string) bool {
	return slices.ContainsFunc(s.Spec.Networks, func(a NetworkAttachment) bool { return a.Network == network })
}

// MaxLogLine is how long a line of output is kept as one, bytes; Docker splits there,
// too.
const MaxLogLine = 16 << 10
