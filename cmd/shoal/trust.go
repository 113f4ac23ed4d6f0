package main

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// joinCommand is what to type on a node that is to join.
func joinCommand(token string, manager *shoalv1.NodeInfo) string {
	return fmt.Sprintf("shoal join --token %s %s", token, hostPort(manager))
}

func (c *cli) tokenCmd() *cobra.Command {
	g := group("token", "Show or replace the tokens that nodes join with", nil, c.tokenShow(), c.tokenRotate())
	g.Example = "  shoal token show worker\n  shoal token rotate manager"
	return g
}

var roles = []string{spec.RoleWorker, spec.RoleManager}

// oneRole is the argument of the token commands.
func oneRole(cmd *cobra.Command, args []string) error {
	if len(args) == 1 && (args[0] == spec.RoleWorker || args[0] == spec.RoleManager) {
		return nil
	}
	if len(args) == 1 {
		return usageError(cmd, fmt.Errorf("role %q: use worker or manager: %s", args[0], cmd.UseLine()))
	}
	return exactly(1)(cmd, args)
}

func (c *cli) tokenShow() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{Use: "show worker|manager", Short: "Show the command by which a node joins", Args: oneRole, ValidArgs: roles,
		Example: "  shoal token show worker\n  shoal token show -q manager     # the token alone",
		RunE: func(cmd *cobra.Command, args []string) error {
			resp, err := c.control().ShowToken(cmd.Context(), connect.NewRequest(&shoalv1.ShowTokenRequest{Role: args[0]}))
			if err != nil {
				return err
			}
			return c.printToken(resp.Msg, args[0], quiet)
		}}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "only the token")
	c.outputFlag(cmd, "json")
	return cmd
}

func (c *cli) printToken(m *shoalv1.ShowTokenResponse, role string, quiet bool) error {
	host := ""
	if len(m.Managers) > 0 {
		host = hostPort(m.Managers[0])
	}
	switch {
	case c.output == "json":
		return c.json(map[string]any{"role": role, "token": m.Token, "since_ms": m.SinceMs, "manager": host})
	case quiet || host == "":
		fmt.Fprintln(c.out, m.Token)
	default:
		fmt.Fprintf(c.out, "To add a %s, start its agent and run on it:\n\n    %s\n", role, joinCommand(m.Token, m.Managers[0]))
	}
	return nil
}

func (c *cli) tokenRotate() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{Use: "rotate worker|manager", Short: "Replace a join token: the old one is worth nothing then", Args: oneRole, ValidArgs: roles,
		Example: "  shoal token rotate worker\n  shoal token rotate -q manager     # prints the token alone",
		Long: `Rotate makes another join token for a role. The one before is worth nothing from
then on; nodes that have joined with it stay.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := c.control().RotateToken(cmd.Context(), connect.NewRequest(&shoalv1.RotateTokenRequest{Role: args[0]})); err != nil {
				return err
			}
			resp, err := c.control().ShowToken(cmd.Context(), connect.NewRequest(&shoalv1.ShowTokenRequest{Role: args[0]}))
			if err != nil {
				return err
			}
			return c.printToken(resp.Msg, args[0], quiet)
		}}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "only the new token")
	c.outputFlag(cmd, "json")
	return cmd
}

func (c *cli) caCmd() *cobra.Command {
	g := group("ca", "Show or replace the cluster's certificate authority", nil, c.caShow(), c.caRotate())
	g.Example = "  shoal ca show\n  shoal ca rotate"
	return g
}

func pemOf(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func (c *cli) caShow() *cobra.Command {
	var certs bool
	cmd := &cobra.Command{Use: "show", Short: "Show the root certificate, and which nodes have moved to it", Args: exactly(0),
		Example: "  shoal ca show\n  shoal ca show --pem > root.pem",
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := c.control().ShowCA(cmd.Context(), connect.NewRequest(&shoalv1.ShowCARequest{}))
			if err != nil {
				return err
			}
			m := resp.Msg
			root := func(r *shoalv1.ShowCAResponse_Root) map[string]any {
				if r == nil {
					return nil
				}
				return map[string]any{"digest": r.Digest, "created_ms": r.CreatedMs, "end_ms": r.EndMs, "certificate": pemOf(r.Certificate)}
			}
			switch {
			case c.output == "json":
				return c.json(map[string]any{"cluster": m.Cluster, "root": root(m.Root), "old": root(m.Old), "waiting": m.Waiting, "lost": m.Lost})
			case certs:
				fmt.Fprint(c.out, pemOf(m.Root.GetCertificate()))
				if m.Old != nil {
					fmt.Fprint(c.out, pemOf(m.Old.Certificate))
				}
				return nil
			}
			day := func(ms int64) string { return time.UnixMilli(ms).UTC().Format("2006-01-02") }
			rows := [][]string{{"Cluster:", m.Cluster}, {"Root:", m.Root.GetDigest()}, {"Made:", day(m.Root.GetCreatedMs())}, {"Ends:", day(m.Root.GetEndMs())}}
			if m.Old != nil {
				rows = append(rows, []string{"Replaces:", m.Old.Digest})
				state := "all nodes have moved; the old root goes now"
				if len(m.Waiting) > 0 {
					state = "not moved yet: " + strings.Join(m.Waiting, ", ")
				}
				rows = append(rows, []string{"Rotation:", state})
				if len(m.Lost) > 0 {
					rows = append(rows, []string{"Down:", strings.Join(m.Lost, ", ") + ": nobody waits for them; they may have to join again"})
				}
			}
			c.table(rows)
			return nil
		}}
	cmd.Flags().BoolVar(&certs, "pem", false, "only the certificate, as PEM")
	c.outputFlag(cmd, "json")
	return cmd
}

func (c *cli) caRotate() *cobra.Command {
	var detach bool
	var wait time.Duration
	cmd := &cobra.Command{Use: "rotate", Short: "Replace the root of the cluster's certificates", Args: exactly(0),
		Example: "  shoal ca rotate\n  shoal ca rotate -d; shoal ca show",
		Long: `Rotate makes another root, certified by the one before, and waits until every
node that lives has a certificate by it; then the old root counts no more. Nodes
and services work on meanwhile. A node that is down does not block it: if it comes
back after the old root has gone, it must leave and join again. Join tokens name
the root: 'shoal token show' prints the new ones.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := c.control().RotateCA(cmd.Context(), connect.NewRequest(&shoalv1.RotateCARequest{}))
			if err != nil {
				return err
			}
			if detach {
				fmt.Fprintln(c.out, resp.Msg.Digest)
				return nil
			}
			done := c.progress("Waiting until all nodes have a certificate by the new root")
			defer done()
			var left []string
			for end := time.Now().Add(wait); ; {
				ca, err := c.control().ShowCA(cmd.Context(), connect.NewRequest(&shoalv1.ShowCARequest{}))
				if err != nil {
					return err
				}
				if ca.Msg.Old == nil {
					break
				}
				if left = ca.Msg.Waiting; time.Now().After(end) {
					return fmt.Errorf("not all nodes have moved to the new root %s after %s: %s: they go on, see 'shoal ca show'", resp.Msg.Digest, wait, strings.Join(left, ", "))
				}
				select {
				case <-cmd.Context().Done():
					return cmd.Context().Err()
				case <-time.After(100 * time.Millisecond):
				}
			}
			done()
			fmt.Fprintln(c.out, resp.Msg.Digest)
			return nil
		}}
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "don't wait for the nodes")
	cmd.Flags().DurationVar(&wait, "timeout", 5*time.Minute, "how long to wait for the nodes")

	return cmd
}

