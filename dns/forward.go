package dns

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	mdns "github.com/miekg/dns"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"
)

// Times and sizes of forwarding.
const (
	// forwardTimeout bounds one question: below the 5 s after which a stub
	// resolver asks again (resolv.conf(5), RES_TIMEOUT).
	forwardTimeout = 4500 * time.Millisecond
	// A resolver that has not answered for the hedge delay is joined by the
	// next: three times what it usually takes, within these bounds.
	hedgeMin, hedgeMax, hedgeUnknown = 40 * time.Millisecond, 400 * time.Millisecond, 150 * time.Millisecond
	// A question that nobody has answered is sent again: packets get lost. To one
	// who is slow it is later, or all of its work would be done twice.
	resendMin, resendMax = time.Second, 2 * time.Second
	// A resolver that did not answer is asked last for this long.
	penalty = 20 * time.Second
	// tcpTimeout bounds asking again by TCP for what was cut short: that is then
	// better than nothing.
	tcpTimeout = 2 * time.Second
	// maxSockets bounds the sockets by which resolvers are asked; half of what
	// the process may open is the bound where that is less (RLIMIT_NOFILE).
	maxSockets = 12288
	// maxForged is the number of answers to another question than ours after
	// which a resolver is asked by TCP (RFC 5452 section 9.2 counts them so).
	maxForged = 3

	cacheSize      = 16384           // answers
	maxTTL         = time.Hour       // of a cached answer, whatever its records say
	maxNegativeTTL = 5 * time.Minute // RFC 2308 section 5 allows 3 h; a name that comes to be should be seen
	maxCached      = 8192            // bytes of one answer
	maxChain       = 32              // aliases that are out of order

	// Stale answers (RFC 8767 section 5): one is given when resolvers take longer
	// than the client response timer, at once for the failure recheck timer after
	// they failed, and says that it is good for so long.
	stalePatience = 1800 * time.Millisecond
	staleRecheck  = 30 * time.Second
	staleTTL      = 30 // seconds
	// plainTime is for how long a resolver that rejects EDNS0 is asked without.
	plainTime = 10 * time.Minute
)

// upstreams are whom to ask.
type upstreams struct {
	servers []netip.AddrPort
	netns   string // namespace to ask from; "": the node's
	who     *asking
}

// key identifies them in the cache. The node's are all one: what they said
// holds after they have changed, for as long as it said.
func (u *upstreams) key() string {
	if u.netns == "" {
		return ""
	}
	return fmt.Sprint(u.netns, u.servers)
}

// forwarder asks resolvers and keeps what they say.
type forwarder struct {
	cfg     Config
	cache   *lru.Cache[string, *cached]
	flight  singleflight.Group
	slots   chan struct{}
	turns   *turns // to send
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	metrics *metrics

	mu     sync.Mutex
	closed bool
	health map[serverKey]*health
}

type serverKey struct {
	netns string
	addr  netip.AddrPort
}

// health is what is known of a resolver.
type health struct {
	srtt  time.Duration // smoothed time to an answer; 0: unknown
	bad   time.Time     // until then it is asked last
	plain time.Time     // until then it is asked without EDNS0
}

// cached is an answer and when it ends. msg is never changed.
type cached struct {
	msg     *mdns.Msg
	stored  time.Time
	expires time.Time
	failed  time.Time // the last time that no resolver had a newer one; guarded by forwarder.mu
}

func newForwarder(cfg Config) *forwarder {
	c, err := lru.New[string, *cached](cacheSize)
	if err != nil {
		panic(err) // only for a size that is not positive
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &forwarder{cfg: cfg, cache: c, slots: make(chan struct{}, socketLimit()), turns: newTurns(max(1, runtime.GOMAXPROCS(0)/2)), ctx: ctx, cancel: cancel, health: map[serverKey]*health{}}
}

// socketLimit is the number of sockets that may be open to resolvers.
func socketLimit() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 1024
	}
	return int(max(16, min(maxSockets, l.Cur/2)))
}

func (f *forwarder) close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.cancel()
	f.wg.Wait()
}

