package peer

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
)

// Owner refuses calls that name another node than the caller, where [Table] says
// so: nobody speaks for another, managers neither.
type Owner struct{}

func ownCall(ctx context.Context, spec connect.Spec, msg any) error {
	if r, ok := ruleOf(spec.Procedure); !ok || !r.Own {
		return nil
	}
	m, ok := msg.(interface{ GetNode() string })
	if !ok {
		return connect.NewError(connect.CodeInternal, errors.New("the call names no node"))
	}
	c := CallerFrom(ctx)
	if m.GetNode() == "" || c.ID != m.GetNode() {
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("%s may not speak for node %q", c, m.GetNode()))
	}
	return nil
}

// WrapUnary implements connect.Interceptor.
func (Owner) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if err := ownCall(ctx, req.Spec(), req.Any()); err != nil {
			return nil, err
		}
		return next(ctx, req)
	}
}

// WrapStreamingClient implements connect.Interceptor.
func (Owner) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler implements connect.Interceptor.
func (Owner) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		return next(ctx, &ownedConn{conn, ctx})
	}
}

type ownedConn struct {
	connect.StreamingHandlerConn
	ctx context.Context
}

// Receive implements connect.StreamingHandlerConn.
func (c *ownedConn) Receive(msg any) error {
	if err := c.StreamingHandlerConn.Receive(msg); err != nil {
		return err
	}
	return ownCall(c.ctx, c.Spec(), msg)
}
