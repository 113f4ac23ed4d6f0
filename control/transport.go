package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/shoalnet/shoal/peer"
)

// transport is raft's, over connections whose other end is known. What a peer
// calls itself must be what its certificate says, so each peer that calls has a
// NetworkTransport of its own here: the library does not tell by which
// connection a call came.
//
// It also refuses numbers that no peer of ours sends. A term is for ever: a
// single call with the highest there is would leave the cluster without a leader
// for good.
type transport struct {
	*raft.NetworkTransport // for calls to others
	log                    hclog.Logger
	listener               net.Listener
	admit                  func(peer.Caller, any) error // nil command: the connection itself
	term                   func() uint64                // this node's

	consume chan raft.RPC
	done    chan struct{}
	wg      sync.WaitGroup

	mu      sync.Mutex
	beat    func(raft.RPC)
	inbound map[string]*inbound // by node ID
	closed  bool
}

const transportTimeout = 2 * time.Second

// newTransport serves the listener. admit tells whether a caller may make a call;
// ready is closed when it and term can be asked.
func newTransport(ln net.Listener, p *peer.Peer, addr raft.ServerAddress, logger hclog.Logger, admit func(peer.Caller, any) error, term func() uint64, ready <-chan struct{}) *transport {
	t := &transport{log: logger, listener: ln, admit: admit, term: term, consume: make(chan raft.RPC), done: make(chan struct{}), inbound: map[string]*inbound{}}
	t.NetworkTransport = newNetworkTransport(&dialLayer{peer: p, addr: addr, done: make(chan struct{})}, logger)
	t.wg.Go(func() { // ends with the listener
		select {
		case <-ready:
		case <-t.done:
			return
		}
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			t.take(c.(*peer.Conn))
		}
	})
	return t
}

func newNetworkTransport(l raft.StreamLayer, logger hclog.Logger) *raft.NetworkTransport {
	return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: l, MaxPool: 3, Timeout: transportTimeout, Logger: logger,
		// One at a time: pipelined, a follower's refusal can block the replication
		// to it for good, while heartbeats go on and hide it, and then the shutdown
		// (raft 1.8.0; hashicorp/raft issue 612, grafana/pyroscope pull request 5518).
		MaxRPCsInFlight: 1,
	})
}

// Consumer implements raft.Transport.
func (t *transport) Consumer() <-chan raft.RPC { return t.consume }

// SetHeartbeatHandler implements raft.Transport.
func (t *transport) SetHeartbeatHandler(cb func(raft.RPC)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.beat = cb
}

// Close implements raft.WithClose. Connections of others are closed, too: that
// of a node which is no manager any more may be kept by its other side for ever.
func (t *transport) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	close(t.done)
	all := t.inbound
	t.inbound = map[string]*inbound{}
	t.mu.Unlock()
	err := errors.Join(t.listener.Close(), t.NetworkTransport.Close())
	t.NetworkTransport.CloseStreams()
	for _, in := range all {
		in.close()
	}
	t.wg.Wait()
	return err
}

// inbound are the connections of one peer.
type inbound struct {
	t      *transport
	caller peer.Caller
	layer  *handLayer
	trans  *raft.NetworkTransport
	done   chan struct{}
	once   sync.Once
	conns  map[*countedConn]struct{} // guarded by t.mu
}

func (in *inbound) close() {
	in.once.Do(func() {
		close(in.done)
		in.trans.Close()
		in.t.mu.Lock()
		conns := in.conns
		in.conns = nil
		in.t.mu.Unlock()
		for c := range conns {
			c.Conn.Close()
		}
	})
}

// countedConn tells its inbound when it is closed.
type countedConn struct {
	net.Conn
	in *inbound
}

func (c *countedConn) Close() error {
	t := c.in.t
	t.mu.Lock()
	delete(c.in.conns, c)
	last := len(c.in.conns) == 0 && t.inbound[c.in.caller.ID] == c.in
	if last {
		delete(t.inbound, c.in.caller.ID)
	}
	t.mu.Unlock()
	if last {
		// Not here: the library's goroutine for this connection calls.
		go c.in.close()
	}
	return c.Conn.Close()
}

