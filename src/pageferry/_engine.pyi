"""Rust engine: per-page and per-fault mechanisms. This stub is its reference.

Lengths, offsets and addresses are in bytes unless stated otherwise. Calls that take longer than 50 us release the GIL,
and long ones check for signals. Errors of system calls are raised as OSError with their errno.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self, TypedDict, Unpack, final

from typing_extensions import disjoint_base

SMALL_PAGE: int
LARGE_PAGE: int

@disjoint_base
class Mapping:
    """Shared mapping of a file or a part of it, aligned to 2 MiB in our address space. Supports the buffer protocol.

    `memoryview(m)` and `numpy.frombuffer(m, ...)` return writable views without a copy. The descriptor is duplicated.
    """

    def __new__(cls, fd: int, length: int, offset: int = 0) -> Self: ...
    @property
    def address(self) -> int:
        """Address of the first byte."""
    @property
    def length(self) -> int:
        """Length in bytes."""
    def fileno(self) -> int:
        """Return the descriptor of the file, which the mapping owns."""
    def data_ranges(self) -> list[tuple[int, int]]:
        """Return the ranges that hold data (SEEK_DATA, SEEK_HOLE), as (start, end). Reading any other byte would
        allocate a page."""
    def large_units(self) -> list[bool]:
        """Return which 2 MiB units are backed by a huge page. Holes are not filled."""
    def close_memory(self) -> None:
        """Make the mapping read-only. New buffers are read-only; a write through an existing one terminates the program
        with a message and SIGSEGV."""
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class PageSet:
    """Set of base pages of a region. `pages` is the size of the region; page numbers start at 0."""

    def __new__(cls, pages: int, full: bool = False) -> PageSet: ...
    @property
    def pages(self) -> int: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __contains__(self, page: int, /) -> bool: ...
    def insert(self, start: int, end: int) -> None: ...
    def remove(self, start: int, end: int) -> None: ...
    def clear(self) -> None: ...
    def update(self, other: PageSet) -> None: ...
    def subtract(self, other: PageSet) -> None: ...
    def unit_counts(self) -> list[int]:
        """Return the number of pages in the set for each 2 MiB unit."""
    def runs(self) -> list[tuple[int, int]]:
        """Return the runs of consecutive pages in the set, as (start, end)."""
    def pack(self) -> bytes:
        """Serialise the set as its compressed bitmap."""
    @staticmethod
    def unpack(data: bytes, pages: int) -> PageSet:
        """Deserialise a packed set, for a region of `pages` pages. Allocates no more than its bitmap. Raises ValueError
        if `data` is not a set of pages of this region."""
    def copy(self) -> PageSet: ...

@final
class Space:
    """Address space of a process; without an argument, of our own. Opening it does not affect the process."""

    def __new__(cls, pid: int | None = None) -> Space: ...
    @property
    def pid(self) -> int: ...
    def call(self, number: int, *arguments: int) -> int:
        """Make the process execute a system call, by ptrace, which stops it for less than a millisecond.

        Raises OSError with the errno of the call; PermissionError or ProcessLookupError if it cannot be executed.
        """
    def missing_faults(self, discards: bool = False) -> tuple[int, int | None]:
        """Create a userfaultfd for a `Pager`. Return its descriptor, which the caller must close, and its number in the
        process, which keeps a copy (None for our own process).

        With `discards`, it reports memory that is discarded, for example by a balloon.
        """
    def write_traces(self) -> tuple[int, int | None]:
        """Create a userfaultfd for traces that a `Saver` leaves or takes up. Return the same values as
        `missing_faults`."""
    def descriptor(self, number: int) -> int:
        """Return a duplicate of a descriptor of the process (pidfd_getfd)."""
    def collapse(self, address: int, length: int) -> None:
        """Back a range by huge pages, or map existing huge pages as such (process_madvise, MADV_COLLAPSE)."""
    def advise(self, address: int, length: int, advice: int) -> None:
        """Advise the kernel about a range (process_madvise): MADV_COLD, MADV_PAGEOUT, MADV_WILLNEED or
        MADV_COLLAPSE."""
    def large_mapped(self, address: int, length: int) -> list[tuple[int, int]]:
        """Return the parts of a range that are mapped as huge pages, as (start, end)."""

_Segment = tuple[Space, int, int, int, int]
"""Address space, address, length, index of the region, and first page of the region that is mapped there."""

@final
class Trace:
    """Write traces over segments (S2): userfaultfd write protection in asynchronous mode, collected by PAGEMAP_SCAN.

    With `release_after` 0, each base page is traced. With n > 0, a huge page is unprotected and mapped as such again
    after n of its base pages were written; all of its pages count as written. `large` lists the 2 MiB units of each
    region that are backed by huge pages; omitted regions have none. The traces are removed when the object is destroyed
    or its process exits.
    """

    def __new__(
        cls,
        segments: Sequence[_Segment],
        release_after: int = 0,
        large: Sequence[Sequence[bool]] | None = None,
        userfaults: dict[int, int] | None = None,
    ) -> Trace:
        """Install the traces. `userfaults` are those of an acquired pager (`Pager.hold`); the traces then cover base
        pages and stay until the pager is released."""
    @property
    def install_seconds(self) -> float: ...
    @property
    def released_units(self) -> int: ...
    def collect(self, dirty: Sequence[PageSet]) -> None:
        """Protect the pages written since the last call again, and add them to `dirty` (one set per region).

        Raises ProcessLookupError if a process has exited, in which case its last writes are unknown. The pages found
        are added nevertheless.
        """
    def peek(self, dirty: Sequence[PageSet]) -> None:
        """Add the pages written since the last `collect`, without resetting them: the next `collect` reports them
        again."""
    def release(self, segment: int) -> None:
        """Remove the traces from one segment, given by its index. Later writes to it are not reported."""
    def remove(self) -> None: ...

@final
class ImageWriter:
    """Writer of images from given storage blocks, for tests."""

    def __new__(
        cls, fd: int, id: bytes, codec: str = "lz4", page_block: int = 65536, storage_block: int = 1048576
    ) -> ImageWriter: ...
    def append(self, region: int, pages: Sequence[tuple[int, bytes]]) -> int:
        """Write (page of the region, contents) pairs as one storage block. Return its number."""
    def section(self, kind: int, contents: bytes) -> None: ...
    def finish(self, regions: int, entries: Sequence[tuple[int, bool, int, int, int]]) -> tuple[int, int]:
        """Write the page map, given as (class, in parent, signature, storage block, slot), and the index.

        Return digest and length.
        """

@final
class PageStore:
    """Writer of images from selected pages of regions, while the workload may write to them. `regions` are their
    numbers of pages.

    The user of the image must know which pages were written in the meantime. Raises OSError if the image cannot be
    written.
    """

    def __new__(
        cls,
        fd: int,
        id: bytes,
        regions: Sequence[int],
        codec: str = "lz4",
        page_block: int = 65536,
        storage_block: int = 1048576,
    ) -> PageStore: ...
    def add(self, region: int, memory: Mapping, pages: PageSet) -> PageSet:
        """Add the present pages among `pages`. Return these pages."""
    def finish(self, sections: Sequence[tuple[int, bytes]], parent: ImageChain | None = None) -> tuple[int, int]:
        """Write the index and sync. Return digest and length. Pages that were not added refer to `parent`."""

class _PagerOptions(TypedDict, total=False):
    working_set: Sequence[int]
    """Windows of 16 pages, counted over all regions, that are loaded first (default: none)."""
    begin: Literal["empty", "kept", "taken-over"]
    """Initial state. `empty` (default): the files are emptied, and all contents are deferred. `kept`: the bitmap is
    set, and the files hold all other pages. `taken-over`: as `kept`, from another pager."""
    fill: Literal["none", "gentle", "eager"]
    """Loading of pages that have not been requested: not at all, with precedence for faults (default), or at full
    speed."""
    on_failure: Literal["block", "sigbus"]
    """Result of an access to a page that cannot be loaded (default: `block`)."""
    whole_blocks: bool
    """Whether a fault loads its whole storage block (default: True)."""
    evicting: bool
    """Whether pages will be evicted (default: False)."""
    checks_removals: bool
    """Whether a reported removal is a discard only if the file system reports a hole; by default, every removal is
    one."""

@final
class Pager:
    """Pager: loads pages on demand, from an image or a peer, and all others in the background (S8, S10).

    `targets` are as for `Placer`. `userfaults` maps the ID of every process of `segments` to a descriptor from
    `Space.missing_faults`. `flags` is the descriptor of the deferred bitmap, a file of `flags_length` bytes from which
    another pager can take over: bit n (little-endian) belongs to page n of all regions.

    With `begin` = `empty`, the files must not be mapped by other processes than those of `segments`. Otherwise deferred
    pages that are mapped are unmapped. Raises OSError if a running workload maps them again.

    Dropping the pager leaves the workload blocked at its next access to a deferred page.
    """

    def __new__(
        cls,
        source: ImageChain | PeerSource,
        targets: Sequence[tuple[Mapping, int, Sequence[bool]]],
        segments: Sequence[_Segment],
        userfaults: dict[int, int],
        flags: int,
        **options: Unpack[_PagerOptions],
    ) -> Pager: ...
    @staticmethod
    def flags_length(pages: int) -> int: ...
    @staticmethod
    def set_flags(flags: int, missing: Sequence[PageSet]) -> None:
        """Set the bits of deferred pages in a bitmap file, given by its descriptor, with one set per region. Call this
        before a pager uses the file."""
    @property
    def pending(self) -> int:
        """Number of deferred pages."""
    def missing(self, region: int) -> PageSet:
        """Return the deferred pages of a region."""
    @property
    def finished(self) -> bool:
        """Whether all pages are loaded and the memory is unregistered."""
    @property
    def counters(self) -> tuple[int, int, int, int, int, float, float]:
        """Faults, faults on deferred pages, pages loaded, pages loaded in the background, bytes read, total service
        time and longest service time in seconds."""
    @property
    def histogram(self) -> list[int]:
        """Faults by service time: bin k counts those of at least 2**(k - 1) us and less than 2**k us."""
    @property
    def touched(self) -> list[int]:
        """Windows of 16 pages in the order of their first fault on a deferred page."""
    @property
    def failures(self) -> list[tuple[int, int, bool, str]]:
        """Pages that could not be loaded: region, page within it, whether a thread waits for it, and message."""
    def wait(self, timeout: float, known: int = 0) -> bool:
        """Wait until the pager has finished, until there are more than `known` failures, or for `timeout` seconds.
        Return whether it has finished."""
    def fill(self, working_set: Sequence[int], eager: bool = False) -> None:
        """Start to load the working set, then all pages, for a pager that was created with `fill` = `none`. `eager`: at
        full speed. Call this once."""
    def ensure(self, region: int, first: int, count: int) -> None:
        """Load pages, for readers that bypass the workload's page tables.

        Raises ValueError if a page is damaged, ConnectionResetError if the connection to the peer is lost, OSError if
        the pager has been stopped.
        """
    def hold(self) -> dict[int, int] | None:
        """Acquire the pager, to install write traces (`Trace`, `Saver`) until `release`. Return its userfaultfd by
        process ID, or None if all pages are loaded or about to be. Pages are still loaded; this does not count as a
        write.

        Raises OSError: EBUSY if the pager is acquired already, EINVAL if the kernel lacks support.
        """
    def release(self) -> None:
        """Release the pager: remove the traces, and let it finish when all pages are loaded."""
    def large(self, region: int) -> list[bool]:
        """Return the 2 MiB units of a region that are backed by huge pages once their contents are present."""
    def populate(self) -> None:
        """Map all present pages, huge pages as such (S1), before the workload resumes on existing memory."""
    def reconnect(self, source: PeerSource) -> None:
        """Continue over another connection, and repeat the requests that faults wait for. Raises ValueError if the
        connection is in use."""
    def evict(self, region: int, pages: PageSet) -> int:
        """Evict pages whose contents are in the chain; a later access loads them again. Return the number of evicted
        pages.

        Requires `evicting`, and the workload must be paused. Raises OSError if it maps the memory nevertheless, or if
        its mappings cannot be changed; nothing is lost.
        """
    def evicted(self) -> None:
        """End evictions: the pager finishes when all pages are loaded."""
    def stop(self) -> None:
        """Stop all threads. Accesses to deferred pages block until another pager takes over."""
    def abandon(self) -> None:
        """Stop all threads, for a workload that will never resume on this memory. Blocked threads continue, and read
        zeros."""

@final
class Sampler:
    """Sampler of accesses to the base pages of huge pages of a process (S3). Huge pages are given by their addresses.

    Splits mappings, but never huge pages. Registered pages are restored when the sampler is destroyed.
    """

    def __new__(cls, space: Space) -> Sampler: ...
    def hold(self, pages: Sequence[int]) -> list[int]:
        """Make each page a separate mapping, by registering it with a userfaultfd. Return the pages that are no longer
        mapped.

        Raises OSError EBUSY if a page is registered with another userfaultfd.
        """
    def split(self, pages: Sequence[int], marked: bool) -> None:
        """Split the mappings of registered pages. With `marked` (shared memory), unmap their base pages, so that
        accesses map them."""
    def cool(self, pages: Sequence[int]) -> None:
        """Clear the accessed bits of pages and flush the TLB (MADV_COLD). Locked memory is not affected."""
    def touched(self, pages: Sequence[int]) -> list[bytes]:
        """Return which base pages of each page are mapped, as 512 bits (little-endian)."""
    def restore(self) -> list[tuple[int, str]]:
        """Unregister all pages, and map those that were split as huge pages again. Return those that stay split, with
        the reason."""

@final
class Placer:
    """Placer of received pages in their slots (S6, S7), which populates the workload's page tables (S1, S5).

    `targets` are the regions as (mapping of a new file, page size of the file, 2 MiB units that are huge at the
    source). With `workers` > 0, units are mapped into the workload's page tables as soon as all of their slots have
    been received.
    """

    def __new__(
        cls,
        targets: Sequence[tuple[Mapping, int, Sequence[bool]]],
        segments: Sequence[_Segment],
        keep_large: bool = True,
        workers: int = 0,
    ) -> Placer: ...
    @property
    def missing(self) -> int:
        """Number of pages that have not been received."""
    @property
    def fallbacks(self) -> int:
        """Number of huge pages of the source that could not be allocated as such."""
    @property
    def populated(self) -> tuple[int, int, int, float]:
        """Huge pages mapped, base pages mapped, huge pages left to their first access, and time in seconds."""
    def populate(self, region: int, units: Sequence[int]) -> None:
        """Map the 2 MiB units of a region of which all pages have been received.

        Raises ValueError if there is no such region or unit.
        """
    def allocate_ahead(self, region: int, units: Sequence[int]) -> None:
        """Allocate huge pages for those of the 2 MiB units that are huge at the source, unless they have been
        allocated."""
    def finish(self, rest: bool) -> None:
        """Wait for the workers. With `rest`, then map all other present pages by UFFDIO_CONTINUE.

        Holes, including zero pages of units backed by base pages, are left to their first access.
        """

@final
class ProcessRange:
    """Range of the memory of a process that can be saved, regardless of its backing. It is read by process_vm_readv."""

    def __new__(cls, space: Space, address: int, length: int) -> ProcessRange: ...
    def data_ranges(self) -> list[tuple[int, int]]:
        """Return the ranges that are present in memory or swap, as (start, end)."""

class _SaverOptions(TypedDict, total=False):
    parent: ImageChain | None
    """Chain of parent images. Pages that it holds are not stored again."""
    codec: str
    """Codec of the page blocks: none, lz4 (default) or zstd."""
    page_block: int
    """Unit of compression, bytes (default: 64 KiB)."""
    storage_block: int
    """Unit of reading, bytes (default: 1 MiB)."""
    trap_block: int
    """Bytes that a trap copies and unprotects (default: 64 KiB)."""
    staging: int
    """Size of the staging buffer, bytes (default: 16 MiB)."""
    bandwidth: int
    """Bandwidth limit of the sweep, bytes per second; 0 (default) means unlimited."""
    packers: int
    """Number of compression threads (default: 1)."""
    traces: tuple[Literal["leave", "take-up", "begin", "borrow"], dict[int, int]] | None
    """Use of write traces, and the userfaultfds by process ID. `leave` (from `Space.write_traces`): leave traces from
    the snapshot point on. `take-up`: such traces were installed when `parent` was saved; only the pages that they
    report are saved. `begin`: install traces now and leave them; all pages are saved in rounds. `borrow` (from
    `Pager.hold`): use the traces of an acquired pager; all pages are saved."""

@final
class Saver:
    """Lazy checkpoint (S4): saves memory as of a snapshot point to an empty file while the workload keeps running.

    `regions` are pairs of a mapping, or range of a process, and the page size of its file. Creating the saver protects
    `segments` while the workload runs; without segments, the workload must stay paused until the end. Then call `begin`
    at the snapshot point, `sweep` when the workload has resumed, `wait` until everything is written, and `finish`, each
    once.

    Raises OSError with the errno of the failed call (ENOSPC: the disk is full), InterruptedError if cancelled,
    ProcessLookupError if the workload exited, PermissionError. After an error no memory is protected.
    """

    def __new__(
        cls,
        regions: Sequence[tuple[Mapping | ProcessRange, int]],
        segments: Sequence[_Segment],
        fd: int,
        id: bytes,
        **options: Unpack[_SaverOptions],
    ) -> Saver:
        """Protect the segments, or install the traces. Raises LookupError, here or from any call before `sweep`, if the
        traces cannot be used; save again without them."""
    @property
    def leaves_traces(self) -> bool:
        """Whether, after `finish`, traces cover all memory since the snapshot point."""
    @property
    def arm_seconds(self) -> float:
        """Time to protect all memory or to install the traces, seconds."""
    @property
    def pages(self) -> Literal["swept", "written", "all"]:
        """How pages to save are found: `swept` by traps and the sweep; `written` by a trace since the parent; `all`
        pages, and then those that a trace reports, which is installed now. With a trace, copy in rounds while the
        workload runs: call `copy_range` for all pages if `all`, then `collect`, `scan`, and `copy` and `collect` until
        few pages remain. `begin` copies the last ones."""
    def collect(self) -> int:
        """Collect the pages that have been written, protect them again, and return the number of pages to copy."""
    def scan(self) -> int:
        """Find pages that have lost their contents without a write, and return the number of pages to copy. Required
        before `begin`."""
    def copy(self) -> None:
        """Copy the collected pages. Wait for the staging buffer. Direct I/O must have been drained since `collect`."""
    def copy_range(self, region: int, first: int, count: int) -> None:
        """Copy all present pages of a range. Direct I/O must have been drained since the traces were installed."""
    def lost(self) -> bool:
        """Return whether memory has been discarded since the last call. If so, `scan` again: copied pages may have to
        be copied once more."""
    def begin(self) -> float:
        """Set the snapshot point, while the workload is paused. Return the duration in seconds."""
    def sweep(self) -> None:
        """Start to save the blocks that the workload does not write."""
    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` until everything is written or has failed. Return whether that is the case."""
    def cancel(self) -> None:
        """Cancel the checkpoint. All memory is unprotected at once."""
    def finish(self, sections: Sequence[tuple[int, bytes]]) -> tuple[int, int, int, int]:
        """Wait for all threads, add sections, write the index and sync. Return digest, length, write calls and storage
        blocks."""
    @property
    def stats(self) -> dict[str, int]:
        """Counters: `traps`, `early_traps` (before the snapshot point), `staging_waits`, `longest_trap` and `trap_time`
        (ns), `swept` (blocks), `pages` classified, of these `zero`, `pattern`, `same_as`, `data` and `in_parent`;
        `absent` after `finish`; `stored` (bytes) in `blocks` (storage blocks), `writes` (calls); `written` (pages
        reported by a trace)."""
    def close(self) -> None:
        """Cancel the checkpoint if it is in progress, and wait for its threads."""

