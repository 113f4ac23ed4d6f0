package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// layer is raft's transport over the shared listener. Closing it closes its
// connections, too, which raft's NetworkTransport leaves to the other side: that
// of a node which is no manager any more may keep them for ever.
//
// Each connection begins with the ID of the caller's cluster. An address may have
// become one of another cluster's, and raft itself would take the other's word for
// what was decided.
type layer struct {
	net.Listener
	cluster func() string // "": not known yet

	mu    sync.Mutex
	conns map[*layerConn]struct{} // nil: closed
}

func newLayer(ln net.Listener, cluster func() string) *layer {
	return &layer{Listener: ln, cluster: cluster, conns: map[*layerConn]struct{}{}}
}

// layerConn is a connection that its layer forgets when it is closed.
type layerConn struct {
	net.Conn
	l       *layer
	greeted bool // the caller's cluster was read, or this is the caller
}

// Read implements net.Conn. It checks the caller's cluster first: Accept must not
// wait for a caller to say it.
func (c *layerConn) Read(b []byte) (int, error) {
	if !c.greeted {
		theirs, err := readGreeting(c.Conn)
		if err != nil {
			return 0, err
		}
		if ours := c.l.cluster(); ours != "" && theirs != "" && ours != theirs {
			c.Close()
			return 0, fmt.Errorf("manager at %s is of cluster %s, this is one of %s", c.RemoteAddr(), theirs, ours)
		}
		c.greeted = true
	}
	return c.Conn.Read(b)
}

// greeting is what a connection begins with.
func greeting(cluster string) []byte {
	return append([]byte{raftMagic, byte(len(cluster))}, cluster...)
}

// readGreeting reads it, after raftMagic.
func readGreeting(r io.Reader) (cluster string, err error) {
	var n [1]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return "", err
	}
	b := make([]byte, n[0])
	_, err = io.ReadFull(r, b)
	return string(b), err
}

func (l *layer) add(c net.Conn, greeted bool) (net.Conn, error) {
	lc := &layerConn{Conn: c, l: l, greeted: greeted}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns == nil {
		c.Close()
		return nil, net.ErrClosed
	}
	l.conns[lc] = struct{}{}
	return lc, nil
}

func (c *layerConn) Close() error {
	c.l.mu.Lock()
	delete(c.l.conns, c)
	c.l.mu.Unlock()
	return c.Conn.Close()
}

// Accept implements raft.StreamLayer.
func (l *layer) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.add(c, false)
}

// Dial implements raft.StreamLayer.
func (l *layer) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", string(addr), timeout)
	if err != nil {
		return nil, err
	}
	_ = c.SetWriteDeadline(time.Now().Add(timeout))
	if _, err := c.Write(greeting(l.cluster())); err != nil {
		c.Close()
		return nil, err
	}
	_ = c.SetWriteDeadline(time.Time{})
	return l.add(c, true)
}

// Close implements raft.StreamLayer.
func (l *layer) Close() error {
	err := l.Listener.Close()
	l.mu.Lock()
	conns := l.conns
	l.conns = nil
	l.mu.Unlock()
	for c := range conns {
		c.Conn.Close()
	}
	return err
}

// openLog opens raft's log and reads all of it. The library panics over a damaged
// file, or the kernel sends SIGBUS for one that is shorter than it says: both are
// an error here, and not later in a goroutine of raft's.
func openLog(path string) (store *raftboltdb.BoltStore, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
		if err != nil {
			err = fmt.Errorf("the managers' log %s can't be read: %w: restore it from a copy; or, while most of the other managers run, "+
				"remove this node there with 'shoal node rm --force', empty its data directory and join again", path, err)
		}
	}()
	if store, err = raftboltdb.NewBoltStore(path); err != nil {
		return nil, err
	}
	first, err := store.FirstIndex()
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	last, err := store.LastIndex()
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	var l raft.Log
	for i := max(first, 1); i <= last; i++ {
		if err := store.GetLog(i, &l); err != nil {
			return nil, errors.Join(fmt.Errorf("entry %d: %w", i, err), store.Close())
		}
	}
	return store, nil
}

// raftLogger writes raft's log to ours, one level lower: an election is news to
// a developer, not an operator.
func raftLogger(log *slog.Logger) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Name: "raft", Level: hclog.Info, DisableTime: true, Output: logSink{log}})
}

type logSink struct{ log *slog.Logger }

func (s logSink) Write(b []byte) (int, error) {
	msg := strings.TrimSpace(string(b))
	level := slog.LevelDebug
	if strings.HasPrefix(msg, "[ERROR]") {
		level = slog.LevelWarn
	}
	if i := strings.Index(msg, "] "); i > 0 {
		msg = strings.TrimSpace(msg[i+2:])
	}
	// What a peer that is down makes raft repeat is no warning of its own.
	if strings.Contains(msg, "failed to appendEntries") || strings.Contains(msg, "failed to heartbeat") || strings.Contains(msg, "failed to make requestVote") {
		level = slog.LevelDebug
	}
	s.log.Log(context.Background(), level, msg)
	return len(b), nil
}
