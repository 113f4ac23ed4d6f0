package ingress

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/shoalnet/shoal/reconcile"
)

// Dataplane carries a State in a kernel, or pretends to.
//
// Observe reports what is there and marked as ours, in the host's namespace and
// in those of want.Ways; and for each wanted [Port] its [Holder], if there is
// one. An object that is as wanted is reported equal to the wanted one.
//
// Apply takes the operations that [Diff] returns. It is idempotent: making what
// is there and deleting what is absent succeed. What package overlay has not
// made yet (an ovns, a device) is an error, except for a deletion.
//
// Both are called from one goroutine at a time.
type Dataplane interface {
	Observe(ctx context.Context, want State) (State, error)
	Apply(ctx context.Context, op reconcile.Op) error
}

// Target is a Dataplane with [Diff] as a reconcile.Target.
type Target struct{ Dataplane }

var (
	_ reconcile.Target[State, State] = Target{}
	_ reconcile.Comparer[State]      = Target{}
)

// Same implements reconcile.Comparer.
func (Target) Same(a, b State) bool {
	return a.Complete == b.Complete && slices.Equal(a.Ways, b.Ways) && a.Equal(b) && maps.Equal(a.owners, b.owners)
}

// Diff implements reconcile.Target.
func (Target) Diff(want, have State, now time.Time) ([]reconcile.Op, time.Time) {
	return Diff(want, have, now)
}
