"""mkdocs hook that provides the styles and anchors that the scripts of the theme require on all pages."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mkdocs.config.defaults import MkDocsConfig

_slugify = import_module("markdown.extensions.toc").slugify  # a package without type annotations
_HIGHLIGHTING = '<style id="hljs-light"></style><style id="hljs-dark"></style>'
"""Placeholders for the styles of an unused syntax highlighter; the theme's dark mode switch needs them."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the function that creates anchors. mkdocs calls this hook after it has read mkdocs.yml."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor
    return config


def on_post_page(output: str, **_: Any) -> str:
    """Add the placeholders to a page. mkdocs calls this function before it writes each page."""
    return output.replace("</head>", f"{_HIGHLIGHTING}</head>", 1)


def anchor(heading: str, separator: str) -> str:
    """Return the anchor of a heading.

    An anchor does not begin with a digit, because the theme uses anchors as CSS selectors.
    """
    found: str = _slugify(heading, separator)
    return f"n{found}" if found[:1].isdigit() else found
