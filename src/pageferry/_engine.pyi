"""Per-page and per-fault work of pageferry, in Rust. This stub is its reference.

All lengths, offsets and addresses are bytes unless named otherwise. Calls that take longer than 50 microseconds
release the GIL; long ones check for Ctrl-C. Errors of the kernel are raised as `OSError` with its errno.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self, final

from typing_extensions import disjoint_base

SMALL_PAGE: int
LARGE_PAGE: int

@disjoint_base
class Mapping:
    """A shared mapping of (part of) a file at a 2 MiB boundary of our own address space, with the buffer protocol.

    `memoryview(m)` and `numpy.frombuffer(m, ...)` are writable views without a copy. The descriptor is duplicated.
    """

    def __new__(cls, fd: int, length: int, offset: int = 0) -> Self: ...
    @property
    def address(self) -> int:
        """Where it is mapped."""
    @property
    def length(self) -> int:
        """Bytes."""
    def fileno(self) -> int:
        """Descriptor of the file, which stays the mapping's."""
    def data_ranges(self) -> list[tuple[int, int]]:
        """(start, end) of the parts that hold data (SEEK_DATA/SEEK_HOLE): reading anything else would allocate."""
    def large_units(self) -> list[bool]:
        """Which 2 MiB units stand on a large page; holes are left alone."""
    def close_memory(self) -> None:
        """Make the mapping read-only. New buffers are read-only, a write to an old one ends the program with SIGSEGV,
        after a message."""
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class PageSet:
    """A set of the small pages of one region; `pages` is the size of the region. Page numbers start at 0."""

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
        """How many pages of each 2 MiB unit are in the set."""
    def runs(self) -> list[tuple[int, int]]:
        """Consecutive pages in the set, as (start, end)."""
    def pack(self) -> bytes:
        """The set as bytes: its bitmap, compressed."""
    @staticmethod
    def unpack(data: bytes, pages: int) -> PageSet:
        """The set over a region of `pages` pages that was packed. ValueError: it is none. Allocates one bitmap."""
    def copy(self) -> PageSet: ...

@final
class Space:
    """The address space of a process (ours without an argument). Opening it does nothing to the process."""

    def __new__(cls, pid: int | None = None) -> Space: ...
    @property
    def pid(self) -> int: ...
    def call(self, number: int, *arguments: int) -> int:
        """Make a system call inside the process, by ptrace; it is stopped for well under a millisecond.

        OSError with the errno of the call; PermissionError, ProcessLookupError when it cannot be made.
        """
    def missing_faults(self, discards: bool = False) -> tuple[int, int | None]:
        """A userfaultfd for a `Pager` (ours to close), and its number in the process, which keeps a copy of it.

        The number is None for our own process. `discards`: hear of memory that is discarded (balloons).
        """
    def write_traces(self) -> tuple[int, int | None]:
        """A userfaultfd for traces that a `Saver` leaves or takes up; the values are those of `missing_faults`."""
    def descriptor(self, number: int) -> int:
        """A duplicate of a descriptor of the process (pidfd_getfd)."""
    def collapse(self, address: int, length: int) -> None:
        """Put a range on large pages, or map it as what it is (process_madvise, MADV_COLLAPSE)."""
    def advise(self, address: int, length: int, advice: int) -> None:
        """Advise on a range from outside (process_madvise): MADV_COLD, MADV_PAGEOUT, MADV_WILLNEED, MADV_COLLAPSE."""
    def large_mapped(self, address: int, length: int) -> list[tuple[int, int]]:
        """The parts of a range that are mapped as large pages, as (start, end): PAGEMAP_SCAN, PAGE_IS_HUGE."""

_Segment = tuple[Space, int, int, int, int]
"""(space, address, length, number of the region, first page of the region that is mapped there)"""

