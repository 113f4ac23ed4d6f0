// Chaos runs package chaos for as long as one likes:
//
//	chaos -seed 7 -minutes 15 -bin bin
//
// It prints what it does, and exits with 1 when a promise was not kept. The same
// seed gives the same commands and faults, as far as what they are answered is the
// same.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/shoalnet/shoal/internal/chaos"
)

func main() {
	names, left := chaos.Kinds()
	seed := flag.Uint64("seed", 0, "seed (0: a new one)")
	minutes := flag.Float64("minutes", 2, "how long")
	rounds := flag.Int("rounds", 0, "rounds at most (0: as many as there is time for)")
	nodes := flag.Int("nodes", 5, "nodes, three of them managers")
	bin := flag.String("bin", "bin", "directory of the binaries shoal and whoami")
	faults := flag.String("faults", "", "only these, with commas: "+strings.Join(names, ", "))
	dataPath := flag.String("data-path", "", "VIP data path: ipvs, nft or auto")
	keep := flag.Bool("keep", false, "leave the lab when something was found")
	flag.Parse()
	if *seed == 0 {
		*seed = rand.Uint64N(1_000_000)
	}
	dir, err := filepath.Abs(*bin)
	if err != nil || flag.NArg() > 0 || *nodes < 5 || os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "chaos: it needs root, at least five nodes, and takes flags only: see -help", err)
		os.Exit(2)
	}
	for name, why := range left {
		fmt.Printf("left out: fault %s: %s\n", name, why)
	}
	o := chaos.Options{Seed: *seed, Duration: time.Duration(*minutes * float64(time.Minute)), Rounds: *rounds, Nodes: *nodes, Bin: dir,
		Name: fmt.Sprintf("chaos%d", os.Getpid()%1_000_000), DataPath: *dataPath, Keep: *keep, Out: os.Stdout}
	if *faults != "" {
		o.Faults = strings.Split(*faults, ",")
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	r, err := chaos.Run(ctx, o)
	fmt.Printf("seed %d: %s\n", *seed, r)
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
	}
	if err != nil || len(r.Problems) > 0 {
		fmt.Printf("again: make chaos SEED=%d MINUTES=%g\n", *seed, *minutes)
		cancel()
		os.Exit(1)
	}
}
