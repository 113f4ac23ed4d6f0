package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
)

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
			err = fmt.Errorf("managers' log %s: %w", path, err)
		}
	}()
	// The time-out: this process may have it open still, from a try that panicked.
	if store, err = raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: &bbolt.Options{Timeout: time.Second}}); err != nil {
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
