package vxlan

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/overlay"
)

// mutation is one thing that somebody may do in a namespace; DEV stands for one of
// its devices, ADDR for an address there, RULE for the priority of a rule and so on.
type mutation string

var mutations = []mutation{
	"ip rule flush", "ip -6 rule flush", "ip rule del priority 0", "ip rule del priority 32766", "ip rule add priority 5 prohibit", "ip rule add priority 7 from all lookup 77",
	"ip rule add priority 9 iif DEV blackhole", "ip rule add priority 11 to 10.0.0.0/8 lookup 77", "ip rule add priority 1000 protocol 84 lookup 77",
	"ip route flush table local", "ip route flush table main", "ip -6 route flush table main", "ip -6 route flush table local", "ip route add blackhole 10.0.0.0/9", "ip route add prohibit 0.0.0.0/1", "ip route add 10.0.1.0/26 dev DEV",
	"ip route add unreachable 0.0.0.0/0 table 77", "ip route add local 10.0.0.0/8 dev lo table local", "ip route add 172.29.0.0/16 dev DEV proto kernel", "ip route add throw 10.0.1.0/25 proto 84", "ip -6 route add blackhole fd00::/9",
	"ip route del ROUTE", "ip addr flush dev DEV", "ip addr del ADDR dev DEV", "ip addr add 10.0.1.77/32 dev DEV", "ip addr add 10.0.1.78/24 dev lo", "ip -6 addr add fd00:77::1/64 dev DEV",
	"ip link set DEV down", "ip link set DEV up mtu 1300", "ip link set DEV alias nobody", "ip link set DEV alias", "ip link set DEV address 02:00:00:00:00:99", "ip link set DEV arp off",
	"ip link set DEV down name renamed0", "ip link del DEV", "ip link add dummy7 type dummy", "ip link add dummy8 up type dummy", "ip link add br7 type bridge", "ip link set lo down", "ip link set lo alias nobody",
	"ip link set vx type vxlan ttl 1", "ip link set vx type vxlan learning", "ip neigh flush all nud permanent", "ip neigh replace NEIGH lladdr 02:00:00:00:00:98 nud permanent",
	"tc qdisc add dev DEV root netem loss 100%", "tc qdisc add dev DEV root pfifo limit 0", "tc qdisc add dev DEV ingress", "tc qdisc add dev DEV clsact",
	"nft flush ruleset", "nft add table inet evil { chain c { type filter hook forward priority 0; policy drop; } ; }", "nft add table ip evil { chain c { type filter hook output priority 0; policy drop; } ; }",
	"nft add table netdev evil", "nft delete table inet shoal-overlay", "nft add table inet shoal-overlay { flags dormant ; }", "nft insert rule inet shoal-overlay forward drop", "nft flush set inet shoal-overlay guard",
	"sysctl -qw net.ipv4.ip_forward=0", "sysctl -qw net.ipv4.conf.all.rp_filter=1", "sysctl -qw net.ipv4.conf.DEV.rp_filter=1", "sysctl -qw net.ipv4.conf.DEV.forwarding=0", "sysctl -qw net.ipv6.conf.DEV.disable_ipv6=1",
	"sysctl -qw net.ipv6.conf.all.disable_ipv6=1", "bridge fdb del FDB", "nft flush chain ip shoal output", "nft add rule ip shoal output drop",
}

