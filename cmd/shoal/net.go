package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

func (c *cli) netCmd() *cobra.Command {
	return group("net", "Manage networks", []string{"network"}, c.netCreate(), c.netLs(), c.netInspect(), c.netConnect(), c.netDisconnect(), c.netRm(), c.netPrune())
}

func (c *cli) netCreate() *cobra.Command {
	req := &shoalv1.CreateNetworkRequest{}
	var opts, lbls []string
	cmd := &cobra.Command{
		Use: "create NETWORK", Short: "Create a network", Args: exactly(1),
		Example: `  shoal net create app
  shoal net create --subnet 10.9.0.0/24 --gateway 10.9.0.254 app
  shoal net create --subnet 10.9.0.0/24 --subnet 10.10.0.0/24 --ip-range 10.9.0.128/25 app
  shoal net create --internal --label tier=data backend
  shoal net create --driver bridge --opt mtu=1400 --opt icc=false here`,
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name = args[0]
			var err error
			if req.Labels, err = labels(lbls); err != nil {
				return usageError(cmd, err)
			}
			for _, o := range opts {
				k, v, ok := strings.Cut(o, "=")
				if !ok {
					return usageError(cmd, fmt.Errorf("option %q: want key=value, like mtu=1400", o))
				}
				if req.Options == nil {
					req.Options = map[string]string{}
				}
				req.Options[k] = v
			}
			if err := spec.ValidateOptions(req.Options); err != nil {
				return usageError(cmd, err)
			}
			if req.Driver == spec.DriverBridge && req.Node == "" {
				var err error
				if req.Node, err = c.self(cmd.Context()); err != nil {
					return err
				}
			}
			made, err := c.api().CreateNetwork(cmd.Context(), req)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.out, made.Id)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&req.Driver, "driver", "d", spec.DriverOverlay, "overlay, or bridge: on one node only")
	f.StringVar(&req.Node, "node", "", "the node of a bridge network (default: this one)")
	f.StringSliceVar(&req.Subnets, "subnet", nil, "subnet, like 10.9.0.0/24 (default: the next of the pool; repeatable)")
	f.StringSliceVar(&req.Gateways, "gateway", nil, "gateway address, one per subnet (default: the subnet's first)")
	f.StringSliceVar(&req.IpRanges, "ip-range", nil, "allocate addresses only from this part of the subnet")
	f.BoolVar(&req.Internal, "internal", false, "no way out of the network")
	f.StringArrayVarP(&opts, "opt", "o", nil, "driver option: mtu=BYTES (0: the underlay's less the overhead), icc=false (tasks can't reach each other)")
	f.StringArrayVar(&lbls, "label", nil, "label, key=value (repeatable)")
	f.Bool("attachable", true, "accepted for Docker's sake: every network is")
	_ = f.MarkHidden("attachable")
	_ = cmd.RegisterFlagCompletionFunc("driver", cobra.FixedCompletions([]string{spec.DriverOverlay, spec.DriverBridge}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("node", c.complete(c.nodeNames))
	return cmd
}

func (c *cli) netLs() *cobra.Command {
	type network = *shoalv1.Network
	l := &listing[network]{
		id:     func(n network) string { return n.Id },
		json:   func(n network) (any, error) { return toNetworkJSON(n) },
		labels: func(n network) map[string]string { return n.Labels },
		columns: []column[network]{
			{"ID", false, func(n network) string { return n.Id }},
			{"NAME", false, func(n network) string { return n.Name }},
			{"DRIVER", false, func(n network) string { return n.Driver }},
			{"SUBNET", false, func(n network) string { return cmp.Or(strings.Join(n.Subnets, ","), "-") }},
			{"GATEWAY", true, func(n network) string { return cmp.Or(strings.Join(n.Gateways, ","), "-") }},
			{"VNI", true, func(n network) string { return fmt.Sprint(n.Vni) }},
			{"MTU", true, func(n network) string {
				if n.Mtu == 0 {
					return "auto"
				}
				return fmt.Sprint(n.Mtu)
			}},
			{"INTERNAL", true, func(n network) string { return fmt.Sprint(n.Internal) }},
			{"LABELS", true, func(n network) string { return labelText(n.Labels) }},
		},
		filters: map[string]func(network, string) bool{
			"id":     func(n network, v string) bool { return strings.HasPrefix(n.Id, v) },
			"name":   func(n network, v string) bool { return nameMatches(n.Name, v) },
			"driver": func(n network, v string) bool { return n.Driver == v },
			"scope":  func(n network, v string) bool { return scope(n) == v },
			"type": func(n network, v string) bool {
				return v == map[bool]string{true: "builtin", false: "custom"}[builtIn(n)]
			},
		},
		values: map[string][]string{"driver": {spec.DriverOverlay, spec.DriverBridge, spec.DriverHost, spec.DriverNull}, "scope": {"swarm", "local"}, "type": {"builtin", "custom"}},
		fields: map[string]func(network) string{"Scope": scope, "CreatedAt": func(n network) string { return createdAt(n.CreatedMs) },
			"IPv6": func(n network) string {
				return fmt.Sprint(slices.ContainsFunc(n.Subnets, func(s string) bool { return strings.Contains(s, ":") }))
			}},
	}
	cmd := &cobra.Command{Use: "ls", Short: "List networks", Aliases: []string{"list"}, Args: exactly(0),
		Example: "  shoal net ls --filter driver=overlay --filter label=tier=data\n  shoal net ls --format '{{.Name}}: {{.Subnet}}'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			nets, _, err := c.networks(cmd.Context())
			if err != nil {
				return err
			}
			slices.SortFunc(nets, func(a, b network) int { return strings.Compare(a.Name, b.Name) })
			return l.print(c, cmd, nets)
		}}
	l.add(c, cmd)
	return cmd
}

