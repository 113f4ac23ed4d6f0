package control

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/control/state"
)

// TestSnapshotFile: what was saved is read again; a file that was cut or changed in
// any place, of a newer version, or of something else is refused, saying so.
func TestSnapshotFile(t *testing.T) {
	st := state.New()
	if r := st.Apply(1, state.Command{InitCluster: &state.InitCluster{Cluster: testCluster, DefaultNetwork: "defaultnet00", Trust: testTrust}}.Stamped(state.Level)); r.Err != nil {
		t.Fatal(r.Err)
	}
	file, err := writeSnapshot(st, time.Unix(1e9, 0))
	if err != nil {
		t.Fatal(err)
	}
	info, back, err := ReadSnapshot(file)
	if err != nil || info.Cluster != testCluster.ID || info.Index != 1 || info.Networks != len(st.Networks()) || !info.Saved.Equal(time.Unix(1e9, 0)) {
		t.Fatalf("%+v, %v", info, err)
	}
	want, _ := st.Snapshot()
	if got, err := back.Snapshot(); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v\n%s\n%s", err, got, want)
	}
	for i := range file {
		if _, _, err := ReadSnapshot(file[:i]); err == nil {
			t.Errorf("cut after %d bytes: read", i)
		}
		b := slices.Clone(file)
		b[i] ^= 1
		if _, _, err := ReadSnapshot(b); err == nil {
			t.Errorf("byte %d changed: read", i)
		}
	}
	for in, want := range map[string]string{
		"":                                 "is empty",
		"SHOAL-SNAP":                       "is damaged",
		"hello\n":                          "is no snapshot",
		string(file) + "x":                 "is damaged",
		"SHOAL-SNAPSHOT\n{\"format\":2}\n": "has format 2",
		"SHOAL-SNAPSHOT\n{\"format\":1,\"size\":9223372036854775807}\n\n": "is damaged",
		strings.Replace(string(file), testCluster.ID, "othercluster", 1):  "is damaged",
	} {
		if _, _, err := ReadSnapshot([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %q", in, err, want)
		}
	}
}
