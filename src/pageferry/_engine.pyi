"""Rust engine: per-page and per-fault mechanisms. This stub is its reference.

Lengths, offsets and addresses are in bytes unless stated otherwise. Calls that take longer than 50 us release the GIL,
and long ones check for signals. Errors of system calls are raised as OSError with their errno.
"""

from collections.abc import Sequence
from typing import Final, Literal, Self, TypedDict, Unpack, final

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
    def data_ranges(self) -> list[_Range]:
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

    def __new__(cls, pages: int) -> PageSet: ...
    @staticmethod
    def full(pages: int) -> PageSet:
        """Create the set of all pages."""
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
    def runs(self) -> list[_Range]:
        """Return the runs of consecutive pages in the set, as (start, end)."""
    def pack(self) -> bytes:
        """Serialise the set as its compressed bitmap."""
    @staticmethod
    def unpack(data: bytes, pages: int) -> PageSet:
        """Deserialise a packed set, for a region of `pages` pages. Allocates no more than its bitmap. Raises ValueError
        if `data` is not a set of pages of this region."""
    def copy(self) -> PageSet: ...

@final
class Advice:
    """Advice of madvise(2) about a range of memory: `Advice.COLD` is MADV_COLD."""

    COLD: Final[Advice]
    COLLAPSE: Final[Advice]
    DOFORK: Final[Advice]
    DONTFORK: Final[Advice]
    HUGEPAGE: Final[Advice]
    MERGEABLE: Final[Advice]
    NOHUGEPAGE: Final[Advice]
    PAGEOUT: Final[Advice]
    POPULATE_READ: Final[Advice]
    POPULATE_WRITE: Final[Advice]
    UNMERGEABLE: Final[Advice]
    def __hash__(self) -> int: ...

@final
class KeptUserfault:
    """Userfaultfd of which its process keeps a copy, so that blocked threads stay blocked if this process exits."""

    @property
    def descriptor(self) -> int:
        """Descriptor in this process, which the caller closes."""
    @property
    def number(self) -> int | None:
        """Number of the descriptor in the process; None for our own process."""

@final
class Space:
    """Address space of a process; without an argument, of our own. Opening it does not affect the process.

    A system call in another process is executed by ptrace, which stops the process for less than a millisecond. Such a
    call raises OSError with the errno of the call; PermissionError or ProcessLookupError if it cannot be executed.
    """

    def __new__(cls, pid: int | None = None) -> Space: ...
    @property
    def pid(self) -> int: ...
    def missing_faults(self, *, discards: bool = False) -> KeptUserfault:
        """Create a userfaultfd for a `Pager`. With `discards`, it reports memory that is discarded, for example by a
        balloon."""
    def write_traces(self) -> KeptUserfault:
        """Create a userfaultfd for traces that a `Saver` leaves or takes up."""
    def descriptor(self, number: int) -> int:
        """Return a duplicate of a descriptor of the process (pidfd_getfd)."""
    def collapse(self, address: int, length: int) -> None:
        """Back a range by huge pages, or map existing huge pages as such (process_madvise, MADV_COLLAPSE)."""
    def madvise(self, address: int, length: int, advice: Advice) -> None:
        """Advise the kernel about a range. COLD, COLLAPSE and PAGEOUT do not stop the process (process_madvise); the
        process itself executes all other advice."""
    def make_read_only(self, address: int, length: int) -> None:
        """Make a mapping read-only (mprotect)."""
    def mmap(self, length: int) -> int:
        """Map private memory, readable and writable, at an address that the kernel chooses. Return the address."""
    def munmap(self, address: int, length: int) -> None:
        """Unmap a range of another process."""
    def ioctl(self, descriptor: int, request: int, argument: int) -> int:
        """Make another process call ioctl(2) on one of its descriptors. `argument` is a number, or an address in that
        process. Return the result."""
    def close_fd(self, number: int) -> None:
        """Close a descriptor of another process."""
    def getppid(self) -> int:
        """Return the result of getppid(2), executed by another process: proof that it executes calls."""
    def present(self, address: int, length: int) -> list[_Range]:
        """Return the parts of a range whose pages are mapped, as (start, end)."""
    def large_mapped(self, address: int, length: int) -> list[_Range]:
        """Return the parts of a range that are mapped as huge pages, as (start, end)."""

