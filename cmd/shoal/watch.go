package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"

	"connectrpc.com/connect"
	units "github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/agent"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// eventFilters are the keys of events' --filter, with what an event has of each.
var eventFilters = map[string]func(*shoalv1.Event) string{
	"type":    func(e *shoalv1.Event) string { return e.Type },
	"event":   func(e *shoalv1.Event) string { return e.Action },
	"name":    func(e *shoalv1.Event) string { return e.Name },
	"id":      func(e *shoalv1.Event) string { return e.Id },
	"network": func(e *shoalv1.Event) string { return nameOf(e, "network") },
	"service": func(e *shoalv1.Event) string { return nameOf(e, "service") },
	"task":    func(e *shoalv1.Event) string { return nameOf(e, "task") },
	"node":    func(e *shoalv1.Event) string { return nameOf(e, "node") },
}

// eventTypes are the values of events' --filter type=.
var eventTypes = []string{"network", "service", "task", "node", "cluster"}

// nameOf is the name of what of a kind an event is about.
func nameOf(e *shoalv1.Event, kind string) string {
	if e.Type == kind {
		return e.Name
	}
	return e.Attributes[kind]
}

func (c *cli) eventsCmd() *cobra.Command {
	var since, until, format string
	var filters []string
	keys := slices.Sorted(maps.Keys(eventFilters))
	cmd := &cobra.Command{Use: "events", Short: "Show what happens in the cluster, as it happens", Args: exactly(0),
		Example: "  shoal events --since 10m\n  shoal events --since 10m --until 0s\n  shoal events -f type=task -f event=failed -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			want := map[string][]string{}
			for _, f := range filters {
				k, v, ok := strings.Cut(f, "=")
				if !ok || eventFilters[k] == nil {
					return usageError(cmd, fmt.Errorf("filter %q: want KEY=VALUE, with one of the keys %s", f, strings.Join(keys, ", ")))
				}
				if k == "type" && !slices.Contains(eventTypes, v) {
					return usageError(cmd, fmt.Errorf("filter %q: type is one of %s", f, strings.Join(eventTypes, ", ")))
				}
				want[k] = append(want[k], v)
			}
			now := time.Now()
			last, err := moment(since, now)
			if err != nil {
				return usageError(cmd, fmt.Errorf("--since: %w", err))
			}
			end, err := moment(until, now)
			if err != nil {
				return usageError(cmd, fmt.Errorf("--until: %w", err))
			}
			if format == "json" {
				c.output = "json"
			}
			var t *template.Template
			if format != "" && format != "json" {
				if t, err = newTemplate(format); err != nil {
					return usageError(cmd, err)
				}
			}
			show := func(e *shoalv1.Event) error {
				for k, vs := range want {
					if !slices.Contains(vs, eventFilters[k](e)) {
						return nil
					}
				}
				if t != nil {
					var b strings.Builder
					if err := t.Execute(&b, row{"Time": time.UnixMilli(e.AtMs).UTC(), "Type": e.Type, "Action": e.Action, "ID": e.Id, "Name": e.Name, "Attributes": e.Attributes}); err != nil {
						return usageError(cmd, fmt.Errorf("--format %q: %w", format, err))
					}
					_, err := fmt.Fprintln(c.out, b.String())
					return err
				}
				if c.output == "json" {
					return c.jsonLine(map[string]any{"at": time.UnixMilli(e.AtMs).UTC(), "type": e.Type, "action": e.Action, "id": e.Id, "name": e.Name, "attributes": e.Attributes})
				}
				line := fmt.Sprintf("%s %s %s %s", time.UnixMilli(e.AtMs).Format("15:04:05.000"), e.Type, e.Action, e.Name)
				if a := labelText(e.Attributes); a != "" {
					line += " (" + strings.ReplaceAll(a, ",", ", ") + ")"
				}
				_, err := fmt.Fprintln(c.out, line)
				return err
			}
			seen := map[string]bool{}
			for began := false; ; {
				err := c.events(cmd.Context(), &last, seen, end, show)
				switch {
				case cmd.Context().Err() != nil, err == nil && !end.IsZero():
					return nil
				case err != nil && !client.Away(err):
					return err
				}
				if e := c.api().Explain(err); e == err {
					began = true
				} else if !began {
					return e // there is no agent
				}
				// Another manager leads, or none yet, or the agent is started anew.
				if !sleep.For(cmd.Context(), 300*time.Millisecond) {
					return nil
				}
			}
		}}
	cmd.Flags().StringVar(&since, "since", "", "begin with those since then, as far as the leader remembers them: how long ago, like 10m, or a moment")
	cmd.Flags().StringVar(&until, "until", "", "end with those until then")
	cmd.Flags().StringVar(&format, "format", "", "Go template for each, with .Time, .Type, .Action, .ID, .Name, .Attributes; or json")
	cmd.Flags().StringArrayVarP(&filters, "filter", "f", nil, "only those with KEY=VALUE (repeatable); keys: "+strings.Join(keys, ", "))
	c.outputFlag(cmd, "json")
	completeFilter(cmd, keys, func(key string) ([]string, bool) {
		lists := map[string]func(context.Context) (names, error){"network": c.networkNames, "service": c.serviceNames, "task": c.taskNames, "node": c.nodeNames}
		if list := lists[key]; list != nil {
			m, err := list(cmd.Context())
			return slices.Sorted(maps.Values(m)), err == nil
		}
		return map[string][]string{"type": eventTypes}[key], key == "type"
	})
	return cmd
}

