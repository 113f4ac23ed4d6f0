package nft

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/nl"
)

// vxlanPort is the default UDP port of the overlay, as nftables compares it.
var vxlanPort = []byte{4789 >> 8, 4789 & 0xff}

// Blocked tells of firewalls on the host that probably drop what published
// ports, and tasks' way out, need: a packet passes only if every table lets it.
// Each text names the table and a rule that would help. It is a guess: what
// counts is a chain that ends in a refusal, and a table none of whose rules
// names our devices.
//
// It may be called at any time, from any goroutine.
func (d *Dataplane) Blocked(ctx context.Context) ([]string, error) {
	var out []string
	err := d.do("", func() (err error) {
		out, err = blocked(ctx)
		return err
	})
	return out, err
}

func blocked(ctx context.Context) ([]string, error) {
	c, err := reader()
	if err != nil {
		return nil, err
	}
	defer c.CloseLasting()
	var out []string
	for _, f := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyINet} {
		chains, err := c.ListChainsOfTableFamily(f)
		if err != nil {
			return nil, fmt.Errorf("list nftables chains: %w", err)
		}
		for _, ch := range chains {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if ch.Hooknum == nil || ch.Type != nftables.ChainTypeFilter || strings.HasPrefix(ch.Table.Name, "shoal") {
				continue
			}
			forward := *ch.Hooknum == *nftables.ChainHookForward
			if !forward && *ch.Hooknum != *nftables.ChainHookInput {
				continue
			}
			rules, err := rawRules(f, ch.Table.Name)
			if err != nil {
				return nil, err
			}
			if !(ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop) && !refusesRest(rules, ch.Name) {
				continue
			}
			names := func(b []byte) bool {
				return slices.ContainsFunc(rules, func(r rawRuleOf) bool { return bytes.Contains(r.exprs, b) })
			}
			switch {
			case forward && !names([]byte(ingress.DevPrefix)):
				out = append(out, forwardText(f, ch))
			case !forward && !names(vxlanPort):
				out = append(out, fmt.Sprintf("table %s, chain %s refuses what no rule accepts, and none seems to accept VXLAN: let other nodes reach this one on 4789/udp (--data-path-port), and on its control and gossip ports", tableName(f, ch), ch.Name))
			}
		}
	}
	return append(out, legacyBlocked(ctx)...), nil
}

func tableName(f nftables.TableFamily, ch *nftables.Chain) string {
	if f == nftables.TableFamilyINet {
		return "inet " + ch.Table.Name
	}
	return "ip " + ch.Table.Name
}

func forwardText(f nftables.TableFamily, ch *nftables.Chain) string {
	dev := ingress.DevPrefix
	s := fmt.Sprintf("table %s, chain %s refuses to forward what no rule accepts, and none accepts Shoal's devices, so that published ports and tasks' way out may not work: ", tableName(f, ch), ch.Name)
	switch {
	case ch.Table.Name == "firewalld":
		return s + "firewall-cmd --permanent --zone=trusted --add-interface=" + dev + "+ && firewall-cmd --reload"
	case ch.Table.Name == "filter" && ch.Name == "FORWARD":
		return s + iptablesHelp("iptables")
	}
	n := tableName(f, ch) + " " + ch.Name
	return s + fmt.Sprintf("nft 'insert rule %s iifname \"%s*\" accept ; insert rule %s oifname \"%s*\" ct status dnat accept ; insert rule %s oifname \"%s*\" ct state established,related accept'", n, dev, n, dev, n, dev)
}

// iptablesHelp: with Docker, rules for DOCKER-USER outlive its restarts; FORWARD
// is there always.
func iptablesHelp(cmd string) string {
	dev := ingress.DevPrefix
	return fmt.Sprintf("%s -I FORWARD -i %s+ -j ACCEPT && %s -I FORWARD -o %s+ -j ACCEPT (with Docker: -I DOCKER-USER)", cmd, dev, cmd, dev)
}

// rawRuleOf is a rule as far as guessing takes it.
type rawRuleOf struct {
	chain string
	names []string // of expressions
	exprs []byte
}

func rawRules(f nftables.TableFamily, table string) ([]rawRuleOf, error) {
	rules, err := nl.Rules(byte(f), table, "")
	if err != nil {
		return nil, err
	}
	var out []rawRuleOf
	for _, as := range rules {
		var r rawRuleOf
		of := ""
		for _, a := range as {
			switch a.Type {
			case unix.NFTA_RULE_TABLE:
				of = strings.TrimRight(string(a.Data), "\x00")
			case unix.NFTA_RULE_CHAIN:
				r.chain = strings.TrimRight(string(a.Data), "\x00")
			case unix.NFTA_RULE_EXPRESSIONS:
				r.exprs = a.Data
				list, _ := netlink.UnmarshalAttributes(a.Data)
				for _, e := range list {
					parts, _ := netlink.UnmarshalAttributes(e.Data)
					for _, p := range parts {
						if p.Type&nl.AttrTypeMask == unix.NFTA_EXPR_NAME {
							r.names = append(r.names, strings.TrimRight(string(p.Data), "\x00"))
						}
					}
				}
			}
		}
		if of == table {
			out = append(out, r)
		}
	}
	return out, nil
}

// refusesRest tells whether a chain's last rule rejects whatever comes.
func refusesRest(rules []rawRuleOf, chain string) bool {
	var last []string
	for _, r := range rules {
		if r.chain == chain {
			last = r.names
		}
	}
	return slices.Contains(last, "reject") && !slices.ContainsFunc(last, func(n string) bool { return n != "reject" && n != "counter" && n != "log" })
}

// legacyBlocked looks at the old iptables, which nftables does not show.
func legacyBlocked(ctx context.Context) []string {
	b, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if err != nil || !slices.Contains(strings.Fields(string(b)), "filter") {
		return nil
	}
	cmd, err := exec.LookPath("iptables-legacy")
	if err != nil {
		return nil
	}
	// -t filter -S: all chains of the table, as commands (iptables(8)).
	rules, err := exec.CommandContext(ctx, cmd, "-w", "1", "-S").Output()
	if err != nil || !legacyDrops(string(rules)) {
		return nil
	}
	return []string{"iptables (legacy), chain FORWARD drops what no rule accepts, and none accepts Shoal's devices, so that published ports and tasks' way out may not work: " + iptablesHelp("iptables-legacy")}
}

func legacyDrops(rules string) bool {
	return strings.Contains(rules, "-P FORWARD DROP") && !strings.Contains(rules, " "+ingress.DevPrefix)
}
