"""mkdocs hook that adds the pages generated from the code. The tree contains no files for these pages."""

from __future__ import annotations

from importlib import import_module

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = ("events", "metrics")
"""Names of scripts in this directory, and of the pages that they generate. mkdocs searches this directory while it
loads the hook."""

_texts = {name: import_module(name).page() for name in PAGES}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages. mkdocs calls this function when it has collected the files of the documentation."""
    for name, text in _texts.items():
        files.append(File.generated(config, f"{name}.md", content=text))
    return files
