"""Daemon threads for blocking calls: a blocked call delays its caller, but not the exit of the process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

_Jobs = SimpleQueue[Callable[[], None] | None]


class Workers:
    """Threads that run calls in the context of the submitter, at most `limit` at a time; with a limit of 1, in order.

    An idle thread takes the next call. The threads end when this object is garbage-collected.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self._limit = limit
        self._begin()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue a call for the next free thread. Return its future."""
        if self._pid != os.getpid():  # threads do not survive a fork
            self._begin()
        future: Future[T] = Future()
        self._jobs.put(_job(future, call))
        if not self._idle.acquire(blocking=False):
            self._add_thread()
        return future

    def within(self) -> bool:
        """Return whether the calling thread is one of the workers."""
        return threading.current_thread() in self._threads

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._jobs: _Jobs = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end, self._jobs, self._threads).atexit = False

    def _add_thread(self) -> None:
        with self._lock:
            if len(self._threads) >= self._limit:
                return
            thread = threading.Thread(target=_work, args=(self._jobs, self._idle), name=self.name, daemon=True)
            self._threads.append(thread)
            thread.start()


def in_new_thread(name: str, call: Callable[[], T]) -> Future[T]:
    """Start a daemon thread that runs a call in the context of the submitter. Return its future."""
    future: Future[T] = Future()
    threading.Thread(target=_job(future, call), name=name, daemon=True).start()
    return future


def _job(future: Future[T], call: Callable[[], T]) -> Callable[[], None]:
    context = copy_context()

    def run() -> None:
        nonlocal call
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = context.run(call)
        except BaseException as error:
            del call  # the caller may depend on the release of objects that the call refers to
            future.set_exception(error)
        else:
            del call
            future.set_result(result)

    return run


def _work(jobs: _Jobs, idle: threading.Semaphore) -> None:
    while True:
        try:
            job = jobs.get_nowait()
        except Empty:
            idle.release()
            job = jobs.get()
        if job is None:
            return
        job()
        del job  # releases the objects that the call refers to


def _end(jobs: _Jobs, threads: list[Any]) -> None:
    for _ in threads:
        jobs.put(None)
