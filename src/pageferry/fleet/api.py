"""Python API of fleets: `pageferry.fleet`, which the commands use too."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

from msgspec.structs import replace

from pageferry import values
from pageferry.errors import FleetError, ImageError, PageferryError, UsageError
from pageferry.events import Listener, ignore
from pageferry.fleet import planning
from pageferry.fleet.cluster import AgentUnreachable, Cluster
from pageferry.fleet.driver import Driver
from pageferry.fleet.events import CloneStarted, FleetCancelled, FleetResult, FleetStatus, Saved, SilentHost
from pageferry.fleet.inventory import identity_of
from pageferry.fleet.model import Demand, Image, Limits, Placed, Plan, Unplaced, View
from pageferry.fleet.options import (
    CheckpointArguments,
    CheckpointOptions,
    CloneArguments,
    CloneOptions,
    ClusterArguments,
    ClusterOptions,
    EvacuateArguments,
    EvacuateOptions,
    MoveArguments,
    MoveOptions,
    RebalanceArguments,
    RebalanceOptions,
    RunArguments,
    RunOptions,
    parse_labels,
)
from pageferry.fleet.protocol import (
    MIGRATE,
    RECEIVE,
    Cancel,
    Checkpoint,
    Clone,
    HostReport,
    Identify,
    Kind,
    Moved,
    OperationReport,
    Run,
)
from pageferry.fleet.starting import complete, new_id, on_hosts, reason_of
from pageferry.fleet.view import reports, view_of
from pageferry.host.blocking import in_thread, synchronous
from pageferry.host.registry import check_name
from pageferry.images.image import open_link
from pageferry.stores.address import is_url

STARTS = 2
"""Number of clones that a host starts at the same time."""
_SUFFIX = ".img"


@contextlib.asynccontextmanager
async def connected(options: ClusterOptions) -> AsyncIterator[Cluster]:
    """Connect to the cluster for the time of the block. Raises FleetError, UnsupportedError, UsageError."""
    cluster = await in_thread(Cluster.connect, options.address, insecure=options.insecure)
    try:
        yield cluster
    finally:
        await asyncio.shield(in_thread(cluster.close))


async def status_async(**options: Unpack[ClusterArguments]) -> FleetStatus:
    """Return the hosts, workloads, images and running operations of a fleet, as its hosts report them.

    `options` are the fields of `pageferry.fleet.options.ClusterOptions`: address (HOST:PORT of the head of the Ray
    cluster), insecure. Raises FleetError if the cluster cannot be used.

    Examples:
        >>> import pageferry
        >>> pageferry.fleet.status(address="127.0.0.1:1")  # no cluster there
        Traceback (most recent call last):
        pageferry.errors.FleetError: cannot connect to Ray at 127.0.0.1:1: ...
    """
    async with connected(values.options(ClusterOptions, options)) as cluster:
        found = await reports(cluster)
        view = view_of(found, draining=await cluster.draining())
    known = {name: one for name, one in found.items() if isinstance(one, HostReport)}
    silent = ((name, one) for name, one in found.items() if isinstance(one, AgentUnreachable))
    return FleetStatus(
        hosts=[host for host in view.hosts if host.name in known],
        workloads=list(view.workloads),
        images=list(view.images),
        operations=list(view.operations),
        silent=[SilentHost(name=name, reason=str(one)) for name, one in silent],
        notes={name: list(one.notes) for name, one in known.items() if one.notes},
    )


status = synchronous(status_async)


async def move_async(
    workload: str, host: str, *, listener: Listener = ignore, **options: Unpack[MoveArguments]
) -> FleetResult:
    """Move a workload of a fleet to a host.

    `listener` receives the `Plan` first, and then the progress of its moves. `options` are the fields of
    `pageferry.fleet.options.MoveOptions`: address, insecure, dry_run (only plan).

    Raises UsageError, FleetError. The result contains the reason if the workload is not on that host afterwards.

    Examples:
        >>> import pageferry
        >>> pageferry.fleet.move("web", "b", address="127.0.0.1:1")  # no cluster there
        Traceback (most recent call last):
        pageferry.errors.FleetError: cannot connect to Ray at 127.0.0.1:1: ...
    """
    chosen = values.options(MoveOptions, options)
    name, destination = values.text("workload", workload), values.text("host", host)
    async with connected(chosen) as cluster:
        view = await _current(cluster)
        return await _carry_out(cluster, "move", view, planning.move(view, name, destination), chosen, listener)


move = synchronous(move_async)


async def evacuate_async(*hosts: str, listener: Listener = ignore, **options: Unpack[EvacuateArguments]) -> FleetResult:
    """Move all workloads of a fleet away from hosts.

    `hosts`: names, or labels such as `rack=r7`, which select all hosts that have them. `listener` receives the `Plan`
    first, and then the progress of its moves. `options` are the fields of `pageferry.fleet.options.EvacuateOptions`:
    address, insecure, dry_run, deadline (seconds), per_host.

    Raises UsageError, FleetError. The result names workloads that remain, with the reason, and hosts that do not reply.

    Examples:
        >>> import pageferry
        >>> pageferry.fleet.evacuate("a", address="127.0.0.1:1")  # no cluster there
        Traceback (most recent call last):
        pageferry.errors.FleetError: cannot connect to Ray at 127.0.0.1:1: ...
    """
    chosen = values.options(EvacuateOptions, options)
    names = [values.text("hosts", one) for one in hosts]
    async with connected(chosen) as cluster:
        view = await _current(cluster)
        leaving = _selected(view, names)
        limits = Limits(per_host=chosen.per_host)
        plan = planning.evacuate(view, leaving, deadline=chosen.deadline, limits=limits)
        result = await _carry_out(cluster, "evacuate", view, plan, chosen, listener)
    by_label = any("=" in name for name in names)  # the labels of a silent host are not known
    return replace(result, silent=[one for one in _silent(view) if by_label or one.name in leaving])


evacuate = synchronous(evacuate_async)


async def rebalance_async(*, listener: Listener = ignore, **options: Unpack[RebalanceArguments]) -> FleetResult:
    """Level the memory use of the hosts of a fleet with few moves.

    `listener` receives the `Plan` first, and then the progress of its moves. `options` are the fields of
    `pageferry.fleet.options.RebalanceOptions`: address, insecure, dry_run, per_host. Raises UsageError, FleetError.

    Examples:
        >>> import pageferry
        >>> pageferry.fleet.rebalance(address="127.0.0.1:1")  # no cluster there
        Traceback (most recent call last):
        pageferry.errors.FleetError: cannot connect to Ray at 127.0.0.1:1: ...
    """
    chosen = values.options(RebalanceOptions, options)
    async with connected(chosen) as cluster:
        view = await _current(cluster)
        plan = planning.rebalance(view, limits=Limits(per_host=chosen.per_host))
        return await _carry_out(cluster, "rebalance", view, plan, chosen, listener)


rebalance = synchronous(rebalance_async)


async def clone_async(
    image: str, arguments: Sequence[str], *, listener: Listener = ignore, **options: Unpack[CloneArguments]
) -> FleetResult:
    """Start clones of an image on the hosts of a fleet that have it.

    `image`: path or file name of an image on the hosts (`pageferry fleet join --images`), or URL of an image in a
    store. `arguments`: command line of QEMU, in which {n}, {name} and {host} stand for the number and the name of the
    clone, and for its host. `listener` receives the `Plan` first. `options` are the fields of
    `pageferry.fleet.options.CloneOptions`: address, insecure, dry_run, count, policy, name, group, labels.

    Raises UsageError, FleetError. The result names clones that do not run, with the reason.

    Examples:
        >>> import pageferry
        >>> pageferry.fleet.clone("web.img", ["qemu-system-x86_64", "-m", "4G"], address="127.0.0.1:1")
        Traceback (most recent call last):
        pageferry.errors.FleetError: cannot connect to Ray at 127.0.0.1:1: ...
    """
    chosen = values.options(CloneOptions, options)
    command = _command(arguments)
    async with connected(chosen) as cluster:
        view = await _current(cluster)
        found = await _find_image(cluster, view, values.text("image", image))
        _check_names_known(view, "start clones")
        if is_url(image):  # each host can download it
            view = _with_image(view, found)
        demand = Demand(
            image=found.identity, count=chosen.count, policy=chosen.policy, name=chosen.name, group=chosen.group
        )
        plan = planning.place(view, demand)
        listener(plan)
        if chosen.dry_run:
            return FleetResult(verb="clone", plan=plan, unplaced=list(plan.unplaced))
        begun = time.monotonic()
        started = await _start_clones(cluster, plan, image if is_url(image) else found.identity, command, chosen)
    took = time.monotonic() - begun
    return FleetResult(verb="clone", plan=plan, total_time=took, started=started, unplaced=list(plan.unplaced))


clone = synchronous(clone_async)


async def _start_clones(
    cluster: Cluster, plan: Plan, image: str, command: tuple[str, ...], options: CloneOptions
) -> list[CloneStarted]:
    numbers = {one.workload: number for number, one in enumerate(plan.placed, 1)}

    async def start(placed: Placed) -> CloneStarted:
        request = Clone(
            id=new_id(),
            image=image,
            workload=placed.workload,
            number=numbers[placed.workload],
            command=command,
            labels=parse_labels(options.labels),
            group=options.group,
        )
        _, error = await reason_of(complete(cluster, placed.host, request))
        return CloneStarted(workload=placed.workload, host=placed.host, error=error)

    return await on_hosts(plan.placed, start, STARTS)


async def run_async(workload: str, arguments: Sequence[str], **options: Unpack[RunArguments]) -> FleetResult:
    """Start a guest on a host of a fleet.

    `arguments`: command line of QEMU, in which {name} and {host} stand for the name of the guest and of its host.
    `options` are the fields of `pageferry.fleet.options.RunOptions`: address, insecure, host (default: the one with the
    most free memory), group, labels. Raises UsageError, FleetError.

    Examples:
        >>> import pageferry
        >>> pageferry.fleet.run("web", ["qemu-system-x86_64", "-m", "4G"], address="127.0.0.1:1")  # no cluster there
        Traceback (most recent call last):
        pageferry.errors.FleetError: cannot connect to Ray at 127.0.0.1:1: ...
    """
    chosen = values.options(RunOptions, options)
    name, command = values.text("workload", workload), _command(arguments)
    check_name(name)
    begun = time.monotonic()
    async with connected(chosen) as cluster:
        view = await _current(cluster)
        if any(one.name == name for one in view.workloads):
            raise UsageError(f"cannot start {name}: a workload of this name is in the fleet; choose another name")
        _check_names_known(view, f"start {name}")
        host = chosen.host or _emptiest(view)
        moved = Moved(name=name, kind="qemu", command=command, labels=parse_labels(chosen.labels), group=chosen.group)
        _, error = await reason_of(complete(cluster, host, Run(id=new_id(), moved=moved)))
    started = [CloneStarted(workload=name, host=host, error=error)]
    return FleetResult(verb="run", total_time=time.monotonic() - begun, started=started)


run = synchronous(run_async)


class _Saving(NamedTuple):
    workload: str
    host: str
    target: str


async def checkpoint_async(
    target: str, *workloads: str, listener: Listener = ignore, **options: Unpack[CheckpointArguments]
) -> FleetResult:
    """Save workloads of a fleet while they run. Each keeps its name as the name of its image.

    `target`: URL in a store, such as s3://BUCKET/PREFIX, or directory on the hosts. `workloads`: names; none for all
    workloads. `options` are the fields of `pageferry.fleet.options.CheckpointOptions`: address, insecure, per_host.

    Raises UsageError, FleetError. The result names workloads that were not saved, with the reason. Without `workloads`,
    it also names hosts that do not reply.

    Examples:
        >>> import pageferry
        >>> pageferry.fleet.checkpoint("s3://bucket/nightly", address="127.0.0.1:1")  # no cluster there
        Traceback (most recent call last):
        pageferry.errors.FleetError: cannot connect to Ray at 127.0.0.1:1: ...
    """
    chosen = values.options(CheckpointOptions, options)
    values.text("target", target)
    begun = time.monotonic()
    async with connected(chosen) as cluster:
        view = await _current(cluster)
        tasks = [_Saving(name, host, _target(target, name)) for name, host in _located(view, workloads)]

        async def save(one: _Saving) -> Saved:
            request = Checkpoint(id=new_id(), workload=one.workload, target=one.target)
            _, error = await reason_of(complete(cluster, one.host, request))
            return Saved(workload=one.workload, host=one.host, image=one.target, error=error)

        saved = await on_hosts(tasks, save, chosen.per_host)
    silent = [] if workloads else _silent(view)
    return FleetResult(verb="checkpoint", total_time=time.monotonic() - begun, saved=saved, silent=silent)


checkpoint = synchronous(checkpoint_async)


async def cancel_async(*workloads: str, **options: Unpack[ClusterArguments]) -> FleetCancelled:
    """Cancel the running moves, checkpoints and starts of workloads of a fleet.

    `workloads`: names; none for all workloads. A move after its commit is not cancelled. `options` are the fields of
    `pageferry.fleet.options.ClusterOptions`. Raises FleetError. The result names hosts that do not reply.

    Examples:
        >>> import pageferry
        >>> pageferry.fleet.cancel(address="127.0.0.1:1")  # no cluster there
        Traceback (most recent call last):
        pageferry.errors.FleetError: cannot connect to Ray at 127.0.0.1:1: ...
    """
    chosen = values.options(ClusterOptions, options)
    names = {values.text("workloads", one) for one in workloads}
    cancelled = set()
    async with connected(chosen) as cluster:
        found = await reports(cluster)
        silent = {host: str(one) for host, one in found.items() if isinstance(one, AgentUnreachable)}
        for host, one in _cancellable(found, names):
            try:
                ended = await cluster.call(host, Cancel(id=one.id), OperationReport, timeout=120.0)
            except AgentUnreachable as error:
                silent[host] = str(error)
                continue
            except PageferryError:  # it has ended meanwhile
                continue
            if ended.state != "running" and ended.exit_code != 0:
                cancelled.add(one.workload)
    return FleetCancelled(
        workloads=sorted(cancelled),
        silent=[SilentHost(name=host, reason=reason) for host, reason in silent.items()],
    )


cancel = synchronous(cancel_async)


def _cancellable(
    found: Mapping[str, HostReport | AgentUnreachable], names: Collection[str]
) -> Iterator[tuple[str, OperationReport]]:
    """Yield running operations, each with its host. `names`: workloads; all if empty.

    The source of a move decides whether it can be cancelled. A receiver is therefore left out if its source has a
    migration, or has committed the workload, or does not reply.
    """
    known = {host: one for host, one in found.items() if isinstance(one, HostReport)}
    migrated = {one.workload for report in known.values() for one in report.operations if _runs(one, MIGRATE)}
    migrated |= {one.name for report in known.values() for one in report.workloads if one.status == "unknown"}
    for host, report in known.items():
        for one in report.operations:
            if one.state != "running" or (names and one.workload not in names) or one.received or one.resumes:
                continue
            if one.kind != RECEIVE or (one.workload not in migrated and one.peer in known):
                yield host, one


def _runs(one: OperationReport, kind: Kind) -> bool:
    return one.kind == kind and one.state == "running"


async def _current(cluster: Cluster) -> View:
    """Return the view of the fleet. Raises FleetError if no host has joined."""
    found = await reports(cluster)
    if not found:
        raise FleetError("cannot plan: no host has joined the fleet; run `pageferry fleet join` on its hosts")
    return view_of(found, draining=await cluster.draining())


async def _carry_out(
    cluster: Cluster, verb: str, view: View, plan: Plan, options: MoveOptions, listener: Listener
) -> FleetResult:
    """Report a plan, and carry out its moves unless it is only planned."""
    listener(plan)
    if options.dry_run or not plan.moves:
        return FleetResult(verb=verb, plan=plan, unplaced=list(plan.unplaced))
    begun = time.monotonic()
    moves, given_up = await Driver(cluster, view, plan, listener).run()
    named = {one.workload for one in given_up}
    unplaced: list[Unplaced] = [*given_up, *(one for one in plan.unplaced if one.workload not in named)]
    return FleetResult(verb=verb, plan=plan, total_time=time.monotonic() - begun, moves=moves, unplaced=unplaced)


def _selected(view: View, names: Sequence[str]) -> list[str]:
    """Return the names of hosts, given by names and labels. Raises UsageError."""
    if not names:
        raise UsageError("invalid `hosts`: expected at least one name or label")
    found: list[str] = []
    for name in names:
        key, separator, value = name.partition("=")
        chosen = [one.name for one in view.hosts if one.labels.get(key) == value] if separator else [name]
        if not chosen:
            _check_silent(view, f"cannot evacuate {name}: no host that replies has this label")
            raise UsageError(f"cannot evacuate {name}: no host has this label; see `pageferry fleet status`")
        found += chosen
    return list(dict.fromkeys(found))


async def _find_image(cluster: Cluster, view: View, image: str) -> Image:
    """Return the image that a user has named. Raises UsageError if no host has it."""
    if is_url(image):
        host = next((one.name for one in view.hosts if one.reachable), "")
        return await cluster.call(host, Identify(image=image), Image, timeout=3600.0)
    with contextlib.suppress(ImageError, OSError):
        identity = identity_of(await in_thread(lambda: open_link(Path(image)).identity))
        return next(one for one in view.images if one.identity == identity)
    for one in view.images:
        if image in (one.name, Path(one.name).name, one.identity, one.identity.partition(":")[0]):
            return one
    raise UsageError(
        f"cannot clone {image}: no host of the fleet has this image; copy it to a directory that a host has joined "
        "with (--images), or give the URL of an image in a store"
    )


def _with_image(view: View, image: Image) -> View:
    """Return the view in which every host has the image."""
    hosts = tuple(replace(host, images=host.images | {image.identity}) for host in view.hosts)
    others = (one for one in view.images if one.identity != image.identity)
    return replace(view, hosts=hosts, images=(*others, image))


def _silent(view: View) -> list[SilentHost]:
    """Return the hosts whose agents do not reply."""
    return [SilentHost(name=one.name, reason="its agent does not reply") for one in view.hosts if not one.reachable]


def _check_silent(view: View, problem: str) -> None:
    """Raise FleetError with `problem` if a host does not reply: it may have what was not found on the others."""
    if names := [one.name for one in _silent(view)]:
        raise FleetError(
            f"{problem}, and {', '.join(names)} may have it but cannot be reached; start the agents of these hosts "
            "(`pageferry fleet join`)"
        )


def _check_names_known(view: View, operation: str) -> None:
    """Raise FleetError if a host does not reply: its workloads may have the names of those to be started."""
    if names := [one.name for one in _silent(view)]:
        raise FleetError(
            f"cannot {operation}: {', '.join(names)} cannot be reached, and may have a workload of the same name; "
            "start their agents (`pageferry fleet join`), or remove these hosts from the cluster of Ray"
        )


def _emptiest(view: View) -> str:
    used = {host.name: 0 for host in view.hosts if host.reachable and not host.draining}
    for workload in view.workloads:
        if workload.host in used:
            used[workload.host] += workload.private
    if not used:
        raise FleetError("cannot start a guest: no host of the fleet accepts workloads; see `pageferry fleet status`")
    free = {host.name: host.memory - host.headroom - used[host.name] for host in view.hosts if host.name in used}
    return max(free, key=lambda name: free[name])


def _located(view: View, workloads: Sequence[str]) -> list[tuple[str, str]]:
    """Return workloads and their hosts. Raises UsageError for an unknown workload."""
    hosts = {one.name: one.host for one in view.workloads}
    for name in workloads:
        if name not in hosts:
            _check_silent(view, f"cannot save {name}: no host that replies has this workload")
            raise UsageError(f"cannot save {name}: no workload of this name is in the fleet; see `pageferry list`")
    return [(name, host) for name, host in hosts.items() if not workloads or name in workloads]


def _target(target: str, name: str) -> str:
    return f"{target.rstrip('/')}/{name}" if is_url(target) else str(Path(target) / f"{name}{_SUFFIX}")


def _command(arguments: Sequence[str]) -> tuple[str, ...]:
    command = values.texts("arguments", arguments)
    if not command:
        raise UsageError("cannot start a guest: the command line of QEMU is missing; give it after --")
    return command
