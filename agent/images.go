package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/runtime/volume"
	"github.com/shoalnet/shoal/spec"
)

// platform is what images for this node are for (OCI image index, GOOS/GOARCH).
const platform = goruntime.GOOS + "/" + goruntime.GOARCH

const (
	containersEvery = 5 * time.Second  // between looks at whether containers can run
	imagesEvery     = 10 * time.Minute // between looks for images that nobody uses
)

// noContainers is said by an agent that was told to run none.
const noContainers = "this agent was started without containers (--containerd '')"

// containers tells whether tasks from images can run here: by what, or why not.
func (a *Agent) containers(ctx context.Context) (bool, string) {
	if a.cfg.Images == nil {
		return false, noContainers
	}
	v, err := a.cfg.Images.Health(ctx)
	if err != nil {
		return false, err.Error()
	}
	return true, v
}

// imageKeeper watches what runs containers, and removes images that nobody uses.
type imageKeeper struct {
	mu  sync.Mutex
	ok  bool
	why string
}

// state is what the managers are told.
func (k *imageKeeper) state() (ok bool, why string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.ok, k.why
}

// imagesLoop keeps imageKeeper true until ctx ends; changed is called when what the
// managers should know did.
func (m *member) imagesLoop() {
	look := func() {
		ok, why := (&Agent{cfg: m.cfg}).containers(m.ctx)
		if ok {
			why = ""
		}
		m.images.mu.Lock()
		changed := m.images.ok != ok || m.images.why != why
		m.images.ok, m.images.why = ok, why
		m.images.mu.Unlock()
		if changed && m.ctx.Err() == nil {
			m.log.Info("containers", "can_run", ok, "why_not", why)
			wake(m.reportWake)
		}
	}
	if m.cfg.Volumes != nil {
		if err := m.cfg.Volumes.Sweep(); err != nil {
			m.log.Warn("what a crash left of volumes can't be cleared away", "error", err)
		}
	}
	look()
	if m.cfg.Images == nil {
		return
	}
	every := min(imagesEvery, max(m.cfg.ImageTTL, containersEvery))
	next := time.Now().Add(every)
	for sleep.For(m.ctx, containersEvery) {
		look()
		if ok, _ := m.images.state(); !ok || m.cfg.ImageTTL <= 0 || time.Now().Before(next) {
			continue
		}
		next = time.Now().Add(every)
		gone, bytes, err := m.cfg.Images.PruneImages(m.ctx, true, m.cfg.ImageTTL, true)
		if err != nil {
			m.log.Warn("images that no task uses can't be removed", "error", err)
		}
		if len(gone) > 0 {
			m.log.Info("removed images that no task used", "images", gone, "unused_for", m.cfg.ImageTTL, "bytes", bytes)
		}
	}
}

// imageStore is the node's, or an error for the caller.
func (a *nodeAPI) imageStore() (runtime.Images, error) {
	if a.cfg.Images == nil {
		return nil, precondition("%s", noContainers)
	}
	return a.cfg.Images, nil
}

func imageError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, runtime.ErrNotFound), errors.Is(err, runtime.ErrNoImage), errors.Is(err, volume.ErrNotFound):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, runtime.ErrUnavailable):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	}
	return connect.NewError(connect.CodeFailedPrecondition, err)
}

func wireImage(i runtime.Image) *shoalv1.Image {
	return &shoalv1.Image{Name: i.Name, Ref: i.Ref, Digest: i.Digest, Size: i.Size, CreatedMs: i.Created.UnixMilli(), InUse: i.InUse, Damaged: i.Damaged}
}

func (a *nodeAPI) nodeName() string { return a.identity().Name }

// ImageList lists the node's images.
func (a *nodeAPI) ImageList(ctx context.Context, _ *connect.Request[shoalv1.ImageListRequest]) (*connect.Response[shoalv1.ImageListResponse], error) {
	s, err := a.imageStore()
	if err != nil {
		return nil, err
	}
	all, err := s.Images(ctx)
	if err != nil {
		return nil, imageError(err)
	}
	resp := &shoalv1.ImageListResponse{Node: a.nodeName()}
	for _, i := range all {
		resp.Images = append(resp.Images, wireImage(i))
	}
	return connect.NewResponse(resp), nil
}

