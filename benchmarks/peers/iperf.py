"""Throughput of one TCP stream, measured with iperf3 over loopback or between hosts."""

from __future__ import annotations

import json
import subprocess
import time

LOOPBACK = "127.0.0.1"


def one_stream(
    seconds: int = 2,
    address: str = LOOPBACK,
    there: tuple[str, ...] = (),
    here: tuple[str, ...] = (),
    port: int = 52017,
) -> float:
    """Return the megabits per second that one stream received. `there`, `here`: command prefixes on the two hosts.

    Raises CalledProcessError if iperf3 fails.
    """
    with subprocess.Popen(
        [*there, "iperf3", "-s", "-1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            time.sleep(0.3)
            client = subprocess.run(
                [*here, "iperf3", "-c", address, "-p", str(port), "-t", str(seconds), "-J"],
                check=True,
                capture_output=True,
            )
        finally:
            server.terminate()
    return float(json.loads(client.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e6
