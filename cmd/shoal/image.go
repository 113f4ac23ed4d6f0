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

	"github.com/shoalnet/shoal/agent"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// nodeRef is --node of what concerns one node: its ID, empty for this one.
func (c *cli) nodeRef(cmd *cobra.Command, ref string) (string, error) {
	if ref == "" {
		return "", nil
	}
	ns, _, err := c.nodes(cmd.Context(), ref)
	if err != nil {
		return "", err
	}
	return ns[0].Id, nil
}

func forNode[T any](msg *T, node string) *connect.Request[T] {
	req := connect.NewRequest(msg)
	if node != "" {
		req.Header().Set(agent.NodeHeader, node)
	}
	return req
}

func (c *cli) imageCmd() *cobra.Command {
	cmd := group("image", "Manage the images of a node", nil, c.imageLs(), c.imagePull(), c.imageRm(), c.imagePrune(), c.imageLoad(), c.imageSave(), c.imageInspect())
	cmd.Example = "  shoal image pull nginx\n  shoal image load -i web.tar"
	return cmd
}

func (c *cli) onNode(cmd *cobra.Command, node *string) {
	cmd.Flags().StringVar(node, "node", "", "node, by name or ID (default: this one)")
	_ = cmd.RegisterFlagCompletionFunc("node", c.complete(c.nodeNames))
}

// imageRow is an image for templates and JSON, in Docker's words.
type imageRow struct {
	Repository string    `json:"repository"`
	Tag        string    `json:"tag"`
	Digest     string    `json:"digest"`
	ID         string    `json:"id"`
	Size       int64     `json:"size"`
	CreatedAt  time.Time `json:"created"`
	InUse      []string  `json:"in_use,omitempty"`
	Ref        string    `json:"ref"`
}

func toImageRow(i *shoalv1.Image) imageRow {
	r := imageRow{Digest: i.Digest, ID: i.Digest, Size: i.Size, CreatedAt: time.UnixMilli(i.CreatedMs).UTC(), InUse: i.InUse, Ref: i.Ref, Tag: "<none>"}
	name, _, _ := strings.Cut(i.Name, "@")
	r.Repository = name
	if n := strings.LastIndexByte(name, ':'); n > strings.LastIndexByte(name, '/') {
		r.Repository, r.Tag = name[:n], name[n+1:]
	}
	return r
}

func shortDigest(d string) string {
	d = strings.TrimPrefix(d, "sha256:")
	return d[:min(len(d), 12)]
}

func bytesText(n int64) string {
	switch {
	case n >= 1e9:
		return fmt.Sprintf("%.2fGB", float64(n)/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1fMB", float64(n)/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.1fkB", float64(n)/1e3)
	}
	return fmt.Sprintf("%dB", n)
}

func (c *cli) imageLs() *cobra.Command {
	var node string
	var quiet, digests bool
	cmd := &cobra.Command{Use: "ls [NAME]", Short: "List images", Example: "  shoal image ls\n  shoal image ls --node node2 -o json", Aliases: []string{"list"}, Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := c.nodeRef(cmd, node)
			if err != nil {
				return err
			}
			resp, err := c.node().ImageList(cmd.Context(), forNode(&shoalv1.ImageListRequest{}, id))
			if err != nil {
				return err
			}
			var rows []imageRow
			for _, i := range resp.Msg.Images {
				r := toImageRow(i)
				if len(args) == 1 && args[0] != r.Repository && args[0] != r.Repository+":"+r.Tag {
					continue
				}
				rows = append(rows, r)
			}
			if quiet {
				for _, r := range rows {
					fmt.Fprintln(c.out, shortDigest(r.Digest))
				}
				return nil
			}
			if c.output == "json" {
				if rows == nil {
					rows = []imageRow{}
				}
				return c.json(rows)
			}
			lines := [][]string{{"REPOSITORY", "TAG", "IMAGE ID", "SIZE", "USED BY"}}
			if digests {
				lines[0][2] = "DIGEST"
			}
			for _, r := range rows {
				id := shortDigest(r.Digest)
				if digests {
					id = r.Digest
				}
				used := "-"
				if len(r.InUse) > 0 {
					used = fmt.Sprintf("%d", len(r.InUse))
				}
				lines = append(lines, []string{r.Repository, r.Tag, id, bytesText(r.Size), used})
			}
			c.table(lines)
			return nil
		}}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "IDs only")
	c.outputFlag(cmd, "json")
	cmd.Flags().BoolVar(&digests, "digests", false, "whole digests")
	c.onNode(cmd, &node)
	return cmd
}

