package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"reflect"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
)

// Bounds of what one scrape costs.
const (
	metricsAtOnce  = 3                // scrapes; another is answered with 503
	metricsTimeout = 10 * time.Second // Prometheus' own scrape_timeout
	dropsTimeout   = 5 * time.Second
	// maxNetworkSeries is how many networks have series of their own, as
	// control.MaxServiceSeries has it of services.
	maxNetworkSeries = 1000
)

// Values of labels where no object's name fits; none of them is a name.
const (
	otherNetworks = "(others)"
	noService     = "(none)" // tasks that are of no service
	hostNetwork   = "(host)" // the node's own namespace
)

// metrics are what an agent tells Prometheus. What a member counts is asked of it
// at each scrape, and starts again from 0 in another cluster.
type metrics struct {
	reg      *prometheus.Registry
	passes   *prometheus.CounterVec
	failures *prometheus.CounterVec
	ops      *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	lastPass *prometheus.GaugeVec
}

func newMetrics(a *Agent) *metrics {
	loop := []string{"reconciler"}
	m := &metrics{
		reg:      prometheus.NewRegistry(),
		passes:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "shoal_reconcile_passes_total", Help: "Times that the kernel was compared with what is wanted."}, loop),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "shoal_reconcile_failures_total", Help: "Of these passes, those in which something failed."}, loop),
		ops:      prometheus.NewCounterVec(prometheus.CounterOpts{Name: "shoal_reconcile_operations_total", Help: "Changes made to the kernel."}, loop),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "shoal_reconcile_duration_seconds", Help: "Time that a pass took.",
			Buckets: []float64{.0005, .002, .01, .05, .2, 1, 5, 30}}, loop),
		lastPass: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "shoal_reconcile_last_pass_timestamp_seconds", Help: "When the newest pass ended."}, loop),
	}
	for _, name := range []string{"overlay", "vip", "ingress"} {
		m.passes.WithLabelValues(name)
		m.failures.WithLabelValues(name)
		m.ops.WithLabelValues(name)
	}
	build := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "shoal_build_info", Help: "Always 1; the labels say what runs.",
		ConstLabels: prometheus.Labels{"version": a.cfg.Version, "goversion": goruntime.Version()}}, func() float64 { return 1 })
	m.reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), build,
		m.passes, m.failures, m.ops, m.seconds, m.lastPass, memberCollector{a})
	return m
}

// passed notes a pass of a reconciler.
func (m *metrics) passed(name string, p reconcile.Pass) {
	if m == nil || p.Spared {
		return
	}
	m.passes.WithLabelValues(name).Inc()
	if p.Err != nil {
		m.failures.WithLabelValues(name).Inc()
	}
	m.ops.WithLabelValues(name).Add(float64(p.Ops))
	m.seconds.WithLabelValues(name).Observe(p.Elapsed.Seconds())
	m.lastPass.WithLabelValues(name).SetToCurrentTime()
}

// handler serves what there is to tell. A part that can't be read is left out,
// counted (promhttp_metric_handler_errors_total) and logged.
func (m *metrics) handler(a *Agent) http.Handler {
	return promhttp.HandlerFor(m.reg, promhttp.HandlerOpts{Registry: m.reg, ErrorHandling: promhttp.ContinueOnError,
		ErrorLog: metricsLog{a}, MaxRequestsInFlight: metricsAtOnce, Timeout: metricsTimeout})
}

type metricsLog struct{ a *Agent }

func (l metricsLog) Println(v ...any) {
	l.a.log.Warn("metrics", "error", strings.TrimSpace(fmt.Sprintln(v...)))
}

// seen is what the reconcilers' newest looks at the kernel found.
type seen struct {
	overlay atomic.Pointer[overlay.State]
	vip     atomic.Pointer[vip.State]
	ingress atomic.Pointer[ingress.State]
}

