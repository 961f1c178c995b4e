"""Rust engine: per-page and per-fault mechanisms. This stub is the reference of its interface.

Lengths, offsets and addresses are in bytes unless stated otherwise. Calls that take longer than 50 us release the GIL,
and long calls check for signals. The deallocation of an object that frees much memory or joins threads releases the
GIL too. Operations of `PageSet`, and the conversion of results to objects of Python, keep the GIL. Errors of system
calls are raised as OSError with their errno.
"""

from collections.abc import Sequence
from typing import Final, Literal, Self, TypedDict, Unpack, final

from typing_extensions import Buffer, disjoint_base

SMALL_PAGE: int
"""Size of a base page in bytes: 4096."""
LARGE_PAGE: int
"""Size in bytes of a huge page, and of a 2 MiB unit: 2097152."""

@disjoint_base
class Mapping:
    """Shared mapping of a file, or of a part of a file, aligned to 2 MiB in our address space. The mapping supports the
    buffer protocol.

    `memoryview(m)` and `numpy.frombuffer(m, ...)` return writable views without a copy. The constructor duplicates the
    descriptor. `room`: number of bytes of address space to reserve, up to which the mapping can grow.
    """

    def __new__(cls, fd: int, length: int, offset: int = 0, room: int = 0) -> Self: ...
    def grow(self, length: int) -> None:
        """Extend the mapping to `length` bytes of the file, at the same address. Existing buffers keep their length."""
    def replace(self, fd: int) -> None:
        """Replace the memory by a private mapping of a file. The mapping permits no access before `permit` is
        called."""
    def permit(self) -> None:
        """Permit reads and writes after `replace`."""
    def keep(self, fd: int) -> int:
        """Duplicate a descriptor, and return the duplicate, which is closed after the memory has been unmapped."""
    @property
    def address(self) -> int:
        """Address of the first byte."""
    @property
    def length(self) -> int:
        """Length in bytes."""
    def fileno(self) -> int:
        """Return the descriptor of the file. The mapping owns the descriptor."""
    def data_ranges(self) -> list[_Range]:
        """Return the ranges that contain data (SEEK_DATA, SEEK_HOLE), as (start, end). A read outside these ranges
        allocates a page."""
    def large_units(self) -> list[bool]:
        """Return, for each 2 MiB unit, whether it is backed by a huge page. Holes are not filled."""
    def copy_in(self, offset: int, contents: Buffer) -> None:
        """Copy contiguous bytes into the mapping, from a buffer of format `B`. Raises OSError if they do not fit."""
    def discard(self, start: int, length: int) -> None:
        """Free a range of whole pages, which reads as zeros from then on (FALLOC_FL_PUNCH_HOLE). Raises ValueError if
        the range does not consist of whole pages of the mapping."""
    def close_memory(self) -> None:
        """Make the mapping read-only. New buffers are read-only. A write through an existing buffer prints a message
        and terminates this process with SIGSEGV."""
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class PageSet:
    """Set of base pages of a region of `pages` pages. The first page has index 0."""

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
        """Return the set as a compressed bitmap."""
    @staticmethod
    def unpack(data: bytes, pages: int) -> PageSet:
        """Return the set that `pack` has serialised to `data`, for a region of `pages` pages. The call allocates at
        most the memory of one bitmap for the region. Raises ValueError if `data` is not a set of pages of such a
        region."""
    def copy(self) -> PageSet: ...

@final
class Advice:
    """Advice of madvise(2) about a range of memory. `Advice.COLD` stands for MADV_COLD, and so on."""

    COLD: Final[Advice]
    COLLAPSE: Final[Advice]
    DOFORK: Final[Advice]
    DONTDUMP: Final[Advice]
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
class BaseFailure:
    """Failure to load a unit of a base."""

    @property
    def unit(self) -> int: ...
    @property
    def message(self) -> str: ...

@final
class CloneCounters:
    """Counters of a clone of a base; times in seconds."""

    @property
    def faults(self) -> int: ...
    @property
    def missed(self) -> int:
        """Number of faults for which a unit was loaded."""
    @property
    def zeros(self) -> int:
        """Number of faults on units of zeros."""
    @property
    def service(self) -> float: ...
    @property
    def longest(self) -> float: ...

@final
class BasePager:
    """Pager of a base: fills a file with the contents of an image on demand, and resolves the faults of all processes
    that map the file privately.

    `regions`: number of pages of each region. The pages that the file contains are kept. Raises ValueError if the file
    or the regions do not match the image, and OSError for other errors.
    """

    def __new__(cls, chain: ImageChain, descriptor: int, regions: list[int]) -> BasePager: ...
    @staticmethod
    def file_length(regions: list[int]) -> int:
        """Return the length of the file in bytes, for regions with these numbers of pages."""
    @staticmethod
    def register(userfault: int, address: int, length: int) -> None:
        """Register a range for faults on pages that the file does not contain."""
    def add(self, userfault: int, segments: list[MappedSegment]) -> int:
        """Resolve the faults of a process from now on, and wake its waiting threads. Return the number of the clone."""
    def remove(self, number: int) -> None:
        """Stop resolving the faults of a clone."""
    def fill(self, windows: list[int], eager: bool) -> None:
        """Start loading all units in the background, those of the given windows of 16 pages first."""
    def ensure(self, first: int, end: int) -> BaseFailure | None:
        """Load the units from `first` to `end`, unless they are loaded. Return the first unit that cannot be loaded;
        None if all are loaded."""
    def counters(self, number: int) -> CloneCounters:
        """Return the counters of a clone. Raises ValueError if there is no such clone."""
    @property
    def holes(self) -> int:
        """Number of units of 2 MiB that are not loaded yet."""
    @property
    def prefetched(self) -> int:
        """Number of units loaded in the background."""
    @property
    def bytes_read(self) -> int: ...
    @property
    def failures(self) -> list[BaseFailure]: ...
    def stop(self) -> None:
        """Stop all threads. Accesses to missing pages wait until another pager takes over."""

@final
class KeptUserfault:
    """Userfaultfd of another process, or of this one. The other process keeps a descriptor of the userfaultfd open, so
    that its blocked threads stay blocked if this process exits."""

    @property
    def descriptor(self) -> int:
        """Descriptor in this process. The caller must close it."""
    @property
    def number(self) -> int | None:
        """Number of the descriptor in the other process; None for this process."""