func (c *cli) imagePull() *cobra.Command {
	var node string
	var quiet bool
	var platform platformFlag
	cmd := &cobra.Command{Use: "pull NAME[:TAG|@DIGEST]", Short: "Fetch an image to a node", Args: exactly(1),
		Example: "  shoal image pull nginx\n  shoal image pull --node node2 registry.example.com:5000/web:1.4",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := spec.ValidateImage(args[0]); err != nil {
				return err
			}
			if err := platform.parse(cmd); err != nil {
				return err
			}
			id, err := c.nodeRef(cmd, node)
			if err != nil {
				return err
			}
			if err := platform.check(cmd.Context(), c, id); err != nil {
				return err
			}
			auth, err := registryAuth(args[0])
			if err != nil {
				return err
			}
			stream, err := c.node().ImagePull(cmd.Context(), forNode(&shoalv1.ImagePullRequest{Image: args[0], Auth: auth}, id))
			if err != nil {
				return err
			}
			defer stream.Close()
			tty, last := c.terminal() && !quiet, ""
			for stream.Receive() {
				m := stream.Msg()
				if m.Done != "" {
					if tty {
						fmt.Fprint(c.err, "\r\033[K")
					}
					fmt.Fprintln(c.out, m.Done)
					return nil
				}
				switch {
				case quiet || m.Progress == last:
				case tty:
					fmt.Fprintf(c.err, "\r\033[K%s", clip(m.Progress, 79))
				default:
					fmt.Fprintln(c.err, m.Progress)
				}
				last = m.Progress
			}
			if tty && last != "" {
				fmt.Fprintln(c.err)
			}
			if err := stream.Err(); err != nil {
				return c.api().Explain(err)
			}
			return errors.New("the node ended the pull without a word: see its agent's log")
		}}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	platform.add(cmd.Flags())
	c.onNode(cmd, &node)
	return cmd
}

func (c *cli) imageRm() *cobra.Command {
	var node string
	var force bool
	cmd := &cobra.Command{Use: "rm IMAGE [IMAGE...]", Short: "Remove images from a node", Example: "  shoal image rm web:1.3", Aliases: []string{"remove"}, Args: atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := c.nodeRef(cmd, node)
			if err != nil {
				return err
			}
			var errs []error
			for _, a := range args {
				resp, err := c.node().ImageRemove(cmd.Context(), forNode(&shoalv1.ImageRemoveRequest{Image: a, Force: force}, id))
				if err != nil {
					errs = append(errs, err)
					continue
				}
				for _, r := range resp.Msg.Removed {
					fmt.Fprintln(c.out, "Untagged: "+r)
				}
			}
			return errors.Join(errs...)
		}}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "also those that a task uses")
	c.onNode(cmd, &node)
	return cmd
}

func (c *cli) imagePrune() *cobra.Command {
	var node, until string
	var all, force bool
	cmd := &cobra.Command{Use: "prune", Short: "Remove images that no task of a node uses", Example: "  shoal image prune -a --filter until=24h", Args: exactly(0),
		Long: "Prune removes images without a tag that no task uses; with -a, every image that no\ntask uses.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var unused time.Duration
			if until != "" {
				v, ok := strings.CutPrefix(until, "until=")
				if !ok {
					return usageError(cmd, fmt.Errorf("--filter %q: use until=DURATION", until))
				}
				var err error
				if unused, err = time.ParseDuration(v); err != nil || unused < 0 {
					return usageError(cmd, fmt.Errorf("--filter %q: want a duration like 24h", until))
				}
			}
			id, err := c.nodeRef(cmd, node)
			if err != nil {
				return err
			}
			resp, err := c.node().ImagePrune(cmd.Context(), forNode(&shoalv1.ImagePruneRequest{All: all, UnusedMs: unused.Milliseconds()}, id))
			if err != nil {
				return err
			}
			for _, r := range resp.Msg.Removed {
				fmt.Fprintln(c.out, "Removed: "+r)
			}
			fmt.Fprintf(c.out, "Total reclaimed space: %s\n", bytesText(resp.Msg.Bytes))
			return nil
		}}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also those with a tag")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "as in Docker; nothing is asked here")
	cmd.Flags().StringVar(&until, "filter", "", "until=DURATION: only what was not used for so long")
	c.onNode(cmd, &node)
	return cmd
}

