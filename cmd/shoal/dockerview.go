package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	units "github.com/docker/go-units"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// Docker's fields, for the templates of people's scripts: what Docker's API
// (v1.44, Swarm's Service, Task, Node, and Network and Container) calls what an
// inspect shows here by names of its own.

type object = map[string]any

// dockerTime is an instant in Docker's JSON.
func dockerTime(ms int64) string { return instant(ms).Format(time.RFC3339Nano) }

func dockerPorts(ps []spec.Port) []object {
	out := []object{}
	for _, p := range ps {
		out = append(out, object{"Protocol": p.Protocol, "TargetPort": p.Target, "PublishedPort": p.Published, "PublishMode": p.Mode})
	}
	return out
}

func dockerResources(r spec.Resources) object {
	return object{
		"Limits":       object{"NanoCPUs": r.NanoCPUs, "MemoryBytes": r.Memory, "Pids": r.Pids},
		"Reservations": object{"NanoCPUs": r.ReserveNanoCPUs, "MemoryBytes": r.ReserveMemory},
	}
}

func dockerPolicy(u *spec.UpdateConfig) object {
	p := u.Policy()
	return object{"Parallelism": p.Parallelism, "Delay": p.Delay.Nanoseconds(), "FailureAction": p.FailureAction, "Monitor": p.Monitor.Nanoseconds(),
		"MaxFailureRatio": p.MaxFailureRatio, "Order": p.Order}
}

func dockerBlobs(kind spec.BlobKind, refs []spec.BlobRef, image bool) []object {
	out := []object{}
	name := capital(string(kind))
	for _, r := range refs {
		out = append(out, object{name + "ID": r.ID, name + "Name": r.Name,
			"File": object{"Name": r.Path(kind, image), "UID": cmp.Or(r.UID, "0"), "GID": cmp.Or(r.GID, "0"), "Mode": r.FileMode()}})
	}
	return out
}

func dockerMounts(ms []spec.Mount) []object {
	out := []object{}
	for _, m := range ms {
		out = append(out, object{"Type": m.Type, "Source": m.Source, "Target": m.Target, "ReadOnly": m.ReadOnly})
	}
	return out
}

func dockerHealth(h *spec.HealthCheck) any {
	if h == nil {
		return nil
	}
	test := []string{"CMD-SHELL", h.Command}
	switch {
	case h.Disabled:
		test = []string{"NONE"}
	case len(h.Exec) > 0:
		test = append([]string{"CMD"}, h.Exec...)
	}
	return object{"Test": test, "Interval": h.Interval.Nanoseconds(), "Timeout": h.Timeout.Nanoseconds(), "StartPeriod": h.StartPeriod.Nanoseconds(), "Retries": h.Retries}
}

