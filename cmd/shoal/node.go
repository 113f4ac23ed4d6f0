package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

func (c *cli) nodeCmd() *cobra.Command {
	return group("node", "Manage the cluster's nodes", nil, c.nodeLs(), c.nodePs(), c.nodeInspect(), c.nodeUpdate(), c.nodeRole("promote", spec.RoleManager), c.nodeRole("demote", spec.RoleWorker), c.nodeRm())
}

func (c *cli) nodeLs() *cobra.Command {
	l := &listing[*shoalv1.NodeInfo]{
		id:     func(n *shoalv1.NodeInfo) string { return n.Id },
		json:   func(n *shoalv1.NodeInfo) (any, error) { return toNodeJSON(n) },
		labels: func(n *shoalv1.NodeInfo) map[string]string { return n.Labels },
		columns: []column[*shoalv1.NodeInfo]{
			{"ID", false, func(n *shoalv1.NodeInfo) string { return n.Id }},
			{"NAME", false, func(n *shoalv1.NodeInfo) string { return n.Name }},
			{"STATUS", false, func(n *shoalv1.NodeInfo) string { return n.Status + certNote(n, time.Now()) }},
			{"AVAILABILITY", false, func(n *shoalv1.NodeInfo) string { return n.Availability }},
			{"ROLE", false, func(n *shoalv1.NodeInfo) string {
				if n.Leader {
					return "leader"
				}
				return n.Role
			}},
			{"ADDRESS", false, func(n *shoalv1.NodeInfo) string { return n.Addr }},
			{"NUMBER", true, func(n *shoalv1.NodeInfo) string { return fmt.Sprint(n.Number) }},
			{"CERTIFICATE", true, func(n *shoalv1.NodeInfo) string {
				if n.CertificateEndMs == 0 {
					return "-"
				}
				return "until " + time.UnixMilli(n.CertificateEndMs).UTC().Format("2006-01-02")
			}},
			{"LEVEL", true, func(n *shoalv1.NodeInfo) string {
				if n.Level == 0 {
					return "-"
				}
				return fmt.Sprint(n.Level)
			}},
			{"VERSION", true, func(n *shoalv1.NodeInfo) string { return cmp.Or(n.Build, "-") }},
			{"DATA PATH", true, func(n *shoalv1.NodeInfo) string { return n.DataPath }},
			{"MESSAGE", true, func(n *shoalv1.NodeInfo) string { return n.Message }},
		},
		filters: map[string]func(*shoalv1.NodeInfo, string) bool{
			"id":           func(n *shoalv1.NodeInfo, v string) bool { return strings.HasPrefix(n.Id, v) },
			"name":         func(n *shoalv1.NodeInfo, v string) bool { return nameMatches(n.Name, v) },
			"role":         func(n *shoalv1.NodeInfo, v string) bool { return n.Role == v },
			"status":       func(n *shoalv1.NodeInfo, v string) bool { return n.Status == v },
			"availability": func(n *shoalv1.NodeInfo, v string) bool { return n.Availability == v },
			"node.label":   func(n *shoalv1.NodeInfo, v string) bool { return hasLabel(n.Labels, v) }, // Docker's word; its label is the engine's
			"membership":   func(_ *shoalv1.NodeInfo, v string) bool { return v == "accepted" },       // none waits to be let in
		},
		values: map[string][]string{"role": {spec.RoleManager, spec.RoleWorker}, "status": {spec.NodeReady, spec.NodeDown}, "membership": {"accepted", "pending"},
			"availability": {spec.AvailabilityActive, spec.AvailabilityPause, spec.AvailabilityDrain}},
		fields: map[string]func(*shoalv1.NodeInfo) string{
			"EngineVersion": func(n *shoalv1.NodeInfo) string { return n.Build },
			"Hostname":      func(n *shoalv1.NodeInfo) string { return n.Name },
			"TLSStatus": func(n *shoalv1.NodeInfo) string {
				if certNote(n, time.Now()) != "" {
					return "Needs Rotation"
				}
				return "Ready"
			},
			"ManagerStatus": func(n *shoalv1.NodeInfo) string {
				switch {
				case n.Leader:
					return "Leader"
				case n.Role != spec.RoleManager:
					return ""
				case n.Status == spec.NodeReady:
					return "Reachable"
				}
				return "Unreachable"
			},
		},
	}
	cmd := &cobra.Command{Use: "ls", Short: "List the nodes", Aliases: []string{"list"}, Args: exactly(0),
		Example: "  shoal node ls --filter role=manager\n  shoal node ls --format '{{.Name}} {{.Address}}'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			nodes, _, err := c.nodes(cmd.Context())
			if err != nil {
				return err
			}
			if slices.ContainsFunc(nodes, func(n *shoalv1.NodeInfo) bool { return len(n.Unreached) > 0 }) {
				l.columns[len(l.columns)-1].wide = false // the message says what is lost
			}
			return l.print(c, cmd, nodes)
		}}
	l.add(c, cmd)
	return cmd
}

