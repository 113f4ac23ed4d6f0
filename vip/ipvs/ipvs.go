// Package ipvs is the VIP data path of the kernel's IP Virtual Server, with a
// small nftables table of our own beside it.
//
// What it keeps in each overlay namespace, per address family:
//
//	IPVS   FWM 0x10000002 rr                   one service per VIP, by firewall mark,
//	         -> 10.0.1.10:0 Masq 1             so that any port and protocol is balanced
//	table ip shoal-vip {
//	  map marks  { type ipv4_addr : mark       ; elements = { 10.0.1.2 : 0x10000002 } }
//	  set served { type ipv4_addr              ; elements = { 10.0.1.2 } }
//	  map self   { type ipv4_addr . ipv4_addr : ipv4_addr ; elements = { 10.0.1.10 . 10.0.1.10 : 169.254.1.1 } }
//	  map back   { type ipv4_addr : ipv4_addr  ; elements = { 10.0.1.10 : 10.0.1.10 } }
//	  chain prerouting { type filter hook prerouting priority mangle;
//	    ip daddr 169.254.1.1 meta l4proto { tcp, udp, sctp } ip daddr set ip saddr map @back
//	    ip daddr @served jump to-vip
//	    meta l4proto { tcp, udp, sctp } meta mark set ip daddr map @marks }
//	  chain postrouting { type filter hook postrouting priority srcnat;
//	    meta l4proto { tcp, udp, sctp } ip saddr set ip saddr . ip daddr map @self
//	    ip saddr @served jump from-vip }
//	}
//
// No rule depends on a service; adding one is an element and an IPVS service.
//
// # Opening, draining, closing
//
// A VIP's element in map marks is what lets new connections in. It is there
// while a backend has weight 1. IPVS finds the connections it knows without
// looking at the mark, so when only draining backends are left the element
// goes: their connections continue, while new ones reach the local TCP stack,
// which refuses them at once. (Leaving the element would refuse them as well,
// but log "no destination available" for each.)
//
// With vs.expire_nodest_conn a connection whose backend was deleted is reset at
// its next packet, and a UDP flow moves to another backend.
//
// # Hairpin
//
// A backend that is balanced to itself would get packets from its own address,
// which its kernel drops. The maps self and back swap the address to
// 169.254.1.1 and back, without connection tracking.
//
// # One source port, used both directly and by the VIP
//
// IPVS keeps the client's source port and tells replies apart by (client, port,
// backend, port) alone. If a client uses one port for a connection to
// backend:80 and for another to VIP:80, the server sees one connection where
// there are two, and IPVS rewrites the replies of both. Linux picks source
// ports per destination, so this happens by chance, ever more often the more
// connections to the VIP there were in the last two minutes (IPVS's TIME_WAIT).
// Without what follows, measured with 6.1: the direct connection hangs as soon
// as the one by the VIP is opened; opened second, it can't be opened at all,
// also when the first one has ended; and what is asked directly over UDP is
// answered by the VIP.
//
// Connection tracking can't close this: translation back of a reply happens in
// prerouting, before IPVS looks, so at that point both look alike again, and
// vs.conntrack=1 changes nothing about it. What does close it is that IPVS
// itself never sees a port that direct connections use: chains to-vip and
// from-vip flip the upper four bits of the client's port in packets to a VIP
// and from a VIP (and in the packets quoted by ICMP errors, or PMTU discovery
// and "port unreachable" would break). The ephemeral ports 32768-60999
// (ip_local_port_range, ip(7)) become 4096-32767, which is disjoint. It is a
// bijection and its own inverse: no state, nothing to run out of, and two
// clients or connections that were distinct stay so. Ports with upper bits 0000
// or 1111 are left alone, so that no client seems to use port 0 or a privileged
// one. What remains: a client that itself picks a port outside of the ephemeral
// range: below, another connection of its own may have the image; with upper
// bits 0000 or 1111, the image is the port itself. SCTP is not flipped: Linux
// gives a port to no two SCTP sockets at a time (sctp_get_port_local), so nothing
// collides by chance, and rewriting its checksum takes Linux 5.10.
//
// # moby/ipvs
//
// It is wrapped here and shows nowhere else: a Handle isn't safe for
// concurrent use and its socket keeps a namespace alive, so each operation
// opens one and closes it; its way to ask for one service takes any error for
// absence, so it isn't used; if the IPVS module can't be loaded when it is
// first used, it never tries again, so [Probe] looks before.
//
// Listing backends takes a netlink dump per service. /proc/net/ip_vs has all in
// one read, but leaves services out where it goes from one page to the next
// when other namespaces have services too (ip_vs_info_seq_next walks those of
// all namespaces, ip_vs_info_array counts those of one; seen with 6.1). What it
// does list is right. So the services are listed by netlink, one dump, and the
// backends are taken from /proc, or by a dump of their own for the few
// services that /proc left out.
package ipvs

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/vip"
	"github.com/shoalnet/shoal/vip/internal/kern"
)

