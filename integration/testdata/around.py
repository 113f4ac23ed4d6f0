"""Tries the ways around every rule of a network, and says how each fails: to leave a packet's checksum to the
network card, and to use sockets that know no networks."""
import ctypes, errno, socket

SOL_PACKET, PACKET_VNET_HDR, PACKET_VNET_HDR_SZ = 263, 15, 24
AF_XDP, SOL_XDP, XDP_RX_RING, IO_URING_SETUP = 44, 283, 2, 425


def option(s, level, opt):
    try:
        s.setsockopt(level, opt, 1)
        return "yes"
    except OSError as e:
        return errno.errorcode[e.errno]


s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
print("raw sockets: yes")
print("virtio headers:", option(s, SOL_PACKET, PACKET_VNET_HDR))
print("virtio header size:", option(s, SOL_PACKET, PACKET_VNET_HDR_SZ))
try:
    print("XDP:", option(socket.socket(AF_XDP, socket.SOCK_RAW), SOL_XDP, XDP_RX_RING))
except OSError:  # this kernel has none
    print("XDP: EPERM")
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(IO_URING_SETUP, 1, ctypes.create_string_buffer(256)) < 0:
    print("io_uring:", errno.errorcode[ctypes.get_errno()])
else:
    print("io_uring: yes")
try:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    print("vsock: yes")
except OSError as e:
    print("vsock:", errno.errorcode[e.errno])
