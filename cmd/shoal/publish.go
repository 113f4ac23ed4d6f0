package main

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// parsePublish parses one --publish: Docker's short form
// [ADDRESS:][PUBLISHED:]TARGET[/PROTOCOL], with ranges (of one length, or
// several published ports for one target, as Swarm has it), or its long form
// published=…,target=…,protocol=…,mode=…, to which nat=true and addr=… are ours.
func parsePublish(s, mode string) ([]spec.Port, error) {
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

func parsePublishes(in []string, mode string) ([]spec.Port, error) {
	var out []spec.Port
	for _, s := range in {
		ps, err := parsePublish(s, mode)
		if err != nil {
			return nil, err
		}
		out = append(out, ps...)
	}
	return out, spec.ValidatePorts(out)
}

// portsText is ports for a table, runs of them as ranges: "*:8000-8010->80/tcp".
func portsText(in []*shoalv1.Port) string {
	ports, err := api.ToPorts(in)
	if err != nil || len(ports) == 0 {
		return ""
	}
	slices.SortFunc(ports, spec.ComparePorts)
	var out []string
	for i := 0; i < len(ports); {
		j, step := i, uint16(1)
		if i+1 < len(ports) && ports[i+1].Target == ports[i].Target {
			step = 0
		}
		for j+1 < len(ports) {
			a, b := ports[j], ports[j+1]
			a.Published++
			a.Target += step
			if a != b {
				break
			}
			j++
		}
		if j == i {
			out = append(out, ports[i].String())
		} else {
			a, b := ports[i], ports[j]
			s := strings.Replace(a.String(), fmt.Sprintf(":%d->", a.Published), fmt.Sprintf(":%d-%d->", a.Published, b.Published), 1)
			if step != 0 {
				s = strings.Replace(s, fmt.Sprintf("->%d/", a.Target), fmt.Sprintf("->%d-%d/", a.Target, b.Target), 1)
			}
			out = append(out, s)
		}
		i = j + 1
	}
	return strings.Join(out, ", ")
}

func (c *cli) portCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "port SERVICE|TASK [TARGET[/PROTOCOL]]", Short: "Show published ports", Args: func(cmd *cobra.Command, args []string) error {
		if len(args) > 2 {
			return exactly(2)(cmd, args)
		}
		return atLeast(1)(cmd, args)
	},
		Example:           "  shoal port web\n  shoal port web 80/tcp",
		ValidArgsFunction: c.complete(c.serviceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			ports, err := c.publishedOf(ctx, args[0])
			if err != nil {
				return err
			}
			if len(args) > 1 {
				want, proto, ok := strings.Cut(args[1], "/")
				n, err := strconv.ParseUint(want, 10, 16)
				if err != nil {
					return usageError(cmd, fmt.Errorf("%q is not a port", args[1]))
				}
				ports = slices.DeleteFunc(ports, func(p spec.Port) bool { return p.Target != uint16(n) || ok && p.Protocol != strings.ToLower(proto) })
				if len(ports) == 0 {
					return fmt.Errorf("%s publishes no port for %s", args[0], args[1])
				}
			}
			slices.SortFunc(ports, func(a, b spec.Port) int { return cmp.Or(cmp.Compare(a.Target, b.Target), spec.ComparePorts(a, b)) })
			if c.output == "json" {
				if ports == nil {
					ports = []spec.Port{}
				}
				return c.json(ports)
			}
			for _, p := range ports {
				host := "0.0.0.0"
				if p.Addr.IsValid() {
					host = p.Addr.String()
				}
				if len(args) > 1 {
					fmt.Fprintf(c.out, "%s:%d\n", host, p.Published)
					continue
				}
				mode := ""
				if p.Mode != spec.PortIngress {
					mode = " (" + p.Mode + ")"
				}
				fmt.Fprintf(c.out, "%d/%s -> %s:%d%s\n", p.Target, p.Protocol, host, p.Published, mode)
			}
			return nil
		}}
	c.outputFlag(cmd, "json")
	return cmd
}

func (c *cli) publishedOf(ctx context.Context, ref string) ([]spec.Port, error) {
	svcs, err := c.services(ctx, ref)
	if err == nil && (svcs[0].GetSpec().GetName() == ref || svcs[0].Id == ref) {
		return api.ToPorts(svcs[0].Ports)
	}
	if err != nil && connect.CodeOf(err) != connect.CodeNotFound {
		return nil, err
	}
	t, terr := c.task(ctx, ref)
	switch {
	case err == nil && (terr != nil || t.Name != ref): // by the beginning of its ID, and no task has that name
		return api.ToPorts(svcs[0].Ports)
	case terr != nil:
		return nil, fmt.Errorf("no such service or task: %s", ref)
	}
	ports, err := api.ToPorts(t.Ports)
	if err != nil || t.Service == "" {
		return ports, err
	}
	svcs, err = c.services(ctx, t.Service)
	if err != nil {
		return nil, err
	}
	return api.ToPorts(svcs[0].Ports)
}
