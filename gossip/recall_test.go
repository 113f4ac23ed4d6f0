package gossip

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// kept waits until node i's file has a record of each of these nodes.
func (c *cluster) kept(i int, of ...int) {
	c.Helper()
	c.eventually(10*time.Second, "kept", func() string {
		recs, err := loadRecords(filepath.Join(c.dir, nodeID(i), "gossip"))
		for _, k := range of {
			if err != nil || recs[nodeID(k)].d == nil {
				return fmt.Sprintf("no record of node %d: %v", k, err)
			}
		}
		return ""
	})
}

// allAway makes three nodes, of which each knows the others, and kills them all.
func (c *cluster) allAway() {
	c.Helper()
	c.grow(3)
	c.kept(1, 2, 3)
	for i := range 3 {
		c.kill(i + 1)
	}
}

// runs waits until node i takes part.
func (c *cluster) runs(i int) {
	c.Helper()
	c.eventually(10*time.Second, "running", func() string {
		if c.node(i).running() == nil {
			return "not yet"
		}
		return ""
	})
}

// TestRecall: agents of several nodes are away at once, and the first that is back knows
// by its disk what the others said, until it hears of them, their machines are gone, or
// they have been away for too long.
func TestRecall(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(c *cluster, gone *atomic.Bool)
		want string
		n    int
	}{
		{"agent back", func(c *cluster, _ *atomic.Bool) { c.start(2).put(1, 2, 3) }, "alive", 3},
		{"agent back, and nothing runs", func(c *cluster, _ *atomic.Bool) { c.start(2).put() }, "alive", 0},
		{"machine gone", func(_ *cluster, gone *atomic.Bool) { gone.Store(true) }, "dead", 0},
		{"time up", func(*cluster, *atomic.Bool) {}, "dead", 0},
		{"removed", func(c *cluster, _ *atomic.Bool) { c.unassign(2) }, "absent", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tune := Tuning{OrphanAge: time.Hour}
			if tc.name == "time up" {
				tune.OrphanAge = 3 * time.Second
			}
			c := newCluster(t, tune)
			var gone atomic.Bool
			c.present = func(_ context.Context, a netip.AddrPort) bool { return a == nodeAddr(2) && !gone.Load() }
			c.allAway()
			n := c.start(1)
			n.put(1)
			c.runs(1)
			if msg := c.expect(2, "absent", 0)(); msg != "" {
				t.Errorf("before there was time to hear of it: %s", msg)
			}
			n.Recall()
			c.eventually(10*time.Second, "recalled", c.expect(2, "suspect", 1))
			c.eventually(10*time.Second, "no machine", c.expect(3, "dead", 0))
			tc.end(c, &gone)
			c.eventually(20*time.Second, tc.name, c.expect(2, tc.want, tc.n))
			n.Recall() // and only once
			if msg := c.expect(2, tc.want, tc.n)(); msg != "" {
				t.Error(msg)
			}
		})
	}
}

// TestRecallIsOverruled: what the disk has counts for nothing beside what was heard.
func TestRecallIsOverruled(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.present = func(context.Context, netip.AddrPort) bool { return true }
	c.grow(3)
	c.kept(1, 2, 3)
	c.kill(1)
	c.node(2).put(7, 8)
	n := c.start(1)
	n.put(1)
	c.eventually(10*time.Second, "heard", c.agreed)
	n.Recall()
	if msg := c.agreed(); msg != "" {
		t.Error(msg)
	}
}

// TestDamagedRecords: a file that is damaged, or says what its nodes never signed, is of
// no use, and does no harm.
func TestDamagedRecords(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.present = func(context.Context, netip.AddrPort) bool { return true }
	c.allAway()
	path := filepath.Join(c.dir, nodeID(1), "gossip", "records.json")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var f recordsFile
	if err := json.Unmarshal(whole, &f); err != nil || len(f.Records) != 2 {
		t.Fatalf("%v: %s", err, whole)
	}
	with := func(change func(k *keptRecord)) []byte {
		g := recordsFile{append([]keptRecord(nil), f.Records...)}
		for i := range g.Records {
			g.Records[i].Delta = bytes.Clone(g.Records[i].Delta)
			change(&g.Records[i])
		}
		b, _ := json.Marshal(g)
		return b
	}
	swap := strings.NewReplacer("node02", "node03", "node03", "node02")
	for name, b := range map[string][]byte{
		"empty": {}, "cut": whole[:len(whole)/2], "null": []byte("null"), "a list": []byte("[1]"),
		"a record is cut":  with(func(k *keptRecord) { k.Delta = k.Delta[:len(k.Delta)/2] }),
		"no record":        with(func(k *keptRecord) { k.Delta = nil }),
		"absurd MTU":       with(func(k *keptRecord) { k.MTU = -1 }),
		"another signed":   with(func(k *keptRecord) { k.Delta = []byte(swap.Replace(string(k.Delta))) }),
		"other endpoints":  with(func(k *keptRecord) { k.Delta = bytes.ReplaceAll(k.Delta, []byte("task"), []byte("evil")) }),
		"its last bit":     with(func(k *keptRecord) { k.Delta[len(k.Delta)-1] ^= 1 }),
		"each record, yet": nil,
	} {
		if b == nil { // as a check of the others
			b = whole
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		n := c.start(1)
		c.runs(1)
		n.Recall()
		got := n.Snapshot().Endpoints
		if want := map[bool]int{true: 2}[name == "each record, yet"]; len(got) != want {
			t.Errorf("%s: %d endpoints are recalled, want %d: %+v", name, len(got), want, got)
		}
		c.kill(1)
	}
}
