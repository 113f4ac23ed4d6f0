package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"connectrpc.com/connect"
	"github.com/docker/go-units"
	"github.com/moby/go-archive"
	"github.com/moby/go-archive/compression"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/shoalnet/shoal/agent"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

func (c *cli) cpCmd() *cobra.Command {
	var k copying
	cmd := &cobra.Command{Use: "cp [flags] TASK:PATH DEST|-\n  shoal cp [flags] SRC|- TASK:PATH", Short: "Copy files between a task and this machine", Args: exactly(2),
		Long: `Cp copies a file or a directory out of a task, or into it, on whichever node it is.
The task runs, or is a container that has ended and can be started again. As with
docker cp, a directory is copied into one that exists, and otherwise takes its name;
SRC/. is what is in a directory. - is a tar archive on standard output, or input,
which may be compressed. SERVICE.SLOT names a replica, such as web.1.

What is copied belongs to root in the task, and to you on this machine; with -a, users
and groups stay as they are, by number.`,
		Example: "  shoal cp c1:/etc/hosts .\n  shoal cp site/. web.1:/srv/www\n  shoal cp c1:/var/log - | tar tv\n  tar c data | shoal cp - c1:/srv",
		RunE: func(cmd *cobra.Command, args []string) error {
			from, src := taskPath(args[0])
			to, dst := taskPath(args[1])
			switch {
			case from != "" && to != "":
				return usageError(cmd, errors.New("copying between tasks is not supported: 'shoal cp TASK:PATH - | shoal cp - TASK:PATH' does it"))
			case from == "" && to == "":
				return usageError(cmd, errors.New("must specify at least one task source: TASK:PATH"))
			case src == "" || dst == "":
				return usageError(cmd, errors.New("a path is empty"))
			case from != "":
				return k.out(cmd.Context(), c, from, src, dst)
			}
			return k.in(cmd.Context(), c, src, to, dst)
		}}
	f := cmd.Flags()
	f.BoolVarP(&k.archive, "archive", "a", false, "keep users and groups, by number")
	f.BoolVarP(&k.follow, "follow-link", "L", false, "copy what a symbolic link at the source leads to")
	f.BoolVarP(&k.quiet, "quiet", "q", false, "say nothing of success")
	return cmd
}

// taskPath takes TASK:PATH apart; a path of this machine has no task. As Docker has it,
// one that begins with / or . is this machine's, whatever follows.
func taskPath(arg string) (task, path string) {
	if filepath.IsAbs(arg) || arg == "-" {
		return "", arg
	}
	task, path, ok := strings.Cut(arg, ":")
	if !ok || strings.HasPrefix(task, ".") {
		return "", arg
	}
	return task, path
}

// copying is a cp.
type copying struct{ archive, follow, quiet bool }