@final
class Space:
    """Address space of the process `pid`, by default of this process. Creating the object does not affect the process.

    A system call in another process is injected with ptrace, which stops the process for less than a millisecond. A
    method that makes such a call raises OSError with the errno of the call, or PermissionError or ProcessLookupError if
    the call cannot be injected.
    """

    def __new__(cls, pid: int | None = None) -> Space: ...
    @property
    def pid(self) -> int: ...
    def missing_faults(self, *, discards: bool = False) -> KeptUserfault:
        """Create a userfaultfd for a `Pager`. With `discards`, the userfaultfd reports memory that the process
        discards, for example through a balloon."""
    def write_traces(self) -> KeptUserfault:
        """Create a userfaultfd for the write traces that a `Saver` leaves installed or takes over (see the option
        `traces` of `Saver`)."""
    def descriptor(self, number: int) -> int:
        """Return a duplicate of descriptor `number` of the process (pidfd_getfd)."""
    def collapse(self, address: int, length: int) -> None:
        """Replace the base pages of a range by huge pages, and map huge pages by PMD mappings (process_madvise,
        MADV_COLLAPSE)."""
    def madvise(self, address: int, length: int, advice: Advice) -> None:
        """Advise the kernel about a range. COLD, COLLAPSE and PAGEOUT do not stop the process (process_madvise). For
        any other advice, the process itself calls madvise(2)."""
    def make_read_only(self, address: int, length: int) -> None:
        """Make a range of the process read-only (mprotect)."""
    def map_private(self, address: int, length: int, number: int, offset: int) -> None:
        """Replace the mappings of a range by a private mapping of the file behind descriptor `number` of the process,
        from byte `offset` on. The mapping permits no access before `make_writable`."""
    def make_writable(self, address: int, length: int) -> None:
        """Make a range of the process readable and writable (mprotect)."""
    def lock_on_fault(self, address: int, length: int) -> None:
        """Lock the pages of a range when they are accessed (mlock2, MLOCK_ONFAULT). The process then cannot discard
        them."""
    def mmap(self, length: int) -> int:
        """Map private memory in the process, readable and writable, at an address that the kernel chooses. Return the
        address."""
    def munmap(self, address: int, length: int) -> None:
        """Unmap a range of the process (munmap)."""
    def ioctl(self, descriptor: int, request: int, argument: int) -> int:
        """Make the process call ioctl(2) on one of its descriptors. `argument` is a number, or an address in the
        process. Return the result."""
    def close_fd(self, number: int) -> None:
        """Close a descriptor of the process."""
    def getppid(self) -> int:
        """Return the result of getppid(2) in the process. Probes call this to test whether system calls can be
        injected."""
    def present(self, address: int, length: int) -> list[_Range]:
        """Return the parts of a range whose pages are mapped, as pairs of addresses (start, end)."""
    def large_mapped(self, address: int, length: int) -> list[_Range]:
        """Return the parts of a range that are mapped as huge pages, as pairs of addresses (start, end)."""

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
        """Length in bytes."""
    @property
    def region(self) -> int:
        """Index of the region."""
    @property
    def first_page(self) -> int:
        """Index, within the region, of the page that is mapped at `address`."""

@final
class Trace:
    """Write traces over segments (S2): userfaultfd write protection in asynchronous mode. PAGEMAP_SCAN collects the
    written pages.

    With `release_after` = 0, each base page is traced. With n > 0, a huge page is unprotected after n of its base pages
    were written. It is then mapped as a huge page again, and all of its base pages count as written. `large` states,
    for each 2 MiB unit of each region, whether the unit is backed by a huge page; an omitted region has no huge pages.
    The traces are removed when the object is destroyed or when this process exits.
    """

    def __new__(
        cls,
        segments: Sequence[MappedSegment],
        release_after: int = 0,
        large: Sequence[Sequence[bool]] | None = None,
        userfaults: dict[int, int] | None = None,
        *,
        private: bool = False,
    ) -> Trace:
        """Install the traces. `userfaults` are the userfaultfds of an acquired pager (`Pager.hold`). With them, the
        traces cover base pages, and stay installed until the pager is released.

        With `private`, the segments are private mappings of a base, and `userfaults` those that clones keep. The traces
        report private pages that are written, and pages that become private.
        """
    @property
    def install_seconds(self) -> float: ...
    @property
    def released_units(self) -> int: ...
    def collect(self, dirty: Sequence[PageSet]) -> None:
        """Add the pages written since the last call to `dirty` (one set per region), and protect them again.

        Raises ProcessLookupError if a process has exited, because its last writes are then unknown. Pages found before
        the error are added nevertheless.
        """
    def peek(self, dirty: Sequence[PageSet]) -> None:
        """Add the pages written since the last `collect` to `dirty`, without protecting them: the next `collect`
        reports them again."""
    def release(self, segment: int) -> None:
        """Remove the trace from the segment with index `segment`. Later writes to this segment are not reported."""
    def remove(self) -> None: ...

_Section = tuple[int, bytes]
"""Section of an image: its kind (see `pageferry.images.metadata`) and its contents."""

_Range = tuple[int, int]
"""Start and end of a range, in bytes, addresses or pages as documented by the call. The end is exclusive."""

_Extent = tuple[int, int]
"""Part of memory or of a file: its address or offset, and its length in bytes."""

class _ImageFormat(TypedDict, total=False):
    codec: str
    """Codec of the page blocks: `none`, `lz4` (default) or `zstd`."""
    page_block: int
    """Size in bytes of a page block, the unit of compression (default: 64 KiB)."""
    storage_block: int
    """Maximum size in bytes of a storage block, the unit of reading (default: 1 MiB)."""

@final
class WrittenImage:
    """Result of writing an image file."""

    @property
    def digest(self) -> int:
        """Checksum of the footer (`Image.digest`)."""
    @property
    def length(self) -> int:
        """Size of the file in bytes."""

@final
class ImageWriter:
    """Writer of an image from given storage blocks and a given page map, for tests."""

    def __new__(cls, fd: int, id: bytes, **format: Unpack[_ImageFormat]) -> ImageWriter: ...
    def append(self, region: int, pages: Sequence[tuple[int, bytes]]) -> int:
        """Write one storage block. `pages` contains pairs: index of a page in the region, and contents of the page.
        Return the number of the block."""
    def section(self, kind: int, contents: bytes) -> None: ...
    def finish(self, regions: int, entries: Sequence[tuple[int, bool, int, int, int]]) -> WrittenImage:
        """Write the page map and the index. `entries` contains a tuple for each page: (class, in parent, signature,
        storage block, slot)."""

@final
class PageStore:
    """Writer of an image from selected pages, to which the workload may write at the same time. `regions` contains the
    number of pages of each region.

    The caller must detect which pages the workload has written after they were added. Raises OSError if the image
    cannot be written.
    """

    def __new__(cls, fd: int, id: bytes, regions: Sequence[int], **format: Unpack[_ImageFormat]) -> PageStore: ...
    def add(self, region: int, memory: Mapping, pages: PageSet) -> PageSet:
        """Add those of `pages` that are in memory. Return the set of added pages."""
    def finish(self, sections: Sequence[_Section], parent: ImageChain | None = None) -> WrittenImage:
        """Write the index, and sync the file. Pages that were not added refer to `parent`."""

class _PagerOptions(TypedDict, total=False):
    windows: Sequence[int]
    """Indices of the windows that are loaded first (default: none). A window is 16 pages; windows are counted over all
    regions."""
    blocks: Sequence[tuple[int, int]]
    """Storage blocks that are loaded next (default: none), each as (index of the image in the chain, number of the
    block). Pages that no such block contains are loaded last, one after the other. Raises OSError if a block does not
    exist."""
    begin: Literal["empty", "kept", "taken-over"]
    """Initial state. `empty` (default): the files of the targets are emptied, and all contents are deferred. `kept`:
    the bitmap contains the deferred pages, and the files contain all other pages. `taken-over`: as `kept`, for memory
    that another pager has served."""
    fill: Literal["none", "gentle", "eager"]
    """Background loading of pages that have not been accessed: `none`, `gentle` (default; pauses while faults occur) or
    `eager` (at full speed)."""
    on_failure: Literal["block", "sigbus"]
    """Effect of an access to a page that cannot be loaded: the thread waits (`block`, default) or receives SIGBUS
    (`sigbus`)."""
    whole_blocks: bool
    """Whether a fault loads the whole storage block of its page (default: True)."""
    read_ahead: bool
    """Whether faults in the order of the image also load the next storage blocks (default: True). Has no effect without
    `whole_blocks`."""
    evicting: bool
    """Whether `evict` may be called (default: False)."""
    checks_removals: bool
    """Whether a removal event of a userfaultfd counts as a discard only if the file system reports a punched hole. If
    False (default), every removal event counts as a discard."""

