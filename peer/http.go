package peer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
)

// Bounds of HTTP connections.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 64 << 10 // bytes
)

// Server serves the API on one kind of listener. On connections of a Peer the
// caller is who the certificate says; on others, which are the node's own unix
// socket, local says who it is.
func (p *Peer) Server(h http.Handler, log *slog.Logger, local func() Caller) *http.Server {
	return &http.Server{
		Handler: p.guard(h), Protocols: protocols(), ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		HTTP2:    &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if pc, ok := c.(*Conn); ok {
				return WithCaller(ctx, pc.Caller())
			}
			if local != nil {
				return context.WithValue(ctx, localKey{}, local)
			}
			return ctx
		},
	}
}

// localKey carries who a local caller is: its node may enter a cluster while the
// connection is open.
type localKey struct{}

func protocols() *http.Protocols {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true) // it sees what is inside of TLS
	return p
}

// NodeHeader names the node (ID) that a call of the Node service is for. The agent
// that gets it from its own socket passes it on when it is another.
const NodeHeader = "Shoal-Node"

// UnknownHeader, of an error, says that it is not known whether the change was made.
const UnknownHeader = "Shoal-Unknown-Outcome"

// RemovedHeader, of an answer, says that the caller is no longer in the cluster.
const RemovedHeader = "Shoal-Removed"

// guard is the one place where calls are let in: by [Table].
func (p *Peer) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		var err error
		c := CallerFrom(ctx)
		if local, ok := ctx.Value(localKey{}).(func() Caller); ok {
			c = local()
		} else if c, err = p.Again(c); err != nil {
			w.Header().Set(RemovedHeader, "1")
			p.deny(w, r, connect.CodeUnauthenticated, err)
			return
		}
		rule, ok := ruleOf(r.URL.Path)
		switch {
		case !ok:
			p.deny(w, r, connect.CodeUnimplemented, fmt.Errorf("there is nothing at %q", r.URL.Path))
		case rule.Who&c.Kind == 0 && c.Kind == Stranger:
			p.deny(w, r, connect.CodeUnauthenticated, errors.New("this needs a certificate of the cluster: nodes get one by 'shoal join'"))
		case rule.Who&c.Kind == 0:
			p.deny(w, r, connect.CodePermissionDenied, fmt.Errorf("%s may not call %s: run this on a manager", c, Verb(r.URL.Path)))
		default:
			if !p.begin(c) {
				p.deny(w, r, connect.CodeResourceExhausted, fmt.Errorf("too many calls of %s are being answered: try again when some of them have ended", c))
				return
			}
			defer p.end(c)
			if rule.Body > 0 {
				r.Body = http.MaxBytesReader(w, r.Body, rule.Body)
			}
			next.ServeHTTP(w, r.WithContext(WithCaller(ctx, c)))
		}
	})
}

// callsOf bounds the calls of one caller that are being answered; 0: not bounded. A
// worker's are some streams; a manager's those of its users.
func callsOf(c Caller) int {
	switch c.Kind {
	case Worker:
		return 64
	case Manager:
		return 1024
	case Local:
		return 0
	}
	return 16
}

func callKey(c Caller) string {
	if c.ID != "" {
		return c.ID
	}
	return prefixOf(c.Addr).String()
}

// begin counts a call; false when it is one too many.
func (p *Peer) begin(c Caller) bool {
	most, key := callsOf(c), callKey(c)
	p.mu.Lock()
	defer p.mu.Unlock()
	if most > 0 && p.calls[key] >= most {
		return false
	}
	p.calls[key]++
	return true
}

func (p *Peer) end(c Caller) {
	key := callKey(c)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.calls[key]--; p.calls[key] <= 0 {
		delete(p.calls, key)
	}
}