// certNote tells of a certificate that ends soon: renewal has a fifth of its life
// for it, so one with a tenth left was not renewed for long.
func certNote(n *shoalv1.NodeInfo, now time.Time) string {
	left := time.UnixMilli(n.CertificateEndMs).Sub(now)
	switch {
	case n.CertificateEndMs == 0 || left > peer.CertificateLife/10:
		return ""
	case left <= 0:
		return " (certificate ended)"
	case left < 24*time.Hour:
		return fmt.Sprintf(" (certificate ends in %d h)", int(left.Hours()))
	}
	return fmt.Sprintf(" (certificate ends in %d days)", int(left.Hours()/24))
}

// nodesOrSelf is nodes, of which "self" is the one that this runs on.
func (c *cli) nodesOrSelf(ctx context.Context, refs []string) ([]*shoalv1.NodeInfo, error) {
	refs = slices.Clone(refs)
	for i, r := range refs {
		if r == "self" {
			id, err := c.self(ctx)
			if err != nil {
				return nil, err
			}
			refs[i] = id
		}
	}
	nodes, _, err := c.nodes(ctx, refs...)
	return nodes, err
}

func (c *cli) nodeInspect() *cobra.Command {
	var people bool
	cmd := &cobra.Command{Use: "inspect NODE [NODE...]", Short: "Show nodes in full", Args: atLeast(1),
		Example:           "  shoal node inspect node2\n  shoal node inspect self",
		ValidArgsFunction: c.complete(c.nodeNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			nodes, err := c.nodesOrSelf(cmd.Context(), args)
			if err != nil {
				return err
			}
			if people {
				for i, n := range nodes {
					if i > 0 {
						fmt.Fprintln(c.out)
					}
					if err := prettyNode(c.out, n); err != nil {
						return err
					}
				}
				return nil
			}
			js, err := each(nodes, toNodeJSON)
			if err != nil {
				return err
			}
			return inspected(c, cmd, js, func(i int) (object, error) { return dockerNode(nodes[i]) })
		}}
	c.inspectFlags(cmd)
	cmd.Flags().BoolVar(&people, "pretty", false, "for a person")
	return cmd
}

// nodePs lists tasks by their node.
func (c *cli) nodePs() *cobra.Command {
	l := c.taskListing()
	cmd := &cobra.Command{Use: "ps [NODE...]", Short: "List the tasks of nodes, this one by default", Args: cobra.ArbitraryArgs,
		Example:           "  shoal node ps\n  shoal node ps --filter desired-state=running node2 node3",
		ValidArgsFunction: c.complete(c.nodeNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = []string{"self"}
			}
			nodes, err := c.nodesOrSelf(cmd.Context(), args)
			if err != nil {
				return err
			}
			var tasks []*shoalv1.Task
			for _, n := range nodes {
				ts, err := c.tasks(cmd.Context(), &shoalv1.ListTasksRequest{Node: n.Id, All: true})
				if err != nil {
					return err
				}
				for _, t := range ts {
					if !slices.ContainsFunc(tasks, func(o *shoalv1.Task) bool { return o.Id == t.Id }) {
						tasks = append(tasks, t)
					}
				}
			}
			return l.show(cmd, tasks)
		}}
	cmd.Flags().BoolVar(&l.ids, "no-resolve", false, "show IDs of nodes, not names")
	l.add(c, cmd)
	return cmd
}

