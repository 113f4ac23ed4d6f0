package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

const (
	// notLeaderHeader marks an answer that says "ask another": nothing was done.
	notLeaderHeader = "Shoal-Not-Leader"
	// leftOpenHeader marks an answer that says that nobody knows whether it was done.
	leftOpenHeader = "Shoal-Left-Open"
	// requestHeader is the ID of what a call is to create: made twice, it creates one.
	requestHeader = "Shoal-Request"

	leaderWait    = 10 * time.Second       // default of ForwarderConfig.Wait
	majorityWait  = 3 * time.Second        // and while too few managers answer to elect one
	leaderRetry   = 100 * time.Millisecond // between looks
	leaderTimeout = time.Second            // for one manager's answer
)

// ForwarderConfig is what a Forwarder needs.
type ForwarderConfig struct {
	NodeID string
	// Peer is this node among the others.
	Peer *peer.Peer
	// Managers are control addresses to ask, HOST:PORT.
	Managers func() []string
	// Wait is for how long a call waits for a leader to be found. 0: 10 s.
	Wait time.Duration
	Log  *slog.Logger
}

// Forwarder serves the Control service on any node: it answers where the leader
// is here, and passes the call on where it is not. While there is no leader it
// waits for one for a while.
//
// What another node calls goes no further: it would be made in this node's name
// then. Only a stranger that wants to join is passed on to the leader.
type Forwarder struct {
	cfg     ForwarderConfig
	client  *http.Client
	refusal atomic.Pointer[string] // why this node and the managers it asked last don't know each other; nil: they do
	removed atomic.Bool            // a manager said last that this node is no longer in the cluster

	mu      sync.Mutex
	manager *Manager
	handler http.Handler
	leader  string // last known, HOST:PORT
}

// NewForwarder makes a Forwarder for a node that is no manager yet.
func NewForwarder(cfg ForwarderConfig) *Forwarder {
	if cfg.Wait == 0 {
		cfg.Wait = leaderWait
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Forwarder{cfg: cfg, client: cfg.Peer.Managers()}
}

// SetManager tells that this node is a manager now, or (nil) no longer.
func (f *Forwarder) SetManager(m *Manager) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.manager, f.handler = m, nil
	if m != nil {
		f.handler = m.Handler()
	}
}

func (f *Forwarder) local() (*Manager, http.Handler) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.manager, f.handler
}