_Counters = tuple[int, int, int, int, int]
"""Bytes transferred, storage blocks, data pages, zero pages and absent pages."""

@final
class TlsIdentity:
    """Certificate, including intermediate certificates, and private key (both PEM), for page streams.

    Raises ValueError if certificate or key is invalid or of an unsupported kind, or if they do not match.
    """

    def __new__(cls, certificates: bytes, key: bytes) -> TlsIdentity: ...
    def connect(self, expected: bytes) -> TlsSession:
        """Create the connecting side of a handshake with the peer that has this certificate (DER)."""
    def accept(self, accepted: Sequence[bytes]) -> TlsSession:
        """Create the accepting side of a handshake with any peer that has one of these certificates (DER)."""

@final
class TlsSession:
    """One side of a TLS 1.3 connection, without I/O. Pass received bytes to `feed` and send the result of `outgoing`,
    also after an error, because it then contains the alert.

    Raises PermissionError if the peer is not the expected one or violates the protocol; ValueError once a stream has
    taken the session.
    """

    def feed(self, received: bytes) -> None: ...
    def outgoing(self) -> bytes: ...
    @property
    def established(self) -> bool:
        """Whether the handshake is complete. The connecting side cannot know whether it has been accepted."""
    @property
    def peer_certificate(self) -> bytes | None:
        """Certificate of the peer (DER); None before it was received."""
    def write(self, data: bytes) -> None:
        """Seal data for the peer, once the handshake is complete."""
    def read(self, count: int) -> bytes | None:
        """Return the next `count` bytes from the peer, or None if fewer have been received."""

