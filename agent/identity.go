package agent

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// identity is what a node must not forget: who it is and in which cluster. It
// is node.json in the data directory, and a second copy of it.
type identity struct {
	Format      int           `json:"format"` // identityFormat
	NodeID      string        `json:"node_id"`
	Name        string        `json:"name"`
	Cluster     state.Cluster `json:"cluster"` // Cluster.ID is empty while in none
	Number      int           `json:"number,omitempty"`
	Role        string        `json:"role,omitempty"`
	CA          string        `json:"ca,omitempty"` // digest of the root at the time of init or join; empty: the cluster had no certificates yet
	Addr        netip.Addr    `json:"addr,omitzero"`
	ControlPort int           `json:"control_port,omitempty"`
	GossipPort  int           `json:"gossip_port,omitempty"`
	// Managers are the control addresses last heard of, for a start while
	// gossip knows nobody yet.
	Managers []string `json:"managers,omitempty"`
}

const identityFormat = 1

// encode is node.json.
func (id *identity) encode() ([]byte, error) {
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return nil, err
	}
	return indentedSum.add(append(b, '\n')), nil
}

func identityPath(dataDir string) string { return filepath.Join(dataDir, "node.json") }

// lostIdentity says that the node was in a cluster, and no longer knows who it is
// there. To begin as a new node would be to forget what it runs.
type lostIdentity struct{ why string }

func (e *lostIdentity) Error() string {
	return "this node was in a cluster and no longer knows who it is there: " + e.why + ": restore node.json from a backup and start the agent anew, " +
		"or run 'shoal leave --force', which ends the node's tasks, and join again; until then its tasks run without names and changes"
}

// newerIdentity says that node.json is of a version to come.
type newerIdentity struct {
	path   string
	format int
}

func (e *newerIdentity) Error() string {
	return fmt.Sprintf("%s has format %d, this version of shoal reads %d: use the version that wrote it", e.path, e.format, identityFormat)
}

// goneError is the path of a file that is not there.
type goneError string

func (e goneError) Error() string { return string(e) + " is gone" }

// Is makes it an os.ErrNotExist.
func (e goneError) Is(target error) bool { return target == os.ErrNotExist }

// readIdentity reads one file that node.json may be.
func readIdentity(path string) (*identity, []byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, goneError(path)
	} else if err != nil {
		return nil, nil, err
	}
	id := &identity{}
	kept := struct {
		*identity
		Sum *string `json:"sum"`
	}{identity: id}
	switch err := json.Unmarshal(b, &kept); {
	case len(b) == 0:
		return nil, b, fmt.Errorf("%s is damaged: it is empty", path)
	case err != nil:
		return nil, b, fmt.Errorf("%s is damaged: %w", path, err)
	case kept.Sum != nil && indentedSum.check(b, *kept.Sum) != nil: // versions of before write none
		return nil, b, fmt.Errorf("%s is damaged: it is not what its checksum is of", path)
	case id.Format > identityFormat:
		return nil, b, &newerIdentity{path, id.Format}
	case id.Format != identityFormat || id.NodeID == "" || id.Name == "":
		return nil, b, fmt.Errorf("%s is damaged: it names no node", path)
	}
	return id, b, nil
}

