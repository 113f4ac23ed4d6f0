package container

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/runtime/volume"
	"github.com/shoalnet/shoal/spec"
)

// mounts are what a box has beside its image, and the names of its volumes, which
// are made where they are not there.
func (e *Executor) mounts(ctx context.Context, c *client.Client, img client.Image, b runtime.Box) (out []specs.Mount, vols []string, err error) {
	// The task's own files come first: a mount of the user's over one of them wins.
	for _, f := range []string{"resolv.conf", "hosts", "hostname"} {
		if b.Netns == "" && f != "hostname" {
			out = append(out, specs.Mount{Destination: "/etc/" + f, Type: "bind", Source: "/etc/" + f, Options: []string{"rbind", "ro"}})
			continue
		}
		out = append(out, specs.Mount{Destination: "/etc/" + f, Type: "bind", Source: filepath.Join(b.Dir, f), Options: []string{"rbind", "rprivate", "rw"}})
	}
	if b.Blobs != "" {
		for _, m := range runtime.BlobMounts(b.Spec, b.Blobs) {
			out = append(out, specs.Mount{Destination: m.Path, Type: "bind", Source: m.File, Options: []string{"bind", "rprivate", "ro", "nosuid", "nodev", "noexec"}})
		}
	}
	for _, m := range b.Spec.Mounts {
		var sm specs.Mount
		switch m.Type {
		case spec.MountTmpfs:
			sm = tmpfs(m)
		case spec.MountBind:
			if sm, err = e.bind(m); err != nil {
				return nil, nil, err
			}
		case spec.MountVolume:
			v, verr := e.volume(ctx, c, img, b, m)
			if verr != nil {
				return nil, nil, verr
			}
			vols = append(vols, v.Name)
			sm = specs.Mount{Destination: m.Target, Type: "bind", Source: v.Path, Options: []string{"rbind", "rprivate", rw(m)}}
		}
		out = append(out, sm)
		out = append(out, e.hide(sm)...)
	}
	if b.Spec.Init {
		exe, err := os.Executable()
		if err != nil {
			return nil, nil, err
		}
		out = append(out, specs.Mount{Destination: initPath, Type: "bind", Source: exe, Options: []string{"bind", "ro", "rprivate"}})
	}
	return out, vols, nil
}

// Files implements runtime.Executor. Volumes and directories of the node are where the
// program had them; what was in memory is gone.
func (e *Executor) Files(ctx context.Context, b runtime.Box, do func(ctx context.Context, root string) error) error {
	c, ctx, err := e.conn(ctx)
	if err != nil {
		return err
	}
	ctr, err := e.kept(ctx, c, b.ID)
	if err != nil {
		return err
	}
	if ctr == nil {
		return fmt.Errorf("%w: files of task %s", runtime.ErrNotFound, b.ID)
	}
	ctx, done, err := e.look(ctx, b.ID)
	if err != nil {
		return err
	}
	defer done()
	switch t, err := ctr.Task(ctx, nil); {
	case errdefs.IsNotFound(err):
	case err != nil:
		return e.unavailable(err)
	default:
		// What has ended may not have been cleared away yet.
		if st, err := t.Status(ctx); err == nil && st.Status != client.Stopped {
			return errStarted
		} else if err != nil && !errdefs.IsNotFound(err) {
			return e.unavailable(err)
		}
	}
	ms, err := c.SnapshotService(e.cfg.Snapshotter).Mounts(ctx, e.snapshotKey(b.ID))
	if err != nil {
		return e.unavailable(err)
	}
	var over []specs.Mount
	for _, m := range b.Spec.Mounts {
		switch m.Type {
		case spec.MountBind:
			sm, err := e.bind(m)
			if err != nil {
				return err
			}
			over = append(append(over, sm), e.hide(sm)...)
		case spec.MountVolume:
			v, err := e.cfg.Volumes.Get(volumeName(m, b.ID))
			if err != nil {
				return err
			}
			over = append(over, specs.Mount{Destination: m.Target, Type: "bind", Source: v.Path, Options: []string{"rbind", "rprivate", rw(m)}})
		}
	}
	for _, m := range over {
		ms = append(ms, mount.Mount{Type: m.Type, Source: m.Source, Target: m.Destination, Options: m.Options})
	}
	var did error
	err = mount.WithTempMount(ctx, ms, func(root string) error { did = do(ctx, root); return nil })
	if err != nil {
		err = fmt.Errorf("the files of the task can't be mounted: %w", err)
	}
	if cause := context.Cause(ctx); did != nil && errors.Is(cause, errStarted) {
		did = cause
	}
	return errors.Join(did, err)
}