// scope is Docker's word for whether a network is on every node.
func scope(n *shoalv1.Network) string {
	if n.Driver == spec.DriverOverlay {
		return "swarm"
	}
	return "local"
}

// builtIn tells whether a network is one that every cluster has.
func builtIn(n *shoalv1.Network) bool {
	return n.Name == spec.DefaultNetwork || n.Name == spec.HostNetwork || n.Name == spec.NoneNetwork
}

func (c *cli) netConnect() *cobra.Command {
	req := &shoalv1.ConnectNetworkRequest{}
	cmd := &cobra.Command{Use: "connect NETWORK TASK|SERVICE", Short: "Attach a running task or service to a further network", Args: exactly(2),
		Long: `Connect adds an interface to a running task, or to all tasks of a service. Nothing
is restarted; connections over its other networks go on.`,
		Example: "  shoal net connect backend web\n  shoal net connect --alias db --ip 10.9.0.20 backend c1",
		RunE: func(cmd *cobra.Command, args []string) error {
			nets, _, err := c.networks(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			req.Network, req.Target = nets[0].Id, args[1]
			resp, err := c.control().ConnectNetwork(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			return c.rewired(cmd.Context(), resp.Msg.GetService().GetId(), resp.Msg.GetTask().GetId(), func(t *shoalv1.Task) bool {
				return slices.ContainsFunc(t.Attachments, func(a *shoalv1.Attachment) bool {
					return a.Network == nets[0].Id && a.Joined <= t.GetStatus().GetWired()
				})
			})
		}}
	cmd.Flags().StringSliceVar(&req.Aliases, "alias", nil, "further name on the network (repeatable)")
	cmd.Flags().StringSliceVar(&req.Addrs, "ip", nil, "address of the task there, or virtual IP of the service")
	cmd.ValidArgsFunction = c.complete(c.networkNames)
	return cmd
}

func (c *cli) netDisconnect() *cobra.Command {
	cmd := &cobra.Command{Use: "disconnect NETWORK TASK|SERVICE", Short: "Take a running task or service off a network", Args: exactly(2),
		ValidArgsFunction: c.complete(c.networkNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			nets, _, err := c.networks(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			resp, err := c.control().DisconnectNetwork(cmd.Context(), connect.NewRequest(&shoalv1.DisconnectNetworkRequest{Network: nets[0].Id, Target: args[1]}))
			if err != nil {
				return err
			}
			return c.rewired(cmd.Context(), resp.Msg.GetService().GetId(), resp.Msg.GetTask().GetId(), func(t *shoalv1.Task) bool {
				return !slices.ContainsFunc(t.Attachments, func(a *shoalv1.Attachment) bool { return a.Network == nets[0].Id })
			})
		}}
	cmd.Flags().BoolP("force", "f", false, "accepted for Docker's sake")
	_ = cmd.Flags().MarkHidden("force")
	return cmd
}

// rewired waits until the tasks of a service, or one task, are as a connect or
// disconnect wants them: of an ID, since what was typed may be the name of the one and
// the beginning of the other's. A manager of an older version may give neither.
func (c *cli) rewired(ctx context.Context, service, task string, done func(*shoalv1.Task) bool) error {
	req := &shoalv1.WatchRequest{Services: []string{service}}
	switch {
	case task != "":
		req = &shoalv1.WatchRequest{Tasks: []string{task}}
	case service == "":
		return nil
	}
	defer c.progress("Waiting for the nodes")()
	watch := c.api().Watch(req)
	defer watch.Close()
	for limit := time.Now().Add(20 * time.Second); time.Now().Before(limit); {
		now, err := watch.Next(ctx)
		if client.Away(err) && sleep.For(ctx, 200*time.Millisecond) {
			continue // the managers will answer again
		}
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(now.GetTasks(), func(t *shoalv1.Task) bool {
			return t.Desired == spec.DesiredRunning && !ended(t) && t.Node != "" && !done(t)
		}) {
			return nil
		}
	}
	return fmt.Errorf("the change is made, but not every node has confirmed it: see 'shoal ps' and 'shoal doctor'")
}

func (c *cli) netPrune() *cobra.Command {
	var force bool
	var filters []string
	cmd := &cobra.Command{Use: "prune", Short: "Remove all networks that nothing uses", Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			want := map[string]string{}
			for _, f := range filters {
				l, ok := strings.CutPrefix(f, "label=")
				if !ok {
					return usageError(cmd, fmt.Errorf("filter %q: want label=KEY or label=KEY=VALUE", f))
				}
				k, v, _ := strings.Cut(spec.Text(l), "=")
				want[k] = v
			}
			if !force {
				if !c.confirm("This removes every network that no task and no service uses. Go on?") {
					return errors.New("nothing was removed: say y, or give --force")
				}
			}
			nets, _, err := c.networks(cmd.Context())
			if err != nil {
				return err
			}
			for _, n := range nets {
				if builtIn(n) || slices.ContainsFunc(slices.Collect(maps.Keys(want)), func(k string) bool {
					have, ok := n.Labels[k]
					return !ok || (want[k] != "" && have != want[k])
				}) {
					continue
				}
				users, err := c.users(cmd.Context(), n.Id)
				if err != nil {
					return err
				}
				if users {
					continue
				}
				_, err = c.control().RemoveNetwork(cmd.Context(), connect.NewRequest(&shoalv1.RemoveNetworkRequest{Ref: n.Id}))
				switch connect.CodeOf(err) {
				case connect.CodeFailedPrecondition, connect.CodeNotFound:
					continue // someone else was quicker
				}
				if err != nil {
					return err
				}
				fmt.Fprintln(c.out, n.Name)
			}
			return nil
		}}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "don't ask")
	cmd.Flags().StringArrayVar(&filters, "filter", nil, "only those with label=KEY[=VALUE] (repeatable)")
	return cmd
}

// users tells whether a task or a service is on a network.
func (c *cli) users(ctx context.Context, network string) (bool, error) {
	svcs, err := c.services(ctx)
	if err != nil {
		return false, err
	}
	tasks, err := c.tasks(ctx, &shoalv1.ListTasksRequest{})
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(svcs, func(s *shoalv1.Service) bool {
		return slices.ContainsFunc(s.GetSpec().GetNetworks(), func(a *shoalv1.NetworkAttachment) bool { return a.Network == network })
	}) || slices.ContainsFunc(tasks, func(t *shoalv1.Task) bool {
		return slices.ContainsFunc(t.Attachments, func(a *shoalv1.Attachment) bool { return a.Network == network })
	}), nil
}

// confirm asks a person; where there is none, the answer is no.
func (c *cli) confirm(question string) bool {
	in, ok := c.in.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return false
	}
	fmt.Fprintf(c.err, "%s [y/N] ", question)
	line, _ := bufio.NewReader(in).ReadString('\n')
	return strings.HasPrefix(strings.ToLower(strings.TrimSpace(line)), "y")
}

