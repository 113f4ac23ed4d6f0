package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/shoalnet/shoal/agent"
	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/spec"
)

func (c *cli) runCmd() *cobra.Command {
	var tf taskFlags
	var detach, remove, stdin, tty bool
	var stopTimeout int
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
			resp, err := c.control().CreateTask(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			if detach {
				return c.awaitRunning(cmd.Context(), resp.Msg.Task)
			}
			return c.attend(cmd.Context(), resp.Msg.Task)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&detach, "detach", "d", false, "leave it running and print its ID")
	f.BoolVar(&remove, "rm", false, "remove it, and its output, when it has ended")
	f.BoolVarP(&stdin, "interactive", "i", false, "pass standard input on")
	f.BoolVarP(&tty, "tty", "t", false, "give the program a terminal")
	f.StringVar(&req.Name, "name", "", "name of the task, and its host name on its networks")
	f.StringVar(&req.Node, "node", "", "node to run it on, by name or ID (default: this one)")
	f.StringArrayVarP(&tf.publish, "publish", "p", nil, "port of this node that leads to the task: TARGET, PUBLISHED:TARGET or ADDRESS:PUBLISHED:TARGET, with /PROTOCOL (repeatable)")
	f.StringVar(&tf.ip, "ip", "", "address on the first network (default: a free one)")
	f.IntVar(&stopTimeout, "stop-timeout", int(spec.DefaultStopGrace/time.Second), "seconds between the stop signal and the kill")
	tf.add(f, "h")
	tf.image.add(f, false)
	tf.resources.add(f, false)
	f.Bool("help", false, "help for run") // -h is Docker's for --hostname
	_ = cmd.RegisterFlagCompletionFunc("network", c.complete(c.networkNames))
	_ = cmd.RegisterFlagCompletionFunc("node", c.complete(c.nodeNames))
	return cmd
}

// awaitRunning waits until a new task runs, and prints its ID.
func (c *cli) awaitRunning(ctx context.Context, t *shoalv1.Task) error {
	id := t.Id
	for {
		ts, err := c.tasks(ctx, &shoalv1.ListTasksRequest{Refs: []string{id}, All: true})
		if connect.CodeOf(err) == connect.CodeNotFound && err != nil && t.Spec.GetAutoRemove() {
			fmt.Fprintln(c.out, id) // it has run, and is gone already
			return nil
		}
		if err != nil {
			return err
		}
		if len(ts) == 1 {
			t = ts[0]
		}
		st, err := spec.ParseTaskState(t.GetStatus().GetState())
		if err != nil {
			return err
		}
		if st.Ended() && st != spec.TaskComplete {
			failed := c.taskFailed(t)
			if t.Spec.GetAutoRemove() {
				return errors.Join(failed, c.removeTask(ctx, id))
			}
			return failed
		}
		if st >= spec.TaskRunning {
			fmt.Fprintln(c.out, id)
			c.warn(t.Faults)
			return nil
		}
		if !sleep(ctx, 20*time.Millisecond) {
			return ctx.Err()
		}
	}
}

// attend is the foreground of a new task: its input, output and exit status.
func (c *cli) attend(ctx context.Context, t *shoalv1.Task) error {
	err := c.exec(ctx, t.Node, &shoalv1.ExecRequest_Start{Task: t.Id, Attach: true, Stdin: t.Spec.Stdin, Tty: t.Spec.Tty})
	var exit *exitError
	if err != nil && !errors.As(err, &exit) {
		if connect.CodeOf(err) != connect.CodeFailedPrecondition {
			return fmt.Errorf("%s: task %s may go on: see 'shoal ps -a'", message(err), t.Name)
		}
		exit = &exitError{code: 125, err: err}
		var failed *connect.Error
		if errors.As(err, &failed) {
			if n, aerr := strconv.Atoi(failed.Meta().Get(agent.ExitHeader)); aerr == nil && n != 0 {
				exit.code = n
			}
		}
		err = exit
	}
	// Its name and its addresses are free when this returns.
	if t.Spec.AutoRemove {
		_ = c.removeTask(ctx, t.Id)
	}
	for limit := time.Now().Add(5 * time.Second); time.Now().Before(limit); {
		ts, lerr := c.tasks(context.WithoutCancel(ctx), &shoalv1.ListTasksRequest{Refs: []string{t.Id}, All: true})
		if lerr != nil || len(ts) == 0 || !t.Spec.AutoRemove && ended(ts[0]) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// removeTask makes the managers forget a task; that they have is no error.
func (c *cli) removeTask(ctx context.Context, id string) error {
	_, err := c.control().StopTask(context.WithoutCancel(ctx), connect.NewRequest(&shoalv1.StopTaskRequest{Ref: id, Remove: true}))
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

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
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
	return &cobra.Command{Use: "stop TASK [TASK...]", Short: "Stop tasks made with shoal run", Args: atLeast(1),
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.endTasks(cmd.Context(), args, false)
		}}
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
			return c.endTasks(cmd.Context(), args, true)
		}}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "stop those that run")
	return cmd
}