var errStarted = errors.New("it is started again")

// looking is somebody who sees the files of a task that does not run.
type looking struct {
	end  context.CancelCauseFunc
	over chan struct{}
}

// look has one at a time see a task's files, until done is called or the context ends.
func (e *Executor) look(ctx context.Context, id string) (context.Context, func(), error) {
	for {
		e.mu.Lock()
		other := e.looked[id]
		if other == nil {
			ctx, end := context.WithCancelCause(ctx)
			l := &looking{end, make(chan struct{})}
			if e.looked == nil {
				e.looked = map[string]*looking{}
			}
			e.looked[id] = l
			e.mu.Unlock()
			return ctx, func() {
				e.mu.Lock()
				delete(e.looked, id)
				e.mu.Unlock()
				close(l.over)
				end(nil)
			}, nil
		}
		e.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-other.over:
		}
	}
}

// lookAway ends who sees a task's files.
func (e *Executor) lookAway(ctx context.Context, id string) error {
	e.mu.Lock()
	l := e.looked[id]
	e.mu.Unlock()
	if l == nil {
		return nil
	}
	l.end(errStarted)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-l.over:
		return nil
	}
}

// volumeName is what a mount's volume is called: without a name it is of this task alone,
// and the same when the task is started again.
func volumeName(m spec.Mount, task string) string {
	if m.Source != "" {
		return m.Source
	}
	sum := sha256.Sum256([]byte(task + " " + m.Target))
	return hex.EncodeToString(sum[:])
}

// initPath is where --init puts its program, as Docker does.
const initPath = "/sbin/docker-init"

func rw(m spec.Mount) string {
	if m.ReadOnly {
		return "ro"
	}
	return "rw"
}

func tmpfs(m spec.Mount) specs.Mount {
	opts := []string{"nosuid", "nodev", "noexec"}
	for _, o := range m.Options {
		if neg, ok := map[string]string{"suid": "nosuid", "dev": "nodev", "exec": "noexec"}[o]; ok {
			for i := range opts {
				if opts[i] == neg {
					opts[i] = o
				}
			}
			continue
		}
		opts = append(opts, o)
	}
	if m.Size > 0 {
		opts = append(opts, "size="+strconv.FormatInt(m.Size, 10))
	}
	mode := m.Mode
	if mode == 0 {
		mode = 0o1777
	}
	return specs.Mount{Destination: m.Target, Type: "tmpfs", Source: "tmpfs", Options: append(opts, fmt.Sprintf("mode=%o", mode), rw(m))}
}

// bind checks a directory or file of the node. The agent's own are nobody's: who
// reaches its socket or keys rules the cluster.
func (e *Executor) bind(m spec.Mount) (specs.Mount, error) {
	src := filepath.Clean(m.Source)
	if _, err := os.Lstat(src); errors.Is(err, os.ErrNotExist) {
		if !m.CreateSrc {
			return specs.Mount{}, fmt.Errorf("bind mount source %s is not on node %s: make it there, or use -v, which makes a directory", src, e.cfg.Node)
		}
		if err := os.MkdirAll(src, 0o755); err != nil {
			return specs.Mount{}, fmt.Errorf("bind mount source: %w", err)
		}
	}
	real, err := filepath.EvalSymlinks(src)
	if err != nil {
		return specs.Mount{}, fmt.Errorf("bind mount source: %w", err)
	}
	for _, h := range e.cfg.Hidden {
		if hr, err := filepath.EvalSymlinks(h); err == nil {
			h = hr
		}
		if within(real, h) {
			return specs.Mount{}, fmt.Errorf("bind mount source %s is the agent's own, and hidden from tasks", src)
		}
	}
	prop := m.Propagation
	if prop == "" {
		prop = "rprivate"
	}
	return specs.Mount{Destination: m.Target, Type: "bind", Source: real, Options: []string{"rbind", prop, rw(m)}}, nil
}

