package gossip

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDamagedFiles: whatever became of what a node's gossip keeps on disk while it
// was down, the node takes part again, and the others hold what it says now, not
// what it said before.
func TestDamagedFiles(t *testing.T) {
	const readOnly = "gone, and the disk read-only"
	damages := []struct {
		name string
		do   func(path string) error
	}{
		{"absent", os.Remove},
		{"empty", func(p string) error { return os.Truncate(p, 0) }},
		{"cut", func(p string) error {
			fi, err := os.Stat(p)
			if err != nil {
				return err
			}
			return os.Truncate(p, fi.Size()/2)
		}},
		{"wrong", func(p string) error { return os.WriteFile(p, []byte(`{"peers":[{"addr":"0.0.0.0:0"}]}`), 0o600) }},
		{"binary", func(p string) error { return os.WriteFile(p, []byte{0, 0xff, 0, 1}, 0o600) }},
		{"a number too large", func(p string) error { return os.WriteFile(p, []byte("18446744073709551615\n"), 0o600) }},
		{"a directory", func(p string) error {
			if err := os.Remove(p); err != nil {
				return err
			}
			return os.MkdirAll(filepath.Join(p, "x"), 0o700)
		}},
		{readOnly, func(p string) error {
			dir := filepath.Dir(p)
			return errors.Join(os.Remove(p), unix.Mount(dir, dir, "", unix.MS_BIND, ""), unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
		}},
	}
	c := newCluster(t, Tuning{})
	c.grow(3)
	k := 0
	for _, file := range []string{"epoch", "peers.json", "records.json"} {
		for _, d := range damages {
			if d.name == readOnly && os.Geteuid() != 0 {
				continue // it takes a mount
			}
			c.kill(2)
			path := filepath.Join(c.dir, nodeID(2), "gossip", file)
			if err := d.do(path); err != nil {
				t.Fatal(err)
			}
			k++
			n := c.start(2, addrs(1)...)
			n.put(100+k, 200+k)
			c.eventually(10*time.Second, file+" is "+d.name, c.agreed)
			if d.name != readOnly {
				continue
			}
			if n.DiskErr() == nil {
				c.eventually(5*time.Second, file+" can't be kept, and that is told", func() string {
					if n.DiskErr() == nil {
						return "no error"
					}
					return ""
				})
			}
			// The cause goes, and with it the fault, without a restart.
			if err := unix.Unmount(filepath.Dir(path), unix.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
			c.eventually(10*time.Second, file+" is kept again", func() string {
				if err := n.DiskErr(); err != nil {
					return err.Error()
				}
				if b, err := os.ReadFile(path); err != nil || len(b) == 0 {
					return fmt.Sprintf("%q, %v", b, err)
				}
				return ""
			})
		}
	}
}

// TestHostileNumbers: no number that another says of a node's record keeps that
// node's own word from the others for good.
func TestHostileNumbers(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	n := 0
	for _, epoch := range []uint64{0, 1, 2, maxEpoch - 1, maxEpoch + 1, math.MaxInt64, math.MaxUint64 - 1, math.MaxUint64} {
		for _, seq := range []uint64{0, 1, maxSeq, maxSeq + 1, math.MaxUint64 - 1, math.MaxUint64} {
			if epoch == maxEpoch-1 && seq != maxSeq+1 {
				continue // it is in range, and one step from the end: only signatures help
			}
			d := &delta{node: nodeID(2), epoch: epoch, seq: seq, full: true}
			for _, m := range []*message{
				{header: header{typ: msgDelta, from: nodeID(3), addr: nodeAddr(3)}, deltas: []*delta{d}},
				{header: header{typ: msgState, from: nodeID(3), addr: nodeAddr(3)}, digest: []digestItem{{node: nodeID(2), epoch: epoch, seq: seq, hash: 1}}},
				{header: header{typ: msgDelta, from: nodeID(3), addr: nodeAddr(3)}, deltas: []*delta{{node: nodeID(2), epoch: epoch, prev: seq - 1, seq: seq}}},
				{header: header{typ: msgBarrier, from: nodeID(3), addr: nodeAddr(3)}, epoch: epoch, seq: seq},
			} {
				for _, to := range []int{1, 2} {
					c.node(to).receive(m.encode())
				}
			}
			n++
			c.node(2).put(300 + n)
			c.eventually(10*time.Second, fmt.Sprintf("after epoch %d, sequence %d", epoch, seq), c.agreed)
		}
	}
}
