"""Migrate, save and optimise the memory of running workloads from outside.

::

    arena = pageferry.Arena(1 << 30)                  # migratable buffer for numpy and others
    pageferry.migrate(arena, "127.0.0.1:7070")        # to a receiver, while the arena is in use
    arena = pageferry.receive("127.0.0.1:7070")       # at the destination
    pageferry.checkpoint(arena, "table.img")          # while the arena is in use
    arena = pageferry.restore("table.img")            # returns at once; memory is loaded on demand

`dump` and `load` save and restore any picklable object; its arrays are loaded on demand::

    pageferry.dump({"x": x, "y": y}, "data.img")
    data = pageferry.load("data.img")

After a migration whose outcome is unknown (`errors.OutcomeUnknown`), `recover` requests the outcome from the receiver,
and `take_back` resumes the arena at the source. `large_pages` estimates how much of each huge page of a process is
used, and reclaims cold memory; `sharing` finds duplicate pages, and merges them where it pays off. `errors` defines the
exceptions. The command `pageferry` provides the same operations for QEMU guests.

`run_guest` starts a QEMU guest, `checkpoint_guest` saves it, and `restore_guest` and `clone` start guests from an
image. `adopt` registers a guest that another program has started. `pause`, `resume`, `shutdown` and `stop` control the
guests of this host by their names, `logs` returns their output, `console` opens their serial console, and `monitor` and
`qmp` execute commands of QEMU's monitor. `commit_disks` writes overlays back to the disks that a checkpoint has frozen.
`image_info` describes an image, `verify_image` verifies it, `compare_images` compares two, `flatten_image` merges an
image with its parents, and `delete_image` deletes an image. `push_image` and `pull_image` copy an image to and from an
object store, and `copy_image` between stores; `list_images` lists the images of a store, and `collect_garbage` frees
its space. Checkpoints and restores accept the URL of an image in a store; `list_cache` and `clear_cache` manage the
images in the cache. `fleet` places, clones, moves and saves the workloads of many hosts.
`import_image` writes an image of a snapshot of Firecracker, `export_image` writes the snapshot back, and `serve` loads
the memory of microVMs from an image on demand.
"""

from typing import TYPE_CHECKING

from pageferry.lazy import lazily

