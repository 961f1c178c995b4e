"""Images that another pager may have to open again: those of restores in progress, of clones and of bases."""

from __future__ import annotations

from pageferry.errors import WorkloadError
from pageferry.host.registry import Folder, Registry
from pageferry.pager import base_records, records
from pageferry.pager.records import Deferred


def recorded_images(registry: Registry) -> set[str]:
    """Return the paths of the images in the records of all workloads of this host. Raises UsageError."""
    found = set()
    for name in registry.entries():
        folder = Folder(registry, name)
        try:
            deferred = folder.load(records.RECORD, Deferred)
            clone = base_records.clone_record(folder)
        except WorkloadError:
            continue  # no pager can use an unreadable record
        found |= {record.image for record in (deferred, clone) if record is not None}
    for base in base_records.base_folders(registry):
        found |= {program.record.image for program in base.programs()}
        if (record := base.load()) is not None:
            found.add(record.image)
    return found