// stream begins a copy on a task's node. Its end is that of the context.
func (k copying) stream(ctx context.Context, c *cli, ref string, start *shoalv1.CopyRequest_Start) (*connect.BidiStreamForClient[shoalv1.CopyRequest, shoalv1.CopyResponse], string, error) {
	t, err := c.runningTask(ctx, ref)
	if err != nil {
		return nil, "", c.pointTo(ctx, ref, err, "its tasks are REPLICAS")
	}
	if t.Node == "" {
		return nil, "", fmt.Errorf("task %s has no node yet: it is %s", t.Name, t.GetStatus().GetState())
	}
	start.Task = t.Id
	s := c.node().Copy(ctx)
	s.RequestHeader().Set(agent.NodeHeader, t.Node)
	if err := s.Send(&shoalv1.CopyRequest{Msg: &shoalv1.CopyRequest_Start_{Start: start}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, "", c.api().Explain(err)
	}
	return s, t.Name, nil
}

// out copies out of a task.
func (k copying) out(ctx context.Context, c *cli, ref, src, dst string) error {
	if f, ok := c.out.(*os.File); dst == "-" && ok && term.IsTerminal(int(f.Fd())) {
		return errors.New("refusing to write an archive to a terminal: send it to a file or a pipe")
	}
	var at archive.CopyInfo
	if dst != "-" {
		var err error
		if err := notInPlaceOf(dst); err != nil {
			return err
		}
		if dst, err = localPath(dst); err != nil {
			return err
		}
		if at, err = archive.CopyInfoDestinationPath(dst); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, name, err := k.stream(ctx, c, ref, &shoalv1.CopyRequest_Start{Path: src, Follow: k.follow})
	if err != nil {
		return err
	}
	_ = s.CloseRequest()
	first, err := s.Receive()
	if first, err = answered(c, first, err, name); err != nil {
		return err
	}
	found := first.GetSource()
	content := &counted{r: &copyOutput{receive: s.Receive, c: c, task: name}}
	if dst == "-" {
		_, err := io.Copy(c.out, content)
		return err
	}
	info := archive.CopyInfo{Path: found.GetPath(), Exists: true, IsDir: found.GetDir(), RebaseName: found.GetRebase()}
	dir, prepared, err := archive.PrepareArchiveCopy(content, info, at)
	if err != nil {
		return fmt.Errorf("%s: %w", dst, err)
	}
	defer prepared.Close()
	if err := archive.UntarUncompressed(prepared, dir, &archive.TarOptions{NoLchown: !k.archive, NoOverwriteDirNonDir: true}); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, prepared); err != nil { // the node's last word is whether all went well
		return err
	}
	k.done(c, content.n.Load(), dst)
	return nil
}

// in copies into a task.
func (k copying) in(ctx context.Context, c *cli, src, ref, dst string) error {
	start := &shoalv1.CopyRequest_Start{Path: dst, In: true, Owners: k.archive}
	var content io.ReadCloser
	var err error
	if src == "-" {
		if content, err = compression.DecompressStream(c.in); err != nil {
			return fmt.Errorf("standard input: %w", err)
		}
	} else {
		if src, err = localPath(src); err != nil {
			return err
		}
		info, err := archive.CopyInfoSourcePath(src, k.follow)
		if err != nil {
			return err
		}
		if content, err = archive.TarResource(info); err != nil {
			return err
		}
		start.Source = &shoalv1.CopySource{Path: info.Path, Dir: info.IsDir, Rebase: info.RebaseName}
	}
	defer content.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s, name, err := k.stream(ctx, c, ref, start)
	if err != nil {
		return err
	}
	sent := &counted{r: content}
	go func() { // ends with the archive, or what it is sent by; the node may refuse it before
		defer func() { _ = s.CloseRequest() }()
		for buf := make([]byte, 64<<10); ; {
			n, err := sent.Read(buf)
			if n > 0 && s.Send(&shoalv1.CopyRequest{Msg: &shoalv1.CopyRequest_Data{Data: buf[:n]}}) != nil {
				return
			}
			if errors.Is(err, io.EOF) {
				_ = s.Send(&shoalv1.CopyRequest{Msg: &shoalv1.CopyRequest_Eof{Eof: true}})
				return
			}
			if err != nil {
				cancel(err)
				return
			}
		}
	}()
	msg, err := s.Receive()
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if _, err := answered(c, msg, err, name); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	k.done(c, sent.n.Load(), ref+":"+dst)
	return nil
}

// answered is what a node says of a copy; io.EOF once it is whole.
func answered(c *cli, msg *shoalv1.CopyResponse, err error, task string) (*shoalv1.CopyResponse, error) {
	switch {
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("task %s: its node ended the copy before it was whole: copy it again", task)
	case err != nil:
		return nil, older(c.api().Explain(err), "cp", task)
	case msg.GetFailed() != "":
		return nil, errors.New(msg.GetFailed())
	case msg.GetDone():
		return nil, io.EOF
	}
	return msg, nil
}

func (k copying) done(c *cli, n int64, to string) {
	if !k.quiet {
		fmt.Fprintf(c.err, "Successfully copied %s to %s\n", units.HumanSize(float64(n)), to)
	}
}

// localPath is absolute, and has the ending of what was typed, which counts.
func localPath(p string) (string, error) {
	abs, err := filepath.Abs(p)
	return archive.PreserveTrailingDotOrSeparator(abs, p), err
}

// counted counts what is read.
type counted struct {
	r io.Reader
	n atomic.Int64 // read and counted beside each other
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// copyOutput is the archive that a node sends, whole only with its last word.
type copyOutput struct {
	receive func() (*shoalv1.CopyResponse, error)
	c       *cli
	task    string
	rest    []byte
}

func (o *copyOutput) Read(b []byte) (int, error) {
	for len(o.rest) == 0 {
		msg, err := o.receive()
		if msg, err = answered(o.c, msg, err, o.task); err != nil {
			return 0, err
		}
		o.rest = msg.GetData()
	}
	n := copy(b, o.rest)
	o.rest = o.rest[n:]
	return n, nil
}
