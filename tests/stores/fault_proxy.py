"""HTTP proxy between a client and one server, which injects faults into chosen requests and records all requests."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Action = Literal["busy", "reset", "lost", "cut", "short", "corrupt", "stall", "denied"]
"""`busy`: reply 503. `denied`: reply 403. `reset`: close the connection with RST instead of forwarding the request.
`lost`: forward the request, and close the connection instead of replying. `cut`: close the connection in the middle of
the body. `short`: reply with half of the body as if that were all. `corrupt`: change one byte of the body. `stall`:
forward the request after `FaultProxy.stall` seconds."""


@dataclass
class Fault:
    """Fault of the next `count` requests with this method whose path matches."""

    method: str
    path: str
    action: Action
    count: int = 1


@dataclass
class FaultProxy:
    """Running proxy."""

    url: str
    server: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and path of each request."""
    delay: float = 0.0
    """Time after which each request is forwarded, seconds."""
    pack_delay: float = 0.0
    """Additional time for each upload of a pack, seconds."""
    stall: float = 20.0
    gone: bool = False
    """Whether every connection is closed with RST, as by a host without a server."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of the bodies of replies, by path."""
    ignores_conditions: bool = False
    """Whether `If-None-Match` is removed from requests, as if the server did not know it."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, method: str, path: str, action: Action, count: int = 1) -> None:
        """Add a fault. `path`: regular expression that is searched in the path."""
        self.faults.append(Fault(method, path, action, count))

    def take(self, method: str, path: str) -> Action | None:
        """Record a request, and return its fault."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.count and fault.method == method and re.search(fault.path, path):
                    fault.count -= 1
                    return fault.action
        return None


@contextmanager
def fault_proxy(server: str) -> Iterator[FaultProxy]:
    """Run a proxy in front of the server with this URL."""
    proxy = FaultProxy("", server)

    class Handler(_Handler):
        owner = proxy

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        action = self.owner.take(self.command, self.path)
        time.sleep(self.owner.delay)
        if self.command == "PUT" and "/packs/" in self.path:
            time.sleep(self.owner.pack_delay)
        if self.owner.gone:
            action = "reset"
        if action == "busy":
            self.send_error(503)
            return
        if action == "denied":
            self.send_error(403)
            return
        if action == "reset":
            self._reset()
            return
        if action == "stall":
            time.sleep(self.owner.stall)
        status, headers, data = self._forward(body)
        if action == "lost":
            self._reset()
            return
        if action == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif action == "short":
            data = data[: len(data) // 2]
        with self.owner.lock:
            self.owner.sent[self.path] = self.owner.sent.get(self.path, 0) + len(data)
        self._reply(status, headers, data, len(data) // 2 if action == "cut" else None)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.owner.server).netloc, timeout=30)
        try:
            # The server checks only that there are credentials.
            headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"}
            given = dict(self.headers)
            if self.owner.ignores_conditions:
                given = {name: value for name, value in given.items() if name.lower() != "if-none-match"}
            connection.request(self.command, self.path, body, headers | given)
            reply = connection.getresponse()
            return reply.status, reply.getheaders(), reply.read()
        finally:
            connection.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], data: bytes, sent: int | None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        with suppress(OSError):  # the client has cancelled the request
            self.wfile.write(data[:sent])
        if sent is not None:
            self.wfile.flush()
            self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def handle(self) -> None:
        """Ignore that a client has been killed."""
        with suppress(ConnectionError):
            super().handle()

    def finish(self) -> None:
        """Ignore that the connection is closed."""
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""
