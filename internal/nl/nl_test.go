package nl

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("SHOAL_TEST_STRICT") == "1" {
		t.Fatal("needs root, for network namespaces")
	}
	t.Skip("needs root, for network namespaces")
}

func namespace(t testing.TB, suffix string) string {
	name := fmt.Sprintf("shoalnl-%d-%s", os.Getpid(), suffix)
	if err := Create(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Remove(name); err != nil {
			t.Error(err)
		}
	})
	return name
}

func TestCreateDoRemove(t *testing.T) {
	needRoot(t)
	name := namespace(t, "a")
	if err := Create(name); err != nil {
		t.Errorf("second create: %v", err)
	}
	err := Do(name, func() error {
		ls, err := netlink.LinkList()
		if err == nil && (len(ls) != 1 || ls[0].Attrs().Flags&1 == 0) {
			err = fmt.Errorf("links %v: want loopback alone, and up", ls)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if got, err := List(name); err != nil || len(got) != 1 {
		t.Errorf("%v, %v", got, err)
	}
	if err := Remove(name); err != nil {
		t.Error(err)
	}
	if _, err := Open(name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open after remove: %v", err)
	}
	if err := Remove(name); err != nil {
		t.Errorf("second remove: %v", err)
	}
	want := errors.New("mine")
	if err := Do("shoalnl-absent", func() error { return nil }); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("do in an absent one: %v", err)
	}
	if err := DoNew(func() error { return want }); err != want {
		t.Errorf("error of fn in a new namespace: %v", err)
	}
	if err := Do("", func() error { return want }); err != want {
		t.Errorf("error of fn: %v", err)
	}
}

func TestAPlainFileIsNoNamespace(t *testing.T) {
	needRoot(t)
	name := fmt.Sprintf("shoalnl-%d-file", os.Getpid())
	if err := os.WriteFile(Path(name), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Remove(name) })
	if _, err := Open(name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open: %v", err)
	}
	if err := Create(name); err != nil {
		t.Errorf("create over the rest of a crash: %v", err)
	}
	if err := Do(name, func() error { return nil }); err != nil {
		t.Error(err)
	}
}

// The main thread must stay in its namespace whatever the scheduler does: it is
// what /proc/self and /proc/net show, and it can't be thrown away.
func TestTheMainThreadStaysWhereItIs(t *testing.T) {
	needRoot(t)
	main := func() string {
		l, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", unix.Getpid()))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	before := main()
	inside := namespace(t, "m")
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			name := fmt.Sprintf("shoalnl-%d-m%d", os.Getpid(), i)
			if err := Create(name); err != nil {
				t.Error(err)
			}
			for range 20 {
				err := Do(inside, func() error {
					if unix.Gettid() == unix.Getpid() {
						return errors.New("on the main thread")
					}
					runtime.Gosched()
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
			err := DoNew(func() error {
				if unix.Gettid() == unix.Getpid() {
					return errors.New("on the main thread")
				}
				if l, err := os.Readlink(Path("")); err != nil || l == before {
					return fmt.Errorf("in %s, want a new namespace: %v", l, err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			if err := Remove(name); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if after := main(); after != before {
		t.Errorf("the main thread went from %s to %s", before, after)
	}
	for i := range 64 { // nor is any reused thread left elsewhere
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if l, err := os.Readlink(Path("")); err != nil || l != before {
				t.Errorf("thread %d is in %s, %v", i, l, err)
			}
		})
	}
	wg.Wait()
}

func TestSysctlNamesTheKey(t *testing.T) {
	if _, err := Sysctl("net.ipv4.no_such"); err == nil || !strings.Contains(err.Error(), "net.ipv4.no_such") {
		t.Errorf("got %v", err)
	}
}

func TestListening(t *testing.T) {
	needRoot(t)
	name := namespace(t, "l")
	serves, maybe, nothing := Sockets{Serves: 1}, Sockets{Maybe: []uint16{40000}}, Sockets{}
	kept, err := OpenDiag(name)
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	for _, tc := range []struct {
		network, addr string
		want          Sockets
	}{
		{"tcp4", "127.0.0.1:80", nothing}, {"tcp6", "[::1]:80", nothing}, {"udp4", "127.0.0.11:53", nothing}, {"udp4", "127.0.0.1:40000", nothing},
		{"tcp4", "0.0.0.0:80", serves}, {"tcp6", "[::]:80", serves}, {"udp4", "0.0.0.0:53", serves}, {"udp6", "[::]:53", serves},
		{"tcp4", "0.0.0.0:40000", serves}, {"udp4", "0.0.0.0:40000", maybe}, {"udp", "[::]:40000", maybe}, {"udp6", "[::]:61000", serves},
		{"connected", "127.0.0.1:9", nothing},
	} {
		for how, list := range map[string]func(bool) (Sockets, error){"as it is": Listening, "by /proc": listeningByProc, "by sock_diag": listeningByDiag} {
			err := Do(name, func() error {
				var c io.Closer
				var err error
				switch {
				case tc.network == "connected":
					c, err = net.Dial("udp4", tc.addr)
				case strings.HasPrefix(tc.network, "udp"):
					c, err = net.ListenPacket(tc.network, tc.addr)
				default:
					c, err = net.Listen(tc.network, tc.addr)
				}
				if err != nil {
					return err
				}
				defer c.Close()
				if got, err := list(true); err != nil || !reflect.DeepEqual(got, tc.want) {
					return fmt.Errorf("%s: %s %s: all: %+v, %w", how, tc.network, tc.addr, got, err)
				}
				if got, err := list(false); err != nil || !reflect.DeepEqual(got, tc.want) {
					return fmt.Errorf("%s: %s %s: %+v, %w", how, tc.network, tc.addr, got, err)
				}
				for range 2 { // the second time it looks at the one that it found
					if got, err := kept.ServesTCP(); !errors.Is(err, errors.ErrUnsupported) && (err != nil || got != (strings.HasPrefix(tc.network, "tcp") && tc.want.Serves > 0)) {
						return fmt.Errorf("by the socket kept there: %s %s: %t, %w", tc.network, tc.addr, got, err)
					}
				}
				if kept.heard != nil && !kept.heard.listens(kept.socket) {
					return fmt.Errorf("%s %s is there, and not found where it was", tc.network, tc.addr)
				}
				return nil
			})
			if err != nil && !errors.Is(err, errors.ErrUnsupported) {
				t.Error(err)
			}
		}
	}
	// A program opens one after another.
	for how, list := range map[string]func(bool) (Sockets, error){"as it is": Listening, "by /proc": listeningByProc, "by sock_diag": listeningByDiag} {
		err := Do(name, func() error {
			for i, open := range []func() (io.Closer, error){
				func() (io.Closer, error) { return net.ListenPacket("udp4", "0.0.0.0:53") },
				func() (io.Closer, error) { return net.Listen("tcp4", "0.0.0.0:80") },
				func() (io.Closer, error) { return net.Listen("tcp4", "0.0.0.0:443") },
				func() (io.Closer, error) { return net.Listen("tcp6", "[::]:443") },
			} {
				c, err := open()
				if err != nil {
					return err
				}
				defer c.Close()
				if got, err := list(true); err != nil || got.Serves != i+1 {
					return fmt.Errorf("%s: %+v, want %d: %w", how, got, i+1, err)
				}
			}
			return nil
		})
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			t.Error(err)
		}
	}
	if got, err := Listening(false); err != nil {
		t.Errorf("in the host's namespace: %+v, %v", got, err)
	}
}

// TestResetTCP: both ends of the connections at an address hear that it is gone, and
// nobody else does.
func TestResetTCP(t *testing.T) {
	needRoot(t)
	name := namespace(t, "r")
	type end struct {
		addr string
		a, b net.Conn
	}
	var ends []end
	err := Do(name, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, a := range []string{"10.9.0.1/32", "10.9.0.2/32", "fd09::1/128"} {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(lo, addr); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		for _, x := range []struct{ network, listen, addr string }{
			{"tcp4", "0.0.0.0:0", "10.9.0.1"}, {"tcp", "[::]:0", "10.9.0.1"}, {"tcp6", "[::]:0", "fd09::1"}, {"tcp4", "0.0.0.0:0", "10.9.0.2"}, {"tcp4", "127.0.0.1:0", "127.0.0.1"},
		} {
			ln, err := net.Listen(x.network, x.listen)
			if err != nil {
				return err
			}
			defer ln.Close()
			_, port, _ := net.SplitHostPort(ln.Addr().String())
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(x.addr)}}
			if x.addr == "10.9.0.1" {
				d.LocalAddr = &net.TCPAddr{IP: net.ParseIP("127.0.0.1")} // one end only is at the address
			}
			a, err := d.Dial("tcp", net.JoinHostPort(x.addr, port))
			if err != nil {
				return err
			}
			b, err := ln.Accept()
			if err != nil {
				return err
			}
			ends = append(ends, end{x.addr, a, b})
		}
		n, err := ResetTCP([]netip.Addr{netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("fd09::1")})
		if errors.Is(err, errors.ErrUnsupported) {
			t.Skip(err)
		}
		if err != nil || n < 3 {
			t.Errorf("%d reset, %v", n, err)
		}
		n, err = ResetTCP([]netip.Addr{netip.MustParseAddr("10.9.0.1")})
		if err != nil || n != 0 {
			t.Errorf("again: %d reset, %v", n, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range ends {
		defer e.a.Close()
		defer e.b.Close()
		for side, c := range map[string]net.Conn{"client": e.a, "server": e.b} {
			if i < 3 {
				_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
				if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%s at %s reads on: %v", side, e.addr, err)
				}
				continue
			}
			_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s at %s is cut: %v", side, e.addr, err)
			}
		}
	}
}

func TestSCTPListens(t *testing.T) {
	const head = " ENDPT     SOCK   STY SST HBKT LPORT   UID INODE LADDRS\n"
	for rows, want := range map[string]int{
		"": 0,
		"ffff8 ffff9 2   10  27   7000      0 2117 0.0.0.0 \n":                                  1,
		"ffff8 ffff9 0   10  27   7000      0 2117 127.0.0.1 \n":                                0,
		"ffff8 ffff9 0   10  27   7000      0 2117 127.0.0.1 10.0.0.5 \n":                       1,
		"ffff8 ffff9 0   7   27   7000      0 2117 0.0.0.0 \n":                                  0,
		"ffff8 ffff9 0   10  27   7000      0 2117 0000:0000:0000:0000:0000:0000:0000:0000 \n":  1,
		"ffff8 ffff9 0   10  27   7000      0 2117 0000:0000:0000:0000:0000:0000:0000:0001 \n":  0,
		"f f 2 10 27 7000 0 1 0.0.0.0\nf f 2 10 27 7001 0 2 10.0.0.5\n":                         2,
		"nonsense\nffff8 ffff9 0   10  27   7000      0 2117 \nffff8 ffff9 0 10 1 7 0 1 bad \n": 0,
	} {
		if got, err := sctpListens(strings.NewReader(head + rows)); err != nil || got != want {
			t.Errorf("%q: %d, %v", rows, got, err)
		}
	}
}

// TestDiagLetsGo: the socket that is kept in a namespace does not keep it.
func TestDiagLetsGo(t *testing.T) {
	needRoot(t)
	if _, err := OpenDiag("shoal-no-such"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of a namespace that is not there: %v", err)
	}
	d, err := OpenDiag(namespace(t, "d"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.ServesTCP(); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	d.Close()
	if got, err := d.ServesTCP(); err == nil || got {
		t.Errorf("after its end: %t, %v", got, err)
	}
}

// BenchmarkListening is what a look at one server costs, by going to its namespace and by
// a socket that is kept there.
func BenchmarkListening(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	name := namespace(b, "b")
	var ln net.Listener
	if err := Do(name, func() (err error) { ln, err = net.Listen("tcp4", "0.0.0.0:80"); return err }); err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	b.Run("there", func(b *testing.B) {
		for b.Loop() {
			if err := Do(name, func() error { _, err := Listening(false); return err }); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("kept", func(b *testing.B) {
		d, err := OpenDiag(name)
		if err != nil {
			b.Fatal(err)
		}
		defer d.Close()
		for b.Loop() {
			if ok, err := d.ServesTCP(); err != nil || !ok {
				b.Fatal(ok, err)
			}
		}
	})
}
