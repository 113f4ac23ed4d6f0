package process

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/go-archive"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
)

// Files are copied by a process of its own, which takes the root of a task's program for
// its own before it looks at any path (path_resolution(7), chroot(2)): so symbolic links
// lead nowhere else, what is mounted in the task is seen as the task sees it, and nothing
// of the task is run.

// copyArgs is what the runtime tells task-copy, as one line of JSON on file 3. The root is
// file 4.
type copyArgs struct {
	Path   string              `json:"path"`
	Follow bool                `json:"follow,omitempty"`
	In     bool                `json:"in,omitempty"`
	Source *runtime.CopySource `json:"source,omitempty"`
	Owners bool                `json:"owners,omitempty"`
}

// Copy implements runtime.Runtime.
func (r *Runtime) Copy(ctx context.Context, id string, s runtime.CopySpec) error {
	st, err := r.Status(ctx, id)
	if err != nil {
		return err
	}
	if st.State == runtime.Exited {
		return r.copyEnded(ctx, id, s)
	}
	if st.State != runtime.Running || st.PID == 0 {
		return errors.New("its program does not run")
	}
	root, err := os.Open(fmt.Sprintf("/proc/%d/root", st.PID))
	if err != nil {
		return fmt.Errorf("its program ends: %w", err)
	}
	defer root.Close()
	// The number may have become another's meanwhile.
	if now, err := r.Status(ctx, id); err != nil || now.State != runtime.Running || now.PID != st.PID {
		return errors.New("its program has ended")
	}
	return r.copyBelow(ctx, root, s)
}

// copyEnded copies from or to the files that a task has kept, which is what containers do.
func (r *Runtime) copyEnded(ctx context.Context, id string, s runtime.CopySpec) error {
	b, x, err := r.box(id)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if x == nil {
		return errors.New("its program has ended, and its files are those of the node")
	}
	err = x.Files(ctx, b, func(ctx context.Context, dir string) error {
		root, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		return r.copyBelow(ctx, root, s)
	})
	if errors.Is(err, runtime.ErrNotFound) {
		return errors.New("its program has ended, and its files are not kept: those of services, and of 'run --rm', go with it")
	}
	return err
}

// copyBelow copies from or to what is below root.
func (r *Runtime) copyBelow(ctx context.Context, root *os.File, s runtime.CopySpec) error {
	args, err := json.Marshal(copyArgs{Path: s.Path, Follow: s.Follow, In: s.In != nil, Source: s.Source, Owners: s.Owners})
	if err != nil {
		return err
	}
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer pr.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.cfg.Exe[0], append(slices.Clone(r.cfg.Exe[1:]), copyWord)...)
	cmd.ExtraFiles = []*os.File{pr, root}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var said strings.Builder
	cmd.Stderr = &said
	var out io.Reader
	if s.In == nil {
		if out, err = cmd.StdoutPipe(); err != nil {
			return err
		}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		pw.Close()
		return err
	}
	// A path may be longer than a pipe holds without a reader; it has one now.
	_, werr := pw.Write(append(args, '\n'))
	pw.Close()
	var moved error
	if s.In != nil {
		// Its reader may end early, on an error of its own that says more than EPIPE.
		_, moved = io.Copy(in, s.In)
		if moved != nil && !errors.Is(moved, syscall.EPIPE) {
			cancel() // half an archive is not the whole of one
		}
	}
	in.Close()
	if out != nil {
		moved = takeOut(bufio.NewReader(out), s)
		if moved != nil {
			cancel()
		}
	}
	err = cmd.Wait()
	if text := strings.TrimSpace(said.String()); text != "" {
		return errors.New(text)
	}
	if moved != nil && !errors.Is(moved, syscall.EPIPE) {
		return moved
	}
	return errors.Join(err, werr)
}

// takeOut passes on what task-copy writes.
func takeOut(out *bufio.Reader, s runtime.CopySpec) error {
	line, err := out.ReadBytes('\n')
	if err != nil {
		return err // it says why
	}
	var source runtime.CopySource
	if err := json.Unmarshal(line, &source); err != nil {
		return err
	}
	if err := s.Found(source); err != nil {
		return err
	}
	_, err = io.Copy(s.Out, out)
	return err
}

// copyMain is the process that copies.
func copyMain([]string) int {
	if err := copyFiles(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func copyFiles(in io.Reader, out io.Writer) error {
	var a copyArgs
	if err := readLine(os.NewFile(3, "args"), &a); err != nil {
		return fmt.Errorf("%s is for the agent's use: %w", copyWord, err)
	}
	o := &archive.TarOptions{NoOverwriteDirNonDir: true}
	if !a.Owners {
		o.ChownOpts = &archive.ChownOpts{}
	}
	o, done, err := archive.WithProcSelfFD(o)
	if err != nil {
		return err
	}
	defer done()
	if err := errors.Join(unix.Fchdir(4), unix.Chroot("."), unix.Chdir("/"), unix.Close(4)); err != nil {
		return fmt.Errorf("take the root of the task: %w", err)
	}
	unix.Umask(0) // modes are those of the archive
	path := archive.PreserveTrailingDotOrSeparator(filepath.Join("/", a.Path), a.Path)
	if a.In {
		return inPath(copyIn(in, path, a.Source, o), path)
	}
	return inPath(copyOut(out, path, a.Follow), path)
}

// inPath makes an error of a path one that names it as the user did.
func inPath(err error, path string) error {
	var perr *fs.PathError
	if errors.As(err, &perr) && filepath.IsAbs(perr.Path) {
		return fmt.Errorf("%s: %w", perr.Path, perr.Err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// copyOut writes one line of JSON that tells what is there, then the archive.
func copyOut(out io.Writer, path string, follow bool) error {
	info, err := archive.CopyInfoSourcePath(path, follow)
	if err != nil {
		return err
	}
	r, err := archive.TarResource(info)
	if err != nil {
		return err
	}
	defer r.Close()
	line, err := json.Marshal(runtime.CopySource{Path: info.Path, Dir: info.IsDir, Rebase: info.RebaseName})
	if err != nil {
		return err
	}
	if _, err = out.Write(append(line, '\n')); err == nil {
		_, err = io.Copy(out, r)
	}
	return err
}

// copyIn extracts an archive where a copy of its source to path has to be; without a
// source, in the directory path.
func copyIn(in io.Reader, path string, source *runtime.CopySource, o *archive.TarOptions) error {
	to, err := archive.CopyInfoDestinationPath(path)
	if err != nil {
		return err
	}
	dir := to.Path
	if source == nil {
		if !to.IsDir {
			return errors.New("destination must be a directory")
		}
	} else {
		place, r, err := archive.PrepareArchiveCopy(in, archive.CopyInfo{Path: source.Path, Exists: true, IsDir: source.Dir, RebaseName: source.Rebase}, to)
		if err != nil {
			return err
		}
		defer r.Close()
		dir, in = place, r
	}
	err = archive.UntarUncompressed(in, dir, o)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrHeader) {
		return fmt.Errorf("what is to be extracted is no whole tar archive: %w", err)
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, in) // what stands behind the archive's end
	return err
}
