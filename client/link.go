package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// Link gives a task, or a service's tasks, the variables that Docker's --link
// sets, for each of its links. That the alias resolves is the name server's part.
// Who is linked to must be on one of the networks of who links.
func (c *Client) Link(ctx context.Context, t *shoalv1.TaskSpec, name string, on []*shoalv1.NetworkAttachment) error {
	if len(t.Links) == 0 {
		return nil
	}
	var refs []string
	for _, a := range on {
		refs = append(refs, a.Network)
	}
	if len(refs) == 0 {
		refs = []string{spec.DefaultNetwork}
	}
	nets, _, err := c.Networks(ctx, refs...)
	if err != nil {
		return err
	}
	for i, l := range t.Links {
		target, alias := spec.ParseLink(l)
		env, err := c.linkEnv(ctx, target, name, alias, nets)
		if err != nil {
			return fmt.Errorf("link %s: %w", l, err)
		}
		// Before the user's own, which win.
		t.Env = append(env, t.Env...)
		t.Links[i] = target + ":" + alias
	}
	return nil
}

// linkEnv finds what a link leads to, and is its environment.
func (c *Client) linkEnv(ctx context.Context, target, name, alias string, on []*shoalv1.Network) ([]string, error) {
	var ts *shoalv1.TaskSpec
	var ports []*shoalv1.Port
	addrs := map[string][]string{} // by network
	svcs, err := c.Services(ctx, target)
	if err == nil && svcs[0].GetSpec().GetName() != target && svcs[0].Id != target {
		// By the beginning of its ID: a task's ID or name goes before that.
		if t, terr := c.Task(ctx, target); terr == nil && (t.Id == target || t.Name == target) {
			err = errors.New("a task is meant")
		}
	}
	if err == nil {
		ts, ports = svcs[0].GetSpec().GetTask(), svcs[0].Ports
		for _, a := range svcs[0].GetSpec().GetNetworks() {
			addrs[a.Network] = nil // of a service without a virtual IP
		}
		for _, v := range svcs[0].Vips {
			addrs[v.Network] = v.Addrs
		}
	} else {
		t, err := c.Task(ctx, target)
		if err != nil {
			return nil, fmt.Errorf("no such task or service: %s", target)
		}
		ts, ports = t.Spec, t.Ports
		for _, a := range t.Attachments {
			addrs[a.Network] = a.Addrs
		}
	}
	for _, n := range on {
		at, ok := addrs[n.Id]
		if !ok {
			continue
		}
		addr := ""
		if len(at) > 0 {
			addr = at[0]
		}
		expose := slices.Clone(ts.GetExpose())
		for _, p := range ports {
			expose = append(expose, fmt.Sprintf("%d/%s", p.Target, p.Protocol))
		}
		return linkVariables(name, alias, addr, expose, ts.GetEnv()), nil
	}
	var names []string
	for _, n := range on {
		names = append(names, n.Name)
	}
	return nil, fmt.Errorf("%s is on none of the networks %s: give --network one that it is on", target, strings.Join(names, ", "))
}

// linkVariables are the variables that Docker sets for a link, as its manual
// has them under "Legacy container links": the first port is the lowest of TCP,
// and consecutive ones are a range besides.
func linkVariables(name, alias, addr string, expose, env []string) []string {
	type port struct {
		n     int
		proto string
	}
	var ports []port
	for _, e := range expose {
		n, proto, err := spec.ParseExpose(e)
		if p := (port{int(n), proto}); err == nil && addr != "" && !slices.Contains(ports, p) {
			ports = append(ports, p)
		}
	}
	udp := func(p port) bool { return p.proto != spec.TCP }
	slices.SortFunc(ports, func(a, b port) int {
		switch {
		case udp(a) != udp(b) && udp(b):
			return -1
		case udp(a) != udp(b):
			return 1
		}
		return cmp.Or(strings.Compare(a.proto, b.proto), cmp.Compare(a.n, b.n))
	})
	key := strings.ToUpper(strings.NewReplacer("-", "_", ".", "_").Replace(alias))
	url := func(p port) string { return fmt.Sprintf("%s://%s:%d", p.proto, addr, p.n) }
	prefix := func(p port) string { return fmt.Sprintf("%s_PORT_%d_%s", key, p.n, strings.ToUpper(p.proto)) }
	var out []string
	if len(ports) > 0 {
		out = append(out, key+"_PORT="+url(ports[0]))
	}
	for i := 0; i < len(ports); {
		first, last := ports[i], ports[i]
		for ; i < len(ports) && ports[i].proto == first.proto && ports[i].n <= last.n+1; i++ {
			last = ports[i]
			p := prefix(last)
			out = append(out, p+"="+url(last), p+"_ADDR="+addr, fmt.Sprintf("%s_PORT=%d", p, last.n), p+"_PROTO="+last.proto)
		}
		if first != last {
			p := prefix(first)
			out = append(out, p+"_START="+url(first), fmt.Sprintf("%s_PORT_START=%d", p, first.n), p+"_END="+url(last), fmt.Sprintf("%s_PORT_END=%d", p, last.n))
		}
	}
	out = append(out, fmt.Sprintf("%s_NAME=/%s/%s", key, name, alias))
	for _, e := range env {
		if k, _, ok := strings.Cut(e, "="); ok && k != "HOME" && k != "PATH" {
			out = append(out, key+"_ENV_"+e)
		}
	}
	return out
}
