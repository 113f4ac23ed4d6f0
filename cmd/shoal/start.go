package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/spf13/cobra"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// stopFlags say how tasks are to be stopped, other than they say themselves.
type stopFlags struct {
	seconds int
	signal  string
}

func (s *stopFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.IntVarP(&s.seconds, "timeout", "t", 0, "seconds between the stop signal and the kill; -1: wait for ever (default: the task's --stop-timeout)")
	f.IntVar(&s.seconds, "time", 0, "the same as --timeout")
	_ = f.MarkHidden("time")
	f.StringVarP(&s.signal, "signal", "s", "", "stop signal: a name, such as INT, or a number (default: the task's --stop-signal)")
	_ = cmd.RegisterFlagCompletionFunc("signal", signalNames)
}

var signalNames = cobra.FixedCompletions([]string{"HUP", "INT", "QUIT", "KILL", "USR1", "USR2", "TERM", "STOP", "CONT"}, cobra.ShellCompDirectiveNoFileComp)

// stopping is what the flags say; nil where nothing is said.
func (s *stopFlags) stopping(cmd *cobra.Command) (*shoalv1.Stopping, error) {
	timed := cmd.Flags().Changed("timeout") || cmd.Flags().Changed("time")
	if !timed && s.signal == "" {
		return nil, nil
	}
	if _, err := spec.ParseSignal(s.signal); err != nil {
		return nil, usageError(cmd, err)
	}
	out := &shoalv1.Stopping{Signal: s.signal}
	if timed {
		if s.seconds < -1 || s.seconds > math.MaxInt32 {
			return nil, usageError(cmd, fmt.Errorf("--timeout %d is out of range: use seconds, or -1 to wait for ever", s.seconds))
		}
		ns := (time.Duration(s.seconds) * time.Second).Nanoseconds()
		out.GraceNs = &ns
	}
	return out, nil
}

// ownTask finds a task of its own, by its name or ID. Of a service, or a replica of one,
// the error says what to do instead: a text with its NAME.
func (c *cli) ownTask(ctx context.Context, ref, instead string) (*shoalv1.Task, error) {
	t, err := c.task(ctx, ref)
	if err != nil {
		return nil, c.pointTo(ctx, ref, err, instead)
	}
	if t.Service != "" {
		return nil, c.pointTo(ctx, t.Service, fmt.Errorf("task %s is a replica of a service", t.Name), instead)
	}
	return t, nil
}

const startsService = "the service starts its replicas: use 'shoal svc update --force NAME' for new ones, 'shoal svc scale NAME=REPLICAS' for more"

func (c *cli) startCmd() *cobra.Command {
	var attach, stdin bool
	proxy := true
	cmd := &cobra.Command{Use: "start [flags] TASK [TASK...]", Short: "Start tasks again that have ended", Args: atLeast(1),
		Long: `Start runs tasks again, made with shoal run, that were stopped or have ended. They keep
their ID, name and output, and their addresses unless others have these by now (what
--ip asked for is not exchanged). What was changed in an image's files is gone: what is
to stay belongs into a volume. One that runs is left as it is.

With -a it shows a task's output, passes signals on, and exits with the program's exit
status, as run does; with -i, also standard input, if the task was made with -i.`,
		Example:           "  shoal start c1\n  shoal start -ai shell",
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			attach = attach || stdin
			if attach && len(args) > 1 {
				return usageError(cmd, errors.New("you cannot start and attach multiple tasks at once"))
			}
			if !attach {
				return c.forEach(args, func(ref string) error {
					t, err := c.startTask(ctx, ref, &shoalv1.StartTaskRequest{})
					if err != nil {
						return err
					}
					return c.awaitRunning(ctx, t, func() {})
				})
			}
			t, err := c.ownTask(ctx, args[0], startsService)
			if err != nil {
				return err
			}
			if !ended(t) {
				return fmt.Errorf("task %s is %s: use 'shoal attach %s'", t.Name, t.GetStatus().GetState(), t.Name)
			}
			if t.Spec.Tty {
				if _, err := c.ownTerminal(stdin && t.Spec.Stdin); err != nil {
					return err
				}
			}
			if t, err = c.startTask(ctx, t.Id, &shoalv1.StartTaskRequest{Attach: true}); err != nil {
				return err
			}
			return c.attend(ctx, t, stdin && t.Spec.Stdin, proxy)
		}}
	cmd.Flags().BoolVarP(&attach, "attach", "a", false, "show its output, and pass signals on")
	cmd.Flags().BoolVarP(&stdin, "interactive", "i", false, "pass standard input on, too")
	cmd.Flags().BoolVar(&proxy, "sig-proxy", true, "with -a, pass signals on to the program")
	return cmd
}

// startTask asks for the next run of a task.
func (c *cli) startTask(ctx context.Context, ref string, req *shoalv1.StartTaskRequest) (*shoalv1.Task, error) {
	t, err := c.ownTask(ctx, ref, startsService)
	if err != nil {
		return nil, err
	}
	req.Ref, req.Run = t.Id, t.Run+1
	return c.api().StartTask(ctx, req)
}

func (c *cli) restartCmd() *cobra.Command {
	var how stopFlags
	cmd := &cobra.Command{Use: "restart [flags] TASK [TASK...]", Short: "Stop tasks and start them again", Args: atLeast(1),
		Long: `Restart stops tasks made with shoal run as stop does, and starts them again as start
does; those that have ended are started.`,
		Example:           "  shoal restart c1\n  shoal restart -t 3 -s INT c1",
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := how.stopping(cmd)
			if err != nil {
				return err
			}
			return c.forEach(args, func(ref string) error {
				t, err := c.startTask(cmd.Context(), ref, &shoalv1.StartTaskRequest{Restart: true, Stopping: s})
				if err != nil {
					return err
				}
				return c.awaitRunning(cmd.Context(), t, func() {})
			})
		}}
	how.add(cmd)
	return cmd
}

func (c *cli) renameCmd() *cobra.Command {
	return &cobra.Command{Use: "rename TASK NAME", Short: "Give a task made with shoal run another name", Args: exactly(2),
		Long: `Rename gives a task another name, at once also on its networks. The host name that its
program sees changes at its next start.`,
		Example:           "  shoal rename c1 db",
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := c.ownTask(cmd.Context(), args[0], "its replicas are named after it, and it keeps its name: make another with 'shoal svc create'")
			if err != nil {
				return err
			}
			return c.api().RenameTask(cmd.Context(), t.Id, args[1])
		}}
}
