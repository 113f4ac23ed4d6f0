package chaos

import (
	"context"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// taskID is part of the name of what belongs to a task.
var taskID = regexp.MustCompile(`\b[a-z2-7]{12}\b`)

// kept are the files and directories that a node keeps, but for a manager's log and
// the mark that it has one, in an order that does not depend on tasks' IDs: those of
// tasks, and the others.
func (w *world) kept(n string) (tasks, own []string) {
	_, dir, _ := w.node(n)
	for _, top := range []string{"data", "run"} {
		_ = filepath.WalkDir(filepath.Join(dir, top), func(p string, d fs.DirEntry, err error) error {
			rel, _ := filepath.Rel(dir, p)
			switch base := filepath.Base(p); {
			case err != nil: // an agent's temporary file, that is gone
			case strings.HasPrefix(rel, "data/raft"):
				if d.IsDir() {
					return fs.SkipDir
				}
			case rel == top || base == "voter.json":
			case strings.HasPrefix(rel, top+"/tasks"):
				tasks = append(tasks, rel)
			default:
				own = append(own, rel)
			}
			return nil
		})
	}
	named := func(p string) string { return taskID.ReplaceAllString(p, "task") }
	for _, ps := range [][]string{tasks, own} {
		slices.SortFunc(ps, func(a, b string) int { return strings.Compare(named(a), named(b)) })
	}
	return tasks, own
}

// tornFile damages one file, or directory, of what a node keeps while its agent is down.
func (w *world) tornFile(ctx context.Context) (*fault, error) {
	n, err := w.victim()
	if err != nil {
		return nil, err
	}
	peer := pick(w, slices.DeleteFunc(sorted(w.model.nodes), func(o string) bool { return o == n }))
	whole := w.rng.IntN(3) == 0
	r := rand.New(rand.NewPCG(w.rng.Uint64(), 1)) // how many numbers it takes depends on the files
	f, err := w.fell(ctx, n, whole)
	if err != nil {
		return nil, err
	}
	ps, own := w.kept(n)
	if len(ps) == 0 || r.IntN(2) == 0 {
		ps = own
	}
	if len(ps) == 0 {
		return f, nil
	}
	rel := ps[r.IntN(len(ps))]
	_, dir, _ := w.node(n)
	_, other, _ := w.node(peer)
	what, err := Damage(filepath.Join(dir, rel), filepath.Join(other, rel), r)
	w.say("  fault: %s loses its %s; %s: %s %v", n, how(whole), rel, what, orNothing(err))
	return f, nil
}

// Damage does to a file or directory one of what can befall it, and says which. peer is
// another node's of the same name.
func Damage(path, peer string, r *rand.Rand) (how string, err error) {
	d := damages[r.IntN(len(damages))]
	return d.name, d.do(path, peer, r)
}

var damages = []struct {
	name string
	do   func(path, peer string, r *rand.Rand) error
}{
	{"gone", func(p, _ string, _ *rand.Rand) error { return os.RemoveAll(p) }},
	{"empty", func(p, _ string, _ *rand.Rand) error { return emptied(p) }},
	{"cut", func(p, _ string, r *rand.Rand) error {
		return rewritten(p, func(b []byte) []byte { return b[:r.IntN(len(b)+1)] })
	}},
	{"noise", func(p, _ string, r *rand.Rand) error {
		return rewritten(p, func(b []byte) []byte {
			for i := range b {
				b[i] = byte(r.Uint32())
			}
			return b
		})
	}},
	{"one byte", func(p, _ string, r *rand.Rand) error {
		return rewritten(p, func(b []byte) []byte {
			if len(b) > 0 {
				b[r.IntN(len(b))] ^= 1 << r.IntN(8)
			}
			return b
		})
	}},
	{"a directory", func(p, _ string, _ *rand.Rand) error {
		if err := os.RemoveAll(p); err != nil {
			return err
		}
		return os.MkdirAll(filepath.Join(p, "x"), 0o700)
	}},
	{"a file", func(p, _ string, _ *rand.Rand) error {
		if err := os.RemoveAll(p); err != nil {
			return err
		}
		return os.WriteFile(p, []byte("x"), 0o600)
	}},
	{"another node's", func(p, peer string, _ *rand.Rand) error {
		b, err := os.ReadFile(peer)
		if err != nil {
			return os.RemoveAll(p) // it has none such
		}
		return rewritten(p, func([]byte) []byte { return b })
	}},
}

// emptied empties a file, or a directory.
func emptied(p string) error {
	if st, err := os.Stat(p); err != nil || !st.IsDir() {
		return rewritten(p, func([]byte) []byte { return nil })
	}
	if err := os.RemoveAll(p); err != nil {
		return err
	}
	return os.Mkdir(p, 0o700)
}

// rewritten replaces a file's content; a directory, or what is not there, stays.
func rewritten(p string, fn func([]byte) []byte) error {
	b, err := os.ReadFile(p)
	if err != nil {
		return nil
	}
	return os.WriteFile(p, fn(b), 0o600)
}