const scheduler = "rr"

// procFile lists IPVS services and backends of a namespace. Not /proc/net,
// which is that of the process's first thread.
const procFile = "/proc/thread-self/net/ip_vs"

// timeouts of idle connections. IPVS's own default for TCP is 900 s. The others
// are IPVS's defaults, written to be independent of it; for UDP see
// [kern.MinIdle]. SCTP's are built in (900 s established), and enough: its
// heartbeat comes every 30 s (RFC 9260, section 16). moby/ipvs takes whole
// seconds.
var timeouts = ipvs.Config{TimeoutTCP: kern.MinIdle * time.Second, TimeoutTCPFin: 120 * time.Second, TimeoutUDP: 300 * time.Second}

// sysctls of every overlay namespace (kernel: Documentation/networking/ipvs-sysctl.rst).
var sysctls = []struct{ key, value string }{
	{"net.ipv4.vs.expire_nodest_conn", "1"},
	{"net.ipv4.vs.expire_quiescent_template", "1"},
	{"net.ipv4.vs.conntrack", "0"},
}

// Config of a Dataplane. The zero value is ready.
type Config struct {
	Log *slog.Logger // nil: slog.Default
}

// Dataplane implements vip.Dataplane. It holds no state and no sockets, so
// that a namespace can go at any time.
type Dataplane struct {
	log *slog.Logger
}

var _ vip.Dataplane = (*Dataplane)(nil)

// New makes a Dataplane. Whether the kernel can do it is told by [Probe].
func New(cfg Config) *Dataplane {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Dataplane{log: cfg.Log}
}

// Name implements vip.Dataplane.
func (*Dataplane) Name() string { return "ipvs" }

// Observe implements vip.Dataplane.
func (d *Dataplane) Observe(ctx context.Context, want vip.State) (vip.State, error) {
	var out vip.State
	for _, w := range want.Networks {
		if err := ctx.Err(); err != nil {
			return out, err
		}
		h := vip.Network{ID: w.ID, Name: w.Name, Namespace: w.Namespace, Subnets: w.Subnets, Gateways: w.Gateways}
		err := nl.Do(w.Namespace, func() error { return observe(w, &h) })
		switch {
		case isNoNamespace(w, err):
			h = vip.Network{ID: w.ID, Name: w.Name, Namespace: w.Namespace, Absent: true}
		case err != nil:
			return out, fmt.Errorf("network %s: %w", w.Name, err)
		}
		out.Networks = append(out.Networks, h)
	}
	return out, nil
}

// isNoNamespace tells a missing namespace from a missing file inside of it.
func isNoNamespace(n vip.Network, err error) bool {
	if !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	h, err := nl.Open(n.Namespace)
	if err == nil {
		h.Close()
	}
	return errors.Is(err, fs.ErrNotExist)
}

