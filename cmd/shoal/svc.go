package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

func (c *cli) svcCmd() *cobra.Command {
	return group("svc", "Manage services", []string{"service"}, c.svcCreate(), c.svcUpdate(), c.svcLs(), c.svcPs(), c.svcInspect(), c.svcScale(), c.svcRollback(), c.svcRebalance(), c.svcLogs(), c.svcRm())
}

// taskFlags are the flags that svc create and run share.
type taskFlags struct {
	env, envFile, networks, aliases, labels []string
	labelFile, taskLabels                   []string
	hostname, user, dir, stopSignal         string
	stopGrace                               time.Duration
	logDriver                               string
	logOpts                                 []string

	dns, dnsSearch, dnsOptions, hosts, links, expose, publish []string
	ip                                                        string // of the first network

	health    healthFlags
	image     containerFlags
	resources resourceFlags
}

func (t *taskFlags) add(f *pflag.FlagSet, hostShort string) {
	f.SetNormalizeFunc(dockerFlags)
	f.StringArrayVarP(&t.env, "env", "e", nil, "environment variable, KEY=value, or KEY to pass this shell's on (repeatable)")
	f.StringArrayVar(&t.envFile, "env-file", nil, "file of environment variables, one KEY=value a line")
	f.StringArrayVar(&t.networks, "network", nil, "network to attach to; name=NET,alias=NAME,ip=ADDR for more (default \"default\"; repeatable)")
	f.StringSliceVar(&t.aliases, "network-alias", nil, "further name on every network given (repeatable)")
	f.StringArrayVarP(&t.labels, "label", "l", nil, "label, key=value (repeatable)")
	f.StringArrayVar(&t.labelFile, "label-file", nil, "file of labels, one key=value a line")
	f.StringVarP(&t.hostname, "hostname", hostShort, "", "host name inside the task")
	f.StringVarP(&t.user, "user", "u", "", "user or uid, and group: NAME[:GROUP]")
	f.StringVarP(&t.dir, "workdir", "w", "", "working directory")
	f.StringSliceVar(&t.dns, "dns", nil, "resolver asked instead of the node's (repeatable)")
	f.StringSliceVar(&t.dnsSearch, "dns-search", nil, "search domain instead of the node's; . for none (repeatable)")
	f.StringSliceVar(&t.dnsOptions, "dns-option", nil, "resolv.conf option, like ndots:2 or use-vc (repeatable)")
	f.StringArrayVar(&t.hosts, "add-host", nil, "line of /etc/hosts, NAME:ADDRESS; the address may be host-gateway (repeatable)")
	f.StringArrayVar(&t.links, "link", nil, "task or service to know by another name, NAME:ALIAS, with Docker's variables (deprecated there; repeatable)")
	f.StringSliceVar(&t.expose, "expose", nil, "port that is served, PORT[/PROTOCOL], for those that link to it (repeatable)")
	f.StringVar(&t.stopSignal, "stop-signal", "", "signal that asks the program to stop (default SIGTERM)")
	f.StringVar(&t.logDriver, "log-driver", "", logDriverHelp)
	f.StringArrayVar(&t.logOpts, "log-opt", nil, logOptHelp)
	t.health.add(f)
}

const (
	logDriverHelp = "how output is kept: json-file or local, which are the same: in files of the node"
	logOptHelp    = "max-size=SIZE of a file of output (10m), max-file=N of them (3; repeatable)"
)

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
	if len(out) == 0 && (len(t.aliases) > 0 || t.ip != "") {
		out = append(out, &shoalv1.NetworkAttachment{Network: spec.DefaultNetwork, Aliases: t.aliases})
	}
	if t.ip != "" {
		out[0].Addrs = append(out[0].Addrs, t.ip)
	}
	return out, nil
}

