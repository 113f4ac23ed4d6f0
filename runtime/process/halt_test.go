package process

import (
	"syscall"
	"testing"

	"github.com/shoalnet/shoal/runtime"
)

func TestShutsDown(t *testing.T) {
	for comm, want := range map[string]bool{
		"systemd-shutdow\n": true, "systemd\n": false, "init\n": false, "": false, "process_api\n": false,
	} {
		if got := shutsDown(comm); got != want {
			t.Errorf("%q: %t, want %t", comm, got, want)
		}
	}
}

// TestNoSignalEndsAShim: who ends agents by their name, or a terminal, ends no task. (That
// a shim ends with its machine is tested on one that is booted anew, by scripts/test-vms.)
func TestNoSignalEndsAShim(t *testing.T) {
	f := setup(t)
	k := f.running("sh", "-c", "while read l; do echo $l; done; sleep 1000")
	resp, err := f.peek(k.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT} {
		if err := syscall.Kill(resp.ShimPID, sig); err != nil {
			t.Fatal(err)
		}
		// Two round trips: signals come before what was asked after them.
		for range 2 {
			if again, err := f.peek(k.ID); err != nil || again.ShimPID != resp.ShimPID {
				t.Fatalf("after %s: %+v, %v", sig, again, err)
			}
		}
	}
	if st := f.status(k); st.State != runtime.Running {
		t.Errorf("%+v", st)
	}
}
