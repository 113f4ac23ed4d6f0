package proc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// etcFile is a file of /etc that the task has its own of.
type etcFile struct {
	target  string
	content []byte
	needed  bool // made, empty, on a node that has none
	source  string
}

// make writes the content to the task's directory and mounts it.
func (f *etcFile) make(dir string) error {
	f.source = filepath.Join(dir, filepath.Base(f.target))
	if err := os.WriteFile(f.source, f.content, 0o644); err != nil {
		return fmt.Errorf("write %s: %w", f.source, err)
	}
	if err := os.Chmod(f.source, 0o644); err != nil { // whatever the umask
		return err
	}
	if _, err := os.Lstat(f.target); errors.Is(err, os.ErrNotExist) {
		if !f.needed {
			return nil
		}
		// To a resolver, an empty file is no other than none (resolv.conf(5)).
		m, err := os.OpenFile(f.target, os.O_CREATE|os.O_RDONLY, 0o644)
		if err != nil {
			return fmt.Errorf("no place for the task's %s: %w", f.target, err)
		}
		m.Close()
	}
	return f.mount()
}

// mount puts the source in the target's place.
func (f *etcFile) mount() error {
	// On the name itself, also when it is a link: open_tree(2) and
	// move_mount(2), Linux 5.2.
	fd, err := unix.OpenTree(unix.AT_FDCWD, f.source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		err = unix.MoveMount(fd, "", unix.AT_FDCWD, f.target, unix.MOVE_MOUNT_F_EMPTY_PATH)
		unix.Close(fd)
	}
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) { // a kernel or a seccomp filter without them
		var real string
		if real, err = filepath.EvalSymlinks(f.target); err == nil {
			err = unix.Mount(f.source, real, "", unix.MS_BIND, "")
		}
	}
	if err != nil {
		return fmt.Errorf("mount the task's %s: %w", f.target, err)
	}
	return nil
}

// mounted tells whether the target is the source.
func (f *etcFile) mounted() bool {
	a, err1 := os.Stat(f.source)
	b, err2 := os.Stat(f.target)
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

// newEtcWatch returns a function that mounts the files again whenever the node
// has put others in their place: a rename onto a mount point, or its removal,
// detaches the mount in every namespace since Linux 3.18. It never returns.
func newEtcWatch(files []etcFile) (func(), error) {
	// Polls as POLLPRI when the mount table changes (proc_pid_mounts(5)); a
	// file that is removed and made later is seen by the directory only.
	mounts, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	etc, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == nil {
		_, err = unix.InotifyAddWatch(etc, "/etc", unix.IN_CREATE|unix.IN_MOVED_TO)
	}
	if err != nil {
		// No more watches to be had (fs.inotify.max_user_instances, 128 by
		// default, is per user and so per node here): the mount table alone
		// shows all but the removal of a file that is made again later.
		if etc >= 0 {
			unix.Close(etc)
		}
		etc = -1 // ignored by poll(2)
	}
	return func() {
		buf := make([]byte, 4096)
		for {
			for i := range files {
				if f := &files[i]; (f.needed || exists(f.target)) && !f.mounted() {
					_ = f.mount() // absent at this moment: its return is an event
				}
			}
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(mounts), Events: unix.POLLPRI}, {Fd: int32(etc), Events: unix.POLLIN}}, -1)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return
			}
			for etc >= 0 {
				if n, err := unix.Read(etc, buf); n <= 0 || err != nil {
					break
				}
			}
		}
	}, nil
}
