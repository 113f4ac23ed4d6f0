package gossip

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/spec"
)

// Three nodes on real sockets of the loopback interface: 127.0.0.2 to .4.
func TestRealSockets(t *testing.T) {
	c := &cluster{tb: t, nodes: map[int]*node{}, keys: map[int]crypto.Signer{}, says: map[string]NodeInfo{}}
	dirs := map[int]string{1: t.TempDir(), 2: t.TempDir(), 3: t.TempDir()}
	start := func(i, port int) *node {
		g, err := Open(Config{
			NodeID: nodeID(i), Name: fmt.Sprint("n", i), Number: i, Role: spec.RoleWorker, Cluster: "sockets",
			Addr: netip.AddrFrom4([4]byte{127, 0, 0, byte(i + 1)}), Port: port, ControlPort: 7947, DataDir: dirs[i], Log: slog.New(slog.DiscardHandler),
			Keys: testRing, Signer: c.signer(i),
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		n := &node{Gossip: g, i: i, cancel: cancel, done: make(chan struct{}), stop: make(chan struct{}), gone: make(chan struct{})}
		go func() {
			defer close(n.done)
			if err := g.Run(ctx); err != nil {
				t.Errorf("run: %v", err)
			}
		}()
		go n.consume(nil)
		c.nodes[i] = n
		c.assign(i, g.Addr(), c.signer(i).Public())
		return n
	}
	t.Cleanup(func() {
		for _, n := range c.all() {
			c.kill(n.i)
		}
	})
	first := start(1, 0)
	first.put(1)
	for i := 2; i <= 3; i++ {
		n := start(i, 0)
		n.Join([]netip.AddrPort{first.Addr()})
		n.put(1, 2)
	}
	t.Logf("formed after %s", c.eventually(10*time.Second, "formed", c.agreed))
	var all []time.Duration
	for k := range 30 {
		c.node(k%3+1).put(k, k+1)
		all = append(all, c.eventually(5*time.Second, "change", c.agreed))
	}
	slices.Sort(all)
	t.Logf("change known to all: median %s, worst %s", all[15], all[29])
	var eps []spec.Endpoint
	for k := range 4000 {
		eps = append(eps, endpoint(1, k, spec.EndpointActive))
	}
	first.putAll(eps)
	t.Logf("4000 endpoints known after %s", c.eventually(10*time.Second, "big change", c.agreed))
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if missing, err := first.Barrier(ctx); err != nil {
		t.Errorf("barrier: %v, %v", missing, err)
	}

	port := int(c.node(3).Addr().Port())
	begin := time.Now()
	c.kill(3)
	c.eventually(15*time.Second, "dead", c.expect(3, "dead", 0))
	t.Logf("dead after %s", time.Since(begin))
	start(3, port).put(7)
	t.Logf("back after %s", c.eventually(15*time.Second, "back by its peer list", c.agreed))
	lctx, lcancel := context.WithTimeout(context.Background(), 15*time.Second) // the other's time has gone into the waits
	defer lcancel()
	if err := c.node(2).Leave(lctx); err != nil {
		t.Errorf("leave: %v", err)
	}
	c.eventually(3*time.Second, "gone", c.expect(2, "absent", 0))

	reg := prometheus.NewRegistry()
	reg.MustRegister(first.Collector())
	fams, err := reg.Gather()
	if err != nil || len(fams) < 20 {
		t.Errorf("%d metrics, %v", len(fams), err)
	}
}

func TestPortTaken(t *testing.T) {
	addr := netip.MustParseAddr("127.0.0.9")
	ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	port := ln.Addr().(*net.TCPAddr).Port
	open := func(a netip.Addr, port int) error {
		g, err := Open(Config{NodeID: "x", Cluster: "c", Addr: a, Port: port, DataDir: t.TempDir(), Keys: testRing, Signer: newSigner()})
		if err == nil {
			g.Close()
		}
		return err
	}
	err = open(addr, port)
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), fmt.Sprint(port)+"/tcp") || !strings.Contains(err.Error(), "--gossip-port") {
		t.Errorf("TCP port taken: %v", err)
	}
	ln.Close()
	pc, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, uint16(port))))
	if err != nil {
		t.Fatal(err)
	}
	if err := open(addr, port); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "/udp") {
		t.Errorf("UDP port taken: %v", err)
	}
	pc.Close()
	if err := open(addr, port); err != nil {
		t.Errorf("free port: %v", err)
	}
	if err := open(netip.MustParseAddr("192.0.2.1"), 0); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("address of another machine: %v", err)
	}
}