// fingerprint is all that can be seen of a namespace, but for what is another each
// time: indexes, handles, counters, lifetimes.
func fingerprint(t *testing.T, ns string) string {
	t.Helper()
	var b strings.Builder
	cmds := []string{"ip -o -d link", "ip -o addr", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "ip neigh show nud permanent", "bridge fdb show dev vx", "tc qdisc", "nft list ruleset"}
	script := ""
	for _, c := range cmds {
		script += c + " 2>/dev/null; echo ----\n"
	}
	all, err := exec.Command("ip", "netns", "exec", ns, "sh", "-c", script).Output()
	if err != nil {
		t.Fatalf("look at %s: %v", ns, err)
	}
	for i, c := range cmds {
		out := strings.Split(string(all), "----\n")[i]
		lines := strings.Split(volatile.ReplaceAllString(string(out), ""), "\n")
		if !strings.HasPrefix(c, "nft") && !strings.HasSuffix(c, "rule") {
			slices.Sort(lines)
		} else if strings.HasPrefix(c, "nft") {
			slices.Sort(lines) // sets and tables in the order of their making
		}
		lines = slices.DeleteFunc(lines, func(l string) bool {
			// Of IPv6 these depend on whether a device was down for a moment.
			return strings.TrimSpace(l) == "" || strings.Contains(l, "ff00::/8") || strings.Contains(l, "fe80::") && !strings.Contains(l, "fe80::1") || strings.Contains(l, "anycast") ||
				// Broadcasts go nowhere here, and /128 routes beside table local's are of no use.
				strings.HasPrefix(l, "broadcast") || connected128.MatchString(l)
		})
		for i, l := range lines {
			lines[i] = strings.Join(strings.Fields(l), " ")
			if strings.HasPrefix(l, "out:") { // whatever the kernel gave it
				lines[i] = etherAddr.ReplaceAllString(lines[i], "")
			}
		}
		lines = slices.Compact(lines)
		fmt.Fprintf(&b, "# %s\n%s\n", c, strings.Join(lines, "\n"))
	}
	return b.String()
}

var etherAddr = regexp.MustCompile(`link/ether \S+`)

var connected128 = regexp.MustCompile(`^[0-9a-f:]+ dev \S+ (table \S+ )?proto kernel metric 256`)

var volatile = regexp.MustCompile(`(?m)^\d+: |@if\d+|@\S+:|link-netnsid \d+|link-netns \S+|\bqlen \d+|numtxqueues.*|valid_lft.*|noprefixroute|packets \d+ bytes \d+|nodad|metric (0|1024)\b|scope (host|link) src \S+|\bpref medium\b|elements = .*|qdisc noqueue|\bqdisc .* 0: |LOWER_UP|parentbus.*|addrgenmode \S+|inet6_addr_gen_mode \S+|mode DEFAULT group default|promiscuity.*maxmtu \d+|\\`)

