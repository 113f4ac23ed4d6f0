package control

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/raft"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// fakeManager answers LeaderPath with what leader returns, and everything else
// by serve.
func fakeManager(t *testing.T, leader func() string, serve http.HandlerFunc) string {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc(peer.LeaderPath, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, leader()) })
	mux.HandleFunc("/", serve)
	p := peer.New(peer.Config{Credentials: credentials(t, testRoot, spec.NewID(), spec.RoleManager)})
	ln := listen(t)
	api, _ := p.Listen(ln)
	s := p.Server(mux, slog.New(slog.DiscardHandler), nil)
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(api) })
	t.Cleanup(func() {
		ln.Close()
		s.Close()
		p.Close()
		wg.Wait()
	})
	return ln.Addr().String()
}

// newAsker makes a node that has a manager's certificate, and whose part of the
// managers does not run: it has to ask others for everything.
func newAsker(t *testing.T) *simNode {
	n := newNode(t, "asker", spec.RoleWorker)
	n.shows = spec.RoleManager
	return n
}

func notLeader(w http.ResponseWriter, r *http.Request) {
	w.Header().Set(notLeaderHeader, "1")
	_ = connect.NewErrorWriter().Write(w, r, errNotLeader())
}

// TestForwarderWithoutLeader: with nobody to ask, the answer comes after the
// wait for a leader and says what to look at. A caller with less patience is
// let go.
func TestForwarderWithoutLeader(t *testing.T) {
	t.Parallel()
	n := newAsker(t)
	n.wait = time.Second
	n.start()
	dead := nobody(t)
	deaf := fakeManager(t, func() string { return "" }, notLeader)
	n.sees = []string{dead, deaf}

	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	_, err := n.ctl.ListNetworks(ctx, connect.NewRequest(&shoalv1.ListNetworksRequest{}))
	if connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Errorf("a caller without patience: %v", err)
	}
	start := time.Now()
	_, err = n.ctl.ListNetworks(testCtx(t), connect.NewRequest(&shoalv1.ListNetworksRequest{}))
	if connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "no manager leads the cluster") {
		t.Errorf("without a leader: %v", err)
	}
	if d := time.Since(start); d < n.wait || d > n.wait+10*time.Second {
		t.Errorf("the answer came after %s, want about %s", d, n.wait)
	}
}

// TestForwarderWithoutMajority: while too few managers answer to elect a leader,
// waiting for one is in vain; the answer names who is missing.
func TestForwarderWithoutMajority(t *testing.T) {
	t.Parallel()
	p := peer.New(peer.Config{Credentials: credentials(t, testRoot, spec.NewID(), spec.RoleWorker)})
	t.Cleanup(p.Close)
	f := NewForwarder(ForwarderConfig{Peer: p, Managers: func() []string { return nil }})
	dead := nobody(t)
	deaf := fakeManager(t, func() string { return "" }, notLeader)
	for _, c := range []struct {
		managers []string
		majority bool
		silent   int
	}{
		{nil, false, 0},
		{[]string{deaf}, true, 0},
		{[]string{dead}, false, 1},
		{[]string{deaf, dead}, false, 1},
		{[]string{deaf, dead, deaf}, true, 1},
	} {
		f.cfg.Managers = func() []string { return c.managers }
		leader, silent, majority := f.findLeader(testCtx(t), nil)
		if leader != "" || majority != c.majority || len(silent) != c.silent {
			t.Errorf("%v: leader %q, majority %v, no answer from %v", c.managers, leader, majority, silent)
		}
	}
}

// TestForwarderOfAnotherCluster: an address that has become another cluster's is
// not asked, so that what it does not know of is not taken for removed.
func TestForwarderOfAnotherCluster(t *testing.T) {
	t.Parallel()
	m := newNode(t, "manager", spec.RoleManager)
	m.start()
	if _, err := m.mgr.Bootstrap(testCtx(t), testCluster, testTrust); err != nil {
		t.Fatal(err)
	}
	_, stranger, err := NewTrust("anothercluster")
	if err != nil {
		t.Fatal(err)
	}
	for in, c := range map[string]struct {
		root *peer.Root
		want string
	}{"the same": {testRoot, ""}, "another": {stranger, "no answer from " + m.addr()}} {
		n := newAsker(t)
		n.root, n.sees, n.wait = c.root, []string{m.addr()}, time.Second
		n.start()
		_, err := n.ctl.ListNetworks(testCtx(t), connect.NewRequest(&shoalv1.ListNetworksRequest{}))
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("a node of %s cluster asks: %v, want %q", in, err, c.want)
		}
		if r := n.fwd.Refusal(); (r == "") != (c.want == "") {
			t.Errorf("a node of %s cluster asks: refusal %q", in, r)
		}
	}
}

