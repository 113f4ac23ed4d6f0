package control

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/peer"
)

// tolerant are the calls in which what is not known is overlooked: agents make them,
// which may be newer than the leader, and mean the same without it. In a user's
// command it is what was asked for, and to do the rest in silence is worse than
// nothing: a command line of a newer version may reach an older leader.
var tolerant = []string{"JoinNode", "Report", "RenewCertificate", "LeaveNode", "AdmitManager", "Assignments"}

// known is an interceptor that refuses users' calls with fields which this build does
// not know.
type known struct{ m *Manager }

// WrapUnary implements connect.Interceptor.
func (k known) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if m, ok := req.Any().(proto.Message); ok && !slices.Contains(tolerant, peer.Verb(req.Spec().Procedure)) {
			if at := unknownFields(m.ProtoReflect(), ""); len(at) > 0 {
				return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("the command has what the leading manager %s (%s, feature level %d) does not know (%s): upgrade shoal on the managers first",
					k.m.cfg.Node.Name, k.m.cfg.Node.Build, state.Level, strings.Join(at, ", ")))
			}
		}
		return next(ctx, req)
	}
}

// WrapStreamingClient implements connect.Interceptor.
func (known) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler implements connect.Interceptor: streams only tell.
func (known) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// maxUnknown are named.
const maxUnknown = 5

// unknownFields names the fields of a message, at any depth, that its type has not:
// "spec.task.field 99".
func unknownFields(m protoreflect.Message, path string) []string {
	var out []string
	for b := m.GetUnknown(); len(b) > 0; {
		num, _, n := protowire.ConsumeField(b)
		if n < 0 {
			break
		}
		if f := fmt.Sprintf("%sfield %d", path, num); len(out) == 0 || out[len(out)-1] != f {
			out = append(out, f)
		}
		b = b[n:]
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		at := path + string(f.Name()) + "."
		switch {
		case f.IsMap():
			if f.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					out = append(out, unknownFields(v.Message(), at)...)
					return len(out) < maxUnknown
				})
			}
		case f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				out = append(out, unknownFields(v.List().Get(i).Message(), at)...)
			}
		default:
			out = append(out, unknownFields(v.Message(), at)...)
		}
		return len(out) < maxUnknown
	})
	slices.Sort(out)
	return out[:min(len(out), maxUnknown)]
}
