package viptest

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/internal/nl"
)

// NeedRoot skips the test without the right to make namespaces.
func NeedRoot(tb testing.TB) {
	tb.Helper()
	if os.Getuid() != 0 {
		Skip(tb, "missing: root (CAP_SYS_ADMIN and CAP_NET_ADMIN), to make network namespaces")
	}
}

// Sh runs a command line, words separated by single spaces, and returns its
// output. It fails the test when the command fails.
func Sh(tb testing.TB, line string) string {
	tb.Helper()
	w := strings.Split(line, " ")
	out, err := exec.Command(w[0], w[1:]...).CombinedOutput()
	if err != nil {
		tb.Fatalf("%s: %v: %s", line, err, out)
	}
	return string(out)
}

// In runs a command line inside a namespace.
func In(tb testing.TB, ns, line string) string {
	tb.Helper()
	return Sh(tb, "ip netns exec "+ns+" "+line)
}

// AddNamespace makes a namespace as the overlay does, as far as VIPs care.
func AddNamespace(tb testing.TB, name string) {
	tb.Helper()
	if err := nl.Create(name); err != nil {
		tb.Fatal(err)
	}
	err := nl.Do(name, func() error {
		for _, kv := range []string{"net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0",
			"net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.default.send_redirects=0", "net.ipv6.conf.all.forwarding=1"} {
			k, v, _ := strings.Cut(kv, "=")
			if err := nl.SetSysctl(k, v); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	Sh(tb, "ip -n "+name+" addr add "+addr(1).String()+"/32 dev lo")
	Sh(tb, "ip -n "+name+" addr add "+addr6(1).String()+"/128 dev lo nodad")
}

// RemoveNamespace removes a namespace.
func RemoveNamespace(tb testing.TB, name string) {
	tb.Helper()
	if err := nl.Remove(name); err != nil {
		tb.Error(err)
	}
}

// Native tells whether the machine runs at its own speed: in an emulated one,
// limits of time mean nothing.
func Native() bool {
	b, _ := os.ReadFile("/proc/cpuinfo")
	return !strings.Contains(string(b), "QEMU TCG")
}

// Foreign puts a stranger's table, address and loopback route in a namespace.
func Foreign(tb testing.TB, ns string) (check func(tb testing.TB)) {
	tb.Helper()
	foreign := addr(77).String()
	Sh(tb, "ip -n "+ns+" addr add "+foreign+"/32 dev lo")
	In(tb, ns, "nft add table ip other ; add map ip other vips { type ipv4_addr : verdict ; elements = { "+foreign+" : accept } } ; add chain ip other vip-10.213.7.2")
	ls := func(tb testing.TB) string {
		return In(tb, ns, "nft list table ip other") + Sh(tb, "ip -n "+ns+" -br addr show dev lo")
	}
	before := ls(tb)
	return func(tb testing.TB) {
		tb.Helper()
		In(tb, ns, "nft list ruleset") // nft(8) can show what there is
		if after := ls(tb); after != before {
			tb.Errorf("a stranger's objects were\n%s\nand are\n%s", before, after)
		}
	}
}

// ConntrackIdle reads for how long a namespace tracks an idle TCP connection.
func ConntrackIdle(tb testing.TB, ns string) map[string]time.Duration {
	return conntrackTime(tb, ns, "established")
}

func conntrackTime(tb testing.TB, ns, state string) map[string]time.Duration {
	tb.Helper()
	out := map[string]time.Duration{}
	err := nl.Do(ns, func() error {
		key := "net.netfilter.nf_conntrack_tcp_timeout_" + state
		v, err := nl.Sysctl(key)
		if err != nil {
			return err
		}
		n, err := strconv.Atoi(v)
		out[key] = time.Duration(n) * time.Second
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return out
}
