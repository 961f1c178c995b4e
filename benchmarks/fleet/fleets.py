"""Fleets of the simulation: rows of racks of hosts, with workloads of random sizes.

A row has ten racks of 40 hosts. A host has 256 GiB and an interface of 25 Gbit/s, a rack an uplink of 400 Gbit/s, a row
one of 3.2 Tbit/s. A host runs about 20 workloads: four fifths are clones of a few images, the others have their own
memory.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pageferry.fleet.model import Host, Image, Link, View, Workload

GIB = 1 << 30
MIB = 1 << 20
GBIT = 125_000_000
"""Bytes per second."""
IMAGE_SIZES = (2 * GIB, 4 * GIB, 8 * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of a fleet, and rates of its links in bytes per second."""

    rows: int = 25
    racks: int = 10
    """Racks of a row."""
    hosts: int = 40
    """Hosts of a rack."""
    workloads: int = 20
    """Workloads of a host, on average."""
    images: int = 200
    kinds: int = 5
    """Images of a host, on average."""
    memory: int = 256 * GIB
    interface: int = 25 * GBIT
    rack: int = 400 * GBIT
    row: int = 3200 * GBIT


LARGE = Shape()
"""10,000 hosts, 200,000 workloads."""
SMALL = Shape(rows=2, racks=2, hosts=4, workloads=6, images=8, kinds=3)


def build(shape: Shape, seed: int = 1) -> View:
    """Return a fleet. The same shape and seed return the same fleet."""
    chance = random.Random(seed)
    images = [
        Image(identity=f"{number:032x}:{number:016x}", memory=chance.choice(IMAGE_SIZES), name=f"image-{number}")
        for number in range(shape.images)
    ]
    links, hosts, workloads = [], [], []
    for row in range(shape.rows):
        links.append(Link(name=f"row-{row}", rate=shape.row))
        for rack in range(shape.racks):
            links.append(Link(name=f"rack-{row}-{rack}", rate=shape.rack))
            for number in range(shape.hosts):
                name = f"host-{row}-{rack}-{number}"
                own = chance.sample(images, min(shape.kinds, len(images)))
                hosts.append(_host(shape, name, row, rack, own))
                count = chance.randint(shape.workloads - 4, shape.workloads + 4)
                workloads += [_workload(chance, f"{name}-{one}", name, own) for one in range(count)]
    return View(hosts=tuple(hosts), workloads=tuple(workloads), images=tuple(images), links=tuple(links))


def _host(shape: Shape, name: str, row: int, rack: int, images: list[Image]) -> Host:
    held = frozenset(image.identity for image in images)
    return Host(
        name=name,
        memory=shape.memory,
        headroom=shape.memory // 10,
        link=shape.interface,
        cores=64,
        images=held,
        labels={"rack": f"rack-{row}-{rack}", "row": f"row-{row}"},
        uplinks=(f"rack-{row}-{rack}", f"row-{row}"),
    )


def _workload(chance: random.Random, name: str, host: str, images: list[Image]) -> Workload:
    dirty = round(chance.lognormvariate(2.5, 1.5)) * MIB
    group = f"group-{chance.randrange(20_000)}" if chance.random() < 0.2 else None
    if chance.random() < 0.8:
        image = chance.choice(images)
        private = round(image.memory * chance.uniform(0.05, 0.6))
        return Workload(
            name=name,
            host=host,
            memory=image.memory,
            private=private,
            base=image.identity,
            dirty_rate=min(dirty, private),
            group=group,
            cannot=dict.fromkeys(("hybrid", "postcopy"), "a clone is migrated in pre-copy only"),
        )
    memory = chance.choice((2, 4, 8, 16, 32)) * GIB
    private = round(memory * chance.uniform(0.3, 1.0))
    return Workload(name=name, host=host, memory=memory, private=private, dirty_rate=min(dirty, private), group=group)
