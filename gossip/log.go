package gossip

import (
	"context"
	"log"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// logWriter turns memberlist's log lines, "[LEVEL] memberlist: text", into
// slog records, one level milder than memberlist thinks: its errors are mostly
// packets that some node did not answer, which the cluster is built to bear.
// The same line again within repeatAfter is left out.
type logWriter struct {
	log    *slog.Logger
	closed atomic.Bool

	mu   sync.Mutex
	seen map[string]time.Time
}

const repeatAfter = 10 * time.Second

func newLogger(l *slog.Logger) (*log.Logger, *logWriter) {
	w := &logWriter{log: l, seen: map[string]time.Time{}}
	return log.New(w, "", 0), w
}

// parseLine splits one line of memberlist's.
func parseLine(line string) (slog.Level, string) {
	line = strings.TrimSpace(line)
	level := slog.LevelInfo
	if rest, ok := strings.CutPrefix(line, "["); ok {
		if name, text, ok := strings.Cut(rest, "]"); ok {
			line = strings.TrimSpace(text)
			switch name {
			case "ERR", "ERROR":
				level = slog.LevelWarn
			case "WARN":
				level = slog.LevelInfo
			default: // its INFO tells of single suspicions
				level = slog.LevelDebug
			}
		}
	}
	return level, strings.TrimSpace(strings.TrimPrefix(line, "memberlist:"))
}

// Write implements io.Writer; log.Logger calls it once per line.
func (w *logWriter) Write(p []byte) (int, error) {
	level, text := parseLine(string(p))
	if w.closed.Load() || !w.log.Enabled(context.Background(), level) {
		return len(p), nil
	}
	now := time.Now()
	w.mu.Lock()
	again := now.Sub(w.seen[text]) < repeatAfter
	if !again {
		if len(w.seen) > 256 {
			clear(w.seen)
		}
		w.seen[text] = now
	}
	w.mu.Unlock()
	if !again {
		w.log.Log(context.Background(), level, "memberlist: "+text)
	}
	return len(p), nil
}
