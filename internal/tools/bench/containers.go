package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/shoalnet/shoal/internal/imagefile"
	"github.com/shoalnet/shoal/internal/proc"
	"github.com/shoalnet/shoal/lab"
)

// manyContainers are made on one node at once.
const manyContainers = 100

// containers measures how long a container takes to be there, beside Docker's on this
// machine, if its daemon is installed, and what a hundred of them on a node take.
func (b *bench) containers() (err error) {
	dir, err := os.MkdirTemp("", "shoal-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	image := filepath.Join(dir, "whoami.tar")
	if err := imageOf(image, "whoami:1", filepath.Join(b.bin, "whoami")); err != nil {
		return err
	}
	say("lab up (%s)", b.dataPath)
	defer func() {
		_, derr := b.shoal("lab", "down", "--name", b.lab)
		err = errors.Join(err, derr)
	}()
	if _, err := b.shoal("lab", "up", "--name", b.lab, "--nodes", "2", "--data-path", b.dataPath); err != nil {
		return err
	}
	if _, err := b.shoal("lab", "load", "--name", b.lab, image); err != nil {
		return err
	}
	if _, err := b.on("node1", "shoal", "net", "create", "--subnet", "10.8.0.0/16", "app"); err != nil {
		return err
	}
	if _, err := b.on("node1", "shoal", "run", "-d", "--name", "c", "--node", "node2", "--network", "app", "--", "sleep", "3600"); err != nil {
		return err
	}
	create := func(name string, replicas int) []string {
		return []string{"shoal", "svc", "create", "-q", "--name", name, "--network", "app", "--replicas", strconv.Itoa(replicas), "--constraint", "node.name==node1", "--pull", "never", "whoami:1"}
	}
	rounds := 3*b.rounds + 1
	var told, answers, task, docked, dockAnswers []float64
	d, why := dockerd(dir, image)
	defer d.stop()
	for r := range rounds {
		say("round %d of %d: a container", r+1, rounds)
		start := time.Now()
		done := make(chan error, 1)
		var first float64
		go func() {
			_, err := b.on("node2", "shoal", "exec", "c", "timeout", "60", "sh", "-c", "until curl -sf -m 1 http://one/ >/dev/null; do sleep 0.01; done")
			first = time.Since(start).Seconds()
			done <- err
		}()
		_, err := b.on("node1", create("one", 1)...)
		told = append(told, time.Since(start).Seconds())
		if err = errors.Join(err, <-done); err != nil {
			return err
		}
		answers = append(answers, first)
		if _, err := b.on("node1", "shoal", "svc", "rm", "one"); err != nil {
			return err
		}
		start = time.Now()
		if _, err := b.on("node1", "shoal", "run", "-d", "--name", "t", "--network", "app", "--pull", "never", "whoami:1"); err != nil {
			return err
		}
		task = append(task, time.Since(start).Seconds())
		if _, err := b.on("node1", "shoal", "rm", "-f", "t"); err != nil {
			return err
		}
		if why != nil {
			continue
		}
		ran, answered, err := d.run()
		if err != nil {
			return err
		}
		docked, dockAnswers = append(docked, ran), append(dockAnswers, answered)
	}
	row := func(what string, xs []float64) {
		if len(xs) == 0 {
			fmt.Printf("| %s | not measured: %v | |\n", what, why)
			return
		}
		fmt.Printf("| %s | %.2f | %.2f to %.2f |\n", what, median(xs), slices.Min(xs), slices.Max(xs))
	}
	fmt.Printf("| a container of a static program, %d rounds | s | |\n|---|---|---|\n", rounds)
	row("shoal svc create, until it returns: the replica is in the VIP on each node", told)
	row("the same, until another node's client has an answer by name", answers)
	row("shoal run -d, on an overlay network", task)
	row("docker run -d, on its bridge", docked)
	row("the same, until its port answers", dockAnswers)
	return b.manyContainers(create)
}

// manyContainers makes a hundred on one node.
func (b *bench) manyContainers(create func(string, int) []string) error {
	l, err := lab.Open(b.lab)
	if err != nil {
		return err
	}
	agent := 0
	for _, n := range l.Nodes() {
		if n.Name == "node1" {
			agent = n.PID
		}
	}
	time.Sleep(3 * time.Second)
	before := rss(agent)
	say("%d containers on a node", manyContainers)
	start := time.Now()
	if _, err := b.on("node1", create("many", manyContainers)...); err != nil {
		return err
	}
	took := time.Since(start).Seconds()
	time.Sleep(3 * time.Second)
	n := float64(manyContainers)
	ours, theirs := pss(l.Dir, "task-shim"), pss(l.Dir, "containerd-shim")
	fmt.Printf("| %d replicas on one node, from nothing to all in the VIP | %.1f | |\n\n", manyContainers, took)
	fmt.Printf("| memory of each of %d containers, MB | |\n|---|---|\n| its shim (what the kernel shares counted in parts: PSS) | %.1f |\n| containerd's shim (PSS) | %.1f |\n| the agent's growth | %.2f |\n| the agent, then | %.0f |\n\n",
		manyContainers, ours/n/1e6, theirs/n/1e6, float64(rss(agent)-before)/n/1e6, float64(rss(agent))/1e6)
	return nil
}

// pss is the memory of processes of a lab whose command has a word in it, bytes: what
// several share is counted in equal parts (proc(5), smaps_rollup).
func pss(dir, word string) (sum float64) {
	pids, _ := proc.PIDs()
	for _, pid := range pids {
		if cmd := strings.Join(proc.Args(pid), " "); !strings.Contains(cmd, word) || !strings.Contains(cmd, dir) {
			continue
		}
		roll, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		for line := range strings.Lines(string(roll)) {
			var kb float64
			if n, _ := fmt.Sscanf(line, "Pss: %g kB", &kb); n == 1 {
				sum += kb * 1024
			}
		}
	}
	return sum
}

// docker is Docker's daemon in namespaces of its own.
type docker struct {
	socket string
	cmd    *exec.Cmd // its first process is in the network namespace
}

// dockerd starts Docker's daemon, with the image.
func dockerd(dir, image string) (d docker, err error) {
	for _, p := range []string{"dockerd", "docker"} {
		if _, err := exec.LookPath(p); err != nil {
			return d, fmt.Errorf("%s is not installed (scripts/setup bench)", p)
		}
	}
	log, err := os.Create(filepath.Join(dir, "dockerd.log"))
	if err != nil {
		return d, err
	}
	defer log.Close()
	d.socket = filepath.Join(dir, "docker.sock")
	// With the process namespace all that runs in it ends.
	script := fmt.Sprintf(`mount -t tmpfs tmpfs /run && ip link set lo up && exec dockerd --data-root %[1]s/data --exec-root /run/docker --pidfile /run/docker.pid -H unix://%[1]s/docker.sock --iptables=false --ip6tables=false`, dir)
	cmd := exec.Command("unshare", "-m", "-n", "-p", "-f", "--kill-child", "--mount-proc", "--propagation", "private", "sh", "-c", script)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "HTTP_PROXY=", "HTTPS_PROXY=", "http_proxy=", "https_proxy=")
	if err := cmd.Start(); err != nil {
		return d, err
	}
	d.cmd = cmd
	for end := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		if _, err = d.do("info"); err == nil {
			break
		}
		if time.Now().After(end) {
			text, _ := os.ReadFile(log.Name())
			return d, fmt.Errorf("dockerd does not answer: %s", text[max(0, len(text)-300):])
		}
	}
	_, err = d.do("load", "-i", image)
	return d, err
}