@final
class TargetRegion:
    """Region whose contents a `Placer` or `Pager` provides. `large` states for each 2 MiB unit whether it is a huge
    page at the source or in the image. Units beyond the end of `large` are not huge pages."""

    def __new__(cls, mapping: Mapping, page_size: int, large: Sequence[bool] = ...) -> TargetRegion: ...
    @property
    def mapping(self) -> Mapping:
        """Mapping of the file in this process."""
    @property
    def page_size(self) -> int:
        """Page size of the file in bytes."""

@final
class PrivateRegion:
    """Region of private memory, whose contents a `Pager` installs by UFFDIO_COPY: the memory of a process that has sent
    its userfaultfd. `pages` is its number of base pages. `page_size` is 4096, or 2097152 for memory of hugetlbfs."""

    def __new__(cls, pages: int, page_size: int) -> PrivateRegion: ...
    @property
    def pages(self) -> int:
        """Number of base pages."""
    @property
    def page_size(self) -> int:
        """Page size, bytes."""

@final
class PagerCounters:
    """Counters of a `Pager`."""

    @property
    def faults(self) -> int:
        """Number of page faults read from the userfaultfds."""
    @property
    def missed(self) -> int:
        """Number of faults on deferred pages."""
    @property
    def loaded(self) -> int:
        """Number of pages loaded."""
    @property
    def prefetched(self) -> int:
        """Number of pages loaded in the background."""
    @property
    def bytes_read(self) -> int:
        """Number of bytes read from the image chain or received from the peer."""
    @property
    def service(self) -> float:
        """Total service time of the faults in seconds."""
    @property
    def longest(self) -> float:
        """Longest service time of a fault in seconds."""

@final
class Failure:
    """Page that a `Pager` could not load."""

    @property
    def region(self) -> int:
        """Index of the region; the number of regions for a fault outside all of them."""
    @property
    def page(self) -> int:
        """Index of the page within the region; for a fault outside all regions, within the address space."""
    @property
    def accessed(self) -> bool:
        """Whether a thread has accessed the page and waits for it."""
    @property
    def message(self) -> str:
        """Reason for the failure."""

@final
class Pager:
    """Loader of deferred pages from an image or a peer: accessed pages on demand, all others in the background (S8,
    S10).

    `userfaults` maps the ID of every process of `segments` to a descriptor from `Space.missing_faults`. `flags` is the
    descriptor of the deferred bitmap, a file of `flags_length` bytes. Bit n (little-endian) belongs to page n, counted
    over all regions. Another pager can use this file to take over.

    With `begin` = `empty`, only the processes of `segments` may map the files. With `kept`, deferred pages that are
    mapped are unmapped first; OSError is raised if a running workload maps them again.

    The process of `PrivateRegion` targets has registered their memory for MISSING faults with the userfaultfd, and has
    not accessed it. `begin` must be `empty`; only `evict`, `hold` and `populate` do not apply.

    After the pager has been destroyed, the workload blocks at its next access to a deferred page.
    """

    def __new__(
        cls,
        source: ImageChain | PeerSource,
        targets: Sequence[TargetRegion] | Sequence[PrivateRegion],
        segments: Sequence[MappedSegment],
        userfaults: dict[int, int],
        flags: int,
        **options: Unpack[_PagerOptions],
    ) -> Pager: ...
    @staticmethod
    def flags_length(pages: int) -> int: ...
    @staticmethod
    def set_flags(flags: int, missing: Sequence[PageSet]) -> None:
        """Set the bits of deferred pages in a bitmap file. `flags` is its descriptor; `missing` contains one set per
        region. Call this before a pager uses the file."""
    @property
    def pending(self) -> int:
        """Number of deferred pages."""
    def missing(self, region: int) -> PageSet:
        """Return the deferred pages of a region."""
    @property
    def finished(self) -> bool:
        """Whether all pages are loaded and the memory is unregistered from the userfaultfds."""
    @property
    def counters(self) -> PagerCounters: ...
    @property
    def histogram(self) -> list[int]:
        """Number of faults by service time. Bin 0 counts service times of less than 1 us; bin k counts service times of
        at least 2**(k - 1) us and less than 2**k us. The last bin has no upper limit."""
    @property
    def touched(self) -> list[int]:
        """Indices of the windows of 16 pages with faults on deferred pages, in the order of the first fault in each
        window."""
    @property
    def failures(self) -> list[Failure]:
        """Pages that could not be loaded."""
    def wait(self, timeout: float, known: int = 0) -> bool:
        """Wait until the pager has finished or has more than `known` failures, for at most `timeout` seconds. Return
        whether the pager has finished."""
    def fill(self, windows: Sequence[int], blocks: Sequence[tuple[int, int]], eager: bool = False) -> None:
        """Start loading all pages: these windows first, then these storage blocks, then the other pages; with `eager`,
        at full speed. The pager must have been created with `fill` = `none`. Call this once.

        Raises OSError if a block does not exist."""
    def ensure(self, region: int, first: int, count: int) -> None:
        """Load `count` pages of a region from page `first` on, and return when they are present. This is required
        before any read that bypasses the workload's page tables.

        Raises ValueError if a page is damaged, ConnectionResetError if the connection to the peer is lost, or OSError
        if the pager has been stopped.
        """
    def answer_requests(self, socket: int, ranges: Sequence[tuple[int, int, int, int]]) -> bool:
        """Answer the `PageFault` requests of Cloud Hypervisor that are received on a blocking stream socket, also after
        all pages are loaded. Cloud Hypervisor maps the files of the targets and handles its own page faults.

        `ranges`: guest physical addresses, as (address, length in bytes, region, index of the first page within the
        region). Return whether the peer has abandoned the restore; False if it has closed the socket. To end the call,
        shut the socket down.

        Raises ConnectionAbortedError for an invalid request, ValueError if a page is damaged, OSError for other errors.
        A request for a page that cannot be loaded gets no reply.
        """
    def hold(self) -> dict[int, int] | None:
        """Acquire the pager, so that write traces (`Trace`, `Saver`) can use its userfaultfds until `release` is
        called. Return the descriptor of the userfaultfd for each process ID, or None if the pager has finished or is
        about to finish. The pager continues to load pages; loading a page does not count as a write.

        Raises OSError: EBUSY if the pager is already acquired, EINVAL if the kernel cannot install write traces on its
        userfaultfds, ESRCH if a process has exited.
        """
    def release(self) -> None:
        """Remove the traces and release the pager, which then finishes when all pages are loaded."""
    def large(self, region: int) -> list[bool]:
        """Return, for each 2 MiB unit of a region, whether a huge page will back it when its contents are present."""
    def populate(self) -> None:
        """Map all present pages into the workload's page tables (S1), huge pages by PMD mappings. Call this before the
        workload resumes on existing memory."""
    def reconnect(self, source: PeerSource) -> None:
        """Continue over another connection to the peer, and repeat the pending requests. Raises ValueError if another
        pager uses the connection, or if the pager loads from an image."""
    def evict(self, region: int, pages: PageSet) -> int:
        """Evict pages whose contents are in the image chain. A later access loads them again. Return the number of
        evicted pages.

        The pager must have been created with `evicting`. The workload must be paused, and must not have written to the
        pages since they were stored. Raises OSError if the workload maps the memory nevertheless, or if its mappings
        cannot be changed. Pages that were evicted before the error stay evicted; all other pages are unchanged.
        """
    def evicted(self) -> None:
        """Declare that no more pages will be evicted: the pager finishes when all pages are loaded."""
    def stop(self) -> None:
        """Stop all threads of the pager. Accesses to deferred pages block until another pager takes over."""
    def abandon(self) -> None:
        """Stop all threads of the pager, for a workload that will never resume on this memory. Blocked threads of the
        workload continue, and read zeros from deferred pages."""