// answer returns the answer to req from the cache or from resolvers, and which of
// these (fromCache, …); SERVFAIL if there is none.
func (f *forwarder) answer(ctx context.Context, up *upstreams, req *mdns.Msg) (*mdns.Msg, int) {
	q := req.Question[0]
	do := false
	if o := req.IsEdns0(); o != nil {
		do = o.Do()
	}
	key := cacheKey(up.key(), q, do, req.CheckingDisabled)
	now := time.Now()
	have, ok := f.cache.Get(key)
	if ok && now.Before(have.expires) {
		return have.reply(req, now, 0), fromCache
	}
	stale := ok && f.cfg.Stale > 0 && now.Before(have.expires.Add(f.cfg.Stale))
	var patience <-chan time.Time
	if stale {
		if f.failedLately(have, now) {
			return have.reply(req, now, staleTTL), fromStale
		}
		t := time.NewTimer(stalePatience)
		defer t.Stop()
		patience = t.C
	}
	ch := f.flight.DoChan(key, func() (any, error) {
		if !f.begin() {
			return nil, context.Canceled
		}
		defer f.wg.Done()
		fctx, cancel := context.WithTimeout(f.ctx, forwardTimeout)
		defer cancel()
		return f.ask(fctx, up, key, q, do, req.CheckingDisabled)
	})
	var got *cached
	select {
	case r := <-ch:
		if r.Err == nil {
			got = r.Val.(*cached)
		} else {
			f.cfg.Log.Debug("name server: no resolver answers", "name", q.Name, "error", r.Err)
		}
	case <-patience: // the flight goes on, and its answer is kept
	case <-ctx.Done():
	}
	switch {
	case got != nil && (got.msg.Rcode == mdns.RcodeSuccess || got.msg.Rcode == mdns.RcodeNameError):
		return got.reply(req, time.Now(), 0), fromUpstream
	case stale:
		f.mu.Lock()
		have.failed = time.Now()
		f.mu.Unlock()
		return have.reply(req, now, staleTTL), fromStale
	case got != nil:
		return got.reply(req, time.Now(), 0), fromUpstream
	}
	return failure(req, mdns.RcodeServerFailure), fromUpstream
}

// failedLately tells whether it is too early to ask again for what is stale.
func (f *forwarder) failedLately(c *cached, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return now.Before(c.failed.Add(staleRecheck))
}

func (f *forwarder) begin() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return false
	}
	f.wg.Add(1)
	return true
}

func cacheKey(up string, q mdns.Question, do, cd bool) string {
	flags := byte(0)
	if do {
		flags |= 1
	}
	if cd {
		flags |= 2
	}
	var b strings.Builder
	b.Grow(len(up) + len(q.Name) + 4)
	b.WriteString(lower(q.Name))
	b.Write([]byte{0, flags, byte(q.Qtype >> 8), byte(q.Qtype)})
	b.WriteString(up)
	return b.String()
}

// reply makes the cached answer one to req: its ID, its spelling of the name,
// its EDNS, and what is left of the records' time; or ttl seconds, if not 0.
func (c *cached) reply(req *mdns.Msg, now time.Time, ttl uint32) *mdns.Msg {
	m := c.msg.Copy()
	age := uint32(max(0, now.Sub(c.stored)) / time.Second)
	name := req.Question[0].Name
	asked := c.msg.Question[0].Name
	for _, section := range [][]mdns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			h := rr.Header()
			if h.Rrtype == mdns.TypeOPT {
				continue
			}
			switch {
			case ttl > 0:
				h.Ttl = ttl
			case h.Ttl > age:
				h.Ttl -= age
			default:
				h.Ttl = 0
			}
			if strings.EqualFold(h.Name, asked) {
				h.Name = name
			}
		}
	}
	m.Id, m.Question, m.RecursionDesired, m.RecursionAvailable = req.Id, req.Question, req.RecursionDesired, true
	m.CheckingDisabled, m.Authoritative = req.CheckingDisabled, false
	m.Extra = slices.DeleteFunc(m.Extra, func(rr mdns.RR) bool { return rr.Header().Rrtype == mdns.TypeOPT })
	o := req.IsEdns0()
	if o != nil {
		m.SetEdns0(advertisedUDP, o.Do())
	} else if m.Rcode > 0xf {
		m.Rcode = mdns.RcodeServerFailure // an extended rcode needs EDNS to be told
	}
	if o == nil || !o.Do() {
		// RFC 6840 section 5.7: AD is for who asks for it.
		m.AuthenticatedData = m.AuthenticatedData && req.AuthenticatedData
	}
	return m
}

