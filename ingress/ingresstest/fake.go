// Package ingresstest has a fake of ingress.Dataplane, and the conformance suite
// that the fake and the kernel both pass, which is what keeps the fake truthful.
package ingresstest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/reconcile"
)

// Errors of the Fake, after the kernel's.
var (
	ErrNoNamespace = errors.New("no such namespace")
	ErrNoDevice    = errors.New("no such device")
	ErrNoTable     = errors.New("no such table")
	ErrHeld        = errors.New("port is held")
)

// Fake is a stateful ingress.Dataplane without a kernel. It refuses what the
// kernel refuses: elements without their table, routes by a device that does
// not exist, anything in a namespace that does not exist. And it loses what the
// kernel loses: with a table its elements, with a device or a namespace all
// that is on or in it.
//
// Its methods may be called from several goroutines.
type Fake struct {
	mu      sync.Mutex
	objects map[any]ingress.Object
	ways    map[string]string // device by ovns
	holders map[any]ingress.Holder
	fail    func(ingress.Op) error
}

var _ ingress.Dataplane = (*Fake)(nil)

// NewFake makes a host without networks.
func NewFake() *Fake {
	return &Fake{objects: map[any]ingress.Object{}, ways: map[string]string{}, holders: map[any]ingress.Holder{}}
}

// AddWay makes a network's ovns and its way out, as the overlay does.
func (f *Fake) AddWay(netns, dev string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ways[netns] = dev
}

// DelWay deletes an ovns.
func (f *Fake) DelWay(netns string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	dev := f.ways[netns]
	delete(f.ways, netns)
	for k, o := range f.objects {
		if ingress.NetnsOf(o) == netns && netns != "" || on(o, dev) {
			delete(f.objects, k)
		}
	}
}

func on(o ingress.Object, dev string) bool {
	switch o := o.(type) {
	case ingress.Route:
		return o.Dev == dev
	case ingress.Localnet:
		return o.Dev == dev
	}
	return false
}

// Hold lets a program have a port; an empty name takes it back.
func (f *Fake) Hold(addr netip.Addr, published uint16, protocol, by string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := ingress.Holder{Addr: addr, Published: published, Protocol: protocol, By: by}
	if by == "" {
		delete(f.holders, h.Key())
		return
	}
	f.holders[h.Key()] = h
}

// SetFail sets a function that is asked before each operation; its error is
// Apply's. nil: none.
func (f *Fake) SetFail(fn func(ingress.Op) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = fn
}

// Break removes an object as someone would by hand.
func (f *Fake) Break(o ingress.Object) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.remove(o)
}

// Dump is all there is, as a State.
func (f *Fake) Dump() ingress.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	var s ingress.State
	for _, o := range f.objects {
		s.Add(o)
	}
	return s
}

// Observe implements ingress.Dataplane.
func (f *Fake) Observe(_ context.Context, want ingress.State) (ingress.State, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var have ingress.State
	places := map[string]bool{"": true}
	for _, w := range want.Ways {
		places[w.Netns] = true
	}
	for _, o := range f.objects {
		if places[ingress.NetnsOf(o)] {
			have.Add(o)
		}
	}
	for _, o := range want.Objects() {
		if p, ok := o.(ingress.Port); ok {
			if h, ok := f.holders[ingress.Holder{Addr: p.Addr, Published: p.Published, Protocol: p.Protocol}.Key()]; ok {
				have.Add(h)
			}
		}
	}
	return have, nil
}

// Apply implements ingress.Dataplane.
func (f *Fake) Apply(ctx context.Context, rop reconcile.Op) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	op, ok := rop.(ingress.Op)
	if !ok {
		return fmt.Errorf("operation %s is not the ingress's", rop)
	}
	if f.fail != nil {
		if err := f.fail(op); err != nil {
			return err
		}
	}
	switch op.Verb {
	case ingress.Refuse:
		return fmt.Errorf("%s: %w", op.Target, ErrHeld)
	case ingress.Delete:
		for _, o := range op.Each() {
			f.remove(o)
		}
		return nil
	}
	var errs []error
	for _, o := range op.Each() {
		errs = append(errs, f.put(o))
	}
	return errors.Join(errs...)
}

func (f *Fake) put(target ingress.Object) error {
	netns := ingress.NetnsOf(target)
	if netns != "" && f.ways[netns] == "" {
		return fmt.Errorf("%s: %w", target, ErrNoNamespace)
	}
	needs := func(table ingress.Object) error {
		if f.objects[table.Key()] == nil {
			return fmt.Errorf("%s: %w", target, ErrNoTable)
		}
		return nil
	}
	device := func(dev string) error {
		for _, d := range f.ways {
			if d == dev {
				return nil
			}
		}
		return fmt.Errorf("%s: %w", target, ErrNoDevice)
	}
	var err error
	switch o := target.(type) {
	case ingress.HostTable, ingress.Table:
		f.remove(o) // and so is empty
	case ingress.Localnet:
		err = device(o.Dev)
	case ingress.Route:
		err = device(o.Dev)
	case ingress.Private, ingress.Port:
		err = needs(ingress.HostTable{})
	case ingress.Node, ingress.Entry, ingress.Local:
		err = needs(ingress.Table{Netns: netns})
	default:
		err = fmt.Errorf("%s can't be put", o)
	}
	if err == nil {
		f.objects[target.Key()] = target
	}
	return err
}

// remove deletes an object and what goes with it.
func (f *Fake) remove(o ingress.Object) {
	delete(f.objects, o.Key())
	for k, x := range f.objects {
		switch o.(type) {
		case ingress.HostTable:
			switch x.(type) {
			case ingress.Private, ingress.Port:
				delete(f.objects, k)
			}
		case ingress.Table:
			switch x.(type) {
			case ingress.Node, ingress.Entry, ingress.Local:
				if ingress.NetnsOf(x) == ingress.NetnsOf(o) {
					delete(f.objects, k)
				}
			}
		}
	}
}
