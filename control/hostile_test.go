package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// hostile fills messages with numbers that are absent, extreme, or a lie, and with words
// that are often right, so that the numbers get far.
type hostile struct {
	*rand.Rand
	words []string
}

func one[T any](h *hostile, of ...T) T { return of[h.IntN(len(of))] }

func (h *hostile) word() string {
	if len(h.words) > 0 && h.IntN(3) > 0 {
		return one(h, h.words...)
	}
	return one(h, "", "x", "app", "web", "10.0.0.0/8", "10.0.1.5", "::", "0.0.0.0/0", "255.255.255.255/32", "tcp", "any", "manager", "worker", "drain", "running", "a b", "\x00", "../../x", strings.Repeat("y", 300))
}

func (h *hostile) scalar(f protoreflect.FieldDescriptor) protoreflect.Value {
	small := int64(h.IntN(4))
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(h.IntN(2) == 0)
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(h.word())
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(h.word()))
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(one(h, 0, 1, 2, -1, math.MaxInt32)))
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(one(h, 0, 1, -1, math.MaxInt32-1, math.MaxInt32, math.MinInt32, int32(small)))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(one(h, 0, 1, math.MaxInt32, math.MaxUint32-1, math.MaxUint32, uint32(small)))
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(one(h, 0, 1, -1, math.MaxInt64-1, math.MaxInt64, math.MinInt64, small))
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(one(h, 0, 1, math.MaxInt64, math.MaxUint64-1, math.MaxUint64, uint64(small)))
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(one(h, 0, -1, math.MaxFloat32, float32(math.NaN()), float32(math.Inf(1))))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(one(h, 0, -1, math.MaxFloat64, math.NaN(), math.Inf(-1)))
	default:
		panic(fmt.Sprintf("field %s of kind %v", f.FullName(), f.Kind()))
	}
}

// fill sets most fields of a message, down to a depth.
func (h *hostile) fill(m protoreflect.Message, depth int) {
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		deep := f.Message() != nil && !f.IsMap()
		if h.IntN(3) == 0 || deep && depth == 0 {
			continue
		}
		switch {
		case f.IsMap():
			for range h.IntN(3) {
				if f.MapValue().Message() == nil {
					m.Mutable(f).Map().Set(h.scalar(f.MapKey()).MapKey(), h.scalar(f.MapValue()))
				}
			}
		case f.IsList() && deep:
			l := m.Mutable(f).List()
			for range h.IntN(3) {
				h.fill(l.AppendMutable().Message(), depth-1)
			}
		case f.IsList():
			l := m.Mutable(f).List()
			for range h.IntN(3) {
				l.Append(h.scalar(f))
			}
		case deep:
			h.fill(m.Mutable(f).Message(), depth-1)
		default:
			m.Set(f, h.scalar(f))
		}
	}
}

