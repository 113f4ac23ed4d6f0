package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain makes the test binary the program itself for those who ask for it.
func TestMain(m *testing.M) {
	if os.Getenv("SHOAL_TEST_RUN") != "" {
		main()
	}
	os.Exit(m.Run())
}

// wrong are command lines with one thing wrong, and what the one line on stderr
// says of it. Where the mistake is on the command line itself the status is 2,
// and a second line points to the help.
var wrong = []struct {
	args string
	code int
	want string
}{
	// What is no command.
	{"nett", 2, `unknown command "shoal nett": did you mean "net"?`},
	{"net creat", 2, `unknown command "shoal net creat": did you mean "create"?`},
	{"lab nix", 2, `unknown command "shoal lab nix"`},
	{"node promote", 2, "shoal node promote takes at least 1 arguments, 0 are given"},
	{"token show", 2, "shoal token show takes 1 arguments, 0 are given"},
	{"token rotate boss", 2, `role "boss": use worker or manager`},
	{"ca show now", 2, "shoal ca show takes 0 arguments, 1 are given"},
	{"--bogus", 2, "unknown flag: --bogus"},
	{"net ls --bogus", 2, "unknown flag: --bogus"},
	{"net ls -o", 2, "flag needs an argument"},
	// Too few or too many arguments.
	{"init x", 2, "shoal init takes 0 arguments, 1 are given"},
	{"join", 2, "shoal join takes 1 arguments, 0 are given"},
	{"net create", 2, "takes 1 arguments, 0 are given"},
	{"net create a b", 2, "takes 1 arguments, 2 are given"},
	{"net rm", 2, "takes at least 1 arguments"},
	{"net inspect", 2, "takes at least 1 arguments"},
	{"net connect a", 2, "takes 2 arguments"},
	{"net disconnect a b c", 2, "takes 2 arguments"},
	{"svc create", 2, "no command"},
	{"svc create --name web", 2, "no command"},
	{"svc scale", 2, "takes at least 1 arguments"},
	{"svc update", 2, "takes at least 1 arguments"},
	{"svc ps", 2, "takes at least 1 arguments"},
	{"svc rm", 2, "takes at least 1 arguments"},
	{"svc logs", 2, "takes 1 arguments"},
	{"run", 2, "no command"},
	{"exec", 2, "exec takes a task and a command"},
	{"exec t", 2, "exec takes a task and a command"},
	{"stop", 2, "takes at least 1 arguments"},
	{"rm", 2, "takes at least 1 arguments"},
	{"logs", 2, "takes 1 arguments"},
	{"port", 2, "takes at least 1 arguments"},
	{"node rm", 2, "takes at least 1 arguments"},
	{"node update", 2, "takes 1 arguments"},
	{"agent x", 2, "shoal agent takes 0 arguments"},
	{"lab up x", 2, "takes 0 arguments"},
	{"lab exec node1", 2, "lab exec takes a node and a command"},
	{"lab kill", 2, "takes 1 arguments"},
	{"lab partition node1", 2, "takes 2 arguments"},
	{"version x", 2, "takes 0 arguments"},
	// Values that a flag can't have.
	{"net ls -o yaml", 2, `output "yaml" is unknown: use json or wide`},
	{"info -o x", 2, `output "x" is unknown: use json`},
	{"init --data-path-port x", 2, `invalid argument "x" for "--data-path-port" flag: invalid syntax`},
	{"init --data-path-port 99999999999", 2, "value out of range"},
	{"svc create --name web --replicas x -- a", 2, `invalid argument "x" for "--replicas" flag: invalid syntax`},
	{"svc create --name web --stop-grace-period x -- a", 2, `"--stop-grace-period" flag: invalid duration "x"`},
	{"svc create --name web --publish x -- a", 2, `publish "x"`},
	{"svc create --name web -p 80:80:80:80 -- a", 2, "is not an address of the node"},
	{"svc create --name web -p 70000:80 -- a", 2, `"70000"`},
	{"svc create --name web --network alias=x -- a", 2, "network"},
	{"svc scale -q web", 2, "want SERVICE=REPLICAS"},
	{"svc scale web", 2, `"web": want SERVICE=REPLICAS`},
	{"svc scale web=x", 2, `"web=x": want SERVICE=REPLICAS`},
	{"logs --tail x t", 2, `invalid argument "x"`},
	{"events --since x", 2, `--since: "x" is not a time`},
	{"events --until -1h", 2, `--until: "-1h" is not a time`}, {"events --filter type=x", 2, "type is one of"}, {"port a 1 2", 2, "takes 2 arguments, 3 are given"},
	{"events --filter x", 2, `filter "x": want KEY=VALUE`},
	{"node update --label-add =x n", 2, `label "=x"`},
	{"agent --log-level x", 2, `--log-level "x": use debug, info, warn or error`},
	{"agent --log-format x", 2, `--log-format "x": use text or json`},
	{"agent --data-path x", 2, `--data-path "x": use auto, ipvs, nft`},
	{"agent --dns-stale -1s", 2, "--dns-stale -1s is out of range: use 0 (never) to 168h0m0s"},
	{"agent --dns-stale 8d", 2, `invalid argument "8d"`},
	{"agent --control-port x", 2, `invalid argument "x"`},
	{"agent --control-port 0", 2, "--control-port 0 is out of range"},
	{"agent --gossip-port 65536", 2, "--gossip-port 65536 is out of range"},
	{"agent --gossip-port 2377", 2, "are both 2377"},
	{"agent --node-name a/b", 2, `node name "a/b"`},
	{"agent --instance a/b", 2, `instance name "a/b"`},
	{"agent --instance=", 2, "instance name is empty"},
	{"agent --socket /" + strings.Repeat("x", 120), 2, "the longest allowed is 107"},
	{"lab up --nodes 0", 2, "can't be 0"},
	{"lab up --managers 0", 2, "can't be 0"},
	{"lab up --mtu 0", 2, "can't be 0"},
	{"lab ls --name ../x", 1, `lab name "../x"`},
	{"lab ls --name nosuchlab", 1, "lab nosuchlab is not up: run 'shoal lab up --name nosuchlab'"},
	{"lab down --name nosuchlab", 1, "lab nosuchlab is not up"},
	{"lab kill --name nosuchlab node1", 1, "lab nosuchlab is not up"},
	{"lab partition --name nosuchlab a b", 1, "lab nosuchlab is not up"},
	{"lab heal --name nosuchlab", 1, "lab nosuchlab is not up"},
	{"lab exec --name nosuchlab node1 ls", 1, "lab nosuchlab is not up"},
	// No agent.
	{"init", 1, noAgent}, {"join h", 1, noAgent}, {"leave", 1, noAgent}, {"info", 1, noAgent}, {"doctor", 1, noAgent},
	{"net create app", 1, noAgent}, {"net ls", 1, noAgent}, {"net rm x", 1, noAgent}, {"net inspect x", 1, noAgent}, {"net connect a b", 1, noAgent},
	{"net disconnect a b", 1, noAgent}, {"svc create --name web -- a", 1, noAgent}, {"svc create --name web a -g b --replicas", 1, noAgent}, {"svc ls", 1, noAgent}, {"svc ps x", 1, noAgent},
	{"svc scale web=1", 1, noAgent}, {"svc update --replicas 2 x", 1, noAgent}, {"svc rm x", 1, noAgent}, {"svc inspect x", 1, noAgent}, {"svc logs x", 1, noAgent},
	{"run -- a", 125, noAgent}, {"exec t ls", 1, noAgent}, {"ps", 1, noAgent}, {"stop x", 1, noAgent}, {"rm x", 1, noAgent}, {"logs x", 1, noAgent},
	{"port x", 1, noAgent}, {"stats", 1, noAgent}, {"events", 1, noAgent}, {"node ls", 1, noAgent}, {"node inspect x", 1, noAgent},
	{"node inspect self", 1, noAgent}, {"node update --role worker x", 1, noAgent}, {"node rm x", 1, noAgent},
	{"--socket /dev/null info", 1, "no agent answers at /dev/null"}, // A file is not made in the place of what is none: once /dev/null is a file, little works.
	{"image save -o /dev/null web:1", 1, "/dev/null is a device, no file"},
	{"snapshot save --force /dev/null", 1, "/dev/null is a device, no file"},
	{"cp c1:/etc/hosts /dev/null", 1, "/dev/null is a device, no file"},
}

