package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/spec"
)

// TestOutputOutlivesAFullDisk: what is written while the disk is full is lost, and
// that is said; before and after, all lines are there, whole.
func TestOutputOutlivesAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Skip("no mounts here: ", err)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(dir, logFile)
	told := make(chan error, 10)
	l, err := newLogWriter(path, spec.LogConfig{}, func(err error) { told <- err })
	if err != nil {
		t.Fatal(err)
	}
	fill := filepath.Join(dir, "fill")
	want := 0
	for round := range 3 {
		l.write(false, fmt.Appendf(nil, "before %d", round), true)
		for n := 128 << 10; n > 0; n /= 2 { // to the last page
			f, err := os.OpenFile(fill, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = f.Write(make([]byte, n))
			f.Close()
		}
		for i := range 50 {
			l.write(i%2 == 0, bytes.Repeat([]byte("x"), 5000), i%3 == 0)
		}
		l.flush()
		if err := os.Remove(fill); err != nil {
			t.Fatal(err)
		}
		if err := <-told; !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("told %v, want that the disk is full", err)
		}
		if round > 0 {
			l.write(false, fmt.Appendf(nil, "after %d", round), true)
		}
		// Where nothing more is written, the loss is told all the same.
		select {
		case err := <-told:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("it is not told that the output is kept again")
		}
		if round == 0 {
			l.write(false, fmt.Appendf(nil, "after %d", round), true)
		}
		want++
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for line := range strings.Lines(text) {
		if _, err := parseLog([]byte(strings.TrimSuffix(line, "\n"))); err != nil {
			t.Errorf("%q: %v", line[:min(len(line), 80)], err)
		}
	}
	for round := range 3 {
		for _, w := range []string{"before", "after"} {
			if !strings.Contains(text, fmt.Sprintf(" o %s %d\n", w, round)) {
				t.Errorf("line %s %d is gone", w, round)
			}
		}
	}
	if n := strings.Count(text, "lines of output could not be kept: no space left on device]"); n != want {
		t.Errorf("the loss is told %d times, want %d:\n%.500s", n, want, text)
	}
}

// TestLogFiles: there are as many files as the task asks for, of that size, and what is in
// them is the end of the output.
func TestLogFiles(t *testing.T) {
	for _, keep := range []int{1, 2, 5, 12} {
		path := filepath.Join(t.TempDir(), logFile)
		l, err := newLogWriter(path, spec.LogConfig{Size: spec.MinLogSize, Files: keep}, func(error) {})
		if err != nil {
			t.Fatal(err)
		}
		// One that reads along misses nothing.
		along, err := openOldest(path)
		if err != nil {
			t.Fatal(err)
		}
		const lines = 1300 // of some 1,020 bytes
		next := 0
		read := func(r *logReader, want int) int {
			for {
				b, note, ok, err := r.next()
				if err != nil || note != "" {
					t.Fatalf("%d files: %v %s", keep, err, note)
				}
				if !ok {
					return want
				}
				x, err := parseLog(b)
				if err != nil {
					t.Fatal(err)
				}
				var n int
				if _, err := fmt.Sscanf(string(x.Line), "line %d", &n); err != nil || want >= 0 && n != want {
					t.Fatalf("%d files: %.20q, want line %d: %v", keep, x.Line, want, err)
				}
				want = n + 1
			}
		}
		for i := range lines {
			l.write(false, fmt.Appendf(nil, "line %d %s", i, strings.Repeat("x", 990)), true)
			next = read(along, next)
		}
		if next != lines {
			t.Errorf("%d files: who reads along has read %d lines", keep, next)
		}
		along.close()
		found, _ := filepath.Glob(path + "*")
		var size int64
		for _, f := range found {
			st, err := os.Stat(f)
			if err != nil || st.Size() > spec.MinLogSize+2000 {
				t.Errorf("%d files: %s: %d bytes, %v", keep, f, st.Size(), err)
			}
			size += st.Size()
		}
		if len(found) != keep || keep > 1 && size < int64(keep-1)*(spec.MinLogSize-2000) {
			t.Errorf("%d files, %d bytes: %v", keep, size, found)
		}
		r, err := openOldest(path)
		if err != nil {
			t.Fatal(err)
		}
		if end := read(r, -1); end != lines {
			t.Errorf("%d files: the last line is %d", keep, end)
		}
		r.close()
	}
}
