package agent

import (
	"context"
	"errors"
	"fmt"
	"io"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/runtime"
)

// Copy moves files between a task and an archive. That it can't is said by a message: the
// error of a call comes to a client only once that has sent all it has to, which may be
// never.
func (a *nodeAPI) Copy(ctx context.Context, stream *connect.BidiStream[shoalv1.CopyRequest, shoalv1.CopyResponse]) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return invalid("copy: the first message is not a start")
	}
	if err := a.copy(ctx, stream, start); err != nil {
		return stream.Send(&shoalv1.CopyResponse{Msg: &shoalv1.CopyResponse_Failed{Failed: err.Error()}})
	}
	return stream.Send(&shoalv1.CopyResponse{Msg: &shoalv1.CopyResponse_Done{Done: true}})
}

func (a *nodeAPI) copy(ctx context.Context, stream *connect.BidiStream[shoalv1.CopyRequest, shoalv1.CopyResponse], start *shoalv1.CopyRequest_Start) error {
	m, t, err := a.task(ctx, start.Task)
	if err != nil {
		return err
	}
	s := runtime.CopySpec{Path: start.Path, Follow: start.Follow, Owners: start.Owners,
		Found: func(c runtime.CopySource) error {
			return stream.Send(&shoalv1.CopyResponse{Msg: &shoalv1.CopyResponse_Source{Source: &shoalv1.CopySource{Path: c.Path, Dir: c.Dir, Rebase: c.Rebase}}})
		},
		Out: writerFunc(func(b []byte) error {
			return stream.Send(&shoalv1.CopyResponse{Msg: &shoalv1.CopyResponse_Data{Data: b}})
		})}
	if start.In {
		s.In = &copyReader{stream: stream}
		if c := start.Source; c != nil {
			s.Source = &runtime.CopySource{Path: c.Path, Dir: c.Dir, Rebase: c.Rebase}
		}
	}
	err = m.cfg.Runtime.Copy(ctx, t.ID, s)
	if errors.Is(err, runtime.ErrNotFound) {
		err = errors.New("its program does not run")
	}
	if err != nil {
		return fmt.Errorf("task %s: %w", t.Name, err)
	}
	return nil
}

// copyReader is the archive that a client sends.
type copyReader struct {
	stream *connect.BidiStream[shoalv1.CopyRequest, shoalv1.CopyResponse]
	rest   []byte
	whole  bool
}

func (r *copyReader) Read(b []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.whole {
			return 0, io.EOF
		}
		msg, err := r.stream.Receive()
		if errors.Is(err, io.EOF) {
			return 0, errors.New("the archive was cut off on its way")
		}
		if err != nil {
			return 0, err
		}
		r.rest, r.whole = msg.GetData(), msg.GetEof()
	}
	n := copy(b, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}
