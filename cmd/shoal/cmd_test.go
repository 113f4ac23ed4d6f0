package main

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/spec"
)

func TestPortsText(t *testing.T) {
	ports, err := client.ParsePublishes([]string{"8000-8010:80-90", "8011:90", "9000-9002:70", "53:53/udp", "127.0.0.1:9:9"}, spec.PortIngress)
	if err != nil {
		t.Fatal(err)
	}
	if got := portsText(api.Ports(ports)); got != "127.0.0.1:9->9/tcp, *:53->53/udp, *:8000-8010->80-90/tcp, *:8011->90/tcp, *:9000-9002->70/tcp" {
		t.Error(got)
	}
}

func TestWithoutPorts(t *testing.T) {
	ports, err := client.ParsePublishes([]string{"8080:80", "8081:80/udp", "9000:90"}, spec.PortIngress)
	if err != nil {
		t.Fatal(err)
	}
	svc := func(ports []spec.Port) *shoalv1.Service {
		return &shoalv1.Service{Spec: &shoalv1.ServiceSpec{Name: "web", Ports: api.Ports(ports)}, Ports: api.Ports(ports)}
	}
	const all = "*:8080->80/tcp, *:8081->80/udp, *:9000->90/tcp"
	for rm, want := range map[string]string{
		"80": "*:8081->80/udp, *:9000->90/tcp", "8080": "*:8081->80/udp, *:9000->90/tcp", "80/udp": "*:8080->80/tcp, *:9000->90/tcp",
		"9000:90": "*:8080->80/tcp, *:8081->80/udp", "x": "",
		// What is not published may be taken away, as with Docker.
		"1:90": all, "81": all, "81/udp": all,
	} {
		left, err := withoutPorts(svc(ports), []string{rm})
		if (err != nil) != (want == "") || err == nil && portsText(left) != want {
			t.Errorf("without %s: %q, %v", rm, portsText(left), err)
		}
	}
	// A number that is one port's target and another's published port is the
	// target; and a dynamic port goes by the number it got.
	if ports, err = client.ParsePublishes([]string{"80:8080", "8080:90", "91"}, spec.PortIngress); err != nil {
		t.Fatal(err)
	}
	for rm, want := range map[string]string{"8080": "*:0->91/tcp, *:8080->90/tcp", "30000": "*:80->8080/tcp, *:8080->90/tcp", "30000:91": "*:80->8080/tcp, *:8080->90/tcp"} {
		w := svc(ports)
		w.Ports[2].Published = 30000
		if left, err := withoutPorts(w, []string{rm}); err != nil || portsText(left) != want {
			t.Errorf("without %s: %q, %v", rm, portsText(left), err)
		}
	}
}

// TestAgain: an update that is typed again, or takes away what is not there, changes nothing,
// as with Docker.
func TestAgain(t *testing.T) {
	one, err := client.ParsePublishes([]string{"8080:80", "90", "mode=host,target=80,published=8081"}, spec.PortIngress)
	if err != nil {
		t.Fatal(err)
	}
	if got := morePorts(api.Ports(one[:2]), api.Ports(one[:2])); portsText(got) != portsText(api.Ports(one[:2])) {
		t.Errorf("published again: %s", portsText(got))
	}
	if got := morePorts(api.Ports(one[:2]), api.Ports(one[2:])); len(got) != 3 {
		t.Errorf("published in another mode: %s", portsText(got))
	}
	hosts := []string{"db:192.0.2.7", "db:192.0.2.8", "web=2001:db8::1"}
	for rm, want := range map[string]string{
		"db": "web=2001:db8::1", "db:192.0.2.8": "db:192.0.2.7 web=2001:db8::1", "db=192.0.2.7": "db:192.0.2.8 web=2001:db8::1",
		"web": "db:192.0.2.7 db:192.0.2.8", "web:2001:db8::1": "db:192.0.2.7 db:192.0.2.8", "db:192.0.2.9": strings.Join(hosts, " "), "cache": strings.Join(hosts, " "),
	} {
		if got := strings.Join(dropHosts(hosts, []string{rm}), " "); got != want {
			t.Errorf("hosts without %s: %s, want %s", rm, got, want)
		}
	}
}