// ServeHTTP implements http.Handler.
func (f *Forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m, h := f.local()
	if r.URL.Path == peer.LeaderPath {
		f.serveLeader(w, m)
		return
	}
	caller := peer.CallerFrom(r.Context())
	switch {
	case caller.Kind == peer.Worker || caller.Kind == peer.Manager:
		if m == nil || !m.IsLeader() {
			w.Header().Set(notLeaderHeader, "1")
			_ = connect.NewErrorWriter().Write(w, r, errNotLeader())
			return
		}
		h.ServeHTTP(w, r)
		return
	case caller.Kind == peer.Stranger:
		if !f.cfg.Peer.MayTry(caller.Addr) {
			_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("too many wrong join tokens came from %s: wait a few seconds, then try again with the right one", caller.Addr)))
			return
		}
		if m == nil {
			_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeFailedPrecondition, errors.New("this node is a worker: join by way of a manager")))
			return
		}
		defer func() {
			if answer(w.Header()).wrongToken() {
				f.cfg.Peer.WrongToken(caller.Addr)
			}
		}()
	case m == nil && f.worker() && !peer.Allowed(r.URL.Path, peer.Worker):
		// The managers would say so, too.
		managers := f.cfg.Managers()
		_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("this node is a worker, and only managers take this command: run it on one of them (%s)", strings.Join(managers, ", "))))
		return
	}
	// The body of a call of this service is one small message: it is kept, to
	// be sent again when a manager says that it does not lead.
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, state.MaxCommand))
	if err != nil {
		_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("request: %w", err)))
		return
	}
	r.Header.Del(requestHeader)
	if creates(r.URL.Path) {
		r.Header.Set(requestHeader, spec.NewID())
	}
	start := time.Now()
	var last, open error // open: why nobody knows whether an earlier try was carried out
	var silent []string
	elected := start // when it was last seen that managers could elect a leader
	for {
		m, h := f.local()
		if m != nil && m.IsLeader() {
			f.refusal.Store(nil)
			r.Body = io.NopCloser(bytes.NewReader(body))
			lw := &leaderWriter{ResponseWriter: w, again: again(r)}
			h.ServeHTTP(lw, r)
			if !lw.refused {
				return
			}
			// It lost its office in between, and did nothing, or nothing that can't be done again.
			if lw.open {
				open = errors.New("this manager lost the lead while it worked on it")
			}
			clear(w.Header())
		}
		addr, quiet, quorum := f.findLeader(r.Context(), m)
		if silent = quiet; quorum {
			elected = time.Now()
		}
		if addr == "" && f.removed.Load() {
			w.Header().Set(peer.RemovedHeader, "1")
			_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeUnauthenticated, errRemoved))
			return
		}
		if addr != "" {
			sent, err := f.forward(w, r, addr, body)
			if sent {
				return
			}
			var lost *lostError
			if last = err; errors.As(err, &lost) {
				open = err
			}
			// A leader that is frozen, or cut off, takes its time to fail: who follows it
			// is looked for from now on.
			elected = time.Now()
			f.forget(addr)
		}
		if r.Context().Err() != nil {
			return
		}
		if time.Since(start) > f.cfg.Wait || time.Since(elected) > min(majorityWait, f.cfg.Wait) {
			break
		}
		sleep.For(r.Context(), leaderRetry)
	}
	if open != nil && !repeatable(r.URL.Path) {
		_ = connect.NewErrorWriter().Write(w, r, errLeftOpen(open))
		return
	}
	msg := fmt.Errorf("no manager leads the cluster: see whether a majority of the managers run and reach each other")
	if len(silent) > 0 {
		msg = fmt.Errorf("%w; no answer from %s", msg, strings.Join(silent, ", "))
	}
	if r := f.Refusal(); r != "" && last == nil {
		last = errors.New(r)
	}
	if last != nil {
		msg = fmt.Errorf("%w (%w)", msg, last)
	}
	_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeUnavailable, msg))
}

// worker tells whether this node's certificate is a worker's.
func (f *Forwarder) worker() bool {
	info, ok := f.cfg.Peer.Credentials().Info()
	return ok && info.Role == spec.RoleWorker
}

// answer is an answer's header, or its trailer.
type answer http.Header

func (a answer) wrongToken() bool {
	for _, k := range []string{wrongTokenHeader, "Trailer-" + wrongTokenHeader, http.TrailerPrefix + wrongTokenHeader} {
		if http.Header(a).Get(k) != "" {
			return true
		}
	}
	return false
}

// leaderWriter holds back an answer that says "ask another" and, where a call may be
// made again, one that leaves open what it did.
type leaderWriter struct {
	http.ResponseWriter
	again                bool
	begun, refused, open bool
}

func (w *leaderWriter) WriteHeader(code int) {
	if !w.begun {
		w.begun, w.open = true, w.again && w.Header().Get(leftOpenHeader) != ""
		w.refused = w.open || w.Header().Get(notLeaderHeader) != ""
	}
	if !w.refused {
		w.ResponseWriter.WriteHeader(code)
	}
}

func (w *leaderWriter) Write(b []byte) (int, error) {
	if !w.begun {
		w.WriteHeader(http.StatusOK)
	}
	if w.refused {
		return len(b), nil
	}
	return w.ResponseWriter.Write(b)
}

// Flush implements http.Flusher, for streams.
func (w *leaderWriter) Flush() {
	if !w.begun {
		w.WriteHeader(http.StatusOK)
	}
	if !w.refused {
		_ = http.NewResponseController(w.ResponseWriter).Flush()
	}
}

func (f *Forwarder) forget(addr string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.leader == addr {
		f.leader = ""
	}
}

