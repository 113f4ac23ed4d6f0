package integration

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/shoalnet/shoal/internal/chaos"
)

// TestChaos gives a lab random commands and faults for a while, and holds it against
// what is promised; see package chaos and docs/chaos.md. SHOAL_CHAOS_SEED repeats a
// run, SHOAL_CHAOS_SECONDS makes it longer, or shorter.
func TestChaos(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	seed, length := rand.Uint64N(1_000_000), 2*time.Minute
	for name, set := range map[string]func(uint64){"SHOAL_CHAOS_SEED": func(n uint64) { seed = n }, "SHOAL_CHAOS_SECONDS": func(n uint64) { length = time.Duration(n) * time.Second }} {
		if v := os.Getenv(name); v != "" {
			n, err := strconv.ParseUint(v, 10, 32)
			if err != nil {
				t.Fatalf("%s=%s: want a number: %v", name, v, err)
			}
			set(n)
		}
	}
	r, err := chaos.Run(t.Context(), chaos.Options{Seed: seed, Duration: length, Bin: bin, Name: labName("chaos"), Out: t.Output()})
	t.Logf("seed %d: %s", seed, r)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Problems {
		t.Errorf("make chaos SEED=%d: %s", seed, p)
	}
	if r.Rounds == 0 || r.Commands == 0 || r.Requests == 0 {
		t.Errorf("nothing was done: %s", r)
	}
}
