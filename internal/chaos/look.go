package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// What is read of the lists that the command line prints.
type (
	nodeInfo struct {
		Name, Status, Availability, Role string
		Leader                           bool
	}
	netInfo struct{ Name, Driver string }
	onNet   struct {
		NetworkName string `json:"network_name"`
		Addrs       []string
	}
	svcInfo struct {
		ID   string
		Spec struct {
			Name         string
			Replicas     int
			EndpointMode string `json:"endpoint_mode"`
			Networks     []onNet
		}
		Ports   []struct{ Published int }
		VIPs    []onNet
		Running int
	}
	taskInfo struct {
		ID, Name, Service string
		Slot              int
		NodeName          string `json:"node_name"`
		Desired           string
		Attachments       []onNet
		Status            struct {
			State, Message string
			PID            int
		}
	}
	check struct{ Name, Status, Message string }
)

func (t taskInfo) runs() bool { return t.Desired == "running" && t.Status.State == "running" }

// host is what a task's program calls itself: host names have no dots.
func (t taskInfo) host() string { return strings.ReplaceAll(t.Name, ".", "-") }

// ended tells whether nothing of a task is left on its node.
func (t taskInfo) ended() bool {
	return slices.Contains([]string{"complete", "shutdown", "failed", "rejected", "lost"}, t.Status.State)
}

func addrOn(as []onNet, net string) (string, bool) {
	for _, a := range as {
		if a.NetworkName == net && len(a.Addrs) > 0 {
			return a.Addrs[0], true
		}
	}
	return "", false
}

// askTime bounds a question to an agent.
const askTime = 10 * time.Second

func list[T any](ctx context.Context, w *world, node string, args ...string) (out []T, err error) {
	ctx, cancel := context.WithTimeout(ctx, scaled(askTime))
	defer cancel()
	text, err := w.lab.Run(ctx, node, append(append([]string{w.lab.Binary}, args...), "-o", "json")...)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		return nil, fmt.Errorf("%s: shoal %v printed %q: %w", node, args, text, err)
	}
	return out, nil
}

func (w *world) listTasks(ctx context.Context, node string) ([]taskInfo, error) {
	return list[taskInfo](ctx, w, node, "ps", "-a")
}

// lists is what one manager shows.
type lists struct {
	nodes []nodeInfo
	nets  []netInfo
	svcs  []svcInfo
	tasks []taskInfo
}

func (w *world) lists(ctx context.Context, node string) (l lists, err error) {
	if l.nodes, err = list[nodeInfo](ctx, w, node, "node", "ls"); err != nil {
		return l, err
	}
	if l.nets, err = list[netInfo](ctx, w, node, "net", "ls"); err != nil {
		return l, err
	}
	if l.svcs, err = list[svcInfo](ctx, w, node, "svc", "ls"); err != nil {
		return l, err
	}
	l.tasks, err = w.listTasks(ctx, node)
	return l, err
}

// doctor asks a node's doctor what is not ok; an error when it does not answer.
func (w *world) doctor(ctx context.Context, node string) ([]check, error) {
	ctx, cancel := context.WithTimeout(ctx, scaled(askTime))
	defer cancel()
	text, err := w.lab.Run(ctx, node, w.lab.Binary, "doctor", "-o", "json") // exits with 1 where it finds something
	var d struct{ Checks []check }
	if jerr := json.Unmarshal([]byte(text), &d); jerr != nil || len(d.Checks) == 0 {
		return nil, fmt.Errorf("%s: shoal doctor printed %q: %w", node, text, err)
	}
	return slices.DeleteFunc(d.Checks, func(c check) bool { return c.Status == "ok" }), nil
}
