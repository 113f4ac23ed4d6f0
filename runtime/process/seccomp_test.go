package process

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSeccompFilter runs the filter as the kernel would, for ABIs too that this
// machine has no programs of.
func TestSeccompFilter(t *testing.T) {
	const x64, x86, arm, arm32 = unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386, unix.AUDIT_ARCH_AARCH64, unix.AUDIT_ARCH_ARM
	const allow, eperm, enosys = unix.SECCOMP_RET_ALLOW, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM), unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	for _, x := range []struct {
		machine  string
		arch, nr uint32
		args     [3]uint64
		want     uint32
	}{
		{"amd64", x64, 54, [3]uint64{3, unix.SOL_PACKET, packetVnetHdr}, eperm},
		{"amd64", x64, 54, [3]uint64{3, 1<<32 | unix.SOL_PACKET, 1<<32 | packetVnetHdr}, eperm}, // the kernel takes 32 bits
		{"amd64", x64, 54, [3]uint64{3, unix.SOL_PACKET, packetVnetHdrSz}, eperm},
		{"amd64", x64, 54, [3]uint64{3, unix.SOL_PACKET, unix.PACKET_AUXDATA}, allow},
		{"amd64", x64, 54, [3]uint64{3, unix.SOL_SOCKET, packetVnetHdr}, allow},
		{"amd64", x64, 54, [3]uint64{3, solXDP, 4}, eperm},
		{"amd64", x64, 41, [3]uint64{unix.AF_VSOCK, unix.SOCK_STREAM}, eperm},
		{"amd64", x64, 41, [3]uint64{1<<32 | unix.AF_VSOCK, unix.SOCK_STREAM}, eperm},
		{"amd64", x64, 41, [3]uint64{unix.AF_PACKET, unix.SOCK_RAW}, allow},
		{"amd64", x86, 359, [3]uint64{unix.AF_VSOCK, unix.SOCK_STREAM}, eperm},
		{"amd64", x86, 359, [3]uint64{unix.AF_INET, unix.SOCK_STREAM}, allow},
		{"arm64", arm, 198, [3]uint64{unix.AF_VSOCK, unix.SOCK_STREAM}, eperm},
		{"arm64", arm32, 281, [3]uint64{unix.AF_VSOCK, unix.SOCK_STREAM}, eperm},
		{"amd64", x64, 1, [3]uint64{3, unix.SOL_PACKET, packetVnetHdr}, allow},
		{"amd64", x64, sysIOURingSetup, [3]uint64{}, enosys},
		{"amd64", x64, sysX32 | 541, [3]uint64{3, unix.SOL_PACKET, packetVnetHdr}, enosys},
		{"amd64", x86, 366, [3]uint64{3, unix.SOL_PACKET, packetVnetHdr}, eperm},
		{"amd64", x86, 366, [3]uint64{3, unix.SOL_SOCKET, 1}, allow},
		{"amd64", x86, 102, [3]uint64{callSetsockopt}, eperm},
		{"amd64", x86, 102, [3]uint64{1}, allow},
		{"amd64", x86, 54, [3]uint64{3, unix.SOL_PACKET, packetVnetHdr}, allow}, // ioctl(2)
		{"amd64", x86, sysIOURingSetup, [3]uint64{}, enosys},
		{"amd64", arm, 63, [3]uint64{}, enosys},
		{"arm64", arm, 208, [3]uint64{3, unix.SOL_PACKET, packetVnetHdr}, eperm},
		{"arm64", arm, 63, [3]uint64{}, allow},
		{"arm64", arm32, 294, [3]uint64{3, unix.SOL_PACKET, packetVnetHdr}, eperm},
	} {
		b := binary.NativeEndian.AppendUint32(nil, x.nr)
		b = binary.NativeEndian.AppendUint64(binary.NativeEndian.AppendUint32(b, x.arch), 0)
		for _, a := range x.args {
			b = binary.NativeEndian.AppendUint64(b, a)
		}
		if got := runFilter(t, seccompFilter(abis[x.machine]), b); got != x.want {
			t.Errorf("%s: arch %#x call %#x%v: %#x, want %#x", x.machine, x.arch, x.nr, x.args, got, x.want)
		}
	}
}

func runFilter(t *testing.T, f []unix.SockFilter, data []byte) uint32 {
	var a uint32
	for i := 0; i < len(f); i++ {
		switch x := f[i]; x.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = binary.NativeEndian.Uint32(data[x.K:])
		case unix.BPF_RET | unix.BPF_K:
			return x.K
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			yes := a == x.K
			if x.Code&unix.BPF_JSET == unix.BPF_JSET {
				yes = a&x.K != 0
			}
			if yes {
				i += int(x.Jt)
			} else {
				i += int(x.Jf)
			}
		default:
			t.Fatalf("instruction %d: %#x", i, x.Code)
		}
	}
	t.Fatal("no verdict")
	return 0
}
