package integration

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

// TestWhatIsTyped: bytes, quotes, templates and mistakes on the command line of
// tasks and services, as Docker has them.
func TestWhatIsTyped(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	// Arguments, environment and labels are bytes.
	r := s.on("node1", "shoal", "run", "--rm", "--env", "X=a\xff\xc3b", "--label", "l=\xfe", "--", "printf", "%s|%s", "\xff\xfearg", "\U0010ff80")
	if want := "\xff\xfearg|\U0010ff80"; r.code != 0 || r.out != want {
		t.Errorf("bytes: %d, %q, %s, want %q", r.code, r.out, r.err, want)
	}
	s.ok("node1", "shoal run -d --name bytes --label l=\xfex --env X=\xff\xc3b -- sleep 600")
	if r := s.on("node1", "shoal", "exec", "bytes", "sh", "-c", "printf %s \"$X\" \xfd"); r.out != "\xff\xc3b\xfd" {
		t.Errorf("environment: %q, %s", r.out, r.err)
	}
	if got := s.ok("node2", "shoal ps -q -f label=l=\xfex"); got == "" {
		t.Error("a label of bytes is not found")
	}
	// Status as of docker run.
	for line, code := range map[string]int{
		"run --rm -- /nosuch/program":              127,
		"run --rm -- nosuchprogram":                127,
		"run --rm -- /etc/hostname":                126,
		"run --rm -- sh -c 'exit 7'":               7,
		"run --rm --network nosuchnet -- true":     125,
		"run --rm --node nosuchnode -- true":       125,
		"run --rm --name bytes -- true":            125,
		"run --rm --hostname {{.Node.ID}} -- true": 125,
		"run -d --network nosuchnet -- true":       125,
		"run --rm --user nosuchuser -- true":       125,
	} {
		if r := s.on("node1", words("shoal "+line)...); r.code != code {
			t.Errorf("%s: exit status %d, want %d: %s", line, r.code, code, r.err)
		}
	}
	// Templates, quotes, and the flags of update.
	s.ok("node1", "shoal svc create -q --name typed --replicas 2 --label tier=front --hostname h{{.Task.Slot}}-{{.Node.Hostname}} --env ME={{.Service.Name}}.{{.Task.Slot}}@{{.Node.Hostname}}/{{.Service.Labels.tier}} -- sleep 600")
	node := s.ok("node1", "shoal svc ps --format {{.Node}} -f name=typed.1 typed")
	if got, want := s.ok("node1", "shoal exec typed.1 sh -c 'echo $ME $(hostname)'"), "typed.1@"+node+"/front h1-"+node; got != want {
		t.Errorf("templates: %q, want %q", got, want)
	}
	s.fails("node1", "environment X", "shoal svc create --name bad --env X={{.Nix}} -- true")
	s.fails("node1", "hostname", "shoal svc create --name bad --hostname {{.Service.Labels}} -- true")
	if r := s.on("node1", "shoal", "svc", "update", "-q", "--args", `-c 'echo "$0|$1|"; exec sleep 600' "a b" c\ d`, "--stop-signal", "KILL", "typed", "--", "sh"); r.code != 0 {
		t.Errorf("update: %s", r.err)
	}
	s.eventually(slow(20e9), func() error {
		if out := s.on("node1", "shoal", "logs", "typed.1").out; !strings.Contains(out, "a b|c d|") {
			return fmt.Errorf("quotes: %q", out)
		}
		return nil
	})
	s.fails("node1", "--args", "shoal svc update --args ' \"open' typed")
	s.ok("node1", "shoal svc scale -q typed=1")
	// A service where a task is meant.
	s.fails("node1", "typed is a service, not a task: use 'shoal svc logs typed'", "shoal logs typed")
	s.fails("node1", "typed is a service, not a task: name one of its replicas: typed.", "shoal exec typed true")
	s.fails("node1", "use 'shoal svc rm typed'", "shoal rm typed")
	s.fails("node1", "typed is a service", "shoal stop typed")
	// Of several that remove one thing one succeeds.
	s.ok("node1", "shoal net create twice")
	for _, what := range []string{"svc rm typed", "rm -f bytes", "net rm twice"} {
		var wg sync.WaitGroup
		rs := make([]result, 4)
		for i := range rs {
			wg.Go(func() { rs[i] = s.on("node"+string("1231"[i]), words("shoal "+what)...) })
		}
		wg.Wait()
		good := 0
		for _, r := range rs {
			if r.code == 0 {
				good++
			} else if !strings.Contains(r.err, "no such") {
				t.Errorf("%s: %s", what, r.err)
			}
		}
		if good != 1 {
			t.Errorf("%s: %d of 4 succeed", what, good)
		}
	}
}