@final
class SplitPage:
    """Huge page whose mapping a `Sampler` could not restore."""

    @property
    def address(self) -> int:
        """Address of the huge page."""
    @property
    def reason(self) -> str:
        """Error message of the failed system call."""

@final
class Sampler:
    """Sampler of accesses to the base pages of huge pages of a process (S3). Huge pages are given by their addresses.

    The sampler splits mappings, but never huge pages. It restores the mappings of registered pages when it is
    destroyed.
    """

    def __new__(cls, space: Space) -> Sampler: ...
    def hold(self, pages: Sequence[int]) -> list[int]:
        """Register each huge page with a userfaultfd, so that the huge page becomes a separate mapping. Return the huge
        pages that are no longer mapped.

        Raises OSError EBUSY if a huge page is registered with another userfaultfd.
        """
    def split(self, pages: Sequence[int], *, marked: bool) -> None:
        """Split the PMD mappings of registered huge pages. With `marked` (for shared memory), also unmap their base
        pages: an access then maps the base page again."""
    def cool(self, pages: Sequence[int]) -> None:
        """Clear the accessed bits of huge pages and flush the TLB (MADV_COLD). Locked memory is not affected."""
    def touched(self, pages: Sequence[int]) -> list[bytes]:
        """Return, for each huge page, which of its base pages are mapped, as 512 bits (little-endian)."""
    def restore(self) -> list[SplitPage]:
        """Unregister all huge pages, and restore their PMD mappings. Return the huge pages whose mappings stay
        split."""

@final
class Populated:
    """Pages that a `Placer` has mapped into the workload's page tables."""

    @property
    def large(self) -> int:
        """Number of huge pages mapped by PMD mappings."""
    @property
    def small(self) -> int:
        """Number of base pages mapped."""
    @property
    def failed(self) -> int:
        """Number of huge pages that could not be mapped; their first access maps them."""
    @property
    def seconds(self) -> float:
        """Total time in seconds that the threads have spent on mapping."""

@final
class Placer:
    """Writer of received pages to their slots (S6, S7), which also populates the workload's page tables (S1, S5).

    `targets` are the regions, in new files. With `workers` > 0, that number of threads maps each 2 MiB unit into the
    workload's page tables as soon as all of its pages have been received. With `keep_large`, units that are huge pages
    at the source are allocated as huge pages (S6).
    """

    def __new__(
        cls,
        targets: Sequence[TargetRegion],
        segments: Sequence[MappedSegment],
        *,
        keep_large: bool = True,
        workers: int = 0,
        private: dict[int, int] | None = None,
    ) -> Placer:
        """`private`: for a clone, the userfaultfds with which `segments`, its private mappings of a base, are
        registered, by process id. The targets are then staging files, and an absent page is a page of the base.
        `keep_large` and `workers` have no effect."""
    def move_private(self) -> int:
        """Move the pages of a clone received since the last call from the staging files into its process, and free the
        memory of the files. Return the number of pages. Do not call this while a round is received.

        Raises OSError; ProcessLookupError if the process has exited.
        """
    @property
    def missing(self) -> int:
        """Number of pages that have not been received."""
    @property
    def fallbacks(self) -> int:
        """Number of huge pages of the source for which no huge page could be allocated."""
    @property
    def populated(self) -> Populated: ...
    def populate(self, region: int, units: Sequence[int]) -> None:
        """Map the given 2 MiB units of a region, except units with pages that have not been received.

        Raises ValueError if the region or a unit does not exist.
        """
    def allocate_ahead(self, region: int, units: Sequence[int]) -> None:
        """Allocate huge pages for those of the given 2 MiB units that are huge pages at the source and have not been
        allocated yet."""
    def finish(self, *, populate_rest: bool) -> None:
        """Wait for the workers. With `populate_rest`, map all other present pages afterwards (UFFDIO_CONTINUE).

        Holes are mapped at their first access. Zero pages are holes too, except in units that are backed by huge pages.
        """

@final
class ProcessRange:
    """Memory range of a process, file-backed or anonymous, that a `Saver` reads with process_vm_readv(2).

    `private`: the range is a private mapping of a base. A `Saver` stores its private pages only, and requires a parent
    with the contents of the base. A `BlockSender` sends the private pages only; all other pages are absent. `base`:
    descriptor of the file of the base, and start of the range in it, bytes: a `BlockSender` then sends the pages of the
    base too.
    """

    def __new__(
        cls,
        space: Space,
        address: int,
        length: int,
        *,
        private: bool = False,
        base: tuple[int, int] | None = None,
    ) -> ProcessRange: ...
    def data_ranges(self) -> list[_Range]:
        """Return the ranges that are in memory or swap, as (start, end). With `private`, return the private pages."""
    def overlay(self, start: int, contents: bytes) -> bytes:
        """Return whole pages from byte `start` on, as the process reads them: its private pages, and otherwise
        `contents`, which are the pages of the base. Raises ProcessLookupError, OSError."""

class _SaverOptions(_ImageFormat, total=False):
    parent: ImageChain | None
    """Chain of parent images, or None. Pages whose contents are in the chain are not stored again."""
    trap_block: int
    """Number of bytes that a trap copies and unprotects (default: 64 KiB)."""
    staging: int
    """Size of the staging buffer in bytes (default: 16 MiB)."""
    bandwidth: int
    """Bandwidth limit in bytes per second of the sweep, `copy` and `copy_range`; 0 (default) means unlimited."""
    packers: int
    """Number of compression threads (default: 1)."""
    traces: tuple[Literal["leave", "take-up", "begin", "borrow", "private"], dict[int, int]] | None
    """Use of write traces, and for each process ID the descriptor of its userfaultfd; None for no traces. `leave`:
    install traces at the snapshot point, with userfaultfds from `Space.write_traces`, and leave them installed.
    `take-up`: use the traces that were left when `parent` was saved, and save only the pages that they report. `begin`:
    install traces at once, save all pages in rounds, and leave the traces installed. `borrow`: use the userfaultfds of
    an acquired pager (`Pager.hold`), and save all pages. `private`: use the userfaultfds that clones keep, and save all
    private pages."""

