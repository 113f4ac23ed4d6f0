package kern

import (
	"errors"
	"io/fs"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/vip"
)

// The kernel limits the ICMP errors it sends to one destination to one a second
// after a burst of six (icmp_ratelimit), and "port unreachable" is how a UDP
// client is refused: limited, a refusal becomes a timeout. These are the
// defaults of the masks of limited types, less "destination unreachable" (type
// 3, in IPv6 type 1), and for IPv6 less "parameter problem" (type 4), by which a
// kernel without SCTP refuses SCTP. The limit on all errors of the namespace together
// (icmp_msgs_per_sec) stays. See kernel: Documentation/networking/ip-sysctl.rst.
var icmpMask = map[bool]struct{ key, value string }{
	false: {"net.ipv4.icmp_ratemask", "6160"}, // 6168 without bit 3
	true:  {"net.ipv6.icmp.ratemask", "0,3,5-127"},
}

// SetICMP lets the namespace refuse UDP and SCTP at once however often.
func SetICMP(n vip.Network) error {
	var errs []error
	for _, f := range Families(n) {
		s := icmpMask[f.V6]
		if err := nl.SetSysctl(s.key, s.value); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// ICMPFault says what SetICMP has to set.
func ICMPFault(n vip.Network) string {
	for _, f := range Families(n) {
		s := icmpMask[f.V6]
		if v, err := nl.Sysctl(s.key); err == nil && v != s.value {
			return "sysctl " + s.key + " is " + v
		}
	}
	return ""
}
