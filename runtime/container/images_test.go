package container

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

// TestExplainPull: what a person is told of an error, and whether it is tried again. A
// digest may hold any number.
func TestExplainPull(t *testing.T) {
	digest := "sha256:" + strings.Repeat("401", 21) + "4"
	for _, c := range []struct {
		err   error
		again bool
		want  string
	}{
		{fmt.Errorf("copy %s: connection reset", digest), true, "image reg:5000/web:1: copy"},
		{fmt.Errorf("fetch: %w", remoteserrors.ErrUnexpectedStatus{StatusCode: 401, Status: "401 Unauthorized"}), false, "run 'shoal login reg:5000'"},
		{fmt.Errorf("fetch: %w", remoteserrors.ErrUnexpectedStatus{StatusCode: 404}), false, "is not in registry reg:5000"},
		{fmt.Errorf("fetch: %w", remoteserrors.ErrUnexpectedStatus{StatusCode: 429}), true, ""},
		{fmt.Errorf("fetch: %w", remoteserrors.ErrUnexpectedStatus{StatusCode: 503}), true, "fails: see its own log"},
		{fmt.Errorf("commit: unexpected commit digest %s", digest), false, "sent something else"},
		{errors.New("write: no space left on device"), false, "the disk of containerd is full"},
		{fmt.Errorf("copy: %w for 1s", errStalled), true, "does not answer in time"},
	} {
		if got := passing(c.err); got != c.again {
			t.Errorf("%v: tried again: %t, want %t", c.err, got, c.again)
		}
		if got := explainPull("reg:5000/web:1@"+digest, c.err).Error(); !strings.Contains(got, c.want) {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}

func TestShown(t *testing.T) {
	d := "@sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string]string{"nginx": "nginx:latest", "docker.io/library/nginx:1" + d: "nginx:1", "reg:5000/a/b" + d: "reg:5000/a/b" + d, "No Image": "No Image"} {
		if got := shown(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}
