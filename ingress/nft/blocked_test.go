package nft

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/spec"
)

func TestBlocked(t *testing.T) {
	needKernel(t)
	for _, c := range []struct{ name, rules, want string }{
		{"nothing", "", ""},
		{"Docker", `table ip filter {
			chain DOCKER-USER { }
			chain FORWARD { type filter hook forward priority 0 ; policy drop ; jump DOCKER-USER ; }
		}`, "table ip filter, chain FORWARD"},
		{"Docker that lets us", `table ip filter {
			chain DOCKER-USER { iifname "sho*" accept
				oifname "sho*" accept
			}
			chain FORWARD { type filter hook forward priority 0 ; policy drop ; jump DOCKER-USER ; }
		}`, ""},
		{"firewalld", `table inet firewalld {
			chain filter_FORWARD { type filter hook forward priority 10 ; policy accept ; ct state established accept
				reject with icmpx admin-prohibited
			}
		}`, "firewall-cmd"},
		{"own", `table inet mine {
			chain pass { type filter hook forward priority 0 ; policy drop ; }
		}`, `insert rule inet mine pass iifname "sho*" accept`},
		{"ours", `table inet shoal-egress {
			chain pass { type filter hook forward priority 0 ; policy drop ; }
		}`, ""},
		{"with a direction", `table inet mine {
			chain pass { type filter hook forward priority 0 ; policy accept ; tcp dport 80 ct direction original accept ; }
		}`, ""},
		{"input", `table inet mine {
			chain in { type filter hook input priority 0 ; policy drop ; tcp dport 22 accept ; }
		}`, "4789/udp"},
		{"input with VXLAN", `table inet mine {
			chain in { type filter hook input priority 0 ; policy drop ; udp dport 4789 accept ; }
		}`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := "ingb" + spec.NewID()[:6]
			addNetns(t, ns)
			if c.rules != "" {
				file := filepath.Join(t.TempDir(), "rules")
				if err := os.WriteFile(file, []byte(c.rules), 0o600); err != nil {
					t.Fatal(err)
				}
				if out, err := exec.Command("ip", "netns", "exec", ns, "nft", "-f", file).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			got, err := New(Config{Instance: "ingb", HostNetns: ns}).Blocked(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if text := strings.Join(got, "\n"); (c.want == "") != (text == "") || !strings.Contains(text, c.want) {
				t.Errorf("got %q, want %q", text, c.want)
			}
		})
	}
}

func TestLegacyDrops(t *testing.T) {
	for rules, want := range map[string]bool{
		"-P INPUT ACCEPT\n-P FORWARD DROP\n":                     true,
		"-P FORWARD ACCEPT\n":                                    false,
		"-P FORWARD DROP\n-A DOCKER-USER -i sho+ -j ACCEPT\n":    false,
		"-P FORWARD DROP\n-A DOCKER-USER -i docker0 -j ACCEPT\n": true,
	} {
		if got := legacyDrops(rules); got != want {
			t.Errorf("%q: %v", rules, got)
		}
	}
}