// TestCutIsNoRefusal: a manager whose agent ends or hangs as it is asked says nothing of
// certificates; nor does what was said before a leader was found that this node follows.
func TestCutIsNoRefusal(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"cut", "hangs"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var conns sync.WaitGroup
		conns.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				if how == "cut" {
					_ = c.(*net.TCPConn).SetLinger(0) // a reset, as of a process that was killed
					_ = c.Close()
				} else {
					conns.Go(func() { _, _ = io.Copy(io.Discard, c); c.Close() })
				}
			}
		})
		n := newAsker(t)
		n.sees, n.wait = []string{l.Addr().String()}, time.Second
		n.start()
		if _, err := n.ctl.ListNetworks(testCtx(t), connect.NewRequest(&shoalv1.ListNetworksRequest{})); err == nil {
			t.Errorf("%s: the call was answered", how)
		}
		if r := n.fwd.Refusal(); r != "" {
			t.Errorf("%s: said to be a matter of certificates: %s", how, r)
		}
		l.Close()
		t.Cleanup(conns.Wait) // once the asker has ended
	}

	m := newNode(t, "manager", spec.RoleManager)
	m.start()
	if _, err := m.mgr.Bootstrap(testCtx(t), testCluster, testTrust); err != nil {
		t.Fatal(err)
	}
	was := "handshake with 192.0.2.1:2377: bad certificate"
	m.fwd.refusal.Store(&was)
	if _, err := m.ctl.ListNetworks(testCtx(t), connect.NewRequest(&shoalv1.ListNetworksRequest{})); err != nil {
		t.Fatal(err)
	}
	if r := m.fwd.Refusal(); r != "" {
		t.Errorf("a manager that leads still says: %s", r)
	}
}

// TestForwarderOfOlderLeader: a leader that does not know a command is of an older
// build, and that is what the caller is told, not what is there at which path.
func TestForwarderOfOlderLeader(t *testing.T) {
	t.Parallel()
	n := newAsker(t)
	var addr string
	addr = fakeManager(t, func() string { return addr }, func(w http.ResponseWriter, r *http.Request) {
		_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeUnimplemented, fmt.Errorf("there is nothing at %q", r.URL.Path)))
	})
	n.sees = []string{addr}
	n.start()
	_, err := n.ctl.CreateBlob(testCtx(t), connect.NewRequest(&shoalv1.CreateBlobRequest{}))
	if want := "the managers' leader at " + addr + " runs an older shoal, which does not know CreateBlob: upgrade shoal there"; connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(fmt.Sprint(err), want) {
		t.Errorf("%v\nwant %s", err, want)
	}
}

// TestForwarderOfNothingFound: that there is no such thing is an answer like any, and
// no sign of a leader's age, although it has the status (404) of a path that is not
// there.
func TestForwarderOfNothingFound(t *testing.T) {
	t.Parallel()
	n := newAsker(t)
	var addr string
	addr = fakeManager(t, func() string { return addr }, func(w http.ResponseWriter, r *http.Request) {
		_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeNotFound, fmt.Errorf("no such task: c1")))
	})
	n.sees = []string{addr}
	n.start()
	_, err := n.ctl.ListTasks(testCtx(t), connect.NewRequest(&shoalv1.ListTasksRequest{Refs: []string{"c1"}}))
	if connect.CodeOf(err) != connect.CodeNotFound || !strings.Contains(err.Error(), "no such task: c1") {
		t.Errorf("%v", err)
	}
}

// TestForwarderNamesWhatFailed: an answer that nobody leads also says what was
// tried last.
func TestForwarderNamesWhatFailed(t *testing.T) {
	t.Parallel()
	n := newAsker(t)
	n.wait = time.Second
	n.start()
	var self string
	self = fakeManager(t, func() string { return self }, notLeader) // thinks it leads, and does not
	n.sees = []string{self}
	_, err := n.ctl.ListNetworks(testCtx(t), connect.NewRequest(&shoalv1.ListNetworksRequest{}))
	if connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), self) {
		t.Errorf("got %v, want an error that names %s", err, self)
	}
}

