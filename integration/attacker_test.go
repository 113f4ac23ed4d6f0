package integration

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/raft"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/gossip"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// loot is what an attacker has, and whom he attacks. He is a process of his own: this
// test's binary, started in a namespace with SHOAL_ATTACK, which ends with its input.
type loot struct {
	Targets []netip.Addr // agents
	Addr    netip.Addr   // his own
	Pcap    string       // recorded traffic

	// What is on a node's disk; without Self he is a stranger.
	Self, Cluster string
	Node, Manager string // files with a worker's, and a manager's, certificate and key
	Nodes         []spec.Node
	Keys          []state.GossipKey
	Victim        string // node whose part he plays
	Endpoints     []spec.Endpoint
	Dir           string
}

// attacker is one at work.
type attacker struct {
	loot
	mu     sync.Mutex
	counts map[string]int
}

// attack is the attacker's main.
func attack(what string) int {
	var l attacker
	if err := json.Unmarshal([]byte(what), &l.loot); err != nil {
		fmt.Fprintln(os.Stderr, "attack:", err)
		return 1
	}
	l.counts = map[string]int{}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	// every repeats an attack, with a pause that leaves the machine to the others.
	every := func(name string, pause time.Duration, do func(ctx context.Context, to netip.Addr) error) {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				if err := do(ctx, l.Targets[i%len(l.Targets)]); err == nil {
					l.count(name)
				} else {
					l.count(name + ": " + err.Error()[:min(len(err.Error()), 60)])
				}
				select {
				case <-ctx.Done():
				case <-time.After(pause):
				}
			}
		})
	}
	datagrams, streams := readPcap(l.Pcap)
	l.counts["recorded datagrams"], l.counts["recorded streams"] = len(datagrams), len(streams)
	if l.Self == "" {
		l.strange(every, datagrams)
	} else {
		l.thieve(every)
	}
	every("half-open handshakes", 100*time.Millisecond, l.halfOpen)
	every("stranger's slow body", 200*time.Millisecond, l.slowBody)
	every("stranger's big header", 500*time.Millisecond, l.bigHeader)
	if len(streams) > 0 {
		i := 0
		every("recorded streams", 50*time.Millisecond, func(ctx context.Context, _ netip.Addr) error {
			i++
			return l.resend(streams[i%len(streams)])
		})
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	cancel()
	wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = json.NewEncoder(os.Stdout).Encode(l.counts)
	return 0
}

func (l *attacker) count(name string) {
	l.mu.Lock()
	l.counts[name]++
	l.mu.Unlock()
}

type repeat func(name string, pause time.Duration, do func(ctx context.Context, to netip.Addr) error)

// ---- whoever is on the underlay ----

// strange attacks without a key, from his own address and with others' as the source.
func (l *attacker) strange(every repeat, datagrams []datagram) {
	raw, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_RAW)
	if err != nil {
		l.count("raw socket: " + err.Error())
		return
	}
	send := func(d datagram) error {
		return syscall.Sendto(raw, d.packet(), 0, &syscall.SockaddrInet4{Addr: d.to.Addr().As4()})
	}
	other := func(to netip.Addr) netip.AddrPort {
		for _, a := range l.Targets {
			if a != to {
				return netip.AddrPortFrom(a, 7946)
			}
		}
		return netip.AddrPort{}
	}
	foreign := newSeal("", []state.GossipKey{{Generation: 1, Key: bytes.Repeat([]byte{9}, 32), Primary: true}})
	i := 0
	every("datagrams of others, recorded", time.Millisecond, func(context.Context, netip.Addr) error {
		i++
		return send(datagrams[i%len(datagrams)])
	})
	every("datagrams of others, made up", 5*time.Millisecond, func(_ context.Context, to netip.Addr) error {
		for _, b := range [][]byte{
			{}, {0}, bytes.Repeat([]byte{1}, 1400), bytes.Repeat([]byte{0xff}, 60000),
			swim(mlAlive, "Incarnation", uint32(1), "Node", "nobody", "Addr", l.Addr.AsSlice(), "Port", uint32(7946), "Vsn", []byte{1, 5, 2, 0, 0, 0}), // as memberlist has it
			foreign.packet(swim(mlDead, "Incarnation", uint32(math.MaxUint32), "Node", "nobody", "From", "nobody")),                                    // of another keyring
		} {
			for _, from := range []netip.AddrPort{other(to), netip.AddrPortFrom(l.Addr, 7946)} {
				if err := send(datagram{from, netip.AddrPortFrom(to, 7946), b}); err != nil && len(b) < 1480 { // the longest are fragments
					return err
				}
			}
		}
		return nil
	})
	every("gossip streams of a stranger", 20*time.Millisecond, func(_ context.Context, to netip.Addr) error {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, 7946).String(), time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = c.Write(swim(mlPushPull, "Nodes", uint32(math.MaxUint32), "UserStateLen", uint32(math.MaxUint32), "Join", uint32(1)))
		if n, err := c.Read(make([]byte, 1)); n > 0 || os.IsTimeout(err) {
			return fmt.Errorf("ANSWERED: %d bytes, %v", n, err)
		}
		return nil
	})
}

