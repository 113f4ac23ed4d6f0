package vip

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/reconcile"
)

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
)

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

// Batch is an ApplyAll (see reconcile.Batcher): it calls set and del in a
// network's namespace with as many operations on that network as come in a row,
// and apply with the others. set and del return an error for each.
func Batch(ctx context.Context, ops []reconcile.Op, apply func(context.Context, reconcile.Op) error,
	set func([]SetServer) []error, del func([]DelServer) []error) []error {
	var errs []error
	for len(ops) > 0 {
		var done []error
		switch op := ops[0].(type) {
		case SetServer:
			done = inside(ctx, op.Network, row(ops, func(o SetServer) bool { return o.Network.Namespace == op.Network.Namespace }), set)
		case DelServer:
			done = inside(ctx, op.Network, row(ops, func(o DelServer) bool { return o.Network.Namespace == op.Network.Namespace }), del)
			for i, err := range done {
				if errors.Is(err, ErrNoNamespace) {
					done[i] = nil
				}
			}
		default:
			done = []error{apply(ctx, op)}
		}
		errs = append(errs, done...)
		ops = ops[len(done):]
	}
	return errs
}

// chunk is how many servers share a transaction when many are set at once.
const chunk = 200

// Chunks calls fn with some of ops at a time, and again with each of those that
// failed together, so that one bad VIP spoils no other. It returns an error for
// each.
func Chunks[T any](ops []T, fn func([]T) error) []error {
	errs := make([]error, 0, len(ops))
	for some := range slices.Chunk(ops, chunk) {
		err := fn(some)
		if err == nil || len(some) == 1 {
			errs = append(errs, slices.Repeat([]error{err}, len(some))...)
			continue
		}
		for one := range slices.Chunk(some, 1) {
			errs = append(errs, fn(one))
		}
	}
	return errs
}

// row lists the operations of type T at the beginning of ops, as long as ok says.
func row[T reconcile.Op](ops []reconcile.Op, ok func(T) bool) []T {
	var out []T
	for _, op := range ops {
		x, is := op.(T)
		if !is || !ok(x) {
			break
		}
		out = append(out, x)
	}
	return out
}

// inside calls fn in a network's namespace. Where that can't be, it is the error
// of every operation.
func inside[T any](ctx context.Context, n Network, ops []T, fn func([]T) []error) []error {
	var errs []error
	err := ctx.Err()
	if err == nil {
		err = nl.Do(n.Namespace, func() error { errs = fn(ops); return nil })
		// Only the namespace's own absence: fn's errors are in errs.
		err = NamespaceError(n, err)
	}
	if err != nil {
		errs = make([]error, len(ops))
		for i := range errs {
			errs[i] = err
		}
	}
	return errs
}
