"""Options of sampling and reclaim."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pageferry.errors import UsageError
from pageferry.images.metadata import Codec
from pageferry.options import API_ONLY, Count, Duration, Fraction, PathName, check

_CODEC: Codec = "lz4"
"""Default compression of the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of sampling and reclaim. Raises UsageError if they are invalid."""

    sample: Annotated[float, Fraction(), "sampling"] = 0.05
    """Maximum fraction of the huge pages to sample per round."""
    window: Annotated[float, Duration(1e-3, 60.0), "sampling"] = 0.2
    """Time during which accesses are counted, such as 200ms or 1s."""
    rounds: Annotated[int, Count(1, 1_000_000), "sampling"] = 5
    """Maximum number of rounds, each with different samples."""
    budget: Annotated[float | None, Fraction(zero=True), "sampling"] = 0.01
    """Limit for sampling, as a fraction of one CPU; the number of samples is reduced to stay below it; 0: unlimited."""
    reclaim: Annotated[Literal["store", "swap"] | None, "reclaiming"] = None
    """Split the huge pages selected by the policy, and move their cold base pages to swap or to a compressed store,
    from which they are reloaded on demand; the store requires a guest or an arena."""
    store: Annotated[
        Path | None,
        PathName(metavar="DIR", unset="that of the workload in the run directory, usually a tmpfs"),
        "reclaiming",
    ] = None
    """Directory for the store."""
    codec: Annotated[Codec, "reclaiming"] = _CODEC
    """Compression of the store."""
    seed: Annotated[int | None, Count(0, 1 << 63), API_ONLY] = None
    """Seed of the random choice of samples; None for a different choice in each run."""

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "budget", self.budget or None)
        if self.store is not None and (self.reclaim != "store" or not self.store.is_dir()):
            raise UsageError(
                f"invalid `store` {self.store}: expected an existing directory, together with `reclaim` store"
            )
        if self.codec != _CODEC and self.reclaim != "store":
            raise UsageError(f"`codec` {self.codec} requires `reclaim` store: nothing else is compressed")
