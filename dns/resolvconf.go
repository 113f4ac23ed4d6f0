package dns

import (
	"bufio"
	"bytes"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
)

// checkInterval is how long resolv.conf is taken to be as it was.
const checkInterval = time.Second

// Upstreams returns a function that gives the resolvers of a resolv.conf(5), as
// it is now: the file is read again when it has changed. A file that is absent
// has none.
func Upstreams(path string) func() []netip.AddrPort {
	var (
		mu      sync.Mutex
		checked time.Time
		stat    os.FileInfo
		servers []netip.AddrPort
	)
	return func() []netip.AddrPort {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(checked) < checkInterval {
			return servers
		} else {
			checked = now
		}
		fi, err := os.Stat(path)
		if err != nil {
			stat, servers = nil, nil
			return nil
		}
		if stat != nil && os.SameFile(stat, fi) && stat.ModTime().Equal(fi.ModTime()) && stat.Size() == fi.Size() {
			return servers
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return servers
		}
		stat, servers = fi, parseResolvConf(b)
		return servers
	}
}

// parseResolvConf returns the name servers of a resolv.conf(5), in its order,
// once each.
func parseResolvConf(b []byte) []netip.AddrPort {
	var out []netip.AddrPort
	seen := map[netip.Addr]bool{}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		a, err := netip.ParseAddr(f[1])
		if err != nil || seen[a] {
			continue
		}
		seen[a] = true
		out = append(out, netip.AddrPortFrom(a, 53))
	}
	return out
}
