package vip

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/shoalnet/shoal/reconcile"
)

// SetNetwork makes the part of a namespace that all its servers share as Want
// says: tables, chains, sysctls, and the hairpin of Want.Locals.
type SetNetwork struct {
	Want Network
	// With Servers, everything is to be built in what is an empty namespace.
	// Why is what was found wrong.
	Why string
}

// Object implements reconcile.Op.
func (o SetNetwork) Object() string { return "network " + o.Want.Name + ": vip table" }

func (o SetNetwork) String() string {
	s := o.Object() + ": set, hairpin of " + addrs(o.Want.Locals)
	if len(o.Want.Servers) > 0 {
		s += fmt.Sprintf(", %d servers", len(o.Want.Servers))
	}
	if o.Why != "" {
		s += " (" + o.Why + ")"
	}
	return s
}

// SetServer makes one VIP exactly as Want says, and resets what is connected
// to backends that Have has and Want does not.
type SetServer struct {
	Network Network // without Servers
	Want    Server
	Have    Server // zero but for VIP when there is nothing
}

// Object implements reconcile.Op.
func (o SetServer) Object() string {
	return "network " + o.Network.Name + ": vip " + o.Want.VIP.String()
}

func (o SetServer) String() string {
	s := o.Object() + ": service " + o.Want.Name + ", backends "
	if len(o.Want.Backends) == 0 {
		s += "none"
	}
	for i, b := range o.Want.Backends {
		if i > 0 {
			s += " "
		}
		if i == 16 {
			s += fmt.Sprintf("and %d more", len(o.Want.Backends)-i)
			break
		}
		s += b.Addr.String()
		if b.Weight == 0 {
			s += "(drain)"
		}
	}
	if o.Have.Fault != "" {
		s += " (" + o.Have.Fault + ")"
	}
	return s
}

// Removed lists the backends that leave: those of Have that Want has not.
func (o SetServer) Removed() []netip.Addr {
	var out []netip.Addr
	for _, b := range o.Have.Backends {
		if _, ok := o.Want.Backend(b.Addr); !ok {
			out = append(out, b.Addr)
		}
	}
	return out
}

// DelServer removes a VIP with all that belongs to it. What is still connected
// to it goes nowhere from then on, but is not reset: the address that could say
// so is gone, and a TCP client takes the "host unreachable" that it gets for
// passing (RFC 9293 section 3.9.2.2), until its own time runs out. [Diff] asks
// for it when no task of the service is left; tasks that were stopped, not lost,
// have ended their connections by then.
type DelServer struct {
	Network Network // without Servers
	Have    Server
}

// Object implements reconcile.Op.
func (o DelServer) Object() string {
	return "network " + o.Network.Name + ": vip " + o.Have.VIP.String()
}

func (o DelServer) String() string { return o.Object() + ": remove" }

func addrs(as []netip.Addr) string {
	if len(as) == 0 {
		return "nothing"
	}
	ss := make([]string, 0, len(as))
	for i, a := range as {
		if i == 16 {
			ss = append(ss, fmt.Sprintf("and %d more", len(as)-i))
			break
		}
		ss = append(ss, a.String())
	}
	return strings.Join(ss, " ")
}

// Diff lists the operations that turn have into want, in the order to apply
// them: per network the shared part, then servers to add or change, then those
// to remove. There is one operation per VIP. While want is not Complete,
// nothing is removed: no server, no hairpin, and no backend but one whose address has
// become a VIP.
//
// The VIP of a removed service stays as long as tasks of that service do that
// were its backends, draining, so that removing a service ends its connections
// the way its tasks end them, not before. New connections are refused.
//
// The second result is always zero: nothing here waits for a moment (see the
// package comment on weights). now is there for the shape that all data plane
// packages share.
func Diff(want, have State, _ time.Time) ([]reconcile.Op, time.Time) {
	var ops []reconcile.Op
	for _, w := range want.Networks {
		h, ok := have.Network(w.ID)
		if !ok || h.Absent {
			// One operation that fails as long as the namespace is missing,
			// rather than one per VIP. It builds all when it does not fail.
			ops = append(ops, SetNetwork{Want: w, Why: "namespace " + w.Namespace + " was absent"})
			continue
		}
		ops = append(ops, diffNetwork(w, h, want.Complete)...)
	}
	return ops, time.Time{}
}

func diffNetwork(w, h Network, complete bool) []reconcile.Op {
	var ops []reconcile.Op
	hdr := w.header()
	if !complete {
		hdr.Locals = union(w.Locals, h.Locals)
	}
	switch {
	case h.Fault != "" && len(h.Servers) == 0:
		// A fresh namespace: all at once, which is several times faster than
		// one by one when there are thousands.
		hdr.Servers = w.Servers
		return append(ops, SetNetwork{Want: hdr, Why: h.Fault})
	case h.Fault != "":
		ops = append(ops, SetNetwork{Want: hdr, Why: h.Fault})
	case !slices.Equal(hdr.Locals, h.Locals):
		ops = append(ops, SetNetwork{Want: hdr})
	}
	var last []reconcile.Op
	for _, s := range h.Servers {
		if _, ok := w.Server(s.VIP); ok {
			continue
		}
		if !complete {
			continue // it stays for now
		}
		d := Server{VIP: s.VIP, Name: "removed", Backends: stay(s.Backends, w.Orphans)}
		m, ok := w.MarkOf(s.VIP)
		d.Mark = m
		switch {
		case has(w.Claimed, s.VIP):
			// Its address was given to an endpoint, which can't be reached
			// while the namespace has it.
			ops = append(ops, DelServer{Network: hdr, Have: s})
		case len(d.Backends) == 0 || !ok:
			last = append(last, DelServer{Network: hdr, Have: s})
		case !matches(d, s):
			last = append(last, SetServer{Network: hdr, Want: d, Have: s})
		}
	}
	for _, s := range w.Servers {
		hs, ok := h.Server(s.VIP)
		if !ok {
			hs = Server{VIP: s.VIP}
		}
		if !complete {
			s.Backends = slices.DeleteFunc(keep(s.Backends, hs.Backends), func(b Backend) bool {
				_, was := h.Server(b.Addr)
				_, is := w.Server(b.Addr)
				return was || is // what is a VIP here can't be reached as an endpoint
			})
		}
		if !ok || !matches(s, hs) {
			ops = append(ops, SetServer{Network: hdr, Want: s, Have: hs})
		}
	}
	return append(ops, last...)
}

func has(sorted []netip.Addr, a netip.Addr) bool {
	_, ok := slices.BinarySearchFunc(sorted, a, netip.Addr.Compare)
	return ok
}

// stay are the backends of have that orphans has, draining.
func stay(have []Backend, orphans []netip.Addr) []Backend {
	var out []Backend
	for _, b := range have {
		if has(orphans, b.Addr) {
			out = append(out, Backend{Addr: b.Addr})
		}
	}
	return out
}

func matches(want, have Server) bool {
	return have.Fault == "" && have.Open == (len(want.Takes()) > 0) && slices.Equal(want.Backends, have.Backends)
}

// keep is want with the backends of have that it lacks.
func keep(want, have []Backend) []Backend {
	out := slices.Clone(want)
	for _, b := range have {
		if !slices.ContainsFunc(want, func(w Backend) bool { return w.Addr == b.Addr }) {
			out = append(out, b)
		}
	}
	slices.SortFunc(out, func(a, b Backend) int { return a.Addr.Compare(b.Addr) })
	return out
}

func union(a, b []netip.Addr) []netip.Addr {
	out := slices.Concat(a, b)
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}
