// Package viptest has a strict, stateful fake of vip.Dataplane and the
// conformance suite that the fake and both kernel data paths pass. That the
// suite is the same is what keeps the fake truthful.
package viptest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/vip"
)

// Fake is a vip.Dataplane without a kernel. It is strict: it refuses what a
// kernel refuses and what a correct Diff never asks for (a VIP outside of the
// network, a mark used twice, a backend of another family, lists out of order,
// a server before its table), and reports calls that overlap in time.
//
// The zero value has no namespaces. Its own methods may be called at any time.
type Fake struct {
	// Fail, if set, is asked before each Apply; an error is returned as is,
	// and nothing is applied.
	Fail func(reconcile.Op) error

	busy atomic.Bool
	mu   sync.Mutex
	ns   map[string]*fakeNS
}

type fakeNS struct {
	table   bool
	locals  []netip.Addr
	addrs   map[netip.Addr]bool // on lo, ours
	servers map[netip.Addr]*fakeServer
}

type fakeServer struct {
	mark     uint32
	open     bool
	backends map[netip.Addr]int
}

var _ vip.Dataplane = (*Fake)(nil)

// AddNamespace makes an empty namespace, or keeps the one there is.
func (f *Fake) AddNamespace(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ns == nil {
		f.ns = map[string]*fakeNS{}
	}
	if f.ns[name] == nil {
		f.ns[name] = &fakeNS{addrs: map[netip.Addr]bool{}, servers: map[netip.Addr]*fakeServer{}}
	}
}

// RemoveNamespace removes a namespace with all that is in it.
func (f *Fake) RemoveNamespace(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.ns, name)
}

// Things that Break breaks.
const (
	BreakTable   = "table"
	BreakAddress = "address"
	BreakElement = "element"
	BreakServer  = "server"
	BreakBackend = "backend"
)

// Break deletes one thing behind the back of the data plane.
func (f *Fake) Break(ns, what string, v netip.Addr) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.ns[ns]
	if n == nil {
		return fmt.Errorf("fake: namespace %s does not exist", ns)
	}
	s := n.servers[v]
	switch {
	case what == BreakTable:
		n.table, n.locals = false, nil
		for _, s := range n.servers {
			s.open = false
		}
	case what == BreakAddress && n.addrs[v]:
		delete(n.addrs, v)
	case what == BreakElement && s != nil && s.open:
		s.open = false
	case what == BreakServer && s != nil:
		delete(n.servers, v)
	case what == BreakBackend && s != nil && len(s.backends) > 0:
		delete(s.backends, slices.MinFunc(slices.Collect(maps.Keys(s.backends)), netip.Addr.Compare))
	default:
		return fmt.Errorf("fake: there is no %s of %s to break", what, v)
	}
	return nil
}

// Dump is the whole state as lines, for comparison in tests.
func (f *Fake) Dump() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(f.ns)) {
		n := f.ns[name]
		fmt.Fprintf(&b, "namespace %s table=%v\n", name, n.table)
		for _, a := range n.locals {
			fmt.Fprintf(&b, "  hairpin %s\n", a)
		}
		for _, a := range slices.SortedFunc(maps.Keys(n.addrs), netip.Addr.Compare) {
			fmt.Fprintf(&b, "  address %s\n", a)
		}
		for _, v := range slices.SortedFunc(maps.Keys(n.servers), netip.Addr.Compare) {
			s := n.servers[v]
			fmt.Fprintf(&b, "  server %s mark=%#x open=%v\n", v, s.mark, s.open)
			for _, a := range slices.SortedFunc(maps.Keys(s.backends), netip.Addr.Compare) {
				fmt.Fprintf(&b, "    backend %s weight=%d\n", a, s.backends[a])
			}
		}
	}
	return b.String()
}

// Name implements vip.Dataplane.
func (*Fake) Name() string { return "fake" }

func (f *Fake) enter() (func(), error) {
	if !f.busy.CompareAndSwap(false, true) {
		return nil, errors.New("fake: Observe and Apply were called at the same time")
	}
	f.mu.Lock()
	return func() { f.mu.Unlock(); f.busy.Store(false) }, nil
}