// TestDoctorOfAHungAgent: doctor is asked where something hangs, and must not hang itself.
func TestDoctorOfAHungAgent(t *testing.T) {
	defer func(d time.Duration) { doctorWait = d }(doctorWait)
	doctorWait = 200 * time.Millisecond
	socket := filepath.Join(t.TempDir(), "hung.sock")
	l, err := net.Listen("unix", socket) // takes connections, as the kernel does for who is stopped
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var out, errOut bytes.Buffer
	code := run(t.Context(), []string{"--socket", socket, "doctor"}, strings.NewReader(""), &out, &errOut)
	if code != 1 || !strings.Contains(errOut.String(), "has not answered for 200ms") || out.Len() > 0 {
		t.Errorf("exit status %d: %s%s", code, out.String(), errOut.String())
	}
}

const noAgent = "no agent answers at "

func TestWrongInput(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none.sock")
	t.Setenv("SHOAL_SOCKET", socket)
	for _, k := range wrong {
		t.Run(k.args, func(t *testing.T) {
			var out, errOut bytes.Buffer
			code := run(context.Background(), strings.Fields(k.args), strings.NewReader(""), &out, &errOut)
			if code != k.code {
				t.Errorf("exit status %d, want %d", code, k.code)
			}
			if out.Len() > 0 {
				t.Errorf("on stdout: %s", out.String())
			}
			checkLine(t, errOut.String(), k.code, k.want)
			if k.want == noAgent && !strings.Contains(errOut.String(), socket) {
				t.Errorf("%q does not name the socket", errOut.String())
			}
		})
	}
}

