"""Checkpoints: memory saved while the workload runs, and read back while it runs (S4, S8, S10)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package, which goes by the same name as the function `pageferry.checkpoint` and so is called like it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from pageferry.checkpoint.save import checkpoint

        return checkpoint(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
