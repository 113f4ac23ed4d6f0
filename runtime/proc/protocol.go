package proc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
)

// Everything here that talks does so in JSON, one value per message, on
// SOCK_SEQPACKET sockets: whole messages, and the end of the other side shows.
//
// A shim's socket takes one request per connection and answers it once; "watch"
// is answered at once and again at each change.

type request struct {
	Op     string        `json:"op"` // one of the op constants
	Signal int           `json:"signal,omitempty"`
	Grace  time.Duration `json:"grace,omitempty"`
}

const (
	opStatus   = "status"
	opStart    = "start"
	opStop     = "stop"
	opWatch    = "watch"
	opDNS      = "dns"      // the answer comes with the UDP and the TCP socket
	opShutdown = "shutdown" // kills the task and ends the shim
)

type response struct {
	Err string `json:"err,omitempty"`
	// Status has no Data: that is on disk.
	Status runtime.Status `json:"status"`
	Init   procID         `json:"init"`
}

// Bounds of messages. An exec's carries the command and the environment; one
// message can't exceed a socket's send buffer, by default 208 KiB (socket(7)).
const (
	maxMessage     = 16 << 10
	maxExecMessage = 128 << 10
)

func dialShim(path string) (c *net.UnixConn, err error) {
	err = withShortPath(path, func(short string) error {
		c, err = net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: short, Net: "unixpacket"})
		return err
	})
	return c, err
}

// socketPair makes two connected sockets: one for this process, one for a
// child.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	child := os.NewFile(uintptr(fds[1]), "child")
	c, err := unixConn(os.NewFile(uintptr(fds[0]), "parent"))
	if err != nil {
		child.Close()
		return nil, nil, err
	}
	return c, child, nil
}

// unixConn makes a connection of an inherited or fresh socket, and closes f.
func unixConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("not a unix socket")
	}
	return u, nil
}

func send(c *net.UnixConn, v any, fds ...int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	return sendControl(c, v, oob)
}

func sendControl(c *net.UnixConn, v any, oob []byte) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxExecMessage {
		return fmt.Errorf("command and environment are too long: %d bytes, %d are allowed", len(b), maxExecMessage)
	}
	_, _, err = c.WriteMsgUnix(b, oob, nil)
	return err
}

// receive reads one message and the files that came with it. io.EOF says that
// the other end has gone.
func receive(c *net.UnixConn, v any) ([]*os.File, error) {
	files, _, err := receiveFrom(c, v, maxMessage)
	return files, err
}

// receiveFrom is receive that also returns a pid sent as credentials, in the
// numbering of this process (unix(7), SCM_CREDENTIALS).
func receiveFrom(c *net.UnixConn, v any, limit int) (files []*os.File, pid int, err error) {
	buf := make([]byte, limit)
	oob := make([]byte, unix.CmsgSpace(4*4)+unix.CmsgSpace(unix.SizeofUcred))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			files = nil
		}
	}()
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, 0, err
	}
	for _, m := range msgs {
		if cred, err := unix.ParseUnixCredentials(&m); err == nil {
			pid = int(cred.Pid)
		}
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	if n == 0 {
		return files, pid, io.EOF
	}
	if flags&unix.MSG_TRUNC != 0 {
		return files, pid, errors.New("message is too long")
	}
	if err := json.Unmarshal(buf[:n], v); err != nil {
		return files, pid, fmt.Errorf("message of %d bytes: %w", n, err)
	}
	return files, pid, nil
}

// call asks a shim one thing and waits for the answer, as long as ctx lasts.
func call(ctx context.Context, path string, req request) (resp response, files []*os.File, err error) {
	c, err := dialShim(path)
	if err != nil {
		return resp, nil, fmt.Errorf("shim: %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if err = send(c, req); err == nil {
		files, err = receive(c, &resp)
	}
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case errors.Is(err, io.EOF):
		err = errShimGone
	case err != nil:
		err = fmt.Errorf("shim: %w", err)
	case resp.Err != "":
		err = errors.New(resp.Err)
	default:
		return resp, files, nil
	}
	for _, f := range files {
		f.Close()
	}
	return resp, nil, err
}

var errShimGone = errors.New("the task's shim is gone")
