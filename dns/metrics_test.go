package dns

import (
	"fmt"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// counted reads a counter, or the count of a histogram, of a Server.
func counted(t *testing.T, s *Server, name string, labels map[string]string) float64 {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(s.Collector())
	fams, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range fams {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.Metric {
			match := true
			for _, l := range m.Label {
				if want, ok := labels[l.GetName()]; ok && want != l.GetValue() {
					match = false
				}
			}
			if match {
				sum += m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

func TestMetricsCountEveryAnswer(t *testing.T) {
	for _, network := range []string{"udp", "tcp"} {
		t.Run(network, func(t *testing.T) {
			good, bad := upstream(t, says("192.0.2.1", 300)), upstream(t, fails(mdns.RcodeServerFailure))
			cfg := by(good)
			s, addr := serving(t, cfg, both)
			s.SetZone(NewZone(sample(), ZoneOptions{}))
			ask(t, addr, network, "web.", mdns.TypeA)
			ask(t, addr, network, "web.", mdns.TypeAAAA)
			ask(t, addr, network, "web.", mdns.TypeMX)
			ask(t, addr, network, "nosuch.app.shoal.", mdns.TypeA)
			ask(t, addr, network, "example.com.", mdns.TypeA)
			ask(t, addr, network, "example.com.", mdns.TypeA)
			ask(t, addr, network, "example.com.", mdns.TypeA, func(m *mdns.Msg) { m.Question[0].Qclass = mdns.ClassCHAOS })
			for _, c := range []struct {
				name   string
				labels map[string]string
				want   float64
			}{
				{"shoal_dns_queries_total", map[string]string{"type": "A", "result": "noerror"}, 3},
				{"shoal_dns_queries_total", map[string]string{"type": "AAAA", "result": "noerror"}, 1},
				{"shoal_dns_queries_total", map[string]string{"type": "other", "result": "noerror"}, 1},
				{"shoal_dns_queries_total", map[string]string{"result": "nxdomain"}, 1},
				{"shoal_dns_queries_total", map[string]string{"result": "refused"}, 1},
				{"shoal_dns_queries_total", nil, 7},
				{"shoal_dns_answer_seconds", map[string]string{"source": "cluster"}, 5},
				{"shoal_dns_answer_seconds", map[string]string{"source": "upstream"}, 1},
				{"shoal_dns_answer_seconds", map[string]string{"source": "cache"}, 1},
				{"shoal_dns_upstream_failures_total", nil, 0},
			} {
				// By UDP an answer is counted after it is sent.
				for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
					got := counted(t, s, c.name, c.labels)
					if got == c.want {
						break
					}
					if time.Now().After(end) {
						t.Errorf("%s%v is %v, want %v", c.name, c.labels, got, c.want)
						break
					}
				}
			}
			failing, addr := serving(t, by(bad), both)
			ask(t, addr, network, "example.com.", mdns.TypeA)
			if got := counted(t, failing, "shoal_dns_upstream_failures_total", map[string]string{"reason": "rcode"}); got < 1 {
				t.Errorf("a resolver that says SERVFAIL is counted %v times", got)
			}
			if problems, err := testutil.CollectAndLint(s.Collector()); err != nil || len(problems) > 0 {
				t.Error(problems, err)
			}
		})
	}
}

// What a task asks makes no series.
func TestMetricsAreBounded(t *testing.T) {
	s, addr := serving(t, by(), both)
	before := testutil.CollectAndCount(s.Collector())
	for i := range uint16(100) {
		ask(t, addr, "udp", fmt.Sprintf("n%d.shoal.", i), 1000+i)
	}
	if after := testutil.CollectAndCount(s.Collector()); after != before {
		t.Errorf("%d series became %d", before, after)
	}
}
