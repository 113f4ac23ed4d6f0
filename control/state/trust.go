package state

import (
	"bytes"
	"cmp"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// Trust is the cluster's authority: what nodes are certified by and may join
// with. Only managers have it.
type Trust struct {
	// Roots are the roots that certificates count by, at most two: the last one
	// signs, one before it goes once all nodes have moved.
	Roots []Root `json:"roots"`
	// Tokens are the join tokens, by role.
	Tokens map[string]JoinToken `json:"tokens"`
	// Gossip are the keys of gossip, oldest first. See package gossip.
	Gossip []GossipKey `json:"gossip,omitempty"`
	// Unlock is the key that managers' disks are sealed with, by way of a key of
	// their own; empty: they are not.
	Unlock           string `json:"unlock,omitempty"`
	UnlockGeneration uint64 `json:"unlock_generation,omitempty"`
	// Exposed is the newest generation that a removed node has seen.
	Exposed uint64 `json:"exposed,omitempty"`
}

// Root is one root, in DER.
type Root struct {
	Cert  []byte `json:"cert"`
	Key   []byte `json:"key,omitempty"`   // PKCS #8; only of the one that signs
	Cross []byte `json:"cross,omitempty"` // the same, certified by the one before
	// Digest of Cert, as join tokens have it.
	Digest  string `json:"digest"`
	Created int64  `json:"created"` // Unix milliseconds
}

// JoinToken is a role's. The secret itself is here, as people ask to see it
// again; next to the root's key, which is worth more, that gives nothing away.
// Of those before it only the hashes are left, to say that one is outdated.
type JoinToken struct {
	Secret string   `json:"secret"`
	Since  int64    `json:"since"` // Unix milliseconds
	Old    [][]byte `json:"old,omitempty"`
}

// maxOldTokens are remembered of each role.
const maxOldTokens = 8

// GossipKey is a key of gossip.
type GossipKey struct {
	Generation uint64 `json:"generation"`
	Key        []byte `json:"key"`
	Primary    bool   `json:"primary,omitempty"`
	Since      int64  `json:"since,omitempty"` // when it was first used; Unix milliseconds
}

// clone returns a deep copy.
func (t *Trust) clone() *Trust {
	if t == nil {
		return nil
	}
	out := &Trust{Roots: slices.Clone(t.Roots), Tokens: map[string]JoinToken{}, Gossip: slices.Clone(t.Gossip), Unlock: t.Unlock, UnlockGeneration: t.UnlockGeneration, Exposed: t.Exposed}
	for k, v := range t.Tokens {
		v.Old = slices.Clone(v.Old)
		out.Tokens[k] = v
	}
	return out
}

func (t *Trust) check() error {
	if t == nil {
		return nil // of tests
	}
	if len(t.Roots) == 0 || len(t.Roots) > 2 || len(t.Roots[len(t.Roots)-1].Key) == 0 {
		return failf(ErrInvalid, "the cluster's authority has %d roots, or none that signs: want one, or two while nodes move to another", len(t.Roots))
	}
	for _, r := range t.Roots {
		if len(r.Cert) == 0 || r.Digest == "" {
			return failf(ErrInvalid, "a root of the cluster is empty")
		}
	}
	for _, role := range []string{spec.RoleManager, spec.RoleWorker} {
		if t.Tokens[role].Secret == "" {
			return failf(ErrInvalid, "there is no join token for role %s", role)
		}
	}
	return nil
}

// RotateToken replaces a role's join token. The old one is worth nothing then.
type RotateToken struct {
	Role    string `json:"role"`
	Secret  string `json:"secret"`
	OldHash []byte `json:"old_hash"` // of the one that it replaces
	Now     int64  `json:"now"`
}

// RotateRoot makes another root sign.
type RotateRoot struct {
	Root Root `json:"root"`
}

// DropRoot forgets the root before the one that signs: certificates by it are
// worth nothing then.
type DropRoot struct {
	Digest string `json:"digest"`
}

// Certify notes that a node gets a certificate. The index that it is applied at,
// which is the Version of the node in the Result, is the certificate's serial
// number.
type Certify struct {
	Node string `json:"node"` // ID
	Role string `json:"role"` // that the certificate will have; refused if the node's is another by now
	Root string `json:"root"` // digest of the root that will sign
	End  int64  `json:"end"`  // Unix milliseconds
}

// SetGossipKeys replaces the keys of gossip.
type SetGossipKeys struct {
	// Was is the generation of the newest key before: refused with ErrConflict if
	// it is another.
	Was  uint64      `json:"was"`
	Keys []GossipKey `json:"keys"`
}

// RotateUnlock replaces the unlock key.
type RotateUnlock struct {
	Key string `json:"key"`
	Was uint64 `json:"was"` // generation of the one before: refused with ErrConflict if it is another
}

func (s *State) rotateUnlock(c *RotateUnlock) Result {
	t := s.trust.clone()
	if t == nil || t.Unlock == "" || c.Key == "" {
		return Result{Err: failf(ErrInvalid, "the managers of this cluster are not locked: that is decided when it is made, by 'shoal init --autolock'")}
	}
	if t.UnlockGeneration != c.Was {
		return Result{Err: failf(ErrConflict, "the unlock key was rotated meanwhile")}
	}
	t.Unlock, t.UnlockGeneration = c.Key, c.Was+1
	s.trust, s.changed = t, s.index // managers look at their locks
	s.event("cluster", "unlock-rotate", s.cluster.ID, s.cluster.ID)
	return Result{}
}

// UnlockKey is the cluster's; "" without one.
func (s *State) UnlockKey() (key string, generation uint64) {
	if s.trust == nil {
		return "", 0
	}
	return s.trust.Unlock, s.trust.UnlockGeneration
}

// Trust returns a copy of the cluster's authority; nil when there is none.
func (s *State) Trust() *Trust { return s.trust.clone() }

func (s *State) rotateToken(c *RotateToken) Result {
	t, ok := s.trust.clone(), c.Role == spec.RoleManager || c.Role == spec.RoleWorker
	if !ok {
		return Result{Err: failf(ErrInvalid, "role %q: use %s or %s", c.Role, spec.RoleManager, spec.RoleWorker)}
	}
	if t == nil || c.Secret == "" {
		return Result{Err: failf(ErrInvalid, "the cluster has no join tokens")}
	}
	old := append(t.Tokens[c.Role].Old, c.OldHash)
	t.Tokens[c.Role] = JoinToken{Secret: c.Secret, Since: c.Now, Old: old[max(0, len(old)-maxOldTokens):]}
	s.trust = t
	s.event("cluster", "token-rotate", s.cluster.ID, s.cluster.ID, "role", c.Role)
	return Result{}
}

func (s *State) rotateRoot(c *RotateRoot) Result {
	t := s.trust.clone()
	if t == nil {
		return Result{Err: failf(ErrInvalid, "the cluster has no authority")}
	}
	if len(t.Roots) > 1 {
		return Result{Err: failf(ErrInUse, "the root is being replaced already: 'shoal ca show' tells which nodes have not moved yet")}
	}
	t.Roots[0].Key = nil
	t.Roots = append(t.Roots, c.Root)
	if err := t.check(); err != nil {
		return Result{Err: err}
	}
	s.trust, s.changed = t, s.index
	s.event("cluster", "ca-rotate", s.cluster.ID, s.cluster.ID, "root", c.Root.Digest)
	return Result{}
}

func (s *State) dropRoot(c *DropRoot) Result {
	t := s.trust.clone()
	if t == nil || len(t.Roots) != 2 || t.Roots[0].Digest != c.Digest {
		return Result{Err: failf(ErrConflict, "root %s is not one that is being replaced", c.Digest)}
	}
	t.Roots = t.Roots[1:]
	t.Roots[0].Cross = nil // of no more use
	s.trust, s.changed = t, s.index
	s.event("cluster", "ca-rotated", s.cluster.ID, s.cluster.ID, "root", t.Roots[0].Digest)
	return Result{}
}

func (s *State) certify(c *Certify) Result {
	n := s.nodes[c.Node]
	if n == nil || n.expelled {
		return Result{Err: &NotFoundError{"node", c.Node}}
	}
	if n.Role != c.Role {
		return Result{Err: failf(ErrConflict, "node %s is a %s by now", n.Name, n.Role)}
	}
	// Not part of what assignments show: else each renewal would wake every node.
	n.CertEnd, n.CertRoot, n.Version = c.End, c.Root, s.index
	s.event("node", "certify", n.ID, n.Name, "role", n.Role)
	out := n.Node
	return Result{Node: &out}
}

func (s *State) setGossipKeys(c *SetGossipKeys) Result {
	t := s.trust.clone()
	if t == nil {
		return Result{Err: failf(ErrInvalid, "the cluster has no keys of gossip")}
	}
	var was uint64
	for _, k := range t.Gossip {
		was = max(was, k.Generation)
	}
	if was != c.Was {
		return Result{Err: failf(ErrConflict, "the newest key of gossip is %d, not %d", was, c.Was)}
	}
	primary := 0
	for _, k := range c.Keys {
		if len(k.Key) != 32 {
			return Result{Err: failf(ErrInvalid, "key %d of gossip has %d bytes: want 32", k.Generation, len(k.Key))}
		}
		if k.Primary {
			primary++
		}
	}
	sorted := slices.IsSortedFunc(c.Keys, func(a, b GossipKey) int { return cmp.Compare(a.Generation, b.Generation) })
	if primary != 1 || len(c.Keys) > 3 || !sorted {
		return Result{Err: failf(ErrInvalid, "%d keys of gossip, of which %d are primary: want at most three by generation, one of them primary", len(c.Keys), primary)}
	}
	same := slices.EqualFunc(t.Gossip, c.Keys, func(a, b GossipKey) bool {
		return a.Generation == b.Generation && a.Primary == b.Primary && bytes.Equal(a.Key, b.Key)
	})
	if !same {
		t.Gossip = slices.Clone(c.Keys)
		s.trust, s.changed = t, s.index
	}
	return Result{}
}
