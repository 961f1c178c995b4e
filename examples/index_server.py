"""In-memory index, served on a socket and handed from one process to the next without a failed request.

    python examples/index_server.py serve /tmp/index.sock &     # fills the index and serves it
    python examples/index_server.py replace /tmp/index.sock     # a process takes over, such as one of a new release

A request is a line with a number, and the reply is a line with the entry of that number. Each connection carries one
request. The memory is migrated while the old process serves. During the switch-over, requests wait in the queue of the
listening socket, which the old process hands to the new one.

Requires numpy.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading

import numpy

import pageferry

ENTRIES = 4_000_000


class Server:
    """Server that replies to one request at a time from an arena, and to none while the arena is paused."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.listener.setblocking(False)
        self.turn = threading.Lock()
        self.turn.acquire()  # until `begin`
        self.index: numpy.ndarray | None = None
        self.gone = False

    def begin(self, arena: pageferry.Arena) -> None:
        """Start serving the index of an arena."""
        self.index = numpy.frombuffer(arena, dtype=numpy.int64, count=ENTRIES)
        self.turn.release()

    def pause(self) -> None:
        """Wait for the end of the current request, and start no other."""
        self.turn.acquire()

    def resume(self) -> None:
        """Continue to serve. An index that was just received waits for `begin`."""
        if self.index is not None:
            self.turn.release()

    def moved(self) -> None:
        """Stop serving: another process has taken over."""
        self.gone = True
        self.turn.release()

    def serve(self) -> None:
        """Serve until the index has been migrated."""
        while not self.gone:
            ready, _, _ = select.select([self.listener], [], [], 0.1)
            if ready:
                with self.turn:
                    self.answer_one()

    def answer_one(self) -> None:
        """Serve one request, unless another process has taken over or has accepted the request."""
        if self.gone:
            return
        try:
            connection, _ = self.listener.accept()
        except BlockingIOError:
            return
        with connection, connection.makefile("rw") as lines:
            number = int(lines.readline())
            lines.write(f"{self.index[number % ENTRIES]}\n")


def serve(path: str) -> None:
    """Fill an index and serve it until another process takes over."""
    server = Server(socket.create_server(path, family=socket.AF_UNIX, backlog=128))
    arena = pageferry.Arena(ENTRIES * 8, on_pause=server.pause, on_resume=server.resume, on_moved=server.moved)
    numpy.frombuffer(arena, dtype=numpy.int64, count=ENTRIES)[:] = numpy.arange(ENTRIES) ** 2 % 1_000_003
    answer(server, arena, path)


def replace(path: str) -> None:
    """Take over from the process that serves at a path."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path + ".replace")
        _, (descriptor,), _, _ = socket.recv_fds(connection, 16, 1)
        server = Server(socket.socket(fileno=descriptor))
        arena = pageferry.receive(
            "127.0.0.1:0",
            listening=lambda address: connection.send(address.encode()),
            on_pause=server.pause,
            on_resume=server.resume,
            on_moved=server.moved,
        )
    answer(server, arena, path)


def answer(server: Server, arena: pageferry.Arena, path: str) -> None:
    """Serve until the index has been migrated to the next process."""
    server.begin(arena)
    successor = threading.Thread(target=hand_over, args=(server, arena, path))
    successor.start()
    print(f"{os.getpid()} serves {path}", flush=True)
    server.serve()
    successor.join()
    print(f"{os.getpid()} is replaced", flush=True)


def hand_over(server: Server, arena: pageferry.Arena, path: str) -> None:
    """Wait for the next process. Send it the listening socket, then the memory."""
    with socket.create_server(path + ".replace", family=socket.AF_UNIX) as waiting:
        connection, _ = waiting.accept()
        os.unlink(path + ".replace")
    with connection:
        socket.send_fds(connection, [b"listener"], [server.listener.fileno()])
        pageferry.migrate(arena, connection.recv(64).decode())


if __name__ == "__main__":
    {"serve": serve, "replace": replace}[sys.argv[1]](sys.argv[2])
