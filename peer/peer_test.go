package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

const testCluster = "testcluster1"

func newRoot(t *testing.T, cluster string, old *Root) *Root {
	t.Helper()
	r, err := NewRoot(cluster, old)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// certified makes credentials by a root that trust these roots.
func certified(t *testing.T, by *Root, s Subject, trust ...*Root) *Credentials {
	t.Helper()
	c, err := NewCredentials()
	if err != nil {
		t.Fatal(err)
	}
	certify(t, c, by, s, trust...)
	return c
}

func certify(t *testing.T, c *Credentials, by *Root, s Subject, trust ...*Root) {
	t.Helper()
	if s.Cluster == "" {
		s.Cluster = testCluster
	}
	if s.Serial == 0 {
		s.Serial = 1
	}
	der, err := by.Sign(c.Signer().Public(), s)
	if err != nil {
		t.Fatal(err)
	}
	roots := [][]byte{by.Cert.Raw}
	if len(trust) > 0 {
		roots = nil
	}
	for _, r := range trust {
		roots = append(roots, r.Cert.Raw)
	}
	if err := c.Set(append([][]byte{der}, by.Chain()...), roots); err != nil {
		t.Fatal(err)
	}
}

// list is a node list that a test changes.
type list struct {
	mu    sync.Mutex
	index uint64
	roles map[string]string
}

func (l *list) standing(id string) (string, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.roles[id], l.index
}

func (l *list) set(index uint64, roles map[string]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.index, l.roles = index, roles
}

// server is a node that answers with who calls.
type server struct {
	*Peer
	addr string
	raft *Conns
	last atomic.Pointer[Caller]
}

func serve(t *testing.T, cfg Config) *server {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{Peer: New(cfg), addr: ln.Addr().String()}
	api, raft := s.Listen(ln)
	s.raft = raft
	srv := s.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := CallerFrom(r.Context())
		s.last.Store(&c)
		b, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
			return
		}
		_, _ = io.WriteString(w, c.String()+string(b))
	}), slog.New(slog.DiscardHandler), nil)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(api) })
	t.Cleanup(func() {
		ln.Close()
		srv.Close()
		s.Close()
		wg.Wait()
	})
	return s
}

