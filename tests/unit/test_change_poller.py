"""What a driver reads at each look: what changed, nothing twice, and nothing that came late is lost."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from deephyper_balsam.store.change_poller import ChangePoller

ZERO = datetime(2026, 1, 1, tzinfo=timezone.utc)


def stamp(seconds: float) -> str:
    return (ZERO + timedelta(seconds=seconds)).isoformat()


class Table:
    """Jobs by id with the time of their last change; counts what each look was given."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.looks: list[int] = []
        self.at_s = 0.0
        self.put_back_s = 0.0

    def now(self) -> float:
        """The server's clock: never behind what was changed, unless it was put back."""
        newest = max((datetime.fromisoformat(row["last_update"]) for row in self.rows.values()), default=ZERO)
        return newest.timestamp() - self.put_back_s

    def put(self, job_id: int, at: float) -> None:
        self.rows[job_id] = {"id": job_id, "last_update": stamp(at), "tags": {"trial": str(job_id)}, "data": {}}

    def jobs(self, tags: Any, changed_since: str | None = None, states: Any = None) -> list[dict[str, Any]]:
        if "snapshot" in tags:
            return []
        found = [
            dict(row) for row in self.rows.values() if changed_since is None or row["last_update"] >= changed_since
        ]
        self.looks.append(len(found))
        return found


def look(changes: ChangePoller) -> list[int]:
    """Deal with all that is new, as a driver does."""
    new = [row for row in changes.read() if changes.is_new(row)]
    for row in new:
        changes.note(row)
    changes.forget_old()
    return [row["id"] for row in new]


def make(table: Table) -> ChangePoller:
    return ChangePoller(table, "s", clock=lambda: table.at_s)  # type: ignore[arg-type]


def test_each_change_is_seen_once() -> None:
    table = Table()
    changes = make(table)
    table.put(1, 0)
    table.put(2, 1)
    assert look(changes) == [1, 2]
    assert look(changes) == []
    table.put(1, 2)
    assert look(changes) == [1]


def test_a_look_reads_little_of_a_long_table() -> None:
    table = Table()
    changes = make(table)
    for job_id in range(1000):
        table.put(job_id, job_id)
    look(changes)
    table.at_s = 1.0
    look(changes)  # far back
    table.at_s = 2.0
    look(changes)
    assert table.looks == [1000, 31, 2]


def test_a_look_far_back_that_fails_is_made_again() -> None:
    table = Table()
    changes = make(table)
    table.put(1, 100)
    look(changes)
    look(changes)
    table.put(2, 80)
    changes.look_far()
    answer, table.jobs = table.jobs, lambda *_, **__: 1 / 0  # type: ignore[assignment,method-assign]
    with pytest.raises(ZeroDivisionError):
        changes.read()
    table.jobs = answer  # type: ignore[method-assign]
    assert look(changes) == [2]


def test_a_change_that_was_written_late_is_seen_at_the_next_look_far_back() -> None:
    table = Table()
    changes = make(table)
    table.put(1, 100)
    look(changes)
    look(changes)
    table.put(2, 80)  # its request began before that of job 1, and ended after it
    table.at_s = 5.0
    assert look(changes) == []
    table.at_s = 10.0
    assert look(changes) == [2]


def test_what_is_offered_again_is_new_without_a_change() -> None:
    table = Table()
    changes = make(table)
    table.put(1, 0)
    table.put(2, 500)
    look(changes)
    changes.offer_again([table.rows[1]])
    assert look(changes) == [1]
    assert look(changes) == []


def test_of_what_is_offered_and_has_changed_the_newer_counts() -> None:
    table = Table()
    changes = make(table)
    table.put(1, 0)
    look(changes)
    changes.offer_again([dict(table.rows[1])])
    table.put(1, 1)
    [row] = [row for row in changes.read() if changes.is_new(row)]
    assert row["last_update"] == stamp(1)


def test_what_changes_after_the_servers_clock_was_put_back_is_seen() -> None:
    table = Table()
    changes = make(table)
    table.put(1, 3600.0)
    assert look(changes) == [1]
    table.rows.clear()
    for second in range(5):  # by the clock as it is now, an hour behind what was seen
        table.put(2 + second, float(second))
        table.at_s += 1.0
        assert 2 + second in look(changes)
        changes.forget_old()
