package state

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/spec"
)

// storedFields lists every field of what is in the log and in snapshots, one a line:
// level, type and JSON name, Go type.
func storedFields(t *testing.T) []string {
	var out []string
	seen := map[reflect.Type]bool{}
	var walk func(reflect.Type)
	walk = func(x reflect.Type) {
		switch x.Kind() {
		case reflect.Map:
			walk(x.Key())
			walk(x.Elem())
		case reflect.Pointer, reflect.Slice, reflect.Array:
			walk(x.Elem())
		case reflect.Struct:
			if seen[x] || !strings.HasPrefix(x.PkgPath(), "github.com/shoalnet/shoal") || x.Implements(reflect.TypeFor[encoding.TextMarshaler]()) {
				return
			}
			seen[x] = true
			for i := range x.NumField() {
				f := x.Field(i)
				name, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
				if name == "-" || !f.IsExported() {
					continue
				}
				level := f.Tag.Get("level")
				if n, err := strconv.Atoi(level); level != "" && (err != nil || n < 1 || n > Level || strconv.Itoa(n) != level) {
					t.Errorf("%s.%s has level %q: want a number from 1 to %d, which state.Level is", x, f.Name, level, Level)
				}
				if level != "" && !strings.Contains(opts, "omit") {
					t.Errorf("%s.%s has a level, and not omitempty: older managers would stop at it although nobody uses it", x, f.Name)
				}
				if level == "" {
					level = "0"
				}
				if f.Anonymous && name == "" {
					name = "(embedded)"
				}
				out = append(out, fmt.Sprintf("%s %s.%s %s", level, x, name, f.Type))
				walk(f.Type)
			}
		}
	}
	walk(reflect.TypeFor[Command]())
	walk(reflect.TypeFor[snapshot]())
	slices.Sort(out)
	return out
}

