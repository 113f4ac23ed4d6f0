package integration

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestNetworkOptions(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create --subnet 10.77.0.0/24 --subnet 10.78.0.0/24 --gateway 10.77.0.254 --ip-range 10.77.0.128/25 --label tier=a --label team=x wide")
	s.ok("node2", "shoal net create --opt com.docker.network.driver.mtu=1300 --label tier=b small")
	s.ok("node2", "shoal net create --driver bridge here")
	if got := s.ok("node1", "shoal net ls --filter label=tier --format {{.Name}}"); got != "small\nwide" {
		t.Errorf("by label: %q", got)
	}
	if got := s.ok("node1", "shoal net ls --filter label=tier=a --filter label=team=x --format {{.Name}}"); got != "wide" {
		t.Errorf("by labels: %q", got)
	}
	if got := s.ok("node1", "shoal net ls --filter driver=bridge --format {{.Name}}"); got != "here" {
		t.Errorf("by driver: %q", got)
	}
	if got := s.ok("node1", `shoal net ls --filter name=wide --format '{{.Name}} {{.Scope}} {{.Label "tier"}}'`); got != "wide swarm a" {
		t.Errorf("Docker's fields: %q", got)
	}
	if got := s.ok("node1", "shoal net inspect -f '{{.Name}} {{json .Subnets}}' wide"); got != `wide ["10.77.0.0/24","10.78.0.0/24"]` {
		t.Errorf("inspect -f: %q", got)
	}
	id := s.ok("node1", "shoal net ls --filter name=wide -q")
	if got := s.ok("node1", "shoal net ls --filter id=%s --format {{.Name}}", id[:6]); got != "wide" {
		t.Errorf("by ID: %q", got)
	}
	s.ok("node1", "shoal run -d --name a --network wide --network small -- sleep 1000")
	a := s.task("a")
	if ip := a.Attachments[0].Addrs[0]; !strings.HasPrefix(ip, "10.77.0.") || ip < "10.77.0.128" {
		t.Errorf("address %s is not of the range", ip)
	}
	if got := s.ok("node1", "shoal exec a ping -c 1 -W 2 10.77.0.254"); !strings.Contains(got, "1 received") {
		t.Error(got)
	}
	if got := s.ok("node1", "shoal exec a cat /sys/class/net/eth1/mtu"); got != "1300" {
		t.Errorf("MTU is %s", got)
	}
	s.fails("node1", "network wide is used by task a", "shoal net rm wide")
	var nets []struct {
		Name  string
		Tasks []struct{ Name, Node, Iface string }
	}
	if err := json.Unmarshal([]byte(s.ok("node1", "shoal net inspect wide")), &nets); err != nil || len(nets) != 1 || len(nets[0].Tasks) != 1 || nets[0].Tasks[0].Iface != "eth0" {
		t.Errorf("inspect: %v, %+v", err, nets)
	}
	s.ok("node1", "shoal rm -f a")
	if got := s.ok("node1", "shoal net prune --force --filter label=tier=b"); got != "small" {
		t.Errorf("prune: %q", got)
	}
	for want, line := range map[string]string{
		"option \"color\" is unknown":   "shoal net create --opt color=red x",
		"want a number of bytes":        "shoal net create --opt mtu=big x",
		"overlaps 10.77.0.0/24 of":      "shoal net create --subnet 10.77.0.0/16 x",
		"overlaps the host's route":     "shoal net create --subnet 172.30.0.0/16 x",
		"host bits set":                 "shoal net create --subnet 10.99.0.1/24 x",
		"driver \"macvlan\" is unknown": "shoal net create -d macvlan x",
		"network wide exists already":   "shoal net create wide",
		"no such network: nosuch":       "shoal net inspect nosuch",
		"is built in":                   "shoal net rm host",
		"filter \"colour=red\"":         "shoal net ls -f colour=red",
		"type is one of builtin":        "shoal net ls -f type=red",
		"with different values":         "shoal net create -o icc=false -o com.docker.network.bridge.enable_icc=true x",
		"no such node: nosuch":          "shoal ps -f node=nosuch",
		"state is one of":               "shoal ps -f state=red",
	} {
		s.fails("node1", want, "%s", line)
	}
}

