package nl

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

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

func namespace(t *testing.T, suffix string) string {
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
	for _, tc := range []struct {
		network, addr string
		want          bool
	}{
		{"tcp4", "127.0.0.1:80", false}, {"tcp6", "[::1]:80", false}, {"udp4", "127.0.0.11:53", false},
		{"tcp4", "0.0.0.0:80", true}, {"tcp6", "[::]:80", true}, {"udp4", "0.0.0.0:53", true}, {"udp6", "[::]:53", true},
	} {
		err := Do(name, func() error {
			var c io.Closer
			var err error
			if strings.HasPrefix(tc.network, "udp") {
				c, err = net.ListenPacket(tc.network, tc.addr)
			} else {
				c, err = net.Listen(tc.network, tc.addr)
			}
			if err != nil {
				return err
			}
			defer c.Close()
			if got, err := Listening(); err != nil || got != tc.want {
				return fmt.Errorf("%s %s: %t, %w", tc.network, tc.addr, got, err)
			}
			return nil
		})
		if errors.Is(err, errors.ErrUnsupported) {
			t.Skip(err) // the runtime falls back to /proc
		}
		if err != nil {
			t.Error(err)
		}
	}
	if got, err := Listening(); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("in the host's namespace: %t, %v", got, err)
	}
}
