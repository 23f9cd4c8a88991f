"""Importances: what a forest finds in trials whose truth is known."""

from __future__ import annotations

import math

import ConfigSpace as cs
import numpy as np
import pytest

from deephyper_balsam.errors import InputError
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.results.analysis.importance import Landscape
from deephyper_balsam.trial import Config, Result

WIDTH = 10


def ten() -> HpProblem:
    problem = HpProblem("ten")
    for j in range(WIDTH):
        problem.add_hyperparameter((0.0, 1.0), f"x{j}")
    return problem


def two_matter(config: Config) -> float:
    """Of the variance over the whole space, x3 explains 0.8 and x7 explains 0.2."""
    return float(-10 * (config["x3"] - 0.3) ** 2 - 5 * (config["x7"] - 0.7) ** 2)


def drawn(problem: HpProblem, count: int, seed: int) -> list[Config]:
    return problem.encoder.decode(problem.encoder.sample(count, np.random.default_rng(seed)))


def test_the_two_hyperparameters_of_ten_that_matter_are_found_in_random_trials() -> None:
    first, second, third = [], [], []
    for seed in range(5):
        configs = drawn(ten(), 150, seed)
        noise = np.random.default_rng(seed).normal(0, 0.05, 150)
        shares = Landscape(ten(), configs, [two_matter(c) + e for c, e in zip(configs, noise, strict=True)]).shares()
        of = {share.names: share.share for share in shares}
        first.append(of.pop(("x3",)))
        second.append(of.pop(("x7",)))
        third.append(max(of.values()))
    assert np.median(first) == pytest.approx(0.8, abs=0.12)
    assert np.median(second) == pytest.approx(0.2, abs=0.12)
    assert np.median(third) < 0.03


def test_they_are_found_in_what_an_optimizer_looked_at_mostly_near_the_optimum() -> None:
    looked_there, first, second, third = [], [], [], []
    for seed in range(3):
        optimizer = make_optimizer("ambs", ten(), seed=seed, num_workers=4)
        rng = np.random.default_rng(seed)
        configs: list[Config] = []
        objectives: list[float] = []
        while len(configs) < 120:
            trials = optimizer.ask(4)
            told = [two_matter(trial.config) + rng.normal(0, 0.05) for trial in trials]
            optimizer.tell([Result(trial.number, value) for trial, value in zip(trials, told, strict=True)])
            configs += [trial.config for trial in trials]
            objectives += told
        optimizer.close()
        looked_there.append(np.mean([abs(config["x3"] - 0.3) < 0.15 for config in configs]))
        of = {share.names: share.share for share in Landscape(ten(), configs, objectives).shares()}
        first.append(of.pop(("x3",)))
        second.append(of.pop(("x7",)))
        third.append(max(of.values()))
    assert np.median(looked_there) > 0.45
    assert np.median(first) > np.median(second) > np.median(third)


def test_two_that_matter_only_together_are_found_as_a_pair() -> None:
    problem = HpProblem("pair")
    for name in ("a", "b", "c"):
        problem.add_hyperparameter((0.0, 1.0), name)
    configs = drawn(problem, 300, 1)
    landscape = Landscape(problem, configs, [float((c["a"] > 0.5) != (c["c"] > 0.5)) for c in configs])
    assert landscape.pairs()[0].names == ("a", "c")
    assert landscape.pairs()[0].share > 0.8
    assert max(share.share for share in landscape.shares()) < 0.1


def test_choices_and_whole_numbers_and_log_scales_count_by_their_own_measure() -> None:
    problem = HpProblem("mixed")
    problem.add_hyperparameter(["a", "b", "c", "d"], "choice")
    problem.add_hyperparameter((1e-6, 1.0, "log-uniform"), "rate")
    problem.add_hyperparameter((1, 4), "layers")
    problem.add_hyperparameter([8, 16, 32], "batch")
    problem.add_hyperparameter(cs.Constant("fixed", 1))
    configs = drawn(problem, 300, 0)
    # Variances: of the choice 3/16 (one of four is 1), of the layers 5/4 * 0.15, of the rate none
    landscape = Landscape(problem, configs, [float(c["choice"] == "c") + 0.15**0.5 * c["layers"] for c in configs])
    assert [column.name for column in landscape.columns] == ["choice", "rate", "layers", "batch"]
    shares = {share.names[0]: share.share for share in landscape.shares()}
    assert shares["choice"] == pytest.approx(0.5, abs=0.06)
    assert shares["layers"] == pytest.approx(0.5, abs=0.06)
    assert shares["rate"] + shares["batch"] < 0.02
    curve = landscape.curve("choice")
    assert curve.values == ["a", "b", "c", "d"]
    assert np.argmax(curve.mean) == 2
    assert landscape.curve("layers").values == [1, 2, 3, 4]
    assert landscape.curve("batch").values == [8, 16, 32]
    rates = landscape.curve("rate").values
    assert rates[0] == 1e-6
    assert rates[-1] == 1.0