// TestStoredFields: what is stored is what older builds read. A field that is new has
// to say from which level on they do; one that is gone or has another type can't be
// read from a log of before.
//
// SHOAL_UPDATE=1 adds the fields that have a level to the list. It takes none away,
// and none without a level: managers would part over those, or stop.
func TestStoredFields(t *testing.T) {
	const file = "testdata/fields.txt"
	have := storedFields(t)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	listed := strings.Split(strings.TrimSpace(string(b)), "\n")
	var fresh []string
	for _, f := range have {
		if slices.Contains(listed, f) {
			continue
		}
		if strings.HasPrefix(f, "0 ") {
			t.Errorf("new or changed, and without a level: %s\ngive it the tag `level:\"N\"`: see \"What is stored\" in CONTRIBUTING.md", f[2:])
			continue
		}
		fresh = append(fresh, f)
	}
	for _, f := range listed {
		if !slices.Contains(have, f) {
			t.Errorf("gone or changed: %s\na log or snapshot of before can't be read without it", f)
		}
	}
	switch {
	case len(fresh) == 0 || t.Failed():
	case os.Getenv("SHOAL_UPDATE") == "1":
		listed = append(listed, fresh...)
		slices.Sort(listed)
		if err := os.WriteFile(file, []byte(strings.Join(listed, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("new: %s\nadd them to %s with SHOAL_UPDATE=1", strings.Join(fresh, ", "), file)
	}
	if len(Levels) != Level+1 || slices.Contains(Levels, "") {
		t.Errorf("Levels has %d lines: want one for each of 0 to %d", len(Levels), Level)
	}
}

func TestNeed(t *testing.T) {
	type inner struct {
		Old string `json:"old"`
		New string `json:"new,omitempty" level:"3"`
	}
	type embedded struct {
		Deep *inner `json:"deep,omitempty"`
	}
	type value struct {
		embedded
		Embedded embedded          `json:"-"`
		List     []inner           `json:"list"`
		Map      map[string]*inner `json:"map"`
		Kind     *inner            `json:"kind,omitempty" level:"2"`
		Self     *value            `json:"self"`
		Plain    map[string]string `json:"plain"`
	}
	for i, x := range []struct {
		v     value
		level int
		what  string
	}{
		{value{}, 0, ""},
		{value{Plain: map[string]string{"a": "b"}, List: []inner{{Old: "x"}}, Self: &value{}}, 0, ""},
		{value{Kind: &inner{}}, 2, "kind"},
		{value{Kind: &inner{New: "x"}}, 3, "kind.new"},
		{value{List: []inner{{}, {New: "x"}}}, 3, "list.new"},
		{value{Map: map[string]*inner{"a": nil, "b": {New: "x"}}}, 3, "map.new"},
		{value{Self: &value{Self: &value{Kind: &inner{}}}}, 2, "self.self.kind"},
	} {
		if level, what := NeedOf(x.v); level != x.level || what != x.what {
			t.Errorf("%d: level %d of %q, want %d of %q", i, level, what, x.level, x.what)
		}
	}
	if level, what := (Command{UpsertNode: &UpsertNode{Node: spec.Node{Level: 1}}}).Need(); level != 1 || what != "upsert_node.node.level" {
		t.Errorf("%d %s", level, what)
	}
	if level, _ := (Command{UpsertNode: &UpsertNode{Node: spec.Node{Name: "a"}}}).Need(); level != 0 {
		t.Errorf("%d", level)
	}
}

func TestRaiseLevel(t *testing.T) {
	c := newCluster(t)
	n := c.join("n1")
	up := func(level int, change func(*spec.Node)) Result {
		x := c.s.nodes[n.id].Node.Clone()
		x.Level, x.Build = level, "v"+strconv.Itoa(level)
		if change != nil {
			change(&x)
		}
		return c.apply(Command{UpsertNode: &UpsertNode{Node: x}})
	}
	if c.s.Level() != 0 {
		t.Fatal(c.s.Level())
	}
	c.must(Command{RaiseLevel: &RaiseLevel{Level: 1}})
	if c.s.Level() != 1 {
		t.Error(c.s.Level())
	}
	wantErr(t, c.apply(Command{RaiseLevel: &RaiseLevel{Level: 1}}).Err, ErrInvalid, "at feature level 1 already")
	wantErr(t, c.apply(Command{RaiseLevel: &RaiseLevel{Level: -1}}).Err, ErrInvalid, "at feature level 1 already")

	// A node of before may stay and report; another may not come, nor may it manage.
	if r := up(0, nil); r.Err != nil {
		t.Error(r.Err)
	}
	other := func(n *spec.Node) { n.ID, n.Name, n.Role = "nodother0001", "n2", spec.RoleWorker }
	wantErr(t, up(0, other).Err, ErrLevel, "node n2 can't join: the cluster is at feature level 1, and its shoal (v0) has level 0: install a shoal of level 1 or newer")
	if r := up(1, other); r.Err != nil || r.Node.Build != "v1" {
		t.Errorf("%+v", r)
	}
	manager := spec.RoleManager
	if r := c.apply(Command{UpdateNode: &UpdateNode{Ref: "n2", Role: &manager}}); r.Err != nil {
		t.Error(r.Err)
	}
	worker := spec.RoleWorker
	c.must(Command{UpdateNode: &UpdateNode{Ref: "n2", Role: &worker}})
	if r := up(0, other); r.Err != nil {
		t.Error(r.Err)
	}
	wantErr(t, c.apply(Command{UpdateNode: &UpdateNode{Ref: "n2", Role: &manager}}).Err, ErrLevel, "node n2 can't be made a manager: the cluster is at feature level 1")

	// It is in the snapshot, and beyond this build's nothing is read.
	s, err := Restore(c.snapshot())
	if err != nil || s.Level() != 1 {
		t.Fatalf("%v, %v", s, err)
	}
	var m map[string]any
	if err := json.Unmarshal(c.snapshot(), &m); err != nil {
		t.Fatal(err)
	}
	m["level"], m["from_the_future"] = Level+1, true
	b, _ := json.Marshal(m)
	_, err = Restore(b)
	wantErr(t, err, ErrLevel, fmt.Sprintf("the cluster is at feature level %d, and this Shoal has level %d", Level+1, Level))
	for _, cmd := range []string{
		fmt.Sprintf(`{"raise_level":{"level":%d}}`, Level+1), fmt.Sprintf(`{"rules":%d,"remove_node":{"ref":"a"}}`, Level+1),
		fmt.Sprintf(`{"init_cluster":{"cluster":{},"default_network":"a","level":%d}}`, Level+1),
	} {
		if _, err := Decode([]byte(cmd)); !errors.Is(err, ErrLevel) {
			t.Errorf("%s: %v", cmd, err)
		}
	}
	c.checkReplay(2)
}

// TestLaggingManager: a manager that has said less keeps the level where it is.
func TestLaggingManager(t *testing.T) {
	s := New()
	for i, c := range []Command{
		{InitCluster: &InitCluster{Cluster: Cluster{ID: "clusteraaaaa"}, DefaultNetwork: "netaaaaaaaaa", Level: 1}},
		{UpsertNode: &UpsertNode{Node: spec.Node{ID: "nodaaaaaaaaa", Name: "a", Role: spec.RoleManager, Addr: netip.MustParseAddr("192.0.2.1"), ControlPort: 1, GossipPort: 1, Level: 1, Build: "v1"}}},
		{UpsertNode: &UpsertNode{Node: spec.Node{ID: "nodbbbbbbbbb", Name: "b", Role: spec.RoleWorker, Addr: netip.MustParseAddr("192.0.2.2"), ControlPort: 1, GossipPort: 1, Level: 1}}},
	} {
		if r := s.Apply(uint64(i+1), c.Stamped(1)); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	if got := s.Behind(2, nil).String(); got != "a runs level 1 (v1)" {
		t.Errorf("%q", got)
	}
	if got := s.Behind(2, map[string]int{"nodaaaaaaaaa": 2}); got != nil {
		t.Errorf("%v", got)
	}
	before, _ := s.Snapshot()
	r := s.raiseLevel(&RaiseLevel{Level: 2})
	wantErr(t, r.Err, ErrLevel, "a runs level 1 (v1)")
	if after, _ := s.Snapshot(); !bytes.Equal(before, after) {
		t.Error("a refused command changed the state")
	}
	// What a task needs of its node it needs of each, workers too.
	rules := s.taskRules(nil, nil, "", 2)
	if allow(rules, s.nodes["nodbbbbbbbbb"].Node) || !allow(rules, spec.Node{Level: 2}) || !allow(s.taskRules(nil, nil, "", 0), spec.Node{}) {
		t.Error("a node may have a task of which it does not know all")
	}
}
