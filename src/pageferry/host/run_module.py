"""Entry point of Python children: `python -I run_module.py ROOTS MODULE ARGUMENTS...` (see `host.python`).

ROOTS is a JSON list of directories that contain packages. Directories that `sys.path` lacks are inserted after the
standard library, so that no file in them replaces one of its modules, and before site-packages. MODULE is then run as
`__main__`.
"""

from __future__ import annotations

import json
import runpy
import site
import sys


def main() -> None:
    """Complete `sys.path` and run the module."""
    roots, module = json.loads(sys.argv[1]), sys.argv[2]
    packages = site.getsitepackages()
    end = next((number for number, path in enumerate(sys.path) if path in packages), len(sys.path))
    sys.path[end:end] = [root for root in roots if root not in sys.path]
    del sys.argv[:2]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
