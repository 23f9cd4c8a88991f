"""YAML that means what it looks like: nothing that a person wrote is turned into something else without a word.

YAML 1.1 reads ``no`` as false, ``2020-01-01`` as a date, ``010`` as eight, ``12:30:00`` as 45000 and ``1.10`` as 1.1,
and takes the last of two equal keys. Who reads a file for people asks here what was written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_READ_AS = {"bool": "true or false", "timestamp": "a date", "null": "nothing", "int": "a number", "float": "a number"}


class _Loader(yaml.SafeLoader):
    """The safe loader, which refuses a key that stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _AsWritten(_Loader):
    """Every scalar as the text that was written; None where ``null`` or ``~`` was."""


def _text(_loader: _AsWritten, node: yaml.ScalarNode) -> str:
    return str(node.value)


def _nothing(_loader: _AsWritten, node: yaml.ScalarNode) -> str | None:
    return None if node.value else ""


for _kind in ("bool", "int", "float", "timestamp"):
    _AsWritten.add_constructor(f"{_TAG}{_kind}", _text)
_AsWritten.add_constructor(f"{_TAG}null", _nothing)


def read(text: str) -> Any:
    """Return what YAML makes of `text`.

    Raises
    ------
    yaml.YAMLError
        When it is no YAML, or a key stands twice in a mapping.
    """
    return yaml.load(text, Loader=_Loader)


def as_written(text: str) -> Any:
    """Return the same as `read`, but each scalar as it was written: a blank is the empty string, ``null`` None."""
    return yaml.load(text, Loader=_AsWritten)


def as_text(value: Any, written: Any) -> str | None:
    """Return the text that a scalar stands for; None when YAML reads something else than what was written.

    Parameters
    ----------
    value
        As `read` has it: text, or a number in its plain form, such as 8 or 0.5, can stand for text.
    written
        The same as `as_written` has it.
    """
    if isinstance(value, str):
        return value
    is_plain = isinstance(value, (int, float)) and not isinstance(value, bool) and str(value) == written
    return str(value) if is_plain else None


def misread(written: Any) -> str:
    """Return what is wrong with a scalar that should be text, and what to write instead."""
    if written in ("", None):
        return "is blank: write '' for no text"
    return f"is {written} without quotes, which YAML does not read as text: write '{written}'"


def surprises(text: str, texts: Collection[str]) -> Iterator[str]:
    """Yield what YAML reads otherwise than a person means, one sentence for each.

    Parameters
    ----------
    text
        A document; `read` accepts it.
    texts
        The keys whose values, or the items and entries of these, are texts.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        yield from _surprises(root, "", texts, is_text=False)


def _surprises(node: Any, where: str, texts: Collection[str], *, is_text: bool) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = str(key.value)
            place = f"{where}.{name}" if where else name
            yield from _surprises(key, f"the key {place}", texts, is_text=True)
            yield from _surprises(value, place, texts, is_text=is_text or name in texts)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _surprises(item, where, texts, is_text=is_text)
    else:
        kind = node.tag.removeprefix(_TAG)
        if kind in ("str", "merge"):
            return
        value = yaml.SafeLoader("").construct_object(node)
        if kind == "null" and not node.value:
            yield f"`{where}` is blank: write null where none is meant"
        elif is_text and kind != "null" and as_text(value, node.value) is None:
            yield f"`{where}` {misread(node.value)}"
        elif kind == "timestamp" or (kind == "int" and not _is_decimal(node.value)) or ":" in node.value:
            read_as = f"{_READ_AS[kind]}, {value}"
            yield f"`{where}` is {node.value}, which YAML reads as {read_as}: write that, or '{node.value}'"


def _is_decimal(written: str) -> bool:
    digits = written.lstrip("+-").replace("_", "")
    return digits == "0" or (digits.isdigit() and not digits.startswith("0"))
