"""A small HTTP API that counts its requests in PostgreSQL.

GET / answers {"api": host name, "visits": count of all requests, "client": who asked}.
GET /healthz answers 200 once the database does.
"""
import http.server
import json
import os
import socket
import socketserver
import sys
import time

import psycopg2

DSN = dict(host=os.environ.get("DB_HOST", "db"), user=os.environ["POSTGRES_USER"], password=os.environ["POSTGRES_PASSWORD"],
           dbname="postgres", connect_timeout=3)


def query(sql):
    with psycopg2.connect(**DSN) as db, db.cursor() as cur:
        cur.execute(sql)
        return cur.fetchone()[0] if cur.description else None


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        try:
            if self.path == "/healthz":
                body = {"db": query("SELECT 1")}
            else:
                visits = query("INSERT INTO visits DEFAULT VALUES RETURNING id")
                body = {"api": socket.gethostname(), "visits": visits,
                        "client": self.headers.get("X-Real-IP", self.client_address[0])}
            code = 200
        except psycopg2.Error as e:
            code, body = 503, {"error": str(e).strip()}
        data = (json.dumps(body) + "\n").encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, fmt, *args):
        print(self.address_string(), fmt % args, flush=True)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


# A replica listens, and so enters its service's virtual IP, once the database answers.
for attempt in range(60):
    try:
        # Two replicas may come here at once: the lock lets one make the table.
        query("SELECT pg_advisory_lock(1); CREATE TABLE IF NOT EXISTS visits (id serial PRIMARY KEY)")
        break
    except psycopg2.Error as e:
        print("waiting for the database:", str(e).strip(), flush=True)
        time.sleep(0.5)
else:
    sys.exit("the database does not answer")
Server(("", 8000), Handler).serve_forever()