@final
class MappedSegment:
    """Part of a region that a process maps."""

    def __new__(
        cls, space: Space, address: int, length: int, region: int = 0, first_page: int = 0
    ) -> MappedSegment: ...
    @property
    def space(self) -> Space:
        """Address space of the process."""
    @property
    def address(self) -> int: ...
    @property
    def length(self) -> int:
        """Bytes."""
    @property
    def region(self) -> int:
        """Index of the region."""
    @property
    def first_page(self) -> int:
        """First page of the region that is mapped at `address`."""

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
        segments: Sequence[MappedSegment],
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

_Section = tuple[int, bytes]
"""Kind of a section (see `pageferry.images.metadata`), and its contents."""

_Range = tuple[int, int]
"""Start and end of a range: bytes, addresses or pages, as the call says. The end is exclusive."""

_Extent = tuple[int, int]
"""Address or offset of a part of memory or of a file, and its length, bytes."""

class _ImageFormat(TypedDict, total=False):
    codec: str
    """Codec of the page blocks: none, lz4 (default) or zstd."""
    page_block: int
    """Unit of compression, bytes (default: 64 KiB)."""
    storage_block: int
    """Unit of reading, bytes (default: 1 MiB)."""

@final
class WrittenImage:
    """Complete image file."""

    @property
    def digest(self) -> int:
        """Checksum of the footer (`Image.digest`)."""
    @property
    def length(self) -> int:
        """Size of the file, bytes."""

@final
class ImageWriter:
    """Writer of images from given storage blocks, for tests."""

    def __new__(cls, fd: int, id: bytes, **format: Unpack[_ImageFormat]) -> ImageWriter: ...
    def append(self, region: int, pages: Sequence[tuple[int, bytes]]) -> int:
        """Write (page of the region, contents) pairs as one storage block. Return its number."""
    def section(self, kind: int, contents: bytes) -> None: ...
    def finish(self, regions: int, entries: Sequence[tuple[int, bool, int, int, int]]) -> WrittenImage:
        """Write the page map, given as (class, in parent, signature, storage block, slot), and the index."""

@final
class PageStore:
    """Writer of images from selected pages of regions, while the workload may write to them. `regions` are their
    numbers of pages.

    The user of the image must know which pages were written in the meantime. Raises OSError if the image cannot be
    written.
    """

    def __new__(cls, fd: int, id: bytes, regions: Sequence[int], **format: Unpack[_ImageFormat]) -> PageStore: ...
    def add(self, region: int, memory: Mapping, pages: PageSet) -> PageSet:
        """Add the present pages among `pages`. Return these pages."""
    def finish(self, sections: Sequence[_Section], parent: ImageChain | None = None) -> WrittenImage:
        """Write the index and sync. Pages that were not added refer to `parent`."""

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
class TargetRegion:
    """Region whose contents a `Placer` or `Pager` provides. `large` lists the 2 MiB units that are huge at the source
    or in the image; missing ones are not."""

    def __new__(cls, mapping: Mapping, page_size: int, large: Sequence[bool] = ...) -> TargetRegion: ...
    @property
    def mapping(self) -> Mapping:
        """Our mapping of the file."""
    @property
    def page_size(self) -> int:
        """Page size of the file, bytes."""

