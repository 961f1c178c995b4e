"""First code of a Python child: `python -I run_module.py ROOTS MODULE ARGUMENTS...` (see `host.python`).

ROOTS: folders of packages as a JSON list. Those that are missing on `sys.path` are inserted in front of site-packages
and behind the standard library, so that nothing in them replaces a module of it. Then MODULE runs as `__main__`.
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
