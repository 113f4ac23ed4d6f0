package kern

import (
	"context"
	"errors"
	"slices"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/vip"
)

// Batch is an ApplyAll (see reconcile.Batcher): it calls set and del in a
// network's namespace with as many operations on that network as come in a row,
// and apply with the others. set and del return an error for each.
func Batch(ctx context.Context, ops []reconcile.Op, apply func(context.Context, reconcile.Op) error,
	set func([]vip.SetServer) []error, del func([]vip.DelServer) []error) []error {
	var errs []error
	for len(ops) > 0 {
		var done []error
		switch op := ops[0].(type) {
		case vip.SetServer:
			done = inside(ctx, op.Network, row(ops, func(o vip.SetServer) bool { return o.Network.Namespace == op.Network.Namespace }), set)
		case vip.DelServer:
			done = inside(ctx, op.Network, row(ops, func(o vip.DelServer) bool { return o.Network.Namespace == op.Network.Namespace }), del)
			for i, err := range done {
				if errors.Is(err, vip.ErrNoNamespace) {
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
func inside[T any](ctx context.Context, n vip.Network, ops []T, fn func([]T) []error) []error {
	var errs []error
	err := ctx.Err()
	if err == nil {
		err = nl.Do(n.Namespace, func() error { errs = fn(ops); return nil })
		// Only the namespace's own absence: fn's errors are in errs.
		err = vip.NamespaceError(n, err)
	}
	if err != nil {
		errs = make([]error, len(ops))
		for i := range errs {
			errs[i] = err
		}
	}
	return errs
}
