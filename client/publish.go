package client

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// ParsePublish parses one --publish: Docker's short form
// [ADDRESS:][PUBLISHED:]TARGET[/PROTOCOL], with ranges (of one length, or
// several published ports for one target, as Swarm has it), or its long form
// published=…,target=…,protocol=…,mode=…, to which nat=true and addr=… are ours.
func ParsePublish(s, mode string) ([]spec.Port, error) {
	if strings.Contains(s, "=") {
		return parsePublishLong(s, mode)
	}
	bad := func(format string, args ...any) ([]spec.Port, error) {
		return nil, fmt.Errorf("publish %q: %s", s, fmt.Sprintf(format, args...))
	}
	rest, protocol, ok := strings.Cut(s, "/")
	if !ok {
		protocol = spec.TCP
	}
	p := spec.Port{Protocol: strings.ToLower(protocol), Mode: mode}
	target := rest
	published := ""
	if i := strings.LastIndex(rest, ":"); i >= 0 {
		published, target = rest[:i], rest[i+1:]
		if i := strings.LastIndex(published, ":"); i >= 0 {
			host := strings.Trim(published[:i], "[]")
			published = published[i+1:]
			a, err := netip.ParseAddr(host)
			if err != nil {
				return bad("%q is not an address of the node: want [ADDRESS:][PUBLISHED:]TARGET[/PROTOCOL]", host)
			}
			if !a.IsUnspecified() {
				p.Addr = a
			}
		}
	}
	tlo, thi, err := portRange(target)
	if err != nil {
		return bad("target port: %v", err)
	}
	plo, phi := 0, 0
	if published != "" {
		if plo, phi, err = portRange(published); err != nil {
			return bad("published port: %v", err)
		}
	}
	n, step := thi-tlo+1, 1
	switch {
	case published == "" || plo == 0 || phi-plo == thi-tlo:
	case tlo == thi && mode == spec.PortHost:
		return bad("%d ports for one: a task's port has one number; name it, or 0 for one that is free", phi-plo+1)
	case tlo == thi:
		n, step = phi-plo+1, 0
	default:
		return bad("the ranges %s and %s are of different length", published, target)
	}
	if n > spec.MaxPorts {
		return bad("%d ports are too many: publish at most %d", n, spec.MaxPorts)
	}
	var out []spec.Port
	for i := range n {
		q := p
		if q.Target = uint16(tlo + i*step); plo != 0 {
			q.Published = uint16(plo + i)
		}
		if err := q.Validate(); err != nil {
			return nil, err
		}
		out = append(out, q)
	}
	return out, nil
}

func portRange(s string) (lo, hi int, err error) {
	a, b, isRange := strings.Cut(s, "-")
	if !isRange {
		b = a
	}
	for _, v := range []struct {
		text string
		to   *int
	}{{a, &lo}, {b, &hi}} {
		n, err := strconv.ParseUint(v.text, 10, 16)
		if err != nil {
			return 0, 0, fmt.Errorf("%q is not a number from 0 to 65535", v.text)
		}
		*v.to = int(n)
	}
	if hi < lo {
		return 0, 0, fmt.Errorf("the range %s ends before it begins", s)
	}
	return lo, hi, nil
}

func parsePublishLong(s, mode string) ([]spec.Port, error) {
	p := spec.Port{Protocol: spec.TCP, Mode: mode}
	for _, kv := range strings.Split(s, ",") {
		k, v, _ := strings.Cut(strings.TrimSpace(kv), "=")
		v = strings.ToLower(v) // as Docker does
		var err error
		switch strings.ToLower(k) {
		case "published":
			var n uint64
			n, err = strconv.ParseUint(v, 10, 16)
			p.Published = uint16(n)
		case "target":
			var n uint64
			n, err = strconv.ParseUint(v, 10, 16)
			p.Target = uint16(n)
		case "protocol":
			p.Protocol = v
		case "mode":
			p.Mode = v
		case "addr", "host_ip":
			p.Addr, err = netip.ParseAddr(v)
		case "nat":
			p.NAT, err = strconv.ParseBool(v)
		default:
			return nil, fmt.Errorf("publish %q: key %q is unknown: use published, target, protocol, mode, addr or nat", s, k)
		}
		if err != nil {
			return nil, fmt.Errorf("publish %q: %s can't be %q", s, k, v)
		}
	}
	if err := p.Validate(); err != nil {
		return nil, err
	}
	return []spec.Port{p}, nil
}

// ParsePublishes parses every --publish; mode is that of those that name none.
func ParsePublishes(in []string, mode string) ([]spec.Port, error) {
	var out []spec.Port
	for _, s := range in {
		ps, err := ParsePublish(s, mode)
		if err != nil {
			return nil, err
		}
		out = append(out, ps...)
	}
	return out, spec.ValidatePorts(out)
}