def test_a_conditional_hyperparameter_counts_where_it_is_active_and_not_for_its_parent() -> None:
    problem = HpProblem("conditional")
    optimizer = problem.add_hyperparameter(["sgd", "adam"], "optimizer")
    momentum = problem.add_hyperparameter((0.0, 1.0), "momentum")
    decay = problem.add_hyperparameter((0.0, 1.0), "decay")
    problem.add_condition(cs.EqualsCondition(momentum, optimizer, "sgd"))
    problem.add_condition(cs.EqualsCondition(decay, optimizer, "adam"))
    configs = drawn(problem, 300, 0)

    by_parent = Landscape(problem, configs, [float(c["optimizer"] == "adam") for c in configs]).shares()
    assert by_parent[0].names == ("optimizer",)
    assert by_parent[0].share > 0.97  # not shared with those that are only there, or only absent, along with it

    landscape = Landscape(problem, configs, [c.get("momentum", 0.5) for c in configs])
    assert landscape.shares()[0].names == ("momentum",)
    assert landscape.pairs()[0].names == ("optimizer", "momentum")
    assert {share.names[0]: share.share for share in landscape.shares()}["decay"] < 0.02


def test_where_trials_fail_is_a_landscape_of_its_own() -> None:
    configs = drawn(ten(), 200, 0)
    landscape = Landscape.of_failures(ten(), configs, [c["x5"] > 0.8 for c in configs])
    assert landscape.shares()[0].names == ("x5",)
    assert landscape.explained > 0.8


def test_noise_is_not_explained() -> None:
    configs = drawn(ten(), 200, 0)
    assert Landscape(ten(), configs, np.random.default_rng(1).normal(size=200).tolist()).explained < 0.2


def test_the_curve_and_the_surface_are_means_over_the_others() -> None:
    configs = drawn(ten(), 600, 0)
    landscape = Landscape(ten(), configs, [2 * c["x0"] + c["x1"] for c in configs])
    curve = landscape.curve("x0")
    assert np.abs(curve.mean - (2 * np.array(curve.values) + 0.5)).max() < 0.25
    surface = landscape.surface("x0", "x1")
    truth = 2 * np.array(surface.values[0])[:, None] + np.array(surface.values[1])[None, :]
    assert surface.mean.shape == truth.shape
    assert np.abs(surface.mean - truth).max() < 0.45


def test_the_same_trials_give_the_same_importances() -> None:
    configs = drawn(ten(), 60, 0)
    first, second = (Landscape(ten(), configs, [two_matter(c) for c in configs]).shares() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("exponent", [-1000, -500, -27, 40, 530, 1000])
def test_importances_do_not_depend_on_the_unit_of_the_objective(exponent: int) -> None:
    configs = drawn(ten(), 60, 0)
    plain = [two_matter(config) for config in configs]
    there, here = (Landscape(ten(), configs, values) for values in ([math.ldexp(y, exponent) for y in plain], plain))
    assert there.shares() == here.shares()
    assert there.pairs() == here.pairs()
    assert there.explained == here.explained
    assert np.ldexp(there.curve("x3").mean, -exponent) == pytest.approx(here.curve("x3").mean)
    assert np.ldexp(there.curve("x3").spread, -exponent) == pytest.approx(here.curve("x3").spread)
    assert np.ldexp(there.surface("x3", "x7").mean, -exponent) == pytest.approx(here.surface("x3", "x7").mean)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("scale", "shift"), [(1e-8, 0), (1e-4, 1e3), (1e160, 0), (1e-300, 0), (1e307, -1e307), (-1, 5)]
)
def test_what_matters_is_found_at_any_scale_and_shift(scale: float, shift: float, seed: int) -> None:
    configs = drawn(ten(), 120, seed)
    shares = Landscape(ten(), configs, [two_matter(config) / 8 * scale + shift for config in configs]).shares()
    assert [share.names for share in shares[:2]] == [("x3",), ("x7",)]
    assert shares[0].share == pytest.approx(0.8, abs=0.15)


def test_few_trials_with_a_condition_are_learnt_whatever_each_tree_draws() -> None:
    problem = HpProblem("conditional")
    kind = problem.add_hyperparameter(["sgd", "adam"], "optimizer")
    momentum = problem.add_hyperparameter((0.0, 1.0), "momentum")
    problem.add_condition(cs.EqualsCondition(momentum, kind, "sgd"))
    configs = drawn(problem, 10, 0)
    for seed in range(120):  # in some of them a tree draws every trial, so that it has none to be judged by
        landscape = Landscape(problem, configs, np.random.default_rng(seed).normal(size=10).tolist(), seed)
        assert math.isfinite(landscape.explained)
        assert all(0 <= share.share <= 1 for share in landscape.shares())


def test_what_cannot_be_learnt_is_refused_with_the_reason() -> None:
    configs = drawn(ten(), 12, 0)
    with pytest.raises(InputError, match="need 10 trials with an objective, but got 3"):
        Landscape(ten(), configs[:3], [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match=r"all 12 are 0\.5"):
        Landscape(ten(), configs, [0.5] * 12)
    constant = HpProblem("constant")
    constant.add_hyperparameter(cs.Constant("c", 1))
    with pytest.raises(InputError, match="all are constant"):
        Landscape(constant, [{"c": 1}] * 12, list(range(12)))
