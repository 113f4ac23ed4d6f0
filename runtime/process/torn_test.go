package process

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/shoalnet/shoal/internal/nl"
)

// TestATornRecordLeaksNothing: of a task whose record is gone or damaged neither the
// program nor the namespace stays.
func TestATornRecordLeaksNothing(t *testing.T) {
	f := setup(t)
	for name, damage := range map[string]func(path string) error{
		"absent": os.Remove,
		"empty":  func(p string) error { return os.Truncate(p, 0) },
		"cut":    func(p string) error { return os.Truncate(p, 20) },
	} {
		k := f.running("sleep", "1000")
		pid := f.status(k).PID
		if err := damage(filepath.Join(f.taskDir(k.ID), taskFile)); err != nil {
			t.Fatal(err)
		}
		f.restart()
		if ss, err := f.List(f.ctx()); err != nil || len(ss) != 0 {
			t.Errorf("%s: %v, %v", name, ss, err)
		}
		f.eventually(name+": the program has ended", func() bool { return syscall.Kill(pid, 0) != nil })
		if _, err := nl.Open(k.Netns); err == nil {
			t.Errorf("%s: its namespace is still there", name)
		}
		if es, _ := os.ReadDir(f.state); len(es) != 0 {
			t.Errorf("%s: left: %v", name, es)
		}
	}
}
