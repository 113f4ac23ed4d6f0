package process

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A task's /etc.
//
// A mount is put on a directory entry of the file system below it. When that entry is
// unlinked, or another file is renamed over it, the kernel takes the mount away in
// every mount namespace but the one where it happens (detach_mounts in
// fs/namespace.c): on a node whose DHCP client replaces /etc/resolv.conf, a file
// that is merely bound over it is gone from all tasks. So a task gets a file system
// of its own at /etc: an overlay (overlayfs(5), kernel documentation) whose lower
// layer is the node's /etc. Its entries are nobody else's, and the files of the task
// are bound over those. What a task writes in /etc is its own and ends with it.
//
// The kernel does not promise what an overlay shows of changes in its lower layer.
// What it does is to keep what was once looked up, for as long as it likes; what was
// not, it looks up anew. An overlay that is reconfigured forgets what nobody uses
// (shrink_dcache_sb in reconfigure_super): so the agent does that to all tasks' when
// the node's /etc has changed ([Runtime.refresh]).
//
// Tried and dropped: task-init that waits for its table of mounts to change and binds
// again, since names are gone for that moment, and a rename in a loop makes
// it long; a tmpfs of links, since relative links of the node's lead elsewhere there.

// covered are the files that a task has of its own, by their place in /etc and in
// the task's directory.
func covered(netns string) []string {
	if netns == "" {
		return []string{"hostname"} // the others are the node's
	}
	return []string{"resolv.conf", "hosts", "hostname"}
}

// ownEtc covers the node's /etc by an overlay with a private upper layer, in which
// there are files with the given names; within the task's mount namespace.
func ownEtc(dir string, names []string) error {
	etc, err := filepath.EvalSymlinks("/etc")
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(etc, &st); err != nil {
		return fmt.Errorf("%s: %w", etc, err)
	}
	within, err := mountsWithin(etc, names)
	if err != nil {
		return err
	}
	defer func() {
		for _, m := range within {
			unix.Close(m.fd)
		}
	}()
	scratch := filepath.Join(dir, "etc")
	if err := os.Mkdir(scratch, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", unix.MS_NODEV, "size=64m,mode=700"); err != nil {
		return fmt.Errorf("mount %s: %w", scratch, err)
	}
	// The overlay holds its layers by itself.
	defer func() {
		_ = unix.Unmount(scratch, unix.MNT_DETACH)
		_ = os.Remove(scratch)
	}()
	upper := filepath.Join(scratch, "upper")
	if err := errors.Join(os.Mkdir(upper, 0o700), os.Chown(upper, int(st.Uid), int(st.Gid)), unix.Chmod(upper, st.Mode&0o7777),
		os.Mkdir(filepath.Join(scratch, "work"), 0o700)); err != nil {
		return err
	}
	for _, n := range names {
		f := filepath.Join(upper, n)
		if err := errors.Join(os.WriteFile(f, nil, 0o644), os.Chmod(f, 0o644)); err != nil {
			return err
		}
	}
	// By relative paths: a comma or a colon in an absolute one would end it.
	if err := os.Chdir(scratch); err != nil {
		return err
	}
	err = unix.Mount("overlay", etc, "overlay", 0, "lowerdir="+etc+",upperdir=upper,workdir=work,index=off,redirect_dir=off,metacopy=off")
	if cerr := os.Chdir("/"); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("mount an overlay on %s: %w", etc, err)
	}
	// A layer is a file system, without what is mounted on it.
	for _, m := range within {
		if err := unix.MoveMount(m.fd, "", unix.AT_FDCWD, m.path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("mount %s: %w", m.path, err)
		}
	}
	return nil
}

// innerMount is a copy of a mount with all that is on it, at no place yet.
type innerMount struct {
	path string
	fd   int
}

// mountsWithin copies what is mounted below a directory, but on the named files.
func mountsWithin(dir string, but []string) ([]innerMount, error) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var paths []string
	for l := range strings.Lines(string(table)) {
		// proc(5): the fifth field, with octal escapes for white space.
		f := strings.Fields(l)
		if len(f) < 5 {
			continue
		}
		p := unescape(f[4])
		if rest, ok := strings.CutPrefix(p, dir+"/"); ok && !slices.Contains(but, rest) && !slices.Contains(paths, p) {
			paths = append(paths, p)
		}
	}
	slices.Sort(paths)
	var out []innerMount
	for _, p := range paths {
		if slices.ContainsFunc(out, func(m innerMount) bool { return strings.HasPrefix(p, m.path+"/") }) {
			continue // it comes with that
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, p, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			continue // it is gone, or no longer to be seen
		}
		out = append(out, innerMount{p, fd})
	}
	return out, nil
}

// unescape undoes the escapes of /proc/PID/mountinfo: \040 and the like.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// hide makes a directory an empty one that nobody can write to.
func hide(d string) error {
	err := unix.Mount("tmpfs", d, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=0,mode=755")
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("hide %s: %w", d, err)
	}
	return nil
}
