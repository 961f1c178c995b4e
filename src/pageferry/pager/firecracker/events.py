"""Events and results of `pageferry serve`."""

from __future__ import annotations

from typing import Literal

from pageferry.events import Event, Latency

Action = Literal["none", "kill", "freeze"]
"""Effect on the virtual machine monitor: nothing, SIGKILL or SIGSTOP."""
End = Literal["loaded", "exited", "killed", "frozen"]
"""Reason why a microVM is no longer served: all memory is loaded, or its virtual machine monitor has exited, was killed
or stopped."""


class Serving(Event, frozen=True, kw_only=True, tag="serving"):
    """The socket accepts connections of Firecracker, or a restore by Cloud Hypervisor begins. Result of `pageferry
    serve --detach`."""

    image: str
    socket: str
    """Path of the socket: the `backend_path` of `PUT /snapshot/load`, or the `receiver_url` of `PUT
    vm.receive-migration`."""
    pager: int
    """Process id of the pager."""
    memory: int
    """Size of the memory of a microVM, bytes."""
    log: str | None = None
    """Path of the log of a detached pager."""


class MicrovmConnected(Event, frozen=True, kw_only=True, tag="microvm-connected"):
    """A Firecracker process has sent its userfaultfd, and the pager serves its page faults; or Cloud Hypervisor has
    restored a VM, and the pager answers its requests for pages."""

    microvm: int
    """Process id of Firecracker or Cloud Hypervisor."""
    page_size: int
    deferred: int
    """Deferred memory, bytes."""
    mappings: int
    """Number of mappings of the memory."""


class MicrovmRefused(Event, frozen=True, kw_only=True, tag="microvm-refused"):
    """A connection was refused."""

    microvm: int
    """Process id of the process that has connected; 0 if it is not known."""
    reason: str
    action: Action
    """Effect on that process: a process that has sent its userfaultfd would otherwise wait for its memory for ever."""


class MicrovmFailed(Event, frozen=True, kw_only=True, tag="microvm-failed"):
    """Memory of a microVM cannot be loaded."""

    microvm: int
    reason: str
    action: Action
    """`none` if the microVM has not accessed the page yet."""


class MicrovmEnded(Event, frozen=True, kw_only=True, tag="microvm-ended"):
    """A microVM is no longer served."""

    microvm: int
    end: End
    deferred: int
    """Deferred memory, bytes."""
    faults: int
    missed: int
    """Number of faults on deferred pages."""
    prefetched: int
    """Number of pages loaded before they were requested."""
    bytes_read: int
    """Number of bytes of storage blocks read."""
    duration_ms: float
    """Milliseconds since the handshake."""
    service_times: Latency
    """Service times of the faults."""


class ServeResult(Event, frozen=True, kw_only=True, tag="serve"):
    """Result of `pageferry serve`."""

    image: str
    socket: str
    microvms: int
    """Number of microVMs that were served."""
    loaded: int
    """Number of microVMs whose memory was loaded completely."""
    failed: list[str]
    """For each microVM that was killed or stopped, the reason."""
