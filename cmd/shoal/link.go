package main

import (
	"context"
	"fmt"
	"strings"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// publishHelp is the help of --publish of services.
const publishHelp = "published port: [ADDRESS:][PUBLISHED:]TARGET[/PROTOCOL], ranges too, or published=…,target=…[,protocol=tcp|udp|sctp][,mode=ingress|host|local][,nat=true] (repeatable)"

// link gives a task the variables that Docker's --link sets, for each of its
// links. That the alias resolves is the name server's part.
func (c *cli) link(ctx context.Context, t *shoalv1.TaskSpec) error {
	for i, l := range t.Links {
		target, alias := spec.ParseLink(l)
		env, err := c.linkEnv(ctx, target, alias)
		if err != nil {
			return fmt.Errorf("link %s: %w", l, err)
		}
		// Before the user's own, which win.
		t.Env = append(env, t.Env...)
		t.Links[i] = target + ":" + alias
	}
	return nil
}

// linkEnv is the environment of a link, as Docker's manual describes it under
// "Legacy container links".
func (c *cli) linkEnv(ctx context.Context, target, alias string) ([]string, error) {
	var ts *shoalv1.TaskSpec
	var ports []*shoalv1.Port
	addr := ""
	if svcs, err := c.services(ctx, target); err == nil {
		ts, ports = svcs[0].GetSpec().GetTask(), svcs[0].Ports
		for _, v := range svcs[0].Vips {
			if addr == "" && len(v.Addrs) > 0 {
				addr = v.Addrs[0]
			}
		}
	} else {
		t, err := c.task(ctx, target)
		if err != nil {
			return nil, fmt.Errorf("no such task or service: %s", target)
		}
		ts, ports = t.Spec, t.Ports
		for _, a := range t.Attachments {
			if addr == "" && len(a.Addrs) > 0 {
				addr = a.Addrs[0]
			}
		}
	}
	key := strings.ToUpper(strings.NewReplacer("-", "_", ".", "_").Replace(alias))
	env := []string{key + "_NAME=/" + alias}
	expose := append([]string(nil), ts.GetExpose()...)
	for _, p := range ports {
		expose = append(expose, fmt.Sprintf("%d/%s", p.Target, p.Protocol))
	}
	seen := map[string]bool{}
	for _, e := range expose {
		port, proto, err := spec.ParseExpose(e)
		if err != nil || seen[fmt.Sprint(port, proto)] || addr == "" {
			continue
		}
		url := fmt.Sprintf("%s://%s:%d", proto, addr, port)
		if len(seen) == 0 {
			env = append(env, key+"_PORT="+url)
		}
		seen[fmt.Sprint(port, proto)] = true
		p := fmt.Sprintf("%s_PORT_%d_%s", key, port, strings.ToUpper(proto))
		env = append(env, p+"="+url, p+"_ADDR="+addr, fmt.Sprintf("%s_PORT=%d", p, port), p+"_PROTO="+proto)
	}
	for _, e := range ts.GetEnv() {
		env = append(env, key+"_ENV_"+e)
	}
	return env, nil
}
