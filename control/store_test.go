package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/raft"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/spec"
)

// damages is what may become of a manager's store while it is down. old is a copy of
// the data directory from an earlier time, other another manager's.
func damages() map[string]func(dir, old, other string) error {
	log := func(dir string) string { return filepath.Join(RaftDir(dir), "log.db") }
	return map[string]func(dir, old, other string) error{
		"log absent": func(dir, _, _ string) error { return os.Remove(log(dir)) },
		"log empty":  func(dir, _, _ string) error { return os.Truncate(log(dir), 0) },
		"log cut":    func(dir, _, _ string) error { return os.Truncate(log(dir), 4096*2+100) },
		"log of zeros": func(dir, _, _ string) error {
			return os.WriteFile(log(dir), make([]byte, 64<<10), 0o600)
		},
		"log is text":        func(dir, _, _ string) error { return os.WriteFile(log(dir), []byte("hello\n"), 0o600) },
		"log is a directory": func(dir, _, _ string) error { return errors.Join(os.Remove(log(dir)), os.Mkdir(log(dir), 0o700)) },
		"raft absent":        func(dir, _, _ string) error { return os.RemoveAll(RaftDir(dir)) },
		"raft empty": func(dir, _, _ string) error {
			return errors.Join(os.RemoveAll(RaftDir(dir)), os.Mkdir(RaftDir(dir), 0o700))
		},
		"raft and mark absent": func(dir, _, _ string) error {
			return errors.Join(os.RemoveAll(RaftDir(dir)), os.Remove(MarkPath(dir)))
		},
		"another's": func(dir, _, other string) error {
			return errors.Join(os.RemoveAll(RaftDir(dir)), os.CopyFS(RaftDir(dir), os.DirFS(RaftDir(other))))
		},
		"an old copy": func(dir, old, _ string) error {
			return errors.Join(os.RemoveAll(RaftDir(dir)), os.CopyFS(RaftDir(dir), os.DirFS(RaftDir(old))))
		},
	}
}

// report says what a node's agent says each second.
func report(via, n *simNode) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err := shoalv1connect.NewControlClient(n.fwd.client, "http://"+via.addr()).Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: n.node.ID, ManagerReady: n.mgr != nil}))
	return err
}

func voters(t *testing.T, l *simNode) []string {
	t.Helper()
	f := l.mgr.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return nil
	}
	var out []string
	for _, s := range f.Configuration().Servers {
		if s.Suffrage == raft.Voter {
			out = append(out, string(s.ID))
		}
	}
	return out
}

// TestLostStoreDoesNotVote: what two of three managers acknowledged outlives that
// one of them loses its store and the other is gone, in every way that a store is
// lost; and the one that lost it is a voter again, by the leader.
func TestLostStoreDoesNotVote(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 3)
	l := leader(t, nodes)
	b := without(nodes, l)[0]
	old := t.TempDir()
	b.stop()
	if err := os.CopyFS(old, os.DirFS(b.dir)); err != nil {
		t.Fatal(err)
	}
	b.start()
	k := 0
	all := damages()
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for n := range all {
			if !yield(n) {
				return
			}
		}
	}) {
		k++
		l = leader(t, nodes)
		a := without(nodes, l)[1]
		b = without(nodes, l)[0]
		a.stop()
		x := fmt.Sprintf("x%d", k)
		eventually(t, name+": "+x, func() error {
			err := createNetwork(l, x)
			if connect.CodeOf(err) == connect.CodeAlreadyExists {
				return nil // an earlier try made it, and its answer did not arrive
			}
			return err
		})
		b.stop() // writes down how far it is
		from := old
		if name == "an old copy" && !sameStore(b.dir, old) {
			from = l.dir // the old copy is of a store before: any other will do
		}
		if err := all[name](b.dir, from, l.dir); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		b.start()
		if b.mgr != nil {
			t.Fatalf("%s: the manager votes from what is no store of its own", name)
		}
		l.stop()
		a.start()
		// a and b would be a majority. The one that is lost has no part in it, so
		// what they lack can't be decided away.
		time.Sleep(3 * a.tune.Election)
		if a.mgr.IsLeader() {
			t.Fatalf("%s: elected by a manager without a store", name)
		}
		l.start()
		now := leader(t, []*simNode{a, l})
		readmit(t, now, b)
		eventually(t, name+": a voter again", func() error {
			for _, n := range nodes {
				if err := report(now, n); err != nil {
					return err
				}
			}
			if v := voters(t, now); !slices.Contains(v, b.node.ID) {
				return fmt.Errorf("voters are %v", v)
			}
			return nil
		})
		alike(t, nodes...)
		// And now its vote counts.
		now.stop()
		next := leader(t, without(nodes, now))
		var got []string
		eventually(t, name+": networks", func() (err error) { got, err = networkNames(next); return err })
		if !slices.Contains(got, x) {
			t.Fatalf("%s: %s was acknowledged and is gone: %v", name, x, got)
		}
		now.start()
		alike(t, nodes...)
	}
}