// ask asks resolvers, and keeps the answer for as long as it says.
func (f *forwarder) ask(ctx context.Context, up *upstreams, key string, q mdns.Question, do, cd bool) (*cached, error) {
	m, err := f.race(ctx, up, q, do, cd)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	c := &cached{msg: m, stored: now}
	if ttl := lifetime(m); ttl > 0 && m.Len() <= maxCached {
		// RFC 2308 section 5: the SOA record of a negative answer ends with it.
		for _, rr := range m.Ns {
			if h := rr.Header(); h.Rrtype == mdns.TypeSOA && !answers(m) {
				h.Ttl = min(h.Ttl, uint32(ttl/time.Second))
			}
		}
		c.expires = now.Add(ttl)
		f.cache.Add(key, c)
	}
	return c, nil
}

// lifetime is for how long an answer may be kept: the least of its records'
// (RFC 2181 section 5.2), or what the SOA record of a negative one says
// (RFC 2308 section 5: without one it is not kept).
func lifetime(m *mdns.Msg) time.Duration {
	if m.Truncated || m.Rcode != mdns.RcodeSuccess && m.Rcode != mdns.RcodeNameError {
		return 0
	}
	if len(m.Answer) > 0 && m.Rcode == mdns.RcodeSuccess && answers(m) {
		ttl := maxTTL
		for _, rr := range m.Answer {
			ttl = min(ttl, seconds(rr.Header().Ttl))
		}
		return ttl
	}
	for _, rr := range m.Ns {
		if s, ok := rr.(*mdns.SOA); ok {
			ttl := min(maxNegativeTTL, seconds(s.Minttl), seconds(s.Hdr.Ttl))
			for _, rr := range m.Answer { // a CNAME that leads to nothing
				ttl = min(ttl, seconds(rr.Header().Ttl))
			}
			return ttl
		}
	}
	return 0
}

// seconds is a TTL; one with the first bit set is none (RFC 2181 section 8).
func seconds(ttl uint32) time.Duration {
	if ttl > 1<<31-1 {
		return 0
	}
	return time.Duration(ttl) * time.Second
}

// answers tells whether m holds what was asked for, beside aliases.
func answers(m *mdns.Msg) bool {
	t := m.Question[0].Qtype
	return t == mdns.TypeANY || slices.ContainsFunc(m.Answer, func(rr mdns.RR) bool { return rr.Header().Rrtype == t })
}

