"""Print the Events page of the documentation, generated from the event types and their docstrings.

`make docs` adds the page to the site (`scripts/generated_pages.py`).
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import msgspec

import pageferry
from pageferry.docstrings import field_docstrings
from pageferry.events import SCHEMA, Event
from pageferry.report.events import LogEnd, LogHeader

HEAD = f"""# Events

With `--log FILE` each command writes its events to FILE as JSON lines. With `--output json` the same objects are
written to stdout, without `at-ms`. `pageferry report FILE` draws a log. This page is generated from the code.

A log consists of a `log` line, events (in most cases with a result), and an `end` line. Each line has a `type` and
`at-ms`, the milliseconds since the first line on a monotonic clock. If a log has no `end`, its command was killed or is
still running; only the last line may be incomplete. Secret arguments and the command line of a guest are not recorded.

The schema number is {SCHEMA}. Fields and types may be added at any time: ignore those that you do not know. The number
increases if a field or type is renamed or removed, or changes its meaning. Sizes are in bytes unless stated otherwise.
"""


def modules() -> None:
    """Import all modules of pageferry, so that all event types are defined."""
    for module in pkgutil.walk_packages(pageferry.__path__, "pageferry."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def events() -> dict[str, type[Event]]:
    """Return the event types by tag. Raises ValueError if two types have the same tag."""
    modules()
    found: dict[str, type[Event]] = {}
    for event in _below(Event):
        tag = str(event.__struct_config__.tag)
        if not event.__module__.startswith("pageferry."):
            continue
        if tag in found:
            raise ValueError(f"invalid tag {tag!r} of {event}: {found[tag]} has the same tag")
        found[tag] = event
    return found


def _below(kind: type[Event]) -> Iterator[type[Event]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)


def page() -> str:
    """Return the text of the Events page, in Markdown."""
    found = events()
    first = ["log", "end"]
    assert [found[tag] for tag in first] == [LogHeader, LogEnd]
    order = first + sorted(set(found) - set(first))
    inner: dict[str, type[msgspec.Struct]] = {}
    parts = [HEAD, *(f"## `{tag}`\n\n{_text(found[tag])}\n\n{_table(found[tag], inner)}" for tag in order)]
    parts.append("# Parts of events\n")
    done: set[str] = set()
    while todo := sorted(set(inner) - done):
        for name in todo:
            parts.append(f"## {name}\n\n{_text(inner[name])}\n\n{_table(inner[name], inner)}")
            done.add(name)
    return "\n".join(parts)


def _text(kind: type) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def _table(kind: type[msgspec.Struct], inner: dict[str, type[msgspec.Struct]]) -> str:
    described = field_docstrings(kind)
    rows = ["| field | JSON | meaning |", "| --- | --- | --- |"]
    for field in msgspec.structs.fields(kind):
        meaning = described.get(field.name, "").replace("|", "\\|")
        rows.append(f"| `{field.encode_name}` | {_json(msgspec.inspect.type_info(field.type), inner)} | {meaning} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def _json(info: msgspec.inspect.Type, inner: dict[str, type[msgspec.Struct]]) -> str:
    match info:
        case msgspec.inspect.StructType(cls=kind):
            name = f"{kind.__module__.split('.')[1]}.{kind.__name__}"
            if not issubclass(kind, Event):
                inner[name] = kind
                return f"[{name}](#{name.lower().replace('.', '')})"
            return f"`{kind.__struct_config__.tag}`"
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(_json(one, inner) for one in types)
        case msgspec.inspect.LiteralType(values=values):
            return " or ".join(f'`"{value}"`' for value in values)
        case msgspec.inspect.ListType(item_type=item) | msgspec.inspect.VarTupleType(item_type=item):
            return f"array of {_json(item, inner)}"
        case msgspec.inspect.TupleType(item_types=items):
            return f"array of {', '.join(_json(item, inner) for item in items)}"
        case msgspec.inspect.DictType(value_type=value):
            return f"object of {_json(value, inner)}"
        case msgspec.inspect.IntType():
            return "integer"
        case msgspec.inspect.FloatType():
            return "number"
        case msgspec.inspect.StrType():
            return "string"
        case msgspec.inspect.BoolType():
            return "boolean"
        case msgspec.inspect.NoneType():
            return "null"
        case _:
            return "anything"


if __name__ == "__main__":
    print(page(), end="")
