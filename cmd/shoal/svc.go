package main

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/shoalnet/shoal/agent"
	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

func (c *cli) svcCmd() *cobra.Command {
	return group("svc", "Manage services", []string{"service"}, c.svcCreate(), c.svcLs(), c.svcPs(), c.svcInspect(), c.svcScale(), c.svcLogs(), c.svcRm())
}

// taskFlags are the flags that svc create and run share.
type taskFlags struct {
	env, envFile, networks, aliases, labels []string
	hostname, user, dir, stopSignal         string
	stopGrace                               time.Duration
}

func (t *taskFlags) add(f *pflag.FlagSet) {
	f.StringArrayVarP(&t.env, "env", "e", nil, "environment variable, KEY=value, or KEY to pass this shell's on (repeatable)")
	f.StringArrayVar(&t.envFile, "env-file", nil, "file of environment variables, one KEY=value a line")
	f.StringArrayVar(&t.networks, "network", nil, "network to attach to; name=NET,alias=NAME,ip=ADDR for more (default \"default\"; repeatable)")
	f.StringSliceVar(&t.aliases, "network-alias", nil, "further name on every network given (repeatable)")
	f.StringArrayVarP(&t.labels, "label", "l", nil, "label, key=value (repeatable)")
	f.StringVar(&t.hostname, "hostname", "", "host name inside the task")
	f.StringVarP(&t.user, "user", "u", "", "user or uid, and group: NAME[:GROUP]")
	f.StringVarP(&t.dir, "workdir", "w", "", "working directory")
	f.StringVar(&t.stopSignal, "stop-signal", "", "signal that asks the program to stop (default SIGTERM)")
}

// attachments parses --network: a name, or Docker's name=…,alias=…,ip=….
func (t *taskFlags) attachments() ([]*shoalv1.NetworkAttachment, error) {
	var out []*shoalv1.NetworkAttachment
	for _, n := range t.networks {
		a := &shoalv1.NetworkAttachment{Network: n, Aliases: slices.Clone(t.aliases)}
		if strings.Contains(n, "=") {
			a.Network = ""
			for _, kv := range strings.Split(n, ",") {
				k, v, _ := strings.Cut(kv, "=")
				switch k {
				case "name":
					a.Network = v
				case "alias":
					a.Aliases = append(a.Aliases, v)
				case "ip", "ip6", "vip":
					a.Addrs = append(a.Addrs, v)
				default:
					return nil, fmt.Errorf("--network %q: key %q is unknown: use name, alias or ip", n, k)
				}
			}
		}
		if a.Network == "" {
			return nil, fmt.Errorf("--network %q names no network", n)
		}
		out = append(out, a)
	}
	if len(out) == 0 && len(t.aliases) > 0 {
		out = append(out, &shoalv1.NetworkAttachment{Network: spec.DefaultNetwork, Aliases: t.aliases})
	}
	return out, nil
}

func (t *taskFlags) spec(command []string) (*shoalv1.TaskSpec, error) {
	s := &shoalv1.TaskSpec{Command: command, Hostname: t.hostname, User: t.user, Dir: t.dir, StopSignal: t.stopSignal, StopGraceMs: t.stopGrace.Milliseconds()}
	for _, file := range t.envFile {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("--env-file: %w", err)
		}
		sc := bufio.NewScanner(f)
		for n := 1; sc.Scan(); n++ {
			l := strings.TrimSpace(sc.Text())
			if l == "" || strings.HasPrefix(l, "#") {
				continue
			}
			if !strings.Contains(l, "=") {
				if v, ok := os.LookupEnv(l); ok {
					s.Env = append(s.Env, l+"="+v)
				}
				continue
			}
			s.Env = append(s.Env, l)
		}
		f.Close()
		if err := sc.Err(); err != nil {
			return nil, fmt.Errorf("--env-file %s: %w", file, err)
		}
	}
	for _, e := range t.env {
		if !strings.Contains(e, "=") {
			v, ok := os.LookupEnv(e)
			if !ok {
				continue
			}
			e += "=" + v
		}
		s.Env = append(s.Env, e)
	}
	var err error
	s.Labels, err = labels(t.labels)
	return s, err
}

