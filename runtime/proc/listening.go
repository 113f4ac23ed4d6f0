package proc

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/shoalnet/shoal/internal/nl"
)

// Socket states in /proc/net/{tcp,udp} (proc_pid_net(5);
// include/net/tcp_states.h).
const (
	tcpListen      = "0A"
	udpUnconnected = "07" // TCP_CLOSE
)

// The kernel's default net.ipv4.ip_local_port_range, which every new network
// namespace has and a task can't change: a UDP socket bound in it is most
// probably a client's, such as a resolver's.
const ephemeralFirst, ephemeralLast = 32768, 60999

// Listening implements runtime.Runtime. It looks from inside the task's network
// namespace: by a pid of the task it could be led to another's.
func (r *Runtime) Listening(_ context.Context, id string) (bool, error) {
	e, err := r.get(id)
	if err != nil {
		return false, err
	}
	up := false
	err = nl.Do(e.netns, func() error {
		for _, f := range []struct{ name, state string }{{"tcp", tcpListen}, {"tcp6", tcpListen}, {"udp", udpUnconnected}, {"udp6", udpUnconnected}} {
			file, err := os.Open("/proc/thread-self/net/" + f.name)
			if errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
				continue
			}
			if err != nil {
				return err
			}
			up, err = listens(file, f.state)
			file.Close()
			if err != nil {
				return fmt.Errorf("%s: %w", file.Name(), err)
			}
			if up {
				return nil
			}
		}
		return nil
	})
	if errors.Is(err, os.ErrNotExist) { // released
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("task %s: %w", e.name, err)
	}
	return up, nil
}

// listens looks for a socket in a state that takes traffic from outside.
func listens(r io.Reader, state string) (bool, error) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 4 || f[3] != state {
			continue
		}
		ap, err := parseSocketAddr(f[1])
		if err != nil {
			continue // the header
		}
		p := ap.Port()
		if ap.Addr().Unmap().IsLoopback() || p == 0 || state == udpUnconnected && p >= ephemeralFirst && p <= ephemeralLast {
			continue
		}
		return true, nil
	}
	return false, sc.Err()
}

// parseSocketAddr reads ADDRESS:PORT in hexadecimal: an address is one or four
// words of 32 bits in the byte order of the machine.
func parseSocketAddr(s string) (netip.AddrPort, error) {
	as, ps, ok := strings.Cut(s, ":")
	b, err := hex.DecodeString(as)
	if !ok || err != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, fmt.Errorf("socket address %q is malformed", s)
	}
	port, err := strconv.ParseUint(ps, 16, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("socket address %q: %w", s, err)
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a, uint16(port)), nil
}
