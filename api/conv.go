// Package api converts between the wire form of the Shoal API (api/shoal/v1,
// generated) and the project's own values (package spec).
//
// Addresses and prefixes are text on the wire, durations and instants are
// milliseconds. What comes from the wire is checked here for form only; whether
// it makes sense is the receiver's to say.
package api

import (
	"fmt"
	"net/netip"
	"time"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

func texts[T fmt.Stringer](in []T) []string {
	if len(in) == 0 {
		return nil
	}
	out := make([]string, len(in))
	for i, v := range in {
		out[i] = v.String()
	}
	return out
}

// Addrs parses addresses; field names them in the error.
func Addrs(field string, in []string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, s := range in {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("%s: %q is not an IP address", field, s)
		}
		out = append(out, a)
	}
	return out, nil
}

// Prefixes parses prefixes; field names them in the error.
func Prefixes(field string, in []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range in {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("%s: %q is not an address and a prefix length like 10.1.0.0/24", field, s)
		}
		out = append(out, p)
	}
	return out, nil
}

// Network is n on the wire.
func Network(n spec.Network) *shoalv1.Network {
	return &shoalv1.Network{Id: n.ID, Name: n.Name, Driver: n.Driver, Labels: n.Labels, Subnets: texts(n.Subnets), Gateways: texts(n.Gateways),
		IpRanges: texts(n.IPRanges), Vni: n.VNI, Mtu: int32(n.MTU), Internal: n.Internal, Options: n.Options, Version: n.Version, CreatedMs: n.Created, Node: n.Node}
}

// ToNetwork is the inverse of Network.
func ToNetwork(n *shoalv1.Network) (spec.Network, error) {
	out := spec.Network{ID: n.GetId(), Name: n.GetName(), Driver: n.GetDriver(), Labels: n.GetLabels(), VNI: n.GetVni(), MTU: int(n.GetMtu()),
		Internal: n.GetInternal(), Options: n.GetOptions(), Version: n.GetVersion(), Created: n.GetCreatedMs(), Node: n.GetNode()}
	var err error
	if out.Subnets, err = Prefixes("subnet", n.GetSubnets()); err != nil {
		return out, err
	}
	if out.Gateways, err = Addrs("gateway", n.GetGateways()); err != nil {
		return out, err
	}
	out.IPRanges, err = Prefixes("ip range", n.GetIpRanges())
	return out, err
}

// NetworkAttachments are as on the wire.
func NetworkAttachments(in []spec.NetworkAttachment) []*shoalv1.NetworkAttachment {
	var out []*shoalv1.NetworkAttachment
	for _, a := range in {
		out = append(out, &shoalv1.NetworkAttachment{Network: a.Network, Aliases: a.Aliases, Addrs: texts(a.Addrs)})
	}
	return out
}

// ToNetworkAttachments is the inverse of NetworkAttachments.
func ToNetworkAttachments(in []*shoalv1.NetworkAttachment) ([]spec.NetworkAttachment, error) {
	var out []spec.NetworkAttachment
	for _, a := range in {
		addrs, err := Addrs("address on network "+a.GetNetwork(), a.GetAddrs())
		if err != nil {
			return nil, err
		}
		out = append(out, spec.NetworkAttachment{Network: a.GetNetwork(), Aliases: a.GetAliases(), Addrs: addrs})
	}
	return out, nil
}

// TaskSpec is t on the wire.
func TaskSpec(t spec.TaskSpec) *shoalv1.TaskSpec {
	return &shoalv1.TaskSpec{Command: t.Command, Env: t.Env, Dir: t.Dir, User: t.User, Hostname: t.Hostname, Labels: t.Labels,
		StopSignal: t.StopSignal, StopGraceMs: t.StopGrace.Milliseconds(),
		Dns: texts(t.DNS), DnsSearch: t.DNSSearch, DnsOptions: t.DNSOptions, ExtraHosts: t.ExtraHosts, Links: t.Links, Expose: t.Expose,
		Health: HealthCheck(t.Health), Container: Container(t.Container), Resources: Resources(t.Resources),
		Secrets: blobRefs(t.Secrets), Configs: blobRefs(t.Configs),
		Attach: t.Attach, Stdin: t.Stdin, Tty: t.TTY, AutoRemove: t.AutoRemove, Restart: t.Restart, Log: LogConfig(t.Log)}
}

