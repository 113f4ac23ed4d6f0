package gossip

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// lines keeps what is logged.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A connection that says nothing is nobody's news: agents look so whether
// another's machine is there. A stranger that speaks is, in a line of counts.
func TestSilentConnections(t *testing.T) {
	log := &lines{}
	g, err := Open(Config{NodeID: nodeID(1), Name: "n1", Number: 1, Role: spec.RoleWorker, Cluster: "silent",
		Addr: netip.AddrFrom4([4]byte{127, 0, 0, 2}), DataDir: t.TempDir(), Keys: testRing, Signer: newSigner(), Log: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- g.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for range 20 {
		c, err := net.Dial("tcp", g.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.(*net.TCPConn).CloseWrite()
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		// It is closed without a word.
		if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("read %d, %v", n, err)
		}
		c.Close()
	}
	if s := log.String(); strings.Contains(s, "stream") || strings.Contains(s, "label") {
		t.Errorf("silent connections are logged:\n%s", s)
	}
	c, err := net.Dial("tcp", g.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello?")); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); !strings.Contains(log.String(), "not let in"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("one that speaks wrongly is not logged:\n%s", log.String())
		}
	}
}