// Verb is the last part of a procedure's path, the name of the call.
func Verb(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

func (p *Peer) deny(w http.ResponseWriter, r *http.Request, code connect.Code, err error) {
	p.counters.denied.Add(1)
	if ew := connect.NewErrorWriter(); ew.IsSupported(r) {
		_ = ew.Write(w, r, connect.NewError(code, err))
		return
	}
	status := http.StatusForbidden
	switch code {
	case connect.CodeUnimplemented:
		status = http.StatusNotFound
	case connect.CodeResourceExhausted:
		status = http.StatusTooManyRequests
	case connect.CodeUnauthenticated:
		status = http.StatusUnauthorized
	}
	http.Error(w, err.Error(), status)
}

func client(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Client {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return &http.Client{Transport: &http.Transport{
		Protocols:   p,
		DialContext: dial,
		// A peer that vanished without a word is found out even while a
		// stream is silent.
		HTTP2:           &http.HTTP2Config{SendPingTimeout: 3 * time.Second, PingTimeout: 3 * time.Second},
		IdleConnTimeout: 30 * time.Second,
	}}
}

// UnixClient calls an agent by its unix socket, whatever the URL's host.
func UnixClient(socket string) *http.Client {
	c := client(func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	})
	// No pings: the kernel tells of an agent's end, and one that only stalls must
	// not lose its sessions.
	c.Transport.(*http.Transport).HTTP2 = nil
	return c
}

// Managers calls managers by the address in the URL: nothing is sent to anyone
// who does not show a manager's certificate. URLs begin with "http:", as all that
// there is of TLS is below HTTP.
func (p *Peer) Managers() *http.Client {
	return client(func(ctx context.Context, _, addr string) (net.Conn, error) {
		c, err := p.Dial(ctx, addr, ProtoAPI, IsManager)
		if err != nil {
			return nil, err // not a *Conn that is nil
		}
		return c, nil
	})
}

// NodesBy calls nodes by their ID, which is the host in the URL; find tells where
// a node listens. Only that node gets to see the call.
func (p *Peer) NodesBy(find func(id string) (addr string, err error)) *http.Client {
	c := client(func(ctx context.Context, _, hostport string) (net.Conn, error) {
		id, _, err := net.SplitHostPort(hostport)
		if err != nil {
			return nil, err
		}
		addr, err := find(id)
		if err != nil {
			return nil, err
		}
		c, err := p.Dial(ctx, addr, ProtoAPI, IsNode(id))
		if err != nil {
			return nil, err
		}
		return c, nil
	})
	// These carry sessions of people, which an agent that stalls for some seconds must
	// not lose.
	c.Transport.(*http.Transport).HTTP2 = &http.HTTP2Config{SendPingTimeout: 5 * time.Second, PingTimeout: 10 * time.Second}
	return c
}

// A WrongClusterError says that who answers a joining node is not of the cluster
// that its token is for.
type WrongClusterError struct{ Addr, Cluster string }

func (e *WrongClusterError) Error() string {
	return fmt.Sprintf("the join token is of another cluster than %s, which is of cluster %s, or of before 'shoal ca rotate' there: run 'shoal token show' on a manager there", e.Addr, e.Cluster)
}

// Joiner calls the manager at addr on behalf of a node without a certificate. It
// sends nothing to anyone who does not show a manager's certificate by the root
// of that digest.
func Joiner(addr, digest string) *http.Client {
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{ProtoAPI}, SessionTicketsDisabled: true,
		InsecureSkipVerify: true, // not by name: by the digest
		VerifyConnection: func(cs tls.ConnectionState) error {
			s, err := verifyDigest(cs, digest)
			var wrong *WrongClusterError
			if errors.As(err, &wrong) {
				wrong.Addr = addr
			}
			if err != nil {
				return err
			}
			return IsManager(Caller{Kind: kindOf(s.Role), ID: s.ID})
		},
	}
	return client(func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := dialTLS(ctx, addr, cfg)
		if err != nil {
			return nil, err
		}
		return c, nil
	})
}

func verifyDigest(cs tls.ConnectionState, digest string) (Subject, error) {
	certs := cs.PeerCertificates
	if len(certs) == 0 {
		return Subject{}, errors.New("no certificate is shown")
	}
	s, err := subject(certs[0])
	if err != nil {
		return s, err
	}
	for _, r := range certs[1:] {
		if Digest(r.Raw) == digest {
			return verifyChain(certs, []*x509.Certificate{r})
		}
	}
	return s, &WrongClusterError{Cluster: s.Cluster}
}

// CompressLarge has answers compressed that gain by it. Setting up a compressor costs
// more than most calls, whose answers fit a packet as they are.
func CompressLarge() connect.HandlerOption { return connect.WithCompressMinBytes(1 << 10) }