func (c *cli) nodeUpdate() *cobra.Command {
	var name, role, availability string
	var add, rm []string
	cmd := &cobra.Command{Use: "update NODE", Short: "Change a node's name, role, availability or labels", Args: exactly(1),
		Example: `  shoal node update --availability drain node2     # move its replicas elsewhere
  shoal node update --role manager node3
  shoal node update --label-add disk=ssd node1
  shoal node update --name web-1 node1`,
		ValidArgsFunction: c.complete(c.nodeNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &shoalv1.UpdateNodeRequest{Ref: args[0], RemoveLabels: rm}
			if cmd.Flags().Changed("name") {
				req.Name = &name
			}
			if cmd.Flags().Changed("role") {
				req.Role = &role
			}
			if cmd.Flags().Changed("availability") {
				req.Availability = &availability
			}
			var err error
			if req.SetLabels, err = labels(add); err != nil {
				return usageError(cmd, err)
			}
			resp, err := c.control().UpdateNode(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			if role == spec.RoleManager {
				if err := c.awaitVoter(cmd.Context(), resp.Msg.Node, voterWait); err != nil {
					return err
				}
			}
			fmt.Fprintln(c.out, resp.Msg.Node.Name)
			return nil
		}}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "rename the node; the host keeps its name")
	f.StringVar(&role, "role", "", "manager or worker")
	f.StringVar(&availability, "availability", "", "active, pause (no new tasks) or drain (none at all)")
	f.StringSliceVar(&add, "label-add", nil, "set a label, key=value")
	f.StringSliceVar(&rm, "label-rm", nil, "remove a label, by key")
	_ = cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{spec.RoleManager, spec.RoleWorker}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("availability", cobra.FixedCompletions([]string{spec.AvailabilityActive, spec.AvailabilityPause, spec.AvailabilityDrain}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (c *cli) nodeRm() *cobra.Command {
	var force bool
	cmd := &cobra.Command{Use: "rm NODE [NODE...]", Short: "Remove nodes from the cluster", Aliases: []string{"remove"}, Args: atLeast(1),
		Long: `Rm makes the managers forget a node that will not come back; its tasks' addresses
are free again. Run 'shoal leave' on a node that still works.`,
		ValidArgsFunction: c.complete(c.nodeNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, a := range args {
				if _, err := c.control().RemoveNode(cmd.Context(), connect.NewRequest(&shoalv1.RemoveNodeRequest{Ref: a, Force: force})); err != nil {
					return err
				}
				fmt.Fprintln(c.out, a)
			}
			return nil
		}}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "also a node that is not down")
	return cmd
}

// voterWait bounds the wait for a node that was made a manager: it gets another
// certificate, starts its raft, says so, and is added, which takes about a second.
const voterWait = time.Minute

// awaitVoter waits until the managers count on a node that was made one of them. Who
// stops another manager before that has lost its vote, and not got this one's.
func (c *cli) awaitVoter(ctx context.Context, n *shoalv1.NodeInfo, limit time.Duration) error {
	done := c.progress("Waiting for " + n.Name + " to vote")
	defer done()
	for end := time.Now().Add(limit); ; {
		nodes, _, err := c.nodes(ctx)
		if err == nil {
			told := false // a leader of an older version says of nobody that he votes
			for _, o := range nodes {
				told = told || o.Voter
				switch {
				case o.Id != n.Id:
				case o.Voter:
					return nil
				case o.Role != spec.RoleManager:
					return fmt.Errorf("node %s was made a %s meanwhile", o.Name, o.Role)
				case o.Status == spec.NodeDown:
					return fmt.Errorf("node %s is to be a manager, and is down: it votes once it is back; 'shoal node demote %s' takes that back", o.Name, o.Name)
				}
			}
			if !told {
				return nil
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Now().After(end) {
			if err != nil {
				return fmt.Errorf("node %s is to be a manager, and whether it votes can't be found out: %w", n.Name, err)
			}
			return fmt.Errorf("node %s is to be a manager, and does not vote after %s: 'shoal doctor' on it says why; it goes on trying", n.Name, limit)
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// labels parses key=value; a key alone has an empty value, as Docker has it.
func labels(in []string) (map[string]string, error) {
	if len(in) == 0 {
		return nil, nil
	}
	m := map[string]string{}
	for _, l := range in {
		k, v, _ := strings.Cut(l, "=")
		if k == "" {
			return nil, fmt.Errorf("label %q: want key=value", l)
		}
		m[spec.Text(k)] = spec.Text(v)
	}
	return m, nil
}
