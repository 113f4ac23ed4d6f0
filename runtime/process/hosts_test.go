package process

import (
	"net/netip"
	"testing"
)

func TestWithHost(t *testing.T) {
	addrs := func(in ...string) (out []netip.Addr) {
		for _, a := range in {
			out = append(out, netip.MustParseAddr(a))
		}
		return out
	}
	before := "127.0.0.1\tlocalhost\n10.0.0.5\tbox\n10.9.9.9 box extra\n10.9.9.8\tother"
	for _, c := range []struct {
		addrs []netip.Addr
		want  string
	}{
		{addrs("10.0.0.5"), before + "\n"},
		{addrs("10.0.1.7"), "127.0.0.1\tlocalhost\n10.9.9.9 box extra\n10.9.9.8\tother\n10.0.1.7\tbox\n"},
		{addrs("10.0.0.5", "10.0.1.7"), before + "\n10.0.1.7\tbox\n"},
		{nil, "127.0.0.1\tlocalhost\n10.9.9.9 box extra\n10.9.9.8\tother\n"},
	} {
		got := withHost(before, "box", c.addrs)
		if got != c.want {
			t.Errorf("%v: %q, want %q", c.addrs, got, c.want)
		}
		if again := withHost(got, "box", c.addrs); again != got {
			t.Errorf("%v: not the same when done twice: %q", c.addrs, again)
		}
	}
	if got := withHost("10.0.0.1\tbox\n10.0.0.1\tbox\n", "box", addrs("10.0.0.1")); got != "10.0.0.1\tbox\n" {
		t.Errorf("twice the same: %q", got)
	}
}
