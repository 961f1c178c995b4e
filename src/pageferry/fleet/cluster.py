"""Ray: the only module of the fleet that uses it (package `ray`, 2.50 to 2.x, the extra `ray`).

Ray provides membership, names of actors, their restarts, and calls. Each host has one agent: an actor in the namespace
`pageferry` whose name is that of the host. It is pinned to its node, and restarted there if its process exits. Ids of
Ray's nodes change whenever Ray is restarted, so they are never stored.

Ray executes any code that a client sends. A cluster is therefore used only if it requires a token, and, on addresses
other than loopback, if its connections are encrypted by TLS (RAY_AUTH_MODE, RAY_USE_TLS). A client cannot ask a cluster
whether it requires the token. It tries: `cluster_probe` connects without one, and must be refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from pageferry.errors import FleetError, UnsupportedError, UsageError
from pageferry.fleet.agent import Agent
from pageferry.fleet.protocol import AnyRequest, Describe, HostReport, decode
from pageferry.host.blocking import in_thread
from pageferry.host.python import start_python
from pageferry.migration.events import MigrationResult

T = TypeVar("T")

NAMESPACE = "pageferry"
_AGENT = "host:"
"""Prefix of the names of agents in the namespace."""
CALL = 30.0
"""Seconds to wait for the reply of an agent, in addition to the time that the request itself waits."""
RECEIVING = 120.0
"""Seconds to wait until the successor of a movable actor has started and listens."""
TAKING_OVER = 15.0
"""Seconds for which `join` waits for the end of an earlier agent of the same host."""
_PORT = 6379
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
"""Settings of Ray in this process, unless the environment has others."""


class AgentUnreachable(FleetError):
    """The agent of a host does not reply. The state of its workloads is not known."""


class RayAgent(Agent):
    """Agent as an actor of Ray."""

    async def node(self) -> str:
        """Return the id of the node on which this actor runs."""
        return str(_ray().get_runtime_context().get_node_id())


class Cluster:
    """Connection of this process to a cluster of Ray. A process has at most one."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._agents: dict[str, Any] = {}
        self._own: dict[str, Any] = {}
        """Agents that this process has started. Ray ends an actor when its owner drops the last reference to it."""

    @classmethod
    def connect(cls, address: str | None = None, *, insecure: bool = False) -> Cluster:
        """Connect to a cluster.

        `address`: HOST:PORT of its head (default: RAY_ADDRESS, or the cluster of which this host is a node).
        `insecure`: use a cluster without a token, or without TLS. Blocks for seconds. Raises UnsupportedError without
        Ray, FleetError if the cluster cannot be reached or is not secure.
        """
        target = _target(address)
        _check_reachable(target)
        ray = _ray()
        _refuse_insecure(target, insecure=insecure)
        try:
            ray.init(
                address=target,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level="CRITICAL",
                configure_logging=False,
                ignore_reinit_error=True,
                **_own_address(target),
            )
        except Exception as error:  # Ray raises many classes
            raise FleetError(
                f"cannot connect to Ray at {target}: {_cause(error)}; start Ray on this host (`ray start "
                "--address=...`), and use the token of the cluster (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN)"
            ) from error
        return cls(ray)

    def close(self) -> None:
        """Disconnect. Agents that this process has started end."""
        self._ray.shutdown()

    # -- agents

    def start_agent(self, name: str, config: bytes) -> None:
        """Start the agent of this host, pinned to this node of Ray. It ends with this process, or by `stop_agent`.

        Blocks. Raises UsageError if another host has the name.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = self._ray.get_runtime_context().get_node_id()
        actor = self._ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)(RayAgent)
        options = {
            "name": _AGENT + name,
            "namespace": NAMESPACE,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        end = time.monotonic() + TAKING_OVER
        while True:
            try:
                self._own[name] = actor.options(**options).remote(config)
                return
            except ValueError as taken:
                if time.monotonic() > end:
                    raise UsageError(
                        f"cannot join as {name}: another host of the fleet has this name; choose another with --name"
                    ) from taken
                time.sleep(0.2)  # an agent of this host whose `join` was killed ends soon

    def stop_agent(self, name: str) -> None:
        """Stop the agent that `start_agent` has started."""
        if (agent := self._own.pop(name, None)) is not None:
            with contextlib.suppress(Exception):
                self._ray.kill(agent, no_restart=True)

    async def names(self) -> list[str]:
        """Return the names of the hosts that have joined, sorted."""
        from ray.util import list_named_actors

        found = await self._asked(list_named_actors)
        return sorted(name.removeprefix(_AGENT) for name in found if name.startswith(_AGENT))

    async def call(self, host: str, request: AnyRequest, kind: type[T], *, timeout: float = CALL) -> T:
        """Send a request to the agent of a host, and return its reply.

        `timeout`: seconds to wait. Raises AgentUnreachable if there is no reply, and the error of the agent.
        """
        return decode(await self._call(host, "call", msgspec.json.encode(request), timeout=timeout), kind, host)

    async def report(self, host: str) -> HostReport:
        """Return the state of a host. Raises AgentUnreachable."""
        return await self.call(host, Describe(), HostReport)

    async def draining(self) -> set[str]:
        """Return the names of the hosts whose nodes Ray drains."""
        nodes = await self._asked(self._draining_nodes)
        if not nodes:
            return set()
        found = set()
        for host in await self.names():
            with contextlib.suppress(AgentUnreachable):
                if await self._call(host, "node", timeout=CALL) in nodes:
                    found.add(host)
        return found

    def _draining_nodes(self) -> set[str]:
        # Ray has no public interface for it. tests/kernel/test_fleet.py checks this one.
        return set(self._ray._private.state.state.get_draining_nodes())

    async def _call(self, host: str, method: str, *arguments: bytes, timeout: float) -> Any:
        try:
            agent = await self._agent(host)
            async with asyncio.timeout(timeout):
                return await getattr(agent, method).remote(*arguments)
        except TimeoutError as slow:
            raise AgentUnreachable(
                f"cannot reach the agent of {host}: no reply within {timeout:g} s; see `pageferry fleet status`"
            ) from slow
        except self._ray.exceptions.RayError as error:
            self._agents.pop(host, None)
            raise AgentUnreachable(
                f"cannot reach the agent of {host}: {_cause(error)}; start `pageferry fleet join` on that host"
            ) from error

    async def _agent(self, host: str) -> Any:
        """Return the agent of a host. Raises AgentUnreachable."""
        if host not in self._agents:
            try:
                self._agents[host] = await in_thread(self._ray.get_actor, _AGENT + host, NAMESPACE)
            except (ValueError, self._ray.exceptions.RayError) as error:
                raise AgentUnreachable(
                    f"cannot reach the agent of {host}: no host of this name has joined; see `pageferry fleet status`"
                ) from error
        return self._agents[host]

    async def _asked(self, call: Any) -> Any:
        try:
            return await in_thread(call)
        except Exception as error:
            raise FleetError(
                f"cannot reach the head of the cluster: {_cause(error)}; check that Ray runs there"
            ) from error


def listening_address(address: str | None) -> str:
    """Return the address of this host by which the head of the cluster reaches it: the default for receivers."""
    return next(iter(_own_address(_target(address)).values()), "127.0.0.1")


def _ray() -> Any:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as missing:
        raise UnsupportedError(
            "cannot use a fleet: the package ray is not installed; run `pip install 'pageferry[ray]'`"
        ) from missing
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray


def _target(address: str | None) -> str:
    """Return the address of the head, HOST:PORT. Raises UsageError."""
    given = address or os.environ.get("RAY_ADDRESS") or f"127.0.0.1:{_PORT}"
    host, _, port = given.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"invalid address of the cluster {given!r}: expected HOST:PORT, the address of Ray's head")
    return given


def _own_address(target: str) -> dict[str, str]:
    """Return our address on the route to the head, by which Ray finds the node of this host."""
    host, _, port = target.rpartition(":")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return {"_node_ip_address": str(probe.getsockname()[0])}
    return {}


def _check_reachable(target: str) -> None:
    """Raise FleetError if no process listens at the address: Ray would try to connect for a minute."""
    host, _, port = target.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=10):
            pass
    except OSError as error:
        raise FleetError(
            f"cannot connect to Ray at {target}: {error.strerror or error}; start its head, or correct the address"
        ) from error


def _refuse_insecure(target: str, *, insecure: bool) -> None:
    """Raise FleetError if the cluster accepts clients without a token, or has no TLS."""
    host = target.rpartition(":")[0]
    if insecure:
        return
    missing = list(_missing(target, host))
    if missing:
        raise FleetError(
            f"cannot use the cluster at {target}: {' and '.join(missing)}, so that other users can execute code on its "
            "hosts; see docs/security.md, or give --insecure"
        )


def _missing(target: str, host: str) -> Iterator[str]:
    if _accepts_without_token(target):
        yield "it accepts clients without a token"
    if not _is_loopback(host) and os.environ.get("RAY_USE_TLS") not in ("1", "true"):
        yield "its connections are not encrypted (RAY_USE_TLS)"


def _accepts_without_token(target: str) -> bool:
    with start_python("pageferry.fleet.cluster_probe", target, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as probe:
        said, complaint = probe.communicate()
    match said.decode().strip():
        case "accepted":
            return True
        case "refused":
            return False
        case _:
            tail = complaint.decode(errors="replace").strip().splitlines()
            raise FleetError(
                f"cannot find out whether the cluster at {target} requires a token: "
                f"{tail[-1] if tail else 'no reply'}; check that Ray runs there"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _cause(error: Exception) -> str:
    """Return the cause of an error of Ray in one line: the last one, if the error contains a traceback."""
    lines = re.sub("\x1b\\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    return lines[
        -1 if any(line.startswith("Traceback") for line in lines) or "creation task" in lines[0] else 0
    ].rstrip(".")


# -- movable actors


class ActorExited(FleetError):
    """A movable actor has exited, or its node has been lost."""


class MovableActor:
    """One process of a movable actor."""

    def __init__(self, handle: Any, generation: int) -> None:
        self._handle = handle
        self.generation = generation

    def call(
        self, client: str, number: int, method: str, arguments: bytes, timeout: float | None = None
    ) -> tuple[str, bytes]:
        """Send a call, and wait for its end for `timeout` seconds. Raises ActorExited, TimeoutError."""
        how, result = self._get(self._handle.call.remote(client, number, method, arguments), timeout)
        return str(how), bytes(result)

    def call_start(self, size: int | str) -> None:
        """Create the state. Raises its errors, ActorExited."""
        self._get(self._handle.start.remote(size))

    def receive(self) -> str:
        """Start the receiver, and return its address. Raises its errors, ActorExited, TimeoutError."""
        return str(self._get(self._handle.receive.remote(), RECEIVING))

    def arrival(self) -> str:
        """Return whether the state of the predecessor has arrived. Raises ActorExited, also without a reply."""
        try:
            return str(self._get(self._handle.arrival.remote(), CALL))
        except TimeoutError as slow:
            raise ActorExited(f"no reply within {CALL:g} s") from slow

    def move(self, node: str) -> MigrationResult | None:
        """Move the actor to a node, and return the result of the migration; None if it has moved before. Raises its
        errors, ActorExited."""
        found: MigrationResult | None = self._get(self._handle.move.remote(node))
        return found

    def kill(self) -> None:
        """End the process."""
        with contextlib.suppress(Exception):
            _ray().kill(self._handle, no_restart=True)

    def _get(self, reference: Any, timeout: float | None = None) -> Any:
        ray = _ray()
        try:
            return ray.get(reference, timeout=timeout)
        except ray.exceptions.GetTimeoutError as slow:
            raise TimeoutError from slow
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else FleetError(_cause(error)) from error
        except ray.exceptions.RayError as error:
            raise ActorExited(_cause(error)) from error


class MovableActors:
    """The processes of one movable actor, by generation: each successor has the next higher one."""

    def __init__(self, name: str) -> None:
        self._prefix = f"movable:{name}:"
        self._name = name
        self._known: MovableActor | None = None

    def start(self, kind: type, node: str, generation: int, arguments: tuple[Any, ...]) -> MovableActor:
        """Start a process on a node. It outlives this process. Raises UsageError if the name is taken."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = _ray().remote(num_cpus=0, max_restarts=0, max_concurrency=32)(kind)
        try:
            handle = actor.options(
                name=f"{self._prefix}{generation}",
                namespace=NAMESPACE,
                lifetime="detached",
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            ).remote(*arguments)
        except ValueError as taken:
            raise UsageError(f"cannot start {self._name}: an actor has this name; choose another name") from taken
        return MovableActor(handle, generation)

    def current(self, seconds: float, after: int = -1) -> MovableActor:
        """Return the process with the lowest generation above `after`: a successor serves no calls before its
        predecessor has moved. Wait for at most `seconds` seconds. Raises ActorExited."""
        if self._known is not None and self._known.generation > after:
            return self._known
        end = time.monotonic() + seconds
        while True:
            found = [one for one in self._generations() if one > after]
            if found:
                with contextlib.suppress(ValueError):
                    handle = _ray().get_actor(f"{self._prefix}{min(found)}", NAMESPACE)
                    self._known = MovableActor(handle, min(found))
                    return self._known
            if time.monotonic() > end:
                raise ActorExited(f"no actor named {self._name} is running")
            time.sleep(0.05)

    def exists(self, after: int = -1, before: float = math.inf) -> bool:
        """Return whether there is a process of a higher generation than `after`, and of a lower one than `before`."""
        return any(after < one < before for one in self._generations())

    def kill(self) -> None:
        """End all processes."""
        for generation in self._generations():
            with contextlib.suppress(ValueError):
                MovableActor(_ray().get_actor(f"{self._prefix}{generation}", NAMESPACE), generation).kill()

    def _generations(self) -> list[int]:
        from ray.util import list_named_actors

        _ray()
        names = [one["name"] for one in list_named_actors(all_namespaces=True) if one["namespace"] == NAMESPACE]
        return [int(name.removeprefix(self._prefix)) for name in names if name.startswith(self._prefix)]


