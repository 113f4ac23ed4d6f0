package ingress

import (
	"fmt"
	"slices"
	"time"

	"github.com/shoalnet/shoal/reconcile"
)

// Verb of an operation.
type Verb string

// Verbs.
const (
	Put    Verb = "put"    // make Object, or mend it
	Delete Verb = "delete" // remove Object, as it was observed
	Refuse Verb = "refuse" // fail, because of the Holder that Object is
)

// Op is one operation. It implements reconcile.Op.
type Op struct {
	Verb   Verb
	Target Object
	Have   Object // of the same key, as observed; or nil
	// More are ports of the same owner, or entries of the same network, that
	// Verb is for as well: looking for the connections of one port costs as
	// much as for those of a thousand. One that fails must not keep the others.
	More []Object

	name string
}

// Each lists Target and More.
func (o Op) Each() []Object { return append([]Object{o.Target}, o.More...) }

// many is how many there are before they share operations; up to that, status
// tells of each.
const many = 16

var _ reconcile.Op = Op{}

// Object implements reconcile.Op: "service NAME: …", "task NAME: …",
// "network NAME: …" or "node: …".
func (o Op) Object() string {
	s := o.name + ": " + o.Target.label()
	if len(o.More) > 0 {
		s += fmt.Sprintf(" and %d more", len(o.More))
	}
	return s
}

// String implements reconcile.Op.
func (o Op) String() string {
	s := o.name + ": " + string(o.Verb) + " " + o.Target.String()
	if len(o.More) > 0 {
		s += fmt.Sprintf(" and %d more", len(o.More))
	}
	return s
}

// Diff returns the operations that take have to want, in the order to apply
// them: first what is to be made or mended, in the order in which one needs the
// other, then what is to go, in the reverse order. Nothing goes while want is
// not complete. A port that another program holds is taken back, and its
// operation fails in each pass until the program lets it go. The time is always
// zero: nothing here waits for a moment.
func Diff(want, have State, _ time.Time) ([]reconcile.Op, time.Time) {
	held := map[any]Holder{}
	for _, o := range have.objects {
		if h, ok := o.(Holder); ok {
			held[h.Key().(holderKey).portKey] = h
		}
	}
	// A table that is written anew is empty.
	emptied := map[string]bool{}
	for k, w := range want.objects {
		if h := have.objects[k]; w.rank() == rankTable && h != nil && h != w {
			emptied[w.place()] = true
		}
	}
	var put, del, refuse []Object
	for k, w := range want.objects {
		h := have.objects[k]
		if holder, ok := held[k]; ok {
			refuse = append(refuse, holder)
			if h != nil {
				del = append(del, h)
			}
			continue
		}
		if h != w || w.rank() > rankSetting && emptied[w.place()] {
			put = append(put, w)
		}
	}
	if want.Complete {
		for k, h := range have.objects {
			if _, ok := h.(Holder); !ok && want.objects[k] == nil {
				del = append(del, h)
			}
		}
	}
	sortObjects(put)
	sortObjects(del)
	sortObjects(refuse)
	slices.Reverse(del)

	ops := make([]reconcile.Op, 0, len(put)+len(del)+len(refuse))
	add := func(v Verb, os []Object) {
		groups := map[string][]int{} // by kind and owner: places in os
		for i, o := range os {
			switch o.(type) {
			case Port, Entry:
				k := fmt.Sprintf("%T %s", o, want.owner(o))
				groups[k] = append(groups[k], i)
			}
		}
		more := map[int][]Object{} // by the place of the first
		taken := map[int]bool{}
		for _, g := range groups {
			if v == Refuse || len(g) <= many {
				continue
			}
			for _, i := range g[1:] {
				more[g[0]] = append(more[g[0]], os[i])
				taken[i] = true
			}
		}
		for i, o := range os {
			if !taken[i] {
				ops = append(ops, Op{Verb: v, Target: o, Have: have.objects[o.Key()], More: more[i], name: want.owner(o)})
			}
		}
	}
	add(Put, put)
	add(Delete, del)
	add(Refuse, refuse)
	return ops, time.Time{}
}
