// Package nl holds what every importer of netlink needs: running code in
// another network namespace, sysctls there, the names under [spec.NetnsDir],
// and the errors that mean "absent" and "already so".
//
// Only this package, overlay/vxlan, vip/ipvs and vip/nft touch the kernel's
// network configuration.
package nl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	vnl "github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/spec"
)

// Path is the file of a named network namespace; "" is this process's own.
func Path(name string) string {
	if name == "" {
		// Not /proc/self: that is the main thread's.
		return "/proc/thread-self/ns/net"
	}
	return filepath.Join(spec.NetnsDir, name)
}

// Open opens a named network namespace. The error of an absent one satisfies
// errors.Is(err, fs.ErrNotExist). A name whose mount is gone (a plain file, as
// a crash between creation and mount leaves) counts as absent.
func Open(name string) (netns.NsHandle, error) {
	h, err := netns.GetFromPath(Path(name))
	if err != nil {
		return -1, fmt.Errorf("network namespace %s: %w", name, err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(h), &st); err == nil && st.Type != unix.NSFS_MAGIC && st.Type != unix.PROC_SUPER_MAGIC {
		h.Close()
		return -1, fmt.Errorf("network namespace %s: not mounted: %w", name, os.ErrNotExist)
	}
	return h, nil
}

// Do runs fn on a thread of its own inside the named namespace ("" is this
// process's own) and returns fn's error. fn must not start goroutines that are
// to be in the namespace.
func Do(name string, fn func() error) error {
	if name == "" {
		return fn()
	}
	target, err := Open(name)
	if err != nil {
		return err
	}
	defer target.Close()
	return onThread(func() (bool, error) {
		origin, err := netns.Get()
		if err != nil {
			return true, fmt.Errorf("own network namespace: %w", err)
		}
		defer origin.Close()
		if err := netns.Set(target); err != nil {
			return true, fmt.Errorf("enter network namespace %s: %w", name, err)
		}
		err = fn()
		// A thread that can't go back dies with its goroutine.
		return netns.Set(origin) == nil, err
	})
}

// DoNew runs fn on a thread of its own, never the main thread, in a new network
// namespace that ends with the call: what fn makes there needs no cleaning up.
// Its loopback device is down. fn must not start goroutines that are to be in
// the namespace.
func DoNew(fn func() error) error {
	return onThread(func() (bool, error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return true, fmt.Errorf("make a network namespace: unshare: %w", err)
		}
		return false, fn()
	})
}