// usedNetworkJSON is a network with who is on it.
type usedNetworkJSON struct {
	networkJSON
	Services []networkService `json:"services"`
	Tasks    []networkTask    `json:"tasks"`
}

type networkService struct {
	ID      string   `json:"id"`
	Name    string   `json:"name"`
	VIPs    []string `json:"vips"`
	Aliases []string `json:"aliases,omitempty"`
}

type networkTask struct {
	ID      string   `json:"id"`
	Name    string   `json:"name"`
	Node    string   `json:"node"`
	State   string   `json:"state"`
	Iface   string   `json:"iface"`
	Addrs   []string `json:"addrs"`
	Aliases []string `json:"aliases,omitempty"`
}

func (c *cli) netInspect() *cobra.Command {
	cmd := &cobra.Command{Use: "inspect NETWORK [NETWORK...]", Short: "Show networks in full, with their services and tasks", Args: atLeast(1),
		ValidArgsFunction: c.complete(c.networkNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			nets, _, err := c.networks(ctx, args...)
			if err != nil {
				return err
			}
			svcs, err := c.services(ctx)
			if err != nil {
				return err
			}
			tasks, err := c.tasks(ctx, &shoalv1.ListTasksRequest{})
			if err != nil {
				return err
			}
			_, nodes, err := c.nodes(ctx)
			if err != nil {
				return err
			}
			out := []usedNetworkJSON{}
			for _, n := range nets {
				v, err := toNetworkJSON(n)
				if err != nil {
					return err
				}
				j := usedNetworkJSON{networkJSON: v, Services: []networkService{}, Tasks: []networkTask{}}
				for _, s := range svcs {
					i := slices.IndexFunc(s.GetSpec().GetNetworks(), func(a *shoalv1.NetworkAttachment) bool { return a.Network == n.Id })
					if i < 0 {
						continue
					}
					ns := networkService{Aliases: s.GetSpec().GetNetworks()[i].Aliases, ID: s.Id, Name: s.GetSpec().GetName(), VIPs: []string{}}
					for _, v := range s.Vips {
						if v.Network == n.Id {
							ns.VIPs = append(ns.VIPs, v.Addrs...)
						}
					}
					j.Services = append(j.Services, ns)
				}
				for _, t := range tasks {
					for _, a := range t.Attachments {
						if a.Network == n.Id {
							j.Tasks = append(j.Tasks, networkTask{ID: t.Id, Name: t.Name, Node: nodes.Of(t.Node), State: t.GetStatus().GetState(), Iface: a.Iface, Addrs: a.Addrs, Aliases: a.Aliases})
						}
					}
				}
				out = append(out, j)
			}
			return inspected(c, cmd, out, func(i int) (object, error) { return dockerNetwork(nets[i], tasks) })
		}}
	cmd.Flags().BoolP("verbose", "v", false, "as in Docker; all is shown always")
	c.inspectFlags(cmd)
	return cmd
}

