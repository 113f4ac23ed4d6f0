package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/runtime"
)

// record is what taskFile holds.
type record struct {
	runtime.Task
	Hidden []string `json:"hidden,omitempty"`
	// Cgroup is the task's control group, below the hierarchy's root; empty: none.
	Cgroup string `json:"cgroup,omitempty"`
	// Blobs is where the files of its secrets and configs are; empty: it has none.
	Blobs string `json:"blobs,omitempty"`
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// readLine decodes one line of JSON and reads nothing behind it.
func readLine(r io.Reader, v any) error {
	var line []byte
	for b := make([]byte, 1); len(line) < maxLine; {
		if _, err := io.ReadFull(r, b); err != nil {
			return err
		}
		if b[0] == '\n' {
			return json.Unmarshal(line, v)
		}
		line = append(line, b[0])
	}
	return errors.New("line is too long")
}

// maxLine is more than a command line can be (execve(2): 128 KiB an argument,
// by default 2 MiB in all).
const maxLine = 8 << 20

// writeJSON replaces a file whole or not at all, whatever crashes.
func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return durable.WriteFile(path, b)
}

func writeBytes(path string, b []byte) error { return durable.WriteFile(path, b) }

// readAll reads at most n bytes, to the end.
func readAll(r io.Reader, n int64) ([]byte, error) { return io.ReadAll(io.LimitReader(r, n)) }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// taskDir is where a task's files are.
func (r *Runtime) taskDir(id string) string { return filepath.Join(r.cfg.StateDir, id) }

// socket of a task's shim. Its path is short, because 108 bytes are the limit
// (unix(7)), and the state directory may be anywhere.
func (r *Runtime) socket(id string) string { return filepath.Join(r.cfg.RunDir, id+".sock") }
