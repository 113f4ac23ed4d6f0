"""Keeps connections to a server that sends back lines, and prints what becomes of them.

keep.py HOST PORT COUNT
"""
import socket
import sys
import time

conns = [socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) for _ in range(int(sys.argv[3]))]
print("connected", flush=True)
while conns:
    for i, c in enumerate(conns):
        try:
            c.settimeout(10)
            c.sendall(b"still there?\n")
            if not c.recv(500):
                raise OSError("closed")
        except OSError as e:
            print("%s: a connection is gone: %s" % (time.strftime("%X"), e), flush=True)
            del conns[i]
            break
    time.sleep(0.3)