// events shows those after *last until the stream ends, and keeps *last at the
// newest, for the next leader to go on from; seen are those of that moment.
func (c *cli) events(ctx context.Context, last *time.Time, seen map[string]bool, until time.Time, show func(*shoalv1.Event) error) error {
	req := &shoalv1.EventsRequest{}
	if !last.IsZero() {
		req.SinceMs = last.UnixMilli()
	}
	if !until.IsZero() {
		req.UntilMs = until.UnixMilli()
	}
	stream, err := c.control().Events(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer stream.Close()
	if last.IsZero() {
		*last = time.Now()
	}
	for stream.Receive() {
		e := stream.Msg()
		key := fmt.Sprint(e.Type, e.Action, e.Id, e.Attributes)
		if at := time.UnixMilli(e.AtMs); at.After(*last) {
			*last = at
			clear(seen)
		} else if at.Equal(*last) && seen[key] {
			continue
		}
		seen[key] = true
		if err := show(e); err != nil {
			return err
		}
	}
	return stream.Err()
}

// statsRow is one task's counters with the node it runs on.
type statsRow struct {
	Task        string  `json:"task"`
	Name        string  `json:"name"`
	Node        string  `json:"node"`
	RxBytes     uint64  `json:"rx_bytes"`
	RxPackets   uint64  `json:"rx_packets"`
	TxBytes     uint64  `json:"tx_bytes"`
	TxPackets   uint64  `json:"tx_packets"`
	Dropped     uint64  `json:"dropped"`
	Connections int32   `json:"connections"`
	RxRate      float64 `json:"rx_bytes_per_second"`
	TxRate      float64 `json:"tx_bytes_per_second"`
	// Of the task's control group; absent where it has none.
	CPU         *float64 `json:"cpu_percent,omitempty"` // 100: one CPU's time
	CPUTime     *float64 `json:"cpu_seconds,omitempty"`
	Memory      *uint64  `json:"memory_bytes,omitempty"`
	MemoryLimit uint64   `json:"memory_limit_bytes,omitempty"` // the task's, or all that the node has
	Pids        *uint64  `json:"pids,omitempty"`
	PidsLimit   uint64   `json:"pids_limit,omitempty"`
	ReadBytes   uint64   `json:"block_read_bytes"`
	WriteBytes  uint64   `json:"block_write_bytes"`
}

// cells are what Docker's stats shows first.
func (r *statsRow) cells(wide bool) []string {
	cpu, mem, limit, share, pids := "-", "-", "-", "-", "-"
	if r.CPU != nil {
		cpu = fmt.Sprintf("%.2f%%", *r.CPU)
	}
	if r.Memory != nil {
		mem, limit = units.BytesSize(float64(*r.Memory)), units.BytesSize(float64(r.MemoryLimit))
		if r.MemoryLimit > 0 {
			share = fmt.Sprintf("%.2f%%", 100*float64(*r.Memory)/float64(r.MemoryLimit))
		}
	}
	if r.Pids != nil {
		pids = fmt.Sprint(*r.Pids)
	}
	out := []string{clip(r.Name, 20), clip(r.Node, 8), cpu, mem, limit}
	io := size(float64(r.RxBytes)) + " / " + size(float64(r.TxBytes))
	if !wide {
		return append(out, io, pids)
	}
	return append(out, share, io, size(r.RxRate)+"/s", size(r.TxRate)+"/s", fmt.Sprint(r.RxPackets), fmt.Sprint(r.TxPackets), fmt.Sprint(r.Dropped), fmt.Sprint(r.Connections),
		size(float64(r.ReadBytes))+" / "+size(float64(r.WriteBytes)), pids)
}

var (
	statsHead     = []string{"TASK", "NODE", "CPU %", "MEMORY", "LIMIT", "NET I/O", "PIDS"}
	statsHeadWide = []string{"TASK", "NODE", "CPU %", "MEMORY", "LIMIT", "MEM %", "NET I/O", "RX", "TX", "RX PKTS", "TX PKTS", "DROPPED", "CONNS", "BLOCK I/O", "PIDS"}
)

func (c *cli) statsCmd() *cobra.Command {
	var noStream, drops bool
	cmd := &cobra.Command{Use: "stats [TASK|SERVICE...]", Short: "Show what tasks use, send and receive, live", Args: cobra.ArbitraryArgs,
		Long: `Stats shows, for each running task of the cluster or for those named, its share of
a CPU's time over the last second, its memory (without what the kernel can take
back at once) and the limit, the bytes received and sent over all its networks,
and its processes and threads. With -o wide also packets, those dropped at its
interfaces, established TCP connections, and what it read and wrote of disks.
Without control groups on its node a task's CPU, memory and processes are "-".

With --drops it shows instead, once, what the rules of the ready nodes have dropped
or refused, by network and reason, since they were last written: packets with a
forged source, VXLAN from elsewhere than nodes, ways between networks.`,
		Example:           "  shoal stats\n  shoal stats --no-stream -o json web\n  shoal stats --drops",
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			if drops {
				if len(args) > 0 {
					return fmt.Errorf("--drops is of nodes and their networks, not of task %q: leave that out", args[0])
				}
				return c.showDrops(cmd.Context())
			}
			var before map[string]statsRow
			var at time.Time
			tty := c.terminal()
			for {
				rows, err := c.stats(cmd.Context(), args)
				if cmd.Context().Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				now := time.Now()
				seen := map[string]statsRow{}
				for i := range rows {
					r := &rows[i]
					seen[r.Task] = *r
					b, ok := before[r.Task]
					if !ok {
						continue
					}
					d := now.Sub(at).Seconds()
					if r.RxBytes >= b.RxBytes && r.TxBytes >= b.TxBytes {
						r.RxRate, r.TxRate = float64(r.RxBytes-b.RxBytes)/d, float64(r.TxBytes-b.TxBytes)/d
					}
					if r.CPUTime != nil && b.CPUTime != nil && *r.CPUTime >= *b.CPUTime {
						share := 100 * (*r.CPUTime - *b.CPUTime) / d
						r.CPU = &share
					}
				}
				first := before == nil
				before, at = seen, now
				if first && len(rows) > 0 { // rates take two looks
					if !sleep.For(cmd.Context(), time.Second) {
						return nil
					}
					continue
				}
				if c.output == "json" {
					if err := c.json(rows); err != nil {
						return err
					}
				} else {
					if tty && !noStream {
						fmt.Fprint(c.out, "\033[H\033[J") // cursor home, erase below
					}
					wide := c.output == "wide"
					table := [][]string{statsHead}
					if wide {
						table[0] = statsHeadWide
					}
					for _, r := range rows {
						table = append(table, r.cells(wide))
					}
					c.table(table)
				}
				if noStream || !sleep.For(cmd.Context(), time.Second) {
					return nil
				}
			}
		}}
	cmd.Flags().BoolVar(&noStream, "no-stream", false, "once, then end")
	cmd.Flags().BoolVar(&drops, "drops", false, "what the nodes' rules dropped, once")
	c.outputFlag(cmd, "json", "wide")
	return cmd
}

