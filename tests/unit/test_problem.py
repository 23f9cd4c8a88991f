from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import ConfigSpace as cs
import numpy as np
import pytest

from deephyper_balsam.errors import ProblemError
from deephyper_balsam.problem.hp_problem import HpProblem


def digits() -> HpProblem:
    problem = HpProblem("digits")
    problem.add_hyperparameter((1, 8), "num_layers")
    problem.add_hyperparameter(["relu", "tanh"], "activation")
    problem.add_hyperparameter((1e-5, 1e-1, "log-uniform"), "learning_rate", default_value=1e-3)
    return problem


@pytest.mark.parametrize(
    ("value", "kind", "size"),
    [
        ((1, 8), "integer", 8),
        ((1, 8, "uniform"), "integer", 8),
        ((1, 64, "log-uniform"), "integer", 64),
        ((np.int64(1), np.int64(8)), "integer", 8),
        ((0.0, 1.0), "real", math.inf),
        ((0, 1.5), "real", math.inf),
        ((1e-5, 1e-1, "log-uniform"), "real", math.inf),
        (["a", "b"], "categorical", 2),
        ([True, False], "categorical", 2),
        (["a", 1, 2.5, None], "categorical", 4),
        ([16, 32, 64], "ordinal", 3),
        ([0.5, 0.25], "ordinal", 2),
        (np.array([1, 2, 4]), "ordinal", 3),
        (["only"], "constant", 1),
        (7, "constant", 1),
        ("on", "constant", 1),
        (True, "constant", 1),
        ({"mu": 0.0, "sigma": 1.0, "lower": -2.0, "upper": 2.0}, "real", math.inf),
        ({"mu": 4, "sigma": 1.5, "lower": 1, "upper": 9}, "integer", 9),
    ],
)
def test_each_shorthand_makes_its_kind(value: Any, kind: str, size: float) -> None:
    problem = HpProblem()
    problem.add_hyperparameter(value, "x")
    (column,) = problem.encoder.columns
    assert (column.name, column.kind, problem.size) == ("x", kind, size)
    problem.check()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((3, 1), r"`low < high` must hold for `x`, but got \(low=3, high=1\)"),
        ((2, 2), "a single value is a constant"),
        ((0.0, 1.0, "log-uniform"), r"`low > 0` must hold for the log-uniform `x`, but got \(low=0.0"),
        ((1e-15, 1e-13), "keeps 13 decimal places"),
        ((1e-300, 1.0, "log-uniform"), "`low >= 1e-12`"),
        ((1, 8, "normal"), 'must be "uniform" or "log-uniform", but got \'normal\''),
        ((1,), "must be given as"),
        ((1, 2, 3, 4), "must be given as"),
        ((True, False), "must be given as"),
        (("a", "b"), r"a list of choices.*but got \('a', 'b'\)"),
        ((0.0, math.inf), "must be finite"),
        ((math.nan, 1.0), "must be finite"),
        ((-1.7e308, 1.7e308), "must be finite"),
        ((0, 2**60), r"2\*\*53"),
        ([], "at least one choice"),
        (["a", "a"], "'a' equals an earlier one"),
        ([True, 1], "1 equals an earlier one"),
        ([1.0, math.nan], "finite number"),
        ([["a"], ["b"]], "must be a str, bool, finite number or None"),
        ({"mu": 0.0}, "lower, mu, sigma, upper"),
        ({"mu": 5.0, "sigma": 1.0, "lower": 0.0, "upper": 1.0}, "lower <= mu <= upper"),
        (None, "must be given as"),
        ({"a", "b"}, "must be given as"),
        (print, "must be given as"),
    ],
)
def test_a_shorthand_that_cannot_be_used_says_what_is_allowed(value: Any, message: str) -> None:
    problem = HpProblem()
    with pytest.raises(ProblemError, match=message):
        problem.add_hyperparameter(value, "x")
    assert len(problem) == 0


@pytest.mark.parametrize("name", ["", "self", "1st", "a b", "a,b", "é", "-x", None, 3, b"x"])
def test_a_name_that_cannot_be_used_is_refused(name: Any) -> None:
    with pytest.raises(ProblemError, match="name must"):
        HpProblem().add_hyperparameter((0, 1), name)


