"""Sends packets that ought to be dropped, and listens for those that were not.

  spoof.py listen FILE                          UDP port 7777; appends each datagram's text to FILE
  spoof.py source FROM TO TEXT                  a datagram with a source address of choice
  spoof.py shadow PORT HOST PORT TTL FILE       a datagram from the first port to the second; listens on the first, as listen does
  spoof.py vxlan VNI MAC NODE PORT FROM TO TEXT a datagram inside of VXLAN, to a node
"""
import socket, struct, sys


def checksum(b):
    s = sum(struct.unpack("!%dH" % (len(b) // 2), b))
    s = (s >> 16) + (s & 0xFFFF)
    return ~(s + (s >> 16)) & 0xFFFF


def datagram(src, dst, text):
    body = struct.pack("!HHHH", 5555, 7777, 8 + len(text), 0) + text
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, 64, 17, 0, socket.inet_aton(src), socket.inet_aton(dst))
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def listen(s, file):
    open(file, "w").close()
    while True:
        text, who = s.recvfrom(2048)
        with open(file, "a") as f:
            f.write(text.decode() + " from " + who[0] + "\n")


what, args = sys.argv[1], sys.argv[2:]
if what == "listen":
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("0.0.0.0", 7777))
    listen(s, args[0])
elif what == "shadow":
    port, host, to, ttl, file = args
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("0.0.0.0", int(port)))
    s.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, int(ttl))
    s.sendto(b"shadow", (host, int(to)))
    listen(s, file)
elif what == "source":
    src, dst, text = args
    s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    s.sendto(datagram(src, dst, text.encode()), (dst, 0))
elif what == "vxlan":
    vni, mac, node, port, src, dst, text = args
    eth = bytes.fromhex(mac.replace(":", "")) + bytes.fromhex("025368000099") + b"\x08\x00"
    vx = struct.pack("!BBHI", 8, 0, 0, int(vni) << 8)
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.sendto(vx + eth + datagram(src, dst, text.encode()), (node, int(port)))
