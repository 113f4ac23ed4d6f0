package deptest

import (
	"os/exec"
	"strings"
	"testing"
)

// TestImports holds every package of the tree, without its tests, against Rules.
func TestImports(t *testing.T) {
	cmd := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, Module+"/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	used := map[string]bool{}
	n := 0
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		// Suites that tests of several packages share are test code themselves.
		if strings.HasSuffix(f[0], "test") {
			continue
		}
		n++
		for _, to := range f[1:] {
			used[short(to)] = true
			for _, r := range Broken(f[0], to) {
				t.Errorf("%s imports %s: %s", short(f[0]), short(to), r.Why)
			}
		}
	}
	if n < 20 {
		t.Fatalf("go list told of %d packages only", n)
	}
	// A rule about a library that nobody uses any more guards nothing.
	for _, r := range Rules {
		if !strings.HasPrefix(r.To, "./") && r.To != "testing" && !used[r.To] {
			t.Errorf("no package imports %s: remove its rule", r.To)
		}
	}
}

func TestBroken(t *testing.T) {
	for _, c := range []struct {
		from, to string
		broken   bool
	}{
		{"spec", "ipam", true},
		{"overlay", "spec", false},
		{"overlay/vxlan", "vip", true},
		{"cmd/shoal", "agent", false},
		{"control/state", "control", true},
		{"control", "control/state", false},
		{"overlayer", "vip", false},
	} {
		if got := len(Broken(Module+"/"+c.from, Module+"/"+c.to)) > 0; got != c.broken {
			t.Errorf("Broken(%s, %s) = %v, want %v", c.from, c.to, got, c.broken)
		}
	}
	if len(Broken(Module+"/agent", "github.com/miekg/dns")) != 1 || len(Broken(Module+"/dns", "github.com/miekg/dns")) != 0 {
		t.Error("miekg/dns is dns's alone")
	}
}
