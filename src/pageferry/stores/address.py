"""URLs of stores and of the images in them.

The last component of the URL of an image is its name, and the rest is the URL of the store. A store is a prefix of a
bucket, so that one bucket can contain several stores::

    s3://bucket/guests/web-monday       image `web-monday` of the store s3://bucket/guests
    file:///srv/images/web-monday       image `web-monday` of the store file:///srv/images
    s3://bucket/guests/web@DIGEST       image `web`, only if its manifest has this digest (64 hexadecimal digits)
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pageferry import values
from pageferry.errors import UsageError

WRITABLE = ("s3", "gs", "az", "file")
READ_ONLY = ("http", "https")
SCHEMES = (*WRITABLE, *READ_ONLY)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,199}")
_PIN = re.compile(r"(.*)@([0-9a-f]{64})")
_EXPECTED = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, file:///DIRECTORY or https://..."


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """URL of a store, without a slash at the end."""

    text: str
    scheme: str

    @property
    def writable(self) -> bool:
        """Whether the scheme supports uploads."""
        return self.scheme in WRITABLE

    @property
    def folder(self) -> Path | None:
        """Directory of a store on a local file system; None for other stores."""
        return Path(unquote(urlsplit(self.text).path)) if self.scheme == "file" else None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """URL of an image in a store."""

    store: StoreUrl
    name: str
    manifest: str | None = None
    """Required digest of the manifest, hexadecimal; None if any manifest is accepted."""

    def __str__(self) -> str:
        return f"{self.store}/{self.name}"


def is_url(value: object) -> bool:
    """Return whether a value is a text that begins with a scheme and `://`. A path object is never a URL."""
    return isinstance(value, str) and _URL.match(value) is not None


def store_url(name: str, value: object) -> StoreUrl:
    """Check the URL of a store, the value of the parameter `name`. Raises UsageError."""
    text = values.text(name, value).rstrip("/")
    if not is_url(f"{text}/") or not text.isprintable():
        raise UsageError(f"invalid `{name}` {text!r}: expected the URL of a store, such as {_EXPECTED}")
    parts = urlsplit(text)
    if parts.scheme.lower() not in SCHEMES:
        raise UsageError(
            f"invalid `{name}` {text!r}: unsupported scheme {parts.scheme}, expected one of {', '.join(SCHEMES)}"
        )
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise UsageError(
            f"invalid `{name}`: expected a URL without credentials, ? and #; give credentials by environment variables"
        )
    local = parts.scheme.lower() == "file"
    if local and (parts.netloc or not os.path.isabs(parts.path)):
        raise UsageError(f"invalid `{name}` {text!r}: expected an absolute path, such as file:///srv/images")
    if not local and not parts.netloc:
        raise UsageError(f"invalid `{name}` {text!r}: the bucket or host is missing, expected {_EXPECTED}")
    return StoreUrl(text, parts.scheme.lower())


def image_url(name: str, value: object, default: str | None = None) -> ImageUrl:
    """Check the URL of an image. `default`: name of the image if the URL ends with a slash. Raises UsageError."""
    text = values.text(name, value)
    if text.endswith("/") and default is not None and is_url(text):
        return ImageUrl(store_url(name, text), image_name(name, default))
    head, _, tail = text.rpartition("/")
    if not is_url(f"{head}/") or head.endswith(":/"):
        raise UsageError(
            f"invalid `{name}` {text!r}: expected the URL of an image, which is the URL of a store and a name, such as "
            "s3://BUCKET/PREFIX/NAME"
        )
    pinned = _PIN.fullmatch(tail)
    tail, manifest = pinned.groups() if pinned is not None else (tail, None)
    return ImageUrl(store_url(name, head), image_name(name, tail), manifest)


def image_name(name: str, value: str) -> str:
    """Check the name of an image in a store. Raises UsageError."""
    if _PIN.fullmatch(value) is not None:
        raise UsageError(f"invalid `{name}`: invalid image name {value!r}, which ends with the digest of a manifest")
    if _NAME.fullmatch(value) is None:
        raise UsageError(
            f"invalid `{name}`: invalid image name {value!r}, expected up to 200 letters, digits and ._+=@- of ASCII, "
            "and a letter, a digit or _ at the beginning"
        )
    return value
