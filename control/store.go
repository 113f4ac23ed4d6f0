package control

import (
	"crypto/cipher"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/spec"
)

// A manager's vote is worth what its store remembers: which entries it confirmed to
// a leader, and for whom it voted. One that lost its store and votes all the same
// can make a leader of a manager that lacks what was acknowledged. So each store has
// an ID of its own, which is in the log's file and, apart from it, in the mark: a
// store that is not the marked one, or that knows less than the mark says, is lost.
//
// How a manager without a store comes back: it runs no raft, so it neither votes nor
// confirms. It asks the leader (AdmitManager), who first takes it out of raft's
// configuration. Once that is committed, every later majority is one of the others,
// who have all that was committed before, also what only the lost store and one
// other had. The answer brings the leader's term, and the new store begins with its
// vote of that term given away: in no term does a manager vote twice. Then it runs
// raft, says so in its reports, and the leader adds it as it would any new voter.

// markFile is in the data directory, beside RaftDir and not in it.
const markFile = "voter.json"

// mark is the durable evidence that this node was a voter.
type mark struct {
	Format int    `json:"format"` // markFormat
	Node   string `json:"node"`   // ID
	Store  string `json:"store"`  // ID
	// What the store had at least when this was written: a copy from before that is
	// not it any more.
	Term      uint64 `json:"term,omitempty"`
	LastTerm  uint64 `json:"last_term,omitempty"` // of the last entry; entries of a later term may replace it
	LastIndex uint64 `json:"last_index,omitempty"`
	// GivenUp: the node was made a worker, and its store removed.
	GivenUp bool `json:"given_up,omitempty"`
}

const markFormat = 1

// MarkPath is where a manager keeps the mark that it has voted.
func MarkPath(dataDir string) string { return filepath.Join(dataDir, markFile) }

// LostPath is where a store that was found damaged is put aside, for people.
func LostPath(dataDir string) string { return RaftDir(dataDir) + ".lost" }

// StoreLostError says that the node was a manager and what it knew as one is gone:
// it must not vote before a leader has admitted it.
type StoreLostError struct {
	Path string // of the log
	Why  string
	// New: there is no sign that it ever was a voter, as of a node that is just
	// being promoted.
	New bool
	// GivenUp: the node removed it itself when it was made a worker.
	GivenUp bool
}

// Expected tells that nothing is wrong: the node is being made a manager.
func (e *StoreLostError) Expected() bool { return e.New || e.GivenUp }

func (e *StoreLostError) Error() string {
	if e.New {
		return "this node has no managers' log yet: it waits for the leader to admit it"
	}
	if e.GivenUp {
		return "this node gave its managers' log up when it was made a worker: it waits for the leader to admit it anew"
	}
	return fmt.Sprintf("the managers' log %s of this node is lost (%s): it does not vote, and joins the managers anew as soon as a leader admits it", e.Path, e.Why)
}

var keyStore = []byte("ShoalStore")