@pytest.mark.parametrize("name", ["lr", "_x", "layer1.units", "opt:lr", "weight-decay", "lambda"])
def test_dots_colons_and_hyphens_are_allowed_in_names(name: str) -> None:
    problem = HpProblem()
    problem.add_hyperparameter((0, 1), name)
    assert problem.check_configuration({name: 1}) == {name: 1}


def test_a_name_is_used_once() -> None:
    problem = digits()
    with pytest.raises(ProblemError, match="'activation' already"):
        problem.add_hyperparameter((0, 1), "activation")


@pytest.mark.parametrize(
    ("value", "default", "message"),
    [
        ((1, 8), 9, r"low <= default_value <= high.*default_value=9"),
        ((1, 8), 2.5, "must be an int, but got 2.5"),
        ((0.0, 1.0), "a", "must be a number, but got 'a'"),
        (["a", "b"], "c", r"must be one of \['a', 'b'\], but got 'c'"),
        ([True, False], 1, "must be one of"),
        (7, 8, "leave `default_value` out"),
    ],
)
def test_a_default_outside_the_range_is_refused(value: Any, default: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        HpProblem().add_hyperparameter(value, "x", default_value=default)


def test_defaults_are_kept_exactly() -> None:
    problem = digits()
    problem.add_hyperparameter([16, 32], "batch", default_value=32)
    problem.add_hyperparameter([True, False], "bias", default_value=False)
    default = problem.default_configuration
    assert default["learning_rate"] == 1e-3
    assert default["batch"] == 32
    assert default["bias"] is False


def test_columns_stand_in_the_order_of_addition() -> None:
    problem = HpProblem()
    for name in ("z", "a", "m"):
        problem.add_hyperparameter((0, 1), name)
    problem.add_condition(cs.EqualsCondition(problem["z"], problem["m"], 1))
    assert problem.hyperparameter_names == ("z", "a", "m")
    assert [column.name for column in problem.encoder.columns] == ["z", "a", "m"]
    assert list(problem) == ["z", "a", "m"]
    assert "z" in problem
    assert "y" not in problem
    with pytest.raises(KeyError, match="there are: z, a, m"):
        problem["y"]


def test_configspace_objects_are_taken_as_they_are() -> None:
    problem = HpProblem()
    x = problem.add_hyperparameter(cs.UniformIntegerHyperparameter("x", 1, 9, default_value=2))
    problem.add_hyperparameters([cs.CategoricalHyperparameter("c", ["a", "b"]), ((0.0, 1.0), "r"), ((1, 3), "i", 2)])
    assert x is problem.space["x"]
    assert problem.default_configuration == {"x": 2, "c": "a", "r": 0.5, "i": 2}
    with pytest.raises(ProblemError, match="is called 'y'"):
        problem.add_hyperparameter(cs.Constant("y", 1), name="other")


def test_several_hyperparameters_are_added_all_or_none() -> None:
    problem = HpProblem()
    with pytest.raises(ProblemError, match="low < high"):
        problem.add_hyperparameters([((0, 1), "a"), ((1, 0), "b")])
    assert len(problem) == 0


# -- conditions and forbidden clauses --------------------------------------------------------------------------------


def test_a_condition_decides_what_a_configuration_holds() -> None:
    problem = digits()
    momentum = problem.add_hyperparameter((0.0, 1.0), "momentum")
    problem.add_condition(cs.EqualsCondition(momentum, problem.space["activation"], "tanh"))
    problem.check_configuration({"num_layers": 1, "activation": "relu", "learning_rate": 0.1})
    with pytest.raises(ProblemError, match="`momentum` has no value"):
        problem.check_configuration({"num_layers": 1, "activation": "tanh", "learning_rate": 0.1})
    with pytest.raises(ProblemError, match=r"`momentum` is inactive here and must be left out, but got 0\.5"):
        problem.check_configuration({"num_layers": 1, "activation": "relu", "learning_rate": 0.1, "momentum": 0.5})


@pytest.mark.parametrize("what", [3, None, "x", lambda: 1])
def test_what_is_no_condition_or_clause_is_refused(what: Any) -> None:
    with pytest.raises(ProblemError, match="must be a ConfigSpace"):
        digits().add_condition(what)
    with pytest.raises(ProblemError, match="must be a ConfigSpace"):
        digits().add_forbidden_clause(what)


def test_a_condition_on_an_unknown_hyperparameter_is_refused() -> None:
    problem, stranger = digits(), cs.UniformIntegerHyperparameter("stranger", 0, 3)
    with pytest.raises(ProblemError, match="names 'stranger', but there are only: num_layers"):
        problem.add_condition(cs.EqualsCondition(problem["num_layers"], stranger, 1))
    other = cs.UniformIntegerHyperparameter("num_layers", 0, 3)
    with pytest.raises(ProblemError, match="made from another 'num_layers'"):
        problem.add_forbidden_clause(cs.ForbiddenEqualsClause(other, 1))


def test_a_second_condition_and_a_cycle_are_refused_and_change_nothing() -> None:
    problem = digits()
    layers, activation, rate = (problem[name] for name in problem)
    problem.add_condition(cs.EqualsCondition(rate, activation, "relu"))
    before = problem.to_dict()
    with pytest.raises(ProblemError, match="AndConjunction"):
        problem.add_condition(cs.GreaterThanCondition(rate, layers, 2))
    with pytest.raises(ProblemError, match="cannot be added"):
        problem.add_condition(cs.GreaterThanCondition(activation, rate, 1e-2))
    assert problem.to_dict() == before
    problem.check()


def test_a_clause_that_forbids_the_default_says_which_default_would_be_legal() -> None:
    problem = digits()
    with pytest.raises(ProblemError, match=r"default configuration .* must be legal.*legal would be .*'tanh'"):
        problem.add_forbidden_clause(cs.ForbiddenEqualsClause(problem["activation"], "relu"))
    assert not problem.space.forbidden_clauses


def test_a_contradictory_space_is_found() -> None:
    problem = HpProblem()
    x = problem.add_hyperparameter(["a", "b"], "x")
    with pytest.raises(ProblemError, match="contradictory"):
        problem.add_forbidden_clause(cs.ForbiddenInClause(x, ["a", "b"]))


def test_a_space_of_which_almost_nothing_is_legal_is_found() -> None:
    problem = HpProblem()
    x, y = (problem.add_hyperparameter((0.0, 1.0), name) for name in "xy")
    problem.add_forbidden_clause(cs.ForbiddenGreaterThanRelation(x, y))
    problem.check()
    problem.add_forbidden_clause(cs.ForbiddenLessThanRelation(x, y))
    with pytest.raises(ProblemError, match=r"contradictory.*Remove one of.*x < y.*x > y"):
        problem.check()


def test_an_empty_problem_is_found() -> None:
    with pytest.raises(ProblemError, match='"bare" has no hyperparameters'):
        HpProblem("bare").check()


# -- configurations and starting points ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 9}, r"`num_layers` must be an int in \[1, 8\], but got 9"),
        ({"num_layers": 2.5}, "must be an int"),
        ({"num_layers": True}, "must be an int"),
        ({"num_layers": "2"}, "must be an int in .*but got '2'"),
        ({"activation": "elu"}, r"`activation` must be one of \['relu', 'tanh'\], but got 'elu'"),
        ({"learning_rate": 1.0}, "must be a number in"),
        ({"learning_rate": math.nan}, "must be a number in"),
        ({"learning_rate": None}, "must be a number in"),
        ({"momentum": 0.9}, "There is no hyperparameter 'momentum'; there are: num_layers, activation, learning_rate"),
    ],
)
def test_a_starting_point_outside_the_space_is_refused(change: dict[str, Any], message: str) -> None:
    problem = digits()
    point = {"num_layers": 2, "activation": "relu", "learning_rate": 1e-3, **change}
    with pytest.raises(ProblemError, match=f"(?s)starting point cannot be used: .*{message}"):
        problem.add_starting_point(point)
    assert problem.starting_points == ()