// TestHostileNumbers asks the managers everything that can be asked, as a user and with
// the key of a node, with numbers that nobody would give. Nothing of it may be an
// internal error, let alone the end of the manager; what came of it outlives a restart,
// and the cluster works. SHOAL_HOSTILE_SEED asks others, SHOAL_HOSTILE_ROUNDS
// more.
func TestHostileNumbers(t *testing.T) {
	t.Parallel()
	seed, rounds := uint64(1), uint64(40)
	for name, to := range map[string]*uint64{"SHOAL_HOSTILE_SEED": &seed, "SHOAL_HOSTILE_ROUNDS": &rounds} {
		if v := os.Getenv(name); v != "" {
			var err error
			if *to, err = strconv.ParseUint(v, 10, 64); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	t.Logf("SHOAL_HOSTILE_SEED=%d", seed)
	h := &hostile{Rand: rand.New(rand.NewPCG(seed, 7))}
	n := newCluster(t, 1)[0]
	worker := newNode(t, "worker", spec.RoleWorker)
	worker.start()
	join(t, n, worker)
	stranger := peer.New(peer.Config{Credentials: credentials(t, n.root, worker.node.ID, spec.RoleWorker)})
	t.Cleanup(stranger.Close)
	byStranger := stranger.Managers() // one: a node's connections are counted
	if err := createNetwork(n, "app"); err != nil {
		t.Fatal(err)
	}
	n.createService(svc("web", 2, "app"))
	methods := shoalv1.File_shoal_v1_shoal_proto.Services().ByName("Control").Methods()
	refused, done, out := 0, 0, false
	for round := range rounds {
		h.words = n.knownWords(t)
		for i := range methods.Len() {
			m := methods.Get(i)
			path := fmt.Sprintf("/shoal.v1.Control/%s", m.Name())
			if m.IsStreamingServer() || m.IsStreamingClient() || m.Name() == "AdmitManager" || m.Name() == "SaveSnapshot" {
				continue // their requests have no numbers, or are raft's (TestRaftAttacks)
			}
			typ, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
			if err != nil {
				t.Fatal(err)
			}
			req := typ.New()
			h.fill(req, 6)
			body, err := proto.Marshal(req.Interface())
			if err != nil {
				continue // a string that is no text: a client can't send it
			}
			c, url := n.client, "http://shoal"
			thief := !out && h.IntN(3) == 0
			if thief {
				c, url = byStranger, "http://"+n.addr()
			}
			switch code, answer := post(c, url+path, body); {
			case code == http.StatusOK:
				done++
			case code == 0 && thief && n.knows(worker.node.ID) == nil:
				out = true // the user removed that node meanwhile: its key is worth nothing
			case strings.Contains(answer, `"internal"`), strings.Contains(answer, `"unknown"`), strings.Contains(answer, "panic"), code == 0:
				t.Errorf("round %d: %s: %d %s\n%v", round, path, code, answer, req.Interface())
			default:
				refused++
			}
		}
		if t.Failed() {
			return
		}
	}
	if done == 0 || refused == 0 {
		t.Errorf("%d done, %d refused", done, refused)
	}
	t.Logf("%d done, %d refused", done, refused)
	// What it made of all that is a state that can be read again, and works.
	n.stop()
	n.start()
	eventually(t, "the manager works", func() error {
		err := createNetwork(n, "after")
		if connect.CodeOf(err) == connect.CodeAlreadyExists {
			return nil
		}
		return err
	})
	if _, err := n.ctl.ListTasks(testCtx(t), connect.NewRequest(&shoalv1.ListTasksRequest{})); err != nil {
		t.Error(err)
	}
}

// post sends one message of the Connect protocol; code is 0 when no answer came.
func post(c *http.Client, url string, body []byte) (code int, answer string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return 0, err.Error()
	}
	req.Header.Set("Content-Type", "application/proto")
	req.Header.Set("Connect-Timeout-Ms", "2000") // some wait for what never comes
	resp, err := c.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(b)
}

// knows returns a node; nil when the managers have none such, or don't answer.
func (n *simNode) knows(id string) *shoalv1.NodeInfo {
	r, err := n.ctl.ListNodes(testCtx(n.t), connect.NewRequest(&shoalv1.ListNodesRequest{}))
	if err != nil {
		n.t.Error(err)
		return nil
	}
	i := slices.IndexFunc(r.Msg.Nodes, func(x *shoalv1.NodeInfo) bool { return x.GetId() == id })
	if i < 0 {
		return nil
	}
	return r.Msg.Nodes[i]
}

// knownWords are names and IDs of what there is.
func (n *simNode) knownWords(t *testing.T) (out []string) {
	ctx := testCtx(t)
	if r, err := n.ctl.ListNodes(ctx, connect.NewRequest(&shoalv1.ListNodesRequest{})); err == nil {
		for _, x := range r.Msg.Nodes {
			out = append(out, x.GetId(), x.GetName())
		}
	}
	if r, err := n.ctl.ListNetworks(ctx, connect.NewRequest(&shoalv1.ListNetworksRequest{})); err == nil {
		for _, x := range r.Msg.Networks {
			out = append(out, x.GetId(), x.GetName())
		}
	}
	if r, err := n.ctl.ListServices(ctx, connect.NewRequest(&shoalv1.ListServicesRequest{})); err == nil {
		for _, x := range r.Msg.Services {
			out = append(out, x.GetId(), x.GetSpec().GetName())
		}
	}
	if r, err := n.ctl.ListTasks(ctx, connect.NewRequest(&shoalv1.ListTasksRequest{})); err == nil {
		for _, x := range r.Msg.Tasks {
			out = append(out, x.GetId(), x.GetName())
		}
	}
	return out
}