// halfOpen begins handshakes and leaves them where they are, 100 at a time or as many as
// it is let.
func (l *attacker) halfOpen(ctx context.Context, to netip.Addr) error {
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for range 100 {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, 2377).String(), time.Second)
		if err != nil && len(open) == 0 {
			return err
		}
		if err != nil {
			break
		}
		open = append(open, c)
		_, _ = c.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1}) // a ClientHello that does not go on (RFC 8446)
	}
	select {
	case <-ctx.Done():
	case <-time.After(2 * time.Second):
	}
	return nil
}

func (l *attacker) stranger() *http.Client {
	return &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}}}}
}

// endless is a body that comes slowly, and does not end.
type endless struct{ ctx context.Context }

func (s endless) Read(p []byte) (int, error) {
	select {
	case <-s.ctx.Done():
		return 0, io.EOF
	case <-time.After(100 * time.Millisecond):
	}
	return copy(p, "{"), nil
}

func (l *attacker) post(to netip.Addr, path string, body io.Reader, header string) error {
	req, err := http.NewRequest("POST", "https://"+netip.AddrPortFrom(to, 2377).String()+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if header != "" {
		req.Header.Set("X-Long", header)
	}
	resp, err := l.stranger().Do(req)
	if err != nil {
		return nil // cut off
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return fmt.Errorf("ANSWERED: %s", path)
	}
	return nil
}

func (l *attacker) slowBody(ctx context.Context, to netip.Addr) error {
	return l.post(to, "/shoal.v1.Control/JoinNode", endless{ctx}, "")
}

func (l *attacker) bigHeader(_ context.Context, to netip.Addr) error {
	if err := l.post(to, "/shoal.v1.Control/JoinNode", strings.NewReader(strings.Repeat("[", 8<<20)), ""); err != nil {
		return err
	}
	return l.post(to, "/health/80", nil, strings.Repeat("x", 4<<20))
}

// ---- with what is on a node's disk ----

func (l *attacker) thieve(every repeat) {
	creds, err := peer.Load(l.Node)
	if err != nil {
		l.count(err.Error())
		return
	}
	p := peer.New(peer.Config{Credentials: creds})
	client := func(to netip.Addr) shoalv1connect.ControlClient {
		tr := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return p.Dial(ctx, netip.AddrPortFrom(to, 2377).String(), peer.ProtoAPI, nil)
		}}
		tr.Protocols.SetUnencryptedHTTP2(true)
		return shoalv1connect.NewControlClient(&http.Client{Transport: tr, Timeout: 3 * time.Second}, "http://x")
	}
	clients := map[netip.Addr]shoalv1connect.ControlClient{}
	for _, a := range l.Targets {
		clients[a] = client(a)
	}
	denied := func(err error) error {
		if err == nil {
			return fmt.Errorf("ANSWERED")
		}
		return nil
	}
	every("calls as another node", 100*time.Millisecond, func(ctx context.Context, to netip.Addr) error {
		_, err := clients[to].Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: l.Victim, DeadPeers: []string{l.Victim}}))
		return denied(err)
	})
	every("calls of a user", 100*time.Millisecond, func(ctx context.Context, to netip.Addr) error {
		_, err := clients[to].CreateNetwork(ctx, connect.NewRequest(&shoalv1.CreateNetworkRequest{Name: "evil"}))
		return denied(err)
	})
	every("unbounded assignments", 100*time.Millisecond, func(ctx context.Context, to netip.Addr) error {
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		time.AfterFunc(3*time.Second, cancel)
		go func() { // many at a time, and nobody reads what comes
			s, err := clients[to].Assignments(ctx, connect.NewRequest(&shoalv1.AssignmentsRequest{Node: l.Self}))
			if err == nil {
				<-ctx.Done()
				s.Close()
			}
		}()
		return nil
	})
	every("big messages", 500*time.Millisecond, func(ctx context.Context, to netip.Addr) error {
		_, err := clients[to].Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: l.Self, ContainersWhy: strings.Repeat("x", 8<<20)}))
		return denied(err)
	})
	news := 0
	every("reports that are news each time", 50*time.Millisecond, func(ctx context.Context, to netip.Addr) error {
		news++
		_, err := clients[to].Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: l.Self, Addr: l.Addr.String(), ControlPort: 2377, GossipPort: 7946,
			Level: 1 << 30, Build: fmt.Sprint("evil", news), NanoCpus: math.MaxInt64, Memory: math.MaxInt64, Applied: math.MaxUint64, GossipKey: math.MaxUint64}))
		_ = err // some are taken: it is the node's own
		return nil
	})
	every("renewals", 200*time.Millisecond, func(ctx context.Context, to netip.Addr) error {
		_, _ = clients[to].RenewCertificate(ctx, connect.NewRequest(&shoalv1.RenewCertificateRequest{Node: l.Self}))
		return nil
	})
	every("connections of one node", 2*time.Second, func(ctx context.Context, to netip.Addr) error {
		for range 200 {
			c, err := p.Dial(ctx, netip.AddrPortFrom(to, 2377).String(), peer.ProtoAPI, nil)
			if err != nil {
				break
			}
			time.AfterFunc(2*time.Second, func() { c.Close() })
		}
		return nil
	})
	l.raft(every, "a worker's raft", l.Node)
	l.raft(every, "raft in absurd terms", l.Manager)
	l.gossip(every)
}

