package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// createInto makes a task and writes its ID to a file, if there is to be one: before it
// is made it is known that this can be done.
func (c *cli) createInto(ctx context.Context, req *shoalv1.CreateTaskRequest, file string) (*shoalv1.Task, error) {
	if file == "" {
		return c.api().CreateTask(ctx, req)
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("--cidfile %s: the file is there already: another task's, perhaps: remove it, or name another", file)
	}
	if err != nil {
		return nil, fmt.Errorf("--cidfile: %w", err)
	}
	defer f.Close()
	t, err := c.api().CreateTask(ctx, req)
	if err != nil {
		_ = os.Remove(file)
		return nil, err
	}
	if _, err := f.WriteString(t.Id); err != nil {
		return nil, fmt.Errorf("--cidfile: task %s was made, and its ID is not in the file: %w", t.Id, err)
	}
	return t, nil
}

func (c *cli) runCmd() *cobra.Command {
	var tf taskFlags
	var detach, remove, stdin, tty, quiet bool
	proxy := true
	var restart, cidfile string
	var stopTimeout int
	var platform platformFlag
	var publishAll bool
	req := &shoalv1.CreateTaskRequest{}
	cmd := &cobra.Command{
		Use: "run [flags] IMAGE|-- [COMMAND] [ARG...]", Short: "Run a task on one node, this one by default", Args: cobra.ArbitraryArgs,
		Long: `Run starts a task of its own, of an image or, after --, of a program of the node,
outside of any service, on this node or the one
given with --node. In the foreground it shows the task's output as it is, passes
signals on, and exits with the task's exit status, 125 for a task that could not
be made, 126 for a command that can't be executed and 127 for one that is not
found; with -d it prints the task's ID once it runs.`,
		Example: `  shoal run --rm -it --network app debian bash
  shoal run -d --name c1 --network app -- sleep 3600
  shoal run --rm --network app -- curl -s http://web/
  shoal run -it --rm --network app -- bash`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			// Docker's status for what is not the program's.
			defer func() {
				var exit *exitError
				if err != nil && !errors.As(err, &exit) {
					err = &exitError{code: 125, err: err}
				}
			}()
			if len(args) == 0 {
				return usageError(cmd, fmt.Errorf("no image and no command: name an image, or a program after --, like: shoal run --network app -- sleep 60"))
			}
			if err := platform.parse(cmd); err != nil {
				return err
			}
			image, args := imageArgs(cmd, args)
			tf.stopGrace = time.Duration(stopTimeout) * time.Second
			if req.Spec, err = tf.spec(args); err != nil {
				return usageError(cmd, err)
			}
			tf.image.entrypointGiven = cmd.Flags().Changed("entrypoint")
			if err := c.setContainer(req.Spec, &tf.image, "run", image, args, false, tf.health.none); err != nil {
				return usageError(cmd, err)
			}
			req.Spec.Attach, req.Spec.Stdin, req.Spec.Tty, req.Spec.AutoRemove = !detach, stdin, tty, remove
			if req.Spec.Restart = restart; restart == spec.RestartNo {
				req.Spec.Restart = ""
			}
			if tty {
				req.Spec.Env = append([]string{"TERM=" + cmp.Or(os.Getenv("TERM"), "xterm")}, req.Spec.Env...)
			}
			if !detach && tty {
				if _, err := c.ownTerminal(stdin); err != nil {
					return err
				}
			}
			if req.Networks, err = tf.attachments(); err != nil {
				return usageError(cmd, err)
			}
			ports, err := client.ParsePublishes(tf.publish, spec.PortHost)
			if err != nil {
				return usageError(cmd, err)
			}
			req.Ports = api.Ports(ports)
			if req.Name == "" && len(tf.links) > 0 {
				req.Name = "task-" + spec.NewID()[:6]
			}
			if err := c.api().Link(cmd.Context(), req.Spec, req.Name, req.Networks); err != nil {
				return err
			}
			if req.Node == "" {
				if req.Node, err = c.self(cmd.Context()); err != nil {
					return err
				}
			}
			if err := platform.check(cmd.Context(), c, req.Node); err != nil {
				return err
			}
			if publishAll {
				more, err := c.exposed(cmd.Context(), req, tf.expose)
				if err != nil {
					return err
				}
				req.Ports = append(req.Ports, more...)
			}
			t, err := c.createInto(cmd.Context(), req, cidfile)
			if err != nil {
				return err
			}
			if detach {
				return c.awaitRunning(cmd.Context(), t, func() { fmt.Fprintln(c.out, t.Id) })
			}
			return c.attend(cmd.Context(), t, t.Spec.Stdin, proxy)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&detach, "detach", "d", false, "leave it running and print its ID")
	f.StringVar(&restart, "restart", spec.RestartNo, "whether its node starts it again when it has ended: no, on-failure[:ATTEMPTS], always or unless-stopped")
	f.BoolVar(&remove, "rm", false, "remove it, and its output, when it has ended")
	f.BoolVarP(&stdin, "interactive", "i", false, "pass standard input on")
	f.BoolVarP(&tty, "tty", "t", false, "give the program a terminal")
	f.StringVar(&cidfile, "cidfile", "", "write the task's ID to this file, which must not exist")
	f.BoolVar(&proxy, "sig-proxy", true, "in the foreground, pass signals on to the program")
	f.BoolVarP(&quiet, "quiet", "q", false, "say nothing of pulling the image, as is so anyway")
	_ = f.MarkHidden("quiet")
	f.StringVar(&req.Name, "name", "", "name of the task, and its host name on its networks")
	f.StringVar(&req.Node, "node", "", "node to run it on, by name or ID (default: this one)")
	f.StringArrayVarP(&tf.publish, "publish", "p", nil, "port of this node that leads to the task: TARGET, PUBLISHED:TARGET or ADDRESS:PUBLISHED:TARGET, with /PROTOCOL (repeatable)")
	f.StringVar(&tf.ip, "ip", "", "address on the first network (default: a free one)")
	f.IntVar(&stopTimeout, "stop-timeout", int(spec.DefaultStopGrace/time.Second), "seconds between the stop signal and the kill")
	f.BoolVarP(&publishAll, "publish-all", "P", false, "publish each port that the image exposes, and each of --expose, at a free port of this node")
	platform.add(f)
	tf.add(f, "h")
	tf.image.add(f, false)
	tf.resources.add(f, false)
	f.Bool("help", false, "help for run") // -h is Docker's for --hostname
	_ = cmd.RegisterFlagCompletionFunc("network", c.complete(c.networkNames))
	_ = cmd.RegisterFlagCompletionFunc("node", c.complete(c.nodeNames))
	_ = cmd.RegisterFlagCompletionFunc("restart", cobra.FixedCompletions([]string{spec.RestartNo, spec.RestartOnFailure, spec.RestartAlways, spec.RestartUnlessStopped}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// awaitRunning waits until a task's run is there, and has that said.
func (c *cli) awaitRunning(ctx context.Context, t *shoalv1.Task, runs func()) error {
	id, run := t.Id, t.Run
	var since time.Time // since when its program runs and is not healthy yet
	watch := c.api().Watch(&shoalv1.WatchRequest{Tasks: []string{id}})
	defer watch.Close()
	for {
		now, err := watch.Next(ctx)
		if client.Away(err) && sleep.For(ctx, 200*time.Millisecond) {
			continue // the managers will answer again
		}
		switch ts := now.GetTasks(); {
		case err != nil:
			return err
		case len(ts) > 0:
			t = ts[0]
		case t.Spec.GetAutoRemove():
			runs() // it has run, and is gone already
			return nil
		default:
			return fmt.Errorf("task %s was removed meanwhile", t.Name)
		}
		st, err := spec.ParseTaskState(t.GetStatus().GetState())
		if err != nil {
			return err
		}
		if t.GetStatus().GetRun() < run {
			continue // the one before ends
		}
		if st == spec.TaskFailed && t.GetSpec().GetRestart() != "" && strings.HasPrefix(t.GetStatus().GetMessage(), "exit status ") {
			runs() // it has run, as often as its policy has it
			return nil
		}
		if st.Ended() && st != spec.TaskComplete {
			failed := c.taskFailed(t)
			if t.Spec.GetAutoRemove() {
				return errors.Join(failed, c.removeTask(ctx, id))
			}
			return failed
		}
		if t.GetSpec().GetRestart() != "" && st == spec.TaskPreparing && strings.Contains(t.GetStatus().GetMessage(), "; restart ") {
			runs() // it has run
			return nil
		}
		if st == spec.TaskStarting && since.IsZero() {
			since = time.Now()
		}
		if why := unhealthy(t, since, time.Now()); why != "" {
			// It is there, and goes on: see the health checks of tasks.
			runs()
			return fmt.Errorf("task %s runs, but is not healthy: %s: see 'shoal logs %s'; 'shoal rm -f %s' ends it", t.Name, why, t.Name, t.Name)
		}
		if st >= spec.TaskRunning {
			runs()
			c.warn(t.Faults)
			return nil
		}
	}
}

// healthSlack is how long after its time a first success of a health check is waited for.
const healthSlack = 10 * time.Second

// unhealthy tells why a starting task is given up on: its node says that its health
// check fails, or there was time enough for it to succeed.
func unhealthy(t *shoalv1.Task, since, now time.Time) string {
	msg := t.GetStatus().GetMessage()
	if t.GetStatus().GetState() != spec.TaskStarting.String() {
		return ""
	}
	if why, ok := strings.CutPrefix(msg, spec.Unhealthy); ok {
		return why
	}
	h := api.ToHealthCheck(t.GetSpec().GetHealth())
	if h == nil || h.Disabled || since.IsZero() {
		return ""
	}
	if bound := h.Patience() + h.WithDefaults().Timeout + healthSlack; now.Sub(since) > bound {
		return cmp.Or(msg, "its health check has not succeeded in "+bound.String())
	}
	return ""
}

// removeTask makes the managers forget a task; that they have is no error.
func (c *cli) removeTask(ctx context.Context, id string) error {
	err := c.api().StopTask(context.WithoutCancel(ctx), &shoalv1.StopTaskRequest{Ref: id, Remove: true})
	if connect.CodeOf(err) == connect.CodeNotFound {
		return nil
	}
	return err
}

// taskFailed reports a task that could not run. 125 is Docker's status for that.
func (c *cli) taskFailed(t *shoalv1.Task) error {
	code := cmp.Or(int(t.GetStatus().GetExitCode()), 125)
	if t.GetSpec().GetAutoRemove() {
		return &exitError{code: code, err: fmt.Errorf("task %s %s: %s", t.Name, t.GetStatus().GetState(), t.GetStatus().GetMessage())}
	}
	return &exitError{code: code, err: fmt.Errorf("task %s %s: %s: see 'shoal logs %s'; 'shoal rm %s' frees its name", t.Name, t.GetStatus().GetState(), t.GetStatus().GetMessage(), t.Name, t.Name)}
}

func (c *cli) psCmd() *cobra.Command {
	req := &shoalv1.ListTasksRequest{}
	l := c.taskListing()
	cmd := &cobra.Command{Use: "ps", Short: "List tasks, of all nodes", Args: exactly(0),
		Example: "  shoal ps --filter node=node2 --filter state=running\n  shoal ps -a --format '{{.Name}} {{.State}}'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			tasks, err := c.tasks(cmd.Context(), req)
			if err != nil {
				return err
			}
			return l.show(cmd, tasks)
		}}
	cmd.Flags().BoolVarP(&req.All, "all", "a", false, "also those that have ended")
	cmd.Flags().StringVar(&req.Node, "node", "", "only those of one node")
	_ = cmd.RegisterFlagCompletionFunc("node", c.complete(c.nodeNames))
	l.add(c, cmd)
	return cmd
}

func (c *cli) stopCmd() *cobra.Command {
	var how stopFlags
	cmd := &cobra.Command{Use: "stop [flags] TASK [TASK...]", Short: "Stop tasks made with shoal run", Args: atLeast(1),
		Long: `Stop sends tasks their stop signal, and kills what has not ended by it in time. They
are kept, with their output, and 'shoal start' runs them again.`,
		Example:           "  shoal stop c1\n  shoal stop -t 60 -s INT c1",
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := how.stopping(cmd)
			if err != nil {
				return err
			}
			return c.endTasks(cmd.Context(), args, false, s)
		}}
	how.add(cmd)
	return cmd
}

func (c *cli) rmCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{Use: "rm TASK [TASK...]", Short: "Remove tasks made with shoal run", Aliases: []string{"remove"}, Args: atLeast(1),
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !force {
				for _, a := range args {
					t, err := c.task(cmd.Context(), a)
					if err != nil {
						return c.pointTo(cmd.Context(), a, err, "use 'shoal svc rm NAME'")
					}
					if !ended(t) && t.Service == "" {
						return fmt.Errorf("task %s is %s: run 'shoal stop %s' first, or 'shoal rm -f %s'", t.Name, t.GetStatus().GetState(), a, a)
					}
				}
			}
			return c.endTasks(cmd.Context(), args, true, nil)
		}}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "stop those that run")
	return cmd
}