@final
class Trace:
    """Write traces (S2) over segments: userfaultfd write protection in asynchronous mode, read by PAGEMAP_SCAN.

    `release_after` = 0 traces small pages; n: a large page in which n traces fired is released as a whole and mapped as
    a large page again; every page of it counts as written. `large`: which 2 MiB units of each region stand on large
    pages; what is left out is traced by small pages. Traces go when the object or the process that made it goes.
    """

    def __new__(
        cls,
        segments: Sequence[_Segment],
        release_after: int = 0,
        large: Sequence[Sequence[bool]] | None = None,
        userfaults: dict[int, int] | None = None,
    ) -> Trace:
        """`userfaults`: those of a pager that is held (`Pager.hold`): traces are put on by them, by small pages, and
        stay until it is released."""
    @property
    def install_seconds(self) -> float: ...
    @property
    def released_units(self) -> int: ...
    def collect(self, dirty: Sequence[PageSet]) -> None:
        """Add what was written since the last call (one set per region), having protected it again.

        ProcessLookupError when a process has ended: its last writes are not known. What was found is added anyway.
        """
    def peek(self, dirty: Sequence[PageSet]) -> None:
        """Add what was written since the last `collect`, and leave it to be reported by the next."""
    def release(self, segment: int) -> None:
        """Take the traces off one segment, by its place in the sequence: writes to it are not reported any more."""
    def remove(self) -> None: ...

@final
class ImageWriter:
    """Writes an image, storage block by storage block. For tests, and for images of other making."""

    def __new__(
        cls, fd: int, id: bytes, codec: str = "lz4", page_block: int = 65536, storage_block: int = 1048576
    ) -> ImageWriter: ...
    def append(self, region: int, pages: Sequence[tuple[int, bytes]]) -> int:
        """Write (page of the region, its contents) as one storage block; returns its number."""
    def section(self, kind: int, contents: bytes) -> None: ...
    def finish(self, regions: int, entries: Sequence[tuple[int, bool, int, int, int]]) -> tuple[int, int]:
        """Write the page map, of (class, in parent, signature, storage block, place in it), and the index.

        Returns digest and length.
        """

