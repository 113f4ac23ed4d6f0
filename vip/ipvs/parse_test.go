package ipvs

import (
	"fmt"
	"strings"
	"testing"
)

func TestParseProc(t *testing.T) {
	got, err := parseProc(strings.NewReader(`IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0AD5074D:0050 lc 
  -> 0AD507C9:1F90      Masq    1      0          0
FWM  10000002 rr 
  -> 0A000103:0000      Masq    1      0          0
  -> 0A000104:0000      Masq    0      12         3
FWM  11000002 rr 
  -> [fd00:0001:0000:0000:0000:0000:0000:0011]:0000      Masq    1      0          0
FWM  00000007 wrr persistent 60 FFFFFFFF
  -> 0AD507C8:0050      Route   3      0          0
UDP  0AD5074D:0035 rr 
  -> 0AD507C9:0035      Masq    1      0          0
`))
	if err != nil {
		t.Fatal(err)
	}
	want := map[uint32]string{
		0x10000002: "10.0.1.3 0 Masq 1; 10.0.1.4 0 Masq 0; ",
		0x11000002: "fd00:1::11 0 Masq 1; ",
		7:          "10.213.7.200 80 Route 3; ",
	}
	for m, w := range want {
		s := ""
		for _, d := range got[m] {
			s += fmt.Sprintf("%s %d %s %d; ", d.addr, d.port, d.forward, d.weight)
		}
		if s != w {
			t.Errorf("mark %#x: %s, want %s", m, s, w)
		}
	}
	if len(got) != len(want) {
		t.Errorf("services %v", got)
	}
}

func FuzzParseProc(f *testing.F) {
	f.Add("FWM  10000002 rr \n  -> 0A000103:0000      Masq    1      0          0\n")
	f.Add("FWM  1 rr\n -> [::1]:0 Masq x 0\n -> : : :\n")
	f.Fuzz(func(t *testing.T, s string) { parseProc(strings.NewReader(s)) })
}

// TestFlip: ports that Linux hands out and their images are disjoint, and the
// map is its own inverse.
func TestFlip(t *testing.T) {
	for p := range 1 << 16 {
		q := Flip(uint16(p))
		if Flip(q) != uint16(p) {
			t.Fatalf("flip of %d is %d, whose flip is %d", p, q, Flip(q))
		}
		if p >= 1024 && q < 1024 {
			t.Errorf("port %d becomes the privileged %d", p, q)
		}
		if p >= 32768 && p <= 60999 && q >= 32768 {
			t.Errorf("ephemeral port %d becomes %d, which is ephemeral too", p, q)
		}
	}
}