// nodeRole is promote and demote.
func (c *cli) nodeRole(verb, role string) *cobra.Command {
	return &cobra.Command{Use: verb + " NODE [NODE...]", Short: "Make nodes " + role + "s", Args: atLeast(1),
		Example:           "  shoal node " + verb + " node3",
		ValidArgsFunction: c.complete(c.nodeNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, a := range args {
				resp, err := c.control().UpdateNode(cmd.Context(), connect.NewRequest(&shoalv1.UpdateNodeRequest{Ref: a, Role: &role}))
				if err != nil {
					return err
				}
				if role == spec.RoleManager {
					if err := c.awaitVoter(cmd.Context(), resp.Msg.Node, voterWait); err != nil {
						return err
					}
				}
				fmt.Fprintln(c.out, resp.Msg.Node.Name)
			}
			return nil
		}}
}

func (c *cli) unlockCmd() *cobra.Command {
	return &cobra.Command{Use: "unlock", Short: "Give a locked manager the unlock key", Args: exactly(0),
		Long: `Unlock reads the unlock key from the terminal, or from standard input, and gives it
to this node's agent, whose part of the managers can't be read without it. Tasks,
networks and names of the node work meanwhile.`,
		Example: "  shoal unlock\n  shoal unlock < key",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var key []byte
			var err error
			if f, ok := c.in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
				fmt.Fprint(c.err, "Unlock key: ")
				key, err = term.ReadPassword(int(f.Fd()))
				fmt.Fprintln(c.err)
			} else {
				key, err = io.ReadAll(io.LimitReader(c.in, 1024))
			}
			if err != nil {
				return fmt.Errorf("read the unlock key: %w", err)
			}
			_, err = c.local().Unlock(cmd.Context(), connect.NewRequest(&shoalv1.UnlockRequest{Key: string(key)}))
			return err
		}}
}

func (c *cli) unlockKeyCmd() *cobra.Command {
	var rotate, quiet bool
	cmd := &cobra.Command{Use: "unlock-key", Short: "Show or replace the key that locked managers ask for", Args: exactly(0),
		Long: `Unlock-key shows the key that managers ask for after a start, if the cluster was
made with 'shoal init --autolock'. A manager that is not up when the key is
rotated needs the one before to start, and the new one from then on.`,
		Example: "  shoal unlock-key\n  shoal unlock-key --rotate",
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := c.control().UnlockKey(cmd.Context(), connect.NewRequest(&shoalv1.UnlockKeyRequest{Rotate: rotate}))
			if err != nil {
				return err
			}
			if resp.Msg.Key == "" {
				return errors.New("the managers of this cluster are not locked: that is decided when it is made, by 'shoal init --autolock'")
			}
			if quiet {
				fmt.Fprintln(c.out, resp.Msg.Key)
				return nil
			}
			fmt.Fprintf(c.out, "After a start of its agent a manager asks for this key ('shoal unlock'); keep it\nelsewhere than on the managers' disks:\n\n    %s\n", resp.Msg.Key)
			return nil
		}}
	cmd.Flags().BoolVar(&rotate, "rotate", false, "replace it")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "only the key")
	return cmd
}