// race asks the first resolver, and another as soon as one fails or takes
// longer than is usual for it; the first good answer wins. SERVFAIL and REFUSED
// are taken only if nobody has better.
func (f *forwarder) race(ctx context.Context, up *upstreams, q mdns.Question, do, cd bool) (*mdns.Msg, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		m   *mdns.Msg
		err error
	}
	order := f.order(up)
	results := make(chan result) // whoever sends also looks at ctx
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	running, sent := 0, 0
	// send asks the next resolver, and returns when to ask another. Only the first
	// waits for a socket and its turn: where they are short, nobody gets a second one.
	send := func() time.Duration {
		select {
		case f.slots <- struct{}{}:
		default:
			if running > 0 {
				return hedgeMax
			}
			select {
			case f.slots <- struct{}{}:
			case <-ctx.Done():
				return hedgeMax
			}
		}
		if running > 0 && !f.turns.try() || running == 0 && f.turns.take(ctx, up.who) != nil {
			<-f.slots
			return hedgeMax
		}
		s := order[sent%len(order)]
		sent++
		running++
		wg.Go(func() {
			defer func() { <-f.slots }()
			gone := sync.OnceFunc(f.turns.give)
			defer gone()
			m, err := f.exchange(ctx, s, q, do, cd, gone)
			select {
			case results <- result{m, err}:
			case <-ctx.Done():
			}
		})
		return f.wait(s, sent >= len(order))
	}
	timer := time.NewTimer(send())
	defer timer.Stop()
	var fallback *mdns.Msg
	var errs []error
	for {
		select {
		case <-ctx.Done():
			if fallback != nil {
				return fallback, nil
			}
			return nil, errors.Join(append(errs, ctx.Err())...)
		case r := <-results:
			running--
			switch {
			case r.err != nil:
				errs = append(errs, r.err)
			case r.m.Rcode == mdns.RcodeSuccess || r.m.Rcode == mdns.RcodeNameError:
				return r.m, nil
			default:
				fallback = r.m
			}
			if sent < len(order) {
				timer.Reset(send())
			} else if running == 0 {
				// Each has said no: nothing to wait for.
				if fallback != nil {
					return fallback, nil
				}
				return nil, errors.Join(errs...)
			}
		case <-timer.C:
			if sent < 3*len(order) {
				timer.Reset(send())
			}
		}
	}
}

