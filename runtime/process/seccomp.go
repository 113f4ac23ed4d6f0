package process

import (
	"encoding/binary"
	"fmt"
	goruntime "runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// abi is a way in which a program may call the kernel, by its number of
// linux/audit.h, with the numbers of the calls that are filtered.
type abi struct {
	arch       uint32
	setsockopt uint32
	socket     uint32
	socketcall uint32 // 0: it has none
}

// abis of a machine; a call by another is refused. On an architecture that is
// not here nothing is filtered.
var abis = map[string][]abi{
	"amd64": {{unix.AUDIT_ARCH_X86_64, 54, 41, 0}, {unix.AUDIT_ARCH_I386, 366, 359, 102}},
	"arm64": {{unix.AUDIT_ARCH_AARCH64, 208, 198, 0}, {unix.AUDIT_ARCH_ARM, 294, 281, 102}},
}

const (
	solXDP          = 283 // linux/socket.h
	packetVnetHdr   = 15  // linux/if_packet.h
	packetVnetHdrSz = 24
	sysIOURingSetup = 425        // on every architecture
	sysX32          = 0x40000000 // asm/unistd.h: __X32_SYSCALL_BIT
	callSetsockopt  = 14         // linux/net.h: SYS_SETSOCKOPT
)

// filterCalls keeps this thread's children from what no network namespace and no
// rule of a network would keep them from.
//
// They can't hand the kernel packets whose checksum is to be put in later, at a
// place of their choice: by virtio headers on packet sockets, or by XDP sockets.
// Only the network card, or the kernel just before it, would write it; so it could
// be another port, or a source address of IPv6, than the one that every rule on
// the way has seen.
//
// io_uring, which may set socket options itself (Linux 6.7), is not to be had,
// nor the socketcall(2) of old 32-bit programs to set them, whose arguments a
// filter can't see.
//
// They get no AF_VSOCK socket either (vsock(7)), as in Docker: those reach the
// hypervisor, the node and every other task, in whatever network. What remains is
// such a 32-bit program's socketcall(2) to make one: without that it would have
// no sockets at all.
func filterCalls() error {
	f := seccompFilter(abis[goruntime.GOARCH])
	if len(f) == 0 {
		return nil
	}
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	// With CAP_SYS_ADMIN, which this thread still has, it takes no
	// no_new_privs, under which sudo and ping would fail in the task.
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return fmt.Errorf("filter system calls (the kernel needs CONFIG_SECCOMP_FILTER): %w", err)
	}
	return nil
}

// seccompFilter is the program; each ABI's part ends in allowing.
func seccompFilter(all []abi) []unix.SockFilter {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		bits  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
	)
	low := uint32(0) // of an argument's 64 bits
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		low = 4
	}
	arg := func(i uint32) uint32 { return 16 + 8*i + low } // struct seccomp_data
	st := func(code int, k uint32) unix.SockFilter { return unix.SockFilter{Code: uint16(code), K: k} }
	ret := func(v uint32) unix.SockFilter { return st(unix.BPF_RET|unix.BPF_K, v) }
	// unless skips the next statement unless the value is k.
	unless := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: equal, Jf: 1, K: k} }
	deny, absent, allow := ret(unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM)), ret(unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS)), ret(unix.SECCOMP_RET_ALLOW)
	var out []unix.SockFilter
	for _, a := range all {
		part := []unix.SockFilter{
			st(load, 0), // the call's number
			unless(sysIOURingSetup), absent,
		}
		if a.arch == unix.AUDIT_ARCH_X86_64 {
			part = append(part, unix.SockFilter{Code: bits, Jf: 1, K: sysX32}, absent)
		}
		if a.socketcall != 0 {
			part = append(part, unix.SockFilter{Code: equal, Jf: 4, K: a.socketcall},
				st(load, arg(0)), unless(callSetsockopt), deny, allow)
		}
		part = append(part,
			unix.SockFilter{Code: equal, Jf: 4, K: a.socket},
			st(load, arg(0)), unless(unix.AF_VSOCK), deny, allow,
			unix.SockFilter{Code: equal, Jt: 1, K: a.setsockopt}, allow,
			st(load, arg(1)), // level
			unless(solXDP), deny,
			unix.SockFilter{Code: equal, Jt: 1, K: unix.SOL_PACKET}, allow,
			st(load, arg(2)), // option
			unless(packetVnetHdr), deny,
			unless(packetVnetHdrSz), deny,
			allow)
		out = append(out, st(load, 4), unix.SockFilter{Code: equal, Jf: uint8(len(part)), K: a.arch})
		out = append(out, part...)
	}
	if len(out) > 0 {
		out = append(out, absent)
	}
	return out
}
