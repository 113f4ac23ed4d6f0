package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

// A secret is in the tasks that were given it, in memory, and nowhere else: not on a
// worker's disk, not in another's answer; it is rotated by an update, and can't be
// removed while it is used.
func TestSecretsAndConfigs(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "sec", lab.Options{Nodes: 2, Managers: 1})
	s.ok("node1", "shoal net create app")
	const one, two = "correct-horse-battery", "staple-two"
	put := func(kind, name, data string) {
		t.Helper()
		if r := s.in(data, "node1", "shoal", kind, "create", "--label", "tier=data", name, "-"); r.code != 0 {
			t.Fatalf("%s create: %s", kind, r.err)
		}
	}
	put("secret", "pw", one)
	put("secret", "pw2", two)
	put("config", "site", "listen 80;\n")
	s.ok("node1", "shoal svc create --name db --network app --replicas 2 --secret pw --secret source=pw,target=other/pw,mode=0400,uid=1000,gid=1001 --config site --config source=site,target=/etc/app/site.conf -- sleep 3600")
	for _, w := range []string{"db.1", "db.2"} {
		if got := s.ok("node1", "shoal exec %s sh -c 'cat /run/secrets/pw; echo; cat /run/configs/site /etc/app/site.conf; stat -c \"%%a %%u %%g\" /run/secrets/other/pw; stat -c %%a /run/secrets/pw'", w); got != one+"\nlisten 80;\nlisten 80;\n400 1000 1001\n444" {
			t.Errorf("%s: %q", w, got)
		}
		for _, f := range []string{"/run/secrets/pw", "/etc/app/site.conf", "/run/secrets/new"} {
			if r := s.on("node1", "shoal", "exec", w, "sh", "-c", "echo x > "+f); r.code == 0 {
				t.Errorf("%s: %s can be written to", w, f)
			}
		}
	}
	// Nobody else sees it.
	if r := s.on("node1", "shoal", "run", "--rm", "--", "sh", "-c", "cat /run/secrets/pw /run/configs/site"); r.code == 0 || strings.Contains(r.out, one) {
		t.Errorf("another task sees it: %s", r.out)
	}
	for _, cmd := range []string{"shoal secret inspect pw", "shoal secret ls -o json", "shoal svc inspect db"} {
		if got := s.ok("node1", cmd); strings.Contains(got, one) || strings.Contains(got, "Y29ycmVjdC1ob3JzZS") {
			t.Errorf("%s tells the secret:\n%s", cmd, got)
		}
	}
	if got := s.ok("node1", "shoal config inspect --pretty site"); !strings.Contains(got, "listen 80;") || !strings.Contains(got, "tier=data") {
		t.Errorf("config inspect: %s", got)
	}
	worker := s.Nodes()[1]
	err := filepath.Walk(filepath.Join(worker.Dir, "data"), func(p string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() || !info.Mode().IsRegular() {
			return nil
		}
		if b, err := os.ReadFile(p); err == nil && (bytes.Contains(b, []byte(one)) || bytes.Contains(b, []byte("Y29ycmVjdC1ob3JzZS"))) {
			t.Errorf("the secret is in %s", p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}

	s.fails("node1", "in use by service db", "shoal secret rm pw")
	s.fails("node1", "exists already", "shoal secret create pw /etc/hostname")
	s.fails("node1", "no such secret", "shoal svc create --name bad --secret nosuch -- sleep 1")
	s.fails("node1", "one target", "shoal svc create --name bad --secret pw --secret source=pw2,target=pw -- sleep 1")
	s.fails("node1", "is empty", "shoal config create nothing /dev/null")
	s.fails("node1", "most allowed", "shoal secret create big /dev/zero")
	s.fails("node1", "letters", "shoal secret create a/b /etc/hostname")

	// Rotated: the same path, another content.
	s.ok("node1", "shoal svc update --secret-rm pw --secret-add source=pw2,target=pw db")
	for _, w := range []string{"db.1", "db.2"} {
		if got := s.ok("node1", "shoal exec %s cat /run/secrets/pw", w); got != two {
			t.Errorf("%s after the update: %q", w, got)
		}
	}
	s.ok("node1", "shoal secret rm pw")
	// What was acknowledged is there after the manager's end, and tasks keep theirs.
	if err := s.Kill(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(time.Minute), func() error {
		if r := s.on("node1", "shoal", "secret", "ls", "-q", "--filter", "name=pw2"); r.code != 0 || len(strings.Fields(r.out)) != 1 {
			return fmt.Errorf("secret ls: %q %s", r.out, r.err)
		}
		if r := s.on("node1", "shoal", "svc", "ps", "db", "-o", "json"); strings.Count(r.out, `"running"`) < 4 { // desired and state
			return fmt.Errorf("svc ps: %s", r.out)
		}
		return nil
	})
	s.ok("node1", "shoal svc rm db")
	s.eventually(slow(30*time.Second), func() error {
		left, err := filepath.Glob(filepath.Join(filepath.Dir(worker.Dir), "*", "run", "tasks", "*.files"))
		if err != nil || len(left) > 0 {
			return fmt.Errorf("left behind: %v %v", left, err)
		}
		return nil
	})
	s.ok("node1", "shoal secret rm pw2")
	s.ok("node1", "shoal config rm site")
}
