package state

import (
	"cmp"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"

	"github.com/shoalnet/shoal/spec"
)

// Level is this build's feature level. It grows by one when the log may hold what an
// older build can't read, or would judge otherwise: a kind of command, a field of
// what is stored, another rule of [State.Apply]. CONTRIBUTING.md tells how.
//
// The cluster has a level of its own ([State.Level]): the lowest of all its managers.
// A leader proposes nothing that needs more ([Command.Need]), and has commands judged
// by the rules of that level, so that every manager makes the same of the log. When
// the last manager has a newer build the leader raises it (RaiseLevel), never to go
// back.
const Level = 4

// Levels tells, by level, what each brings.
var Levels = []string{
	0: "clusters made before there were levels",
	1: "the feature level itself; node ls -o wide and inspect show each node's level and version",
	2: "secrets and configs; updates wait for a replica to listen; update and rollback policies, previous specs",
	3: "tasks that are started again, and renamed",
	4: "what a task's health check says is kept: ps --filter health, inspect, events",
}

// RaiseLevel raises the cluster's level. It is refused while a manager has less.
type RaiseLevel struct {
	Level int `json:"level"`
}

// Level is the cluster's: the least that all of its managers understand.
func (s *State) Level() int { return s.level }

func (s *State) raiseLevel(c *RaiseLevel) Result {
	if c.Level <= s.level {
		return Result{Err: failf(ErrInvalid, "the cluster is at feature level %d already", s.level)}
	}
	// What nodes say of their level is in the log only from level 1 on.
	if behind := s.Behind(c.Level, nil); s.level > 0 && len(behind) > 0 {
		return Result{Err: failf(ErrLevel, "%s", behind)}
	}
	s.event("cluster", "level", s.cluster.ID, s.cluster.ID, "level", strconv.Itoa(c.Level), "was", strconv.Itoa(s.level))
	s.level, s.changed = c.Level, s.index
	return Result{}
}

// Laggards are managers whose build has less than some level.
type Laggards []Laggard

// Laggard is one of them.
type Laggard struct {
	Name  string
	Level int
	Build string // the version that it runs; empty: not known
}

// String names them: "node2 runs level 1 (v1.2)".
func (l Laggards) String() string {
	var out []string
	for _, x := range l {
		text := fmt.Sprintf("%s runs level %d", x.Name, x.Level)
		if x.Level == 0 {
			text = x.Name + " runs a version without levels, or has not said yet"
		}
		if x.Build != "" {
			text += " (" + x.Build + ")"
		}
		out = append(out, text)
	}
	return strings.Join(out, ", ")
}

// Behind are the managers that have less than a level, by name. What was heard of
// nodes, by ID, counts more than what is stored; nil: nothing was.
func (s *State) Behind(level int, heard map[string]int) Laggards {
	return BehindOf(s.Nodes(), level, heard, func(id string) bool { return s.nodes[id].expelled })
}

// BehindOf is Behind of a list of nodes.
func BehindOf(nodes []spec.Node, level int, heard map[string]int, expelled func(id string) bool) Laggards {
	var out Laggards
	for _, n := range nodes {
		if n.Role != spec.RoleManager || expelled != nil && expelled(n.ID) {
			continue
		}
		if has := max(n.Level, heard[n.ID]); has < level {
			out = append(out, Laggard{n.Name, has, n.Build})
		}
	}
	return out
}

// tooOld refuses a build in a cluster whose log it may not understand.
func (s *State) tooOld(n spec.Node, what string) error {
	if n.Level >= s.level {
		return nil
	}
	build := ""
	if n.Build != "" {
		build = " (" + n.Build + ")"
	}
	return failf(ErrLevel, "node %s can't %s: the cluster is at feature level %d, and its shoal%s has level %d: install a shoal of level %d or newer on it, like that of another node ('shoal node ls -o wide'), and try again",
		n.Name, what, s.level, build, n.Level, s.level)
}

// Need is the least level that all managers must have for the command to enter the
// log, and what in it needs that: the highest `level` tag of a field that is set,
// wherever it is in the command.
func (c Command) Need() (level int, what string) {
	var n need
	n.walk(reflect.ValueOf(c), "")
	return n.level, n.what
}

// NeedOf is the same of a part of a command, such as a spec.ServiceSpec.
func NeedOf(v any) (level int, what string) {
	var n need
	n.walk(reflect.ValueOf(v), "")
	return n.level, n.what
}

type need struct {
	level int
	what  string
}

// leveled are the fields of a struct that need a level, or lead to one that does.
type leveled struct {
	index int
	level int // that it needs itself
	name  string
}

var leveledOf sync.Map // reflect.Type → []leveled

// plan finds the fields of a struct that walk has to look at.
func plan(t reflect.Type) []leveled {
	if p, ok := leveledOf.Load(t); ok {
		return p.([]leveled)
	}
	var out []leveled
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.IsExported() {
			continue
		}
		l := leveled{index: i}
		l.level, _ = strconv.Atoi(f.Tag.Get("level")) // a test checks them
		l.name, _, _ = strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && l.name == "" {
			l.name = "" // its fields are those of the struct around it
		} else {
			l.name = cmp.Or(l.name, f.Name)
		}
		if l.level > 0 || leads(f.Type, map[reflect.Type]bool{}) {
			out = append(out, l)
		}
	}
	leveledOf.Store(t, out)
	return out
}

// leads tells whether a value of a type may have a field that needs a level in it.
func leads(t reflect.Type, seen map[reflect.Type]bool) bool {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Array, reflect.Map:
		return leads(t.Elem(), seen)
	case reflect.Struct:
		if seen[t] {
			return false
		}
		seen[t] = true
		for i := range t.NumField() {
			if f := t.Field(i); f.IsExported() && (f.Tag.Get("level") != "" || leads(f.Type, seen)) {
				return true
			}
		}
	}
	return false
}

func (n *need) walk(v reflect.Value, path string) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			n.walk(v.Elem(), path)
		}
	case reflect.Slice, reflect.Array:
		if leads(v.Type().Elem(), map[reflect.Type]bool{}) {
			for i := range v.Len() {
				n.walk(v.Index(i), path)
			}
		}
	case reflect.Map:
		if leads(v.Type().Elem(), map[reflect.Type]bool{}) {
			for it := v.MapRange(); it.Next(); {
				n.walk(it.Value(), path)
			}
		}
	case reflect.Struct:
		for _, l := range plan(v.Type()) {
			f := v.Field(l.index)
			if f.IsZero() {
				continue
			}
			at := path
			if l.name != "" {
				at = strings.TrimPrefix(path+"."+l.name, ".")
			}
			if l.level > n.level {
				n.level, n.what = l.level, at
			}
			n.walk(f, at)
		}
	}
}
