package control

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

// A snapshot file is a line that says what it is, a line of JSON that tells of the
// content, the state as raft's snapshots have it, and the SHA-256 of all before.

const (
	snapshotMagic  = "SHOAL-SNAPSHOT\n"
	snapshotFormat = 1
)

// SnapshotInfo tells what is in a snapshot.
type SnapshotInfo struct {
	Format   int       `json:"format"`
	Cluster  string    `json:"cluster"`
	Index    uint64    `json:"index"` // of the last entry in it
	Saved    time.Time `json:"saved"`
	Size     int       `json:"size"` // of the state, in bytes
	Networks int       `json:"networks"`
	Services int       `json:"services"`
	Tasks    int       `json:"tasks"`
	Nodes    int       `json:"nodes"`
	Managers []string  `json:"managers"` // names
	Autolock bool      `json:"autolock"`
}

func infoOf(st *state.State) SnapshotInfo {
	c, _ := st.Cluster()
	key, _ := st.UnlockKey()
	out := SnapshotInfo{Format: snapshotFormat, Cluster: c.ID, Index: st.Index(), Networks: len(st.Networks()), Services: len(st.Services()),
		Tasks: len(st.Tasks(state.TaskFilter{All: true})), Nodes: len(st.Nodes()), Managers: []string{}, Autolock: key != ""}
	for _, n := range st.Nodes() {
		if n.Role == spec.RoleManager {
			out.Managers = append(out.Managers, n.Name)
		}
	}
	return out
}

// writeSnapshot is the file of a state.
func writeSnapshot(st *state.State, now time.Time) ([]byte, error) {
	b, err := st.Snapshot()
	if err != nil {
		return nil, err
	}
	info := infoOf(st)
	info.Saved, info.Size = now.UTC().Truncate(time.Second), len(b)
	head, err := json.Marshal(info)
	if err != nil {
		return nil, err
	}
	out := append(append([]byte(snapshotMagic), head...), '\n')
	out = append(append(out, b...), '\n')
	sum := sha256.Sum256(out)
	return append(out, hex.EncodeToString(sum[:])+"\n"...), nil
}

// ReadSnapshot reads a snapshot file, whole. It changes nothing.
func ReadSnapshot(b []byte) (SnapshotInfo, *state.State, error) {
	fail := func(format string, args ...any) (SnapshotInfo, *state.State, error) {
		return SnapshotInfo{}, nil, fmt.Errorf(format, args...)
	}
	rest, ok := bytes.CutPrefix(b, []byte(snapshotMagic))
	switch {
	case len(b) == 0:
		return fail("the snapshot is empty")
	case !ok && strings.HasPrefix(snapshotMagic, string(b)):
		return fail("the snapshot is damaged: it ends after %d bytes", len(b))
	case !ok:
		return fail("this is no snapshot of Shoal's managers: want a file that 'shoal snapshot save' wrote")
	}
	head, rest, _ := bytes.Cut(rest, []byte("\n"))
	var info SnapshotInfo
	if err := json.Unmarshal(head, &info); err != nil {
		return fail("the snapshot is damaged: its head can't be read")
	}
	if info.Format > snapshotFormat {
		return fail("the snapshot has format %d, and this Shoal reads up to %d: use the version that saved it, or a newer one", info.Format, snapshotFormat)
	}
	const trailer = 2*sha256.Size + 2
	if info.Size < 0 || len(rest) != info.Size+trailer {
		return fail("the snapshot is damaged: it has %d bytes of %d", len(b), len(b)-len(rest)+info.Size+trailer)
	}
	covered := b[:len(b)-trailer+1]
	sum := sha256.Sum256(covered)
	if want := string(b[len(covered):]); want != hex.EncodeToString(sum[:])+"\n" {
		return fail("the snapshot is damaged: its checksum is %x, and not %q as it says", sum, want)
	}
	st, err := state.Restore(rest[:info.Size])
	if err != nil {
		return fail("the snapshot can't be used: %w", err)
	}
	if c, ok := st.Cluster(); !ok || c.ID != info.Cluster || st.Trust() == nil {
		return fail("the snapshot can't be used: there is no cluster in it, or another than it says")
	}
	return info, st, nil
}

// SaveSnapshot returns all that the managers hold.
func (s *service) SaveSnapshot(context.Context, *connect.Request[shoalv1.SaveSnapshotRequest]) (*connect.Response[shoalv1.SaveSnapshotResponse], error) {
	resp := &shoalv1.SaveSnapshotResponse{}
	err := s.read(func(st *state.State) (err error) {
		if st.Trust() == nil {
			return connect.NewError(connect.CodeFailedPrecondition, errors.New("the cluster has no authority"))
		}
		resp.Snapshot, err = writeSnapshot(st, time.Now())
		return err
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(resp), nil
}