func TestBuiltInNetworks(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node2", "shoal run -d --name h --network host -- sleep 1000")
	if got := s.ok("node1", "shoal exec h ip -br addr"); !strings.Contains(got, "172.30.0.2/24") {
		t.Errorf("host: %s", got)
	}
	if got := s.ok("node1", "shoal run --rm --network none -- ip -br addr"); strings.Contains(got, "eth") || !strings.Contains(got, "lo") {
		t.Errorf("none: %s", got)
	}
	// A bridge: its tasks are on its node, and reach each other.
	s.ok("node2", "shoal net create --driver bridge br")
	s.whoami("web", 2, "--network br")
	for _, x := range s.running("web") {
		if x.NodeName != "node2" {
			t.Errorf("%s runs on %s", x.Name, x.NodeName)
		}
	}
	s.ok("node2", "shoal run -d --name c --network br -- sleep 1000")
	s.fair("bridge", s.inTask("c", "-n 100 http://web/"), 2)
	s.fails("node1", "is a bridge on node node2", "shoal run --network br -- true")
}

func TestInternalAndICC(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	stop := s.outside("8099")
	defer stop()
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal net create --internal inner")
	s.ok("node1", "shoal net create --opt icc=false apart")
	out := "curl -s -m 4 http://172.30.0.254:8099/"
	s.ok("node1", "shoal run -d --name a --network app -- sleep 1000")
	if got := s.ok("node1", "shoal exec a %s", out); got != "172.30.0.1" {
		t.Errorf("the way out: seen as %q", got)
	}
	s.ok("node1", "shoal run -d --name i --network inner -- sleep 1000")
	if r := s.on("node1", words("shoal exec i "+out)...); r.code == 0 {
		t.Errorf("an internal network has a way out: %s", r.out)
	}
	s.whoami("web", 2, "--network inner --network apart")
	s.fair("internal network", s.inTask("i", "-n 60 http://web/"), 2)
	s.ok("node1", "shoal run -d --name p --network apart -- sleep 1000")
	if got := s.ok("node1", "shoal exec p %s", out); got != "172.30.0.1" {
		t.Errorf("icc=false: the way out: seen as %q", got)
	}
	s.eventually(slow(5*time.Second), func() error {
		if r := s.on("node1", words("shoal exec p curl -s -m 2 http://web/")...); r.code == 0 {
			return fmt.Errorf("icc=false: a virtual IP answers: %s", r.out)
		}
		return nil
	})
	for _, x := range s.running("web") {
		for _, at := range x.Attachments[1:] {
			if r := s.on("node1", "shoal", "exec", "p", "curl", "-s", "-m", "2", "http://"+at.Addrs[0]+"/"); r.code == 0 {
				t.Errorf("icc=false: %s answers at %s", x.Name, at.Addrs[0])
			}
		}
	}
}

