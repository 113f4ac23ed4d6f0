package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// version is set by the build (-ldflags -X main.version=…).
var version = ""

func versionString() string {
	if version != "" {
		return version
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "unknown"
}

// versionJSON is the JSON form of version.
type versionJSON struct {
	Version string `json:"version"`
	Go      string `json:"go"`
	Arch    string `json:"arch"`
}

func (c *cli) versionCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "version", Short: "Show the version", Args: exactly(0),
		Example: `  shoal version
  shoal version --format '{{.Server.Version}}'      # that of the agent`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versionJSON{versionString(), runtime.Version(), runtime.GOARCH}
			if format, _ := cmd.Flags().GetString("format"); format != "" {
				return formatted(c, cmd, format, []versionJSON{v}, func(int) (object, error) { return c.dockerVersion(cmd.Context(), v, format) })
			}
			if c.output == "json" {
				return c.json(v)
			}
			fmt.Fprintf(c.out, "shoal %s (%s, linux/%s)\n", v.Version, v.Go, v.Arch)
			return nil
		}}
	c.inspectFlags(cmd)
	return cmd
}

// dockerVersion has the fields of docker version. Of the server only who names it is
// told, as the client's version is there without an agent too.
func (c *cli) dockerVersion(ctx context.Context, v versionJSON, format string) (object, error) {
	of := func(version string) object {
		return object{"Version": version, "APIVersion": "v1", "ApiVersion": "v1", "GoVersion": v.Go, "Os": "linux", "Arch": v.Arch, "KernelVersion": kernelRelease()}
	}
	out := object{"Client": of(v.Version)}
	if strings.Contains(format, ".Server") {
		resp, err := c.local().Info(ctx, connect.NewRequest(&shoalv1.InfoRequest{}))
		if err != nil {
			return nil, err
		}
		out["Server"] = of(resp.Msg.Version)
	}
	return out, nil
}

// infoJSON is the JSON form of info.
type infoJSON struct {
	Version           string   `json:"version"`
	Cluster           string   `json:"cluster"`
	NodeID            string   `json:"node_id"`
	Node              string   `json:"node"`
	Number            int32    `json:"number"`
	Role              string   `json:"role"`
	Addr              string   `json:"addr"`
	DataPath          string   `json:"data_path"`
	DataPathReason    string   `json:"data_path_reason"`
	DataDir           string   `json:"data_dir"`
	ControlGroups     string   `json:"control_groups"`
	Leader            string   `json:"leader"`
	Locked            bool     `json:"locked"`
	Problems          []string `json:"problems"`
	CertificateRole   string   `json:"certificate_role"`
	CertificateFromMs int64    `json:"certificate_from_ms"`
	CertificateEndMs  int64    `json:"certificate_end_ms"`
	CA                string   `json:"ca"`
	Roots             []string `json:"roots"`
	Level             int32    `json:"level"`
	ClusterLevel      int32    `json:"cluster_level"`
	WaitingFor        []string `json:"waiting_for"`
}

func (c *cli) infoCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "info",
		Short: "Show this node and its cluster",
		Example: `  shoal info
  shoal info --format '{{.Node}} {{.Role}}'
  shoal info --format '{{.Swarm.LocalNodeState}} {{.Swarm.NodeID}}'      # Docker's fields`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := c.local().Info(cmd.Context(), connect.NewRequest(&shoalv1.InfoRequest{}))
			if err != nil {
				return err
			}
			m := resp.Msg
			v := infoJSON{Version: m.Version, Cluster: m.Cluster, NodeID: m.Node.GetId(), Node: m.Node.GetName(), Number: m.Node.GetNumber(),
				Role: m.Node.GetRole(), Addr: m.Node.GetAddr(), DataPath: m.DataPath, DataPathReason: m.DataPathReason, DataDir: m.DataDir, ControlGroups: m.Limits, Leader: m.Leader, Locked: m.Locked, Problems: m.Problems,
				CertificateRole: m.CertificateRole, CertificateFromMs: m.CertificateFromMs, CertificateEndMs: m.CertificateEndMs, CA: m.Ca, Roots: m.Roots,
				Level: m.Level, ClusterLevel: m.ClusterLevel, WaitingFor: append([]string{}, m.Waiting...)}
			if format, _ := cmd.Flags().GetString("format"); format != "" {
				return formatted(c, cmd, format, []infoJSON{v}, func(int) (object, error) { return c.dockerInfo(cmd.Context(), m, format) })
			}
			if c.output == "json" {
				return c.json(v)
			}
			cluster := m.Cluster
			if cluster == "" {
				cluster = "none: run 'shoal init' or 'shoal join'"
			}
			rows := [][]string{{"Node:", m.Node.GetName()}, {"Node ID:", m.Node.GetId()}, {"Cluster:", cluster}, {"Role:", m.Node.GetRole()}, {"Address:", m.Node.GetAddr()},
				{"Data path:", m.DataPath + " (" + m.DataPathReason + ")"}, {"Containers:", containersLine(m)}, {"Control groups:", m.Limits}, {"Data directory:", m.DataDir}, {"Agent version:", m.Version}, {"Feature level:", levelLine(m)}}
			for _, p := range m.Problems {
				rows = append(rows, []string{"Problem:", p})
			}
			if m.CertificateEndMs != 0 {
				rows = append(rows, []string{"Certificate:", fmt.Sprintf("%s, until %s", m.CertificateRole, time.UnixMilli(m.CertificateEndMs).UTC().Format("2006-01-02 15:04"))},
					[]string{"CA:", m.Ca})
			}
			c.table(rows)
			return nil
		},
	}
	c.inspectFlags(cmd)
	return cmd
}