// readMark returns nil when there is none.
func readMark(dataDir string) (*mark, error) {
	b, err := os.ReadFile(MarkPath(dataDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil && !errors.Is(err, syscall.EISDIR) {
		return nil, err
	}
	k := &mark{}
	if err := json.Unmarshal(b, k); err != nil || k.Format != markFormat || k.Store == "" {
		// It stands for a store whose ID is not known.
		return &mark{}, nil
	}
	return k, nil
}

func (k mark) save(dataDir string) error {
	k.Format = markFormat
	b, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return durable.WriteFile(MarkPath(dataDir), append(b, '\n'))
}

// GiveUp removes the store of a node that is a manager no more: it may never vote from it
// again. The mark that it has voted stays, as a leader may count on it still.
func GiveUp(dataDir string) error {
	k, err := readMark(dataDir)
	if k != nil && k.Store != "" {
		k.GivenUp = true
		err = k.save(dataDir)
	}
	return errors.Join(err, os.RemoveAll(RaftDir(dataDir)), os.RemoveAll(LockPath(dataDir)))
}

// store is what raft keeps on disk.
type store struct {
	*raftboltdb.BoltStore
	id     string
	snaps  *raft.FileSnapshotStore
	seal   cipher.AEAD // nil: entries are as they are; see lock.go
	closed chan struct{}
	once   sync.Once
	err    atomic.Pointer[error] // why the last write failed; nil: it did not
}

// openStore opens the store that this node voted from. With fresh, it never has:
// the store is made. A store that is lost is a StoreLostError; any other error may
// pass, like that of a full disk.
func openStore(cfg ManagerConfig) (*store, error) {
	dir := RaftDir(cfg.DataDir)
	path := filepath.Join(dir, "log.db")
	k, err := readMark(cfg.DataDir)
	if err != nil {
		return nil, fmt.Errorf("mark of the managers' log: %w", err)
	}
	lost := func(format string, args ...any) error {
		return &StoreLostError{Path: path, Why: fmt.Sprintf(format, args...)}
	}
	if !cfg.Fresh {
		fi, err := os.Stat(path)
		switch {
		case errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
			if k == nil && !cfg.Voted {
				return nil, &StoreLostError{Path: path, Why: "there is none", New: true}
			}
			if k != nil && k.GivenUp {
				return nil, &StoreLostError{Path: path, Why: "given up", GivenUp: true}
			}
			return nil, lost("the file is gone")
		case err != nil:
			return nil, fmt.Errorf("managers' log: %w", err)
		case !fi.Mode().IsRegular():
			return nil, lost("it is no file")
		case fi.Size() == 0:
			return nil, lost("the file is empty")
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("raft directory: %w", err)
	}
	db, err := openLog(path)
	if err != nil {
		if passes(err) || cfg.Fresh {
			return nil, err
		}
		return nil, lost("it can't be read: %v", err)
	}
	s := &store{BoltStore: db, closed: make(chan struct{})}
	if len(cfg.Seal) > 0 {
		if s.seal, err = gcm(cfg.Seal, "store"); err != nil {
			db.Close()
			return nil, err
		}
	}
	if err := s.check(cfg, dir, k, lost); err != nil {
		db.Close()
		return nil, err
	}
	return s, nil
}

// check compares the store with the mark, and with itself.
func (s *store) check(cfg ManagerConfig, dir string, k *mark, lost func(string, ...any) error) error {
	id, err := s.Get(keyStore)
	if err != nil && !errors.Is(err, raftboltdb.ErrKeyNotFound) {
		return fmt.Errorf("managers' log: %w", err)
	}
	s.id = string(id)
	term, err := s.GetUint64(keyTerm)
	if err != nil && !errors.Is(err, raftboltdb.ErrKeyNotFound) {
		return fmt.Errorf("managers' log: %w", err)
	}
	sealed, err := s.GetUint64(keySealed)
	if err != nil && !errors.Is(err, raftboltdb.ErrKeyNotFound) {
		return fmt.Errorf("managers' log: %w", err)
	}
	switch {
	case sealed == 1 && s.seal == nil:
		return lost("it is sealed, and %s with its key is gone", LockPath(cfg.DataDir))
	case sealed == 0 && s.seal != nil:
		if i, err := s.LastIndex(); err != nil || i > 0 {
			return lost("it is not sealed, and %s has a key for it", LockPath(cfg.DataDir))
		}
		if err := s.SetUint64(keySealed, 1); err != nil {
			return fmt.Errorf("managers' log: %w", err)
		}
	}
	first, ferr := s.FirstIndex()
	last, lerr := s.LastIndex()
	if err := errors.Join(ferr, lerr); err != nil {
		return fmt.Errorf("managers' log: %w", err)
	}
	if s.snaps, err = raft.NewFileSnapshotStoreWithLogger(dir, snapshotsKept, raftLogger(cfg.Log)); err != nil {
		return fmt.Errorf("raft snapshots: %w", err)
	}
	snap := newestSnapshot(s.snaps)
	lastTerm, lastIndex := snap.term, snap.index
	if last > 0 {
		var l raft.Log
		if err := s.GetLog(last, &l); err != nil {
			return lost("entry %d can't be read: %v", last, err)
		}
		if older(lastTerm, lastIndex, l.Term, l.Index) {
			lastTerm, lastIndex = l.Term, l.Index
		}
	}
	switch {
	case cfg.Fresh:
	case k == nil && s.id == "" && term == 0:
		return lost("it is empty")
	case k == nil: // the mark is lost, or of a version that had none
	case k.Store == "":
		if s.id == "" {
			return lost("neither it nor %s says which it is", MarkPath(cfg.DataDir))
		}
	case s.id != k.Store:
		return lost("it is another one than this node voted from")
	case k.Node != "" && k.Node != cfg.Node.ID:
		return lost("it is of node %s", k.Node)
	case term < k.Term || older(lastTerm, lastIndex, k.LastTerm, k.LastIndex):
		return lost("it is a copy from an earlier time: at term %d and entry %d, after term %d and entry %d", term, lastIndex, k.Term, k.LastIndex)
	}
	// What the log does not have any more is in a snapshot, or nowhere.
	if first > 1 && snap.index+1 < first {
		return lost("the snapshot of what came before entry %d is gone or damaged", first)
	}
	if s.id == "" {
		s.id = spec.NewID()
		if err := s.Set(keyStore, []byte(s.id)); err != nil {
			return fmt.Errorf("managers' log: %w", err)
		}
	}
	if k == nil || k.Store != s.id {
		k = &mark{Node: cfg.Node.ID, Store: s.id, Term: term}
		return k.save(cfg.DataDir)
	}
	return nil
}

// older compares entries as raft does.
func older(term, index, thanTerm, thanIndex uint64) bool {
	return term < thanTerm || term == thanTerm && index < thanIndex
}

type entryID struct{ term, index uint64 }

// newestSnapshot is the entry that the newest snapshot which can be read goes up to.
func newestSnapshot(snaps *raft.FileSnapshotStore) entryID {
	metas, err := snaps.List()
	if err != nil {
		return entryID{}
	}
	for _, m := range metas { // newest first
		_, r, err := snaps.Open(m.ID)
		if err != nil {
			continue
		}
		_, err = io.Copy(io.Discard, r)
		if cerr := r.Close(); err == nil && cerr == nil {
			return entryID{m.Term, m.Index}
		}
	}
	return entryID{}
}

// Keys of raft's own, in its stable store (raft.go there).
var (
	keyTerm     = []byte("CurrentTerm")
	keyVoteTerm = []byte("LastVoteTerm")
	keyVoteCand = []byte("LastVoteCand")
)

// passes tells whether an error of the disk is one that time, or a person, mends
// without the store being another.
func passes(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return false
	}
	return slices.Contains([]syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EACCES, syscall.EPERM, syscall.EMFILE,
		syscall.ENFILE, syscall.ENOMEM, syscall.EIO, syscall.EINTR}, errno)
}

// Admission is what the leader tells a manager that begins anew.
type Admission struct {
	Term   uint64 // the leader's
	Leader string // its control address
}

// Begin makes a new store for a manager that was admitted, in the place of the lost
// one, which is put aside. After a crash at any moment the store is the new one, or
// still lost.
func (a Admission) Begin(dataDir, node string) error {
	if a.Term == 0 || a.Leader == "" {
		return fmt.Errorf("the leader's admission has term %d and address %q", a.Term, a.Leader)
	}
	dir := RaftDir(dataDir)
	tmp := dir + durable.Suffix
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return err
	}
	db, err := openLog(filepath.Join(tmp, "log.db"))
	if err != nil {
		return err
	}
	k := mark{Node: node, Store: spec.NewID(), Term: a.Term}
	err = errors.Join(db.SetUint64(keyTerm, a.Term), db.SetUint64(keyVoteTerm, a.Term), db.Set(keyVoteCand, []byte(a.Leader)), db.Set(keyStore, []byte(k.Store)))
	if err := errors.Join(err, db.Close(), durable.SyncDir(tmp)); err != nil {
		return err
	}
	// From here on the old store is not the marked one any more.
	if err := k.save(dataDir); err != nil {
		return err
	}
	if err := os.RemoveAll(LostPath(dataDir)); err != nil {
		return err
	}
	if err := os.Rename(dir, LostPath(dataDir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	return durable.SyncDir(dataDir)
}

// note keeps what the last write came to.
func (s *store) note(err error) error {
	if err == nil {
		s.err.Store(nil)
	} else {
		s.err.Store(&err)
	}
	return err
}

// StoreLog implements raft.LogStore.
func (s *store) StoreLog(l *raft.Log) error { return s.note(s.BoltStore.StoreLog(s.sealLog(l))) }

// StoreLogs implements raft.LogStore.
func (s *store) StoreLogs(ls []*raft.Log) error {
	if s.seal != nil {
		ls = slices.Clone(ls)
		for i, l := range ls {
			ls[i] = s.sealLog(l)
		}
	}
	return s.note(s.BoltStore.StoreLogs(ls))
}

// Set implements raft.StableStore.
func (s *store) Set(k, v []byte) error { return s.note(s.BoltStore.Set(k, v)) }

// termRetry is the wait between tries to keep a term.
const termRetry = 200 * time.Millisecond

// SetUint64 implements raft.StableStore. Raft panics over a term that can't be kept:
// it waits here until the disk takes it. Meanwhile this manager neither votes nor
// confirms, which is all that a full disk may cost.
func (s *store) SetUint64(k []byte, v uint64) error {
	for {
		err := s.note(s.BoltStore.SetUint64(k, v))
		if err == nil || string(k) != string(keyTerm) {
			return err
		}
		t := time.NewTimer(termRetry)
		select {
		case <-s.closed:
			// Raft is ending: nothing that it could do in this term is left.
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

// end lets go of whoever waits for the disk.
func (s *store) end() { s.once.Do(func() { close(s.closed) }) }

// DiskErr is why the managers' log could not be written last; nil when it could.
func (m *Manager) DiskErr() error {
	if p := m.store.err.Load(); p != nil {
		return *p
	}
	return nil
}

// StoreID names what this manager votes from.
func (m *Manager) StoreID() string { return m.store.id }

// markInterval is how often the mark is brought up to what the store has.
const markInterval = 30 * time.Second

// keepMark writes down how far the store is.
func (m *Manager) keepMark(last mark) mark {
	k := mark{Node: m.cfg.Node.ID, Store: m.store.id, Term: m.raft.CurrentTerm()}
	var l raft.Log
	if i, err := m.store.LastIndex(); err == nil && i > 0 && m.store.GetLog(i, &l) == nil {
		k.LastTerm, k.LastIndex = l.Term, l.Index
	}
	if k.Format = markFormat; k == last {
		return last
	}
	if err := k.save(m.cfg.DataDir); err != nil {
		m.log.Debug("the mark of the managers' log can't be kept; trying again", "error", err)
		return last
	}
	return k
}
