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

// One platform has several names; another's variant is another platform.
func TestPlatform(t *testing.T) {
	for _, k := range []struct {
		flag, node string
		want       bool
	}{
		{"linux/amd64", "linux/amd64", true}, {"linux/x86_64", "linux/amd64", true}, {"linux/amd64/v1", "linux/amd64", true},
		{"linux/arm64/v8", "linux/arm64", true}, {"linux/aarch64", "linux/arm64", true}, {"linux/arm/v7", "linux/arm", true},
		{"linux/arm64", "linux/amd64", false}, {"linux/386", "linux/amd64", false}, {"linux/arm/v6", "linux/arm", false}, {"windows/amd64", "linux/amd64", false},
		{"linux/amd64", "", false},
	} {
		p := platformFlag{k.flag}
		if err := p.parse(nil); err != nil {
			t.Errorf("%s: %v", k.flag, err)
		} else if got := p.is(&shoalv1.NodeInfo{Platform: k.node}); got != k.want {
			t.Errorf("%s on a node of %q: %t, want %t", k.flag, k.node, got, k.want)
		}
	}
}