// LogConfig is c on the wire.
func LogConfig(c spec.LogConfig) *shoalv1.LogConfig {
	if c == (spec.LogConfig{}) {
		return nil
	}
	return &shoalv1.LogConfig{Driver: c.Driver, Size: c.Size, Files: int32(c.Files)}
}

// ToLogConfig is the inverse of LogConfig.
func ToLogConfig(c *shoalv1.LogConfig) spec.LogConfig {
	return spec.LogConfig{Driver: c.GetDriver(), Size: c.GetSize(), Files: int(c.GetFiles())}
}

// HealthCheck is h on the wire.
func HealthCheck(h *spec.HealthCheck) *shoalv1.HealthCheck {
	if h == nil {
		return nil
	}
	return &shoalv1.HealthCheck{Command: h.Command, IntervalMs: h.Interval.Milliseconds(), TimeoutMs: h.Timeout.Milliseconds(),
		StartPeriodMs: h.StartPeriod.Milliseconds(), StartIntervalMs: h.StartInterval.Milliseconds(), Retries: int32(h.Retries), Exec: h.Exec, Disabled: h.Disabled}
}

// ToHealthCheck is the inverse of HealthCheck.
func ToHealthCheck(h *shoalv1.HealthCheck) *spec.HealthCheck {
	if h == nil {
		return nil
	}
	ms := func(n int64) time.Duration { return time.Duration(n) * time.Millisecond }
	return &spec.HealthCheck{Command: h.GetCommand(), Interval: ms(h.GetIntervalMs()), Timeout: ms(h.GetTimeoutMs()),
		StartPeriod: ms(h.GetStartPeriodMs()), StartInterval: ms(h.GetStartIntervalMs()), Retries: int(h.GetRetries()), Exec: h.GetExec(), Disabled: h.GetDisabled()}
}

func blobRefs(in []spec.BlobRef) (out []*shoalv1.BlobRef) {
	for _, r := range in {
		out = append(out, &shoalv1.BlobRef{Id: r.ID, Name: r.Name, Target: r.Target, Uid: r.UID, Gid: r.GID, Mode: r.Mode})
	}
	return out
}

func toBlobRefs(in []*shoalv1.BlobRef) (out []spec.BlobRef) {
	for _, r := range in {
		out = append(out, spec.BlobRef{ID: r.GetId(), Name: r.GetName(), Target: r.GetTarget(), UID: r.GetUid(), GID: r.GetGid(), Mode: r.GetMode()})
	}
	return out
}

// BlobRefs are refs on the wire.
func BlobRefs(in []spec.BlobRef) []*shoalv1.BlobRef { return blobRefs(in) }

// Blob is b on the wire.
func Blob(b spec.Blob) *shoalv1.Blob {
	return &shoalv1.Blob{Id: b.ID, Kind: string(b.Kind), Name: b.Name, Labels: b.Labels, Data: b.Data, Version: b.Version, CreatedMs: b.Created, UpdatedMs: b.Updated}
}

// ToBlob is the inverse of Blob.
func ToBlob(b *shoalv1.Blob) spec.Blob {
	return spec.Blob{ID: b.GetId(), Kind: spec.BlobKind(b.GetKind()), Name: b.GetName(), Labels: b.GetLabels(), Data: b.GetData(), Version: b.GetVersion(), Created: b.GetCreatedMs(), Updated: b.GetUpdatedMs()}
}

// Resources are r on the wire.
func Resources(r spec.Resources) *shoalv1.Resources {
	if r == (spec.Resources{}) {
		return nil
	}
	return &shoalv1.Resources{NanoCpus: r.NanoCPUs, Memory: r.Memory, MemorySwap: r.MemorySwap, MemoryLow: r.MemoryLow, Pids: r.Pids, CpuShares: r.CPUShares,
		CpusetCpus: r.CpusetCPUs, OomScoreAdj: int32(r.OOMScoreAdj), ReserveNanoCpus: r.ReserveNanoCPUs, ReserveMemory: r.ReserveMemory}
}

// ToResources is the inverse of Resources.
func ToResources(r *shoalv1.Resources) spec.Resources {
	return spec.Resources{NanoCPUs: r.GetNanoCpus(), Memory: r.GetMemory(), MemorySwap: r.GetMemorySwap(), MemoryLow: r.GetMemoryLow(), Pids: r.GetPids(), CPUShares: r.GetCpuShares(),
		CpusetCPUs: r.GetCpusetCpus(), OOMScoreAdj: int(r.GetOomScoreAdj()), ReserveNanoCPUs: r.GetReserveNanoCpus(), ReserveMemory: r.GetReserveMemory()}
}