func (c *cli) imageLoad() *cobra.Command {
	var node, input, name string
	var quiet bool
	cmd := &cobra.Command{Use: "load", Short: "Read an image from an archive into a node", Args: exactly(0),
		Long:    "Load reads an archive of 'docker save', or an OCI layout in a tar, from a file or\nstandard input, and prints the names of the images in it.",
		Example: "  shoal image load -i web.tar\n  docker save web:1.4 | shoal image load --node node2",
		RunE: func(cmd *cobra.Command, _ []string) error {
			in := c.in
			if input != "" {
				f, err := os.Open(input)
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			} else if _, err := c.ownTerminal(false); err != nil {
				return err
			}
			id, err := c.nodeRef(cmd, node)
			if err != nil {
				return err
			}
			stream := c.node().ImageLoad(cmd.Context())
			if id != "" {
				stream.RequestHeader().Set(agent.NodeHeader, id)
			}
			buf := make([]byte, 256<<10)
			msg := &shoalv1.ImageLoadRequest{Name: name}
			for {
				n, rerr := io.ReadFull(in, buf)
				msg.Data = buf[:n]
				if err := stream.Send(msg); err != nil && !errors.Is(err, io.EOF) {
					return err
				} else if err != nil {
					break
				}
				msg = &shoalv1.ImageLoadRequest{}
				if errors.Is(rerr, io.EOF) || errors.Is(rerr, io.ErrUnexpectedEOF) {
					break
				}
				if rerr != nil {
					return rerr
				}
			}
			resp, err := stream.CloseAndReceive()
			if err != nil {
				return c.api().Explain(err)
			}
			for _, i := range resp.Msg.Images {
				fmt.Fprintln(c.out, "Loaded image: "+i)
			}
			return nil
		}}
	cmd.Flags().StringVarP(&input, "input", "i", "", "file to read (default: standard input)")
	cmd.Flags().StringVar(&name, "name", "", "name for an image whose archive has none")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "as in Docker; there is no progress")
	c.onNode(cmd, &node)
	return cmd
}

func (c *cli) imageSave() *cobra.Command {
	var node, output string
	cmd := &cobra.Command{Use: "save IMAGE [IMAGE...]", Short: "Write images of a node to an archive", Args: atLeast(1),
		Example: "  shoal image save -o web.tar web:1.4",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			out := c.out
			if output != "" {
				if err := notInPlaceOf(output); err != nil {
					return err
				}
				f, ferr := os.CreateTemp(dirOf(output), ".shoal-save-")
				if ferr != nil {
					return ferr
				}
				out = f
				defer func() {
					err = errors.Join(err, f.Close())
					if err == nil {
						err = errors.Join(os.Chmod(f.Name(), 0o644), os.Rename(f.Name(), output))
					}
					if err != nil {
						err = errors.Join(err, os.Remove(f.Name()))
					}
				}()
			} else if c.terminal() {
				return usageError(cmd, errors.New("an archive is nothing for a terminal: give -o FILE, or redirect the output"))
			}
			id, err := c.nodeRef(cmd, node)
			if err != nil {
				return err
			}
			stream, err := c.node().ImageSave(cmd.Context(), forNode(&shoalv1.ImageSaveRequest{Images: args}, id))
			if err != nil {
				return err
			}
			defer stream.Close()
			for stream.Receive() {
				if _, err := out.Write(stream.Msg().Data); err != nil {
					return err
				}
			}
			return c.api().Explain(stream.Err())
		}}
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write (default: standard output)")
	c.onNode(cmd, &node)
	return cmd
}

// notInPlaceOf refuses to write a file where a device, a pipe or a socket is. Files are
// written whole and then renamed, and whoever has it done by root to /dev/null has a file
// there that everybody writes to and reads from.
func notInPlaceOf(path string) error {
	i, err := os.Stat(path)
	if err != nil { // of a file that can't be written there, the write tells
		return nil
	}
	what := ""
	switch m := i.Mode(); {
	case m&os.ModeDevice != 0:
		what = "device"
	case m&os.ModeNamedPipe != 0:
		what = "pipe"
	case m&os.ModeSocket != 0:
		what = "socket"
	default:
		return nil
	}
	return fmt.Errorf("%s is a %s, no file to be replaced: write to standard output, and redirect that", path, what)
}

func dirOf(path string) string {
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		return path[:i+1]
	}
	return "."
}

func (c *cli) imageInspect() *cobra.Command {
	var node string
	cmd := &cobra.Command{Use: "inspect IMAGE [IMAGE...]", Short: "Show what an image says of itself, as JSON", Example: "  shoal image inspect web:1.4", Args: atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := c.nodeRef(cmd, node)
			if err != nil {
				return err
			}
			var out []any
			for _, a := range args {
				resp, err := c.node().ImageInspect(cmd.Context(), forNode(&shoalv1.ImageInspectRequest{Image: a}, id))
				if err != nil {
					return err
				}
				v, err := imageInspection(resp.Msg)
				if err != nil {
					return err
				}
				out = append(out, v)
			}
			return c.json(out)
		}}
	c.onNode(cmd, &node)
	return cmd
}

// shortcuts are Docker's commands without the noun, for who has them in the fingers.
func (c *cli) shortcuts() []*cobra.Command {
	images := c.imageLs()
	images.Use, images.Aliases = "images [NAME]", nil
	rmi := c.imageRm()
	rmi.Use, rmi.Aliases = "rmi IMAGE [IMAGE...]", nil
	out := []*cobra.Command{images, rmi, c.imagePull(), c.imageLoad(), c.imageSave()}
	for _, cmd := range out {
		cmd.Hidden = true
	}
	return out
}