def test_a_starting_point_that_lacks_a_value_is_refused() -> None:
    with pytest.raises(ProblemError, match="`learning_rate` has no value: a number in"):
        digits().add_starting_point(num_layers=2, activation="relu")


def test_a_forbidden_starting_point_is_refused_with_the_clause() -> None:
    problem = digits()
    problem.add_forbidden_clause(cs.ForbiddenEqualsClause(problem["num_layers"], 8))
    with pytest.raises(ProblemError, match="excluded by a forbidden clause: num_layers == 8"):
        problem.add_starting_point(num_layers=8, activation="relu", learning_rate=1e-3)


def test_starting_points_are_normalised_and_kept_once() -> None:
    problem = digits()
    problem.add_starting_point(num_layers=np.int64(2), activation=np.str_("relu"), learning_rate=np.float64(1e-3))
    problem.add_starting_point({"learning_rate": 1e-3, "num_layers": 2.0, "activation": "relu"})
    assert problem.starting_points == ({"num_layers": 2, "activation": "relu", "learning_rate": 1e-3},)
    assert [type(v) for v in problem.starting_points[0].values()] == [int, str, float]
    problem.starting_points[0]["num_layers"] = 5
    assert problem.starting_points[0]["num_layers"] == 2


def test_a_starting_point_that_a_later_clause_forbids_is_found_by_check() -> None:
    problem = digits()
    problem.add_starting_point(num_layers=8, activation="relu", learning_rate=1e-3)
    problem.add_forbidden_clause(cs.ForbiddenEqualsClause(problem["num_layers"], 8))
    with pytest.raises(ProblemError, match="no longer fits the space"):
        problem.check()


