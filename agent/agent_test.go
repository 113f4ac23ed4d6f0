package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/ingress/ingresstest"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/overlay/overlaytest"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
	"github.com/shoalnet/shoal/vip/viptest"
)

// freePort is a TCP and UDP port of 127.0.0.1 that nobody holds now.
func freePort(t *testing.T) int {
	t.Helper()
	for range 50 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := ln.Addr().(*net.TCPAddr).Port
		err = checkUDPPort("gossip", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(port)), "")
		ln.Close()
		if err == nil {
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

// testAgent is an agent on fakes, with the API's clients.
type testAgent struct {
	t     *testing.T
	cfg   Config
	bench *bench
	local shoalv1connect.LocalClient
	ctl   shoalv1connect.ControlClient
	stop  func()
}

func newAgent(t *testing.T, name string) *testAgent {
	cfg := testConfig(t)
	cfg.NodeName, cfg.ControlPort, cfg.GossipPort, cfg.AdvertiseAddr, cfg.Version = name, freePort(t), freePort(t), "127.0.0.1", "test"
	a := &testAgent{t: t, bench: newBench(t)}
	cfg.Runtime, cfg.Overlay, cfg.VIP, cfg.Ingress = a.bench, overlaytest.NewFake(netip.MustParseAddr("127.0.0.1"), 1500), &viptest.Fake{}, ingresstest.NewFake()
	cfg.Cleanup = func() error { return nil }
	cfg.HostRoutes = func() []netip.Prefix { return nil }
	cfg.Upstreams = func() []netip.AddrPort { return nil }
	cfg.SearchDomains = func() []string { return nil }
	a.cfg = cfg
	client := peer.UnixClient(cfg.Socket)
	a.local = shoalv1connect.NewLocalClient(client, "http://shoal")
	a.ctl = shoalv1connect.NewControlClient(client, "http://shoal")
	t.Cleanup(func() {
		if a.stop != nil {
			a.stop()
		}
		client.CloseIdleConnections()
	})
	return a
}

func (a *testAgent) start() {
	a.t.Helper()
	ag, err := New(a.cfg)
	if err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := ag.Run(ctx); err != nil {
			a.t.Errorf("%s: %v", a.cfg.NodeName, err)
		}
	})
	a.stop = func() {
		cancel()
		wg.Wait()
		a.stop = nil
	}
	a.await("the agent answers", func() error { _, err := a.info(); return err })
}

func (a *testAgent) await(what string, fn func() error) {
	a.t.Helper()
	var err error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = fn(); err == nil {
			return
		}
	}
	a.t.Fatalf("%s: %s: %v", a.cfg.NodeName, what, err)
}

