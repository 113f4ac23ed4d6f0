package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/spec"
)

// identity is what a node must not forget: who it is and in which cluster. It
// is node.json in the data directory.
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

func identityPath(dataDir string) string { return filepath.Join(dataDir, "node.json") }

// loadIdentity reads node.json, or makes a new identity when there is none.
func loadIdentity(dataDir, name string) (*identity, error) {
	path := identityPath(dataDir)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		id := &identity{Format: identityFormat, NodeID: spec.NewID(), Name: name}
		return id, id.save(dataDir)
	}
	if err != nil {
		return nil, fmt.Errorf("read node identity: %w", err)
	}
	id := &identity{}
	if err := json.Unmarshal(b, id); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w: restore it, or remove the data directory to start as a new node", path, err)
	}
	if id.Format != identityFormat {
		return nil, fmt.Errorf("%s has format %d, this version of shoal reads %d: use the version that wrote it", path, id.Format, identityFormat)
	}
	if id.NodeID == "" || id.Name == "" {
		return nil, fmt.Errorf("%s is damaged: it names no node: restore it, or remove the data directory to start as a new node", path)
	}
	// In a cluster a node keeps its name, whatever the host's or a flag's is by now:
	// 'shoal node update --name' changes it.
	if name != "" && id.Name != name && id.Cluster.ID == "" {
		id.Name = name
		return id, id.save(dataDir)
	}
	return id, nil
}

// save writes node.json so that a crash leaves the old or the new one.
func (id *identity) save(dataDir string) error {
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(identityPath(dataDir), append(b, '\n'))
}

// lockDir keeps a second agent away from a data directory. The lock goes with
// the process, whatever ends it.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		b, _ := os.ReadFile(f.Name())
		f.Close()
		return nil, fmt.Errorf("data directory %s is in use by the agent with pid %s: stop it, or give another --data-dir", dir, strings.TrimSpace(string(b)))
	}
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteString(strconv.Itoa(os.Getpid()) + "\n")
	}
	return f, nil
}