// raftLayer dials with a certificate.
type raftLayer struct{ p *peer.Peer }

func (r raftLayer) Dial(a raft.ServerAddress, d time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	return r.p.Dial(ctx, string(a), peer.ProtoRaft, nil)
}
func (raftLayer) Accept() (net.Conn, error) { select {} }
func (raftLayer) Close() error              { return nil }
func (raftLayer) Addr() net.Addr            { return &net.TCPAddr{} }

// raft asks for votes and sends entries that would depose every leader for ever.
func (l *attacker) raft(every repeat, name, file string) {
	creds, err := peer.Load(file)
	if err != nil {
		l.count(err.Error())
		return
	}
	info, _ := creds.Info()
	tr := raft.NewNetworkTransport(raftLayer{peer.New(peer.Config{Credentials: creds})}, 1, time.Second, io.Discard)
	header := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(info.ID), Addr: []byte(info.ID)}
	every(name, 200*time.Millisecond, func(_ context.Context, to netip.Addr) error {
		at := raft.ServerAddress(netip.AddrPortFrom(to, 2377).String())
		for _, term := range []uint64{math.MaxUint64, math.MaxUint64 - 1, 1 << 62} {
			for _, err := range []error{
				tr.RequestVote("", at, &raft.RequestVoteRequest{RPCHeader: header, Term: term, LastLogIndex: math.MaxUint64, LastLogTerm: term, LeadershipTransfer: true}, &raft.RequestVoteResponse{}),
				tr.RequestPreVote("", at, &raft.RequestPreVoteRequest{RPCHeader: header, Term: term, LastLogIndex: math.MaxUint64, LastLogTerm: term}, &raft.RequestPreVoteResponse{}),
				tr.AppendEntries("", at, &raft.AppendEntriesRequest{RPCHeader: header, Term: term}, &raft.AppendEntriesResponse{}),
				tr.InstallSnapshot("", at, &raft.InstallSnapshotRequest{RPCHeader: header, Term: term, Size: math.MaxInt64}, &raft.InstallSnapshotResponse{}, strings.NewReader("x")),
			} {
				if err == nil {
					return fmt.Errorf("ANSWERED: term %d", term)
				}
			}
		}
		return nil
	})
}