func (d docker) stop() {
	if d.cmd == nil {
		return
	}
	// The daemon first: unshare waits for it, and so leaves nobody behind who does not.
	pid := d.cmd.Process.Pid
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	killed := false
	for _, f := range strings.Fields(string(children)) {
		if n, _ := strconv.Atoi(f); n > 1 {
			killed = syscall.Kill(n, syscall.SIGKILL) == nil || killed
		}
	}
	if !killed {
		_ = d.cmd.Process.Kill()
	}
	_ = d.cmd.Wait()
}

func (d docker) do(args ...string) (string, error) {
	out, err := exec.Command("docker", append([]string{"-H", "unix://" + d.socket}, args...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// run returns after how many seconds docker run -d did, and the program answered.
func (d docker) run() (ran, answered float64, err error) {
	start := time.Now()
	if _, err := d.do("run", "-d", "--name", "one", "whoami:1"); err != nil {
		return 0, 0, err
	}
	ran = time.Since(start).Seconds()
	addr, err := d.do("inspect", "-f", "{{.NetworkSettings.IPAddress}}", "one")
	if err != nil {
		return 0, 0, err
	}
	out, err := exec.Command("nsenter", "-t", strconv.Itoa(d.cmd.Process.Pid), "-n", "timeout", "60", "sh", "-c", "until curl -sf -m 1 http://"+addr+"/ >/dev/null; do sleep 0.01; done").CombinedOutput()
	if err != nil {
		return 0, 0, fmt.Errorf("docker's container does not answer: %w: %s", err, out)
	}
	answered = time.Since(start).Seconds()
	_, err = d.do("rm", "-f", "one")
	return ran, answered, err
}

// imageOf writes an image of one static program, as docker save does.
func imageOf(path, name, program string) error {
	b, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	i, err := imagefile.New(runtime.GOARCH, map[string]any{"Entrypoint": []string{"/whoami"}}, imagefile.File{Name: "whoami", Mode: 0o755, Data: b})
	if err != nil {
		return err
	}
	if b, err = i.Archive(name); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}
