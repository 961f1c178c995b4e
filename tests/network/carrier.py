"""Network between hosts: `python carrier.py SETUP` creates network namespaces and forwards packets between them.

Each host has a TUN device. This process reads the packets of each device and writes them to the device of the receiving
host, with the delay, loss and bandwidth of the current conditions. Both ends use the kernel's own TCP. The program
requires root and /dev/net/tun. It does not use netem: many kernels lack netem, and TCP would detect data that netem
corrupts.

The namespaces have no names, so they vanish with this process, which exits at the end of its standard input. Other
processes enter them through the descriptors in the first line of output::

    {"hosts": [{"address": "10.77.0.1", "namespace": "/proc/4711/fd/5"}, ...]}

Each line of standard input is an `Order`; the reply `{}` means that it is in effect.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import socket
import struct
import sys
import time
from dataclasses import dataclass, field

import msgspec

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCSIFTXQLEN = 0x8914, 0x8916, 0x891C, 0x8922, 0x8943
IFF_UP = 0x1
DEVICE, LOOPBACK = b"wan", b"lo"

VNET_HEADER = 10
"""Size of `struct virtio_net_hdr`, which precedes each packet, bytes. With this header, the kernel passes TCP segments
unsplit and without checksum.
"""
MAX_PACKET = VNET_HEADER + (1 << 16)
BATCH = 64
"""Maximum number of packets read from one device before the others are polled."""
TCP = 6
MAGICS = {b"PFCTRL1\n": "control", b"PFPAGE1\n": "pages"}


class Setup(msgspec.Struct, frozen=True):
    """Configuration of the network."""

    hosts: int
    segments: bool = True
    """Whether the kernel may pass many packets as one. This is faster, but the packets are also lost together."""
    seed: int = 0
    """Seed of the random packet loss."""


class Order(msgspec.Struct, frozen=True):
    """Changes of the conditions; None leaves a condition unchanged."""

    delay: float | None = None
    """One-way delay, seconds."""
    rate: float | None = None
    """Uplink bandwidth of each host, bytes per second; 0: unlimited."""
    loss: float | None = None
    """Fraction of packets that are lost."""
    silent: list[int] | None = None
    """Hosts whose packets are dropped in both directions, without an error."""
    down: list[int] | None = None
    """Hosts whose network device is down."""
    corrupt: str | None = None
    """Kind of connection (`control`, `pages`) in whose next packet one byte is changed. TCP does not detect the
    change."""
    back: bool = False
    """Whether `corrupt` applies to packets to the client of the connection instead of packets from it."""


@dataclass
class Host:
    """Network namespace and its TUN device."""

    address: bytes
    namespace: int
    device: int
    control: socket.socket
    """Socket for ioctls on the devices; a socket belongs to the namespace in which it was created."""
    free: float = 0.0
    """Time at which the uplink will have sent all queued packets (`time.monotonic`)."""


@dataclass
class Conditions:
    """Current conditions of the links."""

    delay: float = 0.0
    rate: float = 0.0
    loss: float = 0.0
    silent: set[int] = field(default_factory=set)
    corrupt: str | None = None
    back: bool = False
    backlog: float = 0.2
    """Maximum queueing delay of an uplink, seconds; further packets are dropped."""


class Carrier:
    """Forwarder of packets between the hosts, which runs until standard input ends."""

    def __init__(self, setup: Setup) -> None:
        self.dice = random.Random(setup.seed)
        self.conditions = Conditions()
        self.hosts = [_make_host(number, setup.segments) for number in range(setup.hosts)]
        self.numbers = {host.address: number for number, host in enumerate(self.hosts)}
        self.kinds: dict[bytes, str] = {}
        """Kind of each connection, by addresses and ports of the packets from its client."""
        self._under_way: list[tuple[float, int, int, bytearray]] = []
        self._order = itertools.count()

    def run(self) -> None:
        orders = b""
        devices = {host.device: number for number, host in enumerate(self.hosts)}
        while True:
            ready, _, _ = select.select([0, *devices], [], [], self._deliver())
            for descriptor in ready:
                if descriptor in devices:
                    self._take(devices[descriptor])
                elif not (data := os.read(0, 1 << 16)):
                    return
                else:
                    *lines, orders = (orders + data).split(b"\n")
                    for line in lines:
                        self._obey(msgspec.json.decode(line, type=Order))
                        os.write(1, b"{}\n")

    def _obey(self, order: Order) -> None:
        now = self.conditions
        now.delay = now.delay if order.delay is None else order.delay
        now.rate = now.rate if order.rate is None else order.rate
        now.loss = now.loss if order.loss is None else order.loss
        now.silent = now.silent if order.silent is None else set(order.silent)
        if order.corrupt is not None:
            now.corrupt, now.back = order.corrupt, order.back
        if order.down is not None:
            for number, host in enumerate(self.hosts):
                _switch(host.control, DEVICE, up=number not in order.down)

    def _take(self, number: int) -> None:
        """Read packets that a host sends, and queue them for delivery. Drop packets according to the conditions."""
        sender, now = self.hosts[number], self.conditions
        for _ in range(BATCH):
            try:
                packet = bytearray(os.read(sender.device, MAX_PACKET))
            except (BlockingIOError, OSError):  # no more packets, or the device is down
                return
            receiver = self.numbers.get(bytes(packet[VNET_HEADER + 16 : VNET_HEADER + 20]))
            if receiver is None or packet[VNET_HEADER] >> 4 != 4:
                continue
            self._look_at(packet)
            if number in now.silent or receiver in now.silent or self.dice.random() < now.loss:
                continue
            leaves = time.monotonic()
            if now.rate:
                if sender.free - leaves > now.backlog:
                    continue
                sender.free = leaves = max(sender.free, leaves) + len(packet) / now.rate
            heapq.heappush(self._under_way, (leaves + now.delay, next(self._order), receiver, packet))

    def _deliver(self) -> float | None:
        """Deliver packets that are due. Return the seconds until the next is due, None if no packet is queued."""
        while self._under_way:
            due = self._under_way[0][0] - time.monotonic()
            if due > 0:
                return due
            _, _, receiver, packet = heapq.heappop(self._under_way)
            try:
                os.write(self.hosts[receiver].device, packet)
            except OSError:  # the device is down or its queue is full: drop the packet
                continue
        return None

    def _look_at(self, packet: bytearray) -> None:
        """Record the kind of a new connection by its first bytes, and corrupt one packet if an order requests it.

        The kernel leaves the checksum to the device (TUN_F_CSUM), so the corrupted packet is accepted.
        """
        start = VNET_HEADER + (packet[VNET_HEADER] & 15) * 4
        if packet[VNET_HEADER + 9] != TCP:
            return
        data = start + (packet[start + 12] >> 4) * 4
        source, target = packet[VNET_HEADER + 12 : VNET_HEADER + 16], packet[VNET_HEADER + 16 : VNET_HEADER + 20]
        there = bytes(source + target + packet[start : start + 4])
        back = bytes(target + source + packet[start + 2 : start + 4] + packet[start : start + 2])
        if kind := MAGICS.get(bytes(packet[data : data + 8])):
            self.kinds[there] = kind
            return
        wanted = self.kinds.get(back if self.conditions.back else there)
        if len(packet) > data and wanted is not None and wanted == self.conditions.corrupt:
            packet[(data + len(packet)) // 2] ^= 0x10
            self.conditions.corrupt = None


def _make_host(number: int, segments: bool) -> Host:
    """Create a network namespace with a TUN device, and enter the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    _switch(control, LOOPBACK, up=True)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE, IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | (TUN_F_TSO4 if segments else 0))
    address = bytes((10, 77, 0, number + 1))
    for request, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, bytes((255, 255, 255, 0)))):
        fcntl.ioctl(control, request, struct.pack("16sHH4s16x", DEVICE, socket.AF_INET, 0, value))
    fcntl.ioctl(control, SIOCSIFMTU, struct.pack("16si20x", DEVICE, 1500))
    fcntl.ioctl(control, SIOCSIFTXQLEN, struct.pack("16si20x", DEVICE, 10_000))
    _switch(control, DEVICE, up=True)
    return Host(address, os.open("/proc/self/ns/net", os.O_RDONLY), device, control)


def _switch(control: socket.socket, device: bytes, *, up: bool) -> None:
    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", device, IFF_UP if up else 0))


def main() -> None:
    """Create the network, print its hosts, and forward packets."""
    carrier = Carrier(msgspec.json.decode(sys.argv[1], type=Setup))
    hosts = [
        {"address": socket.inet_ntoa(host.address), "namespace": f"/proc/{os.getpid()}/fd/{host.namespace}"}
        for host in carrier.hosts
    ]
    os.write(1, msgspec.json.encode({"hosts": hosts}) + b"\n")
    carrier.run()


if __name__ == "__main__":
    main()
