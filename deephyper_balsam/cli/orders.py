"""`deephyper-balsam search stop|extend|add`: what a person asks of a search that was begun."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.cli.common import echo_json, json_option
from deephyper_balsam.errors import InputError, SettingsError

if TYPE_CHECKING:
    from deephyper_balsam.drivers import Life
    from deephyper_balsam.gateway import Gateway
    from deephyper_balsam.orders import Order
    from deephyper_balsam.record import SearchRecord

_ANSWER_S = 20.0  # a driver reads orders with its signs of life, every five seconds
_LEAVE_S = 60.0  # it may still be ending the allocations that it asked for


def _open(name: str) -> tuple[Gateway, SearchRecord, int]:
    from deephyper_balsam.gateway import Gateway
    from deephyper_balsam.record import find_record

    gateway = Gateway()
    record = find_record(gateway, name)
    return gateway, record, int(gateway.site(record.sites[0])["id"])


def _driver(gateway: Gateway, name: str) -> Life | None:
    from deephyper_balsam.drivers import at_the_wheel, read_lives

    return at_the_wheel(read_lives(gateway, name).get(name, []), gateway.now())


def _answer(gateway: Gateway, name: str, order: Order, wait_s: float = _ANSWER_S) -> Order:
    """Wait until the order is answered, as long as somebody drives; the order as it is then."""
    from deephyper_balsam.orders import read_orders

    def found() -> Order:
        return next((one for one in read_orders(gateway, name) if one.id == order.id), order)

    _wait(lambda: found().handled is not None or _driver(gateway, name) is None, wait_s)
    return found()


def _wait(condition: Callable[[], bool], wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _report(name: str, order: Order, answer: str, as_json: bool) -> None:
    if as_json:
        echo_json({"name": name, "order": order.id, "what": order.what, "handled": order.handled, "said": answer})
    else:
        click.echo(answer)


@click.command()
@click.argument("name")
@click.option("--now", is_flag=True, help="Do not wait for trials that run; the next life collects them.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
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
    from deephyper_balsam.jobs import withdraw_waiting
    from deephyper_balsam.orders import STOP, answer_order, give_order
    from deephyper_balsam.sites.chain import withdraw

    gateway, _, site_id = _open(name)
    wait_s = 0.0 if now else wait_s
    driver = _driver(gateway, name)
    order = give_order(gateway, site_id, name, STOP, time.time(), wait_s=wait_s)
    for batch_job_id in withdraw(gateway, [site["id"] for site in gateway.sites()], name):
        if not as_json:
            click.echo(f"BatchJob {batch_job_id} is taken out of the queue.")
    if driver is not None:
        if not as_json:
            click.echo(f"Asked the driver ({driver.where}) to stop ...")
        order = _answer(gateway, name, order)
        if order.handled is not None:
            if not as_json:
                click.echo(f"It {order.handled['did']}.")
            left = _wait(lambda: _driver(gateway, name) is None, wait_s + _LEAVE_S)
            _report(name, order, "Stopped." if left else "It has not left yet.", as_json)
            return
        if _driver(gateway, name) is not None:
            _report(name, order, "It has not answered yet; it will at its next look at Balsam.", as_json)
            return
    withdrawn = withdraw_waiting(gateway, name, time.time())
    answer_order(gateway, order, time.time(), f"nobody drove; withdrew {len(withdrawn)} waiting trials")
    _report(name, order, f"Nobody drives {name}; {len(withdrawn)} waiting trials withdrawn.", as_json)


@click.command()
@click.argument("name")
@click.option(
    "--max-evals",
    type=click.IntRange(min=1),
    help="Evaluations of the whole search, those done included. [default: as it is]",
)
@click.option(
    "--timeout", "timeout_s", type=float, help="Seconds of the whole search, those driven included. [default: as it is]"
)
@json_option
def extend(name: str, max_evals: int | None, timeout_s: float | None, as_json: bool) -> None:
    """Give the search NAME a larger budget. Its driver takes it up at once; without one, `search resume` does.

    \b
    Example:
      deephyper-balsam search extend digits-1 --max-evals 200
    """
    from deephyper_balsam.drivers import read_lives
    from deephyper_balsam.orders import EXTEND, effective_budget, give_order, read_orders

    if max_evals is None and timeout_s is None:
        raise SettingsError("Say what to extend: give --max-evals, --timeout or both.")
    gateway, record, site_id = _open(name)
    lives = [life for life in read_lives(gateway, name).get(name, []) if life.driving_since is not None]
    budget = effective_budget(record.settings, lives, read_orders(gateway, name))
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
    order = give_order(gateway, site_id, name, EXTEND, time.time(), max_evals=max_evals, timeout_s=timeout_s)
    order = _answer(gateway, name, order)
    _report(name, order, f"{_done(name, order)} ({order})", as_json)


def _done(name: str, order: Order) -> str:
    if order.handled is not None:
        return f"Its driver says: {order.handled['did']}"
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
    from deephyper_balsam.archive import read_rows
    from deephyper_balsam.jobs import read_config, read_outcome, read_state, trial_number
    from deephyper_balsam.orders import ADD, give_order, read_orders
    from deephyper_balsam.problem import HpProblem
    from deephyper_balsam.trial import TrialState

    gateway, record, site_id = _open(name)
    problem = HpProblem.from_dict(record.settings["problem"])
    config = problem.fill_in(_parse(problem, assignments))
    key = problem.encoder.key(config)
    for row in read_rows(gateway, name):
        state = read_state(row)
        if state is not TrialState.CANCELLED and problem.encoder.key(read_config(row)) == key:
            objective = f", objective {read_outcome(row)['objective']:.6g}" if state is TrialState.DONE else ""
            raise InputError(
                f"This configuration is trial {trial_number(row)} of {name!r} already ({state.value}{objective}); no "
                "configuration is evaluated twice."
            )
    for other in read_orders(gateway, name):
        if other.what == ADD and other.handled is None and problem.encoder.key(dict(other.config)) == key:
            raise InputError(f"This configuration was added to {name!r} already, by {other.by}, and waits its turn.")
    order = give_order(gateway, site_id, name, ADD, time.time(), config=config)
    order = _answer(gateway, name, order)
    _report(name, order, f"{_done(name, order)} ({order})", as_json)


def _parse(problem: Any, assignments: Sequence[str]) -> dict[str, Any]:
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


def _value(problem: Any, name: str, text: str) -> Any:
    from deephyper_balsam.warm_start import value_of

    return value_of(next(column for column in problem.encoder.columns if column.name == name), text)
