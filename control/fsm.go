package control

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/shoalnet/shoal/control/state"
)

// fsm is raft's view of the state. Readers take the lock for reading.
type fsm struct {
	log    *slog.Logger
	events *eventLog

	mu      sync.RWMutex
	st      *state.State
	changed bell  // of each change
	stuck   error // why nothing more is applied; nil: all is
	level   error // why the last snapshot could not be restored: it is of a newer version
}

func newFSM(log *slog.Logger) *fsm {
	return &fsm{log: log, events: newEventLog(), st: state.New(), changed: make(bell)}
}

// read calls fn with the state, which fn must not keep.
func (f *fsm) read(fn func(*state.State)) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	fn(f.st)
}

// next is closed at the next change. Take it before reading what may change.
func (f *fsm) next() <-chan struct{} {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.changed
}

// StuckError says that a manager met an entry of the log that it can't read. It applies
// nothing from there on: the managers that can read it go on from another state.
type StuckError struct {
	Index uint64
	Err   error
}

func (e *StuckError) Error() string {
	if e.Index == 0 {
		return fmt.Sprintf("this manager can't read the managers' state, which a newer version wrote (%v): it follows nothing more and does not lead; upgrade shoal on this node", e.Err)
	}
	return fmt.Sprintf("this manager can't read entry %d of the managers' log, which a newer version wrote (%v): it applies nothing more and does not lead; upgrade shoal on this node", e.Index, e.Err)
}

func (e *StuckError) Unwrap() error { return e.Err }

// unread is why a snapshot of the managers' state could not be read: a newer version
// wrote it; nil when none was met.
func (f *fsm) unread() error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.level
}

// standing is why nothing more is applied; nil when all is.
func (f *fsm) standing() error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.stuck == nil && f.level != nil {
		return &StuckError{Err: f.level}
	}
	return f.stuck
}

// Apply implements raft.FSM. An entry that can't be read is of a newer version: to
// skip it would let the managers' states part without a word.
func (f *fsm) Apply(l *raft.Log) any {
	cmd, err := state.Decode(l.Data)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stuck == nil && err != nil {
		f.stuck = &StuckError{l.Index, err}
		f.log.Error("the managers' log can't be followed", "error", f.stuck)
	}
	if f.stuck != nil {
		return state.Result{Err: f.stuck}
	}
	r := f.st.Apply(l.Index, cmd)
	at := l.AppendedAt
	if at.IsZero() {
		at = time.Now()
	}
	f.events.add(at, f.st.TakeEvents())
	if r.Err == nil {
		// A refused command changed nothing: whoever waits for what it was
		// refused for would be woken by its own trying.
		f.changed.ring()
	}
	return r
}

// Snapshot implements raft.FSM.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.stuck != nil {
		return nil, f.stuck // the entries are still needed
	}
	b, err := f.st.Snapshot()
	if err != nil {
		return nil, fmt.Errorf("snapshot of the cluster state: %w", err)
	}
	return snapshot(b), nil
}

// Restore implements raft.FSM.
func (f *fsm) Restore(r io.ReadCloser) error {
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("read snapshot of the cluster state: %w", err)
	}
	st, err := state.Restore(b)
	f.mu.Lock()
	defer f.mu.Unlock()
	if errors.Is(err, state.ErrLevel) {
		f.level = err
	}
	if err != nil {
		return err
	}
	f.st, f.stuck, f.level = st, nil, nil
	f.changed.ring()
	return nil
}

type snapshot []byte

func (s snapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := sink.Write(s); err != nil {
		_ = sink.Cancel()
		return err
	}
	return sink.Close()
}

func (snapshot) Release() {}