// take hands a connection to the inbound of its caller.
func (t *transport) take(c *peer.Conn) {
	caller := c.Caller()
	if err := t.admit(caller, nil); err != nil {
		t.log.Warn("a raft connection was refused", "from", c.RemoteAddr(), "reason", err)
		c.Close()
		return
	}
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		c.Close()
		return
	}
	in := t.inbound[caller.ID]
	if in == nil {
		in = &inbound{t: t, caller: caller, done: make(chan struct{}), conns: map[*countedConn]struct{}{},
			layer: &handLayer{ch: make(chan net.Conn), done: make(chan struct{}), addr: c.LocalAddr()}}
		in.trans = newNetworkTransport(in.layer, t.log)
		in.trans.SetHeartbeatHandler(in.heartbeat)
		t.inbound[caller.ID] = in
		t.wg.Go(in.pass)
	}
	cc := &countedConn{c, in}
	in.conns[cc] = struct{}{}
	t.mu.Unlock()
	select {
	case in.layer.ch <- cc:
	case <-in.layer.done:
		cc.Close()
	case <-t.done:
		cc.Close()
	}
}

// check tells whether a call of this peer's may be answered.
func (in *inbound) check(cmd any) error {
	if h, ok := cmd.(raft.WithRPCHeader); ok {
		if id := string(h.GetRPCHeader().ID); id != in.caller.ID {
			return fmt.Errorf("node %s calls itself %q", in.caller.ID, id)
		}
	}
	if err := sane(cmd, in.t.term()); err != nil {
		return fmt.Errorf("node %s: %w", in.caller.ID, err)
	}
	return in.t.admit(in.caller, cmd)
}

func (in *inbound) refuse(rpc raft.RPC, err error) {
	in.t.log.Warn("a raft call was refused", "from", in.caller.ID, "reason", err)
	rpc.Respond(nil, err)
	if rpc.Reader != nil {
		// Its snapshot need not be read for that.
		go in.close()
	}
}

func (in *inbound) heartbeat(rpc raft.RPC) {
	if err := in.check(rpc.Command); err != nil {
		in.refuse(rpc, err)
		return
	}
	in.t.mu.Lock()
	beat := in.t.beat
	in.t.mu.Unlock()
	if beat != nil {
		beat(rpc)
		return
	}
	select {
	case in.t.consume <- rpc:
	case <-in.done:
	}
}

// pass hands calls on to raft.
func (in *inbound) pass() {
	for {
		select {
		case <-in.done:
			return
		case rpc := <-in.trans.Consumer():
			if err := in.check(rpc.Command); err != nil {
				in.refuse(rpc, err)
				continue
			}
			select {
			case in.t.consume <- rpc:
			case <-in.done:
				return
			}
		}
	}
}

// Bounds of what peers say. A million elections beyond this node's own term, an
// index of 2^62, a snapshot of 16 GiB: none of ours gets there.
const (
	maxTermJump = 1 << 20
	maxIndex    = 1 << 62
	maxSnapshot = 16 << 30
)

// sane refuses numbers that no peer of ours sends. It is pure.
func sane(msg any, term uint64) error {
	checkTerm := func(theirs uint64) error {
		if theirs > maxIndex || theirs > term && theirs-term > maxTermJump {
			return fmt.Errorf("term %d is absurd, this node is at %d", theirs, term)
		}
		return nil
	}
	index := func(vs ...uint64) error {
		for _, v := range vs {
			if v > maxIndex {
				return fmt.Errorf("log index %d is absurd", v)
			}
		}
		return nil
	}
	switch m := msg.(type) {
	case *raft.AppendEntriesRequest:
		if err := errors.Join(checkTerm(m.Term), index(m.PrevLogEntry, m.PrevLogTerm, m.LeaderCommitIndex)); err != nil {
			return err
		}
		for i, e := range m.Entries {
			if e == nil || e.Index != m.PrevLogEntry+1+uint64(i) || e.Term > m.Term {
				return fmt.Errorf("entry %d after log index %d does not follow it", i, m.PrevLogEntry)
			}
		}
	case *raft.AppendEntriesResponse:
		return errors.Join(checkTerm(m.Term), index(m.LastLog))
	case *raft.RequestVoteRequest:
		return errors.Join(checkTerm(m.Term), index(m.LastLogIndex, m.LastLogTerm))
	case *raft.RequestVoteResponse:
		return checkTerm(m.Term)
	case *raft.RequestPreVoteRequest:
		return errors.Join(checkTerm(m.Term), index(m.LastLogIndex, m.LastLogTerm))
	case *raft.RequestPreVoteResponse:
		return checkTerm(m.Term)
	case *raft.InstallSnapshotRequest:
		if m.Size < 0 || m.Size > maxSnapshot {
			return fmt.Errorf("a snapshot of %d bytes is absurd", m.Size)
		}
		return errors.Join(checkTerm(m.Term), index(m.LastLogIndex, m.LastLogTerm, m.ConfigurationIndex))
	case *raft.InstallSnapshotResponse:
		return checkTerm(m.Term)
	}
	return nil
}

