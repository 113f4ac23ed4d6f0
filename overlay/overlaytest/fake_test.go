package overlaytest

import (
	"net/netip"
	"testing"

	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
)

type fakeWorld struct {
	*Fake
	v6 bool
}

func (w fakeWorld) Dataplane() overlay.Dataplane { return w.Fake }
func (w fakeWorld) View() *spec.View {
	return Sample("shoal", spec.Underlay{Addr: netip.MustParseAddr("192.0.2.1"), VXLANPort: 4789}, spec.MinVNI, w.v6)
}
func (w fakeWorld) Break(o overlay.Object) bool {
	switch o.(type) {
	case overlay.Sandbox, overlay.Underlay:
		return false
	}
	w.Fake.Break(o.Key())
	return true
}
func (w fakeWorld) Empty(t *testing.T) {
	s := w.Dump()
	for _, o := range s.Objects() {
		// A redirect goes with its task's namespace.
		if _, ok := o.(overlay.Redirect); !ok {
			t.Errorf("left: %s", o)
		}
	}
}

func TestFakeConforms(t *testing.T) {
	Run(t, func(t *testing.T, v6 bool) World {
		w := fakeWorld{NewFake(netip.MustParseAddr("192.0.2.1"), 1500), v6}
		for _, s := range w.View().Sandboxes {
			w.AddSandbox(s.Netns)
		}
		return w
	})
}
