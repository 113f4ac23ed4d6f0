package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/versionstest"
	"github.com/shoalnet/shoal/lab"
)

// install replaces the lab's binary, as a package does.
func (s site) install(from string) {
	s.Helper()
	in, err := os.Open(from)
	if err != nil {
		s.Fatal(err)
	}
	defer in.Close()
	tmp := s.Binary + ".new"
	out, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		s.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		s.Fatal(err)
	}
	if err := out.Close(); err != nil {
		s.Fatal(err)
	}
	if err := os.Rename(tmp, s.Binary); err != nil {
		s.Fatal(err)
	}
}

// endAgent asks a node's agent to end, and waits until it has.
func (s site) endAgent(name string, within time.Duration) {
	s.Helper()
	i := slices.IndexFunc(s.NodeList, func(n lab.Node) bool { return n.Name == name })
	n := s.NodeList[i]
	if err := syscall.Kill(n.PID, syscall.SIGTERM); err != nil {
		s.Fatal(err)
	}
	s.eventually(within, func() error {
		if n.Running() {
			return fmt.Errorf("the agent of %s does not end", name)
		}
		return nil
	})
}

// restartAgent ends a node's agent, and starts the binary that is installed now.
func (s site) restartAgent(name string) {
	s.Helper()
	s.endAgent(name, slow(20*time.Second))
	if err := s.Start(s.Context(), name); err != nil {
		s.Fatal(err)
	}
}

// restart does so with several, each when the one before is ready again.
func (s site) restart(names ...string) {
	s.Helper()
	for _, name := range names {
		s.Logf("%s: restarting %s", time.Now().Format("15:04:05.000"), name)
		s.restartAgent(name)
		s.Logf("%s: started", time.Now().Format("15:04:05.000"))
		s.eventually(slow(30*time.Second), func() error {
			if r := s.on(name, "shoal", "node", "ls", "--format", "{{.Status}}"); r.code != 0 || strings.Trim(r.out, "ready\n") != "" {
				return fmt.Errorf("after the restart of %s: %s%s", name, r.out, r.err)
			}
			return nil
		})
	}
}

type levels struct {
	Level        int      `json:"level"`
	ClusterLevel int      `json:"cluster_level"`
	WaitingFor   []string `json:"waiting_for"`
	Problems     []string `json:"problems"`
	Leader       string   `json:"leader"`
	NodeID       string   `json:"node_id"`
}

func (s site) levels(node string) levels {
	s.Helper()
	var l levels
	if err := json.Unmarshal([]byte(s.ok(node, "shoal info -o json")), &l); err != nil {
		s.Fatal(err)
	}
	return l
}

// TestUpgrade: from the oldest build to today's, half-way back, and on, node by node,
// while clients ask by virtual IP and by published port: none of their requests fails.
// What needs today's level waits for the last manager, and says for which; from then on
// a node that would not understand it is kept out.
func TestUpgrade(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	const oldLevel = 1
	now, old := filepath.Join(bin, "shoal"), versionstest.Oldest(t, repo, "shoal", "")
	s := site{t, &lab.Lab{Binary: filepath.Join(t.TempDir(), "shoal")}}
	s.install(old)
	s = own(t, "upgr", lab.Options{Nodes: 4, Managers: 3, Binary: s.Binary})

	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app --constraint node.role==manager -p 8080:80")
	// An old agent that ends may take a question with it out of the socket (TestHandover
	// of package dns has that of today's): it is asked again in time.
	s.ok("node1", "shoal run -d --name client --node node1 --network app --dns-option timeout:1 -- %s/load -for 10m -rate 50 -timeout 5s http://web/", bin)
	stop, asked := make(chan struct{}), make(chan load, 1)
	go func() {
		all := load{Errors: map[string]int{}}
		defer func() { asked <- all }()
		for {
			select {
			case <-stop:
				return
			default:
			}
			r := s.on("node4", bin+"/load", "-for", "2s", "-rate", "50", "-timeout", "5s", "http://172.30.0.1:8080/")
			var l load
			if err := json.Unmarshal([]byte(r.out), &l); err != nil {
				t.Errorf("load: %+v", r)
				return
			}
			all.Requests, all.OK, all.Failed = all.Requests+l.Requests, all.OK+l.OK, all.Failed+l.Failed
			for k, v := range l.Errors {
				all.Errors[k] += v
			}
		}
	}()

	s.install(now)
	s.restart("node1", "node4")
	s.ok("node1", "shoal net create mixed")
	s.install(old) // half-way back
	s.restart("node1")
	s.ok("node1", "shoal net inspect mixed")
	s.install(now)
	s.restart("node1", "node2")
	older := fmt.Sprintf("and the cluster is at level %d, as node3 runs level %d (old): upgrade shoal there", oldLevel, oldLevel)
	// The old one may lead, who knows no secrets at all: then another node says so.
	s.eventually(slow(60*time.Second), func() error {
		switch l := s.levels("node1"); l.Leader {
		case s.levels("node1").NodeID, s.levels("node2").NodeID:
			return nil
		case s.levels("node3").NodeID:
			s.fails("node1", older, "shoal secret create key /etc/hostname")
			s.install(old)
			s.restart("node3")
			s.install(now)
		}
		return fmt.Errorf("node1 and node2 do not lead")
	})
	l := s.levels("node1")
	if l.Level != state.Level || l.ClusterLevel != oldLevel || len(l.WaitingFor) != 1 || !strings.HasPrefix(l.WaitingFor[0], fmt.Sprintf("node3 runs level %d (", oldLevel)) {
		t.Errorf("%+v", l)
	}
	if out := s.ok("node1", "shoal info"); !strings.Contains(out, "once all managers have it: node3 runs level") {
		t.Errorf("info prints\n%s", out)
	}
	s.fails("node1", older, "shoal secret create key /etc/hostname")
	if out := s.ok("node1", "shoal secret ls -q"); out != "" {
		t.Errorf("secrets: %s", out)
	}
	s.whoami("between", 1, "--network app --constraint node.name==node3") // of a new leader for an old node
	s.restart("node3")
	s.eventually(slow(30*time.Second), func() error {
		if l := s.levels("node4"); l.ClusterLevel != state.Level || len(l.WaitingFor) > 0 {
			return fmt.Errorf("%+v", l)
		}
		return nil
	})
	s.ok("node1", "shoal secret create key /etc/hostname")
	s.whoami("keyed", 1, "--secret key --constraint node.name==node3")

	close(stop)
	if l := <-asked; l.Failed > 0 || l.OK < 100 {
		t.Errorf("by the published port %d of %d requests failed: %v", l.Failed, l.Requests, l.Errors)
	} else {
		t.Logf("by the published port %d requests, none failed", l.OK)
	}
	s.ok("node1", "shoal stop client")
	out := s.ok("node1", "shoal logs client")
	if l := s.parseLoad(out); l.Failed > 0 || l.OK < 100 {
		t.Errorf("by the virtual IP %d of %d requests failed: %v\n%s", l.Failed, l.Requests, l.Errors, out)
	} else {
		t.Logf("by the virtual IP %d requests, none failed", l.OK)
	}

	// An old build does not come in any more.
	s.ok("node4", "shoal leave")
	if err := s.KillAgent("node4"); err != nil {
		t.Fatal(err)
	}
	s.install(old)
	if err := s.Start(t.Context(), "node4"); err != nil {
		t.Fatal(err)
	}
	if err := s.Join(t.Context(), &s.NodeList[3], false); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("node node4 can't join: the cluster is at feature level %d", state.Level)) {
		t.Errorf("a node of less than the cluster's level joins: %v", err)
	}
}