func TestListing(t *testing.T) {
	type fish struct {
		id, name string
		labels   map[string]string
	}
	school := []fish{{"a1", "cod", map[string]string{"sea": "north", "big": ""}}, {"b2", "carp", map[string]string{"sea": "none"}}, {"c3", "eel", nil}}
	for _, k := range []struct{ args, want string }{
		{"", "ID  REAL NAME\na1  cod\nb2  carp\nc3  eel\n"},
		{"-o wide", "ID  REAL NAME  SEA\na1  cod        north\nb2  carp       none\nc3  eel        \n"},
		{"-q", "a1\nb2\nc3\n"},
		{"-q -f name=c", "a1\nb2\n"},
		{"-q -f name=o -f name=l", "a1\nc3\n"},
		{"-q -f label=sea", "a1\nb2\n"},
		{"-q -f label=sea=north -f label=big", "a1\n"},
		{"-q -f name=c -f label=sea=none", "b2\n"},
		{"-f colour=red", "error: filter \"colour=red\": want KEY=VALUE, with one of the keys name, label"},
		{"-f name", "error: filter \"name\": want KEY=VALUE"},
		{"--format {{.RealName}}:{{.ID}}", "cod:a1\ncarp:b2\neel:c3\n"},
		{"--format {{.Labels}}", "big=,sea=north\nsea=none\n\n"},
		{`--format table.{{.ID}}\t{{upper(.RealName)}}`, "error: --format"},
		{"--format {{.Colour}}", "error: --format"},
		{"--format {{", "error: --format"},
		{"--format table -f name=^c.*p$", "ID  REAL NAME\nb2  carp\n"},
		{"-q -f name=^ar", ""},
		{"-q -f name=+", ""}, // no regular expression, and no name's part
		{"--format json", "\"cod\"\n\"carp\"\n\"eel\"\n"},
		{"-o json -f name=eel", "[\n  \"eel\"\n]\n"},
		{"-o yaml", "error: output \"yaml\" is unknown"},
	} {
		var out, errs bytes.Buffer
		c := &cli{out: &out, err: &errs}
		l := &listing[fish]{
			id: func(f fish) string { return f.id }, json: func(f fish) (any, error) { return f.name, nil }, labels: func(f fish) map[string]string { return f.labels },
			columns: []column[fish]{{"ID", false, func(f fish) string { return f.id }}, {"REAL NAME", false, func(f fish) string { return f.name }},
				{"SEA", true, func(f fish) string { return f.labels["sea"] }}},
			filters: map[string]func(fish, string) bool{"name": func(f fish, v string) bool { return nameMatches(f.name, v) }},
		}
		cmd := &cobra.Command{Use: "ls", SilenceErrors: true, SilenceUsage: true, RunE: func(cmd *cobra.Command, _ []string) error { return l.print(c, cmd, school) }}
		l.add(c, cmd)
		cmd.SetArgs(strings.Fields(k.args))
		got := ""
		if err := cmd.Execute(); err != nil {
			got = "error: " + err.Error()
		} else {
			got = out.String()
		}
		if got != k.want && !(strings.HasPrefix(k.want, "error: ") && strings.HasPrefix(got, k.want)) {
			t.Errorf("ls %s:\n%swant\n%s", k.args, got, k.want)
		}
	}
	if got := field("VIRTUAL IP"); got != "VirtualIP" {
		t.Error(got)
	}
}