// endTasks asks for the end of tasks, and waits for it.
func (c *cli) endTasks(ctx context.Context, refs []string, remove bool) error {
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
		if _, err := c.control().StopTask(ctx, connect.NewRequest(&shoalv1.StopTaskRequest{Ref: t.Id, Remove: remove})); err != nil {
			return err
		}
		done := c.progress("Stopping " + t.Name)
		defer done()
		limit := time.Now().Add(time.Duration(t.GetSpec().GetStopGraceMs())*time.Millisecond + 20*time.Second)
		for time.Now().Before(limit) {
			ts, err := c.tasks(ctx, &shoalv1.ListTasksRequest{Refs: []string{t.Id}, All: true})
			if connect.CodeOf(err) == connect.CodeNotFound && err != nil {
				return nil
			}
			if err != nil {
				return err
			}
			if len(ts) == 0 || (!remove && ended(ts[0])) {
				return nil
			}
			if !sleep(ctx, 30*time.Millisecond) {
				return ctx.Err()
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
			return c.exec(cmd.Context(), t.Node, start)
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

// ownTerminal is standard input if it is a terminal; needed tells that it must
// be.
func (c *cli) ownTerminal(needed bool) (*os.File, error) {
	in, ok := c.in.(*os.File)
	if ok && term.IsTerminal(int(in.Fd())) {
		return in, nil
	}
	if needed {
		return nil, fmt.Errorf("-t needs a terminal, and standard input is none: leave -t out")
	}
	return nil, nil
}

// exec runs one command over the Node API, or attaches to a task's program.
func (c *cli) exec(ctx context.Context, node string, start *shoalv1.ExecRequest_Start) error {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // signals are the command's
	defer cancel()
	in, err := c.ownTerminal(start.Stdin && start.Tty)
	if err != nil {
		return err
	}
	if start.Tty {
		if start.Stdin && in != nil {
			old, err := term.MakeRaw(int(in.Fd()))
			if err != nil {
				return err
			}
			defer func() { _ = term.Restore(int(in.Fd()), old) }()
			if w, h, err := term.GetSize(int(in.Fd())); err == nil {
				start.Rows, start.Cols = int32(h), int32(w)
			}
		} else if in != nil {
			if w, h, err := term.GetSize(int(in.Fd())); err == nil {
				start.Rows, start.Cols = int32(h), int32(w)
			}
		}
		start.Env = append([]string{"TERM=" + cmp.Or(os.Getenv("TERM"), "xterm")}, start.Env...)
	}
	stream := c.node().Exec(ctx)
	stream.RequestHeader().Set(agent.NodeHeader, node)
	var sendMu sync.Mutex
	send := func(r *shoalv1.ExecRequest) error {
		sendMu.Lock()
		defer sendMu.Unlock()
		return stream.Send(r)
	}
	if err := send(&shoalv1.ExecRequest{Msg: &shoalv1.ExecRequest_Start_{Start: start}}); err != nil && !errors.Is(err, io.EOF) {
		return c.api().Explain(err)
	}
	if start.Stdin {
		go func() { // ends with the process: a read of standard input can't be cut short
			buf := make([]byte, 32<<10)
			for {
				n, err := c.in.Read(buf)
				if n > 0 {
					if send(&shoalv1.ExecRequest{Msg: &shoalv1.ExecRequest_Stdin{Stdin: buf[:n]}}) != nil {
						return
					}
				}
				if err != nil {
					_ = send(&shoalv1.ExecRequest{Msg: &shoalv1.ExecRequest_StdinEof{StdinEof: true}})
					return
				}
			}
		}()
	}
	sigs := make(chan os.Signal, 8)
	signal.Notify(sigs, syscall.SIGINT, syscall.SIGTERM, syscall.SIGWINCH)
	if start.Attach {
		signal.Notify(sigs, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	}
	defer signal.Stop(sigs)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case s := <-sigs:
				if s == syscall.SIGWINCH {
					if in != nil && start.Tty {
						if w, h, err := term.GetSize(int(in.Fd())); err == nil {
							_ = send(&shoalv1.ExecRequest{Msg: &shoalv1.ExecRequest_Resize_{Resize: &shoalv1.ExecRequest_Resize{Rows: int32(h), Cols: int32(w)}}})
						}
					}
					continue
				}
				_ = send(&shoalv1.ExecRequest{Msg: &shoalv1.ExecRequest_Signal{Signal: int32(s.(syscall.Signal))}})
			}
		}
	}()
	for {
		msg, err := stream.Receive()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return fmt.Errorf("the node ended the command without an exit status")
			}
			if m := message(err); start.Attach {
				return c.api().Explain(err)
			} else if strings.Contains(m, "executable file not found") || strings.Contains(m, "no such file") {
				return &exitError{code: 127, err: err}
			} else if strings.Contains(m, "permission denied") {
				return &exitError{code: 126, err: err}
			}
			return c.api().Explain(err)
		}
		switch v := msg.Msg.(type) {
		case *shoalv1.ExecResponse_Stdout:
			if _, err := c.out.Write(v.Stdout); err != nil {
				return err
			}
		case *shoalv1.ExecResponse_Stderr:
			if _, err := c.err.Write(v.Stderr); err != nil {
				return err
			}
		case *shoalv1.ExecResponse_ExitCode:
			if v.ExitCode != 0 {
				return &exitError{code: int(v.ExitCode)}
			}
			return nil
		}
	}
}
