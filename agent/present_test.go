package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/shoalnet/shoal/internal/nl"
)

// TestPresent: a machine is there if either of the two ways to ask has an answer.
func TestPresent(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("SHOAL_TEST_STRICT") == "1" {
			t.Fatal("needs root, for a network namespace")
		}
		t.Skip("needs root, for a network namespace")
	}
	name := fmt.Sprintf("shoal-present%d", os.Getpid())
	if err := nl.Create(name); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = nl.Remove(name) }()
	in := func(fn func() error) {
		t.Helper()
		if err := nl.Do(name, fn); err != nil {
			t.Fatal(err)
		}
	}
	sh := func(line string) {
		t.Helper()
		in(func() error {
			if out, err := exec.Command("sh", "-ec", line).CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", line, err, out)
			}
			return nil
		})
	}
	sh("ip link set lo up")
	var busy net.Listener
	in(func() (err error) { busy, err = net.Listen("tcp", "[::]:7946"); return err })
	defer busy.Close()
	const noTCP, noEcho = "nft add rule inet t in tcp dport 1-65535 drop", "nft 'add rule inet t in icmp type echo-request drop; add rule inet t in icmpv6 type echo-request drop'"
	for _, tc := range []struct {
		name          string
		rules         []string
		port          uint16
		connect, echo bool
	}{
		{"an agent", nil, 7946, true, true},
		{"no agent", nil, 7947, true, true},
		{"an agent that takes nothing", []string{noTCP}, 7946, false, true},
		{"no echoes", []string{noEcho}, 7947, true, false},
		{"nothing", []string{noTCP, noEcho}, 7946, false, false},
	} {
		sh("nft 'add table inet t; delete table inet t; add table inet t; add chain inet t in { type filter hook input priority 0; }'")
		for _, r := range tc.rules {
			sh(r)
		}
		for _, ip := range []string{"127.0.0.1", "::1"} {
			at := netip.AddrPortFrom(netip.MustParseAddr(ip), tc.port)
			for what, ask := range map[string]struct {
				fn   func(context.Context, netip.AddrPort) bool
				want bool
			}{"connects": {connects, tc.connect}, "echoes": {echoes, tc.echo}} {
				in(func() error {
					// Long for what has an answer, on a busy machine.
					wait := 250 * time.Millisecond
					if ask.want {
						wait = 10 * time.Second
					}
					ctx, cancel := context.WithTimeout(t.Context(), wait)
					defer cancel()
					if got := ask.fn(ctx, at); got != ask.want {
						t.Errorf("%s at %s: %s is %t", tc.name, ip, what, got)
					}
					return nil
				})
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if !present(ctx, netip.MustParseAddrPort("127.0.0.1:1")) {
		t.Error("this machine is not there")
	}
	cancel()
	if present(ctx, netip.MustParseAddrPort("127.0.0.1:1")) {
		t.Error("an answer without a question")
	}
}