// TestForwarderFindsAnotherLeader: an address that answers no more, or "not the
// leader", is forgotten, and the call is repeated where the leader is.
func TestForwarderFindsAnotherLeader(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	var leads atomic.Value
	leads.Store("")
	lead := func() string { return leads.Load().(string) }
	ok := func(w http.ResponseWriter, r *http.Request) {
		if c := peer.CallerFrom(r.Context()); c.Kind != peer.Manager {
			t.Errorf("a forwarded call is of a %s, not of the node that forwards it", c)
		}
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", "text/plain")
		fmt.Fprintf(w, "%s?%s %s", r.URL.Path, r.URL.RawQuery, b)
	}
	a := fakeManager(t, lead, func(w http.ResponseWriter, r *http.Request) { calls.Add(1); notLeader(w, r) })
	b := fakeManager(t, lead, ok)
	leads.Store(a)
	n := newAsker(t)
	n.start()
	n.sees = []string{b}
	go func() { // once a has refused, b leads
		for calls.Load() == 0 {
			time.Sleep(time.Millisecond)
		}
		leads.Store(b)
	}()
	post := func() string {
		resp, err := n.client.Post("http://shoal/shoal.v1.Control/CreateNetwork?x=1", "text/plain", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		got, _ := io.ReadAll(resp.Body)
		return string(got)
	}
	if got := post(); got != "/shoal.v1.Control/CreateNetwork?x=1 body" {
		t.Errorf("answer %q", got)
	}
	// An address where nobody listens any more carried nothing: another is asked.
	gone := nobody(t)
	n.fwd.mu.Lock()
	n.fwd.leader = gone
	n.fwd.mu.Unlock()
	if got := post(); got != "/shoal.v1.Control/CreateNetwork?x=1 body" {
		t.Errorf("answer %q", got)
	}
}

// TestForwarderLostWrite: when the leader is lost while it works on a write that
// can't be made again, the caller is told that nobody knows, and it is not.
func TestForwarderLostWrite(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	var self string
	self = fakeManager(t, func() string { return self }, func(w http.ResponseWriter, r *http.Request) {
		if calls.Add(1) == 1 {
			panic(http.ErrAbortHandler)
		}
		notLeader(w, r)
	})
	n := newAsker(t)
	n.start()
	n.sees = []string{self}
	_, err := n.ctl.RemoveNetwork(testCtx(t), connect.NewRequest(&shoalv1.RemoveNetworkRequest{Ref: "app"}))
	if connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "see whether the change was made") {
		t.Errorf("a lost write: %v", err)
	}
	if k := calls.Load(); k != 1 {
		t.Errorf("it was sent %d times", k)
	}
}

// TestForwarderLostCreation: a creation whose answer was lost, or whose leader fell
// while the managers were to agree, is asked for again, and makes one object. Where
// no leader comes, the caller is told that nobody knows.
func TestForwarderLostCreation(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 1)
	real := nodes[0].mgr.Handler()
	creations := map[string]func(*simNode) error{
		"network": func(n *simNode) error { return createNetwork(n, "app") },
		"service": func(n *simNode) error {
			_, err := n.ctl.CreateService(testCtx(t), connect.NewRequest(svc("web", 0, "app")))
			return err
		},
		"task": func(n *simNode) error {
			_, err := n.ctl.CreateTask(testCtx(t), connect.NewRequest(&shoalv1.CreateTaskRequest{Name: "c1", Node: nodes[0].node.ID, Spec: &shoalv1.TaskSpec{Command: []string{"sleep"}}}))
			return err
		},
	}
	for _, kind := range []string{"network", "service", "task"} {
		var calls atomic.Int32
		var self string
		self = fakeManager(t, func() string { return self }, func(w http.ResponseWriter, r *http.Request) {
			switch calls.Add(1) {
			case 1: // done, and nobody hears of it
				real.ServeHTTP(httptest.NewRecorder(), r)
				panic(http.ErrAbortHandler)
			case 2:
				_ = connect.NewErrorWriter().Write(w, r, errLeftOpen(raft.ErrLeadershipLost))
			default:
				real.ServeHTTP(w, r)
			}
		})
		n := newAsker(t)
		n.start()
		n.sees = []string{self}
		if err := creations[kind](n); err != nil {
			t.Errorf("a creation of a %s whose answer was lost: %v", kind, err)
		}
		if k := calls.Load(); k != 3 {
			t.Errorf("the creation of a %s was sent %d times, want 3", kind, k)
		}
		// Another that asks for the same name is another call.
		if err := creations[kind](n); connect.CodeOf(err) != connect.CodeAlreadyExists {
			t.Errorf("a second creation of the %s: %v", kind, err)
		}
		var gone atomic.Bool
		self = fakeManager(t, func() string { return self }, func(w http.ResponseWriter, r *http.Request) {
			if gone.Swap(true) {
				notLeader(w, r)
			} else {
				panic(http.ErrAbortHandler)
			}
		})
		n = newAsker(t)
		n.wait = 500 * time.Millisecond
		n.start()
		n.sees = []string{self}
		if err := creations[kind](n); connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "may or may not have been made") {
			t.Errorf("a creation of a %s of which nobody knows the end: %v", kind, err)
		}
	}
}