// gossip plays its own part at first, with what others have, then another node's: each with the whole protocol, and beside that with messages that no node sends.
func (l *attacker) gossip(every repeat) {
	s := newSeal(l.Cluster, l.Keys)
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: l.Addr.AsSlice()}) // of a port of its own: addresses are what counts
	if err != nil {
		l.count(err.Error())
		return
	}
	meta := bytes.Repeat([]byte{1}, 100)
	alive := func(node string, addr netip.Addr, inc uint32) []byte {
		return swim(mlAlive, "Incarnation", inc, "Node", node, "Addr", addr.AsSlice(), "Port", uint32(7946), "Meta", meta, "Vsn", []byte{1, 5, 2, 0, 0, 0})
	}
	accuse := func(typ byte, inc uint32) []byte {
		return swim(typ, "Incarnation", inc, "Node", l.Victim, "From", l.Self)
	}
	var victim netip.Addr
	for _, n := range l.Nodes {
		if n.ID == l.Victim {
			victim = n.Addr
		}
	}
	every("forged gossip", 20*time.Millisecond, func(_ context.Context, to netip.Addr) error {
		for _, b := range [][]byte{
			alive("nobody", l.Addr, 1), alive(l.Victim, l.Addr, 99), alive(l.Victim, victim, math.MaxUint32),
			accuse(mlSuspect, math.MaxUint32), accuse(mlDead, math.MaxUint32), accuse(mlSuspect, 1), accuse(mlDead, 1), accuse(mlDead, 0),
			swim(mlIndirectPing, "SeqNo", uint32(1), "Target", []byte{192, 0, 2, 1}, "Port", uint32(53), "Node", "x"),
			append([]byte{mlCompress}, make([]byte, 1000)...), append([]byte{mlUser}, bytes.Repeat([]byte{0xff}, 1000)...), {mlUser}, {mlCompound, 255},
		} {
			if _, err := udp.WriteToUDPAddrPort(s.packet(b), netip.AddrPortFrom(to, 7946)); err != nil {
				return err
			}
		}
		_, err := udp.WriteToUDPAddrPort(newSeal("othercluster", l.Keys).packet(alive("nobody", l.Addr, 1)), netip.AddrPortFrom(to, 7946))
		return err
	})
	stream := func(to netip.Addr, sealed []byte, last bool) error {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, 7946).String(), time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(6 * time.Second))
		if _, err := c.Write(sealed); err != nil {
			return nil // cut off
		}
		if !last { // and never goes on
			_, _ = c.Read(make([]byte, 1))
		}
		return nil
	}
	var forged [][]byte
	for _, b := range [][]byte{
		swim(mlPushPull, "Nodes", uint32(math.MaxUint32), "UserStateLen", uint32(0), "Join", uint32(1)),
		swim(mlPushPull, "Nodes", uint32(1<<20), "UserStateLen", uint32(1<<20)),
		swim(mlUser, "UserMsgLen", uint32(math.MaxUint32)), append([]byte{mlCompress}, make([]byte, 31<<10)...), {mlEncrypt}, {},
		append(swim(mlPushPull, "Nodes", uint32(1), "UserStateLen", uint32(0)), swim(0, "Name", "nobody", "Addr", l.Addr.AsSlice(), "Port", uint32(7946), "Meta", meta, "Incarnation", uint32(1), "State", uint32(0), "Vsn", []byte{1, 5, 2, 0, 0, 0})[1:]...),
	} {
		forged = append(forged, s.stream(b, true))
	}
	every("forged streams", 100*time.Millisecond, func(_ context.Context, to netip.Addr) error {
		for _, b := range forged {
			if err := stream(to, b, true); err != nil {
				return err
			}
		}
		return nil
	})
	endless := s.stream(make([]byte, 3<<19), false)
	for range 30 { // more than one node may have
		every("streams without an end", 3*time.Second, func(_ context.Context, to netip.Addr) error {
			return stream(to, endless, false)
		})
	}
	every("its own part, and another node's", 0, func(ctx context.Context, _ netip.Addr) error {
		self, eps := l.Victim, l.Endpoints
		if l.impersonate()%2 == 0 {
			self = l.Self
		}
		return l.member(ctx, self, eps)
	})
}

func (l *attacker) impersonate() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts["parts played"]++
	return l.counts["parts played"] - 1
}

