package control

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"connectrpc.com/connect"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// NewTrust makes the authority of a new cluster.
func NewTrust(cluster string) (*state.Trust, *peer.Root, error) {
	root, err := peer.NewRoot(cluster, nil)
	if err != nil {
		return nil, nil, err
	}
	r, err := rootState(root)
	if err != nil {
		return nil, nil, err
	}
	t := &state.Trust{Roots: []state.Root{r}, Tokens: map[string]state.JoinToken{}}
	for _, role := range []string{spec.RoleManager, spec.RoleWorker} {
		t.Tokens[role] = state.JoinToken{Secret: peer.NewSecret(), Since: r.Created}
	}
	for i := range 2 { // current and next: there is none before
		k := make([]byte, 32)
		_, _ = rand.Read(k) // never fails
		t.Gossip = append(t.Gossip, state.GossipKey{Generation: uint64(i + 1), Key: k, Primary: i == 0, Since: r.Created})
	}
	return t, root, nil
}

func rootState(r *peer.Root) (state.Root, error) {
	key, err := r.MarshalKey()
	if err != nil {
		return state.Root{}, fmt.Errorf("root key: %w", err)
	}
	out := state.Root{Cert: r.Cert.Raw, Key: key, Digest: r.Digest(), Created: time.Now().UnixMilli()}
	if r.Cross != nil {
		out.Cross = r.Cross.Raw
	}
	return out, nil
}

// Signer is the root that signs.
func Signer(t *state.Trust) (*peer.Root, error) {
	if t == nil || len(t.Roots) == 0 {
		return nil, errors.New("the cluster has no authority")
	}
	r := t.Roots[len(t.Roots)-1]
	return peer.ParseRoot(r.Cert, r.Key, r.Cross)
}

// Tokens are the join tokens as people type them.
func Tokens(t *state.Trust, role string) peer.Token {
	return peer.Token{Digest: t.Roots[len(t.Roots)-1].Digest, Secret: t.Tokens[role].Secret}
}

func roots(t *state.Trust) [][]byte {
	var out [][]byte
	for _, r := range t.Roots {
		out = append(out, r.Cert)
	}
	return out
}

// TrustInfo is what of it every node must know: no key of a root, no token.
func TrustInfo(t *state.Trust) *shoalv1.Trust {
	if t == nil {
		return nil
	}
	out := &shoalv1.Trust{Roots: roots(t), Signs: t.Roots[len(t.Roots)-1].Digest}
	for _, k := range t.Gossip {
		out.GossipKeys = append(out.GossipKeys, &shoalv1.GossipKey{Generation: k.Generation, Key: k.Key, Primary: k.Primary})
	}
	return out
}

func (s *service) trust() (*state.Trust, state.Cluster, error) {
	var t *state.Trust
	var c state.Cluster
	err := s.read(func(st *state.State) error {
		t = st.Trust()
		c, _ = st.Cluster()
		return nil
	})
	if err == nil && t == nil {
		err = connect.NewError(connect.CodeFailedPrecondition, errors.New("the cluster has no authority"))
	}
	return t, c, err
}

// role finds out what a join token is for. All are compared, in a time that does
// not tell which was how right.
func role(t *state.Trust, secret string) (string, error) {
	hash := peer.HashSecret(secret)
	found, outdated := "", ""
	for _, role := range []string{spec.RoleManager, spec.RoleWorker} {
		if subtle.ConstantTimeCompare(hash, peer.HashSecret(t.Tokens[role].Secret)) == 1 {
			found = role
		}
		for _, old := range t.Tokens[role].Old {
			if subtle.ConstantTimeCompare(hash, old) == 1 {
				outdated = role
			}
		}
	}
	switch {
	case found != "":
		return found, nil
	case secret == "":
		return "", errors.New("no join token is given: 'shoal token show worker' (or manager) on a manager prints the command to type")
	case outdated != "":
		return "", fmt.Errorf("the join token was rotated and is worth nothing any more: 'shoal token show %s' on a manager prints the one that counts", outdated)
	}
	return "", errors.New("the join token is wrong: 'shoal token show worker' (or manager) on a manager prints the one that counts")
}

// wrongTokenHeader, of an answer, says that the token was no good.
const wrongTokenHeader = "Shoal-Wrong-Token"

