"""`deephyper-balsam search stop|extend|add`: what a person asks of a search that was begun."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.cli.common import Finite, echo_json, json_option
from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import InputError, SettingsError

if TYPE_CHECKING:
    from deephyper_balsam.problem.hp_problem import HpProblem
    from deephyper_balsam.store.driver_requests import DriverRequest
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.lease import Lease
    from deephyper_balsam.store.record import SearchRecord
    from deephyper_balsam.store.search_state import SearchState
    from deephyper_balsam.trial import TrialState

_ANSWER_S = 20.0  # a driver reads requests with its signs of life, every five seconds
_LEAVE_S = 60.0  # it may still be ending the allocations that it asked for


def _open(name: str) -> tuple[Gateway, SearchRecord, int]:
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.record import find_record

    gateway = Gateway()
    record = find_record(gateway, name)
    return gateway, record, int(gateway.site(record.sites[0])["id"])


def _driver(gateway: Gateway, name: str) -> Lease | None:
    from deephyper_balsam.store.lease import current_lease, read_leases

    return current_lease(read_leases(gateway, name).get(name, []), gateway.now())


def _answer(gateway: Gateway, name: str, request: DriverRequest, wait_s: float = _ANSWER_S) -> DriverRequest:
    """Wait until the request is answered, as long as somebody drives; the request as it is then."""
    from deephyper_balsam.store.driver_requests import read_requests

    def found() -> DriverRequest:
        return next((one for one in read_requests(gateway, name) if one.id == request.id), request)

    _wait(lambda: found().handled is not None or _driver(gateway, name) is None, wait_s)
    return found()


def _wait(condition: Callable[[], bool], wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _report(name: str, request: DriverRequest, answer: str, as_json: bool) -> None:
    if as_json:
        echo_json(
            {"name": name, "request": request.id, "what": request.what, "handled": request.handled, "said": answer}
        )
    else:
        click.echo(answer)


@click.command()
@click.argument("name")
@click.option("--now", is_flag=True, help="Do not wait for trials that run; the next driver collects them.")
@click.option(
    "--wait",
    "wait_s",
    type=Finite(min=0),
    default=600.0,
    show_default=True,
    help="How many seconds its driver waits for trials that run.",
)
@json_option
def stop(name: str, now: bool, wait_s: float, as_json: bool) -> None:
    """Stop the search NAME: no new trials, waiting ones withdrawn, running ones waited for and collected.

    Its driver then exits with 0 if there is a result. Allocations of `search submit` that wait in the queue are given
    back. What still runs when it leaves goes on if the allocation is not
    the driver's own; else it begins anew when the search goes on.

    \b
    Example:
      deephyper-balsam search stop digits-1
      deephyper-balsam search stop digits-1 --now
    """
    from deephyper_balsam.store.allocation_chain import withdraw
    from deephyper_balsam.store.driver_requests import STOP, answer_request, send_request
    from deephyper_balsam.store.trial_rows import withdraw_waiting

    gateway, _, site_id = _open(name)
    wait_s = 0.0 if now else wait_s
    driver = _driver(gateway, name)
    request = send_request(gateway, site_id, name, STOP, gateway.now(), wait_s=wait_s)
    for batch_job_id in withdraw(gateway, [site["id"] for site in gateway.sites()], name):
        if not as_json:
            click.echo(f"BatchJob {batch_job_id} is taken out of the queue.")
    if driver is not None:
        if not as_json:
            click.echo(f"Asked the driver ({driver.where}) to stop ...")
        request = _answer(gateway, name, request)
        if request.handled is not None:
            if not as_json:
                click.echo(f"It {request.handled['did']}.")
            left = _wait(lambda: _driver(gateway, name) is None, wait_s + _LEAVE_S)
            _report(name, request, "Stopped." if left else "It has not left yet.", as_json)
            return
        if _driver(gateway, name) is not None:
            _report(name, request, "It has not answered yet; it will at its next look at Balsam.", as_json)
            return
    withdrawn = withdraw_waiting(gateway, name, gateway.now())
    answer_request(gateway, request, gateway.now(), f"nobody drove; withdrew {len(withdrawn)} waiting trials")
    _report(name, request, f"Nobody drives {name}; {len(withdrawn)} waiting trials withdrawn.", as_json)


@click.command()
@click.argument("name")
@click.option(
    "--max-evals",
    type=click.IntRange(min=1),
    help="Evaluations of the whole search, those done included. [default: as it is]",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=Finite(min=0, min_open=True),
    help="Seconds of the whole search, those driven included. [default: as it is]",
)
@json_option
def extend(name: str, max_evals: int | None, timeout_s: float | None, as_json: bool) -> None:
    """Give the search NAME a larger budget. Its driver takes it up at once; without one, `search resume` does.

    \b
    Example:
      deephyper-balsam search extend digits-1 --max-evals 200
    """
    from deephyper_balsam.store.driver_requests import EXTEND, effective_budget, read_requests, send_request
    from deephyper_balsam.store.lease import read_leases

    if max_evals is None and timeout_s is None:
        raise SettingsError("Say what to extend: give --max-evals, --timeout or both.")
    gateway, record, site_id = _open(name)
    leases = [lease for lease in read_leases(gateway, name).get(name, []) if lease.driving_since is not None]
    budget = effective_budget(record.settings, leases, read_requests(gateway, name))
    for option, new, old in (("--max-evals", max_evals, budget[0]), ("--timeout", timeout_s, budget[1])):
        if new is None:
            continue
        if old is None:
            raise SettingsError(f"The search {name!r} has no limit of that kind: leave {option} out.")
        if not new > old:
            raise SettingsError(
                f"{option} must be larger than the budget of the search {name!r}, which is {old:g}, but got {new:g}. "
                f"To end it sooner: deephyper-balsam search stop {name}"
            )
    request = send_request(gateway, site_id, name, EXTEND, gateway.now(), max_evals=max_evals, timeout_s=timeout_s)
    request = _answer(gateway, name, request)
    _report(name, request, f"{_done(name, request)} ({request})", as_json)


def _done(name: str, request: DriverRequest) -> str:
    if request.handled is not None:
        return f"Its driver says: {request.handled['did']}"
    return f"Recorded; `deephyper-balsam search resume {name}` goes on with it, or its driver at its next look"


@click.command()
@click.argument("name")
@click.argument("assignments", nargs=-1, required=True, metavar="PARAMETER=VALUE...")
@json_option
def add(name: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """Have the search NAME evaluate a configuration of yours, before any that its method suggests.

    A hyperparameter that is left out has its default. The driver takes it up at once; without one `search resume` does.

    \b
    Example:
      deephyper-balsam search add digits-1 learning_rate=0.01 optimizer=adam
    """
    from deephyper_balsam.common.objective import minimises, title, turned
    from deephyper_balsam.problem.hp_problem import HpProblem
    from deephyper_balsam.store.driver_requests import ADD, read_requests, send_request
    from deephyper_balsam.store.search_state import read_state as search_state
    from deephyper_balsam.store.snapshots import read_rows
    from deephyper_balsam.store.trial_rows import read_config, read_outcome, read_state, trial_number
    from deephyper_balsam.trial import TrialState

    gateway, record, site_id = _open(name)
    problem = HpProblem.from_dict(record.settings["problem"])
    config = problem.fill_in(_parse(problem, assignments))
    key = problem.encoder.key(config)
    states: Counter[TrialState] = Counter()
    for row in read_rows(gateway, name):
        state = read_state(row)
        states[state] += 1
        if state is not TrialState.CANCELLED and problem.encoder.key(read_config(row)) == key:
            minimize = minimises(record.settings)
            found = read_outcome(row)["objective"]
            objective = "" if found is None else f", {title(minimize)} {turned(found, minimize):.6g}"
            raise InputError(
                f"This configuration is trial {trial_number(row)} of {name!r} already ({state.value}{objective}); no "
                "configuration is evaluated twice."
            )
    for other in read_requests(gateway, name):
        if other.what == ADD and other.handled is None and problem.encoder.key(dict(other.config)) == key:
            raise InputError(f"This configuration was added to {name!r} already, by {other.by}, and waits its turn.")
    request = send_request(gateway, site_id, name, ADD, gateway.now(), config=config)
    request = _answer(gateway, name, request)
    said = _done(name, request)
    if request.handled is None:
        said = _waits_for_budget(search_state(gateway, record, states)) or said
    _report(name, request, f"{said} ({request})", as_json)


def _waits_for_budget(state: SearchState) -> str | None:
    """Return what to say of an added configuration that no budget is left for; None: there is."""
    if state.extension is None:
        return None
    used = [counted(state.budget.max_evals, "evaluation")] if state.all_submitted and state.budget.max_evals else []
    used += [f"{state.budget.timeout_s:g} s"] if state.budget.timeout_s and "--timeout" in state.extension else []
    then = "" if state.driver is not None else f", then `deephyper-balsam search resume {state.name}`,"
    return (
        f"Recorded, but the budget of {' and '.join(used)} is used up: `deephyper-balsam {state.extension}`{then} lets "
        "it be evaluated"
    )


def _parse(problem: HpProblem, assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``name=value`` words into a configuration, each value in the type of its hyperparameter."""
    config: dict[str, Any] = {}
    names = problem.hyperparameter_names
    for word in assignments:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise InputError(f"A hyperparameter is set as PARAMETER=VALUE, but got {word!r}.")
        if name not in names:
            raise InputError(f"There is no hyperparameter {name!r}; the problem has {', '.join(names)}.")
        if name in config:
            raise InputError(f"{name!r} is given twice.")
        config[name] = _value(problem, name, text)
    return config


def _value(problem: HpProblem, name: str, text: str) -> Any:
    from deephyper_balsam.problem.warm_start import value_of

    return value_of(next(column for column in problem.encoder.columns if column.name == name), text)