// post calls a path and returns the status and the answer.
func post(c *http.Client, addr, path, body string) (int, string, error) {
	req, err := http.NewRequest(http.MethodPost, "http://"+addr+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// dialer calls an address with credentials, whoever answers.
func dialer(t *testing.T, creds *Credentials) *http.Client {
	p := New(Config{Credentials: creds})
	c := client(func(ctx context.Context, _, addr string) (net.Conn, error) {
		conn, err := p.Dial(ctx, addr, ProtoAPI, nil)
		if err != nil {
			return nil, err
		}
		return conn, nil
	})
	t.Cleanup(func() {
		c.CloseIdleConnections()
		p.Close()
	})
	return c
}

const (
	userRPC  = "/shoal.v1.Control/CreateNetwork"
	nodeRPC  = "/shoal.v1.Control/Report"
	joinRPC  = "/shoal.v1.Control/JoinNode"
	localRPC = "/shoal.v1.Local/Leave"
)

// TestWhoGetsIn: who calls is known by its certificate and the node list, and may
// what the table says.
func TestWhoGetsIn(t *testing.T) {
	t.Parallel()
	root, other := newRoot(t, testCluster, nil), newRoot(t, testCluster, nil) // of the same name, even
	l := &list{}
	l.set(10, map[string]string{"boss": spec.RoleManager, "hand": spec.RoleWorker, "demoted": spec.RoleWorker, "promoted": spec.RoleManager})
	s := serve(t, Config{Credentials: certified(t, root, Subject{ID: "server", Role: spec.RoleManager}), Standing: l.standing})
	for name, k := range map[string]struct {
		creds *Credentials
		may   string // of u(ser), n(ode), j(oin)
		fails string // the connection does
	}{
		"manager":                       {creds: certified(t, root, Subject{ID: "boss", Role: spec.RoleManager}), may: "unj"},
		"worker":                        {creds: certified(t, root, Subject{ID: "hand", Role: spec.RoleWorker}), may: "n"},
		"worker, by certificate only":   {creds: certified(t, root, Subject{ID: "demoted", Role: spec.RoleManager}), may: "n"},
		"manager, by the list only":     {creds: certified(t, root, Subject{ID: "promoted", Role: spec.RoleWorker}), may: "n"},
		"removed":                       {creds: certified(t, root, Subject{ID: "gone", Role: spec.RoleManager, Serial: 9})},
		"newer than the list":           {creds: certified(t, root, Subject{ID: "new", Role: spec.RoleManager, Serial: 11}), may: "unj"},
		"promoted after the list":       {creds: certified(t, root, Subject{ID: "hand", Role: spec.RoleManager, Serial: 11}), may: "unj"},
		"another root of the same name": {creds: certified(t, other, Subject{ID: "boss", Role: spec.RoleManager}, root), fails: "certificate"},
		"another cluster, same root":    {creds: certified(t, root, Subject{ID: "boss", Role: spec.RoleManager, Cluster: "elsewhere"}), fails: "cluster"},
	} {
		t.Run(name, func(t *testing.T) {
			c := dialer(t, k.creds)
			for letter, path := range map[string]string{"u": userRPC, "n": nodeRPC, "j": joinRPC, "-": localRPC, ".": "/nothing"} {
				status, body, err := post(c, s.addr, path, "{}")
				switch {
				case k.fails != "":
					if err == nil {
						t.Errorf("%s: %d %s, want no connection", path, status, body)
					}
				case err != nil:
					t.Errorf("%s: %v", path, err)
				case strings.Contains(k.may, letter) != (status == http.StatusOK):
					t.Errorf("%s: %d %s", path, status, body)
				}
			}
		})
	}
	t.Run("nobody", func(t *testing.T) {
		c := Joiner(s.addr, root.Digest())
		defer c.CloseIdleConnections()
		for path, want := range map[string]int{userRPC: 401, nodeRPC: 401, joinRPC: 200, localRPC: 401, LeaderPath: 401, "/": 404, "/health/80": 200} {
			if status, body, err := post(c, s.addr, path, "{"+"}"[:0]); err != nil || status != want && !(path == "/" && status == 501) {
				t.Errorf("%s: %d %s %v, want %d", path, status, body, err, want)
			}
		}
		if status, _, err := post(c, s.addr, joinRPC, strings.Repeat("x", 65<<10)); err == nil && status == http.StatusOK {
			t.Error("a stranger sent 65 KiB")
		}
	})
	t.Run("a joining node tells nothing to", func(t *testing.T) {
		hand := serve(t, Config{Credentials: certified(t, root, Subject{ID: "hand", Role: spec.RoleWorker})})
		for what, k := range map[string]struct{ addr, digest, want string }{
			"another cluster": {s.addr, other.Digest(), "the join token is of another cluster"},
			"a worker":        {hand.addr, root.Digest(), "worker hand is no manager"},
		} {
			_, _, err := post(Joiner(k.addr, k.digest), k.addr, joinRPC, "secret")
			if err == nil || !strings.Contains(err.Error(), k.want) {
				t.Errorf("%s: %v, want %q", what, err, k.want)
			}
		}
		if c := hand.last.Load(); c != nil {
			t.Errorf("a worker was sent a call of %s", c)
		}
	})
	t.Run("a caller of managers tells nothing to a worker", func(t *testing.T) {
		hand := serve(t, Config{Credentials: certified(t, root, Subject{ID: "hand", Role: spec.RoleWorker})})
		p := New(Config{Credentials: certified(t, root, Subject{ID: "x", Role: spec.RoleWorker})})
		_, _, err := post(p.Managers(), hand.addr, nodeRPC, "{}")
		var he *HandshakeError
		if !errors.As(err, &he) || hand.last.Load() != nil {
			t.Errorf("%v, %v", err, hand.last.Load())
		}
		byID := p.NodesBy(func(string) (string, error) { return hand.addr, nil })
		if _, _, err := post(byID, "boss", nodeRPC, "{}"); err == nil || !strings.Contains(err.Error(), "worker hand answers, not node boss") {
			t.Errorf("another node: %v", err)
		}
		p.Close()
	})
	t.Run("raft", func(t *testing.T) {
		for name, k := range map[string]struct {
			creds *Credentials
			ok    bool
		}{
			"manager": {certified(t, root, Subject{ID: "boss", Role: spec.RoleManager}), true},
			"worker":  {certified(t, root, Subject{ID: "hand", Role: spec.RoleWorker}), false},
			"demoted": {certified(t, root, Subject{ID: "demoted", Role: spec.RoleManager}), false},
			"removed": {certified(t, root, Subject{ID: "gone", Role: spec.RoleManager}), false},
		} {
			p := New(Config{Credentials: k.creds})
			conn, err := p.Dial(t.Context(), s.addr, ProtoRaft, nil)
			if err == nil && !k.ok {
				_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
				_, err = conn.Read(make([]byte, 1)) // TLS 1.3: the other side's verdict comes after the handshake
			}
			if k.ok {
				in, aerr := s.raft.Accept()
				if err != nil || aerr != nil || in.(*Conn).Caller().ID != "boss" {
					t.Errorf("%s: %v, %v", name, err, aerr)
				}
			} else if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s speaks raft: %v", name, err)
			}
			p.Close()
		}
		// Nor without a certificate.
		conn, err := tls.Dial("tcp", s.addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ProtoRaft}})
		if err == nil {
			_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err = conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("nobody speaks raft: %v", err)
			}
			conn.Close()
		}
	})
	t.Run("without TLS", func(t *testing.T) {
		resp, err := http.Get("http://" + s.addr + "/health/80")
		if err == nil {
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				t.Errorf("plain HTTP: %s", b)
			}
		}
	})
}

