package lab

import (
	"fmt"
	"net"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/shoalnet/shoal/internal/nl"
)

const (
	bridge         = "br0"
	partitionTable = "shoal-lab"
)

func (l *Lab) makeUnderlay() error {
	if err := nl.Create(l.underlay()); err != nil {
		return err
	}
	return nl.Do(l.underlay(), func() error {
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge, MTU: l.MTU}}
		if err := netlink.LinkAdd(br); err != nil {
			return fmt.Errorf("underlay: add bridge: %w", err)
		}
		if err := addAddr(br, &net.IPNet{IP: Outside.AsSlice(), Mask: net.CIDRMask(Underlay.Bits(), 32)}); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(br); err != nil {
			return fmt.Errorf("underlay: set bridge up: %w", err)
		}
		// A router without a way on: what a node sends beyond is refused at once,
		// each time (kernel doc networking/ip-sysctl, icmp_ratelimit), and not
		// waited for in vain.
		if err := nl.SetSysctl("net.ipv4.ip_forward", "1"); err != nil {
			return fmt.Errorf("underlay: %w", err)
		}
		if err := nl.SetSysctl("net.ipv4.icmp_ratelimit", "0"); err != nil {
			return fmt.Errorf("underlay: %w", err)
		}
		return nil
	})
}

func addAddr(link netlink.Link, ip *net.IPNet) error {
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ip}); err != nil {
		return fmt.Errorf("add address %s to %s: %w", ip, link.Attrs().Name, err)
	}
	return nil
}

// makeNode makes a node's namespace and plugs it into the bridge.
func (l *Lab) makeNode(n *Node) error {
	if err := nl.Create(n.Netns); err != nil {
		return err
	}
	ns, err := nl.Open(n.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	err = nl.Do(l.underlay(), func() error {
		br, err := netlink.LinkByName(bridge)
		if err != nil {
			return fmt.Errorf("underlay: %s: %w", bridge, err)
		}
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: n.Name, MTU: l.MTU, MasterIndex: br.Attrs().Index}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("%s: add link: %w", n.Name, err)
		}
		return netlink.LinkSetUp(veth)
	})
	if err != nil {
		return err
	}
	return nl.Do(n.Netns, func() error {
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return fmt.Errorf("%s: eth0: %w", n.Name, err)
		}
		if err := netlink.LinkSetMTU(eth, l.MTU); err != nil {
			return fmt.Errorf("%s: MTU of eth0: %w", n.Name, err)
		}
		if err := addAddr(eth, &net.IPNet{IP: n.Addr.AsSlice(), Mask: net.CIDRMask(Underlay.Bits(), 32)}); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(eth); err != nil {
			return fmt.Errorf("%s: eth0 up: %w", n.Name, err)
		}
		return l.defaultRoute(n, eth)
	})
}

func (l *Lab) defaultRoute(n *Node, eth netlink.Link) error {
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: Outside.AsSlice()}); err != nil {
		return fmt.Errorf("%s: default route: %w", n.Name, err)
	}
	return nil
}

// setLink works on both ends, as a cable does.
func (l *Lab) setLink(n *Node, up bool) error {
	set := func(name string) error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("%s: link %s: %w", n.Name, name, err)
		}
		if !up {
			return netlink.LinkSetDown(link)
		}
		return netlink.LinkSetUp(link)
	}
	if err := nl.Do(l.underlay(), func() error { return set(n.Name) }); err != nil {
		return err
	}
	return nl.Do(n.Netns, func() error {
		if err := set("eth0"); err != nil || !up {
			return err
		}
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return l.defaultRoute(n, eth) // it went with the link
	})
}

// Partition stops all traffic between two groups of nodes, in both directions,
// in addition to earlier partitions.
func (l *Lab) Partition(a, b []string) error {
	for _, name := range append(append([]string{}, a...), b...) {
		if _, err := l.find(name); err != nil {
			return err
		}
	}
	if len(a) == 0 || len(b) == 0 {
		return fmt.Errorf("a partition takes two groups of nodes, and one is empty")
	}
	for _, x := range a {
		for _, y := range b {
			if x == y {
				return fmt.Errorf("%s is on both sides of the partition", x)
			}
		}
	}
	return l.nft(func(c *nftables.Conn) {
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyBridge, Name: partitionTable})
		chain := c.AddChain(&nftables.Chain{Name: "forward", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
		for _, x := range a {
			for _, y := range b {
				for _, p := range [][2]string{{x, y}, {y, x}} {
					c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
						&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
						&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ifname(p[0])},
						&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
						&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ifname(p[1])},
						&expr.Verdict{Kind: expr.VerdictDrop},
					}})
				}
			}
		}
	})
}

// ifname is a name as nft compares it: 16 bytes (IFNAMSIZ), padded with zeros.
func ifname(s string) []byte { return append([]byte(s), make([]byte, 16-len(s))...) }

// Heal ends all partitions.
func (l *Lab) Heal() error {
	return l.nft(func(c *nftables.Conn) {
		// Adding it first makes the deletion of an absent one no error.
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyBridge, Name: partitionTable})
		c.DelTable(t)
	})
}

func (l *Lab) nft(fn func(*nftables.Conn)) error {
	ns, err := nl.Open(l.underlay())
	if err != nil {
		return err
	}
	defer ns.Close()
	c, err := nftables.New(nftables.WithNetNSFd(int(netns.NsHandle(ns))))
	if err != nil {
		return fmt.Errorf("underlay: nftables: %w", err)
	}
	fn(c)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("underlay: partition rules: %w", err)
	}
	return nil
}
