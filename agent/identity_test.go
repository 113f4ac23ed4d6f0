package agent

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

func TestIdentitySurvives(t *testing.T) {
	dir := t.TempDir()
	id, err := loadIdentity(dir, "n1")
	if err != nil {
		t.Fatal(err)
	}
	if len(id.NodeID) != spec.IDLen || id.Name != "n1" || id.Cluster.ID != "" {
		t.Errorf("a new identity is %+v", id)
	}
	id.Cluster = state.Cluster{ID: "c1", Pools: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, SubnetSize: 24, DataPathPort: 4789}
	id.Number, id.Role, id.Addr, id.ControlPort, id.GossipPort = 3, spec.RoleManager, netip.MustParseAddr("192.0.2.1"), 2377, 7946
	id.Managers = []string{"192.0.2.2:2377"}
	if err := id.save(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"n1", ""} { // as before, or not named
		got, err := loadIdentity(dir, name)
		if err != nil || !reflect.DeepEqual(got, id) {
			t.Errorf("read back: %+v, %v\nwant %+v", got, err, id)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.new*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestIdentityRefusals: what can't be this node's is left as it is, and the
// error says what to do.
func TestIdentityRefusals(t *testing.T) {
	member := `{"format":1,"node_id":"abcdefghijkl","name":"n1","cluster":{"id":"c1"}}`
	for name, k := range map[string]struct{ file, node, want string }{
		"damaged":              {`{"format":1,`, "n1", "is damaged"},
		"empty":                {``, "n1", "is damaged"},
		"of a newer version":   {`{"format":2,"node_id":"abcdefghijkl","name":"n1"}`, "n1", "has format 2, this version of shoal reads 1"},
		"without a format":     {`{}`, "n1", "has format 0"},
		"without an ID":        {`{"format":1,"name":"n1"}`, "n1", "is damaged"},
		"without a name":       {`{"format":1,"node_id":"abcdefghijkl"}`, "", "is damaged"},
		"in a cluster nowhere": {`{"format":1,"node_id":"abcdefghijkl","name":"n1","cluster":{"id":"c1"},"addr":"here"}`, "n1", "is damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(identityPath(dir), []byte(k.file), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := loadIdentity(dir, k.node)
			if err == nil || !strings.Contains(err.Error(), k.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, k.want)
			}
			if b, _ := os.ReadFile(identityPath(dir)); string(b) != k.file {
				t.Errorf("the file was changed: %s", b)
			}
		})
	}
	t.Run("keeps its name in a cluster", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(identityPath(dir), []byte(member), 0o600); err != nil {
			t.Fatal(err)
		}
		id, err := loadIdentity(dir, "n2")
		if b, _ := os.ReadFile(identityPath(dir)); err != nil || id.Name != "n1" || string(b) != member {
			t.Errorf("got %+v, %v; the file is %s", id, err, b)
		}
	})
	t.Run("renamed while in no cluster", func(t *testing.T) {
		dir := t.TempDir()
		a, err := loadIdentity(dir, "n1")
		if err != nil {
			t.Fatal(err)
		}
		b, err := loadIdentity(dir, "n2")
		if err != nil || b.Name != "n2" || b.NodeID != a.NodeID {
			t.Errorf("got %+v, %v", b, err)
		}
	})
}

func testConfig(t *testing.T) Config {
	dir := t.TempDir()
	return Config{NodeName: "n1", DataDir: filepath.Join(dir, "data"), Socket: filepath.Join(dir, "run", "s.sock"), Instance: "shoal-unit",
		ControlPort: 2377, GossipPort: 7946, Log: slog.New(slog.DiscardHandler)}
}

func TestNewRefusals(t *testing.T) {
	for name, k := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"node name":    {func(c *Config) { c.NodeName = "a b" }, `node name "a b"`},
		"control port": {func(c *Config) { c.ControlPort = 0 }, "--control-port 0 is out of range"},
		"gossip port":  {func(c *Config) { c.GossipPort = 70000 }, "--gossip-port 70000 is out of range"},
		"equal ports":  {func(c *Config) { c.GossipPort = c.ControlPort }, "are both 2377"},
		"instance":     {func(c *Config) { c.Instance = "../x" }, `instance name "../x"`},
		"socket":       {func(c *Config) { c.Socket = "/" + strings.Repeat("x", 107) }, "the longest allowed is 107"},
		"data dir":     {func(c *Config) { c.DataDir = "/dev/null/x" }, "data directory"},
	} {
		cfg := testConfig(t)
		k.change(&cfg)
		if a, err := New(cfg); err == nil || !strings.Contains(err.Error(), k.want) {
			t.Errorf("%s: %v, %v, want %q", name, a, err, k.want)
		}
	}
}