// checkLine checks what a failed command wrote to stderr.
func checkLine(t *testing.T, got string, code int, want string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
	if code == 2 {
		if last := lines[len(lines)-1]; len(lines) == 1 || !strings.HasPrefix(last, "see 'shoal") || !strings.HasSuffix(last, "--help'") {
			t.Errorf("%q does not point to the help", got)
		}
		lines = lines[:len(lines)-1]
	}
	if len(lines) != 1 || !strings.HasPrefix(lines[0], "shoal: ") || !strings.Contains(lines[0], want) {
		t.Errorf("stderr is %q\nwant one line with %q", got, want)
	}
	for _, goish := range []string{"strconv.", "rpc error", "<nil>", "%!", "goroutine"} {
		if strings.Contains(got, goish) {
			t.Errorf("%q holds %q", got, goish)
		}
	}
}

// TestNotRoot runs the program as nobody.
func TestNotRoot(t *testing.T) {
	dir, err := os.MkdirTemp("", "shoal-cmd") // t.TempDir is closed to others
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "shoal")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(exe, b, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, k := range []struct{ args, want string }{
		{"agent --data-dir " + dir + "/data", "the agent needs root"},
		{"lab up --name notroot", "a lab needs root"},
	} {
		cmd := exec.Command(exe, strings.Fields(k.args)...)
		cmd.Dir, cmd.Env = "/", append(os.Environ(), "SHOAL_TEST_RUN=1", "SHOAL_SOCKET="+dir+"/none.sock")
		if os.Geteuid() == 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		var errOut bytes.Buffer
		cmd.Stderr = &errOut
		err := cmd.Run()
		var ee *exec.ExitError
		if !errors.As(err, &ee) || ee.ExitCode() != 1 {
			t.Errorf("%s: %v: %s", k.args, err, errOut.String())
			continue
		}
		checkLine(t, errOut.String(), 1, k.want)
	}
}

// TestHelpSucceeds: who asks for help gets it, and no error.
func TestHelpSucceeds(t *testing.T) {
	for _, args := range []string{"", "--help", "net", "net --help", "svc create --help", "lab", "agent --help"} {
		var out, errOut bytes.Buffer
		if code := run(context.Background(), strings.Fields(args), strings.NewReader(""), &out, &errOut); code != 0 || !strings.Contains(out.String(), "Usage:") || errOut.Len() > 0 {
			t.Errorf("shoal %s: exit status %d, stderr %q, stdout %q", args, code, errOut.String(), out.String())
		}
	}
}
