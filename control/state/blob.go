package state

import (
	"cmp"
	"maps"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// CreateBlob makes a secret or a config.
type CreateBlob struct {
	Blob spec.Blob `json:"blob,omitempty" level:"2"` // without Version
}

// UpdateBlob changes the labels of a secret or a config, which is all that can be
// changed of one.
type UpdateBlob struct {
	Kind    spec.BlobKind     `json:"kind,omitempty" level:"2"`
	Ref     string            `json:"ref,omitempty" level:"2"`
	Labels  map[string]string `json:"labels,omitempty" level:"2"`
	Updated int64             `json:"updated,omitempty" level:"2"` // Unix milliseconds
}

// RemoveBlob removes a secret or a config that no service uses.
type RemoveBlob struct {
	Kind spec.BlobKind `json:"kind,omitempty" level:"2"`
	Ref  string        `json:"ref,omitempty" level:"2"`
}

// blob finds one by ref: full ID, name, then prefix of an ID.
func (s *State) blob(kind spec.BlobKind, ref string) (*spec.Blob, error) {
	if b := s.blobs[ref]; b != nil && b.Kind == kind {
		return b, nil
	}
	for _, b := range s.blobs {
		if b.Kind == kind && b.Name == ref {
			return b, nil
		}
	}
	return byPrefix(string(kind), ref, s.blobs, func(b *spec.Blob) bool { return b.Kind == kind })
}

// Blob finds a secret or a config by ref.
func (s *State) Blob(kind spec.BlobKind, ref string) (spec.Blob, error) {
	b, err := s.blob(kind, ref)
	if err != nil {
		return spec.Blob{}, err
	}
	return b.Clone(), nil
}

// Blobs are all secrets, or all configs, by name.
func (s *State) Blobs(kind spec.BlobKind) []spec.Blob {
	var out []spec.Blob
	for _, b := range s.blobs {
		if b.Kind == kind {
			out = append(out, b.Clone())
		}
	}
	slices.SortFunc(out, func(a, b spec.Blob) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// BlobsFor are the secrets and configs of these IDs that a node needs for its tasks;
// others are not found. A node learns no others'.
func (s *State) BlobsFor(node string, ids []string) ([]spec.Blob, error) {
	n := s.nodes[node]
	if n == nil || n.expelled {
		return nil, &NotFoundError{"node", node}
	}
	may := map[string]bool{}
	for _, t := range n.tasks {
		if t.holds() && !t.Status.State.Ended() {
			for _, r := range blobRefs(t.Spec) {
				may[r.ID] = true
			}
		}
	}
	var out []spec.Blob
	for _, id := range ids {
		b := s.blobs[id]
		if b == nil || !may[id] {
			return nil, &NotFoundError{"secret or config of a task of this node", id}
		}
		out = append(out, b.Clone())
	}
	return out, nil
}

func blobRefs(t spec.TaskSpec) []spec.BlobRef {
	return append(slices.Clone(t.Secrets), t.Configs...)
}

// resolveBlobs returns a task's spec with the IDs of what it asks for.
func (s *State) resolveBlobs(t spec.TaskSpec) (spec.TaskSpec, error) {
	t = t.Clone()
	for _, l := range []struct {
		kind spec.BlobKind
		refs []spec.BlobRef
	}{{spec.KindSecret, t.Secrets}, {spec.KindConfig, t.Configs}} {
		for i, r := range l.refs {
			b, err := s.blob(l.kind, cmp.Or(r.ID, r.Name))
			if err != nil {
				return t, err
			}
			l.refs[i].ID, l.refs[i].Name = b.ID, b.Name
		}
	}
	return t, nil
}

func (s *State) createBlob(c *CreateBlob) Result {
	b := c.Blob.Clone()
	if err := s.checkID(string(b.Kind), b.ID); err != nil {
		return Result{Err: err}
	}
	if err := b.Validate(); err != nil {
		return Result{Err: failf(ErrInvalid, "%w", err)}
	}
	if s.blobs[b.ID] != nil {
		return Result{Err: failf(ErrExists, "%s %s exists already", b.Kind, b.ID)}
	}
	for _, o := range s.blobs {
		if o.Kind == b.Kind && o.Name == b.Name {
			return Result{Err: failf(ErrExists, "%s %s exists already", b.Kind, b.Name)}
		}
	}
	b.Version = s.index
	s.blobs[b.ID] = &b
	s.event(string(b.Kind), "create", b.ID, b.Name)
	return Result{Blob: &b}
}

func (s *State) updateBlob(c *UpdateBlob) Result {
	b, err := s.blob(c.Kind, c.Ref)
	if err != nil {
		return Result{Err: err}
	}
	out := b.Clone()
	out.Labels, out.Updated, out.Version = maps.Clone(c.Labels), c.Updated, s.index
	s.blobs[b.ID] = &out
	s.event(string(b.Kind), "update", b.ID, b.Name)
	return Result{Blob: &out}
}

func (s *State) removeBlob(c *RemoveBlob) Result {
	b, err := s.blob(c.Kind, c.Ref)
	if err != nil {
		return Result{Err: err}
	}
	uses := func(t spec.TaskSpec) bool {
		return slices.ContainsFunc(blobRefs(t), func(r spec.BlobRef) bool { return r.ID == b.ID })
	}
	var by []string
	for _, v := range s.services {
		if !v.removed && uses(v.Spec.Task) {
			by = append(by, v.Spec.Name)
		}
	}
	if len(by) > 0 {
		slices.Sort(by)
		return Result{Err: failf(ErrInUse, "%s %s is in use by %s: take it away with 'shoal svc update --%s-rm %s %s' first", b.Kind, b.Name, list("service", by), b.Kind, b.Name, by[0])}
	}
	for _, t := range s.tasks {
		if t.Live() && uses(t.Spec) {
			by = append(by, t.Name)
		}
	}
	if len(by) > 0 {
		slices.Sort(by)
		return Result{Err: failf(ErrInUse, "%s %s is in use by %s", b.Kind, b.Name, list("task", by))}
	}
	delete(s.blobs, b.ID)
	s.event(string(b.Kind), "remove", b.ID, b.Name)
	out := b.Clone()
	return Result{Blob: &out}
}

func list(noun string, names []string) string {
	if len(names) == 1 {
		return noun + " " + names[0]
	}
	out := noun + "s " + names[0]
	for i, n := range names[1:] {
		switch {
		case i == 4 && len(names) > 6:
			return out + " and others"
		case i == len(names)-2:
			out += " and " + n
		default:
			out += ", " + n
		}
	}
	return out
}
