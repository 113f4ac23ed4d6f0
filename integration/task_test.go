package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

func TestExecAndFiles(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "data"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.ok("node1", "shoal run -d --name a -- sleep 1000")
	s.ok("node2", "shoal run -d --name b -- sleep 1000")
	to := t.TempDir()
	s.ok("node3", "sh -c 'shoal exec a tar -c -C %s data | shoal exec -i b tar -x -C %s'", dir, to)
	if b, err := os.ReadFile(filepath.Join(to, "data")); err != nil || string(b) != "precious" {
		t.Errorf("copied %q, %v", b, err)
	}
	big := strings.Repeat("0123456789abcde\n", 1<<16)
	if r := s.in(big, "node1", words("shoal exec -i b cat")...); r.out != big {
		t.Errorf("1 MiB through cat: %d bytes came back, exit status %d, %s", len(r.out), r.code, r.err)
	}
	for line, code := range map[string]int{"sh -c 'exit 7'": 7, "true": 0, "nosuchprogram": 127, "/etc/passwd": 126, "sh -c 'kill -9 $$'": 137} {
		if r := s.on("node3", append(words("shoal exec b"), words(line)...)...); r.code != code {
			t.Errorf("%s: exit status %d, want %d", line, r.code, code)
		}
	}
	if got := s.ok("node1", "shoal exec -t b sh -c 'test -t 1 && tty'"); !strings.HasPrefix(got, "/dev/pts/") {
		t.Errorf("tty: %q", got)
	}
	mark := filepath.Join(to, "mark")
	s.ok("node1", "shoal exec -d b sh -c 'sleep 0.5; echo done > %s; sleep 1000'", mark)
	s.eventually(10*time.Second, func() error {
		_, err := os.Stat(mark)
		return err
	})
	for line, code := range map[string]int{"-d b nosuchprogram": 127, "-d b /etc/passwd": 126, "-dt b true": 2} {
		if r := s.on("node1", append(words("shoal exec"), words(line)...)...); r.code != code {
			t.Errorf("exec %s: exit status %d, want %d: %s", line, r.code, code, r.err)
		}
	}
	r := s.on("node1", words("shoal run --rm -- sh -c 'echo out; echo err >&2; exit 5'")...)
	if r.code != 5 || r.out != "out\n" || r.err != "err\n" {
		t.Errorf("run: %+v", r)
	}
	// The foreground is what it is in Docker: every byte, and the program's own end.
	if r := s.in(big+"no newline", "node1", words("shoal run --rm -i --node node2 -- cat")...); r.code != 0 || r.out != big+"no newline" {
		t.Errorf("1 MiB through run -i: %d bytes came back, exit status %d, %s", len(r.out), r.code, r.err)
	}
	for line, code := range map[string]int{"nosuchprogram": 127, "/etc/passwd": 126, "sh -c 'kill -9 $$'": 137} {
		for _, how := range []string{"", "-d "} {
			if r := s.on("node3", append(words("shoal run --rm "+how+"--"), words(line)...)...); r.code != code && (how == "" || code < 128) {
				t.Errorf("run %s%s: exit status %d, want %d", how, line, r.code, code)
			}
		}
	}
	if got := s.ok("node1", "shoal run --rm -t -- sh -c 'test -t 0 && tty'"); !strings.HasPrefix(got, "/dev/pts/") {
		t.Errorf("tty: %q", got)
	}
	r = s.on("node1", words("timeout -s INT 1 shoal run --rm -- sh -c 'trap \"echo interrupted; exit 3\" INT; while :; do sleep 0.1; done'")...)
	if r.out != "interrupted\n" {
		t.Errorf("interrupted: %+v", r)
	}
	s.ok("node1", "shoal run -d --rm --name brief -- true")
	s.eventually(slow(5*time.Second), func() error {
		if got := s.ok("node1", "shoal ps -a --format {{.Name}}"); got != "a\nb" && got != "b\na" {
			return errf("with --rm these are left: %q", got)
		}
		return nil
	})
	s.fails("node1", "no such task: nosuch", "shoal exec nosuch true")
	s.fails("node1", "no command", "shoal run")
}