@final
class PageStore:
    """Writes chosen pages of regions (given by their pages) into an image, while the workload may write to them.

    Whoever uses the image must know which pages were written meanwhile. OSError: the image cannot be written.
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
        """Add those of the pages that are in memory; returns which they are."""
    def finish(self, sections: Sequence[tuple[int, bytes]], parent: ImageChain | None = None) -> tuple[int, int]:
        """Write the index and sync: (digest, length). What was not added is as the parent has it."""

@final
class Pager:
    """Brings the contents of pages on access, from an image or a peer, and all others in the background (S8, S10).

    `targets`: as for `Placer`; `userfaults`: pid -> descriptor from `Space.missing_faults`, for every process of
    `segments`; `flags`: a file of `flags_length` bytes in which a pager that takes over finds what is still to come;
    `working_set`: windows of 16 pages, counted over all regions, that are read first. `background`: read what nobody
    asks for; `eager`: at full speed. `fatal`: an access to a page that cannot be had ends in SIGBUS; else it waits.

    The files must be all holes, or mapped by nobody but us and `segments`: whatever they hold is thrown away, unless
    `taken_over`, or `kept`: then the caller has set the flags of the pages that are still to come (bit n of the file,
    little-endian, for page n of all regions), and all others are in the files. Where a page to come is mapped it is
    unmapped; OSError where a workload that runs maps it again and again. `checks_removals`: a removal that is reported
    is a discard only if the file says so; without it each is one.

    Dropping it leaves the workload waiting at the next page that is missing.
    """

    def __new__(
        cls,
        source: ImageChain | PeerSource,
        targets: Sequence[tuple[Mapping, int, Sequence[bool]]],
        segments: Sequence[_Segment],
        userfaults: dict[int, int],
        flags: int,
        *,
        working_set: Sequence[int] = ...,
        background: bool = True,
        eager: bool = False,
        taken_over: bool = False,
        kept: bool = False,
        fatal: bool = False,
        whole_blocks: bool = True,
        evicting: bool = False,
        checks_removals: bool = False,
    ) -> Pager: ...
    @staticmethod
    def flags_length(pages: int) -> int: ...
    @staticmethod
    def set_flags(flags: int, missing: Sequence[PageSet]) -> None:
        """Set the flags of pages in a file of flags (a descriptor), one set per region, before there is a pager."""
    @property
    def pending(self) -> int:
        """Pages whose contents are still to come."""
    def missing(self, region: int) -> PageSet:
        """Those of a region."""
    @property
    def finished(self) -> bool:
        """Everything is in memory, and nothing traps any more."""
    @property
    def counters(self) -> tuple[int, int, int, int, int, float, float]:
        """(accesses that waited for us, of these to missing pages, pages read, of these in the background, bytes read,
        seconds of service, seconds of the longest)"""
    @property
    def histogram(self) -> list[int]:
        """Accesses by time of service: number k of those that took less than 2**k us, and 2**(k - 1) us or more."""
    @property
    def touched(self) -> list[int]:
        """Windows of 16 pages in the order in which the workload first missed them."""
    @property
    def failures(self) -> list[tuple[int, int, bool, str]]:
        """(region, page of it, whether it has been accessed, message) of pages that cannot be had."""
    def wait(self, patience: float, known: int = 0) -> bool:
        """Wait until it is finished (True), until there are more than `known` failures, or for `patience` seconds."""
    def ensure(self, region: int, first: int, count: int) -> None:
        """Bring pages into memory, for who reads them past the workload's page tables. ValueError: they are damaged.

        ConnectionResetError: the connection to the peer is lost, or gets lost. OSError: the pager has been stopped.
        """
    def hold(self) -> dict[int, int] | None:
        """Let somebody put write traces on (`Trace`, `Saver`): pid -> our userfaultfd, until `release`. Contents go on
        coming, and what comes does not count as written. None: everything is there, or as good as there.

        OSError: EBUSY, somebody does so already; EINVAL, the kernel cannot.
        """
    def release(self) -> None:
        """Take the traces off. It may end, when everything is there."""
    def large(self, region: int) -> list[bool]:
        """Which 2 MiB units of a region stand on large pages when their contents are there."""
    def populate(self) -> None:
        """Map what is in memory already, large pages as such (S1): before the workload runs on memory that was kept."""
    def reconnect(self, source: PeerSource) -> None:
        """Go on over another connection; what accesses wait for is asked for again. ValueError: it is in use."""
    def evict(self, region: int, pages: PageSet) -> int:
        """Let pages go that stand in the chain as memory has them: an access brings them back. How many went.

        Made with `evicting`; the workload is paused. OSError: it maps memory all the same, or that cannot be worked on;
        nothing is lost.
        """
    def evicted(self) -> None:
        """Nothing more is let go: it may finish, when everything is back."""
    def stop(self) -> None:
        """End all threads. Accesses to what is missing wait for the next pager."""
    def abandon(self) -> None:
        """End all threads for a workload that will never run on this memory: who waits goes on, and finds zeros."""

@final
class Sampler:
    """Accesses to the small pages of large ones (S3), in one process. Pages are addresses at 2 MiB boundaries.

    What it holds is restored when it goes. Mappings are split, large pages never.
    """

    def __new__(cls, space: Space) -> Sampler: ...
    def hold(self, pages: Sequence[int]) -> list[int]:
        """Make each page a mapping of its own (a userfaultfd registration); those that are not mapped any more.

        EBUSY: another userfaultfd has it.
        """
    def split(self, pages: Sequence[int], marked: bool) -> None:
        """Split the mappings of held pages: `marked` (shared memory) into nothing, so that accesses map small pages."""
    def cool(self, pages: Sequence[int]) -> None:
        """Clear the accessed bits of pages, with a flush (MADV_COLD); those of locked memory stay."""
    def touched(self, pages: Sequence[int]) -> list[bytes]:
        """Which small pages of each page are mapped: 512 bits each, little-endian."""
    def restore(self) -> list[tuple[int, str]]:
        """Let go of all pages, and map those that were split as large ones again. Those that stay small, and why."""

@final
class Placer:
    """Puts received pages at their slots (S6, S7) and populates the workload's page tables (S1, S5).

    `targets`: per region (mapping of a fresh file, page size of the file, which 2 MiB units are large at the source).
    With `workers` > 0, units are mapped into the workload as soon as every slot of them has been received.
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
        """Pages that have not been received yet."""
    @property
    def fallbacks(self) -> int:
        """Large pages of the source for which there was no large page here."""
    @property
    def populated(self) -> tuple[int, int, int, float]:
        """(large pages mapped, small pages mapped, large pages left to the first access, seconds of work)."""
    def populate(self, region: int, units: Sequence[int]) -> None:
        """Map those of the 2 MiB units of a region now of which every page has been received.

        ValueError for a region or unit that there is not.
        """
    def allocate_ahead(self, region: int, units: Sequence[int]) -> None:
        """Allocate those of the 2 MiB units now that are large at the source, and have no large page here yet."""
    def finish(self, rest: bool) -> None:
        """Wait for the workers; with `rest`, map everything else that is in memory, by UFFDIO_CONTINUE.

        What remains for the first access: holes, and with them pages of zeros that stand on small pages.
        """

