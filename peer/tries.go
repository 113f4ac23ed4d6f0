package peer

import (
	"net/netip"
	"time"
)

// A source may give so many wrong tokens at once, and one more in each
// triesInterval. The secret has 160 bits: this is so that guessing costs the
// managers nothing.
const (
	triesBurst    = 10
	triesInterval = time.Second
	triesSources  = 4096 // that are remembered
)

type try struct {
	left float64
	at   time.Time
}

func (t *try) fill(now time.Time) {
	t.left = min(triesBurst, t.left+now.Sub(t.at).Seconds()/triesInterval.Seconds())
	t.at = now
}

// MayTry tells whether a source may try a token now.
func (p *Peer) MayTry(from netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.tries[prefixOf(from)]
	if t == nil {
		return true
	}
	t.fill(time.Now())
	return t.left >= 1
}

// WrongToken notes that a source gave one.
func (p *Peer) WrongToken(from netip.Addr) {
	p.counters.tokens.Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	src := prefixOf(from)
	t := p.tries[src]
	if t == nil {
		if len(p.tries) >= triesSources {
			for k, o := range p.tries {
				if o.fill(now); o.left >= triesBurst {
					delete(p.tries, k)
				}
			}
		}
		if len(p.tries) >= triesSources {
			return // so many sources are one attack; none of them gets far
		}
		t = &try{left: triesBurst, at: now}
		p.tries[src] = t
	}
	t.fill(now)
	t.left = max(0, t.left-1)
}
