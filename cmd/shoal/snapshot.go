package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/internal/durable"
)

func (c *cli) snapshotCmd() *cobra.Command {
	g := group("snapshot", "Save or restore all that the managers hold", nil, c.snapshotSave(), c.snapshotInspect(), c.snapshotRestore())
	g.Example = "  shoal snapshot save cluster.snap\n  shoal snapshot inspect cluster.snap\n  shoal snapshot restore cluster.snap"
	return g
}

func (c *cli) readSnapshot(path string) ([]byte, error) {
	if path == "-" {
		return io.ReadAll(c.in)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	return b, nil
}

func (c *cli) snapshotSave() *cobra.Command {
	var force bool
	cmd := &cobra.Command{Use: "save FILE", Short: "Save all that the managers hold to a file", Args: exactly(1),
		Long: `Save writes networks, services, tasks, nodes, the root's key, join tokens and the
unlock key, as they are at one moment, to a file of mode 0600. Who has the file can
join and rule the cluster: keep it as you keep a key. It holds nothing of what
tasks keep on disks. With FILE - it goes to standard output.`,
		Example: "  shoal snapshot save cluster.snap\n  shoal snapshot save - | gpg -e -r ops > cluster.snap.gpg",
		RunE: func(cmd *cobra.Command, args []string) error {
			path := args[0]
			if path == "-" && c.terminal() {
				return errors.New("a snapshot is not written to a terminal: give a file, or a pipe")
			}
			if _, err := os.Lstat(path); err == nil && path != "-" && !force {
				return fmt.Errorf("%s exists: give another file, or --force to replace it", path)
			}
			if err := notInPlaceOf(path); err != nil {
				return err
			}
			resp, err := c.control().SaveSnapshot(cmd.Context(), connect.NewRequest(&shoalv1.SaveSnapshotRequest{}))
			if err != nil {
				return err
			}
			if path == "-" {
				_, err := c.out.Write(resp.Msg.Snapshot)
				return err
			}
			info, _, err := control.ReadSnapshot(resp.Msg.Snapshot)
			if err != nil {
				return fmt.Errorf("the managers' answer: %w", err)
			}
			if err := durable.WriteFile(path, resp.Msg.Snapshot); err != nil {
				return err
			}
			fmt.Fprintf(c.out, "Cluster %s is saved to %s as it is at index %d (%d bytes).\nThe keys of the cluster are in it: who has the file can rule the cluster.\n", info.Cluster, path, info.Index, len(resp.Msg.Snapshot))
			return nil
		}}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "replace the file")
	return cmd
}

func (c *cli) snapshotInspect() *cobra.Command {
	cmd := &cobra.Command{Use: "inspect FILE", Short: "Show what is in a snapshot", Args: exactly(1),
		Long: `Inspect checks a snapshot, as restore does, and shows what is in it. It asks no agent.
With FILE - it is read from standard input.`,
		Example: "  shoal snapshot inspect cluster.snap\n  shoal snapshot inspect -o json cluster.snap",
		RunE: func(_ *cobra.Command, args []string) error {
			b, err := c.readSnapshot(args[0])
			if err != nil {
				return err
			}
			i, _, err := control.ReadSnapshot(b)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if c.output == "json" {
				return c.json(i)
			}
			lock := "no"
			if i.Autolock {
				lock = "yes"
			}
			c.table([][]string{{"Cluster:", i.Cluster}, {"Saved:", i.Saved.Format(time.RFC3339)}, {"Index:", fmt.Sprint(i.Index)}, {"Size:", fmt.Sprint(len(b))}, {"Format:", fmt.Sprint(i.Format)},
				{"Networks:", fmt.Sprint(i.Networks)}, {"Services:", fmt.Sprint(i.Services)}, {"Tasks:", fmt.Sprint(i.Tasks)}, {"Nodes:", fmt.Sprint(i.Nodes)},
				{"Managers:", strings.Join(i.Managers, ", ")}, {"Autolock:", lock}})
			return nil
		}}
	c.outputFlag(cmd, "json")
	return cmd
}

func (c *cli) snapshotRestore() *cobra.Command {
	req := &shoalv1.RestoreSnapshotRequest{}
	cmd := &cobra.Command{Use: "restore FILE", Short: "Make the cluster of a snapshot, with this node as its manager", Args: exactly(1),
		Long: `Restore makes the cluster of a snapshot again: on a node that is in no cluster, or
with --force on the only manager that is left of that very cluster, which gives up
what was changed since. This node is its only manager then; the others count no more,
as with 'shoal init --force-new-cluster'. Workers that still run follow it once they
reach it: by itself where it has the address of a manager of before.`,
		Example: "  shoal snapshot restore cluster.snap\n  shoal snapshot restore --advertise-addr 192.0.2.1 cluster.snap",
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if req.Snapshot, err = c.readSnapshot(args[0]); err != nil {
				return err
			}
			if _, _, err := control.ReadSnapshot(req.Snapshot); err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			resp, err := c.local().RestoreSnapshot(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			c.printRecovered(resp.Msg)
			if k := resp.Msg.UnlockKey; k != "" {
				fmt.Fprintf(c.out, "\nThe managers' disks are sealed, and the unlock key is as it was: 'shoal unlock-key' shows it.\n")
			}
			return nil
		}}
	cmd.Flags().StringVar(&req.AdvertiseAddr, "advertise-addr", "", "address or interface that other nodes reach this one by (default: that of the default route)")
	cmd.Flags().BoolVarP(&req.Force, "force", "f", false, "also on the only manager of that cluster: what was changed since is given up")
	return cmd
}
