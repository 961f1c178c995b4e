"""Client of the API socket of Cloud Hypervisor: HTTP with JSON over a Unix socket. All calls block."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.peer_credentials import peer_credentials

TIMEOUT = 10.0
"""Maximum time for a reply, seconds."""
MAX_REPLY = 16 << 20
"""Maximum length of a reply, bytes."""
PREFIX = "/api/v1/"

T = TypeVar("T")


class Ping(msgspec.Struct, frozen=True):
    """Reply to `vmm.ping`. Unknown fields are ignored."""

    version: str
    """Version of the package, such as `54.0.0` or, before version 24, `v23.1`."""
    build_version: str = ""

    @property
    def major(self) -> int:
        """Number of the major version; 0 if it is not known."""
        number = self.version.removeprefix("v").split(".")[0]
        return int(number) if number.isdecimal() and len(number) < 6 else 0


class _Zone(msgspec.Struct, frozen=True):
    shared: bool = False
    hugepages: bool = False


class _Memory(msgspec.Struct, frozen=True):
    size: int = 0
    shared: bool = False
    hugepages: bool = False
    zones: list[_Zone] | None = None


class _Config(msgspec.Struct, frozen=True):
    memory: _Memory


class VmInfo(msgspec.Struct, frozen=True):
    """Reply to `vm.info`. Unknown fields are ignored."""

    config: _Config
    state: str
    """`Running`, `Paused`, `Created` or another state."""

    @property
    def shares_memory(self) -> bool:
        """Whether all memory of the VM is in files that Cloud Hypervisor can send."""
        memory = self.config.memory
        parts: list[_Memory | _Zone] = list(memory.zones or [])
        if memory.size or not parts:
            parts.append(memory)
        return all(part.shared or part.hugepages for part in parts)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        """Connect to the Unix socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(str(self._path))


class Api:
    """API socket of one Cloud Hypervisor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def process(self) -> int:
        """Return the process id of Cloud Hypervisor. Raises WorkloadDied."""
        connection = _Connection(self.path)
        try:
            connection.connect()
            return peer_credentials(connection.sock).pid
        except OSError as error:
            raise self._gone(error) from error
        finally:
            connection.close()

    def ping(self) -> Ping:
        """Return the version (`vmm.ping`). Raises WorkloadError, WorkloadDied."""
        return self._get("vmm.ping", Ping)

    def info(self) -> VmInfo:
        """Return the configuration and the state of the VM (`vm.info`). Raises WorkloadError, WorkloadDied."""
        return self._get("vm.info", VmInfo)

    def put(self, name: str, body: dict[str, Any] | None = None) -> None:
        """Send a request that changes something. Raises WorkloadError if it is refused, WorkloadDied."""
        self._request("PUT", name, body)

    def _get(self, name: str, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(self._request("GET", name), type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise WorkloadError(
                f"cannot use Cloud Hypervisor on {self.path}: invalid reply to {name}: {error}; use its API socket "
                "(--api-socket)"
            ) from error

    def _request(self, method: str, name: str, body: dict[str, Any] | None = None) -> bytes:
        connection = _Connection(self.path)
        try:
            encoded = msgspec.json.encode(body) if body is not None else None
            headers = {"Content-Type": "application/json"} if encoded is not None else {}
            connection.request(method, PREFIX + name, encoded, headers)
            reply = connection.getresponse()
            contents = reply.read(MAX_REPLY)
        except TimeoutError as error:
            raise WorkloadError(
                f"cannot use Cloud Hypervisor on {self.path}: no reply to {name} within {TIMEOUT:g} s; see its log"
            ) from error
        except OSError as error:
            raise self._gone(error) from error
        except http.client.HTTPException as error:
            raise WorkloadError(
                f"cannot use Cloud Hypervisor on {self.path}: invalid reply to {name} ({type(error).__name__}); use "
                "its API socket (--api-socket)"
            ) from error
        finally:
            connection.close()
        if not 200 <= reply.status < 300:
            words = contents[:1000].decode(errors="replace").strip()
            raise WorkloadError(
                f"cannot use Cloud Hypervisor on {self.path}: it has refused {name} with status {reply.status}: "
                f"{words}; see its log"
            )
        return contents

    def _gone(self, error: OSError) -> WorkloadDied:
        return WorkloadDied(
            f"cannot use Cloud Hypervisor on {self.path}: {error.strerror or error}; use the API socket (--api-socket) "
            "of a running Cloud Hypervisor"
        )
