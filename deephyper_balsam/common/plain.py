"""Plain values from what people give in Python: JSON and YAML know numbers, text, lists and dicts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from typing import Any


def plain(value: Any) -> Any:
    """Return a value with Python's own numbers, text, lists and dicts in the place of numpy's, tuples, sets and paths.

    Whatever else it holds is left as it is.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(one) for one in value), key=repr)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    to_python = getattr(value, "tolist", None)  # numpy's scalars and arrays, and what others make like them
    return plain(to_python()) if callable(to_python) and hasattr(value, "dtype") else value
