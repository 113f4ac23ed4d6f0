package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/spec"
)

const defaultSocket = "/run/shoal/shoal.sock"

// cli is what every command shares.
type cli struct {
	in       io.Reader
	out, err io.Writer
	socket   string
	output   string // "", json, wide
}

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "shoal",
		Short: "Swarm-style overlay networks and virtual IPs for services on many machines",
		Long: `Shoal gives services on many Linux machines a network of their own: a name and a
virtual IP for each, balanced over its healthy replicas on any node.`,
		Example: `  shoal init --advertise-addr 192.0.2.1      # on the first machine
  shoal join 192.0.2.1                       # on the others
  shoal net create app
  shoal svc create --name web --replicas 3 --network app -- nginx -g 'daemon off;'
  shoal run --network app -- curl http://web/`,
		Version:       versionString(),
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          unknownSubcommand,

		SuggestionsMinimumDistance: 2,
		// Without it cobra shows the help and succeeds, whatever is asked for.
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVar(&c.socket, "socket", cmp.Or(os.Getenv("SHOAL_SOCKET"), defaultSocket), "the agent's unix socket (also $SHOAL_SOCKET)")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usageError(cmd, flagError(err)) })
	root.AddCommand(c.agentCmd(), c.initCmd(), c.joinCmd(), c.leaveCmd(), c.infoCmd(), c.doctorCmd(),
		c.nodeCmd(), c.netCmd(), c.svcCmd(), c.runCmd(), c.execCmd(), c.psCmd(), c.stopCmd(), c.rmCmd(), c.logsCmd(), c.portCmd(), c.statsCmd(), c.eventsCmd(), c.labCmd(), c.versionCmd())
	finish(root)
	return root
}

// unknownSubcommand makes "shoal nett" an error that names what is near.
func unknownSubcommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	msg := fmt.Errorf("unknown command %q", cmd.CommandPath()+" "+args[0])
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		msg = fmt.Errorf("%w: did you mean %q?", msg, near[0])
	}
	return usageError(cmd, msg)
}

// goErrorRE is what Go's own parsers say around the reason.
var goErrorRE = regexp.MustCompile(`: (strconv\.\w+: parsing ".*": |time: )`)

// flagError is a mistake in a flag's value in words that are not Go's.
func flagError(err error) error {
	if clean := goErrorRE.ReplaceAllString(err.Error(), ": "); clean != err.Error() {
		return errors.New(clean)
	}
	return err
}

// group is a noun with verbs below it.
func group(use, short string, aliases []string, sub ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Aliases: aliases, Args: unknownSubcommand, SuggestionsMinimumDistance: 2,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(sub...)
	return cmd
}

// exactly, atLeast are cobra's checks with an error that shows the usage.
func exactly(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usageError(cmd, fmt.Errorf("%s takes %d arguments, %d are given: %s", cmd.CommandPath(), n, len(args), cmd.UseLine()))
		}
		return nil
	}
}

func atLeast(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < n {
			return usageError(cmd, fmt.Errorf("%s takes at least %d arguments, %d are given: %s", cmd.CommandPath(), n, len(args), cmd.UseLine()))
		}
		return nil
	}
}

// outputFlag adds -o to a command.
func (c *cli) outputFlag(cmd *cobra.Command, allowed ...string) {
	cmd.Flags().StringVarP(&c.output, "output", "o", "", "output: "+strings.Join(allowed, " or "))
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(allowed, cobra.ShellCompDirectiveNoFileComp))
	pre := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if c.output != "" && !slices.Contains(allowed, c.output) {
			return usageError(cmd, fmt.Errorf("output %q is unknown: use %s", c.output, strings.Join(allowed, " or ")))
		}
		if pre != nil {
			return pre(cmd, args)
		}
		return nil
	}
}

// ---- clients ----

func (c *cli) control() shoalv1connect.ControlClient {
	return shoalv1connect.NewControlClient(control.UnixClient(c.socket), "http://shoal", connect.WithInterceptors(explain{c.socket}))
}

func (c *cli) node() shoalv1connect.NodeClient {
	return shoalv1connect.NewNodeClient(control.UnixClient(c.socket), "http://shoal", connect.WithInterceptors(explain{c.socket}))
}

