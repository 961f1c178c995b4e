"""Arguments of `pageferry cache`."""

from __future__ import annotations

import argparse

from pageferry.cli.parser import shared_options


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the operations."""
    parser.description = (
        "List or remove the images that restores from stores have fetched, completely or in part. The cache is in "
        "$PAGEFERRY_CACHE_DIR, and by default in /var/cache/pageferry for root and in ~/.cache/pageferry for other "
        "users. Images that were used least recently are removed if it is larger than $PAGEFERRY_CACHE_SIZE "
        "(default: 32G)."
    )
    operations = parser.add_subparsers(title="operations", dest="what", required=True, metavar="OPERATION")
    works = {
        "list": "list the images in the cache, least recently used first",
        "clear": "remove all images that no restore needs",
    }
    for name, text in works.items():
        below = operations.add_parser(name, help=text, description=f"{text.capitalize()}.", parents=[shared_options()])
        below.set_defaults(usage_error=below.error)
