package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

func (c *cli) netCmd() *cobra.Command {
	return group("net", "Manage networks", []string{"network"}, c.netCreate(), c.netLs(), c.netInspect(), c.netRm())
}

func (c *cli) netCreate() *cobra.Command {
	req := &shoalv1.CreateNetworkRequest{}
	var opts, lbls []string
	cmd := &cobra.Command{
		Use: "create NETWORK", Short: "Create an overlay network", Args: exactly(1),
		Example: `  shoal net create app
  shoal net create --subnet 10.9.0.0/24 --gateway 10.9.0.254 app
  shoal net create --internal backend`,
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name = args[0]
			var err error
			if req.Labels, err = labels(lbls); err != nil {
				return usageError(cmd, err)
			}
			for _, o := range opts {
				k, v, ok := strings.Cut(o, "=")
				switch {
				case !ok:
					return usageError(cmd, fmt.Errorf("option %q: want key=value, like mtu=1400", o))
				case k == "mtu" || k == "com.docker.network.driver.mtu":
					var mtu int32
					if _, err := fmt.Sscanf(v, "%d", &mtu); err != nil || fmt.Sprint(mtu) != v {
						return usageError(cmd, fmt.Errorf("option %q: the MTU is a number of bytes", o))
					}
					req.Mtu = mtu
				default:
					return usageError(cmd, fmt.Errorf("option %q is unknown: use mtu=BYTES", k))
				}
			}
			resp, err := c.control().CreateNetwork(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			fmt.Fprintln(c.out, resp.Msg.Network.Id)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&req.Driver, "driver", "d", spec.DriverOverlay, "overlay")
	f.StringSliceVar(&req.Subnets, "subnet", nil, "subnet, like 10.9.0.0/24 (default: the next of the pool; repeatable)")
	f.StringSliceVar(&req.Gateways, "gateway", nil, "gateway address, one per subnet (default: the subnet's first)")
	f.StringSliceVar(&req.IpRanges, "ip-range", nil, "allocate addresses only from this part of the subnet")
	f.BoolVar(&req.Internal, "internal", false, "no way out of the network")
	f.StringArrayVar(&opts, "opt", nil, "driver option: mtu=BYTES (0: the underlay's less the overhead)")
	f.StringArrayVar(&lbls, "label", nil, "label, key=value (repeatable)")
	f.Bool("attachable", true, "accepted for Docker's sake: every network is")
	_ = f.MarkHidden("attachable")
	return cmd
}

func (c *cli) netLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{Use: "ls", Short: "List networks", Aliases: []string{"list"}, Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			nets, _, err := c.networks(cmd.Context())
			if err != nil {
				return err
			}
			slices.SortFunc(nets, func(a, b *shoalv1.Network) int { return strings.Compare(a.Name, b.Name) })
			if c.output == "json" {
				js, err := each(nets, api.ToNetwork)
				if err != nil {
					return err
				}
				return c.json(js)
			}
			if quiet {
				for _, n := range nets {
					fmt.Fprintln(c.out, n.Id)
				}
				return nil
			}
			head := []string{"ID", "NAME", "DRIVER", "SUBNET"}
			if c.output == "wide" {
				head = append(head, "GATEWAY", "VNI", "MTU", "INTERNAL")
			}
			rows := [][]string{head}
			for _, n := range nets {
				row := []string{n.Id, n.Name, n.Driver, strings.Join(n.Subnets, ",")}
				if c.output == "wide" {
					mtu := "auto"
					if n.Mtu != 0 {
						mtu = fmt.Sprint(n.Mtu)
					}
					row = append(row, strings.Join(n.Gateways, ","), fmt.Sprint(n.Vni), mtu, fmt.Sprint(n.Internal))
				}
				rows = append(rows, row)
			}
			c.table(rows)
			return nil
		}}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "IDs only")
	c.outputFlag(cmd, "json", "wide")
	return cmd
}

// networkJSON is a network with who is on it.
type networkJSON struct {
	spec.Network
	Services []networkService `json:"services"`
	Tasks    []networkTask    `json:"tasks"`
}

type networkService struct {
	ID   string   `json:"id"`
	Name string   `json:"name"`
	VIPs []string `json:"vips"`
}

type networkTask struct {
	ID    string   `json:"id"`
	Name  string   `json:"name"`
	Node  string   `json:"node"`
	State string   `json:"state"`
	Addrs []string `json:"addrs"`
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
			out := []networkJSON{}
			for _, n := range nets {
				v, err := api.ToNetwork(n)
				if err != nil {
					return err
				}
				j := networkJSON{Network: v, Services: []networkService{}, Tasks: []networkTask{}}
				for _, s := range svcs {
					on := slices.ContainsFunc(s.GetSpec().GetNetworks(), func(a *shoalv1.NetworkAttachment) bool { return a.Network == n.Id })
					if !on {
						continue
					}
					ns := networkService{ID: s.Id, Name: s.GetSpec().GetName(), VIPs: []string{}}
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
							j.Tasks = append(j.Tasks, networkTask{ID: t.Id, Name: t.Name, Node: nodes.of(t.Node), State: t.GetStatus().GetState(), Addrs: a.Addrs})
						}
					}
				}
				out = append(out, j)
			}
			return c.json(out)
		}}
	c.outputFlag(cmd, "json")
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
	var errs []error
	for _, a := range args {
		if err := do(a); err != nil {
			errs = append(errs, errors.New(message(err)))
			continue
		}
		fmt.Fprintln(c.out, a)
	}
	return errors.Join(errs...)
}