func (c *cli) local() shoalv1connect.LocalClient {
	return shoalv1connect.NewLocalClient(control.UnixClient(c.socket), "http://shoal", connect.WithInterceptors(explain{c.socket}))
}

// explain says what to do when no agent answers.
type explain struct{ socket string }

func (e explain) err(err error) error {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "dial" {
		return err
	}
	switch {
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("no permission to use %s: run as root, or as a member of the socket's group", e.socket)
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no agent answers at %s: start it with 'systemctl start shoal' or 'shoal agent', or name its socket with --socket or $SHOAL_SOCKET", e.socket)
	}
	return err
}

func (e explain) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		resp, err := next(ctx, req)
		return resp, e.err(err)
	}
}

func (e explain) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (e explain) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// ---- what commands look up ----

// names maps IDs to names, for tables.
type names map[string]string

func (n names) of(id string) string { return cmp.Or(n[id], id) }

func (c *cli) nodes(ctx context.Context, refs ...string) ([]*shoalv1.NodeInfo, names, error) {
	resp, err := c.control().ListNodes(ctx, connect.NewRequest(&shoalv1.ListNodesRequest{Refs: refs}))
	if err != nil {
		return nil, nil, err
	}
	m := names{}
	for _, n := range resp.Msg.Nodes {
		m[n.Id] = n.Name
	}
	return resp.Msg.Nodes, m, nil
}

func (c *cli) networks(ctx context.Context, refs ...string) ([]*shoalv1.Network, names, error) {
	resp, err := c.control().ListNetworks(ctx, connect.NewRequest(&shoalv1.ListNetworksRequest{Refs: refs}))
	if err != nil {
		return nil, nil, err
	}
	m := names{}
	for _, n := range resp.Msg.Networks {
		m[n.Id] = n.Name
	}
	return resp.Msg.Networks, m, nil
}

