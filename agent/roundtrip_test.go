package agent

import (
	"encoding/json"
	"testing"

	"github.com/shoalnet/shoal/internal/filled"
)

// TestFilesRoundTrip: every field of what the agent keeps is read as it was written,
// and what a newer version keeps beside it is overlooked: a node may go back to the
// version of before.
func TestFilesRoundTrip(t *testing.T) {
	id := filled.Value[identity]()
	a := filled.Value[assignment]()
	a.Nodes[0].ID = id.NodeID
	b, err := encodeAssignment(&a, &id)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeAssignment(b, id.Cluster.ID, id.NodeID)
	if err != nil {
		t.Fatal(err)
	}
	if d := filled.Differ(a, *got); d != "" {
		t.Errorf("assignment%s", d)
	}
	if b, err = json.Marshal(id); err != nil {
		t.Fatal(err)
	}
	var back identity
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if d := filled.Differ(id, back); d != "" {
		t.Errorf("identity%s", d)
	}
	for what, v := range map[string]any{"identity": &identity{}, "assignment": &assignment{}} {
		if err := json.Unmarshal([]byte(`{"of_the_future":{"a":[1]}}`), v); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}
