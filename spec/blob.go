package spec

import (
	"encoding/csv"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// BlobKind tells a secret from a config.
type BlobKind string

// Kinds, in Docker's words.
const (
	KindSecret BlobKind = "secret"
	KindConfig BlobKind = "config"
)

// MaxBlob bounds a secret or a config, in bytes; the bounds are Docker's
// (500 KB and 1,000 KB).
func (k BlobKind) MaxBlob() int {
	if k == KindSecret {
		return 500 << 10
	}
	return 1000 << 10
}

// Blob is a secret or a config: bytes that tasks of services get as a file. Its
// content never changes; another takes another name.
type Blob struct {
	ID      string            `json:"id,omitempty" level:"2"`
	Kind    BlobKind          `json:"kind,omitempty" level:"2"`
	Name    string            `json:"name,omitempty" level:"2"`
	Labels  map[string]string `json:"labels,omitempty" level:"2"`
	Data    []byte            `json:"data,omitempty" level:"2"`
	Version uint64            `json:"version,omitempty" level:"2"`
	Created int64             `json:"created,omitempty" level:"2"` // Unix milliseconds
	Updated int64             `json:"updated,omitempty" level:"2"` // Unix milliseconds
}

// Clone returns a copy that shares Data, which nobody changes.
func (b Blob) Clone() Blob {
	b.Labels = maps.Clone(b.Labels)
	return b
}

// blobName is Docker's rule (swarmkit, validateConfigOrSecretName): letters, digits,
// '-', '_' and '.', at most 64.
var blobName = regexp.MustCompile(`^[A-Za-z0-9](?:[-_.A-Za-z0-9]{0,62}[A-Za-z0-9])?$`)

// Validate reports the first thing wrong.
func (b Blob) Validate() error {
	switch {
	case b.Kind != KindSecret && b.Kind != KindConfig:
		return fmt.Errorf("kind %q: use %s or %s", b.Kind, KindSecret, KindConfig)
	case !blobName.MatchString(b.Name):
		return fmt.Errorf("%s name %q: use letters, digits, '-', '_' and '.', at most 64, beginning and ending with a letter or a digit", b.Kind, b.Name)
	case len(b.Data) == 0:
		return fmt.Errorf("%s %s is empty", b.Kind, b.Name)
	case len(b.Data) > b.Kind.MaxBlob():
		return fmt.Errorf("%s %s has %d bytes: the most allowed is %d", b.Kind, b.Name, len(b.Data), b.Kind.MaxBlob())
	}
	return nil
}

// BlobRef asks for a secret or a config in a task.
type BlobRef struct {
	ID     string `json:"id,omitempty" level:"2"`   // filled in by the managers
	Name   string `json:"name,omitempty" level:"2"` // a ref, in what a user asks for
	Target string `json:"target,omitempty" level:"2"`
	UID    string `json:"uid,omitempty" level:"2"` // a number; empty: 0
	GID    string `json:"gid,omitempty" level:"2"`
	Mode   uint32 `json:"mode,omitempty" level:"2"` // 0: 0444
}

// secretsDir is where secrets are when nothing else is said; configsDir is that of
// configs of a program of the node, whose root directory is not the task's own.
const (
	secretsDir = "/run/secrets"
	configsDir = "/run/configs"
)

// Path is where the task finds it: relative targets of secrets are in /run/secrets,
// of configs in / (of a program of the node: in /run/configs).
func (r BlobRef) Path(k BlobKind, image bool) string {
	t := r.Target
	if t == "" {
		t = r.Name
	}
	switch {
	case path.IsAbs(t):
		return path.Clean(t)
	case k == KindSecret:
		return path.Join(secretsDir, t)
	case image:
		return path.Join("/", t)
	}
	return path.Join(configsDir, t)
}

// FileMode is Mode with its default.
func (r BlobRef) FileMode() uint32 {
	if r.Mode == 0 {
		return 0o444
	}
	return r.Mode
}

func (r BlobRef) validate(k BlobKind) error {
	if r.Name == "" {
		return fmt.Errorf("%s without a name: give source=NAME", k)
	}
	for _, id := range []string{r.UID, r.GID} {
		if _, err := strconv.ParseUint(id, 10, 32); id != "" && err != nil {
			return fmt.Errorf("%s %s: user or group %q: want a number", k, r.Name, id)
		}
	}
	if r.Mode > 0o7777 {
		return fmt.Errorf("%s %s: mode %#o: use 0 to 07777", k, r.Name, r.Mode)
	}
	if strings.ContainsRune(r.Target, 0) || r.Target != "" && path.Clean("/"+r.Target) == "/" || slices.Contains(strings.Split(r.Target, "/"), "..") {
		return fmt.Errorf("%s %s: target %q is no path of a file", k, r.Name, r.Target)
	}
	return nil
}

// ParseBlobRef reads Docker's NAME, or source=NAME,target=PATH,uid=N,gid=N,mode=0444.
func ParseBlobRef(k BlobKind, s string) (BlobRef, error) {
	if !strings.Contains(s, "=") {
		r := BlobRef{Name: s}
		return r, r.validate(k)
	}
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return BlobRef{}, fmt.Errorf("--%s %q: %w", k, s, err)
	}
	var r BlobRef
	for _, f := range fields {
		key, v, ok := strings.Cut(f, "=")
		if !ok {
			return r, fmt.Errorf("--%s %q: %q: want KEY=VALUE", k, s, f)
		}
		switch strings.ToLower(key) {
		case "source", "src":
			r.Name = v
		case "target":
			r.Target = v
		case "uid":
			r.UID = v
		case "gid":
			r.GID = v
		case "mode":
			n, err := strconv.ParseUint(v, 8, 32)
			if err != nil {
				return r, fmt.Errorf("--%s %q: mode %q: want octal digits, like 0400", k, s, v)
			}
			r.Mode = uint32(n)
		default:
			return r, fmt.Errorf("--%s %q: key %q is unknown: use source, target, uid, gid or mode", k, s, key)
		}
	}
	return r, r.validate(k)
}

// validateBlobs reports the first thing wrong with what a task is to have.
func (t TaskSpec) validateBlobs() error {
	seen := map[string]string{}
	for _, l := range []struct {
		kind BlobKind
		refs []BlobRef
	}{{KindSecret, t.Secrets}, {KindConfig, t.Configs}} {
		for _, r := range l.refs {
			if err := r.validate(l.kind); err != nil {
				return err
			}
			p := r.Path(l.kind, t.Image != "")
			if other, ok := seen[p]; ok {
				return fmt.Errorf("%s %s and %s have one target, %s: give one of them another", l.kind, r.Name, other, p)
			}
			seen[p] = fmt.Sprintf("%s %s", l.kind, r.Name)
		}
	}
	return nil
}
