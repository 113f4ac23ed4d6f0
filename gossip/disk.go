package gossip

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/shoalnet/shoal/internal/durable"
)

// What has to outlive the process: DataDir/gossip/epoch, a decimal number, and
// DataDir/gossip/peers.json.

// nextEpoch returns an epoch above the stored one and above atLeast, once it
// is stored. A damaged file counts as 0: the first peer that knows better makes
// us move on (see checkSelf).
func nextEpoch(dir string, atLeast uint64, log *slog.Logger) (uint64, error) {
	path := filepath.Join(dir, "epoch")
	old := uint64(0)
	b, err := os.ReadFile(path)
	if err == nil {
		old, err = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("boot epoch can't be read; beginning anew", "path", path, "error", err)
	}
	epoch := max(old, atLeast) + 1
	if err := durable.WriteFile(path, []byte(strconv.FormatUint(epoch, 10)+"\n")); err != nil {
		return 0, fmt.Errorf("gossip: keep boot epoch: %w", err)
	}
	return epoch, nil
}

type peersFile struct {
	Peers []peerRecord `json:"peers"`
}

type peerRecord struct {
	Addr netip.AddrPort `json:"addr"`
	Node string         `json:"node,omitempty"`
}

func loadPeers(dir string) ([]peerRecord, error) {
	b, err := os.ReadFile(filepath.Join(dir, "peers.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("gossip: peer list: %w", err)
	}
	var f peersFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("gossip: peer list %s: %w", filepath.Join(dir, "peers.json"), err)
	}
	return f.Peers, nil
}

func savePeers(dir string, peers []peerRecord) error {
	b, err := json.MarshalIndent(peersFile{peers}, "", "  ")
	if err == nil {
		err = durable.WriteFile(filepath.Join(dir, "peers.json"), append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("gossip: keep peer list: %w", err)
	}
	return nil
}