// Whatever is changed in a namespace of ours is as it was two passes later, or the
// loop has failures or remarks to tell of, which doctor shows. SHOAL_MUTATE_SEED
// repeats a run, SHOAL_MUTATE_SECONDS makes it longer than the default,
// which draws as many as there are.
func TestMutations(t *testing.T) {
	needKernel(t)
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("SHOAL_MUTATE_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("SHOAL_MUTATE_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	m := machines(t, 1)[0]
	m.v6 = true
	_, d, want := converged(t, m)
	kinds := map[bool][]string{} // ovns or not: namespaces
	for _, o := range want.Objects() {
		switch o := o.(type) {
		case overlay.Namespace:
			kinds[true] = append(kinds[true], o.Netns)
		case overlay.Sandbox:
			kinds[false] = append(kinds[false], o.Netns)
		}
	}
	base := map[string]string{}
	for _, ns := range append(slices.Clone(kinds[true]), kinds[false]...) {
		base[ns] = fingerprint(t, ns)
	}
	type step struct {
		m    mutation
		ovns bool
	}
	var steps []step
	for _, mu := range mutations {
		steps = append(steps, step{mu, true}, step{mu, false})
	}
	rng.Shuffle(len(steps), func(i, j int) { steps[i], steps[j] = steps[j], steps[i] })
	end := time.Now()
	if n, err := strconv.Atoi(os.Getenv("SHOAL_MUTATE_SECONDS")); err == nil {
		end = end.Add(time.Duration(n) * time.Second)
	}
	done := 0
	for i := 0; i < len(mutations) || time.Now().Before(end); i++ {
		s := steps[i%len(steps)]
		ns := kinds[s.ovns][rng.IntN(len(kinds[s.ovns]))]
		line := fill(rng, want, ns, string(s.m))
		if _, err := try(append([]string{"ip", "netns", "exec", ns}, strings.Fields(line)...)...); err != nil {
			continue // it can't be done there, or was done
		}
		done++
		told := heal(t, d, want)
		if strings.Contains(line, "-6 route flush table local") {
			time.Sleep(settle6 + 50*time.Millisecond)
			told = heal(t, d, want)
		}
		for n, was := range base {
			if n != ns && !strings.Contains(line, "link") && i%10 != 0 {
				continue // what changes no device is no other's affair
			}
			if is := fingerprint(t, n); is != was && told == "" {
				t.Errorf("after %q in %s neither mended nor told of; %s differs:\n%s", line, ns, n, differ(was, is))
				base[n] = is // once is enough
			}
		}
		if told == "" {
			continue
		}
		// Told of: then it is for a person to undo, as the text says.
		for _, l := range []string{"dummy7", "dummy8", "br7"} {
			_, _ = try("ip", "-n", ns, "link", "del", l)
		}
		_, _ = try("ip", "netns", "exec", ns, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0")
		if told := heal(t, d, want); told != "" {
			t.Fatalf("after %q in %s and undoing: %s", line, ns, told)
		}
	}
	if done < len(mutations)/3 {
		t.Errorf("only %d mutations could be done", done)
	}
	t.Logf("%d mutations", done)
}

// fill puts something wanted in the place of the capitals.
func fill(rng *rand.Rand, want overlay.State, ns, line string) string {
	pick := map[string][]string{"DEV": {"lo"}}
	for _, o := range want.Objects() {
		for _, dev := range overlay.Devices(o) {
			if dev[0] == ns {
				pick["DEV"] = append(pick["DEV"], dev[1])
			}
		}
		if place, _ := overlay.Place(o); place != ns {
			continue
		}
		switch o := o.(type) {
		case overlay.Addr:
			pick["ADDR"] = append(pick["ADDR"], o.Prefix.String()+" dev "+o.Dev)
		case overlay.Neigh:
			pick["NEIGH"] = append(pick["NEIGH"], o.Addr.String()+" dev "+o.Dev)
		case overlay.Route:
			if o.Dst.Addr().Is4() {
				pick["ROUTE"] = append(pick["ROUTE"], o.Type+" "+o.Dst.String())
			}
		case overlay.FDB:
			pick["FDB"] = append(pick["FDB"], o.MAC+" dev vx dst "+o.Dst.String()+" self")
		}
	}
	for k := range pick {
		if k == "DEV" && strings.Contains(line, "ADDR") {
			continue
		}
		c := pick[k][rng.IntN(len(pick[k]))]
		if k == "DEV" && strings.Contains(line, "link") && c == "lo" {
			c = pick[k][len(pick[k])-1]
		}
		line = strings.ReplaceAll(strings.ReplaceAll(line, k+" dev DEV", c), k, c)
	}
	return line
}

// heal runs passes until there is nothing left to do; what is told of is
// returned.
func heal(t *testing.T, d *Dataplane, want overlay.State) string {
	t.Helper()
	var told []string
	for range 8 {
		told = nil
		did := false
		have, err := d.Observe(context.Background(), want)
		if err != nil {
			return err.Error()
		}
		ops, _ := overlay.Diff(want, have, time.Now())
		for _, op := range ops {
			op := op.(overlay.Op)
			if op.Verb == overlay.Report {
				told = append(told, op.Remark())
			} else if err := d.Apply(context.Background(), op); err != nil {
				told = append(told, err.Error())
			} else {
				did = true
			}
		}
		if !did {
			break
		}
	}
	return strings.Join(told, "\n")
}

func differ(a, b string) string {
	var out []string
	as, bs := strings.Split(a, "\n"), strings.Split(b, "\n")
	for _, l := range as {
		if !slices.Contains(bs, l) {
			out = append(out, "- "+l)
		}
	}
	for _, l := range bs {
		if !slices.Contains(as, l) {
			out = append(out, "+ "+l)
		}
	}
	return strings.Join(out, "\n")
}
