package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

// promtool runs Prometheus' own checker; a machine without it fails a strict run.
func promtool(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil {
		if os.Getenv("SHOAL_TEST_STRICT") != "" {
			t.Fatal("promtool is missing: scripts/setup test installs it")
		}
		t.Skip("SKIPPED: promtool is missing: scripts/setup test installs it (Debian package prometheus)")
	}
	cmd := exec.Command("promtool", args...)
	cmd.Dir, cmd.Stdin = filepath.Join(repo, "deploy/grafana"), strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestMetrics: Debian's Prometheus scrapes the nodes of a lab, has what happened
// there, and every metric that the board and the alerts ask for exists.
func TestMetrics(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	promtool(t, "", "check", "config", "prometheus.yml")
	promtool(t, "", "test", "rules", "alerts_test.yml")
	s := own(t, "met", lab.Options{AgentArgs: []string{"--metrics-addr", ":9947"}})
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal svc create -q --name web --replicas 3 --network app -- %s", filepath.Join(bin, "whoami"))
	dir := t.TempDir()
	conf := `global: {scrape_interval: 500ms, scrape_timeout: 400ms}
rule_files: ["` + filepath.Join(repo, "deploy/grafana/alerts.yml") + `"]
scrape_configs: [{job_name: shoal, scrape_timeout: 500ms, static_configs: [{targets: ["172.30.0.1:9947", "172.30.0.2:9947", "172.30.0.3:9947"]}]}]
`
	if err := os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	// In node1's namespace: nothing of it is on the machine's own addresses.
	prom := exec.Command("ip", "netns", "exec", s.Nodes()[0].Netns, "prometheus", "--config.file", filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path", filepath.Join(dir, "data"), "--web.listen-address", "127.0.0.1:9090", "--log.level", "warn")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	prom.Stdout, prom.Stderr = log, log
	if err := prom.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = prom.Process.Kill()
		_ = prom.Wait()
		if b, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("prometheus:\n%s", b)
		}
	})
	s.ok("node2", "shoal run --rm --network app -- %s -n 60 http://web/", filepath.Join(bin, "load"))
	// A question that no resolver can answer: the lab has none outside.
	s.on("node2", "shoal", "run", "--rm", "--network", "app", "--dns", "172.30.0.254", "--", "getent", "hosts", "nosuch.example.com")

	query := func(expr string) (float64, error) {
		r := s.on("node1", "curl", "-sS", "--max-time", "5", "--data-urlencode", "query="+expr, "http://127.0.0.1:9090/api/v1/query")
		var a struct {
			Error string
			Data  struct {
				Result []struct{ Value [2]any }
			}
		}
		if err := json.Unmarshal([]byte(r.out), &a); err != nil {
			return 0, fmt.Errorf("%s%s: %w", r.out, r.err, err)
		}
		if len(a.Data.Result) != 1 {
			return 0, fmt.Errorf("%d series, want 1: %s", len(a.Data.Result), a.Error)
		}
		var f float64
		_, err := fmt.Sscan(fmt.Sprint(a.Data.Result[0].Value[1]), &f)
		return f, err
	}
	for expr, want := range map[string]float64{
		`sum(up{job="shoal"})`:                                                      3,
		`sum(shoal_raft_leader)`:                                                    1,
		`max(shoal_raft_voters)`:                                                    3,
		`sum(shoal_cluster_nodes{status="ready"})`:                                  3,
		`shoal_cluster_service_replicas_running{service="web"}`:                     3,
		`shoal_cluster_service_replicas_desired{service="web"}`:                     3,
		`sum(shoal_vip_service_backends{service="web",network="app"})`:              9, // 3 on each node
		`sum(shoal_tasks{state="running"})`:                                         3,
		`sum(shoal_vip_faults)`:                                                     0,
		`min(shoal_gossip_members)`:                                                 3,
		`sum(shoal_service_accepted_connections_total{service="web"})`:              60,
		`count(shoal_build_info)`:                                                   3,
		`min(shoal_certificate_not_after_timestamp_seconds) > bool time() + 86400`:  1,
		`sum(shoal_dns_queries_total{type="A",result="noerror"}) >= bool 1`:         1,
		`sum(shoal_dns_answer_seconds_count{source="cluster"}) >= bool 1`:           1,
		`sum(shoal_dns_upstream_failures_total) >= bool 1`:                          1,
		`sum(shoal_reconcile_operations_total{reconciler="overlay"}) > bool 0`:      1,
		`count(shoal_dropped_packets_total{reason="spoofed-source",network="app"})`: 3,
		`sum(promhttp_metric_handler_errors_total)`:                                 0,
	} {
		s.eventually(slow(20*time.Second), func() error {
			if got, err := query(expr); err != nil || got != want {
				return fmt.Errorf("%s is %v (%v), want %v", expr, got, err, want)
			}
			return nil
		})
	}

	text := s.ok("node1", "curl -sS --fail http://172.30.0.1:9947/metrics")
	if out := promtool(t, text+"\n", "check", "metrics"); out != "" {
		t.Errorf("promtool check metrics says:\n%s", out)
	}
	socket := s.ok("node1", "curl -sS --fail --unix-socket %s http://shoal/metrics", s.Nodes()[0].Socket)
	if !strings.Contains(socket, "\nshoal_raft_term ") {
		t.Errorf("the unix socket's metrics:\n%s", socket)
	}
	// What the board and the rules ask for is there, on a manager.
	known := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+)`).FindAllStringSubmatch(text, -1) {
		known[m[1]] = true
	}
	var asked []string
	for _, f := range []string{"shoal.json", "alerts.yml"} {
		b, err := os.ReadFile(filepath.Join(repo, "deploy/grafana", f))
		if err != nil {
			t.Fatal(err)
		}
		if f == "shoal.json" && !json.Valid(b) {
			t.Errorf("%s is no JSON", f)
		}
		asked = append(asked, regexp.MustCompile(`\bshoal_\w+|\b(process|go)_[a-z_]+`).FindAllString(string(b), -1)...)
	}
	slices.Sort(asked)
	for _, name := range slices.Compact(asked) {
		base := strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count")
		// A network without published ports has none of their objects.
		if !known[name] && !known[base] && name != "shoal_ingress_objects" {
			t.Errorf("deploy/grafana asks for %s, which a manager does not have", name)
		}
	}
	// Nothing else is served there, and a wrong address is said before anything starts.
	if r := s.on("node1", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://172.30.0.1:9947/debug/pprof/"); r.out != "404" {
		t.Errorf("profiles at --metrics-addr: %s", r.out)
	}
	for arg, says := range map[string]string{"9947": "no port", "web:80": "no IP address", "127.0.0.1:x": "1 to 65535", ":2377": "--control-port"} {
		r := s.on("node1", "shoal", "agent", "--data-dir", filepath.Join(dir, "d"), "--metrics-addr", arg)
		if r.code == 0 || !strings.Contains(r.err, "--metrics-addr") || !strings.Contains(r.err, says) {
			t.Errorf("--metrics-addr %s: exit %d, %s", arg, r.code, r.err)
		}
	}
}