// server gathers what is found of one VIP.
type server struct {
	vip.Server
	served, service bool
}

func markOf(n vip.Network, a netip.Addr) uint32 {
	m, _ := n.MarkOf(a)
	return m
}

func observe(w vip.Network, h *vip.Network) error {
	found := map[netip.Addr]*server{}
	get := func(a netip.Addr) *server {
		s := found[a]
		if s == nil {
			s = &server{Server: vip.Server{VIP: a, Mark: markOf(w, a)}}
			found[a] = s
		}
		return s
	}
	as, err := kern.Addrs(w)
	if err != nil {
		return err
	}
	for a := range as {
		get(a).Addressed = true
	}
	svcs, err := services(func(mark uint32) bool { _, ok := w.VIPOf(mark); return ok })
	if err != nil {
		return err
	}
	for _, s := range svcs {
		a, _ := w.VIPOf(s.mark)
		if a.Is4() != (s.family == unix.AF_INET) {
			continue // a stranger's: no VIP of ours has this mark in this family
		}
		x := get(a)
		x.service = true
		if s.fault != "" {
			x.Fault = s.fault
		}
		for _, b := range s.dests {
			if b.port != 0 || b.forward != "Masq" || b.weight > 1 || b.addr.Is4() != a.Is4() {
				x.Fault = fmt.Sprintf("its IPVS backend %s:%d %s has weight %d", b.addr, b.port, b.forward, b.weight)
				continue
			}
			x.Backends = append(x.Backends, vip.Backend{Addr: b.addr, Weight: b.weight})
		}
	}
	if f := settingsFault(); f != "" {
		h.Fault = f
	}
	if f := kern.ICMPFault(w); f != "" {
		h.Fault = f
	}
	// Connections to a VIP are not tracked, but those beside it are.
	if f := kern.IdleFault(); f != "" {
		h.Fault = f
	}
	for _, f := range kern.Families(w) {
		if err := observeFamily(w, f, h, get); err != nil {
			return err
		}
	}
	for _, s := range found {
		slices.SortFunc(s.Backends, func(a, b vip.Backend) int { return a.Addr.Compare(b.Addr) })
		switch {
		case s.Fault != "":
		case !s.Addressed:
			s.Fault = "its address is missing on lo"
		case !s.service:
			s.Fault = "its IPVS service is missing"
		case !s.served:
			s.Fault = "its element in set served is missing"
		}
		h.Servers = append(h.Servers, s.Server)
	}
	slices.SortFunc(h.Servers, func(a, b vip.Server) int { return a.VIP.Compare(b.VIP) })
	slices.SortFunc(h.Locals, netip.Addr.Compare)
	return nil
}

func settingsFault() string {
	for _, s := range sysctls {
		v, err := nl.Sysctl(s.key)
		if errors.Is(err, fs.ErrNotExist) && s.value == "0" {
			continue // vs.conntrack: a kernel without CONFIG_IP_VS_NFCT
		}
		if err != nil {
			return err.Error()
		}
		if v != s.value {
			return "sysctl " + s.key + " is " + v
		}
	}
	h, err := ipvs.New("")
	if err != nil {
		return fmt.Sprintf("IPVS netlink: %v", err)
	}
	defer h.Close()
	c, err := h.GetConfig()
	if err != nil {
		return fmt.Sprintf("read IPVS timeouts: %v", err)
	}
	if *c != timeouts {
		return fmt.Sprintf("IPVS timeouts are tcp %s, tcpfin %s, udp %s", c.TimeoutTCP, c.TimeoutTCPFin, c.TimeoutUDP)
	}
	return ""
}

