"""`deephyper-balsam simulate`: plan a campaign on a virtual clock."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.cli import EXIT_NO_RESULT
from deephyper_balsam.cli.common import echo_json, json_option
from deephyper_balsam.cli.methods import method_options, of_method
from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import InputError

if TYPE_CHECKING:
    from deephyper_balsam.driver.simulation import SimulationReport
    from deephyper_balsam.node.running_job import RunningJob
    from deephyper_balsam.node.worker import RunFunction


@click.command()
@click.option("--problem", required=True, help="What is searched, as in `search run`.")
@click.option("--run", "run_target", help="The run function; default: beside the problem.")
@click.option("--workers", type=click.IntRange(min=1), required=True, help="Evaluations at a time.")
@click.option("--minutes", type=float, required=True, help="Virtual minutes.")
@click.option("--duration-mean", type=float, help="Mean seconds of an evaluation. [default: what the run takes here]")
@click.option("--duration-std", type=float, default=0.0, show_default=True, help="Standard deviation of the seconds.")
@click.option(
    "--method", type=click.Choice(["ambs", "random", "ga"]), default="ambs", show_default=True, help="Method."
)
@click.option("--max-evals", type=click.IntRange(min=1), help="End after so many evaluations.")
@click.option(
    "--stopper",
    default="none",
    show_default=True,
    help="Ends runs early: sha:max=27,min=1,factor=3,competing=5; median:min=1,interval=1; epoch:K; none.",
)
@click.option(
    "--finish-top",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="So many stopped trials, the best, go on to their end after --max-evals trials.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Makes it repeatable.")
@method_options
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where what the run function prints goes. [default: nowhere]",
)
@json_option
def simulate(
    problem: str,
    run_target: str | None,
    workers: int,
    minutes: float,
    duration_mean: float | None,
    duration_std: float,
    method: str,
    max_evals: int | None,
    stopper: str,
    finish_top: int,
    seed: int,
    output: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Search on a virtual clock: how busy would N workers be, and what would be found? Nothing is sent anywhere.

    The run function is really called, but its evaluations take as long as you say; the driver's own computing is real
    and passes on the clock. With a stopper, a run function that records (job.record) and asks (job.stopped) is
    evaluated in full all the same; what it recorded is replayed on the clock.

    \b
    Example:
      deephyper-balsam simulate --problem ackley --workers 128 --minutes 30 --duration-mean 60 --duration-std 20
    """
    from deephyper_balsam.driver.simulated_runs import as_recorded, by_budget
    from deephyper_balsam.driver.simulated_session import normal_durations, own_durations
    from deephyper_balsam.driver.simulation import simulate as run_simulation
    from deephyper_balsam.node.shell_command import nothing_left_behind
    from deephyper_balsam.node.stoppers import NEVER, parse_stopper
    from deephyper_balsam.node.worker import make_run_function
    from deephyper_balsam.store.applications import resolve_problem, resolve_run

    ends_early = parse_stopper(stopper)
    space = resolve_problem(problem)
    space.check()
    spec = resolve_run(run_target or problem)
    space = space.as_run_by(spec)
    durations = own_durations if duration_mean is None else normal_durations(duration_mean, duration_std, seed)
    with TemporaryDirectory() as folder, _output(output) as apart, nothing_left_behind():
        report = run_simulation(
            space,
            apart(make_run_function(spec, Path(folder))),
            method=method,
            workers=workers,
            minutes=minutes,
            duration=durations,
            seed=seed,
            max_evals=max_evals,
            stopper=ends_early,
            finish_top=finish_top,
            pace=as_recorded if duration_mean is None else by_budget,
            on_progress=_Progress(minutes),
            **of_method(given),
        )
    if as_json:
        echo_json(report.to_dict())
    else:
        number = report.best_loss if report.minimize else report.best_objective
        best = "none" if number is None else f"{number:.6g}"
        for name, value in (
            ("workers", f"{workers} for {minutes:g} virtual minutes"),
            ("utilization", f"{report.utilization:.4f}"),
            ("evaluations", f"{report.evaluations} ({report.failures} failed)"),
            ("best loss" if report.minimize else "best objective", best),
            (
                "manager",
                f"{report.manager_seconds:.2f} s (tell {report.tell_seconds:.2f}, ask {report.ask_seconds:.2f})",
            ),
            ("longest loop", f"{report.longest_loop_seconds:.3f} s"),
            *(() if ends_early == NEVER else _stopped_said(report)),
        ):
            click.echo(f"{name:<15} {value}")
        for name, value in (report.best_config or {}).items():
            click.echo(f"  {name} = {value}")
    if report.best_objective is None:
        raise click.exceptions.Exit(EXIT_NO_RESULT)


def _stopped_said(report: SimulationReport) -> tuple[tuple[str, str], ...]:
    spent, saved = report.worker_hours, report.worker_hours_saved
    share = f" ({saved / (spent + saved):.0%} of {spent + saved:.4g})" if spent + saved else ""
    return ("stopped early", str(report.stopped)), ("saved", f"{saved:.4g} worker-hours{share}")


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[Callable[[RunFunction], RunFunction]]:
    """Yield what sends the output of a run function, and of what it starts, to a file, apart from ours."""
    try:
        file = (path or Path(os.devnull)).open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Give another --output.") from error

    def apart(run: RunFunction) -> RunFunction:
        def call(job: RunningJob) -> Any:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            kept = [(number, os.dup(number)) for number in (1, 2)]
            try:
                for number, _ in kept:
                    os.dup2(file.fileno(), number)
                with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                    return run(job)
            finally:
                file.flush()
                for number, copy in kept:
                    os.dup2(copy, number)
                    os.close(copy)

        return call

    with file:
        yield apart


class _Progress:
    """Says now and then how far the virtual clock is."""

    def __init__(self, minutes: float, every_s: float = 5.0) -> None:
        self._minutes = minutes
        self._every_s = every_s
        self._said_at = time.monotonic()

    def __call__(self, minute: float, evaluations: int) -> None:
        if time.monotonic() - self._said_at > self._every_s:
            click.echo(f"minute {minute:.1f} of {self._minutes:g}, {counted(evaluations, 'evaluation')}", err=True)
            self._said_at = time.monotonic()
