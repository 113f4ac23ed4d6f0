package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

func (c *cli) volumeCmd() *cobra.Command {
	cmd := group("volume", "Manage the volumes of a node", nil, c.volumeCreate(), c.volumeLs(), c.volumeInspect(), c.volumeRm(), c.volumePrune())
	cmd.Example = "  shoal volume create data\n  shoal run --rm -v data:/data debian ls /data"
	return cmd
}

// volumeRow is a volume for JSON, in Docker's words.
type volumeRow struct {
	Name       string            `json:"Name"`
	Driver     string            `json:"Driver"`
	Mountpoint string            `json:"Mountpoint"`
	CreatedAt  time.Time         `json:"CreatedAt"`
	Labels     map[string]string `json:"Labels"`
	Scope      string            `json:"Scope"`
	Node       string            `json:"Node"`
	InUse      []string          `json:"InUse,omitempty"`
}

func toVolumeRow(v *shoalv1.Volume, node string) volumeRow {
	return volumeRow{Name: v.Name, Driver: "local", Mountpoint: v.Path, CreatedAt: time.UnixMilli(v.CreatedMs).UTC(), Labels: v.Labels, Scope: "local", Node: node, InUse: v.InUse}
}

func (c *cli) volumeCreate() *cobra.Command {
	var node, driver, name string
	var labelArgs []string
	cmd := &cobra.Command{Use: "create [VOLUME]", Short: "Make a volume on a node", Example: "  shoal volume create data --node node2", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if driver != "local" {
				return usageError(cmd, fmt.Errorf("volume driver %q is not here: use local", driver))
			}
			if len(args) == 1 {
				name = args[0]
			}
			if name != "" {
				if err := spec.ValidateVolumeName(name); err != nil {
					return err
				}
			}
			l, err := labels(labelArgs)
			if err != nil {
				return usageError(cmd, err)
			}
			id, err := c.nodeRef(cmd, node)
			if err != nil {
				return err
			}
			resp, err := c.node().VolumeCreate(cmd.Context(), forNode(&shoalv1.VolumeCreateRequest{Name: name, Labels: l}, id))
			if err != nil {
				return err
			}
			fmt.Fprintln(c.out, resp.Msg.Volume.Name)
			return nil
		}}
	cmd.Flags().StringVarP(&driver, "driver", "d", "local", "local is the only one")
	cmd.Flags().StringArrayVar(&labelArgs, "label", nil, "label, key=value (repeatable)")
	cmd.Flags().StringVar(&name, "name", "", "its name (Docker's older way)")
	c.onNode(cmd, &node)
	return cmd
}

func (c *cli) volumesOf(cmd *cobra.Command, node string) (string, *shoalv1.VolumeListResponse, error) {
	id, err := c.nodeRef(cmd, node)
	if err != nil {
		return "", nil, err
	}
	resp, err := c.node().VolumeList(cmd.Context(), forNode(&shoalv1.VolumeListRequest{}, id))
	if err != nil {
		return "", nil, err
	}
	return id, resp.Msg, nil
}

func (c *cli) volumeLs() *cobra.Command {
	var node string
	var quiet bool
	cmd := &cobra.Command{Use: "ls", Short: "List volumes", Example: "  shoal volume ls --node node2", Aliases: []string{"list"}, Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, resp, err := c.volumesOf(cmd, node)
			if err != nil {
				return err
			}
			rows := [][]string{{"DRIVER", "VOLUME NAME", "USED BY"}}
			all := []volumeRow{}
			for _, v := range resp.Volumes {
				if quiet {
					fmt.Fprintln(c.out, v.Name)
				}
				used := "-"
				if len(v.InUse) > 0 {
					used = fmt.Sprint(len(v.InUse))
				}
				rows = append(rows, []string{"local", v.Name, used})
				all = append(all, toVolumeRow(v, resp.Node))
			}
			switch {
			case quiet:
			case c.output == "json":
				return c.json(all)
			default:
				c.table(rows)
			}
			return nil
		}}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "names only")
	c.outputFlag(cmd, "json")
	c.onNode(cmd, &node)
	return cmd
}

func (c *cli) volumeInspect() *cobra.Command {
	var node string
	cmd := &cobra.Command{Use: "inspect VOLUME [VOLUME...]", Short: "Show volumes, as JSON", Example: "  shoal volume inspect data", Args: atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, resp, err := c.volumesOf(cmd, node)
			if err != nil {
				return err
			}
			out := []volumeRow{}
			for _, a := range args {
				found := false
				for _, v := range resp.Volumes {
					if v.Name == a {
						out, found = append(out, toVolumeRow(v, resp.Node)), true
					}
				}
				if !found {
					return fmt.Errorf("no such volume: %s: see 'shoal volume ls'", a)
				}
			}
			return c.json(out)
		}}
	c.onNode(cmd, &node)
	return cmd
}

func (c *cli) volumeRm() *cobra.Command {
	var node string
	var force bool
	cmd := &cobra.Command{Use: "rm VOLUME [VOLUME...]", Short: "Remove volumes and their data", Example: "  shoal volume rm data", Aliases: []string{"remove"}, Args: atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := c.nodeRef(cmd, node)
			if err != nil {
				return err
			}
			var errs []error
			for _, a := range args {
				if _, err := c.node().VolumeRemove(cmd.Context(), forNode(&shoalv1.VolumeRemoveRequest{Name: a, Force: force}, id)); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(c.out, a)
			}
			return errors.Join(errs...)
		}}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "one that is not there is no error")
	c.onNode(cmd, &node)
	return cmd
}

func (c *cli) volumePrune() *cobra.Command {
	var node string
	var all, force bool
	cmd := &cobra.Command{Use: "prune", Short: "Remove volumes that no task uses", Example: "  shoal volume prune -a", Args: exactly(0),
		Long: "Prune removes volumes without a name that no task uses; with -a, those with a name,\ntoo. Their data is gone.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			id, resp, err := c.volumesOf(cmd, node)
			if err != nil {
				return err
			}
			for _, v := range resp.Volumes {
				if len(v.InUse) > 0 || !v.Anonymous && !all {
					continue
				}
				if _, err := c.node().VolumeRemove(cmd.Context(), forNode(&shoalv1.VolumeRemoveRequest{Name: v.Name, Force: true}, id)); err != nil {
					return err
				}
				fmt.Fprintln(c.out, v.Name)
			}
			return nil
		}}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also those with a name")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "as in Docker; nothing is asked here")
	c.onNode(cmd, &node)
	return cmd
}

// imageInspection is an image in the fields that docker image inspect has.
func imageInspection(r *shoalv1.ImageInspectResponse) (any, error) {
	var cfg struct {
		Architecture, OS, Author string
		Created                  time.Time
		Config                   json.RawMessage
		RootFS                   struct {
			Type    string
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal(r.Config, &cfg); err != nil {
		return nil, fmt.Errorf("configuration of image %s: %w", r.Image.Name, err)
	}
	return map[string]any{"Id": r.Image.Digest, "RepoTags": []string{r.Image.Name}, "RepoDigests": []string{r.Image.Ref}, "Created": cfg.Created, "Author": cfg.Author,
		"Architecture": cfg.Architecture, "Os": cfg.OS, "Size": r.Image.Size, "Config": cfg.Config,
		"RootFS": map[string]any{"Type": cfg.RootFS.Type, "Layers": cfg.RootFS.DiffIDs}, "UsedBy": r.Image.InUse}, nil
}