// ToTaskSpec is the inverse of TaskSpec.
func ToTaskSpec(t *shoalv1.TaskSpec) (spec.TaskSpec, error) {
	dns, err := Addrs("DNS server", t.GetDns())
	return spec.TaskSpec{Command: t.GetCommand(), Env: t.GetEnv(), Dir: t.GetDir(), User: t.GetUser(), Hostname: t.GetHostname(), Labels: t.GetLabels(),
		StopSignal: t.GetStopSignal(), StopGrace: time.Duration(t.GetStopGraceMs()) * time.Millisecond,
		DNS: dns, DNSSearch: t.GetDnsSearch(), DNSOptions: t.GetDnsOptions(), ExtraHosts: t.GetExtraHosts(), Links: t.GetLinks(), Expose: t.GetExpose(),
		Health: ToHealthCheck(t.GetHealth()), Container: ToContainer(t.GetContainer()), Resources: ToResources(t.GetResources()),
		Secrets: toBlobRefs(t.GetSecrets()), Configs: toBlobRefs(t.GetConfigs()),
		Attach: t.GetAttach(), Stdin: t.GetStdin(), TTY: t.GetTty(), AutoRemove: t.GetAutoRemove(), Restart: t.GetRestart(), Log: ToLogConfig(t.GetLog())}, err
}

// Ports are as on the wire.
func Ports(in []spec.Port) []*shoalv1.Port {
	var out []*shoalv1.Port
	for _, p := range in {
		w := &shoalv1.Port{Published: uint32(p.Published), Target: uint32(p.Target), Protocol: p.Protocol, Mode: p.Mode, Nat: p.NAT}
		if p.Addr.IsValid() {
			w.Addr = p.Addr.String()
		}
		out = append(out, w)
	}
	return out
}

// ToPorts is the inverse of Ports.
func ToPorts(in []*shoalv1.Port) ([]spec.Port, error) {
	var out []spec.Port
	for _, w := range in {
		p := spec.Port{Published: uint16(w.GetPublished()), Target: uint16(w.GetTarget()), Protocol: w.GetProtocol(), Mode: w.GetMode(), NAT: w.GetNat()}
		if w.GetPublished() > 65535 || w.GetTarget() > 65535 {
			return nil, fmt.Errorf("published port %d to %d: use 1 to 65535", w.GetPublished(), w.GetTarget())
		}
		if w.GetAddr() != "" {
			a, err := netip.ParseAddr(w.GetAddr())
			if err != nil {
				return nil, fmt.Errorf("published port %d: %q is not an IP address", p.Published, w.GetAddr())
			}
			p.Addr = a
		}
		out = append(out, p)
	}
	return out, nil
}

// ServiceSpec is s on the wire.
func ServiceSpec(s spec.ServiceSpec) *shoalv1.ServiceSpec {
	return &shoalv1.ServiceSpec{Name: s.Name, Labels: s.Labels, Replicas: int32(s.Replicas), EndpointMode: s.EndpointMode,
		Networks: NetworkAttachments(s.Networks), Constraints: s.Constraints, Task: TaskSpec(s.Task),
		RestartDelayMs: s.RestartDelay.Milliseconds(), RestartMax: int32(s.RestartMax), Ports: Ports(s.Ports), ListenTimeoutMs: s.ListenTimeout.Milliseconds(),
		Update: UpdateConfig(s.Update), Rollback: UpdateConfig(s.Rollback), ForceUpdate: s.ForceUpdate,
		Mode: s.Mode, Spread: s.Spread, MaxPerNode: int32(s.MaxPerNode), RestartCondition: s.RestartCondition, RestartWindowMs: s.RestartWindow.Milliseconds(), MaxConcurrent: int32(s.MaxConcurrent)}
}