func (a *testAgent) info() (*shoalv1.InfoResponse, error) {
	r, err := a.local.Info(context.Background(), connect.NewRequest(&shoalv1.InfoRequest{}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

func (a *testAgent) init(change ...func(*shoalv1.InitRequest)) error {
	r := &shoalv1.InitRequest{DataPathPort: 21789}
	for _, c := range change {
		c(r)
	}
	_, err := a.local.Init(context.Background(), connect.NewRequest(r))
	return err
}

// TestAgentLife: a node makes a cluster, is restarted, refuses to enter another,
// is not let go as the last one, and leaves nothing behind.
func TestAgentLife(t *testing.T) {
	a := newAgent(t, "n1")
	// What an init that was cut short by the agent's death leaves: a new one
	// must not stumble over it.
	raft := control.RaftDir(a.cfg.DataDir)
	if err := errors.Join(os.MkdirAll(raft, 0o700), os.WriteFile(filepath.Join(raft, "log.db"), []byte("half"), 0o600)); err != nil {
		t.Fatal(err)
	}
	a.start()
	ctx := context.Background()
	_, err := a.ctl.ListNodes(ctx, connect.NewRequest(&shoalv1.ListNodesRequest{}))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "shoal init") {
		t.Errorf("in no cluster: %v", err)
	}
	for name, k := range map[string]struct {
		call func() error
		want string
	}{
		"pool":           {func() error { return a.init(func(r *shoalv1.InitRequest) { r.AddressPools = []string{"10"} }) }, `address pool "10"`},
		"data path port": {func() error { return a.init(func(r *shoalv1.InitRequest) { r.DataPathPort = 80 }) }, "data path port 80 is out of range"},
		"address":        {func() error { return a.init(func(r *shoalv1.InitRequest) { r.AdvertiseAddr = "192.0.2.1" }) }, "is not one of this machine's"},
		"interface":      {func() error { return a.init(func(r *shoalv1.InitRequest) { r.AdvertiseAddr = "nosuchif0" }) }, "neither an address nor an interface"},
		"leave":          {func() error { _, err := a.local.Leave(ctx, connect.NewRequest(&shoalv1.LeaveRequest{})); return err }, "in no cluster"},
		"join nobody":    {func() error { _, err := a.local.Join(ctx, connect.NewRequest(&shoalv1.JoinRequest{})); return err }, "no manager is named"},
		"join as a boss": {func() error {
			_, err := a.local.Join(ctx, connect.NewRequest(&shoalv1.JoinRequest{Remote: "127.0.0.1", Role: "boss"}))
			return err
		}, `role "boss"`},
		"subnet size": {func() error { return a.init(func(r *shoalv1.InitRequest) { r.SubnetSize = 99 }) }, "99"},
	} {
		if err := k.call(); err == nil || !strings.Contains(err.Error(), k.want) {
			t.Errorf("%s: %v, want %q", name, err, k.want)
		}
	}
	var wg sync.WaitGroup
	for range 2 { // as people look while it goes on
		wg.Go(func() {
			for range 50 {
				_, _ = a.info()
			}
		})
	}
	if err := a.init(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	was, err := a.info()
	if err != nil || was.Cluster == "" || was.Node.Role != spec.RoleManager || was.Node.Number != 1 {
		t.Fatalf("info %v, %v", was, err)
	}
	if err := a.init(); err == nil || !strings.Contains(err.Error(), "already in cluster "+was.Cluster) {
		t.Errorf("a second init: %v", err)
	}

	a.stop()
	a.start()
	a.await("leads again", func() error {
		_, err := a.ctl.CreateNetwork(ctx, connect.NewRequest(&shoalv1.CreateNetworkRequest{Name: "app"}))
		return err
	})
	if now, err := a.info(); err != nil || now.Cluster != was.Cluster || now.Node.Id != was.Node.Id || now.Node.Number != 1 {
		t.Errorf("after a restart: %v, %v", now, err)
	}

	_, err = a.local.Leave(ctx, connect.NewRequest(&shoalv1.LeaveRequest{}))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "--force") {
		t.Errorf("the last one leaves: %v", err)
	}
	if _, err := a.local.Leave(ctx, connect.NewRequest(&shoalv1.LeaveRequest{Force: true})); err != nil {
		t.Fatal(err)
	}
	if now, err := a.info(); err != nil || now.Cluster != "" || now.Node.Id == was.Node.Id {
		t.Errorf("after leave: %v, %v", now, err)
	}
	for _, f := range []string{"raft", "gossip", "assignment.json"} {
		if _, err := os.Stat(filepath.Join(a.cfg.DataDir, f)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", f, err)
		}
	}
	if err := a.init(); err != nil { // and on to a new life
		t.Errorf("init after leave: %v", err)
	}
}

// TestAgentJoin: a second node joins as a worker, is made a manager and a worker
// again, and is sent away while its agent runs.
func TestAgentJoin(t *testing.T) {
	a, b := newAgent(t, "n1"), newAgent(t, "n2")
	a.start()
	if err := a.init(); err != nil {
		t.Fatal(err)
	}
	b.start()
	ctx := context.Background()
	remote := func(x *testAgent) string {
		i, err := x.info()
		if err != nil {
			t.Fatal(err)
		}
		return netip.AddrPortFrom(netip.MustParseAddr(i.Node.Addr), uint16(i.Node.ControlPort)).String()
	}
	tok, err := a.ctl.ShowToken(ctx, connect.NewRequest(&shoalv1.ShowTokenRequest{Role: spec.RoleWorker}))
	if err != nil {
		t.Fatal(err)
	}
	token := tok.Msg.Token
	free := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(freePort(t))).String()
	_, err = b.local.Join(ctx, connect.NewRequest(&shoalv1.JoinRequest{Remote: free, Token: token}))
	if connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "no manager answers at "+free) {
		t.Errorf("join of nobody: %v", err)
	}
	if _, err := b.local.Join(ctx, connect.NewRequest(&shoalv1.JoinRequest{Remote: remote(a), Token: token})); err != nil {
		t.Fatal(err)
	}
	was, err := b.info()
	if err != nil || was.Node.Role != spec.RoleWorker || was.Node.Number != 2 {
		t.Fatalf("info %v, %v", was, err)
	}
	for _, role := range []string{spec.RoleManager, spec.RoleWorker} {
		if _, err := a.ctl.UpdateNode(ctx, connect.NewRequest(&shoalv1.UpdateNodeRequest{Ref: "n2", Role: &role})); err != nil {
			t.Fatal(err)
		}
		b.await("is a "+role, func() error {
			if i, err := b.info(); err != nil || i.Node.Role != role {
				return errors.New(i.GetNode().GetRole())
			}
			return nil
		})
	}
	if _, err := a.ctl.RemoveNode(ctx, connect.NewRequest(&shoalv1.RemoveNodeRequest{Ref: "n2", Force: true})); err != nil {
		t.Fatal(err)
	}
	b.await("left", func() error {
		if i, err := b.info(); err != nil || i.Cluster != "" {
			return errors.New("still in " + i.GetCluster())
		}
		return nil
	})
}

