"""Migration of the built-in workload between network namespaces, over slow, lossy or high-latency links."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.migrate import trips
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.trips import Ends
from benchmarks.peers import iperf
from tests.network.hosts import Network

WRITER = {"rate": 2 << 20, "working_set": 0.1, "scatter": True}
METHODS: dict[str, tuple[str, ...]] = {
    "precopy": (),
    "precopy, 4 streams": ("--streams", "4"),
    "precopy, zstd": ("--codec", "zstd"),
    "hybrid": ("--mode", "hybrid"),
    "postcopy": ("--mode", "postcopy"),
    "postcopy, 4 streams": ("--mode", "postcopy", "--streams", "4"),
}
CONTENTS = {"compressible": 0.5, "zero_fraction": 0.1}
SMALL = 8 << 20
"""Size of the migrated workload with --quick, bytes."""


@dataclass(frozen=True, slots=True)
class Link:
    """Network link. `conditions`: fields of `tests.network.carrier.Order`."""

    conditions: dict[str, float]
    size: int
    """Size of the migrated workload, bytes."""
    segments: bool
    """Whether the kernel may pass many packets as one (segmentation offload); False on lossy links."""


LINKS = {
    "1 Gbit/s, 50 ms": Link({"delay": 0.025, "rate": 125e6}, 192 << 20, segments=True),
    "100 Mbit/s, 20 ms, 0.1 % lost": Link({"delay": 0.01, "rate": 12.5e6, "loss": 0.001}, 24 << 20, segments=False),
}
"""Links by name. The delay in a name is the round-trip time, twice `delay`."""


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure each method over each link, in turn; with --quick, each method over one of the links."""
    runs = []
    for number, (name, link) in enumerate(LINKS.items()):
        methods = list(METHODS)[number :: len(LINKS)] if setting.quick else list(METHODS)
        with Network(setting.folder / "hosts", segments=link.segments, seed=1) as network:
            network.order(**link.conditions)
            runs += [{"link": name} | run for run in _over(network, link, methods, setting)]
    return runs


def _over(network: Network, link: Link, methods: list[str], setting: Setting) -> list[dict[str, Any]]:
    here, there = network.hosts
    assert there.address is not None
    ends = Ends(here.within, there.within, ("--insecure",), ("--listen", f"{there.address}:0", "--insecure"))
    size = SMALL if setting.quick else link.size
    runs = []
    with Ledger("far", size, WRITER | CONTENTS) as ledger, Ballast(size + (64 << 20)) as ballast:
        for _ in range(setting.repetitions):
            rate = iperf.one_stream(1 if setting.quick else 3, there.address, there.within, here.within)
            for method in methods:
                run = trips.move(ledger, ballast, METHODS[method], ends)
                runs.append({"method": method, "iperf3-mbps": rate} | run)
    return runs
