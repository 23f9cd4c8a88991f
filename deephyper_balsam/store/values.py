"""Values that Balsam keeps as pickles, read without running what a pickle may ask for.

Balsam stores parameters, return values and exceptions of jobs as base64 of what dill wrote, and a pickle may name any
function to be called. What a server sends is data for us, never code: `read` builds plain containers and numpy's
numbers and refuses everything else, and `describe_error` tells what an exception said without making its class.
"""

from __future__ import annotations

import base64
import binascii
import io
import pickle
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

_DTYPE = re.compile(r"[biufc](1|2|4|8|16)\Z|[SU][0-9]{1,9}\Z")
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_SCALARS = frozenset({str, int, float, bool, type(None), bytes, bytearray, complex})
_CONTAINERS = frozenset({dict, list, tuple, set, frozenset})
_QUICK_KEYS = frozenset({str, bytes, bool, type(None), float})
# What nearly every row is: dicts and lists of numbers and short text. None of it can be a key that takes time.
_SIMPLE = re.compile(
    rb"\x80[\x02-\x05](?:\x95.{8})?(?:[(}\]usaeN\x88\x89\x94]|[Kqh].|M.{2}|J.{4}|G.{8}|\x8c(?:"
    + b"|".join(rb"\x%02x.{%d}" % (size, size) for size in range(64))
    + rb"))*\.",
    re.DOTALL,
)
_MAX_SIMPLE = 100_000
_MAX_CHARS = 2000
_MAX_NAME_CHARS = 200
_MAX_SHOWN = 20
_MAX_DEPTH = 100
_MAX_ENTRIES = 1_000_000  # with all that is there twice counted twice; more where the text itself is longer
_MAX_KEY_PARTS = 10_000
_FAULTS = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError)


class NotPlainError(ValueError):
    """A value is no plain value, or cannot be decoded at all."""


def read(text: str) -> Any:
    """Return a value that is made of plain containers, numbers, text and numpy's scalars.

    Raises
    ------
    NotPlainError
        When there is anything else in it.
    """
    return _load(text, _Plain)


def describe_error(text: str) -> tuple[str, str]:
    """Return the class's name and the words of an exception that Balsam stored with its traceback.

    Raises
    ------
    NotPlainError
        When the text is no such pickle.
    """
    found = _load(text, _Inert)
    error = found[0] if isinstance(found, tuple) and found else None
    if not isinstance(error, _Thing) or error.arguments is None:
        raise NotPlainError("no exception is stored there")
    words = [one[:_MAX_CHARS] if isinstance(one, str) else _short(one) for one in error.arguments[:_MAX_SHOWN]]
    return error.name, ", ".join(words)[:_MAX_CHARS]


def _short(value: Any, level: int = 0) -> str:
    """Return a short repr of a value that somebody else made: it may be endless, nested or too large to be said."""
    kind = type(value)
    if kind in (bool, int, float, complex, type(None)):
        try:
            return repr(value)
        except ValueError:  # an integer of too many digits
            return "<int>"
    if kind in (str, bytes, bytearray):
        return repr(value[:100])
    if kind in (list, tuple) and level < 2:
        inner = [_short(one, level + 1) for one in value[:6]] + ["..."] * (len(value) > 6)
        return ("[{}]" if kind is list else "({})").format(", ".join(inner))
    return f"<{value.name if isinstance(value, _Thing) else kind.__name__}>"


def _load(text: str, kind: Callable[[bytes], _Careful]) -> Any:
    try:
        return kind(base64.b64decode(text, validate=True)).load()
    except NotPlainError:
        raise
    except (binascii.Error, struct.error, RecursionError, MemoryError, *_FAULTS) as error:
        raise NotPlainError(f"no value can be read from it ({type(error).__name__}: {error})") from error


def _stock(*names: str) -> dict[int, Callable[[Any], None]]:
    """Return Python's own readers of the opcodes that only make a plain value, or move one."""
    known: dict[int, Callable[[Any], None]] = _Stock.dispatch
    return {code: known[code] for code in (getattr(pickle, name)[0] for name in names)}


_Stock: Any = pickle._Unpickler


