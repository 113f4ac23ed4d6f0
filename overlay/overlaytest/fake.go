// Package overlaytest has a fake of overlay.Dataplane, and the conformance suite
// that the fake and the kernel both pass, which is what keeps the fake truthful.
package overlaytest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/reconcile"
)

// Errors of the Fake, after the kernel's.
var (
	ErrNoNamespace = errors.New("no such namespace")
	ErrNoDevice    = errors.New("no such device")
	ErrExists      = errors.New("exists and is another's")
	ErrInvalid     = errors.New("invalid argument")
	ErrUnreachable = errors.New("network is unreachable")
)

// Fake is a stateful overlay.Dataplane without a kernel. It refuses what the
// kernel refuses: objects in namespaces or on devices that don't exist, routes
// whose next hop or source doesn't, a second vxlan device of a VNI, the change
// of what can only be replaced. And it loses what the kernel loses: with a
// device all that is on it, with an address the routes that prefer it.
//
// Its methods may be called from several goroutines.
type Fake struct {
	mu        sync.Mutex
	objects   map[any]overlay.Object
	sandboxes map[string]bool
	foreign   map[[2]string]bool // devices
	underlay  netip.Addr
	mtu       int
	fail      func(overlay.Op) error
	applied   int
}

var _ overlay.Dataplane = (*Fake)(nil)

// NewFake makes a host whose underlay link has an address and an MTU in bytes.
func NewFake(underlay netip.Addr, mtu int) *Fake {
	return &Fake{objects: map[any]overlay.Object{}, sandboxes: map[string]bool{}, foreign: map[[2]string]bool{}, underlay: underlay, mtu: mtu}
}

// AddSandbox makes a task's namespace.
func (f *Fake) AddSandbox(netns string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sandboxes[netns] = true
}

// DelSandbox deletes a task's namespace with all that is in it.
func (f *Fake) DelSandbox(netns string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.sandboxes, netns)
	f.empty(netns)
}

// AddForeign makes a device that is not Shoal's; DelForeign deletes it.
func (f *Fake) AddForeign(netns, dev string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.foreign[[2]string{netns, dev}] = true
}

// DelForeign deletes a device that is not Shoal's.
func (f *Fake) DelForeign(netns, dev string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.foreign, [2]string{netns, dev})
}

// SetFail sets a function that is asked before each operation; its error is
// Apply's. nil: none.
func (f *Fake) SetFail(fn func(overlay.Op) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = fn
}

// SetUnderlay changes the underlay's address and MTU.
func (f *Fake) SetUnderlay(a netip.Addr, mtu int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.underlay, f.mtu = a, mtu
}

// Break removes the object with a key as someone would by hand.
func (f *Fake) Break(key any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if o := f.objects[key]; o != nil {
		f.remove(o)
	}
}

// Applied is the number of operations that succeeded.
func (f *Fake) Applied() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied
}

// Dump is all there is, as a State.
func (f *Fake) Dump() overlay.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	var s overlay.State
	for _, o := range f.objects {
		s.Add(o)
	}
	return s
}

// Observe implements overlay.Dataplane.
func (f *Fake) Observe(_ context.Context, want overlay.State) (overlay.State, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var have overlay.State
	places := map[string]bool{"": true}
	want.Each(func(o overlay.Object) {
		ns, _ := overlay.Place(o)
		places[ns] = true
		switch o := o.(type) {
		case overlay.Sandbox:
			if f.sandboxes[o.Netns] {
				have.Add(o)
			}
		case overlay.Underlay:
			if o.Addr == f.underlay {
				have.Add(o)
				have.UnderlayMTU = f.mtu
			}
		}
	})
	for k, o := range f.objects {
		ns, _ := overlay.Place(o)
		_, isNs := o.(overlay.Namespace)
		_, isWay := o.(overlay.Egress)
		switch {
		case ns == "" && want.Get(k) == nil && !isForwarding(o):
			continue // on a device of ours, or a setting: nobody's business
		case !places[ns] && !isNs && !isWay:
			continue
		case f.sandboxes[ns] && want.Get(k) == nil:
			if _, ok := o.(overlay.Route); !ok {
				continue
			}
		}
		if _, ok := o.(overlay.Sysctl); ok && want.Get(k) != o {
			continue
		}
		have.Add(o)
	}
	return have, nil
}

func isForwarding(o overlay.Object) bool {
	switch o.(type) {
	case overlay.Forwarding, overlay.Members:
		return true
	}
	return false
}

// Apply implements overlay.Dataplane.
func (f *Fake) Apply(_ context.Context, rop reconcile.Op) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	op, ok := rop.(overlay.Op)
	if !ok {
		return fmt.Errorf("%v: %w", rop, ErrInvalid)
	}
	if f.fail != nil {
		if err := f.fail(op); err != nil {
			return err
		}
	}
	var err error
	if op.Verb == overlay.Delete {
		err = f.del(op.Target)
	} else {
		err = f.put(op)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	f.applied++
	return nil
}

func (f *Fake) namespace(ns string) bool {
	if ns == "" || f.sandboxes[ns] {
		return true
	}
	for _, o := range f.objects {
		if n, ok := o.(overlay.Namespace); ok && n.Netns == ns {
			return true
		}
	}
	return false
}

func (f *Fake) device(ns, dev string) bool {
	if dev == "lo" || f.foreign[[2]string{ns, dev}] {
		return true
	}
	for _, o := range f.objects {
		for _, d := range overlay.Devices(o) {
			if d == [2]string{ns, dev} {
				return true
			}
		}
	}
	return false
}