// Observe implements vip.Dataplane.
func (f *Fake) Observe(ctx context.Context, want vip.State) (vip.State, error) {
	var out vip.State
	leave, err := f.enter()
	if err != nil {
		return out, err
	}
	defer leave()
	if err := ctx.Err(); err != nil {
		return out, err
	}
	for _, w := range want.Networks {
		h := vip.Network{ID: w.ID, Name: w.Name, Namespace: w.Namespace, Subnets: w.Subnets, Gateways: w.Gateways}
		n := f.ns[w.Namespace]
		if n == nil {
			h.Absent = true
			out.Networks = append(out.Networks, h)
			continue
		}
		if !n.table {
			h.Fault = "table is missing"
		}
		h.Locals = slices.Clone(n.locals)
		all := map[netip.Addr]bool{}
		for a := range n.addrs {
			all[a] = true
		}
		for a := range n.servers {
			all[a] = true
		}
		for _, v := range slices.SortedFunc(maps.Keys(all), netip.Addr.Compare) {
			s := vip.Server{VIP: v, Addressed: n.addrs[v]}
			if fs := n.servers[v]; fs != nil {
				s.Mark, s.Open = fs.mark, fs.open
				for _, a := range slices.SortedFunc(maps.Keys(fs.backends), netip.Addr.Compare) {
					s.Backends = append(s.Backends, vip.Backend{Addr: a, Weight: fs.backends[a]})
				}
			} else {
				s.Fault = "server is missing"
			}
			if !n.addrs[v] {
				s.Fault = "address is missing"
			}
			h.Servers = append(h.Servers, s)
		}
		out.Networks = append(out.Networks, h)
	}
	return out, nil
}

// Apply implements vip.Dataplane.
func (f *Fake) Apply(ctx context.Context, op reconcile.Op) error {
	leave, err := f.enter()
	if err != nil {
		return err
	}
	defer leave()
	if err := ctx.Err(); err != nil {
		return err
	}
	if f.Fail != nil {
		if err := f.Fail(op); err != nil {
			return err
		}
	}
	switch op := op.(type) {
	case vip.SetNetwork:
		n := f.ns[op.Want.Namespace]
		if n == nil {
			return fmt.Errorf("network %s: %w", op.Want.Name, vip.ErrNoNamespace)
		}
		if err := ordered(op.Want.Locals, "hairpin"); err != nil {
			return err
		}
		for _, a := range op.Want.Locals {
			if !op.Want.Contains(a) {
				return fmt.Errorf("fake: hairpin %s is not in network %s", a, op.Want.Name)
			}
		}
		n.table, n.locals = true, slices.Clone(op.Want.Locals)
		for _, s := range op.Want.Servers {
			if err := n.set(op.Want, s); err != nil {
				return err
			}
		}
		return nil
	case vip.SetServer:
		n := f.ns[op.Network.Namespace]
		if n == nil {
			return fmt.Errorf("network %s: %w", op.Network.Name, vip.ErrNoNamespace)
		}
		return n.set(op.Network, op.Want)
	case vip.DelServer:
		n := f.ns[op.Network.Namespace]
		if n == nil {
			return nil
		}
		delete(n.servers, op.Have.VIP)
		delete(n.addrs, op.Have.VIP)
		return nil
	}
	return fmt.Errorf("fake: unknown operation %T", op)
}

func ordered(as []netip.Addr, what string) error {
	for i, a := range as {
		if !a.IsValid() || i > 0 && as[i-1].Compare(a) >= 0 {
			return fmt.Errorf("fake: %s: %v is not in order, or has an entry twice", what, as)
		}
	}
	return nil
}

func (n *fakeNS) set(net vip.Network, w vip.Server) error {
	if !n.table {
		return fmt.Errorf("fake: vip %s: there is no table", w.VIP)
	}
	if !net.Contains(w.VIP) {
		return fmt.Errorf("fake: vip %s is not in network %s, or is its gateway", w.VIP, net.Name)
	}
	if v, ok := net.VIPOf(w.Mark); !ok || v != w.VIP {
		return fmt.Errorf("fake: vip %s: mark %#x is that of %s", w.VIP, w.Mark, v)
	}
	var as []netip.Addr
	s := &fakeServer{mark: w.Mark, backends: map[netip.Addr]int{}}
	for _, b := range w.Backends {
		switch {
		case b.Addr.Is4() != w.VIP.Is4():
			return fmt.Errorf("fake: vip %s: backend %s is of another family", w.VIP, b.Addr)
		case b.Weight != 0 && b.Weight != 1:
			return fmt.Errorf("fake: vip %s: backend %s has weight %d", w.VIP, b.Addr, b.Weight)
		case n.addrs[b.Addr] || n.servers[b.Addr] != nil || b.Addr == w.VIP:
			return fmt.Errorf("fake: vip %s: backend %s is a VIP", w.VIP, b.Addr)
		}
		as = append(as, b.Addr)
		s.backends[b.Addr] = b.Weight
		s.open = s.open || b.Weight == 1
	}
	if err := ordered(as, "backends of "+w.VIP.String()); err != nil {
		return err
	}
	n.addrs[w.VIP] = true
	n.servers[w.VIP] = s
	return nil
}