// hide covers the agent's directories where a bind mount would show them.
func (e *Executor) hide(m specs.Mount) (out []specs.Mount) {
	if m.Type != "bind" {
		return nil
	}
	var hidden []string
	for _, h := range e.cfg.Hidden {
		if hr, err := filepath.EvalSymlinks(h); err == nil {
			h = hr
		}
		if fi, err := os.Stat(h); err != nil || !fi.IsDir() || !within(h, m.Source) {
			continue
		}
		hidden = append(hidden, h)
	}
	slices.Sort(hidden)
	for i, h := range hidden {
		// What is below one that is covered would be named there.
		covered := slices.ContainsFunc(hidden[:i], func(above string) bool { return within(h, above) })
		rel, err := filepath.Rel(m.Source, h)
		if err != nil || rel == "." || covered {
			continue
		}
		out = append(out, specs.Mount{Destination: filepath.Join(m.Destination, rel), Type: "tmpfs", Source: "tmpfs", Options: []string{"ro", "nosuid", "nodev", "noexec", "size=0", "mode=755"}})
	}
	return out
}

// within tells whether path is dir or below it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && (rel == "." || rel != ".." && !strings.HasPrefix(rel, "../"))
}

// volume finds or makes the volume of a mount. A new one begins with what the
// image has at its place, as in Docker.
func (e *Executor) volume(ctx context.Context, c *client.Client, img client.Image, b runtime.Box, m spec.Mount) (volume.Volume, error) {
	if e.cfg.Volumes == nil {
		return volume.Volume{}, errors.New("this node keeps no volumes")
	}
	name, owner := volumeName(m, b.ID), ""
	if m.Source == "" {
		owner = b.ID
	}
	v, made, err := e.cfg.Volumes.Create(name, m.Labels, owner)
	if err != nil {
		return v, err
	}
	if m.NoCopy {
		return v, nil
	}
	if !made {
		if es, err := os.ReadDir(v.Path); err != nil || len(es) > 0 {
			return v, err
		}
	}
	if err := e.populate(ctx, c, img, b.ID, m.Target, v.Path); err != nil {
		if made {
			err = errors.Join(err, e.cfg.Volumes.Remove(name))
		}
		return v, fmt.Errorf("fill volume %s from the image: %w", name, err)
	}
	return v, nil
}

// populate copies what the image has at target.
func (e *Executor) populate(ctx context.Context, c *client.Client, img client.Image, id, target, to string) error {
	diffIDs, err := img.RootFS(ctx)
	if err != nil {
		return err
	}
	sn := c.SnapshotService(e.cfg.Snapshotter)
	key := e.snapshotKey(id) + "-volume"
	ms, err := sn.View(ctx, key, identity.ChainID(diffIDs).String())
	if errdefs.IsAlreadyExists(err) {
		if ms, err = sn.Mounts(ctx, key); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	defer func() { _ = sn.Remove(context.WithoutCancel(ctx), key) }()
	return mount.WithReadonlyTempMount(ctx, ms, func(root string) error {
		src, err := fs.RootPath(root, target)
		if err != nil {
			return err
		}
		fi, err := os.Stat(src)
		if errors.Is(err, os.ErrNotExist) || err == nil && !fi.IsDir() {
			return nil
		}
		if err != nil {
			return err
		}
		return fs.CopyDir(to, src)
	})
}
