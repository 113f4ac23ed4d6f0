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

// minHalfClosed is the like, in seconds, for a connection that one side has
// closed and the other is still to send on: a long job's result. The kernel's
// 60 s are a complaint of Swarm's users (moby issue 37822). An hour, kube-proxy's
// value, and not MinIdle: programs that never close leave many such behind.
const minHalfClosed = 3600

// idleTimes are a new namespace's own sysctls, with their least values
// (Documentation/networking/nf_conntrack-sysctl.rst: five days and 60 s, unless
// set).
var idleTimes = []struct {
	key   string
	least int
}{
	{"net.netfilter.nf_conntrack_tcp_timeout_established", MinIdle},
	{"net.netfilter.nf_conntrack_tcp_timeout_close_wait", minHalfClosed},
}

// SetIdle sees to it that conntrack in the namespace knows idle connections for
// MinIdle, half-closed ones for an hour. A larger value stays. Without conntrack
// in the kernel its error satisfies errors.Is(err, fs.ErrNotExist).
func SetIdle() error {
	for _, t := range idleTimes {
		v, err := nl.Sysctl(t.key)
		if err == nil && !atLeast(v, t.least) {
			err = nl.SetSysctl(t.key, strconv.Itoa(t.least))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// IdleFault says what SetIdle has to set; nothing without conntrack.
func IdleFault() string {
	for _, t := range idleTimes {
		v, err := nl.Sysctl(t.key)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return ""
		case err != nil:
			return err.Error()
		case !atLeast(v, t.least):
			return fmt.Sprintf("sysctl %s is %s, less than %d", t.key, v, t.least)
		}
	}
	return ""
}

func atLeast(v string, least int) bool {
	n, err := strconv.Atoi(v)
	return err == nil && n >= least
}
