package agent

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

func cached() *assignment {
	return &assignment{Index: 7, Nodes: []spec.Node{{ID: "n1", Name: "node1"}, {ID: "n2", Name: "node2"}},
		Networks: []spec.Network{{ID: "app", Name: "app"}},
		Tasks:    []spec.Task{{ID: "t1", Node: "n1", Desired: spec.DesiredRunning}}, Trust: &trust{Signs: "abc"}}
}

func self(cluster, node string) *identity {
	return &identity{Format: identityFormat, NodeID: node, Name: "node1", Cluster: state.Cluster{ID: cluster}}
}

// TestCachedAssignment: only what was written for this node, whole, is known.
// Everything else is not known, which is not the same as empty.
func TestCachedAssignment(t *testing.T) {
	whole, err := encodeAssignment(cached(), self("c1", "n1"))
	if err != nil {
		t.Fatal(err)
	}
	// Versions of before read it as they read their own, and theirs is read here.
	var old assignment
	if err := json.Unmarshal(whole, &old); err != nil || !reflect.DeepEqual(&old, cached()) {
		t.Fatalf("a version of before reads %+v, %v", old, err)
	}
	before, err := json.Marshal(cached())
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"now": whole, "before": before} {
		if a, err := decodeAssignment(b, "c1", "n1"); err != nil || !reflect.DeepEqual(a, cached()) {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
	foreign, _ := encodeAssignment(cached(), self("c2", "n1"))
	other, _ := encodeAssignment(cached(), self("c1", "n2"))
	fewer := cached()
	fewer.Tasks = nil
	less, _ := json.Marshal(fewer)
	cut := bytes.LastIndex(whole, []byte(compactSum.member))
	stranger := bytes.ReplaceAll(bytes.ReplaceAll(before, []byte(`"n1"`), []byte(`"n8"`)), []byte(`"n2"`), []byte(`"n9"`))
	for name, k := range map[string]struct {
		b    []byte
		want string
	}{
		"empty":                {nil, "damaged: it is empty"},
		"no JSON":              {[]byte("garbage"), "damaged"},
		"null":                 {[]byte("null"), "without what the managers said"},
		"an empty object":      {[]byte("{}"), "without what the managers said"},
		"an array":             {[]byte("[]"), "damaged"},
		"another object":       {[]byte(`{"name":"x","version":"1.0"}`), "without what the managers said"},
		"zeros":                {make([]byte, 4096), "damaged"},
		"other types":          {[]byte(`{"index":"seven"}`), "damaged"},
		"of another cluster":   {foreign, "not this node's: it is of node n1 in cluster c2"},
		"of another node":      {other, "not this node's: it is of node n2"},
		"of before, another's": {stranger, "not this node's"},
		"fewer tasks":          {append(less[:len(less)-1], whole[cut:]...), "checksum"},
		"an edit":              {bytes.Replace(whole, []byte(`"running"`), []byte(`"shutdown"`), 1), "checksum"},
		"a sum elsewhere":      {append([]byte(`{"sum":"abc",`), before[1:]...), "checksum"},
		"an empty sum":         {append(bytes.Clone(before[:len(before)-1]), `,"sum":""}`...), "checksum"},
	} {
		if a, err := decodeAssignment(k.b, "c1", "n1"); err == nil || a != nil || !strings.Contains(err.Error(), k.want) {
			t.Errorf("%s: %+v, %v, want %q", name, a, err, k.want)
		}
	}
	for n := range whole { // every cut, and every changed byte
		if a, err := decodeAssignment(whole[:n], "c1", "n1"); err == nil {
			t.Fatalf("the first %d bytes are taken: %+v", n, a)
		}
		b := bytes.Clone(whole)
		b[n] ^= 1
		if a, err := decodeAssignment(b, "c1", "n1"); err == nil && !reflect.DeepEqual(a, cached()) {
			t.Fatalf("with byte %d changed it is taken: %+v", n, a)
		}
	}
}

// TestUnknownAssignment: a file that can't be believed leaves the node without an
// assignment, and says so until the managers have said it again. What init and join
// know before that, the keys, is no assignment either.
func TestUnknownAssignment(t *testing.T) {
	m := &member{cfg: Config{DataDir: t.TempDir()}, ident: &identity{NodeID: "n1", Cluster: state.Cluster{ID: "c1"}}, log: slog.New(slog.DiscardHandler)}
	m.kept.log = m.log
	m.loadAssignment()
	if err := m.cacheFault(); m.assigned != nil || err == nil || !strings.Contains(err.Error(), "is gone") {
		t.Errorf("no file: %+v, %v", m.assigned, err)
	}
	if err := os.WriteFile(m.assignmentPath(), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.loadAssignment()
	if err := m.cacheFault(); m.assigned != nil || err == nil || !strings.Contains(err.Error(), m.assignmentPath()) {
		t.Errorf("{}: %+v, %v", m.assigned, err)
	}
	m.saveAssignment(cached())
	m.loadAssignment()
	if err := m.cacheFault(); err != nil || !m.assigned.known() || m.nodes.Load() == nil {
		t.Errorf("as it should be: %+v, %v", m.assigned, err)
	}
	m.assigned = &assignment{Trust: &trust{}}
	if err := os.Remove(m.assignmentPath()); err != nil {
		t.Fatal(err)
	}
	if m.loadAssignment(); m.cacheFault() != nil || m.assigned == nil || m.assigned.known() {
		t.Errorf("after init: %+v, %v", m.assigned, m.cacheFault())
	}
}