// member takes part as a node for some seconds, with the worker's key.
func (l *attacker) member(ctx context.Context, self string, eps []spec.Endpoint) error {
	ctx, cancel := context.WithTimeout(ctx, 4*time.Second)
	defer cancel()
	creds, err := peer.Load(l.Node)
	if err != nil {
		return err
	}
	var ring gossip.Keyring
	for _, k := range l.Keys {
		ring.Keys = append(ring.Keys, gossip.Key{ID: uint32(k.Generation), Secret: k.Key})
		if k.Primary {
			ring.Use = uint32(k.Generation)
		}
	}
	g, err := gossip.Open(gossip.Config{NodeID: self, Name: "evil", Number: 1, Role: spec.RoleManager, Cluster: l.Cluster, Addr: l.Addr, Port: 7946, ControlPort: 2377,
		DataDir: l.Dir, Keys: ring, Signer: creds.Signer(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	d := gossip.Directory{Nodes: map[string]gossip.NodeInfo{}}
	var join []netip.AddrPort
	for _, n := range l.Nodes {
		info := gossip.NodeInfo{Name: n.Name, Role: n.Role, Number: n.Number, Addr: n.Addr, ControlPort: n.ControlPort, GossipPort: n.GossipPort}
		if k, err := peer.ParsePublic(n.PublicKey); err == nil {
			info.Keys = append(info.Keys, k.Key())
		}
		if n.ID != self {
			d.Nodes[n.ID] = info
			join = append(join, netip.AddrPortFrom(n.Addr, uint16(n.GossipPort)))
		}
	}
	g.SetDirectory(d)
	g.SetEndpoints(eps)
	g.Join(join)
	return g.Run(ctx)
}

// ---- the wire ----

// memberlist's types of messages (its net.go).
const (
	mlIndirectPing, mlSuspect, mlAlive, mlDead, mlPushPull, mlCompound, mlUser, mlCompress, mlEncrypt = 1, 3, 4, 5, 6, 7, 8, 9, 10
)

// swim encodes a message as memberlist does: its type and a msgpack map.
func swim(typ byte, kv ...any) []byte {
	b := []byte{typ, 0x80 | byte(len(kv)/2)}
	str := func(s string) { b = append(append(b, 0xa0|byte(len(s))), s...) }
	for i := 0; i < len(kv); i += 2 {
		str(kv[i].(string))
		switch v := kv[i+1].(type) {
		case string:
			str(v)
		case uint32:
			b = binary.BigEndian.AppendUint32(append(b, 0xce), v)
		case []byte:
			b = append(append(b, 0xc4, byte(len(v))), v...)
		}
	}
	return b
}

// sealing is what gossip/seal.go and wall.go describe.
type sealing struct {
	use            uint32
	aead           cipher.AEAD
	inPacket, inTx []byte
}

func newSeal(cluster string, keys []state.GossipKey) sealing {
	var s sealing
	for _, k := range keys {
		if k.Primary {
			block, err := aes.NewCipher(k.Key)
			if err != nil {
				panic(err)
			}
			s.use = uint32(k.Generation)
			s.aead, _ = cipher.NewGCM(block)
		}
	}
	aad := func(use string) []byte { h := sha256.Sum256([]byte(use + "\x00" + cluster)); return h[:] }
	s.inPacket, s.inTx = aad("shoal gossip packet"), aad("shoal gossip stream")
	return s
}

func (s sealing) frame(text, aad []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{1}, s.use)
	nonce := make([]byte, 12)
	_, _ = rand.Read(nonce)
	return s.aead.Seal(append(b, nonce...), nonce, text, aad)
}

func (s sealing) packet(text []byte) []byte { return s.frame(text, s.inPacket) }

// stream is a whole message as the one who dials sends it, or one that goes on.
func (s sealing) stream(text []byte, last bool) []byte {
	id := make([]byte, 16)
	_, _ = rand.Read(id)
	out := bytes.Clone(id)
	for n := uint32(0); ; n++ {
		part := text[:min(len(text), 64<<10)]
		text = text[len(part):]
		end := last && len(text) == 0
		aad := append(bytes.Clone(s.inTx), id...)
		aad = binary.BigEndian.AppendUint32(append(aad, 1), n)
		head := uint32(len(part) + 33)
		if aad = append(aad, 0); end {
			aad[len(aad)-1] = 1
			head |= 1 << 31
		}
		out = binary.BigEndian.AppendUint32(out, head)
		out = append(out, s.frame(part, aad)...)
		if len(text) == 0 {
			return out
		}
	}
}

// datagram is one of UDP.
type datagram struct {
	from, to netip.AddrPort
	body     []byte
}

// packet is it with a source of its own, for a raw socket (raw(7), IP_HDRINCL).
func (d datagram) packet() []byte {
	b := make([]byte, 28, 28+len(d.body))
	b[0], b[8], b[9] = 0x45, 64, syscall.IPPROTO_UDP
	binary.BigEndian.PutUint16(b[2:], uint16(28+len(d.body)))
	copy(b[12:], d.from.Addr().AsSlice())
	copy(b[16:], d.to.Addr().AsSlice())
	binary.BigEndian.PutUint16(b[20:], d.from.Port())
	binary.BigEndian.PutUint16(b[22:], d.to.Port())
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(d.body)))
	return append(b, d.body...)
}