func observeFamily(w vip.Network, f kern.Family, h *vip.Network, get func(netip.Addr) *server) error {
	chains, err := kern.Chains(f)
	if err != nil {
		return err
	}
	for _, c := range form(w, f) {
		if !chains[c.base.Name].Is(c.base, c.comments()...) {
			h.Fault = "table " + kern.Table + " is missing or was changed"
		}
	}
	if len(chains) == 0 {
		return nil
	}
	fault, err := kern.TableFault(f, chains, ours(form(w, f)))
	if err != nil {
		return err
	}
	if fault != "" {
		h.Fault = fault
	}
	sets := map[string][]kern.Elem{}
	for _, name := range []string{mapMarks, setServed, mapSelf, mapBack} {
		es, err := kern.Elems(f, name)
		if errors.Is(err, kern.ErrNoSet) {
			h.Fault = "set " + name + " of table " + kern.Table + " is missing"
			continue
		}
		if err != nil {
			return err
		}
		sets[name] = es
	}
	for _, e := range sets[mapMarks] {
		a, ok := netip.AddrFromSlice(e.Key)
		if !ok || len(e.Val) != 4 {
			continue
		}
		s := get(a)
		s.Open = true
		if m := binary.NativeEndian.Uint32(e.Val); m != s.Mark {
			s.Fault = fmt.Sprintf("its mark is %#x", m)
		}
	}
	for _, e := range sets[setServed] {
		if a, ok := netip.AddrFromSlice(e.Key); ok {
			get(a).served = true
		}
	}
	// An endpoint is local when both maps have it, right.
	as, _ := kern.Hairpin(w, f)
	back := map[netip.Addr]bool{}
	for _, e := range sets[mapBack] {
		a, ok := netip.AddrFromSlice(e.Key)
		if b, ok2 := netip.AddrFromSlice(e.Val); ok && ok2 {
			back[a] = a == b
		}
	}
	for _, e := range sets[mapSelf] {
		if len(e.Key) != int(2*f.Len) {
			continue
		}
		a, _ := netip.AddrFromSlice(e.Key[:f.Len])
		b, _ := netip.AddrFromSlice(e.Key[f.Len:])
		v, _ := netip.AddrFromSlice(e.Val)
		if a != b || v != as || !back[a] {
			h.Fault = "hairpin maps are damaged"
			continue
		}
		delete(back, a)
		h.Locals = append(h.Locals, a)
	}
	if len(back) > 0 {
		h.Fault = "hairpin maps are damaged"
	}
	return nil
}

// service is one IPVS service by firewall mark.
type service struct {
	mark   uint32
	family uint16
	fault  string // what is not as we make it
	dests  []dest
}

type dest struct {
	addr    netip.Addr
	port    uint16
	forward string
	weight  int
}

// svcHashed is IP_VS_SVC_F_HASHED (linux/ip_vs.h), which the kernel sets itself.
const svcHashed = 2

// services reads the services of the thread's namespace whose mark is ours.
func services(ours func(mark uint32) bool) ([]service, error) {
	h, err := ipvs.New("")
	if err != nil {
		return nil, fmt.Errorf("IPVS netlink: %w", err)
	}
	defer h.Close()
	list, err := nl.Dump(h.GetServices)
	if err != nil {
		return nil, fmt.Errorf("list IPVS services: %w", err)
	}
	list = slices.DeleteFunc(list, func(s *ipvs.Service) bool { return s.FWMark == 0 || !ours(s.FWMark) })
	if len(list) == 0 {
		return nil, nil
	}
	quick, err := procDests()
	if err != nil {
		return nil, err
	}
	// The file tells two services apart that share a mark (of two families)
	// only by their backends.
	uses := map[uint32]int{}
	for _, s := range list {
		uses[s.FWMark]++
	}
	var out []service
	for _, s := range list {
		x := service{mark: s.FWMark, family: s.AddressFamily}
		if s.SchedName != scheduler || s.Flags&^svcHashed != 0 {
			x.fault = fmt.Sprintf("its IPVS service has scheduler %s and flags %#x", s.SchedName, s.Flags)
		}
		ds, ok := quick[s.FWMark]
		if !ok || uses[s.FWMark] > 1 {
			if ds, err = netlinkDests(h, s); err != nil {
				return nil, err
			}
		}
		x.dests = ds
		out = append(out, x)
	}
	return out, nil
}

