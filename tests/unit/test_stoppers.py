"""Who is stopped early: rungs, the standing that is published, and decisions that can be checked afterwards."""

from __future__ import annotations

import json
import math
import random

import pytest

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.node.stoppers import (
    NEVER,
    AtBudget,
    Decision,
    Stopper,
    SuccessiveHalving,
    parse_stopper,
)

TEXTS = [
    "none",
    "epoch:1",
    "epoch:0.25",
    "sha",
    "sha:max=27,min=1,factor=3",
    "sha:max=81,min=3,factor=4,competing=0,recent=0",
    "median",
    "median:max=50,min=2,interval=5,competing=1",
]

# --- text and JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_stopper_goes_to_text_and_json_and_back(text: str) -> None:
    stopper = parse_stopper(text)
    assert parse_stopper(stopper.to_text()) == stopper
    assert Stopper.from_dict(json.loads(json.dumps(stopper.to_dict()))) == stopper


def test_what_is_left_out_has_its_default_and_max_is_unknown() -> None:
    assert parse_stopper("sha") == SuccessiveHalving(None, 1.0, 3.0, 5, 30)
    assert parse_stopper(" sha: max=27 , factor=2 ") == SuccessiveHalving(27.0, 1.0, 2.0, 5, 30)
    assert parse_stopper("epoch:budget=3") == AtBudget(3.0)
    assert parse_stopper("none") is not None
    assert SuccessiveHalving(27, 1, 3, 5).to_text() == "sha:max=27,min=1,factor=3,competing=5,recent=30"
    assert AtBudget(1).to_text() == "epoch:1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("asha", r"one of sha:.*but got 'asha'"),
        ("", "but got ''"),
        ("sha:max", "'max' has no value"),
        ("sha:maximum=27", "has the settings max, min, factor, competing, recent, but got 'maximum'"),
        ("sha:max=many", "`max` of a stopper must be a number, but got 'many'"),
        ("sha:max=27,max=9", "twice"),
        ("sha:competing=2.5", "whole number, but got '2.5'"),
        ("sha:competing=-1", "at least 0"),
        ("sha:recent=some", "whole number, but got 'some'"),
        ("sha:min=0", "`min > 0`"),
        ("sha:min=nan", "finite number"),
        ("sha:max=inf", "finite number"),
        ("sha:factor=1", r"`factor >= 1.1` must hold, but got \(factor=1\)"),
        ("sha:min=9,max=9", r"`min < max` must hold of a stopper, but got \(min=9, max=9\)"),
        ("median:interval=0", "`interval > 0`"),
        ("median:max=1000000", "1000 rungs at most"),
        ("epoch", "needs K"),
        ("epoch:0", "`epoch > 0`"),
        ("epoch:one", "must be a number"),
        ("none:min=1", "has no settings"),
    ],
)
def test_a_text_that_names_no_stopper_is_refused_with_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_stopper(text)


@pytest.mark.parametrize("said", [{}, {"kind": "hyperband"}, {"kind": ["sha"]}, {"kind": "sha", "eta": 3}])
def test_json_of_an_unknown_kind_or_setting_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Stopper.from_dict(said)


# --- rungs -----------------------------------------------------------------------------------------------------------


def rungs(stopper: Stopper, budgets: list[float]) -> list[float | None]:
    before: list[float | None] = [None, *budgets[:-1]]
    return [stopper.rung(last, budget) for last, budget in zip(before, budgets, strict=True)]


def test_rungs_of_successive_halving_are_powers_of_the_factor_below_max() -> None:
    budgets = [float(epoch) for epoch in range(1, 28)]
    found = rungs(parse_stopper("sha:max=27"), budgets)
    assert {budget: rung for budget, rung in zip(budgets, found, strict=True) if rung} == {1: 1, 3: 3, 9: 9}


def test_rungs_go_on_while_max_is_unknown() -> None:
    assert rungs(parse_stopper("sha"), [1, 9, 10, 27, 100]) == [1, 9, None, 27, 81]


def test_a_record_that_jumps_over_rungs_crosses_the_highest() -> None:
    stopper = parse_stopper("sha:max=27")
    assert stopper.rung(None, 12.0) == 9
    assert stopper.rung(2.0, 8.0) == 3
    assert stopper.rung(None, 0.5) is None
    assert stopper.rung(None, 500.0) == 9


