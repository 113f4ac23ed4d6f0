package control

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// layer is raft's transport over the shared listener.
type layer struct {
	net.Listener
}

// Dial implements raft.StreamLayer.
func (layer) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", string(addr), timeout)
	if err != nil {
		return nil, err
	}
	_ = c.SetWriteDeadline(time.Now().Add(timeout))
	if _, err := c.Write([]byte{raftMagic}); err != nil {
		c.Close()
		return nil, err
	}
	_ = c.SetWriteDeadline(time.Time{})
	return c, nil
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
