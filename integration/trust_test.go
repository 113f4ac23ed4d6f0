package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/lab"
	"github.com/shoalnet/shoal/peer"
)

// thief calls a node from the underlay with a certificate that it has stolen.
func (s site) thief(t *testing.T, creds *peer.Credentials, node string) *http.Client {
	p := peer.New(peer.Config{Credentials: creds})
	transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, _, _ string) (conn net.Conn, err error) {
		derr := nl.Do("shoal-"+s.Name+"-underlay", func() error {
			conn, err = p.Dial(ctx, net.JoinHostPort(s.addrOf(node), "2377"), peer.ProtoAPI, nil)
			return err
		})
		if derr != nil {
			return nil, derr
		}
		return conn, nil
	}}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(p.Close)
	return &http.Client{Transport: transport, Timeout: 20 * time.Second}
}

func (s site) dataDir(node string) string {
	for _, n := range s.Nodes() {
		if n.Name == node {
			return filepath.Join(n.Dir, "data")
		}
	}
	s.Fatalf("no node %s", node)
	return ""
}

func (s site) steal(node string) *peer.Credentials {
	s.Helper()
	c, err := peer.Load(peer.Path(s.dataDir(node)))
	if err != nil {
		s.Fatal(err)
	}
	return c
}

// TestTrust attacks a cluster from its underlay: without a certificate, with
// tokens that are worth nothing, with a worker's and a removed node's key, and
// with connections that take their time.
func TestTrust(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "ittrust", lab.Options{Nodes: 3, Managers: 1})
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")

	t.Run("keys are the node's own", func(t *testing.T) {
		for _, n := range s.Nodes() {
			fi, err := os.Stat(peer.Path(s.dataDir(n.Name)))
			if err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", n.Name, fi, err)
			}
		}
		r := s.on("node1", "shoal", "run", "--rm", "--network", "host", "--", "cat", peer.Path(s.dataDir("node1")))
		if r.code == 0 || strings.Contains(r.out, "KEY") {
			t.Errorf("a task reads the node's key: %s", r.out)
		}
	})

	t.Run("without a certificate", func(t *testing.T) {
		for _, path := range []string{"/shoal.v1.Control/ListNodes", "/shoal.v1.Control/RemoveNode", "/shoal.v1.Node/Tasks", "/shoal.v1.Local/Info", "/debug/pprof/"} {
			for _, n := range []string{"node1", "node2"} {
				out, _ := s.client("curl", "-sk", "-m", "5", "-w", " %{http_code}", "-H", "Content-Type: application/json", "-d", "{}", "https://"+s.addrOf(n)+":2377"+path)
				if !strings.HasSuffix(out, " 401") && !strings.HasSuffix(out, " 404") && !strings.HasSuffix(out, " 501") {
					t.Errorf("%s%s: %s", n, path, out)
				}
			}
		}
		if out, _ := s.client("curl", "-s", "-m", "5", "http://"+s.addrOf("node1")+":2377/shoal.v1.Control/leader"); strings.Contains(out, "2377") {
			t.Errorf("plain HTTP: %s", out)
		}
	})

	t.Run("with a worker's key", func(t *testing.T) {
		stolen := s.steal("node2")
		ctl := shoalv1connect.NewControlClient(s.thief(t, stolen, "node1"), "http://x")
		ctx := t.Context()
		var ids = map[string]string{}
		for _, n := range s.nodeIDs() {
			ids[n[0]] = n[1]
		}
		for what, call := range map[string]func() error{
			"a network": func() error {
				_, err := ctl.CreateNetwork(ctx, connect.NewRequest(&shoalv1.CreateNetworkRequest{Name: "evil"}))
				return err
			},
			"services": func() error {
				_, err := ctl.ListServices(ctx, connect.NewRequest(&shoalv1.ListServicesRequest{}))
				return err
			},
			"tokens": func() error {
				_, err := ctl.ShowToken(ctx, connect.NewRequest(&shoalv1.ShowTokenRequest{Role: "manager"}))
				return err
			},
			"promotion": func() error {
				role := "manager"
				_, err := ctl.UpdateNode(ctx, connect.NewRequest(&shoalv1.UpdateNodeRequest{Ref: "node2", Role: &role}))
				return err
			},
			"another's report": func() error {
				_, err := ctl.Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: ids["node3"]}))
				return err
			},
			"another's leave": func() error {
				_, err := ctl.LeaveNode(ctx, connect.NewRequest(&shoalv1.LeaveNodeRequest{Node: ids["node3"]}))
				return err
			},
			"exec on a worker": func() error {
				c := shoalv1connect.NewNodeClient(s.thief(t, stolen, "node3"), "http://x")
				_, err := c.Tasks(ctx, connect.NewRequest(&shoalv1.TasksRequest{}))
				return err
			},
		} {
			if err := call(); connect.CodeOf(err) != connect.CodePermissionDenied {
				t.Errorf("%s: %v", what, err)
			}
		}
		p := peer.New(peer.Config{Credentials: stolen})
		defer p.Close()
		err := nl.Do("shoal-"+s.Name+"-underlay", func() error {
			c, err := p.Dial(ctx, s.addrOf("node1")+":2377", peer.ProtoRaft, nil)
			if err != nil {
				return nil
			}
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
				return fmt.Errorf("a worker's raft connection stays: %v", err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		s.fails("node2", s.addrOf("node1"), "shoal net create evil") // and says where to go
	})

	t.Run("tokens", func(t *testing.T) {
		s.ok("node3", "shoal leave")
		worker := s.ok("node1", "shoal token show -q worker")
		foreign := s.ok("node3", "shoal init --advertise-addr 172.30.0.3")
		foreign = foreign[strings.Index(foreign, "SHOAL-1-"):]
		foreign, _, _ = strings.Cut(foreign, " ")
		s.ok("node3", "shoal leave --force")
		rotated := worker
		worker = s.ok("node1", "shoal token rotate -q worker")
		digest := strings.Join(strings.Split(worker, "-")[:3], "-")
		for want, token := range map[string]string{"another cluster": foreign, "was rotated": rotated, "is wrong": digest + "-" + peer.NewSecret()} {
			start := time.Now()
			s.fails("node3", want, "shoal join --token %s 172.30.0.1", token)
			if d := time.Since(start); d > slow(5*time.Second) {
				t.Errorf("%s: refused after %s", want, d)
			}
		}
		s.fails("node3", "no join token", "shoal join 172.30.0.1")
		s.fails("node3", "for a worker", "shoal join --role manager --token %s 172.30.0.1", worker)
		s.fails("node3", "worker", "shoal join --token %s 172.30.0.2", worker) // which is one
		s.fails("node3", "no cluster", "shoal net ls")
		s.ok("node3", "shoal join --token %s 172.30.0.1", worker)
	})

	t.Run("slow connections", func(t *testing.T) {
		var conns []net.Conn
		err := nl.Do("shoal-"+s.Name+"-underlay", func() error {
			d := net.Dialer{Timeout: time.Second}
			for range 2000 {
				if c, err := d.Dial("tcp", s.addrOf("node1")+":2377"); err == nil {
					conns = append(conns, c)
				}
			}
			return nil
		})
		defer func() {
			for _, c := range conns {
				c.Close()
			}
		}()
		if err != nil {
			t.Fatal(err)
		}
		s.ok("node1", "shoal net create meanwhile")
		s.eventually(slow(20*time.Second), func() error {
			out := s.ok("node1", "ss -Htn state established sport = :2377")
			if n := strings.Count(out, lab.Outside.String()); n > 64 {
				return fmt.Errorf("%d of %d connections are held", n, len(conns))
			}
			return nil
		})
		s.eventually(slow(20*time.Second), func() error {
			out := s.ok("node1", "ss -Htn state established sport = :2377")
			if n := strings.Count(out, lab.Outside.String()); n > 0 {
				return fmt.Errorf("%d of %d connections are held", n, len(conns))
			}
			return nil
		})
	})

	t.Run("nothing readable on the wire", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "pcap")
		cmd := exec.Command("tcpdump", "-i", "br0", "-U", "-s", "0", "-w", file, "tcp", "port", "2377")
		if _, err := exec.LookPath("tcpdump"); err != nil {
			t.Skip("no tcpdump")
		}
		if err := nl.Do("shoal-"+s.Name+"-underlay", cmd.Start); err != nil {
			t.Fatal(err)
		}
		s.eventually(slow(10*time.Second), func() error {
			s.ok("node1", "shoal svc create -q -d --name readable-name --label readable=label --replicas 0 -- /bin/readable")
			s.ok("node1", "shoal svc rm readable-name")
			fi, err := os.Stat(file)
			if err != nil || fi.Size() < 5000 {
				return fmt.Errorf("nothing is captured yet: %v", err)
			}
			return nil
		})
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range []string{"readable", "shoal.v1", "POST", "node1", "whoami", "PRI *"} {
			if strings.Contains(string(b), word) {
				t.Errorf("%q is readable in %d bytes captured", word, len(b))
			}
		}
	})

	t.Run("with a removed node's disk", func(t *testing.T) {
		stolen := s.steal("node3")
		info, _ := stolen.Info()
		if err := s.KillAgent("node3"); err != nil { // it does not hear of it
			t.Fatal(err)
		}
		s.ok("node1", "shoal node rm --force node3")
		for _, n := range []string{"node1", "node2"} {
			s.eventually(slow(5*time.Second), func() error {
				ctl := shoalv1connect.NewControlClient(s.thief(t, stolen, n), "http://x")
				_, err := ctl.Report(t.Context(), connect.NewRequest(&shoalv1.ReportRequest{Node: info.ID}))
				if err == nil || !strings.Contains(err.Error(), "was removed from the cluster") {
					return fmt.Errorf("%s: %v", n, err)
				}
				return nil
			})
		}
		// The node itself finds out, and leaves.
		if err := s.Start(t.Context(), "node3"); err != nil {
			t.Fatal(err)
		}
		s.eventually(slow(30*time.Second), func() error {
			if out := s.ok("node3", "shoal info -o json"); !strings.Contains(out, `"cluster": ""`) {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
	})

	t.Run("a data directory of before", func(t *testing.T) {
		// As a version without certificates left it.
		path := filepath.Join(s.dataDir("node3"), "node.json")
		if err := s.KillAgent("node3"); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var id map[string]any
		if err := json.Unmarshal(b, &id); err != nil {
			t.Fatal(err)
		}
		id["cluster"], id["number"], id["role"], id["addr"], id["control_port"], id["gossip_port"] = map[string]any{"id": "oldcluster", "pools": []string{"10.0.0.0/8"}, "subnet_size": 24, "data_path_port": 4789}, 1, "manager", "172.30.0.3", 2377, 7946
		delete(id, "sum")
		old, _ := json.Marshal(id)
		if err := os.WriteFile(path, old, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(s.dataDir("node3"), "raft"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(s.dataDir("node3"), "raft", "log.db"), []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(t.Context(), "node3"); err != nil {
			t.Fatal(err)
		}
		s.fails("node3", "before nodes had certificates", "shoal net ls")
		if r := s.on("node3", "shoal", "doctor"); r.code != 1 || !strings.Contains(r.out, "shoal leave --force") {
			t.Errorf("doctor: %d %s", r.code, r.out)
		}
		if got, _ := os.ReadFile(path); string(got) != string(old) {
			t.Errorf("node.json was changed: %s", got)
		}
		if got, _ := os.ReadFile(filepath.Join(s.dataDir("node3"), "raft", "log.db")); string(got) != "precious" {
			t.Errorf("the log was changed: %q", got)
		}
		s.ok("node3", "shoal leave --force")
		s.ok("node3", "shoal join --token %s 172.30.0.1", s.ok("node1", "shoal token show -q manager"))
		s.ok("node3", "shoal net ls")
	})
}

// nodeIDs are names and IDs.
func (s site) nodeIDs() (out [][2]string) {
	for line := range strings.Lines(s.ok("node1", "shoal node ls --format '{{.Name}} {{.ID}}'")) {
		f := strings.Fields(line)
		out = append(out, [2]string{f[0], f[1]})
	}
	return out
}

// TestAutolock: what managers keep on their disks can't be read without the
// unlock key, which a manager asks for after a start.
func TestAutolock(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "itlock", lab.Options{Nodes: 3, NoInit: true})
	out := s.ok("node1", "shoal init --autolock --advertise-addr 172.30.0.1")
	key := strings.TrimSpace(out[strings.Index(out, "SHOALKEY-1-"):])
	token := s.ok("node1", "shoal token show -q manager")
	for _, n := range []string{"node2", "node3"} {
		s.ok(n, "shoal join --token %s --advertise-addr %s 172.30.0.1", token, s.addrOf(n))
	}
	s.ok("node1", "shoal net create readable-network")
	if got := s.ok("node2", "shoal unlock-key -q"); got != key {
		t.Errorf("the unlock key is %s, not %s", got, key)
	}
	s.eventually(slow(10*time.Second), func() error { // that a manager has it is no secret
		if out := s.ok("node3", "shoal net ls"); !strings.Contains(out, "readable-network") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	for _, n := range s.Nodes() {
		err := filepath.Walk(filepath.Join(n.Dir, "data", "raft"), func(path string, fi os.FileInfo, err error) error {
			if err != nil || fi.IsDir() {
				return err
			}
			b, err := os.ReadFile(path)
			for _, word := range []string{"readable-network", strings.Split(token, "-")[3], "create_network", key} {
				if strings.Contains(string(b), word) {
					t.Errorf("%s has %q in it", path, word)
				}
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	restart := func(n string) {
		t.Helper()
		if err := s.KillAgent(n); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	unlock := func(n, key, want string) {
		t.Helper()
		if r := s.in(key, n, "shoal", "unlock"); (r.code == 0) != (want == "") || !strings.Contains(r.err, want) {
			t.Errorf("%s: unlock: %d %s, want %q", n, r.code, r.err, want)
		}
	}
	unlock("node1", key, "not locked")
	restart("node3")
	s.eventually(slow(20*time.Second), func() error {
		if r := s.on("node3", "shoal", "doctor"); !strings.Contains(r.out, "shoal unlock") {
			return fmt.Errorf("%s", r.out)
		}
		return nil
	})
	s.ok("node3", "shoal net ls") // the others answer
	unlock("node3", "SHOALKEY-1-short", "no unlock key")
	unlock("node3", out[strings.Index(out, "SHOALKEY-1-"):len(out)-3], "no unlock key") // cut
	rotated := s.ok("node1", "shoal unlock-key -q --rotate")
	unlock("node3", rotated, "wrong")
	unlock("node3", key+"\n", "") // the one from before its start
	s.eventually(slow(20*time.Second), func() error {
		if out := s.ok("node3", "shoal doctor"); strings.Contains(out, "unlock") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	// From now on it is the new one.
	s.eventually(slow(30*time.Second), func() error {
		b, err := os.ReadFile(filepath.Join(s.dataDir("node3"), "lock.json"))
		if err != nil || !strings.Contains(string(b), `"generation":2`) {
			return fmt.Errorf("%s, %v", b, err)
		}
		return nil
	})
	restart("node3")
	unlock("node3", key, "wrong")
	unlock("node3", rotated, "")
	s.ok("node3", "shoal net ls")
}

// TestPromotedWithAFullDisk: a node whose disk is full while it is made a manager becomes
// one when there is room again: with its certificate kept, with a lock, and shown to the
// others as what it is. It went on as a worker for them, and waited for ever.
func TestPromotedWithAFullDisk(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "itfull", lab.Options{Nodes: 2, NoInit: true})
	s.ok("node1", "shoal init --autolock --advertise-addr 172.30.0.1")
	data := s.dataDir("node2")
	if err := s.KillAgent("node2"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(data, 0o700), syscall.Mount("tmpfs", data, "tmpfs", 0, "size=64m")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(data, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	s.ok("node2", "shoal join --token %s --advertise-addr 172.30.0.2 172.30.0.1", s.ok("node1", "shoal token show -q worker"))

	ballast := filepath.Join(data, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 4
		}
	}
	f.Close()
	promoted := make(chan result, 1)
	go func() { promoted <- s.on("node1", "shoal", "node", "promote", "node2") }()
	s.eventually(slow(30*time.Second), func() error {
		if r := s.on("node2", "shoal", "doctor"); r.code == 0 || !strings.Contains(r.out, "no space left on device") || !strings.Contains(r.out, "certificate") {
			return fmt.Errorf("doctor: %d %s", r.code, r.out)
		}
		return nil
	})
	s.eventually(slow(30*time.Second), func() error {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(data), "agent.log"))
		if n := strings.Count(string(b), "can't be brought up to date"); err != nil || n < 2 {
			return fmt.Errorf("tried %d times: %v", n, err)
		}
		return nil
	})
	if _, err := os.Stat(filepath.Join(data, "raft", "log.db")); err == nil {
		t.Error("it has a managers' log before it has a certificate for that")
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(60*time.Second), func() error {
		if r := s.on("node2", "shoal", "doctor"); r.code != 0 {
			return fmt.Errorf("doctor: %d %s", r.code, r.out)
		}
		if out := s.ok("node2", "shoal info -o json"); !strings.Contains(out, `"role": "manager"`) {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if r := <-promoted; r.code != 0 {
		t.Logf("node promote: %d %s", r.code, r.err) // it waits for as long as it says
	}
	creds, err := peer.Load(peer.Path(data))
	if err != nil {
		t.Fatal(err)
	}
	if info, _ := creds.Info(); info.Role != "manager" {
		t.Errorf("the certificate that is kept is a %s's", info.Role)
	}
	if _, err := os.Stat(filepath.Join(data, "lock.json")); err != nil {
		t.Errorf("no lock, though all managers have one: %v", err)
	}
	s.ok("node2", "shoal net create made-there")

	// And the other way: what it had as a manager goes once the disk lets it.
	store := filepath.Join(data, "raft")
	stuck := filepath.Join(store, "stuck")
	if err := errors.Join(os.Mkdir(stuck, 0o700), syscall.Mount("tmpfs", stuck, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	s.ok("node1", "shoal node demote node2")
	s.eventually(slow(30*time.Second), func() error {
		if r := s.on("node2", "shoal", "doctor"); !strings.Contains(r.out, "the managers' log of before can't be removed") {
			return fmt.Errorf("doctor: %d %s", r.code, r.out)
		}
		return nil
	})
	if err := syscall.Unmount(stuck, 0); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(60*time.Second), func() error {
		if _, err := os.Stat(store); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s: %v", store, err)
		}
		if r := s.on("node2", "shoal", "doctor"); r.code != 0 {
			return fmt.Errorf("doctor: %d %s", r.code, r.out)
		}
		return nil
	})
}