// validateMetricsAddr says what is wrong with a value of --metrics-addr.
func (c Config) validateMetricsAddr() error {
	if c.MetricsAddr == "" {
		return nil
	}
	bad := func(why string) error {
		return fmt.Errorf("--metrics-addr %q: %s: want ADDRESS:PORT, like 127.0.0.1:9947", c.MetricsAddr, why)
	}
	host, port, err := net.SplitHostPort(c.MetricsAddr)
	if err != nil {
		return bad("it has no port, or is no address")
	}
	if host != "" && host != "localhost" {
		if _, err := netip.ParseAddr(host); err != nil {
			return bad(fmt.Sprintf("%q is no IP address", host))
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return bad(fmt.Sprintf("port %q is not a number from 1 to 65535", port))
	}
	for _, p := range []struct {
		flag string
		port int
	}{{"--control-port", c.ControlPort}, {"--gossip-port", c.GossipPort}} {
		if int(n) == p.port {
			return fmt.Errorf("--metrics-addr %q has the port of %s: use another", c.MetricsAddr, p.flag)
		}
	}
	return nil
}

// serveMetrics listens at --metrics-addr until ctx ends. An address that the
// machine does not have yet, as after a boot, is waited for.
func (a *Agent) serveMetrics(ctx context.Context, wg *sync.WaitGroup) error {
	if a.cfg.MetricsAddr == "" {
		return nil
	}
	ln, err := net.Listen("tcp", a.cfg.MetricsAddr)
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("--metrics-addr %s: %w", a.cfg.MetricsAddr, err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET "+peer.MetricsPath, a.metrics.handler(a))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: metricsTimeout, WriteTimeout: 2 * metricsTimeout,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 1 << 14}
	wg.Go(func() {
		if err != nil {
			a.log.Warn("metrics are not served yet; waiting for the address", "address", a.cfg.MetricsAddr, "error", err)
			for err != nil {
				if !sleep.For(ctx, time.Second) {
					return
				}
				ln, err = net.Listen("tcp", a.cfg.MetricsAddr)
			}
		}
		a.log.Info("metrics are served", "address", ln.Addr().String())
		stop := context.AfterFunc(ctx, func() { srv.Close() })
		defer stop()
		if err := srv.Serve(ln); err != nil && ctx.Err() == nil {
			a.log.Error("metrics are no longer served", "error", err)
		}
	})
	return nil
}

// memberCollector tells what the member, if there is one, is like now. It is
// "unchecked" (it describes nothing beforehand): without a member there is little.
type memberCollector struct{ a *Agent }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("shoal_"+name, help, labels, nil)
}

var (
	descNodeInfo = desc("node_info", "Always 1; the labels say which node this is.", "cluster", "id", "node", "role", "data_path")
	descMember   = desc("node_in_cluster", "1: the node is in a cluster, and its agent has started.")
	descTasks    = desc("tasks", "Tasks of this node, by state.", "state")
	descNetworks = desc("networks", "Networks that this node takes part in.")

	descServers  = desc("vip_servers", "Virtual IPs as this node's kernel has them: open ones balance, others refuse.", "state")
	descBackends = desc("vip_backends", "Backends of virtual IPs as this node's kernel has them.", "state")
	descFaults   = desc("vip_faults", "Virtual IPs and networks whose state in the kernel is not as it should be.")
	descTakes    = desc("vip_service_backends", "Backends of a service that take new connections, as this node's kernel has them.", "service", "network")
	descOverlay  = desc("overlay_objects", "Objects of networks in this node's kernel, by kind.", "kind")
	descIngress  = desc("ingress_objects", "Objects of published ports in this node's kernel, by kind.", "kind")
	descFailed   = desc("reconcile_failed_objects", "Kernel objects whose last change failed.", "reconciler")
	descRemarks  = desc("reconcile_remarks", "Things of others in the kernel that are in the way; 'shoal doctor' names them.")

	descDropped      = desc("dropped_packets_total", "Packets that the rules of the data path dropped or refused.", "network", "reason")
	descDroppedBytes = desc("dropped_bytes_total", "Bytes that the rules of the data path dropped or refused.", "network", "reason")

	descRxBytes   = desc("service_receive_bytes_total", "Bytes that a service's tasks on this node have received.", "service")
	descTxBytes   = desc("service_transmit_bytes_total", "Bytes that a service's tasks on this node have sent.", "service")
	descRxPackets = desc("service_receive_packets_total", "Packets that a service's tasks on this node have received.", "service")
	descTxPackets = desc("service_transmit_packets_total", "Packets that a service's tasks on this node have sent.", "service")
	descAccepted  = desc("service_accepted_connections_total", "TCP connections that a service's tasks on this node have accepted.", "service")
	descOpened    = desc("service_opened_connections_total", "TCP connections that a service's tasks on this node have opened.", "service")
	descConns     = desc("service_connections", "TCP connections of a service's tasks on this node now.", "service")

	descHandshakes = desc("peer_handshakes_total", "Connections of nodes accepted.")
	descRefused    = desc("peer_refused_total", "Connections to the control port whose handshake or certificate was no good.")
	descShed       = desc("peer_shed_total", "Connections to the control port that were one too many.")
	descDenied     = desc("peer_denied_total", "Calls that their caller may not make.")
	descTokens     = desc("peer_wrong_tokens_total", "Wrong join tokens.")
	descOpen       = desc("peer_connections", "Connections with other nodes now, both ways.")
	descCertFrom   = desc("certificate_not_before_timestamp_seconds", "When the node's certificate was issued.")
	descCertEnd    = desc("certificate_not_after_timestamp_seconds", "When the node's certificate ends.")
	descNotGiven   = desc("endpoints_not_given", "Endpoints on networks of this node that another node says it has, and the managers say it has not.")
	descDisk       = desc("disk_faults", "Things that the node could not keep on its disk; 'shoal doctor' names them.")
)

// Describe implements prometheus.Collector.
func (memberCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c memberCollector) Collect(ch chan<- prometheus.Metric) {
	m := c.a.current()
	out := emit{ch}
	out.gauge(descMember, is(m != nil))
	if m == nil {
		return
	}
	m.mu.Lock()
	id := *m.ident
	m.mu.Unlock()
	out.gauge(descNodeInfo, 1, id.Cluster.ID, id.NodeID, id.Name, id.Role, m.cfg.VIP.Name())
	m.g.Collector().Collect(ch)
	m.dns.Collector().Collect(ch)
	if mgr := m.fsm.Load(); mgr != nil {
		mgr.Collect(ch)
	}
	m.collectTasks(out)
	m.collectKernel(out)
	m.collectDrops(out)
	st := m.peer.Stats()
	out.counter(descHandshakes, float64(st.Handshakes))
	out.counter(descRefused, float64(st.Refused))
	out.counter(descShed, float64(st.Shed))
	out.counter(descDenied, float64(st.Denied))
	out.counter(descTokens, float64(st.Tokens))
	out.gauge(descOpen, float64(st.Open))
	if info, ok := m.creds.Info(); ok {
		out.gauge(descCertFrom, float64(info.From.Unix()))
		out.gauge(descCertEnd, float64(info.Until.Unix()))
	}
	denied := 0
	for _, n := range m.claims.wrongs() {
		denied += n
	}
	out.gauge(descNotGiven, float64(denied))
	out.gauge(descDisk, float64(len(m.diskFaults())))
}

// emit sends metrics.
type emit struct{ ch chan<- prometheus.Metric }

func (e emit) gauge(d *prometheus.Desc, v float64, labels ...string) {
	e.ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func (e emit) counter(d *prometheus.Desc, v float64, labels ...string) {
	e.ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
}

func is(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// collectKernel tells what the reconcilers found when they last looked.
func (m *member) collectKernel(out emit) {
	v := m.view.Load()
	if v != nil {
		out.gauge(descNetworks, float64(len(v.Networks)))
	}
	if s := m.seen.vip.Load(); s != nil {
		collectVIPs(out, v, *s)
	}
	kinds := func(d *prometheus.Desc, each func(func(any))) {
		n := map[string]int{}
		each(func(o any) { n[strings.ToLower(reflect.TypeOf(o).Name())]++ }) // the types of a package: a closed list
		for kind, count := range n {
			out.gauge(d, float64(count), kind)
		}
	}
	if s := m.seen.overlay.Load(); s != nil {
		kinds(descOverlay, func(fn func(any)) { s.Each(func(o overlay.Object) { fn(o) }) })
	}
	if s := m.seen.ingress.Load(); s != nil {
		kinds(descIngress, func(fn func(any)) { s.Each(func(o ingress.Object) { fn(o) }) })
	}
	out.gauge(descFailed, float64(len(m.overlay.Failed())), "overlay")
	out.gauge(descFailed, float64(len(m.vip.Failed())), "vip")
	out.gauge(descFailed, float64(len(m.ingress.Failed())), "ingress")
	out.gauge(descRemarks, float64(len(m.overlay.Remarks())))
}

// collectVIPs tells of virtual servers; v names the services they are of.
func collectVIPs(out emit, v *spec.View, s vip.State) {
	type on struct {
		network string
		vip     netip.Addr
	}
	names := map[on]string{}
	networks := map[string]string{}
	if v != nil {
		for _, n := range v.Networks {
			networks[n.ID] = n.Name
		}
		for _, svc := range v.Services {
			for _, a := range svc.VIPs {
				for _, ip := range a.Addrs {
					names[on{a.Network, ip}] = svc.Spec.Name
				}
			}
		}
	}
	type key struct{ service, network string }
	open, refusing, active, draining, faults := 0, 0, 0, 0, 0
	by := map[key]int{}
	for _, n := range s.Networks {
		faults += int(is(n.Fault != ""))
		for _, srv := range n.Servers {
			if faults += int(is(srv.Fault != "")); srv.Open {
				open++
			} else {
				refusing++
			}
			takes := len(srv.Takes())
			active, draining = active+takes, draining+len(srv.Drains())
			// A service whose view has gone is on its way out of the kernel, too. One with
			// an address of each family has the same backends at both: the more is told.
			if name, ok := names[on{n.ID, srv.VIP}]; ok {
				k := key{name, networks[n.ID]}
				by[k] = max(by[k], takes)
			}
		}
	}
	out.gauge(descServers, float64(open), "open")
	out.gauge(descServers, float64(refusing), "refusing")
	out.gauge(descBackends, float64(active), "active")
	out.gauge(descBackends, float64(draining), "draining")
	out.gauge(descFaults, float64(faults))
	keys := make([]key, 0, len(by))
	for k := range by {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int {
		if c := strings.Compare(a.service, b.service); c != 0 {
			return c
		}
		return strings.Compare(a.network, b.network)
	})
	others := 0
	for i, k := range keys {
		if i < control.MaxServiceSeries {
			out.gauge(descTakes, float64(by[k]), k.service, k.network)
		} else {
			others += by[k]
		}
	}
	if len(keys) > control.MaxServiceSeries {
		out.gauge(descTakes, float64(others), control.OtherServices, "")
	}
}

// collectDrops tells what the rules dropped.
func (m *member) collectDrops(out emit) {
	by, err := m.drops(m.ctx)
	if err != nil && m.ctx.Err() == nil {
		out.ch <- prometheus.NewInvalidMetric(descDropped, err)
	}
	for k, x := range by {
		out.counter(descDropped, float64(x.Packets), k.network, k.reason)
		out.counter(descDroppedBytes, float64(x.Bytes), k.network, k.reason)
	}
}

// dropKey is what drops are counted by.
type dropKey struct{ network, reason string } // names

// drops are what the rules of this node have dropped.
func (m *member) drops(ctx context.Context) (map[dropKey]overlay.Drop, error) {
	if m.cfg.Drops == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, dropsTimeout)
	defer cancel()
	drops, err := m.cfg.Drops(ctx)
	if err != nil {
		return nil, fmt.Errorf("the rules' counters can't be read: %w", err)
	}
	networks := map[string]string{"": hostNetwork}
	if v := m.view.Load(); v != nil {
		for i, n := range v.Networks {
			name := n.Name
			if i >= maxNetworkSeries {
				name = otherNetworks
			}
			networks[spec.OverlayNetns(m.cfg.Instance, n)] = name
		}
	}
	by := map[dropKey]overlay.Drop{}
	for _, d := range drops {
		name, ok := networks[d.Netns]
		if !ok {
			continue // of a network that goes
		}
		k := dropKey{name, d.Reason}
		x := by[k]
		x.Packets, x.Bytes = x.Packets+d.Packets, x.Bytes+d.Bytes
		by[k] = x
	}
	return by, nil
}

// flow is what a task, or all of a service's here, has sent and received.
type flow struct {
	rxBytes, txBytes, rxPackets, txPackets, accepted, opened float64
	now                                                      float64 // connections
}

// flows adds up what the tasks of each service have sent and received, also those
// that have ended. What a task does between the last scrape and its end is lost.
type flows struct {
	mu    sync.Mutex
	last  map[string]flow // by task ID
	total map[string]flow // by label
}

// taskFlow is a task's counters, and the label that it counts for.
type taskFlow struct {
	task, label string
	flow
}

// add takes the counters of all tasks that run, and returns the sums. A service
// without a task here is forgotten: its next one starts from 0 again, which
// Prometheus knows as a reset.
func (f *flows) add(tasks []taskFlow) map[string]flow {
	f.mu.Lock()
	defer f.mu.Unlock()
	last, total := map[string]flow{}, map[string]flow{}
	for _, t := range tasks {
		sum, ok := total[t.label]
		if !ok {
			sum = f.total[t.label]
			sum.now = 0
		}
		was := f.last[t.task]
		grow := func(to *float64, was, is float64) {
			if is < was { // a new namespace
				was = 0
			}
			*to += is - was
		}
		grow(&sum.rxBytes, was.rxBytes, t.rxBytes)
		grow(&sum.txBytes, was.txBytes, t.txBytes)
		grow(&sum.rxPackets, was.rxPackets, t.rxPackets)
		grow(&sum.txPackets, was.txPackets, t.txPackets)
		grow(&sum.accepted, was.accepted, t.accepted)
		grow(&sum.opened, was.opened, t.opened)
		sum.now += t.now
		total[t.label] = sum
		last[t.task] = t.flow
	}
	f.last, f.total = last, total
	return total
}

// collectTasks tells of this node's tasks, and of their traffic.
func (m *member) collectTasks(out emit) {
	states := map[string]int{}
	for _, s := range spec.TaskStates() {
		states[s] = 0
	}
	services := map[string]string{}
	m.mu.Lock()
	if m.assigned != nil {
		for _, s := range m.assigned.Services {
			services[s.ID] = s.Spec.Name
		}
	}
	m.mu.Unlock()
	var tasks []taskFlow
	names := map[string]bool{}
	for id, st := range m.tasks.statuses() {
		states[st.State.String()]++
		t, _, ok := m.tasks.find(id)
		if !ok || st.PID == 0 || st.State.Ended() {
			continue
		}
		fl, err := readFlow(st.PID)
		if err != nil {
			continue // it has just ended
		}
		label := noService
		if t.Service != "" {
			if label = services[t.Service]; label == "" {
				continue // it goes with its service
			}
			names[label] = true
		}
		tasks = append(tasks, taskFlow{id, label, fl})
	}
	if len(names) > control.MaxServiceSeries {
		sorted := make([]string, 0, len(names))
		for n := range names {
			sorted = append(sorted, n)
		}
		slices.Sort(sorted)
		for _, n := range sorted[control.MaxServiceSeries:] {
			delete(names, n)
		}
		for i := range tasks {
			if l := tasks[i].label; l != noService && !names[l] {
				tasks[i].label = control.OtherServices
			}
		}
	}
	for s, n := range states {
		out.gauge(descTasks, float64(n), s)
	}
	for label, fl := range m.flows.add(tasks) {
		out.counter(descRxBytes, fl.rxBytes, label)
		out.counter(descTxBytes, fl.txBytes, label)
		out.counter(descRxPackets, fl.rxPackets, label)
		out.counter(descTxPackets, fl.txPackets, label)
		out.counter(descAccepted, fl.accepted, label)
		out.counter(descOpened, fl.opened, label)
		out.gauge(descConns, fl.now, label)
	}
}

// readFlow reads the counters of the network namespace of a process: readLinks, and
// /proc/PID/net/snmp in proc(5), whose cost does not grow with connections.
func readFlow(pid int) (flow, error) {
	l, err := readLinks(pid)
	if err != nil {
		return flow{}, err
	}
	fl := flow{rxBytes: float64(l.rxBytes), rxPackets: float64(l.rxPackets), txBytes: float64(l.txBytes), txPackets: float64(l.txPackets)}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/snmp", pid))
	if err != nil {
		return fl, err
	}
	// A line of names, and one of values (RFC 4022's tcpActiveOpens, …).
	var names []string
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) == 0 || f[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i, v := range f {
			to := map[string]*float64{"PassiveOpens": &fl.accepted, "ActiveOpens": &fl.opened, "CurrEstab": &fl.now}[names[min(i, len(names)-1)]]
			if to == nil {
				continue
			}
			if *to, err = strconv.ParseFloat(v, 64); err != nil {
				return fl, fmt.Errorf("/proc/%d/net/snmp: %w", pid, err)
			}
		}
	}
	return fl, nil
}