// dropRow is what one node's rules dropped of a network for one reason.
type dropRow struct {
	Node    string `json:"node"`
	Network string `json:"network"`
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// showDrops asks the ready nodes, and names those that don't answer.
func (c *cli) showDrops(ctx context.Context) error {
	rows := []dropRow{}
	var errs []error
	err := askReady(ctx, c, &shoalv1.StatsRequest{Drops: true}, c.node().Stats, func(node string, resp *shoalv1.StatsResponse, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("node %s: %s", node, client.Message(err)))
		}
		for _, d := range resp.GetDrops() {
			if d.Packets > 0 || c.output == "wide" {
				rows = append(rows, dropRow{node, d.Network, d.Reason, d.Packets, d.Bytes})
			}
		}
	})
	if err != nil {
		return err
	}
	if c.output == "json" {
		err = c.json(rows)
	} else {
		table := [][]string{{"NODE", "NETWORK", "REASON", "PACKETS", "SIZE"}}
		for _, r := range rows {
			table = append(table, []string{r.Node, r.Network, r.Reason, strconv.FormatUint(r.Packets, 10), size(float64(r.Bytes))})
		}
		c.table(table)
	}
	return errors.Join(append(errs, err)...)
}

// stats asks every node that runs one of the tasks.
func (c *cli) stats(ctx context.Context, refs []string) ([]statsRow, error) {
	tasks, err := c.tasks(ctx, &shoalv1.ListTasksRequest{})
	if err != nil {
		return nil, err
	}
	if len(refs) > 0 {
		var chosen []*shoalv1.Task
		for _, ref := range refs {
			if ts, err := c.tasks(ctx, &shoalv1.ListTasksRequest{Service: ref}); err == nil {
				chosen = append(chosen, ts...)
				continue
			}
			t, err := c.task(ctx, ref)
			if err != nil {
				return nil, err
			}
			chosen = append(chosen, t)
		}
		tasks = chosen
	}
	_, nodes, err := c.nodes(ctx)
	if err != nil {
		return nil, err
	}
	byNode := map[string][]string{}
	for _, t := range tasks {
		if t.Node != "" && t.GetStatus().GetState() == spec.TaskRunning.String() {
			byNode[t.Node] = append(byNode[t.Node], t.Id)
		}
	}
	rows := []statsRow{}
	for node, ids := range byNode {
		req := connect.NewRequest(&shoalv1.StatsRequest{Tasks: ids})
		req.Header().Set(agent.NodeHeader, node)
		resp, err := c.node().Stats(ctx, req)
		if connect.CodeOf(err) == connect.CodeUnavailable && err != nil {
			continue // its node is down: it has nothing to show
		}
		if err != nil {
			return nil, err
		}
		for _, s := range resp.Msg.Tasks {
			r := statsRow{Task: s.Id, Name: s.Name, Node: nodes.Of(node), RxBytes: s.RxBytes, RxPackets: s.RxPackets,
				TxBytes: s.TxBytes, TxPackets: s.TxPackets, Dropped: s.Dropped, Connections: s.Connections,
				Memory: s.Memory, MemoryLimit: cmp.Or(s.MemoryLimit, s.NodeMemory), Pids: s.Pids, PidsLimit: s.PidsLimit, ReadBytes: s.ReadBytes, WriteBytes: s.WriteBytes}
			if s.CpuNs != nil {
				sec := float64(*s.CpuNs) / 1e9
				r.CPUTime = &sec
			}
			rows = append(rows, r)
		}
	}
	slices.SortFunc(rows, func(a, b statsRow) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Task, b.Task))
	})
	return rows, nil
}