// TestRemovedIsOut: the list changes while connections are open.
func TestRemovedIsOut(t *testing.T) {
	t.Parallel()
	root := newRoot(t, testCluster, nil)
	l := &list{}
	l.set(10, map[string]string{"boss": spec.RoleManager})
	s := serve(t, Config{Credentials: certified(t, root, Subject{ID: "server", Role: spec.RoleManager}), Standing: l.standing})
	c := dialer(t, certified(t, root, Subject{ID: "boss", Role: spec.RoleManager}))
	if status, body, err := post(c, s.addr, userRPC, "{}"); err != nil || status != 200 {
		t.Fatal(status, body, err)
	}
	l.set(11, map[string]string{"boss": spec.RoleWorker})
	if status, body, err := post(c, s.addr, userRPC, "{}"); err != nil || status == 200 {
		t.Errorf("demoted, on its old connection: %d %s %v", status, body, err)
	}
	l.set(12, map[string]string{})
	for _, path := range []string{userRPC, nodeRPC, joinRPC, "/health/80"} {
		status, body, err := post(c, s.addr, path, "{}")
		if err != nil || status == 200 || !strings.Contains(body, "node boss was removed from the cluster") {
			t.Errorf("removed, on its old connection: %s: %d %s %v", path, status, body, err)
		}
	}
	s.Recheck()
	for end := time.Now().Add(10 * time.Second); s.Stats().Open > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("its connections stay: %+v", s.Stats())
		}
	}
	// And on a new one.
	if status, body, err := post(c, s.addr, nodeRPC, "{}"); err == nil && status == 200 {
		t.Errorf("removed: %d %s", status, body)
	}
}

