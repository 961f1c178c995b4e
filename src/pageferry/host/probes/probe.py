"""Probe: name of a feature, operation to try, and remedies."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pageferry.host.probes.child import Outcome

AS_ROOT = "run as root"


def newer_kernel(release: str, option: str | None = None) -> str:
    """Return the remedy for a kernel that lacks a feature: the first release with the feature, and its build option, if
    any."""
    return f"use Linux {release} or later" + (f", built with {option}" if option else "")


def unknown_to_kernel(remedy: str) -> dict[int, str]:
    """Map every errno with which a kernel rejects an unknown request to this remedy."""
    return dict.fromkeys((errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP), remedy)


@dataclass(frozen=True, slots=True)
class Probe:
    """Kernel feature, and the operation that tests whether it is available."""

    name: str
    """Name of the feature, as in reports and docs/support.md."""
    attempt: Callable[[], str]
    """Function that performs the operation and returns a short observation. Raises OSError or Unavailable."""
    remedy: str
    """Remedy for failures without a more specific one."""
    remedies: Mapping[int, str] = field(default_factory=dict)
    """Remedies by errno."""

    def remedy_for(self, outcome: Outcome) -> str | None:
        """Return the remedy for an outcome; None if there is nothing to do."""
        if outcome.available:
            return None
        if outcome.error is None:
            return outcome.remedy or self.remedy
        return outcome.remedy or self.remedies.get(outcome.error, self.remedy)
