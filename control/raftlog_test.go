package control

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

// TestDamagedLog: whatever became of the log's file, opening it is an error that
// names it, or works; never a panic, nor a signal.
func TestDamagedLog(t *testing.T) {
	t.Parallel()
	good := filepath.Join(t.TempDir(), "log.db")
	s, err := openLog(good)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(200) {
		if err := s.StoreLog(&raft.Log{Index: i + 1, Term: 1, Data: bytes.Repeat([]byte("x"), 1000)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = openLog(good); err != nil {
		t.Fatal(err)
	}
	s.Close()
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	damage := map[string]func(b []byte) []byte{
		"zeros": func(b []byte) []byte { clear(b[2*4096:]); return b },
		"text":  func([]byte) []byte { return []byte(strings.Repeat("not a log ", 2000)) },
	}
	// Often, as a field that is garbage may by chance be a count to follow.
	for i := range 30 {
		damage[fmt.Sprint("garbage ", i)] = func(b []byte) []byte {
			for i := 2 * 4096; i < len(b); i++ {
				b[i] = byte(r.Uint32())
			}
			return b
		}
	}
	for _, n := range []int{1, 4096, 5000, 12288, 33000, len(whole) / 2} {
		damage[fmt.Sprint("cut to ", n)] = func(b []byte) []byte { return b[:n] }
	}
	failed := 0
	for name, fn := range damage {
		path := filepath.Join(t.TempDir(), "log.db")
		if err := os.WriteFile(path, fn(bytes.Clone(whole)), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := openLog(path)
		if err == nil {
			s.Close()
			t.Logf("%s: readable", name)
			continue
		}
		failed++
		if !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if failed < len(damage)-1 {
		t.Errorf("only %d of %d damaged logs are refused", failed, len(damage))
	}
}