func (t *taskFlags) spec(command []string) (*shoalv1.TaskSpec, error) {
	s := &shoalv1.TaskSpec{Command: spec.Texts(command), Dns: t.dns, DnsSearch: t.dnsSearch, DnsOptions: t.dnsOptions, ExtraHosts: t.hosts, Links: t.links, Expose: t.expose, Hostname: t.hostname, User: spec.Text(t.user), Dir: spec.Text(t.dir), StopSignal: t.stopSignal, StopGraceMs: t.stopGrace.Milliseconds()}
	env, err := fileLines("--env-file", t.envFile)
	if err != nil {
		return nil, err
	}
	for _, l := range env {
		if !strings.Contains(l, "=") {
			if v, ok := os.LookupEnv(l); ok {
				s.Env = append(s.Env, l+"="+v)
			}
			continue
		}
		s.Env = append(s.Env, l)
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
	s.Env = spec.Texts(s.Env)
	lines, err := fileLines("--label-file", t.labelFile)
	if err != nil {
		return nil, err
	}
	if s.Health, err = t.health.apply(nil); err != nil {
		return nil, err
	}
	kept, err := spec.ParseLog(t.logDriver, t.logOpts)
	if err != nil {
		return nil, err
	}
	s.Log = api.LogConfig(kept)
	if t.resources.set != nil {
		r, err := t.resources.apply(spec.Resources{})
		if err != nil {
			return nil, err
		}
		s.Resources = api.Resources(r)
	}
	s.Labels, err = labels(append(lines, t.labels...))
	return s, err
}

// fileLines are the lines of files, without blank ones and comments.
func fileLines(flag string, files []string) ([]string, error) {
	var out []string
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", flag, err)
		}
		// As Docker reads them: what is behind the = stays as it is, but for the
		// line's end.
		for l := range strings.Lines(strings.TrimPrefix(string(b), "\uFEFF")) {
			l = strings.TrimLeft(strings.TrimRight(l, "\r\n"), " \t")
			if strings.TrimSpace(l) == "" || l[0] == '#' {
				continue
			}
			if k, _, _ := strings.Cut(l, "="); k == "" || strings.ContainsAny(strings.TrimSpace(k), " \t") {
				return nil, fmt.Errorf("%s %s: %q: want KEY=value, with no space in the key", flag, file, l)
			}
			out = append(out, l)
		}
	}
	return out, nil
}

// dockerFlags takes Docker's older spellings of flags.
func dockerFlags(_ *pflag.FlagSet, name string) pflag.NormalizedName {
	switch name {
	case "net":
		name = "network"
	case "net-alias":
		name = "network-alias"
	case "dns-opt":
		name = "dns-option"
	}
	return pflag.NormalizedName(name)
}

const listenTimeoutHelp = "how long a replica may take to listen that replaces one that listens, before it has failed (0: it need not listen)"

// listenTimeoutMs is the value of --listen-timeout as the API has it.
func listenTimeoutMs(d time.Duration) (int64, error) {
	switch {
	case d < 0 || d%time.Millisecond != 0:
		return 0, fmt.Errorf("--listen-timeout %s: use a whole number of milliseconds, like 90s, or 0", d)
	case d == 0:
		return spec.NoListenTimeout.Milliseconds(), nil
	}
	return d.Milliseconds(), nil
}