def test_bools_and_numbers_are_not_taken_for_each_other() -> None:
    problem = HpProblem()
    problem.add_hyperparameter([True, False], "flag")
    problem.add_hyperparameter(["a", 1], "mixed")
    assert problem.check_configuration({"flag": np.bool_(True), "mixed": 1.0}) == {"flag": True, "mixed": 1}
    for wrong in ({"flag": 1, "mixed": 1}, {"flag": True, "mixed": True}, {"flag": "True", "mixed": "1"}):
        with pytest.raises(ProblemError, match="must be one of"):
            problem.check_configuration(wrong)


def test_reals_keep_twelve_digits_and_their_bounds() -> None:
    problem = HpProblem()
    problem.add_hyperparameter((0.0, 1 / 3), "x")
    problem.add_hyperparameter((1e-7, 1e-3, "log-uniform"), "y")
    upper = problem["x"].upper  # ConfigSpace rounds 1/3
    assert problem.check_configuration({"x": 1 / 3, "y": 1e-7}) == {"x": upper, "y": 1e-7}
    assert problem.check_configuration({"x": 0.1, "y": 3e-5}) == {"x": 0.1, "y": 3e-5}


@pytest.mark.parametrize("config", [None, [1, 2], "x"])
def test_a_configuration_must_be_a_mapping(config: Any) -> None:
    with pytest.raises(ProblemError, match="must be a dict"):
        digits().check_configuration(config)


# -- size, text, JSON ------------------------------------------------------------------------------------------------


def test_size_counts_what_conditions_and_clauses_leave() -> None:
    problem = HpProblem()
    a = problem.add_hyperparameter([True, False], "a")
    b = problem.add_hyperparameter((1, 10), "b")
    assert problem.size == 20
    problem.add_condition(cs.EqualsCondition(b, a, True))
    assert problem.size == 11
    problem.add_forbidden_clause(cs.ForbiddenEqualsClause(b, 10))
    assert problem.size == 10
    problem.add_hyperparameter((1, 10**6), "c")
    assert problem.size == 2 * 10 * 10**6
    problem.add_hyperparameter((0.0, 1.0), "d")
    assert problem.size == math.inf


def test_the_description_is_a_table_with_everything_in_it() -> None:
    problem = digits()
    units = problem.add_hyperparameter([16, 32], "units")
    problem.add_condition(cs.GreaterThanCondition(units, problem["num_layers"], 2))
    problem.add_forbidden_clause(cs.ForbiddenEqualsClause(problem["num_layers"], 8))
    problem.add_starting_point(num_layers=2, activation="relu", learning_rate=1e-3)
    text = repr(problem)
    for part in (
        'Problem "digits": 4 hyperparameters',
        "[1e-05, 0.1] log",
        "  num_layers > 2",
        "num_layers == 8",
        "'num_layers': 2",
    ):
        assert part in text
    assert "|" not in text
    assert "no hyperparameters yet" in repr(HpProblem("bare"))


