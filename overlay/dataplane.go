package overlay

import (
	"context"
	"maps"
	"time"

	"github.com/shoalnet/shoal/reconcile"
)

// Dataplane carries a State in a kernel, or pretends to.
//
// Observe reports what is there and marked as ours: in the host's namespace, in
// every namespace that want names, and, as [Namespace] objects only, ovns's of
// this agent that want does not name. An object that is as wanted is reported
// equal to the wanted one, whose MTUs of 0 stand for the underlay's less the
// overhead: see [State.Resolve].
//
// Apply takes the operations that [Diff] returns. It is idempotent: making what
// is there and deleting what is absent succeed. It never changes what is not
// ours, and fails when that is in the way.
//
// Both are called from one goroutine at a time.
type Dataplane interface {
	Observe(ctx context.Context, want State) (State, error)
	Apply(ctx context.Context, op reconcile.Op) error
}

// Drop is how much the rules of one namespace have dropped or refused for one
// reason, since they were last written.
type Drop struct {
	Netns          string // "" the host's
	Reason         string // a word such as "spoofed-source"
	Packets, Bytes uint64
}

// Change is where something changed in the kernel: in a namespace, "" the host's, an
// nftables table there, or (Table "") devices, addresses, routes and the like. The zero
// one may stand for any.
type Change struct{ Netns, Table string }

// Target is a Dataplane with [Diff] as a reconcile.Target.
type Target struct {
	Dataplane
	quiet *quiet
}

// quiet is of what Diff had nothing to say last.
type quiet struct{ want, have State }

var (
	_ reconcile.Target[State, State] = Target{}
	_ reconcile.Comparer[State]      = Target{}
)

// Same implements reconcile.Comparer.
func (Target) Same(a, b State) bool {
	return a.Alike(b) && maps.Equal(a.Owners, b.Owners) && maps.Equal(a.PortOwners, b.PortOwners)
}

// NewTarget makes a Target.
func NewTarget(d Dataplane) Target { return Target{d, &quiet{}} }

// Diff implements reconcile.Target. Between the very two of which it had nothing to say
// it has nothing to say again; that is each pass in which nothing happened.
func (t Target) Diff(want, have State, now time.Time) ([]reconcile.Op, time.Time) {
	q := t.quiet
	if want.Is(q.want) && have.Is(q.have) {
		return nil, time.Time{}
	}
	ops, next := Diff(want, have, now)
	if *q = (quiet{}); len(ops) == 0 && next.IsZero() {
		*q = quiet{want, have}
	}
	return ops, next
}
