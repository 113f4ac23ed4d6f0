package vxlan

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
)

var native = binary.NativeEndian

const ipForward = "net.ipv4.ip_forward"

// setRouted is a set of the host's table that exists when we switched
// forwarding on. It holds the devices that the host had at that moment: it was
// no router between them, and we don't make it one. Docker drops everything it
// doesn't know at that point, which breaks other software's bridges; here, a
// device that comes later (docker0, a VPN) is nobody's loss.
const setRouted = "was-no-router"

// hostRules is the table of the host's namespace: masquerade of what leaves by
// the ways out, and what may pass between those and the rest. routed is nil
// where forwarding was on before us.
func hostRules(name string, routed *[]string) ruleset {
	way := overlay.HostPrefix + "*"
	var nat []rule
	for _, m := range []rule{masqPorts, masq} {
		for _, p := range spec.EgressPrefixes {
			nat = append(nat, r(oifNot(way), saddr(p), m))
		}
	}
	forward := []rule{
		r(oif(way), ctDNAT(), accept),                     // published ports, also for tasks of this node
		r(iif(way), oif(way), because(whyNetworks, drop)), // networks don't meet here
		r(iif(way), accept),
		r(oif(way), ctEstablished(), accept),
		r(oif(way), because(whyNoReply, drop)),
	}
	rs := ruleset{table: table{nftables.TableFamilyINet, name}}
	if routed != nil {
		s := set{name: setRouted, key: nftables.TypeIFName}
		for _, n := range *routed {
			s.elems = append(s.elems, ifKey(n))
		}
		rs.sets = append(rs.sets, s)
		forward = append(forward, r(ifIn(true, setRouted), ifIn(false, setRouted), because(whyNoRouter, drop)))
	}
	rs.chains = []chain{
		{"forward", nftables.ChainTypeFilter, nftables.ChainHookForward, prioFilter, nftables.ChainPolicyAccept, forward},
		{"postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, prioSrcNAT, nftables.ChainPolicyAccept, nat},
	}
	return rs
}

// readRouted reads whether, and over which devices, we switched forwarding on.
func readRouted(c *nftConn, name string) (*[]string, bool, error) {
	t := table{nftables.TableFamilyINet, name}
	chains, err := c.list(t)
	if err != nil || len(chains) == 0 {
		return nil, false, err
	}
	keys, ok, err := c.elems(t, setRouted)
	if err != nil || !ok {
		return nil, true, err
	}
	names := []string{}
	for _, k := range keys {
		n, _, _ := bytes.Cut(k, []byte{0})
		names = append(names, string(n))
	}
	slices.Sort(names)
	return &names, true, nil
}

// readForwarding reads the host's table, nil if it is absent; within the host's
// namespace. Whether forwarding is on is not in it.
func (d *Dataplane) readForwarding(c *nftConn) (*overlay.Forwarding, error) {
	o := overlay.Forwarding{Table: overlay.HostTable(d.cfg.Instance)}
	routed, present, err := readRouted(c, o.Table)
	if err != nil || !present {
		return nil, err
	}
	d.routed = routed
	if o.Fault, _, err = c.check(hostRules(o.Table, routed)); err != nil {
		return nil, err
	}
	return &o, nil
}

// putForwarding switches forwarding on, after the rules that bound it.
func (d *Dataplane) putForwarding(o overlay.Forwarding) error {
	return d.do("", func() error {
		c, err := dialNFT()
		if err != nil {
			return err
		}
		defer c.close()
		routed, present, err := readRouted(c, o.Table)
		if err != nil {
			return err
		}
		if !present {
			// If someone flushed all rules, what we last saw stands.
			routed = d.routed
		}
		v, err := nl.Sysctl(ipForward)
		if err != nil {
			return err
		}
		if v != "1" && routed == nil {
			names, err := foreignLinks()
			if err != nil {
				return err
			}
			routed = &names
			d.log.Info("switching IP forwarding on, for the networks' way out; this host still does not forward between the devices it has", "devices", names)
		}
		if err := hostRules(o.Table, routed).write(); err != nil {
			return err
		}
		d.routed = routed
		if err := nl.SetSysctl(ipForward, "1"); err != nil {
			if errors.Is(err, os.ErrPermission) {
				return fmt.Errorf("%w: /proc/sys must be writable for the agent", err)
			}
			return err
		}
		return nil
	})
}

// foreignLinks names the devices of the calling thread's namespace that are not
// ours, but for lo.
func foreignLinks() ([]string, error) {
	links, err := nl.Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var out []string
	for _, l := range links {
		if n := l.Attrs().Name; l.Attrs().Flags&net.FlagLoopback == 0 && !strings.HasPrefix(n, overlay.HostPrefix) {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out, nil
}

// delForwarding removes the table. Forwarding is switched off if we switched it
// on, unless a device has come since: someone may rely on it by now.
func (d *Dataplane) delForwarding(o overlay.Forwarding) error {
	return d.do("", func() error {
		c, err := dialNFT()
		if err != nil {
			return err
		}
		defer c.close()
		routed, _, err := readRouted(c, o.Table)
		if err != nil {
			return err
		}
		if routed != nil {
			now, err := foreignLinks()
			if err != nil {
				return err
			}
			news := slices.DeleteFunc(now, func(n string) bool { return slices.Contains(*routed, n) })
			if len(news) == 0 {
				if err := nl.SetSysctl(ipForward, "0"); err != nil {
					return err
				}
			} else {
				d.log.Info("leaving IP forwarding on, because devices have come since it was switched on", "devices", news)
			}
		}
		d.routed = nil
		return delTable(table{nftables.TableFamilyINet, o.Table})
	})
}

// Cleanup removes everything of an instance from this machine: its overlay
// namespaces, its devices in the host's namespace, and its nftables table there.
// What is absent is no error. Tasks' namespaces are the runtime's.
func Cleanup(instance string) error {
	d := New(Config{Instance: instance})
	defer d.Close()
	return d.Cleanup()
}

// Cleanup removes everything of the Dataplane's instance, as the function of
// that name does.
func (d *Dataplane) Cleanup() error {
	d.Close()
	names, err := nl.List(d.netnsPrefix())
	errs := []error{err}
	for _, ns := range names {
		_, ours, err := d.whoseNamespace(ns)
		if err == nil && ours {
			err = d.delNamespace(ns)
		}
		errs = append(errs, err)
	}
	errs = append(errs, d.cleanHostLinks(), d.do("", func() error {
		return delTable(membersTable(overlay.MembersTable(d.cfg.Instance)))
	}), d.delForwarding(overlay.Forwarding{Table: overlay.HostTable(d.cfg.Instance)}))
	d.Close()
	return errors.Join(errs...)
}

func (d *Dataplane) cleanHostLinks() error {
	s, err := d.in("")
	if err != nil {
		return err
	}
	links, err := nl.Dump(s.h.LinkList)
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, l := range links {
		a := l.Attrs()
		if strings.HasPrefix(a.Name, overlay.HostPrefix) && strings.HasPrefix(a.Alias, networkMarkPrefix) {
			if err := s.h.LinkDel(l); err != nil && !nl.Absent(err) {
				errs = append(errs, fmt.Errorf("delete device %s: %w", a.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}