// dockerInfo has the fields of docker info (API v1.44, SystemInfo) that say something of
// a node of Shoal's. What managers have to be asked for is there if it is named, and zero
// where Docker has zero too: on a worker.
func (c *cli) dockerInfo(ctx context.Context, m *shoalv1.InfoResponse, format string) (object, error) {
	local := "active"
	switch {
	case m.Cluster == "":
		local = "inactive"
	case m.Locked:
		local = "locked"
	case m.Node.GetAddr() == "":
		local = "pending"
	}
	manager := m.Node.GetRole() == spec.RoleManager && local == "active"
	swarm := object{"NodeID": "", "NodeAddr": m.Node.GetAddr(), "LocalNodeState": local, "ControlAvailable": manager, "Error": strings.Join(m.Problems, "; "),
		"RemoteManagers": nil, "Nodes": 0, "Managers": 0}
	if m.Cluster != "" {
		swarm["NodeID"] = m.Node.GetId()
	}
	if manager {
		swarm["Cluster"] = object{"ID": m.Cluster}
	}
	cgroups := "1"
	if strings.Contains(m.Limits, "v2") {
		cgroups = "2"
	}
	var si unix.Sysinfo_t
	_ = unix.Sysinfo(&si)
	out := object{"ID": m.Node.GetId(), "Name": m.Node.GetName(), "ServerVersion": m.Version, "DockerRootDir": m.DataDir, "OSType": "linux", "Architecture": dockerArch(runtime.GOARCH),
		"OperatingSystem": osName("/etc/os-release"), "KernelVersion": kernelRelease(), "NCPU": runtime.NumCPU(), "MemTotal": uint64(si.Totalram) * uint64(si.Unit),
		"Driver": "overlayfs", "LoggingDriver": "json-file", "CgroupDriver": "cgroupfs", "CgroupVersion": cgroups, "Labels": []string{}, "Warnings": m.Problems,
		"SystemTime": time.Now().Format(time.RFC3339Nano), "Swarm": swarm}
	for k, v := range m.Node.GetEngineLabels() {
		out["Labels"] = append(out["Labels"].([]string), k+"="+v)
	}
	slices.Sort(out["Labels"].([]string))
	all := strings.Contains(format, "json") // {{json .}}, {{json .Swarm}}
	if manager && (all || strings.Contains(format, ".Nodes") || strings.Contains(format, ".Managers") || strings.Contains(format, ".RemoteManagers")) {
		nodes, _, err := c.nodes(ctx)
		if err != nil {
			return nil, err
		}
		var managers []object
		for _, n := range nodes {
			if n.Role == spec.RoleManager {
				managers = append(managers, object{"NodeID": n.Id, "Addr": net.JoinHostPort(n.Addr, strconv.Itoa(int(n.ControlPort)))})
			}
		}
		swarm["Nodes"], swarm["Managers"], swarm["RemoteManagers"] = len(nodes), len(managers), managers
	}
	if all || strings.Contains(format, ".Containers") {
		resp, err := c.node().Tasks(ctx, connect.NewRequest(&shoalv1.TasksRequest{}))
		if err != nil {
			return nil, err
		}
		running := 0
		for _, t := range resp.Msg.Tasks {
			if t.Status.GetState() == spec.TaskRunning.String() {
				running++
			}
		}
		out["Containers"], out["ContainersRunning"], out["ContainersPaused"], out["ContainersStopped"] = len(resp.Msg.Tasks), running, 0, len(resp.Msg.Tasks)-running
	}
	if all || strings.Contains(format, ".Images") {
		out["Images"] = 0
		if m.ContainersOk {
			resp, err := c.node().ImageList(ctx, connect.NewRequest(&shoalv1.ImageListRequest{}))
			if err != nil {
				return nil, err
			}
			out["Images"] = len(resp.Msg.Images)
		}
	}
	return out, nil
}

// osName is the distribution's name for people (os-release(5)).
func osName(file string) string {
	b, _ := os.ReadFile(file)
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); ok {
			return strings.Trim(v, `"'`)
		}
	}
	return "Linux"
}

// kernelRelease is what uname -r says.
func kernelRelease() string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	return unix.ByteSliceToString(u.Release[:])
}

// levelLine tells of the feature level: this build's, and the cluster's where that is
// another.
func levelLine(m *shoalv1.InfoResponse) string {
	text := fmt.Sprint(m.Level)
	switch {
	case m.Cluster == "":
	case len(m.Waiting) > 0:
		text = fmt.Sprintf("%d, and %d once all managers have it: %s", m.ClusterLevel, m.Level, strings.Join(m.Waiting, ", "))
	case m.ClusterLevel > m.Level:
		text = fmt.Sprintf("%d, and this node's shoal has %d: upgrade it", m.ClusterLevel, m.Level)
	case m.ClusterLevel < m.Level && m.ClusterLevel > 0:
		text = fmt.Sprintf("%d, and about to be %d", m.ClusterLevel, m.Level)
	}
	return text
}

// containersLine says how tasks from images run here, or why they don't.
func containersLine(m *shoalv1.InfoResponse) string {
	if m.ContainersOk {
		return m.Containers
	}
	return "none (" + m.Containers + ")"
}