// ---- calls to others ----

// named is an address with the ID of who must answer there: the library hands
// its dialer only an address.
func named(id raft.ServerID, addr raft.ServerAddress) raft.ServerAddress {
	return raft.ServerAddress(string(id) + "@" + string(addr))
}

// answered checks an answer.
func (t *transport) answered(resp any, err error) error {
	if err != nil {
		return err
	}
	return sane(resp, t.term())
}

// AppendEntriesPipeline implements raft.Transport.
func (t *transport) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported // see newNetworkTransport
}

// AppendEntries implements raft.Transport.
func (t *transport) AppendEntries(id raft.ServerID, to raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	return t.answered(resp, t.NetworkTransport.AppendEntries(id, named(id, to), args, resp))
}

// RequestVote implements raft.Transport.
func (t *transport) RequestVote(id raft.ServerID, to raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return t.answered(resp, t.NetworkTransport.RequestVote(id, named(id, to), args, resp))
}

// RequestPreVote implements raft.WithPreVote.
func (t *transport) RequestPreVote(id raft.ServerID, to raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return t.answered(resp, t.NetworkTransport.RequestPreVote(id, named(id, to), args, resp))
}

// InstallSnapshot implements raft.Transport.
func (t *transport) InstallSnapshot(id raft.ServerID, to raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	return t.answered(resp, t.NetworkTransport.InstallSnapshot(id, named(id, to), args, resp, data))
}

// TimeoutNow implements raft.Transport.
func (t *transport) TimeoutNow(id raft.ServerID, to raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return t.NetworkTransport.TimeoutNow(id, named(id, to), args, resp)
}

// dialLayer only dials.
type dialLayer struct {
	peer *peer.Peer
	addr raft.ServerAddress
	done chan struct{}
	once sync.Once
}

// Dial implements raft.StreamLayer.
func (l *dialLayer) Dial(target raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	id, addr, ok := strings.Cut(string(target), "@")
	if !ok {
		return nil, fmt.Errorf("raft peer %q has no ID", target)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	c, err := l.peer.Dial(ctx, addr, peer.ProtoRaft, func(c peer.Caller) error {
		return errors.Join(peer.IsNode(id)(c), peer.IsManager(c))
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Accept implements raft.StreamLayer: nobody comes.
func (l *dialLayer) Accept() (net.Conn, error) {
	<-l.done
	return nil, net.ErrClosed
}

// Close implements raft.StreamLayer.
func (l *dialLayer) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements raft.StreamLayer.
func (l *dialLayer) Addr() net.Addr { return namedAddr(l.addr) }

type namedAddr string

func (namedAddr) Network() string  { return "tcp" }
func (a namedAddr) String() string { return string(a) }

// handLayer only accepts what it is handed.
type handLayer struct {
	ch   chan net.Conn
	done chan struct{}
	once sync.Once
	addr net.Addr
}

// Accept implements raft.StreamLayer.
func (l *handLayer) Accept() (net.Conn, error) {
	select {
	case c := <-l.ch:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Dial implements raft.StreamLayer.
func (*handLayer) Dial(raft.ServerAddress, time.Duration) (net.Conn, error) {
	return nil, errors.New("this side only answers")
}

// Close implements raft.StreamLayer.
func (l *handLayer) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements raft.StreamLayer.
func (l *handLayer) Addr() net.Addr { return l.addr }