func sameStore(a, b string) bool {
	x, _ := readMark(a)
	y, _ := readMark(b)
	return x != nil && y != nil && x.Store == y.Store
}

// readmit does what the agent of a manager without a store does.
func readmit(t *testing.T, via, n *simNode) {
	t.Helper()
	var resp *connect.Response[shoalv1.AdmitManagerResponse]
	eventually(t, "admission", func() (err error) {
		resp, err = via.ctl.AdmitManager(testCtx(t), connect.NewRequest(&shoalv1.AdmitManagerRequest{Node: n.node.ID}))
		return err
	})
	n.stop()
	if err := (Admission{Term: resp.Msg.Term, Leader: resp.Msg.Leader}).Begin(n.dir, n.node.ID); err != nil {
		t.Fatal(err)
	}
	n.start()
	if n.mgr == nil {
		t.Fatalf("admitted, and: %v", n.lost)
	}
	if term, err := n.mgr.store.GetUint64(keyVoteTerm); err != nil || term < resp.Msg.Term {
		t.Errorf("its vote of term %d is not given away: %d, %v", resp.Msg.Term, term, err)
	}
}

// TestAlone: the only manager of a cluster does not become an empty cluster, and a
// mark that is gone or damaged alone costs nothing.
func TestAlone(t *testing.T) {
	t.Parallel()
	n := newCluster(t, 1)[0]
	for _, mark := range []string{"", "{", `{"format":1}`, "null"} {
		n.stop()
		var err error
		if mark == "" {
			err = os.Remove(MarkPath(n.dir))
		} else {
			err = os.WriteFile(MarkPath(n.dir), []byte(mark), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		n.start()
		if n.mgr == nil {
			t.Fatalf("mark %q: %v", mark, n.lost)
		}
		leader(t, []*simNode{n})
		if b, err := os.ReadFile(MarkPath(n.dir)); err != nil || !bytes.Contains(b, []byte(n.mgr.StoreID())) {
			t.Errorf("after mark %q: %s, %v", mark, b, err)
		}
	}
	n.stop()
	if err := os.RemoveAll(RaftDir(n.dir)); err != nil {
		t.Fatal(err)
	}
	n.wait = 100 * time.Millisecond
	for range 2 {
		n.start()
		if n.mgr != nil {
			t.Fatal("an empty cluster took the place of the lost one")
		}
		if _, err := n.ctl.AdmitManager(testCtx(t), connect.NewRequest(&shoalv1.AdmitManagerRequest{Node: n.node.ID})); err == nil {
			t.Error("admitted by nobody")
		}
		n.stop()
	}
}

// TestAdmitRefusals: who is no manager is not admitted, nor the leader.
func TestAdmitRefusals(t *testing.T) {
	t.Parallel()
	m := newCluster(t, 1)[0]
	w := newNode(t, "worker", spec.RoleWorker)
	w.start()
	join(t, m, w)
	for _, id := range []string{"", "nix", w.node.ID, m.node.ID} {
		if _, err := m.ctl.AdmitManager(testCtx(t), connect.NewRequest(&shoalv1.AdmitManagerRequest{Node: id})); err == nil {
			t.Errorf("node %q is admitted", id)
		}
	}
	if v := voters(t, m); !slices.Equal(v, []string{m.node.ID}) {
		t.Errorf("voters %v", v)
	}
}

// TestGivenUp: a store that was removed as its node became a worker is no lost one, and
// votes no more for that.
func TestGivenUp(t *testing.T) {
	dir := t.TempDir()
	cfg := ManagerConfig{Node: spec.Node{ID: "n1"}, DataDir: dir}
	if err := GiveUp(dir); err != nil {
		t.Errorf("of one that never was a manager: %v", err)
	}
	var lost *StoreLostError
	if _, err := openStore(cfg); !errors.As(err, &lost) || !lost.New {
		t.Errorf("then: %v", err)
	}
	k := mark{Node: "n1", Store: "s1", Term: 3}
	if err := errors.Join(k.save(dir), os.MkdirAll(RaftDir(dir), 0o700), os.WriteFile(filepath.Join(RaftDir(dir), "log.db"), []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(RaftDir(dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(cfg); !errors.As(err, &lost) || lost.Expected() {
		t.Errorf("of one that is lost: %v", err)
	}
	if err := GiveUp(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(cfg); !errors.As(err, &lost) || !lost.Expected() || lost.New || !strings.Contains(err.Error(), "gave its managers' log up") {
		t.Errorf("of one that was given up: %v", err)
	}
	if got, err := readMark(dir); err != nil || got == nil || got.Store != "s1" || got.Term != 3 || !got.GivenUp {
		t.Errorf("its mark: %+v, %v", got, err)
	}
	cfg.Fresh = false
	cfg.Voted = true
	if _, err := openStore(cfg); !errors.As(err, &lost) || !lost.GivenUp {
		t.Errorf("known to have voted: %v", err)
	}
}