def test_when_a_hyperparameter_is_active_is_said_in_words() -> None:
    problem = digits()
    units = problem.add_hyperparameter([16, 32], "units")
    layers, activation = problem["num_layers"], problem["activation"]
    either = cs.OrConjunction(cs.EqualsCondition(units, layers, 2), cs.GreaterThanCondition(units, layers, 5))
    problem.add_condition(either)
    more = problem.add_hyperparameter((0.0, 1.0), "more")
    both = [cs.InCondition(more, activation, ["relu", "tanh"]), cs.NotEqualsCondition(more, layers, 3)]
    problem.add_condition(cs.AndConjunction(*both))
    text = repr(problem)
    assert "(num_layers == 2 or num_layers > 5)" in text
    assert "activation in ['relu', 'tanh'] and num_layers != 3" in text
    one = HpProblem("one")
    one.add_hyperparameter(["a"], "only")
    assert '"one": 1 hyperparameter, 1 configuration, objective' in repr(one)


def test_a_whole_problem_survives_json() -> None:
    problem = digits()
    units = problem.add_hyperparameter([16, 32], "units", default_value=32)
    problem.add_hyperparameter(["x", 3, True, None], "mixed")
    problem.add_hyperparameter(3, "constant")
    layers, activation = problem["num_layers"], problem["activation"]
    problem.add_condition(
        cs.AndConjunction(cs.GreaterThanCondition(units, layers, 2), cs.InCondition(units, activation, ["relu"]))
    )
    problem.add_forbidden_clause(
        cs.ForbiddenAndConjunction(cs.ForbiddenInClause(layers, [7, 8]), cs.ForbiddenEqualsClause(activation, "tanh"))
    )
    problem.add_starting_point(num_layers=2, activation="relu", learning_rate=0.1, mixed=True, constant=3)
    again = HpProblem.from_dict(json.loads(json.dumps(problem.to_dict())))
    assert again == problem
    assert again.describe() == problem.describe()
    assert again.starting_points == problem.starting_points
    assert again != digits()
    again.add_forbidden_clause(cs.ForbiddenEqualsClause(again["num_layers"], 6))
    assert again != problem


@pytest.mark.parametrize("data", [None, {}, {"format": 99}, {"format": 1, "name": "x", "space": {}}])
def test_data_of_another_format_is_refused(data: Any) -> None:
    with pytest.raises(ProblemError, match=r"format|cannot be read"):
        HpProblem.from_dict(data)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_problem_needs_a_name(name: Any) -> None:
    with pytest.raises(ProblemError, match="non-empty str"):
        HpProblem(name)


def test_one_clause_object_can_serve_two_problems() -> None:
    small, large = digits(), digits()
    large.add_hyperparameter((0, 1), "a_first_one")
    clause = cs.ForbiddenEqualsClause(small["num_layers"], 8)
    small.add_forbidden_clause(clause)
    large.add_forbidden_clause(clause)
    for problem in (small, large):
        rows = problem.encoder.sample(200, np.random.default_rng(0))
        assert all(config["num_layers"] != 8 for config in problem.encoder.decode(rows))


# --- spaces of many clauses ------------------------------------------------------------------------------------------


def work_of(monkeypatch: pytest.MonkeyPatch, build: Callable[[HpProblem, int], None], count: int) -> int:
    """How much ConfigSpace has to go through while a problem is built: the sizes of the spaces at each addition."""
    sizes: list[int] = []
    add = cs.ConfigurationSpace.add

    def counted(self: cs.ConfigurationSpace, *args: Any) -> None:
        add(self, *args)
        sizes.append(len(self) + len(self.conditions) + len(self.forbidden_clauses))

    with monkeypatch.context() as patched:
        patched.setattr(cs.ConfigurationSpace, "add", counted)
        problem = HpProblem("many")
        build(problem, count)
        problem.check()
    return sum(sizes)