func TestEnvironment(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	file := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(file, []byte("# comment\nA=file\n  B=from file\n\nSHELLS\nUNSET\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := s.ok("node1", "env SHELLS=own shoal run --rm --env-file %s -e A=flag -- sh -c 'echo $A, $B, $SHELLS, ${UNSET-none}'", file)
	if got != "flag, from file, own, none" {
		t.Error(got)
	}
	s.ok("node1", "shoal run -d --name db --expose 5432 -e PGUSER=x -- sleep 1000")
	got = s.ok("node1", "shoal run --rm --name app --link db:database -- sh -c 'echo $DATABASE_NAME $DATABASE_PORT $DATABASE_ENV_PGUSER; getent hosts database'")
	if ip := s.task("db").Attachments[0].Addrs[0]; !strings.HasPrefix(got, "/app/database tcp://"+ip+":5432 x\n"+ip+" ") {
		t.Errorf("link: %q", got)
	}
	s.fails("node1", "--env-file", "shoal run --env-file /nosuch -- true")
}

func TestWatching(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 2, "--network app --label tier=front --publish 18080:80")
	s.ok("node1", "shoal run -d --name c --network app --label job=x -- sleep 1000")
	if l := s.inTask("c", "-n 20 http://web/"); l.Failed > 0 {
		t.Errorf("%+v", l)
	}
	var rows []struct {
		Name    string
		RxBytes uint64 `json:"rx_bytes"`
		TxBytes uint64 `json:"tx_bytes"`
	}
	if err := json.Unmarshal([]byte(s.ok("node3", "shoal stats --no-stream -o json")), &rows); err != nil || len(rows) != 3 {
		t.Errorf("stats: %v, %+v", err, rows)
	}
	for _, r := range rows {
		if r.RxBytes == 0 || r.TxBytes == 0 {
			t.Errorf("stats: %+v", r)
		}
	}
	if got, want := s.ok("node2", "shoal svc ps --no-resolve --format {{.Node}} web"), s.ok("node2", "shoal svc ps -o json web"); got == "" || !strings.Contains(want, `"node": "`+strings.Fields(got)[0]+`"`) {
		t.Errorf("svc ps --no-resolve: %q, and %s", got, want)
	}
	cid := filepath.Join(t.TempDir(), "cid")
	id := s.ok("node1", "shoal run -d --name withid --cidfile %s -- sleep 1000", cid)
	if b, err := os.ReadFile(cid); err != nil || string(b) != id {
		t.Errorf("--cidfile: %q, %v, want %q", b, err, id)
	}
	s.fails("node1", "is there already", "shoal run -d --name second --cidfile %s -- sleep 1000", cid)
	s.fails("node1", "withid", "shoal run -d --name withid --cidfile %s.2 -- sleep 1000", cid)
	if _, err := os.Stat(cid + ".2"); err == nil {
		t.Error("--cidfile: a file is left of a task that was not made")
	}
	s.ok("node1", "shoal rm -f withid")
	if got := s.ok("node2", "shoal port web"); got != "80/tcp -> 0.0.0.0:18080" {
		t.Errorf("port: %q", got)
	}
	if got := s.ok("node2", "shoal port web 80/tcp"); got != "0.0.0.0:18080" {
		t.Errorf("port: %q", got)
	}
	if got := s.ok("node2", "shoal svc ls --filter label=tier=front --format '{{.Name}} {{.Ports}}'"); got != "web *:18080->80/tcp" {
		t.Errorf("svc ls: %q", got)
	}
	// Docker's fields and ways; what they give as a regular expression.
	for cmd, want := range map[string]string{
		"shoal svc ls -f mode=replicated -f name=^web$ --format '{{.Name}} {{.Mode}} {{.EndpointMode}}'": "web replicated vip",
		"shoal svc ls -f mode=global -q": "",
		"shoal svc ps -f desired-state=running --format '{{.DesiredState}} {{.CurrentState}}{{.Error}}' web":               `Running Running .* ago(\nRunning Running .* ago)*`,
		"shoal ps -f name=^c$ -f node=self --format '{{.Image}} {{.Status}}'":                                              "sleep Up .*",
		"shoal ps -f name=^c$ -f health=none -q":                                                                           "[a-z0-9]{12}",
		"shoal ps -f health=healthy -q":                                                                                    "",
		"shoal inspect -f '{{if .State.Health}}{{.State.Health.Status}}{{else}}none{{end}}' c":                             "none",
		"shoal info --format '{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}} {{.Swarm.Nodes}} {{.Swarm.Managers}}'": "active true 3 3",
		"shoal info -f '{{.Name}} {{.NCPU}} {{.Swarm.NodeAddr}} {{len .Swarm.RemoteManagers}} {{.OSType}}'":                "node1 [1-9][0-9]* 172.30.0.1 3 linux",
		"shoal info -f '{{.Node}} {{.Role}} {{.DataPath}}'":                                                                "node1 manager (nft|ipvs)",
		"shoal version -f '{{.Client.Os}} {{.Server.Arch}}'":                                                               "linux (amd64|arm64)",
		"shoal info -f '{{.ContainersRunning}} {{json .Swarm.Cluster}}'":                                                   `[1-9][0-9]* {"ID":"[a-z0-9]{12}"}`,
		"shoal ps -a -f name=^c$ -f status=exited -q":                                                                      "",
		"shoal node ls -f name=^node1$ --format '{{.Hostname}} {{.ManagerStatus}}'":                                        "node1 Leader",
		"shoal net ls -f name=^app$ --format '{{.Name}} {{.IPv6}}'":                                                        "app false",
	} {
		if got := s.ok("node1", strings.ReplaceAll(cmd, "%", "%%")); !regexp.MustCompile("^" + want + "$").MatchString(got) {
			t.Errorf("%s: %q, want %q", cmd, got, want)
		}
	}
	if r := s.on("node1", "shoal", "svc", "create", "--name", "web.app", "--network", "app", "--", "sleep", "1000"); r.code == 0 || !strings.Contains(r.err, "has a dot") {
		t.Errorf("a service named as another's NAME.NETWORK: exit status %d: %s%s", r.code, r.out, r.err)
	}
	if got := s.ok("node2", "shoal ps --filter label=job=x --filter node=node1 --format {{.Name}}"); got != "c" {
		t.Errorf("ps: %q", got)
	}
	var svcs []struct {
		Kernel []struct {
			Node string
			VIPs []struct {
				VIP      string
				Open     bool
				Backends []struct {
					Addr   string
					Weight int
				}
			}
		}
	}
	s.eventually(5*time.Second, func() error {
		if err := json.Unmarshal([]byte(s.ok("node1", "shoal svc inspect web")), &svcs); err != nil {
			return err
		}
		for _, k := range svcs[0].Kernel {
			for _, v := range k.VIPs {
				if !v.Open || len(v.Backends) != 2 {
					return errf("%s: %+v", k.Node, v)
				}
			}
		}
		return nil
	})
	got := s.ok("node2", "shoal events --since 1h --until 0s -f type=service -f name=web -o json")
	if !strings.Contains(got, `"action":"create"`) {
		t.Errorf("events: %q", got)
	}
	got = s.ok("node2", "shoal events --since 1h --until 0s -f task=c -f event=create --format '{{.Type}} {{.Name}} {{.Attributes.node}}'")
	if last := strings.Split(got, "\n"); last[len(last)-1] != "task c node1" {
		t.Errorf("events: %q", got)
	}
	s.fails("node2", "type is one of", "shoal events -f type=color")
	s.fails("node2", "is not a time", "shoal events --since yesterday")
}

// TestKillTopAttach: a task on another node hears signals, shows its processes, and is
// attached to.
func TestKillTopAttach(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal run -d --name k --node node2 -- sh -c 'trap \"echo hup\" HUP; trap \"echo bye; exit 3\" TERM; while :; do echo tick; sleep 0.1; done'")
	if got := s.ok("node1", "shoal kill -s HUP k"); got != "k" {
		t.Errorf("kill says %q", got)
	}
	s.eventually(slow(10*time.Second), func() error {
		if got := s.ok("node1", "shoal logs k"); !strings.Contains(got, "hup") {
			return fmt.Errorf("logs: %q", got)
		}
		return nil
	})
	if got := s.ok("node1", "shoal top k"); !strings.HasPrefix(got, "UID") || !strings.Contains(got, "echo tick") || strings.Contains(got, "shoal agent") {
		t.Errorf("top: %s", got)
	}
	if got := s.ok("node1", "shoal top k -o pid,rss,args"); strings.Contains(got, "UID") || !strings.Contains(got, "echo tick") {
		t.Errorf("top with options: %s", got)
	}
	if r := s.on("node1", words("timeout -s INT 2 shoal attach --sig-proxy=false --no-stdin k")...); !strings.Contains(r.out, "tick") {
		t.Errorf("attach shows %q, %s", r.out, r.err)
	}
	if got := s.task("k").Status.State; got != "running" {
		t.Errorf("after an interrupted attach it is %s", got)
	}
	attached := make(chan result)
	shown := filepath.Join(t.TempDir(), "shown")
	go func() { attached <- s.on("node3", "sh", "-c", "exec shoal attach k >"+shown) }()
	s.eventually(slow(10*time.Second), func() error {
		if b, err := os.ReadFile(shown); err != nil || !strings.Contains(string(b), "tick") {
			return fmt.Errorf("attach shows %q, %v", b, err)
		}
		return nil
	})
	s.ok("node1", "shoal kill -s TERM k")
	if r := <-attached; r.code != 3 {
		t.Errorf("attach ends with %d: %s%s", r.code, r.out, r.err)
	}
	s.ok("node1", "shoal run -d --name l -- sleep 1000")
	s.ok("node1", "shoal kill l")
	if got := s.ok("node1", "shoal wait l"); got != "137" {
		t.Errorf("killed: exit status %s", got)
	}
	s.whoami("web", 1, "")
	s.fails("node1", "l does not run", "shoal kill l")
	s.fails("node1", "web is a service", "shoal kill web")
	s.fails("node1", "web is a service", "shoal top web")
	s.fails("node1", "no such task", "shoal attach nosuch")
	s.fails("node1", "BLAH", "shoal kill -s BLAH %s", s.running("web")[0].Name)
	s.fails("node1", "column PID", "shoal top %s -o args", s.running("web")[0].Name)
}

func TestServiceUpdate(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")
	s.ok("node1", "shoal run -d --name c --network app -- sleep 1000")
	before := s.running("web")
	s.ok("node1", "shoal svc update --label-add a=b --publish-add 18081:80 web")
	if after := s.running("web"); len(after) != 3 || after[0].ID != before[0].ID {
		t.Errorf("an update of labels and ports replaced tasks: %v, %v", before, after)
	}
	// Another environment: replicas are replaced one by one, and no request
	// fails meanwhile.
	done := make(chan load, 1)
	go func() { done <- s.inTask("c", "-rate 50 -for 8s http://web/") }()
	s.ok("node1", "shoal svc update --env-add X=y web")
	if l := <-done; l.Failed > 0 {
		t.Errorf("rolling update: %d of %d failed: %v", l.Failed, l.Requests, l.Errors)
	}
	for _, x := range s.running("web") {
		if got := s.ok("node1", "shoal exec %s printenv X", x.Name); got != "y" {
			t.Errorf("%s: X is %q", x.Name, got)
		}
	}
	s.fails("node1", "published by service web", "shoal svc create --name other --publish 18081:80 -- sleep 1")
	s.ok("node1", "shoal svc update --publish-rm 80 web")
	s.whoami("other", 1, "--publish 18081:80")
	// The same name again, at once.
	s.ok("node1", "shoal svc rm web")
	s.whoami("web", 1, "--network app")
	s.fails("node1", "nothing to change", "shoal svc update web")
}

// TestRestart: a task of its own is started again in its place by its policy, and its
// output goes on; a replica is, by its node, while no manager is there to replace it.
func TestRestart(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "again", lab.Options{Nodes: 2, Managers: 1})
	s.ok("node1", "shoal run -d --name up --node node2 --restart always -- sh -c 'echo begun; exec sleep 1000'")
	was := s.task("up")
	s.fails("node1", "--rm", "shoal run -d --rm --restart always -- true")
	s.fails("node1", "use no, always", "shoal run -d --restart sometimes -- true")
	s.ok("node1", "shoal run -d --name twice --restart on-failure:2 -- sh -c 'echo tried; exit 7'")
	s.eventually(slow(20*time.Second), func() error {
		if x := s.task("twice"); x.Status.State != "failed" {
			return fmt.Errorf("%+v", x.Status)
		}
		return nil
	})
	if got := s.ok("node1", "shoal logs twice"); got != "tried\ntried\ntried" {
		t.Errorf("output of all runs: %q", got)
	}
	if got := s.ok("node1", "shoal inspect twice --format '{{.HostConfig.RestartPolicy.Name}} {{.HostConfig.RestartPolicy.MaximumRetryCount}}'"); got != "on-failure 2" {
		t.Errorf("inspect shows %q", got)
	}
	again := func(name, old string, pid int) task {
		t.Helper()
		var x task
		s.eventually(slow(20*time.Second), func() error {
			x = s.task(name)
			if x.Status.State != "running" || x.Status.PID == pid || x.Status.PID == 0 {
				return fmt.Errorf("%+v", x.Status)
			}
			return nil
		})
		if x.ID != old {
			t.Errorf("it is another task: %+v", x)
		}
		return x
	}
	if err := syscall.Kill(was.Status.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	now := again("up", was.ID, was.Status.PID)
	if !slices.Equal(now.Attachments[0].Addrs, was.Attachments[0].Addrs) {
		t.Errorf("its address was %v, is %v", was.Attachments, now.Attachments)
	}

	// Without managers.
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal svc create --name web --network app --constraint node.name==node2 -- %s/whoami", bin)
	s.ok("node1", "shoal run -d --name c --node node2 --network app -- sleep 10000")
	replica := s.running("web")[0]
	c := s.task("c")
	if err := s.KillAgent("node1"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(replica.Status.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(40*time.Second), func() error {
		r := s.on("node2", "nsenter", "-t", fmt.Sprint(c.Status.PID), "-n", "-m", filepath.Join(bin, "load"), "-n", "5", "-timeout", "1s", "http://web/")
		if l := s.parseLoad(r.out); l.OK != 5 {
			return fmt.Errorf("%+v %s", l, r.err)
		}
		return nil
	})
	if err := s.Start(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(40*time.Second), func() error {
		ts := s.running("web")
		if len(ts) != 1 || ts[0].ID != replica.ID || ts[0].Status.PID == replica.Status.PID {
			return fmt.Errorf("%+v", ts)
		}
		return nil
	})
	s.ok("node1", "shoal stop up")
	s.eventually(slow(20*time.Second), func() error {
		if x := s.task("up"); x.Status.State != "shutdown" {
			return fmt.Errorf("%+v", x.Status)
		}
		return nil
	})
}

// TestStartAndRestart: what was stopped, or has ended, starts again under its ID, name and
// address on its node; by name it is found again, also by another name.
func TestStartAndRestart(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal run -d --name c --node node3 --network app -- sleep 1000")
	s.ok("node1", `shoal run -d --name up --node node2 --network app -- sh -c 'trap "echo int; exit 4" INT; trap "" TERM; echo begun; while :; do sleep 0.05; done'`)
	was := s.task("up")
	same := func(what string) task {
		t.Helper()
		x := s.task("up")
		if x.ID != was.ID || x.Attachments[0].Addrs[0] != was.Attachments[0].Addrs[0] || x.Status.State != "running" || x.Status.PID == 0 {
			t.Errorf("%s: it was %+v, is %+v", what, was, x)
		}
		if got := s.ok("node1", "shoal exec c getent hosts up"); !strings.HasPrefix(got, was.Attachments[0].Addrs[0]) {
			t.Errorf("%s: its name gives %q", what, got)
		}
		return x
	}
	if got := s.ok("node1", "shoal start up"); got != "up" || same("started while it runs").Status.PID != was.Status.PID {
		t.Errorf("start of one that runs says %q", got)
	}
	s.ok("node1", "shoal stop -s INT up")
	if x, code := s.task("up"), s.ok("node1", "shoal wait up"); x.Status.State != "shutdown" || code != "4" {
		t.Errorf("stopped by INT: exit status %s, %+v", code, x.Status)
	}
	if got := s.ok("node3", "shoal start up"); got != "up" {
		t.Errorf("start says %q", got)
	}
	now := same("stopped and started")
	begun := time.Now()
	if got := s.ok("node3", "shoal restart -t 1 up"); got != "up" || time.Since(begun) > slow(8*time.Second) {
		t.Errorf("restart says %q after %s", got, time.Since(begun))
	}
	if again := same("restarted"); again.Status.PID == now.Status.PID {
		t.Errorf("it is the same program: %+v", again)
	}
	if got := s.ok("node1", "shoal logs up"); got != "begun\nint\nbegun\nbegun" {
		t.Errorf("its output: %q", got)
	}

	s.ok("node1", "shoal rename up other")
	s.eventually(slow(10*time.Second), func() error {
		if got := s.on("node3", "shoal", "exec", "c", "getent", "hosts", "other"); !strings.HasPrefix(got.out, was.Attachments[0].Addrs[0]) {
			return fmt.Errorf("%q %s", got.out, got.err)
		}
		if got := s.on("node3", "shoal", "exec", "c", "getent", "hosts", "up"); got.code == 0 {
			return fmt.Errorf("the old name still gives %q", got.out)
		}
		return nil
	})
	s.fails("node1", "no such task: up", "shoal start up")
	s.fails("node1", "is taken by task", "shoal rename other c")
	s.ok("node1", "shoal restart -t 0 other")
	if got := s.ok("node1", "shoal exec other hostname"); got != "other" {
		t.Errorf("its host name after a restart: %s", got)
	}

	// In the foreground: nothing of the output is missed, and the exit status is the program's.
	if r := s.in("first\n", "node1", "shoal", "run", "--name", "fg", "-i", "--", "sh", "-c", `read x; echo got $x; test "$x" = quit`); r.out != "got first\n" || r.code != 1 {
		t.Errorf("the first run: %+v", r)
	}
	for _, k := range []struct {
		in, flags, out string
		code           int
	}{{"quit\n", "-ai", "got quit\n", 0}, {"else\n", "-i", "got else\n", 1}} {
		if r := s.in(k.in, "node2", "shoal", "start", k.flags, "fg"); r.out != k.out || r.code != k.code {
			t.Errorf("start %s: %+v", k.flags, r)
		}
	}
	s.fails("node1", "at once", "shoal start -a fg c")
	s.fails("node1", "shoal attach c", "shoal start -a c")

	// What fails in its run says so, of a service the way is another, and nothing is half done.
	s.whoami("web", 1, "--network app")
	s.fails("node1", "svc update --force web", "shoal start web")
	s.fails("node1", "svc update --force web", "shoal restart %s", s.running("web")[0].Name)
	s.fails("node1", "svc create", "shoal rename web x")
	s.fails("node1", "no such task: nosuch", "shoal restart nosuch")
	s.fails("node1", "SIGFOO", "shoal restart -s SIGFOO c")
	s.fails("node1", "-7", "shoal stop -t -7 c")
	s.ok("node1", "shoal stop -t 0 c other")
	s.ok("node1", "shoal rm other")
	s.ok("node1", "shoal svc rm web")
	s.eventually(slow(20*time.Second), func() error {
		if r := s.on("node1", "shoal", "net", "rm", "app"); r.code != 0 {
			return fmt.Errorf("%s", r.err)
		}
		return nil
	})
	s.fails("node1", "is removed", "shoal start c")
}

// TestCopy: files go between a task on any node and this machine as docker cp has it, and
// no link in the task leads out of it.
func TestCopy(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
	// Its /etc/hostname is its own, the rest of its files the node's.
	in := filepath.Join(dir, "mnt")
	if err := errors.Join(os.MkdirAll(filepath.Join(in, "in"), 0o755), os.Symlink("/etc/hostname", filepath.Join(in, "link")), os.Symlink("in", filepath.Join(in, "dir"))); err != nil {
		t.Fatal(err)
	}
	s.ok("node1", "shoal run -d --name c --node node3 -- sleep 1000")
	write("src/a", "first\n")
	write("src/sub/b", "second\n")
	write("one", "alone\n")
	if err := os.Chown(filepath.Join(dir, "one"), 1234, 2345); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("one", filepath.Join(dir, "alias")); err != nil {
		t.Fatal(err)
	}
	for _, k := range []struct{ flags, from, to string }{
		{"", dir + "/src", "c:" + in + "/new"}, // takes its name
		{"", dir + "/src", "c:" + in + "/in"},  // goes into it
		{"", dir + "/src/.", "c:" + in + "/dir"},
		{"-a", dir + "/one", "c:" + in[1:] + "/in/kept"},
		{"", dir + "/one", "c:" + in + "/in/"},
		{"-L", dir + "/alias", "c:" + in + "/in"},
		{"", "c:" + in + "/new", dir + "/back"},
		{"", "c:" + in + "/new/.", dir + "/src"},
		{"", "c:" + in + "/link", dir + "/aslink"},
		{"-L", "c:" + in + "/link", dir + "/host"},
		{"-a", "c:" + in + "/in/kept", dir + "/owned"},
	} {
		if r := s.on("node1", append([]string{"shoal", "cp"}, words(k.flags+" "+k.from+" "+k.to)...)...); r.code != 0 || r.out != "" || !strings.HasPrefix(r.err, "Successfully copied ") {
			t.Errorf("cp %s %s %s: %+v", k.flags, k.from, k.to, r)
		}
	}
	want := "/mnt/in/a 0 0 640\n/mnt/in/alias 0 0 640\n/mnt/in/kept 1234 2345 640\n/mnt/in/one 0 0 640\n/mnt/in/src/a 0 0 640\n/mnt/in/src/sub/b 0 0 640\n/mnt/in/sub/b 0 0 640\n/mnt/new/a 0 0 640\n/mnt/new/sub/b 0 0 640"
	if got := s.ok("node1", "shoal exec c sh -c 'find %s -type f | sort | xargs stat -c \"%%n %%u %%g %%a\"'", in); strings.ReplaceAll(got, in, "/mnt") != want {
		t.Errorf("in the task:\n%s\nwant:\n%s", got, want)
	}
	if got := read("back/sub/b") + read("src/sub/b") + read("host"); got != "second\nsecond\nc\n" {
		t.Errorf("copied back: %q", got)
	}
	if got, err := os.Readlink(filepath.Join(dir, "aslink")); got != "/etc/hostname" {
		t.Errorf("a link: %q, %v", got, err)
	}
	if fi, err := os.Stat(filepath.Join(dir, "owned")); err != nil || fi.Sys().(*syscall.Stat_t).Uid != 1234 {
		t.Errorf("-a out of a task: %+v, %v", fi, err)
	}

	// As streams: archives in and out, compressed in.
	s.ok("node1", "sh -c 'tar -C %s -cz src | shoal cp - c:%s/in/sub'", dir, in)
	if got := s.ok("node2", "sh -c 'shoal cp c:%s/in/sub - | tar -t | sort'", in); got != "sub/\nsub/b\nsub/src/\nsub/src/a\nsub/src/sub/\nsub/src/sub/b" {
		t.Errorf("as an archive: %s", got)
	}
	s.ok("node1", "sh -c 'head -c 30000000 /dev/urandom >%[1]s/big && shoal cp -q %[1]s/big c:%[2]s/big && shoal cp -q c:%[2]s/big %[1]s/big2 && cmp %[1]s/big %[1]s/big2'", dir, in)

	// An archive writes nowhere else than where it is to be extracted, whatever it says.
	s.ok("node1", "sh -c 'cd %s && mkdir outside && ln -s $PWD/outside evil && tar -cf evil.tar evil && rm evil && mkdir evil && echo x >evil/out && tar -rf evil.tar evil/out && rm -r evil'", dir)
	_ = s.on("node1", "sh", "-c", fmt.Sprintf("shoal cp - c:%s/in <%s/evil.tar", in, dir))
	if found, err := os.ReadDir(filepath.Join(dir, "outside")); err != nil || len(found) > 0 {
		t.Errorf("outside: %v, %v", found, err)
	}
	for line, want := range map[string]string{
		"cp c:/nosuch .":                              "/nosuch: no such file",
		"cp " + dir + "/nosuch c:" + in:               "nosuch: no such file",
		"cp " + dir + "/one c:/nosuch/x":              "/nosuch: no such file",
		"cp " + dir + "/one c:" + in + "/nosuch/":     "no such directory",
		"cp " + dir + "/src c:" + in + "/in/one":      "cannot copy directory",
		"cp c:" + in + "/in " + dir + "/one":          "cannot copy directory",
		"cp c:" + in + "/in " + dir + "/nosuch/x":     "nosuch",
		"cp " + dir + "/one c:/proc/x":                "/proc",
		"cp c:/etc/hosts c:/mnt":                      "between tasks",
		"cp a b":                                      "TASK:PATH",
		"cp nosuch:/x .":                              "no such task: nosuch",
		"cp " + dir + "/one c:":                       "path is empty",
		"cp - c:" + in + "/in/one </dev/null":         "must be a directory",
		"cp - c:" + in + "/in <" + dir + "/src/sub/b": "tar",
	} {
		s.fails("node1", want, "sh -c 'shoal %s'", line)
	}
	s.ok("node1", "shoal stop -t 0 c")
	s.fails("node1", "its program has ended", "shoal cp c:/etc/hosts .")
}
