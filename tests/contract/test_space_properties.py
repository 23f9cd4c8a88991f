"""The matrix form of a space against ConfigSpace's own judgement, over random spaces."""

from __future__ import annotations

import itertools
import json

import ConfigSpace as cs
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_problems import FINITE, legal_for_configspace, problems

from deephyper_balsam.problem.hp_problem import HpProblem

relaxed = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)


@relaxed
@given(problems(), seeds)
def test_every_sampled_configuration_is_legal_for_configspace(problem: HpProblem, seed: int) -> None:
    encoder = problem.encoder
    rows = encoder.sample(30, np.random.default_rng(seed))
    assert rows.shape == (30, encoder.width)
    for config in encoder.decode(rows):
        assert legal_for_configspace(problem, config), config
        assert problem.check_configuration(config) == config


@relaxed
@given(problems(), seeds)
def test_activity_and_legality_of_any_row_are_those_of_configspace(problem: HpProblem, seed: int) -> None:
    encoder, rng = problem.encoder, np.random.default_rng(seed)
    anything = rng.uniform(-0.5, 4.0, (40, encoder.width))
    anything[rng.random(anything.shape) < 0.2] = np.nan
    rows = encoder.canonical(anything)
    for config, legal in zip(encoder.decode(rows), encoder.legal(rows), strict=True):
        assert legal_for_configspace(problem, config) == legal, config


@relaxed
@given(problems(), seeds)
def test_decode_and_encode_are_inverse_on_snapped_rows(problem: HpProblem, seed: int) -> None:
    encoder = problem.encoder
    rows = encoder.sample(20, np.random.default_rng(seed))
    snapped, configs = encoder.snap(rows), encoder.decode(rows)
    assert np.array_equal(encoder.encode(configs), snapped, equal_nan=True)
    assert encoder.decode(snapped) == configs
    assert np.array_equal(encoder.snap(snapped), snapped, equal_nan=True)
    assert np.array_equal(encoder.canonical(rows), rows, equal_nan=True)
    assert encoder.keys(rows) == encoder.keys(snapped) == [encoder.key(config) for config in configs]


@relaxed
@given(problems(), seeds)
def test_keys_are_equal_exactly_when_configurations_are(problem: HpProblem, seed: int) -> None:
    encoder = problem.encoder
    rows = encoder.sample(25, np.random.default_rng(seed))
    configs, keys = encoder.decode(rows), encoder.keys(rows)
    for i, j in itertools.combinations(range(25), 2):
        assert (keys[i] == keys[j]) == (configs[i] == configs[j])


@relaxed
@given(problems(), seeds)
def test_configurations_hold_plain_python_values_in_column_order(problem: HpProblem, seed: int) -> None:
    encoder = problem.encoder
    for config in encoder.decode(encoder.sample(10, np.random.default_rng(seed))):
        assert list(config) == [name for name in problem.hyperparameter_names if name in config]
        assert all(type(value) in (int, float, str, bool, type(None)) for value in config.values())
        again = json.loads(json.dumps(config))
        assert again == config
        assert [type(v) for v in again.values()] == [type(v) for v in config.values()]


@relaxed
@given(problems(kinds=FINITE, max_size=4))
def test_enumerate_finds_exactly_the_configurations_that_configspace_allows(problem: HpProblem) -> None:
    encoder = problem.encoder
    rows = encoder.enumerate(100_000)
    assert rows is not None
    domains = []
    for column in encoder.columns:
        values = column.choices or range(int(column.lower), int(column.upper) + 1)
        domains.append([(column.name, value) for value in values] + [None])
    allowed = set()
    for items in itertools.product(*domains):
        config = dict(item for item in items if item is not None)
        if legal_for_configspace(problem, config):
            allowed.add(encoder.key(config))
    assert len(rows) == len(allowed) == problem.size
    assert set(encoder.keys(rows)) == allowed


@relaxed
@given(problems(), seeds)
def test_a_problem_survives_json_exactly(problem: HpProblem, seed: int) -> None:
    data = json.loads(json.dumps(problem.to_dict()))
    again = HpProblem.from_dict(data)
    assert again == problem
    assert again.to_dict() == problem.to_dict()
    assert again.hyperparameter_names == problem.hyperparameter_names
    assert again.default_configuration == problem.default_configuration
    one, other = (p.encoder.sample(10, np.random.default_rng(seed)) for p in (problem, again))
    assert np.array_equal(one, other, equal_nan=True)


@relaxed
@given(problems())
def test_the_default_configuration_is_the_one_of_configspace(problem: HpProblem) -> None:
    theirs = dict(problem.space.get_default_configuration())
    ours = problem.default_configuration
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value == theirs[name] or np.isclose(float(value), float(theirs[name]), rtol=1e-9)


def test_configspace_takes_our_configurations_as_its_own() -> None:
    problem = HpProblem()
    parent = problem.add_hyperparameter(["a", "b"], "parent")
    child = problem.add_hyperparameter((1e-4, 1.0, "log-uniform"), "child")
    problem.add_condition(cs.EqualsCondition(child, parent, "b"))
    for config in problem.encoder.decode(problem.encoder.sample(50, np.random.default_rng(0))):
        cs.Configuration(problem.space, values=config).check_valid_configuration()
