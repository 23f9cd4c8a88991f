"""What people ask of a search that was begun: to stop, to go on for longer, to evaluate a configuration of theirs.

Each request is one note in Balsam (`store.notes`). Whoever gives it writes it once; who drives reads it with
its next sign of life, and answers it in the note's ``data["handled"]``. What nobody has answered waits for
the next driver.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from deephyper_balsam.common.wording import counted
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.lease import Lease
from deephyper_balsam.store.notes import read_notes, write_note
from deephyper_balsam.store.schema import check_schema

STOP, EXTEND, ADD = "stop", "extend", "add"


class Answer(TypedDict, total=False):
    """What became of a request: when (epoch), in words, and of an addition the number of its trial."""

    at: float
    did: str
    trial: int


@dataclass(frozen=True)
class DriverRequest:
    """One request.

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
    handled: Answer | None = None

    @classmethod
    def read(cls, row: Row) -> DriverRequest:
        """Read a note."""
        known = cls.__dataclass_fields__
        return cls(**{**{key: value for key, value in row["data"].items() if key in known}, "id": row["id"]})

    def __str__(self) -> str:
        if self.what == STOP:
            how = f"waiting up to {self.wait_s:.0f} s for running trials" if self.wait_s else "at once"
            return f"stop, {how}"
        if self.what == EXTEND:
            parts = [counted(self.max_evals, "evaluation")] if self.max_evals is not None else []
            parts += [f"{self.timeout_s:g} s"] if self.timeout_s is not None else []
            return f"extend to {' and '.join(parts)}"
        return "add " + " ".join(f"{name}={value}" for name, value in self.config.items())


def send_request(gateway: Gateway, site_id: int, search: str, what: str, now: float, **details: Any) -> DriverRequest:
    """Write a request down."""
    data = {"what": what, "given_at": now, "by": f"{_user()}@{socket.gethostname()}", **details}
    return DriverRequest(write_note(gateway, site_id, search, "request", data), **data)


def answer_request(gateway: Gateway, request: DriverRequest, now: float, did: str, **details: Any) -> None:
    """Write down what became of a request."""
    for row in gateway.jobs({"kind": "request"}, ids=[request.id]):
        check_schema(row)
        gateway.write_data({request.id: {**row["data"], "handled": {"at": now, "did": did, **details}}})


def read_requests(gateway: Gateway, search: str) -> list[DriverRequest]:
    """Return all requests of a search, the oldest first."""
    return [DriverRequest.read(row) for row in read_notes(gateway, search, "request")]


def effective_budget(
    planned: Mapping[str, Any], leases: Iterable[Lease], requests: Iterable[DriverRequest]
) -> tuple[int | None, float | None]:
    """Return the evaluations and the seconds that the whole search may take; None: no limit.

    What the latest driver that was given a budget was given, else what the search was planned with; and at least what
    it was extended to, so that a command which is repeated after an extension does not take it back.
    """
    given = [
        (lease.max_evals, lease.timeout_s) for lease in leases if (lease.max_evals, lease.timeout_s) != (None, None)
    ]
    max_evals, timeout_s = given[-1] if given else (planned.get("max_evals"), planned.get("timeout"))
    for request in requests:
        if request.what == EXTEND:
            max_evals = _larger(max_evals, request.max_evals)
            timeout_s = _larger(timeout_s, request.timeout_s)
    return max_evals, timeout_s


def _larger(limit: Any, wanted: Any) -> Any:
    return limit if limit is None or wanted is None else max(limit, wanted)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name
        return "unknown"
