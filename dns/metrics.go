package dns

import (
	"encoding/binary"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

// Where an answer came from: the label "source".
const (
	fromCluster  = iota // the Zone, or what the server itself has to say
	fromCache           // what a resolver said before
	fromUpstream        // a resolver, now
	fromStale           // what a resolver said before, after its time
	sources
)

var sourceNames = [sources]string{"cluster", "cache", "upstream", "stale"}

// What was asked for, and how it ended: the labels "type" and "result". Both are
// closed lists, so that no task can make series.
var (
	typeNames   = [...]string{"A", "AAAA", "PTR", "SRV", "other"}
	resultNames = [...]string{"noerror", "formerr", "servfail", "nxdomain", "notimp", "refused", "other"}
)

// Why a resolver's answer did not come: the label "reason".
const (
	upstreamTimeout = iota // it had its time, or another was faster after it had
	upstreamError          // it can't be reached, or what it says is no answer
	upstreamRcode          // SERVFAIL, REFUSED and their like
	upstreamLocal          // a want of this machine's, such as of sockets
	upstreamReasons
)

var upstreamReasonNames = [upstreamReasons]string{"timeout", "error", "rcode", "local"}

// metrics are made once for a Server; what is counted for each question is looked
// up in arrays.
type metrics struct {
	queries  [len(typeNames)][len(resultNames)]prometheus.Counter
	seconds  [sources]prometheus.Observer
	dropped  prometheus.Counter
	failures [upstreamReasons]prometheus.Counter
	all      []prometheus.Collector
}

func newMetrics(s *Server) *metrics {
	m := &metrics{}
	queries := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "shoal_dns_queries_total", Help: "Questions of tasks answered, by type and result."}, []string{"type", "result"})
	for i, t := range typeNames {
		for j, r := range resultNames {
			m.queries[i][j] = queries.WithLabelValues(t, r)
		}
	}
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "shoal_dns_answer_seconds", Help: "Time from a question to its answer, by where the answer came from.",
		// From what the zone takes to forwardTimeout.
		Buckets: []float64{.00001, .0001, .001, .005, .02, .1, .5, 2, 5}}, []string{"source"})
	for i, s := range sourceNames {
		m.seconds[i] = seconds.WithLabelValues(s)
	}
	failures := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "shoal_dns_upstream_failures_total", Help: "Questions that a resolver outside did not answer well, by reason."}, []string{"reason"})
	for i, r := range upstreamReasonNames {
		m.failures[i] = failures.WithLabelValues(r)
	}
	m.dropped = prometheus.NewCounter(prometheus.CounterOpts{Name: "shoal_dns_dropped_total", Help: "Packets of tasks that were no question, and not answered."})
	m.all = []prometheus.Collector{queries, seconds, failures, m.dropped,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "shoal_dns_forwarding", Help: "Questions being forwarded now."}, func() float64 { return float64(s.forwards.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "shoal_dns_cached_answers", Help: "Answers of resolvers that are kept."}, func() float64 { return float64(s.forward.cache.Len()) }),
	}
	return m
}

// Collector exports the Server's counters as shoal_dns_… metrics.
func (s *Server) Collector() prometheus.Collector { return s.metrics }

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.all {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.all {
		c.Collect(ch)
	}
}

// answered counts an answer.
func (m *metrics) answered(qtype uint16, rcode, source int, start time.Time) {
	t, r := len(typeNames)-1, len(resultNames)-1
	switch qtype {
	case mdns.TypeA:
		t = 0
	case mdns.TypeAAAA:
		t = 1
	case mdns.TypePTR:
		t = 2
	case mdns.TypeSRV:
		t = 3
	}
	if rcode >= 0 && rcode < r { // RFC 1035 section 4.1.1 numbers them in resultNames' order
		r = rcode
	}
	m.queries[t][r].Inc()
	m.seconds[source].Observe(time.Since(start).Seconds())
}

// quick counts an answer of [Zone.quick], which has the question's type where the
// question in has it.
func (m *metrics) quick(in, out []byte, start time.Time) {
	off := headerLen
	for off < len(in) && in[off] != 0 {
		off += 1 + int(in[off])
	}
	if off+3 > len(in) {
		return // no answer of quick's
	}
	m.answered(binary.BigEndian.Uint16(in[off+1:]), int(out[3]&0xf), fromCluster, start)
}

// replied counts an answer that is a message; nil is none.
func (m *metrics) replied(resp *mdns.Msg, source int, start time.Time) {
	if resp == nil {
		return
	}
	qtype := uint16(mdns.TypeNone)
	if len(resp.Question) == 1 {
		qtype = resp.Question[0].Qtype
	}
	m.answered(qtype, resp.Rcode, source, start)
}
