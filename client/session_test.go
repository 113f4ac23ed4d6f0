package client

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

func (a *fakeAgent) CreateService(_ context.Context, req *connect.Request[shoalv1.CreateServiceRequest]) (*connect.Response[shoalv1.CreateServiceResponse], error) {
	a.mu.Lock()
	cut := a.cut
	a.cut = nil
	a.creates++
	id := req.Msg.Id
	if a.services[id] == nil {
		a.services[id] = &shoalv1.Service{Id: id, Spec: req.Msg.Spec}
	}
	a.mu.Unlock()
	if cut != nil {
		cut()
	}
	return connect.NewResponse(&shoalv1.CreateServiceResponse{Service: &shoalv1.Service{Id: id, Spec: req.Msg.Spec}}), nil
}

func (a *fakeAgent) RemoveService(_ context.Context, req *connect.Request[shoalv1.RemoveServiceRequest]) (*connect.Response[shoalv1.RemoveServiceResponse], error) {
	a.mu.Lock()
	cut := a.cut
	a.cut = nil
	_, ok := a.services[req.Msg.Ref]
	delete(a.services, req.Msg.Ref)
	a.mu.Unlock()
	if cut != nil {
		cut()
	}
	if !ok {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such service"))
	}
	return connect.NewResponse(&shoalv1.RemoveServiceResponse{}), nil
}

// ListServices finds as a manager does: by ID, by name, by the beginning of an ID.
func (a *fakeAgent) ListServices(_ context.Context, req *connect.Request[shoalv1.ListServicesRequest]) (*connect.Response[shoalv1.ListServicesResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	resp := &shoalv1.ListServicesResponse{}
	for _, r := range req.Msg.Refs {
		s := a.services[r]
		for id, v := range a.services {
			if s == nil && (v.GetSpec().GetName() == r || strings.HasPrefix(id, r)) {
				s = v
			}
		}
		if s == nil {
			return nil, connect.NewError(connect.CodeNotFound, errors.New("no such service"))
		}
		resp.Services = append(resp.Services, s)
	}
	return connect.NewResponse(resp), nil
}

// TestChangesOutlastAgent: a change whose answer is lost with the agent is made once,
// and is the success that it is.
func TestChangesOutlastAgent(t *testing.T) {
	a := newFakeAgent(t)
	c := New(a.socket)
	if _, err := c.Services(t.Context()); err != nil {
		t.Fatal(err)
	}
	anew := func() { // a.stop waits for no call
		a.stop()
		go func() {
			time.Sleep(100 * time.Millisecond)
			a.start()
		}()
	}
	a.do(func() { a.cut = anew })
	s, err := c.CreateService(t.Context(), &shoalv1.ServiceSpec{Name: "web"})
	if err != nil {
		t.Fatal(err)
	}
	a.do(func() {
		if len(a.services) != 1 || a.services[s.Id] == nil || a.creates != 2 {
			t.Errorf("%d services after %d calls", len(a.services), a.creates)
		}
		a.cut = anew
	})
	if err := c.RemoveService(t.Context(), s.Id); err != nil {
		t.Errorf("the second try finds it gone: %v", err)
	}
	if err := c.RemoveService(t.Context(), s.Id); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("one that was not there: %v", err)
	}
	// Reads go on by themselves.
	a.stop()
	go func() {
		time.Sleep(100 * time.Millisecond)
		a.start()
	}()
	if _, err := c.Services(t.Context()); err != nil {
		t.Error(err)
	}
	// Who has had enough is told whether it exists.
	ctx, cancel := context.WithCancel(t.Context())
	a.do(func() { a.cut = func() { cancel(); <-ctx.Done(); time.Sleep(50 * time.Millisecond) } })
	if _, err := c.CreateService(ctx, &shoalv1.ServiceSpec{Name: "db"}); err == nil || !strings.Contains(err.Error(), "service db exists: see 'shoal svc ps db'") {
		t.Error(err)
	}
}

// TestNoAgent: an agent that has never answered is not waited for.
func TestNoAgent(t *testing.T) {
	begun := time.Now()
	if _, err := New(t.TempDir() + "/none").Services(t.Context()); err == nil || !strings.Contains(err.Error(), "no agent answers") {
		t.Error(err)
	}
	if d := time.Since(begun); d > 10*time.Second {
		t.Errorf("it took %s", d)
	}
}