func (c *cli) svcCreate() *cobra.Command {
	req := &shoalv1.ServiceSpec{}
	var tf taskFlags
	var detach, quiet bool
	var restartDelay time.Duration
	cmd := &cobra.Command{
		Use: "create [flags] -- COMMAND [ARG...]", Short: "Create a service", Args: cobra.ArbitraryArgs,
		Example: `  shoal svc create --name web --replicas 3 --network app -- nginx -g 'daemon off;'
  shoal svc create --name db --network app --constraint node.labels.disk==ssd -- postgres -D /data`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(cmd, fmt.Errorf("no command: give it after --, like: shoal svc create --name web -- nginx -g 'daemon off;'"))
			}
			var err error
			if req.Task, err = tf.spec(args); err != nil {
				return usageError(cmd, err)
			}
			if req.Networks, err = tf.attachments(); err != nil {
				return usageError(cmd, err)
			}
			req.Labels, req.Task.Labels = req.Task.Labels, nil
			req.RestartDelayMs = restartDelay.Milliseconds()
			if req.Name == "" {
				req.Name = "svc-" + spec.NewID()[:6]
			}
			resp, err := c.control().CreateService(cmd.Context(), connect.NewRequest(&shoalv1.CreateServiceRequest{Spec: req}))
			if err != nil {
				return err
			}
			fmt.Fprintln(c.out, resp.Msg.Service.Id)
			if detach {
				return nil
			}
			return c.converge(cmd.Context(), resp.Msg.Service, quiet)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Name, "name", "", "name of the service, and its host name on its networks")
	f.Int32Var(&req.Replicas, "replicas", 1, "number of tasks")
	f.StringVar(&req.EndpointMode, "endpoint-mode", spec.EndpointModeVIP, "vip (one balanced address) or dnsrr (the replicas' addresses)")
	f.StringArrayVar(&req.Constraints, "constraint", nil, "placement: node.name==x, node.role!=manager, node.labels.k==v (repeatable)")
	f.DurationVar(&restartDelay, "restart-delay", 0, "wait before the first restart; doubles up to 30s (default 100ms)")
	f.Int32Var(&req.RestartMax, "restart-max-attempts", 0, "restarts of a replica before it is given up (0: no limit)")
	f.DurationVar(&tf.stopGrace, "stop-grace-period", spec.DefaultStopGrace, "time between the stop signal and the kill")
	f.BoolVarP(&detach, "detach", "d", false, "don't wait until the replicas run")
	f.BoolVarP(&quiet, "quiet", "q", false, "wait, but show no progress")
	tf.add(f)
	_ = cmd.RegisterFlagCompletionFunc("network", c.complete(c.networkNames))
	_ = cmd.RegisterFlagCompletionFunc("endpoint-mode", cobra.FixedCompletions([]string{"vip", "dnsrr"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// convergeTimeout bounds the wait of svc create and scale.
const convergeTimeout = 2 * time.Minute

// converge waits until a service has as many running tasks as it wants, shows
// how far it is, and says what stands in the way when it takes long.
func (c *cli) converge(ctx context.Context, s *shoalv1.Service, quiet bool) error {
	name, want := s.GetSpec().GetName(), int(s.GetSpec().GetReplicas())
	ctx, cancel := context.WithTimeout(ctx, convergeTimeout)
	defer cancel()
	tty := c.terminal() && !quiet
	last, why := "", ""
	for {
		tasks, err := c.tasks(ctx, &shoalv1.ListTasksRequest{Service: s.Id, All: true})
		if err != nil && ctx.Err() == nil {
			return err
		}
		running, extra := 0, 0
		why = ""
		for _, t := range tasks {
			st := t.GetStatus()
			switch {
			case t.Desired == spec.DesiredRunning && st.GetState() == spec.TaskRunning.String():
				running++
			case t.Desired != spec.DesiredRunning && !ended(t):
				extra++
			}
			if st.GetMessage() != "" && t.Desired == spec.DesiredRunning {
				why = fmt.Sprintf("%s: %s: %s", t.Name, st.GetState(), st.GetMessage())
			}
		}
		line := fmt.Sprintf("%s: %d/%d running", name, running, want)
		if extra > 0 {
			line += fmt.Sprintf(", %d stopping", extra)
		}
		if err == nil && running == want && extra == 0 {
			if tty {
				fmt.Fprintf(c.err, "\r\033[K%s\n", line)
			} else if !quiet {
				fmt.Fprintln(c.err, line)
			}
			return nil
		}
		show := line
		if why != "" {
			show += " (" + clip(why, 60) + ")"
		}
		if !quiet && show != last && err == nil {
			if tty {
				fmt.Fprintf(c.err, "\r\033[K%s", clip(show, 79))
			} else {
				fmt.Fprintln(c.err, show)
			}
			last = show
		}
		select {
		case <-ctx.Done():
			if tty {
				fmt.Fprintln(c.err)
			}
			err := fmt.Errorf("service %s exists, but not all of its replicas run yet: %s", name, line)
			if why != "" {
				err = fmt.Errorf("%w: %s", err, why)
			}
			return fmt.Errorf("%w: see 'shoal svc ps %s'", err, name)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *cli) svcLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{Use: "ls", Short: "List services", Aliases: []string{"list"}, Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			svcs, err := c.services(cmd.Context())
			if err != nil {
				return err
			}
			slices.SortFunc(svcs, func(a, b *shoalv1.Service) int { return strings.Compare(a.GetSpec().GetName(), b.GetSpec().GetName()) })
			if c.output == "json" {
				js, err := each(svcs, toServiceJSON)
				if err != nil {
					return err
				}
				return c.json(js)
			}
			if quiet {
				for _, s := range svcs {
					fmt.Fprintln(c.out, s.Id)
				}
				return nil
			}
			_, nets, err := c.networks(cmd.Context())
			if err != nil {
				return err
			}
			rows := [][]string{{"ID", "NAME", "REPLICAS", "NETWORK", "VIRTUAL IP", "COMMAND"}}
			for _, s := range svcs {
				var ns, vips []string
				for _, a := range s.GetSpec().GetNetworks() {
					ns = append(ns, nets.of(a.Network))
				}
				for _, v := range s.Vips {
					vips = append(vips, v.Addrs...)
				}
				width := 22
				if c.output == "wide" {
					width = 1000
				}
				rows = append(rows, []string{s.Id, s.GetSpec().GetName(), fmt.Sprintf("%d/%d", s.Running, s.GetSpec().GetReplicas()),
					strings.Join(ns, ","), cmp.Or(strings.Join(vips, ","), "-"), clip(strings.Join(s.GetSpec().GetTask().GetCommand(), " "), width)})
			}
			c.table(rows)
			return nil
		}}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "IDs only")
	c.outputFlag(cmd, "json", "wide")
	return cmd
}

func (c *cli) svcPs() *cobra.Command {
	var all bool
	cmd := &cobra.Command{Use: "ps SERVICE [SERVICE...]", Short: "List the tasks of services", Args: atLeast(1),
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			var tasks []*shoalv1.Task
			for _, a := range args {
				ts, err := c.tasks(cmd.Context(), &shoalv1.ListTasksRequest{Service: a, All: true})
				if err != nil {
					return err
				}
				tasks = append(tasks, ts...)
			}
			if !all && c.output != "json" {
				tasks = recent(tasks)
			}
			return c.taskTable(cmd.Context(), tasks)
		}}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "the whole history, not the last ended task of each slot only")
	c.outputFlag(cmd, "json", "wide")
	return cmd
}

