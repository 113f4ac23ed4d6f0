package container

import (
	"context"
	"encoding/json"
	"fmt"
	goruntime "runtime"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/runtime/cgroup"
	"github.com/shoalnet/shoal/spec"
)

// dockerCaps are Docker's default capabilities
// (https://docs.docker.com/engine/containers/run/#runtime-privilege-and-linux-capabilities).
var dockerCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

const defaultShm = 64 << 20 // bytes; Docker's

// specOpts describe the container of a box. Spec is as Prepare returned it: the
// image's own defaults are in it already.
func specOpts(b runtime.Box, img client.Image, mounts []specs.Mount) []oci.SpecOpts {
	s := b.Spec
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=" + b.Hostname}
	if s.TTY {
		env = append(env, "TERM=xterm")
	}
	cwd := s.Dir
	if cwd == "" {
		cwd = "/"
	}
	opts := []oci.SpecOpts{
		oci.WithDefaultSpec(),
		oci.WithEnv(env),
		oci.WithEnv(s.Env),
		oci.WithProcessArgs(append(slices.Clone(s.Entrypoint), s.Command...)...),
		oci.WithProcessCwd(cwd),
		oci.WithHostname(b.Hostname),
		oci.WithCgroup(b.Cgroup),
		withResources(s.Resources),
		withUser(s.User, s.Groups),
		oci.WithoutMounts("/run"), // containerd's own idea; an image's /run is its own, as in Docker
		oci.WithDevShmSize(shmKB(s.ShmSize)),
		oci.WithMounts(mounts),
		withSysctls(s, b.Netns != ""),
		withUlimits(s.Ulimits),
	}
	if b.Netns != "" {
		opts = append(opts, oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: spec.NetnsDir + "/" + b.Netns}))
	} else {
		opts = append(opts, oci.WithHostNamespace(specs.NetworkNamespace))
	}
	if s.TTY {
		opts = append(opts, oci.WithTTY)
	}
	if s.ReadOnly {
		opts = append(opts, oci.WithRootFSReadonly())
	}
	for _, d := range s.Devices {
		if host, ctr, perm, err := spec.ParseDevice(d); err == nil {
			opts = append(opts, oci.WithDevices(host, ctr, perm))
		}
	}
	nnp, unconfined, sysPaths, profile, apparmor := security(s.SecurityOpt)
	if s.Privileged {
		// What this node itself has not, runc can't give: the bounding set counts.
		opts = append(opts, oci.WithPrivileged, oci.WithAllCurrentCapabilities, oci.WithHostDevices, oci.WithAllDevicesAllowed, oci.WithWriteableSysfs, oci.WithWriteableCgroupfs)
		unconfined = unconfined || profile == ""
	} else {
		opts = append(opts, withCapabilities(s.CapAdd, s.CapDrop))
	}
	if sysPaths {
		opts = append(opts, oci.WithMaskedPaths(nil), oci.WithReadonlyPaths(nil))
	}
	if nnp {
		opts = append(opts, oci.WithNoNewPrivileges)
	} else {
		opts = append(opts, oci.WithNewPrivileges)
	}
	if apparmor != "" && apparmor != "unconfined" {
		opts = append(opts, oci.WithApparmorProfile(apparmor))
	}
	if !unconfined {
		opts = append(opts, withSeccomp(profile)) // after the capabilities, on which it depends
	}
	opts = append(opts, oci.WithAnnotations(map[string]string{"net.shoal.task": b.Name}))
	return opts
}

func shmKB(bytes int64) int64 {
	if bytes == 0 {
		bytes = defaultShm
	}
	return max(bytes>>10, 1)
}

