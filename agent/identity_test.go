package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

func TestIdentitySurvives(t *testing.T) {
	dir := t.TempDir()
	id, err := load(dir, "n1")
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
		got, err := load(dir, name)
		if err != nil || !reflect.DeepEqual(got, id) {
			t.Errorf("read back: %+v, %v\nwant %+v", got, err, id)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.new*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func noName() (string, error) { return "", errors.New("no name") }

// load is loadIdentity as New has it.
func load(dir, name string) (*identity, error) {
	return loadIdentity(dir, name, noName, slog.New(slog.DiscardHandler))
}

// damages are what befalls a file. The last is the file of another node.
func damages(another []byte) map[string]func(path string) error {
	return map[string]func(path string) error{
		"absent":  os.RemoveAll,
		"empty":   func(p string) error { return os.Truncate(p, 0) },
		"cut":     func(p string) error { return os.Truncate(p, 40) },
		"garbage": func(p string) error { return os.WriteFile(p, []byte("\x00\x01garbage"), 0o600) },
		"null":    func(p string) error { return os.WriteFile(p, []byte("null"), 0o600) },
		"no node": func(p string) error { return os.WriteFile(p, []byte("{}"), 0o600) },
		"a directory": func(p string) error {
			return errors.Join(os.Remove(p), os.Mkdir(p, 0o700))
		},
		"another's": func(p string) error { return os.WriteFile(p, another, 0o600) },
	}
}

// memberDir is the data directory of a node in a cluster.
func memberDir(t *testing.T) (string, *identity) {
	t.Helper()
	dir := t.TempDir()
	_, root, err := control.NewTrust("c1")
	if err != nil {
		t.Fatal(err)
	}
	id := &identity{Format: identityFormat, NodeID: "abcdefghijkl", Name: "n1", Number: 3, Role: spec.RoleWorker, CA: root.Digest(),
		Cluster: state.Cluster{ID: "c1", DataPathPort: 4799}, Addr: netip.MustParseAddr("192.0.2.1"), ControlPort: 2377, GossipPort: 7946}
	creds, err := peer.NewCredentials()
	if err != nil {
		t.Fatal(err)
	}
	if err := certify(creds, root, id, 1); err != nil {
		t.Fatal(err)
	}
	a := cached()
	a.Nodes[0].ID = id.NodeID
	b, err := encodeAssignment(a, id)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(creds.Save(peer.Path(dir)), id.save(dir), os.WriteFile(assignmentPath(dir), b, 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir, id
}

// TestIdentityIsRecovered: whatever becomes of any one of node.json, its copy and
// assignment.json, or of two of them, the node knows who it is; of all three, it
// says so, and neither becomes another node nor writes anything.
func TestIdentityIsRecovered(t *testing.T) {
	another := []byte(`{"format":1,"node_id":"zzzzzzzzzzzz","name":"other","cluster":{"id":"c1"}}`)
	for name, damage := range damages(another) {
		for lost := range 8 { // which of the three
			dir, want := memberDir(t)
			for i, p := range []string{identityPath(dir), durable.CopyOf(identityPath(dir)), assignmentPath(dir)} {
				if lost&(1<<i) != 0 {
					if err := damage(p); err != nil {
						t.Fatal(err)
					}
				}
			}
			before, _ := os.ReadFile(identityPath(dir))
			id, err := load(dir, "new-name")
			if lost == 7 {
				// Another node's is told by the certificate, later: see loadCredentials.
				if name == "another's" {
					if _, err := loadCredentials(dir, id, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "this is node zzzzzzzzzzzz") {
						t.Errorf("%s: all of them: %+v, %v", name, id, err)
					}
					continue
				}
				var e *lostIdentity
				after, _ := os.ReadFile(identityPath(dir))
				if !errors.As(err, &e) || id.NodeID != want.NodeID || id.Cluster.ID != "c1" || !strings.Contains(err.Error(), "shoal leave --force") || strings.Contains(err.Error(), "\n") || string(before) != string(after) {
					t.Errorf("%s: all of them: %+v, %v", name, id, err)
				}
				continue
			}
			if err != nil || !reflect.DeepEqual(id, want) {
				t.Errorf("%s of %03b: %+v, %v", name, lost, id, err)
				continue
			}
			if !sameFiles(identityPath(dir), durable.CopyOf(identityPath(dir))) && !(lost&2 != 0 && name == "a directory") {
				t.Errorf("%s of %03b: not mended", name, lost)
			}
		}
	}
}

// TestIdentityIsWhole: whatever bit of node.json is another, the second copy counts, also
// where what is left reads well.
func TestIdentityIsWhole(t *testing.T) {
	dir, want := memberDir(t)
	whole, err := os.ReadFile(identityPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		b := slices.Clone(whole)
		b[i] ^= 1 << (i % 7)
		if err := os.WriteFile(identityPath(dir), b, 0o600); err != nil {
			t.Fatal(err)
		}
		id, err := load(dir, "")
		if now, rerr := os.ReadFile(identityPath(dir)); err != nil || rerr != nil || !reflect.DeepEqual(id, want) {
			t.Fatalf("byte %d of\n%s\nwas another: %+v, %v\nwant %+v", i, b, id, err, want)
		} else if string(now) != string(whole) && string(now) != string(b) {
			t.Errorf("byte %d was another: the file is\n%s", i, now)
		}
		if copied, err := os.ReadFile(durable.CopyOf(identityPath(dir))); err != nil || string(copied) != string(whole) {
			if err := want.save(dir); err != nil { // b is as good: a space or so
				t.Fatal(err)
			}
		}
	}
}

// TestIdentityOfBefore: a node whose version kept no copy has one after the first
// start; without its certificate, too, it is not a new node.
func TestIdentityOfBefore(t *testing.T) {
	dir, want := memberDir(t)
	if err := errors.Join(os.RemoveAll(filepath.Join(dir, "copy")), os.Remove(assignmentPath(dir))); err != nil {
		t.Fatal(err)
	}
	if id, err := load(dir, ""); err != nil || !reflect.DeepEqual(id, want) || !sameFiles(identityPath(dir), durable.CopyOf(identityPath(dir))) {
		t.Errorf("%+v, %v", id, err)
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(dir, "copy")), os.Remove(identityPath(dir)), os.Remove(peer.Path(dir)), os.WriteFile(control.MarkPath(dir), []byte("{}"), 0o600)); err != nil {
		t.Fatal(err)
	}
	var e *lostIdentity
	if id, err := load(dir, "n1"); !errors.As(err, &e) || id.Cluster.ID == "" {
		t.Errorf("with the mark of a manager only: %+v, %v", id, err)
	}
}

// TestIdentityRefusals: a node that was in no cluster is a new one when its file is
// damaged; what a newer version wrote is left as it is.
func TestIdentityRefusals(t *testing.T) {
	member := `{"format":1,"node_id":"abcdefghijkl","name":"n1","cluster":{"id":"c1"}}`
	for name, damage := range damages([]byte(`{"format":1,"name":"n1"}`)) {
		dir := t.TempDir()
		was, err := load(dir, "n1")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(filepath.Join(dir, "copy")); err != nil {
			t.Fatal(err)
		}
		if err := damage(identityPath(dir)); err != nil {
			t.Fatal(err)
		}
		id, err := load(dir, "n1")
		if err != nil || id.NodeID == was.NodeID || id.Cluster.ID != "" {
			t.Errorf("%s: %+v, %v", name, id, err)
		}
		if again, err := load(dir, "n1"); err != nil || again.NodeID != id.NodeID {
			t.Errorf("%s: then %+v, %v", name, again, err)
		}
	}
	t.Run("of a newer version", func(t *testing.T) {
		dir, _ := memberDir(t)
		newer := `{"format":2,"node_id":"abcdefghijkl","name":"n1"}`
		if err := os.WriteFile(identityPath(dir), []byte(newer), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := load(dir, "n1")
		if b, _ := os.ReadFile(identityPath(dir)); err == nil || !strings.Contains(err.Error(), "has format 2, this version of shoal reads 1") || string(b) != newer {
			t.Errorf("%v; the file is %s", err, b)
		}
	})
	t.Run("no name", func(t *testing.T) {
		if _, err := load(t.TempDir(), ""); err == nil || err.Error() != "no name" {
			t.Error(err)
		}
	})
	t.Run("keeps its name in a cluster", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(identityPath(dir), []byte(member), 0o600); err != nil {
			t.Fatal(err)
		}
		id, err := load(dir, "n2")
		if b, _ := os.ReadFile(identityPath(dir)); err != nil || id.Name != "n1" || string(b) != member {
			t.Errorf("got %+v, %v; the file is %s", id, err, b)
		}
	})
	t.Run("renamed while in no cluster", func(t *testing.T) {
		dir := t.TempDir()
		a, err := load(dir, "n1")
		if err != nil {
			t.Fatal(err)
		}
		b, err := load(dir, "n2")
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