@final
class ProcessRange:
    """A stretch of the memory of a process that can be saved, whatever it is backed by. Read by process_vm_readv."""

    def __new__(cls, space: Space, address: int, length: int) -> ProcessRange: ...
    def data_ranges(self) -> list[tuple[int, int]]:
        """(start, end) of the parts that are in memory or swap."""

@final
class Saver:
    """Saves memory as of one instant while the workload runs on (S4), into an empty file that becomes an image.

    `regions`: (mapping, or range of a process; page size of its file). Made with `segments` it protects them, while the
    workload runs; without any, the workload must be paused until the end. Then `begin` at the instant, `sweep` when the
    workload runs again, `wait` until all is written, and `finish`, each once.

    Raises OSError with the errno of what failed (ENOSPC: the disk is full), InterruptedError (cancelled),
    ProcessLookupError (the workload ended), PermissionError. After any error nothing is protected any more.
    """

    def __new__(
        cls,
        regions: Sequence[tuple[Mapping | ProcessRange, int]],
        segments: Sequence[_Segment],
        fd: int,
        id: bytes,
        parent: ImageChain | None = None,
        codec: str = "lz4",
        page_block: int = 65536,
        storage_block: int = 1048576,
        trap_block: int = 65536,
        staging: int = 16777216,
        bandwidth: int = 0,
        packers: int = 1,
        at_instant: int = 16777216,
        leave: dict[int, int] | None = None,
        take_up: dict[int, int] | None = None,
        begin: dict[int, int] | None = None,
        borrow: dict[int, int] | None = None,
    ) -> Saver:
        """`bandwidth` limits the sweep over what nobody writes to, bytes per second; 0: as fast as it can.

        `leave`: pid -> userfaultfd (`Space.write_traces`) of every process: write traces by these are on from the
        instant on, and stay. `take_up`: such traces are on since `parent` was saved; only what they report is saved,
        and at most about `at_instant` bytes of it are copied in the pause. `begin`: such traces are put on now, and
        stay; everything is saved in rounds. `borrow`: those of a pager that is held
        (`Pager.hold`); everything is saved. LookupError, here, from `prepare` or `begin`: they cannot be used, save
        again without.
        """
    @property
    def leaves_traces(self) -> bool:
        """Whether traces are on all memory since the instant, once it is finished."""
    @property
    def arm_seconds(self) -> float:
        """How long it took to protect everything, or to save in rounds."""
    def prepare(
        self,
        bring: Callable[[int, int, int], object] | None = None,
        drain: Callable[[], object] | None = None,
    ) -> None:
        """With traces that are taken up, begun or borrowed, before `begin`: save in rounds until little is left.

        `bring`(region, first page, pages) has pages in memory before they are read; `drain`() returns when direct I/O
        has ended that had begun before. What they raise is raised here.
        """
    def begin(self) -> float:
        """The instant: what memory holds now is saved. Returns how long it took, seconds."""
    def sweep(self) -> None:
        """Start to save what the workload does not write to."""
    def wait(self, seconds: float) -> bool:
        """Wait until all is written, or has failed; False when it is not yet so after some time."""
    def cancel(self) -> None:
        """End it soon. The workload is released at once."""
    def finish(self, sections: Sequence[tuple[int, bytes]]) -> tuple[int, int, int, int]:
        """Wait for the end, add sections, write the index and sync: (digest, length, write calls, storage blocks)."""
    @property
    def stats(self) -> dict[str, int]:
        """So far: `traps`, `early_traps` (before the instant), `staging_waits`, `longest_trap` and `trap_time` (ns),
        `swept` (blocks), `pages` classified, of them `zero`, `pattern`, `same_as`, `data`, `in_parent`; `absent` at the
        end; `stored` bytes in `blocks` storage blocks, `writes`; `written`: pages that a trace reported, saved in
        `rounds` and at the instant."""
    def close(self) -> None:
        """Cancel what is under way, and wait for its threads."""