// order is the order to ask in: as configured, with those that lately failed
// last.
func (f *forwarder) order(up *upstreams) []serverKey {
	out := make([]serverKey, len(up.servers))
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, a := range up.servers {
		out[i] = serverKey{up.netns, a}
	}
	bad := func(k serverKey) int {
		if h := f.health[k]; h != nil && now.Before(h.bad) {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(out, func(a, b serverKey) int { return cmp.Compare(bad(a), bad(b)) })
	return out
}

// wait is for how long a resolver is waited for before the next is asked, or,
// with all asked, before one is asked again.
func (f *forwarder) wait(k serverKey, all bool) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.health[k]
	switch {
	case all && h != nil:
		return min(max(3*h.srtt/2, resendMin), resendMax)
	case all:
		return resendMin
	case h != nil && h.srtt > 0:
		return min(max(3*h.srtt, hedgeMin), hedgeMax)
	}
	return hedgeUnknown
}

// note records how a resolver did; took 0: it did not answer.
func (f *forwarder) note(k serverKey, took time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.healthOf(k)
	if took == 0 {
		h.bad = time.Now().Add(penalty)
		return
	}
	h.bad = time.Time{}
	if h.srtt == 0 {
		h.srtt = took
	} else {
		h.srtt += (took - h.srtt) / 8 // RFC 6298 section 2's gain
	}
}

// healthOf returns what is known of a resolver. f.mu is held.
func (f *forwarder) healthOf(k serverKey) *health {
	h := f.health[k]
	if h == nil {
		if len(f.health) > 4096 { // tasks come and go with resolvers of their own
			clear(f.health)
		}
		h = &health{}
		f.health[k] = h
	}
	return h
}

// errForged tells that an answer came which is not to be believed.
var errForged = errors.New("answers that look forged")

// exchange asks one resolver: by UDP, and by TCP where the answer is cut short
// or looks forged; with EDNS0, and without where that is rejected (RFC 6891
// section 7). It calls gone when the first question is on its way.
func (f *forwarder) exchange(ctx context.Context, k serverKey, q mdns.Question, do, cd bool, gone func()) (*mdns.Msg, error) {
	start := time.Now()
	f.mu.Lock()
	plain := start.Before(f.healthOf(k).plain)
	f.mu.Unlock()
	m, err := f.exchangeWith(ctx, k, q, flags{plain: plain, do: do, cd: cd, gone: gone})
	if err == nil && !plain && rejectsEDNS(m.Rcode) {
		if second, err := f.exchangeWith(ctx, k, q, flags{plain: true, cd: cd, gone: gone}); err == nil && !rejectsEDNS(second.Rcode) {
			m = second
			f.mu.Lock()
			f.healthOf(k).plain = time.Now().Add(plainTime)
			f.mu.Unlock()
		}
	}
	switch {
	case err == nil:
		if m.Rcode != mdns.RcodeSuccess && m.Rcode != mdns.RcodeNameError {
			f.metrics.failures[upstreamRcode].Inc()
		}
		f.note(k, max(time.Since(start), 1))
	case isLocal(err):
		// Says nothing of the resolver.
		f.metrics.failures[upstreamLocal].Inc()
	case ctx.Err() == nil:
		f.metrics.failures[upstreamError].Inc()
		f.note(k, 0)
	case time.Since(start) > hedgeMax:
		// An end from outside says nothing of it, unless it had its time.
		f.metrics.failures[upstreamTimeout].Inc()
		f.note(k, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("resolver %s: %w", k.addr, err)
	}
	return m, nil
}

func rejectsEDNS(rcode int) bool {
	return rcode == mdns.RcodeFormatError || rcode == mdns.RcodeNotImplemented || rcode == mdns.RcodeBadVers
}

// isLocal tells whether an error is a want of this machine's.
func isLocal(err error) bool {
	for _, e := range [...]error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EADDRNOTAVAIL, unix.EAGAIN} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// flags are how a question is asked.
type flags struct {
	plain  bool // without EDNS0
	do, cd bool
	gone   func() // called when it is on its way
}

// exchangeWith is exchange in one way.
func (f *forwarder) exchangeWith(ctx context.Context, k serverKey, q mdns.Question, fl flags) (*mdns.Msg, error) {
	m, err := f.exchangeBy(ctx, "udp", k, q, fl)
	switch {
	case err == nil && m.Truncated:
		tctx, cancel := context.WithTimeout(ctx, tcpTimeout)
		defer cancel()
		if whole, err := f.exchangeBy(tctx, "tcp", k, q, fl); err == nil {
			return whole, nil
		}
		// It says that it is cut short.
	case errors.Is(err, errForged):
		return f.exchangeBy(ctx, "tcp", k, q, fl)
	}
	return m, err
}

// exchangeBy sends one question with a random ID, by a socket with a random
// port, in random case (draft-vixie-dnsext-dns0x20), and takes only an answer
// that has all three.
func (f *forwarder) exchangeBy(ctx context.Context, network string, k serverKey, q mdns.Question, fl flags) (*mdns.Msg, error) {
	// AD in a question asks for it in the answer (RFC 6840 section 5.7), which is
	// kept for those who want it, too.
	req := &mdns.Msg{MsgHdr: mdns.MsgHdr{Id: mdns.Id(), RecursionDesired: true, AuthenticatedData: true, CheckingDisabled: fl.cd},
		Question: []mdns.Question{{Name: mixCase(q.Name), Qtype: q.Qtype, Qclass: q.Qclass}}}
	if !fl.plain {
		req.SetEdns0(advertisedUDP, fl.do)
	}
	b, err := req.Pack()
	if err != nil {
		return nil, err
	}
	c, err := f.cfg.Dial(ctx, k.netns, network, k.addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	hearUnreachable(c)
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	if network == "tcp" {
		b = append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)
	}
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	if fl.gone != nil {
		fl.gone()
	}
	buf := make([]byte, 4096)
	for forged := 0; ; {
		n, err := readMessage(c, network, &buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, err
		}
		m := new(mdns.Msg)
		err = m.Unpack(buf[:n])
		// A message that can't be read to its end may still be cut short, which
		// its header tells.
		readable := err == nil || n >= 12 && m.Truncated
		if readable && m.Response && m.Id == req.Id && m.Opcode == mdns.OpcodeQuery {
			same, spelt := sameQuestion(m, req)
			switch {
			case same && spelt:
				m.Question = []mdns.Question{q}
				respell(m, req.Question[0].Name, q.Name)
				clean(m)
				return m, nil
			case same && network == "tcp":
				// A resolver that does not keep the case; nobody forges a TCP stream.
				m.Question = []mdns.Question{q}
				clean(m)
				return m, nil
			case same:
				return nil, fmt.Errorf("%w: the name's case is not as it was sent", errForged)
			case len(m.Question) == 0 && m.Rcode != mdns.RcodeSuccess && m.Rcode != mdns.RcodeNameError:
				// Some send errors without the question.
				m.Question = []mdns.Question{q}
				clean(m)
				return m, nil
			}
		}
		if network == "tcp" {
			return nil, errForged
		}
		if forged++; forged >= maxForged {
			return nil, errForged
		}
	}
}

// hearUnreachable makes a read of a UDP socket fail when a router says that
// there is no way to the resolver. Without IP_RECVERR (ip(7)) only a closed port
// is told, and all else is waited for.
func hearUnreachable(c net.Conn) {
	udp, ok := c.(*net.UDPConn)
	if !ok {
		return
	}
	rc, err := udp.SyscallConn()
	if err != nil {
		return
	}
	v6 := udp.RemoteAddr().(*net.UDPAddr).IP.To4() == nil
	_ = rc.Control(func(fd uintptr) {
		if v6 {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
		} else {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1)
		}
	})
}

// readMessage reads one message into buf, which may grow.
func readMessage(c net.Conn, network string, buf *[]byte) (int, error) {
	if network != "tcp" {
		return c.Read(*buf)
	}
	var head [2]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return 0, err
	}
	n := int(binary.BigEndian.Uint16(head[:]))
	if n > len(*buf) {
		*buf = make([]byte, n)
	}
	return io.ReadFull(c, (*buf)[:n])
}

