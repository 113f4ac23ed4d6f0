package container

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

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

// TestPullsAreShared: by all who want the same image with the same login, and by no others:
// a registry may refuse the one and serve the other.
func TestPullsAreShared(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var fs flights
	refused := errors.New("refused without a valid login")
	begun, end := make(chan struct{}), make(chan struct{})
	silent := func(string) {}
	first := make(chan error, 1)
	go func() {
		first <- fs.join(ctx, pullOf("registry/web:1", ""), silent, func(func(string)) error {
			close(begun)
			<-end
			return refused
		})
	}()
	<-begun
	ran := false
	if err := fs.join(ctx, pullOf("registry/web:1", "a login"), silent, func(func(string)) error { ran = true; return nil }); err != nil || !ran {
		t.Errorf("with a login, beside one without: %v, asked for itself: %t", err, ran)
	}
	second := make(chan error, 1)
	go func() {
		second <- fs.join(ctx, pullOf("registry/web:1", ""), func(string) {}, func(func(string)) error {
			return refused // when the first has ended by then
		})
	}()
	close(end)
	for _, ch := range []chan error{first, second} {
		if err := <-ch; !errors.Is(err, refused) {
			t.Errorf("without: %v", err)
		}
	}
}
