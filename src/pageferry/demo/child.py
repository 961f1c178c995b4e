"""Child process that runs a share of a ledger's partitions.

`host.python` starts it with the arguments FILE SIZE SOCKET; FILE and SOCKET are inherited descriptors. The child
receives orders over the socket, and exits when the parent closes the socket or exits.
"""

from __future__ import annotations

import signal
import socket
import sys

from pageferry import _engine
from pageferry.demo.orders import MAX_PACKET, Order, Reply, decode_order, encode


class Child:
    """Executor of the orders that the child receives."""

    def __init__(self, file: int, size: int) -> None:
        self._mapping = _engine.Mapping(file, size)
        self._ledger: _engine.Ledger | None = None

    def obey(self, order: Order) -> Reply:
        """Carry out one order and return the reply. If the order fails, the reply contains the error."""
        try:
            return self._obey(order)
        except (OSError, RuntimeError, ValueError) as error:
            return Reply(error=str(error))

    def _obey(self, order: Order) -> Reply:
        if order.verb == "map":  # the constructor has mapped the file: this order only confirms it
            return Reply()
        if order.verb == "attach":
            self._ledger = _engine.Ledger.attach(self._mapping, first_thread=order.first_thread, threads=order.threads)
            return Reply()
        if self._ledger is None:
            return Reply(error="no ledger has been attached")
        match order.verb:
            case "start":
                self._ledger.start(paused=True)
                return Reply(tids=self._ledger.tids)
            case "stalls":
                stalls = self._ledger.stalls(reset=order.reset)
                return Reply(longest_stall=stalls.longest, stalls=stalls.histogram)
            case "pause":
                self._ledger.pause()
            case "resume":
                self._ledger.resume()
            case "stop":
                self._ledger.stop()
        return Reply()


def main() -> None:
    """Carry out orders until the socket is closed."""
    # The parent handles Ctrl-C on the terminal: it sends the order to stop between two operations.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    file, size, descriptor = (int(argument) for argument in sys.argv[1:4])
    child = Child(file, size)
    with socket.socket(fileno=descriptor) as orders:
        while data := orders.recv(MAX_PACKET):
            orders.send(encode(child.obey(decode_order(data))))


if __name__ == "__main__":
    main()