class _Careful(_Stock):  # type: ignore[misc]
    """Reads a pickle in time and memory that grow with its length alone, and crashes on none.

    The C unpickler of Python does neither: the index of a memo asks for a table of that size, a length for that much
    memory, and the hash of a tuple recurses without a limit, or goes through what it holds twice again and again.
    Only the opcodes in `dispatch` are known.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = _stock(
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "EMPTY_DICT", "EMPTY_SET"),
        *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL"),
    )

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self._raw, self._length = raw, len(raw)
        self._left_to_copy = len(raw)
        self._left_of_keys = _MAX_KEY_PARTS

    def load(self) -> Any:
        """Return the value."""
        try:
            return super().load()
        except KeyError as error:
            raise NotPlainError(f"it has an instruction that no plain value needs ({error})") from error

    def copied(self, content: Any) -> Any:
        """Count what is copied: each byte that came makes one byte, however often a pickle asks."""
        self._left_to_copy -= len(content)
        if self._left_to_copy < 0:
            raise NotPlainError("it makes far more of what it holds than it has itself")
        return content

    def keys(self, keys: Sequence[Any]) -> Sequence[Any]:
        """Check that the hashes of keys are soon made: they have few parts, and are not nested deeply."""
        waiting = [(key, 0) for key in keys if type(key) not in _QUICK_KEYS]
        while waiting:
            key, depth = waiting.pop()
            if type(key) is int:
                self._left_of_keys -= key.bit_length() // 64  # a small one is free
            else:
                self._left_of_keys -= 1 + (len(key) if isinstance(key, (tuple, frozenset)) else 0)
            if self._left_of_keys < 0 or depth > _MAX_DEPTH:
                raise NotPlainError("it has keys that are nested or too large")
            if isinstance(key, tuple):
                waiting.extend((part, depth + 1) for part in key if type(part) not in _QUICK_KEYS)
        return keys

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Return what stands for the call of a function that was found by its name."""
        raise NotImplementedError

    def give_state(self, made: Any, state: Any) -> None:
        """Give a made object its state."""
        raise NotImplementedError

    def fill(self, kind: type, target: Any) -> Any:
        """Return the list, dict or set that items are for; None: they count for nothing."""
        if type(target) is not kind:
            raise NotPlainError(f"it puts items into a {type(target).__name__} as into a {kind.__name__}")
        return target

    def _call(self, arguments: Any) -> None:
        if type(arguments) is not tuple:
            raise NotPlainError("it calls something without a tuple of arguments")
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def _reduce(self) -> None:
        self._call(self.stack.pop())

    def _reduce_with_names(self) -> None:
        self.stack.pop()
        self._call(self.stack.pop())

    def _build(self) -> None:
        state = self.stack.pop()
        self.give_state(self.stack[-1], state)

    def _extend(self, items: list[Any]) -> None:
        target = self.fill(list, self.stack[-1])
        if target is not None:
            target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self.fill(dict, self.stack[-1])
        if target is not None:
            target.update(zip(self.keys(items[::2]), items[1::2], strict=True))

    def _add(self) -> None:
        items = self.pop_mark()
        target = self.fill(set, self.stack[-1])
        if target is not None:
            target.update(self.keys(items))

    def _one_pair(self) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(self.keys(items)))

    def _bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(min(size, self._length))))

    dispatch.update(
        {
            pickle.REDUCE[0]: _reduce,
            pickle.NEWOBJ[0]: _reduce,
            pickle.NEWOBJ_EX[0]: _reduce_with_names,
            pickle.BUILD[0]: _build,
            pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
            pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
            pickle.SETITEM[0]: _one_pair,
            pickle.SETITEMS[0]: lambda self: self._update(self.pop_mark()),
            pickle.ADDITEMS[0]: _add,
            pickle.DICT[0]: _dict,
            pickle.FROZENSET[0]: _frozenset,
            pickle.BYTEARRAY8[0]: _bytearray,
        }
    )


class _Plain(_Careful):
    """Knows the names that plain values need, and no others."""

    def load(self) -> Any:
        """Return the value."""
        is_simple = self._length <= _MAX_SIMPLE and _SIMPLE.fullmatch(self._raw)
        value = pickle.loads(self._raw) if is_simple else super().load()  # ten times as fast
        _require_plain(value, max(_MAX_ENTRIES, self._length))
        return value

    def find_class(self, module: str, name: str) -> Any:
        """Return the name, which `call` knows."""
        module = "builtins" if module == "__builtin__" else "numpy.multiarray" if module in _NUMPY_MODULES else module
        if f"{module}.{name}" not in _CALLS:
            raise NotPlainError(f"it holds {module[:100]}.{name[:100]}, which is no plain value")
        return _Name(f"{module}.{name}")

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Make a value of a plain class."""
        if type(function) is not _Name or len(arguments) > 3:
            raise NotPlainError("it calls something that is no plain class")
        return _CALLS[function.said](self, *arguments)

    def give_state(self, made: Any, state: Any) -> None:
        """Give a number's type its byte order."""
        if type(made) is not _Dtype:
            raise NotPlainError(f"it gives a state to a {type(made).__name__}, which has none")
        if state[1] in ("<", ">", "|", "="):
            made.order = state[1]


