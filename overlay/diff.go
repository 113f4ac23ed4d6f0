package overlay

import (
	"slices"
	"strings"
	"time"

	"github.com/shoalnet/shoal/reconcile"
)

// Verb of an operation.
type Verb string

// Verbs.
const (
	Put    Verb = "put"    // make Object, or mend it
	Delete Verb = "delete" // remove Object, as it was observed
	Report Verb = "report" // tell of Object: nothing is to be done
)

// Op is one operation. It implements reconcile.Op.
type Op struct {
	Verb   Verb
	Target Object
	// Have is the object of the same key that was observed, or nil.
	Have Object
	// Replace (of a device): what is there can't be mended and must go first.
	Replace bool

	name string
}

var _ reconcile.Op = Op{}

// Object implements reconcile.Op: "network NAME: …", "task NAME: …" or
// "node: …".
func (o Op) Object() string { return o.name + ": " + o.Target.label() }

// Remark implements reconcile.Remarker.
func (o Op) Remark() string {
	if o.Verb != Report {
		return ""
	}
	where := "this node"
	if ns := o.Target.place(); ns != "" {
		where = "namespace " + ns
	}
	return where + ": " + o.Target.String()
}

// String implements reconcile.Op.
func (o Op) String() string {
	s := o.name + ": " + string(o.Verb) + " " + o.Target.String()
	if o.Replace {
		s += ", replacing " + o.Have.String()
	}
	return s
}

// Resolve fills in the MTU of devices that want it to follow the underlay's,
// from the underlay's MTU that was observed. If no link has the underlay's
// address, they keep the MTU they have, or get that of an Ethernet underlay.
func (s State) Resolve(have State) State {
	under := s.UnderlayMTU
	if under == 0 {
		under = have.UnderlayMTU
	}
	out := s.Clone()
	for k, o := range s.objects {
		auto := func(m *int, had int) {
			switch {
			case *m != 0:
			case under != 0:
				*m = under - s.Overhead
			case had != 0:
				*m = had
			default:
				*m = 1500 - s.Overhead
			}
		}
		h := have.objects[k]
		switch o := o.(type) {
		case VXLAN:
			hv, _ := h.(VXLAN)
			auto(&o.MTU, hv.MTU)
			out.objects[k] = o
		case Egress:
			he, _ := h.(Egress)
			auto(&o.MTU, he.MTU)
			out.objects[k] = o
		case Port:
			hp, _ := h.(Port)
			auto(&o.MTU, hp.MTU)
			out.objects[k] = o
		}
	}
	return out
}

// replaces tells whether have can't be mended to become want.
func replaces(want, have Object) bool {
	switch w := want.(type) {
	case VXLAN:
		h, ok := have.(VXLAN)
		return !ok || h.Broken || h.VNI != w.VNI || h.Local != w.Local || h.Port != w.Port || h.Network != w.Network
	case Egress:
		h, ok := have.(Egress)
		return !ok || h.Broken || h.Netns != w.Netns || h.Network != w.Network
	case Port:
		h, ok := have.(Port)
		return !ok || h.Broken || h.TaskNetns != w.TaskNetns || h.Eth != w.Eth || h.Task != w.Task || h.Network != w.Network
	}
	return false
}

// Diff returns the operations that take have to want, in the order to apply
// them: first what is to be made or mended, in the order in which one needs the
// other, then what is to go, in the reverse order. Nothing goes while want is
// not complete. The time is always zero: nothing here waits for a moment.
//
// Where a task's namespace is absent, that alone is reported, not everything
// that would be in it.
func Diff(want, have State, _ time.Time) ([]reconcile.Op, time.Time) {
	want = want.Resolve(have)
	lost := map[[2]string]bool{}    // devices that are made anew, with all they carry
	absent := map[string]bool{}     // task namespaces
	unwired := map[[2]string]bool{} // devices of tasks without a namespace
	for k, w := range want.objects {
		h := have.objects[k]
		switch w.(type) {
		case Sandbox:
			if h == nil {
				absent[w.place()] = true
			}
		case VXLAN, Egress, Port:
			// Of a device that is absent one end may still have been there to be
			// seen: the kernel takes the pairs of a deleted namespace apart in its
			// own time.
			if h == nil || replaces(w, h) {
				for _, d := range Devices(w) {
					lost[d] = true
				}
				if h != nil {
					for _, d := range Devices(h) {
						lost[d] = true
					}
				}
			}
		}
	}
	for _, w := range want.objects {
		if p, ok := w.(Port); ok && absent[p.TaskNetns] {
			unwired[[2]string{p.Netns, p.Dev}] = true
		}
	}

	var put, del, tell []Object
	for _, h := range have.objects {
		if _, ok := h.(Remark); ok {
			tell = append(tell, h)
		}
	}
	for k, w := range want.objects {
		if _, ok := w.(Sandbox); !ok && absent[w.place()] {
			continue
		}
		if dev, ok := w.Key().(deviceKey); ok && unwired[[2]string{dev.netns, dev.dev}] || unwired[[2]string{w.place(), w.device()}] {
			continue
		}
		h := have.objects[k]
		if h == nil || h != w || lost[[2]string{w.place(), w.device()}] {
			put = append(put, w)
		}
	}
	if want.Complete {
		gone := map[[2]string]bool{}
		for k, h := range have.objects {
			if want.objects[k] == nil {
				for _, d := range Devices(h) {
					gone[d] = true
				}
			}
		}
		for k, h := range have.objects {
			if want.objects[k] == nil && !gone[[2]string{h.place(), h.device()}] {
				switch h.(type) {
				case Sandbox: // the runtime's
					continue
				case Remark:
					continue
				}
				del = append(del, h)
			}
		}
	}
	sortObjects(put)
	sortObjects(del)
	sortObjects(tell)
	slices.Reverse(del)

	ops := make([]reconcile.Op, 0, len(put)+len(del))
	for _, o := range put {
		op := Op{Verb: Put, Target: o, Have: have.objects[o.Key()], name: want.owner(o)}
		if lost[[2]string{o.place(), o.device()}] {
			op.Have = nil
		}
		op.Replace = op.Have != nil && replaces(o, op.Have)
		ops = append(ops, op)
	}
	for _, o := range del {
		ops = append(ops, Op{Verb: Delete, Target: o, Have: o, name: want.owner(o)})
	}
	for _, o := range tell {
		ops = append(ops, Op{Verb: Report, Target: o, Have: o, name: want.owner(o)})
	}
	return ops, time.Time{}
}

// owner names whose object o is.
func (s State) owner(o Object) string {
	dev := o.device()
	switch o := o.(type) {
	case Port:
		dev = o.Dev
	case Guard:
		dev = o.Dev
	}
	if n, ok := s.PortOwners[dev]; ok {
		return n
	}
	if n, ok := s.Owners[o.place()]; ok {
		return n
	}
	switch o := o.(type) {
	case Namespace:
		return "network " + o.Netns
	case Egress:
		return "network " + o.Network
	}
	if p := o.place(); p != "" {
		return "network " + strings.TrimSpace(p)
	}
	return "node"
}
