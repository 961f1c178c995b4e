"""Event logs of runs of each kind, in the form in which the verbs write them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from pageferry.checkpoints import events as checkpoint
from pageferry.errors import NotConverging
from pageferry.events import Event, Latency
from pageferry.large_pages import events as large
from pageferry.large_pages.estimate import estimate
from pageferry.migration import events as migration
from pageferry.report.event_log import EventLog, header
from pageferry.sharing import events as sharing

MIB = 1 << 20
Told = Iterable[tuple[float, Event]]


def written(path: Path, verb: str, arguments: dict[str, object], told: Told, error: Exception | None = None) -> None:
    """Write the log of a run of `verb` to `path`.

    `told`: events, each with the seconds since the start; `error`: error with which the run fails, None for success.
    """
    now = 0.0
    log = EventLog(path, header(verb, arguments), lambda: now)
    for at, event in told:
        now = at
        log.event(event)
    now += 0.01
    log.end(getattr(error, "exit_code", 1) if error is not None else 0, error)


def _rounds() -> list[tuple[float, Event]]:
    maps = [
        migration.LargeMap.of("ram0", 1024 * MIB, [unit % 7 < 5 for unit in range(512)]),
        migration.LargeMap.of("bios", MIB // 4, [False]),
    ]
    told: list[tuple[float, Event]] = [
        (
            0.05,
            migration.SetupEvent(
                peer="[::1]:7070", memory=1024 * MIB, present=700 * MIB, large_pages=365, install_ms=2
            ),
        ),
        (0.06, migration.LargePagesEvent(side="source", regions=maps)),
    ]
    sent = ((131072, 400, 90, 1200.0), (23040, 80, 22, 250.0), (5632, 19, 4, 60.0), (1024, 3, 1, 12.0))
    at = 0.1
    for number, (pages, mib, left, ms) in enumerate(sent, 1):
        at += ms / 1e3
        rate = round(left * MIB / ms * 1e3)
        told.append(
            (
                at,
                migration.RoundEvent(
                    round=number,
                    pages=pages,
                    sent=mib * MIB,
                    remaining=left * MIB,
                    ms=ms,
                    mbps=round(mib * MIB * 8 / 1e3 / ms, 1),
                    dirty_rate=rate,
                ),
            )
        )
    return told


def _migrated() -> migration.MigrationResult:
    """Return the result of a successful pre-copy migration."""
    parts = migration.Downtime(total=21.4, stop=0.6, last_pages=5.2, device_state=9.1, populate=0.4, resume=0.3)
    return migration.MigrationResult(
        status="completed",
        mode="precopy",
        workload="web",
        peer="[::1]:7070",
        total_time=1612.0,
        setup_time=50.0,
        downtime=parts.total,
        downtime_parts=parts,
        transferred=503 * MIB,
        memory=1024 * MIB,
        normal=130000,
        duplicate=4000,
        skipped=82944,
        dirty_sync_count=6,
        mbps=2617.0,
        large_pages=migration.LargePageCount(source=365, destination=364, fallbacks=1),
        populated=migration.PopulateCount(mode="all", large=364, small=900, failed=0, work_ms=9.0),
        faults_after_resume=migration.FaultCount(minor=3, major=0),
        trace=migration.TraceCount(granularity="auto", install_ms=2.0, released_units=4),
    )


def migrate(path: Path) -> None:
    """Write the log of a successful migration."""
    told = _rounds()
    after = [migration.LargeMap.of("ram0", 1024 * MIB, [unit % 7 < 5 and unit != 14 for unit in range(512)])]
    told.append((2.7, migration.LargePagesEvent(side="destination", regions=after)))
    told.append((2.71, _migrated()))
    written(path, "migrate", {"name": "web", "address": "[::1]:7070", "max_downtime": 0.3}, told)


def postcopy(path: Path) -> None:
    """Write the log of a post-copy migration."""
    told = _rounds()[:3]
    for step in range(12):
        left = 90 * MIB * (11 - step) // 11
        event = migration.PostcopyEvent(
            status="postcopy-active", remaining=left, postcopy_requests=40 * step, mbps=900.0
        )
        told.append((1.4 + step * 0.1, event))
    bins = [0, 0, 0, 0, 0, 10, 200, 150, 60, 20, 8, 3]
    late = migration.PostcopyCount(
        time=1100.0, pages=23040, faults=sum(bins), service_us=110.0, waits=Latency.of(bins, 1900.0)
    )
    told.append((2.6, msgspec.structs.replace(_migrated(), mode="postcopy", postcopy=late, postcopy_requests=440)))
    written(path, "migrate", {"name": "web", "address": "[::1]:7070", "mode": "postcopy"}, told)


def copied(path: Path) -> None:
    """Write the log of a migration that copied two disks."""
    told = _rounds()
    for step in range(1, 9):
        event = migration.DiskProgressEvent(
            done=step * 256 * MIB, total=2048 * MIB, remaining=(8 - step) * 256 * MIB, ready=step == 8, sent=0, mbps=2e3
        )
        told.insert(1 + step, (0.05 + step * 0.01, event))
    disks = [migration.DiskCopy(name=name, path=f"/images/{name}.raw", size=1024 * MIB) for name in ("root", "data")]
    told.append((2.71, msgspec.structs.replace(_migrated(), disks=disks, disks_transferred=2048 * MIB)))
    written(path, "migrate", {"name": "web", "address": "[::1]:7070", "copy_disks": True}, told)


def failed(path: Path) -> None:
    """Write the log of a migration that did not converge."""
    error = NotConverging("web modifies 900 MiB/s and the link takes <400> MiB/s & no more")
    written(path, "migrate", {"name": "web", "address": "[::1]:7070"}, _rounds(), error)


def save(path: Path) -> None:
    """Write the log of a lazy checkpoint."""
    told: list[tuple[float, Event]] = [
        (0.02, checkpoint.ArmedEvent(memory=1024 * MIB, present=700 * MIB, large_pages=350, arm_ms=3.0)),
        (0.03, checkpoint.InstantEvent(downtime=3.4)),
    ]
    for step in range(1, 21):
        done, stored = 179200 * step // 20, 310 * MIB * step // 20
        told.append(
            (0.03 + step * 0.1, checkpoint.SavingEvent(done=done, total=179200, traps=90 * step, stored=stored))
        )
    parts = checkpoint.Downtime(total=3.4, stop=0.8, device_state=1.6, protect=0.2, save=0.0, resume=0.4)
    told.append(
        (
            2.1,
            checkpoint.CheckpointResult(
                status="completed",
                workload="web",
                image="/images/web.img",
                id="00",
                digest="01",
                parent=None,
                tracking="none",
                tracking_note="",
                tracked=False,
                written=0,
                rounds=0,
                mode="lazy",
                codec="lz4",
                total_time=2080.0,
                arm_time=3.0,
                downtime=3.4,
                downtime_parts=parts,
                memory=1024 * MIB,
                pages=checkpoint.PageCount(
                    absent=82944, zero=31000, pattern=2000, same_as=6200, data=140000, in_parent=0
                ),
                bytes_written=311 * MIB,
                writes=300,
                mean_write=MIB,
                blocks=4375,
                traps=1800,
                trap_details=checkpoint.TrapCount(before=3, longest_us=910.0, mean_us=44.0, staging_waits=0),
                compression=1.78,
            ),
        )
    )
    written(path, "checkpoint", {"name": "web", "image": "/images/web.img"}, told)


def bring(path: Path) -> None:
    """Write the log of a complete lazy restore."""
    chance = random.Random(3)
    memory, left, missed = 1024 * MIB, 800 * MIB, 60
    told: list[tuple[float, Event]] = [
        (0.42, checkpoint.RunningEvent(workload="web2", time_to_running=61.2, deferred=left)),
        (0.5, checkpoint.TouchedEvent(windows=[100 + number for number in range(60)])),
    ]
    for step in range(30):
        left = int(left * 0.8) if step < 29 else 0
        windows = [3000 + step * 40 + number for number in range(12)] + [chance.randrange(16384) for _ in range(18)]
        missed += len(windows)
        at = 0.7 + step * 0.2
        told.append((at, checkpoint.TouchedEvent(windows=windows)))
        told.append(
            (
                at,
                checkpoint.ProgressEvent(
                    deferred=left,
                    faults=2 * missed,
                    missed=missed,
                    prefetched=6000 * step,
                    bytes_read=10 * MIB * step,
                    failures=[],
                ),
            )
        )
    bins = [0, 0, 0, 3, 40, 210, 420, 260, 90, 30, 12, 4, 2]
    told.append(
        (
            6.6,
            checkpoint.RestoreResult(
                status="completed",
                workload="web2",
                image="/images/web.img",
                time_to_running=61.2,
                time_parts=checkpoint.TimeToRunning(
                    total=400.0, qemu_start=338.8, open_image=4.1, adopt=9.4, device_state=40.2, resume=7.5
                ),
                memory=memory,
                deferred=0,
                faults=sum(bins),
                missed=missed,
                prefetched=174000,
                bytes_read=310 * MIB,
                service_us=44.0,
                longest_us=3100.0,
                service_times=Latency.of(bins, 3100.0),
            ),
        )
    )
    written(path, "restore", {"name": "web2", "image": "/images/web.img", "command": ["qemu", "-m", "1G"]}, told)


def look(path: Path) -> None:
    """Write the log of a sampling of huge pages. All samples have page maps, except those of private memory."""
    chance = random.Random(5)
    samples = []
    for number in range(60):
        touched = 0
        for _ in range(chance.choice((0, 2, 9, 40, 300))):
            touched |= 1 << chance.randrange(512)
        anonymous = number % 20 == 19
        samples.append(
            large.Sample(
                pid=4711,
                address=0x7F0000000000 + number * 2 * MIB,
                region="" if anonymous else "ram0",
                kind="anon" if anonymous else "shared",
                activity=touched.bit_count(),
                touched=None if anonymous else f"{touched:0128x}",
                decision="break" if touched.bit_count() < 8 else "keep",
            )
        )
    counts = [sample.activity for sample in samples]
    histogram = [0] * 11
    for count in counts:
        histogram[count.bit_length()] += 1
    result = large.LargePagesResult(
        target="web",
        window_ms=200.0,
        rounds=1,
        regions=[
            large.RegionActivity(
                name="ram0", kind="shared", bytes=1024 * MIB, large_pages=480, sampled=57, idle=11, mean=60.0
            ),
            large.RegionActivity(name="", kind="anon", bytes=64 * MIB, large_pages=30, sampled=3, idle=0, mean=70.0),
        ],
        samples=samples,
        histogram=histogram,
        estimate=estimate(counts, 510),
        reclaimed=0,
        broken=0,
        restored=60,
        not_restored=0,
        overhead=large.Overhead(cpu_ms=3.0, fraction=0.009, budget=0.01, faults=4000, per_page_us=50.0),
        skipped=[],
    )
    event = large.SampleEvent(round=1, sampled=60, idle=11, mean=60.0, cpu_ms=3.0)
    written(path, "large-pages", {"target": "web"}, [(0.25, event), (0.27, result)])


def share(path: Path) -> None:
    """Write the log of a scan for identical pages."""
    curve, free = [], 40 * MIB
    for number in range(200):
        curve.append(sharing.Point(number, free, free * 2 // 3))
        free += max(2 * MIB - number * 11000, 0)
    result = sharing.SharingResult(
        workloads=["web", "web2"],
        memory=1400 * MIB,
        large_pages=520,
        already_shared=0,
        reclaimable=curve[-1].reclaimable,
        possible=curve[-1].possible,
        classes={
            "zero": sharing.Class(30000, 117 * MIB),
            "pattern": sharing.Class(2000, 7 * MIB),
            "inside": sharing.Class(9000, 30 * MIB),
            "across": sharing.Class(40000, 80 * MIB),
        },
        curve=curve,
        scan=sharing.ScanReport(1400 * MIB, 480.0, 1, 1),
        threshold=128,
        not_shareable=[],
    )
    written(path, "sharing", {"names": ["web", "web2"]}, [(0.1, sharing.ScanEvent(10, 20)), (0.5, result)])


MAKERS: dict[str, Callable[[Path], None]] = {
    "migrate": migrate,
    "copied": copied,
    "postcopy": postcopy,
    "failed": failed,
    "checkpoint": save,
    "restore": bring,
    "large-pages": look,
    "sharing": share,
}
