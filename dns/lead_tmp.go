package dns

// TEMPORARY, by the lead, until the real package lands: delete this file then.

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"

	mdns "github.com/miekg/dns"

	"github.com/shoalnet/shoal/spec"
)

type Asker struct {
	Task      string
	Networks  []string
	NoForward bool
}
type ZoneOptions struct{ Nodes []spec.Node }
type Zone struct{ v *spec.View }

func NewZone(v *spec.View, _ ZoneOptions) *Zone { return &Zone{v} }

type Config struct {
	Upstreams func() []netip.AddrPort
	Log       *slog.Logger
}
type Server struct {
	cfg Config
	z   atomic.Pointer[Zone]
}

func NewServer(c Config) *Server    { return &Server{cfg: c} }
func (s *Server) SetZone(z *Zone) { s.z.Store(z) }
func (s *Server) Serve(ctx context.Context, a Asker, pc net.PacketConn, ln net.Listener) error {
	h := mdns.HandlerFunc(func(w mdns.ResponseWriter, r *mdns.Msg) {
		m := new(mdns.Msg)
		m.SetReply(r)
		z := s.z.Load()
		name := strings.ToLower(strings.TrimSuffix(r.Question[0].Name, "."))
		var addrs []netip.Addr
		if z != nil {
			for _, n := range a.Networks {
				for _, sv := range z.v.Services {
					if sv.Spec.Name == name {
						addrs = append(addrs, sv.VIPsOn(n)...)
					}
					if "tasks."+sv.Spec.Name == name {
						for _, e := range z.v.Endpoints {
							if e.Service == sv.ID && e.Network == n && e.State == spec.EndpointActive {
								addrs = append(addrs, e.Addrs...)
							}
						}
					}
				}
				for _, e := range z.v.Endpoints {
					if e.Network == n && strings.ToLower(e.TaskName) == name {
						addrs = append(addrs, e.Addrs...)
					}
				}
			}
		}
		for _, ad := range addrs {
			if r.Question[0].Qtype == mdns.TypeA && ad.Is4() {
				m.Answer = append(m.Answer, &mdns.A{Hdr: mdns.RR_Header{Name: r.Question[0].Name, Rrtype: mdns.TypeA, Class: 1, Ttl: 2}, A: ad.AsSlice()})
			}
		}
		if len(addrs) == 0 {
			m.Rcode = mdns.RcodeNameError
		}
		_ = w.WriteMsg(m)
	})
	u := &mdns.Server{PacketConn: pc, Handler: h}
	t := &mdns.Server{Listener: ln, Handler: h}
	go t.ActivateAndServe()
	go func() { <-ctx.Done(); pc.Close(); ln.Close() }()
	return u.ActivateAndServe()
}

func Upstreams(path string) func() []netip.AddrPort {
	return func() []netip.AddrPort { _, _ = os.ReadFile(path); return nil }
}
