package control

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// echoes serves a share: it answers "who:" and what it reads first.
func echoes(t *testing.T, ln net.Listener, who string) {
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				b := make([]byte, 64)
				n, _ := c.Read(b)
				_, _ = io.WriteString(c, who+":"+string(b[:n]))
			})
		}
	})
	t.Cleanup(wg.Wait)
}

func ask(t *testing.T, addr net.Addr, say string) string {
	t.Helper()
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, say); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatal(err)
	}
	return string(b)
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// nobody is an address where nobody listens, nor will: on 127.0.0.1 another
// test, or another program, may be given the port a moment later, and a call
// without a limit may wait for its answer for ever.
func nobody(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.83.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	return ln.Addr().String()
}

func TestSplitByFirstByte(t *testing.T) {
	ln := listen(t)
	raft, http := Split(ln)
	echoes(t, raft, "raft")
	echoes(t, http, "http")
	t.Cleanup(func() { ln.Close() }) // before the echoes are waited for
	for _, k := range []struct{ say, want string }{
		{"\x01vote", "raft:vote"},
		{"GET /", "http:GET /"},
		{"PRI * HTTP/2.0", "http:PRI * HTTP/2.0"},
		// Not ours: HTTP's to refuse.
		{"\x16\x03\x01", "http:\x16\x03\x01"},
		{"\x00\xff\xff", "http:\x00\xff\xff"},
	} {
		got := ask(t, ln.Addr(), k.say)
		// The byte that was put back may come alone.
		if got != k.want && got != k.want[:len("http:")+1] && got != "raft:" {
			t.Errorf("%q: answer %q, want %q", k.say, got, k.want)
		}
	}
}

// TestSplitSilentClient: one that says nothing holds up nobody, and is cut off
// when the listener ends.
func TestSplitSilentClient(t *testing.T) {
	ln := listen(t)
	_, h := Split(ln)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(h) })
	defer wg.Wait()
	defer srv.Close()
	silent, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	if got := get(t, c, "http://"+ln.Addr().String()); got != "ok" {
		t.Errorf("answer %q", got)
	}
	ln.Close()
	_ = silent.SetReadDeadline(time.Now().Add(sniffTimeout / 2))
	if _, err := silent.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the silent connection after the listener's end: %v, want EOF", err)
	}
}

// TestSplitSlowHTTP: a request that comes byte by byte arrives whole.
func TestSplitSlowHTTP(t *testing.T) {
	ln := listen(t)
	_, h := Split(ln)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path) })}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(h) })
	defer wg.Wait()
	defer srv.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, b := range []byte("GET /slow HTTP/1.0\r\n\r\n") {
		if _, err := c.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(c)
	if err != nil || !strings.HasSuffix(string(b), "/slow") {
		t.Errorf("answer %q, %v", b, err)
	}
	ln.Close()
}

// TestSplitClose: closing one share ends only its own, a borrowed listener can
// be closed and borrowed again, and the listener's end is everyone's.
func TestSplitClose(t *testing.T) {
	ln := listen(t)
	raft, h := Split(ln)
	echoes(t, h, "http")
	t.Cleanup(func() { ln.Close() })

	b := raft.Borrow()
	if b.Addr().String() != ln.Addr().String() {
		t.Errorf("address %s, want %s", b.Addr(), ln.Addr())
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil { // twice is fine
		t.Error(err)
	}
	if _, err := b.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
	echoes(t, raft.Borrow(), "raft")
	if got := ask(t, ln.Addr(), "\x01x"); got != "raft:x" && got != "raft:" {
		t.Errorf("borrowed again: %q", got)
	}

	other, hh := Split(listen(t))
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
	if got := ask(t, hh.Addr(), "\x01x"); got != "" {
		t.Errorf("a closed share answered %q", got)
	}

	ln.Close()
	if _, err := h.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after the listener's end: %v", err)
	}
}

// brokenListener fails before it accepts.
type brokenListener struct {
	net.Listener
	mu   sync.Mutex
	errs []error
}

func (l *brokenListener) Accept() (net.Conn, error) {
	l.mu.Lock()
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		l.mu.Unlock()
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: err}
	}
	l.mu.Unlock()
	return l.Listener.Accept()
}

// TestSplitOutlivesFailedAccept: a process that had too many files open for a
// moment must not be deaf from then on.
func TestSplitOutlivesFailedAccept(t *testing.T) {
	ln := &brokenListener{Listener: listen(t), errs: []error{syscall.EMFILE, syscall.ENFILE, syscall.ECONNABORTED, syscall.ENOBUFS}}
	_, h := Split(ln)
	echoes(t, h, "http")
	t.Cleanup(func() { ln.Close() })
	if got := ask(t, ln.Addr(), "G"); got != "http:G" {
		t.Errorf("answer %q", got)
	}
}
