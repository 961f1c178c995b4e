"""mkdocs hook: adds the pages that are made from the code, which no file of the tree contains."""

from __future__ import annotations

from importlib import import_module

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = ("events", "metrics")
"""Scripts of this folder, and names of their pages. mkdocs searches this folder while it loads the hook."""

_texts = {name: import_module(name).page() for name in PAGES}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages. Called when mkdocs has collected the files of the documentation."""
    for name, text in _texts.items():
        files.append(File.generated(config, f"{name}.md", content=text))
    return files