// endTasks asks for the end of tasks, and waits for it.
func (c *cli) endTasks(ctx context.Context, refs []string, remove bool, how *shoalv1.Stopping) error {
	return c.forEach(refs, func(ref string) error {
		t, err := c.task(ctx, ref)
		if err != nil {
			how := "use 'shoal svc scale NAME=0', or 'shoal svc rm NAME'"
			if remove {
				how = "use 'shoal svc rm NAME'"
			}
			return c.pointTo(ctx, ref, err, how)
		}
		if t.Service != "" {
			return fmt.Errorf("task %s is a replica of a service, which would replace it: use 'shoal svc scale' or 'shoal svc rm'", t.Name)
		}
		if err := c.api().StopTask(ctx, &shoalv1.StopTaskRequest{Ref: t.Id, Remove: remove, Stopping: how}); err != nil {
			return err
		}
		done := c.progress("Stopping " + t.Name)
		defer done()
		grace := time.Duration(t.GetSpec().GetStopGraceMs()) * time.Millisecond
		if how != nil && how.GraceNs != nil {
			grace = time.Duration(how.GetGraceNs())
		}
		limit := time.Now().Add(grace + 20*time.Second)
		watch := c.api().Watch(&shoalv1.WatchRequest{Tasks: []string{t.Id}})
		defer watch.Close()
		for grace < 0 || time.Now().Before(limit) {
			now, err := watch.Next(ctx)
			if client.Away(err) && sleep.For(ctx, 200*time.Millisecond) {
				continue // the managers will answer again
			}
			if err != nil {
				return err
			}
			if ts := now.GetTasks(); len(ts) == 0 || !remove && ended(ts[0]) {
				return nil
			}
		}
		return fmt.Errorf("task %s was asked to stop, but its node has not confirmed it: see 'shoal ps -a'", t.Name)
	})
}

