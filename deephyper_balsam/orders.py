"""What people ask of a search that was begun: to stop, to go on for longer, to evaluate a configuration of theirs.

Each order is one note in Balsam (`deephyper_balsam.notes`). Whoever gives it writes it once; who drives reads it with
its next sign of life, and answers it in the note's ``data["handled"]``. What nobody has answered waits for
the next driver.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deephyper_balsam.drivers import Life
from deephyper_balsam.gateway import Gateway, Row
from deephyper_balsam.notes import read_notes, write_note

STOP, EXTEND, ADD = "stop", "extend", "add"


@dataclass(frozen=True)
class Order:
    """One order.

    Attributes
    ----------
    id
        Of the note; the greater, the later.
    what
        ``"stop"``, ``"extend"`` or ``"add"``.
    given_at, by
        When, in seconds since the epoch, and by whom (``user@host``).
    wait_s
        Of a stop: how long the driver waits for running trials; 0: it leaves at once.
    max_evals, timeout_s
        Of an extension: the new budget of the whole search; None: as it was.
    config
        Of an addition: the configuration.
    handled
        The answer: ``at``, ``did`` (in words) and, of an addition, ``trial`` (its number); None: not answered yet.
    """

    id: int
    what: str
    given_at: float
    by: str
    wait_s: float = 0.0
    max_evals: int | None = None
    timeout_s: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    handled: dict[str, Any] | None = None

    @classmethod
    def read(cls, row: Row) -> Order:
        """Read a note."""
        known = cls.__dataclass_fields__
        return cls(**{**{key: value for key, value in row["data"].items() if key in known}, "id": row["id"]})

    def __str__(self) -> str:
        if self.what == STOP:
            how = f"waiting up to {self.wait_s:.0f} s for running trials" if self.wait_s else "at once"
            return f"stop, {how}"
        if self.what == EXTEND:
            parts = [f"{self.max_evals} evaluations"] if self.max_evals is not None else []
            parts += [f"{self.timeout_s:g} s"] if self.timeout_s is not None else []
            return f"extend to {' and '.join(parts)}"
        return "add " + " ".join(f"{name}={value}" for name, value in self.config.items())


def give_order(gateway: Gateway, site_id: int, search: str, what: str, now: float, **details: Any) -> Order:
    """Write an order down."""
    data = {"what": what, "given_at": now, "by": f"{_user()}@{socket.gethostname()}", **details}
    return Order(write_note(gateway, site_id, search, "order", data), **data)


def answer_order(gateway: Gateway, order: Order, now: float, did: str, **details: Any) -> None:
    """Write down what became of an order."""
    for row in gateway.jobs({"kind": "order"}, ids=[order.id]):
        gateway.write_data({order.id: {**row["data"], "handled": {"at": now, "did": did, **details}}})


def read_orders(gateway: Gateway, search: str) -> list[Order]:
    """Return all orders of a search, the oldest first."""
    return [Order.read(row) for row in read_notes(gateway, search, "order")]


def effective_budget(
    planned: Mapping[str, Any], lives: Iterable[Life], orders: Iterable[Order]
) -> tuple[int | None, float | None]:
    """Return the evaluations and the seconds that the whole search may take; None: no limit.

    What the latest driver that was given a budget was given, else what the search was planned with; and at least what
    it was extended to, so that a command which is repeated after an extension does not take it back.
    """
    given = [(life.max_evals, life.timeout_s) for life in lives if (life.max_evals, life.timeout_s) != (None, None)]
    max_evals, timeout_s = given[-1] if given else (planned.get("max_evals"), planned.get("timeout"))
    for order in orders:
        if order.what == EXTEND:
            max_evals = _larger(max_evals, order.max_evals)
            timeout_s = _larger(timeout_s, order.timeout_s)
    return max_evals, timeout_s


def _larger(limit: Any, wanted: Any) -> Any:
    return limit if limit is None or wanted is None else max(limit, wanted)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name
        return "unknown"
