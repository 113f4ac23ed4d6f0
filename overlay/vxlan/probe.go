package vxlan

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
)

// Probe tells whether this kernel can carry an overlay, by making one of each
// kind of object in a namespace that it throws away. The error names what is
// missing and what to do.
func Probe() error {
	name := fmt.Sprintf("shoal-probe-%d-%s", os.Getpid(), spec.NewID())
	if err := nl.Create(name); err != nil {
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("network namespaces can't be made: run as root, with CAP_SYS_ADMIN and CAP_NET_ADMIN: %w", err)
		}
		return fmt.Errorf("network namespaces can't be made: the kernel needs CONFIG_NET_NS, and %s must be writable: %w", spec.NetnsDir, err)
	}
	err := nl.Do(name, probe)
	return errors.Join(err, nl.Remove(name))
}

func probe() error {
	a := netlink.NewLinkAttrs()
	a.Name = "probe"
	if err := netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: a, VxlanId: spec.MinVNI, SrcAddr: net.IPv4(192, 0, 2, 1), Port: 4789}); err != nil {
		return missing("VXLAN devices", "vxlan", "CONFIG_VXLAN", err)
	}
	a.Name = "probe2"
	v := netlink.NewVeth(a)
	v.PeerName = "probe3"
	if err := netlink.LinkAdd(v); err != nil {
		return missing("veth devices", "veth", "CONFIG_VETH", err)
	}
	if err := filterRules(overlay.Filter{Subnets: "10.0.0.0/24", Out: true}).write(); err != nil {
		return missing("nftables with NAT in family inet (5.2 or later)", "nft_chain_nat nft_masq nft_ct", "CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT, CONFIG_NFT_MASQ, CONFIG_NFT_CT", err)
	}
	if err := redirectRules(5353).write(); err != nil {
		return missing("nftables NAT", "nft_chain_nat nft_nat", "CONFIG_NFT_NAT", err)
	}
	if err := hostRules("probe", &[]string{"probe2"}).write(); err != nil {
		return missing("nftables with NAT in family inet (5.2 or later)", "nft_chain_nat nft_masq nft_ct", "CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT, CONFIG_NFT_MASQ", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	// The alias of a device is how ours are told from others'.
	if err := netlink.LinkSetAlias(lo, "shoal probe"); err != nil {
		return fmt.Errorf("the kernel does not keep a device's alias: %w", err)
	}
	if err := nl.SetSysctl(ipForward, "1"); err != nil {
		return fmt.Errorf("IP forwarding can't be switched on: /proc/sys must be writable for the agent: %w", err)
	}
	return nil
}

func missing(what, modules, config string, err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%s can't be made: run as root, with CAP_NET_ADMIN: %w", what, err)
	}
	return fmt.Errorf("the kernel has no %s: load it with 'modprobe -a %s', or use a kernel with %s: %w", what, modules, config, err)
}
