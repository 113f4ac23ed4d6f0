package runtime

import (
	"context"
	"encoding/json"
	"io"
	"time"
)

// Image is one that a node has.
type Image struct {
	Name    string // as people know it
	Ref     string // whole: host, repository, tag or digest
	Digest  string
	Size    int64 // bytes
	Created time.Time
	InUse   []string // names of tasks
	Damaged bool     // something of it is missing
}

// Images are those of a node.
type Images interface {
	// Health returns what runs containers and its version; an error says, in words
	// for a person, why nothing does.
	Health(ctx context.Context) (string, error)
	// Pull fetches an image for this node; by tells who asked: "user", or "task".
	Pull(ctx context.Context, image, auth, by string, progress func(string)) error
	// Resolve returns an image's reference with the digest that it has now.
	Resolve(ctx context.Context, image, auth string) (string, error)
	Images(ctx context.Context) ([]Image, error)
	// RemoveImage takes one away, by name or digest; ErrNotFound.
	RemoveImage(ctx context.Context, ref string, force bool) ([]string, error)
	// PruneImages removes those that no task uses: all of them, or those without a
	// tag; only what was not used for so long; onlyTasks, what only tasks asked for.
	PruneImages(ctx context.Context, all bool, unused time.Duration, onlyTasks bool) (gone []string, bytes int64, err error)
	InspectImage(ctx context.Context, ref string) (Image, json.RawMessage, error)
	Load(ctx context.Context, r io.Reader, name string) ([]string, error)
	Save(ctx context.Context, refs []string, w io.Writer) error
	// VolumesInUse are the names of volumes in tasks, with these tasks' names.
	VolumesInUse(ctx context.Context) (map[string][]string, error)
}