_Counters = tuple[int, int, int, int, int]
"""(bytes on the wire, storage blocks, data pages, zero pages, absent pages)"""

@final
class TlsIdentity:
    """A certificate (with those that lead to its authority) and its private key, both PEM, for page streams.

    ValueError for what is no certificate or key, are not of each other, or of a kind that page streams cannot use.
    """

    def __new__(cls, certificates: bytes, key: bytes) -> TlsIdentity: ...
    def connect(self, expected: bytes) -> TlsSession:
        """The connecting end of a handshake with the peer whose certificate (DER) this is."""
    def accept(self, accepted: Sequence[bytes]) -> TlsSession:
        """The accepting end of a handshake with anyone whose certificate (DER) is one of these."""

@final
class TlsSession:
    """One end of a TLS 1.3 connection, which does no input or output of its own: what comes from the peer goes in by
    `feed`, and what `outgoing` returns is for the peer (after an error too: then it is the reason).

    Raises PermissionError for a peer that is not the one expected, or breaks the rules; ValueError once a stream has
    it.
    """

    def feed(self, received: bytes) -> None: ...
    def outgoing(self) -> bytes: ...
    @property
    def established(self) -> bool:
        """Whether both ends have shown who they are. The connecting end cannot know whether it was believed."""
    @property
    def peer_certificate(self) -> bytes | None:
        """DER."""
    def write(self, data: bytes) -> None:
        """Seal data for the peer, once established."""
    def read(self, count: int) -> bytes | None:
        """The next `count` bytes of the peer, or None while they are not all here."""

_Stream = int | tuple[int, TlsSession]
"""A connected, blocking socket (the descriptor is duplicated), in the clear or with the session established on it."""

@final
class BlockSender:
    """Sends pages as storage blocks over connected, blocking stream sockets (descriptors are duplicated).

    Raises ConnectionResetError (peer closed), TimeoutError (no byte moved for `patience` seconds), InterruptedError
    (cancelled), PermissionError (TLS: not from the peer), OSError. After an error the streams are out of step and must
    be closed.
    """

    def __new__(
        cls,
        sockets: Sequence[_Stream],
        codec: str = "none",
        page_block: int = 65536,
        storage_block: int = 524288,
        patience: float = 30.0,
        bandwidth: int = 0,
        adaptive: bool = False,
    ) -> BlockSender:
        """`bandwidth`: most bytes per second over all streams; 0: no limit. `adaptive`: no codec while the link is
        faster."""
    def send(self, regions: Sequence[Mapping], pages: Sequence[PageSet], round: int, barrier: bool = True) -> None:
        """Send the pages of one set per region, and with `barrier` the end of the round on every stream.

        Pages that were sent before and have been freed since are sent as holes: no trace reports them.
        """
    @property
    def progress(self) -> _Counters: ...
    @property
    def uncompressed(self) -> int:
        """Storage blocks sent without the codec because the link was faster (`adaptive`)."""
    def cancel(self) -> None: ...

@final
class BlockReceiver:
    """Receives storage blocks and places them.

    Errors as for `BlockSender`; ValueError for a block that is wrong, OSError ENOMEM without memory for its pages.
    """

    def __new__(cls, sockets: Sequence[_Stream], placer: Placer, patience: float = 30.0) -> BlockReceiver: ...
    def receive(self, round: int) -> None:
        """Receive until every stream has seen the barrier of the round."""
    @property
    def progress(self) -> _Counters: ...
    def cancel(self) -> None: ...

