package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// A login that was sent to the nodes is shown to nobody.
func TestLoginIsNotShown(t *testing.T) {
	ts := api.TaskSpec(spec.TaskSpec{Container: spec.Container{Image: "docker.io/library/web:1@sha256:" + strings.Repeat("a", 64), RegistryAuth: "hush"}})
	svc, err := toServiceJSON(&shoalv1.Service{Spec: &shoalv1.ServiceSpec{Name: "web", EndpointMode: "vip", Task: ts}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	task, err := toTaskJSON(&shoalv1.Task{Name: "web.1", Spec: ts, Desired: "running", Status: &shoalv1.TaskStatus{State: "running"}}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{svc, task} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "hush") || !strings.Contains(string(b), "web:1") {
			t.Errorf("%s", b)
		}
	}
	if got := kindText(ts); got != "web:1" {
		t.Errorf("image %q", got)
	}
	if got := kindText(&shoalv1.TaskSpec{}); got != "host task" {
		t.Errorf("image of a program: %q", got)
	}
}
