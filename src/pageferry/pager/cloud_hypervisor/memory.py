"""Memory of a VM of Cloud Hypervisor that is restored: a file of this process per memory slot, and its pager.

Cloud Hypervisor maps the files. With loading on demand, it handles the page faults of its guest itself: it requests
each page over a socket before it maps the page, and requests all other pages in ascending order. The pager answers the
requests (`Pager.answer_requests`), and loads pages in the background. It has no address space to watch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from logging import getLogger

from pageferry._engine import Mapping, Pager, Space, TargetRegion
from pageferry.errors import ImageError
from pageferry.host import proc
from pageferry.host.memory_file import create_ram_file
from pageferry.host.smaps import smaps
from pageferry.images.image import ImageFile
from pageferry.images.working_set import WorkingSet
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.pager import eager, records
from pageferry.pager.cloud_hypervisor.slots import Slot
from pageferry.pager.fill_order import FillOrder, fill_order
from pageferry.pager.firecracker.options import ServeOptions

log = getLogger(__name__)


class VmMemory:
    """Files for the memory slots of a VM, and the pager that loads their contents. `close` closes the files, which
    Cloud Hypervisor keeps open.

    The constructor allocates no pages. Raises UnsupportedError if there is too little memory of hugetlbfs.
    """

    def __init__(self, image: ImageFile, slots: Sequence[Slot], options: ServeOptions) -> None:
        self.slots = slots
        self.files: list[int] = []
        """Descriptors of the files, in the order of the slots."""
        self.pager: Pager | None = None
        self._image = image
        self._options = options
        self._page_sizes = [region.page_size for region in image.metadata.regions]
        try:
            for slot, page_size in zip(slots, self._page_sizes, strict=True):
                file = create_ram_file(slot.file_length, hugetlb=page_size == LARGE_PAGE)
                self.files.append(file.fd)
                if file.warning is not None:
                    log.warning("%s: %s", slot.region, file.warning)
        except BaseException:
            self.close()
            raise

    def load(self, report: eager.Report) -> None:
        """Load all contents. Raises ImageError for a page that cannot be read."""
        self.pager = eager.load(self._image, self._targets(), report)

    def serve(self) -> Pager:
        """Start the pager, which loads pages on request and in the background. Raises ImageError, OSError."""
        flags = records.create_flags(None, Pager.flags_length(self._image.pages))
        options, order = self._options, FillOrder((), ())
        if options.prefetch:
            order = fill_order(self._image, WorkingSet(self._image).windows)
        try:
            self.pager = Pager(
                self._image.chain,
                self._targets(),
                [],
                {},
                flags,
                windows=order.windows,
                blocks=order.blocks,
                fill=("eager" if options.eager else "gentle") if options.prefetch else "none",
            )
        except ValueError as error:
            raise ImageError(f"cannot load {self._image.path}: {error}; take another checkpoint") from error
        finally:
            os.close(flags)
        return self.pager

    def _targets(self) -> list[TargetRegion]:
        # All of the memory is in huge pages: a VM that loads on demand allocates all of its memory.
        return [
            TargetRegion(Mapping(file, slot.size, slot.file_offset), page_size, [True] * -(-slot.size // LARGE_PAGE))
            for file, slot, page_size in zip(self.files, self.slots, self._page_sizes, strict=True)
        ]

    @property
    def ranges(self) -> list[tuple[int, int, int, int]]:
        """Guest physical addresses of the regions, for `Pager.answer_requests`."""
        return [(slot.gpa, slot.size, number, 0) for number, slot in enumerate(self.slots)]

    def reports_present(self, pid: int) -> bool:
        """Return whether the userfaultfd of Cloud Hypervisor reports accesses to pages that are present in the files
        (MINOR faults). Raises WorkloadDied, UnsupportedError."""
        mapped = [one for one in smaps(pid) if one.mapping.shared and one.mapping.inode in self._inodes()]
        return bool(mapped) and all("ui" in one.flags for one in mapped)

    def _inodes(self) -> set[int]:
        return {os.fstat(file).st_ino for file in self.files}

    def map_large(self, pid: int) -> None:
        """Map the huge pages of the files by PMD entries in Cloud Hypervisor, which has mapped base pages and no longer
        handles page faults. After a failure, base pages stay mapped."""
        inodes = self._inodes()
        with contextlib.suppress(OSError):
            space = Space(pid)
            for mapping in proc.mappings(pid):
                if mapping.shared and mapping.inode in inodes:
                    _collapse(space, mapping.address, mapping.length)

    def learn(self) -> None:
        """Record the windows of pages for which the guest has waited, for the next restore of the image."""
        if self.pager is not None and self.pager.touched:
            WorkingSet(self._image).learn(self.pager.touched, self._options.prefetch)

    @property
    def deferred(self) -> int:
        """Deferred memory, bytes."""
        return self.pager.pending * SMALL_PAGE if self.pager is not None else self._image.pages * SMALL_PAGE

    def close(self) -> None:
        """Stop the pager and close the files. May be called twice."""
        pager, self.pager = self.pager, None
        if pager is not None:
            pager.stop()
        while self.files:
            os.close(self.files.pop())


def _collapse(space: Space, address: int, length: int) -> None:
    for start in range(-(-address // LARGE_PAGE) * LARGE_PAGE, address + length - LARGE_PAGE + 1, LARGE_PAGE):
        with contextlib.suppress(OSError):  # a unit that is no longer a huge page
            space.collapse(start, LARGE_PAGE)
