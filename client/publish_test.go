package client

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/spec"
)

func TestParsePublish(t *testing.T) {
	port := func(published, target uint16, protocol string) spec.Port {
		return spec.Port{Published: published, Target: target, Protocol: protocol, Mode: spec.PortIngress}
	}
	at := func(p spec.Port, addr string) spec.Port { p.Addr = netip.MustParseAddr(addr); return p }
	long := port(8080, 80, "udp")
	long.Mode, long.NAT = spec.PortHost, true
	for _, k := range []struct {
		in   string
		want []spec.Port
		err  string
	}{
		{"8080:80", []spec.Port{port(8080, 80, "tcp")}, ""},
		{"80", []spec.Port{port(0, 80, "tcp")}, ""},
		{"0:80", []spec.Port{port(0, 80, "tcp")}, ""},
		{"8080:80/udp", []spec.Port{port(8080, 80, "udp")}, ""},
		{"8080:80/SCTP", []spec.Port{port(8080, 80, "sctp")}, ""},
		{"8000-8002:80-82", []spec.Port{port(8000, 80, "tcp"), port(8001, 81, "tcp"), port(8002, 82, "tcp")}, ""},
		{"127.0.0.1:8080:80", []spec.Port{at(port(8080, 80, "tcp"), "127.0.0.1")}, ""},
		{"0.0.0.0:8080:80", []spec.Port{port(8080, 80, "tcp")}, ""},
		{"127.0.0.1::80", []spec.Port{at(port(0, 80, "tcp"), "127.0.0.1")}, ""},
		{"published=8080,target=80,protocol=udp,mode=host,nat=true", []spec.Port{long}, ""},
		{"Protocol=UDP, mode=Host,target=80,nat=True,published=8080", []spec.Port{long}, ""},
		{"1-20000:1-20000", nil, "20000 ports are too many"},
		{"target=80,addr=127.0.0.1", []spec.Port{at(port(0, 80, "tcp"), "127.0.0.1")}, ""},
		{"", nil, "target port"},
		{"8080:", nil, `"" is not a number`},
		{"8080:0", nil, "target port is missing"},
		{"70000:80", nil, "not a number from 0 to 65535"},
		{"8080:80/icmp", nil, `protocol "icmp" is unknown`},
		{"8000-8002:80/udp", []spec.Port{port(8000, 80, "udp"), port(8001, 80, "udp"), port(8002, 80, "udp")}, ""},
		{"8000-8002:80-81", nil, "different length"},
		{"8000:80-81", nil, "different length"},
		{"1-20000:80", nil, "20000 ports are too many"},
		{"8002-8000:80-82", nil, "ends before it begins"},
		{"host:8080:80", nil, `"host" is not an address`},
		{"published=8080,target=80,mode=mesh", nil, `mode "mesh" is unknown`},
		{"published=8080,to=80", nil, `key "to" is unknown`},
		{"published=x,target=80", nil, `published can't be "x"`},
		{"published=8080", nil, "target port is missing"},
	} {
		got, err := ParsePublish(k.in, spec.PortIngress)
		if (err == nil) != (k.err == "") || err != nil && !strings.Contains(err.Error(), k.err) {
			t.Errorf("%q: error %v, want %q", k.in, err, k.err)
		} else if err == nil && !slices.Equal(got, k.want) {
			t.Errorf("%q: %v, want %v", k.in, got, k.want)
		}
	}
	if _, err := ParsePublish("8000-8002:80", spec.PortHost); err == nil || !strings.Contains(err.Error(), "3 ports for one") {
		t.Error(err)
	}
	if _, err := ParsePublishes([]string{"8080:80", "8079-8081:90-92"}, spec.PortIngress); err == nil || !strings.Contains(err.Error(), "8080/tcp is published twice") {
		t.Error(err)
	}
}

func FuzzParsePublish(f *testing.F) {
	f.Add("8080:80/tcp")
	f.Add("[::1]:8080:80")
	f.Add("published=1,target=2")
	f.Fuzz(func(t *testing.T, s string) {
		ports, err := ParsePublish(s, spec.PortIngress)
		for _, p := range ports {
			if err == nil && p.Validate() != nil {
				t.Errorf("%q gives %v: %v", s, p, p.Validate())
			}
		}
	})
}
