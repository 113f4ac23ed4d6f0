package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/lab"
)

func (c *cli) labCmd() *cobra.Command {
	var name string
	cmd := group("lab", "Several nodes on this machine, to try Shoal", nil,
		c.labUp(&name), c.labLs(&name), c.labExec(&name), c.labNode(&name, "kill NODE", "Kill a node: its agent, its tasks, its link"),
		c.labNode(&name, "start NODE", "Bring a killed node back"), c.labPartition(&name), c.labHeal(&name), c.labLoad(&name), c.labDown(&name))
	cmd.Example = `  shoal lab up --nodes 3
  shoal lab exec node2 -- shoal node ls
  shoal lab kill node3
  shoal lab partition node1,node2 node3
  shoal lab heal
  shoal lab down`
	cmd.PersistentFlags().StringVar(&name, "name", "", "which lab, of several on one machine (default \"lab\")")
	return cmd
}

func (c *cli) labUp(name *string) *cobra.Command {
	o := lab.Options{}
	var quiet, noContainers bool
	cmd := &cobra.Command{Use: "up", Short: "Make a lab", Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Nodes == 0 || o.MTU == 0 || cmd.Flags().Changed("managers") && o.Managers == 0 {
				return usageError(cmd, errors.New("--nodes, --managers and --mtu can't be 0")) // which is the default in Options
			}
			o.Name, o.Containers = *name, !noContainers
			if !quiet {
				o.Progress = c.err
			}
			l, err := lab.Up(cmd.Context(), o)
			if err != nil {
				return err
			}
			if !quiet {
				flag := ""
				if *name != "" {
					flag = " --name " + *name
				}
				fmt.Fprintf(c.out, "%d nodes are up. Try:\n\n    %s lab exec%s node1 -- shoal node ls\n    %s lab down%s\n", len(l.Nodes()), program(), flag, program(), flag)
			}
			return nil
		}}
	f := cmd.Flags()
	f.IntVar(&o.Nodes, "nodes", 3, "number of nodes")
	f.IntVar(&o.Managers, "managers", 0, "how many of them are managers (default 3, or 1 with fewer nodes)")
	f.StringVar(&o.DataPath, "data-path", "", "VIP data path of every agent: ipvs, nft or auto")
	f.StringVar(&o.LogLevel, "log-level", "", "log level of every agent")
	f.StringArrayVar(&o.AgentArgs, "agent-arg", nil, "further argument of every agent, like --agent-arg=--gossip-port=7947 (repeatable)")
	f.IntVar(&o.MTU, "mtu", 1500, "MTU of the underlay in bytes")
	f.BoolVar(&noContainers, "no-containers", false, "run no containerd for images, where that is installed")
	f.BoolVar(&o.NoInit, "no-init", false, "start the agents, but make no cluster of them")
	f.BoolVarP(&quiet, "quiet", "q", false, "say nothing")
	_ = cmd.RegisterFlagCompletionFunc("data-path", cobra.FixedCompletions(dataPaths, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// program is how this binary was called, for commands to copy.
func program() string {
	if strings.Contains(os.Args[0], "/") {
		return os.Args[0]
	}
	return filepath.Base(os.Args[0])
}

func (c *cli) labLs(name *string) *cobra.Command {
	cmd := &cobra.Command{Use: "ls", Short: "List a lab's nodes", Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			if c.output == "json" {
				return c.json(l.Nodes())
			}
			rows := [][]string{{"NODE", "ADDRESS", "NAMESPACE", "AGENT", "DIRECTORY"}}
			for _, n := range l.Nodes() {
				agent := "down"
				if n.Running() {
					agent = fmt.Sprintf("pid %d", n.PID)
				}
				rows = append(rows, []string{n.Name, n.Addr.String(), n.Netns, agent, n.Dir})
			}
			c.table(rows)
			return nil
		}}
	c.outputFlag(cmd, "json")
	return cmd
}

func (c *cli) labExec(name *string) *cobra.Command {
	cmd := &cobra.Command{Use: "exec NODE -- COMMAND [ARG...]", Short: "Run a command on a node", Args: cobra.ArbitraryArgs, ValidArgsFunction: labNodes(name),
		Long: `Exec runs any command in a node's network namespace, with shoal on the PATH and
talking to that node's agent. Standard input and output pass through, and so does
the exit status.`,
		Example: "  shoal lab exec node2 -- shoal node ls\n  shoal lab exec node1 -- ip addr",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 && args[1] == "--" {
				args = append(args[:1:1], args[2:]...)
			}
			if len(args) < 2 {
				return usageError(cmd, fmt.Errorf("lab exec takes a node and a command, like: shoal lab exec node1 -- shoal node ls"))
			}
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			code, err := l.Exec(cmd.Context(), args[0], args[1:], c.in, c.out, c.err)
			if err != nil {
				return &exitError{code: code, err: err}
			}
			if code != 0 {
				return &exitError{code: code}
			}
			return nil
		}}
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func (c *cli) labNode(name *string, use, short string) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: exactly(1), ValidArgsFunction: labNodes(name),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			if strings.HasPrefix(use, "kill") {
				return l.Kill(cmd.Context(), args[0])
			}
			return l.Start(cmd.Context(), args[0])
		}}
}

func (c *cli) labPartition(name *string) *cobra.Command {
	return &cobra.Command{Use: "partition NODE[,NODE...] NODE[,NODE...]", Short: "Stop traffic between two groups of nodes", Args: exactly(2),
		RunE: func(_ *cobra.Command, args []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			return l.Partition(strings.Split(args[0], ","), strings.Split(args[1], ","))
		}}
}

func (c *cli) labHeal(name *string) *cobra.Command {
	return &cobra.Command{Use: "heal", Short: "End all partitions", Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			return l.Heal()
		}}
}

func (c *cli) labDown(name *string) *cobra.Command {
	return &cobra.Command{Use: "down", Short: "Remove a lab and all that is in it", Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			return l.Down(cmd.Context())
		}}
}

func (c *cli) labLoad(name *string) *cobra.Command {
	return &cobra.Command{Use: "load FILE", Short: "Read an image from an archive into all nodes", Args: exactly(1),
		Example: "  shoal lab load web.tar",
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			file, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			if _, err := os.Stat(file); err != nil {
				return err
			}
			for _, n := range l.Nodes() {
				out, err := l.Run(cmd.Context(), n.Name, l.Binary, "image", "load", "-i", file)
				if err != nil {
					return fmt.Errorf("%s: %w", n.Name, err)
				}
				fmt.Fprintf(c.out, "%s: %s\n", n.Name, strings.TrimSpace(out))
			}
			return nil
		}}
}
