"""A dead agent is started again by itself, once it was dead at two looks, and not for ever."""

from __future__ import annotations

import pytest

from deephyper_balsam.server.mender import Mender
from deephyper_balsam.server.site_agent import Condition

WHOLE, ENDING, DEAD = Condition


def mender(looks: list[Condition], now: list[float]) -> tuple[Mender, list[float]]:
    mended: list[float] = []
    return Mender(lambda: looks.pop(0), lambda: mended.append(now[0]), lambda: now[0]), mended


@pytest.mark.parametrize(
    ("looks", "times"),
    [
        ([WHOLE, WHOLE, WHOLE], 0),
        ([DEAD, WHOLE, DEAD, WHOLE], 0),  # somebody else, such as `server up`, is at work on it
        ([DEAD, DEAD, WHOLE, WHOLE], 1),
        ([DEAD, DEAD, DEAD, DEAD], 2),
    ],
)
def test_an_agent_that_is_dead_at_two_looks_is_started_again(looks: list[Condition], times: int) -> None:
    made, mended = mender(list(looks), [0.0])
    for _ in looks:
        made.look()
    assert len(mended) == times


def test_an_agent_that_dies_again_and_again_is_left_to_a_person_for_a_while() -> None:
    now = [0.0]
    made, mended = mender([DEAD] * 200, now)
    for _ in range(60):
        made.look()
        now[0] += 5
    assert len(mended) == 3
    now[0] += 600
    made.look()
    made.look()
    assert len(mended) == 4


def test_an_agent_that_a_person_stops_has_time_to_end_and_is_started_again_when_its_end_hangs() -> None:
    now = [0.0]
    made, mended = mender([ENDING] * 25 + [WHOLE] + [ENDING] * 27, now)
    for _ in range(51):
        made.look()
        now[0] += 5
    assert mended == []
    for _ in range(2):
        made.look()
        now[0] += 5
    assert len(mended) == 1


def test_an_error_in_one_look_is_told_and_the_next_look_comes(caplog: pytest.LogCaptureFixture) -> None:
    class EndedError(BaseException):
        pass

    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 4:
            raise EndedError

    def condition() -> Condition:
        raise OSError("the disk is away")

    with pytest.raises(EndedError):
        Mender(condition, lambda: None).run(7.0, sleep)
    assert waited == [7.0] * 4
    assert "the disk is away" in caplog.text