def with_clauses(problem: HpProblem, count: int) -> None:
    xs = [problem.add_hyperparameter((0, 100), f"x{i}") for i in range(10)]
    for k in range(count):
        one = cs.ForbiddenEqualsClause(xs[k % 10], 1 + k // 10)
        problem.add_forbidden_clause(cs.ForbiddenAndConjunction(one, cs.ForbiddenEqualsClause(xs[(k + 1) % 10], 2)))


def with_conditions(problem: HpProblem, count: int) -> None:
    parent = problem.add_hyperparameter(["a", "b"], "parent")
    for i in range(count):
        child = problem.add_hyperparameter((0, 100), f"x{i}")
        problem.add_condition(cs.EqualsCondition(child, parent, "a"))
        assert f"x{i}" in problem
        assert len(problem) == i + 2


@pytest.mark.parametrize("build", [with_clauses, with_conditions])
def test_a_space_of_twice_as_many_clauses_is_twice_the_work(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[HpProblem, int], None]
) -> None:
    assert work_of(monkeypatch, build, 100) < 2.5 * work_of(monkeypatch, build, 50)


def test_an_addition_that_does_not_fit_the_others_is_refused_and_taken_out() -> None:
    problem = HpProblem("p")
    switch = problem.add_hyperparameter(["a", "b"], "switch")
    parent = problem.add_hyperparameter(["u", "v"], "parent")
    child = problem.add_hyperparameter(["x", "y"], "child")
    problem.add_condition(cs.NotEqualsCondition(child, parent, "u"))
    problem.add_forbidden_clause(cs.ForbiddenEqualsClause(child, "x"))
    # Without its parent the child is active, and by default it is what the clause forbids
    problem.add_condition(cs.EqualsCondition(parent, switch, "b"))
    problem.add_hyperparameter((1, 9), "later")
    with pytest.raises(ProblemError, match=r"parent \| switch == 'b'\) does not fit .* was taken out"):
        problem.check()
    assert problem.hyperparameter_names == ("switch", "parent", "child", "later")
    assert [str(condition) for condition in problem.space.conditions] == ["child | parent != 'u'"]
    problem.check()


# --- what Balsam and JSON can hold -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([2**70, 1], "within 64 bits"),
        ([-(2**63) - 1, "a"], "within 64 bits"),
        (2**70, "within 64 bits"),
        ((0, 2**63), "within"),
        ((0, 10**400), "within"),
        ((0.0, 10**400), "cannot be made"),
        ((1, 2**63, "log-uniform"), "within"),
        ({"mu": 5, "sigma": 1, "lower": 0, "upper": 2**70}, "cannot be made"),
        (["a\udcff", "b"], "valid Unicode"),
        ("a\udcff", "valid Unicode"),
        (["a\0", "b"], "NUL"),
        (cs.CategoricalHyperparameter("x", ["a\udcff", "b"]), "valid Unicode"),
    ],
)
def test_what_would_not_come_back_the_same_is_refused(value: Any, words: str) -> None:
    problem = HpProblem("p")
    with pytest.raises(ProblemError, match=words):
        problem.add_hyperparameter(value, "x")
    assert len(problem) == 0


@pytest.mark.parametrize("name", ["x\udcff", "x\x1b[31m", "x\0", "x\n", "", "1x", " x"])
def test_a_name_that_no_table_or_terminal_should_see_is_refused(name: str) -> None:
    with pytest.raises(ProblemError, match="must begin with a letter"):
        HpProblem("p").add_hyperparameter((0, 1), name)


def test_whole_numbers_of_64_bits_and_wide_reals_are_taken() -> None:
    problem = HpProblem("p")
    problem.add_hyperparameter([-(2**63), 2**63 - 1, "a"], "x")
    problem.add_hyperparameter((0.0, 2**60), "y")
    assert problem.check_configuration({"x": 2**63 - 1, "y": 1.0})["x"] == 2**63 - 1


def test_a_problem_is_not_called_what_balsam_cannot_keep() -> None:
    with pytest.raises(ProblemError, match="valid Unicode"):
        HpProblem("a\udcff")
