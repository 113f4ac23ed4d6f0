package kern

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"github.com/shoalnet/shoal/internal/nl"
)

// MinIdle is the least time, in seconds, for which an idle TCP connection has
// to be known: the first keepalive comes after 7200 s (tcp_keepalive_time,
// tcp(7)), and nine more 75 s apart. What is forgotten before is reset, or
// balanced to another backend, when either side speaks again.
//
// It is for TCP alone. A UDP flow has no end, and here no keepalive either:
// known for hours, every flow there ever was would fill the table, and a source
// port used again would reach the backend of then, even a draining one.
const MinIdle = 7200 + 10*75

// keyEstablished is a new namespace's own; the kernel's default is five days
// (Documentation/networking/nf_conntrack-sysctl.rst).
const keyEstablished = "net.netfilter.nf_conntrack_tcp_timeout_established"

// SetIdle sees to it that conntrack in the namespace knows idle connections for
// MinIdle. A larger value stays. Without conntrack in the kernel its error
// satisfies errors.Is(err, fs.ErrNotExist).
func SetIdle() error {
	v, err := nl.Sysctl(keyEstablished)
	if err != nil || longIdle(v) {
		return err
	}
	return nl.SetSysctl(keyEstablished, strconv.Itoa(MinIdle))
}

// IdleFault says what SetIdle has to set; nothing without conntrack.
func IdleFault() string {
	v, err := nl.Sysctl(keyEstablished)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ""
	case err != nil:
		return err.Error()
	case !longIdle(v):
		return fmt.Sprintf("sysctl %s is %s, less than %d", keyEstablished, v, MinIdle)
	}
	return ""
}

func longIdle(v string) bool {
	n, err := strconv.Atoi(v)
	return err == nil && n >= MinIdle
}
