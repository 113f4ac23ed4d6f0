// Package versionstest builds programs of an older Shoal, from its history, for tests of
// what old and new builds make of each other.
package versionstest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// FirstLevel is the commit of the first build that has a feature level: all newer ones
// work with it in one cluster.
const FirstLevel = "40a744c"

// Oldest returns a program of FirstLevel, cmd/NAME. It is built once, and kept in bin
// of the repository at repo. source, if there is one, is the program's only file: one
// that the commit does not have. Where there is no history the test is skipped.
func Oldest(t testing.TB, repo, name, source string) string {
	t.Helper()
	repo, err := filepath.Abs(repo)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(repo, "bin", "versions", FirstLevel, name)
	if fi, err := os.Stat(path); err == nil && !newer(source, fi) {
		return path
	}
	if out, err := exec.Command("git", "-C", repo, "cat-file", "-e", FirstLevel+"^{commit}").CombinedOutput(); err != nil {
		t.Skipf("SKIPPED, and upgrades are NOT TESTED: commit %s is not in this clone (shallow?), and its build is the old one: %s", FirstLevel, out)
	}
	tree := t.TempDir()
	cmd := exec.Command("sh", "-c", fmt.Sprintf("git archive %s | tar x -C %s", FirstLevel, tree))
	cmd.Dir = repo
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git archive %s: %v\n%s", FirstLevel, err, out)
	}
	if source != "" {
		b, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(tree, "cmd", name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "main.go"), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return build(t, path, tree, name)
}

// newer tells whether a file was changed after another.
func newer(file string, than os.FileInfo) bool {
	fi, err := os.Stat(file)
	return err == nil && fi.ModTime().After(than.ModTime())
}

func build(t testing.TB, path, tree, name string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-X main.version=old", "-o", tmp, "./cmd/"+name)
	cmd.Dir, cmd.Env = tree, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s of %s: %v\n%s", name, FirstLevel, err, out)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
	return path
}