func TestAttachmentFlags(t *testing.T) {
	tf := taskFlags{networks: []string{"a", "name=b,alias=x,alias=y,ip=10.0.0.9"}, aliases: []string{"all"}, ip: "10.1.0.1"}
	got, err := tf.attachments()
	if err != nil || len(got) != 2 {
		t.Fatal(got, err)
	}
	if a, b := got[0], got[1]; a.Network != "a" || !slices.Equal(a.Addrs, []string{"10.1.0.1"}) || !slices.Equal(b.Aliases, []string{"all", "x", "y"}) || !slices.Equal(b.Addrs, []string{"10.0.0.9"}) {
		t.Errorf("%+v", got)
	}
	for _, bad := range []string{"alias=x", "name=a,colour=red", "name="} {
		tf := taskFlags{networks: []string{bad}}
		if _, err := tf.attachments(); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[float64]string{0: "0B", 999: "999B", 1000: "1.0kB", 123456: "123kB", 1.5e9: "1.5GB"} {
		if got := size(n); got != want {
			t.Errorf("%v is %s, want %s", n, got, want)
		}
	}
}

// TestCommandsHaveHelp goes through the whole tree: each command says what it
// does, and accepts --help.
func TestCommandsHaveHelp(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Short == "" && !cmd.Hidden {
			t.Errorf("%s has no short help", cmd.CommandPath())
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	var out bytes.Buffer
	walk((&cli{out: &out, err: &out}).root())
}

// TestFit: a table fits a terminal, on which a note goes on in further lines; for
// scripts nothing is shortened.
func TestFit(t *testing.T) {
	long := strings.Repeat("long-name-", 6)
	note := "the task's shim is gone: the machine was restarted, or someone killed it"
	make := func() [][]string {
		return [][]string{{"NAME", "NODE", "STATE", "ADDRESS", "NOTE"}, {long, "node1", "running", "10.0.1.3", note}, {"web.1", "node2", "failed", "10.0.1.4", ""}}
	}
	for _, width := range []int{80, 100, 150, 200} {
		rows := fit(make(), width, true)
		total := -2
		var said []string
		for i := range rows[0] {
			w := 0
			for _, r := range rows {
				w = max(w, len([]rune(r[i])))
			}
			total += w + 2
		}
		if total > width {
			t.Errorf("%d columns on a terminal of %d: %q", total, width, rows)
		}
		for _, r := range rows[1:] {
			said = append(said, strings.Fields(r[4])...)
		}
		if got := strings.Join(said, " "); got != note {
			t.Errorf("the note on %d columns: %q", width, got)
		}
		if width == 200 && (rows[1][0] != long || len(rows) != 3) {
			t.Errorf("on a wide terminal: %q", rows)
		}
	}
	if rows := fit(make(), 80, false); rows[1][0] != long || rows[1][4] != note {
		t.Errorf("for a script: %q", rows)
	}
	fit(make(), 10, true) // as narrow as it can be
	if got := wrap(strings.Repeat("x", 60)+" y", 26); len(got) != 3 || got[2] != strings.Repeat("x", 8)+" y" {
		t.Errorf("%q", got)
	}
}

// TestCompletion: values that are known are offered, also those of filters.
func TestCompletion(t *testing.T) {
	t.Setenv("SHOAL_SOCKET", t.TempDir()+"/none.sock")
	for line, want := range map[string]string{
		"node update --availability ":     "active pause drain",
		"node update --role ":             "manager worker",
		"join --role ":                    "manager worker",
		"net create --driver ":            "overlay bridge",
		"node ls -f ":                     "availability= id= membership= name= node.label= role= status= label=",
		"node ls --filter role=":          "role=manager role=worker",
		"node ls -f availability=d":       "availability=active availability=pause availability=drain",
		"net ls -f driver=":               "driver=overlay driver=bridge driver=host driver=null",
		"events -f type=":                 "type=network type=service type=task type=node type=cluster",
		"svc ls -f mode=":                 "mode=replicated mode=global mode=replicated-job mode=global-job mode=vip mode=dnsrr",
		"service update --endpoint-mode ": "vip dnsrr",
	} {
		words, last := strings.Fields(line), ""
		if !strings.HasSuffix(line, " ") {
			words, last = words[:len(words)-1], words[len(words)-1]
		}
		var out, errOut bytes.Buffer
		if code := run(context.Background(), append(append([]string{"__complete"}, words...), last), strings.NewReader(""), &out, &errOut); code != 0 {
			t.Errorf("%s: %s", line, errOut.String())
		}
		got := strings.Split(strings.TrimSpace(out.String()), "\n")
		if s := strings.Join(got[:len(got)-1], " "); s != want {
			t.Errorf("%s: %q, want %q", line, s, want)
		}
	}
}

// TestHelp: every command has an example, and help that fits a terminal.
func TestHelp(t *testing.T) {
	root := (&cli{}).root()
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Hidden || strings.HasPrefix(cmd.CommandPath(), "shoal completion ") || strings.HasPrefix(cmd.CommandPath(), "shoal help") {
			return
		}
		if cmd.Example == "" {
			t.Errorf("%s has no example", cmd.CommandPath())
		}
		for l := range strings.Lines(cmd.UsageString()) {
			if n := len([]rune(strings.TrimRight(l, "\n"))); n > standardWidth && !strings.Contains(l, "shoal ") {
				t.Errorf("%s: a line of %d characters: %s", cmd.CommandPath(), n, l)
			}
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(root)
}

// TestUpdateFlags: what svc create sets, svc update changes.
func TestUpdateFlags(t *testing.T) {
	c := &cli{}
	create, update := c.svcCreate(), c.svcUpdate()
	renamed := map[string]string{"add-host": "host"}
	create.Flags().VisitAll(func(f *pflag.Flag) {
		name := cmp.Or(renamed[f.Name], f.Name)
		has := func(n string) bool { return update.Flags().Lookup(n) != nil }
		// What a service is called and of which mode it is stays, as in Docker.
		if f.Name != "name" && f.Name != "mode" && !has(name) && (!has(name+"-add") || !has(name+"-rm")) {
			t.Errorf("svc update can't change --%s", f.Name)
		}
	})
}
