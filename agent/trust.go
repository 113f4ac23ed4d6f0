package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/gossip"
	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// trust is what the managers told this node of the cluster's authority. It is
// part of the cached assignment.
type trust struct {
	Signs  string            `json:"signs"` // digest of the root that signs
	Roots  [][]byte          `json:"roots"`
	Gossip []state.GossipKey `json:"gossip,omitempty"`
}

func toTrust(t *shoalv1.Trust) *trust {
	if t == nil {
		return nil
	}
	out := &trust{Signs: t.Signs, Roots: t.Roots}
	for _, k := range t.GossipKeys {
		out.Gossip = append(out.Gossip, state.GossipKey{Generation: k.Generation, Key: k.Key, Primary: k.Primary})
	}
	return out
}

// errOldData is what an agent says of a data directory whose cluster had no
// certificates yet. Nothing in it is changed: the version that wrote it can go on.
type errOldData struct{ dir, cluster string }

func (e *errOldData) Error() string {
	return fmt.Sprintf("data directory %s is of cluster %s, which was made before nodes had certificates, and this version can't take part in it: "+
		"run 'shoal leave --force' on every node, then 'shoal init' on one and 'shoal join' on the others", e.dir, e.cluster)
}

// loadCredentials reads what a node of a cluster shows to the others.
func loadCredentials(dataDir string, id *identity, log *slog.Logger) (*peer.Credentials, error) {
	path := peer.Path(dataDir)
	c, was, err := readCredentials(dataDir, func(i peer.Info) bool { return i.ID == id.NodeID && i.Cluster == id.Cluster.ID })
	if errors.Is(err, os.ErrNotExist) {
		if id.CA == "" {
			return nil, &errOldData{dataDir, id.Cluster.ID}
		}
		return nil, fmt.Errorf("the node's certificate %s is gone: restore it from a copy, or run 'shoal leave --force' and join again", path)
	}
	if err != nil {
		return nil, err
	}
	if info, ok := c.Info(); !ok || info.ID != id.NodeID || info.Cluster != id.Cluster.ID {
		return nil, fmt.Errorf("the certificate in %s is of node %s in cluster %s, and this is node %s in cluster %s: restore the right one from a copy, or run 'shoal leave --force' and join again",
			path, info.ID, info.Cluster, id.NodeID, id.Cluster.ID)
	}
	if was != nil {
		log.Warn("the node's certificate is taken from its second copy", "error", was)
	}
	if was != nil || !sameFiles(path, durable.CopyOf(path)) {
		if err := c.Save(path); err != nil {
			log.Warn("the node's certificate can't be kept: the agent goes on without", "error", err)
		}
	}
	return c, nil
}

// readCredentials reads the node's certificate, or its second copy when the first
// can't be read or is not right; was is then why. When neither is right, it is the
// first that can be read.
func readCredentials(dataDir string, right func(peer.Info) bool) (c *peer.Credentials, was, err error) {
	path := peer.Path(dataDir)
	if c, err = peer.Load(path); err == nil {
		info, _ := c.Info()
		if right(info) {
			return c, nil, nil
		}
		was = fmt.Errorf("%s is of node %s in cluster %s", path, info.ID, info.Cluster)
	} else {
		was = err
	}
	second, serr := peer.Load(durable.CopyOf(path))
	if serr != nil {
		return c, nil, err
	}
	if info, _ := second.Info(); right(info) || c == nil {
		return second, was, nil
	}
	return c, nil, nil
}

