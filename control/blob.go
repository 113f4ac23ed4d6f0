package control

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

// shown is a secret or a config as people may see it: a secret never again.
func shown(b spec.Blob) *shoalv1.Blob {
	if b.Kind == spec.KindSecret {
		b.Data = nil
	}
	return api.Blob(b)
}

func blobKind(s string) (spec.BlobKind, error) {
	switch k := spec.BlobKind(s); k {
	case spec.KindSecret, spec.KindConfig:
		return k, nil
	}
	return "", invalid(fmt.Errorf("kind %q: use %s or %s", s, spec.KindSecret, spec.KindConfig))
}

func (s *service) CreateBlob(ctx context.Context, req *connect.Request[shoalv1.CreateBlobRequest]) (*connect.Response[shoalv1.CreateBlobResponse], error) {
	b := api.ToBlob(req.Msg.Blob)
	b.ID, b.Version, b.Created = spec.NewID(), 0, time.Now().UnixMilli()
	b.Updated = b.Created
	if err := b.Validate(); err != nil {
		return nil, invalid(err)
	}
	res, err := s.m.Propose(ctx, state.Command{CreateBlob: &state.CreateBlob{Blob: b}})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.CreateBlobResponse{Blob: shown(*res.Blob)}), nil
}

func (s *service) UpdateBlob(ctx context.Context, req *connect.Request[shoalv1.UpdateBlobRequest]) (*connect.Response[shoalv1.UpdateBlobResponse], error) {
	kind, err := blobKind(req.Msg.Kind)
	if err != nil {
		return nil, err
	}
	res, err := s.m.Propose(ctx, state.Command{UpdateBlob: &state.UpdateBlob{Kind: kind, Ref: req.Msg.Ref, Labels: req.Msg.Labels, Updated: time.Now().UnixMilli()}})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&shoalv1.UpdateBlobResponse{Blob: shown(*res.Blob)}), nil
}

func (s *service) ListBlobs(_ context.Context, req *connect.Request[shoalv1.ListBlobsRequest]) (*connect.Response[shoalv1.ListBlobsResponse], error) {
	kind, err := blobKind(req.Msg.Kind)
	if err != nil {
		return nil, err
	}
	resp := &shoalv1.ListBlobsResponse{}
	err = s.read(func(st *state.State) error {
		bs, err := pick(req.Msg.Refs, func() []spec.Blob { return st.Blobs(kind) }, func(ref string) (spec.Blob, error) { return st.Blob(kind, ref) })
		for _, b := range bs {
			resp.Blobs = append(resp.Blobs, shown(b))
		}
		return err
	})
	return connect.NewResponse(resp), err
}

func (s *service) RemoveBlob(ctx context.Context, req *connect.Request[shoalv1.RemoveBlobRequest]) (*connect.Response[shoalv1.RemoveBlobResponse], error) {
	kind, err := blobKind(req.Msg.Kind)
	if err != nil {
		return nil, err
	}
	_, err = s.m.Propose(ctx, state.Command{RemoveBlob: &state.RemoveBlob{Kind: kind, Ref: req.Msg.Ref}})
	return connect.NewResponse(&shoalv1.RemoveBlobResponse{}), err
}

// TaskBlobs gives a node what its tasks need, and nothing else.
func (s *service) TaskBlobs(_ context.Context, req *connect.Request[shoalv1.TaskBlobsRequest]) (*connect.Response[shoalv1.TaskBlobsResponse], error) {
	resp := &shoalv1.TaskBlobsResponse{}
	err := s.read(func(st *state.State) error {
		bs, err := st.BlobsFor(req.Msg.Node, req.Msg.Ids)
		for _, b := range bs {
			resp.Blobs = append(resp.Blobs, api.Blob(b))
		}
		return err
	})
	return connect.NewResponse(resp), err
}
