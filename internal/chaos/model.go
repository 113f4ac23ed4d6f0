package chaos

import (
	"fmt"
	"maps"
	"slices"
)

// model is what must be there, by what commands were answered. Where an answer left
// it open, as errors may that say so, the object is doubtful until the next quiet
// point, when what is found is taken as the truth: either is right.
type model struct {
	nets  map[string]*network
	svcs  map[string]*service
	tasks map[string]*task
	nodes map[string]*node
	next  int // number in the next name: no name comes twice
	// removed are names of services that are gone, the last few.
	removed []string
}

type network struct{ doubt bool }

type service struct {
	replicas int
	nets     []string
	dnsrr    bool
	port     int  // published; 0: none
	doubt    bool // whether it exists
	open     bool // what it is like: an update was left open
	gone     bool // only while it is doubtful: it may have been removed
}

type task struct {
	node  string
	nets  []string
	ended bool // stopped, or its node died
	doubt bool
	open  bool
	going bool // its node was to end it, and may yet: that it is found says nothing
}

type node struct {
	availability, role string
	open               bool // an update was left open
}

func newModel(nodes int) model {
	m := model{nets: map[string]*network{}, svcs: map[string]*service{}, tasks: map[string]*task{}, nodes: map[string]*node{}}
	for i := range nodes {
		role := "worker"
		if i < 3 {
			role = "manager"
		}
		m.nodes[fmt.Sprintf("node%d", i+1)] = &node{availability: "active", role: role}
	}
	return m
}

// clone is a copy that shares nothing with it.
func (m *model) clone() model {
	c := model{nets: map[string]*network{}, svcs: map[string]*service{}, tasks: map[string]*task{}, nodes: map[string]*node{}, next: m.next, removed: slices.Clone(m.removed)}
	for k, v := range m.nets {
		x := *v
		c.nets[k] = &x
	}
	for k, v := range m.svcs {
		x := *v
		x.nets = slices.Clone(v.nets)
		c.svcs[k] = &x
	}
	for k, v := range m.tasks {
		x := *v
		x.nets = slices.Clone(v.nets)
		c.tasks[k] = &x
	}
	for k, v := range m.nodes {
		x := *v
		c.nodes[k] = &x
	}
	return c
}

func (m *model) name(kind string) string {
	m.next++
	return fmt.Sprintf("%s%d", kind, m.next)
}

func (m *model) gone(name string) {
	m.removed = append(m.removed, name)
	m.removed = m.removed[max(0, len(m.removed)-4):]
}

// sorted are the names of a map: what is chosen by the seed must not depend on the
// order of maps.
func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// usable are networks that are surely there.
func (m *model) usable() []string {
	return slices.DeleteFunc(sorted(m.nets), func(n string) bool { return m.nets[n].doubt })
}

func (m *model) sureServices() []string {
	return slices.DeleteFunc(sorted(m.svcs), func(n string) bool { return m.svcs[n].doubt })
}

func (m *model) sureTasks() []string {
	return slices.DeleteFunc(sorted(m.tasks), func(n string) bool { return m.tasks[n].doubt })
}

func (m *model) nodesThat(ok func(*node) bool) []string {
	return slices.DeleteFunc(sorted(m.nodes), func(n string) bool { return !ok(m.nodes[n]) })
}

func (m *model) managers() []string {
	return m.nodesThat(func(n *node) bool { return n.role == "manager" })
}
func (m *model) active() []string {
	return m.nodesThat(func(n *node) bool { return n.availability == "active" })
}
