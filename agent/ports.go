package agent

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	errAddrInUse    = unix.EADDRINUSE
	errAddrNotAvail = unix.EADDRNOTAVAIL
)

// checkUDPPort tells whether a UDP port can be had. One that no process holds
// is the kernel's own, a VXLAN device's, which can be shared.
func checkUDPPort(what string, addr netip.AddrPort, flag string) error {
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
	if err == nil {
		return c.Close()
	}
	if what == "VXLAN" && portOwner("udp", addr.Port()) == "" {
		return nil
	}
	return listenError(what, "udp", addr, flag, err)
}

// portOwner names a program of this machine that holds a port, "" when there
// is none or it can't be found (proc(5): /proc/net/tcp, /proc/PID/fd).
func portOwner(proto string, port uint16) string {
	inodes := map[string]bool{}
	for _, file := range []string{"/proc/net/" + proto, "/proc/net/" + proto + "6"} {
		f, err := os.Open(file)
		if err != nil {
			continue
		}
		sc := bufio.NewScanner(f)
		for sc.Scan() {
			fs := strings.Fields(sc.Text())
			if len(fs) < 10 || !strings.HasSuffix(fs[1], fmt.Sprintf(":%04X", port)) {
				continue
			}
			if proto == "tcp" && fs[3] != "0A" { // TCP_LISTEN
				continue
			}
			inodes["socket:["+fs[9]+"]"] = true
		}
		f.Close()
	}
	if len(inodes) == 0 {
		return ""
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if l, err := os.Readlink(fd); err == nil && inodes[l] {
			pid := strings.Split(fd, "/")[2]
			comm, _ := os.ReadFile("/proc/" + pid + "/comm")
			return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(comm)), pid)
		}
	}
	return ""
}

// advertiseAddr resolves what the user gave: an address, an interface's name,
// or nothing, which is the address that the default route would use.
func advertiseAddr(s string) (netip.Addr, error) {
	if s == "" {
		// connect(2) of a UDP socket sends nothing: it only picks the route
		// and its source address. 192.0.2.1 is documentation space (RFC 5737).
		c, err := net.Dial("udp4", "192.0.2.1:9")
		if err != nil {
			return netip.Addr{}, fmt.Errorf("no address to advertise: there is no default route: give --advertise-addr")
		}
		defer c.Close()
		return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
	}
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		a = a.Unmap()
		if a.IsUnspecified() || a.IsMulticast() {
			return netip.Addr{}, fmt.Errorf("advertise address %s can't be reached by others: give one of this machine's addresses", a)
		}
		return a, nil
	}
	ifi, err := net.InterfaceByName(s)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("advertise address %q is neither an address nor an interface of this machine", s)
	}
	addrs, err := ifi.Addrs()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("addresses of interface %s: %w", s, err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && !p.Addr().IsLinkLocalUnicast() {
			return p.Addr().Unmap(), nil
		}
	}
	return netip.Addr{}, fmt.Errorf("interface %s has no address to advertise", s)
}
