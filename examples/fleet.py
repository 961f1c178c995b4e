"""Fleet of three hosts on one machine: network namespaces with a run directory and a node of Ray each.

    examples/fleet.py                                               as root
    examples/fleet.py -- qemu-system-x86_64 -m 64M -serial 'file:{folder}/{name}-{host}' ...

The program starts workloads that verify their memory on host `a`, shows the status of the fleet, evacuates `a`, and
checks that no write was lost. With the command line of a guest, it also saves the guest, and starts clones of it on all
hosts. `{folder}` stands for a temporary directory. Requires the package `pageferry[ray]`, ip(8), unshare(1) and
nsenter(1).
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("a", "b", "c")
PORT = 6379
CLONES, LEDGERS = 3, 2


class Demo:
    """Hosts of the fleet, and the processes on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(32)
        self.namespaces: dict[str, subprocess.Popen[bytes]] = {}

    def namespace(self, name: str) -> int:
        """Create a network namespace, which exists as long as its process. Return the pid of the process."""
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"], stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        assert holder.stdout.readline()
        self.namespaces[name] = holder
        return holder.pid

    def connect(self) -> None:
        """Create the hosts, and a switch to which all of them are connected."""
        switch = self.namespace("switch")
        self.within(switch, "ip link add switch type bridge")
        self.within(switch, "ip link set switch up")
        for number, name in enumerate(NAMES, 1):
            host = self.namespace(name)
            self.within(switch, f"ip link add port{number} type veth peer name eth0 netns {host}")
            self.within(switch, f"ip link set port{number} master switch up")
            self.within(host, f"ip address add {self.address(name)}/24 dev eth0")
            self.within(host, "ip link set eth0 up")
            self.within(host, "ip link set lo up")

    def within(self, pid: int, command: str) -> None:
        """Run a command in the namespace of a process."""
        subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", *command.split()], check=True)

    def address(self, name: str) -> str:
        """Return the address of a host."""
        return f"10.88.0.{NAMES.index(name) + 1}"

    def command(self, name: str, *words: str) -> list[str]:
        """Return a command that runs on a host."""
        return ["nsenter", f"--net=/proc/{self.namespaces[name].pid}/ns/net", *words]

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of a host."""
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}
        path = os.pathsep.join(one for one in sys.path if one)
        return {**os.environ, **ray, "PYTHONPATH": path, "PAGEFERRY_RUN_DIR": str(self.folder / name)}

    def start_ray(self, name: str) -> None:
        """Start a node of Ray on a host; the first one is the head."""
        role = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if name != NAMES[0]:
            role = [f"--address={self.address(NAMES[0])}:{PORT}"]
        ray = [str(Path(sys.executable).with_name("ray")), "start", *role, f"--node-ip-address={self.address(name)}"]
        ray += ["--num-cpus=0", "--object-store-memory=80000000", f"--temp-dir={self.folder}/ray"]
        with open(self.folder / f"ray-{name}.log", "wb") as log:
            subprocess.run(self.command(name, *ray), env=self.environment(name), check=True, stdout=log, stderr=log)

    def join(self, name: str) -> None:
        """Start the agent of a host, and wait until it has joined."""
        words = ["--name", name, "--images", str(self.folder / "images"), "--memory", "2G", "--output", "json"]
        agent = subprocess.Popen(
            self.fleet(name, "join", *words), env=self.environment(name), stdout=subprocess.PIPE, start_new_session=True
        )
        assert agent.stdout is not None
        assert agent.stdout.readline(), f"{name} has not joined"

    def fleet(self, name: str, verb: str, *words: str) -> list[str]:
        """Return a command of the fleet. The network is private, so Ray needs no TLS here."""
        pageferry = [sys.executable, "-m", "pageferry", "fleet", verb]
        address = f"{self.address(NAMES[0])}:{PORT}"
        return self.command(name, *pageferry, "--address", address, "--insecure", *words)

    def show(self, verb: str, *words: str) -> None:
        """Run a command of the fleet on the first host, and show its output."""
        print(f"\n$ pageferry fleet {' '.join([verb, *words])[:110]}", flush=True)
        subprocess.run(self.fleet(NAMES[0], verb, *words), env=self.environment(NAMES[0]), check=True)

    def start_ledger(self, name: str) -> None:
        """Start the built-in workload on the first host. It detects every lost write."""
        setup = {"name": name, "size": 64 << 20, "options": {"threads": 1, "rate": 4 << 20}}
        words = [sys.executable, "-m", "pageferry.demo.process", json.dumps(setup)]
        program = subprocess.Popen(
            self.command(NAMES[0], *words), env=self.environment(NAMES[0]), stdout=subprocess.PIPE
        )
        assert program.stdout is not None
        assert program.stdout.readline()

    def verify(self) -> bool:
        """End the ledgers, and return whether none of them has lost a write."""
        found = 0
        for path in self.folder.glob("*/.fleet/*-in/stdout"):
            name = json.loads((path.parent / "order.json").read_text())["workload"]
            running = path.parents[2] / name / "workload.json"
            if not name.startswith("ledger") or not running.exists():
                continue
            os.kill(json.loads(running.read_text())["pid"], signal.SIGTERM)
            while not (path.parent / "ended.json").exists():
                time.sleep(0.1)
            report = json.loads(path.read_text().splitlines()[-1])
            print(f"{name}: {report['writes']} writes, {'intact' if report['intact'] else 'DAMAGED'}")
            found += report["intact"]
        return found == LEDGERS

    def end(self) -> None:
        """Kill all processes of the fleet: their command line or environment has the path of its directory."""
        mark = os.fsencode(f"{self.folder}/")
        for _ in range(100):
            left = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _mentions(pid, mark)]
            if not left:
                break
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)
        for holder in self.namespaces.values():
            holder.kill()
            holder.wait()


def _mentions(pid: int, mark: bytes) -> bool:
    if pid == os.getpid():
        return False
    try:
        return any(mark in Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
    except OSError:
        return False


def main() -> int:
    """Run the demonstration. Return 0 if no write was lost."""
    guest = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    folder = Path(tempfile.mkdtemp(prefix="pf-", dir="/tmp"))
    (folder / "images").mkdir()
    guest = [word.replace("{folder}", str(folder)) for word in guest]
    demo = Demo(folder)
    try:
        demo.connect()
        for name in NAMES:
            demo.start_ray(name)
        for name in NAMES:
            demo.join(name)
        for number in range(LEDGERS):
            demo.start_ledger(f"ledger-{number + 1}")
        if guest:
            demo.show("run", "guest", "--host", "a", "--", *guest)
            time.sleep(float(os.environ.get("BOOT_SECONDS", "3")))
            demo.show("checkpoint", str(folder / "images"), "guest")
            demo.show("clone", "guest.img", "--count", str(CLONES), "--spread", "--", *guest)
        demo.show("status")
        demo.show("evacuate", "a", "--dry-run")
        demo.show("evacuate", "a")
        demo.show("status")
        print()
        return 0 if demo.verify() else 1
    finally:
        demo.end()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