// TestStrays: an agent whose data directory was lost says what runs on of before, which
// no manager knows of, and ends it when it is told to.
func TestStrays(t *testing.T) {
	a := newAgent(t, "n1")
	a.bench.have["t1"] = &fakeTask{Status: found(newTask("t1"), runtime.Running, 0)}
	a.bench.have["t2"] = &fakeTask{Status: found(newTask("t2"), runtime.Exited, 0)}
	cleaned := 0
	a.cfg.Cleanup = func() error { cleaned++; return nil }
	a.start()
	ctx := context.Background()
	doctor := func() string {
		r, err := a.local.Doctor(ctx, connect.NewRequest(&shoalv1.DoctorRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		for _, c := range r.Msg.Checks {
			fmt.Fprintf(&out, "%s %s: %s (%s)\n", c.Status, c.Name, c.Message, c.Hint)
		}
		return out.String()
	}
	if d := doctor(); !regexp.MustCompile(`(?m)^error tasks: .*in no cluster.*: t1 \('shoal leave --force'`).MatchString(d) {
		t.Errorf("doctor says\n%s", d)
	}
	if _, err := a.local.Leave(ctx, connect.NewRequest(&shoalv1.LeaveRequest{})); err == nil || !strings.Contains(err.Error(), "in no cluster") {
		t.Errorf("leave without force: %v", err)
	}
	a.bench.never("remove t1")
	if _, err := a.local.Leave(ctx, connect.NewRequest(&shoalv1.LeaveRequest{Force: true})); err != nil {
		t.Fatal(err)
	}
	a.bench.await("remove t1")
	if d := doctor(); strings.Contains(d, "error tasks") || cleaned != 1 {
		t.Errorf("cleaned %d times, and doctor says\n%s", cleaned, d)
	}
}

// TestLockDir: one agent has a data directory, whatever the disk makes of the file that
// says so.
func TestLockDir(t *testing.T) {
	for name, prepare := range map[string]func(path string) error{
		"ordinary":         func(string) error { return nil },
		"a directory":      func(p string) error { return os.Mkdir(p, 0o700) },
		"a dangling link":  func(p string) error { return os.Symlink("/nowhere/at/all", p) },
		"of one that died": func(p string) error { return os.WriteFile(p, []byte("4711\n"), 0o600) },
	} {
		dir := t.TempDir()
		if err := prepare(filepath.Join(dir, "lock")); err != nil {
			t.Fatal(err)
		}
		l, err := lockDir(dir)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if _, err := lockDir(dir); err == nil || !strings.Contains(err.Error(), "in use by the agent with pid") {
			t.Errorf("%s: a second agent: %v", name, err)
		}
		l.Close()
		l, err = lockDir(dir)
		if err != nil {
			t.Errorf("%s: the next agent: %v", name, err)
			continue
		}
		l.Close()
	}
}

// TestEnter: who looks at a node in no cluster, as each agent does that starts, is no
// reason to refuse an init; another init is.
func TestEnter(t *testing.T) {
	a := &Agent{}
	a.mu.Lock()
	go func() {
		time.Sleep(50 * time.Millisecond) // it looks
		a.mu.Unlock()
	}()
	if err := a.enter(t.Context()); err != nil {
		t.Errorf("beside one that looks: %v", err)
	}
	if err := a.enter(t.Context()); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("beside another: %v", err)
	}
	a.mu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.enter(ctx); err == nil {
		t.Error("entered without the lock")
	}
}

// TestConcerned: a change wakes the loops that read what changed, and no other.
func TestConcerned(t *testing.T) {
	m := &member{cfg: Config{Instance: "shoal"},
		overlay: reconcile.New("overlay", overlay.NewTarget(nil), reconcile.Options{}),
		vip:     reconcile.New("vip", vip.Target{}, reconcile.Options{}),
		ingress: reconcile.New("ingress", ingress.Target{}, reconcile.Options{})}
	for _, c := range []struct {
		changes []overlay.Change
		want    int // loops
	}{
		{nil, 0},
		{[]overlay.Change{{}}, 3}, // the host, or whatever was missed
		{[]overlay.Change{{Netns: "shoal-net-app-k3v9x2"}}, 3},
		{[]overlay.Change{{Netns: "shoal-task-web.1.k3v9x2m1p0qa"}}, 1},
		{[]overlay.Change{{Netns: "shoal-net-app-k3v9x2", Table: "shoal-vip"}}, 1},
		{[]overlay.Change{{Netns: "shoal-net-app-k3v9x2", Table: "shoal-ingress"}, {Table: "shoal-ingress"}}, 1},
		{[]overlay.Change{{Netns: "shoal-net-app-k3v9x2", Table: "shoal-overlay"}, {Netns: "shoal-net-app-k3v9x2", Table: "stranger"}, {Table: "shoal-members"}}, 1},
		{[]overlay.Change{{Netns: "shoal-task-web.1.k3v9x2m1p0qa", Table: "shoal"}, {Netns: "shoal-net-app-k3v9x2", Table: "shoal-vip"}}, 2},
	} {
		if got := len(m.concerned(c.changes)); got != c.want {
			t.Errorf("%v wakes %d loops, want %d", c.changes, got, c.want)
		}
	}
}
