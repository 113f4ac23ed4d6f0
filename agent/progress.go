package agent

import (
	"context"
	"sync"

	"github.com/shoalnet/shoal/spec"
)

// progress tells how far the node's data plane is behind what is wanted. Every
// change of it wakes all who wait in await.
type progress struct {
	mu sync.Mutex
	ch chan struct{} // closed and replaced at each change

	requested uint64 // newest ticket taken
	composed  uint64 // newest ticket that a View has covered
	// want are the generations of the newest View in the loops, have those
	// of their newest passes.
	want, have generations
	pending    []appliedRev // Views not applied yet, oldest first
	// views are those that the overlay has not applied yet, oldest first. routed
	// are the endpoints that have their routes and keep them: those of the last
	// that it has applied and of every later one; nil before the first complete
	// one. held tells that a View awaits it.
	views  []pendingView
	wanted routes // of the newest
	routed routes
	held   bool
}

type pendingView struct {
	gen      uint64 // in the overlay's loop
	complete bool
	routes   routes
}

type generations struct{ overlay, vip, ingress uint64 }

func (g generations) reached(want generations) bool {
	return g.overlay >= want.overlay && g.vip >= want.vip && g.ingress >= want.ingress
}

type appliedRev struct {
	rev  uint64 // of the gossip snapshot in the View
	gens generations
}

func newProgress() *progress { return &progress{ch: make(chan struct{})} }

// update changes the progress under its lock.
func (p *progress) update(fn func(*progress)) {
	p.mu.Lock()
	fn(p)
	close(p.ch)
	p.ch = make(chan struct{})
	p.mu.Unlock()
}

// await returns when cond, called under the lock, is true.
func (p *progress) await(ctx context.Context, cond func(*progress) bool) error {
	for {
		p.mu.Lock()
		ok, ch := cond(p), p.ch
		p.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ch:
		}
	}
}

// ticket numbers a request for a View.
func (p *progress) ticket() (t uint64) {
	p.update(func(p *progress) {
		p.requested++
		t = p.requested
	})
	return t
}

// routesWanted notes a View that the overlay is to apply. What is not in it may
// lose its routes from now on. p.mu is held.
func (p *progress) routesWanted(gen uint64, v *spec.View, changed spec.Change) {
	if changed.In(spec.ChangedNetworks | spec.ChangedEndpoints) {
		p.wanted = routesOf(v)
		p.routed.and(p.wanted)
	}
	p.views = append(p.views, pendingView{gen, v.Complete, p.wanted})
}

// routesMade notes the Views that the overlay has applied up to a generation,
// and tells whether a View was held for that.
func (p *progress) routesMade(gen uint64) (release bool) {
	p.update(func(p *progress) {
		var last *pendingView
		for len(p.views) > 0 && p.views[0].gen <= gen {
			last = &p.views[0]
			p.views = p.views[1:]
		}
		// Before the first complete View what is in the kernel of an earlier agent
		// is better than what is known.
		if last != nil && (last.complete || p.routed != nil) {
			p.routed = last.routes
			for _, v := range p.views {
				p.routed.and(v.routes)
			}
			release, p.held = p.held, false
		}
	})
	return release
}

// passed records a loop's pass and returns the newest gossip revision that is
// now in the kernel, 0 if that did not change.
func (p *progress) passed(fn func(*generations)) (rev uint64) {
	p.update(func(p *progress) {
		fn(&p.have)
		n := 0
		for n < len(p.pending) && p.have.reached(p.pending[n].gens) {
			rev = p.pending[n].rev
			n++
		}
		p.pending = p.pending[n:]
	})
	return rev
}