// onThread runs fn on a thread of its own, which is used for other goroutines
// afterwards only if fn says that it is as it was. It is never the main thread:
// that one can't die, and its namespace is what /proc/self and /proc/net show.
func onThread(fn func() (reuse bool, err error)) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// While this goroutine keeps the main thread, another is on
			// another thread.
			err := onThread(fn)
			runtime.UnlockOSThread()
			done <- err
			return
		}
		reuse, err := fn()
		if reuse {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// Create makes a named namespace as "ip netns add" does (ip-netns(8)): a new
// namespace, kept by a bind mount on a file in /run/netns. Its loopback device
// is up. One that exists already is left as it is.
func Create(name string) error {
	if h, err := Open(name); err == nil {
		return h.Close()
	}
	if err := ensureNetnsDir(); err != nil {
		return err
	}
	path := Path(name)
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o444)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	f.Close()
	err = onThread(func() (bool, error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return false, fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, ""); err != nil {
			return false, fmt.Errorf("bind mount: %w", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		return false, err
	})
	if err != nil {
		Remove(name)
		return fmt.Errorf("create network namespace %s: %w", name, err)
	}
	return nil
}

// ensureNetnsDir makes /run/netns a shared mount, so that namespaces made here
// are seen, and can be removed, in other mount namespaces.
func ensureNetnsDir() error {
	if err := os.MkdirAll(spec.NetnsDir, 0o755); err != nil {
		return err
	}
	err := unix.Mount("", spec.NetnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
		if err := unix.Mount(spec.NetnsDir, spec.NetnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind mount %s: %w", spec.NetnsDir, err)
		}
		err = unix.Mount("", spec.NetnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	}
	if err != nil {
		return fmt.Errorf("make %s shared: %w", spec.NetnsDir, err)
	}
	return nil
}

// Remove unmounts and deletes a named namespace. The kernel destroys it, with
// its devices, once no process, socket or open file holds it. An absent one
// is no error.
func Remove(name string) error {
	path := Path(name)
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if err == nil {
			continue // mounted more than once
		}
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		return fmt.Errorf("remove network namespace %s: unmount: %w", name, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace %s: %w", name, err)
	}
	return nil
}

// List names the namespaces in /run/netns that begin with prefix.
func List(prefix string) ([]string, error) {
	es, err := os.ReadDir(spec.NetnsDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var out []string
	for _, e := range es {
		if strings.HasPrefix(e.Name(), prefix) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

func sysctlPath(key string) string {
	return "/proc/sys/" + strings.ReplaceAll(key, ".", "/")
}

// Sysctl reads a sysctl of the calling thread's namespace; use it within Do.
// Dots separate the parts of key, so a device name must hold none.
func Sysctl(key string) (string, error) {
	b, err := os.ReadFile(sysctlPath(key))
	if err != nil {
		return "", fmt.Errorf("read sysctl %s: %w", key, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// OpenSysctl opens a sysctl of the calling thread's namespace for reading; use it
// within Do. What is read from the file is that namespace's, wherever it is read.
// The file keeps neither the namespace nor a device alive.
func OpenSysctl(key string) (*os.File, error) {
	fd, err := unix.Open(sysctlPath(key), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open sysctl %s: %w", key, err)
	}
	return os.NewFile(uintptr(fd), key), nil
}

// SetSysctl sets a sysctl of the calling thread's namespace; use it within Do.
// It writes only when the value differs.
func SetSysctl(key, value string) error {
	if have, err := Sysctl(key); err == nil && have == value {
		return nil
	}
	if err := os.WriteFile(sysctlPath(key), []byte(value), 0o644); err != nil {
		return fmt.Errorf("set sysctl %s=%s: %w", key, value, err)
	}
	return nil
}

// Absent tells whether err says that the object of a deletion was not there.
func Absent(err error) bool {
	var lnf netlink.LinkNotFoundError
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENODEV) ||
		errors.Is(err, unix.EADDRNOTAVAIL) || errors.As(err, &lnf)
}

// Exists tells whether err says that the object of an addition was there.
func Exists(err error) bool { return errors.Is(err, unix.EEXIST) }

// Dump runs a netlink dump again when the kernel interrupted it because the
// table changed meanwhile (NLM_F_DUMP_INTR) or a signal did.
func Dump[T any](fn func() (T, error)) (T, error) {
	for try := 0; ; try++ {
		v, err := fn()
		if err == nil || try == 10 || !(errors.Is(err, netlink.ErrDumpInterrupted) || errors.Is(err, unix.EINTR)) {
			return v, err
		}
	}
}

// Addr is an address of a device.
type Addr struct {
	netip.Prefix
	Label string // of IPv4
}

// LoAddrs lists the addresses of lo, of one family or of both ([unix.AF_UNSPEC]), in the
// namespace of the calling thread. There may be thousands, and they are asked for at each
// change: the messages (ifaddrmsg, rtnetlink(7)) are read for no more than this.
func LoAddrs(family int) ([]Addr, error) {
	const lo = 1 // in every namespace (LOOPBACK_IFINDEX in linux/net/flow.h)
	return Dump(func() (out []Addr, err error) {
		req := vnl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
		req.AddData(vnl.NewIfInfomsg(family))
		err = req.ExecuteIter(unix.NETLINK_ROUTE, unix.RTM_NEWADDR, func(m []byte) bool {
			if len(m) < unix.SizeofIfAddrmsg || binary.NativeEndian.Uint32(m[4:]) != lo {
				return true
			}
			attrs := m[unix.SizeofIfAddrmsg:]
			b := attrBytes(attrs, unix.IFA_LOCAL)
			if b == nil {
				b = attrBytes(attrs, unix.IFA_ADDRESS)
			}
			if a, ok := netip.AddrFromSlice(b); ok {
				out = append(out, Addr{netip.PrefixFrom(a, int(m[1])), attr(attrs, unix.IFA_LABEL)})
			}
			return true
		})
		return out, err
	})
}

// HostRoutes lists the prefixes that this process's namespace reaches by a
// route, but for the default route, link-local and multicast ones, and those on
// Shoal's own links.
func HostRoutes() ([]netip.Prefix, error) {
	routes, err := Dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	ours := map[int]bool{}
	links, err := Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Alias, "shoal ") {
			ours[l.Attrs().Index] = true
		}
	}
	var out []netip.Prefix
	for _, r := range routes {
		if r.Dst == nil || ours[r.LinkIndex] {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP)
		if !ok {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		p := netip.PrefixFrom(a.Unmap(), ones)
		if ones == 0 || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsLoopback() {
			continue
		}
		out = append(out, p)
	}
	return out, nil
}
