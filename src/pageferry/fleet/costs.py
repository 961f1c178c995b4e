"""Cost model: bytes, duration and downtime of a move, from the dirty rate of the workload and the rate of its path.

The defaults of `Costs` are figures that the benchmarks have recorded; each names its file in `benchmarks/results`. The
rounds of pre-copy form a geometric series: each round sends what the workload has modified during the previous round.
`pageferry.migration.convergence` decides by the same conditions during the migration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil, inf, log
from typing import NamedTuple

from pageferry.fleet.model import Image, Mode, Record, Workload

PRIVATE_SHARE = 0.1
"""Private memory of a new clone that is reserved for it, as a part of its memory. It is an assumption about the first
minutes of a clone: the kernel allocates private memory on the first write, whatever the plan has reserved."""
CONVERGING = 0.5
"""Maximum dirty rate for pre-copy, as a part of the rate of the move. Each round is then at most half as long as the
previous one, and all rounds send at most twice the memory."""
UNTHROTTLED = 2
"""Number of rounds without progress that are assumed before a throttled workload (`--auto-converge`) converges."""
MODES: tuple[Mode, ...] = ("precopy", "hybrid", "postcopy")
UNMEASURED: tuple[Mode, ...] = ("hybrid", "precopy", "postcopy")
"""Modes for a workload whose dirty rate was not measured: hybrid ends at any dirty rate."""


class Costs(Record, frozen=True, kw_only=True):
    """Constant costs of a move. The defaults are recorded medians."""

    setup: float = 0.3
    """Time before the first page and after the last one, seconds: `elapsed-ms` of migrate.json (QEMU 10.0), 263 to 404
    ms for a guest whose pages take a tenth of that time."""
    downtime: float = 0.025
    """Downtime without pages that are sent in the pause, seconds: `downtime-ms` of migrate.json, 19 to 37 ms; of
    postcopy.json, 24 ms."""
    max_downtime: float = 0.3
    """Default of `pageferry migrate --max-downtime`, seconds: pages that can be sent in this time are sent in the
    pause."""
    rate: int = 1_765_000_000
    """Maximum rate of one move over TLS, bytes per second: `first-round-mbps` of links.json, two streams, 14,124
    Mbit/s."""
    overhead: float = 1.001
    """Bytes on the wire per byte of memory: `transferred` of links.json, 1,074.7 MB per GiB."""
    hybrid: float = 1.65
    """Bytes of a hybrid move of a workload that writes faster than the link, as a multiple of its memory:
    postcopy.json."""
    max_rounds: int = 30
    """Default of `pageferry migrate --max-rounds`."""


class Load(NamedTuple):
    """Memory that a move sends."""

    volume: int
    """Bytes of memory."""
    dirty: int | None
    """Dirty rate, bytes per second; None if unknown."""
    mode: Mode
    auto_converge: bool = False


class Prediction(NamedTuple):
    """Predicted cost of a move at one rate."""

    bytes: int
    seconds: float
    downtime: float


def image_sizes(images: Iterable[Image], workloads: Iterable[Workload]) -> dict[str, int]:
    """Return the memory of a complete base of each image, bytes; for an image without a record, the memory of its
    largest clone."""
    sizes: dict[str, int] = {}
    for workload in workloads:
        if workload.base is not None and workload.memory > sizes.get(workload.base, 0):
            sizes[workload.base] = workload.memory
    sizes.update({image.identity: image.memory for image in images})
    return sizes


def occupied(workload: Workload, shares: bool, sizes: Mapping[str, int]) -> int:
    """Return the memory that the workload occupies on a host in addition to a base, bytes. `shares`: whether it shares
    a base there."""
    if shares or workload.base is None:
        return workload.private
    return max(workload.private, min(workload.memory, workload.private + sizes[workload.base]))


def staging(workload: Workload, shares: bool) -> int:
    """Return the additional memory that the destination needs during a move, bytes. Private pages of a clone are
    received in staging files (docs/clones.md)."""
    return workload.private if shares else 0


def allowed_modes(workload: Workload) -> tuple[Mode, ...]:
    """Return the modes that the workload supports, the preferred ones first."""
    return tuple(mode for mode in MODES if mode not in workload.cannot)


def choose_mode(workload: Workload, volume: int, rate: float, costs: Costs) -> tuple[Mode, bool, str]:
    """Choose the mode of a move by the dirty rate against `rate`, the highest rate of its path, bytes per second.

    `volume`: bytes of memory to send. Returns the mode, whether to throttle the workload (`--auto-converge`), and the
    reason.
    """
    modes, dirty = allowed_modes(workload), workload.dirty_rate
    if dirty is None:
        preferred: Mode = next((mode for mode in UNMEASURED if mode in modes), "precopy")
        return preferred, preferred == "precopy", "dirty rate not measured"
    fits = volume <= rate * costs.max_downtime
    if (fits or dirty <= CONVERGING * rate) and "precopy" in modes:
        return "precopy", False, f"modifies {dirty / rate:.0%} of the rate of its path"
    why = f"modifies {dirty / rate:.0%} of the rate of its path: pre-copy would not converge"
    for mode in modes:
        if mode != "precopy":
            return mode, False, why
    return (
        "precopy",
        True,
        f"{why} without throttling, and {workload.cannot.get('postcopy', 'no other mode is allowed')}",
    )


def least_rate(workload: Workload, mode: Mode) -> int:
    """Return the minimum rate at which the mode converges without throttling, bytes per second; 0 if it ends at any
    rate."""
    if mode != "precopy" or workload.dirty_rate is None:
        return 0
    return int(workload.dirty_rate / CONVERGING)


def predict(load: Load, rate: float, costs: Costs) -> Prediction:
    """Predict a move at `rate` bytes per second."""
    sent, left = _sent(load.volume, load.dirty or 0, load.mode, rate, costs)
    if load.auto_converge and (load.dirty or 0) > CONVERGING * rate:
        # Rounds without progress precede the throttle step at which the rounds converge.
        sent, left = _sent(load.volume, min(load.dirty or 0, round(CONVERGING * rate)), "precopy", rate, costs)
        sent += UNTHROTTLED * load.volume
    wire = sent * costs.overhead
    downtime = costs.downtime + left / rate
    return Prediction(round(wire), costs.setup + wire / rate + costs.downtime, downtime)


def _sent(volume: int, dirty: int, mode: Mode, rate: float, costs: Costs) -> tuple[float, float]:
    """Return the bytes sent in all rounds, and those of them that are sent in the pause."""
    if mode == "postcopy":
        return volume, 0.0
    ratio = dirty / rate
    in_pause = rate * costs.max_downtime
    if volume <= in_pause:
        # The first round ends with what was modified during it, which is sent in the pause.
        left = min(volume * ratio, volume)
        return volume + left, left
    if ratio >= 1.0 or (mode == "hybrid" and ratio > CONVERGING):
        return (volume * costs.hybrid, 0.0) if mode == "hybrid" else (volume * costs.max_rounds, in_pause)
    if ratio == 0.0:
        return volume, 0.0
    # Round n + 1 has volume * ratio^n bytes. The first one that fits into `max_downtime` is sent in the pause.
    rounds = min(max(1, ceil(log(volume / in_pause) / log(1 / ratio))), costs.max_rounds)
    left = volume * ratio**rounds
    return volume * (1 - ratio**rounds) / (1 - ratio) + left, left


def rate_for(volume: float, average: float, most: float, costs: Costs) -> float:
    """Return the rate of the transfer with which a move of `volume` bytes uses `average` bytes per second over its
    whole duration, set-up and pause included; at most `most`."""
    transfer = volume / average - costs.setup - costs.downtime if average > 0 else inf
    return min(most, volume / transfer) if transfer > 0 else most
