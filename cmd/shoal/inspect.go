package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// found is what inspect shows of one thing.
type found struct {
	id, name string
	json     any
	docker   func() (object, error)
}

// finders look for a thing of a kind, in the order in which inspect asks.
func (c *cli) finders() (kinds []string, find map[string]func(ctx context.Context, cmd *cobra.Command, ref string) (found, error)) {
	kinds = []string{"task", "service", "network", "node", "secret", "config"}
	blob := func(k spec.BlobKind) func(context.Context, *cobra.Command, string) (found, error) {
		return func(_ context.Context, cmd *cobra.Command, ref string) (found, error) {
			bs, err := c.blobs(cmd, k, ref)
			if err != nil {
				return found{}, err
			}
			j, err := toBlobJSON(bs[0])
			return found{id: bs[0].Id, name: bs[0].Name, json: j}, err
		}
	}
	find = map[string]func(ctx context.Context, cmd *cobra.Command, ref string) (found, error){
		"task": func(ctx context.Context, _ *cobra.Command, ref string) (found, error) {
			t, err := c.task(ctx, ref)
			if err != nil {
				return found{}, err
			}
			_, nodes, err := c.nodes(ctx)
			if err != nil {
				return found{}, err
			}
			_, nets, err := c.networks(ctx)
			if err != nil {
				return found{}, err
			}
			j, err := toTaskJSON(t, nodes, nets)
			return found{t.Id, t.Name, j, func() (object, error) { return dockerTask(t, nodes, nets) }}, err
		},
		"service": func(ctx context.Context, _ *cobra.Command, ref string) (found, error) {
			svcs, err := c.services(ctx, ref)
			if err != nil {
				return found{}, err
			}
			all, nets, err := c.networks(ctx)
			if err != nil {
				return found{}, err
			}
			j, err := toServiceJSON(svcs[0], nets)
			return found{svcs[0].Id, svcs[0].GetSpec().GetName(), j, func() (object, error) { return dockerService(svcs[0], all) }}, err
		},
		"network": func(ctx context.Context, _ *cobra.Command, ref string) (found, error) {
			nets, _, err := c.networks(ctx, ref)
			if err != nil {
				return found{}, err
			}
			j, err := toNetworkJSON(nets[0])
			return found{nets[0].Id, nets[0].Name, j, func() (object, error) {
				tasks, err := c.tasks(ctx, &shoalv1.ListTasksRequest{})
				if err != nil {
					return nil, err
				}
				return dockerNetwork(nets[0], tasks)
			}}, err
		},
		"node": func(ctx context.Context, _ *cobra.Command, ref string) (found, error) {
			nodes, _, err := c.nodes(ctx, ref)
			if err != nil {
				return found{}, err
			}
			j, err := toNodeJSON(nodes[0])
			return found{nodes[0].Id, nodes[0].Name, j, func() (object, error) { return dockerNode(nodes[0]) }}, err
		},
		"secret": blob(spec.KindSecret),
		"config": blob(spec.KindConfig),
	}
	return kinds, find
}

func (c *cli) inspectCmd() *cobra.Command {
	var kind string
	cmd := &cobra.Command{Use: "inspect NAME|ID [NAME|ID...]", Short: "Show tasks, services, networks, nodes, secrets or configs in full", Args: atLeast(1),
		Long: `Inspect shows what an ID or a name is, or the beginning of an ID: a task, a service,
a network, a node, a secret or a config, the first of these that there is; --type says
which. A template
may use the names of the JSON form, or those of Docker's.`,
		Example: "  shoal inspect c1\n  shoal inspect --type network app\n  shoal inspect -f '{{.State.Status}}' c1",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			kinds, find := c.finders()
			if kind == "container" { // Docker's word
				kind = "task"
			}
			if kind != "" {
				if !slices.Contains(kinds, kind) {
					return usageError(cmd, fmt.Errorf("type %q: use %v; of images and volumes see 'shoal image inspect' and 'shoal volume inspect'", kind, kinds))
				}
				kinds = []string{kind}
			}
			var all []found
			for _, ref := range args {
				var best found
				var absent, unclear error
				how := client.NotMeant
				for _, k := range kinds {
					f, err := find[k](ctx, cmd, ref)
					switch {
					case err == nil:
						if m := client.Meant(ref, f.id, f.name); m > how {
							best, how = f, m
						}
					case connect.CodeOf(err) == connect.CodeNotFound || errors.Is(err, client.ErrNotFound):
						absent = err
					case unclear == nil:
						unclear = err
					}
				}
				switch {
				case unclear != nil && how < client.MeantByName:
					return unclear
				case how > client.NotMeant:
					all = append(all, best)
				case len(kinds) > 1:
					return fmt.Errorf("no such object: %s: there is no task, service, network, node, secret or config of that name or ID", ref)
				default:
					return absent
				}
			}
			js := each1(all, func(f found) any { return f.json })
			return inspected(c, cmd, js, func(i int) (object, error) {
				if all[i].docker == nil {
					return object{}, nil
				}
				return all[i].docker()
			})
		}}
	c.inspectFlags(cmd)
	cmd.Flags().StringVar(&kind, "type", "", "task, service, network, node, secret or config")
	_ = cmd.RegisterFlagCompletionFunc("type", cobra.FixedCompletions([]string{"task", "service", "network", "node", "secret", "config"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// waitCmd is docker wait.
func (c *cli) waitCmd() *cobra.Command {
	return &cobra.Command{Use: "wait TASK [TASK...]", Short: "Wait until tasks have ended, and print their exit statuses", Args: atLeast(1),
		Example:           "  shoal wait c1",
		ValidArgsFunction: c.complete(c.taskNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			var errs []error
			for _, ref := range args {
				t, err := c.task(ctx, ref)
				if err != nil {
					errs = append(errs, c.pointTo(ctx, ref, err, "its tasks are REPLICAS"))
					continue
				}
				if t, err = c.awaitEnd(ctx, t); ctx.Err() != nil {
					return ctx.Err()
				}
				if err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(c.out, t.GetStatus().GetExitCode())
			}
			return errors.Join(errs...)
		}}
}

// awaitEnd waits until a task has ended, and returns it as it is then.
func (c *cli) awaitEnd(ctx context.Context, t *shoalv1.Task) (*shoalv1.Task, error) {
	watch := c.api().Watch(&shoalv1.WatchRequest{Tasks: []string{t.Id}})
	defer watch.Close()
	for !ended(t) {
		now, err := watch.Next(ctx)
		if client.Away(err) && sleep.For(ctx, 200*time.Millisecond) {
			continue // the managers will answer again
		}
		switch ts := now.GetTasks(); {
		case err != nil:
			return nil, err
		case len(ts) == 0:
			return nil, fmt.Errorf("task %s was removed before its exit status was known", t.Name)
		default:
			t = ts[0]
		}
	}
	return t, nil
}
