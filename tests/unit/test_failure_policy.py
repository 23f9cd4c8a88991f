"""Whose fault an end is, and what follows from it."""

from __future__ import annotations

import pytest

from deephyper_balsam.node import failure_policy
from deephyper_balsam.node.failure_policy import BrokenApplication, Fault, Nodes


def test_an_objective_is_nobodys_fault() -> None:
    assert failure_policy.of_outcome({"objective": 0.0, "fault": "machine"}) is None
    assert not failure_policy.runs_again({"objective": 0.0, "fault": "machine"}, 0)


@pytest.mark.parametrize("said", [{}, {"fault": "configuration"}, {"fault": "of a later version"}])
def test_a_failure_is_the_configurations_unless_it_says_otherwise_and_never_run_again(said: dict[str, str]) -> None:
    assert failure_policy.of_outcome({"objective": None, **said}) is Fault.CONFIGURATION
    assert not failure_policy.runs_again({"objective": None, **said}, 0)


def test_the_machines_fault_is_run_once_more() -> None:
    outcome = {"objective": None, "fault": "machine"}
    assert [failure_policy.runs_again(outcome, tries) for tries in (0, 1, 2)] == [True, False, False]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (-9, "killed by SIGKILL (out of memory?)"),
        (137, "killed by SIGKILL (out of memory?)"),
        (-11, "killed by SIGSEGV (a crash outside Python)"),
        (143, "killed by SIGTERM (from outside)"),
        (-77, "killed by signal 77"),
        (1, "the run ended with status 1 before it left a result"),
        (255, "the run ended with status 255 before it left a result"),
        (None, "the run left no result"),
    ],
)
def test_an_exit_status_is_said_with_the_signals_name(status: int | None, said: str) -> None:
    assert failure_policy.exit_status_said(status) == said


# --- a broken application --------------------------------------------------------------------------------------------


def test_five_failures_that_differ_only_in_numbers_make_a_broken_application() -> None:
    watch = BrokenApplication()
    reasons = [f"ValueError: lr={10.0**-n:g} at 0x7f{n}a is wrong, got -{n}.5e-3 or nan" for n in range(5)]
    assert [watch.sees(None, reason) for reason in reasons] == [False, False, False, False, True]


def test_it_is_said_once() -> None:
    watch = BrokenApplication(2)
    assert [watch.sees(None, "no licence") for _ in range(4)] == [False, True, False, False]


def test_failures_that_differ_or_one_success_make_none() -> None:
    mixed, worked, before, never = (BrokenApplication(n) for n in (3, 3, 3, 0))
    assert not any(mixed.sees(None, reason) for reason in ("a", "b", "a", "a", "a", "a"))
    assert not any(worked.sees(objective, "a") for objective in (None, None, 1.0, None, None, None))
    before.settle()
    assert not any(watch.sees(None, "a") for watch in (before, never) for _ in range(9))


# --- nodes and lengths -----------------------------------------------------------------------------------------------


def test_a_node_is_suspect_after_three_failures_and_nothing_else_while_others_work() -> None:
    nodes = Nodes()
    for _ in range(3):
        nodes.add("bad", Fault.MACHINE)
        nodes.add("mixed", Fault.MACHINE)
        nodes.add(None, Fault.MACHINE)
    assert nodes.suspects() == {}
    nodes.add("mixed", Fault.CONFIGURATION)  # the node did its part
    assert nodes.suspects() == {"bad": 3}
    nodes.add("bad", None)
    assert nodes.suspects() == {}


@pytest.mark.parametrize(
    ("cut_after_s", "too_long"),
    [([100, 100], False), ([100, 100, 100], True), ([100, 100, 49], False), ([5, 5, 60, 60, 60], True), ([], False)],
)
def test_a_run_is_too_long_when_three_allocations_in_a_row_gave_it_most_of_their_time(
    cut_after_s: list[float], too_long: bool
) -> None:
    assert failure_policy.is_too_long(cut_after_s, 100.0) is too_long