// orEmpty is m, and never nil: {{range}} and {{index}} work on it.
// dockerHealthNow is nothing, which a template can ask for, where there is no check.
func dockerHealthNow(h string) any {
	if h == "" {
		return nil
	}
	return object{"Status": h}
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

func dockerRestart(s string) object {
	policy, most, _ := spec.ParseRestart(s)
	return object{"Name": cmp.Or(policy, spec.RestartNo), "MaximumRetryCount": most}
}

func dockerTaskSpec(t spec.TaskSpec) object {
	return object{
		"ContainerSpec": object{
			"Image": t.Image, "Labels": orEmpty(t.Labels), "Command": t.Entrypoint, "Args": t.Command, "Hostname": t.Hostname, "Env": t.Env, "Dir": t.Dir, "User": t.User,
			"Groups": t.Groups, "StopSignal": t.StopSignal, "StopGracePeriod": t.Grace().Nanoseconds(), "Mounts": dockerMounts(t.Mounts), "Hosts": t.ExtraHosts,
			"DNSConfig": object{"Nameservers": t.DNS, "Search": t.DNSSearch, "Options": t.DNSOptions},
			"Secrets":   dockerBlobs(spec.KindSecret, t.Secrets, t.Image != ""), "Configs": dockerBlobs(spec.KindConfig, t.Configs, t.Image != ""),
			"Healthcheck": dockerHealth(t.Health), "Init": t.Init, "ReadOnly": t.ReadOnly, "CapabilityAdd": t.CapAdd, "CapabilityDrop": t.CapDrop, "Sysctls": orEmpty(t.Sysctls), "TTY": t.TTY,
		},
		"Resources": dockerResources(t.Resources),
		"LogDriver": object{"Name": cmp.Or(t.Log.Driver, "json-file"), "Options": t.Log.Options()},
	}
}

func dockerServiceSpec(s spec.ServiceSpec) object {
	t := dockerTaskSpec(s.Task)
	nets := []object{}
	for _, n := range s.Networks {
		nets = append(nets, object{"Target": n.Network, "Aliases": n.Aliases})
	}
	t["Networks"], t["ForceUpdate"] = nets, s.ForceUpdate
	t["RestartPolicy"] = object{"Condition": cmp.Or(s.RestartCondition, spec.RestartAny), "Delay": s.RestartDelay.Nanoseconds(), "MaxAttempts": s.RestartMax, "Window": s.RestartWindow.Nanoseconds()}
	prefs := []object{}
	for _, d := range s.Spread {
		prefs = append(prefs, object{"Spread": object{"SpreadDescriptor": d}})
	}
	t["Placement"] = object{"Constraints": s.Constraints, "Preferences": prefs, "MaxReplicas": s.MaxPerNode}
	mode := object{"Replicated": object{"Replicas": s.Replicas}}
	switch s.Mode {
	case spec.ModeGlobal:
		mode = object{"Global": object{}}
	case spec.ModeReplicatedJob:
		mode = object{"ReplicatedJob": object{"MaxConcurrent": cmp.Or(s.MaxConcurrent, s.Replicas), "TotalCompletions": s.Replicas}}
	case spec.ModeGlobalJob:
		mode = object{"GlobalJob": object{}}
	}
	return object{"Name": s.Name, "Labels": orEmpty(s.Labels), "TaskTemplate": t, "Mode": mode,
		"UpdateConfig": dockerPolicy(s.Update), "RollbackConfig": dockerPolicy(s.Rollback), "Networks": nets,
		"EndpointSpec": object{"Mode": s.EndpointMode, "Ports": dockerPorts(s.Ports)}}
}

// withPrefix is an address with the prefix length of the subnet that it is in.
func withPrefix(a netip.Addr, subnets []string) string {
	for _, s := range subnets {
		if p, err := netip.ParsePrefix(s); err == nil && p.Contains(a) {
			return netip.PrefixFrom(a, p.Bits()).String()
		}
	}
	return a.String()
}

func dockerService(w *shoalv1.Service, nets []*shoalv1.Network) (object, error) {
	s, err := api.ToService(w)
	if err != nil {
		return nil, err
	}
	vips := []object{}
	for _, v := range s.VIPs {
		for _, a := range v.Addrs {
			i := slices.IndexFunc(nets, func(n *shoalv1.Network) bool { return n.Id == v.Network })
			var subnets []string
			if i >= 0 {
				subnets = nets[i].Subnets
			}
			vips = append(vips, object{"NetworkID": v.Network, "Addr": withPrefix(a, subnets)})
		}
	}
	out := object{"ID": s.ID, "Version": object{"Index": s.Version}, "CreatedAt": dockerTime(s.Created), "UpdatedAt": dockerTime(s.Created), "Spec": dockerServiceSpec(s.Spec),
		"Endpoint":      object{"Spec": object{"Mode": s.Spec.EndpointMode, "Ports": dockerPorts(s.Spec.Ports)}, "Ports": dockerPorts(s.Ports), "VirtualIPs": vips},
		"ServiceStatus": object{"RunningTasks": w.Running, "DesiredTasks": w.Desired},
		"PreviousSpec":  nil, "UpdateStatus": nil} // so that {{if .UpdateStatus}} asks for it
	if s.Previous != nil {
		out["PreviousSpec"] = dockerServiceSpec(*s.Previous)
	}
	if u := s.Update; u != nil {
		out["UpdateStatus"] = object{"State": u.State, "StartedAt": dockerTime(u.StartedAt), "CompletedAt": dockerTime(u.CompletedAt), "Message": u.Message}
		if u.StartedAt > 0 {
			out["UpdatedAt"] = dockerTime(u.StartedAt)
		}
	}
	return out, nil
}

// dockerArch is a machine as Docker's nodes name it (uname -m).
func dockerArch(goarch string) string {
	return cmp.Or(map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[goarch], goarch)
}

func dockerNode(w *shoalv1.NodeInfo) (object, error) {
	n, err := api.ToNode(w)
	if err != nil {
		return nil, err
	}
	os, arch, _ := strings.Cut(n.Platform, "/")
	out := object{"ID": n.ID, "Version": object{"Index": n.Version}, "CreatedAt": dockerTime(n.Created), "UpdatedAt": dockerTime(n.Created),
		"Spec":        object{"Name": n.Name, "Role": n.Role, "Availability": n.Availability, "Labels": orEmpty(n.Labels)},
		"Description": object{"Hostname": n.Name, "Platform": object{"OS": os, "Architecture": dockerArch(arch)}, "Resources": object{"NanoCPUs": n.NanoCPUs, "MemoryBytes": n.Memory}, "Engine": object{"EngineVersion": n.Build, "Labels": orEmpty(n.EngineLabels)}},
		"Status":      object{"State": n.Status, "Addr": n.Addr.String(), "Message": n.Message}}
	if n.Role == spec.RoleManager {
		reach := "reachable"
		if n.Status != spec.NodeReady {
			reach = "unreachable"
		}
		out["ManagerStatus"] = object{"Leader": w.Leader, "Reachability": reach, "Addr": netip.AddrPortFrom(n.Addr, uint16(n.ControlPort)).String()}
	}
	return out, nil
}

func dockerNetwork(w *shoalv1.Network, tasks []*shoalv1.Task) (object, error) {
	n, err := api.ToNetwork(w)
	if err != nil {
		return nil, err
	}
	cfg, six := []object{}, false
	for i, s := range n.Subnets {
		c := object{"Subnet": s.String(), "Gateway": "", "IPRange": ""}
		if i < len(n.Gateways) {
			c["Gateway"] = n.Gateways[i].String()
		}
		for _, r := range n.IPRanges {
			if s.Contains(r.Addr()) {
				c["IPRange"] = r.String()
			}
		}
		cfg, six = append(cfg, c), six || s.Addr().Is6()
	}
	on := object{}
	for _, t := range tasks {
		for _, a := range t.Attachments {
			if a.Network != n.ID {
				continue
			}
			c := object{"Name": t.Name, "EndpointID": t.Id, "MacAddress": "", "IPv4Address": "", "IPv6Address": ""}
			for _, text := range a.Addrs {
				if ip, err := netip.ParseAddr(text); err == nil {
					c[map[bool]string{true: "IPv4Address", false: "IPv6Address"}[ip.Is4()]] = withPrefix(ip, w.Subnets)
				}
			}
			on[t.Id] = c
		}
	}
	return object{"Name": n.Name, "Id": n.ID, "Created": dockerTime(n.Created), "Scope": scope(w), "Driver": n.Driver, "EnableIPv4": true, "EnableIPv6": six,
		"IPAM": object{"Driver": "default", "Config": cfg, "Options": nil}, "Internal": n.Internal, "Attachable": true, "Ingress": false, "Containers": on,
		"Options": orEmpty(n.Options), "Labels": orEmpty(n.Labels)}, nil
}

// dockerState is a task's state as a container's.
func dockerState(t *shoalv1.Task) string {
	switch st, _ := spec.ParseTaskState(t.GetStatus().GetState()); {
	case st.Ended():
		return "exited"
	case st >= spec.TaskStarting:
		return "running"
	}
	return "created"
}

// dockerStatus is a container's status in docker ps: "Up 3 minutes (healthy)".
func dockerStatus(t *shoalv1.Task) string {
	st := t.GetStatus()
	switch dockerState(t) {
	case "exited":
		return fmt.Sprintf("Exited (%d) %s", st.GetExitCode(), ago(st.GetAtMs()))
	case "running":
		since := t.CreatedMs
		if t.Run > 0 {
			since = max(since, st.GetAtMs())
		}
		up := "Up " + units.HumanDuration(time.Since(time.UnixMilli(since)))
		switch h := st.GetHealth(); h {
		case "":
			return up
		case spec.HealthStarting:
			return up + " (health: starting)"
		default:
			return up + " (" + h + ")"
		}
	}
	return "Created"
}

// dockerTask has the fields of a container and of a task of Swarm's: no name is in
// both with another meaning, but for Spec and Status, which are a task's.
func dockerTask(w *shoalv1.Task, nodes, nets names) (object, error) {
	t, err := api.ToTask(w)
	if err != nil {
		return nil, err
	}
	on, attached, first := object{}, []object{}, ""
	for _, a := range t.Attachments {
		v4, v6 := "", ""
		var all []string
		for _, ip := range a.Addrs {
			all = append(all, ip.String())
			if ip.Is4() {
				v4 = cmp.Or(v4, ip.String())
			} else {
				v6 = cmp.Or(v6, ip.String())
			}
		}
		first = cmp.Or(first, v4)
		on[nets.Of(a.Network)] = object{"NetworkID": a.Network, "EndpointID": t.ID, "IPAddress": v4, "GlobalIPv6Address": v6, "Aliases": a.Aliases}
		attached = append(attached, object{"Network": object{"ID": a.Network, "Spec": object{"Name": nets.Of(a.Network)}}, "Addresses": all})
	}
	state := dockerState(w)
	return object{
		"Id": t.ID, "ID": t.ID, "Name": "/" + t.Name, "Created": dockerTime(t.Created), "CreatedAt": dockerTime(t.Created), "Version": object{"Index": t.Version}, "Image": t.Spec.Image,
		"State": object{"Status": state, "Running": state == "running", "Paused": false, "Restarting": false, "OOMKilled": strings.Contains(t.Status.Message, "out of memory"),
			"Dead": false, "Pid": t.Status.PID, "ExitCode": t.Status.ExitCode, "Error": t.Status.Message, "Health": dockerHealthNow(t.Status.Health)},
		"Config": object{"Hostname": cmp.Or(t.Spec.Hostname, t.Name), "User": t.Spec.User, "Env": t.Spec.Env, "Cmd": t.Spec.Command, "Entrypoint": t.Spec.Entrypoint, "Image": t.Spec.Image,
			"WorkingDir": t.Spec.Dir, "Labels": orEmpty(t.Spec.Labels), "Tty": t.Spec.TTY, "StopSignal": t.Spec.StopSignal, "Healthcheck": dockerHealth(t.Spec.Health)},
		"HostConfig": object{"NanoCpus": t.Spec.Resources.NanoCPUs, "Memory": t.Spec.Resources.Memory, "MemorySwap": t.Spec.Resources.MemorySwap, "PidsLimit": t.Spec.Resources.PidsLimit(),
			"Privileged": t.Spec.Privileged, "ReadonlyRootfs": t.Spec.ReadOnly, "AutoRemove": t.Spec.AutoRemove, "RestartPolicy": dockerRestart(t.Spec.Restart),
			"LogConfig": object{"Type": cmp.Or(t.Spec.Log.Driver, "json-file"), "Config": t.Spec.Log.Options()},
			"CapAdd":    t.Spec.CapAdd, "CapDrop": t.Spec.CapDrop},
		"Mounts":          dockerMounts(t.Spec.Mounts),
		"NetworkSettings": object{"IPAddress": first, "Networks": on},
		"ServiceID":       t.Service, "Slot": t.Slot, "NodeID": t.Node, "Node": object{"Name": nodes[t.Node]}, "DesiredState": t.Desired, "NetworksAttachments": attached,
		"Spec": dockerTaskSpec(t.Spec),
		"Status": object{"State": t.Status.State.String(), "Timestamp": dockerTime(t.Status.At), "Message": t.Status.Message, "Err": t.Status.Message,
			"ContainerStatus": object{"ContainerID": t.ID, "PID": t.Status.PID, "ExitCode": t.Status.ExitCode}},
	}, nil
}

// ---- for people ----

// pretty is a list of lines "Key: value", indented by their depth, as Docker's
// --pretty has them.
type pretty struct{ w io.Writer }

func (p pretty) line(depth int, key string, v any) {
	if s, ok := v.(string); ok && s == "" {
		return
	}
	fmt.Fprintf(p.w, "%-*s %v\n", 20, strings.Repeat(" ", depth)+key+":", v)
}

func (p pretty) head(key string) { fmt.Fprintln(p.w, key+":") }

func (p pretty) labels(head string, l map[string]string) {
	if len(l) == 0 {
		return
	}
	p.head(head)
	for _, k := range slices.Sorted(maps.Keys(l)) {
		fmt.Fprintf(p.w, " %s=%s\n", k, spec.Raw(l[k]))
	}
}

func (p pretty) policy(name, order string, u *spec.UpdateConfig) {
	v := u.Policy()
	p.head(name)
	p.line(1, "Parallelism", v.Parallelism)
	if v.Delay > 0 {
		p.line(1, "Delay", v.Delay)
	}
	p.line(1, "On failure", v.FailureAction)
	p.line(1, "Monitoring Period", v.Monitor)
	p.line(1, "Max failure ratio", v.MaxFailureRatio)
	p.line(1, order, v.Order)
}

func prettyService(w io.Writer, s *shoalv1.Service, nets names) error {
	v, err := api.ToService(s)
	if err != nil {
		return err
	}
	p, t := pretty{w}, v.Spec.Task
	p.line(0, "ID", v.ID)
	p.line(0, "Name", v.Spec.Name)
	p.labels("Labels", v.Spec.Labels)
	switch {
	case v.Spec.Job():
		p.line(0, "Service Mode", map[bool]string{true: "GlobalJob", false: "ReplicatedJob"}[v.Spec.Global()])
		if v.Spec.MaxConcurrent > 0 {
			p.line(1, "Max Concurrent", v.Spec.MaxConcurrent)
		}
		p.line(1, "Completions", fmt.Sprintf("%d of %d (%d running)", s.Completed, s.ToComplete, s.Running))
	case v.Spec.Global():
		p.line(0, "Service Mode", "Global")
		p.line(1, "Tasks", fmt.Sprintf("%d (%d running)", s.GetDesired(), s.Running))
	default:
		p.line(0, "Service Mode", "Replicated")
		p.line(1, "Replicas", fmt.Sprintf("%d (%d running)", v.Spec.Replicas, s.Running))
	}
	if u := v.Update; u != nil {
		p.head("UpdateStatus")
		p.line(1, "State", u.State)
		if u.StartedAt > 0 {
			p.line(1, "Started", ago(u.StartedAt))
		}
		if u.CompletedAt > 0 {
			p.line(1, "Completed", ago(u.CompletedAt))
		}
		p.line(1, "Message", u.Message)
	}
	if len(v.Spec.Constraints)+len(v.Spec.Spread)+v.Spec.MaxPerNode > 0 {
		p.head("Placement")
		if len(v.Spec.Constraints) > 0 {
			p.line(1, "Constraints", v.Spec.Constraints)
		}
		if len(v.Spec.Spread) > 0 {
			p.line(1, "Preferences", v.Spec.Spread)
		}
		if v.Spec.MaxPerNode > 0 {
			p.line(1, "Max Replicas Per Node", v.Spec.MaxPerNode)
		}
	}
	p.policy("UpdateConfig", "Update order", v.Spec.Update)
	p.policy("RollbackConfig", "Rollback order", v.Spec.Rollback)
	if t.Image != "" {
		p.head("ContainerSpec")
		p.line(1, "Image", t.Image)
	} else {
		p.head("HostTaskSpec") // a program of the nodes' own file systems
	}
	p.line(1, "Command", strings.Join(spec.Raws(t.Entrypoint), " "))
	p.line(1, "Args", strings.Join(spec.Raws(t.Command), " "))
	p.line(1, "Env", strings.Join(spec.Raws(t.Env), " "))
	p.line(1, "Dir", spec.Raw(t.Dir))
	p.line(1, "User", spec.Raw(t.User))
	for _, m := range t.Mounts {
		p.line(1, "Mount", fmt.Sprintf("%s %s at %s", m.Type, m.Source, m.Target))
	}
	for _, r := range t.Secrets {
		p.line(1, "Secret", r.Name+" at "+r.Path(spec.KindSecret, t.Image != ""))
	}
	for _, r := range t.Configs {
		p.line(1, "Config", r.Name+" at "+r.Path(spec.KindConfig, t.Image != ""))
	}
	if t.Log != (spec.LogConfig{}) {
		p.head("Log Driver")
		p.line(1, "Name", cmp.Or(t.Log.Driver, "json-file"))
		p.line(1, "LogOpts", t.Log.String())
	}
	prettyResources(p, t.Resources)
	p.line(0, "Networks", strings.Join(each1(v.Spec.Networks, func(a spec.NetworkAttachment) string { return nets.Of(a.Network) }), " "))
	for _, a := range v.VIPs {
		p.line(0, "Virtual IP", fmt.Sprintf("%s on %s", strings.Trim(fmt.Sprint(a.Addrs), "[]"), nets.Of(a.Network)))
	}
	p.line(0, "Endpoint Mode", v.Spec.EndpointMode)
	if len(v.Ports) > 0 {
		p.head("Ports")
	}
	for _, port := range v.Ports {
		fmt.Fprintf(w, " PublishedPort = %d\n  Protocol = %s\n  TargetPort = %d\n  PublishMode = %s\n", port.Published, port.Protocol, port.Target, port.Mode)
	}
	return nil
}

func prettyResources(p pretty, r spec.Resources) {
	if r == (spec.Resources{}) {
		return
	}
	p.head("Resources")
	for _, l := range []struct {
		what      string
		cpu, mem  int64
		processes int64
	}{{"Limits", r.NanoCPUs, r.Memory, r.Pids}, {"Reservations", r.ReserveNanoCPUs, r.ReserveMemory, 0}} {
		var parts []string
		if l.cpu > 0 {
			parts = append(parts, "CPU "+spec.FormatCPUs(l.cpu))
		}
		if l.mem > 0 {
			parts = append(parts, "memory "+units.BytesSize(float64(l.mem)))
		}
		if l.processes > 0 {
			parts = append(parts, fmt.Sprintf("%d processes", l.processes))
		}
		p.line(1, l.what, strings.Join(parts, ", "))
	}
}

func prettyNode(w io.Writer, n *shoalv1.NodeInfo) error {
	v, err := api.ToNode(n)
	if err != nil {
		return err
	}
	p := pretty{w}
	p.line(0, "ID", v.ID)
	p.labels("Labels", v.Labels)
	p.line(0, "Hostname", v.Name)
	p.line(0, "Joined at", createdAt(v.Created))
	p.head("Status")
	p.line(1, "State", capital(v.Status))
	p.line(1, "Availability", capital(v.Availability))
	p.line(1, "Address", v.Addr)
	p.line(1, "Message", v.Message)
	if v.Role == spec.RoleManager {
		p.head("Manager Status")
		p.line(1, "Address", netip.AddrPortFrom(v.Addr, uint16(v.ControlPort)))
		p.line(1, "Raft Status", map[bool]string{true: "Reachable", false: "Unreachable"}[v.Status == spec.NodeReady])
		p.line(1, "Leader", map[bool]string{true: "Yes", false: "No"}[n.Leader])
	}
	if os, arch, ok := strings.Cut(v.Platform, "/"); ok {
		p.head("Platform")
		p.line(1, "Operating System", os)
		p.line(1, "Architecture", dockerArch(arch))
	}
	if v.NanoCPUs > 0 || v.Memory > 0 {
		p.head("Resources")
		p.line(1, "CPUs", spec.FormatCPUs(v.NanoCPUs))
		p.line(1, "Memory", fmt.Sprintf("%.4gGiB", float64(v.Memory)/(1<<30)))
	}
	p.line(0, "Engine Version", v.Build)
	p.labels("Engine Labels", v.EngineLabels)
	p.line(0, "Data Path", v.DataPath)
	return nil
}