// ToServiceSpec is the inverse of ServiceSpec.
func ToServiceSpec(s *shoalv1.ServiceSpec) (spec.ServiceSpec, error) {
	nets, err := ToNetworkAttachments(s.GetNetworks())
	if err != nil {
		return spec.ServiceSpec{}, err
	}
	task, err := ToTaskSpec(s.GetTask())
	if err != nil {
		return spec.ServiceSpec{}, err
	}
	ports, err := ToPorts(s.GetPorts())
	return spec.ServiceSpec{Name: s.GetName(), Labels: s.GetLabels(), Replicas: int(s.GetReplicas()), EndpointMode: s.GetEndpointMode(),
		Networks: nets, Constraints: s.GetConstraints(), Task: task, Ports: ports,
		RestartDelay: time.Duration(s.GetRestartDelayMs()) * time.Millisecond, RestartMax: int(s.GetRestartMax()), ListenTimeout: time.Duration(s.GetListenTimeoutMs()) * time.Millisecond,
		Update: ToUpdateConfig(s.GetUpdate()), Rollback: ToUpdateConfig(s.GetRollback()), ForceUpdate: s.GetForceUpdate(),
		Mode: s.GetMode(), Spread: s.GetSpread(), MaxPerNode: int(s.GetMaxPerNode()), RestartCondition: s.GetRestartCondition(), RestartWindow: time.Duration(s.GetRestartWindowMs()) * time.Millisecond, MaxConcurrent: int(s.GetMaxConcurrent())}, err
}

// UpdateConfig is u on the wire.
func UpdateConfig(u *spec.UpdateConfig) *shoalv1.UpdateConfig {
	if u == nil {
		return nil
	}
	return &shoalv1.UpdateConfig{Parallelism: int32(u.Parallelism), DelayMs: u.Delay.Milliseconds(), MonitorMs: u.Monitor.Milliseconds(),
		MaxFailureRatio: u.MaxFailureRatio, FailureAction: u.FailureAction, Order: u.Order}
}

// ToUpdateConfig is the inverse of UpdateConfig.
func ToUpdateConfig(u *shoalv1.UpdateConfig) *spec.UpdateConfig {
	if u == nil {
		return nil
	}
	return &spec.UpdateConfig{Parallelism: int(u.GetParallelism()), Delay: time.Duration(u.GetDelayMs()) * time.Millisecond,
		Monitor: time.Duration(u.GetMonitorMs()) * time.Millisecond, MaxFailureRatio: u.GetMaxFailureRatio(),
		FailureAction: u.GetFailureAction(), Order: u.GetOrder()}
}

// ToUpdateStatus is u as it came; nil of none.
func ToUpdateStatus(u *shoalv1.UpdateStatus) *spec.UpdateStatus {
	if u == nil {
		return nil
	}
	return &spec.UpdateStatus{State: u.GetState(), StartedAt: u.GetStartedAtMs(), CompletedAt: u.GetCompletedAtMs(), Message: u.GetMessage(), Since: u.GetSince()}
}

// Service is s on the wire; running is the leader's count.
func Service(s spec.Service, running int) *shoalv1.Service {
	out := &shoalv1.Service{Id: s.ID, Spec: ServiceSpec(s.Spec), Version: s.Version, CreatedMs: s.Created, Running: int32(running),
		Ports: Ports(s.Ports), Ingress: s.Ingress}
	for _, v := range s.VIPs {
		out.Vips = append(out.Vips, &shoalv1.VIPs{Network: v.Network, Addrs: texts(v.Addrs)})
	}
	if s.Previous != nil {
		out.PreviousSpec = ServiceSpec(*s.Previous)
	}
	if u := s.Update; u != nil {
		out.UpdateStatus = &shoalv1.UpdateStatus{State: u.State, StartedAtMs: u.StartedAt, CompletedAtMs: u.CompletedAt, Message: u.Message, Since: u.Since}
	}
	return out
}

// ToService is the inverse of Service, but for the count.
func ToService(s *shoalv1.Service) (spec.Service, error) {
	out := spec.Service{ID: s.GetId(), Version: s.GetVersion(), Created: s.GetCreatedMs(), Ingress: s.GetIngress()}
	var err error
	if out.Ports, err = ToPorts(s.GetPorts()); err != nil {
		return out, err
	}
	if out.Spec, err = ToServiceSpec(s.GetSpec()); err != nil {
		return out, err
	}
	if s.GetPreviousSpec() != nil {
		p, err := ToServiceSpec(s.GetPreviousSpec())
		if err != nil {
			return out, err
		}
		out.Previous = &p
	}
	out.Update = ToUpdateStatus(s.GetUpdateStatus())
	for _, v := range s.GetVips() {
		addrs, err := Addrs("virtual IP of "+out.Spec.Name, v.GetAddrs())
		if err != nil {
			return out, err
		}
		out.VIPs = append(out.VIPs, spec.VIPs{Network: v.GetNetwork(), Addrs: addrs})
	}
	return out, nil
}

