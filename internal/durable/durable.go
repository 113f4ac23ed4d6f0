// Package durable writes the files that carry a promise: who a node is, what it
// was told, what it runs. After a crash at any moment, of the process or of the
// machine, such a file holds the old content or the new one, whole.
package durable

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Suffix is what the name of a file that is being written ends in. One that a
// crash left is replaced by the next write; nobody reads it.
const Suffix = ".new"

// WriteFile replaces the file at path, or makes it, with mode 0600. It returns
// once the content is on the disk: fsync(2) of the file comes before rename(2),
// of the directory after. When it fails, the old file stands as it was. A directory
// in its place is put aside (PutAside). Of one path there must be one writer at a time.
func WriteFile(path string, data []byte) error {
	if err := replace(path, data, true); err != nil {
		return err
	}
	if err := SyncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// Replace is WriteFile for what changes often, and is worth nothing once the machine has
// lost its power: it does not wait for the disk.
func Replace(path string, data []byte) error { return replace(path, data, false) }

func replace(path string, data []byte, sync bool) error {
	tmp := path + Suffix
	err := writeNew(tmp, data, sync)
	if errors.Is(err, unix.EISDIR) && os.RemoveAll(tmp) == nil {
		err = writeNew(tmp, data, sync)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), remove(tmp))
	}
	err = os.Rename(tmp, path)
	if err != nil && isDir(path) && PutAside(path) == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), remove(tmp))
	}
	return nil
}

// Append opens a file for what is to come behind what it has, or makes it, with mode 0600.
// A directory in its place is put aside (PutAside).
func Append(path string) (*os.File, error) {
	open := func() (*os.File, error) { return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600) }
	f, err := open()
	if errors.Is(err, unix.EISDIR) && PutAside(path) == nil {
		return open()
	}
	return f, err
}

// MkdirAll makes a directory with mode 0700, and those above it. What is in its place and
// is none is put aside (PutAside).
func MkdirAll(path string) error {
	err := os.MkdirAll(path, 0o700)
	if st, serr := os.Lstat(path); err != nil && serr == nil && !st.IsDir() && PutAside(path) == nil {
		err = os.MkdirAll(path, 0o700)
	}
	return err
}

// PutAside gives the name of what can't be used to something that can: it is there, for
// a person, as PATH.damaged, in the place of what was put aside before.
func PutAside(path string) error {
	return errors.Join(os.RemoveAll(path+".damaged"), os.Rename(path, path+".damaged"))
}

func isDir(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.IsDir()
}

func writeNew(path string, data []byte, sync bool) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return cause(err)
	}
	_, err = f.Write(data)
	if err == nil && sync {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return cause(err)
}

// cause drops the name of the temporary file, which nobody knows.
func cause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// remove takes a temporary file away, if it was made.
func remove(path string) error {
	if _, err := os.Lstat(path); err != nil {
		return nil
	}
	return os.Remove(path)
}

// SyncDir makes what was made, renamed or removed in a directory last.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// CopyOf is where the second copy of a file is that is written by WriteTwice: in a
// directory of its own, so that what befalls one need not befall the other.
func CopyOf(path string) string {
	return filepath.Join(filepath.Dir(path), "copy", filepath.Base(path))
}

// WriteTwice is WriteFile for a file without which the rest is worth nothing. The
// copy is written after the file: a crash between leaves the older copy, and the
// file counts.
func WriteTwice(path string, data []byte) error {
	if err := WriteFile(path, data); err != nil {
		return err
	}
	return WriteCopy(path, data)
}

// WriteCopy is the second part of WriteTwice.
func WriteCopy(path string, data []byte) error {
	dup := CopyOf(path)
	if dir := filepath.Dir(dup); !isDir(dir) {
		if err := MkdirAll(dir); err != nil {
			return fmt.Errorf("write %s: %w", dup, cause(err))
		}
		if err := SyncDir(filepath.Dir(path)); err != nil {
			return fmt.Errorf("write %s: %w", dup, err)
		}
	}
	return WriteFile(dup, data)
}

// RemoveTwice removes a file and its copy; absence is no error.
func RemoveTwice(path string) error {
	return errors.Join(os.RemoveAll(path), os.RemoveAll(CopyOf(path)))
}