// recent keeps what runs and, per slot, the newest of what has ended.
func recent(in []*shoalv1.Task) []*shoalv1.Task {
	newest := map[string]*shoalv1.Task{}
	key := func(t *shoalv1.Task) string { return t.Service + "." + strconv.Itoa(int(t.Slot)) }
	for _, t := range in {
		if ended(t) && (newest[key(t)] == nil || newest[key(t)].CreatedMs < t.CreatedMs) {
			newest[key(t)] = t
		}
	}
	return slices.DeleteFunc(slices.Clone(in), func(t *shoalv1.Task) bool { return ended(t) && newest[key(t)] != t })
}

// taskTable prints tasks: by service, slot, newest first.
func (c *cli) taskTable(ctx context.Context, tasks []*shoalv1.Task) error {
	slices.SortFunc(tasks, func(a, b *shoalv1.Task) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Slot, b.Slot), -cmp.Compare(a.CreatedMs, b.CreatedMs), cmp.Compare(a.Name, b.Name))
	})
	_, nodes, err := c.nodes(ctx)
	if err != nil {
		return err
	}
	if c.output == "json" {
		type taskJSON struct {
			spec.Task
			NodeName string `json:"node_name"`
		}
		js, err := each(tasks, func(t *shoalv1.Task) (taskJSON, error) {
			v, err := api.ToTask(t)
			return taskJSON{v, nodes[t.Node]}, err
		})
		if err != nil {
			return err
		}
		return c.json(js)
	}
	head := []string{"NAME", "NODE", "STATE", "ADDRESS", "NOTE"}
	width := 26
	if c.output == "wide" {
		head = append([]string{"ID"}, head...)
		head = append(head, "COMMAND")
		width = 1000
	}
	rows := [][]string{head}
	for _, t := range tasks {
		var addrs []string
		for _, a := range t.Attachments {
			addrs = append(addrs, a.Addrs...)
		}
		row := []string{t.Name, cmp.Or(nodes[t.Node], "-"), t.GetStatus().GetState(), cmp.Or(strings.Join(addrs, ","), "-"), clip(t.GetStatus().GetMessage(), width)}
		if c.output == "wide" {
			row = append([]string{t.Id}, row...)
			row = append(row, strings.Join(t.GetSpec().GetCommand(), " "))
		}
		rows = append(rows, row)
	}
	c.table(rows)
	return nil
}

