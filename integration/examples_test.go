package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

func errf(format string, args ...any) error { return fmt.Errorf(format, args...) }

func TestExamples(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	microservice(s)
	threeTier(s)
}

// TestExamplesInImages: nginx, PostgreSQL and redis from Debian's packages as containers,
// started as users of Docker do.
func TestExamplesInImages(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	needContainers(t, "mmdebstrap")
	images := exec.Command(filepath.Join(repo, "examples/images"))
	if out, err := images.CombinedOutput(); err != nil {
		t.Fatalf("examples/images: %v: %s", err, out)
	}
	s := own(t, "ex", lab.Options{Nodes: 3, Containers: true})
	load := exec.Command(filepath.Join(bin, "shoal"), "lab", "load", "--name", s.Name, filepath.Join(repo, "bin/examples.tar"))
	if out, err := load.CombinedOutput(); err != nil {
		t.Fatalf("lab load: %v: %s", err, out)
	}
	microservice(s, "--images")
	threeTier(s, "--images")

	// The database's data outlives its service, in the volume that the example left.
	visits := func() int {
		var v struct{ Visits int }
		got := s.ok("node3", "curl -s -m 5 localhost:8080/api/")
		if err := json.Unmarshal([]byte(got), &v); err != nil {
			t.Fatalf("%v: %s", err, got)
		}
		return v.Visits
	}
	dir := filepath.Join(repo, "examples/microservice")
	s.ok("node1", "%s/up --images", dir)
	first := visits()
	if first < 2 {
		t.Errorf("visit %d of a database that had some before", first)
	}
	// Updated it never runs twice on one directory, and the connections of its clients end.
	s.ok("node1", "shoal svc update --update-order stop-first --force --env-add A=1 db")
	if got := visits(); got <= first {
		t.Errorf("visit %d after %d: the update lost what was written", got, first)
	}
	// A crash of the database costs nothing that was acknowledged.
	before := visits()
	s.ok("node1", "shoal kill db.1")
	s.eventually(30*time.Second, func() error {
		got := s.on("node3", "curl", "-s", "-m", "5", "localhost:8080/api/")
		var v struct{ Visits int }
		if err := json.Unmarshal([]byte(got.out), &v); err != nil || v.Visits <= before {
			return errf("%s %s", got.out, got.err)
		}
		return nil
	})
	// nginx's site is changed as one changes it in a swarm.
	site := filepath.Join(t.TempDir(), "new.conf")
	if err := os.WriteFile(site, []byte("server { listen 80; return 200 \"new site\\n\"; }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.ok("node2", "shoal config create new.conf %s", site)
	s.ok("node2", "shoal svc update --config-rm frontend.conf --config-add source=new.conf,target=/etc/nginx/conf.d/default.conf nginx")
	for _, n := range []string{"node1", "node2", "node3"} {
		if got := s.ok(n, "curl -s -m 5 localhost:8080/"); got != "new site" {
			t.Errorf("%s: %s", n, got)
		}
	}
	if got := s.ok("node1", "shoal exec nginx.1 nginx -t"); strings.Contains(got, "failed") {
		t.Error(got)
	}
	s.ok("node1", "%s/down", dir)
	s.ok("node1", "shoal config rm new.conf")

	// redis has a health check of its image's, a user and a volume.
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal svc create --name cache --network app redis:debian")
	cli := func(cmd string) string {
		return s.ok("node2", "shoal run --rm --network app redis:debian redis-cli -h cache %s", cmd)
	}
	if got := cli("set a 1"); got != "OK" {
		t.Errorf("set: %s", got)
	}
	if got := cli("get a"); got != "1" {
		t.Errorf("get: %s", got)
	}
	if got := s.ok("node1", "shoal inspect --format {{.State.Health.Status}} cache.1"); got != "healthy" {
		t.Errorf("health: %s", got)
	}
	if got := s.ok("node1", "shoal exec cache.1 id -un"); got != "redis" {
		t.Errorf("user: %s", got)
	}
	s.ok("node1", "shoal svc rm cache")

	// Without its password PostgreSQL ends, and whoever waits is told why.
	r := s.on("node1", "shoal", "svc", "create", "--restart-max-attempts", "1", "--restart-delay", "100ms", "--name", "bad", "--network", "app", "postgres:debian")
	if r.code == 0 || !strings.Contains(r.err, "exit status") {
		t.Errorf("a database without password: exit status %d, %s", r.code, r.err)
	}
	if got := s.on("node1", "shoal", "svc", "logs", "bad"); !strings.Contains(got.out+got.err, "wants a password") {
		t.Errorf("its output: %s %s", got.out, got.err)
	}
}

// microservice checks what examples/microservice/README.md promises.
func microservice(s site, args ...string) {
	t := s.T
	dir := filepath.Join(repo, "examples/microservice")
	s.ok("node1", "%s/up %s", dir, strings.Join(args, " "))
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

// threeTier checks what examples/three-tier/README.md promises.
func threeTier(s site, args ...string) {
	t := s.T
	dir := filepath.Join(repo, "examples/three-tier")
	s.ok("node1", "%s/up %s", dir, strings.Join(args, " "))
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
	s.ok("node1", "shoal svc create --name app1 --network data -- sleep infinity") // for down, which removes it
	s.ok("node1", "%s/down", dir)
}
