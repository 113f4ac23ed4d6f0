package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/spec"
)

// publishHelp is the help of --publish of services.
const publishHelp = "published port: TARGET, PUBLISHED:TARGET or ADDRESS:PUBLISHED:TARGET, with /PROTOCOL, ranges too; or target=PORT,published=PORT with protocol=tcp|udp|sctp, mode=ingress|host|local, nat=true after commas (repeatable)"

// portsText is ports for a table, runs of them as ranges: "*:8000-8010->80/tcp".
func portsText(in []*shoalv1.Port) string {
	ports, err := api.ToPorts(in)
	if err != nil || len(ports) == 0 {
		return ""
	}
	slices.SortFunc(ports, spec.ComparePorts)
	var out []string
	for i := 0; i < len(ports); {
		j, step := i, uint16(1)
		if i+1 < len(ports) && ports[i+1].Target == ports[i].Target {
			step = 0
		}
		for j+1 < len(ports) {
			a, b := ports[j], ports[j+1]
			a.Published++
			a.Target += step
			if a != b {
				break
			}
			j++
		}
		if j == i {
			out = append(out, ports[i].String())
		} else {
			a, b := ports[i], ports[j]
			s := strings.Replace(a.String(), fmt.Sprintf(":%d->", a.Published), fmt.Sprintf(":%d-%d->", a.Published, b.Published), 1)
			if step != 0 {
				s = strings.Replace(s, fmt.Sprintf("->%d/", a.Target), fmt.Sprintf("->%d-%d/", a.Target, b.Target), 1)
			}
			out = append(out, s)
		}
		i = j + 1
	}
	return strings.Join(out, ", ")
}

func (c *cli) portCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "port SERVICE|TASK [TARGET[/PROTOCOL]]", Short: "Show published ports", Args: func(cmd *cobra.Command, args []string) error {
		if len(args) > 2 {
			return exactly(2)(cmd, args)
		}
		return atLeast(1)(cmd, args)
	},
		Example:           "  shoal port web\n  shoal port web 80/tcp",
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			ports, err := c.publishedOf(ctx, args[0])
			if err != nil {
				return err
			}
			if len(args) > 1 {
				want, proto, ok := strings.Cut(args[1], "/")
				n, err := strconv.ParseUint(want, 10, 16)
				if err != nil {
					return usageError(cmd, fmt.Errorf("%q is not a port", args[1]))
				}
				ports = slices.DeleteFunc(ports, func(p spec.Port) bool { return p.Target != uint16(n) || ok && p.Protocol != strings.ToLower(proto) })
				if len(ports) == 0 {
					return fmt.Errorf("%s publishes no port for %s", args[0], args[1])
				}
			}
			slices.SortFunc(ports, func(a, b spec.Port) int { return cmp.Or(cmp.Compare(a.Target, b.Target), spec.ComparePorts(a, b)) })
			if c.output == "json" {
				if ports == nil {
					ports = []spec.Port{}
				}
				return c.json(ports)
			}
			for _, p := range ports {
				host := "0.0.0.0"
				if p.Addr.IsValid() {
					host = p.Addr.String()
				}
				if len(args) > 1 {
					fmt.Fprintf(c.out, "%s:%d\n", host, p.Published)
					continue
				}
				mode := ""
				if p.Mode != spec.PortIngress {
					mode = " (" + p.Mode + ")"
				}
				fmt.Fprintf(c.out, "%d/%s -> %s:%d%s\n", p.Target, p.Protocol, host, p.Published, mode)
			}
			return nil
		}}
	c.outputFlag(cmd, "json")
	return cmd
}

// exposed are the ports that --publish-all is of: those of the image, which its node must
// have for that, and of --expose, but for those that are published anyway.
func (c *cli) exposed(ctx context.Context, req *shoalv1.CreateTaskRequest, expose []string) ([]*shoalv1.Port, error) {
	if ct := req.Spec.Container; ct.GetImage() != "" {
		nodes, _, err := c.nodes(ctx, req.Node)
		if err != nil {
			return nil, err
		}
		of, err := c.exposedBy(ctx, nodes[0].Id, ct)
		if err != nil {
			return nil, err
		}
		expose = append(of, expose...)
	}
	all, err := client.ParsePublishes(expose, spec.PortHost)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(all, func(a, b spec.Port) int {
		return cmp.Or(cmp.Compare(a.Target, b.Target), cmp.Compare(a.Protocol, b.Protocol))
	})
	var out []*shoalv1.Port
	for _, p := range api.Ports(slices.Compact(all)) {
		if !slices.ContainsFunc(req.Ports, func(o *shoalv1.Port) bool { return o.Target == p.Target && o.Protocol == p.Protocol }) {
			out = append(out, p)
		}
	}
	return out, nil
}

// exposedBy are the ports that an image says it serves. It is fetched as the task would have
// it fetched.
func (c *cli) exposedBy(ctx context.Context, node string, ct *shoalv1.Container) ([]string, error) {
	inspect := func() (out []string, err error) {
		resp, err := c.node().ImageInspect(ctx, forNode(&shoalv1.ImageInspectRequest{Image: ct.Image}, node))
		if err != nil {
			return nil, err
		}
		var image struct {
			Config struct{ ExposedPorts map[string]struct{} }
		}
		if err := json.Unmarshal(resp.Msg.Config, &image); err != nil {
			return nil, fmt.Errorf("configuration of image %s: %w", ct.Image, err)
		}
		return slices.Sorted(maps.Keys(image.Config.ExposedPorts)), nil
	}
	if ct.Pull != spec.PullAlways {
		out, err := inspect()
		if connect.CodeOf(err) != connect.CodeNotFound || ct.Pull == spec.PullNever {
			return out, err
		}
	}
	stream, err := c.node().ImagePull(ctx, forNode(&shoalv1.ImagePullRequest{Image: ct.Image, Auth: ct.RegistryAuth}, node))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	for stream.Receive() {
	}
	if err := stream.Err(); err != nil {
		return nil, c.api().Explain(err)
	}
	return inspect()
}

func (c *cli) publishedOf(ctx context.Context, ref string) ([]spec.Port, error) {
	v, t, err := c.api().ServiceOrTask(ctx, ref)
	if err != nil {
		return nil, err
	}
	if v != nil {
		return api.ToPorts(v.Ports)
	}
	ports, err := api.ToPorts(t.Ports)
	if err != nil || t.Service == "" {
		return ports, err
	}
	svcs, err := c.services(ctx, t.Service)
	if err != nil {
		return nil, err
	}
	return api.ToPorts(svcs[0].Ports)
}