func (c *cli) svcCreate() *cobra.Command {
	req := &shoalv1.ServiceSpec{}
	var tf taskFlags
	var detach, quiet, tty bool
	var restartDelay, restartWindow, listenTimeout time.Duration
	var prefs []string
	var secrets, configs []string
	var policy, back policyFlags
	cmd := &cobra.Command{
		Use: "create [flags] IMAGE|-- [COMMAND] [ARG...]", Short: "Create a service", Args: cobra.ArbitraryArgs,
		Long: `Create makes a service of replicas of an image or, after --, of a program of the
nodes' own file systems. The image is pinned to the digest that it has now, so
that all replicas are one image.`,
		Example: `  shoal svc create --name web --replicas 3 --network app nginx
  shoal svc create --name web --replicas 3 --network app -- nginx -g 'daemon off;'
  shoal svc create --name db --network app --constraint node.labels.disk==ssd -- postgres -D /data
  shoal svc create --name web --replicas 3 --network app --publish 8080:80 -- nginx -g 'daemon off;'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(cmd, fmt.Errorf("no image and no command: name an image, or a program after --, like: shoal svc create --name web -- nginx -g 'daemon off;'"))
			}
			image, command := imageArgs(cmd, args)
			var err error
			if req.Task, err = tf.spec(command); err != nil {
				return usageError(cmd, err)
			}
			tf.image.entrypointGiven = cmd.Flags().Changed("entrypoint")
			if err := c.setContainer(req.Task, &tf.image, "svc create --name NAME", image, command, true, tf.health.none); err != nil {
				return usageError(cmd, err)
			}
			if req.Networks, err = tf.attachments(); err != nil {
				return usageError(cmd, err)
			}
			req.Task.Tty = tty
			req.Labels = req.Task.Labels
			if req.Task.Labels, err = labels(tf.taskLabels); err != nil {
				return usageError(cmd, err)
			}
			if req.Task.Secrets, err = blobRefs(spec.KindSecret, secrets); err != nil {
				return usageError(cmd, err)
			}
			if req.Task.Configs, err = blobRefs(spec.KindConfig, configs); err != nil {
				return usageError(cmd, err)
			}
			req.RestartDelayMs, req.RestartWindowMs = restartDelay.Milliseconds(), restartWindow.Milliseconds()
			if req.Mode == spec.ModeReplicated {
				req.Mode = "" // which managers of before know, too
			}
			if global(req.Mode) {
				if cmd.Flags().Changed("replicas") {
					return usageError(cmd, errReplicas)
				}
				req.Replicas = 0
			}
			if req.Spread, err = spreads(prefs); err != nil {
				return usageError(cmd, err)
			}
			if cmd.Flags().Changed("listen-timeout") {
				if req.ListenTimeoutMs, err = listenTimeoutMs(listenTimeout); err != nil {
					return usageError(cmd, err)
				}
			}
			req.Update, req.Rollback = policy.apply(nil), back.apply(nil)
			ports, err := client.ParsePublishes(tf.publish, spec.PortIngress)
			if err != nil {
				return usageError(cmd, err)
			}
			req.Ports = api.Ports(ports)
			if req.Name == "" {
				req.Name = "svc-" + spec.NewID()[:6]
			}
			if err := c.api().Link(cmd.Context(), req.Task, req.Name, req.Networks); err != nil {
				return err
			}
			if err := c.pinImage(cmd.Context(), req.Task, &tf.image, "svc create --name "+req.Name, image, command); err != nil {
				return err
			}
			svc, err := c.api().CreateService(cmd.Context(), req)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.out, svc.Id)
			if detach {
				return nil
			}
			return c.converge(cmd.Context(), svc, quiet)
		},
	}
	f := cmd.Flags()
	policy.add(cmd, "update")
	back.add(cmd, "rollback")
	f.SetInterspersed(false) // what follows the program is the program's, as in Docker
	f.StringVar(&req.Name, "name", "", "name of the service, and its host name on its networks")
	f.Int32Var(&req.Replicas, "replicas", 1, "number of tasks")
	f.StringVar(&req.EndpointMode, "endpoint-mode", spec.EndpointModeVIP, "vip (one balanced address) or dnsrr (the replicas' addresses)")
	f.StringArrayVar(&req.Constraints, "constraint", nil, "placement: node.name==x, node.role!=manager, node.labels.k==v (repeatable)")
	f.StringVar(&req.Mode, "mode", spec.ModeReplicated, "replicated, global (one task on each node), replicated-job or global-job (tasks that run to their end)")
	f.Int32Var(&req.MaxConcurrent, "max-concurrent", 0, "tasks of a replicated-job that run at once (default: all)")
	f.StringArrayVar(&prefs, "placement-pref", nil, placementPrefHelp)
	f.Int32Var(&req.MaxPerNode, "replicas-max-per-node", 0, "most replicas on one node (0: no limit)")
	f.StringVar(&req.RestartCondition, "restart-condition", "", restartConditionHelp)
	f.DurationVar(&restartWindow, "restart-window", 0, restartWindowHelp)
	f.DurationVar(&restartDelay, "restart-delay", 0, "wait before the first restart; doubles up to 30s (default 100ms)")
	f.DurationVar(&listenTimeout, "listen-timeout", spec.DefaultListenTimeout, listenTimeoutHelp)
	f.Int32Var(&req.RestartMax, "restart-max-attempts", 0, "restarts of a replica before it is given up (0: no limit)")
	f.StringArrayVarP(&tf.publish, "publish", "p", nil, publishHelp)
	f.StringVar(&tf.ip, "vip", "", "virtual IP on the first network (default: a free one)")
	f.StringArrayVar(&tf.hosts, "host", nil, "the same as --add-host")
	_ = f.MarkHidden("host")
	f.DurationVar(&tf.stopGrace, "stop-grace-period", spec.DefaultStopGrace, "time between the stop signal and the kill")
	f.BoolVarP(&detach, "detach", "d", false, "don't wait until the replicas run")
	f.BoolVarP(&quiet, "quiet", "q", false, "wait, but show no progress")
	f.BoolVarP(&tty, "tty", "t", false, "give each replica a terminal, as programs want that are silent without, or end")
	f.StringArrayVar(&tf.taskLabels, "container-label", nil, "label of the tasks, key=value (repeatable); --label is the service's")
	tf.add(f, "")
	tf.image.add(f, true)
	tf.resources.add(f, true)
	f.StringArrayVar(&secrets, "secret", nil, "secret: NAME, or source= with target=, uid=, gid=, mode= between commas (repeatable)")
	f.StringArrayVar(&configs, "config", nil, "config: NAME, or source= with target=, uid=, gid=, mode= between commas (repeatable)")
	_ = cmd.RegisterFlagCompletionFunc("secret", c.completeBlobs(spec.KindSecret))
	_ = cmd.RegisterFlagCompletionFunc("config", c.completeBlobs(spec.KindConfig))
	_ = cmd.RegisterFlagCompletionFunc("network", c.complete(c.networkNames))
	_ = cmd.RegisterFlagCompletionFunc("endpoint-mode", cobra.FixedCompletions([]string{"vip", "dnsrr"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions(modes, cobra.ShellCompDirectiveNoFileComp))
	completeConditions(cmd)
	return cmd
}

const (
	placementPrefHelp    = "spread=node.labels.KEY: spread the replicas over the label's values (repeatable, the outer first)"
	restartConditionHelp = "of which ends a task is replaced: any (default), on-failure or none"
	restartWindowHelp    = "how long a run lasts that counts as a success; attempts are counted anew then (default 10s)"
)

var modes = []string{spec.ModeReplicated, spec.ModeGlobal, spec.ModeReplicatedJob, spec.ModeGlobalJob}

// errReplicas has Docker's words.
var errReplicas = fmt.Errorf("replicas can only be used with mode %s or %s", spec.ModeReplicated, spec.ModeReplicatedJob)

func global(mode string) bool { return spec.ServiceSpec{Mode: mode}.Global() }
func job(mode string) bool    { return spec.ServiceSpec{Mode: mode}.Job() }

func completeConditions(cmd *cobra.Command) {
	_ = cmd.RegisterFlagCompletionFunc("restart-condition", cobra.FixedCompletions([]string{spec.RestartAny, spec.RestartOnFailure, spec.RestartNone}, cobra.ShellCompDirectiveNoFileComp))
}

// spreads reads placement preferences, of which there is one strategy.
func spreads(prefs []string) ([]string, error) {
	var out []string
	for _, p := range prefs {
		d, ok := strings.CutPrefix(p, "spread=")
		if !ok {
			return nil, fmt.Errorf("placement preference %q: use spread=node.labels.KEY", p)
		}
		if err := spec.ValidateSpread(d); err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

// convergeTimeout bounds the wait of svc create and scale.
const convergeTimeout = 2 * time.Minute

// followTimeout bounds the wait for nodes to say that their kernels follow a
// change: one that hangs is for the managers to notice.
const followTimeout = 5 * time.Second

// convergeAll is converge for one service after the other, unless the user does not wait.
func (c *cli) convergeAll(ctx context.Context, ss []*shoalv1.Service, detach, quiet bool) error {
	if detach {
		return nil
	}
	for _, s := range ss {
		if err := c.converge(ctx, s, quiet); err != nil {
			return err
		}
	}
	return nil
}

// converge waits until a service has as many running tasks as it wants, and every
// node's kernel follows, shows how far it is, and says what stands in the way when
// it takes long.
func (c *cli) converge(ctx context.Context, s *shoalv1.Service, quiet bool) error {
	name, want := s.GetSpec().GetName(), int(s.GetSpec().GetReplicas())
	manual := s.GetUpdateStatus().GetState() == spec.RollbackStarted
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// An update comes to its end by itself, after delays that may be long.
	patience := time.AfterFunc(convergeTimeout, cancel)
	defer patience.Stop()
	var update *shoalv1.UpdateStatus
	tty := c.terminal() && !quiet
	last, why, said := "", "", ""
	var up time.Time   // since when all tasks are as wanted
	var over time.Time // since when a slot is given up
	var away time.Time // since when nobody says how it is
	watch := c.api().Watch(&shoalv1.WatchRequest{Services: []string{s.Id}})
	defer watch.Close()
	for {
		now, err := watch.Next(ctx)
		tasks := now.GetTasks()
		running, extra, rewiring := 0, 0, 0
		if err == nil {
			why = ""
		}
		for _, t := range tasks {
			st := t.GetStatus()
			switch {
			case t.Desired == spec.DesiredRunning && st.GetState() == spec.TaskRunning.String():
				running++
				if !wired(t) {
					rewiring++
				}
			case t.Desired != spec.DesiredRunning && !ended(t):
				extra++
			}
			if st.GetMessage() != "" && t.Desired == spec.DesiredRunning {
				why = fmt.Sprintf("%s: %s: %s", t.Name, st.GetState(), st.GetMessage())
			}
		}
		stale, done, todo := 0, 0, 0
		var behind []string
		var faults []*shoalv1.NodeFault
		if svcs := now.GetServices(); len(svcs) > 0 {
			stale, behind, faults = int(svcs[0].Stale), svcs[0].Behind, svcs[0].Faults
			update, want = svcs[0].UpdateStatus, desired(svcs[0])
			done, todo = int(svcs[0].Completed), int(svcs[0].ToComplete)
		} else if err == nil {
			return fmt.Errorf("service %s was removed meanwhile", name)
		}
		if err != nil && ctx.Err() == nil {
			if !client.Away(err) {
				return fmt.Errorf("service %s exists, but how far it is can't be learned: %w", name, err)
			}
			// Another leader is about to come, or the agent again: it goes on.
			if away.IsZero() {
				away = time.Now()
			}
			if time.Since(away) > 3*time.Second && !quiet && last != client.Message(err) {
				last = client.Message(err)
				fmt.Fprintf(c.err, "%s: %s: waiting\n", name, last)
			}
			sleep.For(ctx, 200*time.Millisecond)
			if ctx.Err() == nil {
				continue
			}
			why = cmp.Or(why, client.Message(err))
		}
		away = time.Time{}
		line := fmt.Sprintf("%s: %d/%d running", name, running, want)
		complete := completed(tasks, s.GetSpec())
		there := running+complete == want
		if job(s.GetSpec().GetMode()) {
			// It may take long, and what ran before a change does not count.
			if running > 0 {
				patience.Reset(convergeTimeout)
			}
			there, want = done == todo, todo
			line = fmt.Sprintf("%s: %d/%d complete, %d running", name, done, todo, running)
		} else if complete > 0 {
			line += fmt.Sprintf(", %d complete", complete)
		}
		there = there && extra+stale+rewiring == 0
		if stale > 0 {
			line += fmt.Sprintf(", %d to be replaced", stale)
		}
		if rewiring > 0 {
			line += fmt.Sprintf(", %d being rewired", rewiring)
		}
		if extra > 0 {
			line += fmt.Sprintf(", %d stopping", extra)
		}
		active := api.ToUpdateStatus(update).Active()
		if active {
			patience.Reset(convergeTimeout)
			if there {
				line += ", being watched"
			}
			if update.GetState() == spec.RollbackStarted && !manual {
				line += ", " + update.GetMessage()
			}
		} else if oerr := updateOutcome(update, manual); err == nil && oerr != nil && extra == 0 {
			if tty {
				fmt.Fprintln(c.err)
			}
			return fmt.Errorf("%w (%s): see 'shoal svc ps %s'", oerr, line, name)
		}
		settled := err == nil && !active && there
		if up.IsZero() || !settled {
			up = time.Now()
		}
		if settled && len(behind) > 0 {
			line += ", not followed yet by " + strings.Join(behind, ", ")
			settled = time.Since(up) > followTimeout
		}
		if settled {
			if tty {
				fmt.Fprintf(c.err, "\r\033[K%s\n", line)
			} else if !quiet {
				fmt.Fprintln(c.err, line)
			}
			c.warn(faults)
			return nil
		}
		if t := givenUp(tasks, want, s.GetSpec()); t == nil || err != nil || stale+extra > 0 {
			over = time.Time{}
		} else if over.IsZero() {
			over = time.Now()
		} else if time.Since(over) > giveUpAfter {
			if tty {
				fmt.Fprintln(c.err)
			}
			limit := fmt.Sprintf("--restart-max-attempts %d", s.GetSpec().GetRestartMax())
			if c := s.GetSpec().GetRestartCondition(); c == spec.RestartNone {
				limit = "--restart-condition " + c
			}
			return fmt.Errorf("service %s exists, but its replicas are not restarted any more (%s): %s: task %s %s: %s: see 'shoal svc ps %s'",
				name, limit, line, t.Name, t.GetStatus().GetState(), t.GetStatus().GetMessage(), name)
		}
		// A terminal's line is written over, so a reason, whole, has lines of its own.
		show, reason := line, strings.Join(strings.Fields(why), " ")
		if tty && reason != "" && reason != said && !quiet && err == nil {
			fmt.Fprintf(c.err, "\r\033[K%s\n", reason)
			said, last = reason, ""
		} else if !tty && reason != "" {
			show += " (" + reason + ")"
		}
		if !quiet && show != last && err == nil {
			if tty {
				fmt.Fprintf(c.err, "\r\033[K%s", clip(show, 79))
			} else {
				fmt.Fprintln(c.err, show)
			}
			last = show
		}
		if ctx.Err() != nil {
			if tty {
				fmt.Fprintln(c.err)
			}
			err := fmt.Errorf("service %s exists, but not all of its replicas run yet: %s", name, line)
			if why != "" {
				err = fmt.Errorf("%w: %s", err, why)
			}
			return fmt.Errorf("%w: see 'shoal svc ps %s'", err, name)
		}
	}
}

// giveUpAfter is how long a slot must look given up: its next task may be on its way.
const giveUpAfter = time.Second

// slots are the newest task of each slot, and whether one lives there.
func slots(tasks []*shoalv1.Task) (newest map[int32]*shoalv1.Task, live map[int32]bool) {
	newest, live = map[int32]*shoalv1.Task{}, map[int32]bool{}
	for _, t := range tasks {
		live[t.Slot] = live[t.Slot] || !ended(t)
		if n := newest[t.Slot]; n == nil || t.CreatedMs > n.CreatedMs || t.CreatedMs == n.CreatedMs && t.Attempt > n.Attempt {
			newest[t.Slot] = t
		}
	}
	return newest, live
}

// completed counts the slots whose program came to its end in good order and is not
// started again, as the restart condition wants it.
func completed(tasks []*shoalv1.Task, sp *shoalv1.ServiceSpec) (n int) {
	newest, live := slots(tasks)
	for slot, t := range newest {
		if !live[slot] && t.Desired == spec.DesiredRunning && endsWell(t, sp) {
			n++
		}
	}
	return n
}

// endsWell tells whether a task has completed where that is the end of its slot.
func endsWell(t *shoalv1.Task, sp *shoalv1.ServiceSpec) bool {
	v := spec.ServiceSpec{Mode: sp.GetMode(), RestartCondition: sp.GetRestartCondition()}
	return t.GetStatus().GetState() == spec.TaskComplete.String() && !v.Restarts(spec.TaskComplete)
}

// givenUp is the last task of a slot that gets no other, as it has had its limit of
// runs and none is live; nil if there is no such slot, or if as many others as are
// wanted live: it is one that scale took away. A limit of 0 is none.
func givenUp(tasks []*shoalv1.Task, want int, sp *shoalv1.ServiceSpec) *shoalv1.Task {
	limit := int(sp.GetRestartMax())
	newest, live := slots(tasks)
	for _, l := range live {
		if l {
			want--
		}
	}
	if want <= 0 {
		return nil
	}
	for _, slot := range slices.Sorted(maps.Keys(newest)) {
		t := newest[slot]
		over := limit > 0 && int(t.Attempt) >= limit || sp.GetRestartCondition() == spec.RestartNone && t.GetStatus().GetState() == spec.TaskFailed.String()
		if over && !live[slot] && !endsWell(t, sp) {
			return t
		}
	}
	return nil
}

// warn says what nodes can't do for a service or task that is otherwise as wanted.
func (c *cli) warn(faults []*shoalv1.NodeFault) {
	for _, f := range faults {
		fmt.Fprintf(c.err, "warning: %s: %s\n", f.Node, f.Message)
	}
}

// wired tells whether a task's node has connected and disconnected it as it was
// told to.
func wired(t *shoalv1.Task) bool {
	return !slices.ContainsFunc(t.Attachments, func(a *shoalv1.Attachment) bool {
		return a.Leaving != 0 || a.Joined > t.GetStatus().GetWired()
	})
}

// desired is how many tasks a service should have now. Leaders of before there were
// modes do not say.
func desired(s *shoalv1.Service) int {
	if serviceMode(s) == spec.ModeReplicated {
		return int(s.GetSpec().GetReplicas())
	}
	return int(s.GetDesired())
}

func serviceMode(s *shoalv1.Service) string {
	return cmp.Or(s.GetSpec().GetMode(), spec.ModeReplicated)
}

// image is the program, which stands where Docker shows an image.
func image(t *shoalv1.TaskSpec) string {
	if img := t.GetContainer().GetImage(); img != "" {
		name, _, _ := strings.Cut(img, "@")
		return strings.TrimPrefix(strings.TrimPrefix(name, "docker.io/"), "library/")
	}
	if c := t.GetCommand(); len(c) > 0 {
		return spec.Raw(c[0])
	}
	return ""
}

// kindText tells a container, by its image, from a program of the node.
func kindText(t *shoalv1.TaskSpec) string {
	if t.GetContainer().GetImage() == "" {
		return "host task"
	}
	return image(t)
}

func commandText(t *shoalv1.TaskSpec) string { return spec.Raw(strings.Join(t.GetCommand(), " ")) }

func (c *cli) svcLs() *cobra.Command {
	type service = *shoalv1.Service
	var nets names
	l := &listing[service]{
		id:     func(s service) string { return s.Id },
		json:   func(s service) (any, error) { return toServiceJSON(s, nets) },
		labels: func(s service) map[string]string { return s.GetSpec().GetLabels() },
		columns: []column[service]{
			{"ID", false, func(s service) string { return s.Id }},
			{"NAME", false, func(s service) string { return s.GetSpec().GetName() }},
			{"REPLICAS", false, func(s service) string {
				out := fmt.Sprintf("%d/%d", s.Running, desired(s))
				if job(s.GetSpec().GetMode()) {
					out += fmt.Sprintf(" (%d/%d completed)", s.Completed, s.ToComplete)
				}
				return out
			}},
			{"NETWORK", false, func(s service) string {
				return strings.Join(each1(s.GetSpec().GetNetworks(), func(a *shoalv1.NetworkAttachment) string { return nets.Of(a.Network) }), ",")
			}},
			{"VIRTUAL IP", false, func(s service) string {
				var vips []string
				for _, v := range s.Vips {
					vips = append(vips, v.Addrs...)
				}
				return cmp.Or(strings.Join(vips, ","), "-")
			}},
			{"PORTS", false, func(s service) string { return cmp.Or(portsText(s.Ports), "-") }},
			{"MODE", true, serviceMode},
			{"ENDPOINT MODE", true, func(s service) string { return s.GetSpec().GetEndpointMode() }},
			{"KIND", true, func(s service) string { return kindText(s.GetSpec().GetTask()) }},
			{"COMMAND", true, func(s service) string { return commandText(s.GetSpec().GetTask()) }},
		},
		filters: map[string]func(service, string) bool{
			"id":   func(s service, v string) bool { return strings.HasPrefix(s.Id, v) },
			"name": func(s service, v string) bool { return nameMatches(s.GetSpec().GetName(), v) },
			// Docker's mode is of the replicas.
			"mode": func(s service, v string) bool { return serviceMode(s) == v || s.GetSpec().GetEndpointMode() == v },
			"network": func(s service, v string) bool {
				return slices.ContainsFunc(s.GetSpec().GetNetworks(), func(a *shoalv1.NetworkAttachment) bool { return nets.Of(a.Network) == v || a.Network == v })
			},
		},
		values: map[string][]string{"mode": append(slices.Clone(modes), spec.EndpointModeVIP, spec.EndpointModeDNSRR)},
		fields: map[string]func(service) string{
			"Image": func(s service) string { return image(s.GetSpec().GetTask()) },
		},
	}
	cmd := &cobra.Command{Use: "ls", Short: "List services", Aliases: []string{"list"}, Args: exactly(0),
		Example: "  shoal svc ls --filter label=tier=front\n  shoal svc ls --format '{{.Name}} {{.VirtualIP}}'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			svcs, err := c.services(cmd.Context())
			if err != nil {
				return err
			}
			if _, nets, err = c.networks(cmd.Context()); err != nil {
				return err
			}
			slices.SortFunc(svcs, func(a, b service) int { return strings.Compare(a.GetSpec().GetName(), b.GetSpec().GetName()) })
			return l.print(c, cmd, svcs)
		}}
	l.add(c, cmd)
	return cmd
}

func (c *cli) svcPs() *cobra.Command {
	var all bool
	l := c.taskListing()
	cmd := &cobra.Command{Use: "ps SERVICE [SERVICE...]", Short: "List the tasks of services", Args: atLeast(1),
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			svcs, err := c.services(cmd.Context(), args...)
			if err != nil {
				return err
			}
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
			if err := l.show(cmd, tasks); err != nil {
				return err
			}
			if l.isTable(c) {
				for _, s := range svcs {
					if l := updateLine(s); l != "" {
						fmt.Fprintln(c.err, l)
					}
					c.warn(s.Faults)
				}
			}
			return nil
		}}
	cmd.Flags().BoolVar(&l.ids, "no-resolve", false, "show IDs of nodes, not names")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "the whole history, not the last ended task of each slot only")
	l.add(c, cmd)
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

// exited is Docker's word for every way in which a task has ended.
const exited = "exited"

// noHealth is Docker's word for the health of a task without a check.
const noHealth = "none"

// taskListing is what ps and svc ps show.
type taskListing struct {
	listing[*shoalv1.Task]
	c     *cli
	ids   bool // nodes by their IDs, not by name
	nodes names
	svcs  names
	nets  names
}

func (c *cli) taskListing() *taskListing {
	type task = *shoalv1.Task
	l := &taskListing{c: c}
	note := func(t task) string { return t.GetStatus().GetMessage() }
	l.listing = listing[task]{
		id:     func(t task) string { return t.Id },
		json:   func(t task) (any, error) { return toTaskJSON(t, l.nodes, l.nets) },
		labels: func(t task) map[string]string { return t.GetSpec().GetLabels() },
		columns: []column[task]{
			{"ID", true, func(t task) string { return t.Id }},
			{"NAME", false, func(t task) string { return t.Name }},
			{"NODE", false, func(t task) string {
				if l.ids {
					return cmp.Or(t.Node, "-")
				}
				return cmp.Or(l.nodes[t.Node], "-")
			}},
			{"STATE", false, func(t task) string { return t.GetStatus().GetState() }},
			{"ADDRESS", false, func(t task) string {
				var addrs []string
				for _, a := range t.Attachments {
					addrs = append(addrs, a.Addrs...)
				}
				return cmp.Or(strings.Join(addrs, ","), "-")
			}},
			{"NOTE", false, func(t task) string {
				if l.whole {
					return note(t)
				}
				return strings.Join(strings.Fields(note(t)), " ")
			}},
			{"PORTS", true, func(t task) string { return cmp.Or(portsText(t.Ports), "-") }},
			{"KIND", true, func(t task) string { return kindText(t.GetSpec()) }},
			{"COMMAND", true, func(t task) string { return commandText(t.GetSpec()) }},
		},
		filters: map[string]func(task, string) bool{
			"id":      func(t task, v string) bool { return strings.HasPrefix(t.Id, v) },
			"name":    func(t task, v string) bool { return nameMatches(t.Name, v) },
			"node":    func(t task, v string) bool { return t.Node == v || l.nodes[t.Node] == v },
			"state":   func(t task, v string) bool { return t.GetStatus().GetState() == v },
			"service": func(t task, v string) bool { return t.Service == v || t.Service != "" && l.svcs[t.Service] == v },
			"network": func(t task, v string) bool {
				return slices.ContainsFunc(t.Attachments, func(a *shoalv1.Attachment) bool { return a.Network == v })
			},
			"desired-state": func(t task, v string) bool { return t.Desired == v },
			"health":        func(t task, v string) bool { return cmp.Or(t.GetStatus().GetHealth(), noHealth) == v },
			"status": func(t task, v string) bool {
				return t.GetStatus().GetState() == v || v == exited && ended(t)
			},
		},
		values: map[string][]string{"health": append(spec.Healths(), noHealth), "state": spec.TaskStates(), "status": append(spec.TaskStates(), exited), "desired-state": {spec.DesiredRunning, spec.DesiredShutdown, spec.DesiredRemove}},
		fields: map[string]func(task) string{
			"Names":     func(t task) string { return t.Name },
			"Status":    dockerStatus,
			"Health":    func(t task) string { return t.GetStatus().GetHealth() },
			"CreatedAt": func(t task) string { return createdAt(t.CreatedMs) },
			"RunningFor": func(t task) string {
				return ago(t.CreatedMs)
			},
			"Image":        func(t task) string { return image(t.GetSpec()) },
			"DesiredState": func(t task) string { return capital(t.Desired) },
			"CurrentState": func(t task) string {
				s := capital(t.GetStatus().GetState())
				if at := t.GetStatus().GetAtMs(); at != 0 {
					s += " " + ago(at)
				}
				return s
			},
			"Error": note,
			"Networks": func(t task) string {
				return strings.Join(each1(t.Attachments, func(a *shoalv1.Attachment) string { return l.nets.Of(a.Network) }), ",")
			},
		},
	}
	return l
}

// show prints tasks: by service, slot, newest first.
func (l *taskListing) show(cmd *cobra.Command, tasks []*shoalv1.Task) error {
	slices.SortFunc(tasks, func(a, b *shoalv1.Task) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Slot, b.Slot), -cmp.Compare(a.CreatedMs, b.CreatedMs), cmp.Compare(a.Name, b.Name))
	})
	var err error
	if _, l.nodes, err = l.c.nodes(cmd.Context()); err != nil {
		return err
	}
	if l.svcs, err = l.c.serviceNames(cmd.Context()); err != nil {
		return err
	}
	if _, l.nets, err = l.c.networks(cmd.Context()); err != nil {
		return err
	}
	for i, f := range l.want {
		if n, ok := strings.CutPrefix(f, "node="); ok {
			if n == "self" {
				id, err := l.c.self(cmd.Context())
				if err != nil {
					return err
				}
				l.want[i] = "node=" + id
				continue
			}
			if _, _, err := l.c.nodes(cmd.Context(), n); err != nil {
				return err
			}
		}
		if n, ok := strings.CutPrefix(f, "network="); ok {
			nets, _, err := l.c.networks(cmd.Context(), n)
			if err != nil {
				return err
			}
			l.want[i] = "network=" + nets[0].Id
		}
	}
	return l.print(l.c, cmd, tasks)
}

func (c *cli) svcInspect() *cobra.Command {
	var people bool
	cmd := &cobra.Command{Use: "inspect SERVICE [SERVICE...]", Short: "Show services in full, with what every node's kernel holds of them", Args: atLeast(1),
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			svcs, err := c.services(cmd.Context(), args...)
			if err != nil {
				return err
			}
			type full struct {
				serviceJSON
				Faults []nodeFault  `json:"faults,omitempty"` // what nodes can't do for it now
				Kernel []nodeKernel `json:"kernel"`           // read from each live node now
			}
			all, nets, err := c.networks(cmd.Context())
			if err != nil {
				return err
			}
			if people {
				for i, s := range svcs {
					if i > 0 {
						fmt.Fprintln(c.out)
					}
					if err := prettyService(c.out, s, nets); err != nil {
						return err
					}
				}
				return nil
			}
			js, err := each(svcs, func(s *shoalv1.Service) (full, error) {
				v, err := toServiceJSON(s, nets)
				if err != nil {
					return full{}, err
				}
				k, err := c.kernel(cmd.Context(), s.Id, nets)
				return full{v, nodeFaults(s.Faults), k}, err
			})
			if err != nil {
				return err
			}
			return inspected(c, cmd, js, func(i int) (object, error) { return dockerService(svcs[i], all) })
		}}
	c.inspectFlags(cmd)
	cmd.Flags().BoolVar(&people, "pretty", false, "for a person: the spec, how far an update is, and where it is reached")
	return cmd
}

func (c *cli) svcScale() *cobra.Command {
	var detach, quiet bool
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
				svc, err := c.api().UpdateService(cmd.Context(), &shoalv1.UpdateServiceRequest{Ref: ch.ref, Replicas: &ch.n})
				if err != nil {
					return err
				}
				fmt.Fprintf(c.out, "%s scaled to %d\n", ch.ref, ch.n)
				scaled = append(scaled, svc)
			}
			return c.convergeAll(cmd.Context(), scaled, detach, quiet)
		}}
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "don't wait until the replicas run")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "wait, but show no progress")
	return cmd
}

func (c *cli) svcRm() *cobra.Command {
	return &cobra.Command{Use: "rm SERVICE [SERVICE...]", Short: "Remove services", Aliases: []string{"remove"}, Args: atLeast(1),
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.forEach(args, func(ref string) error {
				return c.api().RemoveService(cmd.Context(), ref)
			})
		}}
}