def ensure_connected(address: str | None, *, insecure: bool) -> None:
    """Connect this process to a cluster, unless it is connected and no address is given. Raises FleetError."""
    if address is None and "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    Cluster.connect(address, insecure=insecure)


def node_of(host: str | None) -> str:
    """Return the id of the node of a host of the fleet, of a node, or of this process (None). Raises FleetError."""
    ray = _ray()
    if host is None:
        return str(ray.get_runtime_context().get_node_id())
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    if host in nodes:
        return host
    try:
        return str(ray.get(ray.get_actor(_AGENT + host, NAMESPACE).node.remote(), timeout=CALL))
    except (ValueError, ray.exceptions.RayError) as error:
        raise AgentUnreachable(
            f"cannot find the node of {host}: {_cause(error)}; see `pageferry fleet status`"
        ) from error


def node_address() -> str:
    """Return the address of the node on which this actor runs."""
    return str(_ray().util.get_node_ip_address())


def refuge() -> str | None:
    """Return a node to which an actor of this node must move because Ray drains this node; None if it need not."""
    ray = _ray()
    draining = set(ray._private.state.state.get_draining_nodes())
    if ray.get_runtime_context().get_node_id() not in draining:
        return None
    return next((node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining), None)


def end_this_actor() -> None:
    """End the actor that runs in this process. Ray does not start it again."""
    ray = _ray()
    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
