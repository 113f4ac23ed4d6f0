package spec

import (
	"crypto/rand"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// IDLen is the length of every ID made by [NewID].
const IDLen = 12

const idAlphabet = "abcdefghijklmnopqrstuvwxyz234567"

// NewID returns a random 60-bit ID of [IDLen] characters from a-z and 2-7.
// An ID is short enough that a prefix and the whole ID fit a Linux interface
// name (IFNAMSIZ 16, with its final NUL).
func NewID() string {
	var b [IDLen]byte
	rand.Read(b[:]) // never fails: crypto/rand documents that it crashes instead
	for i := range b {
		b[i] = idAlphabet[b[i]&31]
	}
	return string(b[:])
}

// IsID tells whether a text is an ID as [NewID] makes them.
func IsID(id string) bool {
	return len(id) == IDLen && strings.Trim(id, idAlphabet) == ""
}

var (
	nameRE = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9_.-]*[a-zA-Z0-9])?$`)
	hostRE = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?$`)
)

// MaxNameLen is the longest name of a network, service, task or node. A name
// is also a DNS label, whose limit is 63 octets (RFC 1035, section 2.3.4).
const MaxNameLen = 63

// ValidateName reports why name can't name an object of the given kind
// ("network", "service", …), or nil.
func ValidateName(kind, name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%s name is empty", kind)
	case len(name) > MaxNameLen:
		return fmt.Errorf("%s name %q is %d characters long: the longest allowed is %d", kind, name, len(name), MaxNameLen)
	case !nameRE.MatchString(name):
		return fmt.Errorf("%s name %q: use letters, digits, '-', '_' and '.', beginning and ending with a letter or digit", kind, name)
	}
	return nil
}

// ValidateNewName is ValidateName for a name that nothing has yet: it may not read
// as an address, either. A cluster may have such names from before.
func ValidateNewName(kind, name string) error {
	if err := ValidateName(kind, name); err != nil {
		return err
	}
	return checkNoAddress(kind, name)
}

func checkNoAddress(kind, name string) error {
	if a, ok := ReadsAsAddress(name); ok {
		return fmt.Errorf("%s name %q is the address %s to programs, which never ask for it as a name: begin it with a letter", kind, name, a)
	}
	return nil
}

// ReadsAsAddress tells whether a C library takes a name for an IPv4 address, and
// for which: one to four numbers, decimal, octal (0…) or hexadecimal (0x…), the
// last of which fills what the others leave (inet_aton(3); glibc and musl agree).
func ReadsAsAddress(name string) (netip.Addr, bool) {
	parts := strings.Split(name, ".")
	if len(parts) > 4 {
		return netip.Addr{}, false
	}
	var out uint64
	for i, p := range parts {
		digits, base := p, 10
		switch {
		case len(p) > 2 && (p[:2] == "0x" || p[:2] == "0X"):
			digits, base = p[2:], 16
		case len(p) > 1 && p[0] == '0':
			base = 8
		}
		if digits == "" || strings.ContainsAny(digits, "_+-") {
			return netip.Addr{}, false
		}
		n, err := strconv.ParseUint(digits, base, 32)
		bits := 8
		if i == len(parts)-1 {
			bits = 32 - 8*i
		}
		if err != nil || n>>bits != 0 {
			return netip.Addr{}, false
		}
		out = out<<bits | n
	}
	return netip.AddrFrom4([4]byte{byte(out >> 24), byte(out >> 16), byte(out >> 8), byte(out)}), true
}

// ValidateServiceName is ValidateNewName for a service, whose name has no dot, as in
// Swarm: NAME.NETWORK, tasks.NAME and NAME.SLOT belong to the service NAME.
func ValidateServiceName(name string) error {
	if err := ValidateNewName("service", name); err != nil {
		return err
	}
	if strings.Contains(name, ".") {
		return fmt.Errorf("service name %q has a dot: use letters, digits, '-' and '_'; %s may be an alias of it: --network name=NETWORK,alias=%s", name, name, name)
	}
	return nil
}

// ValidateHostname reports why name can't be the host name of a task: one or
// more labels of letters, digits and hyphens, 64 characters at most
// (sethostname(2): HOST_NAME_MAX).
func ValidateHostname(name string) error {
	if name == "" || len(name) > 64 {
		return fmt.Errorf("hostname %q: use 1 to 64 characters", name)
	}
	for start, i := 0, 0; i <= len(name); i++ {
		if i == len(name) || name[i] == '.' {
			if l := name[start:i]; len(l) > 63 || !hostRE.MatchString(l) {
				return fmt.Errorf("hostname %q: each label is letters, digits and '-', beginning and ending with a letter or digit", name)
			}
			start = i + 1
		}
	}
	return nil
}