_Stream = int | tuple[int, TlsSession]
"""Connected socket (the descriptor is duplicated): unencrypted, or with the TLS session established on it."""

@final
class BlockSender:
    """Sender of pages in storage blocks, over connected stream sockets (the descriptors are duplicated).

    Raises ConnectionResetError if the peer closes a stream, TimeoutError if no byte is transferred for `timeout`
    seconds, InterruptedError if cancelled, PermissionError for a TLS error, OSError. After an error the streams are out
    of step and must be closed.
    """

    def __new__(
        cls,
        sockets: Sequence[_Stream],
        codec: str = "none",
        page_block: int = 65536,
        storage_block: int = 524288,
        timeout: float = 30.0,
        bandwidth: int = 0,
        adaptive: bool = False,
    ) -> BlockSender:
        """`bandwidth` limits all streams together, in bytes per second; 0 means unlimited. With `adaptive`, blocks are
        not compressed while the link is faster than the codec."""
    def send(self, regions: Sequence[Mapping], pages: Sequence[PageSet], round: int, barrier: bool = True) -> None:
        """Send the pages of one set per region. With `barrier`, end the round on every stream.

        Pages that have been freed since they were sent are sent as holes, because no trace reports them.
        """
    @property
    def progress(self) -> _Counters: ...
    @property
    def uncompressed(self) -> int:
        """Number of storage blocks sent without the codec because the link was faster (`adaptive`)."""
    def cancel(self) -> None: ...

