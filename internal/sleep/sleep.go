// Package sleep is a time.Sleep that ends with a context.
package sleep

import (
	"context"
	"time"
)

// For waits for d, or until ctx ends, and tells whether ctx still goes on.
func For(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