@final
class PageServer:
    """The source of a post-copy migration: serves the pages of a paused workload, those asked for ahead of all others.

    `missing`: per region, the pages that the destination does not have; `urgent`: a connection for requests and their
    answers; `streams`: connections for everything else. All of them fresh: none that rounds were sent over. `codec`,
    `bandwidth` and `adaptive` as for `BlockSender`; answers count for the bandwidth, and do not wait for it.
    After a lost connection another one is made, of what is missing then.
    """

    def __new__(
        cls,
        regions: Sequence[Mapping],
        missing: Sequence[PageSet],
        urgent: _Stream,
        streams: Sequence[_Stream],
        codec: str = "none",
        patience: float = 30.0,
        bandwidth: int = 0,
        adaptive: bool = False,
    ) -> PageServer: ...
    def start(self) -> None:
        """Answer requests from now on, in a thread of its own, until the peer closes the connection."""
    def push(self) -> None:
        """Send everything that has not been sent, from the last request onward; returns when it has all been sent.

        Errors as for `BlockSender`; ValueError for requests that are none.
        """
    def cancel(self) -> None:
        """End it soon. Requests are not answered any more: not before the destination has said that it has all."""
    @property
    def progress(self) -> _Counters: ...
    @property
    def uncompressed(self) -> int: ...
    @property
    def requests(self) -> int:
        """Answered so far."""
    @property
    def remaining(self) -> int:
        """Pages that are still to be sent."""
    @property
    def lost(self) -> str | None:
        """Why requests are not answered any more."""

@final
class PeerSource:
    """The destination's end of connections to a `PageServer`, for one `Pager`. Idle connections are no error; an answer
    that does not come for `patience` seconds is, and a stream that breaks off."""

    def __new__(cls, urgent: _Stream, streams: Sequence[_Stream], patience: float = 30.0) -> PeerSource: ...
    @property
    def lost(self) -> str | None:
        """Why nothing comes any more; None as long as all is well, and when everything has come."""
    @property
    def ended(self) -> bool:
        """Every stream has come to its end."""
    @property
    def requests(self) -> int:
        """Sent so far."""
    @property
    def progress(self) -> _Counters: ...

@final
class Image:
    """An image, opened and verified but for its storage blocks. ValueError: it is damaged, cut off, or of a version
    that is not known; the message says which. The descriptor is duplicated."""

    def __new__(cls, fd: int) -> Image: ...
    def fileno(self) -> int:
        """The open file, which the image closes with itself."""
    @property
    def id(self) -> bytes: ...
    @property
    def digest(self) -> int:
        """Checksum of the footer, which covers everything else but the contents of storage blocks."""
    @property
    def regions(self) -> int: ...
    @property
    def pages(self) -> int:
        """Of all regions; in calls they are counted over all regions, in order."""
    @property
    def length(self) -> int: ...
    @property
    def page_block(self) -> int: ...
    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(offset, length) of every storage block."""
    def section(self, kind: int) -> bytes | None: ...
    def entries(self, first: int, count: int) -> list[tuple[int, bool, int, int, int]]:
        """The page map: (class, whether it is in the parent, signature, storage block, place in it)."""
    def count(self, first: int, count: int) -> list[int]:
        """Pages that are absent, zero, pattern, same-as, data; and those that are in the parent."""

@final
class ImageChain:
    """An image and the images it builds on, the nearest first."""

    def __new__(cls, images: Sequence[Image]) -> ImageChain: ...
    def read(self, first: int, count: int) -> bytes:
        """Contents of pages, verified. ValueError for a damaged block, or a page whose image is not in the chain."""
    def differences(self, other: ImageChain, first: int, count: int) -> list[tuple[int, int]]:
        """Pages of a range whose contents differ, as runs (start, end)."""
    @property
    def stored(self) -> int:
        """Pages whose contents stand in the first image."""
    def verify(self, first: int, count: int, most: int) -> list[tuple[int | None, str]]:
        """Compare stored pages `first` to `first + count` with their signatures: (page, what is wrong)."""
    def verify_unused(self) -> list[tuple[int | None, str]]:
        """Verify the storage blocks that no page points into."""
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
        """Write the chain as one image into an empty file, synced: (digest, length). `regions`: pages of each."""

_Piece = tuple[int, Mapping | Space, int, int]
"""(number of the workload, where it is, position, length). Positions: in the mapping, or addresses of the space."""

@final
class PagerFlags:
    """The flags of a pager (S8), for who looks at memory that it fills: `fd` of their file, over `pages` pages.

    `image`: the one that contents come from; its page map tells what pages hold. ValueError when it is of other pages.
    """

    def __new__(cls, fd: int, pages: int, image: Image | None = None) -> PagerFlags: ...

@final
class SharingScan:
    """Looks for small pages whose content stands elsewhere too (S9), without touching large pages.

    Pages that are not in memory are left alone, but for those of `deferred`: by number of the piece, (flags, first page
    of the region over all regions, which 2 MiB units will be large). What is still to come counts by its signature in
    the image, without being loaded; where there is no image it is left out.

    `most_pages`: pages kept in mind at 24 bytes each; with more, only one of `scale` contents is kept, and counts are
    scaled up. `every` n: only every nth unit of 2 MiB is looked at.
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
        """Bytes that are left to look at."""
    @property
    def scale(self) -> int:
        """One of how many contents is kept in mind; 1: every one."""
    def step(self, bytes: int, threads: int) -> int:
        """Look at the next units, up to so many bytes; the bytes looked at, 0 at the end.

        ProcessLookupError when a process has ended.
        """
    def finish(self) -> None:
        """Find equal pages among those looked at. After this `units` and `totals` are filled in."""
    def units(self) -> list[tuple[int, int, int, bool, int, int, int, list[int]]]:
        """Per 2 MiB unit: (piece, position, length, large, present, deferred, shared already, pages by class).

        The classes are zero, pattern, inside and across.
        Pages of zeros; of one repeated word that stands elsewhere too; whose content stands in the same workload once
        more; whose content stands once in its workload and in another.
        """
    @property
    def totals(self) -> tuple[list[int], list[int]]:
        """Pages of each of these classes, and how many of them sharing would free."""
    def curve(self, order: Sequence[int], pages_per_copy: int = 256, possible: bool = False) -> list[int]:
        """Pages freed by sharing all that is shareable in the first 1, 2, 3... units (by number) of `order`.

        One copy for `pages_per_copy` pages is kept, none of zeros. `possible`: of shared files only zeros count.
        """