// security reads the options that spec.Container has validated.
func security(opts []string) (noNewPrivileges, unconfined, sysPaths bool, profile, apparmor string) {
	for _, o := range opts {
		k, v, _ := strings.Cut(strings.Replace(o, ":", "=", 1), "=")
		switch {
		case k == "no-new-privileges":
			noNewPrivileges = v != "false"
		case k == "seccomp" && v == "unconfined":
			unconfined = true
		case k == "seccomp" && v != "builtin":
			_, profile, _ = strings.Cut(o, "=")
		case k == "systempaths":
			sysPaths = true
		case k == "apparmor":
			apparmor = v
		}
	}
	return
}

// withUser resolves USER[:GROUP] in the image's own files.
func withUser(user string, groups []string) oci.SpecOpts {
	return func(ctx context.Context, c oci.Client, ctr *containers.Container, s *oci.Spec) error {
		who := "root"
		if user != "" {
			if err := oci.WithUser(user)(ctx, c, ctr, s); err != nil {
				return fmt.Errorf("user %q is not in the image: %w", user, err)
			}
			who, _, _ = strings.Cut(user, ":")
		}
		if !strings.Contains(user, ":") {
			if err := oci.WithAdditionalGIDs(who)(ctx, c, ctr, s); err != nil {
				return err
			}
		}
		if len(groups) > 0 {
			if err := oci.WithAppendAdditionalGroups(groups...)(ctx, c, ctr, s); err != nil {
				return fmt.Errorf("groups %s: %w", strings.Join(groups, ", "), err)
			}
		}
		return nil
	}
}

func withCapabilities(add, drop []string) oci.SpecOpts {
	return func(ctx context.Context, c oci.Client, ctr *containers.Container, s *oci.Spec) error {
		caps, err := capabilities(dockerCaps, add, drop)
		if err != nil {
			return err
		}
		if err := oci.WithCapabilities(caps)(ctx, c, ctr, s); err != nil {
			return err
		}
		// As Docker since 20.10: what a program may have it does not pass on.
		s.Process.Capabilities.Inheritable, s.Process.Capabilities.Ambient = nil, nil
		return nil
	}
}

// capabilities are Docker's rules for --cap-add and --cap-drop.
func capabilities(base, add, drop []string) ([]string, error) {
	norm := func(list []string) (all bool, out []string, err error) {
		for _, c := range list {
			c = strings.ToUpper(c)
			if c == "ALL" || c == "CAP_ALL" {
				all = true
				continue
			}
			if !strings.HasPrefix(c, "CAP_") {
				c = "CAP_" + c
			}
			if !slices.Contains(allCaps, c) {
				return false, nil, fmt.Errorf("capability %q is unknown: use a name of capabilities(7), like NET_ADMIN, or ALL", c)
			}
			out = append(out, c)
		}
		return all, out, nil
	}
	addAll, adds, err := norm(add)
	if err != nil {
		return nil, err
	}
	dropAll, drops, err := norm(drop)
	if err != nil {
		return nil, err
	}
	var out []string
	switch {
	case addAll:
		out = slices.Clone(allCaps)
	case dropAll:
	default:
		out = slices.Clone(base)
	}
	out = slices.DeleteFunc(out, func(c string) bool { return slices.Contains(drops, c) })
	for _, c := range adds {
		if !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	return out, nil
}

// allCaps are those of capabilities(7), Linux 5.9 and later.
var allCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP",
	"CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
	"CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE",
	"CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP",
	"CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// withSysctls: in a network namespace of its own a container may use low ports and
// ICMP sockets without privileges, as Docker has it since 20.10. The shim has set
// these already; runc would refuse network ones for the node's own namespace.
func withSysctls(t spec.TaskSpec, own bool) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		if len(t.Sysctls) == 0 {
			return nil
		}
		s.Linux.Sysctl = map[string]string{}
		for k, v := range t.Sysctls {
			if !own && strings.HasPrefix(k, "net.") {
				return fmt.Errorf("sysctl %s would change the node's own network: a task on network host can't set it", k)
			}
			s.Linux.Sysctl[k] = v
		}
		return nil
	}
}