func (c *cli) svcInspect() *cobra.Command {
	cmd := &cobra.Command{Use: "inspect SERVICE [SERVICE...]", Short: "Show services in full", Args: atLeast(1),
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			svcs, err := c.services(cmd.Context(), args...)
			if err != nil {
				return err
			}
			js, err := each(svcs, toServiceJSON)
			if err != nil {
				return err
			}
			return c.json(js)
		}}
	c.outputFlag(cmd, "json")
	return cmd
}

func (c *cli) svcScale() *cobra.Command {
	var detach bool
	cmd := &cobra.Command{Use: "scale SERVICE=REPLICAS [SERVICE=REPLICAS...]", Short: "Change the number of replicas", Args: atLeast(1),
		Example:           "  shoal svc scale web=5\n  shoal svc scale web=0 db=1",
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			type change struct {
				ref string
				n   int32
			}
			var changes []change
			for _, a := range args {
				ref, v, ok := strings.Cut(a, "=")
				n, err := strconv.ParseInt(v, 10, 32)
				if !ok || err != nil || ref == "" {
					return usageError(cmd, fmt.Errorf("%q: want SERVICE=REPLICAS, like web=5", a))
				}
				changes = append(changes, change{ref, int32(n)})
			}
			var scaled []*shoalv1.Service
			for _, ch := range changes {
				resp, err := c.control().UpdateService(cmd.Context(), connect.NewRequest(&shoalv1.UpdateServiceRequest{Ref: ch.ref, Replicas: &ch.n}))
				if err != nil {
					return err
				}
				fmt.Fprintf(c.out, "%s scaled to %d\n", ch.ref, ch.n)
				scaled = append(scaled, resp.Msg.Service)
			}
			if detach {
				return nil
			}
			for _, s := range scaled {
				if err := c.converge(cmd.Context(), s, false); err != nil {
					return err
				}
			}
			return nil
		}}
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "don't wait until the replicas run")
	return cmd
}