// serveLeader tells who leads, in text: the control address, or nothing.
func (f *Forwarder) serveLeader(w http.ResponseWriter, m *Manager) {
	w.Header().Set("Content-Type", "text/plain")
	if m == nil {
		return
	}
	if _, addr := m.Leader(); addr != "" {
		_, _ = io.WriteString(w, addr)
	}
}

// olderLeader refuses a call that this build knows and the leader's does not.
func (f *Forwarder) olderLeader(path, addr string) error {
	what := peer.Verb(path)
	var level int
	var behind state.Laggards
	if m, _ := f.local(); m != nil {
		m.fsm.read(func(s *state.State) { level, behind = s.Level(), s.Behind(state.Level, nil) })
	}
	err := fmt.Errorf("the managers' leader at %s runs an older shoal, which does not know %s: upgrade shoal there ('shoal node ls -o wide' shows the versions)", addr, what)
	if len(behind) > 0 {
		err = fmt.Errorf("the managers' leader at %s runs an older shoal, which does not know %s; this node has feature level %d, and the cluster is at level %d, as %s: upgrade shoal there", addr, what, state.Level, level, behind)
	}
	return connect.NewError(connect.CodeFailedPrecondition, err)
}

// findLeader returns the leader's address, "" when nobody knows one; which
// managers did not answer then, and whether those that did are a majority.
func (f *Forwarder) findLeader(ctx context.Context, m *Manager) (leader string, silent []string, majority bool) {
	if m != nil {
		if id, addr := m.Leader(); addr != "" && id != f.cfg.NodeID {
			f.refusal.Store(nil) // it leads this node: they know each other
			return addr, nil, true
		}
	}
	f.mu.Lock()
	known := f.leader
	f.mu.Unlock()
	if known != "" {
		return known, nil, true
	}
	// All at once: the first may be down.
	managers := f.cfg.Managers()
	ctx, cancel := context.WithTimeout(ctx, leaderTimeout)
	defer cancel()
	type said struct {
		addr, leader string
		err          error
	}
	answers := make(chan said, len(managers))
	for _, a := range managers {
		go func() {
			l, err := f.askLeader(ctx, a)
			answers <- said{a, l, err}
		}()
	}
	for range managers {
		a := <-answers
		if errors.Is(a.err, errRemoved) {
			f.removed.Store(true)
		}
		if a.leader != "" {
			f.removed.Store(false)
			f.mu.Lock()
			f.leader = a.leader
			f.mu.Unlock()
			return a.leader, nil, true
		}
		if a.err != nil {
			silent = append(silent, a.addr)
		}
	}
	all := len(managers)
	if m != nil {
		all++ // and this one answers
	}
	slices.Sort(silent)
	return "", silent, all-len(silent) > all/2
}

// noteRefusal keeps why a handshake with a manager failed: unlike one that is down,
// it will not pass by itself.
func (f *Forwarder) noteRefusal(err error) {
	if !peer.IsRefusal(err) {
		return
	}
	text := err.Error()
	var ue *url.Error
	if errors.As(err, &ue) {
		text = ue.Err.Error()
	}
	if was := f.refusal.Swap(&text); was == nil {
		f.cfg.Log.Warn("this node and the managers don't know each other by their certificates", "error", text)
	}
}

// Refusal is why this node and the managers that it asked last don't know each
// other by their certificates; "" when they do, or none answers at all.
func (f *Forwarder) Refusal() string {
	if p := f.refusal.Load(); p != nil {
		return *p
	}
	return ""
}

// errRemoved is what a manager says to a node that is no longer in the cluster.
var errRemoved = errors.New("this node was removed from the cluster")

// askLeader asks a manager who leads; "" when it does not know.
func (f *Forwarder) askLeader(ctx context.Context, addr string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+peer.LeaderPath, nil)
	if err != nil {
		return "", err
	}
	resp, err := f.client.Do(req)
	if err != nil {
		f.noteRefusal(err)
		return "", err
	}
	defer resp.Body.Close()
	f.refusal.Store(nil)
	if resp.Header.Get(peer.RemovedHeader) != "" {
		return "", errRemoved
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("manager %s does not say who leads: %s", addr, resp.Status)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 256))
	if err != nil {
		return "", err
	}
	if _, err := netip.ParseAddrPort(string(b)); err != nil {
		return "", nil
	}
	return string(b), nil
}

