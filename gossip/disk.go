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
	"time"

	"github.com/shoalnet/shoal/internal/durable"
)

// What has to outlive the process: DataDir/gossip/epoch, a decimal number, and
// DataDir/gossip/peers.json. (And records.json, see recall.go.)

// maxEpoch and maxSeq bound what a node may say of its record. No node comes near
// them by itself: a number beyond is damage or malice, and one that were taken
// could not be exceeded by the record's owner any more.
const (
	maxEpoch = 1 << 62
	maxSeq   = 1 << 62
)

// nextEpoch returns an epoch above the stored one and above atLeast. With an
// error it could not be stored: it is good for now, and has to be stored later
// (storeEpoch). A damaged file counts as 0: the first peer that knows better makes
// us move on (see checkSelf).
func nextEpoch(dir string, atLeast uint64, log *slog.Logger) (uint64, error) {
	path := filepath.Join(dir, "epoch")
	old := uint64(0)
	b, err := os.ReadFile(path)
	if err == nil {
		if old, err = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err == nil && old >= epochLimit(time.Now()) {
			err = fmt.Errorf("epoch %d is out of range", old)
		}
	}
	if err != nil {
		old = 0
		if !errors.Is(err, fs.ErrNotExist) {
			log.Warn("boot epoch can't be read; beginning anew", "path", path, "error", err)
		}
	}
	epoch := min(max(old, atLeast)+1, maxEpoch)
	return epoch, storeEpoch(dir, epoch)
}

func storeEpoch(dir string, epoch uint64) error {
	if err := durable.MkdirAll(dir); err != nil {
		return fmt.Errorf("gossip: data directory: %w", err)
	}
	if err := durable.WriteFile(filepath.Join(dir, "epoch"), []byte(strconv.FormatUint(epoch, 10)+"\n")); err != nil {
		return fmt.Errorf("gossip: keep boot epoch: %w", err)
	}
	return nil
}

type peersFile struct {
	Peers []peerRecord `json:"peers"`
}

type peerRecord struct {
	Addr netip.AddrPort `json:"addr"`
	Node string         `json:"node,omitempty"`
}

// load reads one of the folder's JSON files; an absent one leaves into as it is.
func load(dir, file, what string, into any) error {
	path := filepath.Join(dir, file)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("gossip: %s: %w", what, err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("gossip: %s %s: %w", what, path, err)
	}
	return nil
}

func loadPeers(dir string) ([]peerRecord, error) {
	var f peersFile
	if err := load(dir, "peers.json", "peer list", &f); err != nil {
		return nil, err
	}
	return f.Peers, nil
}

func savePeers(dir string, peers []peerRecord) error {
	b, err := json.MarshalIndent(peersFile{peers}, "", "  ")
	if err == nil {
		err = durable.MkdirAll(dir)
	}
	if err == nil {
		err = durable.WriteFile(filepath.Join(dir, "peers.json"), append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("gossip: keep peer list: %w", err)
	}
	return nil
}
