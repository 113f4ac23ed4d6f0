// Command replay is built in the tree of an older Shoal by TestOldestAndNewest: it
// applies a log as that build does.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/shoalnet/shoal/control/state"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "replay:", err)
		os.Exit(1)
	}
}

func run() error {
	var in struct {
		Log       [][]byte       // from index 1 on
		Snapshots map[int][]byte // after so many entries, of another build
	}
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		return err
	}
	var out struct {
		Log     [][]byte       // as this build writes it
		States  [][]byte       // after each number of entries; before the first there is none
		Refused []string       // why, of each entry
		Ends    map[int][]byte // after the rest of the log on a snapshot
	}
	apply := func(s *state.State, i int) (string, error) {
		c, err := state.Decode(in.Log[i])
		if err != nil {
			return "", fmt.Errorf("entry %d: %w", i+1, err)
		}
		if r := s.Apply(uint64(i+1), c); r.Err != nil {
			return r.Err.Error(), nil
		}
		return "", nil
	}
	s := state.New()
	for i := range in.Log {
		why, err := apply(s, i)
		if err != nil {
			return err
		}
		c, _ := state.Decode(in.Log[i])
		written, err := state.Encode(c)
		if err != nil {
			return err
		}
		b, err := s.Snapshot()
		if err != nil {
			return err
		}
		out.Log, out.States, out.Refused = append(out.Log, written), append(out.States, b), append(out.Refused, why)
	}
	out.Ends = map[int][]byte{}
	for n, snap := range in.Snapshots {
		s, err := state.Restore(snap)
		if err != nil {
			return fmt.Errorf("snapshot after %d entries: %w", n, err)
		}
		for i := n; i < len(in.Log); i++ {
			if _, err := apply(s, i); err != nil {
				return err
			}
		}
		if out.Ends[n], err = s.Snapshot(); err != nil {
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}
