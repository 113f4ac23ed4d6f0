package peer

import (
	"testing"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

// TestTableIsWhole: every RPC of the .proto is in the table, and nothing else.
func TestTableIsWhole(t *testing.T) {
	want := map[string]bool{LeaderPath: true}
	services := shoalv1.File_shoal_v1_shoal_proto.Services()
	for i := range services.Len() {
		s := services.Get(i)
		for j := range s.Methods().Len() {
			want["/"+string(s.FullName())+"/"+string(s.Methods().Get(j).Name())] = true
		}
	}
	if len(want) < 30 {
		t.Fatalf("only %d RPCs were found", len(want))
	}
	for path := range want {
		r, ok := Table[path]
		if !ok || r.Who == 0 {
			t.Errorf("%s is not in the table: nobody may call it", path)
		}
	}
	for path := range Table {
		if !want[path] {
			t.Errorf("%s is in the table, and no RPC", path)
		}
	}
}

// TestWhoMay lists what the weak may do: it is little, and stays so.
func TestWhoMay(t *testing.T) {
	for who, want := range map[Who][]string{
		Stranger: {"/shoal.v1.Control/JoinNode"},
		Worker: {"/shoal.v1.Control/Assignments", "/shoal.v1.Control/LeaveNode", "/shoal.v1.Control/ListNodes", "/shoal.v1.Control/RenewCertificate",
			"/shoal.v1.Control/Report", "/shoal.v1.Control/TaskBlobs", "/shoal.v1.Control/CheckEndpoints", LeaderPath},
		Removed: {},
	} {
		may := map[string]bool{}
		for path := range Table {
			if Allowed(path, who) {
				may[path] = true
			}
		}
		for _, path := range want {
			if !may[path] {
				t.Errorf("a %s may not call %s", who, path)
			}
			delete(may, path)
		}
		for path := range may {
			t.Errorf("a %s may call %s", who, path)
		}
	}
	for path, r := range Table {
		if r.Who&Worker != 0 && !r.Own && path != LeaderPath && path != "/shoal.v1.Control/ListNodes" {
			t.Errorf("a worker may call %s for others", path)
		}
		if r.Who&Stranger != 0 && r.Body > 64<<10 {
			t.Errorf("a stranger may send %d bytes to %s", r.Body, path)
		}
	}
	if !Allowed("/debug/pprof/heap", Local) || !Allowed(MetricsPath, Local) || Allowed(MetricsPath, Manager|Worker|Stranger) || Allowed("/debug/pprof/heap", Manager|Worker|Stranger) || !Allowed("/health/80/udp", Stranger) {
		t.Error("profiles, metrics, or health")
	}
	if Allowed("/shoal.v1.Control/Nothing", Manager) || Allowed("/", Local) {
		t.Error("what is not in the table is allowed")
	}
}