// loadIdentity finds out who this node is: by node.json, by its second copy, or by
// what assignment.json says of it; the certificate tells which of them are the
// node's. What can't be this node's node.json is put aside and replaced. A node that
// never was in a cluster is made anew when there is nothing.
//
// The error is a *lostIdentity or *newerIdentity when the node was in a cluster and
// nothing says who it is there; the identity is then only what is known of it, and
// nothing is written.
//
// In a cluster a node keeps its name, whatever the host's or a flag's is by now:
// 'shoal node update --name' changes it. With an empty name fallback is asked for
// that of a new node.
func loadIdentity(dataDir, name string, fallback func() (string, error), log *slog.Logger) (*identity, error) {
	path := identityPath(dataDir)
	creds, _, _ := readCredentials(dataDir, func(peer.Info) bool { return true })
	var info peer.Info
	if creds != nil {
		info, _ = creds.Info()
	}
	var best *identity
	var rank int
	var from string
	offer := func(id *identity, where string) {
		if r := id.fits(info); best == nil || r > rank {
			best, rank, from = id, r, where
		}
	}
	first, written, ferr := readIdentity(path)
	if first != nil {
		offer(first, path)
	}
	second, copied, serr := readIdentity(durable.CopyOf(path))
	if second != nil {
		offer(second, durable.CopyOf(path))
	}
	cache := assignmentPath(dataDir)
	if b, err := os.ReadFile(cache); err == nil {
		if c, err := parseCache(b); err == nil && c.Identity != nil && c.Identity.NodeID == c.Node && c.Identity.Cluster.ID == c.Cluster && c.Identity.Format == identityFormat && c.Identity.Name != "" {
			offer(c.Identity, cache)
		}
	}
	var newer *newerIdentity
	if errors.As(ferr, &newer) || best == nil && (creds != nil || wasMember(dataDir)) {
		if newer == nil {
			ferr = &lostIdentity{fmt.Sprintf("%v, %v, and %s says nothing of it", ferr, serr, cache)}
		}
		id := &identity{Format: identityFormat, NodeID: info.ID, Name: name, Cluster: state.Cluster{ID: cmp.Or(info.Cluster, "unknown")}}
		if id.NodeID == "" {
			id.NodeID = spec.NewID()
		}
		if id.Name == "" {
			var err error
			if id.Name, err = fallback(); err != nil {
				return nil, err
			}
		}
		return id, ferr
	}
	if best == nil {
		if name == "" {
			var err error
			if name, err = fallback(); err != nil {
				return nil, err
			}
			if err := spec.ValidateName("node", name); err != nil {
				return nil, err
			}
		}
		if !errors.Is(ferr, os.ErrNotExist) {
			log.Warn("the identity of a node that was in no cluster can't be read: it is a new node now", "error", ferr)
		}
		id := &identity{Format: identityFormat, NodeID: spec.NewID(), Name: name}
		if err := id.save(dataDir); err != nil {
			return nil, fmt.Errorf("make node identity: %w", err)
		}
		return id, nil
	}
	save := false
	if best != first {
		if ferr == nil {
			ferr = fmt.Errorf("%s is of node %s in cluster %s, and the certificate is not", path, first.NodeID, cmp.Or(first.Cluster.ID, "none"))
		}
		log.Warn("who this node is was not to be had from node.json, and is taken from elsewhere", "error", ferr, "from", from, "id", best.NodeID, "cluster", best.Cluster.ID)
		if !errors.Is(ferr, os.ErrNotExist) {
			if err := durable.PutAside(path); err != nil {
				log.Warn("what was node.json can't be put aside", "error", err)
			}
		}
		save = true
	}
	if name != "" && best.Name != name && best.Cluster.ID == "" {
		best.Name, save = name, true
	}
	if save {
		if err := best.save(dataDir); err != nil {
			log.Warn("node identity can't be kept: the agent goes on without", "error", err)
		}
	} else if !bytes.Equal(written, copied) {
		if err := durable.WriteCopy(path, written); err != nil {
			log.Warn("the second copy of the node identity can't be kept: the agent goes on without", "error", err)
		}
	}
	return best, nil
}

// fits tells how well an identity goes with the node's certificate: 0 not at all, 1
// it may be the node's, 2 it is. Without a certificate any may be.
func (id *identity) fits(info peer.Info) int {
	switch {
	case info.ID == "":
		return 1
	case id.NodeID != info.ID:
		return 0
	case id.Cluster.ID == info.Cluster:
		return 2
	case id.Cluster.ID == "": // a join that was cut short
		return 1
	}
	return 0
}

// wasMember tells that there are files of a node in a cluster.
func wasMember(dataDir string) bool {
	for _, p := range []string{peer.Path(dataDir), durable.CopyOf(peer.Path(dataDir)), control.MarkPath(dataDir), assignmentPath(dataDir)} {
		if _, err := os.Lstat(p); err == nil {
			return true
		}
	}
	return false
}

// save writes node.json, and its second copy, so that a crash leaves the old or the
// new one.
func (id *identity) save(dataDir string) error {
	b, err := id.encode()
	if err != nil {
		return err
	}
	return durable.WriteTwice(identityPath(dataDir), b)
}

// dirLock keeps a second agent away from a data directory. It goes with the process,
// whatever ends that.
type dirLock struct{ dir, file *os.File }

// lockDir locks the directory itself, which a disk that takes nothing can't refuse. The
// file in it tells people who has it, and was the lock of earlier versions.
func lockDir(dir string) (*dirLock, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	path := filepath.Join(dir, "lock")
	taken := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	var f *os.File
	if taken == nil {
		if f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			f, err = os.Open(path)
		}
		if err == nil {
			taken = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}
	}
	l := &dirLock{d, f}
	if taken != nil {
		l.Close()
		b, _ := os.ReadFile(path)
		return nil, fmt.Errorf("data directory %s is in use by the agent with pid %s: stop it, or give another --data-dir", dir, cmp.Or(strings.TrimSpace(string(b)), "?"))
	}
	if err == nil && f.Truncate(0) == nil {
		_, _ = f.WriteString(strconv.Itoa(os.Getpid()) + "\n")
	}
	return l, nil
}

// Close gives the directory up.
func (l *dirLock) Close() {
	l.dir.Close()
	if l.file != nil {
		l.file.Close()
	}
}