func TestOpenValidates(t *testing.T) {
	good := Config{NodeID: "x", Cluster: "c", Addr: netip.MustParseAddr("127.0.0.1"), DataDir: t.TempDir(), Keys: testRing, Signer: newSigner()}
	for name, spoil := range map[string]func(*Config){
		"no ID":       func(c *Config) { c.NodeID = "" },
		"no cluster":  func(c *Config) { c.Cluster = "" },
		"no address":  func(c *Config) { c.Addr = netip.Addr{} },
		"any address": func(c *Config) { c.Addr = netip.IPv4Unspecified() },
		"port":        func(c *Config) { c.Port = 70000 },
		"number":      func(c *Config) { c.Number = spec.MaxNodes + 1 },
		"no folder":   func(c *Config) { c.DataDir = "" },
		"no key":      func(c *Config) { c.Keys = Keyring{} },
		"short key":   func(c *Config) { c.Keys = Keyring{Use: 1, Keys: []Key{{ID: 1, Secret: make([]byte, 16)}}} },
		"other key":   func(c *Config) { c.Keys.Use = 2 },
		"no signer":   func(c *Config) { c.Signer = nil },
	} {
		cfg := good
		spoil(&cfg)
		if g, err := Open(cfg); err == nil {
			g.Close()
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestDisk(t *testing.T) {
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	for want := uint64(1); want < 4; want++ {
		if got, err := nextEpoch(dir, 0, log); err != nil || got != want {
			t.Fatalf("epoch %d, %v; want %d", got, err, want)
		}
	}
	if got, _ := nextEpoch(dir, 10, log); got != 11 {
		t.Errorf("epoch %d after 10", got)
	}
	if err := durable.WriteFile(dir+"/epoch", []byte("rubbish")); err != nil {
		t.Fatal(err)
	}
	if got, err := nextEpoch(dir, 0, log); err != nil || got != 1 {
		t.Errorf("after a damaged file: %d, %v", got, err)
	}
	want := []peerRecord{{Addr: nodeAddr(1), Node: "a"}, {Addr: nodeAddr(2)}}
	if err := savePeers(dir, want); err != nil {
		t.Fatal(err)
	}
	if got, err := loadPeers(dir); err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if err := durable.WriteFile(dir+"/peers.json", []byte("{")); err != nil {
		t.Fatal(err)
	}
	if _, err := loadPeers(dir); err == nil {
		t.Error("a damaged list was read")
	}
	if got, err := nextEpoch("/dev/null/absent", 6, log); err == nil || got != 7 {
		t.Errorf("where nothing can be kept: %d, %v", got, err)
	}
	// Numbers that could not be exceeded any more are damage.
	for _, bad := range []string{"18446744073709551615", "18446744073709551614", "9223372036854775807", "4611686018427387904", "-1", "", "\x00\x00"} {
		if err := durable.WriteFile(dir+"/epoch", []byte(bad)); err != nil {
			t.Fatal(err)
		}
		if got, err := nextEpoch(dir, 0, log); err != nil || got != 1 {
			t.Errorf("after epoch %q: %d, %v", bad, got, err)
		}
	}
}

func TestLogLevels(t *testing.T) {
	for line, want := range map[string]struct {
		level slog.Level
		text  string
	}{
		"[ERR] memberlist: Failed to send\n":       {slog.LevelWarn, "Failed to send"},
		"[WARN] memberlist: Refuting":              {slog.LevelInfo, "Refuting"},
		"[INFO] memberlist: Suspect x has failed":  {slog.LevelDebug, "Suspect x has failed"},
		"[DEBUG] memberlist: Stream connection":    {slog.LevelDebug, "Stream connection"},
		"[ERR] Failed to shutdown transport: gone": {slog.LevelWarn, "Failed to shutdown transport: gone"},
		"Err: Could not set the deadline":          {slog.LevelInfo, "Err: Could not set the deadline"},
	} {
		if level, text := parseLine(line); level != want.level || text != want.text {
			t.Errorf("%q: %s, %q", line, level, text)
		}
	}
}
