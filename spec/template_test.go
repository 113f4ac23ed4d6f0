package spec

import (
	"strings"
	"testing"
)

func TestTemplates(t *testing.T) {
	sp := ServiceSpec{Name: "web", EndpointMode: EndpointModeVIP, Labels: map[string]string{"tier": "front"},
		Networks: []NetworkAttachment{{Network: "n"}}, Task: TaskSpec{Command: []string{"a", "{{.Task.Slot}}"}}}
	task := Task{ID: "t1", Name: "web.2.t1", Slot: 2}
	for in, want := range map[string]string{
		"plain":                            "plain",
		"{{.Service.ID}}":                  "s1",
		"{{.Service.Name}}":                "web",
		"{{.Service.Labels.tier}}":         "front",
		`{{index .Service.Labels "tier"}}`: "front",
		"{{.Node.ID}}-{{.Node.Hostname}}":  "n1-node7",
		"{{.Task.ID}} {{.Task.Name}}":      "t1 web.2.t1",
		"{{ .Task.Slot }}":                 "2",
		"{{.Node.Platform.OS}}":            "linux",
		`{{"{{"}}`:                         "{{",
		"{ {":                              "{ {",
	} {
		sp.Task.Env = []string{"X=" + in}
		if err := sp.Validate(); err != nil {
			t.Errorf("%s: %v", in, err)
		}
		got, err := sp.Task.Expand(NewTemplateContext(Service{ID: "s1", Spec: sp}, Node{ID: "n1", Name: "node7"}, task))
		if err != nil || got.Env[0] != "X="+want || got.Command[1] != "{{.Task.Slot}}" {
			t.Errorf("%s: %q, %v, want %q", in, got.Env, err, want)
		}
	}
	for in, want := range map[string]string{
		"{{.Service.Nix}}": "Nix", "{{": "environment X", "{{.Foo}}": "Foo", "{{json .}}": "json", "{{.Service.Labels.none}}": "none", "{{.Task.Slot": "environment X",
	} {
		sp.Task.Env = []string{"X=" + in}
		if err := sp.Validate(); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "service web: environment X") {
			t.Errorf("%s: %v", in, err)
		}
	}
	sp.Task.Env = nil
	for host, ok := range map[string]bool{"{{.Node.Hostname}}-{{.Task.Slot}}": true, "{{.Service.Name}}": true, "{{.Task.Name}}": true, "{{.Task.Slot}}_x": false, "{{.X}}": false, "{{.Service.Labels}}": false} {
		sp.Task.Hostname = host
		if err := sp.Validate(); (err == nil) != ok {
			t.Errorf("hostname %s: %v", host, err)
		}
	}
}
