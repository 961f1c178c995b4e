"""`pageferry image`: inspect, verify, compare, flatten, convert, copy or delete images, in files and in stores."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from pageferry import report
from pageferry.cli.options import given
from pageferry.control.images import (
    compare_images,
    export_image,
    flatten_image,
    image_info,
    import_image,
    verify_image,
)
from pageferry.errors import ImageError
from pageferry.events import Event
from pageferry.host.blocking import in_thread
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.stores.options import OpenOptions


async def run(args: argparse.Namespace) -> int:
    """Run the requested operation, and print its result. Files are processed in a thread, so that Ctrl-C can cancel the
    operation."""
    if args.what not in OPERATIONS:
        with open_reporter(args.output, lambda: report.ImageView()) as out:
            out.final(await _in_store(args, out))
        return 0
    result, code = await in_thread(OPERATIONS[args.what], args)
    with open_reporter(args.output, lambda: report.ImageView()) as out:
        out.final(result)
    return code


async def _in_store(args: argparse.Namespace, out: Reporter) -> Event:
    """Run an operation on a store, or the deletion of a file."""
    from pageferry.control import stores  # the other operations need no stores and no guests
    from pageferry.stores.options import CollectOptions, KeyOptions, PushOptions

    match args.what:
        case "push":
            return await stores.push_image_async(args.image, args.url, listener=out.event, **given(args, PushOptions))
        case "pull":
            return await stores.pull_image_async(args.url, args.image, listener=out.event, **given(args, OpenOptions))
        case "copy":
            keys = given(args, OpenOptions)
            return await stores.copy_image_async(args.image, args.target, listener=out.event, **keys)
        case "list":
            return await stores.list_images_async(args.url, **given(args, KeyOptions))
        case "gc":
            return await stores.collect_garbage_async(args.url, **given(args, CollectOptions))
        case _:
            return await stores.delete_image_async(args.image)


def _info(args: argparse.Namespace) -> tuple[Event, int]:
    return image_info(args.image, **given(args, OpenOptions)), 0


def _verify(args: argparse.Namespace) -> tuple[Event, int]:
    found = verify_image(args.image, **given(args, OpenOptions))
    return found, ImageError.exit_code if found.findings else 0


def _diff(args: argparse.Namespace) -> tuple[Event, int]:
    found = compare_images(args.image, args.other, **given(args, OpenOptions))
    return found, 0 if found.same else 1


def _flatten(args: argparse.Namespace) -> tuple[Event, int]:
    return flatten_image(args.image, args.target, codec=args.codec, **given(args, OpenOptions)), 0


def _import(args: argparse.Namespace) -> tuple[Event, int]:
    result = import_image(
        args.image,
        firecracker=args.firecracker,
        vmstate=args.vmstate,
        parent=args.parent,
        full=args.full,
        codec=args.codec,
    )
    return result, 0


def _export(args: argparse.Namespace) -> tuple[Event, int]:
    keys = given(args, OpenOptions)
    return export_image(args.image, firecracker=args.firecracker, vmstate=args.vmstate, **keys), 0


OPERATIONS: dict[str, Callable[[argparse.Namespace], tuple[Event, int]]] = {
    "info": _info,
    "verify": _verify,
    "diff": _diff,
    "flatten": _flatten,
    "import": _import,
    "export": _export,
}
