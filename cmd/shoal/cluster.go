package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/agent"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

func (c *cli) initCmd() *cobra.Command {
	req := &shoalv1.InitRequest{}
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a cluster, with this node as its first manager",
		Long: `Init makes a cluster, with this node as its first manager.

With --force-new-cluster it makes the cluster that this manager is in anew, from
what this manager has of its state: for when a majority of the managers is lost for
good. Services, networks, workers and join tokens stay, tasks run on. The other
managers count no more: what they show is refused, 'shoal node ls' lists them as
down, 'shoal node rm' removes them. One that comes back leaves, and can join again.
What the lost managers acknowledged in their last moments may be missing. The
managers' log of before is kept in raft.lost in the data directory.`,
		Example: `  shoal init
  shoal init --force-new-cluster     # on the manager that is left
  shoal init --advertise-addr 192.0.2.1
  shoal init --advertise-addr eth1 --default-addr-pool 10.20.0.0/16 --default-addr-pool-mask-length 26`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.ForceNewCluster {
				for _, f := range []string{"advertise-addr", "autolock", "default-addr-pool", "default-addr-pool-mask-length", "data-path-port"} {
					if cmd.Flags().Changed(f) {
						return usageError(cmd, fmt.Errorf("--%s can't be given with --force-new-cluster: the cluster stays as it is: %s", f, cmd.UseLine()))
					}
				}
			}
			resp, err := c.local().Init(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			n := resp.Msg.Node
			if req.ForceNewCluster {
				c.printRecovered(resp.Msg)
				return nil
			}
			fmt.Fprintf(c.out, "Cluster %s is made; this node (%s) is its manager.\n\nTo add a node, start its agent and run on it:\n\n    %s\n\nFor a further manager (three bear the loss of one) take the command that\n'shoal token show manager' prints.\n",
				resp.Msg.Cluster, n.Name, joinCommand(resp.Msg.WorkerToken, n))
			if k := resp.Msg.UnlockKey; k != "" {
				fmt.Fprintf(c.out, "\nThe managers' disks are sealed. After a start of its agent a manager asks for this\nkey ('shoal unlock'); keep it elsewhere than on their disks:\n\n    %s\n", k)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&req.ForceNewCluster, "force-new-cluster", false, "make this manager's cluster anew, without the other managers: they are lost for good")
	f.BoolVar(&req.Autolock, "autolock", false, "seal the managers' disks with a key that 'shoal unlock' asks for after a start")
	f.StringVar(&req.AdvertiseAddr, "advertise-addr", "", "address or interface that other nodes reach this one by (default: that of the default route)")
	f.StringSliceVar(&req.AddressPools, "default-addr-pool", nil, "pool that networks' subnets are cut from (default "+agent.DefaultPool+"; repeatable)")
	f.Int32Var(&req.SubnetSize, "default-addr-pool-mask-length", agent.DefaultSubnetSize, "prefix length of those subnets")
	f.Int32Var(&req.DataPathPort, "data-path-port", agent.DefaultDataPathPort, "UDP port of VXLAN, the same on every node")
	return cmd
}

// printRecovered tells what came of making a cluster anew.
func (c *cli) printRecovered(m *shoalv1.InitResponse) {
	fmt.Fprintf(c.out, "Cluster %s goes on, with this node (%s) as its only manager, as it was at index %d.\n", m.Cluster, m.Node.GetName(), m.Index)
	if len(m.Lost) > 0 {
		var names []string
		for _, n := range m.Lost {
			names = append(names, n.Name)
		}
		fmt.Fprintf(c.out, "Managers that count no more, whatever becomes of them: %s.\nRemove them with 'shoal node rm', and add managers by what 'shoal token show manager'\nprints: three bear the loss of one.\n", strings.Join(names, ", "))
	}
}

func hostPort(n *shoalv1.NodeInfo) string {
	host := n.Addr
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if n.ControlPort == agent.DefaultControlPort {
		return strings.Trim(host, "[]")
	}
	return fmt.Sprintf("%s:%d", host, n.ControlPort)
}

func (c *cli) joinCmd() *cobra.Command {
	req := &shoalv1.JoinRequest{}
	cmd := &cobra.Command{
		Use:   "join --token TOKEN HOST[:PORT]",
		Short: "Join this node to the cluster of a manager",
		Long: `Join makes this node a member of the cluster that the manager at HOST is in. The
token says that it may, and whether as a worker or as a manager; 'shoal token show
worker' (or manager) on a manager prints the whole command. The token also names
the cluster's root certificate: it is not sent to anyone else.`,
		Example: `  shoal join --token SHOAL-1-… 192.0.2.1
  shoal join --token SHOAL-1-… --advertise-addr 192.0.2.2 192.0.2.1:2377`,
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Remote = args[0]
			resp, err := c.local().Join(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			fmt.Fprintf(c.out, "This node (%s) joined cluster %s as a %s.\n", resp.Msg.Node.Name, resp.Msg.Cluster, resp.Msg.Node.Role)
			return nil
		},
	}
	cmd.Flags().StringVar(&req.AdvertiseAddr, "advertise-addr", "", "address or interface that other nodes reach this one by (default: that of the default route)")
	cmd.Flags().StringVar(&req.Token, "token", "", "join token, as 'shoal token show' prints it on a manager")
	cmd.Flags().StringVar(&req.Role, "role", "", "refuse a token that is for another role: manager or worker (default: whichever it is for)")
	_ = cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"manager", "worker"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (c *cli) leaveCmd() *cobra.Command {
	req := &shoalv1.LeaveRequest{}
	cmd := &cobra.Command{
		Use:   "leave",
		Short: "Leave the cluster, and remove all that Shoal made here",
		Args:  exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			done := c.progress("Leaving: draining and stopping this node's tasks")
			_, err := c.local().Leave(cmd.Context(), connect.NewRequest(req))
			done()
			if err != nil {
				return err
			}
			fmt.Fprintln(c.out, "This node left the cluster.")
			return nil
		},
	}
	cmd.Flags().BoolVarP(&req.Force, "force", "f", false, "also when it is the last manager, or no manager answers")
	return cmd
}

// doctorWait is how long doctor waits for the agent: it is asked where something hangs.
var doctorWait = 20 * time.Second

func (c *cli) doctorCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what is wrong on this node",
		Long: `Doctor checks this node's part of the cluster and lists every kernel object that
can't be brought into the state that is wanted. It exits with status 1 when it
finds an error.

paths: this node asks the others with which it shares a network for echoes over
VXLAN, all of them in turn. One that does not answer is named, with the port that
firewalls have to let pass; balancers prefer other nodes meanwhile.
drops: what the rules of the data path dropped or refused, by reason.`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), doctorWait)
			defer cancel()
			resp, err := c.local().Doctor(ctx, connect.NewRequest(&shoalv1.DoctorRequest{}))
			if ctx.Err() == context.DeadlineExceeded && err != nil {
				return fmt.Errorf("the agent at %s has not answered for %s: it hangs, or has too much to do. What it says is in 'journalctl -u shoal'; 'systemctl restart shoal' starts it anew, and what runs here goes on", c.socket, doctorWait)
			}
			if err != nil {
				return err
			}
			bad := false
			for _, ch := range resp.Msg.Checks {
				bad = bad || ch.Status == "error"
			}
			if c.output == "json" {
				checks, _ := each(resp.Msg.Checks, func(ch *shoalv1.DoctorResponse_Check) (map[string]string, error) {
					return map[string]string{"name": ch.Name, "status": ch.Status, "message": ch.Message, "hint": ch.Hint}, nil
				})
				objects, _ := each(resp.Msg.Objects, func(o *shoalv1.DoctorResponse_Object) (map[string]any, error) {
					return map[string]any{"reconciler": o.Reconciler, "object": o.Object, "phase": o.Phase, "op": o.Op, "since": instant(o.SinceMs), "error": o.Error, "tries": o.Tries}, nil
				})
				if err := c.json(map[string]any{"checks": checks, "objects": objects}); err != nil {
					return err
				}
			} else {
				for _, ch := range resp.Msg.Checks {
					fmt.Fprintf(c.out, "%-6s%-14s%s\n", ch.Status, ch.Name, ch.Message)
					if ch.Hint != "" {
						fmt.Fprintf(c.out, "%20s%s\n", "", ch.Hint)
					}
				}
				for _, o := range resp.Msg.Objects {
					if o.Phase == "error" || c.output == "wide" {
						fmt.Fprintf(c.out, "%-6s%s\n      %s, for %s\n", o.Phase, o.Object, o.Op, time.Since(time.UnixMilli(o.SinceMs)).Round(time.Second))
						if o.Error != "" {
							fmt.Fprintf(c.out, "      %s (tried %d times)\n", o.Error, o.Tries)
						}
					}
				}
			}
			if bad {
				return &exitError{code: 1}
			}
			return nil
		},
	}
	c.outputFlag(cmd, "json", "wide")
	return cmd
}

// progress shows on a terminal that something goes on; call what it returns
// when it is over.
func (c *cli) progress(what string) func() {
	if !c.terminal() {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		start := time.Now()
		for {
			fmt.Fprintf(c.err, "\r%s (%s) \033[K", what, time.Since(start).Round(time.Second))
			select {
			case <-ctx.Done():
				fmt.Fprint(c.err, "\r\033[K")
				return
			case <-time.After(time.Second):
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}