// dialBackTimeout bounds the look at whether a joining node can be reached.
const dialBackTimeout = 3 * time.Second

// JoinNode takes a node in, and certifies it with the role of its token. Of a
// manager raft learns only once it says that it is ready.
func (s *service) JoinNode(ctx context.Context, req *connect.Request[shoalv1.JoinNodeRequest]) (*connect.Response[shoalv1.JoinNodeResponse], error) {
	t, cluster, err := s.trust()
	if err != nil {
		return nil, err
	}
	as, err := role(t, req.Msg.Token)
	if err != nil {
		denied := connect.NewError(connect.CodePermissionDenied, err)
		denied.Meta().Set(wrongTokenHeader, "1")
		return nil, denied
	}
	n, err := api.ToNode(req.Msg.Node)
	if err != nil {
		return nil, invalid(err)
	}
	if n.Role != "" && n.Role != as {
		return nil, invalid(fmt.Errorf("the join token is for a %s, not for a %s: 'shoal token show %s' on a manager prints the other", as, n.Role, n.Role))
	}
	n.Role = as
	if !n.Addr.IsValid() || n.ControlPort < 1 || n.ControlPort > 65535 || n.GossipPort < 1 || n.GossipPort > 65535 {
		return nil, invalid(fmt.Errorf("node %s: address %s, control port %d, gossip port %d: want an address and ports from 1 to 65535", n.Name, n.Addr, n.ControlPort, n.GossipPort))
	}
	if c := req.Msg.Cluster; c != "" && c != cluster.ID {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("node %s belongs to cluster %s, this is cluster %s: run 'shoal leave --force' on it first", n.Name, c, cluster.ID))
	}
	pub, err := peer.CheckRequest(req.Msg.Csr)
	if err != nil {
		return nil, invalid(err)
	}
	if n.PublicKey, err = peer.MarshalPublic(pub); err != nil {
		return nil, invalid(err)
	}
	addr := netip.AddrPortFrom(n.Addr, uint16(n.ControlPort)).String()
	d := net.Dialer{Timeout: dialBackTimeout}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("the managers can't reach node %s at %s, which it advertises: %w: give another --advertise-addr, or open the port", n.Name, addr, err))
	}
	c.Close()
	n.Created = time.Now().UnixMilli()
	n = s.m.withLevel(n, req.Msg.Node.GetLevel(), req.Msg.Node.GetBuild())
	res, err := s.m.Propose(ctx, state.Command{UpsertNode: &state.UpsertNode{Node: n}})
	if err != nil {
		return nil, err
	}
	s.m.seen(res.Node.ID)
	joined, cert, err := s.certify(ctx, *res.Node, pub)
	if err != nil {
		return nil, err
	}
	resp := &shoalv1.JoinNodeResponse{Cluster: clusterInfo(cluster), Node: s.nodeInfo(joined), Certificate: cert, Trust: TrustInfo(t), Lock: lockFor(t, joined)}
	err = s.read(func(st *state.State) error {
		resp.Managers = s.managers(st)
		return nil
	})
	return connect.NewResponse(resp), err
}

// managers lists them, this one first.
func (s *service) managers(st *state.State) []*shoalv1.NodeInfo {
	var out []*shoalv1.NodeInfo
	for _, n := range st.Nodes() {
		if n.Role != spec.RoleManager {
			continue
		}
		if info := s.nodeInfo(n); n.ID == s.m.cfg.Node.ID {
			out = append([]*shoalv1.NodeInfo{info}, out...)
		} else {
			out = append(out, info)
		}
	}
	return out
}

// certify signs a node's key, for the role that the node has now.
func (s *service) certify(ctx context.Context, n spec.Node, pub crypto.PublicKey) (spec.Node, *shoalv1.Certificate, error) {
	fail := func(err error) (spec.Node, *shoalv1.Certificate, error) {
		return n, nil, connect.NewError(connect.CodeInternal, fmt.Errorf("certificate for node %s: %w", n.Name, err))
	}
	t, cluster, err := s.trust()
	if err != nil {
		return n, nil, err
	}
	root, err := Signer(t)
	if err != nil {
		return fail(err)
	}
	res, err := s.m.Propose(ctx, state.Command{Certify: &state.Certify{Node: n.ID, Role: n.Role, Root: root.Digest(), End: time.Now().Add(peer.CertificateLife).UnixMilli()}})
	if err != nil {
		return n, nil, err
	}
	der, err := root.Sign(pub, peer.Subject{ID: n.ID, Role: n.Role, Cluster: cluster.ID, Serial: res.Node.Version})
	if err != nil {
		return fail(err)
	}
	return *res.Node, &shoalv1.Certificate{Chain: append([][]byte{der}, root.Chain()...), Roots: roots(t)}, nil
}

