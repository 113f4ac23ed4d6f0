package spec

import (
	"fmt"
	"runtime"
	"strings"
	"text/template"
)

// TemplateContext is what a service's environment and host name may name in double
// braces: the words are Docker's.
type TemplateContext struct {
	Service struct {
		ID, Name string
		Labels   map[string]string
	}
	Node struct {
		ID, Hostname string
		Platform     struct{ Architecture, OS string }
	}
	Task struct {
		ID, Name string
		// Slot is the replica's number; of a task of a global service its node's ID.
		Slot any
	}
}

// NewTemplateContext is what the templates of a service's task see.
func NewTemplateContext(s Service, n Node, t Task) TemplateContext {
	var c TemplateContext
	c.Service.ID, c.Service.Name, c.Service.Labels = s.ID, s.Spec.Name, s.Spec.Labels
	c.Node.ID, c.Node.Hostname = n.ID, n.Name
	c.Node.Platform.Architecture, c.Node.Platform.OS = runtime.GOARCH, runtime.GOOS
	c.Task.ID, c.Task.Name, c.Task.Slot = t.ID, t.Name, t.Slot
	if s.Spec.Global() {
		c.Task.Slot = n.ID
	}
	return c
}

// HasTemplates tells whether Expand would change anything.
func (t TaskSpec) HasTemplates() bool {
	if strings.Contains(t.Hostname, "{{") {
		return true
	}
	for _, e := range t.Env {
		if strings.Contains(e, "{{") {
			return true
		}
	}
	return false
}

// Expand fills in the templates of the environment and the host name.
func (t TaskSpec) Expand(c TemplateContext) (TaskSpec, error) {
	t = t.Clone()
	var err error
	for i, e := range t.Env {
		if t.Env[i], err = expand(e, c); err != nil {
			k, _, _ := strings.Cut(e, "=")
			return t, fmt.Errorf("environment %s: %w", k, err)
		}
	}
	if strings.Contains(t.Hostname, "{{") {
		if t.Hostname, err = expand(t.Hostname, c); err != nil {
			return t, fmt.Errorf("hostname %q: %w", t.Hostname, err)
		}
		if err := ValidateHostname(t.Hostname); err != nil {
			return t, err
		}
	}
	return t, nil
}

func expand(text string, c TemplateContext) (string, error) {
	if !strings.Contains(text, "{{") {
		return text, nil
	}
	fail := func(err error) (string, error) {
		return text, fmt.Errorf("the template can't be filled in: %w: a service's templates know .Service.ID, .Service.Name, .Service.Labels, .Node.ID, .Node.Hostname, .Task.ID, .Task.Name and .Task.Slot; braces themselves are {{\"{{\"}}", plainTemplateError(err))
	}
	t, err := template.New("").Option("missingkey=error").Funcs(template.FuncMap{
		"join": strings.Join, "split": strings.Split, "upper": strings.ToUpper, "lower": strings.ToLower, "title": strings.ToTitle,
	}).Parse(text)
	if err != nil {
		return fail(err)
	}
	var b strings.Builder
	if err := t.Execute(&b, c); err != nil {
		return fail(err)
	}
	if strings.ContainsRune(b.String(), 0) {
		return fail(fmt.Errorf("it gives a NUL byte"))
	}
	return b.String(), nil
}

// plainTemplateError takes off what text/template says of where it is.
func plainTemplateError(err error) error {
	s := strings.TrimPrefix(err.Error(), "template: ")
	if i := strings.LastIndex(s, ">: "); i >= 0 {
		s = s[i+3:]
	} else if i := strings.Index(s, ": "); i >= 0 && strings.HasPrefix(s, ":") {
		s = s[i+2:]
	}
	return fmt.Errorf("%s", s)
}

// validateTemplates tries a service's templates on a task that might be its.
func (s ServiceSpec) validateTemplates() error {
	if !s.Task.HasTemplates() {
		return nil
	}
	const id = "abcdefghijkl" // as NewID makes them
	c := NewTemplateContext(Service{ID: id, Spec: s}, Node{ID: id, Name: "node"}, Task{ID: id, Name: s.Name + ".1." + id, Slot: 1})
	_, err := s.Task.Expand(c)
	return err
}