// TestDataDirIsLocked: two agents never share a data directory, and the lock
// goes with its owner.
func TestDataDirIsLocked(t *testing.T) {
	cfg := testConfig(t)
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	_, err = New(cfg)
	if want := fmt.Sprintf("in use by the agent with pid %d", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "--data-dir") {
		t.Errorf("a second agent: %v, want %q", err, want)
	}
	a.lock.Close()
	// A refused identity gives the lock back.
	if err := os.WriteFile(identityPath(cfg.DataDir), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(cfg); err == nil {
		t.Fatal("a damaged identity is taken")
	}
	if err := os.Remove(identityPath(cfg.DataDir)); err != nil {
		t.Fatal(err)
	}
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.lock.Close()
	var id identity
	f, err := os.ReadFile(identityPath(cfg.DataDir))
	if err != nil || json.Unmarshal(f, &id) != nil || id.NodeID != b.ident.NodeID {
		t.Errorf("the identity on disk is %s, %v", f, err)
	}
}

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "s.sock")
	ln, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("mode of the socket: %v, %v", fi.Mode(), err)
	}
	if _, err := listenUnix(path); err == nil || !strings.Contains(err.Error(), "another agent answers at "+path) {
		t.Errorf("a socket that answers: %v", err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // as a killed agent leaves it
	ln.Close()
	ln, err = listenUnix(path)
	if err != nil {
		t.Errorf("a stale socket: %v", err)
	} else {
		ln.Close()
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenUnix(file); err == nil || !strings.Contains(err.Error(), "is not a socket") {
		t.Errorf("a file: %v", err)
	}
	if b, _ := os.ReadFile(file); string(b) != "mine" {
		t.Error("a file that is no socket was touched")
	}
}

// udpOnly takes a UDP port that nobody has by TCP, as another program on this
// machine well may.
func udpOnly(t *testing.T) net.PacketConn {
	for range 100 {
		udp, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if tcp, err := net.Listen("tcp", udp.LocalAddr().String()); err == nil {
			tcp.Close()
			return udp
		}
		udp.Close()
	}
	t.Fatal("no UDP port whose like by TCP is free")
	return nil
}

// TestTakenPorts: the error names the port, who has it, and the flag.
func TestTakenPorts(t *testing.T) {
	local := netip.MustParseAddr("127.0.0.1")
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp := udpOnly(t)
	defer udp.Close()
	tcpPort := int(netip.MustParseAddrPort(tcp.Addr().String()).Port())
	udpPort := int(netip.MustParseAddrPort(udp.LocalAddr().String()).Port())
	me := fmt.Sprintf("(pid %d)", os.Getpid())
	a := &Agent{log: slog.New(slog.DiscardHandler)}
	for name, k := range map[string]struct {
		err  error
		want []string
	}{
		"control": {func() error {
			_, err := newMember(Config{}, &identity{Addr: local, ControlPort: tcpPort}, nil, a.log)
			return err
		}(), []string{fmt.Sprintf("control port %d/tcp is taken by", tcpPort), me, "--control-port PORT"}},
		"gossip, TCP": {a.checkPorts(&identity{Addr: local, GossipPort: tcpPort}), []string{fmt.Sprintf("gossip port %d/tcp is taken by", tcpPort), me, "--gossip-port PORT"}},
		"gossip, UDP": {a.checkPorts(&identity{Addr: local, GossipPort: udpPort}), []string{fmt.Sprintf("gossip port %d/udp is taken by", udpPort), me, "--gossip-port PORT"}},
		"VXLAN":       {checkUDPPort("VXLAN", netip.AddrPortFrom(local, uint16(udpPort)), dataPathPortFlag), []string{fmt.Sprintf("VXLAN port %d/udp is taken by", udpPort), me, "--data-path-port"}},
		"an address of another machine": {checkUDPPort("gossip", netip.MustParseAddrPort("192.0.2.1:7946"), "--gossip-port"),
			[]string{"address 192.0.2.1 is not one of this machine's", "--advertise-addr"}},
	} {
		for _, w := range k.want {
			if k.err == nil || !strings.Contains(k.err.Error(), w) {
				t.Errorf("%s: %v, want %q", name, k.err, w)
			}
		}
	}
	if tcpPort != udpPort {
		if err := checkUDPPort("gossip", netip.AddrPortFrom(local, 0), ""); err != nil {
			t.Errorf("a free port: %v", err)
		}
	}
	if o := portOwner("tcp", 1); o != "" {
		t.Errorf("port 1 is held by %s", o)
	}
}

func TestAdvertiseAddr(t *testing.T) {
	for in, want := range map[string]string{"192.0.2.1": "192.0.2.1", "[2001:db8::1]": "2001:db8::1", "::ffff:192.0.2.1": "192.0.2.1", "lo": "127.0.0.1"} {
		if got, err := advertiseAddr(in); err != nil || got.String() != want {
			t.Errorf("%s: %s, %v, want %s", in, got, err, want)
		}
	}
	for in, want := range map[string]string{"0.0.0.0": "can't be reached", "::": "can't be reached", "224.0.0.1": "can't be reached", "nosuchif0": "neither an address nor an interface", "10.0.0.1/24": "neither an address nor an interface"} {
		if got, err := advertiseAddr(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %s, %v, want %q", in, got, err, want)
		}
	}
}

func TestClusterOf(t *testing.T) {
	if _, err := clusterOf(nil); err == nil {
		t.Error("an answer without a cluster is taken")
	}
}