// RenewCertificate certifies the caller again.
func (s *service) RenewCertificate(ctx context.Context, req *connect.Request[shoalv1.RenewCertificateRequest]) (*connect.Response[shoalv1.RenewCertificateResponse], error) {
	n, err := s.nodeByID(req.Msg.Node)
	if err != nil {
		return nil, err
	}
	pub, err := peer.ParsePublic(n.PublicKey)
	if err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("node %s: %w", n.Name, err))
	}
	t, _, err := s.trust()
	if err != nil {
		return nil, err
	}
	_, cert, err := s.certify(ctx, n, pub.Key())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.RenewCertificateResponse{Certificate: cert, Lock: lockFor(t, n)}), nil
}

// lockFor is the unlock key for a manager; workers never see it.
func lockFor(t *state.Trust, n spec.Node) *shoalv1.Lock {
	if n.Role != spec.RoleManager || t.Unlock == "" {
		return nil
	}
	return &shoalv1.Lock{Key: t.Unlock, Generation: t.UnlockGeneration}
}

// UnlockKey tells the key that managers ask for after a start, or replaces it.
func (s *service) UnlockKey(ctx context.Context, req *connect.Request[shoalv1.UnlockKeyRequest]) (*connect.Response[shoalv1.UnlockKeyResponse], error) {
	t, _, err := s.trust()
	if err != nil {
		return nil, err
	}
	if !req.Msg.Rotate {
		return connect.NewResponse(&shoalv1.UnlockKeyResponse{Key: t.Unlock}), nil
	}
	key := NewUnlockKey()
	if _, err := s.m.Propose(ctx, state.Command{RotateUnlock: &state.RotateUnlock{Key: key, Was: t.UnlockGeneration}}); err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.UnlockKeyResponse{Key: key}), nil
}

// nodeByID finds a node by its whole ID.
func (s *service) nodeByID(id string) (spec.Node, error) {
	var out spec.Node
	err := s.read(func(st *state.State) error {
		if st.RoleOf(id) == "" {
			return &state.NotFoundError{Kind: "node", Ref: id}
		}
		var err error
		out, err = st.Node(id)
		return err
	})
	return out, err
}

// LeaveNode forgets the caller.
func (s *service) LeaveNode(ctx context.Context, req *connect.Request[shoalv1.LeaveNodeRequest]) (*connect.Response[shoalv1.LeaveNodeResponse], error) {
	if _, err := s.nodeByID(req.Msg.Node); err != nil {
		return nil, err
	}
	if _, err := s.RemoveNode(ctx, connect.NewRequest(&shoalv1.RemoveNodeRequest{Ref: req.Msg.Node, Force: true})); err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.LeaveNodeResponse{}), nil
}

func checkRole(role string) error {
	if role != spec.RoleManager && role != spec.RoleWorker {
		return invalid(fmt.Errorf("role %q: use %s or %s", role, spec.RoleManager, spec.RoleWorker))
	}
	return nil
}

// ShowToken tells a role's join token.
func (s *service) ShowToken(_ context.Context, req *connect.Request[shoalv1.ShowTokenRequest]) (*connect.Response[shoalv1.ShowTokenResponse], error) {
	if err := checkRole(req.Msg.Role); err != nil {
		return nil, err
	}
	t, _, err := s.trust()
	if err != nil {
		return nil, err
	}
	resp := &shoalv1.ShowTokenResponse{Token: Tokens(t, req.Msg.Role).String(), SinceMs: t.Tokens[req.Msg.Role].Since}
	err = s.read(func(st *state.State) error {
		resp.Managers = s.managers(st)
		return nil
	})
	return connect.NewResponse(resp), err
}