// tcpStream is what one side of a TCP connection sent.
type tcpStream struct {
	to   netip.AddrPort
	body []byte
}

func (l *attacker) resend(s tcpStream) error {
	d := net.Dialer{Timeout: time.Second, LocalAddr: &net.TCPAddr{IP: l.Addr.AsSlice()}}
	c, err := d.Dial("tcp", s.to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	_, _ = c.Write(s.body)
	_, _ = c.Read(make([]byte, 4096))
	return nil
}

// readPcap reads what tcpdump wrote (pcap-savefile(5)): datagrams and streams to agents.
func readPcap(file string) (datagrams []datagram, streams []tcpStream) {
	b, err := os.ReadFile(file)
	if err != nil || len(b) < 24 {
		return nil, nil
	}
	type flow struct{ from, to netip.AddrPort }
	first, flows := map[flow]uint32{}, map[flow][]byte{}
	for b = b[24:]; len(b) >= 16; {
		n := int(binary.LittleEndian.Uint32(b[8:]))
		if n > len(b)-16 {
			break
		}
		p := b[16 : 16+n]
		b = b[16+n:]
		if len(p) < 14+20+8 || p[12] != 8 || p[13] != 0 || p[14] != 0x45 {
			continue
		}
		ip := p[14:]
		ip = ip[:min(len(ip), int(binary.BigEndian.Uint16(ip[2:])))]
		from, _ := netip.AddrFromSlice(ip[12:16])
		to, _ := netip.AddrFromSlice(ip[16:20])
		f := flow{netip.AddrPortFrom(from, binary.BigEndian.Uint16(ip[20:])), netip.AddrPortFrom(to, binary.BigEndian.Uint16(ip[22:]))}
		switch {
		case ip[9] == syscall.IPPROTO_UDP && f.to.Port() == 7946:
			datagrams = append(datagrams, datagram{f.from, f.to, ip[28:]})
		case ip[9] == syscall.IPPROTO_TCP && len(ip) >= 40 && (f.to.Port() == 7946 || f.to.Port() == 2377):
			seq, data := binary.BigEndian.Uint32(ip[24:]), ip[20+int(ip[32]>>4)*4:]
			if ip[33]&2 != 0 { // SYN
				first[f], flows[f] = seq+1, nil
			} else if at := seq - first[f]; first[f] != 0 && int(at) == len(flows[f]) && at < 1<<20 {
				flows[f] = append(flows[f], data...)
			}
		}
	}
	for f, body := range flows {
		if len(body) > 0 {
			streams = append(streams, tcpStream{f.to, body})
		}
	}
	return datagrams, streams
}

// attacker starts one in a namespace. end ends him and returns how often he did what.
func (s site) attacker(netns string, l loot) (end func() map[string]int) {
	s.Helper()
	b, err := json.Marshal(&l)
	if err != nil {
		s.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		s.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", netns, exe)
	cmd.Env = append(os.Environ(), "SHOAL_ATTACK="+string(b))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	in, err := cmd.StdinPipe()
	if err != nil {
		s.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	var once sync.Once
	counts := map[string]int{}
	end = func() map[string]int {
		once.Do(func() {
			in.Close()
			t := time.AfterFunc(slow(30*time.Second), func() { _ = cmd.Process.Signal(syscall.SIGQUIT) })
			err := cmd.Wait()
			t.Stop()
			if err == nil {
				err = json.Unmarshal(out.Bytes(), &counts)
			}
			if err != nil {
				s.Errorf("the attacker in %s: %v\n%s%s", netns, err, out.Bytes(), errs.Bytes())
			}
		})
		return counts
	}
	s.Cleanup(func() {
		if counts := end(); s.Failed() {
			s.Logf("the attacker in %s: %v\n%s", netns, counts, errs.Bytes())
		}
	})
	return end
}
