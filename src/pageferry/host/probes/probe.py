"""What a probe is: a name, something to try, and what to do when it fails."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pageferry.host.probes.child import Outcome

AS_ROOT = "run as root"


def newer_kernel(release: str, option: str | None = None) -> str:
    """The remedy for a kernel that does not have it: the release it came with, and what it is built with."""
    return f"use a kernel from {release} on" + (f", built with {option}" if option else "")


def unknown_to_kernel(remedy: str) -> dict[int, str]:
    """One remedy for every errno that says the kernel does not know what was asked of it."""
    return dict.fromkeys((errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP), remedy)


@dataclass(frozen=True, slots=True)
class Probe:
    """A feature, and how to find out whether it works here."""

    name: str
    """Of the feature, as in reports and docs/support.md."""
    attempt: Callable[[], str]
    """Tries the real thing, and returns a few words on what was found. Raises OSError or Unavailable."""
    remedy: str
    """What to do when it fails in a way that says no more."""
    remedies: Mapping[int, str] = field(default_factory=dict)
    """What to do, by errno."""

    def remedy_for(self, outcome: Outcome) -> str | None:
        """What to do about an outcome; None when there is nothing to be done."""
        if outcome.available:
            return None
        if outcome.error is None:
            return outcome.remedy or self.remedy
        return outcome.remedy or self.remedies.get(outcome.error, self.remedy)
