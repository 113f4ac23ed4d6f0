package integration

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/shoalnet/shoal/internal/nl"
)

// outside serves HTTP at a port of 172.30.0.254, the underlay's outside. It
// answers with the address that asked.
func (s site) outside(port string) (stop func()) {
	s.Helper()
	ns := "shoal-" + s.Name + "-underlay"
	var ln net.Listener
	err := nl.Do(ns, func() (err error) {
		ln, err = net.Listen("tcp", "172.30.0.254:"+port)
		return err
	})
	if err != nil {
		s.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		_, _ = io.WriteString(w, host)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	return func() { srv.Close(); <-done }
}

// nextTo is the address n behind the beginning of a subnet.
func nextTo(subnet string, n byte) string {
	a := netip.MustParsePrefix(subnet).Addr().As4()
	a[3] += n
	return netip.AddrFrom4(a).String()
}

// conn is a connection from inside a task, made by nc, that is kept open.
type conn struct {
	s     site
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
}

// line connects from a task to a line server.
func (s site) line(task, host string, port int) *conn {
	s.Helper()
	cmd := exec.Command(filepath.Join(bin, "shoal"), "lab", "exec", "--name", s.Name, "node1", "--", "shoal", "exec", "-i", task, "nc", host, fmt.Sprint(port))
	in, err := cmd.StdinPipe()
	if err != nil {
		s.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	c := &conn{s: s, cmd: cmd, in: in, lines: make(chan string, 16)}
	go func() {
		defer close(c.lines)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			c.lines <- sc.Text()
		}
	}()
	return c
}

// say sends a line and wants it back.
func (c *conn) say(text string) {
	c.s.Helper()
	if _, err := io.WriteString(c.in, text+"\n"); err != nil {
		c.s.Fatalf("the connection is gone: %v", err)
	}
	select {
	case l, ok := <-c.lines:
		if !ok || !strings.Contains(l, text) {
			c.s.Fatalf("said %q, heard %q (open: %t)", text, l, ok)
		}
	case <-time.After(slow(10 * time.Second)):
		c.s.Fatalf("said %q, heard nothing", text)
	}
}

// ends wants the connection to end without a word.
func (c *conn) ends() {
	c.s.Helper()
	select {
	case l, ok := <-c.lines:
		if ok {
			c.s.Errorf("heard %q, want the end of the connection", l)
		}
	case <-time.After(slow(10 * time.Second)):
		c.s.Error("the connection does not end")
	}
}

func (c *conn) close() {
	c.in.Close()
	// Not SIGKILL, which would leave its child with the other end of the pipe.
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	for range c.lines { // until its reader has ended
	}
	_ = c.cmd.Wait()
}
