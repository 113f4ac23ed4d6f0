package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

func (c *cli) secretCmd() *cobra.Command {
	cmd := c.blobCmd(spec.KindSecret, "Manage secrets, which tasks of services get as files")
	cmd.Example = "  shoal secret create db-password password.txt\n  printf s3cret | shoal secret create db-password -\n  shoal svc create --name db --secret db-password postgres"
	return cmd
}

func (c *cli) configCmd() *cobra.Command {
	cmd := c.blobCmd(spec.KindConfig, "Manage configs, which tasks of services get as files")
	cmd.Example = "  shoal config create site nginx.conf\n  shoal svc create --name web --config source=site,target=/etc/nginx/nginx.conf nginx"
	return cmd
}

func (c *cli) blobCmd(k spec.BlobKind, short string) *cobra.Command {
	return group(string(k), short, nil, c.blobCreate(k), c.blobLs(k), c.blobInspect(k), c.blobUpdate(k), c.blobRm(k))
}

func (c *cli) blobs(cmd *cobra.Command, k spec.BlobKind, refs ...string) ([]*shoalv1.Blob, error) {
	resp, err := c.control().ListBlobs(cmd.Context(), connect.NewRequest(&shoalv1.ListBlobsRequest{Kind: string(k), Refs: refs}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.Blobs, nil
}

// completeBlobs completes names of secrets or configs.
func (c *cli) completeBlobs(k spec.BlobKind) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		bs, _ := c.blobs(cmd, k)
		return each1(bs, func(b *shoalv1.Blob) string { return b.Name }), cobra.ShellCompDirectiveNoFileComp
	}
}

func (c *cli) blobCreate(k spec.BlobKind) *cobra.Command {
	var labelArgs []string
	var driver, template string
	cmd := &cobra.Command{Use: "create NAME FILE|-", Short: fmt.Sprintf("Make a %s of a file, or of standard input", k),
		Long: fmt.Sprintf(`Create makes a %s of a file's content, or with - of standard input, as it is: also
its last newline. It can't be changed: make another, and give that to the services
with 'shoal svc update --%s-rm OLD --%s-add NEW'.`, k, k, k),
		Example: fmt.Sprintf("  shoal %s create NAME file.txt\n  printf value | shoal %s create NAME -", k, k), Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if driver != "" || template != "" {
				return usageError(cmd, errors.New("drivers are not here: what is given is kept as it is"))
			}
			if len(args) == 1 {
				return usageError(cmd, fmt.Errorf("no content: name a file, or - for standard input"))
			}
			l, err := labels(labelArgs)
			if err != nil {
				return usageError(cmd, err)
			}
			b := &shoalv1.Blob{Kind: string(k), Name: args[0], Labels: l}
			in := c.in
			if args[1] != "-" {
				f, err := os.Open(args[1])
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			// One byte more than is allowed is enough to be refused.
			if b.Data, err = io.ReadAll(io.LimitReader(in, int64(k.MaxBlob())+1)); err != nil {
				return fmt.Errorf("%s %s: %w", k, args[0], err)
			}
			if err := api.ToBlob(b).Validate(); err != nil {
				return err
			}
			resp, err := c.control().CreateBlob(cmd.Context(), connect.NewRequest(&shoalv1.CreateBlobRequest{Blob: b}))
			if err != nil {
				return err
			}
			fmt.Fprintln(c.out, resp.Msg.Blob.Id)
			return nil
		}}
	cmd.Flags().StringArrayVarP(&labelArgs, "label", "l", nil, "label, key=value (repeatable)")
	cmd.Flags().StringVarP(&driver, "driver", "d", "", "not here")
	cmd.Flags().StringVar(&template, "template-driver", "", "not here")
	_ = cmd.Flags().MarkHidden("driver")
	_ = cmd.Flags().MarkHidden("template-driver")
	return cmd
}

// blobJSON is a secret or a config in JSON, with Docker's fields.
type blobJSON struct {
	ID        string    `json:"ID"`
	Version   versionOf `json:"Version"`
	CreatedAt time.Time `json:"CreatedAt"`
	UpdatedAt time.Time `json:"UpdatedAt"`
	Spec      blobSpec  `json:"Spec"`
}

type versionOf struct {
	Index uint64 `json:"Index"`
}

type blobSpec struct {
	Name   string            `json:"Name"`
	Labels map[string]string `json:"Labels"`
	Data   []byte            `json:"Data,omitempty"` // of a config; base64 in JSON, as in Docker
}

func toBlobJSON(b *shoalv1.Blob) (any, error) {
	out := blobJSON{ID: b.Id, Version: versionOf{b.Version}, CreatedAt: instant(b.CreatedMs), UpdatedAt: instant(b.UpdatedMs), Spec: blobSpec{b.Name, b.Labels, b.Data}}
	if out.Spec.Labels == nil {
		out.Spec.Labels = map[string]string{}
	}
	return out, nil
}