def free_zeros(
    mapping: Mapping,
    ranges: Sequence[tuple[int, int]],
    seconds: float,
    waiting: tuple[PagerFlags, int] | None = None,
) -> tuple[int, int]:
    """Punch pages of zeros out of a file, for at most about so many seconds: (ranges done, pages given back).

    `ranges` are (start, length) in the mapping. Nobody may write to them meanwhile: the workload is paused. `waiting`:
    flags of a pager, and the first page of the mapping in them; what it is still to fill stays.
    """

def end_on_truncation(code: int) -> None:
    """Have this process end with a message and exit code `code` when it accesses memory whose file was truncated.

    Such an access is a SIGBUS; others of them end the process as before.
    """

def large_tmpfs(size: int) -> int:
    """A detached tmpfs mount with huge=always (fsopen/fsmount): a directory descriptor to use with O_TMPFILE.

    Nothing is mounted in any namespace: the mount goes with its last descriptor. OSError EPERM without CAP_SYS_ADMIN.
    """

@final
class LedgerReport:
    """What `Ledger.verify` found. All numbers count body pages, unless named otherwise."""

    @property
    def pages(self) -> int:
        """All there are, touched or not."""
    @property
    def checked(self) -> int:
        """Those that were ever written; the others are not read."""
    @property
    def zeros(self) -> int:
        """Of the checked ones: all zeros, as they should be."""
    @property
    def lost(self) -> int:
        """Zeros that should hold content."""
    @property
    def stale(self) -> int:
        """Whole, but of another version than the table says: the page or the table missed a write."""
    @property
    def misplaced(self) -> int:
        """Whole, but of another place."""
    @property
    def torn(self) -> int:
        """Not whole."""
    @property
    def first_bad(self) -> int | None:
        """Number of the first bad page."""
    @property
    def overwritten(self) -> int:
        """Bad pages that operations met before and have overwritten since."""
    @property
    def versions(self) -> int:
        """Sum of all pages' versions by the table."""
    @property
    def writes(self) -> int:
        """Sum of the counters of writes; equals `versions`."""
    @property
    def disagreeing(self) -> int:
        """Partitions whose versions do not add up to their counter."""
    @property
    def header(self) -> bool:
        """Whether the header is as it was."""
    @property
    def intact(self) -> bool:
        """Nothing was lost, stale, misplaced or torn, now or before, and everything adds up."""

