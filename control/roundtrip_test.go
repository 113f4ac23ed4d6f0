package control

import (
	"encoding/json"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/filled"
)

// TestAssignmentIsWhole: nothing of an assignment is forgotten on its way to a node.
func TestAssignmentIsWhole(t *testing.T) {
	m := assignment(filled.Value[state.Delta]()).ProtoReflect()
	var look func(m protoreflect.Message)
	look = func(m protoreflect.Message) {
		fields := m.Descriptor().Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			if !m.Has(f) {
				switch f.FullName() {
				case "shoal.v1.AssignmentsResponse.unchanged", // of a sign of life
					// What the leader counts for people.
					"shoal.v1.Task.faults", "shoal.v1.Service.running", "shoal.v1.Service.stale", "shoal.v1.Service.behind", "shoal.v1.Service.faults", "shoal.v1.Service.desired", "shoal.v1.Service.completed", "shoal.v1.Service.to_complete",
					"shoal.v1.NodeInfo.leader", "shoal.v1.NodeInfo.unreached", "shoal.v1.NodeInfo.voter":
				default:
					t.Errorf("%s is not set", f.FullName())
				}
				continue
			}
			if f.Message() == nil || f.IsMap() {
				continue
			}
			if f.IsList() {
				look(m.Get(f).List().Get(0).Message())
			} else {
				look(m.Get(f).Message())
			}
		}
	}
	look(m)
}

// TestFileRoundTrips: the manager's own files.
func TestFileRoundTrips(t *testing.T) {
	k := filled.Value[mark]()
	dir := t.TempDir()
	k.Format = markFormat
	if err := k.save(dir); err != nil {
		t.Fatal(err)
	}
	if got, err := readMark(dir); err != nil || *got != k {
		t.Errorf("%+v, %v: was %+v", got, err, k)
	}
	info := filled.Value[SnapshotInfo]()
	b, _ := json.Marshal(info)
	var got SnapshotInfo
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if d := filled.Differ(info, got); d != "" {
		t.Error(d)
	}
}