func (c *cli) blobLs(k spec.BlobKind) *cobra.Command {
	type blob = *shoalv1.Blob
	l := &listing[blob]{
		id: func(b blob) string { return b.Id }, json: toBlobJSON, labels: func(b blob) map[string]string { return b.Labels },
		columns: []column[blob]{
			{"ID", false, func(b blob) string { return b.Id }},
			{"NAME", false, func(b blob) string { return b.Name }},
			{"CREATED", false, func(b blob) string { return ago(b.CreatedMs) }},
			{"UPDATED", false, func(b blob) string { return ago(b.UpdatedMs) }},
			{"LABELS", true, func(b blob) string { return labelText(b.Labels) }},
		},
		filters: map[string]func(blob, string) bool{
			"id":   func(b blob, v string) bool { return strings.HasPrefix(b.Id, v) },
			"name": func(b blob, v string) bool { return nameMatches(b.Name, v) },
		},
		fields: map[string]func(blob) string{"CreatedAt": func(b blob) string { return ago(b.CreatedMs) }, "UpdatedAt": func(b blob) string { return ago(b.UpdatedMs) }},
	}
	cmd := &cobra.Command{Use: "ls", Short: fmt.Sprintf("List %ss", k), Aliases: []string{"list"}, Args: exactly(0), Example: fmt.Sprintf("  shoal %s ls\n  shoal %s ls -f label=tier=front -q", k, k),
		RunE: func(cmd *cobra.Command, _ []string) error {
			bs, err := c.blobs(cmd, k)
			if err != nil {
				return err
			}
			return l.print(c, cmd, bs)
		}}
	l.add(c, cmd)
	return cmd
}

func (c *cli) blobInspect(k spec.BlobKind) *cobra.Command {
	var pretty bool
	cmd := &cobra.Command{Use: "inspect NAME [NAME...]", Short: fmt.Sprintf("Show %ss, in Docker's fields", k), Args: atLeast(1), Example: fmt.Sprintf("  shoal %s inspect NAME\n  shoal %s inspect --pretty NAME", k, k),
		ValidArgsFunction: c.completeBlobs(k),
		RunE: func(cmd *cobra.Command, args []string) error {
			bs, err := c.blobs(cmd, k, args...)
			if err != nil {
				return err
			}
			if pretty {
				for _, b := range bs {
					fmt.Fprintf(c.out, "ID:\t\t\t%s\nName:\t\t\t%s\n", b.Id, b.Name)
					if len(b.Labels) > 0 {
						fmt.Fprintln(c.out, "Labels:")
					}
					for _, l := range slices.Sorted(maps.Keys(b.Labels)) {
						fmt.Fprintf(c.out, " - %s=%s\n", l, b.Labels[l])
					}
					fmt.Fprintf(c.out, "Created at:\t\t%s\nUpdated at:\t\t%s\n", createdAt(b.CreatedMs), createdAt(b.UpdatedMs))
					if k == spec.KindConfig {
						fmt.Fprintf(c.out, "Data:\n%s\n", b.Data)
					}
				}
				return nil
			}
			js, err := each(bs, toBlobJSON)
			if err != nil {
				return err
			}
			return inspected(c, cmd, js, nil)
		}}
	c.inspectFlags(cmd)
	cmd.Flags().BoolVar(&pretty, "pretty", false, "for a person")
	return cmd
}

func (c *cli) blobUpdate(k spec.BlobKind) *cobra.Command {
	var add, rm []string
	cmd := &cobra.Command{Use: "update NAME", Short: fmt.Sprintf("Change the labels of a %s", k), Args: exactly(1), Example: fmt.Sprintf("  shoal %s update --label-add tier=front NAME", k),
		ValidArgsFunction: c.completeBlobs(k),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := labels(add)
			if err != nil {
				return usageError(cmd, err)
			}
			if len(l) == 0 && len(rm) == 0 {
				return usageError(cmd, errNoChange)
			}
			bs, err := c.blobs(cmd, k, args[0])
			if err != nil {
				return err
			}
			now := merged(maps.Clone(bs[0].Labels), l)
			for _, key := range rm {
				delete(now, key)
			}
			if _, err := c.control().UpdateBlob(cmd.Context(), connect.NewRequest(&shoalv1.UpdateBlobRequest{Kind: string(k), Ref: bs[0].Id, Labels: now})); err != nil {
				return err
			}
			fmt.Fprintln(c.out, bs[0].Name)
			return nil
		}}
	cmd.Flags().StringArrayVar(&add, "label-add", nil, "set a label, key=value (repeatable)")
	cmd.Flags().StringArrayVar(&rm, "label-rm", nil, "remove a label, by key (repeatable)")
	return cmd
}

func (c *cli) blobRm(k spec.BlobKind) *cobra.Command {
	return &cobra.Command{Use: "rm NAME [NAME...]", Short: fmt.Sprintf("Remove %ss that no service uses", k), Aliases: []string{"remove"}, Args: atLeast(1), Example: fmt.Sprintf("  shoal %s rm NAME", k),
		ValidArgsFunction: c.completeBlobs(k),
		RunE: func(cmd *cobra.Command, args []string) error {
			var errs []error
			for _, a := range args {
				if _, err := c.control().RemoveBlob(cmd.Context(), connect.NewRequest(&shoalv1.RemoveBlobRequest{Kind: string(k), Ref: a})); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(c.out, a)
			}
			return errors.Join(errs...)
		}}
}

// blobRefs are the values of --secret or --config.
func blobRefs(k spec.BlobKind, args []string) ([]*shoalv1.BlobRef, error) {
	var out []spec.BlobRef
	for _, a := range args {
		r, err := spec.ParseBlobRef(k, a)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return api.BlobRefs(out), nil
}

// changeBlobs is what update makes of the ones that are there: rm by name or ID, then add.
// As with Docker one that is not there may be taken away, so that a script may be run again.
func changeBlobs(k spec.BlobKind, have []*shoalv1.BlobRef, rm, add []string) ([]*shoalv1.BlobRef, error) {
	for _, r := range rm {
		have = slices.DeleteFunc(slices.Clone(have), func(b *shoalv1.BlobRef) bool { return b.Name == r || b.Id == r })
	}
	more, err := blobRefs(k, add)
	return append(have, more...), err
}
