package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/agent"
	"github.com/shoalnet/shoal/dns"
	ingressnft "github.com/shoalnet/shoal/ingress/nft"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/internal/quiet"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/overlay/vxlan"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/runtime/cgroup"
	"github.com/shoalnet/shoal/runtime/container"
	"github.com/shoalnet/shoal/runtime/process"
	"github.com/shoalnet/shoal/runtime/volume"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
	"github.com/shoalnet/shoal/vip/ipvs"
	"github.com/shoalnet/shoal/vip/nft"
)

const resolvConfPath = "/etc/resolv.conf"

// dataPaths are the values of --data-path.
var dataPaths = []string{"auto", "ipvs", "nft"}

func (c *cli) agentCmd() *cobra.Command {
	cfg := agent.Config{Version: versionString()}
	var runDir, dataPath, logLevel, logFormat string
	var hidden, engine []string
	var stopTasks bool
	var ctr container.Config
	cmd := &cobra.Command{
		Use: "agent", Short: "Run this node's agent", Args: exactly(0),
		Long: `Agent is the daemon of a node. It listens on its unix socket only, until 'shoal
init' or 'shoal join' gives it an address to advertise. Tasks and their network
go on when it stops or is killed; the next agent adopts them. When it stops because
the machine goes down, as systemd says, or with --stop-tasks, it has them taken out
of every balancer first, and stopped each by its own signal and grace.

Tasks find --data-dir and --run-dir empty, containerd's directories, and what --hide
names: who reaches the agent's socket rules the cluster, and who reaches containerd's
rules the node.`,
		Example: `  shoal agent
  shoal agent --data-dir /srv/shoal --data-path nft --log-level debug
  shoal agent --hide /root --hide /etc/ssl/private`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Socket = c.socket
			var level slog.Level
			if err := level.UnmarshalText([]byte(logLevel)); err != nil {
				return usageError(cmd, fmt.Errorf("--log-level %q: use debug, info, warn or error", logLevel))
			}
			opt := &slog.HandlerOptions{Level: level}
			switch logFormat {
			case "text":
				cfg.Log = slog.New(quiet.New(slog.NewTextHandler(c.err, opt)))
			case "json":
				cfg.Log = slog.New(quiet.New(slog.NewJSONHandler(c.err, opt)))
			default:
				return usageError(cmd, fmt.Errorf("--log-format %q: use text or json", logFormat))
			}
			if err := cfg.Validate(); err != nil {
				return usageError(cmd, err)
			}
			if !slices.Contains(dataPaths, dataPath) {
				return usageError(cmd, fmt.Errorf("--data-path %q: use %s", dataPath, strings.Join(dataPaths, ", ")))
			}
			if os.Geteuid() != 0 {
				return fmt.Errorf("the agent needs root, for network namespaces and devices: run it as root, or by systemd")
			}
			for _, d := range hidden {
				if !filepath.IsAbs(d) || filepath.Clean(d) == "/" {
					return usageError(cmd, fmt.Errorf("--hide %q: name a directory by its whole path, like /root", d))
				}
			}
			if err := ctr.Pull.Validate(); err != nil {
				return usageError(cmd, err)
			}
			l, err := labels(engine)
			if err == nil {
				err = spec.ValidateEngineLabels(l)
			}
			if cfg.Labels = l; err != nil {
				return usageError(cmd, fmt.Errorf("--label: %w", err))
			}
			if cfg.ImageTTL < 0 {
				return usageError(cmd, fmt.Errorf("--image-ttl %s is negative: use 0 to keep images for ever", cfg.ImageTTL))
			}
			if stopTasks {
				cfg.GoesDown = func() bool { return true }
			}
			if ctr.Namespace == "" {
				ctr.Namespace = cfg.Instance
			}
			return runAgent(cmd.Context(), cfg, runDir, dataPath, hidden, ctr)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.DataDir, "data-dir", "/var/lib/shoal", "what survives a reboot: identity, raft, task output")
	f.StringVar(&runDir, "run-dir", "/run/shoal", "what does not")
	f.StringArrayVar(&hidden, "hide", nil, "directory of the node that its tasks find empty (repeatable)")
	f.StringVar(&cfg.NodeName, "node-name", "", "name of a node that is in no cluster yet (default: the host name); later 'node update --name' changes it")
	f.StringVar(&cfg.AdvertiseAddr, "advertise-addr", "", "address or interface for init and join that name none")
	f.StringArrayVar(&engine, "label", nil, "KEY=VALUE for constraints on engine.labels.KEY, as dockerd has it (repeatable); 'node update --label-add' has the managers keep one, which nobody but they can change")
	f.IntVar(&cfg.ControlPort, "control-port", agent.DefaultControlPort, "TCP port of the managers' and nodes' API")
	f.IntVar(&cfg.GossipPort, "gossip-port", agent.DefaultGossipPort, "TCP and UDP port of gossip")
	f.StringVar(&cfg.SocketGroup, "socket-group", agent.DefaultSocketGroup, "group whose members may use the socket, which is root's power over the cluster; nobody but root where there is none such")
	f.StringVar(&cfg.MetricsAddr, "metrics-addr", "", "ADDRESS:PORT to serve Prometheus' metrics at, to whoever asks (default: on the unix socket only)")
	f.StringVar(&dataPath, "data-path", "auto", "VIP data path: ipvs, nft, or auto: ipvs where the kernel has it")
	f.DurationVar(&cfg.DNSStale, "dns-stale", 0, "when no resolver answers, give tasks its last answer for so long after its end (RFC 8767); 0: never")
	f.StringVar(&ctr.Address, "containerd", container.DefaultAddress, "socket of containerd, which runs tasks from images; empty: this node runs none")
	f.StringVar(&ctr.Namespace, "containerd-namespace", "", "containerd's namespace for this agent alone (default: --instance)")
	f.StringVar(&ctr.Snapshotter, "snapshotter", "", "containerd's snapshotter (default overlayfs)")
	f.StringVar(&ctr.Pull.HostsDir, "registry-config", "/etc/shoal/certs.d", "directory of containerd's hosts.toml files, one directory for each registry: mirrors, certificates")
	f.StringArrayVar(&ctr.Pull.Insecure, "insecure-registry", nil, "HOST[:PORT] or address prefix of registries without TLS, or whose certificate is not checked (repeatable)")
	f.StringArrayVar(&ctr.Pull.Mirrors, "registry-mirror", nil, "URL asked for images of Docker Hub before it (repeatable)")
	f.DurationVar(&ctr.Pull.Stall, "pull-timeout", time.Minute, "how long a registry may send nothing before a pull is given up")
	f.DurationVar(&cfg.ImageTTL, "image-ttl", 7*24*time.Hour, "how long an image that only tasks asked for stays after the last of them; 0: for ever")
	f.StringVar(&cfg.Instance, "instance", "shoal", "prefix of what this agent names on the machine, for several agents on one")
	f.BoolVar(&stopTasks, "stop-tasks", false, "stop the node's tasks, in order, when the agent is stopped, and not only when systemd says that the machine goes down: for a node in a container")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&logFormat, "log-format", "text", "text or json")
	_ = cmd.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("log-format", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("data-path", cobra.FixedCompletions(dataPaths, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// runAgent picks the implementations and runs the agent.
func runAgent(ctx context.Context, cfg agent.Config, runDir, dataPath string, hidden []string, ctr container.Config) error {
	if err := vxlan.Probe(); err != nil {
		return err
	}
	notices, err := nl.Listen("", overlay.VIPLabel)
	if err != nil {
		// Then everything is read in every pass.
		cfg.Log.Warn("the kernel's notices can't be had: the agent will use more of the processor", "error", err)
	}
	defer notices.Close()
	if cfg.VIP, cfg.VIPReason, err = pickDataPath(dataPath, notices, cfg.Log); err != nil {
		return err
	}
	dp := vxlan.New(vxlan.Config{Instance: cfg.Instance, Log: cfg.Log, Notices: notices})
	cfg.Overlay = dp
	cfg.WatchKernel, cfg.Drops = dp.Watch, dp.Drops
	cfg.UnderlayMTU = dp.UnderlayMTU
	cfg.OpenProber = func(netns string) (agent.Prober, error) { return vxlan.OpenProber(netns) }
	if err := ingressnft.Probe(); err != nil {
		return err
	}
	ports := ingressnft.New(ingressnft.Config{Instance: cfg.Instance, Log: cfg.Log, Notices: notices})
	defer ports.Close()
	cfg.Ingress, cfg.Blocked = ports, ports.Blocked
	cfg.Cleanup = func() error {
		return errors.Join(ports.Cleanup(), vxlan.Cleanup(cfg.Instance), cgroup.Clear(cgroup.Root+"/"+cfg.Instance))
	}
	cfg.HostRoutes = func() []netip.Prefix {
		rs, err := nl.HostRoutes()
		if err != nil {
			cfg.Log.Warn("the host's routes can't be read: a new subnet may overlap one", "error", err)
		}
		return rs
	}
	cfg.Upstreams = dns.Upstreams(resolvConfPath)
	cfg.Dial = nl.Dial
	cfg.SearchDomains = func() []string { return searchDomains(resolvConfPath) }
	// The kernel's out-of-memory killer takes tasks first; what this process starts
	// for them takes its own value. It needs CAP_SYS_RESOURCE: where that is missing,
	// there is no protection to have.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-500"), 0) // dockerd's
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("own executable: %w", err)
	}
	hidden = append(hidden, cfg.DataDir, runDir)
	if !slices.ContainsFunc(hidden, func(d string) bool { return within(cfg.Socket, d) }) {
		cfg.Log.Warn("tasks that run as root can reach the agent's socket: put it below --run-dir, or --hide its directory", "socket", cfg.Socket)
	}
	hidden = append(hidden, containerdDirs(ctr.Address)...)
	cfg.Volumes = &volume.Store{Dir: filepath.Join(cfg.DataDir, "volumes")}
	executors := map[string]runtime.Executor{}
	if ctr.Address != "" {
		node := cfg.NodeName
		if h, err := os.Hostname(); err == nil && node == "" {
			node = h
		}
		ctr.Instance, ctr.Node, ctr.RunDir, ctr.Volumes, ctr.Hidden, ctr.Log = cfg.Instance, node, runDir, cfg.Volumes, hidden, cfg.Log
		x := container.New(ctr)
		defer x.Close()
		cfg.Images, executors[runtime.ExecutorContainer] = x, x
	}
	rt, err := process.New(process.Config{Executors: executors, Instance: cfg.Instance, Cgroup: cgroup.Root + "/" + cfg.Instance, StateDir: filepath.Join(cfg.DataDir, "tasks"), RunDir: filepath.Join(runDir, "tasks"), Hidden: hidden, Exe: []string{exe}, Log: cfg.Log})
	if err != nil {
		return err
	}
	cfg.Runtime = rt
	// Of a unit of Type=notify; the variable is no affair of tasks.
	notify := os.Getenv("NOTIFY_SOCKET")
	if cfg.GoesDown == nil {
		cfg.GoesDown = func() bool { return goesDown(notify) }
	}
	cfg.Ready = func() { _, _ = daemon.SdNotify(true, daemon.SdNotifyReady) }
	a, err := agent.New(cfg)
	if err != nil {
		return errors.Join(err, rt.Close())
	}
	err = a.Run(ctx)
	return errors.Join(err, rt.Close())
}

// within tells whether a path is below a directory.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && filepath.IsLocal(rel)
}

// pickDataPath chooses the VIP data path, and says why.
func pickDataPath(want string, notices *nl.Notices, log *slog.Logger) (vip.Dataplane, string, error) {
	switch want {
	case "ipvs":
		if err := ipvs.Probe(); err != nil {
			return nil, "", fmt.Errorf("data path ipvs: %w: use --data-path nft, or auto", err)
		}
		return ipvs.New(ipvs.Config{Log: log}), "as asked for with --data-path", nil
	case "nft":
		if err := nft.Probe(); err != nil {
			return nil, "", fmt.Errorf("data path nft: %w", err)
		}
		return nft.New(nft.Config{Log: log, Notices: notices}), "as asked for with --data-path", nil
	case "auto":
		ipvsErr := ipvs.Probe()
		if ipvsErr == nil {
			return ipvs.New(ipvs.Config{Log: log}), "the kernel has IPVS", nil
		}
		if err := nft.Probe(); err != nil {
			return nil, "", fmt.Errorf("no VIP data path works here: ipvs: %w; nft: %w", ipvsErr, err)
		}
		log.Warn("virtual IPs use nftables, because IPVS can't be used here", "reason", ipvsErr)
		return nft.New(nft.Config{Log: log, Notices: notices}), "IPVS can't be used: " + ipvsErr.Error(), nil
	}
	return nil, "", fmt.Errorf("data path %q is unknown", want)
}

// searchDomains are the machine's own (resolv.conf(5)): the last search or
// domain line counts.
func searchDomains(path string) []string {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var out []string
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) > 1 && (f[0] == "search" || f[0] == "domain") {
			out = f[1:]
		}
	}
	return out
}

// containerdDirs are containerd's, which tasks find empty: who reaches its socket rules
// the node, and in them are the file systems of all containers. The directory of a socket
// that lies among others' things is not its own.
func containerdDirs(socket string) []string {
	if socket == "" {
		return nil
	}
	dirs := []string{"/var/lib/containerd"} // its default root
	if d := filepath.Dir(socket); !slices.Contains([]string{"/", "/run", "/var/run", "/tmp"}, d) {
		dirs = append(dirs, d)
	}
	return dirs
}
