"""Debian guest with many kinds of devices: the zoo.

The machine is a q35 with UEFI firmware, and has virtio-scsi, VGA, USB with a tablet and a disk, a TPM, a balloon that
reports free pages, a virtio-serial port over which the host continuously sends lines, a network card, and virtio-rng.
Besides the programs of the Debian guest, a loop in the guest checks that freed memory is not changed, and commands
check the contents of the other devices.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

from tests.guest.debian import DISKS, DebianGuest
from tests.guest.machines import GuestParts
from tests.guest.serial import GuestFailed

FIRMWARE = "ovmf/usr/share/OVMF"


class Talker:
    """Thread that sends numbered lines to the virtio-serial port, and checks that the guest sends them back.

    After a migration, the thread connects to the port of the new QEMU. Lines in flight during the migration can be
    lost, but each received line must be complete.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        """Socket of the port; None: the thread waits."""
        self.echoed = 0
        """Number of the last line that was sent back."""
        self.wrong: list[bytes] = []
        """Received lines that were not sent."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def wait(self, timeout: float = 120.0) -> None:
        """Wait until the guest has sent back a line that was sent after the call. Raises GuestFailed on a timeout."""
        before, deadline = self.sent, time.monotonic() + timeout
        while self.echoed <= before and not self.wrong:
            if time.monotonic() > deadline:
                raise GuestFailed(f"the virtio-serial port is silent after line {self.echoed} of {self.sent}")
            time.sleep(0.05)
        if self.wrong:
            raise GuestFailed(f"the virtio-serial port returned {self.wrong}")

    def _run(self) -> None:
        self.sent = 0
        while not self._end.is_set():
            try:
                with socket.socket(socket.AF_UNIX) as port:
                    port.settimeout(1)
                    port.connect(str(self.path))
                    self._talk(port)
            except OSError:
                self._end.wait(0.05)

    def _talk(self, port: socket.socket) -> None:
        path, rest = self.path, b""
        while not self._end.is_set() and path == self.path:
            self.sent += 1
            port.sendall(b"line %d of the host\n" % self.sent)
            try:
                received = port.recv(4096)
            except TimeoutError:
                continue
            if not received:
                return
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                if found := re.fullmatch(rb"line (\d+) of the host", line.strip()):
                    self.echoed = max(self.echoed, int(found[1]))
                else:
                    self.wrong.append(line)
            self._end.wait(0.02)


class Zoo(DebianGuest):
    """Guest with many kinds of devices."""

    disks = DISKS | {"usb": 16 << 20}
    load = ("load", "zoo")
    check = ("check", "zoo_check")
    progress = (*DebianGuest.progress, "events")
    tpm = "tpm-crb"

    def __init__(self, parts: GuestParts, folder: Path, source: Path, name: str = "zoo") -> None:
        super().__init__(parts, folder, source, name)
        self.talker = Talker()
        self._tpms: dict[str, subprocess.Popen[bytes]] = {}

    def new_disks(self) -> None:
        super().new_disks()
        shutil.copy(self.source / FIRMWARE / "OVMF_VARS_4M.fd", self.folder / "variables.raw")

    def before(self, name: str) -> None:
        """Start the TPM for a QEMU, with an empty state: the state of a TPM is part of the migrated device state."""
        (self.folder / "tftp").mkdir(exist_ok=True)
        if not (self.folder / "tftp/file").exists():
            (self.folder / "tftp/file").write_bytes(bytes(range(256)) * 80)
        if (before := self._tpms.pop(name, None)) is not None:
            before.kill()
            before.wait()
        state = self.folder / f"{name}.tpm"
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir()
        control = self._tpm_socket(name)
        control.unlink(missing_ok=True)
        words = ["socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"]
        self._tpms[name] = subprocess.Popen([self.source / "swtpm/bin/swtpm", *words, "--terminate"])
        deadline = time.monotonic() + 30
        while not control.exists():
            assert time.monotonic() < deadline, "swtpm did not start"
            time.sleep(0.02)

    def devices(self, name: str) -> list[str]:
        def drive(file: str | Path, name: str, kind: str, *more: str) -> list[str]:
            return ["-drive", ",".join((f"file={self.folder / file}", "format=raw", f"if={kind}", name, *more))]

        return [
            *("-machine", "q35"),
            *drive(self.source / FIRMWARE / "OVMF_CODE_4M.fd", "unit=0", "pflash", "readonly=on"),
            *drive("variables.raw", "unit=1", "pflash"),
            *("-device", "virtio-scsi-pci,id=scsi"),
            *drive("data.raw", "id=data", "none"),
            *("-device", "scsi-hd,drive=data"),
            *("-device", "VGA"),
            *("-device", "qemu-xhci", "-device", "usb-tablet"),
            *drive("usb.raw", "id=usb", "none"),
            *("-device", "usb-storage,drive=usb"),
            *("-chardev", f"socket,id=tpm,path={self._tpm_socket(name)}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"),
            *("-device", f"{self.tpm},tpmdev=tpm0"),
            *("-device", "virtio-balloon-pci,free-page-reporting=on"),
            *("-chardev", f"socket,id=port,path={self._port(name)},server=on,wait=off"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=talk"),
            *("-netdev", f"user,id=net,tftp={self.folder / 'tftp'}", "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-device", "virtio-rng-pci"),
        ]

    def verdict(self) -> dict[str, int]:
        """Move the pointer, and have all programs of the guest and the talking host check their results."""
        for number in range(3):
            axes = [{"type": "abs", "data": {"axis": axis, "value": 100 * number}} for axis in ("x", "y")]
            self.qmp("input-send-event", events=axes)
        self.talker.path = self._port(self.name)
        self.talker.wait()
        return super().verdict()

    def end(self) -> None:
        self.talker.path = None
        super().end()
        for process in self._tpms.values():
            process.kill()
            process.wait()
        self._tpms.clear()

    def close(self) -> None:
        """Stop the thread of the host that talks to the guest."""
        self.talker.close()

    def _port(self, name: str) -> Path:
        return self.folder / f"{name}.port"

    def _tpm_socket(self, name: str) -> Path:
        return self.folder / f"{name}.tpm-control"


def missing(source: Path) -> str | None:
    """Return the file or program that is missing for the zoo; None if there is none."""
    files = [source / name for name in ("debian/vmlinuz", FIRMWARE, "swtpm/bin/swtpm")]
    return next((os.fspath(file) for file in files if not file.exists()), None)