func (c *cli) services(ctx context.Context, refs ...string) ([]*shoalv1.Service, error) {
	resp, err := c.control().ListServices(ctx, connect.NewRequest(&shoalv1.ListServicesRequest{Refs: refs}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.Services, nil
}

func (c *cli) tasks(ctx context.Context, req *shoalv1.ListTasksRequest) ([]*shoalv1.Task, error) {
	resp, err := c.control().ListTasks(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return resp.Msg.Tasks, nil
}

// task finds one task as a person names it: its name, its ID or the beginning
// of it, or SERVICE.SLOT for the newest task there. One that runs goes before
// one that has ended.
func (c *cli) task(ctx context.Context, ref string) (*shoalv1.Task, error) {
	all, err := c.tasks(ctx, &shoalv1.ListTasksRequest{All: true})
	if err != nil {
		return nil, err
	}
	return pickTask(all, ref)
}

// runningTask is task for what its node can do without the managers: of a task
// on this node they are not asked.
func (c *cli) runningTask(ctx context.Context, ref string) (*shoalv1.Task, error) {
	resp, err := c.node().Tasks(ctx, connect.NewRequest(&shoalv1.TasksRequest{}))
	if err != nil {
		return c.task(ctx, ref)
	}
	here := slices.DeleteFunc(resp.Msg.Tasks, ended)
	if i := slices.IndexFunc(here, func(t *shoalv1.Task) bool { return t.Id == ref || t.Name == ref }); i >= 0 {
		return here[i], nil
	}
	t, err := c.task(ctx, ref)
	if connect.CodeOf(err) == connect.CodeUnavailable {
		if t, herr := pickTask(here, ref); herr == nil {
			return t, nil
		}
	}
	return t, err
}

// pickTask is task among some.
func pickTask(all []*shoalv1.Task, ref string) (*shoalv1.Task, error) {
	rank := func(t *shoalv1.Task) int {
		switch {
		case t.Id == ref, t.Name == ref:
			return 4
		case strings.HasPrefix(t.Name, ref+".") && strings.Count(ref, ".") > 0 && t.Service != "":
			return 3
		case len(ref) >= 3 && strings.HasPrefix(t.Id, ref):
			return 2
		}
		return 0
	}
	var best *shoalv1.Task
	ambiguous := false
	for _, t := range all {
		r := rank(t)
		if r == 0 {
			continue
		}
		if best == nil {
			best = t
			continue
		}
		live, bestLive := !ended(t), !ended(best)
		switch b := rank(best); {
		case r != b:
			if r > b {
				best, ambiguous = t, false
			}
		case live != bestLive:
			if live {
				best = t
			}
		case r == 2:
			ambiguous = true
		case t.CreatedMs > best.CreatedMs:
			best = t
		}
	}
	if best == nil {
		return nil, &exitError{code: 1, err: fmt.Errorf("no such task: %s: 'shoal ps -a' lists all of them", ref)}
	}
	if ambiguous {
		return nil, fmt.Errorf("%q is the beginning of several tasks' IDs: give more of it", ref)
	}
	return best, nil
}

func ended(t *shoalv1.Task) bool {
	s, err := spec.ParseTaskState(t.GetStatus().GetState())
	return err == nil && s.Ended()
}

// ---- output ----

// table writes rows with aligned columns.
func (c *cli) table(rows [][]string) {
	w := tabwriter.NewWriter(c.out, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		for i, cell := range r {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			fmt.Fprint(w, cell)
		}
		fmt.Fprintln(w)
	}
	w.Flush()
}

// json writes a value as scripts want it.
func (c *cli) json(v any) error {
	e := json.NewEncoder(c.out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// jsonLine writes a value on one line, for streams.
func (c *cli) jsonLine(v any) error {
	e := json.NewEncoder(c.out)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// each converts a list for json: [] rather than null when it is empty.
func each[A, B any](in []A, fn func(A) (B, error)) ([]B, error) {
	out := make([]B, 0, len(in))
	for _, a := range in {
		b, err := fn(a)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

func (c *cli) terminal() bool {
	f, ok := c.err.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// clip shortens s to n characters for a table.
func clip(s string, n int) string {
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

// The JSON forms: the project's own nouns, with what only the leader knows.
type serviceJSON struct {
	spec.Service
	Running int `json:"running"`
}

func toServiceJSON(s *shoalv1.Service) (serviceJSON, error) {
	v, err := api.ToService(s)
	return serviceJSON{v, int(s.Running)}, err
}

// self is the ID of the node whose agent answers; "" while it is in no cluster.
func (c *cli) self(ctx context.Context) (string, error) {
	info, err := c.local().Info(ctx, connect.NewRequest(&shoalv1.InfoRequest{}))
	if err != nil {
		return "", err
	}
	return info.Msg.Node.GetId(), nil
}

// nodeFault is what a node can't do now for the service or task shown.
type nodeFault struct {
	Node    string `json:"node"`
	Message string `json:"message"`
}

func nodeFaults(in []*shoalv1.NodeFault) []nodeFault {
	return each1(in, func(f *shoalv1.NodeFault) nodeFault { return nodeFault{f.Node, f.Message} })
}

type nodeJSON struct {
	spec.Node
	Leader bool `json:"leader"`
}

func toNodeJSON(n *shoalv1.NodeInfo) (nodeJSON, error) {
	v, err := api.ToNode(n)
	return nodeJSON{v, n.Leader}, err
}

// ---- completion ----

func (c *cli) complete(list func(ctx context.Context) (names, error)) func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		m, err := list(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var out []string
		for _, n := range m {
			if !slices.Contains(args, n) {
				out = append(out, n)
			}
		}
		slices.Sort(out)
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

func (c *cli) nodeNames(ctx context.Context) (names, error) {
	_, m, err := c.nodes(ctx)
	return m, err
}

func (c *cli) networkNames(ctx context.Context) (names, error) {
	_, m, err := c.networks(ctx)
	return m, err
}

func (c *cli) serviceNames(ctx context.Context) (names, error) {
	ss, err := c.services(ctx)
	m := names{}
	for _, s := range ss {
		m[s.Id] = s.GetSpec().GetName()
	}
	return m, err
}

func (c *cli) taskNames(ctx context.Context) (names, error) {
	ts, err := c.tasks(ctx, &shoalv1.ListTasksRequest{})
	m := names{}
	for _, t := range ts {
		m[t.Id] = t.Name
	}
	return m, err
}
