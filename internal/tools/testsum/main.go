// Testsum reads "go test -json" on standard input, prints what failed in full
// a line per package and one for each of the slowest tests, and adds its counts to
// a file, so that several runs end in one summary:
//
//	go test -json ./... | testsum -counts FILE -label unit
//	testsum -counts FILE -total
//
// It exits with 1 when a test or a build failed.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

type event struct {
	Action, Package, Test, Output, ImportPath string
	Elapsed                                   float64
}

// slowTest is from how many seconds on a test may be shown as slow, slowest how many are.
const (
	slowTest = 10
	slowest  = 15
)

type counts struct{ Passed, Failed, Skipped int }

func main() {
	file := flag.String("counts", "", "file of counts, added to")
	label := flag.String("label", "", "what this run is, for the summary")
	total := flag.Bool("total", false, "print the summary of the file instead")
	flag.Parse()
	if *total {
		os.Exit(summary(*file))
	}
	c := read(os.Stdin, *label)
	if *file != "" {
		f, err := os.OpenFile(*file, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
		if err == nil {
			_, err = fmt.Fprintf(f, "%s %d %d %d\n", strings.ReplaceAll(*label, " ", "-"), c.Passed, c.Failed, c.Skipped)
			err = errorOr(err, f.Close())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "testsum:", err)
			os.Exit(1)
		}
	}
	if c.Failed > 0 {
		os.Exit(1)
	}
}

func errorOr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

func read(in io.Reader, label string) (c counts) {
	out := map[string][]string{}
	var skips []string
	type timed struct {
		name    string
		elapsed float64
	}
	var slow []timed
	sc := bufio.NewScanner(in)
	sc.Buffer(make([]byte, 1<<20), 16<<20)
	failedIn := map[string]bool{}
	begun := map[string]bool{} // tests and packages that have not ended
	for sc.Scan() {
		var e event
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			fmt.Println(sc.Text()) // not of go test: shown as it is
			continue
		}
		key := e.Package + " " + e.Test
		switch e.Action {
		case "start", "run":
			begun[key] = true
		case "output", "build-output":
			if e.Action == "build-output" {
				key = e.ImportPath
				fmt.Print(e.Output)
			}
			out[key] = append(out[key], e.Output)
		case "build-fail":
			c.Failed++
		case "pass", "fail", "skip":
			delete(begun, key)
			if e.Test == "" {
				mark := map[string]string{"pass": "ok  ", "fail": "FAIL", "skip": "-   "}[e.Action]
				fmt.Printf("%s %-5s %6.1fs  %s\n", mark, label, e.Elapsed, e.Package)
				if e.Action == "fail" && !failedIn[e.Package] {
					c.Failed++ // the package itself: a panic, a leak, a time-out
					fmt.Print(strings.Join(out[key], ""))
				}
				continue
			}
			if e.Elapsed >= slowTest && !strings.Contains(e.Test, "/") {
				slow = append(slow, timed{e.Test, e.Elapsed})
			}
			switch e.Action {
			case "pass":
				c.Passed++
			case "fail":
				c.Failed++
				failedIn[e.Package] = true
				fmt.Printf("\n=== FAILED %s %s\n%s\n", e.Package, e.Test, strings.Join(out[key], ""))
			case "skip":
				c.Skipped++
				for _, l := range out[key] {
					if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "===") && !strings.HasPrefix(l, "---") {
						skips = append(skips, e.Test+": "+l)
					}
				}
			}
			delete(out, key)
		}
	}
	// What was killed, or whose machine was, has no end: that is one.
	for _, key := range slices.Sorted(maps.Keys(begun)) {
		c.Failed++
		fmt.Printf("\n=== DID NOT END %s\n%s\n", key, strings.Join(out[key], ""))
	}
	slices.Sort(skips)
	for _, s := range slices.Compact(skips) {
		fmt.Println("skip", label, s)
	}
	slices.SortFunc(slow, func(a, b timed) int { return cmp.Compare(b.elapsed, a.elapsed) })
	for _, t := range slow[:min(len(slow), slowest)] {
		fmt.Printf("slow %s %6.1fs  %s\n", label, t.elapsed, t.name)
	}
	return c
}

func summary(file string) int {
	b, err := os.ReadFile(file)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
		return 1
	}
	var all counts
	fmt.Println()
	for l := range strings.Lines(string(b)) {
		var name string
		var c counts
		if _, err := fmt.Sscan(l, &name, &c.Passed, &c.Failed, &c.Skipped); err != nil {
			fmt.Fprintln(os.Stderr, "testsum:", err)
			return 1
		}
		fmt.Printf("%-20s %5d passed %4d failed %4d skipped\n", name, c.Passed, c.Failed, c.Skipped)
		all.Passed, all.Failed, all.Skipped = all.Passed+c.Passed, all.Failed+c.Failed, all.Skipped+c.Skipped
	}
	fmt.Printf("\n%d passed, %d failed, %d skipped\n", all.Passed, all.Failed, all.Skipped)
	if all.Failed > 0 || all.Passed == 0 {
		return 1
	}
	return 0
}