@final
class SaveCounters:
    """Counters of a `Saver`."""

    @property
    def traps(self) -> int:
        """Number of trapped writes."""
    @property
    def early_traps(self) -> int:
        """Number of traps before the snapshot point."""
    @property
    def swept(self) -> int:
        """Number of trap blocks saved by the sweep."""
    @property
    def staging_waits(self) -> int:
        """Number of traps that waited for space in the staging buffer."""
    @property
    def longest_trap(self) -> int:
        """Duration of the longest trap in nanoseconds."""
    @property
    def trap_time(self) -> int:
        """Total duration of all traps in nanoseconds."""
    @property
    def pages(self) -> int:
        """Number of classified pages."""
    @property
    def absent(self) -> int:
        """Number of pages that are not in memory. The count is complete after `finish`."""
    @property
    def zero(self) -> int:
        """Number of pages of zeros."""
    @property
    def pattern(self) -> int:
        """Number of pages of one repeated word."""
    @property
    def same_as(self) -> int:
        """Number of pages identical to another page of the image."""
    @property
    def data(self) -> int:
        """Number of stored pages."""
    @property
    def in_parent(self) -> int:
        """Number of pages whose contents are in the parent."""
    @property
    def stored(self) -> int:
        """Total size of the storage blocks in bytes."""
    @property
    def blocks(self) -> int:
        """Number of storage blocks."""
    @property
    def writes(self) -> int:
        """Number of write calls."""
    @property
    def written(self) -> int:
        """Number of pages that a trace has reported as written."""

@final
class SaveFinished:
    """Image written by a `Saver`."""

    @property
    def digest(self) -> int:
        """Checksum of the footer (`Image.digest`)."""
    @property
    def length(self) -> int:
        """Size of the file in bytes."""
    @property
    def writes(self) -> int:
        """Number of write calls."""
    @property
    def blocks(self) -> int:
        """Number of storage blocks."""