@final
class BlockReceiver:
    """Receiver of storage blocks, which places their pages.

    Raises the same errors as `BlockSender`, ValueError if a block is invalid, and OSError ENOMEM without memory for its
    pages.
    """

    def __new__(cls, sockets: Sequence[_Stream], placer: Placer, timeout: float = 30.0) -> BlockReceiver: ...
    def receive(self, round: int) -> None:
        """Receive until every stream has delivered the barrier of the round."""
    @property
    def progress(self) -> _Counters: ...
    def cancel(self) -> None: ...

@final
class PageServer:
    """Source side of post-copy: serves the pages of a paused workload, requested pages first.

    `missing` are the pages of each region that the destination lacks. `urgent` is a connection for requests and
    replies; `streams` are connections for all other pages. All of them must be new: not used for rounds before.
    `codec`, `bandwidth` and `adaptive` are as for `BlockSender`; replies count for the bandwidth limit without waiting
    for it. After a lost connection, create another server for the pages that are missing then.
    """

    def __new__(
        cls,
        regions: Sequence[Mapping],
        missing: Sequence[PageSet],
        urgent: _Stream,
        streams: Sequence[_Stream],
        codec: str = "none",
        timeout: float = 30.0,
        bandwidth: int = 0,
        adaptive: bool = False,
    ) -> PageServer: ...
    def start(self) -> None:
        """Start a thread that replies to requests until the peer closes the connection."""
    def push(self) -> None:
        """Push all pages that have not been sent, starting at the last request. Return when all of them have been sent.

        Raises the same errors as `BlockSender`, and ValueError for malformed requests.
        """
    def cancel(self) -> None:
        """Cancel the push and the replies. Do not call this before the destination has reported that it has all
        pages."""
    @property
    def progress(self) -> _Counters: ...
    @property
    def uncompressed(self) -> int: ...
    @property
    def requests(self) -> int:
        """Number of requests served."""
    @property
    def remaining(self) -> int:
        """Number of pages that have not been sent."""
    @property
    def lost(self) -> str | None:
        """Reason for which requests are no longer served; None while they are."""

