"""Sends packets that ought to be dropped, and listens for those that were not.

  spoof.py listen FILE                          UDP port 7777; appends each datagram's text to FILE
  spoof.py source FROM TO TEXT                  a datagram with a source address of choice
  spoof.py fragment FROM TO PART TEXT           part 0 or 1 of a datagram of two fragments; "01" is both
  spoof.py shadow PORT HOST PORT TTL FILE       a datagram from the first port to the second; listens on the first, as listen does
  spoof.py toobig FROM ROUTER TO                tells a router that what it sent to another was too big (RFC 1191)
  spoof.py vxlan VNI MAC NODE PORT FROM TO TEXT a datagram inside of VXLAN, to a node
"""
import socket, struct, sys


def checksum(b):
    s = sum(struct.unpack("!%dH" % (len(b) // 2), b))
    s = (s >> 16) + (s & 0xFFFF)
    return ~(s + (s >> 16)) & 0xFFFF


def packet(src, dst, body, number=1, fragment=0):
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), number, fragment, 64, 17, 0, socket.inet_aton(src), socket.inet_aton(dst))
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def udp(text):
    return struct.pack("!HHHH", 5555, 7777, 8 + len(text), 0) + text


def datagram(src, dst, text):
    return packet(src, dst, udp(text))


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
elif what == "toobig":
    src, router, dst = args
    reply = struct.pack("!BBHHH", 0, 0, 0, 1, 1)  # the kernel takes the word of anybody who has an answer of its own
    sent = packet(router, dst, reply)
    sent = sent[:9] + b"\x01" + sent[10:]  # ICMP
    body = struct.pack("!BBHHH", 3, 4, 0, 0, 600) + sent
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    s.bind((src, 0))
    s.sendto(body, (router, 0))
elif what == "fragment":
    src, dst, parts, text = args
    body, more = udp(text.encode()), 0x2000
    s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)  # IPPROTO_RAW would number them
    gateway = open("/proc/net/arp").read().split("eth0")[0].split()[-2]
    to = ("eth0", 0x0800, 0, 0, bytes.fromhex(gateway.replace(":", "")))
    for part in parts:
        i = int(part)
        s.sendto(packet(src, dst, [body[:16], body[16:]][i], 4711, [more, 2][i]), to)
elif what == "vxlan":
    vni, mac, node, port, src, dst, text = args
    eth = bytes.fromhex(mac.replace(":", "")) + bytes.fromhex("025368000099") + b"\x08\x00"
    vx = struct.pack("!BBHI", 8, 0, 0, int(vni) << 8)
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.sendto(vx + eth + datagram(src, dst, text.encode()), (node, int(port)))
