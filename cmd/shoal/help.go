package main

import (
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/shoalnet/shoal/lab"
)

// examples of commands that need no more than a line or two. Others have theirs
// beside their flags.
var examples = map[string]string{
	"completion": "  source <(shoal completion bash)",
	"doctor":     "  shoal doctor\n  shoal doctor -o json",
	"info":       "  shoal info",
	"leave":      "  shoal leave\n  shoal leave --force    # the last manager, or when no manager answers",
	"logs":       "  shoal logs -f c1",
	"rm":         "  shoal rm c1\n  shoal rm --force c1    # also while it runs",
	"stop":       "  shoal stop c1 c2",
	"version":    "  shoal version",

	"node":       "  shoal node ls\n  shoal node update --availability drain node2",
	"node rm":    "  shoal node rm node3",
	"net":        "  shoal net create app\n  shoal net ls",
	"net prune":  "  shoal net prune",
	"net rm":     "  shoal net rm app",
	"svc":        "  shoal svc create --name web --replicas 3 --network app -- nginx -g 'daemon off;'\n  shoal svc ls",
	"svc logs":   "  shoal svc logs -f web",
	"svc ps":     "  shoal svc ps web\n  shoal svc ps -o json web",
	"svc rm":     "  shoal svc rm web",
	"events":     "  shoal events",
	"stats":      "  shoal stats web",
	"port":       "  shoal port c1",
	"lab down":   "  shoal lab down",
	"lab heal":   "  shoal lab heal",
	"lab kill":   "  shoal lab kill node3",
	"lab ls":     "  shoal lab ls",
	"lab start":  "  shoal lab start node3",
	"lab up":     "  shoal lab up --nodes 3\n  shoal lab up --name two --nodes 5 --managers 3",
	"svc update": "  shoal svc update --replicas 5 web",

	"net inspect":    "  shoal net inspect app",
	"net disconnect": "  shoal net disconnect app c1",
	"svc inspect":    "  shoal svc inspect web",
	"node inspect":   "  shoal node inspect node2",
	"lab partition":  "  shoal lab partition node1,node2 node3",
}

// finish gives each command an example, and a help that fits a terminal.
func finish(root *cobra.Command) {
	cobra.AddTemplateFunc("wrapped", func(f *pflag.FlagSet) string {
		return strings.TrimRight(f.FlagUsagesWrapped(standardWidth), " \n")
	})
	root.SetUsageTemplate(strings.NewReplacer(
		".LocalFlags.FlagUsages | trimTrailingWhitespaces", "wrapped .LocalFlags",
		".InheritedFlags.FlagUsages | trimTrailingWhitespaces", "wrapped .InheritedFlags",
	).Replace(root.UsageTemplate()))
	root.InitDefaultCompletionCmd()
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Example == "" {
			cmd.Example = examples[strings.TrimPrefix(cmd.CommandPath(), root.Name()+" ")]
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(root)
}

// labNodes completes the names of a lab's nodes.
func labNodes(name *string) cobra.CompletionFunc {
	return func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		l, err := lab.Open(*name)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return each1(l.Nodes(), func(n lab.Node) string { return n.Name }), cobra.ShellCompDirectiveNoFileComp
	}
}