func TestAliasesAndNames(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal net create back")
	s.whoami("web", 2, "--network name=app,alias=www,alias=site --network name=back,alias=inner")
	s.whoami("rr", 2, "--network app --endpoint-mode dnsrr")
	s.whoami("off", 0, "--network app")
	s.ok("node1", "shoal run -d --name db1 --network name=app,alias=db -- sleep 1000")
	s.ok("node2", "shoal run -d --name db2 --network app --network-alias db --hostname the-db -- sleep 1000")
	s.ok("node3", "shoal run -d --name c --network app -- sleep 1000")
	s.ok("node3", "shoal run -d --name l --network app --link web:shop -e SHOP_NAME=mine -- sleep 1000")
	vip := func(n int) string {
		return strings.Split(s.ok("node1", "shoal svc ls --filter name=web --format {{.VirtualIP}}"), ",")[n]
	}
	addrs := func(task, name string) []string {
		t.Helper()
		r := s.on("node1", "shoal", "exec", task, "getent", "ahostsv4", name)
		var out []string
		for l := range strings.Lines(r.out) {
			if f := strings.Fields(l); !slices.Contains(out, f[0]) {
				out = append(out, f[0])
			}
		}
		slices.Sort(out)
		return out
	}
	ip := func(task string, i int) string { return s.task(task).Attachments[i].Addrs[0] }
	sorted := func(in ...string) []string { slices.Sort(in); return in }
	var replicas, rr []string
	for _, x := range s.running("web") {
		replicas = append(replicas, x.Attachments[0].Addrs[0])
	}
	for _, x := range s.running("rr") {
		rr = append(rr, x.Attachments[0].Addrs[0])
	}
	one := s.running("web")[0]
	off := s.ok("node1", "shoal svc ls --filter name=off --format {{.VirtualIP}}")
	for name, want := range map[string][]string{
		"web": {vip(0)}, "WEB": {vip(0)}, "www": {vip(0)}, "site": {vip(0)}, "web.app": {vip(0)}, "web.app.shoal": {vip(0)}, "web.shoal": {vip(0)},
		"inner": nil, "web.back": nil, "nosuch": nil,
		"tasks.web": sorted(replicas...), "rr": sorted(rr...), "tasks.rr": sorted(rr...), "off": {off}, "tasks.off": nil,
		"db": sorted(ip("db1", 0), ip("db2", 0)), "db1": {ip("db1", 0)}, "the-db": {ip("db2", 0)},
		one.Name: {one.Attachments[0].Addrs[0]}, one.ID: {one.Attachments[0].Addrs[0]}, "shop": nil,
	} {
		s.eventually(slow(5*time.Second), func() error {
			if got := addrs("c", name); !slices.Equal(got, want) {
				return fmt.Errorf("%s is %v, want %v", name, got, want)
			}
			return nil
		})
	}
	if got := addrs("l", "shop"); !slices.Equal(got, []string{vip(0)}) {
		t.Errorf("link: shop is %v", got)
	}
	if env := s.ok("node1", "shoal exec l env"); !strings.Contains(env, "SHOP_NAME=mine") {
		t.Errorf("link: %s", env)
	}
	if r := s.on("node1", words("shoal exec c curl -s -o /dev/null -m 3 -w %{exitcode} http://off/")...); strings.TrimSpace(r.out) != "7" { // CURLE_COULDNT_CONNECT
		t.Errorf("a service without replicas: curl ends with %q, %s", r.out, r.err)
	}
	dig := func(args string) string {
		t.Helper()
		return s.ok("node1", "shoal exec c dig +tries=1 +time=3 %s", args)
	}
	for args, want := range map[string]string{
		"+noall +comments AAAA web":           "status: NOERROR",
		"+noall +comments A nosuch.shoal":     "status: NXDOMAIN",
		"+short -x " + vip(0):                 "web.app.shoal.",
		"+short -x " + ip("db1", 0):           "db1.app.shoal.",
		"+short SRV _80._tcp.web":             " 80 ",
		"+tcp +short A web":                   vip(0),
		"+short ANY web":                      "",
		"+noall +comments +opcode=NOTIFY web": "NOTIMP",
	} {
		if got := dig(args); !strings.Contains(got, want) {
			t.Errorf("dig %s: %s, want %s", args, got, want)
		}
	}
}