@final
class Saver:
    """Lazy checkpoint (S4): saves memory as of a snapshot point to an empty file while the workload keeps running.

    `regions` are pairs: a `Mapping` or `ProcessRange`, and the page size of its file. The constructor protects
    `segments` while the workload runs. Without segments, the workload must stay paused until `finish` returns. Call, in
    this order: `begin` at the snapshot point, `sweep` when the workload has resumed, `wait` until it returns True,
    `finish`.

    Methods raise OSError with the errno of the failed call (ENOSPC if the disk is full), PermissionError if the kernel
    denies access, InterruptedError if the checkpoint was cancelled, or ProcessLookupError if the workload exited. After
    an error, no memory is protected.
    """

    def __new__(
        cls,
        regions: Sequence[tuple[Mapping | ProcessRange, int]],
        segments: Sequence[MappedSegment],
        fd: int,
        id: bytes,
        **options: Unpack[_SaverOptions],
    ) -> Saver:
        """Protect the segments, or install the traces. The constructor and all calls before `sweep` raise LookupError
        if the traces cannot be used. In this case, save again without traces."""
    @property
    def leaves_traces(self) -> bool:
        """Whether traces that cover all memory since the snapshot point stay installed after `finish`."""
    @property
    def arm_seconds(self) -> float:
        """Time in seconds that the constructor took to start the threads and, unless a trace reports the pages to save,
        to protect all memory."""
    @property
    def pages(self) -> Literal["swept", "written", "all"]:
        """Pages to save. `swept`: all pages, found by traps and the sweep. `written`: the pages that a trace has
        reported since the parent was saved. `all`: all pages, and then those that a new trace reports. With a trace,
        copy pages in rounds while the workload runs. If `all`, call `copy_range` for all pages first. Then call
        `collect` and `scan`, and repeat `copy` and `collect` until few pages remain. `begin` copies the remaining
        pages."""
    def collect(self) -> int:
        """Collect the pages that were written since the last call, and protect them again. Return the number of pages
        to copy."""
    def scan(self) -> int:
        """Find the pages that have lost their contents without a write. Return the number of pages to copy. Call this
        before `begin`."""
    def copy(self) -> None:
        """Copy the collected pages, waiting for space in the staging buffer. Direct I/O must have been drained since
        `collect`."""
    def copy_range(self, region: int, first: int, count: int) -> None:
        """Copy the present pages among `count` pages of a region, from page `first` on. Direct I/O must have been
        drained since the traces were installed."""
    def lost(self) -> bool:
        """Return whether memory has been discarded since the last call. If so, call `scan` again, because copied pages
        may have to be copied once more."""
    def begin(self) -> float:
        """Set the snapshot point. The workload must be paused. Return the duration of the call in seconds."""
    def sweep(self) -> None:
        """Start the sweep, which saves all blocks that no trap has saved."""
    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` until all pages are written or the checkpoint has failed. Return False after a
        timeout."""
    def cancel(self) -> None:
        """Cancel the checkpoint, and unprotect all memory at once."""
    def finish(self, sections: Sequence[_Section]) -> SaveFinished:
        """Wait for all threads, write the sections and the index, and sync the file."""
    @property
    def counters(self) -> SaveCounters: ...
    def close(self) -> None:
        """Cancel the checkpoint if it is in progress, and wait for its threads."""

@final
class SendProgress:
    """Pages that streams have sent or received so far. All counters of a new object are 0."""

    def __new__(cls) -> SendProgress: ...
    @property
    def bytes(self) -> int:
        """Number of bytes transferred."""
    @property
    def blocks(self) -> int:
        """Number of storage blocks."""
    @property
    def data(self) -> int:
        """Number of pages that are neither zero pages nor holes."""
    @property
    def zero(self) -> int:
        """Number of pages of zeros."""
    @property
    def absent(self) -> int:
        """Number of pages that are holes."""
    @property
    def pages(self) -> int:
        """Total number of pages."""
    def __hash__(self) -> int: ...

class TlsError(PermissionError):
    """Error of TLS: the identity of the peer was not accepted, or it has violated the protocol."""

@final
class TlsIdentity:
    """Identity of this host for page streams: a certificate with its intermediate certificates, and its private key,
    both in PEM.

    Raises ValueError if the certificate or the key is invalid or of an unsupported kind, or if they do not match.
    """

    def __new__(cls, certificates: bytes, key: bytes) -> TlsIdentity: ...
    def connect(self, expected: bytes) -> TlsSession:
        """Return the connecting side of a handshake with the peer that has the certificate `expected` (DER)."""
    def accept(self, accepted: Sequence[bytes]) -> TlsSession:
        """Return the accepting side of a handshake with any peer that has one of the certificates `accepted` (DER)."""

@final
class TlsSession:
    """One side of a TLS 1.3 connection, without I/O. Pass received bytes to `feed`, and send the result of `outgoing`.
    Even after an error, send the result, which then contains the TLS alert.

    Methods raise TlsError if the peer is not the expected one or violates the protocol, and ValueError after a stream
    has taken over the session.
    """

    def feed(self, received: bytes) -> None: ...
    def outgoing(self) -> bytes: ...
    @property
    def established(self) -> bool:
        """Whether the handshake is complete on this side. The connecting side cannot know whether the peer has accepted
        the handshake."""
    @property
    def peer_certificate(self) -> bytes | None:
        """Certificate of the peer (DER); None before it has been received."""
    def write(self, data: bytes) -> None:
        """Encrypt data for the peer; `outgoing` returns the ciphertext. The handshake must be complete."""
    def read(self, count: int) -> bytes | None:
        """Return the next `count` bytes from the peer, or None if fewer have been received."""

_Stream = int | tuple[int, TlsSession]
"""Descriptor of a connected socket, alone or with the TLS session established on it. The descriptor is duplicated.
Without a TLS session, the stream is unencrypted."""

class _SendOptions(TypedDict, total=False):
    codec: str
    """Codec of the page blocks: `none` (default), `lz4` or `zstd`."""
    timeout: float
    """Time in seconds without a transferred byte after which a stream counts as failed (default: 30)."""
    bandwidth: int
    """Bandwidth limit in bytes per second of all streams together; 0 (default) means unlimited."""
    adaptive: bool
    """Whether blocks are sent uncompressed while the link is faster than the codec (default: False)."""

class _BlockSenderOptions(_SendOptions, total=False):
    page_block: int
    """Size in bytes of a page block, the unit of compression (default: 64 KiB)."""
    storage_block: int
    """Maximum size in bytes of a storage block, the unit of sending (default: 512 KiB)."""

@final
class BlockSender:
    """Sender of pages in storage blocks over connected stream sockets, whose descriptors are duplicated.

    Methods raise ConnectionResetError if the peer closes a stream, TimeoutError if no byte is transferred for `timeout`
    seconds, InterruptedError if cancelled, TlsError, or OSError for any other failed system call. After an error, the
    position in the streams is undefined; close them.
    """

    def __new__(cls, sockets: Sequence[_Stream], **options: Unpack[_BlockSenderOptions]) -> BlockSender: ...
    def send(
        self,
        regions: Sequence[Mapping | ProcessRange],
        pages: Sequence[PageSet],
        round: int,
        *,
        barrier: bool = True,
    ) -> None:
        """Send the pages of a round; `pages` contains one set per region. With `barrier`, end the round on every
        stream.

        Pages that have been freed since they were sent are also sent, as holes or zero pages, because no trace reports
        them.
        """
    @property
    def progress(self) -> SendProgress: ...
    @property
    def uncompressed(self) -> int:
        """Number of storage blocks that `adaptive` sent uncompressed, including trials."""
    def relay(self, local: int, remote: _Stream) -> Relay:
        """Start a relay between a socket of this host and a connection to the peer. Its bytes share the bandwidth limit
        of the pages."""
    def cancel(self) -> None: ...

@final
class Relay:
    """Relay of a byte stream between `local`, a socket of this host, and a connection to the peer, in both directions.

    The descriptors are duplicated. When one side ends the stream, the relay ends it on the other side. The constructor
    raises OSError.
    """

    def __new__(cls, local: int, remote: _Stream) -> Relay: ...
    @property
    def sent(self) -> int:
        """Number of bytes sent to the peer."""
    @property
    def received(self) -> int:
        """Number of bytes received from the peer."""
    @property
    def ended(self) -> bool:
        """Whether both directions have ended."""
    @property
    def failure(self) -> str | None:
        """Reason why the relay has failed; None if it has not failed, or if it was closed."""
    def close(self) -> None:
        """Close both sockets, and wait until no byte is in transit in this process."""

@final
class BlockReceiver:
    """Receiver of storage blocks, which passes their pages to `placer`.

    Methods raise the same errors as those of `BlockSender`, ValueError if a block is invalid, and OSError ENOMEM if
    memory for its pages cannot be allocated.
    """

    def __new__(cls, sockets: Sequence[_Stream], placer: Placer, timeout: float = 30.0) -> BlockReceiver: ...
    def receive(self, round: int) -> None:
        """Receive blocks until the barrier of the round has been received on every stream."""
    @property
    def progress(self) -> SendProgress: ...
    def cancel(self) -> None: ...

@final
class PageServer:
    """Source side of post-copy: sends the pages of a paused workload, requested pages first.

    `missing` contains, for each region, the pages that the destination lacks. `urgent` is a connection for requests and
    replies; `streams` are connections for all other pages. None of these connections may have been used for rounds.
    Replies count towards the bandwidth limit, but do not wait for it. After a lost connection, create another server
    for the pages that are still missing.
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
        """Push all pages that have not been sent, starting at the last requested page. Return when all have been sent.

        Raises the same errors as `BlockSender`, and ValueError for malformed requests.
        """
    def cancel(self) -> None:
        """Stop the push and the replies to requests. After a successful push, call this only when the destination has
        reported that it has received all pages."""
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
        """Reason why requests are no longer served; None while they are served."""

@final
class PeerSource:
    """Destination side of the connections to a `PageServer`, for one `Pager`. A reply that takes longer than `timeout`
    seconds and a stream that ends early are errors; an idle connection is not."""

    def __new__(cls, urgent: _Stream, streams: Sequence[_Stream], timeout: float = 30.0) -> PeerSource: ...
    @property
    def lost(self) -> str | None:
        """Reason why the connection was lost. None while the connection is usable, and after all pages have been
        received."""
    @property
    def ended(self) -> bool:
        """Whether the peer has ended every stream."""
    @property
    def requests(self) -> int:
        """Number of requests sent."""
    @property
    def progress(self) -> SendProgress: ...

@final
class PageCounts:
    """Numbers of pages of an image by class. Each page is counted once; `in_parent` takes precedence."""

    @property
    def absent(self) -> int:
        """Number of pages without contents."""
    @property
    def zero(self) -> int:
        """Number of pages of zeros."""
    @property
    def pattern(self) -> int:
        """Number of pages of one repeated word."""
    @property
    def same_as(self) -> int:
        """Number of pages identical to another page of the image."""
    @property
    def data(self) -> int:
        """Number of pages stored in the image."""
    @property
    def in_parent(self) -> int:
        """Number of pages whose contents are in the parent."""

@final
class Finding:
    """Damage that a verification has found."""

    @property
    def page(self) -> int | None:
        """Index of the damaged page, counted over all regions; None for a storage block to which no page refers."""
    @property
    def message(self) -> str:
        """Description of the damage."""

@final
class Image:
    """Image file that is open for reading. The constructor duplicates the descriptor, and verifies everything except
    the storage blocks. Raises ValueError if the image is damaged, truncated or of an unsupported version."""

    def __new__(cls, fd: int) -> Image: ...
    def fileno(self) -> int:
        """Return the descriptor of the file. The image owns the descriptor."""
    @property
    def id(self) -> bytes: ...
    @property
    def digest(self) -> int:
        """Checksum of the footer, which covers everything except the contents of storage blocks."""
    @property
    def regions(self) -> int: ...
    @property
    def pages(self) -> int:
        """Number of pages of all regions. Page indices in calls are counted over all regions, in the order of the
        regions."""
    @property
    def length(self) -> int: ...
    @property
    def page_block(self) -> int: ...
    @property
    def block_count(self) -> int:
        """Number of storage blocks."""
    @property
    def blocks(self) -> list[_Extent]:
        """Offset and length of every storage block in bytes."""
    def section(self, kind: int) -> bytes | None: ...
    def classes(self, first: int, count: int) -> bytes:
        """Return the class of each of `count` pages from page `first` on, one byte per page: 0 absent, 1 zero, 2
        pattern, 3 same as another page, 4 data."""
    def count(self, first: int, count: int) -> PageCounts:
        """Count the classes of `count` pages from page `first` on."""

@final
class ImageChain:
    """Chain of images: an image and its ancestors, in the order child, parent, grandparent."""

    def __new__(cls, images: Sequence[Image]) -> ImageChain: ...
    def read(self, first: int, count: int) -> bytes:
        """Read and verify `count` pages from page `first` on, and return their contents. Raises ValueError if a block
        is damaged, or if the image that contains a page is not in the chain."""
    def supply_from(self, socket: int, first: int) -> None:
        """Fetch storage blocks that are missing or damaged in the files of image `first` of the chain and its ancestors
        from the provider at the other end of a socket, whose descriptor is duplicated (see
        `pageferry.stores.provider`). The connection is closed with the last of the images. Raises OSError if one of
        them has a provider."""
    def differences(self, other: ImageChain, first: int, count: int) -> list[_Range]:
        """Return those of `count` pages from page `first` on whose contents differ between the chains, as runs (start,
        end)."""
    @property
    def stored(self) -> int:
        """Number of pages stored in the first image."""
    def verify(self, first: int, count: int, limit: int) -> list[Finding]:
        """Compare `count` of the `stored` pages with their signatures, from index `first` on, in the order of the
        storage blocks. Return up to `limit` findings."""
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
        """Write the contents of the chain as one image to an empty file, and sync the file. `regions` contains the
        number of pages of each region."""

_Piece = tuple[int, Mapping | Space, int, int]
"""Piece of memory to scan: index of the workload, memory, position and length. The position is an offset in the
mapping, or an address in the process."""

@final
class PagerFlags:
    """Deferred bitmap of a pager (S8), for scans of memory while the pager loads its pages. `fd` is the descriptor of
    the bitmap, which covers `pages` pages.

    `image` is the image from which the pager loads; its page map describes the deferred pages. Raises ValueError if the
    image has another number of pages.
    """

    def __new__(cls, fd: int, pages: int, image: Image | None = None) -> PagerFlags: ...

@final
class ClassCounts:
    """Numbers of duplicate pages by class."""

    @property
    def zero(self) -> int:
        """Number of pages of zeros."""
    @property
    def pattern(self) -> int:
        """Number of pages of one repeated word with at least one duplicate."""
    @property
    def inside(self) -> int:
        """Number of other pages with a duplicate in the same workload."""
    @property
    def across(self) -> int:
        """Number of other pages with duplicates only in other workloads."""

@final
class ScannedUnit:
    """Scanned 2 MiB unit."""

    @property
    def piece(self) -> int:
        """Index of the piece."""
    @property
    def position(self) -> int:
        """Offset in the mapping, or address in the process."""
    @property
    def length(self) -> int:
        """Length in bytes; less than 2 MiB only at the end of a piece."""
    @property
    def large(self) -> bool:
        """Whether the unit is a huge page, or will be one when its deferred pages are loaded."""
    @property
    def present(self) -> int:
        """Number of pages in memory."""
    @property
    def deferred(self) -> int:
        """Number of deferred pages."""
    @property
    def shared(self) -> int:
        """Number of pages that are already shared."""
    @property
    def counts(self) -> ClassCounts:
        """Numbers of duplicate pages."""

@final
class SharingTotals:
    """Duplicate pages of all scanned units."""

    @property
    def pages(self) -> ClassCounts:
        """Numbers of duplicate pages."""
    @property
    def freed(self) -> ClassCounts:
        """Numbers of pages that sharing would free."""

@final
class FreedZeros:
    """Result of `free_zeros`."""

    @property
    def ranges(self) -> int:
        """Number of ranges processed."""
    @property
    def pages(self) -> int:
        """Number of pages freed."""

@final
class SharingScan:
    """Scan for duplicate base pages (S9). The scan does not split huge pages.

    Pages that are not in memory are ignored, except deferred pages. `deferred` maps the index of a piece to a tuple:
    bitmap, index of the region's first page, counted over all regions, and for each 2 MiB unit whether it will be a
    huge page. Deferred pages are not loaded: their signatures in the image are compared. Without an image, deferred
    pages are ignored.

    `most_pages` is the maximum number of pages that are recorded, at 24 bytes each. Beyond this number, only one of
    `scale` different contents is recorded, and counts are scaled up. With `every` = n, only every nth 2 MiB unit is
    scanned.
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
        """Sampling factor n: one of n different contents is recorded."""
    def step(self, bytes: int, threads: int) -> int:
        """Scan the next units, up to `bytes` bytes, in `threads` threads. Return the number of bytes scanned; 0 if all
        units have been scanned.

        Raises ProcessLookupError if a process has exited.
        """
    def finish(self) -> None:
        """Find the duplicates among the scanned pages, and complete `units` and `totals`."""
    def units(self) -> list[ScannedUnit]: ...
    @property
    def totals(self) -> SharingTotals: ...
    def curve(self, order: Sequence[int], pages_per_copy: int = 256, *, possible: bool = False) -> list[int]:
        """Return the numbers of pages that are freed if all shareable pages of the first 1, 2, 3... units of `order`
        are shared. `order` contains indices into `units`.

        One copy is kept per `pages_per_copy` duplicates; zero pages need no copy. With `possible`, only pages that can
        be shared count; in a shared file, these are the zero pages.
        """

def free_zeros(
    mapping: Mapping,
    ranges: Sequence[_Extent],
    seconds: float,
    waiting: tuple[PagerFlags, int] | None = None,
) -> FreedZeros:
    """Punch holes for the zero pages in `ranges` of a file, given as (start, length). Stop after about `seconds`
    seconds.

    The workload must be paused, because a concurrent write would be lost. `waiting` consists of the deferred bitmap and
    the index of the mapping's first page in the bitmap. Deferred pages are skipped.
    """

def end_on_truncation(code: int) -> None:
    """Make this process exit with a message and exit code `code` when it accesses mapped memory whose file has been
    truncated.

    The kernel sends SIGBUS for such an access. For any other cause, SIGBUS keeps its default action.
    """

def large_tmpfs(size: int) -> int:
    """Create a detached tmpfs mount of `size` bytes with huge=always. Return a directory descriptor for use with
    O_TMPFILE.

    The mount does not belong to a mount namespace. The kernel frees it when its last descriptor is closed. Raises
    OSError EPERM without CAP_SYS_ADMIN.
    """

def hugetlbfs(size: int) -> int:
    """Create a detached hugetlbfs mount of `size` bytes with pages of 2 MiB, as `large_tmpfs` does for tmpfs."""

def file_system_type(fd: int) -> int:
    """Return the type of the file system of an open file (`f_type` of statfs(2)). The descriptor may have been opened
    with O_PATH. Raises OSError if statfs(2) fails."""

def userfaultfd(*, user_mode_only: bool) -> int:
    """Call userfaultfd(2) for a probe, without features, and return the descriptor. Raises OSError if the call
    fails."""

def read_memory(address: int, length: int) -> bytes:
    """Return, for a probe, the contents of mapped memory of this process. Waits if another thread must resolve a fault
    first."""

def write_memory(address: int, contents: bytes) -> None:
    """Write, for a probe, to mapped memory of this process. Waits if another thread must resolve a fault first."""

def kernel_reads(address: int) -> None:
    """Make the kernel read a byte at an address, for a probe. Raises OSError EFAULT if the kernel cannot read the
    byte."""

def kernel_writes(address: int, contents: bytes) -> int:
    """Make the kernel write up to one page of bytes to an address, for a probe. Return the number of bytes written.

    Raises OSError EFAULT if the kernel cannot write to the address.
    """

@final
class LedgerReport:
    """Result of `Ledger.verify`. Values are numbers of body pages unless stated otherwise."""

    @property
    def pages(self) -> int:
        """Number of all body pages."""
    @property
    def checked(self) -> int:
        """Checked pages. These are all pages that have been written; no other page is read."""
    @property
    def zeros(self) -> int:
        """Checked pages that are zeros, as expected."""
    @property
    def lost(self) -> int:
        """Zero pages that should have contents."""
    @property
    def stale(self) -> int:
        """Intact pages whose version differs from that in their table entry: the page or the entry has missed a
        write."""
    @property
    def misplaced(self) -> int:
        """Intact pages that are copies of other pages."""
    @property
    def torn(self) -> int:
        """Pages that are not intact."""
    @property
    def first_bad(self) -> int | None:
        """Index of the first damaged body page; None if no page is damaged."""
    @property
    def overwritten(self) -> int:
        """Damaged pages that operations of the threads have found and overwritten."""
    @property
    def versions(self) -> int:
        """Sum of all versions in the table."""
    @property
    def writes(self) -> int:
        """Sum of the write counters; equal to `versions` unless a write was lost."""
    @property
    def disagreeing(self) -> int:
        """Number of partitions whose table entries do not match the counters of the partition."""
    @property
    def header(self) -> bool:
        """Whether the header is intact."""
    @property
    def intact(self) -> bool:
        """Whether this verification and all operations have found no damage, and all sums match."""

@final
class Stalls:
    """Durations of the operations of a `Ledger`."""

    def __new__(cls, longest: int, histogram: Sequence[int]) -> Stalls: ...
    @property
    def longest(self) -> int:
        """Duration of the longest operation in nanoseconds."""
    @property
    def histogram(self) -> list[int]:
        """Number of operations by duration. Entry n counts durations of at least 2**n ns and less than 2**(n+1) ns. The
        last entry has no upper limit."""

class _LedgerOptions(TypedDict, total=False):
    threads: int
    """Number of threads, and of partitions (default: 1)."""
    seed: int
    """Seed of all pseudo-random contents and choices (default: 1)."""
    rate: int | None
    """Limit in bytes per second on the write rate of all threads together; None (default) means unlimited."""
    working_set: float
    """Fraction of the used pages that is rewritten (default: 1)."""
    scatter: bool
    """Whether the working set is spread over the used pages. If False (default), it consists of the first used
    pages."""
    skew: float
    """Skew k of the writes, 1 to 1000: the first fraction x of the working set receives x**(1/k) of the writes
    (default: 1)."""
    zero_fraction: float
    """Fraction of the writes that fill a page with zeros (default: 0)."""
    fill: float
    """Fraction of the pages that is used (default: 1)."""
    compressible: float
    """Fraction of each page that consists of one repeated word (default: 0)."""

@final
class Ledger:
    """Built-in workload for demonstrations and tests: threads that rewrite self-describing pages of a mapping.

    The memory contains a header, counters, a table of versions and the body pages. All of it is migrated. `verify`
    detects lost, stale and torn writes; the documentation of the crate `pageferry-ledger` describes the method. Each
    thread owns one partition of the pages. Several processes can map the same memory, and each can run a share of the
    partitions.

    Methods raise ValueError if an option is out of range, or if the memory is too small or does not contain a ledger.
    They raise RuntimeError if the operation is not allowed in the current state of the threads.
    """

    @staticmethod
    def create(mapping: Mapping, *, large_fraction: float | None = None, **options: Unpack[_LedgerOptions]) -> Ledger:
        """Create a ledger in new memory and fill it, without starting the threads.

        `large_fraction` is the fraction of the 2 MiB units that may be backed by huge pages; the other units are
        excluded. None: no unit is excluded.
        """
    @staticmethod
    def attach(mapping: Mapping, *, first_thread: int = 0, threads: int | None = None) -> Ledger:
        """Open the ledger in existing memory, to run `threads` partitions from partition `first_thread` on. None: all
        partitions from `first_thread` on."""
    @property
    def options(self) -> _LedgerOptions:
        """Options with which the ledger was created."""
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
        """Start the threads. With `paused`, they access no memory before `resume` is called."""
    def pause(self) -> None:
        """Pause each thread between two operations, and wait until all are paused. If a signal handler raises an
        exception during the wait, the threads resume."""
    def resume(self) -> None: ...
    def stop(self) -> None:
        """Stop each thread between two operations. The threads can be started again."""
    def verify(self, *, threads: int = 0) -> LedgerReport:
        """Verify all written pages of all partitions, with `threads` threads (0: one per CPU). The ledger must be
        paused in all processes."""
    def digest(self, *, threads: int = 0) -> int:
        """Return a 64-bit hash of all written memory of a paused ledger, computed by `threads` threads (0: one per
        CPU)."""
    def fingerprint(self) -> int:
        """Return a 64-bit hash of the header and the counters. They determine the table, so the hash identifies the
        contents of a paused ledger, although the pages are not read."""
    def table_agrees(self) -> bool:
        """Read the whole table of a paused ledger, and return whether it matches the counters."""
    def writes(self) -> list[int]:
        """Return the number of writes to each partition by all processes, including those that filled it."""
    def stalls(self, *, reset: bool = False) -> Stalls:
        """Return the durations of the operations of this object's threads. If `reset` is true, clear them."""
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
        """Length in bytes."""
    @property
    def offset(self) -> int:
        """Offset in the file, in bytes."""
    @property
    def writable(self) -> bool: ...
    @property
    def engine(self) -> bool:
        """Whether the process has loaded pageferry's engine."""

@final
class Mappers:
    """Result of `scan_mappers`."""

    @property
    def mappings(self) -> list[FileMapping]:
        """Shared mappings of the files."""
    @property
    def writers(self) -> list[int]:
        """Process ID for each descriptor that is open for writing on one of the files."""
    @property
    def unreadable(self) -> list[int]:
        """IDs of the processes that this user is not permitted to inspect."""

def scan_mappers(files: Sequence[tuple[int, int, int]]) -> Mappers:
    """Search /proc, without the GIL, for the processes that map the files or have them open for writing.

    Each of `files` is a tuple: st_dev, st_ino, and the device number that /proc/PID/maps shows. Raises OSError if /proc
    cannot be read.
    """

def own_mappings() -> list[_Extent]:
    """Return the address and length of every `Mapping` of this process."""
