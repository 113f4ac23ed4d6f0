package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/agent"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

// livingTask finds a task to act on where it runs. Of one that does not, the error ends
// with what to do instead, a text with its NAME.
func (c *cli) livingTask(ctx context.Context, ref, instead string) (*shoalv1.Task, error) {
	t, err := c.runningTask(ctx, ref)
	if err != nil {
		return nil, c.pointTo(ctx, ref, err, "its tasks are REPLICAS")
	}
	if t.Node == "" || ended(t) {
		return nil, fmt.Errorf("task %s does not run: it is %s%s", t.Name, t.GetStatus().GetState(), strings.ReplaceAll(instead, "NAME", t.Name))
	}
	return t, nil
}

func (c *cli) killCmd() *cobra.Command {
	var sig string
	cmd := &cobra.Command{Use: "kill [flags] TASK [TASK...]", Short: "Send a signal to tasks' programs", Args: atLeast(1),
		Long: `Kill sends a signal to the programs of tasks, on whichever nodes they are: SIGKILL,
or another. A replica of a service that ends by it is replaced.`,
		Example:           "  shoal kill c1\n  shoal kill -s HUP web.1",
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return c.forEach(args, func(ref string) error {
				t, err := c.livingTask(ctx, ref, "")
				if err != nil {
					return err
				}
				req := connect.NewRequest(&shoalv1.KillRequest{Task: t.Id, Signal: sig})
				req.Header().Set(agent.NodeHeader, t.Node)
				_, err = c.node().Kill(ctx, req)
				return older(err, "kill", t.Name)
			})
		}}
	cmd.Flags().StringVarP(&sig, "signal", "s", "KILL", "signal: a name, such as HUP, or a number")
	_ = cmd.RegisterFlagCompletionFunc("signal", signalNames)
	return cmd
}

// older says of a node that does not know a request that its version is older.
func older(err error, what, task string) error {
	if connect.CodeOf(err) == connect.CodeUnimplemented {
		return fmt.Errorf("%s of task %s: its node runs an older version of shoal, which can't: upgrade it", what, task)
	}
	return err
}

func (c *cli) topCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "top TASK [PS OPTIONS]", Short: "List the processes of a task", Args: atLeast(1),
		Long: `Top lists the processes of a task as ps(1) of its node does: with -ef, or with
other options, which have to give a column PID. The PIDs are the node's.`,
		Example:           "  shoal top c1\n  shoal top web.1 -o pid,rss,args",
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			t, err := c.livingTask(ctx, args[0], "")
			if err != nil {
				return err
			}
			req := connect.NewRequest(&shoalv1.TopRequest{Task: t.Id, Args: args[1:]})
			req.Header().Set(agent.NodeHeader, t.Node)
			resp, err := c.node().Top(ctx, req)
			if err != nil {
				return older(err, "top", t.Name)
			}
			if len(resp.Msg.Lines) < 2 {
				return fmt.Errorf("task %s has no process any more", t.Name)
			}
			fmt.Fprintln(c.out, strings.Join(resp.Msg.Lines, "\n"))
			return nil
		}}
	cmd.Flags().SetInterspersed(false) // what follows the task is ps's
	return cmd
}

func (c *cli) attachCmd() *cobra.Command {
	var noStdin bool
	proxy := true
	cmd := &cobra.Command{Use: "attach [flags] TASK", Short: "Connect to a running task's input, output and signals", Args: exactly(1),
		Long: `Attach shows what a task's program writes from now on, and passes on signals and,
where the task was made with -i, standard input; it ends, with the program's exit
status, when that ends. With --sig-proxy=false an interrupt ends attach only.`,
		Example:           "  shoal attach c1\n  shoal attach --sig-proxy=false --no-stdin web.1",
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			t, err := c.livingTask(ctx, args[0], ": see 'shoal logs NAME'")
			if err != nil {
				return err
			}
			start := &shoalv1.ExecRequest_Start{Task: t.Id, Attach: true, Stdin: t.Spec.Stdin && !noStdin, Tty: t.Spec.Tty}
			if start.Tty && start.Stdin {
				if in, err := c.ownTerminal(false); err != nil {
					return err
				} else if in == nil {
					return errors.New("the task has a terminal, and standard input is none: use --no-stdin")
				}
			}
			s, end, err := c.session(ctx, t.Node, start, proxy)
			if err != nil {
				return err
			}
			defer end()
			return untilStopped(ctx, s.attended(t))
		}}
	cmd.Flags().BoolVar(&noStdin, "no-stdin", false, "don't pass standard input on")
	cmd.Flags().BoolVar(&proxy, "sig-proxy", true, "pass signals on to the program")
	return cmd
}