// sameFiles tells whether two files can be read and have the same content.
func sameFiles(a, b string) bool {
	x, errX := os.ReadFile(a)
	y, errY := os.ReadFile(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// nodeList is who is in the cluster, and as what.
type nodeList struct {
	index uint64
	roles map[string]string
}

func listOf(a *assignment) *nodeList {
	l := &nodeList{index: a.Index, roles: make(map[string]string, len(a.Nodes))}
	for _, n := range a.Nodes {
		l.roles[n.ID] = n.Role
	}
	return l
}

// standing implements peer.Standing: by the assignment, or by this node's own
// copy of the managers' state, whichever is newer.
func (m *member) standing(id string) (role string, index uint64) {
	if l := m.nodes.Load(); l != nil {
		role, index = l.roles[id], l.index
	}
	if mgr := m.fsm.Load(); mgr != nil {
		if r, i := mgr.Standing(id); i > index {
			return r, i
		}
	}
	return role, index
}

// takeNodes takes up the node list and the authority of an assignment.
func (m *member) takeNodes(a *assignment) {
	m.nodes.Store(listOf(a))
	if a.Trust != nil && len(a.Trust.Roots) > 0 {
		// They are saved by certLoop.
		if err := m.creds.SetRoots(a.Trust.Roots); err != nil {
			m.log.Error("the cluster's roots can't be taken", "error", err)
		}
	}
	m.peer.Recheck()
	wake(m.certWake)
}

// Timers of the node's own certificate.
const (
	certInterval = 30 * time.Second // between looks without a reason
	certTimeout  = 5 * time.Second  // for the managers' answer
	certRetry    = time.Second      // after a failure, doubled up to certInterval
)

// certLoop keeps the node's certificate and role as the managers have it.
func (m *member) certLoop() {
	wait := certInterval
	if m.creds.Due() { // the machine was off for long
		wait = certRetry
	}
	for {
		t := time.NewTimer(wait)
		select {
		case <-m.ctx.Done():
			t.Stop()
			return
		case <-m.certWake:
		case <-t.C:
		}
		t.Stop()
		err := m.mindCertificate()
		m.mu.Lock()
		m.certErr = err
		m.mu.Unlock()
		switch {
		case err == nil:
			wait = certInterval
		case m.ctx.Err() != nil:
			return
		default:
			if wait == certInterval {
				wait = certRetry / 2
			}
			wait = min(2*wait, certInterval)
			m.log.Warn("this node's certificate or role can't be brought up to date; trying again", "error", err)
		}
	}
}

// mindCertificate renews the certificate when it is due, or is not what it should
// be, and takes up the role that the managers gave this node: as a manager only
// once it can show a certificate for that.
func (m *member) mindCertificate() error {
	m.mu.Lock()
	a, fresh := m.assigned, m.fresh
	role := m.ident.Role
	m.mu.Unlock()
	want, signs := role, ""
	if a != nil && fresh {
		if i := slices.IndexFunc(a.Nodes, func(n spec.Node) bool { return n.ID == m.ident.NodeID }); i >= 0 {
			want = a.Nodes[i].Role
		}
		if a.Trust != nil {
			signs = a.Trust.Signs
		}
	}
	var err error
	switch {
	case want == spec.RoleWorker && role == spec.RoleManager:
		err = m.setRole(want)
	case want == spec.RoleWorker && m.leftover:
		err = m.giveUp()
	}
	info, _ := m.creds.Info()
	if info.Role != want || signs != "" && info.Root != signs || m.creds.Due() {
		err = errors.Join(err, m.renew(info.Role != want))
	}
	if err := errors.Join(err, m.settleCertificate()); err != nil {
		return err
	}
	if err := m.keepLock(); err != nil {
		return err
	}
	if want != role && want == spec.RoleManager {
		return m.setRole(want)
	}
	return nil
}

// renew asks the managers for another certificate, and shows it.
func (m *member) renew(otherRole bool) error {
	ctx, cancel := context.WithTimeout(m.ctx, certTimeout)
	defer cancel()
	resp, err := m.client.RenewCertificate(ctx, connect.NewRequest(&shoalv1.RenewCertificateRequest{Node: m.ident.NodeID}))
	if err != nil {
		return fmt.Errorf("renew this node's certificate: %w", err)
	}
	if err := m.creds.Set(resp.Msg.Certificate.GetChain(), resp.Msg.Certificate.GetRoots()); err != nil {
		return fmt.Errorf("renew this node's certificate: the managers' answer: %w", err)
	}
	if otherRole {
		// Others know this node by the old one on the connections that it made.
		m.peer.Redial()
	}
	m.renewed = resp.Msg
	return nil
}

// settleCertificate does what is left to be done for the certificate and the roots that
// this node shows and trusts: again, for as long as the disk refuses it.
func (m *member) settleCertificate() error {
	if m.creds.Unsaved() {
		if err := m.creds.Save(peer.Path(m.cfg.DataDir)); err != nil {
			return err
		}
	}
	if m.renewed == nil {
		return nil
	}
	if err := m.takeLock(m.renewed.Lock); err != nil {
		return err
	}
	m.renewed = nil
	wake(m.reportWake)
	info, _ := m.creds.Info()
	m.log.Info("this node has another certificate", "role", info.Role, "until", info.Until.UTC().Format(time.RFC3339), "ca", info.Root)
	return nil
}

// setRole takes up the role that the managers gave this node.
func (m *member) setRole(role string) error {
	m.log.Info("role changed", "from", m.role(), "to", role)
	m.mu.Lock()
	m.ident.Role = role
	name, number := m.ident.Name, m.ident.Number
	m.mu.Unlock()
	m.saveIdentity()
	var err error
	if role == spec.RoleManager {
		m.leftover = false
		m.keepManager()
	} else {
		err = m.giveUp()
	}
	m.g.SetMeta(name, number, role)
	wake(m.reportWake)
	return err
}

// giveUp ends this node's part among the managers, and removes what it had for it: again,
// for as long as the disk refuses that.
func (m *member) giveUp() error {
	err := m.stopManager()
	if m.leftover = err != nil; m.leftover {
		return fmt.Errorf("the managers' log of before can't be removed: %w", err)
	}
	return nil
}

// certify signs the first node's own certificate.
func certify(creds *peer.Credentials, root *peer.Root, id *identity, serial uint64) error {
	der, err := root.Sign(creds.Signer().Public(), peer.Subject{ID: id.NodeID, Role: spec.RoleManager, Cluster: id.Cluster.ID, Serial: serial})
	if err != nil {
		return err
	}
	return creds.Set(append([][]byte{der}, root.Chain()...), [][]byte{root.Cert.Raw})
}

// awaitManager waits until the managers count on this node as one of them.
func (m *member) awaitManager(ctx context.Context, mgr *control.Manager) error {
	ctx, cancel := context.WithTimeout(ctx, managerWait)
	defer cancel()
	for {
		if id, _ := mgr.Leader(); id != "" && mgr.IsVoter() {
			return nil
		}
		if !sleep.For(ctx, 10*time.Millisecond) {
			return connect.NewError(connect.CodeUnavailable, fmt.Errorf("the managers did not make this node one of them in %s: see their logs, and whether they reach it at %s", managerWait, m.listener.Addr()))
		}
	}
}

// managerWait bounds the time that a joining manager waits for the others.
const managerWait = time.Minute

func controlAddrOf(n *shoalv1.NodeInfo) string {
	return net.JoinHostPort(n.Addr, strconv.Itoa(int(n.ControlPort)))
}

// unjoin tells the managers that a node which they have taken in did not come to
// work.
func (m *member) unjoin(ctx context.Context, managers []*shoalv1.NodeInfo) error {
	ctx, cancel := context.WithTimeout(ctx, certTimeout)
	defer cancel()
	client := m.peer.Managers()
	defer client.CloseIdleConnections()
	var errs []error
	for _, n := range managers { // one of them leads
		c := shoalv1connect.NewControlClient(client, "http://"+controlAddrOf(n))
		_, err := c.LeaveNode(ctx, connect.NewRequest(&shoalv1.LeaveNodeRequest{Node: m.ident.NodeID}))
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// removed tells whether the managers say that they don't know this node.
func removed(err error) bool {
	var ce *connect.Error
	return connect.CodeOf(err) == connect.CodeNotFound || errors.As(err, &ce) && ce.Meta().Get(peer.RemovedHeader) != ""
}

// finding is a check of doctor's.
type finding struct{ status, message, hint string }

// certificateChecks looks at the node's certificate. Renewal begins at 80 % of
// its life at the latest: one that has less than a tenth left was not renewed
// for long.
func (m *member) certificateChecks(now time.Time) []finding {
	m.mu.Lock()
	failed := m.certErr
	m.mu.Unlock()
	info, ok := m.creds.Info()
	if !ok {
		return []finding{{"error", "this node has no certificate", "shoal leave --force, then join again"}}
	}
	out := certificateFindings(info, m.role(), failed, now)
	if r := m.fwd.Refusal(); r != "" {
		out = append(out, finding{"error", "the managers that answer and this node don't know each other by their certificates: " + r,
			"if the cluster's root was replaced while this node was away, or its certificate has ended: shoal leave --force, then join again"})
	}
	if out == nil {
		out = []finding{{"ok", fmt.Sprintf("%s, until %s", info.Role, info.Until.UTC().Format(time.RFC3339)), ""}}
	}
	return out
}

// certificateFindings is what is wrong with a certificate; it is pure.
func certificateFindings(info peer.Info, role string, failed error, now time.Time) []finding {
	var out []finding
	until := info.Until.UTC().Format(time.RFC3339)
	left := info.Until.Sub(now)
	retry := "it is renewed by itself once a manager that leads is reached: see whether one answers"
	switch {
	case now.Before(info.From.Add(-clockSlack)):
		out = append(out, finding{"error", fmt.Sprintf("the clock here says %s, and the certificate was made at %s: other nodes may refuse what this one shows, and it what they show",
			now.UTC().Format(time.RFC3339), info.From.UTC().Format(time.RFC3339)), "set the clock right"})
	case left <= 0:
		out = append(out, finding{"error", "the certificate ended at " + until + ": no other node talks with this one", "if the clock is right: shoal leave --force, then join again"})
	case left < info.Until.Sub(info.From)/10:
		out = append(out, finding{"warn", fmt.Sprintf("the certificate ends soon, at %s", until), retry})
	}
	if failed != nil {
		out = append(out, finding{"warn", "the certificate or the role can't be brought up to date: " + strings.ReplaceAll(failed.Error(), "\n", "; "), retry})
	} else if info.Role != role {
		out = append(out, finding{"warn", fmt.Sprintf("the certificate is a %s's, and this node is a %s", info.Role, role), retry})
	}
	return out
}

// clockSlack is how much a clock may be behind without a word.
const clockSlack = 5 * time.Minute

// PeerStats tell how connections between nodes are; false while the node is in
// no cluster. For metrics.
func (a *Agent) PeerStats() (peer.Stats, peer.Info, bool) {
	m := a.current()
	if m == nil {
		return peer.Stats{}, peer.Info{}, false
	}
	info, ok := m.creds.Info()
	return m.peer.Stats(), info, ok
}

// takeLock makes a lock for the store that this node is about to have as a
// manager, if the cluster's managers are locked.
func (m *member) takeLock(l *shoalv1.Lock) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l.GetKey() == "" || m.manager != nil {
		return nil
	}
	if g, err := control.LockGeneration(m.cfg.DataDir); err != nil || g > 0 {
		return err // it has one
	}
	key := control.NewSealKey()
	if err := control.WriteLock(m.cfg.DataDir, l.Key, l.Generation, key); err != nil {
		return err
	}
	m.sealKey = key
	return nil
}

// keepLock seals the key of the store anew when the unlock key was rotated.
func (m *member) keepLock() error {
	m.mu.Lock()
	key := m.sealKey
	m.mu.Unlock()
	mgr := m.fsm.Load()
	if mgr == nil || len(key) == 0 {
		return nil
	}
	unlock, now := mgr.UnlockKey()
	have, err := control.LockGeneration(m.cfg.DataDir)
	if err != nil || unlock == "" || now <= have {
		return err
	}
	if err := control.WriteLock(m.cfg.DataDir, unlock, now, key); err != nil {
		return err
	}
	m.log.Info("the managers' log of this node opens with another unlock key", "generation", now)
	return nil
}

// Unlock opens the managers' log of this node.
func (a *localAPI) Unlock(ctx context.Context, req *connect.Request[shoalv1.UnlockRequest]) (*connect.Response[shoalv1.UnlockResponse], error) {
	for !a.mu.TryLock() { // it may be starting
		if !sleep.For(ctx, 20*time.Millisecond) {
			return nil, ctx.Err()
		}
	}
	m := a.current()
	a.mu.Unlock()
	if m == nil {
		return nil, a.noMember()
	}
	m.mu.Lock()
	open := m.manager != nil || len(m.sealKey) > 0
	m.mu.Unlock()
	if open {
		return nil, precondition("this node is not locked")
	}
	key, err := control.OpenLock(m.cfg.DataDir, req.Msg.Key)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	m.mu.Lock()
	m.sealKey = key
	m.mu.Unlock()
	// keepManager tries again by itself.
	ctx, cancel := context.WithTimeout(ctx, managerWait)
	defer cancel()
	for m.fsm.Load() == nil {
		if !sleep.For(ctx, 20*time.Millisecond) {
			return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("this node is unlocked, and does not work as a manager after %s: %w", managerWait, m.managerFault()))
		}
	}
	wake(m.certWake)
	return connect.NewResponse(&shoalv1.UnlockResponse{}), nil
}

// gossipKeys is the keyring that the managers told of last. A node that has none
// (its cached assignment is gone) takes part with one that nobody else has, which
// is to say in silence, until they tell it again.
func (m *member) gossipKeys() gossip.Keyring {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.assigned != nil && m.assigned.Trust != nil && len(m.assigned.Trust.Gossip) > 0 {
		var ring gossip.Keyring
		for _, k := range m.assigned.Trust.Gossip {
			ring.Keys = append(ring.Keys, gossip.Key{ID: uint32(k.Generation), Secret: k.Key})
			if k.Primary {
				ring.Use = uint32(k.Generation)
			}
		}
		return ring
	}
	secret := make([]byte, gossip.KeySize)
	_, _ = rand.Read(secret) // never fails
	return gossip.Keyring{Keys: []gossip.Key{{Secret: secret}}}
}

// trustGossip tells gossip which keys to use, who the nodes are, and what they
// sign with, as the managers have it.
func (m *member) trustGossip() {
	if err := m.g.SetKeys(m.gossipKeys()); err != nil {
		m.log.Error("the keys of gossip that the managers told can't be used", "error", err)
	}
	wake(m.reportWake)
	m.mu.Lock()
	a := m.assigned
	m.mu.Unlock()
	if a == nil || len(a.Nodes) == 0 {
		return // after init or join: the first assignment is to come
	}
	d := gossip.Directory{Nodes: make(map[string]gossip.NodeInfo, len(a.Nodes))}
	for _, n := range a.Nodes {
		info := gossip.NodeInfo{Name: n.Name, Role: n.Role, Number: n.Number, Addr: n.Addr, ControlPort: n.ControlPort, GossipPort: n.GossipPort}
		if pub, err := peer.ParsePublic(n.PublicKey); err == nil {
			info.Keys = append(info.Keys, pub.Key())
		} else {
			m.log.Warn("the managers' key of a node can't be read: what it says is not heard", "node", n.Name, "error", err)
		}
		d.Nodes[n.ID] = info
	}
	m.g.SetDirectory(d)
}