func TestResolverSettings(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal run -d --name c --dns 172.30.0.254 --dns-search corp.test --dns-option ndots:2 --dns-option timeout:1 --hostname box --add-host legacy:10.1.2.3 --add-host gw:host-gateway -- sleep 1000")
	if got := s.ok("node1", "shoal exec c cat /etc/resolv.conf"); !strings.Contains(got, "search corp.test") || !strings.Contains(got, "ndots:2 timeout:1") || !strings.Contains(got, "nameserver 127.0.0.11") {
		t.Error(got)
	}
	for name, want := range map[string]string{"legacy": "10.1.2.3", "gw": "172.30.0.1", "host.shoal.internal": "172.30.0.1", "box": "10."} {
		if got := s.ok("node1", "shoal exec c getent hosts %s", name); !strings.HasPrefix(got, want) {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if got := s.ok("node1", "shoal exec c hostname"); got != "box" {
		t.Error(got)
	}
	for want, line := range map[string]string{
		"DNS server":                       "shoal run --dns ns1 -- true",
		"neither an address nor":           "shoal run --add-host a:b -- true",
		"is the task's name server itself": "shoal run --dns 127.0.0.11 -- true",
		"DNS option \"a b\"":               "shoal run --dns-option 'a b' -- true",
		"no such task or service: nosuch":  "shoal run --link nosuch:x -- true",
		"c is on none of the networks":     "shoal run --network none --link c:x -- true",
	} {
		s.fails("node1", want, "%s", line)
	}
}

func TestConnectAndDisconnect(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	for _, n := range []string{"one", "two", "three"} {
		s.ok("node1", "shoal net create %s", n)
	}
	s.whoami("web", 2, "--network one")
	s.ok("node1", "shoal run -d --name c --network one -- sleep 1000")
	s.ok("node1", "shoal run -d --name other --network two -- sleep 1000")
	// A connection that lives through all that follows: a line, an answer.
	live := s.line("c", "web", 9000)
	defer live.close()
	live.say("before")
	pids := func() (out []string) {
		for _, x := range append(s.running("web"), s.task("c")) {
			out = append(out, fmt.Sprint(x.Name, x.Status.PID))
		}
		slices.Sort(out)
		return out
	}
	before := pids()

	s.ok("node1", "shoal net connect --alias shop two web")
	s.ok("node1", "shoal net connect --ip %s two c", nextTo(s.ok("node1", "shoal net ls -f name=two --format {{.Subnet}}"), 77))
	// What is connected can be used at once.
	if got := s.ok("node1", "shoal exec c ip -br -4 addr"); !strings.Contains(got, ".77/32") {
		t.Errorf("no address .77: %s", got)
	}
	if got := s.ok("node1", "shoal exec c cat /etc/hosts"); !strings.Contains(got, ".77\tc") {
		t.Errorf("no line for .77: %s", got)
	}
	s.eventually(slow(5*time.Second), func() error {
		l := s.inTask("c", "-n 40 -timeout 1s http://shop/")
		if l.Failed > 0 || len(l.Hosts) != 2 {
			return fmt.Errorf("over the second network: %+v", l)
		}
		return nil
	})
	live.say("after connect")
	// One over a network that is left is reset, whoever leaves it.
	over, served := s.line("c", "shop", 9000), s.line("other", "shop", 9000)
	defer over.close()
	defer served.close()
	over.say("over two")
	served.say("over two, too")
	s.ok("node1", "shoal net connect three c")
	s.ok("node1", "shoal net disconnect two c")
	over.ends()
	served.say("after another has left")
	s.ok("node1", "shoal net disconnect two web")
	served.ends()
	live.say("after disconnect")
	if got := s.ok("node1", "shoal exec c ip -br -4 addr"); strings.Contains(got, ".77/") || !strings.Contains(got, "eth0") || !strings.Contains(got, "eth2") {
		t.Errorf("interfaces: %s", got)
	}
	if got := s.ok("node1", "shoal exec c cat /etc/hosts"); strings.Contains(got, ".77\t") {
		t.Errorf("hosts after the network has left: %s", got)
	}
	if r := s.on("node1", words("shoal exec c getent hosts shop")...); r.code != 2 {
		t.Errorf("shop still resolves: %s", r.out)
	}
	if after := pids(); !slices.Equal(before, after) {
		t.Errorf("tasks were restarted: %v, then %v", before, after)
	}
	s.fair("the first network", s.inTask("c", "-n 60 http://web/"), 2)
	// What is a task's whole name is not taken for the beginning of a service's ID.
	s.ok("node1", "shoal net connect two web")
	short := s.ok("node1", "shoal svc ls -f name=web -q")[:4]
	s.ok("node1", "shoal run -d --name %s --network one --network two -- sleep 1000", short)
	s.ok("node1", "shoal net disconnect two %s", short)
	s.ok("node1", "shoal net connect two %s", short)
	s.ok("node1", "shoal logs %s", short)
	s.ok("node1", "shoal svc logs %s", short)
	for _, ref := range []string{short, s.task(short).ID} {
		if got := s.ok("node1", "shoal inspect --format {{.Name}} %s", ref); got != short {
			t.Errorf("inspect %s shows %s", ref, got)
		}
	}
	s.ok("node1", "shoal net disconnect two web")
	s.fails("node1", "is on network one already", "shoal net connect one c")
	s.fails("node1", "is not on network two", "shoal net disconnect two c")
	s.fails("node1", "is taken by", "shoal run --network one --ip %s -- true", s.task("c").Attachments[0].Addrs[0])
	s.fails("node1", "is the only one", "shoal net disconnect one web")
}

func TestIsolation(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create red")
	s.ok("node1", "shoal net create blue")
	s.whoami("rweb", 2, "--network red")
	s.whoami("bweb", 2, "--network blue")
	s.ok("node1", "shoal run -d --name r --network red -- sleep 1000")
	s.ok("node1", "shoal run -d --name proxy --network red --network blue -- sleep 1000")
	s.fair("proxy to red", s.inTask("proxy", "-n 40 http://rweb/"), 2)
	s.fair("proxy to blue", s.inTask("proxy", "-n 40 http://bweb/"), 2)
	targets := []string{s.ok("node1", "shoal svc ls -f name=bweb --format {{.VirtualIP}}")}
	for _, x := range s.running("bweb") {
		targets = append(targets, x.Attachments[0].Addrs[0])
	}
	for _, a := range targets {
		if r := s.on("node1", "shoal", "exec", "r", "curl", "-s", "-m", "1", "http://"+a+"/"); r.code == 0 {
			t.Errorf("red reaches blue at %s", a)
		}
		// Nor does the node itself, nor another machine by way of the node.
		if r := s.on("node1", "curl", "-s", "-m", "1", "http://"+a+"/"); r.code == 0 {
			t.Errorf("the node reaches blue at %s", a)
		}
	}
	if r := s.on("node1", words("shoal exec r getent hosts bweb")...); r.code != 2 {
		t.Errorf("red resolves bweb: %s", r.out)
	}
}

// TestBothFamilies: on a network with an IPv6 subnet as well, everything inside
// the network is there by either.
func TestBothFamilies(t *testing.T) {
	onlyNative(t) // vip's and overlay's suites have both in the VM
	s := shared(t)
	s.ok("node1", "shoal net create --subnet 10.94.0.0/24 --subnet fd94::/64 dual")
	s.whoami("web", 2, "--network dual")
	s.ok("node3", "shoal run -d --name c1 --network dual -- sleep 10000")
	own := s.task("c1").Attachments[0].Addrs
	vip := s.ok("node3", "shoal exec c1 dig +short AAAA web")
	if len(own) != 2 || !strings.HasPrefix(strings.TrimSpace(vip), "fd94::") {
		t.Fatalf("addresses %v, virtual IP %q", own, vip)
	}
	for i, host := range []string{s.ok("node3", "shoal exec c1 dig +short A web"), "[" + strings.TrimSpace(vip) + "]"} {
		host = strings.TrimSpace(host)
		for _, url := range []string{"http://" + host + "/", "udp://" + host + ":9000"} {
			l := s.inTask("c1", "-n 20 -timeout 2s %s", url)
			s.fair(url, l, 2)
			if got := keys(l.Clients); len(got) != 1 || got[0] != own[i] {
				t.Errorf("%s: servers saw %v, the client is %s", url, got, own[i])
			}
		}
	}
	for _, x := range s.running("web") {
		s.ok("node3", "shoal exec c1 ping -c1 -W5 %s", x.Attachments[0].Addrs[1])
	}
}
