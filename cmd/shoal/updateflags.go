package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// policyFlags are Docker's flags for how tasks are replaced, of an update or of a
// rollback.
type policyFlags struct {
	kind           string // update, rollback
	set            *pflag.FlagSet
	parallelism    uint32
	delay, monitor time.Duration
	ratio          float64
	action, order  string
}

func (p *policyFlags) add(cmd *cobra.Command, kind string) {
	f := cmd.Flags()
	p.kind, p.set = kind, f
	actions := spec.FailureActions(kind)
	orders := []string{spec.StartFirst, spec.StopFirst}
	f.Uint32Var(&p.parallelism, kind+"-parallelism", 1, "replicas replaced at a time (0: all)")
	f.DurationVar(&p.delay, kind+"-delay", 0, "wait between a replica and the next")
	f.DurationVar(&p.monitor, kind+"-monitor", spec.DefaultMonitor, "how long a new replica is watched for a failure")
	f.Float64Var(&p.ratio, kind+"-max-failure-ratio", 0, "part of the replicas that may fail, 0 to 1")
	f.StringVar(&p.action, kind+"-failure-action", spec.FailurePause, "what is done when more fail: "+strings.Join(actions, ", "))
	f.StringVar(&p.order, kind+"-order", spec.StartFirst, "which of the two replicas goes first: start-first loses no request (Docker's default is stop-first), stop-first is for what can't run twice")
	_ = cmd.RegisterFlagCompletionFunc(kind+"-failure-action", cobra.FixedCompletions(actions, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc(kind+"-order", cobra.FixedCompletions(orders, cobra.ShellCompDirectiveNoFileComp))
}

// given tells whether one of the flags is.
func (p *policyFlags) given() (given bool) {
	p.set.Visit(func(f *pflag.Flag) { given = given || strings.HasPrefix(f.Name, p.kind+"-") })
	return given
}

// apply changes was (nil: the defaults) by the flags that were given.
func (p *policyFlags) apply(was *shoalv1.UpdateConfig) *shoalv1.UpdateConfig {
	if !p.given() {
		return was
	}
	u := api.ToUpdateConfig(was).Policy()
	for flag, to := range map[string]func(){
		"parallelism":       func() { u.Parallelism = int(min(p.parallelism, spec.MaxReplicas)) },
		"delay":             func() { u.Delay = p.delay },
		"monitor":           func() { u.Monitor = p.monitor },
		"max-failure-ratio": func() { u.MaxFailureRatio = p.ratio },
		"failure-action":    func() { u.FailureAction = p.action },
		"order":             func() { u.Order = p.order },
	} {
		if p.set.Changed(p.kind + "-" + flag) {
			to()
		}
	}
	return api.UpdateConfig(&u)
}

func (c *cli) svcRollback() *cobra.Command {
	var detach, quiet bool
	cmd := &cobra.Command{Use: "rollback SERVICE", Short: "Give a service back the spec that it had before its last change", Args: exactly(1),
		Example:           "  shoal svc rollback web\n  shoal svc rollback -d web",
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.rollback(cmd.Context(), args[0], detach, quiet)
		}}
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "don't wait until the replicas run")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "wait, but show no progress")
	return cmd
}

func (c *cli) rollback(ctx context.Context, ref string, detach, quiet bool) error {
	resp, err := c.control().UpdateService(ctx, connect.NewRequest(&shoalv1.UpdateServiceRequest{Ref: ref, Rollback: true}))
	if err != nil {
		return err
	}
	fmt.Fprintln(c.out, resp.Msg.Service.GetSpec().GetName())
	if detach {
		return nil
	}
	return c.converge(ctx, resp.Msg.Service, quiet)
}

func (c *cli) svcRebalance() *cobra.Command {
	var detach, quiet bool
	cmd := &cobra.Command{Use: "rebalance SERVICE [SERVICE...]", Short: "Spread replicas anew over the nodes that there are", Args: atLeast(1),
		Long: `Rebalance replaces as few replicas as it takes to spread a service as one that is
made anew: what moved away when a node died or was drained does not come back by
itself. They are replaced by the service's --update-… policy.`,
		Example:           "  shoal svc rebalance web",
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			var begun []*shoalv1.Service
			for _, ref := range args {
				resp, err := c.control().UpdateService(ctx, connect.NewRequest(&shoalv1.UpdateServiceRequest{Ref: ref, Rebalance: true}))
				if err != nil {
					return err
				}
				fmt.Fprintln(c.out, resp.Msg.Service.GetSpec().GetName())
				begun = append(begun, resp.Msg.Service)
			}
			return c.convergeAll(ctx, begun, detach, quiet)
		}}
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "don't wait until the replicas run")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "wait, but show no progress")
	return cmd
}

// updateOutcome is what has become of an update that is over: an error of one that did not
// come to its end, or came to another's.
func updateOutcome(u *shoalv1.UpdateStatus, manual bool) error {
	msg := u.GetMessage()
	switch u.GetState() {
	case spec.UpdatePaused:
		return fmt.Errorf("service update paused: %s", strings.TrimPrefix(msg, "update paused"+": "))
	case spec.RollbackPaused:
		return fmt.Errorf("service rollback paused: %s", strings.TrimPrefix(msg, "rollback paused"+": "))
	case spec.RollbackCompleted:
		if !manual {
			return fmt.Errorf("service rolled back: %s", msg)
		}
	}
	return nil
}

// updateLine says how far an update is, and why not further; empty: there is nothing
// to say.
func updateLine(s *shoalv1.Service) string {
	u := s.GetUpdateStatus()
	switch u.GetState() {
	case "", spec.UpdateCompleted, spec.RollbackCompleted:
		return ""
	}
	done := max(0, s.GetDesired()-s.GetStale())
	return fmt.Sprintf("%s: %s, %d of %d replicas are new: %s", s.GetSpec().GetName(), u.GetState(), done, s.GetDesired(), cmp.Or(u.GetMessage(), "-"))
}