def test_a_rung_is_crossed_once_and_never_backwards() -> None:
    stopper = parse_stopper("sha:max=27")
    assert stopper.rung(3.0, 3.0) is None
    assert stopper.rung(9.0, 4.0) is None


def test_budgets_that_are_sums_of_fractions_cross_the_rung_that_they_mean() -> None:
    stopper = parse_stopper("sha:min=0.3,factor=3")
    tenths = sum([0.1] * 9)
    assert tenths < 0.9
    assert stopper.rung(sum([0.1] * 8), tenths) == 0.9
    assert stopper.rung(tenths, 0.9) is None
    assert parse_stopper("epoch:1").rung(0.9, sum([0.1] * 10)) == 1
    assert parse_stopper("median:min=0.1,interval=0.1").rung(0.2, 0.1 + 0.2) == 0.3


def test_rungs_are_found_exactly_at_every_power() -> None:
    for factor in (2.0, 3.0, 4.0, 1.5):
        stopper = SuccessiveHalving(None, 0.7, factor)
        for k in range(25):
            rung = stopper.rung(None, 0.7 * factor**k)
            assert rung is not None
            assert rung == pytest.approx(0.7 * factor**k, rel=1e-9)
            assert stopper.rung(None, 0.7 * factor**k * 0.999) != rung


def test_rungs_of_the_median_are_at_intervals_below_max() -> None:
    stopper = parse_stopper("median:min=2,interval=3,max=8")
    assert rungs(stopper, [1, 2, 4, 5, 7, 8]) == [None, 2, None, 5, None, None]
    assert parse_stopper("median:max=3").rung(None, 3.0) == 2
    assert parse_stopper("median").rung(None, 1e9) == 1001


def test_what_a_curve_counts_for_is_the_record_that_crossed_each_rung() -> None:
    stopper = parse_stopper("sha:max=27")
    assert stopper.crossed([(1, 0.1), (2, 0.2), (4, 0.4), (3, 0.9), (5, 0.5), (10, 0.7)]) == {1: 0.1, 3: 0.4, 9: 0.7}
    assert parse_stopper("none").crossed([(1, 0.1)]) == {}


# --- decisions -------------------------------------------------------------------------------------------------------


def stops(stopper: Stopper, value: float, others: list[float]) -> bool:
    return stopper.decide(1.0, value, stopper.standing({1.0: others})).stop


def test_a_run_goes_on_exactly_if_it_is_in_the_top_share_itself_included() -> None:
    rng = random.Random(1)
    for factor in (2, 3, 4, 2.5):
        stopper = SuccessiveHalving(None, 1, factor, 0, 0)
        for n in range(1, 60):
            others = [rng.random() for _ in range(n)]
            value = rng.random()
            rank = 1 + sum(other > value for other in others)
            assert stops(stopper, value, others) == (rank > max(1, math.floor((n + 1) / factor))), (factor, n)


def test_a_tie_goes_on() -> None:
    assert not stops(parse_stopper("sha"), 0.5, [0.1, 0.2, 0.3, 0.5, 0.4])
    assert not stops(parse_stopper("median"), 0.5, [0.5] * 20)


def test_of_a_stream_that_gets_better_a_share_goes_on_and_not_nearly_all() -> None:
    rng = random.Random(5)
    shares = []
    for stopper in (SuccessiveHalving(competing=5, recent=30), SuccessiveHalving(competing=5, recent=0)):
        others: list[float] = []
        going_on = 0
        for n in range(300):
            value = rng.gauss(0.03 * n, 1.0)
            going_on += not stops(stopper, value, others)
            others.append(value)
        shares.append(going_on / 300)
    assert shares[0] < 0.5
    assert shares[1] > 0.8


def test_a_stream_that_gets_worse_is_held_to_the_best_of_all() -> None:
    values = [1.0 - 0.01 * n for n in range(100)]
    stopper = parse_stopper("sha")
    assert all(stops(stopper, value, values[:n]) for n, value in enumerate(values) if n >= 10)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_where_all_are_equal_a_share_goes_on(factor: int) -> None:
    stopper = SuccessiveHalving(None, 1, factor, 5)
    going_on = [not stops(stopper, 0.5, [0.5] * n) for n in range(5, 305)]
    assert sum(going_on) == pytest.approx(300 / factor, rel=0.12)
    assert not any(stops(stopper, 0.6, [0.5] * n) for n in range(5, 50))


