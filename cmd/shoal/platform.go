package main

import (
	"cmp"
	"context"
	"fmt"

	"github.com/containerd/platforms"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

// platformFlag is Docker's --platform. A node runs its own platform's images and no other,
// so that it is a check: who gives it in a script gets that platform, or an error.
type platformFlag struct{ name string }

func (p *platformFlag) add(f *pflag.FlagSet) {
	f.StringVar(&p.name, "platform", "", "refuse a node of another platform than this, like linux/amd64")
}

// parse is what was given, in its normal form.
func (p *platformFlag) parse(cmd *cobra.Command) error {
	if p.name == "" {
		return nil
	}
	want, err := platforms.Parse(p.name)
	if err != nil {
		return usageError(cmd, fmt.Errorf("--platform %q is none: want OS/ARCHITECTURE, like linux/amd64", p.name))
	}
	p.name = platforms.Format(platforms.Normalize(want))
	return nil
}

// is tells whether a node, by what it says that it runs, has the platform.
func (p *platformFlag) is(n *shoalv1.NodeInfo) bool {
	have, err := platforms.Parse(n.GetPlatform())
	return err == nil && platforms.Format(platforms.Normalize(have)) == p.name
}

// check refuses a node of another platform, by name or ID, and names one that has it.
func (p *platformFlag) check(ctx context.Context, c *cli, node string) error {
	if p.name == "" {
		return nil
	}
	if node == "" {
		var err error
		if node, err = c.self(ctx); err != nil {
			return err
		}
	}
	ns, _, err := c.nodes(ctx, node)
	if err != nil || len(ns) != 1 || p.is(ns[0]) {
		return err
	}
	instead := "no node has that"
	if all, _, err := c.nodes(ctx); err == nil {
		for _, n := range all {
			if p.is(n) {
				instead = "use --node " + n.Name
				break
			}
		}
	}
	return fmt.Errorf("--platform %s: node %s is %s, and runs no other: %s", p.name, ns[0].Name, cmp.Or(ns[0].Platform, "of a platform that is not known yet"), instead)
}
