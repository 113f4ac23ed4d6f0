package client

import (
	"testing"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

func TestMeant(t *testing.T) {
	for _, c := range []struct {
		ref, id, name string
		want          Match
	}{
		{"cvw7", "cvw7t46bekyb", "web", MeantByPrefix},
		{"cvw7", "cvw7t46bekyb", "cvw7", MeantByName},
		{"CVW7", "cvw7t46bekyb", "cvw7", MeantByName}, // names fold case
		{"cvw7t46bekyb", "cvw7t46bekyb", "web", MeantByID},
		{"web.1", "cvw7t46bekyb", "web.1.cvw7t46bekyb", MeantByName},
	} {
		if got := Meant(c.ref, c.id, c.name); got != c.want {
			t.Errorf("%s of %s %s: %d, want %d", c.ref, c.id, c.name, got, c.want)
		}
	}
}

func TestServiceOrTask(t *testing.T) {
	a := newFakeAgent(t)
	a.mu.Lock()
	a.services["cvw7t46bekyb"] = &shoalv1.Service{Id: "cvw7t46bekyb", Spec: &shoalv1.ServiceSpec{Name: "web"}}
	a.tasks["taaaaaaaaaaa"] = &shoalv1.Task{Id: "taaaaaaaaaaa", Name: "cvw7", Status: &shoalv1.TaskStatus{State: "running"}}
	a.tasks["tbbbbbbbbbbb"] = &shoalv1.Task{Id: "tbbbbbbbbbbb", Name: "web", Status: &shoalv1.TaskStatus{State: "running"}}
	a.mu.Unlock()
	c := New(a.socket)
	for ref, want := range map[string]string{
		"cvw7":         "taaaaaaaaaaa", // a name goes before the beginning of an ID
		"cvw":          "cvw7t46bekyb",
		"web":          "cvw7t46bekyb", // a service goes before a task
		"tbbbbbbbbbbb": "tbbbbbbbbbbb",
		"tbbb":         "tbbbbbbbbbbb",
		"nosuch":       "",
	} {
		v, task, err := c.ServiceOrTask(t.Context(), ref)
		got := v.GetId() + task.GetId()
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s is %q, %v, want %q", ref, got, err, want)
		}
		if want == "" && (err == nil || connect.CodeOf(err) == connect.CodeInternal) {
			t.Errorf("%s: %v", ref, err)
		}
	}
}
