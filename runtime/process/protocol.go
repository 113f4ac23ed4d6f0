package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
)

// The socket of a shim speaks one JSON value per message on a SOCK_SEQPACKET
// socket: a request, an answer; after "watch", an answer per change.

type request struct {
	Op     string        `json:"op"` // start, stop, signal, dns, attach, watch, record, shutdown; of an executor's program: await, started, ended
	Signal int           `json:"signal,omitempty"`
	Grace  time.Duration `json:"grace,omitempty"`
	PID    int           `json:"pid,omitempty"`
	Code   int           `json:"code,omitempty"`
	Err    string        `json:"err,omitempty"`
}

type response struct {
	Err     string         `json:"err,omitempty"`
	Status  runtime.Status `json:"status"`
	InitPID int            `json:"init_pid,omitempty"`
	ShimPID int            `json:"shim_pid,omitempty"`
}

// maxMessage bounds a message; Data does not travel, it is on disk.
const maxMessage = 64 << 10

func dialShim(path string) (*net.UnixConn, error) {
	return net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
}

func send(c *net.UnixConn, v any, fds ...int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, oob, nil)
	return err
}

// receive reads one message and the files that came with it.
func receive(c *net.UnixConn, v any) ([]*os.File, error) {
	buf := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, net.ErrClosed // the other end has gone
	}
	var files []*os.File
	if oobn > 0 {
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return nil, err
		}
		for _, m := range msgs {
			fds, err := unix.ParseUnixRights(&m)
			if err != nil {
				return nil, err
			}
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				files = append(files, os.NewFile(uintptr(fd), "received"))
			}
		}
	}
	if err := json.Unmarshal(buf[:n], v); err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, fmt.Errorf("message of %d bytes: %w", n, err)
	}
	return files, nil
}

// callOn asks a shim one thing, and closes the connection.
func callOn(c *net.UnixConn, req request, timeout time.Duration) (response, []*os.File, error) {
	defer c.Close()
	if timeout > 0 {
		_ = c.SetDeadline(time.Now().Add(timeout))
	}
	if err := send(c, req); err != nil {
		return response{}, nil, err
	}
	var resp response
	files, err := receive(c, &resp)
	if err != nil {
		return resp, nil, err
	}
	if resp.Err != "" {
		return resp, files, errors.New(resp.Err)
	}
	return resp, files, nil
}
