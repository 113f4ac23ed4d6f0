package vip

import (
	"reflect"
	"testing"

	"github.com/shoalnet/shoal/internal/filled"
)

// TestSame: a pass is spared only where nothing differs that one would be for.
func TestSame(t *testing.T) {
	target := Target{}
	if !target.Same(filled.Value[State](), filled.Value[State]()) {
		t.Fatal("a want is not the same as itself")
	}
	// Every field, at any depth, is another thing to ask for.
	var paths []string
	var walk func(name string, v reflect.Value, change func(func(reflect.Value)))
	walk = func(name string, v reflect.Value, change func(func(reflect.Value))) {
		switch {
		case v.Kind() == reflect.Slice:
			walk(name+"[0]", v.Index(0), func(f func(reflect.Value)) { change(func(v reflect.Value) { f(v.Index(0)) }) })
			change(func(v reflect.Value) { v.Set(reflect.Append(v, v.Index(0))) })
			paths = append(paths, name)
		case v.Kind() == reflect.Struct && v.Type().PkgPath() == reflect.TypeFor[State]().PkgPath():
			for i := range v.NumField() {
				walk(name+"."+v.Type().Field(i).Name, v.Field(i), func(f func(reflect.Value)) { change(func(v reflect.Value) { f(v.Field(i)) }) })
			}
		default:
			change(func(v reflect.Value) { v.SetZero() })
			paths = append(paths, name)
		}
	}
	walk("State", reflect.ValueOf(filled.Value[State]()), func(f func(reflect.Value)) {
		changed := filled.Value[State]()
		f(reflect.ValueOf(&changed).Elem())
		if target.Same(filled.Value[State](), changed) || target.Same(changed, filled.Value[State]()) {
			t.Errorf("the same, though not as wanted: %+v", changed)
		}
	})
	if len(paths) < 15 {
		t.Errorf("looked at %v only", paths)
	}

	// But for whose addresses are, where no server is to go.
	a, b := filled.Value[State](), filled.Value[State]()
	for _, s := range []*State{&a, &b} {
		for i := range s.Networks {
			s.Networks[i].Orphans = nil
		}
	}
	a.Networks[0].Claimed = nil
	if !target.Same(a, b) {
		t.Error("a pass for an address that some endpoint has")
	}
	a.Complete, b.Complete = false, false
	if target.Same(a, b) {
		t.Error("no pass, though servers may wait to be removed")
	}
	if target.Same(State{}, State{Networks: a.Networks}) {
		t.Error("no pass for a network")
	}
}
