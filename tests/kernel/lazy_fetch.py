"""Program that fetches an image of the cache, is cancelled after a second, and then reads a page.

python lazy_fetch.py IMAGE      prints the error of the read
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from pageferry.errors import ImageError
from pageferry.stores.lazy_image import exit_process, fetch, open_image_file


def main() -> None:
    """Fetch, and read."""
    image = open_image_file(sys.argv[1])
    with contextlib.suppress(TimeoutError):
        asyncio.run(asyncio.wait_for(fetch(image), 1))
    try:
        image.read(0, 1)
        print("read", flush=True)
    except ImageError as error:
        print(error, flush=True)
    exit_process(0)


if __name__ == "__main__":
    main()
