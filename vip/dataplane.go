package vip

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/shoalnet/shoal/reconcile"
)

// Table is the name of the nftables table that a Dataplane has in a network's
// namespace, in families ip and ip6.
const Table = "shoal-vip"

// Dataplane carries virtual servers in a kernel, or pretends to.
//
// Observe reports, for each network of want, what is in its namespace and
// marked as ours; it looks nowhere else. A namespace that does not exist is
// reported as Absent, not as an error.
//
// Apply is idempotent: setting what is set and deleting what is absent succeed.
// Where the namespace does not exist it fails with an error that satisfies
// errors.Is(err, [ErrNoNamespace]), except for a deletion, which succeeds. A
// failed Apply may have done part of its work; applying the difference that is
// observed next completes it.
//
// Both are called from one goroutine at a time.
type Dataplane interface {
	Name() string // "ipvs", "nft": see spec.Node.DataPath
	Observe(ctx context.Context, want State) (State, error)
	Apply(ctx context.Context, op reconcile.Op) error
}

// ErrNoNamespace: the overlay has not made the network's namespace yet.
var ErrNoNamespace = errors.New("overlay namespace does not exist yet")

// NamespaceError is err with its absence of a namespace named.
func NamespaceError(n Network, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("network %s: namespace %s: %w", n.Name, n.Namespace, ErrNoNamespace)
	}
	return err
}

// Target is a Dataplane with [Diff] as a reconcile.Target. Its want is what
// [Desired] returns.
type Target struct{ Dataplane }

var (
	_ reconcile.Target[State, State] = Target{}
	_ reconcile.Batcher              = Target{}
	_ reconcile.Comparer[State]      = Target{}
)

// Same implements reconcile.Comparer.
func (Target) Same(a, b State) bool {
	return a.Complete == b.Complete && slices.EqualFunc(a.Networks, b.Networks, func(x, y Network) bool {
		// Whose an address is matters to servers that are to go. After a clean pass there
		// is none but those that wait for Orphans, and of an incomplete want all stay.
		claims := !a.Complete || len(x.Orphans) > 0 || len(y.Orphans) > 0
		return x.Is(y) && x.Absent == y.Absent && x.Fault == y.Fault && slices.Equal(x.Locals, y.Locals) &&
			slices.Equal(x.Orphans, y.Orphans) && (!claims || slices.Equal(x.Claimed, y.Claimed)) &&
			slices.EqualFunc(x.Servers, y.Servers, Server.same)
	})
}

// ApplyAll implements reconcile.Batcher, also for a Dataplane that does not.
func (t Target) ApplyAll(ctx context.Context, ops []reconcile.Op) []error {
	if b, ok := t.Dataplane.(reconcile.Batcher); ok {
		return b.ApplyAll(ctx, ops)
	}
	errs := make([]error, len(ops))
	for i, op := range ops {
		errs[i] = t.Apply(ctx, op)
	}
	return errs
}

// Diff implements reconcile.Target.
func (Target) Diff(want, have State, now time.Time) ([]reconcile.Op, time.Time) {
	return Diff(want, have, now)
}
