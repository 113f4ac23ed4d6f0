package process

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/runtime"
)

// TestExecTakesAll: a command whose caller leaves goes with all that comes from it,
// also what has a session of its own.
func TestExecTakesAll(t *testing.T) {
	f := setup(t)
	k := f.running("sleep", "600")
	ctx, cancel := context.WithCancel(f.ctx())
	defer cancel()
	p, err := f.Exec(ctx, k.ID, runtime.ExecSpec{Command: []string{"/bin/sh", "-c", "setsid sh -c 'setsid sleep 599.1 & sleep 599.2' & sleep 599.3"}})
	if err != nil {
		t.Fatal(err)
	}
	left := func() (n int) {
		ps, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range ps {
			if b, err := os.ReadFile(p); err == nil && strings.HasPrefix(string(b), "sleep\x00599.") {
				n++
			}
		}
		return n
	}
	for limit := time.Now().Add(20 * time.Second); left() < 3; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("%d of 3 run", left())
		}
	}
	cancel()
	_, _ = p.Wait()
	if n := left(); n != 0 {
		t.Errorf("%d processes are left", n)
	}
}

// TestLogsSurviveDamage: what is wrong with the output is said, and what is right
// behind it is shown.
func TestLogsSurviveDamage(t *testing.T) {
	f := setup(t)
	k := f.running("sh", "-c", "echo one; exec sleep 600")
	path := filepath.Join(f.taskDir(k.ID), logFile)
	ctx, cancel := context.WithTimeout(f.ctx(), 20*time.Second)
	defer cancel()
	write := func(s string) {
		w, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err == nil {
			_, err = w.WriteString(s)
			w.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for l, err := range f.Logs(ctx, k.ID, runtime.LogOptions{Follow: true}) {
		if err != nil {
			t.Fatalf("%v after %q", err, got)
		}
		got = append(got, l.Note+string(l.Line))
		switch got[len(got)-1] {
		case "one":
			write("rubbish\n" + strings.Repeat("\x00", 100_000) + "\n1 o two\n")
		case "two":
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
		case "the output was cut: some of it may be missing":
			write("2 e three\n")
		}
		if l.Stderr {
			break
		}
	}
	if s := strings.Join(got, "|"); s != "one|a damaged line is left out|two|the output was cut: some of it may be missing|three" {
		t.Error(s)
	}
}