// pointTo makes of the error that no task has a name what to do instead, if a
// service has it: a text with its NAME and its REPLICAS.
func (c *cli) pointTo(ctx context.Context, ref string, err error, how string) error {
	svcs, serr := c.services(ctx, ref)
	if serr != nil || len(svcs) != 1 {
		return err
	}
	name, replicas := svcs[0].GetSpec().GetName(), "none is there, see 'shoal svc ps "+svcs[0].GetSpec().GetName()+"'"
	if ts, terr := c.tasks(ctx, &shoalv1.ListTasksRequest{Service: svcs[0].Id}); terr == nil && len(ts) > 0 {
		var slots []string
		for _, t := range ts {
			if s := fmt.Sprintf("%s.%d", name, t.Slot); !slices.Contains(slots, s) && len(slots) < 5 {
				slots = append(slots, s)
			}
		}
		replicas = strings.Join(slots, ", ")
	}
	return fmt.Errorf("%s is a service, not a task: %s", name, strings.NewReplacer("NAME", name, "REPLICAS", replicas).Replace(how))
}

func (c *cli) execCmd() *cobra.Command {
	start := &shoalv1.ExecRequest_Start{}
	var env taskFlags
	cmd := &cobra.Command{
		Use: "exec [flags] TASK COMMAND [ARG...]", Short: "Run a command inside a running task", Args: cobra.ArbitraryArgs,
		Long: `Exec runs a command in a task's namespaces, on whichever node it is, and exits
with the command's exit status: 126 when it can't be executed, 127 when it is
not found. SERVICE.SLOT names a replica, such as web.1. With -d it exits as soon
as the command is started, which runs on until it or the task ends.`,
		Example: `  shoal exec c1 ip route
  shoal exec -it web.1 bash
  shoal exec -d c1 tcpdump -i eth0 -w /tmp/c1.pcap
  tar -c . | shoal exec -i c1 tar -x -C /tmp`,
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 && args[1] == "--" {
				args = append(args[:1:1], args[2:]...)
			}
			if len(args) < 2 {
				return usageError(cmd, fmt.Errorf("exec takes a task and a command, like: shoal exec c1 ip addr"))
			}
			if start.Detach && (start.Stdin || start.Tty) {
				return usageError(cmd, fmt.Errorf("exec -d leaves the command without input and terminal: leave -i and -t out"))
			}
			t, err := c.runningTask(cmd.Context(), args[0])
			if err != nil {
				return c.pointTo(cmd.Context(), args[0], err, "name one of its replicas: REPLICAS")
			}
			if ended(t) {
				return fmt.Errorf("task %s is %s: exec needs one that runs", t.Name, t.GetStatus().GetState())
			}
			ts, err := env.spec(args[1:])
			if err != nil {
				return usageError(cmd, err)
			}
			start.Task, start.Command, start.Env, start.Dir, start.User = t.Id, ts.Command, ts.Env, spec.Text(start.Dir), spec.Text(start.User)
			err = c.exec(cmd.Context(), t.Node, start)
			var lost *lostError
			if errors.As(err, &lost) {
				if start.Detach {
					return fmt.Errorf("%w: whether the command was started is not known", lost)
				}
				return fmt.Errorf("%w, and the command with it, which is ended: when the agent is back, run it again: shoal %s", lost, quoted(os.Args[1:]))
			}
			return err
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&start.Detach, "detach", "d", false, "don't wait for the command; it has no input and output")
	f.BoolVarP(&start.Stdin, "interactive", "i", false, "pass standard input on")
	f.BoolVarP(&start.Tty, "tty", "t", false, "give the command a terminal")
	f.StringArrayVarP(&env.env, "env", "e", nil, "further environment variable, KEY=value, or KEY to pass this shell's on (repeatable)")
	f.StringArrayVar(&env.envFile, "env-file", nil, "file of environment variables, one KEY=value a line")
	f.StringVarP(&start.Dir, "workdir", "w", "", "working directory")
	f.StringVarP(&start.User, "user", "u", "", "user or uid, and group: NAME[:GROUP]")
	return cmd
}