// TaskStatus is s on the wire.
func TaskStatus(s spec.TaskStatus) *shoalv1.TaskStatus {
	return &shoalv1.TaskStatus{State: s.State.String(), Message: s.Message, ExitCode: int32(s.ExitCode), Pid: int32(s.PID), AtMs: s.At, Released: s.Released, Wired: s.Wired, Listened: s.Listened, Run: int32(s.Run), Health: s.Health}
}

// ToTaskStatus is the inverse of TaskStatus.
func ToTaskStatus(s *shoalv1.TaskStatus) (spec.TaskStatus, error) {
	out := spec.TaskStatus{Message: s.GetMessage(), ExitCode: int(s.GetExitCode()), PID: int(s.GetPid()), At: s.GetAtMs(), Released: s.GetReleased(), Wired: s.GetWired(), Listened: s.GetListened(), Run: int(s.GetRun()), Health: s.GetHealth()}
	var err error
	out.State, err = spec.ParseTaskState(s.GetState())
	return out, err
}

// Stopping is s on the wire; nil of nil.
func Stopping(s *spec.Stopping) *shoalv1.Stopping {
	if s == nil {
		return nil
	}
	out := &shoalv1.Stopping{Signal: s.Signal}
	if s.Grace != nil {
		ns := s.Grace.Nanoseconds()
		out.GraceNs = &ns
	}
	return out
}

// ToStopping is the inverse of Stopping.
func ToStopping(s *shoalv1.Stopping) *spec.Stopping {
	if s == nil {
		return nil
	}
	out := &spec.Stopping{Signal: s.GetSignal()}
	if s.GraceNs != nil {
		g := time.Duration(s.GetGraceNs())
		out.Grace = &g
	}
	return out
}

// Task is t on the wire.
func Task(t spec.Task) *shoalv1.Task {
	out := &shoalv1.Task{Id: t.ID, Name: t.Name, Service: t.Service, Slot: int32(t.Slot), Node: t.Node, Spec: TaskSpec(t.Spec), Desired: t.Desired,
		Status: TaskStatus(t.Status), Version: t.Version, CreatedMs: t.Created, NotBeforeMs: t.NotBefore, Attempt: int32(t.Attempt), Ports: Ports(t.Ports), ListenWithinMs: t.ListenWithin.Milliseconds(), Run: int32(t.Run), Stopping: Stopping(t.Stopping)}
	for _, a := range t.Attachments {
		out.Attachments = append(out.Attachments, &shoalv1.Attachment{Network: a.Network, Addrs: texts(a.Addrs), Aliases: a.Aliases, Iface: a.Iface, Leaving: a.Leaving, Joined: a.Joined, Fixed: a.Fixed})
	}
	return out
}

// ToTask is the inverse of Task.
func ToTask(t *shoalv1.Task) (spec.Task, error) {
	out := spec.Task{ID: t.GetId(), Name: t.GetName(), Service: t.GetService(), Slot: int(t.GetSlot()), Node: t.GetNode(),
		Desired: t.GetDesired(), Version: t.GetVersion(), Created: t.GetCreatedMs(), NotBefore: t.GetNotBeforeMs(), Attempt: int(t.GetAttempt()), ListenWithin: time.Duration(t.GetListenWithinMs()) * time.Millisecond,
		Run: int(t.GetRun()), Stopping: ToStopping(t.GetStopping())}
	var err error
	if out.Spec, err = ToTaskSpec(t.GetSpec()); err != nil {
		return out, fmt.Errorf("task %s: %w", out.Name, err)
	}
	if out.Ports, err = ToPorts(t.GetPorts()); err != nil {
		return out, fmt.Errorf("task %s: %w", out.Name, err)
	}
	if out.Status, err = ToTaskStatus(t.GetStatus()); err != nil {
		return out, fmt.Errorf("task %s: %w", out.Name, err)
	}
	for _, a := range t.GetAttachments() {
		addrs, err := Addrs("address of task "+out.Name, a.GetAddrs())
		if err != nil {
			return out, err
		}
		out.Attachments = append(out.Attachments, spec.Attachment{Network: a.GetNetwork(), Addrs: addrs, Aliases: a.GetAliases(), Iface: a.GetIface(), Leaving: a.GetLeaving(), Joined: a.GetJoined(), Fixed: a.GetFixed()})
	}
	return out, nil
}

