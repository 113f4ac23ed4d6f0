package durable

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	// What a crash left of an earlier write is no hindrance.
	if err := os.WriteFile(path+Suffix, []byte("half of somethi"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"first", "", strings.Repeat("long ", 100_000), "x"} {
		if err := WriteFile(path, []byte(want)); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != want {
			t.Fatalf("read back %d bytes, %v, want %d", len(got), err, len(want))
		}
		if fi, _ := os.Stat(path); fi.Mode().Perm() != 0o600 {
			t.Errorf("mode %v", fi.Mode())
		}
	}
	if es, _ := os.ReadDir(dir); len(es) != 1 {
		t.Errorf("left behind: %v", es)
	}
}

// TestFailureKeepsTheOld: a full disk, or a directory that is gone, leaves what
// was there, and nothing else. The error names the file that the caller knows.
func TestFailureKeepsTheOld(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("no mounts here: ", err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(dir, "f")
	if err := WriteFile(path, []byte("old")); err != nil {
		t.Fatal(err)
	}
	check := func(what string, errno error) {
		t.Helper()
		err := WriteFile(path, bytes.Repeat([]byte("new"), 100_000))
		if !errors.Is(err, errno) || !strings.Contains(err.Error(), "write "+path+": ") || strings.Contains(err.Error(), Suffix) {
			t.Errorf("%s: %v", what, err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != "old" {
			t.Errorf("%s: the old file is %q, %v", what, b, err)
		}
		if es, _ := os.ReadDir(dir); len(es) != 1 {
			t.Errorf("%s: left behind: %v", what, es)
		}
	}
	check("full disk", unix.ENOSPC)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	check("read-only disk", unix.EROFS)
	if err := WriteFile(filepath.Join(dir, "no", "f"), nil); err == nil {
		t.Error("a directory that does not exist is no error")
	}
}

// TestWhatIsInTheWay: what is no file where one is to be written, or no directory where
// one is to be made, is put aside for a person, and only the last of them.
func TestWhatIsInTheWay(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, what := range []string{"first", "second"} {
		for _, p := range []string{path, path + Suffix, CopyOf(path)} {
			if err := os.RemoveAll(p); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(filepath.Join(p, what), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := WriteTwice(path, []byte(what)); err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{path, CopyOf(path)} {
			if b, err := os.ReadFile(p); err != nil || string(b) != what {
				t.Errorf("%s: %q, %v, want %q", p, b, err, what)
			}
			if es, err := os.ReadDir(p + ".damaged"); err != nil || len(es) != 1 || es[0].Name() != what {
				t.Errorf("put aside of %s: %v, %v, want %s", p, es, err, what)
			}
		}
	}
	sub := filepath.Dir(CopyOf(path))
	if err := errors.Join(os.RemoveAll(sub), os.WriteFile(sub, []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := WriteTwice(path, []byte("third")); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(CopyOf(path)); err != nil || string(b) != "third" {
		t.Errorf("%q, %v", b, err)
	}
	if b, err := os.ReadFile(sub + ".damaged"); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
}