func (c *cli) svcRm() *cobra.Command {
	return &cobra.Command{Use: "rm SERVICE [SERVICE...]", Short: "Remove services", Aliases: []string{"remove"}, Args: atLeast(1),
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.forEach(args, func(ref string) error {
				_, err := c.control().RemoveService(cmd.Context(), connect.NewRequest(&shoalv1.RemoveServiceRequest{Ref: ref}))
				return err
			})
		}}
}

func (c *cli) svcLogs() *cobra.Command {
	var follow, timestamps, raw bool
	var tail int32
	cmd := &cobra.Command{Use: "logs SERVICE|TASK", Short: "Show the output of a service's tasks, or of one task", Args: exactly(1),
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			tasks, err := c.tasks(cmd.Context(), &shoalv1.ListTasksRequest{Service: args[0], All: true})
			if connect.CodeOf(err) == connect.CodeNotFound {
				t, terr := c.task(cmd.Context(), args[0])
				if terr != nil {
					return err
				}
				tasks, err = []*shoalv1.Task{t}, nil
			}
			if err != nil {
				return err
			}
			return c.followLogs(cmd.Context(), tasks, logFlags{follow: follow, timestamps: timestamps, tail: tail, prefix: !raw})
		}}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on as more comes")
	f.BoolVarP(&timestamps, "timestamps", "t", false, "begin each line with its time")
	f.Int32VarP(&tail, "tail", "n", 0, "only the last lines of each task (0: all)")
	f.BoolVar(&raw, "raw", false, "without the tasks' names")
	return cmd
}

type logFlags struct {
	follow, timestamps, prefix bool
	tail                       int32
}

// followLogs prints the output of several tasks as it comes; without follow,
// by time.
func (c *cli) followLogs(ctx context.Context, tasks []*shoalv1.Task, lf logFlags) error {
	type entry struct {
		at   int64
		text string
		err  bool
	}
	var mu sync.Mutex
	var all []entry
	var firstErr error
	var wg sync.WaitGroup
	_, nodes, err := c.nodes(ctx)
	if err != nil {
		return err
	}
	write := func(e entry) {
		w := c.out
		if e.err {
			w = c.err
		}
		fmt.Fprintln(w, e.text)
	}
	for _, t := range tasks {
		if t.Node == "" {
			continue
		}
		wg.Go(func() {
			err := c.taskLogs(ctx, t, lf.follow, lf.tail, func(m *shoalv1.LogsResponse) {
				var b strings.Builder
				if lf.prefix {
					fmt.Fprintf(&b, "%s@%s | ", t.Name, nodes.of(t.Node))
				}
				if lf.timestamps {
					b.WriteString(time.UnixMilli(m.AtMs).UTC().Format("2006-01-02T15:04:05.000Z") + " ")
				}
				b.Write(m.Line)
				e := entry{m.AtMs, b.String(), m.Stderr}
				mu.Lock()
				defer mu.Unlock()
				if lf.follow {
					write(e)
				} else {
					all = append(all, e)
				}
			})
			// A task that its node has forgotten, or whose node is down, has
			// no output to show; the others have.
			code := connect.CodeOf(err)
			if err != nil && ctx.Err() == nil && (len(tasks) == 1 || code != connect.CodeNotFound && code != connect.CodeUnavailable) {
				mu.Lock()
				firstErr = cmp.Or(firstErr, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	slices.SortStableFunc(all, func(a, b entry) int { return cmp.Compare(a.at, b.at) })
	for _, e := range all {
		write(e)
	}
	return firstErr
}

func (c *cli) taskLogs(ctx context.Context, t *shoalv1.Task, follow bool, tail int32, each func(*shoalv1.LogsResponse)) error {
	req := connect.NewRequest(&shoalv1.LogsRequest{Task: t.Id, Follow: follow, Tail: tail})
	req.Header().Set(agent.NodeHeader, t.Node)
	stream, err := c.node().Logs(ctx, req)
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		each(stream.Msg())
	}
	return stream.Err()
}