// TestSlowConnections: those who take their time are shed, and others served.
func TestSlowConnections(t *testing.T) {
	t.Parallel()
	root := newRoot(t, testCluster, nil)
	s := serve(t, Config{Credentials: certified(t, root, Subject{ID: "server", Role: spec.RoleManager})})
	var slow []net.Conn
	defer func() {
		for _, c := range slow {
			c.Close()
		}
	}()
	for range 400 {
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}).Dial("tcp4", s.addr)
		if err != nil {
			continue
		}
		slow = append(slow, c)
	}
	for end := time.Now().Add(10 * time.Second); s.Stats().Shed < 300; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d connections that say nothing: %+v", len(slow), s.Stats())
		}
	}
	if st := s.Stats(); st.Pending > pendingPerSource {
		t.Errorf("%+v", st)
	}
	// Another source is served meanwhile, and in the end so is this one.
	if status, body, err := post(dialer(t, certified(t, root, Subject{ID: "boss", Role: spec.RoleManager})), s.addr, userRPC, "{}"); err != nil || status != 200 {
		t.Errorf("another: %d %s %v", status, body, err)
	}
	start := time.Now()
	for end := start.Add(30 * time.Second); s.Stats().Pending > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after %s: %+v", time.Since(start), s.Stats())
		}
	}
}

// TestCalls: one caller's calls that are being answered are bounded, and counted
// down when they end.
func TestCalls(t *testing.T) {
	p := New(Config{})
	for _, c := range []Caller{{Kind: Worker, ID: "w"}, {Kind: Manager, ID: "m"}, {Kind: Stranger, Addr: netip.MustParseAddr("192.0.2.1")}} {
		n := 0
		for n < 5000 && p.begin(c) {
			n++
		}
		if n != callsOf(c) {
			t.Errorf("%s: %d calls at a time", c, n)
		}
		if !p.begin(Caller{Kind: c.Kind, ID: c.ID + "2", Addr: netip.MustParseAddr("192.0.2.9")}) {
			t.Errorf("another than %s must wait for it", c)
		}
		p.end(c)
		if !p.begin(c) {
			t.Errorf("%s: none after one has ended", c)
		}
	}
	local := Caller{Kind: Local, ID: "l"}
	for range 5000 {
		if !p.begin(local) {
			t.Fatal("users of the socket are bounded")
		}
	}
	for range 5000 {
		p.end(local)
	}
	if p.calls["l"] != 0 {
		t.Errorf("%d calls are left", p.calls["l"])
	}
}

// TestChangeOfRoot: nodes with certificates by the old and the new root, that
// trust one of them or both, understand each other as long as it takes.
func TestChangeOfRoot(t *testing.T) {
	t.Parallel()
	old := newRoot(t, testCluster, nil)
	next := newRoot(t, testCluster, old)
	type node struct{ by, trusts string }
	roots := func(s string) (out []*Root) {
		for _, r := range s {
			out = append(out, map[rune]*Root{'o': old, 'n': next}[r])
		}
		return out
	}
	for _, k := range []struct {
		a, b node
		ok   bool
	}{
		{node{"o", "o"}, node{"o", "on"}, true},
		{node{"o", "o"}, node{"n", "on"}, true}, // by the cross-signed one
		{node{"o", "on"}, node{"n", "on"}, true},
		{node{"n", "on"}, node{"n", "n"}, true},
		{node{"o", "o"}, node{"n", "n"}, false}, // it was away all the time
	} {
		s := serve(t, Config{Credentials: certified(t, roots(k.b.by)[0], Subject{ID: "b", Role: spec.RoleManager}, roots(k.b.trusts)...)})
		c := dialer(t, certified(t, roots(k.a.by)[0], Subject{ID: "a", Role: spec.RoleManager}, roots(k.a.trusts)...))
		if status, body, err := post(c, s.addr, userRPC, "{}"); (err == nil && status == 200) != k.ok {
			t.Errorf("%+v calls %+v: %d %s %v", k.a, k.b, status, body, err)
		}
	}
}

