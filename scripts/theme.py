"""For the documentation: what the scripts of its theme take for granted. Without it they stop half-way on a page."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mkdocs.config.defaults import MkDocsConfig

_slugify = import_module("markdown.extensions.toc").slugify  # a package without types
_HIGHLIGHTING = '<style id="hljs-light"></style><style id="hljs-dark"></style>'
"""Stands for the styles of a highlighter, which we do without; the switch between light and dark changes them too."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called when mkdocs.yml has been read."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor
    return config


def on_post_page(output: str, **_: Any) -> str:
    """Called with each page as it will be written."""
    return output.replace("</head>", f"{_HIGHLIGHTING}</head>", 1)


def anchor(heading: str, separator: str) -> str:
    """The anchor of a heading. Headings are looked up by selectors, which do not begin with a digit."""
    found: str = _slugify(heading, separator)
    return f"n{found}" if found[:1].isdigit() else found
