"""`deephyper-balsam simulate`: plan a campaign on a virtual clock."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from deephyper_balsam.cli import EXIT_NO_RESULT
from deephyper_balsam.cli.common import echo_json, json_option


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
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Makes it repeatable.")
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
    seed: int,
    as_json: bool,
) -> None:
    """Search on a virtual clock: how busy would N workers be, and what would be found? Nothing is sent anywhere.

    The run function is really called, but its evaluations take as long as you say; the driver's own computing is real
    and passes on the clock.

    \b
    Example:
      deephyper-balsam simulate --problem ackley --workers 128 --minutes 30 --duration-mean 60 --duration-std 20
    """
    from deephyper_balsam.apps import resolve_problem, resolve_run
    from deephyper_balsam.evaluators.simulated import normal_durations, own_durations
    from deephyper_balsam.simulation import simulate as run_simulation
    from deephyper_balsam.worker import make_run_function

    space = resolve_problem(problem)
    space.check()
    spec = resolve_run(run_target or problem)
    durations = own_durations if duration_mean is None else normal_durations(duration_mean, duration_std, seed)
    with TemporaryDirectory() as folder:
        report = run_simulation(
            space,
            make_run_function(spec, Path(folder)),
            method=method,
            workers=workers,
            minutes=minutes,
            duration=durations,
            seed=seed,
            max_evals=max_evals,
            on_progress=_Progress(minutes),
        )
    if as_json:
        echo_json(report.to_dict())
    else:
        best = "none" if report.best_objective is None else f"{report.best_objective:.6g}"
        for name, value in (
            ("workers", f"{workers} for {minutes:g} virtual minutes"),
            ("utilization", f"{report.utilization:.4f}"),
            ("evaluations", f"{report.evaluations} ({report.failures} failed)"),
            ("best objective", best),
            (
                "manager",
                f"{report.manager_seconds:.2f} s (tell {report.tell_seconds:.2f}, ask {report.ask_seconds:.2f})",
            ),
            ("longest loop", f"{report.longest_loop_seconds:.3f} s"),
        ):
            click.echo(f"{name:<15} {value}")
        for name, value in (report.best_config or {}).items():
            click.echo(f"  {name} = {value}")
    if report.best_objective is None:
        raise click.exceptions.Exit(EXIT_NO_RESULT)


class _Progress:
    """Says now and then how far the virtual clock is."""

    def __init__(self, minutes: float, every_s: float = 5.0) -> None:
        self._minutes = minutes
        self._every_s = every_s
        self._said_at = time.monotonic()

    def __call__(self, minute: float, evaluations: int) -> None:
        if time.monotonic() - self._said_at > self._every_s:
            click.echo(f"minute {minute:.1f} of {self._minutes:g}, {evaluations} evaluations", err=True)
            self._said_at = time.monotonic()