if TYPE_CHECKING:
    from pageferry import errors, fleet, large_pages, sharing
    from pageferry.checkpoints.clone import clone, clone_async
    from pageferry.checkpoints.clone_options import CloneArguments
    from pageferry.checkpoints.cloud_hypervisor import checkpoint_cloud_hypervisor, checkpoint_cloud_hypervisor_async
    from pageferry.checkpoints.events import CheckpointResult, CloneInfo, CloneResult, RestoreResult
    from pageferry.checkpoints.options import CheckpointArguments
    from pageferry.checkpoints.restore_arena import RestoredArena, restore, restore_async
    from pageferry.checkpoints.restore_options import GuestArguments, RestoreArguments
    from pageferry.checkpoints.save import checkpoint, checkpoint_async
    from pageferry.control.adopting import adopt, adopt_async
    from pageferry.control.cache import clear_cache, list_cache
    from pageferry.control.console import Console, console, console_async
    from pageferry.control.disks import commit_disks, commit_disks_async
    from pageferry.control.events import DisksCommitted, ImageDeleted, RunStateResult, StopResult
    from pageferry.control.guests import (
        checkpoint_guest,
        checkpoint_guest_async,
        restore_guest,
        restore_guest_async,
        run_guest,
        run_guest_async,
    )
    from pageferry.control.images import (
        compare_images,
        export_image,
        flatten_image,
        image_info,
        import_image,
        verify_image,
    )
    from pageferry.control.logs import logs, logs_async
    from pageferry.control.monitor import monitor, monitor_async, qmp, qmp_async
    from pageferry.control.options import AdoptArguments, CommitArguments, LogArguments, ShutdownArguments
    from pageferry.control.pausing import pause, pause_async, resume, resume_async
    from pageferry.control.serving import serve, serve_async
    from pageferry.control.shutdown import shutdown, shutdown_async
    from pageferry.control.stopping import stop, stop_async
    from pageferry.control.stores import (
        check_store,
        check_store_async,
        collect_garbage,
        collect_garbage_async,
        copy_image,
        copy_image_async,
        delete_image,
        delete_image_async,
        list_images,
        list_images_async,
        pull_image,
        pull_image_async,
        push_image,
        push_image_async,
    )
    from pageferry.events import Event, Listener
    from pageferry.images.events import (
        Difference,
        ExportedSnapshot,
        Flattened,
        ImageSummary,
        ImportedSnapshot,
        Verification,
    )
    from pageferry.migration.api import migrate, migrate_async, recover, recover_async, take_back, take_back_async
    from pageferry.migration.events import MigrationResult
    from pageferry.migration.options import MigrationArguments, RecoverArguments
    from pageferry.migration.receiving import ReceiveArguments, receive, receive_async
    from pageferry.objects.arrays import Arrays
    from pageferry.objects.buffers import StoredBuffer, StoredBuffers, open_buffers, open_buffers_async
    from pageferry.objects.dump import DumpResult, dump, dump_async
    from pageferry.objects.load import LoadArguments, arena_of, load, load_async
    from pageferry.pager.firecracker.events import ServeResult, Serving
    from pageferry.pager.firecracker.options import ServeArguments
    from pageferry.stores.events import (
        CacheCleared,
        CacheListing,
        GarbageCollected,
        ImagePulled,
        ImagePushed,
        StoreCheck,
        StoreListing,
    )
    from pageferry.stores.options import CollectArguments, KeyArguments, OpenArguments, PushArguments
    from pageferry.workloads.arena.arena import Arena
    from pageferry.workloads.arena.attach import attach, attach_async
    from pageferry.workloads.arena.options import ArenaArguments
    from pageferry.workloads.arena.shared import SharedArena
    from pageferry.workloads.events import WorkloadInfo
    from pageferry.workloads.handles import AttachedArena