@final
class Ledger:
    """The built-in workload (demo, tests): threads that rewrite self-describing pages of a mapping.

    Memory holds a header, counters, a table of versions and the pages; all of it moves with the memory. A lost, stale
    or torn write is found by `verify`; the docs of the engine's `ledger` module say why. Each of the threads owns one
    partition of the pages. Several processes may each run a share of the partitions of the same memory.

    Methods raise ValueError for options out of range, memory that is too small and memory that holds no ledger, and
    RuntimeError for calls that do not fit what the threads are doing.
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
        """Makes a ledger in fresh memory and fills it; the threads are not started yet.

        `rate` is bytes per second of all threads together, None for as fast as they can. Fractions are of 1: `fill` of
        the pages is ever touched, `working_set` of these is written again (scattered over them, or the first ones),
        `zero_fraction` of the writes make a page all zeros, `compressible` of each page is one repeated word. `skew` k
        puts x**(1/k) of the writes into the first x of the working set. With `large_fraction` the other 2 MiB units
        are kept from standing on large pages.
        """
    @staticmethod
    def attach(mapping: Mapping, *, first_thread: int = 0, threads: int | None = None) -> Ledger:
        """Takes up the ledger that the memory holds, to run `threads` partitions from `first_thread` on (None: all)."""
    @property
    def options(self) -> dict[str, Any]:
        """What the ledger was made with: the keyword arguments of `create`, without `large_fraction`."""
    @property
    def pages(self) -> int:
        """Body pages."""
    @property
    def filled(self) -> int:
        """Body pages that are ever touched."""
    @property
    def state(self) -> str:
        """Of the threads of this object: `stopped`, `running`, `pausing` or `paused`."""
    @property
    def tids(self) -> list[int]:
        """Kernel thread ids of the threads of this object; empty when stopped."""
    def start(self, *, paused: bool = False) -> None:
        """Starts the threads; with `paused` they wait for `resume`, and touch nothing before."""
    def pause(self) -> None:
        """Parks the threads between two operations and returns when all are. Ctrl-C lets them go on."""
    def resume(self) -> None: ...
    def stop(self) -> None:
        """Ends the threads between two operations. They can be started again."""
    def verify(self, *, threads: int = 0) -> LedgerReport:
        """Checks every page ever written, of all partitions; all who run them must be paused. 0: a thread per CPU."""
    def digest(self, *, threads: int = 0) -> int:
        """64-bit hash of everything ever written, as of a paused ledger."""
    def fingerprint(self) -> int:
        """64-bit hash of header and counters, which add up the table: names the instant of a paused ledger without
        reading its pages."""
    def table_agrees(self) -> bool:
        """Whether the table of a paused ledger is the one that its counters have added up. Reads all of it."""
    def writes(self) -> list[int]:
        """Writes done per partition, filling included; of all partitions, whoever runs them."""
    def stalls(self, *, reset: bool = False) -> tuple[int, list[int]]:
        """How long operations of this object's threads took: the longest, ns, and how many took 2**n to 2**(n+1) ns."""
    def page_offset(self, number: int) -> int:
        """Where body page `number` lies in the mapping."""

def scan_mappers(
    files: Sequence[tuple[int, int, int]],
) -> tuple[list[tuple[int, int, int, int, int, bool]], list[tuple[int, int, int]], list[int], int]:
    """Find the processes that map files or have them open for writing, in /proc, without the interpreter's lock.

    `files`: (st_dev, st_ino, device as /proc/PID/maps shows it). Returns shared mappings (index of the file, process,
    address, length, offset, writable), descriptors that are open for writing (index of the file, process, number),
    processes that may not be looked into, and the number of those that were. Raises OSError.
    """

def own_mappings() -> list[tuple[int, int]]:
    """(address, length) of every `Mapping` of this process."""
