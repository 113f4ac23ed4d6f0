package main

import (
	"strings"

	"github.com/spf13/cobra"
)

// Docker's flags that Shoal has not, each with what there is instead. A test looks that
// they are not there, so that a line goes when its feature comes.
const (
	noNamespace = "a task has namespaces of its own, and shares none but the node's network: '--network host'"
	noBlkio     = "disk bandwidth is not limited; '--cpus', '--memory' and '--pids-limit' are there"
	noWindows   = "it is of Windows"
	noGeneric   = "generic resources are not counted: label the nodes with 'shoal node update --label-add', and use '--constraint'"
)

// dockerTaskFlags are of run, create and update of services.
var dockerTaskFlags = map[string]string{
	"isolation": noWindows, "credential-spec": noWindows,
}

var dockerServiceFlags = map[string]string{
	"generic-resource": noGeneric, "generic-resource-add": noGeneric, "generic-resource-rm": noGeneric,
}

var dockerRunFlags = map[string]string{
	"attach":                "output and errors are both shown; '-i' passes input on",
	"annotation":            "use '--label'",
	"blkio-weight":          noBlkio,
	"blkio-weight-device":   noBlkio,
	"device-read-bps":       noBlkio,
	"device-read-iops":      noBlkio,
	"device-write-bps":      noBlkio,
	"device-write-iops":     noBlkio,
	"cgroup-parent":         "each task has a control group of its own below the agent's",
	"cgroupns":              noNamespace,
	"ipc":                   noNamespace,
	"pid":                   noNamespace,
	"userns":                noNamespace,
	"uts":                   noNamespace,
	"cpu-count":             noWindows,
	"cpu-percent":           noWindows,
	"io-maxbandwidth":       noWindows,
	"io-maxiops":            noWindows,
	"cpu-period":            "use '--cpus'",
	"cpu-quota":             "use '--cpus'",
	"cpu-rt-period":         "there are no limits of real-time scheduling: use '--cpus'",
	"cpu-rt-runtime":        "there are no limits of real-time scheduling: use '--cpus'",
	"cpuset-mems":           "memory is not bound to nodes of the machine: use '--cpuset-cpus'",
	"detach-keys":           "a session ends with the program; 'shoal attach --sig-proxy=false' is left by an interrupt",
	"device-cgroup-rule":    "use '--device'",
	"disable-content-trust": "images are not checked by content trust: name them by their digest",
	"domainname":            "use '--hostname' with the whole name, and '--dns-search'",
	"gpus":                  "use '--device'",
	"ip6":                   "addresses of that family are given by the network: '--ip' takes one of either",
	"kernel-memory":         "use '--memory'",
	"link-local-ip":         "a task has the addresses of its networks only",
	"mac-address":           "networks are routed: no other task sees a hardware address",
	"memory-swappiness":     "use '--memory-swap'",
	"oom-kill-disable":      "a task that is out of memory is ended; '--oom-score-adj' says who is first",
	"runtime":               "containers are run by runc",
	"storage-opt":           "files are kept by containerd's snapshotter: use volumes",
	"use-api-socket":        "tasks can't reach the agent",
	"volume-driver":         "volumes are directories of a node, made by '--volume NAME:PATH'",
	"volumes-from":          "name each volume with '--volume'",
}

// insteadOfFlag is what there is instead of a flag of Docker's that a command has not, ""
// for any other error of a flag.
func insteadOfFlag(cmd *cobra.Command, err error) string {
	name, ok := strings.CutPrefix(err.Error(), "unknown flag: --")
	if !ok {
		if letter, _, is := strings.Cut(strings.TrimPrefix(err.Error(), "unknown shorthand flag: "), " in -"); is {
			name = map[string]string{"'a'": "attach", "'t'": "tty"}[letter]
		}
	}
	tables := []map[string]string{dockerTaskFlags}
	switch path := strings.TrimPrefix(cmd.CommandPath(), "shoal "); path {
	case "run":
		tables = append(tables, dockerRunFlags)
	case "svc create", "svc update":
		tables = append(tables, dockerServiceFlags)
	default:
		return map[string]string{
			"net create --ipv6": "a network has IPv6 with a subnet of it: '--subnet fd00:1::/64'",
		}[path+" --"+name]
	}
	for _, t := range tables {
		if s := t[name]; s != "" {
			return s
		}
	}
	return ""
}
