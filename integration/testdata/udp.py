"""udp.py serve: sends each datagram to port 9999 back. udp.py ask HOST SIZE: sends
one of SIZE bytes until it comes back, for ten seconds, and prints how long it is."""
import socket
import sys

s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
if sys.argv[1] == "serve":
    s.bind(("", 9999))
    while True:
        try:
            b, who = s.recvfrom(65535)
            s.sendto(b, who)
        except OSError:
            pass
s.settimeout(0.5)
for _ in range(20):
    try:
        s.sendto(b"x" * int(sys.argv[3]), (sys.argv[2], 9999))
        print(len(s.recv(65535)))
        break
    except OSError:
        pass
else:
    print("nothing came back")
