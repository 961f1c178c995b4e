"""Program with an arena that another process evicts to a cold store.

Commands on standard input:

- `touch`: read one byte of each 2 MiB
- `look`: check the contents of the arena, and exit
- any other command: check the contents in a forked child and in the program, and exit
"""

import json
import os
import sys

from pageferry import Arena

SIZE = 16 << 20


def contents(page: int) -> bytes:
    return page.to_bytes(8, "little") * 512


def right(arena: Arena) -> bool:
    memory = memoryview(arena)
    return all(memory[page * 4096 : (page + 1) * 4096] == contents(page) for page in range(SIZE // 4096))


def main() -> None:
    arena = Arena(SIZE, "cold", on_pause=lambda: None)
    for page in range(SIZE // 4096):
        memoryview(arena)[page * 4096 : (page + 1) * 4096] = contents(page)
    arena.collapse()
    print(json.dumps({"ready": True}), flush=True)
    while (order := sys.stdin.readline().strip()) == "touch":
        first = [memoryview(arena)[unit] for unit in range(0, SIZE, 2 << 20)]
        print(json.dumps({"touched": len(first)}), flush=True)
    if order == "look":
        print(json.dumps({"right": right(arena)}), flush=True)
        return
    child = os.fork()
    if child == 0:
        os._exit(0 if right(arena) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"right": code == 0 and right(arena)}), flush=True)


main()
