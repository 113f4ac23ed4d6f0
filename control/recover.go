package control

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/spec"
)

// Recovered is what came of Recover.
type Recovered struct {
	Lost  []spec.Node // the managers that count no more
	Index uint64      // of the last entry that this manager had
	Nodes int         // without Lost
}

// Recover makes the cluster anew from what this manager has on its disk, with this
// one as its only manager. No Manager may be open. The store of before is kept
// aside, at LostPath. After a crash at any moment the store is the old or the new
// one.
//
// Entries that this manager has and that were not known to be committed count: to
// drop one that was is the worse mistake.
func Recover(cfg ManagerConfig) (Recovered, error) {
	st, term, err := readStore(cfg)
	if err != nil {
		return Recovered{}, err
	}
	out := Recovered{Index: st.Index()}
	if _, err := st.Node(cfg.Node.ID); err != nil {
		return Recovered{}, fmt.Errorf("its log is of a cluster that this node is not in: %w", err)
	}
	if out.Lost, err = st.Recover(cfg.Node, time.Now(), 0); err != nil {
		return Recovered{}, err
	}
	out.Nodes = len(st.Nodes()) - len(out.Lost)
	return out, replaceStore(cfg, st, term+1)
}

// Restore makes the cluster anew from a saved state, with this node as its only
// manager, in the place of what it has on its disk; see [Recover]. The node's number
// in the cluster is in the result.
func Restore(cfg ManagerConfig, st *state.State) (Recovered, spec.Node, error) {
	out := Recovered{Index: st.Index()}
	term, beyond := uint64(1), uint64(0)
	if was, t, err := readStore(cfg); err == nil {
		term, beyond = t+1, was.Index()
	}
	var err error
	if out.Lost, err = st.Recover(cfg.Node, time.Now(), beyond); err != nil {
		return Recovered{}, spec.Node{}, err
	}
	n, err := st.Node(cfg.Node.ID)
	if err != nil {
		return Recovered{}, spec.Node{}, err
	}
	return out, n, replaceStore(cfg, st, term)
}

// Alone tells whether this manager leads as the only voter.
func (m *Manager) Alone() bool {
	return m.IsLeader() && len(m.raft.GetConfiguration().Configuration().Servers) == 1
}

// readStore is the state that a store leads to, and its term.
func readStore(cfg ManagerConfig) (*state.State, uint64, error) {
	s, err := openStore(cfg)
	if err != nil {
		return nil, 0, err
	}
	defer s.Close()
	var snaps raft.SnapshotStore = s.snaps
	if s.seal != nil {
		snaps = &sealedSnaps{snaps, s.seal}
	}
	metas, err := snaps.List()
	if err != nil {
		return nil, 0, fmt.Errorf("managers' log: %w", err)
	}
	f := newFSM(cfg.Log)
	var from, term uint64
	for _, m := range metas { // newest first
		_, r, oerr := snaps.Open(m.ID)
		if oerr == nil {
			oerr = f.Restore(r)
		}
		if oerr == nil {
			from, term = m.Index, m.Term
			break
		}
		err = oerr
	}
	first, ferr := s.FirstIndex()
	last, lerr := s.LastIndex()
	if err := errors.Join(ferr, lerr); err != nil {
		return nil, 0, fmt.Errorf("managers' log: %w", err)
	}
	if from == 0 && (len(metas) > 0 || first > 1) {
		return nil, 0, fmt.Errorf("no snapshot of the managers' log can be read: %w", err)
	}
	for i := max(from+1, first, 1); i <= last; i++ {
		var l raft.Log
		if err := s.GetLog(i, &l); err != nil {
			return nil, 0, fmt.Errorf("managers' log: entry %d: %w", i, err)
		}
		if term = l.Term; l.Type == raft.LogCommand {
			f.Apply(&l)
		}
	}
	if err := f.standing(); err != nil {
		return nil, 0, err
	}
	if now, err := s.GetUint64(keyTerm); err == nil {
		term = max(term, now)
	}
	return f.st, term, nil
}

// replaceStore puts a store in the place of this node's, if it has one, that begins
// with the state given, in the term given, with this node as the only voter.
func replaceStore(cfg ManagerConfig, st *state.State, term uint64) error {
	dir := RaftDir(cfg.DataDir)
	tmp := dir + durable.Suffix
	if err := errors.Join(os.RemoveAll(tmp), os.MkdirAll(tmp, 0o700)); err != nil {
		return err
	}
	k := mark{Node: cfg.Node.ID, Store: spec.NewID(), Term: term, LastTerm: term, LastIndex: st.Index()}
	db, err := openLog(filepath.Join(tmp, "log.db"))
	if err != nil {
		return err
	}
	err = errors.Join(db.SetUint64(keyTerm, term), db.Set(keyStore, []byte(k.Store)))
	var snaps raft.SnapshotStore
	if err == nil {
		snaps, err = raft.NewFileSnapshotStoreWithLogger(tmp, snapshotsKept, raftLogger(cfg.Log))
	}
	if err == nil && len(cfg.Seal) > 0 {
		seal, serr := gcm(cfg.Seal, "store")
		err = errors.Join(serr, db.SetUint64(keySealed, 1))
		snaps = &sealedSnaps{snaps, seal}
	}
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	b, err := st.Snapshot()
	if err != nil {
		return err
	}
	addr := raftAddress(cfg.Node)
	_, trans := raft.NewInmemTransport(addr) // only for how addresses are written
	sink, err := snaps.Create(raft.SnapshotVersionMax, st.Index(), term, raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(cfg.Node.ID), Address: addr}}}, 1, trans)
	if err != nil {
		return err
	}
	if err := errors.Join(snapshot(b).Persist(sink), durable.SyncDir(tmp)); err != nil {
		return err
	}
	// A store without a mark is taken as it is: so either one is right from here on.
	if err := os.Remove(MarkPath(cfg.DataDir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := exchange(tmp, dir); err != nil {
		return err
	}
	if err := errors.Join(durable.SyncDir(cfg.DataDir), k.save(cfg.DataDir)); err != nil {
		return err
	}
	if _, err := os.Stat(tmp); err == nil { // what was there
		return errors.Join(os.RemoveAll(LostPath(cfg.DataDir)), os.Rename(tmp, LostPath(cfg.DataDir)), durable.SyncDir(cfg.DataDir))
	}
	return nil
}

// exchange puts a in the place of b, and what is there in the place of a.
func exchange(a, b string) error {
	err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT):
		return os.Rename(a, b)
	}
	// A file system that can't: with a moment in which there is none.
	aside := b + ".aside"
	return errors.Join(os.RemoveAll(aside), os.Rename(b, aside), os.Rename(a, b), os.Rename(aside, a))
}