// ImagePull fetches an image, and tells how far it is.
func (a *nodeAPI) ImagePull(ctx context.Context, req *connect.Request[shoalv1.ImagePullRequest], stream *connect.ServerStream[shoalv1.ImagePullResponse]) error {
	s, err := a.imageStore()
	if err != nil {
		return err
	}
	if err := spec.ValidateImage(req.Msg.Image); err != nil {
		return invalid("%s", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex
	err = s.Pull(ctx, req.Msg.Image, req.Msg.Auth, "user", func(p string) {
		mu.Lock()
		defer mu.Unlock()
		if stream.Send(&shoalv1.ImagePullResponse{Progress: p}) != nil {
			cancel()
		}
	})
	if err != nil {
		return imageError(err)
	}
	img, _, err := s.InspectImage(ctx, req.Msg.Image)
	if err != nil {
		return imageError(err)
	}
	mu.Lock()
	defer mu.Unlock()
	return stream.Send(&shoalv1.ImagePullResponse{Done: withDigest(img)})
}

func withDigest(i runtime.Image) string {
	if strings.Contains(i.Ref, "@") {
		return i.Ref
	}
	return i.Ref + "@" + i.Digest
}

// ImageResolve names the digest that an image has now.
func (a *nodeAPI) ImageResolve(ctx context.Context, req *connect.Request[shoalv1.ImageResolveRequest]) (*connect.Response[shoalv1.ImageResolveResponse], error) {
	s, err := a.imageStore()
	if err != nil {
		return nil, err
	}
	if err := spec.ValidateImage(req.Msg.Image); err != nil {
		return nil, invalid("%s", err)
	}
	ref, err := s.Resolve(ctx, req.Msg.Image, req.Msg.Auth)
	if err != nil {
		return nil, imageError(err)
	}
	return connect.NewResponse(&shoalv1.ImageResolveResponse{Ref: ref}), nil
}

// ImageRemove takes an image away.
func (a *nodeAPI) ImageRemove(ctx context.Context, req *connect.Request[shoalv1.ImageRemoveRequest]) (*connect.Response[shoalv1.ImageRemoveResponse], error) {
	s, err := a.imageStore()
	if err != nil {
		return nil, err
	}
	gone, err := s.RemoveImage(ctx, req.Msg.Image, req.Msg.Force)
	if err != nil {
		return nil, imageError(err)
	}
	return connect.NewResponse(&shoalv1.ImageRemoveResponse{Removed: gone}), nil
}

// ImagePrune removes images that no task uses.
func (a *nodeAPI) ImagePrune(ctx context.Context, req *connect.Request[shoalv1.ImagePruneRequest]) (*connect.Response[shoalv1.ImageRemoveResponse], error) {
	s, err := a.imageStore()
	if err != nil {
		return nil, err
	}
	gone, n, err := s.PruneImages(ctx, req.Msg.All, time.Duration(max(req.Msg.UnusedMs, 0))*time.Millisecond, false)
	if err != nil {
		return nil, imageError(err)
	}
	return connect.NewResponse(&shoalv1.ImageRemoveResponse{Removed: gone, Bytes: n}), nil
}

// ImageInspect shows an image's own configuration.
func (a *nodeAPI) ImageInspect(ctx context.Context, req *connect.Request[shoalv1.ImageInspectRequest]) (*connect.Response[shoalv1.ImageInspectResponse], error) {
	s, err := a.imageStore()
	if err != nil {
		return nil, err
	}
	img, cfg, err := s.InspectImage(ctx, req.Msg.Image)
	if err != nil {
		return nil, imageError(err)
	}
	return connect.NewResponse(&shoalv1.ImageInspectResponse{Image: wireImage(img), Config: cfg}), nil
}

// ImageLoad reads an archive.
func (a *nodeAPI) ImageLoad(ctx context.Context, stream *connect.ClientStream[shoalv1.ImageLoadRequest]) (*connect.Response[shoalv1.ImageLoadResponse], error) {
	s, err := a.imageStore()
	if err != nil {
		return nil, err
	}
	name := ""
	if stream.Receive() {
		name = stream.Msg().Name
	}
	if name != "" {
		if err := spec.ValidateImage(name); err != nil {
			return nil, invalid("%s", err)
		}
	}
	r, w := io.Pipe()
	defer r.Close()
	go func() { // ends with the stream, which ends when this handler returns, or with r
		data := []byte{}
		if m := stream.Msg(); m != nil {
			data = m.Data
		}
		for {
			if _, err := w.Write(data); err != nil {
				return
			}
			if !stream.Receive() {
				err := stream.Err()
				if err == nil {
					err = io.EOF
				}
				w.CloseWithError(err)
				return
			}
			data = stream.Msg().Data
		}
	}()
	names, err := s.Load(ctx, r, name)
	if err != nil {
		return nil, imageError(err)
	}
	return connect.NewResponse(&shoalv1.ImageLoadResponse{Images: names}), nil
}

// ImageSave writes an archive.
func (a *nodeAPI) ImageSave(ctx context.Context, req *connect.Request[shoalv1.ImageSaveRequest], stream *connect.ServerStream[shoalv1.ImageSaveResponse]) error {
	s, err := a.imageStore()
	if err != nil {
		return err
	}
	if len(req.Msg.Images) == 0 {
		return invalid("no image is named")
	}
	return imageError(s.Save(ctx, req.Msg.Images, chunks{stream}))
}

// chunks sends what is written in messages of a bounded size.
type chunks struct {
	stream *connect.ServerStream[shoalv1.ImageSaveResponse]
}

func (c chunks) Write(b []byte) (int, error) {
	n := 0
	for p := range slices.Chunk(b, 256<<10) {
		if err := c.stream.Send(&shoalv1.ImageSaveResponse{Data: p}); err != nil {
			return n, err
		}
		n += len(p)
	}
	return n, nil
}

// ---- volumes ----

func (a *nodeAPI) volumeStore() (*volume.Store, error) {
	if a.cfg.Volumes == nil {
		return nil, precondition("this agent keeps no volumes")
	}
	return a.cfg.Volumes, nil
}

// usedVolumes is empty where nothing runs containers: then none is in use.
func (a *nodeAPI) usedVolumes(ctx context.Context) (map[string][]string, error) {
	if a.cfg.Images == nil {
		return nil, nil
	}
	used, err := a.cfg.Images.VolumesInUse(ctx)
	if err != nil {
		return nil, imageError(err)
	}
	return used, nil
}

func wireVolume(v volume.Volume, used []string) *shoalv1.Volume {
	return &shoalv1.Volume{Name: v.Name, Labels: v.Labels, CreatedMs: v.Created.UnixMilli(), Path: v.Path, Anonymous: v.Anonymous, InUse: used}
}

// VolumeList lists the node's volumes.
func (a *nodeAPI) VolumeList(ctx context.Context, _ *connect.Request[shoalv1.VolumeListRequest]) (*connect.Response[shoalv1.VolumeListResponse], error) {
	s, err := a.volumeStore()
	if err != nil {
		return nil, err
	}
	vs, err := s.List()
	if err != nil {
		return nil, imageError(err)
	}
	used, err := a.usedVolumes(ctx)
	if err != nil {
		used = nil // the list is worth having while containerd does not answer
	}
	resp := &shoalv1.VolumeListResponse{Node: a.nodeName()}
	for _, v := range vs {
		resp.Volumes = append(resp.Volumes, wireVolume(v, used[v.Name]))
	}
	return connect.NewResponse(resp), nil
}

// VolumeCreate makes a volume; one that is there is as good.
func (a *nodeAPI) VolumeCreate(_ context.Context, req *connect.Request[shoalv1.VolumeCreateRequest]) (*connect.Response[shoalv1.VolumeCreateResponse], error) {
	s, err := a.volumeStore()
	if err != nil {
		return nil, err
	}
	name := req.Msg.Name
	if name == "" {
		var b [32]byte
		_, _ = rand.Read(b[:])
		name = hex.EncodeToString(b[:])
	}
	if err := spec.ValidateVolumeName(name); err != nil {
		return nil, invalid("%s", err)
	}
	v, _, err := s.Create(name, req.Msg.Labels, "")
	if err != nil {
		return nil, imageError(err)
	}
	return connect.NewResponse(&shoalv1.VolumeCreateResponse{Volume: wireVolume(v, nil)}), nil
}

// VolumeRemove takes a volume and its data away, unless a task has it.
func (a *nodeAPI) VolumeRemove(ctx context.Context, req *connect.Request[shoalv1.VolumeRemoveRequest]) (*connect.Response[shoalv1.VolumeRemoveResponse], error) {
	s, err := a.volumeStore()
	if err != nil {
		return nil, err
	}
	used, err := a.usedVolumes(ctx)
	if err != nil {
		return nil, err
	}
	if by := used[req.Msg.Name]; len(by) > 0 {
		return nil, precondition("volume %s is used by task %s: remove that first", req.Msg.Name, strings.Join(by, ", "))
	}
	if err := s.Remove(req.Msg.Name); err != nil && (!req.Msg.Force || !errors.Is(err, volume.ErrNotFound)) {
		return nil, imageError(err)
	}
	return connect.NewResponse(&shoalv1.VolumeRemoveResponse{}), nil
}

// healthCommand is what a health check runs.
func healthCommand(h spec.HealthCheck) []string {
	if len(h.Exec) > 0 {
		return h.Exec
	}
	return []string{"/bin/sh", "-c", h.Command}
}
