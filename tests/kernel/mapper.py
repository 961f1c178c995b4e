"""Process that shares the memory of an arena: `mapper.py SOURCE HOW`. It prints its pid when ready.

SOURCE is the number of an inherited descriptor, a path to open, or `socket:PATH`, a socket on which to receive a
descriptor. HOW:

- `write`: map the memory, and write the number of each round to the first word of every page, in order
- `read`: map the first page read-only, and close the descriptor
- `hold`: only keep the descriptor open
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import time
from itertools import count

PAGE_WORDS = 512


def descriptor(source: str) -> int:
    if source.isdecimal():
        return int(source)
    if not source.startswith("socket:"):
        return os.open(source, os.O_RDWR)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(source.removeprefix("socket:"))
        listener.listen()
        connection, _ = listener.accept()
        with connection:
            _, (received,), _, _ = socket.recv_fds(connection, 16, 1)
    return received


def write(file: int) -> None:
    size = os.fstat(file).st_size
    words = memoryview(mmap.mmap(file, size)).cast("Q")
    pages = range(0, size // 8, PAGE_WORDS)
    for number in count(1):
        for page in pages:
            words[page] = number
        if number == 1:
            os.write(1, b"%d\n" % os.getpid())


def main() -> None:
    file = descriptor(sys.argv[1])
    if sys.argv[2] == "write":
        write(file)
    mapping = mmap.mmap(file, 4096, prot=mmap.PROT_READ) if sys.argv[2] == "read" else None
    if mapping is not None:
        os.close(file)
    os.write(1, b"%d\n" % os.getpid())
    time.sleep(600)


if __name__ == "__main__":
    main()