@final
class PeerSource:
    """Destination side of the connections to a `PageServer`, for one `Pager`. A reply that is late by `timeout`
    seconds and a stream that is cut off are errors; idle connections are not."""

    def __new__(cls, urgent: _Stream, streams: Sequence[_Stream], timeout: float = 30.0) -> PeerSource: ...
    @property
    def lost(self) -> str | None:
        """Reason for which the connection was lost; None while it works, and after all pages have been received."""
    @property
    def ended(self) -> bool:
        """Whether every stream has ended."""
    @property
    def requests(self) -> int:
        """Number of requests sent."""
    @property
    def progress(self) -> _Counters: ...

@final
class Image:
    """Open image. Everything except its storage blocks has been verified. Raises ValueError if it is damaged, truncated
    or of an unsupported version. The descriptor is duplicated."""

    def __new__(cls, fd: int) -> Image: ...
    def fileno(self) -> int:
        """Return the descriptor of the file, which the image owns."""
    @property
    def id(self) -> bytes: ...
    @property
    def digest(self) -> int:
        """Checksum of the footer, which covers everything except the contents of storage blocks."""
    @property
    def regions(self) -> int: ...
    @property
    def pages(self) -> int:
        """Number of pages of all regions. Calls count pages over all regions, in order."""
    @property
    def length(self) -> int: ...
    @property
    def page_block(self) -> int: ...
    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Offset and length of every storage block."""
    def section(self, kind: int) -> bytes | None: ...
    def entries(self, first: int, count: int) -> list[tuple[int, bool, int, int, int]]:
        """Return entries of the page map: class, whether it is in the parent, signature, storage block and slot."""
    def count(self, first: int, count: int) -> list[int]:
        """Count the pages that are absent, zero, pattern, same-as and data, and those in the parent."""

@final
class ImageChain:
    """Image and its parents, nearest first."""

    def __new__(cls, images: Sequence[Image]) -> ImageChain: ...
    def read(self, first: int, count: int) -> bytes:
        """Read and verify pages. Raises ValueError if a block is damaged or if the image of a page is not in the
        chain."""
    def differences(self, other: ImageChain, first: int, count: int) -> list[tuple[int, int]]:
        """Return the pages of a range whose contents differ, as runs (start, end)."""
    @property
    def stored(self) -> int:
        """Number of pages stored in the first image."""
    def verify(self, first: int, count: int, limit: int) -> list[tuple[int | None, str]]:
        """Compare stored pages `first` to `first + count` with their signatures. Return up to `limit` findings (page,
        message)."""
    def verify_unused(self) -> list[tuple[int | None, str]]:
        """Verify the storage blocks to which no page refers."""
    def flatten(
        self,
        fd: int,
        id: bytes,
        regions: Sequence[int],
        sections: Sequence[tuple[int, bytes]],
        codec: str = "lz4",
        page_block: int = 65536,
        storage_block: int = 1048576,
    ) -> tuple[int, int]:
        """Write the chain as one image to an empty file, and sync. Return digest and length. `regions` are their
        numbers of pages."""

_Piece = tuple[int, Mapping | Space, int, int]
"""Index of the workload, memory, position and length. Positions are offsets in the mapping, or addresses."""

@final
class PagerFlags:
    """Deferred bitmap of a pager (S8), to scan memory that it fills. `fd` is its file, for `pages` pages.

    `image` is the origin of the contents, whose page map describes the deferred pages. Raises ValueError if it has
    another number of pages.
    """

    def __new__(cls, fd: int, pages: int, image: Image | None = None) -> PagerFlags: ...

@final
class SharingScan:
    """Scan for duplicate base pages (S9), which does not split huge pages.

    Pages that are not in memory are ignored, except those of `deferred`. It maps the index of a piece to (bitmap, first
    page of the region counted over all regions, 2 MiB units that will be huge). Deferred pages count by their
    signatures in the image, without being loaded; without an image they are ignored.

    `most_pages` is the number of pages that are recorded, at 24 bytes each. Beyond it, only one of `scale` contents is
    recorded, and counts are scaled up. With `every` n, only every nth 2 MiB unit is scanned.
    """

    def __new__(
        cls,
        pieces: Sequence[_Piece],
        most_pages: int,
        every: int = 1,
        deferred: dict[int, tuple[PagerFlags, int, Sequence[bool]]] | None = None,
    ) -> SharingScan: ...
    @property
    def remaining(self) -> int:
        """Number of bytes that have not been scanned."""
    @property
    def scale(self) -> int:
        """Sampling factor: one of this many contents is recorded."""
    def step(self, bytes: int, threads: int) -> int:
        """Scan the next units, up to `bytes`. Return the number of bytes scanned, or 0 at the end.

        Raises ProcessLookupError if a process has exited.
        """
    def finish(self) -> None:
        """Find the duplicates among the scanned pages. Completes `units` and `totals`."""
    def units(self) -> list[tuple[int, int, int, bool, int, int, int, list[int]]]:
        """Return the 2 MiB units: piece, position, length, large, present, deferred, shared already, and pages by
        class.

        The classes are: zero; pattern, with at least one duplicate; inside, with a duplicate in the same workload;
        across, with duplicates in other workloads only.
        """
    @property
    def totals(self) -> tuple[list[int], list[int]]:
        """Number of pages of each class, and how many of them sharing would free."""
    def curve(self, order: Sequence[int], pages_per_copy: int = 256, possible: bool = False) -> list[int]:
        """Return the numbers of pages freed by sharing all shareable pages of the first 1, 2, 3... units (by index) of
        `order`.

        One copy per `pages_per_copy` pages is kept; zero pages need none. With `possible`, only zero pages of shared
        files count.
        """

def free_zeros(
    mapping: Mapping,
    ranges: Sequence[tuple[int, int]],
    seconds: float,
    waiting: tuple[PagerFlags, int] | None = None,
) -> tuple[int, int]:
    """Punch the zero pages in `ranges` (start, length) of a file, for at most about `seconds`. Return the number of
    ranges that were processed and of pages that were freed.

    The workload must be paused, because a concurrent write would be lost. `waiting` is the deferred bitmap and the
    first page of the mapping in it; deferred pages are skipped.
    """

def end_on_truncation(code: int) -> None:
    """Make this process exit with a message and exit code `code` on an access to memory whose file was truncated.

    Such an access raises SIGBUS. Other causes of SIGBUS keep their default action.
    """

def large_tmpfs(size: int) -> int:
    """Create a detached tmpfs mount with huge=always. Return a directory descriptor for use with O_TMPFILE.

    The mount is in no namespace and is freed with its last descriptor. Raises OSError EPERM without CAP_SYS_ADMIN.
    """

@final
class LedgerReport:
    """Result of `Ledger.verify`. Values are numbers of body pages unless stated otherwise."""

    @property
    def pages(self) -> int:
        """All body pages."""
    @property
    def checked(self) -> int:
        """Checked pages: all that were written. Others are not read."""
    @property
    def zeros(self) -> int:
        """Checked pages that are zeros, as expected."""
    @property
    def lost(self) -> int:
        """Zero pages that should have contents."""
    @property
    def stale(self) -> int:
        """Intact pages of another version than their table entry: the page or the entry has missed a write."""
    @property
    def misplaced(self) -> int:
        """Intact pages that are copies of other pages."""
    @property
    def torn(self) -> int:
        """Pages that are not intact."""
    @property
    def first_bad(self) -> int | None:
        """First damaged page."""
    @property
    def overwritten(self) -> int:
        """Damaged pages that operations have found and overwritten."""
    @property
    def versions(self) -> int:
        """Sum of all versions in the table."""
    @property
    def writes(self) -> int:
        """Sum of the counters of writes; equals `versions`."""
    @property
    def disagreeing(self) -> int:
        """Number of partitions whose table does not match their counters."""
    @property
    def header(self) -> bool:
        """Whether the header is intact."""
    @property
    def intact(self) -> bool:
        """Whether no damage was found, by this verification or by operations, and all sums match."""

@final
class Ledger:
    """Built-in workload for demonstrations and tests: threads that rewrite self-describing pages of a mapping.

    The memory contains a header, counters, a table of versions and the pages; all of it is migrated. `verify` detects
    lost, stale and torn writes; the documentation of the engine's `ledger` module explains how. Each thread owns one
    partition of the pages. Several processes may each run a share of the partitions of the same memory.

    Methods raise ValueError if an option is out of range, if the memory is too small or if it does not contain a
    ledger, and RuntimeError if the operation is not allowed in the current state of the threads.
    """

    @staticmethod
    def create(
        mapping: Mapping,
        *,
        threads: int = 1,
        seed: int = 1,
        rate: int | None = None,
        working_set: float = 1.0,
        scatter: bool = False,
        skew: float = 1.0,
        zero_fraction: float = 0.0,
        fill: float = 1.0,
        compressible: float = 0.0,
        large_fraction: float | None = None,
    ) -> Ledger:
        """Create a ledger in new memory and fill it, without starting the threads.

        `rate` limits the writes of all threads together, in bytes per second; None means unlimited. Fractions are
        between 0 and 1: `fill` of the pages is used, `working_set` of these is rewritten (with `scatter` spread over
        them, otherwise the first ones), `zero_fraction` of the writes zero a page, and `compressible` of each page is a
        repeated word. With `skew` k, the first fraction x of the working set receives x**(1/k) of the writes. With
        `large_fraction`, all other 2 MiB units are excluded from huge pages.
        """
    @staticmethod
    def attach(mapping: Mapping, *, first_thread: int = 0, threads: int | None = None) -> Ledger:
        """Open the ledger in existing memory, to run `threads` partitions from `first_thread` on (None: all)."""
    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `create`, without `large_fraction`."""
    @property
    def pages(self) -> int:
        """Number of body pages."""
    @property
    def filled(self) -> int:
        """Number of body pages that are used."""
    @property
    def state(self) -> str:
        """State of the threads of this object: `stopped`, `running`, `pausing` or `paused`."""
    @property
    def tids(self) -> list[int]:
        """Kernel thread IDs of the threads of this object; empty if stopped."""
    def start(self, *, paused: bool = False) -> None:
        """Start the threads. With `paused`, they wait for `resume` and access nothing before it."""
    def pause(self) -> None:
        """Pause the threads between two operations, and wait for them. A signal handler that raises resumes them."""
    def resume(self) -> None: ...
    def stop(self) -> None:
        """Stop the threads between two operations. They can be started again."""
    def verify(self, *, threads: int = 0) -> LedgerReport:
        """Verify all written pages of all partitions. The ledger must be paused in all processes. 0 threads: one per
        CPU."""
    def digest(self, *, threads: int = 0) -> int:
        """Return a 64-bit hash of all written memory of a paused ledger."""
    def fingerprint(self) -> int:
        """Return a 64-bit hash of header and counters, and thereby of the table. It identifies the contents of a paused
        ledger without reading its pages."""
    def table_agrees(self) -> bool:
        """Return whether the table of a paused ledger matches its counters. Reads the whole table."""
    def writes(self) -> list[int]:
        """Return the number of writes of each partition, filling included, by all processes."""
    def stalls(self, *, reset: bool = False) -> tuple[int, list[int]]:
        """Return the longest operation of this object's threads in ns, and the numbers of operations of 2**n to
        2**(n+1) ns."""
    def page_offset(self, number: int) -> int:
        """Return the offset of body page `number` in the mapping."""

def scan_mappers(
    files: Sequence[tuple[int, int, int]],
) -> tuple[list[tuple[int, int, int, int, int, bool]], list[tuple[int, int, int]], list[int], int]:
    """Find the processes that map files or have them open for writing, in /proc, without the GIL.

    `files` are given as (st_dev, st_ino, device in /proc/PID/maps). Return the shared mappings (index of the file,
    process ID, address, length, offset, writable), the descriptors open for writing (index of the file, process ID,
    descriptor), the processes that may not be inspected, and the number of inspected processes. Raises OSError.
    """

def own_mappings() -> list[tuple[int, int]]:
    """Return the address and length of every `Mapping` of this process."""