// size is a count of bytes for a person, in units of 1000 as Docker shows them.
func size(n float64) string {
	units := []string{"B", "kB", "MB", "GB", "TB", "PB"}
	i := 0
	for n >= 1000 && i < len(units)-1 {
		n, i = n/1000, i+1
	}
	if i == 0 || n >= 100 {
		return fmt.Sprintf("%.0f%s", n, units[i])
	}
	return fmt.Sprintf("%.1f%s", n, units[i])
}

// askReady asks every node that is ready one thing, 5 s each at most, and passes on, by
// the node's name, what it answered or why it did not. Its error is that of the list of
// nodes, or of a ctx that has ended.
func askReady[Q, A any](ctx context.Context, c *cli, msg *Q, ask func(context.Context, *connect.Request[Q]) (*connect.Response[A], error), took func(node string, answer *A, err error)) error {
	nodes, _, err := c.nodes(ctx)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if n.Status != spec.NodeReady {
			continue
		}
		req := connect.NewRequest(msg)
		req.Header().Set(agent.NodeHeader, n.Id)
		nctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		resp, err := ask(nctx, req)
		cancel()
		switch {
		case err == nil:
			took(n.Name, resp.Msg, nil)
		case ctx.Err() != nil:
			return err
		default:
			took(n.Name, nil, err)
		}
	}
	return nil
}

