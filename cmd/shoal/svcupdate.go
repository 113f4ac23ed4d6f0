package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/spec"
)

func (c *cli) svcUpdate() *cobra.Command {
	var replicas int32
	var publishAdd, publishRm, networkAdd, networkRm, envAdd, envRm, labelAdd, labelRm, constraintAdd, constraintRm []string
	var dnsAdd, dnsRm, hostAdd, hostRm []string
	var command, hostname, mode string
	var grace time.Duration
	var health healthFlags
	var detach, quiet bool
	cmd := &cobra.Command{Use: "update SERVICE [-- COMMAND [ARG...]]", Short: "Change a service", Args: atLeast(1),
		Long: `Update changes a running service. Networks, published ports, labels and the
number of replicas change without a restart; another command, environment,
host name or resolver replaces the replicas one after the other, each new one
running before the old one ends.`,
		Example: `  shoal svc update --publish-add 8443:443 --publish-rm 8080 web
  shoal svc update --network-add name=backend,alias=www web
  shoal svc update --env-add LEVEL=debug web
  shoal svc update web -- nginx -c /etc/nginx/new.conf -g 'daemon off;'`,
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, f := cmd.Context(), cmd.Flags()
			svcs, err := c.services(ctx, args[0])
			if err != nil {
				return err
			}
			svc := svcs[0]
			sp := svc.Spec
			changed := len(args) > 1
			if changed {
				sp.Task.Command = args[1:]
			}
			set := func(flag string, fn func() error) {
				if f.Changed(flag) && err == nil {
					changed = true
					err = fn()
				}
			}
			set("replicas", func() error { sp.Replicas = replicas; return nil })
			set("args", func() error { sp.Task.Command = append(sp.Task.Command[:1:1], strings.Fields(command)...); return nil })
			set("hostname", func() error { sp.Task.Hostname = hostname; return nil })
			set("endpoint-mode", func() error { sp.EndpointMode = mode; return nil })
			set("stop-grace-period", func() error { sp.Task.StopGraceMs = grace.Milliseconds(); return nil })
			set("env-rm", func() error { sp.Task.Env = dropKeys(sp.Task.Env, envRm); return nil })
			set("env-add", func() error {
				sp.Task.Env = append(dropKeys(sp.Task.Env, each1(envAdd, key)), envAdd...)
				return nil
			})
			set("label-rm", func() error {
				for _, k := range labelRm {
					delete(sp.Labels, k)
				}
				return nil
			})
			set("label-add", func() error {
				add, err := labels(labelAdd)
				if sp.Labels == nil {
					sp.Labels = map[string]string{}
				}
				for k, v := range add {
					sp.Labels[k] = v
				}
				return err
			})
			set("constraint-rm", func() error { sp.Constraints = drop(sp.Constraints, constraintRm); return nil })
			set("constraint-add", func() error { sp.Constraints = append(sp.Constraints, constraintAdd...); return nil })
			set("dns-rm", func() error { sp.Task.Dns = drop(sp.Task.Dns, dnsRm); return nil })
			set("dns-add", func() error { sp.Task.Dns = append(sp.Task.Dns, dnsAdd...); return nil })
			set("host-rm", func() error { sp.Task.ExtraHosts = drop(sp.Task.ExtraHosts, hostRm); return nil })
			set("host-add", func() error { sp.Task.ExtraHosts = append(sp.Task.ExtraHosts, hostAdd...); return nil })
			set("network-rm", func() error {
				for _, n := range networkRm {
					nets, _, err := c.networks(ctx, n)
					if err != nil {
						return err
					}
					at := slices.IndexFunc(sp.Networks, func(a *shoalv1.NetworkAttachment) bool { return a.Network == nets[0].Id })
					if at < 0 {
						return fmt.Errorf("service %s is not on network %s", sp.Name, n)
					}
					sp.Networks = slices.Delete(sp.Networks, at, at+1)
				}
				return nil
			})
			set("network-add", func() error {
				tf := taskFlags{networks: networkAdd}
				add, err := tf.attachments()
				sp.Networks = append(sp.Networks, add...)
				return err
			})
			set("publish-rm", func() error { sp.Ports, err = withoutPorts(svc, publishRm); return err })
			set("publish-add", func() error {
				add, err := client.ParsePublishes(publishAdd, spec.PortIngress)
				sp.Ports = append(sp.Ports, api.Ports(add)...)
				return err
			})
			if err == nil {
				was := sp.Task.Health
				sp.Task.Health, err = health.apply(was)
				changed = changed || !proto.Equal(was, sp.Task.Health)
			}
			if err != nil {
				return usageError(cmd, err)
			}
			if len(sp.Networks) == 0 {
				return fmt.Errorf("service %s would be on no network: add another with --network-add", sp.Name)
			}
			if !changed {
				return usageError(cmd, errNoChange)
			}
			resp, err := c.control().UpdateService(ctx, connect.NewRequest(&shoalv1.UpdateServiceRequest{Ref: svc.Id, Version: svc.Version, Spec: sp}))
			if err != nil {
				return err
			}
			fmt.Fprintln(c.out, sp.Name)
			if detach {
				return nil
			}
			return c.converge(ctx, resp.Msg.Service, quiet)
		}}
	f := cmd.Flags()
	f.Int32Var(&replicas, "replicas", 0, "number of tasks")
	f.StringVar(&command, "args", "", "arguments of the command")
	f.StringVar(&hostname, "hostname", "", "host name inside the tasks")
	f.StringVar(&mode, "endpoint-mode", "", "vip or dnsrr")
	f.DurationVar(&grace, "stop-grace-period", 0, "time between the stop signal and the kill")
	f.StringArrayVar(&publishAdd, "publish-add", nil, "publish a port, as with svc create --publish")
	f.StringArrayVar(&publishRm, "publish-rm", nil, "stop publishing: the target port, PUBLISHED:TARGET, or the published port")
	f.StringArrayVar(&networkAdd, "network-add", nil, "attach to a network, as with svc create --network")
	f.StringArrayVar(&networkRm, "network-rm", nil, "leave a network")
	f.StringArrayVar(&envAdd, "env-add", nil, "set an environment variable, KEY=value")
	f.StringArrayVar(&envRm, "env-rm", nil, "remove an environment variable, by key")
	f.StringArrayVar(&labelAdd, "label-add", nil, "set a label, key=value")
	f.StringArrayVar(&labelRm, "label-rm", nil, "remove a label, by key")
	f.StringArrayVar(&constraintAdd, "constraint-add", nil, "add a placement constraint")
	f.StringArrayVar(&constraintRm, "constraint-rm", nil, "remove a placement constraint")
	f.StringArrayVar(&dnsAdd, "dns-add", nil, "add a resolver")
	f.StringArrayVar(&dnsRm, "dns-rm", nil, "remove a resolver")
	f.StringArrayVar(&hostAdd, "host-add", nil, "add a line of /etc/hosts, NAME:ADDRESS")
	f.StringArrayVar(&hostRm, "host-rm", nil, "remove such a line")
	health.add(f)
	f.BoolVarP(&detach, "detach", "d", false, "don't wait until the replicas run")
	f.BoolVarP(&quiet, "quiet", "q", false, "wait, but show no progress")
	_ = cmd.RegisterFlagCompletionFunc("endpoint-mode", cobra.FixedCompletions([]string{"vip", "dnsrr"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("network-add", c.complete(c.networkNames))
	of := func(list func(*shoalv1.Service) []string) cobra.CompletionFunc {
		return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			svcs, err := c.services(cmd.Context(), args[0])
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return list(svcs[0]), cobra.ShellCompDirectiveNoFileComp
		}
	}
	_ = cmd.RegisterFlagCompletionFunc("publish-rm", of(func(s *shoalv1.Service) []string {
		return each1(s.Ports, func(p *shoalv1.Port) string {
			if p.Protocol == spec.TCP {
				return fmt.Sprint(p.Target)
			}
			return fmt.Sprintf("%d/%s", p.Target, p.Protocol)
		})
	}))
	_ = cmd.RegisterFlagCompletionFunc("network-rm", of(func(s *shoalv1.Service) []string {
		_, nets, _ := c.networks(cmd.Context())
		return each1(s.GetSpec().GetNetworks(), func(a *shoalv1.NetworkAttachment) string { return nets.Of(a.Network) })
	}))
	_ = cmd.RegisterFlagCompletionFunc("env-rm", of(func(s *shoalv1.Service) []string { return each1(s.GetSpec().GetTask().GetEnv(), key) }))
	_ = cmd.RegisterFlagCompletionFunc("label-rm", of(func(s *shoalv1.Service) []string { return slices.Sorted(maps.Keys(s.GetSpec().GetLabels())) }))
	_ = cmd.RegisterFlagCompletionFunc("constraint-rm", of(func(s *shoalv1.Service) []string { return s.GetSpec().GetConstraints() }))
	return cmd
}

func key(kv string) string { k, _, _ := strings.Cut(kv, "="); return k }

// dropKeys removes KEY=value items by key.
func dropKeys(in, keys []string) []string {
	return slices.DeleteFunc(slices.Clone(in), func(e string) bool { return slices.Contains(keys, key(e)) })
}

func drop(in, items []string) []string {
	return slices.DeleteFunc(slices.Clone(in), func(e string) bool { return slices.Contains(items, e) })
}

// withoutPorts removes published ports: by target port, as Docker has it, by both
// numbers, or by the published one where no target has the number.
func withoutPorts(svc *shoalv1.Service, rm []string) ([]*shoalv1.Port, error) {
	// A dynamic port's number is not in the spec.
	numbers := map[*shoalv1.Port]uint32{}
	for i, w := range svc.Spec.Ports {
		numbers[w] = w.Published
		if i < len(svc.Ports) {
			numbers[w] = svc.Ports[i].Published
		}
	}
	left := slices.Clone(svc.Spec.Ports)
	for _, r := range rm {
		ps, err := client.ParsePublish(r, spec.PortIngress)
		if err != nil {
			return nil, err
		}
		for _, p := range ps {
			is := func(w *shoalv1.Port) bool {
				return w.Target == uint32(p.Target) && w.Protocol == p.Protocol && (p.Published == 0 || numbers[w] == uint32(p.Published))
			}
			if p.Published == 0 && !slices.ContainsFunc(left, is) {
				is = func(w *shoalv1.Port) bool { return numbers[w] == uint32(p.Target) && w.Protocol == p.Protocol }
			}
			before := len(left)
			left = slices.DeleteFunc(left, is)
			if len(left) == before {
				return nil, fmt.Errorf("service %s publishes no port %s", svc.Spec.Name, r)
			}
		}
	}
	return left, nil
}
