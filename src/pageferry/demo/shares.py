"""Shares of a ledger's partitions. Each share is run by threads of this process or of a child process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from typing import Protocol

from pageferry import _engine
from pageferry._engine import Stalls
from pageferry.demo.orders import MAX_PACKET, Order, Reply, decode_reply, encode
from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.python import start_python

TIMEOUT = 60.0
"""Time within which a child must reply, seconds."""


class Share(Protocol):
    """Some of a ledger's partitions, and the threads that run them. Methods raise WorkloadDied if a process has exited,
    and WorkloadError if an operation fails."""

    pid: int
    tids: list[int]
    """Kernel thread IDs of the threads; empty before `start`."""

    def attach(self, first_thread: int, threads: int) -> None:
        """Attach to the ledger in memory, to run `threads` partitions from partition `first_thread` on."""

    def start(self) -> None:
        """Start the threads paused: they wait for `resume`."""

    def begin_pause(self) -> None:
        """Request that the threads pause. `end_pause` waits until they have paused."""

    def end_pause(self) -> None:
        """Wait until all threads have paused."""

    def resume(self) -> None:
        """Resume the threads."""

    def stop(self) -> None:
        """End the threads, and the process if it is a child. The method raises no error."""

    def stalls(self, reset: bool) -> Stalls:
        """Return the durations of the operations since the last reset. If `reset` is true, clear them."""


class LocalShare:
    """Share that threads of this process run."""

    def __init__(self, mapping: _engine.Mapping) -> None:
        self.pid = os.getpid()
        self.tids: list[int] = []
        self._mapping = mapping
        self._ledger: _engine.Ledger | None = None

    @property
    def ledger(self) -> _engine.Ledger:
        """Ledger whose partitions the threads run. Raises WorkloadError before `attach`."""
        if self._ledger is None:
            raise WorkloadError("cannot use the ledger: `attach` has not been called")
        return self._ledger

    def attach(self, first_thread: int, threads: int) -> None:
        """See `Share`."""
        self._ledger = _engine.Ledger.attach(self._mapping, first_thread=first_thread, threads=threads)

    def start(self) -> None:
        """See `Share`."""
        self.ledger.start(paused=True)
        self.tids = self.ledger.tids

    def begin_pause(self) -> None:
        """Do nothing: `end_pause` pauses the threads of this process."""

    def end_pause(self) -> None:
        """See `Share`."""
        self.ledger.pause()

    def resume(self) -> None:
        """See `Share`."""
        self.ledger.resume()

    def stop(self) -> None:
        """See `Share`."""
        if self._ledger is not None:
            self._ledger.stop()
        self.tids = []

    def stalls(self, reset: bool) -> Stalls:
        """See `Share`."""
        return self.ledger.stalls(reset=reset)


class ChildShare:
    """Share that threads of a child process run. The child maps the same file, and exits when `stop` closes the
    socket."""

    def __init__(self, mapping: _engine.Mapping) -> None:
        self.tids: list[int] = []
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.settimeout(TIMEOUT)
        # Not `arena.fileno()`, after which any process could map the memory: the child maps it now, and pageferry finds
        # the mapping.
        memory = _engine.Mapping.fileno(mapping)
        arguments = [str(memory), str(mapping.length), str(theirs.fileno())]
        with theirs:
            self._process = start_python("pageferry.demo.child", *arguments, pass_fds=(memory, theirs.fileno()))
        self.pid = self._process.pid
        self._do(Order("map"))

    def attach(self, first_thread: int, threads: int) -> None:
        """See `Share`."""
        self._do(Order("attach", first_thread, threads))

    def start(self) -> None:
        """See `Share`."""
        self.tids = self._do(Order("start")).tids

    def begin_pause(self) -> None:
        """See `Share`."""
        self._send(Order("pause"))

    def end_pause(self) -> None:
        """See `Share`."""
        self._receive()

    def resume(self) -> None:
        """See `Share`."""
        self._do(Order("resume"))

    def stop(self) -> None:
        """See `Share`."""
        with contextlib.suppress(WorkloadError):  # the child has already exited
            self._do(Order("stop"))
        self._orders.close()
        try:
            self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.tids = []

    def stalls(self, reset: bool) -> Stalls:
        """See `Share`."""
        reply = self._do(Order("stalls", reset=reset))
        return Stalls(reply.longest_stall, reply.stalls)

    def _do(self, order: Order) -> Reply:
        self._send(order)
        return self._receive()

    def _send(self, order: Order) -> None:
        try:
            self._orders.send(encode(order))
        except OSError as gone:
            raise self._died() from gone

    def _receive(self) -> Reply:
        try:
            data = self._orders.recv(MAX_PACKET)
        except TimeoutError as slow:
            raise WorkloadError(f"cannot control ledger process {self.pid}: no reply within {TIMEOUT:.0f} s") from slow
        except OSError as gone:
            raise self._died() from gone
        if not data:
            raise self._died()
        reply = decode_reply(data)
        if reply.error is not None:
            raise WorkloadError(f"cannot control ledger process {self.pid}: {reply.error}")
        return reply

    def _died(self) -> WorkloadDied:
        return WorkloadDied(f"process {self.pid}, which ran a share of the ledger, has exited")
