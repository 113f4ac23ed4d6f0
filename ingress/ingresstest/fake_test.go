package ingresstest

import (
	"net/netip"
	"testing"

	"go.uber.org/goleak"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/spec"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fakeWorld struct{ f *Fake }

func (w fakeWorld) Dataplane() ingress.Dataplane { return w.f }

func (fakeWorld) View() *spec.View {
	return Sample("shoal", spec.Underlay{Addr: netip.MustParseAddr("192.0.2.1"), VXLANPort: 4789}, spec.MinVNI)
}

func (w fakeWorld) Break(o ingress.Object) bool {
	w.f.Break(o)
	return true
}

func (w fakeWorld) Hold(port uint16, protocol string) func() {
	w.f.Hold(netip.Addr{}, port, protocol, "nginx (pid 123)")
	return func() { w.f.Hold(netip.Addr{}, port, protocol, "") }
}

func (w fakeWorld) Empty(t *testing.T) {
	t.Helper()
	if s := w.f.Dump(); s.Len() != 0 {
		t.Errorf("left:\n%s", s)
	}
}

func TestFakeConforms(t *testing.T) {
	Run(t, func(*testing.T) World {
		w := fakeWorld{NewFake()}
		for _, way := range ingress.Desired(w.View()).Ways {
			w.f.AddWay(way.Netns, way.Dev)
		}
		return w
	})
}

func TestFakeLoses(t *testing.T) {
	w := fakeWorld{NewFake()}
	want := ingress.Desired(w.View())
	w.f.AddWay(want.Ways[0].Netns, want.Ways[0].Dev)
	mustPass(t, w.f, want)
	w.f.DelWay(want.Ways[0].Netns)
	for _, o := range w.f.Dump().Objects() {
		switch o.(type) {
		case ingress.HostTable, ingress.Port, ingress.Private:
		default:
			t.Errorf("outlives its network: %s", o)
		}
	}
}
