"""Key-value service over HTTP, whose new version replaces the old one without losing a request or an entry.

    python examples/kv_server.py serve /tmp/kv &       # serves on port 8080
    curl -T file http://127.0.0.1:8080/name; curl http://127.0.0.1:8080/name
    python examples/kv_server.py replace /tmp/kv       # the new version takes over the port and all entries

The entries are arrays in an arena, which is migrated while the old version serves. During the switch-over, requests
wait in the queue of the listening socket, which the old version hands to the new one through a Unix socket at the path.
If the arena grows during a migration, the migration fails: the old version keeps serving, and the new one requests
another migration.

Requires numpy.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np

import pageferry

ATTEMPTS = 5
"""Maximum number of migrations that the new version requests."""
PORT = int(os.environ.get("PORT", "8080"))


class Service(HTTPServer):
    """Service that handles one request at a time, and holds `turn` during the request. The pause of a migration
    acquires `turn`."""

    timeout = 0
    table: pageferry.Arrays

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.getsockname(), Entry, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.turn = threading.Lock()
        self.moved = threading.Event()

    def serve(self) -> None:
        """Serve until the new version has taken over."""
        while not self.moved.is_set():
            select.select([self.socket], [], [], 0.1)
            with self.turn:
                if not self.moved.is_set():
                    self.handle_request()


class Entry(BaseHTTPRequestHandler):
    """Request for the entry of a path: GET returns the entry, PUT stores it."""

    server: Service

    def do_GET(self) -> None:
        """Return the entry."""
        array = self.server.table.get(self.path)
        self.reply(404, b"") if array is None else self.reply(200, array.tobytes())

    def do_PUT(self) -> None:
        """Store the entry."""
        contents = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.table[self.path] = np.frombuffer(contents, np.uint8)
        self.reply(201, b"")

    def reply(self, status: int, contents: bytes) -> None:
        """Send a reply."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(contents)))
        self.end_headers()
        self.wfile.write(contents)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def serve(path: str) -> None:
    """Serve an empty table."""
    service = Service(socket.create_server(("127.0.0.1", PORT), backlog=128))
    service.table = pageferry.Arrays(
        "64MiB", capacity="4GiB", on_pause=service.turn, on_moved=service.moved.set, direct_io=False
    )
    run(service, path)


def replace(path: str) -> None:
    """Take over from the version that serves. Repeat a migration that failed, for example because the arena grew."""
    for attempt in range(ATTEMPTS):
        try:
            service = take_over(path)
            break
        except pageferry.errors.PageferryError as error:
            if attempt == ATTEMPTS - 1:
                raise
            print(f"{os.getpid()} repeats the migration: {error}", file=sys.stderr, flush=True)
    run(service, path)


def take_over(path: str) -> Service:
    """Receive the listening socket and the entries."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        _, (descriptor,), _, _ = socket.recv_fds(connection, 16, 1)
        service = Service(socket.socket(fileno=descriptor))
        arena = pageferry.receive(
            "127.0.0.1:0",
            listening=lambda address: connection.send(address.encode()),
            on_pause=service.turn,
            on_moved=service.moved.set,
            direct_io=False,
            capacity="4GiB",
        )
    service.table = pageferry.Arrays.over(arena)
    return service


def run(service: Service, path: str) -> None:
    """Serve, and hand over to the next version."""
    threading.Thread(target=hand_over, args=(service, path), daemon=True).start()
    print(f"{os.getpid()} serves {len(service.table)} entries", flush=True)
    service.serve()


def hand_over(service: Service, path: str) -> None:
    """Wait for the next version. Send it the listening socket, then the entries. After a failure, wait again."""
    created = f"{path}.{os.getpid()}"
    with socket.create_server(created, family=socket.AF_UNIX) as waiting:
        os.rename(created, path)  # replaces the socket of the old version
        while not service.moved.is_set():
            connection, _ = waiting.accept()
            try:
                with connection:
                    socket.send_fds(connection, [b"listener"], [service.socket.fileno()])
                    pageferry.migrate(service.table, connection.recv(64).decode())
            except (OSError, pageferry.errors.PageferryError) as error:
                print(f"{os.getpid()} keeps serving: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    {"serve": serve, "replace": replace}[sys.argv[1]](sys.argv[2])
