"""Which function Balsam's app calls for a request, replaced by one of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deephyper_balsam.common.patching import missing


def call_instead(app: Any, known: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Let all routes that call a function, or depend on it, call another with the same arguments.

    Parameters
    ----------
    app
        The FastAPI app.
    known
        What its routes call.
    ours
        What they are to call.

    Raises
    ------
    BalsamChangedError
        When no route calls `known`.
    """

    def replace(dependant: Any) -> bool:
        found = dependant.call is known
        if found:
            dependant.call = ours
        return any([found, *(replace(part) for part in dependant.dependencies)])

    if not any([replace(route.dependant) for route in app.routes if hasattr(route, "dependant")]):  # noqa: C419
        raise missing(f"route of its API that calls {known.__module__}.{known.__name__}")
