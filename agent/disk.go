package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/internal/sleep"
)

// fault is something that a person should know of this node at once.
type fault struct{ name, message, hint string }

// diskFaults tells of what this node should remember and can't.
func (m *member) diskFaults() []fault {
	var out []fault
	add := func(name string, err error, hint string) {
		if err != nil {
			out = append(out, fault{name, strings.ReplaceAll(err.Error(), "\n", "; "), hint})
		}
	}
	err := m.managerFault()
	var lost *control.StoreLostError
	var stuck *control.StuckError
	if errors.As(err, &lost) {
		add("managers' log", err, lostHint)
	} else if errors.As(err, &stuck) {
		add("managers' log", err, "upgrade shoal on this node and start its agent anew; tasks, VIPs and names go on")
	} else {
		add("managers' log", err, "it is tried again each second; tasks, VIPs and names go on")
	}
	hint := fmt.Sprintf("make room in %s, or mend its disk: it is tried again by itself", m.cfg.DataDir)
	m.mu.Lock()
	mgr, g := m.manager, m.g
	m.mu.Unlock()
	if mgr != nil {
		add("managers' log", mgr.DiskErr(), hint)
	}
	if g != nil {
		add("disk", g.DiskErr(), hint)
	}
	add("disk", m.kept.err(), hint)
	add("assignment", m.cacheFault(), "tasks and network stay as they are until a manager answers, who says it again: bring a majority of the managers back")
	add("disk", room(m.cfg.DataDir), "make room: output of tasks is lost meanwhile, and what has to be remembered waits")
	return out
}

// minRoom is what the data directory's disk must have free, bytes: less than one page of
// output for each of some hundred tasks is as good as nothing.
const minRoom = 512 << 10

// room tells when the disk of a directory is full, or takes nothing.
func room(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("the data directory %s can't be looked at: %w", dir, err)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return fmt.Errorf("the disk of %s is read-only", dir)
	}
	if free := st.Bavail * uint64(st.Bsize); st.Blocks > 0 && free < minRoom {
		return fmt.Errorf("the disk of %s is full: %d KiB are free", dir, free>>10)
	}
	return nil
}

// kept remembers which of the agent's files the disk refuses, so that each refusal is
// told once, and is known as long as it lasts.
type kept struct {
	log *slog.Logger
	mu  sync.Mutex
	bad map[string]error
}

// note takes what became of writing a file, which is named for people.
func (k *kept) note(what string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, was := k.bad[what]
	switch {
	case err != nil:
		if k.bad == nil {
			k.bad = map[string]error{}
		}
		k.bad[what] = err
		if !was {
			k.log.Warn(what+" can't be kept; trying again", "error", err)
		}
	case was:
		delete(k.bad, what)
		k.log.Info(what + " is kept again")
	}
}

func (k *kept) err() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for _, what := range slices.Sorted(maps.Keys(k.bad)) {
		errs = append(errs, fmt.Errorf("%s can't be kept: %w", what, k.bad[what]))
	}
	if len(errs) == 0 {
		return nil
	}
	return errors.Join(errs...)
}

// keepFiles writes again what the disk refused, until ctx of the member ends.
func (m *member) keepFiles() {
	for sleep.For(m.ctx, keepRetry) {
		m.kept.mu.Lock()
		n := len(m.kept.bad)
		m.kept.mu.Unlock()
		if n == 0 {
			continue
		}
		m.saveIdentity()
		m.mu.Lock()
		a := m.assigned
		m.mu.Unlock()
		if a.known() {
			m.saveAssignment(a)
		}
	}
}

const keepRetry = time.Second

// saveIdentity keeps node.json.
func (m *member) saveIdentity() {
	m.saveMu.Lock()
	defer m.saveMu.Unlock()
	m.mu.Lock()
	id := *m.ident
	m.mu.Unlock()
	m.kept.note("node identity", id.save(m.cfg.DataDir))
}
