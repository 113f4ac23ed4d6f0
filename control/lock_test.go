package control

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/spec"
)

func TestLock(t *testing.T) {
	dir := t.TempDir()
	if g, err := LockGeneration(dir); g != 0 || err != nil {
		t.Errorf("without a lock: %d, %v", g, err)
	}
	unlock, key := NewUnlockKey(), NewSealKey()
	if err := WriteLock(dir, unlock, 3, key); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(LockPath(dir)); err != nil || bytes.Contains(b, key) || strings.Contains(string(b), unlock) {
		t.Errorf("%s, %v", b, err)
	}
	if fi, err := os.Stat(LockPath(dir)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	if g, err := LockGeneration(dir); g != 3 || err != nil {
		t.Errorf("%d, %v", g, err)
	}
	if got, err := OpenLock(dir, unlock+"\n"); err != nil || !bytes.Equal(got, key) {
		t.Errorf("%x, %v", got, err)
	}
	for in, want := range map[string]string{"": "no unlock key", unlock[:len(unlock)-1]: "no unlock key", NewUnlockKey(): "is wrong"} {
		if _, err := OpenLock(dir, in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", in, err, want)
		}
	}
	whole, _ := os.ReadFile(LockPath(dir))
	for _, b := range [][]byte{{}, whole[:len(whole)/2], []byte("{}")} {
		if err := os.WriteFile(LockPath(dir), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenLock(dir, unlock); err == nil || !strings.Contains(err.Error(), "is damaged") {
			t.Errorf("%q: %v", b, err)
		}
	}
}

// TestSealedStore: a manager works from a sealed store, through restarts, with
// snapshots; nothing in it can be read; with another key, or without one, or with
// one where nothing is sealed, it is a lost store and no panic.
func TestSealedStore(t *testing.T) {
	n := newNode(t, "node1", spec.RoleManager)
	n.seal = NewSealKey()
	n.start()
	if _, err := n.mgr.Bootstrap(testCtx(t), testCluster, testTrust); err != nil {
		t.Fatal(err)
	}
	restart := func() {
		t.Helper()
		want := n.snapshot()
		n.stop()
		n.start()
		leader(t, []*simNode{n})
		if got := n.snapshot(); !bytes.Equal(got, want) {
			t.Errorf("the state is\n%s\nwas\n%s", got, want)
		}
	}
	if err := createNetwork(n, "readable1"); err != nil {
		t.Fatal(err)
	}
	restart()
	n.compact()
	restart()
	if err := createNetwork(n, "readable2"); err != nil {
		t.Fatal(err)
	}
	restart()
	// One that joins gets the snapshot as it is inside.
	late := newNode(t, "node2", spec.RoleManager)
	late.start()
	n.compact()
	join(t, n, late)
	alike(t, n, late)
	late.stop()
	n.stop()
	err := filepath.Walk(RaftDir(n.dir), func(path string, fi os.FileInfo, err error) error {
		if err != nil || fi.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte("readable")) || bytes.Contains(b, []byte("create_network")) {
			t.Errorf("%s can be read", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	for name, seal := range map[string][]byte{"none": nil, "another": NewSealKey()} {
		s, err := openStore(ManagerConfig{Node: n.node, DataDir: n.dir, Seal: seal, Log: n.log})
		if err == nil {
			s.Close()
			t.Errorf("with %s key it opens", name)
		}
	}
	if s, err := openStore(ManagerConfig{Node: late.node, DataDir: late.dir, Seal: NewSealKey(), Log: n.log}); err == nil {
		s.Close()
		t.Error("a store that is not sealed opens as one that is")
	}
}
