package main

import (
	"bytes"
	"context"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// have finds the command that words name: how many of them it took.
func have(root *cobra.Command, words []string) (n int) {
	for _, w := range words {
		found := false
		for _, sub := range root.Commands() {
			if sub.Name() == w || sub.HasAlias(w) {
				root, found = sub, true
				break
			}
		}
		if !found {
			return n
		}
		n++
	}
	return n
}

// TestDockerWords: what the table says is missing is missing, and what it names
// instead is there, with its flags.
func TestDockerWords(t *testing.T) {
	var out bytes.Buffer
	root := (&cli{out: &out, err: &out}).root()
	quoted := regexp.MustCompile(`'([^']*)'`)
	for _, d := range dockerWords {
		words := strings.Fields(d.docker)
		if have(root, words) == len(words) {
			t.Errorf("%q is a command of Shoal's by now: its line can go", d.docker)
		}
		for _, q := range quoted.FindAllStringSubmatch(d.instead, -1) {
			_, line, ok := strings.Cut(" "+q[1], " shoal ")
			if !ok {
				continue
			}
			words := strings.Fields(line)
			cmd, rest, err := root.Find(words)
			if err != nil || cmd == root || cmd.HasSubCommands() && len(rest) > 0 {
				t.Errorf("%s: %q is no command: %v", d.docker, q[1], err)
				continue
			}
			for _, w := range rest {
				if name, long := strings.CutPrefix(w, "--"); long && cmd.Flags().Lookup(name) == nil {
					t.Errorf("%s: %q has no flag %s", d.docker, q[1], w)
				}
			}
		}
	}
}

// TestDockerLines: a line that a Swarm user types says what Shoal has for it, and
// never that a flag is wrong.
func TestDockerLines(t *testing.T) {
	for line, want := range map[string]string{
		"swarm init --advertise-addr 192.0.2.1":        `unknown command "shoal swarm init": use 'shoal init'`,
		"swarm join --token SWMTKN-1-x 192.0.2.1:2377": `'shoal join'`,
		"--socket /tmp/x swarm leave --force":          `'shoal leave'`,
		"stack deploy -c docker-compose.yml app":       `'shoal svc create'`,
		"stack up -c x app":                            `'shoal svc create'`,
		"container ls -a":                              `unknown command "shoal container ls": use 'shoal ps'`,
		"container list -a":                            `use 'shoal ps'`,
		"container top c1":                             `'shoal top'`,
		"container inspect --size c1":                  "inspect",
		"container":                                    "'shoal ps'",
		"plugin install x":                             "no plugins",
		"builder prune -a":                             "'shoal image'",
		"context use x":                                "--socket",
		"system prune --volumes":                       "'shoal net prune'",
		"system df -v":                                 "'shoal volume ls'",
		"swarm join-token --rotate worker":             "'shoal token show worker'",
		"swarm ca --rotate":                            "'shoal ca rotate'",
		"compose up -d":                                "'shoal svc create'",
		"pause c1":                                     "'shoal kill -s STOP TASK'",
		"container restart -t 3 c1":                    "'shoal restart'",
		"frobnicate --x":                               `unknown command "shoal frobnicate"`,
		"net frobnicate --x y":                         `unknown command "shoal net frobnicate"`,
		"help swarm":                                   `unknown command "shoal swarm"`,
		"lsit --x":                                     `unknown command "shoal lsit"`,
		"svc lss --filter x":                           `did you mean "ls"?`,
	} {
		var out, errOut bytes.Buffer
		code := run(context.Background(), strings.Fields(line), strings.NewReader(""), &out, &errOut)
		if code != 2 || out.Len() > 0 {
			t.Errorf("%s: exit status %d, %q on stdout", line, code, out.String())
		}
		checkLine(t, errOut.String(), 2, want)
		if got := errOut.String(); strings.Contains(got, "flag") || strings.Contains(got, `did you mean "stop"`) {
			t.Errorf("%s: %s", line, got)
		}
	}
	for _, line := range []string{"service --help", "network --help", "service create --help", "network ls --help", "help net", "help"} {
		var out, errOut bytes.Buffer
		if code := run(context.Background(), strings.Fields(line), strings.NewReader(""), &out, &errOut); code != 0 {
			t.Errorf("%s: %s", line, errOut.String())
		}
	}
}

// TestDockerFlags: each flag of docker's run, service create and service update is there,
// or refused by one line with what there is instead. The lists are those of docker 28.2.
func TestDockerFlags(t *testing.T) {
	var out bytes.Buffer
	for _, k := range []struct {
		file, command string
		tables        []map[string]string
	}{
		{"docker-run.txt", "run", []map[string]string{dockerTaskFlags, dockerRunFlags}},
		{"docker-service-create.txt", "svc create", []map[string]string{dockerTaskFlags, dockerServiceFlags}},
		{"docker-service-update.txt", "svc update", []map[string]string{dockerTaskFlags, dockerServiceFlags}},
	} {
		b, err := os.ReadFile("testdata/" + k.file)
		if err != nil {
			t.Fatal(err)
		}
		root := (&cli{out: &out, err: &out}).root()
		cmd, _, err := root.Find(strings.Fields(k.command))
		if err != nil {
			t.Fatal(err)
		}
		refused := map[string]bool{}
		for _, name := range strings.Fields(string(b)) {
			name = strings.TrimPrefix(name, "--")
			var errOut bytes.Buffer
			instead := ""
			for _, table := range k.tables {
				instead += table[name]
			}
			switch has := cmd.Flags().Lookup(name) != nil; {
			case has && instead != "":
				t.Errorf("shoal %s has --%s by now: its line can go", k.command, name)
			case !has && instead == "":
				t.Errorf("shoal %s --%s is neither there nor refused", k.command, name)
			case !has:
				refused[name] = true
				run(context.Background(), append(strings.Fields(k.command), "--"+name+"=x", "image"), strings.NewReader(""), &out, &errOut)
				checkLine(t, errOut.String(), 2, "--"+name+": "+instead)
			}
		}
		if len(refused) == 0 {
			t.Errorf("nothing is refused of %s", k.file)
		}
	}
}

// lineWords takes a line apart as a shell does, but for anything but double quotes.
func lineWords(line string) (out []string) {
	for i, part := range strings.Split(line, `"`) {
		if i%2 == 1 {
			out = append(out, part)
		} else {
			out = append(out, strings.Fields(part)...)
		}
	}
	return out
}

// TestOperatorsLines: what an operator of a swarm types every day is understood, or
// refused by one line with what there is instead.
func TestOperatorsLines(t *testing.T) {
	b, err := os.ReadFile("testdata/docker-lines.txt")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("SHOAL_SOCKET", t.TempDir()+"/none.sock")
	t.Chdir(t.TempDir())
	for _, f := range []string{"docker_test.go", "nginx.tar"} { // that lines name
		if err := os.WriteFile(f, []byte("package main\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	for _, l := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		kind, line, _ := strings.Cut(l, " ")
		if kind == "#" {
			continue
		}
		n++
		var out, errOut bytes.Buffer
		code := run(context.Background(), lineWords(line), strings.NewReader(""), &out, &errOut)
		got := errOut.String()
		switch {
		case kind == "+" && strings.HasPrefix(line, "version"):
		case kind == "+" && (code == 0 || !strings.Contains(got, noAgent)):
			t.Errorf("%s: exit status %d, %s", line, code, got)
		case kind == "-":
			_, instead, _ := strings.Cut(strings.Split(got, "\n")[0], ": ")
			if code != 2 || strings.Contains(got, noAgent) || strings.Count(got, "\n") != 2 || !strings.Contains(instead, ": ") || strings.Contains(got, "did you mean") {
				t.Errorf("%s: exit status %d, %s", line, code, got)
			}
		case kind != "+":
			t.Errorf("%q is neither + nor -", l)
		}
	}
	if n < 234 {
		t.Errorf("%d lines", n)
	}
}
