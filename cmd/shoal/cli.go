package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/client"
)

const defaultSocket = "/run/shoal/shoal.sock"

// cli is what every command shares.
type cli struct {
	in       io.Reader
	out, err io.Writer
	socket   string
	output   string // "", json, wide
	client   *client.Client
}

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "shoal",
		Short: "Swarm-style overlay networks and virtual IPs for services on many machines",
		Long: `Shoal gives services on many Linux machines a network of their own: a name and a
virtual IP for each, balanced over its healthy replicas on any node.`,
		Example: `  shoal init --advertise-addr 192.0.2.1      # on the first machine
  shoal join --token SHOAL-1-… 192.0.2.1     # on the others: the command that init printed
  shoal net create app
  shoal svc create --name web --replicas 3 --network app nginx
  shoal run --rm --network app curlimages/curl http://web/`,
		Version:       versionString(),
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          unknownSubcommand,

		SuggestionsMinimumDistance: 2,
		// Without it cobra shows the help and succeeds, whatever is asked for.
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVar(&c.socket, "socket", cmp.Or(os.Getenv("SHOAL_SOCKET"), defaultSocket), "the agent's unix socket (also $SHOAL_SOCKET)")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if instead := insteadOfFlag(cmd, err); instead != "" {
			err = fmt.Errorf("%w: %s", err, instead)
		}
		return usageError(cmd, flagError(err))
	})
	root.AddCommand(c.agentCmd(), c.initCmd(), c.joinCmd(), c.leaveCmd(), c.infoCmd(), c.doctorCmd(),
		c.nodeCmd(), c.tokenCmd(), c.caCmd(), c.unlockCmd(), c.unlockKeyCmd(), c.snapshotCmd(), c.netCmd(), c.svcCmd(), c.imageCmd(), c.volumeCmd(), c.secretCmd(), c.configCmd(), c.loginCmd(), c.logoutCmd(), c.runCmd(), c.execCmd(), c.psCmd(), c.inspectCmd(), c.waitCmd(), c.startCmd(), c.restartCmd(), c.renameCmd(), c.stopCmd(), c.killCmd(), c.rmCmd(), c.attachCmd(), c.topCmd(), c.cpCmd(), c.logsCmd(), c.portCmd(), c.statsCmd(), c.eventsCmd(), c.labCmd(), c.versionCmd(), c.manCmd())
	root.AddCommand(c.shortcuts()...)
	finish(root)
	return root
}

// unknownSubcommand makes "shoal nett" an error that names what is near.
func unknownSubcommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return unknownWord(cmd, args[0], args[1:]...)
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

// api is the client of the agent whose socket is named.
func (c *cli) api() *client.Client {
	if c.client == nil {
		c.client = client.New(c.socket)
	}
	return c.client
}

func (c *cli) control() shoalv1connect.ControlClient { return c.api().Control }
func (c *cli) node() shoalv1connect.NodeClient       { return c.api().Node }
func (c *cli) local() shoalv1connect.LocalClient     { return c.api().Local }

// names maps IDs to names, for tables.
type names = client.Names

func (c *cli) nodes(ctx context.Context, refs ...string) ([]*shoalv1.NodeInfo, names, error) {
	return c.api().Nodes(ctx, refs...)
}

func (c *cli) networks(ctx context.Context, refs ...string) ([]*shoalv1.Network, names, error) {
	return c.api().Networks(ctx, refs...)
}

func (c *cli) services(ctx context.Context, refs ...string) ([]*shoalv1.Service, error) {
	return c.api().Services(ctx, refs...)
}

func (c *cli) tasks(ctx context.Context, req *shoalv1.ListTasksRequest) ([]*shoalv1.Task, error) {
	return c.api().Tasks(ctx, req)
}

func (c *cli) task(ctx context.Context, ref string) (*shoalv1.Task, error) {
	return c.api().Task(ctx, ref)
}

func (c *cli) runningTask(ctx context.Context, ref string) (*shoalv1.Task, error) {
	return c.api().RunningTask(ctx, ref)
}

func ended(t *shoalv1.Task) bool { return client.Ended(t) }

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
