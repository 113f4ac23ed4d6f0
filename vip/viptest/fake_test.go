package viptest

import (
	"testing"

	"github.com/shoalnet/shoal/vip"
)

// TestFake runs the conformance suite against the fake.
func TestFake(t *testing.T) {
	f := &Fake{} // a kernel has many namespaces too
	get := func(testing.TB) *Fake { return f }
	h := Harness{
		New:             func(tb testing.TB) vip.Dataplane { return get(tb) },
		AddNamespace:    func(tb testing.TB, name string) { get(tb).AddNamespace(name) },
		RemoveNamespace: func(tb testing.TB, name string) { get(tb).RemoveNamespace(name) },
		Scale:           200,
	}
	for _, what := range []string{BreakTable, BreakAddress, BreakElement, BreakServer, BreakBackend} {
		h.Breakages = append(h.Breakages, Breakage{what, func(tb testing.TB, ns string, s vip.Server) {
			if err := get(tb).Break(ns, what, s.VIP); err != nil {
				tb.Fatal(err)
			}
		}})
	}
	Run(t, h)
}
