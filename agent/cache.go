package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// cachedAssignment is assignment.json: an assignment, and whose it is. A checksum
// follows, so that what somebody else wrote, or a disk damaged, is never believed:
// less than what the managers said is as wrong as other than that.
type cachedAssignment struct {
	Cluster string `json:"cluster,omitempty"`
	Node    string `json:"node,omitempty"`
	// Identity is the node's own, for the case that node.json and its copy are lost.
	Identity *identity `json:"identity,omitempty"`
	assignment
	// Sum is the last member of the object: the SHA-256, in hex, of the file as it
	// would be without it. Versions of before neither write nor read it.
	Sum *string `json:"sum,omitempty"`
}

func encodeAssignment(a *assignment, id *identity) ([]byte, error) {
	b, err := json.Marshal(cachedAssignment{Cluster: id.Cluster.ID, Node: id.NodeID, Identity: id, assignment: *a})
	if err != nil {
		return nil, err
	}
	return compactSum.add(b), nil
}

// decodeAssignment reads what encodeAssignment wrote for this node, or a version
// of before, which said neither whose it is nor a checksum: it must name this node
// at least.
func decodeAssignment(b []byte, cluster, node string) (*assignment, error) {
	c, err := parseCache(b)
	switch {
	case err != nil:
		return nil, err
	case c.Sum != nil && (c.Cluster != cluster || c.Node != node):
		return nil, fmt.Errorf("not this node's: it is of node %s in cluster %s", c.Node, c.Cluster)
	case !c.known():
		return nil, errors.New("without what the managers said")
	case !slices.ContainsFunc(c.Nodes, func(n spec.Node) bool { return n.ID == node }):
		return nil, errors.New("not this node's: it does not name it")
	}
	return &c.assignment, nil
}

// parseCache reads assignment.json, and refuses what its checksum is not of. One of
// before has none, nor an Identity.
func parseCache(b []byte) (*cachedAssignment, error) {
	c := &cachedAssignment{}
	if err := json.Unmarshal(b, c); err != nil {
		if len(b) == 0 {
			err = errors.New("it is empty")
		}
		return nil, fmt.Errorf("damaged: %w", err)
	}
	if c.Sum != nil {
		if err := compactSum.check(b, *c.Sum); err != nil {
			return nil, err
		}
	} else {
		c.Identity = nil
	}
	return c, nil
}

func assignmentPath(dataDir string) string { return filepath.Join(dataDir, "assignment.json") }

func (m *member) assignmentPath() string { return assignmentPath(m.cfg.DataDir) }

// loadAssignment takes what the managers said last, so that the node works
// while none of them is up. Without it nothing is known, which is not to say that
// there is nothing: what is there stays until the managers say it again.
func (m *member) loadAssignment() {
	m.mu.Lock()
	cluster, node, entered := m.ident.Cluster.ID, m.ident.NodeID, m.assigned != nil
	m.mu.Unlock()
	if entered {
		return // by init or join just now: the first assignment is to come
	}
	var a *assignment
	b, err := os.ReadFile(m.assignmentPath())
	if errors.Is(err, os.ErrNotExist) {
		err = errors.New("gone")
	} else if err == nil {
		a, err = decodeAssignment(b, cluster, node)
	}
	if err != nil {
		m.log.Warn("what the managers said last is not known here: tasks and network stay as they are until a manager answers", "file", m.assignmentPath(), "error", err)
	}
	m.mu.Lock()
	m.assigned, m.cacheErr = a, err
	m.mu.Unlock()
	if a != nil {
		m.nodes.Store(listOf(a))
	}
}

// cacheFault tells that the node does not know what the managers said last.
func (m *member) cacheFault() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cacheErr == nil || m.fresh {
		return nil
	}
	return fmt.Errorf("what the managers said last is not known here: %s is %w", m.assignmentPath(), m.cacheErr)
}

func (m *member) saveAssignment(a *assignment) {
	m.saveMu.Lock()
	defer m.saveMu.Unlock()
	m.mu.Lock()
	id := *m.ident
	m.mu.Unlock()
	b, err := encodeAssignment(a, &id)
	if err == nil {
		err = durable.WriteFile(m.assignmentPath(), b)
	}
	m.kept.note("assignment", err)
}

// saveEvery bounds how often the assignment is written: the file is whole each
// time, and so its cost grows with what is there. It is only for the case that the
// agent starts while no manager answers, and what is a moment old is as good then
// as what is new, which the managers tell as soon as they are there.
const saveEvery = 500 * time.Millisecond

// saveLoop keeps what the managers said last, soon after they said it; at the end,
// what they said last of all.
func (m *member) saveLoop() {
	var saved *assignment
	save := func() {
		m.mu.Lock()
		a := m.assigned
		m.mu.Unlock()
		if a.known() && a != saved {
			m.saveAssignment(a)
			saved = a
		}
	}
	defer save()
	m.mu.Lock()
	if !m.fresh {
		saved = m.assigned
	}
	m.mu.Unlock()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.saveWake:
		}
		save()
		if !sleep.For(m.ctx, saveEvery) {
			return
		}
	}
}