func (f *Fake) put(op overlay.Op) error {
	ns, dev := overlay.Place(op.Target)
	if _, ok := op.Target.(overlay.Namespace); !ok && !f.namespace(ns) {
		return fmt.Errorf("%s: %w", ns, ErrNoNamespace)
	}
	if dev != "" && !f.device(ns, dev) {
		return fmt.Errorf("%s in %q: %w", dev, ns, ErrNoDevice)
	}
	switch o := op.Target.(type) {
	case overlay.Sandbox:
		return nil // present, as found above
	case overlay.Underlay:
		if o.Addr != f.underlay {
			return fmt.Errorf("%s: %w", o.Addr, ErrNoDevice)
		}
		return nil
	case overlay.Filter:
		o.Fault = ""
	case overlay.Guard:
		if f.objects[(overlay.Filter{Netns: ns}).Key()] == nil {
			return fmt.Errorf("no filter: %w", ErrInvalid)
		}
	case overlay.VXLAN:
		if err := f.putDevice(op, o.MTU); err != nil {
			return err
		}
		for k, x := range f.objects {
			if v, ok := x.(overlay.VXLAN); ok && k != o.Key() && v.VNI == o.VNI && v.Port == o.Port {
				return fmt.Errorf("VNI %d: %w", o.VNI, ErrExists)
			}
		}
	case overlay.Egress:
		if err := f.putDevice(op, o.MTU); err != nil {
			return err
		}
	case overlay.Port:
		if !f.sandboxes[o.TaskNetns] {
			return fmt.Errorf("%s: %w", o.TaskNetns, ErrNoNamespace)
		}
		if err := f.putDevice(op, o.MTU); err != nil {
			return err
		}
	case overlay.Route:
		if o.Src.IsValid() && !f.hasAddr(ns, o.Src) {
			return fmt.Errorf("source %s is no local address: %w", o.Src, ErrInvalid)
		}
		if o.Via.IsValid() && !o.Onlink && !f.reaches(ns, o.Dev, o.Via) {
			return fmt.Errorf("next hop %s: %w", o.Via, ErrUnreachable)
		}
	case overlay.Stray:
		return ErrInvalid
	}
	f.objects[op.Target.Key()] = op.Target
	return nil
}

// putDevice checks what all devices have in common, and removes what is to be
// replaced.
func (f *Fake) putDevice(op overlay.Op, mtu int) error {
	if mtu < 68 || mtu > 65535 { // ETH_MIN_MTU, ETH_MAX_MTU
		return fmt.Errorf("MTU %d: %w", mtu, ErrInvalid)
	}
	for _, d := range overlay.Devices(op.Target) {
		if f.foreign[d] {
			return fmt.Errorf("device %s in %q: %w", d[1], d[0], ErrExists)
		}
	}
	have := f.objects[op.Target.Key()]
	if have == nil {
		return nil
	}
	if op.Replace {
		f.remove(have)
		return nil
	}
	a, b := overlay.Devices(have), overlay.Devices(op.Target)
	for i := range a {
		if a[i] != b[i] {
			return fmt.Errorf("can only be replaced: %w", ErrInvalid)
		}
	}
	if h, ok := have.(overlay.VXLAN); ok {
		w := op.Target.(overlay.VXLAN)
		if h.VNI != w.VNI || h.Local != w.Local || h.Port != w.Port {
			return fmt.Errorf("can only be replaced: %w", ErrInvalid)
		}
	}
	return nil
}

func (f *Fake) hasAddr(ns string, a netip.Addr) bool {
	for _, o := range f.objects {
		if x, ok := o.(overlay.Addr); ok && x.Netns == ns && x.Prefix.Addr() == a {
			return true
		}
	}
	return false
}

// reaches tells whether a next hop is on the link.
func (f *Fake) reaches(ns, dev string, via netip.Addr) bool {
	if via.Is6() && via.IsLinkLocalUnicast() {
		return true
	}
	for _, o := range f.objects {
		switch x := o.(type) {
		case overlay.Addr:
			if x.Netns == ns && x.Dev == dev && x.Prefix.Contains(via) && x.Prefix.Addr() != via {
				return true
			}
		case overlay.Route:
			if x.Netns == ns && x.Dev == dev && !x.Via.IsValid() && x.Dst.Contains(via) {
				return true
			}
		}
	}
	return false
}

func (f *Fake) del(o overlay.Object) error {
	switch o.(type) {
	case overlay.Sandbox, overlay.Underlay:
		return fmt.Errorf("not ours to delete: %w", ErrInvalid)
	}
	if have := f.objects[o.Key()]; have != nil {
		f.remove(have)
	}
	return nil
}

// remove takes an object away with all that goes with it.
func (f *Fake) remove(o overlay.Object) {
	delete(f.objects, o.Key())
	switch o := o.(type) {
	case overlay.Namespace:
		f.empty(o.Netns)
	case overlay.Filter:
		for k, x := range f.objects {
			if g, ok := x.(overlay.Guard); ok && g.Netns == o.Netns {
				delete(f.objects, k)
			}
		}
	case overlay.Addr:
		for k, x := range f.objects {
			if r, ok := x.(overlay.Route); ok && r.Netns == o.Netns && r.Src == o.Prefix.Addr() {
				delete(f.objects, k)
			}
		}
	}
	for _, d := range overlay.Devices(o) {
		for _, x := range f.objects {
			ns, dev := overlay.Place(x)
			if dev != "" && d == [2]string{ns, dev} {
				f.remove(x)
			}
		}
	}
}

// empty removes all that is in a namespace, and the other ends of its devices.
func (f *Fake) empty(ns string) {
	for _, o := range f.objects {
		in, _ := overlay.Place(o)
		if in == ns {
			f.remove(o)
			continue
		}
		for _, d := range overlay.Devices(o) {
			if d[0] == ns {
				f.remove(o)
				break
			}
		}
	}
}
