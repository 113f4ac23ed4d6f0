package control

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/raft"

	"github.com/shoalnet/shoal/internal/durable"
)

// Autolock: what a manager keeps on its disk, which has the root's key in it, is
// sealed with a key of the manager's own. That key is in lock.json, sealed with
// the cluster's unlock key, which is in no file: after a start a person has to
// give it. So the unlock key can be replaced without writing the log anew.

const (
	lockFile   = "lock.json"
	lockFormat = 1
	sealKeyLen = 32 // bytes, AES-256
)

// LockPath is where a manager keeps the sealed key of its store.
func LockPath(dataDir string) string { return filepath.Join(dataDir, lockFile) }

type lockJSON struct {
	Format     int    `json:"format"`
	Generation uint64 `json:"generation"` // of the unlock key
	Key        []byte `json:"key"`        // sealed
}

const unlockPrefix = "SHOALKEY-1-"

var unlockText = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// NewUnlockKey makes an unlock key, as people type it.
func NewUnlockKey() string {
	b := make([]byte, sealKeyLen)
	_, _ = rand.Read(b) // never fails
	return unlockPrefix + unlockText.EncodeToString(b)
}

func parseUnlockKey(s string) ([]byte, error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(s), unlockPrefix)
	b, err := unlockText.DecodeString(rest)
	if !ok || err != nil || len(b) != sealKeyLen || unlockText.EncodeToString(b) != rest {
		return nil, fmt.Errorf("that is no unlock key: want one that begins with %s, whole, as 'shoal unlock-key' prints it on a manager", unlockPrefix)
	}
	return b, nil
}

// NewSealKey makes a key for a manager's store.
func NewSealKey() []byte {
	b := make([]byte, sealKeyLen)
	_, _ = rand.Read(b)
	return b
}

func gcm(key []byte, purpose string) (cipher.AEAD, error) {
	k, err := hkdf.Key(sha256.New, key, nil, "shoal "+purpose, sealKeyLen)
	if err != nil {
		return nil, err
	}
	b, err := aes.NewCipher(k)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(b)
}

// WriteLock seals the key of a manager's store with an unlock key.
func WriteLock(dataDir, unlock string, generation uint64, key []byte) error {
	u, err := parseUnlockKey(unlock)
	if err != nil {
		return err
	}
	a, err := gcm(u, "unlock")
	if err != nil {
		return err
	}
	b, err := json.Marshal(lockJSON{lockFormat, generation, a.Seal(nil, nil, key, nil)})
	if err != nil {
		return err
	}
	return durable.WriteFile(LockPath(dataDir), append(b, '\n'))
}

func readLock(dataDir string) (*lockJSON, error) {
	b, err := os.ReadFile(LockPath(dataDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("lock of the managers' log: %w", err)
	}
	l := &lockJSON{}
	if err := json.Unmarshal(b, l); err != nil || l.Format != lockFormat {
		return nil, fmt.Errorf("%s is damaged, or of another version: restore it from a copy; without it the managers' log of this node can't be read: "+
			"then leave ('shoal leave --force') and join again", LockPath(dataDir))
	}
	return l, nil
}

// LockGeneration is that of the unlock key that the lock opens with; 0 without a
// lock.
func LockGeneration(dataDir string) (uint64, error) {
	l, err := readLock(dataDir)
	if l == nil {
		return 0, err
	}
	return l.Generation, nil
}

// OpenLock returns the key of the manager's store.
func OpenLock(dataDir, unlock string) ([]byte, error) {
	u, err := parseUnlockKey(unlock)
	if err != nil {
		return nil, err
	}
	l, err := readLock(dataDir)
	if err != nil {
		return nil, err
	}
	if l == nil {
		return nil, errors.New("this node is not locked")
	}
	a, err := gcm(u, "unlock")
	if err != nil {
		return nil, err
	}
	key, err := a.Open(nil, nil, l.Key, nil)
	if err != nil || len(key) != sealKeyLen {
		return nil, errors.New("the unlock key is wrong, or it was rotated since this manager was last up to date: 'shoal unlock-key' on another manager prints the one of now; this one may still need the one before")
	}
	return key, nil
}

// LockedError says that a manager waits for the unlock key.
type LockedError struct{}

func (LockedError) Error() string {
	return "this manager is locked: give the unlock key with 'shoal unlock'"
}

// ---- the sealed store ----

// sealed tells of a store that its entries are.
var keySealed = []byte("ShoalSealed")

func (s *store) sealLog(l *raft.Log) *raft.Log {
	if s.seal == nil {
		return l
	}
	c := *l
	c.Data = s.seal.Seal(nil, nil, l.Data, entryName(l.Index))
	return &c
}

// entryName ties an entry to its place.
func entryName(index uint64) []byte { return binary.BigEndian.AppendUint64([]byte("entry "), index) }

// GetLog implements raft.LogStore.
func (s *store) GetLog(i uint64, l *raft.Log) error {
	if err := s.BoltStore.GetLog(i, l); err != nil || s.seal == nil {
		return err
	}
	data, err := s.seal.Open(nil, nil, l.Data, entryName(l.Index))
	if err != nil {
		return fmt.Errorf("entry %d of the managers' log can't be unsealed: it is damaged, or sealed with another key", i)
	}
	l.Data = data
	return nil
}

// sealedSnaps are snapshots that are sealed as a whole.
type sealedSnaps struct {
	raft.SnapshotStore
	seal cipher.AEAD
}

var snapshotName = []byte("snapshot")

// Create implements raft.SnapshotStore.
func (s *sealedSnaps) Create(v raft.SnapshotVersion, index, term uint64, c raft.Configuration, ci uint64, t raft.Transport) (raft.SnapshotSink, error) {
	sink, err := s.SnapshotStore.Create(v, index, term, c, ci, t)
	if err != nil {
		return nil, err
	}
	return &sealedSink{SnapshotSink: sink, seal: s.seal}, nil
}

// Open implements raft.SnapshotStore.
func (s *sealedSnaps) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, r, err := s.SnapshotStore.Open(id)
	if err != nil {
		return nil, nil, err
	}
	b, err := io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, nil, err
	}
	if b, err = s.seal.Open(nil, nil, b, snapshotName); err != nil {
		return nil, nil, fmt.Errorf("snapshot %s can't be unsealed: it is damaged, or sealed with another key", id)
	}
	m := *meta
	m.Size = int64(len(b)) // it is sent as it is inside
	return &m, io.NopCloser(strings.NewReader(string(b))), nil
}

// sealedSink writes what it was given at the end. The state is in memory as a
// whole anyway.
type sealedSink struct {
	raft.SnapshotSink
	seal cipher.AEAD
	b    []byte
}

// Write implements io.Writer.
func (s *sealedSink) Write(b []byte) (int, error) {
	s.b = append(s.b, b...)
	return len(b), nil
}

// Close implements io.Closer.
func (s *sealedSink) Close() error {
	if _, err := s.SnapshotSink.Write(s.seal.Seal(nil, nil, s.b, snapshotName)); err != nil {
		return errors.Join(err, s.SnapshotSink.Cancel())
	}
	return s.SnapshotSink.Close()
}
