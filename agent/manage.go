package agent

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// Waits of a manager that can't work from its store.
const (
	manageRetry  = time.Second
	admitTimeout = 10 * time.Second // taking a voter out of raft may wait for the others
	// manageCry is how long it may fail before a person is asked to look: a lost store is
	// there again in a second, where the others have a leader.
	manageCry = 10 * time.Second
)

// keepManager starts this node's manager, and goes on trying while that fails and
// the node is to be one: the rest of the agent does not wait for it. A store that is
// lost is made anew as soon as the leader has admitted this node.
func (m *member) keepManager() {
	_, err := m.startManager(false)
	if err == nil {
		return
	}
	m.mu.Lock()
	again := m.managerErr != nil
	m.managerErr = err
	m.mu.Unlock()
	if again {
		return // the loop below looks at it
	}
	m.wg.Go(func() {
		said, saidAt, began := "", slog.LevelInfo, time.Now()
		for m.ctx.Err() == nil && m.role() == spec.RoleManager {
			var lost *control.StoreLostError
			what, level := "this node can't work as a manager; trying again", slog.LevelWarn
			if errors.As(err, &lost) && lost.Expected() {
				what, level = "manager: waiting", slog.LevelInfo
			} else if time.Since(began) >= manageCry {
				level = slog.LevelError
			}
			if text := err.Error(); text != said || level > saidAt {
				said, saidAt = text, level
				m.log.Log(m.ctx, level, what, "error", err)
			}
			if errors.As(err, &lost) {
				if aerr := m.beginAnew(); aerr != nil {
					m.log.Debug("not admitted yet", "error", aerr)
					sleep.For(m.ctx, manageRetry)
					continue
				}
			} else {
				sleep.For(m.ctx, manageRetry)
			}
			if _, err = m.startManager(false); err == nil {
				m.log.Info("this node works as a manager")
				break
			}
			m.mu.Lock()
			m.managerErr = err
			m.mu.Unlock()
		}
		m.mu.Lock()
		m.managerErr = nil
		m.mu.Unlock()
		wake(m.reportWake)
	})
}

// beginAnew asks the leader to admit this node, and makes it a new store.
func (m *member) beginAnew() error {
	ctx, cancel := context.WithTimeout(m.ctx, admitTimeout)
	defer cancel()
	resp, err := m.client.AdmitManager(ctx, connect.NewRequest(&shoalv1.AdmitManagerRequest{Node: m.ident.NodeID}))
	if err != nil {
		return err
	}
	return control.Admission{Term: resp.Msg.Term, Leader: resp.Msg.Leader}.Begin(m.cfg.DataDir, m.ident.NodeID)
}

// managerFault is why this node does not work as the manager that it is; nil when it
// does, or is none.
func (m *member) managerFault() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.managerErr == nil && m.manager != nil {
		return m.manager.Stuck()
	}
	return m.managerErr
}

const lostHint = "it begins anew by itself when the other managers have a leader; where none has the cluster's state any more, that is lost: 'shoal leave --force', then init or join"
