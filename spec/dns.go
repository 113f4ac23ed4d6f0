package spec

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// HostGateway, as the address of an extra host, stands for the node that the
// task runs on, as in Docker's --add-host.
const HostGateway = "host-gateway"

// HostName is the name of the node that a task runs on, in the task's hosts
// file: the like of Docker's host.docker.internal.
const HostName = "host.shoal.internal"

// DNSAddr is where a task's name server is, as in Docker.
var DNSAddr = netip.AddrFrom4([4]byte{127, 0, 0, 11})

// dnsOptionRE is a word of resolv.conf(5)'s options: "rotate", "ndots:2".
var dnsOptionRE = regexp.MustCompile(`^[a-z0-9-]+(:[0-9]+)?$`)

func (t TaskSpec) validateDNS() error {
	for _, a := range t.DNS {
		if !a.IsValid() || a.IsMulticast() || a.IsUnspecified() {
			return fmt.Errorf("DNS server %s: want the address of a resolver", a)
		}
		if a.Unmap() == DNSAddr {
			return fmt.Errorf("DNS server %s: is the task's name server itself: give the resolver that it is to ask, or none for the node's", a)
		}
	}
	for _, d := range t.DNSSearch {
		if d == "." {
			continue
		}
		if len(d) > 253 {
			return fmt.Errorf("search domain %q is longer than 253 characters", d)
		}
		for label := range strings.SplitSeq(strings.TrimSuffix(d, "."), ".") {
			if err := ValidateName("search domain", label); err != nil {
				return err
			}
		}
	}
	for _, o := range t.DNSOptions {
		if !dnsOptionRE.MatchString(o) {
			return fmt.Errorf("DNS option %q: want one of resolv.conf(5), like ndots:2 or use-vc", o)
		}
	}
	for _, l := range t.Links {
		target, alias := ParseLink(l)
		if err := ValidateName("link", target); err != nil {
			return err
		}
		if err := ValidateName("link alias", alias); err != nil {
			return err
		}
	}
	for _, e := range t.Expose {
		if _, _, err := ParseExpose(e); err != nil {
			return err
		}
	}
	for _, h := range t.ExtraHosts {
		if _, _, err := ParseExtraHost(h); err != nil {
			return err
		}
	}
	return nil
}

// A NewName is a name that programs may ask for, and what it is of.
type NewName struct{ Kind, Name string }

// Validate is [ValidateNewName] for a name that is of the right form.
func (n NewName) Validate() error { return checkNoAddress(n.Kind, n.Name) }

// Names are those that the spec gives: to the task, or to others for the task.
func (t TaskSpec) Names() []NewName {
	var out []NewName
	if t.Hostname != "" {
		out = append(out, NewName{"host", t.Hostname})
	}
	for _, l := range t.Links {
		_, alias := ParseLink(l)
		out = append(out, NewName{"link alias", alias})
	}
	for _, h := range t.ExtraHosts {
		if name, _, err := ParseExtraHost(h); err == nil {
			out = append(out, NewName{"extra host", name})
		}
	}
	return out
}

// Names are those that an attachment gives.
func (a NetworkAttachment) Names() []NewName {
	var out []NewName
	for _, al := range a.Aliases {
		out = append(out, NewName{"alias", al})
	}
	return out
}

// Names are those that the spec gives.
func (s ServiceSpec) Names() []NewName {
	out := append([]NewName{{"service", s.Name}}, s.Task.Names()...)
	for _, a := range s.Networks {
		out = append(out, a.Names()...)
	}
	return out
}

// ParseExtraHost parses NAME:ADDRESS or NAME=ADDRESS. The address is the zero
// Addr for [HostGateway].
func ParseExtraHost(s string) (name string, addr netip.Addr, err error) {
	i := strings.IndexAny(s, "=:")
	if i < 0 {
		return "", addr, fmt.Errorf("extra host %q: want NAME:ADDRESS", s)
	}
	name = s[:i]
	if err := ValidateHostname(name); err != nil {
		return "", addr, fmt.Errorf("extra host %q: %w", s, err)
	}
	v := strings.Trim(s[i+1:], "[]")
	if v == HostGateway {
		return name, addr, nil
	}
	if addr, err = netip.ParseAddr(v); err != nil {
		return "", addr, fmt.Errorf("extra host %q: %q is neither an address nor %s", s, v, HostGateway)
	}
	return name, addr, nil
}

// ParseLink splits TARGET[:ALIAS], as of Docker's --link; the alias is the
// target's name without one.
func ParseLink(s string) (target, alias string) {
	target, alias, ok := strings.Cut(s, ":")
	if !ok {
		alias = target
	}
	return target, alias
}

// ParseExpose parses PORT[/PROTOCOL]; the protocol is tcp without one.
func ParseExpose(s string) (port uint16, protocol string, err error) {
	num, protocol, ok := strings.Cut(s, "/")
	if !ok {
		protocol = TCP
	}
	n, err := strconv.ParseUint(num, 10, 16)
	if err != nil || n == 0 || (protocol != TCP && protocol != UDP && protocol != SCTP) {
		return 0, "", fmt.Errorf("exposed port %q: want PORT/PROTOCOL, like 5432/tcp", s)
	}
	return uint16(n), protocol, nil
}
