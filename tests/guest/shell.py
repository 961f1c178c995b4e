"""Shell guest: executes commands from its serial line, with busybox and modules of Debian's kernel (see shell.sh)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from tests.guest import initrd
from tests.guest.debian import Dialogue
from tests.guest.machines import GuestParts

INIT = Path(__file__).with_name("shell.sh")


@dataclass(frozen=True, slots=True)
class ShellGuests:
    """Guests whose serial lines are sockets in `folder`."""

    parts: GuestParts
    folder: Path

    def command(self, *options: str) -> list[str]:
        """Return the command line of QEMU, in which {name} stands for the name of the guest."""
        assert self.parts.initrd is not None
        words = ["-m", "256M", "-serial", f"unix:{self.folder}/{{name}}.serial,server=on,wait=off"]
        words += ["-kernel", str(self.parts.kernel), "-initrd", str(self.parts.initrd)]
        words += ["-append", "console=ttyS0 quiet no_timer_check mitigations=off panic=-1"]
        return self.parts.bare(*words, *options)

    async def ask(self, name: str, *commands: str, booted: bool = True) -> list[str]:
        """Have a guest execute commands. Return their outputs, in which spaces replace ends of lines. `booted`: whether
        the guest has already booted; otherwise, wait for that."""

        def talk() -> list[str]:
            dialogue = Dialogue(self.folder / f"{name}.serial")
            try:
                if not booted:
                    dialogue.ready()
                return [dialogue.ask(command) for command in commands]
            finally:
                dialogue.close()

        return await asyncio.to_thread(talk)


def build(qemu: Path, cache: Path, busybox: Path, folder: Path) -> ShellGuests:
    """Build the initrd in a folder. `cache`: folder with Debian's kernel and its modules."""
    modules = [(path.name, path.read_bytes()) for path in sorted((cache / "identity").iterdir())]
    image = folder / "initrd"
    initrd.write(image, initrd.archive(INIT.read_bytes(), modules, [("bin/busybox", busybox.read_bytes())]))
    return ShellGuests(GuestParts(qemu, cache / "vmlinuz", image), folder)
