"""CPU of a guest: model, signature, and feature words of CPUID, read from the vCPUs.

QEMU does not compare CPUs when it loads a state, and a guest crashes at the first instruction that the CPU lacks.
Therefore, the first message of a migration and every image contain a description of the CPU. It is compared with the
vCPUs that QEMU has created to load the state. The feature words (QOM property `feature-words`) reflect the flags of the
command line, the defaults of the machine type, and the features that accelerator and host lack.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pageferry.errors import WorkloadError
from pageferry.host.qmp import Monitor

_SIGNATURE = ("vendor", "family", "model", "stepping", "phys-bits")
_OF_THE_HOST = frozenset({"host", "max"})
"""Models whose features depend not only on the command line, but also on the host and the version of QEMU."""

_MAX_LENGTH = 16 << 10
_MAX_NAME = 200
_MAX_SHOWN = 12
_WORD = re.compile(r"([0-9a-f]{1,8}(?:\.[0-9a-f]{1,8})?\.e[abcd]x)=([0-9a-f]{1,8})")
"""Text of a feature word: leaf, subleaf (if the leaf has several), register, and bits. Numbers are hexadecimal."""

Words = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU of a guest."""

    model: str
    """Model as in `-cpu`, without flags, such as `qemu64`."""
    signature: str
    """Vendor, family, model, stepping, and bits of a physical address, separated by slashes."""
    features: str
    """Feature words of CPUID that are not zero. If vCPUs differ, their words are separated by `;`."""

    @classmethod
    async def ask(cls, monitor: Monitor, paths: list[str]) -> Self:
        """Read the CPU from the vCPUs at these QOM paths. Raises WorkloadError, WorkloadDied."""
        kind, *values = await asyncio.gather(
            *(_property(monitor, paths[0], name) for name in ("type", *_SIGNATURE)),
            *(_property(monitor, path, "feature-words") for path in paths),
        )
        signature, words = values[: len(_SIGNATURE)], values[len(_SIGNATURE) :]
        features = ";".join(dict.fromkeys(map(_text, words)))
        return cls(str(kind).removesuffix("-x86_64-cpu"), "/".join(map(str, signature)), features)

    @property
    def details(self) -> dict[str, Any]:
        """Details for the identity of a workload."""
        return {"cpu": self.model, "cpu-signature": self.signature, "cpu-features": self.features}

    def mismatch(self, theirs: Mapping[str, Any]) -> tuple[str, str] | None:
        """Compare with a CPU that has the details `theirs`. Return the first difference, as the property of that CPU
        and the property of this CPU; None if the CPUs match.

        Raises WorkloadError if the details are invalid: they are received from a peer, or read from a file.
        """
        model, signature = theirs.get("cpu", self.model), theirs.get("cpu-signature", self.signature)
        if model != self.model:
            return f"-cpu {str(model)[:_MAX_NAME]}", self.model
        if signature != self.signature:
            return f"-cpu {model} with {_readable(signature)}", _readable(self.signature)
        return self._feature_mismatch(theirs.get("cpu-features", ""))

    def _feature_mismatch(self, text: Any) -> tuple[str, str] | None:
        theirs, ours = _parse(text), _parse(self.features)
        if not theirs or not ours:
            return None
        if len(theirs) != len(ours):
            return f"{len(theirs)} kinds of vCPUs", str(len(ours))
        for other, own in zip(theirs, ours, strict=True):
            if lost := list(_bits(other, own)):
                return f"-cpu {self.model} with {_list(lost)}", "the same model without them"
            if self.model not in _OF_THE_HOST and (new := list(_bits(own, other))):
                return f"-cpu {self.model} without {_list(new)}", "the same model with them"
        return None


async def _property(monitor: Monitor, path: str, name: str) -> Any:
    return await monitor.execute("qom-get", path=path, property=name)


def _text(words: list[dict[str, Any]]) -> str:
    return " ".join(sorted(f"{_name(word)}={word['features']:x}" for word in words if word["features"]))


def _name(word: Mapping[str, Any]) -> str:
    subleaf = f".{word['cpuid-input-ecx']:x}" if "cpuid-input-ecx" in word else ""
    return f"{word['cpuid-input-eax']:x}{subleaf}.{word['cpuid-register'].lower()}"


def _parse(text: Any) -> list[Words]:
    if not isinstance(text, str) or len(text) > _MAX_LENGTH:
        raise WorkloadError(f"invalid cpu-features: expected a string of at most {_MAX_LENGTH} characters")
    return [dict(map(_parse_word, part.split(" "))) for part in text.split(";") if part]


def _parse_word(word: str) -> tuple[str, int]:
    found = _WORD.fullmatch(word)
    if found is None:
        raise WorkloadError(f"invalid cpu-features {word[:40]!r}: expected a word such as 7.0.ebx=21")
    return found[1], int(found[2], 16)


def _bits(words: Words, others: Words) -> Iterator[str]:
    """Yield the bits that are set in `words` and not in `others`."""
    for name, bits in words.items():
        left = bits & ~others.get(name, 0)
        yield from (f"CPUID {name} bit {bit}" for bit in range(32) if left >> bit & 1)


def _list(bits: list[str]) -> str:
    more = f" and {len(bits) - _MAX_SHOWN} more" if len(bits) > _MAX_SHOWN else ""
    return ", ".join(bits[:_MAX_SHOWN]) + more


def _readable(signature: Any) -> str:
    values = str(signature)[:_MAX_NAME].split("/")
    if len(values) != len(_SIGNATURE):
        return repr(str(signature)[:_MAX_NAME])
    return ", ".join(f"{name} {value}" for name, value in zip(_SIGNATURE, values, strict=True))