func netlinkDests(h *ipvs.Handle, s *ipvs.Service) ([]dest, error) {
	list, err := nl.Dump(func() ([]*ipvs.Destination, error) { return h.GetDestinations(s) })
	if err != nil {
		return nil, fmt.Errorf("list backends of IPVS service %#x: %w", s.FWMark, err)
	}
	var out []dest
	for _, d := range list {
		a, _ := netip.AddrFromSlice(d.Address)
		x := dest{addr: a, port: d.Port, forward: "Masq", weight: d.Weight}
		if m := d.ConnectionFlags & ipvs.ConnectionFlagFwdMask; m != ipvs.ConnectionFlagMasq {
			x.forward = fmt.Sprintf("method %d", m)
		}
		out = append(out, x)
	}
	return out, nil
}

// procDests reads the backends of those services by mark that the file lists.
func procDests() (map[uint32][]dest, error) {
	f, err := os.Open(procFile)
	if err != nil {
		return nil, fmt.Errorf("read IPVS backends: %w", err)
	}
	defer f.Close()
	return parseProc(f)
}

func parseProc(r io.Reader) (map[uint32][]dest, error) {
	out := map[uint32][]dest{}
	var mark uint32
	cur := false // whether mark is that of the last service
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		w := strings.Fields(sc.Text())
		switch {
		case len(w) >= 3 && w[0] == "FWM":
			m, err := strconv.ParseUint(w[1], 16, 32)
			if err != nil {
				return nil, fmt.Errorf("read IPVS backends: line %q: %w", sc.Text(), err)
			}
			mark, cur = uint32(m), true
			out[mark] = nil // again, if it is listed twice
		case len(w) >= 4 && w[0] == "->" && cur:
			d, err := parseDest(w)
			if err != nil {
				return nil, fmt.Errorf("read IPVS backends: line %q: %w", sc.Text(), err)
			}
			out[mark] = append(out[mark], d)
		case len(w) > 0 && w[0] == "->": // of the header, or of a service by address
		default:
			cur = false
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read IPVS backends: %w", err)
	}
	return out, nil
}

// parseDest reads "-> 0A000101:0050 Masq 1 0 0" or
// "-> [fd00:0000:…]:0050 Masq 1 0 0" (ip_vs_info_seq_show).
func parseDest(w []string) (dest, error) {
	var d dest
	i := strings.LastIndexByte(w[1], ':')
	if i < 0 {
		return d, fmt.Errorf("no port in %q", w[1])
	}
	host, port := w[1][:i], w[1][i+1:]
	p, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return d, err
	}
	if h, ok := strings.CutPrefix(host, "["); ok {
		d.addr, err = netip.ParseAddr(strings.TrimSuffix(h, "]"))
	} else {
		var b []byte
		b, err = hex.DecodeString(host)
		if a, ok := netip.AddrFromSlice(b); ok {
			d.addr = a
		} else if err == nil {
			err = fmt.Errorf("no address in %q", w[1])
		}
	}
	if err != nil {
		return d, err
	}
	d.port, d.forward = uint16(p), w[2]
	d.weight, err = strconv.Atoi(w[3])
	return d, err
}

// Apply implements vip.Dataplane.
func (d *Dataplane) Apply(ctx context.Context, op reconcile.Op) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	switch op := op.(type) {
	case vip.SetNetwork:
		err := nl.Do(op.Want.Namespace, func() error { return d.setNetwork(op.Want) })
		if isNoNamespace(op.Want, err) {
			return vip.NamespaceError(op.Want, err)
		}
		return err
	case vip.SetServer, vip.DelServer:
		return d.ApplyAll(ctx, []reconcile.Op{op})[0]
	}
	return fmt.Errorf("%s: unknown operation %T", op.Object(), op)
}

