"""Fleet on this machine for tests: a Ray cluster whose nodes are network namespaces, with a run directory for each.

Ray uses its token and TLS, and the agents use certificates with the names of their hosts.
"""

from __future__ import annotations

import contextlib
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
from types import TracebackType
from typing import Any, Self

from cryptography.x509.oid import ExtendedKeyUsageOID

from pageferry.host import proc, processes
from tests.certificates import Authority
from tests.kernel.moving import Host
from tests.kernel.programs import Program
from tests.network.hosts import Network

PORT = 6379
STORE = 80_000_000
"""Size of Ray's object store, bytes: the minimum. The fleet stores no objects."""
SECONDS = 90.0
"""Timeout for the start and the end of a process."""
COMMAND_SECONDS = 600.0
"""Timeout of `pageferry fleet`: many moves on a busy machine."""
NAMES = ("a", "b", "c")


class Fleet:
    """Hosts `a`, `b` and `c` of a Ray cluster, whose head is on `a`; a context manager.

    `secure`: with a token and TLS. Otherwise Ray accepts every client.
    """

    def __init__(self, folder: Path, names: tuple[str, ...] = NAMES, *, secure: bool = True, **join: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.names = names
        self.secure = secure
        self.network = Network(folder, hosts=len(names))
        self.hosts: dict[str, Host] = dict(zip(names, self.network.hosts, strict=True))
        self.images = folder / "images"
        self.images.mkdir()
        self._join = join
        self._token = secrets.token_hex(32)
        # Paths of Ray's sockets must be shorter than 108 bytes.
        self._scratch = Path(tempfile.mkdtemp(prefix="pf-", dir="/tmp"))
        self.trust = _certificates(folder, self.hosts) if secure else {}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        """Address of Ray's head."""
        return f"{self.hosts[self.names[0]].address}:{PORT}"

    def start_ray(self, name: str) -> None:
        """Start Ray on a host, and wait until its node is in the cluster.

        Nodes start one after the other: they share a directory, in which Ray chooses the names of sockets.
        """
        head = ("--head", f"--port={PORT}", "--include-dashboard=false")
        role = head if name == self.names[0] else (f"--address={self.address}",)
        words = [
            *(str(Path(sys.executable).with_name("ray")), "start", *role),
            *(f"--node-ip-address={self.hosts[name].address}", "--num-cpus=0", f"--object-store-memory={STORE}"),
            *(f"--temp-dir={self._scratch}", "--disable-usage-stats", "--include-log-monitor=false"),
        ]
        with open(self._log("ray", name), "wb") as file:
            command = [*self.hosts[name].within, *words]
            done = subprocess.run(command, env=self.environment(name), stdout=file, stderr=file, timeout=SECONDS)
        assert done.returncode == 0, self._log("ray", name).read_text()

    def join(self, *names: str, **options: str) -> None:
        """Start `pageferry fleet join` on hosts at the same time, and wait until they have joined."""
        for name in names:
            self._start_joining(name, {"images": str(self.images), "memory": "2G", **self._join, **options})
        for name in names:
            output = self.agents[name].stdout
            assert output is not None
            line = output.readline()
            assert line, self._log("join", name).read_text()
            assert json.loads(line)["type"] == "fleet-joined"

    def _start_joining(self, name: str, options: dict[str, str]) -> None:
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        trust = ("--tls", str(self.trust[name])) if self.secure else ("--insecure",)
        command = self.command("join", "--address", self.address, "--name", name, *trust, *words, "--output", "json")
        with open(self._log("join", name), "ab") as errors:
            self.agents[name] = subprocess.Popen(
                [*self.hosts[name].within, *command],
                env=self.environment(name),
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    def _log(self, what: str, name: str) -> Path:
        return self.folder / f"{what}-{name}.log"

    def leave(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End the agent of a host by a signal to its command."""
        agent = self.agents.pop(name)
        agent.send_signal(number)
        agent.wait(SECONDS)
        assert agent.stdout is not None
        agent.stdout.close()

    def drain(self, name: str) -> None:
        """Announce that the node of a host will be preempted. Ray accepts this only for nodes other than the head."""
        here, address = self.hosts["a"], self.hosts[name].address
        program = (
            f"import ray; ray.init(address={self.address!r}, _node_ip_address={here.address!r}); "
            f"print(next(node['NodeID'] for node in ray.nodes() if node['NodeManagerAddress'] == {address!r}))"
        )
        words = [*here.within, sys.executable, "-c", program]
        found = subprocess.run(words, env=self.environment("a"), capture_output=True, text=True, timeout=SECONDS)
        assert found.returncode == 0, found.stderr
        node = found.stdout.split()[-1]
        words = [*self.hosts["a"].within, str(Path(sys.executable).with_name("ray")), "drain-node"]
        words += ["--address", self.address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        words += ["--reason-message", "test", "--deadline-remaining-seconds", "120"]
        done = subprocess.run(words, env=self.environment("a"), capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr

    def kill_ray(self) -> None:
        """Kill all processes of Ray, and the commands that run the agents. Workloads and operations are not killed."""
        for agent in self.agents.values():
            agent.kill()
        mark = str(self._scratch)
        for pid in self._processes():
            if mark in _title(pid) or _title(pid).startswith("ray::"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for name in self.names:
            self.leave(name, signal.SIGKILL)

    def command(self, *words: str) -> list[str]:
        """Return the command line of `pageferry fleet`."""
        return [sys.executable, "-m", "pageferry", "fleet", *words]

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of a process on a host."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        kept |= {"PAGEFERRY_RUN_DIR": str(self.hosts[name].run_directory), "RAY_USAGE_STATS_ENABLED": "0"}
        kept |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "RAY_AUTH_MODE": "disabled"}
        if self.secure:
            folder = self.folder / "ray"
            kept |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token, "RAY_USE_TLS": "1"}
            kept |= {
                "RAY_TLS_SERVER_CERT": str(folder / f"{name}-cert.pem"),
                "RAY_TLS_SERVER_KEY": str(folder / f"{name}-key.pem"),
                "RAY_TLS_CA_CERT": str(folder / "ca-cert.pem"),
            }
        return kept

    def start(self, *words: str, on: str | None = None) -> Program:
        """Start `pageferry fleet` on a host of the fleet (default: the first one), with JSON output."""
        name = on or self.names[0]
        words = self._complete(words)
        return Program(*self.command(*words)[1:], within=self.hosts[name].within, env=self.environment(name))

    def run(self, *words: str, on: str | None = None, code: int = 0, **environment: str) -> list[dict[str, Any]]:
        """Run `pageferry fleet` on a host of the fleet (default: the first one). Return its events."""
        name = on or self.names[0]
        done = subprocess.run(
            [*self.hosts[name].within, *self.command(*self._complete(words))],
            env=self.environment(name) | environment,
            capture_output=True,
            timeout=COMMAND_SECONDS,
        )
        assert done.returncode == code, (done.returncode, done.stdout.decode(), done.stderr.decode())
        self.said = done.stderr.decode()
        return [json.loads(line) for line in done.stdout.splitlines()]

    def status(self) -> dict[str, Any]:
        """Return the status of the fleet."""
        return self.run("status")[-1]

    def where(self) -> dict[str, str]:
        """Return the host of each workload, from the status of the fleet."""
        return {one["name"]: one["host"] for one in self.status()["workloads"]}

    def owners(self, workload: str) -> list[str]:
        """Return the hosts whose registry has the workload."""
        return [name for name, host in self.hosts.items() if workload in host.registry.entries()]

    def agent_pid(self, name: str) -> int:
        """Return the pid of the actor that is the agent of a host."""
        raylet = f"--node_ip_address={self.hosts[name].address} "
        actors = [pid for pid in self._processes() if _title(pid).startswith("ray::")]
        found = [pid for pid in actors if not _title(pid).rstrip().endswith("Agent") or "RayAgent" in _title(pid)]
        found = [pid for pid in found if raylet in _title(proc.parent(pid) or 0)]
        assert len(found) == 1, found
        return found[0]

    def kill_agent(self, name: str) -> None:
        """Kill the actor that is the agent of a host with SIGKILL. Ray starts another one."""
        os.kill(self.agent_pid(name), signal.SIGKILL)

    def _complete(self, words: tuple[str, ...]) -> tuple[str, ...]:
        cut = words.index("--") if "--" in words else len(words)
        options = ("--address", self.address, "--output", "json", *(() if self.secure else ("--insecure",)))
        return (*words[:cut], *options, *words[cut:])

    def _processes(self) -> list[int]:
        """Return the processes of this cluster: their command line or environment has the path of its directory, or
        they are children of such a process. Ray overwrites the command lines of its actors."""
        marks = (os.fsencode(str(self._scratch)), os.fsencode(f"PAGEFERRY_RUN_DIR={self.folder}/"))
        found = [pid for pid in proc.pids() if pid != os.getpid() and _contains(pid, marks)]
        return list({*found, *(child for pid in found for child in processes.descendants(pid))})

    def __enter__(self) -> Self:
        self.network.__enter__()
        try:
            for name in self.names:
                self.start_ray(name)
            self.join(*self.names)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.monotonic() + SECONDS
        while (left := list(self._processes())) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for agent in self.agents.values():
            agent.wait(SECONDS)
            assert agent.stdout is not None
            agent.stdout.close()
        self.network.__exit__(kind, error, trace)
        shutil.rmtree(self._scratch, ignore_errors=True)
        assert left == [], left


def _contains(pid: int, marks: tuple[bytes, ...]) -> bool:
    with contextlib.suppress(OSError):
        texts = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
        return any(mark in text for mark in marks for text in texts)
    return False


def _title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _certificates(folder: Path, hosts: dict[str, Host]) -> dict[str, Path]:
    """Create the certificates of Ray, and those of the hosts. Return the directory of each host."""
    authority = Authority()
    ray = authority.folder(folder / "ray")
    found = {}
    for name, host in hosts.items():
        assert host.address is not None
        both = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
        authority.issue(ray, name, name, also=(host.address, "127.0.0.1", "localhost"), purposes=both)
        trust = authority.folder(folder / f"tls-{name}")
        authority.issue(trust, "client", name)
        authority.issue(trust, "server", name, also=(name, host.address))
        found[name] = trust
    # Movable actors use the same path on all hosts, which is one directory here.
    shared = authority.folder(folder / "tls-shared")
    everywhere = [name for host_name, host in hosts.items() for name in (host_name, str(host.address))]
    authority.issue(shared, "client", "actors")
    authority.issue(shared, "server", "actors", also=everywhere)
    return {**found, "shared": shared}