// repeatable are calls that may be made twice: reads, and reports, which say
// the same again.
func repeatable(path string) bool {
	verb := peer.Verb(path)
	return strings.HasPrefix(verb, "List") || verb == "Report" || verb == "Assignments" || verb == "Watch"
}

// creates tells which calls make an object with an ID of its own.
func creates(path string) bool {
	verb := peer.Verb(path)
	return verb == "CreateNetwork" || verb == "CreateService" || verb == "CreateTask"
}

// again tells whether a call whose end is not known may be made again.
func again(r *http.Request) bool {
	return repeatable(r.URL.Path) || r.Header.Get(requestHeader) != ""
}

// requestID is the ID of what a call is to create: the one that its client chose, to be
// able to ask again even when its own agent has ended, else the forwarder's.
func requestID(asked string, h http.Header) string {
	if spec.IsID(asked) {
		return asked
	}
	if id := h.Get(requestHeader); spec.IsID(id) {
		return id
	}
	return spec.NewID()
}

// lostError is a call that was sent, and whose answer was lost.
type lostError struct{ error }

func (e *lostError) Unwrap() error { return e.error }

// forward passes a call on. It returns false when nothing was done and nothing
// was answered, so that another may be asked.
func (f *Forwarder) forward(w http.ResponseWriter, r *http.Request, addr string, body []byte) (sent bool, err error) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, r.Method, "http://"+addr+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	for k, v := range r.Header {
		if !slices.Contains([]string{"Connection", "Te", "Transfer-Encoding", "Content-Length", "Keep-Alive", "Upgrade"}, k) {
			req.Header[k] = v
		}
	}
	resp, err := f.client.Do(req)
	if err != nil {
		// A connection that was never made has carried nothing.
		var handshake *peer.HandshakeError
		var dial *net.OpError
		notSent := errors.As(err, &handshake) || errors.As(err, &dial) && dial.Op == "dial"
		if notSent {
			return false, fmt.Errorf("manager %s: %w", addr, err)
		}
		if again(r) {
			return false, &lostError{fmt.Errorf("manager %s: %w", addr, err)}
		}
		lost := connect.NewError(connect.CodeUnavailable,
			fmt.Errorf("the leading manager at %s was lost while it worked on this: see whether the change was made: %w", addr, err))
		lost.Meta().Set(peer.UnknownHeader, "1")
		_ = connect.NewErrorWriter().Write(w, r, lost)
		return true, nil
	}
	defer resp.Body.Close()
	if resp.Header.Get(notLeaderHeader) != "" {
		return false, fmt.Errorf("manager %s does not lead", addr)
	}
	if resp.Header.Get(leftOpenHeader) != "" && again(r) {
		return false, &lostError{fmt.Errorf("manager %s lost the lead while it worked on it", addr)}
	}
	if resp.StatusCode == http.StatusNotImplemented {
		// This node would not have passed on what it does not know itself. (404 is the
		// status of an answer, too: that there is no such thing.)
		_ = connect.NewErrorWriter().Write(w, r, f.olderLeader(r.URL.Path, addr))
		return true, nil
	}
	h := w.Header()
	for k, v := range resp.Header {
		h[k] = v
	}
	defer func() {
		for k, v := range resp.Trailer {
			h[http.TrailerPrefix+k] = v
		}
	}()
	w.WriteHeader(resp.StatusCode)
	rc := http.NewResponseController(w)
	_ = rc.Flush() // a stream's header is news by itself: see Events
	buf := make([]byte, 32<<10)
	for {
		n, rerr := resp.Body.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return true, nil
			}
			_ = rc.Flush()
		}
		if rerr == io.EOF {
			return true, nil
		}
		if rerr != nil {
			// The answer has begun: cutting it is all that can be said.
			panic(http.ErrAbortHandler)
		}
	}
}
