"""What early discarding has saved."""

from __future__ import annotations

from typing import Any

import pytest

from deephyper_balsam.results.early import saved


def line(budget: float | None, duration: float | None, stopped: bool = False, objective: float | None = 0.5) -> Any:
    found: dict[str, Any] = {"objective": objective, "m:duration": duration}
    return found if budget is None else {**found, "m:budget": budget, "m:stopped": stopped}


def test_each_run_is_taken_to_the_largest_budget_at_its_own_pace() -> None:
    lines = [
        line(27, 2700.0),
        line(1, 100.0, stopped=True),
        line(3, 600.0, stopped=True),
        line(None, 50.0),  # it records nothing
        line(1, None, stopped=True),  # it left no times
        line(9, 900.0, objective=None),  # it failed
    ]
    found = saved(lines)
    assert found is not None
    assert (found.recorded, found.stopped) == (3, 2)
    assert found.spent_h == pytest.approx(3400 / 3600)
    assert found.whole_h == pytest.approx((2700 + 2700 + 5400) / 3600)
    assert found.share == pytest.approx(1 - 3400 / 10800)
    assert str(found) == "2 of 3 runs stopped early: 69% of the time saved (0.944 h of runs in place of about 3 h)"
    assert found.to_dict()["share"] == found.share


@pytest.mark.parametrize("lines", [[], [line(None, 1.0)], [line(27, 10.0), line(27, 12.0)]])
def test_where_nothing_was_stopped_nothing_is_said(lines: list[Any]) -> None:
    assert saved(lines) is None


def test_when_all_were_stopped_at_once_nothing_can_be_said_to_be_saved() -> None:
    found = saved([line(1, 10.0, stopped=True), line(1, 12.0, stopped=True)])
    assert found is not None
    assert found.share == 0.0