func (c *cli) netRm() *cobra.Command {
	cmd := &cobra.Command{Use: "rm NETWORK [NETWORK...]", Short: "Remove networks that nothing uses", Aliases: []string{"remove"}, Args: atLeast(1),
		ValidArgsFunction: c.complete(c.networkNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.forEach(args, func(ref string) error {
				_, err := c.control().RemoveNetwork(cmd.Context(), connect.NewRequest(&shoalv1.RemoveNetworkRequest{Ref: ref}))
				return err
			})
		}}
	return cmd
}

// forEach does something to every argument, as Docker does: those that work are
// printed, those that don't are reported, and any of them is a failure.
func (c *cli) forEach(args []string, do func(string) error) error {
	// Some at a time: what one call waits for (the managers' disks, mostly) the
	// others wait for as well. What is said keeps the order of the arguments.
	results := make([]chan error, len(args))
	for i := range args {
		results[i] = make(chan error, 1)
	}
	c.api() // made once, before it is shared
	var next atomic.Int64
	for range min(len(args), callsAtOnce) {
		go func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(args) {
					return
				}
				results[i] <- do(args[i])
			}
		}()
	}
	var errs []error
	for i, a := range args {
		if err := <-results[i]; err != nil {
			errs = append(errs, errors.New(client.Message(err)))
			continue
		}
		fmt.Fprintln(c.out, a)
	}
	return errors.Join(errs...)
}

// callsAtOnce is how many calls of one command are under way together.
const callsAtOnce = 16