// Node is n on the wire.
func Node(n spec.Node) *shoalv1.NodeInfo {
	out := &shoalv1.NodeInfo{Id: n.ID, Name: n.Name, Number: int32(n.Number), Role: n.Role, Availability: n.Availability, Labels: n.Labels,
		ControlPort: int32(n.ControlPort), GossipPort: int32(n.GossipPort), Status: n.Status, Message: n.Message, Version: n.Version,
		CreatedMs: n.Created, DataPath: n.DataPath, Platform: n.Platform, Containers: n.Containers, ContainersWhy: n.ContainersWhy, PublicKey: n.PublicKey, CertificateEndMs: n.CertEnd, CertificateRoot: n.CertRoot, Level: int32(n.Level), Build: n.Build, NanoCpus: n.NanoCPUs, Memory: n.Memory, EngineLabels: n.EngineLabels}
	if n.Addr.IsValid() {
		out.Addr = n.Addr.String()
	}
	return out
}

// ToNode is the inverse of Node.
func ToNode(n *shoalv1.NodeInfo) (spec.Node, error) {
	out := spec.Node{ID: n.GetId(), Name: n.GetName(), Number: int(n.GetNumber()), Role: n.GetRole(), Availability: n.GetAvailability(), Labels: n.GetLabels(),
		ControlPort: int(n.GetControlPort()), GossipPort: int(n.GetGossipPort()), Status: n.GetStatus(), Message: n.GetMessage(), Version: n.GetVersion(),
		Created: n.GetCreatedMs(), DataPath: n.GetDataPath(), Platform: n.GetPlatform(), Containers: n.GetContainers(), ContainersWhy: n.GetContainersWhy(), PublicKey: n.GetPublicKey(), CertEnd: n.GetCertificateEndMs(), CertRoot: n.GetCertificateRoot(), Level: int(n.GetLevel()), Build: n.GetBuild(), NanoCPUs: n.GetNanoCpus(), Memory: n.GetMemory(), EngineLabels: n.GetEngineLabels()}
	if n.GetAddr() != "" {
		a, err := netip.ParseAddr(n.GetAddr())
		if err != nil {
			return out, fmt.Errorf("address of node %s: %q is not an IP address", out.Name, n.GetAddr())
		}
		out.Addr = a
	}
	return out, nil
}

// Container is c on the wire; absent for a program of the node.
func Container(c spec.Container) *shoalv1.Container {
	if c.Image == "" {
		return nil
	}
	out := &shoalv1.Container{Image: c.Image, Entrypoint: c.Entrypoint, Pull: c.Pull, RegistryAuth: c.RegistryAuth, ReadOnly: c.ReadOnly,
		Privileged: c.Privileged, CapAdd: c.CapAdd, CapDrop: c.CapDrop, SecurityOpt: c.SecurityOpt, Devices: c.Devices, ShmSize: c.ShmSize,
		Ulimits: c.Ulimits, Sysctls: c.Sysctls, Groups: c.Groups, Init: c.Init}
	for _, m := range c.Mounts {
		out.Mounts = append(out.Mounts, &shoalv1.Mount{Type: m.Type, Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly, NoCopy: m.NoCopy,
			Propagation: m.Propagation, CreateSource: m.CreateSrc, Size: m.Size, Mode: m.Mode, Options: m.Options, Driver: m.Driver, Labels: m.Labels})
	}
	return out
}

// ToContainer is the inverse of Container.
func ToContainer(c *shoalv1.Container) spec.Container {
	out := spec.Container{Image: c.GetImage(), Entrypoint: c.GetEntrypoint(), Pull: c.GetPull(), RegistryAuth: c.GetRegistryAuth(), ReadOnly: c.GetReadOnly(),
		Privileged: c.GetPrivileged(), CapAdd: c.GetCapAdd(), CapDrop: c.GetCapDrop(), SecurityOpt: c.GetSecurityOpt(), Devices: c.GetDevices(), ShmSize: c.GetShmSize(),
		Ulimits: c.GetUlimits(), Sysctls: c.GetSysctls(), Groups: c.GetGroups(), Init: c.GetInit()}
	for _, m := range c.GetMounts() {
		out.Mounts = append(out.Mounts, spec.Mount{Type: m.GetType(), Source: m.GetSource(), Target: m.GetTarget(), ReadOnly: m.GetReadOnly(), NoCopy: m.GetNoCopy(),
			Propagation: m.GetPropagation(), CreateSrc: m.GetCreateSource(), Size: m.GetSize(), Mode: m.GetMode(), Options: m.GetOptions(), Driver: m.GetDriver(), Labels: m.GetLabels()})
	}
	return out
}