__all__ = [
    "AdoptArguments",
    "Arena",
    "ArenaArguments",
    "Arrays",
    "AttachedArena",
    "CacheCleared",
    "CacheListing",
    "CheckpointArguments",
    "CheckpointResult",
    "CloneArguments",
    "CloneInfo",
    "CloneResult",
    "CollectArguments",
    "CommitArguments",
    "Console",
    "Difference",
    "DisksCommitted",
    "DumpResult",
    "Event",
    "ExportedSnapshot",
    "Flattened",
    "GarbageCollected",
    "GuestArguments",
    "ImageDeleted",
    "ImagePulled",
    "ImagePushed",
    "ImageSummary",
    "ImportedSnapshot",
    "KeyArguments",
    "Listener",
    "LoadArguments",
    "LogArguments",
    "MigrationArguments",
    "MigrationResult",
    "OpenArguments",
    "PushArguments",
    "ReceiveArguments",
    "RecoverArguments",
    "RestoreArguments",
    "RestoreResult",
    "RestoredArena",
    "RunStateResult",
    "ServeArguments",
    "ServeResult",
    "Serving",
    "SharedArena",
    "ShutdownArguments",
    "StopResult",
    "StoreCheck",
    "StoreListing",
    "StoredBuffer",
    "StoredBuffers",
    "Verification",
    "WorkloadInfo",
    "adopt",
    "adopt_async",
    "arena_of",
    "attach",
    "attach_async",
    "check_store",
    "check_store_async",
    "checkpoint",
    "checkpoint_async",
    "checkpoint_cloud_hypervisor",
    "checkpoint_cloud_hypervisor_async",
    "checkpoint_guest",
    "checkpoint_guest_async",
    "clear_cache",
    "clone",
    "clone_async",
    "collect_garbage",
    "collect_garbage_async",
    "commit_disks",
    "commit_disks_async",
    "compare_images",
    "console",
    "console_async",
    "copy_image",
    "copy_image_async",
    "delete_image",
    "delete_image_async",
    "dump",
    "dump_async",
    "errors",
    "export_image",
    "flatten_image",
    "fleet",
    "image_info",
    "import_image",
    "large_pages",
    "list_cache",
    "list_images",
    "list_images_async",
    "load",
    "load_async",
    "logs",
    "logs_async",
    "migrate",
    "migrate_async",
    "monitor",
    "monitor_async",
    "open_buffers",
    "open_buffers_async",
    "pause",
    "pause_async",
    "pull_image",
    "pull_image_async",
    "push_image",
    "push_image_async",
    "qmp",
    "qmp_async",
    "receive",
    "receive_async",
    "recover",
    "recover_async",
    "restore",
    "restore_async",
    "restore_guest",
    "restore_guest_async",
    "resume",
    "resume_async",
    "run_guest",
    "run_guest_async",
    "serve",
    "serve_async",
    "sharing",
    "shutdown",
    "shutdown_async",
    "stop",
    "stop_async",
    "take_back",
    "take_back_async",
    "verify_image",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "AdoptArguments": "pageferry.control.options",
        "Arena": "pageferry.workloads.arena.arena",
        "ArenaArguments": "pageferry.workloads.arena.options",
        "Arrays": "pageferry.objects.arrays",
        "AttachedArena": "pageferry.workloads.handles",
        "CacheCleared": "pageferry.stores.events",
        "CacheListing": "pageferry.stores.events",
        "CheckpointArguments": "pageferry.checkpoints.options",
        "CheckpointResult": "pageferry.checkpoints.events",
        "CloneArguments": "pageferry.checkpoints.clone_options",
        "CloneInfo": "pageferry.checkpoints.events",
        "CloneResult": "pageferry.checkpoints.events",
        "CollectArguments": "pageferry.stores.options",
        "CommitArguments": "pageferry.control.options",
        "Console": "pageferry.control.console",
        "Difference": "pageferry.images.events",
        "ExportedSnapshot": "pageferry.images.events",
        "ImportedSnapshot": "pageferry.images.events",
        "ServeArguments": "pageferry.pager.firecracker.options",
        "ServeResult": "pageferry.pager.firecracker.events",
        "Serving": "pageferry.pager.firecracker.events",
        "DisksCommitted": "pageferry.control.events",
        "DumpResult": "pageferry.objects.dump",
        "Event": "pageferry.events",
        "Flattened": "pageferry.images.events",
        "GarbageCollected": "pageferry.stores.events",
        "GuestArguments": "pageferry.checkpoints.restore_options",
        "ImageDeleted": "pageferry.control.events",
        "ImagePulled": "pageferry.stores.events",
        "ImagePushed": "pageferry.stores.events",
        "ImageSummary": "pageferry.images.events",
        "KeyArguments": "pageferry.stores.options",
        "Listener": "pageferry.events",
        "LoadArguments": "pageferry.objects.load",
        "LogArguments": "pageferry.control.options",
        "MigrationArguments": "pageferry.migration.options",
        "MigrationResult": "pageferry.migration.events",
        "OpenArguments": "pageferry.stores.options",
        "PushArguments": "pageferry.stores.options",
        "ReceiveArguments": "pageferry.migration.receiving",
        "RecoverArguments": "pageferry.migration.options",
        "RestoreArguments": "pageferry.checkpoints.restore_options",
        "RestoreResult": "pageferry.checkpoints.events",
        "RestoredArena": "pageferry.checkpoints.restore_arena",
        "RunStateResult": "pageferry.control.events",
        "SharedArena": "pageferry.workloads.arena.shared",
        "ShutdownArguments": "pageferry.control.options",
        "StopResult": "pageferry.control.events",
        "StoreCheck": "pageferry.stores.events",
        "StoreListing": "pageferry.stores.events",
        "StoredBuffer": "pageferry.objects.buffers",
        "StoredBuffers": "pageferry.objects.buffers",
        "Verification": "pageferry.images.events",
        "WorkloadInfo": "pageferry.workloads.events",
        "adopt": "pageferry.control.adopting",
        "adopt_async": "pageferry.control.adopting",
        "arena_of": "pageferry.objects.load",
        "attach": "pageferry.workloads.arena.attach",
        "attach_async": "pageferry.workloads.arena.attach",
        "check_store": "pageferry.control.stores",
        "check_store_async": "pageferry.control.stores",
        "checkpoint": "pageferry.checkpoints.save",
        "checkpoint_async": "pageferry.checkpoints.save",
        "checkpoint_cloud_hypervisor": "pageferry.checkpoints.cloud_hypervisor",
        "checkpoint_cloud_hypervisor_async": "pageferry.checkpoints.cloud_hypervisor",
        "checkpoint_guest": "pageferry.control.guests",
        "checkpoint_guest_async": "pageferry.control.guests",
        "clear_cache": "pageferry.control.cache",
        "clone": "pageferry.checkpoints.clone",
        "clone_async": "pageferry.checkpoints.clone",
        "collect_garbage": "pageferry.control.stores",
        "collect_garbage_async": "pageferry.control.stores",
        "commit_disks": "pageferry.control.disks",
        "commit_disks_async": "pageferry.control.disks",
        "compare_images": "pageferry.control.images",
        "console": "pageferry.control.console",
        "console_async": "pageferry.control.console",
        "copy_image": "pageferry.control.stores",
        "copy_image_async": "pageferry.control.stores",
        "delete_image": "pageferry.control.stores",
        "delete_image_async": "pageferry.control.stores",
        "dump": "pageferry.objects.dump",
        "dump_async": "pageferry.objects.dump",
        "errors": "pageferry.errors",
        "export_image": "pageferry.control.images",
        "fleet": "pageferry.fleet",
        "flatten_image": "pageferry.control.images",
        "image_info": "pageferry.control.images",
        "import_image": "pageferry.control.images",
        "large_pages": "pageferry.large_pages",
        "list_cache": "pageferry.control.cache",
        "list_images": "pageferry.control.stores",
        "list_images_async": "pageferry.control.stores",
        "load": "pageferry.objects.load",
        "load_async": "pageferry.objects.load",
        "logs": "pageferry.control.logs",
        "logs_async": "pageferry.control.logs",
        "migrate": "pageferry.migration.api",
        "migrate_async": "pageferry.migration.api",
        "monitor": "pageferry.control.monitor",
        "monitor_async": "pageferry.control.monitor",
        "open_buffers": "pageferry.objects.buffers",
        "open_buffers_async": "pageferry.objects.buffers",
        "pause": "pageferry.control.pausing",
        "pause_async": "pageferry.control.pausing",
        "pull_image": "pageferry.control.stores",
        "pull_image_async": "pageferry.control.stores",
        "push_image": "pageferry.control.stores",
        "push_image_async": "pageferry.control.stores",
        "qmp": "pageferry.control.monitor",
        "qmp_async": "pageferry.control.monitor",
        "receive": "pageferry.migration.receiving",
        "receive_async": "pageferry.migration.receiving",
        "recover": "pageferry.migration.api",
        "recover_async": "pageferry.migration.api",
        "restore": "pageferry.checkpoints.restore_arena",
        "restore_async": "pageferry.checkpoints.restore_arena",
        "restore_guest": "pageferry.control.guests",
        "restore_guest_async": "pageferry.control.guests",
        "resume": "pageferry.control.pausing",
        "resume_async": "pageferry.control.pausing",
        "run_guest": "pageferry.control.guests",
        "run_guest_async": "pageferry.control.guests",
        "serve": "pageferry.control.serving",
        "serve_async": "pageferry.control.serving",
        "sharing": "pageferry.sharing",
        "shutdown": "pageferry.control.shutdown",
        "shutdown_async": "pageferry.control.shutdown",
        "stop": "pageferry.control.stopping",
        "stop_async": "pageferry.control.stopping",
        "take_back": "pageferry.migration.api",
        "take_back_async": "pageferry.migration.api",
        "verify_image": "pageferry.control.images",
    },
)
