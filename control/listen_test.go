package control

import (
	"net"
	"testing"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// nobody is an address where nobody listens, nor will: on 127.0.0.1 another
// test, or another program, may be given the port a moment later, and a call
// without a limit may wait for its answer for ever.
func nobody(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.83.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	return ln.Addr().String()
}