// TestForwarderOutlastsAFrozenLeader: a leader whose process is stopped takes connections
// and never answers. The time that it takes to see that is none in which no leader
// could be found.
func TestForwarderOutlastsAFrozenLeader(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 1)
	real := nodes[0].mgr.Handler()
	frozen := listen(t) // nobody accepts
	defer frozen.Close()
	var asked atomic.Int32
	var self string
	self = fakeManager(t, func() string {
		if asked.Add(1) == 1 {
			return frozen.Addr().String()
		}
		return self
	}, real.ServeHTTP)
	n := newAsker(t)
	n.start()
	n.sees = []string{self}
	if err := createNetwork(n, "app"); err != nil {
		t.Error(err)
	}
	if asked.Load() < 2 {
		t.Error("the frozen leader was not tried")
	}
}

// TestForwarderLoopProtection: what another node calls goes no further, even when
// two nodes each hold the other to be the leader: it would be made in this one's
// name.
func TestForwarderLoopProtection(t *testing.T) {
	t.Parallel()
	a, b := newAsker(t), newAsker(t)
	a.start()
	b.start()
	a.fwd.leader, b.fwd.leader = b.addr(), a.addr()
	resp, err := b.fwd.client.Post("http://"+a.addr()+"/shoal.v1.Control/ListNodes", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.Header.Get(notLeaderHeader) == "" || resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a call by another node: %s %s", resp.Status, body)
	}
	// Nor does it know the leader.
	if got := get(t, a.client, "http://shoal"+peer.LeaderPath); got != "" {
		t.Errorf("a manager of no cluster says that %q leads", got)
	}
}

// TestForwarderStreams: a stream's messages arrive as they are made, and its end
// reaches both sides.
func TestForwarderStreams(t *testing.T) {
	t.Parallel()
	next := make(chan string)
	ended := make(chan struct{})
	var self string
	self = fakeManager(t, func() string { return self }, func(w http.ResponseWriter, r *http.Request) {
		defer close(ended)
		rc := http.NewResponseController(w)
		for {
			select {
			case s := <-next:
				_, _ = io.WriteString(w, s)
				_ = rc.Flush()
			case <-r.Context().Done():
				return
			}
		}
	})
	n := newAsker(t)
	n.start()
	n.sees = []string{self}
	ctx, cancel := context.WithCancel(testCtx(t))
	req, _ := http.NewRequestWithContext(ctx, http.MethodPost, "http://shoal/shoal.v1.Control/Events", http.NoBody)
	got := make(chan string, 1)
	go func() {
		resp, err := n.client.Do(req)
		if err != nil {
			got <- err.Error()
			return
		}
		defer resp.Body.Close()
		b := make([]byte, 16)
		for {
			k, err := resp.Body.Read(b)
			if k > 0 {
				got <- string(b[:k])
			}
			if err != nil {
				return
			}
		}
	}()
	for _, s := range []string{"one", "two"} {
		next <- s
		if g := <-got; g != s {
			t.Errorf("got %q, want %q", g, s)
		}
	}
	cancel()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("the leader's end of the stream goes on after the client's is gone")
	}
}

// TestForwarderCutStream: a leader that dies in the middle of an answer cuts it,
// so that no client takes the half for the whole.
func TestForwarderCutStream(t *testing.T) {
	t.Parallel()
	var self string
	self = fakeManager(t, func() string { return self }, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "half")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	n := newAsker(t)
	n.start()
	n.sees = []string{self}
	resp, err := n.client.Post("http://shoal/shoal.v1.Control/ListNodes", "application/json", http.NoBody)
	if err != nil {
		return // cut before the header: as good
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("a cut answer ended in order: %q", b)
	}
}

// TestForwarderBigRequest: more than a command may hold is refused at once.
func TestForwarderBigRequest(t *testing.T) {
	t.Parallel()
	n := newAsker(t)
	n.start()
	_, err := n.ctl.CreateNetwork(testCtx(t), connect.NewRequest(&shoalv1.CreateNetworkRequest{Name: strings.Repeat("x", 5<<20)}))
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("got %v", err)
	}
}

// TestForwarderLeaderLosesItself: the leader that loses its office while it
// handles a call of its own node lets the call be done by the next one.
func TestForwarderLeaderLosesItself(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 3)
	l := leader(t, nodes)
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 4 {
			cur := leader(t, nodes)
			_ = cur.mgr.raft.LeadershipTransfer().Error()
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(50+i) * time.Millisecond):
			}
		}
	}()
	for i := range 60 {
		if err := createNetwork(l, fmt.Sprintf("n%d", i)); err != nil && strings.Contains(err.Error(), "does not lead") {
			t.Errorf("write %d: %v", i, err)
		}
		if _, err := networkNames(l); err != nil {
			t.Errorf("read %d: %v", i, err)
		}
	}
	close(stop)
	<-done
}
