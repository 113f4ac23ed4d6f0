package sleep

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		start := time.Now()
		if !For(ctx, 3*time.Second) || time.Since(start) != 3*time.Second {
			t.Errorf("3 s within a context of 5 s: went on is false, or after %v", time.Since(start))
		}
		if For(ctx, time.Hour) || time.Since(start) != 5*time.Second {
			t.Errorf("an hour within a context of 2 s more: went on is true, or after %v", time.Since(start))
		}
	})
}
