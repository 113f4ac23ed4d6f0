package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func errf(format string, args ...any) error { return fmt.Errorf(format, args...) }

// TestExampleMicroservice checks what examples/microservice/README.md promises.
func TestExampleMicroservice(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	dir := filepath.Join(repo, "examples/microservice")
	s.ok("node1", "%s/up", dir)
	get := func(node, url string) string { return s.ok(node, "curl -s -m 5 %s", url) }
	for _, n := range []string{"node1", "node2", "node3"} {
		s.eventually(10*time.Second, func() error {
			if got := get(n, "localhost:8080/"); !strings.HasPrefix(got, "frontend ") {
				return errf("%s: %s", n, got)
			}
			return nil
		})
		if got := get(n, "localhost:8080/api/"); !strings.Contains(got, `"visits"`) {
			t.Errorf("%s: %s", n, got)
		}
	}
	if got := s.ok("node1", "shoal run --rm --network frontend -- curl -s -m 4 http://nginx/"); !strings.HasPrefix(got, "frontend ") {
		t.Error(got)
	}
	if r := s.on("node1", words("shoal run --rm --network frontend -- getent hosts db")...); r.code != 2 {
		t.Errorf("db resolves on frontend: %+v", r)
	}
	db := s.running("db")[0].Attachments[0].Addrs[0]
	if r := s.on("node1", "shoal", "run", "--rm", "--network", "frontend", "--", "nc", "-zv", "-w", "2", db, "5432"); r.code == 0 {
		t.Errorf("db answers on frontend: %+v", r)
	}
	s.ok("node1", "shoal run --rm --network backend -- nc -zv -w 2 db 5432")
	s.ok("node1", "%s/down", dir)
}

// TestExampleThreeTier checks what examples/three-tier/README.md promises.
func TestExampleThreeTier(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	dir := filepath.Join(repo, "examples/three-tier")
	s.ok("node1", "%s/up", dir)
	seen := map[string]bool{}
	s.eventually(15*time.Second, func() error {
		got := s.on("node2", "curl", "-s", "-m", "5", "localhost:8081/").out
		for _, app := range []string{"app1", "app2"} {
			if strings.Contains(got, `"`+app+"-") {
				seen[app] = true
			}
		}
		if len(seen) < 2 {
			return errf("answered so far: %v, last: %s", seen, got)
		}
		return nil
	})
	if got := s.ok("node1", "shoal net ls --filter label=tier=data --format {{.Name}}"); got != "data" {
		t.Error(got)
	}
	if got := s.ok("node1", "shoal exec lb.1 getent ahostsv4 app"); strings.Count(got, "STREAM") != 2 {
		t.Errorf("app is %s", got)
	}
	if r := s.on("node1", words("shoal exec lb.1 getent hosts database")...); r.code != 2 {
		t.Errorf("lb resolves database: %+v", r)
	}
	s.ok("node1", "shoal svc rm app1")
	s.eventually(10*time.Second, func() error {
		if got := s.ok("node3", "curl -s -m 5 localhost:8081/"); !strings.Contains(got, `"app2-`) {
			return errf("%s", got)
		}
		return nil
	})
	s.ok("node1", "shoal svc create --name app1 --network middle --network data --env DB_HOST=database --env POSTGRES_USER=app --env POSTGRES_PASSWORD=secret -- python3 %s/examples/common/api.py", repo)
	s.ok("node1", "%s/down", dir)
}