// RotateToken replaces a role's join token.
func (s *service) RotateToken(ctx context.Context, req *connect.Request[shoalv1.RotateTokenRequest]) (*connect.Response[shoalv1.RotateTokenResponse], error) {
	if err := checkRole(req.Msg.Role); err != nil {
		return nil, err
	}
	t, _, err := s.trust()
	if err != nil {
		return nil, err
	}
	secret := peer.NewSecret()
	_, err = s.m.Propose(ctx, state.Command{RotateToken: &state.RotateToken{Role: req.Msg.Role, Secret: secret,
		OldHash: peer.HashSecret(t.Tokens[req.Msg.Role].Secret), Now: time.Now().UnixMilli()}})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.RotateTokenResponse{Token: peer.Token{Digest: Tokens(t, req.Msg.Role).Digest, Secret: secret}.String()}), nil
}

// ---- the root ----

// progress tells which nodes don't show a certificate by the root that signs:
// those that are still to get one, and those that are down. What they were given
// does not count: the answer may have been lost, and then a node could never ask
// again once the root of what it has is gone.
func (m *Manager) progress(t *state.Trust, nodes []spec.Node) (waiting, lost []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	signs := t.Roots[len(t.Roots)-1].Digest
	for _, n := range nodes {
		switch {
		case n.CertRoot == signs && m.shows[n.ID] == signs:
		case n.Status == spec.NodeDown:
			lost = append(lost, n.Name)
		default:
			waiting = append(waiting, n.Name)
		}
	}
	return waiting, lost
}

// ShowCA tells of the roots.
func (s *service) ShowCA(context.Context, *connect.Request[shoalv1.ShowCARequest]) (*connect.Response[shoalv1.ShowCAResponse], error) {
	t, cluster, err := s.trust()
	if err != nil {
		return nil, err
	}
	resp := &shoalv1.ShowCAResponse{Cluster: cluster.ID}
	info := func(r state.Root) (*shoalv1.ShowCAResponse_Root, error) {
		p, err := peer.ParseRoot(r.Cert, nil, nil)
		if err != nil {
			return nil, connect.NewError(connect.CodeInternal, err)
		}
		return &shoalv1.ShowCAResponse_Root{Certificate: r.Cert, Digest: r.Digest, CreatedMs: r.Created, EndMs: p.Cert.NotAfter.UnixMilli()}, nil
	}
	if resp.Root, err = info(t.Roots[len(t.Roots)-1]); err != nil {
		return nil, err
	}
	if len(t.Roots) > 1 {
		if resp.Old, err = info(t.Roots[0]); err != nil {
			return nil, err
		}
		err = s.read(func(st *state.State) error {
			resp.Waiting, resp.Lost = s.m.progress(t, st.Nodes())
			return nil
		})
	}
	return connect.NewResponse(resp), err
}

// RotateCA makes another root; nodes move to it by themselves.
func (s *service) RotateCA(ctx context.Context, _ *connect.Request[shoalv1.RotateCARequest]) (*connect.Response[shoalv1.RotateCAResponse], error) {
	t, cluster, err := s.trust()
	if err != nil {
		return nil, err
	}
	old, err := Signer(t)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	root, err := peer.NewRoot(cluster.ID, old)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	r, err := rootState(root)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	if _, err := s.m.Propose(ctx, state.Command{RotateRoot: &state.RotateRoot{Root: r}}); err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.RotateCAResponse{Digest: r.Digest}), nil
}

// rootsInterval is how often it is looked whether all nodes have moved.
const rootsInterval = time.Second

// keepRoots drops a root once all nodes that live have a certificate by the next.
func (m *Manager) keepRoots(ctx context.Context) {
	for {
		sleep.For(ctx, rootsInterval)
		if ctx.Err() != nil {
			return
		}
		old := ""
		m.fsm.read(func(st *state.State) {
			t := st.Trust()
			if t == nil || len(t.Roots) < 2 {
				return
			}
			if waiting, _ := m.progress(t, st.Nodes()); len(waiting) == 0 {
				old = t.Roots[0].Digest
			}
		})
		if old == "" {
			continue
		}
		m.log.Info("all nodes have a certificate by the new root: the old one counts no more", "old", old)
		if _, err := m.Propose(ctx, state.Command{DropRoot: &state.DropRoot{Digest: old}}); err != nil && ctx.Err() == nil {
			m.log.Warn("the old root can't be dropped; trying again", "error", err)
		}
	}
}
