"""Waiting for what a process elsewhere does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
    """Return what `condition` found, once it found something; fail after `timeout_s`, saying `what` was waited for."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {timeout_s} s in vain for: {what}")