func TestToken(t *testing.T) {
	root := newRoot(t, testCluster, nil)
	tok := Token{root.Digest(), NewSecret()}
	if got, err := ParseToken(" " + tok.String() + "\n"); err != nil || got != tok {
		t.Errorf("%v, %v, want %v", got, err, tok)
	}
	whole := tok.String()
	for in, want := range map[string]string{
		"":                          "no join token is given",
		"SWMTKN-1-abc-def":          "Docker Swarm",
		"hello":                     "not have that form",
		"SHOAL-2-a-b":               "not have that form",
		whole[:len(whole)-1]:        "secret is cut",
		whole + "a":                 "secret is cut",
		"SHOAL-1-abc-" + tok.Secret: "digest is cut",
		"SHOAL-1-" + tok.Digest + "-" + tok.Digest: "secret is cut",
	} {
		if _, err := ParseToken(in); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), tok.Secret[:10]) {
			t.Errorf("%q: %v, want %q", in, err, want)
		}
	}
	if a, b := NewSecret(), NewSecret(); a == b {
		t.Error("secrets repeat")
	}
}

// TestTries: wrong tokens of one source are limited, those of others not, and so
// is what is remembered.
func TestTries(t *testing.T) {
	p := New(Config{})
	bad, good := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	for range triesBurst {
		if !p.MayTry(bad) {
			t.Fatal("limited too early")
		}
		p.WrongToken(bad)
	}
	if p.MayTry(bad) || !p.MayTry(good) {
		t.Error("wrong tokens are not limited by source")
	}
	for i := range 3 * triesSources {
		p.WrongToken(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	if len(p.tries) > triesSources {
		t.Errorf("%d sources are remembered", len(p.tries))
	}
	if a, b := prefixOf(netip.MustParseAddr("2001:db8::1")), prefixOf(netip.MustParseAddr("2001:db8::ffff")); a != b {
		t.Errorf("%s and %s are of one machine", a, b)
	}
}

// TestCredentialsFile: what is read back is what was written, nobody else can
// read it, and a damaged file is an error that names it.
func TestCredentialsFile(t *testing.T) {
	root := newRoot(t, testCluster, nil)
	c := certified(t, root, Subject{ID: "n1", Role: spec.RoleWorker, Serial: 7})
	path := Path(t.TempDir())
	if err := c.Save(path); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	a, _ := c.Info()
	b, ok := got.Info()
	if !ok || a.Subject != b.Subject || !a.Until.Equal(b.Until) || b.Root != root.Digest() || string(got.PublicKey()) != string(c.PublicKey()) {
		t.Errorf("%+v, want %+v", b, a)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(t.TempDir(), "node.pem")
	for n := 0; n < len(whole)-1; n += 97 {
		if err := os.WriteFile(bad, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(bad); err != nil && !strings.Contains(err.Error(), bad) {
			t.Errorf("cut to %d: %v", n, err)
		} else if err == nil && n < len(whole)-700 {
			t.Errorf("cut to %d bytes of %d it is taken", n, len(whole))
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
}

// TestDue: a certificate is renewed by the wall clock or the monotonic one,
// whichever is first.
func TestDue(t *testing.T) {
	root := newRoot(t, testCluster, nil)
	c := certified(t, root, Subject{ID: "n1", Role: spec.RoleWorker})
	if c.Due() {
		t.Error("a new one is due")
	}
	for _, age := range []time.Duration{CertificateLife * 81 / 100, 10 * CertificateLife} {
		c.since = time.Now().Add(-age)
		if !c.Due() {
			t.Errorf("%s after it was set, by the monotonic clock, it is not due", age)
		}
	}
	now := time.Now()
	der, err := root.signFor(c.Signer().Public(), Subject{ID: "n1", Role: spec.RoleWorker, Cluster: testCluster, Serial: 2}, now.Add(-CertificateLife*81/100-backdate), now.Add(CertificateLife*19/100))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Set([][]byte{der}, [][]byte{root.Cert.Raw}); err != nil {
		t.Fatal(err)
	}
	if !c.Due() {
		t.Error("at 81 % of its life it is not due")
	}
	for _, x := range []float64{0, 0.5, 1} {
		if r := RenewAt(x); r < 0.5 || r > 0.8 {
			t.Errorf("RenewAt(%v) = %v", x, r)
		}
	}
}

// TestClocks: a machine a day behind or ahead takes a new certificate; an ended
// one is refused, with the reason.
func TestClocks(t *testing.T) {
	t.Parallel()
	root := newRoot(t, testCluster, nil)
	s := serve(t, Config{Credentials: certified(t, root, Subject{ID: "server", Role: spec.RoleManager})})
	for name, k := range map[string]struct {
		off time.Duration // of the clock of who signed
		ok  bool
	}{"a day ahead": {24 * time.Hour, true}, "a day behind": {-24 * time.Hour, true}, "two days ahead": {48 * time.Hour, false}, "ended": {-91 * 24 * time.Hour, false}} {
		c, err := NewCredentials()
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now().Add(k.off)
		der, err := root.signFor(c.Signer().Public(), Subject{ID: "n", Role: spec.RoleManager, Cluster: testCluster, Serial: 1}, now.Add(-backdate), now.Add(CertificateLife))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Set([][]byte{der}, [][]byte{root.Cert.Raw}); err != nil {
			t.Fatal(err)
		}
		if status, _, err := post(dialer(t, c), s.addr, userRPC, "{}"); (err == nil && status == 200) != k.ok {
			t.Errorf("%s: %d %v", name, status, err)
		}
		if !k.ok {
			ended := serve(t, Config{Credentials: c})
			_, _, err := post(dialer(t, certified(t, root, Subject{ID: "a", Role: spec.RoleManager})), ended.addr, userRPC, "{}")
			if err == nil || !strings.Contains(err.Error(), "the clock here says") {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// TestSignatures: what a node signed can be checked by its public key, for its
// purpose only.
func TestSignatures(t *testing.T) {
	c := certified(t, newRoot(t, testCluster, nil), Subject{ID: "n1", Role: spec.RoleWorker})
	pub, err := ParsePublic(c.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	sig, err := Sign(c.Signer(), "gossip", []byte("record"))
	if err != nil {
		t.Fatal(err)
	}
	if !pub.Verify("gossip", []byte("record"), sig) {
		t.Error("refused")
	}
	if pub.Verify("other", []byte("record"), sig) || pub.Verify("gossip", []byte("record2"), sig) || pub.Verify("gossip", []byte("record"), nil) || (PublicKey{}).Verify("gossip", []byte("record"), sig) {
		t.Error("taken")
	}
	for _, bad := range [][]byte{nil, []byte("x"), make([]byte, 1<<20)} {
		if _, err := ParsePublic(bad); err == nil {
			t.Error("a public key that is none is taken")
		}
		if _, err := CheckRequest(bad); err == nil {
			t.Error("a request that is none is taken")
		}
	}
	csr, err := Request(c.Signer())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := CheckRequest(csr); err != nil {
		t.Error(err)
	}
	csr[len(csr)-3]++ // its signature
	if _, err := CheckRequest(csr); err == nil {
		t.Error("a request by who does not have the key is taken")
	}
}

func BenchmarkHandshake(b *testing.B) {
	root, err := NewRoot(testCluster, nil)
	if err != nil {
		b.Fatal(err)
	}
	mk := func(id string) *Credentials {
		c, _ := NewCredentials()
		der, err := root.Sign(c.Signer().Public(), Subject{ID: id, Role: spec.RoleManager, Cluster: testCluster, Serial: 1})
		if err != nil {
			b.Fatal(err)
		}
		if err := c.Set(append([][]byte{der}, root.Chain()...), [][]byte{root.Cert.Raw}); err != nil {
			b.Fatal(err)
		}
		return c
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	s := New(Config{Credentials: mk("a")})
	api, _ := s.Listen(ln)
	go func() {
		for {
			c, err := api.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	p := New(Config{Credentials: mk("b")})
	b.ResetTimer()
	for b.Loop() {
		c, err := p.Dial(b.Context(), ln.Addr().String(), ProtoAPI, IsManager)
		if err != nil {
			b.Fatal(err)
		}
		_, _ = c.Read(make([]byte, 1))
		c.Close()
	}
}
