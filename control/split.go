package control

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// raftMagic is the first byte of a raft connection. No HTTP method, nor the
// HTTP/2 preface ("PRI"), begins with it.
const raftMagic = 0x01

const (
	sniffTimeout  = 5 * time.Second // for the first byte
	acceptTimeout = 5 * time.Second // for whoever accepts
)

// acceptRetry is the wait after an Accept that failed for a passing reason, like
// too many open files (accept(2): EMFILE, ENFILE, ENOBUFS).
const acceptRetry = 50 * time.Millisecond

// Split shares a listener between raft and HTTP, by the first byte of each
// connection. Closing ln ends both; closing one of them ends only its own
// Accept, and its connections are refused from then on.
func Split(ln net.Listener) (raft, http *Conns) {
	done := make(chan struct{})
	mk := func() *Conns {
		return &Conns{addr: ln.Addr(), ch: make(chan net.Conn), done: done, closed: make(chan struct{})}
	}
	raft, http = mk(), mk()
	go func() { // ends with ln
		defer close(done)
		for {
			c, err := ln.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				time.Sleep(acceptRetry)
				continue
			}
			go sniff(c, raft, http) // ends by its timeouts, or with ln
		}
	}()
	return raft, http
}

func sniff(c net.Conn, raft, http *Conns) {
	known := make(chan struct{})
	go func() {
		select {
		case <-raft.done: // nobody will accept it
			c.Close()
		case <-known:
		}
	}()
	_ = c.SetReadDeadline(time.Now().Add(sniffTimeout))
	var b [1]byte
	_, err := io.ReadFull(c, b[:])
	close(known)
	if err != nil {
		c.Close()
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	if b[0] == raftMagic {
		raft.give(c)
		return
	}
	http.give(&peeked{Conn: c, first: b[:]})
}

// peeked is a connection with its first byte put back.
type peeked struct {
	net.Conn
	first []byte
}

func (p *peeked) Read(b []byte) (int, error) {
	if len(p.first) > 0 && len(b) > 0 {
		n := copy(b, p.first)
		p.first = p.first[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// Conns is one share of a split listener.
type Conns struct {
	addr   net.Addr
	ch     chan net.Conn
	done   chan struct{} // the whole listener ended
	once   sync.Once
	closed chan struct{} // this share was closed
}

func (l *Conns) give(c net.Conn) {
	t := time.NewTimer(acceptTimeout)
	defer t.Stop()
	select {
	case l.ch <- c:
	case <-l.done:
		c.Close()
	case <-l.closed:
		c.Close()
	case <-t.C:
		c.Close()
	}
}

// Accept implements net.Listener.
func (l *Conns) Accept() (net.Conn, error) {
	select {
	case c := <-l.ch:
		return c, nil
	case <-l.done:
	case <-l.closed:
	}
	return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
}

// Close implements net.Listener.
func (l *Conns) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements net.Listener.
func (l *Conns) Addr() net.Addr { return l.addr }

// Borrow returns a listener on the same connections that can be closed by
// itself: raft closes its listener, and a node may become a manager again.
func (l *Conns) Borrow() net.Listener {
	return &Conns{addr: l.addr, ch: l.ch, done: l.done, closed: make(chan struct{})}
}
