"""iperf3: what one TCP stream over loopback carries."""

from __future__ import annotations

import json
import subprocess
import time


def one_stream(seconds: float = 2.0, port: int = 52017) -> float:
    """Received megabits per second of a single stream. Raises CalledProcessError when iperf3 fails."""
    with subprocess.Popen(
        ["iperf3", "-s", "-1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            time.sleep(0.3)
            client = subprocess.run(
                ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-t", str(seconds), "-J"],
                check=True,
                capture_output=True,
            )
        finally:
            server.terminate()
    return float(json.loads(client.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e6
