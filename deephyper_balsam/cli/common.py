"""What several commands share: JSON or a table, a search with its signals, the best configuration."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from deephyper_balsam.cli import EXIT_INTERRUPTED, EXIT_NO_RESULT
from deephyper_balsam.errors import DeepHyperBalsamError


class Finite(click.FloatRange):
    """A range of real numbers; neither `nan` nor `inf` is in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


def echo_json(value: Any) -> None:
    """Print `value` as JSON."""
    click.echo(json.dumps(value, indent=2, default=str))


def echo_table(rows: Sequence[Mapping[str, Any]], columns: Iterable[str], as_json: bool, empty: str) -> None:
    """Print rows under their columns, or all of them as a JSON list; `empty` is said when there are none."""
    if as_json:
        echo_json(list(rows))
        return
    if not rows:
        click.echo(empty)
        return
    names = list(columns)
    cells = [["" if row.get(name) is None else str(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    for line in (names, *cells):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def run_target(problem: str) -> str:
    """Return the target of the run function beside a problem, whatever the problem is called in its file."""
    return problem.partition(":")[0]


def drive(search: Any, max_evals: int | None, timeout: float | None, *, takeover: bool = False) -> int:
    """Run a search with its progress shown and its signals minded; the exit code.

    The first SIGINT or SIGTERM ends it orderly and soon, the second at once.
    """
    from deephyper_balsam.cli.progress import ProgressView
    from deephyper_balsam.results import claim_folder

    ours = not search.folder.exists()
    claim_folder(search.folder)

    def end(signum: int, _frame: Any) -> None:
        if search.stopped:
            search.leave_now()
            sys.exit(EXIT_INTERRUPTED)
        view.note("Ending the search; once more to leave at once.")
        search.stop()

    view = ProgressView(search)
    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with view:
            frame = search.search(max_evals=max_evals, timeout=timeout, on_progress=view, takeover=takeover)
    except DeepHyperBalsamError:
        if ours:  # the folder of a search that was refused before it wrote anything
            with contextlib.suppress(OSError):  # not empty: it stays
                search.folder.rmdir()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    summarise(search, frame)
    if search.stopped:
        return EXIT_INTERRUPTED
    return 0 if frame["objective"].notna().any() else EXIT_NO_RESULT


def summarise(search: Any, frame: Any) -> None:
    """Say what a search found and where it is written."""
    from deephyper_balsam.results import best

    counts = frame["job_status"].value_counts().to_dict()
    said = ", ".join(f"{count} {state.lower()}" for state, count in sorted(counts.items())) or "no trial"
    click.echo(f"\nSearch {search.name}: {said}.")
    echo_best(best(search.evaluator.lines))
    click.echo(f"\nResults: {search.folder / 'results.csv'}\nLog:     {search.folder / 'search.log'}")


def echo_best(line: dict[str, Any] | None) -> None:
    """Say the best objective and its configuration."""
    from deephyper_balsam.results import configuration

    if line is None:
        click.echo("No trial has an objective yet.")
        return
    click.echo(f"Best objective {line['objective']:.6g} (trial {line['job_id']}):")
    values = configuration(line)
    width = max(map(len, values), default=0)
    for name, value in values.items():
        click.echo(
            f"  {name.ljust(width)}  {value:.6g}" if isinstance(value, float) else f"  {name.ljust(width)}  {value}"
        )