// kernel asks every live node what its kernel holds of a service.
func (c *cli) kernel(ctx context.Context, service string, nets names) ([]nodeKernel, error) {
	out := []nodeKernel{}
	err := askReady(ctx, c, &shoalv1.KernelRequest{Service: service}, c.node().Kernel, func(node string, resp *shoalv1.KernelResponse, err error) {
		if err != nil {
			out = append(out, nodeKernel{Node: node, Error: client.Message(err)})
			return
		}
		k := nodeKernel{Node: node, DataPath: resp.DataPath, VIPs: []kernelVIP{}}
		for _, s := range resp.Servers {
			v := kernelVIP{Network: s.Network, NetworkName: nets.Of(s.Network), VIP: s.Vip, Open: s.Open, Backends: []kernelBackend{}}
			for _, b := range s.Backends {
				v.Backends = append(v.Backends, kernelBackend{b.Addr, int(b.Weight)})
			}
			k.VIPs = append(k.VIPs, v)
		}
		out = append(out, k)
	})
	return out, err
}

// nodeKernel is what one node's kernel holds, read when it was asked for.
type nodeKernel struct {
	Node     string      `json:"node"`
	DataPath string      `json:"data_path,omitempty"`
	VIPs     []kernelVIP `json:"vips"`
	Error    string      `json:"error,omitempty"`
}

type kernelVIP struct {
	Network     string          `json:"network"`
	NetworkName string          `json:"network_name"`
	VIP         string          `json:"vip"`
	Open        bool            `json:"open"` // false: refuses
	Backends    []kernelBackend `json:"backends"`
}

type kernelBackend struct {
	Addr   string `json:"addr"`
	Weight int    `json:"weight"` // 0: drains
}

var errNoChange = errors.New("nothing to change: give at least one flag, see --help")