// withResources are the limits of which this node is capable.
func withResources(r spec.Resources) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		res := cgroup.Linux(r)
		if s.Linux.Resources != nil {
			res.Devices = s.Linux.Resources.Devices
		}
		s.Linux.Resources = res
		// Not the protection of who starts it.
		s.Process.OOMScoreAdj = &r.OOMScoreAdj
		return nil
	}
}

func withUlimits(limits []string) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		// containerd's own limit of 1,024 files is not Docker's.
		s.Process.Rlimits = nil
		for _, u := range limits {
			name, soft, hard, err := spec.ParseUlimit(u)
			if err != nil {
				return err
			}
			s.Process.Rlimits = append(s.Process.Rlimits, specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(name), Soft: soft, Hard: hard})
		}
		return nil
	}
}

// withSeccomp is containerd's default profile, which is Docker's, or the user's
// own, and on top of either what keeps a network's rules true: see packetRules.
func withSeccomp(profile string) oci.SpecOpts {
	return func(ctx context.Context, c oci.Client, ctr *containers.Container, s *oci.Spec) error {
		if profile != "" {
			p, err := userProfile(profile, s)
			if err != nil {
				return err
			}
			s.Linux.Seccomp = p
			return nil
		}
		if err := seccomp.WithDefaultProfile()(ctx, c, ctr, s); err != nil {
			return err
		}
		if s.Linux.Seccomp != nil {
			packetRules(s.Linux.Seccomp)
		}
		return nil
	}
}

// userProfile reads Docker's format as far as it is OCI's.
func userProfile(text string, s *oci.Spec) (*specs.LinuxSeccomp, error) {
	var p specs.LinuxSeccomp
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	if p.DefaultAction == "" {
		return nil, fmt.Errorf("seccomp profile: it has no defaultAction")
	}
	if len(p.Architectures) == 0 && goruntime.GOARCH == "amd64" {
		p.Architectures = []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32}
	}
	return &p, nil
}

// packetRules let a container set socket options, but for those with which a
// packet's checksum is left to the network card, at a place of the program's
// choice: that would change the packet after all rules have seen it (see
// runtime/process, filterCalls). One argument can be compared once in a rule, so
// it takes several.
func packetRules(p *specs.LinuxSeccomp) {
	const (
		solXDP          = 283
		packetVnetHdr   = 15
		packetVnetHdrSz = 24
	)
	for i := range p.Syscalls {
		if p.Syscalls[i].Action == specs.ActAllow && len(p.Syscalls[i].Args) == 0 {
			p.Syscalls[i].Names = slices.DeleteFunc(slices.Clone(p.Syscalls[i].Names), func(n string) bool {
				return n == "setsockopt" || n == "socketcall" || strings.HasPrefix(n, "io_uring_")
			})
		}
	}
	allow := func(args ...specs.LinuxSeccompArg) {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{"setsockopt"}, Action: specs.ActAllow, Args: args})
	}
	arg := func(i uint, op specs.LinuxSeccompOperator, v uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: i, Op: op, Value: v}
	}
	const level, option = 1, 2
	allow(arg(level, specs.OpLessThan, unix.SOL_PACKET))
	for l := uint64(unix.SOL_PACKET) + 1; l < solXDP; l++ {
		allow(arg(level, specs.OpEqualTo, l))
	}
	allow(arg(level, specs.OpGreaterThan, solXDP))
	packet := arg(level, specs.OpEqualTo, unix.SOL_PACKET)
	allow(packet, arg(option, specs.OpLessThan, packetVnetHdr))
	for o := uint64(packetVnetHdr) + 1; o < packetVnetHdrSz; o++ {
		allow(packet, arg(option, specs.OpEqualTo, o))
	}
	allow(packet, arg(option, specs.OpGreaterThan, packetVnetHdrSz))
	// socketcall(2), of 32-bit programs, for all but setsockopt (14).
	for _, a := range []specs.LinuxSeccompArg{arg(0, specs.OpLessThan, 14), arg(0, specs.OpGreaterThan, 14)} {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{"socketcall"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{a}})
	}
}
