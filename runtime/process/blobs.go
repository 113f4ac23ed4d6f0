package process

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// Secrets and configs of a task are files in a directory of its own below RunDir,
// in memory: never on a disk, and gone with the task's sandbox. Each is bound over
// its target in the task, read-only.

// blobDir is where those of a task are; empty: it has none.
func (r *Runtime) blobDir(t runtime.Task) string {
	if len(t.Spec.Secrets)+len(t.Spec.Configs) == 0 {
		return ""
	}
	return filepath.Join(r.cfg.RunDir, t.ID+".files")
}

// writeBlobs puts them there.
func (r *Runtime) writeBlobs(t runtime.Task) error {
	dir := r.blobDir(t)
	if dir == "" {
		return nil
	}
	if n := len(t.Spec.Secrets) + len(t.Spec.Configs); len(t.Files) != n {
		return fmt.Errorf("contents of %d secrets and configs are given, the task has %d", len(t.Files), n)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("directory for secrets: %w", err)
	}
	if st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC {
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700"); err != nil {
			return fmt.Errorf("file system in memory for secrets: %w", err)
		}
	}
	write := func(kind spec.BlobKind, i int, ref spec.BlobRef, data []byte) error {
		f := filepath.Join(dir, runtime.BlobFile(kind, i))
		_ = os.Remove(f) // of a Create that did not finish
		id := func(s string) int { n, _ := strconv.Atoi(s); return n }
		// os.Chmod knows no set-user-ID bits by their numbers.
		if err := errors.Join(os.WriteFile(f, data, 0o400), os.Chown(f, id(ref.UID), id(ref.GID)), unix.Chmod(f, ref.FileMode())); err != nil {
			return fmt.Errorf("%s %s: %w", kind, ref.Name, err)
		}
		return nil
	}
	files := t.Files
	for i, ref := range t.Spec.Secrets {
		if err := write(spec.KindSecret, i, ref, files[0]); err != nil {
			return err
		}
		files = files[1:]
	}
	for i, ref := range t.Spec.Configs {
		if err := write(spec.KindConfig, i, ref, files[0]); err != nil {
			return err
		}
		files = files[1:]
	}
	return nil
}

// removeBlobs takes the files of a task away.
func (r *Runtime) removeBlobs(id string) error {
	dir := filepath.Join(r.cfg.RunDir, id+".files")
	if !exists(dir) {
		return nil
	}
	_ = unix.Unmount(dir, unix.MNT_DETACH) // if it is a mount
	return os.RemoveAll(dir)
}

// bindBlobs puts a task's secrets and configs in their places, in the task's mount
// namespace. /run/secrets and /run/configs are file systems of the task's own; of the
// node they take no more than an empty directory to be mounted on. /etc is the task's
// own, too. Elsewhere a file of the node must be there to be covered, as a task of
// the node's own file system makes none there.
func bindBlobs(t record) error {
	if t.Blobs == "" {
		return nil
	}
	made := map[string]bool{}
	for _, m := range runtime.BlobMounts(t.Spec, t.Blobs) {
		for _, top := range []string{"/run/secrets", "/run/configs"} {
			if !strings.HasPrefix(m.Path, top+"/") || made[top] {
				continue
			}
			if err := os.MkdirAll(top, 0o755); err != nil {
				return err
			}
			if err := unix.Mount("tmpfs", top, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755"); err != nil {
				return fmt.Errorf("mount %s: %w", top, err)
			}
			made[top] = true
		}
		if _, err := os.Stat(m.Path); errors.Is(err, os.ErrNotExist) {
			own := strings.HasPrefix(m.Path, "/etc/")
			for top := range made {
				own = own || strings.HasPrefix(m.Path, top+"/")
			}
			if !own {
				return fmt.Errorf("target %s is not there: a program of the node can have secrets and configs below /run/secrets, /run/configs and /etc, or over a file that is there; or use an image", m.Path)
			}
			if err := os.MkdirAll(filepath.Dir(m.Path), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(m.Path, nil, 0o400); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		if err := unix.Mount(m.File, m.Path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.Path, err)
		}
		if err := unix.Mount("", m.Path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", m.Path, err)
		}
	}
	for top := range made {
		if err := unix.Mount("", top, "", unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755"); err != nil {
			return fmt.Errorf("make %s read-only: %w", top, err)
		}
	}
	return nil
}