def test_where_half_are_equal_and_best_a_share_of_all_goes_on() -> None:
    rng = random.Random(4)
    stopper, others, going_on = SuccessiveHalving(None, 1, 4, 5), [], 0
    for _ in range(400):
        value = rng.choice([1.0, rng.random()])
        going_on += not stops(stopper, value, others)
        others.append(value)
    assert going_on == pytest.approx(100, rel=0.2)


def test_nobody_is_stopped_among_too_few() -> None:
    for text in ("sha:competing=5", "median:competing=5"):
        stopper = parse_stopper(text)
        assert not stops(stopper, 0.0, [1.0] * 4)
        assert stops(stopper, 0.0, [1.0] * 5)
    assert not stops(parse_stopper("sha:competing=0"), 0.0, [])


def test_the_median_stops_what_is_below_it() -> None:
    stopper = parse_stopper("median:competing=0")
    assert stops(stopper, 0.24, [0.0, 0.1, 0.4, 0.9])
    assert not stops(stopper, 0.25, [0.0, 0.1, 0.4, 0.9])


def test_everything_stops_at_the_epoch_with_and_without_a_note() -> None:
    stopper = parse_stopper("epoch:1")
    assert stopper.decide(1.0, 9.0, None) == Decision(True, 1.0, 9.0, 0, None)
    assert stopper.decide(1.0, 9.0, stopper.standing({})).stop


@pytest.mark.parametrize("text", ["sha", "median", "none"])
def test_without_a_note_a_run_goes_on(text: str) -> None:
    stopper = parse_stopper(text)
    assert stopper.decide(1.0, -1e9, None) == Decision(False, 1.0, -1e9, 0, None)
    note = stopper.standing({3.0: [1.0] * 50})
    assert not stopper.decide(1.0, -1e9, note).stop


def test_none_stops_nobody_and_has_no_rung() -> None:
    assert parse_stopper("none") == NEVER
    assert NEVER.rung(None, 100.0) is None
    assert not stops(NEVER, -1e9, [1.0] * 50)


def test_nan_is_worse_than_every_number_and_does_not_count_among_the_others() -> None:
    stopper = parse_stopper("sha:competing=2")
    assert stops(stopper, math.nan, [0.1, 0.2])
    note = stopper.standing({1.0: [math.nan, -math.inf, 0.1]})
    assert note["rungs"] == {"1": [1, None]}


def test_a_run_at_the_learnt_max_is_not_stopped() -> None:
    stopper = parse_stopper("sha:competing=1")
    values = {27.0: [0.9] * 10, 9.0: [0.9] * 10}
    assert stopper.decide(27.0, 0.1, stopper.standing(values)).stop
    learnt = stopper.standing(values, max_budget=27.0)
    assert stopper.decide(27.0, 0.1, learnt) == Decision(False, 27.0, 0.1, 0, None)
    assert stopper.decide(9.0, 0.1, learnt).stop


def test_the_note_is_small_json() -> None:
    stopper = parse_stopper("sha:max=27")
    rng = random.Random(2)
    values = [rng.random() for _ in range(4096)]
    note = stopper.standing({1.0: values, 3.0: values[:1000], 9.0: values[:5]})
    assert json.loads(json.dumps(note)) == note
    assert len(json.dumps(note)) < 200
    assert note["max"] == 27.0


@pytest.mark.parametrize("text", ["sha:competing=1", "median:competing=1", "epoch:1", "none"])
def test_decisions_can_be_reproduced_from_their_own_numbers(text: str) -> None:
    stopper = parse_stopper(text)
    rng = random.Random(3)
    note = stopper.standing({1.0: [rng.random() for _ in range(20)]})
    for _ in range(50):
        decision = stopper.decide(1.0, rng.random(), note)
        kept = Decision.from_dict(json.loads(json.dumps(decision.to_dict())))
        assert kept == decision
        assert stopper.agrees(kept)
        assert not stopper.agrees(Decision(not kept.stop, kept.rung, kept.value, kept.n, kept.cutoff))