def _require_plain(value: Any, room: int) -> None:
    """Check that a value is made of nothing but plain ones, and that who goes through it comes to an end."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        deeper: list[Any] = []
        for one in level:
            kind = type(one)
            if kind in _SCALARS:
                continue
            if kind not in _CONTAINERS:
                _require_number(one)
                continue
            room -= len(one)
            if room < 0:
                raise NotPlainError(f"it has more than {_MAX_ENTRIES} entries")
            deeper.extend(one)
            if kind is dict:
                deeper.extend(one.values())
        if not deeper:
            return
        level = deeper
    raise NotPlainError(f"it is nested more than {_MAX_DEPTH} times")


def _require_number(value: Any) -> None:
    import numpy as np

    if not isinstance(value, np.generic):
        raise NotPlainError(f"it holds a {type(value).__name__}, which is no plain value")


class _Name:
    """One of `_CALLS`. It is not the function itself, which a pickle could change."""

    __slots__ = ("said",)

    def __init__(self, said: str) -> None:
        self.said = said


class _Dtype:
    """What a pickle says of a dtype; numpy's own is made only when the words are known to be harmless."""

    __slots__ = ("order", "spec")

    def __init__(self, _reader: _Plain, spec: Any, *_: Any) -> None:
        if not isinstance(spec, str) or not _DTYPE.match(spec):
            raise NotPlainError(f"it holds numpy's type {str(spec)[:20]!r}, which is no plain number")
        self.spec, self.order = spec, "="


def _scalar(reader: _Plain, dtype: Any, data: Any) -> Any:
    import numpy as np

    if type(dtype) is not _Dtype or not isinstance(data, bytes):
        raise NotPlainError("it holds a number of numpy that is damaged")
    found = np.frombuffer(reader.copied(data), np.dtype(dtype.order.replace("|", "=") + dtype.spec), 1)
    return found[0]


def _encode(reader: _Plain, text: Any, encoding: Any = "latin1") -> bytes:
    """Return bytes, which old pickles write as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise NotPlainError("it holds bytes that are damaged")
    return bytes(reader.copied(text).encode("latin1"))


def _bytes(_reader: _Plain, content: Any = b"") -> bytes:
    if not isinstance(content, bytes):  # a number would ask for that much memory
        raise NotPlainError("it holds bytes that are damaged")
    return content


def _bytearray(reader: _Plain, content: Any = b"", encoding: Any = None) -> bytearray:
    if encoding is not None:
        return bytearray(_encode(reader, content, encoding))
    return bytearray(reader.copied(_bytes(reader, content)))


def _complex(_reader: _Plain, real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise NotPlainError("it holds a complex number that is damaged")
    return complex(real, imaginary)


def _set_of(kind: type) -> Callable[..., Any]:
    def made(reader: _Plain, items: Any = ()) -> Any:
        if type(items) not in (list, tuple):
            raise NotPlainError("it holds a set that is damaged")
        return kind(reader.keys(reader.copied(items)))

    return made


_CALLS: Mapping[str, Callable[..., Any]] = {
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "builtins.set": _set_of(set),
    "builtins.frozenset": _set_of(frozenset),
    "_codecs.encode": _encode,
    "numpy.dtype": _Dtype,
    "numpy.multiarray.scalar": _scalar,
}


class _Thing:
    """Stands for a class or an object of any class: it knows what it was to be made from, and makes nothing."""

    __slots__ = ("arguments", "name")

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.arguments = arguments


class _Inert(_Careful):
    """Makes a stand-in for whatever is named."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function."""
        return _Thing(name.rpartition(".")[2][:_MAX_NAME_CHARS])

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Stand for what a call would return: an instance, also of a class that dill describes."""
        if type(function) is not _Thing:
            raise NotPlainError("it calls something that has no name")
        described = (one for one in (function.arguments or ())[:_MAX_SHOWN] if isinstance(one, str))
        return _Thing(next(described, function.name)[:_MAX_NAME_CHARS], arguments)

    def give_state(self, made: Any, state: Any) -> None:
        """Forget the state."""

    def fill(self, kind: type, target: Any) -> Any:
        """Return what items are for, or None for a stand-in, which needs none."""
        return None if type(target) is _Thing else super().fill(kind, target)