// sameQuestion tells whether m answers req, and whether it spells the name as
// req does.
func sameQuestion(m, req *mdns.Msg) (same, spelt bool) {
	if len(m.Question) != 1 {
		return false, false
	}
	a, b := m.Question[0], req.Question[0]
	if a.Qtype != b.Qtype || a.Qclass != b.Qclass || !strings.EqualFold(a.Name, b.Name) {
		return false, false
	}
	return true, a.Name == b.Name
}

// respell undoes mixCase in the records of an answer.
func respell(m *mdns.Msg, sent, name string) {
	for _, section := range [][]mdns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if h := rr.Header(); h.Name == sent {
				h.Name = name
			}
		}
	}
}

// clean takes off an answer what is between this resolver and us only (OPT,
// TSIG, SIG(0)), and what is no answer to the question: records that no chain of
// aliases leads to from its name, and additional ones, which nobody asked for.
func clean(m *mdns.Msg) {
	m.Extra = nil
	q := m.Question[0]
	names := map[string]bool{lower(q.Name): true}
	for grown, n := true, 0; grown && n < maxChain; n++ {
		grown = false
		for _, rr := range m.Answer {
			to := ""
			switch rr := rr.(type) {
			case *mdns.CNAME:
				to = rr.Target
			case *mdns.DNAME: // its owner is above the name, and the alias it makes follows
				to = rr.Hdr.Name
				if !slices.ContainsFunc(slices.Collect(maps.Keys(names)), func(n string) bool { return mdns.IsSubDomain(to, n) }) {
					continue
				}
				names[lower(to)] = true
				continue
			default:
				continue
			}
			if names[lower(rr.Header().Name)] && !names[lower(to)] {
				names[lower(to)], grown = true, true
			}
		}
	}
	m.Answer = slices.DeleteFunc(m.Answer, func(rr mdns.RR) bool { return !names[lower(rr.Header().Name)] })
	m.Ns = slices.DeleteFunc(m.Ns, func(rr mdns.RR) bool {
		return len(m.Answer) > 0 && rr.Header().Rrtype == mdns.TypeNS || rr.Header().Rrtype == mdns.TypeTSIG
	})
}

// mixCase gives each letter of a name a random case. Escapes (\DDD) have none.
func mixCase(name string) string {
	b := []byte(name)
	for i, bits := 0, rand.Uint64(); i < len(b); i++ {
		if i%64 == 63 {
			bits = rand.Uint64()
		}
		if c := b[i] | 0x20; c >= 'a' && c <= 'z' {
			b[i] = c ^ byte(bits>>(i%64)&1)<<5
		}
	}
	return string(b)
}