@final
class PagerCounters:
    """Counters of a `Pager`."""

    @property
    def faults(self) -> int:
        """Faults."""
    @property
    def missed(self) -> int:
        """Faults on deferred pages."""
    @property
    def loaded(self) -> int:
        """Pages loaded."""
    @property
    def prefetched(self) -> int:
        """Pages loaded in the background."""
    @property
    def bytes_read(self) -> int:
        """Bytes read from the image, or received from the peer."""
    @property
    def service(self) -> float:
        """Total service time of the faults, seconds."""
    @property
    def longest(self) -> float:
        """Longest service time of a fault, seconds."""

@final
class Failure:
    """Page that a `Pager` could not load."""

    @property
    def region(self) -> int:
        """Index of the region."""
    @property
    def page(self) -> int:
        """Page within the region."""
    @property
    def accessed(self) -> bool:
        """Whether a thread waits for the page."""
    @property
    def message(self) -> str:
        """Reason."""

@final
class Pager:
    """Pager: loads pages on demand, from an image or a peer, and all others in the background (S8, S10).

    `userfaults` maps the ID of every process of `segments` to a descriptor from
    `Space.missing_faults`. `flags` is the descriptor of the deferred bitmap, a file of `flags_length` bytes from which
    another pager can take over: bit n (little-endian) belongs to page n of all regions.

    With `begin` = `empty`, the files must not be mapped by other processes than those of `segments`. Otherwise deferred
    pages that are mapped are unmapped. Raises OSError if a running workload maps them again.

    Dropping the pager leaves the workload blocked at its next access to a deferred page.
    """

    def __new__(
        cls,
        source: ImageChain | PeerSource,
        targets: Sequence[TargetRegion],
        segments: Sequence[MappedSegment],
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
    def counters(self) -> PagerCounters: ...
    @property
    def histogram(self) -> list[int]:
        """Faults by service time: bin k counts those of at least 2**(k - 1) us and less than 2**k us."""
    @property
    def touched(self) -> list[int]:
        """Windows of 16 pages in the order of their first fault on a deferred page."""
    @property
    def failures(self) -> list[Failure]:
        """Pages that could not be loaded."""
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
class SplitPage:
    """Huge page that a `Sampler` could not restore."""

    @property
    def address(self) -> int:
        """Address of the huge page."""
    @property
    def reason(self) -> str:
        """Error of the kernel."""

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
    def split(self, pages: Sequence[int], *, marked: bool) -> None:
        """Split the mappings of registered pages. With `marked` (shared memory), unmap their base pages, so that
        accesses map them."""
    def cool(self, pages: Sequence[int]) -> None:
        """Clear the accessed bits of pages and flush the TLB (MADV_COLD). Locked memory is not affected."""
    def touched(self, pages: Sequence[int]) -> list[bytes]:
        """Return which base pages of each page are mapped, as 512 bits (little-endian)."""
    def restore(self) -> list[SplitPage]:
        """Unregister all pages, and map those that were split as huge pages again. Return those that stay split."""

@final
class Populated:
    """Pages that a `Placer` has mapped into the workload's page tables."""

    @property
    def large(self) -> int:
        """Huge pages mapped as such."""
    @property
    def small(self) -> int:
        """Base pages mapped."""
    @property
    def failed(self) -> int:
        """Huge pages left to their first access."""
    @property
    def seconds(self) -> float:
        """Time in all workers, seconds."""

@final
class Placer:
    """Placer of received pages in their slots (S6, S7), which populates the workload's page tables (S1, S5).

    `targets` are the regions, in new files. With `workers` > 0, units are mapped into the workload's page tables as
    soon as all of their slots have been received.
    """

    def __new__(
        cls,
        targets: Sequence[TargetRegion],
        segments: Sequence[MappedSegment],
        *,
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
    def populated(self) -> Populated: ...
    def populate(self, region: int, units: Sequence[int]) -> None:
        """Map the 2 MiB units of a region of which all pages have been received.

        Raises ValueError if there is no such region or unit.
        """
    def allocate_ahead(self, region: int, units: Sequence[int]) -> None:
        """Allocate huge pages for those of the 2 MiB units that are huge at the source, unless they have been
        allocated."""
    def finish(self, *, populate_rest: bool) -> None:
        """Wait for the workers. With `populate_rest`, then map all other present pages by UFFDIO_CONTINUE.

        Holes, including zero pages of units backed by base pages, are left to their first access.
        """

@final
class ProcessRange:
    """Range of the memory of a process that can be saved, regardless of its backing. It is read by process_vm_readv."""

    def __new__(cls, space: Space, address: int, length: int) -> ProcessRange: ...
    def data_ranges(self) -> list[_Range]:
        """Return the ranges that are present in memory or swap, as (start, end)."""

class _SaverOptions(_ImageFormat, total=False):
    parent: ImageChain | None
    """Chain of parent images. Pages that it holds are not stored again."""
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
class SaveCounters:
    """Counters of a `Saver`."""

    @property
    def traps(self) -> int:
        """Writes that were trapped."""
    @property
    def early_traps(self) -> int:
        """Traps before the snapshot point."""
    @property
    def swept(self) -> int:
        """Blocks saved by the sweep."""
    @property
    def staging_waits(self) -> int:
        """Traps that waited for the staging buffer."""
    @property
    def longest_trap(self) -> int:
        """Longest trap, ns."""
    @property
    def trap_time(self) -> int:
        """Total time in traps, ns."""
    @property
    def pages(self) -> int:
        """Pages classified."""
    @property
    def absent(self) -> int:
        """Pages not in memory; complete after `finish`."""
    @property
    def zero(self) -> int:
        """Pages of zeros."""
    @property
    def pattern(self) -> int:
        """Pages of one repeated word."""
    @property
    def same_as(self) -> int:
        """Pages equal to another page of the image."""
    @property
    def data(self) -> int:
        """Pages stored."""
    @property
    def in_parent(self) -> int:
        """Pages stored in the parent."""
    @property
    def stored(self) -> int:
        """Bytes in storage blocks."""
    @property
    def blocks(self) -> int:
        """Storage blocks."""
    @property
    def writes(self) -> int:
        """Write calls."""
    @property
    def written(self) -> int:
        """Pages that a trace has reported as written."""

@final
class SaveFinished:
    """Image written by a `Saver`."""

    @property
    def digest(self) -> int:
        """Checksum of the footer (`Image.digest`)."""
    @property
    def length(self) -> int:
        """Size of the file, bytes."""
    @property
    def writes(self) -> int:
        """Write calls."""
    @property
    def blocks(self) -> int:
        """Storage blocks."""

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
        segments: Sequence[MappedSegment],
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
    def finish(self, sections: Sequence[_Section]) -> SaveFinished:
        """Wait for all threads, add sections, write the index and sync."""
    @property
    def counters(self) -> SaveCounters: ...
    def close(self) -> None:
        """Cancel the checkpoint if it is in progress, and wait for its threads."""

@final
class SendProgress:
    """Pages sent or received over streams so far; without arguments, none."""

    def __new__(cls) -> SendProgress: ...
    @property
    def bytes(self) -> int:
        """Bytes transferred."""
    @property
    def blocks(self) -> int:
        """Storage blocks."""
    @property
    def data(self) -> int:
        """Pages with contents."""
    @property
    def zero(self) -> int:
        """Pages of zeros."""
    @property
    def absent(self) -> int:
        """Pages that are holes."""
    @property
    def pages(self) -> int:
        """All pages."""
    def __hash__(self) -> int: ...

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

class _SendOptions(TypedDict, total=False):
    codec: str
    """Codec of the page blocks: none (default), lz4 or zstd."""
    timeout: float
    """Time without a transferred byte after which a stream has failed, seconds (default: 30)."""
    bandwidth: int
    """Bandwidth limit of all streams together, bytes per second; 0 (default) means unlimited."""
    adaptive: bool
    """Whether blocks are not compressed while the link is faster than the codec (default: False)."""

class _BlockSenderOptions(_SendOptions, total=False):
    page_block: int
    """Unit of compression, bytes (default: 64 KiB)."""
    storage_block: int
    """Unit of sending, bytes (default: 512 KiB)."""

@final
class BlockSender:
    """Sender of pages in storage blocks, over connected stream sockets (the descriptors are duplicated).

    Raises ConnectionResetError if the peer closes a stream, TimeoutError if no byte is transferred for `timeout`
    seconds, InterruptedError if cancelled, PermissionError for a TLS error, OSError. After an error the streams are out
    of step and must be closed.
    """

    def __new__(cls, sockets: Sequence[_Stream], **options: Unpack[_BlockSenderOptions]) -> BlockSender: ...
    def send(self, regions: Sequence[Mapping], pages: Sequence[PageSet], round: int, *, barrier: bool = True) -> None:
        """Send the pages of one set per region. With `barrier`, end the round on every stream.

        Pages that have been freed since they were sent are sent as holes, because no trace reports them.
        """
    @property
    def progress(self) -> SendProgress: ...
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
    def progress(self) -> SendProgress: ...
    def cancel(self) -> None: ...

@final
class PageServer:
    """Source side of post-copy: serves the pages of a paused workload, requested pages first.

    `missing` are the pages of each region that the destination lacks. `urgent` is a connection for requests and
    replies; `streams` are connections for all other pages. All of them must be new: not used for rounds before.
    Replies count for the bandwidth limit without waiting for it. After a lost connection, create another server for
    the pages that are missing then.
    """

    def __new__(
        cls,
        regions: Sequence[Mapping],
        missing: Sequence[PageSet],
        urgent: _Stream,
        streams: Sequence[_Stream],
        **options: Unpack[_SendOptions],
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
    def progress(self) -> SendProgress: ...
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
    def progress(self) -> SendProgress: ...

@final
class PageCounts:
    """Numbers of pages of an image by class. A page in the parent has no other class."""

    @property
    def absent(self) -> int:
        """Pages without contents."""
    @property
    def zero(self) -> int:
        """Pages of zeros."""
    @property
    def pattern(self) -> int:
        """Pages of one repeated word."""
    @property
    def same_as(self) -> int:
        """Pages equal to another page of the image."""
    @property
    def data(self) -> int:
        """Pages with contents of their own."""
    @property
    def in_parent(self) -> int:
        """Pages whose contents are in the parent."""

@final
class Finding:
    """Damage that a verification has found."""

    @property
    def page(self) -> int | None:
        """Page, counted over all regions; None for a storage block to which no page refers."""
    @property
    def message(self) -> str:
        """Description."""

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
    def blocks(self) -> list[_Extent]:
        """Offset and length of every storage block."""
    def section(self, kind: int) -> bytes | None: ...
    def classes(self, first: int, count: int) -> bytes:
        """Return the class of each page, as bytes: 0 absent, 1 zero, 2 pattern, 3 same as another, 4 data."""
    def count(self, first: int, count: int) -> PageCounts:
        """Count the pages of a range by class."""

@final
class ImageChain:
    """Image and its parents, nearest first."""

    def __new__(cls, images: Sequence[Image]) -> ImageChain: ...
    def read(self, first: int, count: int) -> bytes:
        """Read and verify pages. Raises ValueError if a block is damaged or if the image of a page is not in the
        chain."""
    def differences(self, other: ImageChain, first: int, count: int) -> list[_Range]:
        """Return the pages of a range whose contents differ, as runs (start, end)."""
    @property
    def stored(self) -> int:
        """Number of pages stored in the first image."""
    def verify(self, first: int, count: int, limit: int) -> list[Finding]:
        """Compare stored pages `first` to `first + count` with their signatures. Return up to `limit` findings."""
    def verify_unused(self) -> list[Finding]:
        """Verify the storage blocks to which no page refers."""
    def flatten(
        self,
        fd: int,
        id: bytes,
        regions: Sequence[int],
        sections: Sequence[_Section],
        **format: Unpack[_ImageFormat],
    ) -> WrittenImage:
        """Write the chain as one image to an empty file, and sync. `regions` are their numbers of pages."""

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
class ClassCounts:
    """Numbers of duplicate pages by class."""

    @property
    def zero(self) -> int:
        """Pages of zeros."""
    @property
    def pattern(self) -> int:
        """Pages of one repeated word with at least one duplicate."""
    @property
    def inside(self) -> int:
        """Other pages with a duplicate in the same workload."""
    @property
    def across(self) -> int:
        """Other pages with duplicates in other workloads only."""

@final
class ScannedUnit:
    """Scanned 2 MiB unit."""

    @property
    def piece(self) -> int:
        """Index of the piece."""
    @property
    def position(self) -> int:
        """Offset in the mapping, or address."""
    @property
    def length(self) -> int:
        """Bytes; less than 2 MiB at the end of a piece."""
    @property
    def large(self) -> bool:
        """Whether the unit is, or will be, a huge page."""
    @property
    def present(self) -> int:
        """Pages in memory."""
    @property
    def deferred(self) -> int:
        """Pages that a pager has not loaded yet."""
    @property
    def shared(self) -> int:
        """Pages that are shared already."""
    @property
    def counts(self) -> ClassCounts:
        """Duplicate pages."""

@final
class SharingTotals:
    """Duplicate pages of all scanned units."""

    @property
    def pages(self) -> ClassCounts:
        """Duplicate pages."""
    @property
    def freed(self) -> ClassCounts:
        """Pages that sharing would free."""

@final
class FreedZeros:
    """Result of `free_zeros`."""

    @property
    def ranges(self) -> int:
        """Ranges processed."""
    @property
    def pages(self) -> int:
        """Pages freed."""

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
    def units(self) -> list[ScannedUnit]: ...
    @property
    def totals(self) -> SharingTotals: ...
    def curve(self, order: Sequence[int], pages_per_copy: int = 256, *, possible: bool = False) -> list[int]:
        """Return the numbers of pages freed by sharing all shareable pages of the first 1, 2, 3... units (by index) of
        `order`.

        One copy per `pages_per_copy` pages is kept; zero pages need none. With `possible`, only zero pages of shared
        files count.
        """

def free_zeros(
    mapping: Mapping,
    ranges: Sequence[_Extent],
    seconds: float,
    waiting: tuple[PagerFlags, int] | None = None,
) -> FreedZeros:
    """Punch the zero pages in `ranges` (start, length) of a file, for at most about `seconds`.

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

def hugetlbfs(size: int) -> int:
    """Like `large_tmpfs`, of hugetlbfs with pages of 2 MiB."""

def file_system_type(fd: int) -> int:
    """Return the type of the file system of an open file (`f_type` of statfs(2)); O_PATH suffices. Raises OSError."""

def userfaultfd(*, user_mode_only: bool) -> int:
    """Create a userfaultfd of this process by the system call, without features. For probes. Raises OSError."""

def read_memory(address: int, length: int) -> bytes:
    """Return mapped memory of this process. For probes: may wait until another thread resolves a fault."""

def write_memory(address: int, contents: bytes) -> None:
    """Write to mapped memory of this process. For probes: may wait until another thread resolves a fault."""

def kernel_reads(address: int) -> None:
    """Make the kernel read a byte at an address, for probes. Raises OSError EFAULT if it cannot."""

def kernel_writes(address: int, contents: bytes) -> int:
    """Make the kernel write up to a page of bytes to an address, for probes. Return the number of bytes written.

    Raises OSError EFAULT.
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
class Stalls:
    """Durations of the operations of a `Ledger`."""

    def __new__(cls, longest: int, histogram: Sequence[int]) -> Stalls: ...
    @property
    def longest(self) -> int:
        """Longest operation, ns."""
    @property
    def histogram(self) -> list[int]:
        """Number of operations that took 2**n up to 2**(n+1) ns, by n."""

class _LedgerOptions(TypedDict, total=False):
    threads: int
    """Number of threads, and of partitions (default: 1)."""
    seed: int
    """Seed of all contents and choices (default: 1)."""
    rate: int | None
    """Limit of the writes of all threads together, bytes per second; None (default) means unlimited."""
    working_set: float
    """Fraction of the used pages that is rewritten (default: 1)."""
    scatter: bool
    """Whether the working set is spread over the used pages (default: False, the first ones)."""
    skew: float
    """With skew k, the first fraction x of the working set receives x**(1/k) of the writes (default: 1)."""
    zero_fraction: float
    """Fraction of the writes that zero a page (default: 0)."""
    fill: float
    """Fraction of the pages that is used (default: 1)."""
    compressible: float
    """Fraction of each page that is a repeated word (default: 0)."""

@final
class Ledger:
    """Built-in workload for demonstrations and tests: threads that rewrite self-describing pages of a mapping.

    The memory contains a header, counters, a table of versions and the pages; all of it is migrated. `verify` detects
    lost, stale and torn writes; the documentation of the crate `pageferry-ledger` explains how. Each thread owns one
    partition of the pages. Several processes may each run a share of the partitions of the same memory.

    Methods raise ValueError if an option is out of range, if the memory is too small or if it does not contain a
    ledger, and RuntimeError if the operation is not allowed in the current state of the threads.
    """

    @staticmethod
    def create(mapping: Mapping, *, large_fraction: float | None = None, **options: Unpack[_LedgerOptions]) -> Ledger:
        """Create a ledger in new memory and fill it, without starting the threads.

        With `large_fraction`, the fraction of the 2 MiB units that may be huge pages, all others are excluded.
        """
    @staticmethod
    def attach(mapping: Mapping, *, first_thread: int = 0, threads: int | None = None) -> Ledger:
        """Open the ledger in existing memory, to run `threads` partitions from `first_thread` on (None: all)."""
    @property
    def options(self) -> _LedgerOptions:
        """Options of `create`."""
    @property
    def pages(self) -> int:
        """Number of body pages."""
    @property
    def filled(self) -> int:
        """Number of body pages that are used."""
    @property
    def state(self) -> Literal["stopped", "running", "pausing", "paused"]:
        """State of the threads of this object."""
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
    def stalls(self, *, reset: bool = False) -> Stalls:
        """Return the durations of the operations of this object's threads, and forget them with `reset`."""
    def page_offset(self, number: int) -> int:
        """Return the offset of body page `number` in the mapping."""

@final
class FileMapping:
    """Shared mapping of one of the files given to `scan_mappers`."""

    @property
    def file(self) -> int:
        """Index of the file."""
    @property
    def pid(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def length(self) -> int:
        """Bytes."""
    @property
    def offset(self) -> int:
        """Offset in the file, bytes."""
    @property
    def writable(self) -> bool: ...

@final
class Mappers:
    """Result of `scan_mappers`."""

    @property
    def mappings(self) -> list[FileMapping]:
        """Shared mappings of the files."""
    @property
    def writers(self) -> list[int]:
        """Process ID for each descriptor of a file that is open for writing."""
    @property
    def unreadable(self) -> list[int]:
        """Processes that may not be inspected."""

def scan_mappers(files: Sequence[tuple[int, int, int]]) -> Mappers:
    """Find the processes that map files or have them open for writing, in /proc, without the GIL.

    `files` are given as (st_dev, st_ino, device in /proc/PID/maps). Raises OSError.
    """

def own_mappings() -> list[_Extent]:
    """Return the address and length of every `Mapping` of this process."""