func (d *Dataplane) setNetwork(n vip.Network) error {
	for _, f := range kern.Families(n) {
		err := kern.WriteBase(d.log, n, func(over kern.Over) error { return setBase(n, f, over) })
		if err != nil {
			return fmt.Errorf("network %s: %w", n.Name, err)
		}
	}
	if err := errors.Join(settings(), kern.SetICMP(n)); err != nil {
		return fmt.Errorf("network %s: %w", n.Name, err)
	}
	hdr := n
	hdr.Servers = nil
	var ops []vip.SetServer
	for _, s := range n.Servers {
		ops = append(ops, vip.SetServer{Network: hdr, Want: s, Have: vip.Server{VIP: s.VIP}})
	}
	return errors.Join(setServers(ops)...)
}

// ApplyAll implements reconcile.Batcher: servers of one network share nftables
// transactions.
func (d *Dataplane) ApplyAll(ctx context.Context, ops []reconcile.Op) []error {
	return kern.Batch(ctx, ops, d.Apply, setServers, func(ops []vip.DelServer) []error {
		errs := make([]error, len(ops))
		for i, op := range ops {
			errs[i] = delServer(op)
		}
		return errs
	})
}

func settings() error {
	for _, s := range sysctls {
		if err := nl.SetSysctl(s.key, s.value); err != nil && !(errors.Is(err, fs.ErrNotExist) && s.value == "0") {
			return err
		}
	}
	if err := kern.SetIdle(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	h, err := ipvs.New("")
	if err != nil {
		return fmt.Errorf("IPVS netlink: %w", err)
	}
	defer h.Close()
	c := timeouts
	if err := h.SetConfig(&c); err != nil {
		return fmt.Errorf("set IPVS timeouts: %w", err)
	}
	return nil
}

func ipvsService(f kern.Family, mark uint32) *ipvs.Service {
	s := &ipvs.Service{FWMark: mark, AddressFamily: uint16(f.AF), SchedName: scheduler, Netmask: 0xffffffff}
	if f.V6 {
		s.Netmask = 128 // a prefix length for IPv6 (ip_vs_genl_parse_service)
	}
	return s
}

func ipvsDest(f kern.Family, a netip.Addr, weight int) *ipvs.Destination {
	return &ipvs.Destination{Address: net.IP(a.AsSlice()), AddressFamily: uint16(f.AF), Weight: weight,
		ConnectionFlags: ipvs.ConnectionFlagMasq}
}

// setServers makes VIPs of one network as wanted, and returns an error for each.
func setServers(ops []vip.SetServer) []error { return kern.Chunks(ops, setSome) }

// setSome makes VIPs as wanted. The order lets no connection fail: what
// closes goes out of the map first; address, service and backends are there
// before the map sends anyone; the backends that leave are deleted last.
func setSome(ops []vip.SetServer) error {
	name := fmt.Sprintf("network %s: %d vips", ops[0].Network.Name, len(ops))
	if len(ops) == 1 {
		name = ops[0].Object()
	}
	fail := func(err error) error { return fmt.Errorf("%s: %w", name, err) }
	h, err := ipvs.New("")
	if err != nil {
		return fail(fmt.Errorf("IPVS netlink: %w", err))
	}
	defer h.Close()

	if err := errors.Join(kern.AddAddrs(ops)...); err != nil {
		return fail(err)
	}
	for _, f := range kern.Families(ops[0].Network) {
		before, after := kern.Begin(f), kern.Begin(f)
		var mine []vip.SetServer
		for _, op := range ops {
			if op.Want.VIP.Is4() == f.V6 {
				continue
			}
			mine = append(mine, op)
			key := op.Want.VIP.AsSlice()
			if op.Have.Fault != "" || len(op.Have.Backends) == 0 {
				before.Add(before.Ref(setServed), []nftables.SetElement{{Key: key}})
			}
			open := len(op.Want.Takes()) > 0
			if open && op.Have.Open && op.Have.Fault == "" {
				continue // the element is there
			}
			// An element with another mark can't be overwritten.
			if err := del(before, f, mapMarks, key); err != nil {
				return fail(err)
			}
			if open {
				after.Add(after.Ref(mapMarks), []nftables.SetElement{{Key: key, Val: binary.NativeEndian.AppendUint32(nil, op.Want.Mark)}})
			}
		}
		if err := before.Commit(); err != nil {
			return fail(err)
		}
		var leave []func() error
		for _, op := range mine {
			l, err := setService(h, f, op.Want)
			if err != nil {
				return fail(err)
			}
			leave = append(leave, l...)
		}
		if err := after.Commit(); err != nil {
			return fail(err)
		}
		for _, l := range leave {
			if err := l(); err != nil {
				return fail(err)
			}
		}
	}
	return nil
}

// setService makes a service and its backends, and returns what deletes the
// backends that it should not have.
func setService(h *ipvs.Handle, f kern.Family, w vip.Server) (leave []func() error, err error) {
	s := ipvsService(f, w.Mark)
	err = h.NewService(s)
	if nl.Exists(err) {
		err = h.UpdateService(s)
	}
	if err != nil {
		return nil, fmt.Errorf("IPVS service %#x: %w", w.Mark, err)
	}
	have, err := h.GetDestinations(s)
	if err != nil {
		return nil, fmt.Errorf("IPVS service %#x: list backends: %w", w.Mark, err)
	}
	left := map[netip.Addr]*ipvs.Destination{}
	for _, d := range have {
		a, ok := netip.AddrFromSlice(d.Address)
		if ok && d.Port == 0 {
			left[a] = d
			continue
		}
		leave = append(leave, func() error { return delDest(h, s, d) })
	}
	// Those that take connections first, in random order: IPVS begins with the
	// one that was added last, on every node, so the first connections of all
	// nodes, which may be the ones that last, would meet at one address.
	takes := weighted(w, 1)
	rand.Shuffle(len(takes), func(i, j int) { takes[i], takes[j] = takes[j], takes[i] })
	for _, b := range slices.Concat(takes, weighted(w, 0)) {
		d := left[b.Addr]
		delete(left, b.Addr)
		nd := ipvsDest(f, b.Addr, b.Weight)
		switch {
		case d == nil:
			err = h.NewDestination(s, nd)
			if nl.Exists(err) {
				err = h.UpdateDestination(s, nd)
			}
		case d.Weight != b.Weight || d.ConnectionFlags&ipvs.ConnectionFlagFwdMask != ipvs.ConnectionFlagMasq ||
			d.UpperThreshold != 0 || d.LowerThreshold != 0:
			err = h.UpdateDestination(s, nd)
		default:
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("IPVS service %#x: backend %s: %w", w.Mark, b.Addr, err)
		}
	}
	for _, d := range left {
		leave = append(leave, func() error { return delDest(h, s, d) })
	}
	return leave, nil
}

func weighted(s vip.Server, weight int) []vip.Backend {
	var out []vip.Backend
	for _, b := range s.Backends {
		if min(b.Weight, 1) == weight {
			out = append(out, vip.Backend{Addr: b.Addr, Weight: weight})
		}
	}
	return out
}

func delDest(h *ipvs.Handle, s *ipvs.Service, d *ipvs.Destination) error {
	if err := h.DelDestination(s, d); err != nil && !kern.Absent(err) {
		return fmt.Errorf("IPVS service %#x: remove backend %s: %w", s.FWMark, d.Address, err)
	}
	return nil
}

func delServer(op vip.DelServer) error {
	v := op.Have.VIP
	f := kern.Of(v)
	fail := func(err error) error { return fmt.Errorf("%s: %w", op.Object(), err) }
	t := kern.Begin(f)
	if err := del(t, f, mapMarks, v.AsSlice()); err != nil {
		return fail(err)
	}
	if err := t.Commit(); err != nil {
		return fail(err)
	}
	h, err := ipvs.New("")
	if err != nil {
		return fail(fmt.Errorf("IPVS netlink: %w", err))
	}
	defer h.Close()
	if err := h.DelService(ipvsService(f, markOf(op.Network, v))); err != nil && !kern.Absent(err) {
		return fail(fmt.Errorf("IPVS service %#x: remove: %w", op.Have.Mark, err))
	}
	t = kern.Begin(f)
	if err := del(t, f, setServed, v.AsSlice()); err != nil {
		return fail(err)
	}
	if err := t.Commit(); err != nil {
		return fail(err)
	}
	// The address last: while it is there, clients are refused at once.
	if err := kern.DelAddr(v); err != nil {
		return fail(err)
	}
	return nil
}

func del(t *kern.Tx, f kern.Family, set string, key []byte) error {
	ok, err := kern.Has(f, set, key)
	if ok {
		t.Del(t.Ref(set), []nftables.SetElement{{Key: key}})
	}
	return err
}

// Probe tells whether this kernel can carry the data path, by building one VIP
// in a namespace of its own that ends with the call. It loads the modules where
// it can. The error is one line: what is missing, and what to do about it.
func Probe() error { return nl.DoNew(probe) }

func probe() error {
	// moby/ipvs looks the module up once per process: not before it is there.
	if _, err := os.Stat(procFile); err != nil {
		out, merr := exec.Command("modprobe", "-a", "ip_vs", "ip_vs_rr").CombinedOutput()
		if _, err := os.Stat(procFile); err != nil {
			return noIPVS(string(out), merr)
		}
	}
	n := vip.Network{Name: "probe", Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}
	a := netip.MustParseAddr("10.0.0.2")
	if err := setBase(n, kern.V4, kern.KeepChains); err != nil {
		return fmt.Errorf("no nftables in this kernel, which the IPVS data path needs too: modprobe nf_tables: %w", err)
	}
	if err := settings(); err != nil {
		return fmt.Errorf("this kernel's IPVS lacks a setting, and is too old or is built without it; the nft data path works without: %w", err)
	}
	s := vip.Server{VIP: a, Mark: markOf(n, a), Backends: []vip.Backend{{Addr: netip.MustParseAddr("10.0.0.3"), Weight: 1}}}
	if err := setSome([]vip.SetServer{{Network: n, Want: s, Have: vip.Server{VIP: a}}}); err != nil {
		return fmt.Errorf("this kernel's IPVS can't make a service with round robin: modprobe ip_vs_rr: %w", err)
	}
	return nil
}

// noIPVS is the error for a kernel whose IPVS is still missing after modprobe
// said out and ended with err. The output of modprobe is several lines, one per
// module and cause; what of it tells causes apart is kept.
func noIPVS(out string, err error) error {
	const (
		load = "modprobe ip_vs ip_vs_rr"
		nft  = "the nft data path works without"
	)
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("no IPVS in this kernel, and no modprobe here to load it with: %s; to use IPVS: %s on the host", nft, load)
	case strings.Contains(out, "not found"):
		return fmt.Errorf("no IPVS in this kernel (ip_vs module not found): %s; to use IPVS: install the kernel's modules, and %s", nft, load)
	case strings.Contains(out, "not permitted"):
		return fmt.Errorf("no IPVS in this kernel (not permitted to load module ip_vs): %s; to use IPVS: %s on the host", nft, load)
	}
	why := strings.Join(strings.Fields(out), " ")
	if why == "" && err != nil {
		why = err.Error()
	}
	if why == "" {
		why = "modprobe ip_vs succeeds, but " + procFile + " stays away"
	}
	return fmt.Errorf("no IPVS in this kernel (%s): %s; to use IPVS: %s", why, nft, load)
}
