"""Process of a provider of storage blocks, for a program that loads memory of its own from an image (S10).

The connection to the engine of the program is standard input. The argument is a JSON list with the parameters of
`Provider`; each file is a list of its descriptor and the descriptor of its block table. The process exits when the
program has released the image.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from pageferry.printable import PrintableFormatter
from pageferry.stores.address import image_url
from pageferry.stores.provider import Provider, SuppliedFile


def main() -> int:
    """Serve the program until it closes the connection. Return the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("pageferry: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program decides what an interrupt ends
    url, described, first, path = json.loads(sys.argv[1])
    folder = Path(path) if path is not None else None
    files = [SuppliedFile(*file) for file in described]
    asyncio.run(Provider(image_url("url", url), files, first, folder).run(socket.socket(fileno=0)))
    return 0


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # threads of the client may still end their last calls: see `lazy_image.exit_process`
