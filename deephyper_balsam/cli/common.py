"""What several commands share: JSON or a table, a search with its signals, the best configuration."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.cli import EXIT_INTERRUPTED, EXIT_NO_RESULT, ends_by, give_up_the_output
from deephyper_balsam.common.wording import counted
from deephyper_balsam.driver.progress import by_state, duration, why_failed
from deephyper_balsam.errors import DeepHyperBalsamError
from deephyper_balsam.node.targets import split_target

if TYPE_CHECKING:
    from deephyper_balsam.driver.balsam_session import BalsamEvaluator
    from deephyper_balsam.driver.search import Search


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
    return split_target(problem)[0]


def drive(
    search: Search[BalsamEvaluator], max_evals: int | None, timeout: float | None, *, takeover: bool = False
) -> int:
    """Run a search with its progress shown and its signals minded; the exit code.

    The first SIGINT, SIGTERM or SIGHUP (a terminal that closes) ends it orderly and soon, the second at once. What is
    shown may be lost, by a terminal that has gone or a full disk: the search is not.
    """
    from deephyper_balsam.cli.progress import ProgressView
    from deephyper_balsam.results.table import claim_folder

    ours = not search.folder.exists()
    claim_folder(search.folder)

    def end(signum: int, _frame: Any) -> None:
        if search.stopped and signum == signal.SIGHUP:
            return  # a terminal that closes may say so more than once
        if search.stopped:
            search.leave_now()
            sys.exit(EXIT_INTERRUPTED)
        search.stop()
        # In a thread: a signal may come while the interpreter is within the import of what printing needs
        words = "Ending the search; once more to leave at once."
        threading.Thread(target=view.note, args=(words,), daemon=True).start()

    view = ProgressView(search)
    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, *ends_by())}
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
    try:
        summarise(search)
    except OSError:
        give_up_the_output()
    if search.stopped:
        return EXIT_INTERRUPTED
    return 0 if frame["objective"].notna().any() else EXIT_NO_RESULT


def summarise(search: Search[BalsamEvaluator]) -> None:
    """Say what a search found and where it is written."""
    from deephyper_balsam.results.table import best

    lines = search.evaluator.lines
    click.echo(f"\nSearch {search.name}: {by_state(lines)}. It took {duration(search.elapsed_s)}.")
    echo_best(best(lines), search.minimize)
    for reason in why_failed(lines):
        click.echo(f"Failed: {reason}")
    if search.stopped:
        click.echo(f"To go on: deephyper-balsam search resume {search.name}")
    echo_end(search, sum(line["job_status"] in ("DONE", "FAILED") for line in lines))
    click.echo(f"\nResults: {search.folder / 'results.csv'}\nLog:     {search.folder / 'search.log'}")


def echo_end(search: Search[BalsamEvaluator], evaluated: int) -> None:
    """Say why a search found nothing more to do, and what lets it go on."""
    from deephyper_balsam.store.search_state import EndReason

    end, unmet = search.ended_because, search.unmet_additions
    if end is None:
        return
    if end is EndReason.SPACE:
        click.echo(f"\nEnded: {end.value}.")
        return
    option = (
        "--timeout S" if end is EndReason.TIME else f"--max-evals {evaluated + unmet}" if unmet else "--max-evals N"
    )
    budget = "time" if end is EndReason.TIME else f"budget of {counted(evaluated, 'evaluation')}"
    again = f"deephyper-balsam search extend {search.name} {option}, then search resume"
    click.echo(f"\nEnded: its {budget} is used up. To go on: {again}.")
    if unmet:
        were = "configuration was" if unmet == 1 else "configurations were"
        click.echo(f"{unmet} added {were} not evaluated for want of budget; they come first then.")


def echo_best(line: dict[str, Any] | None, minimize: bool) -> None:
    """Say the best objective, as the run function returned it, and its configuration."""
    from deephyper_balsam.common.objective import title, turned
    from deephyper_balsam.results.table import configuration

    if line is None:
        click.echo("No trial has an objective yet.")
        return
    click.echo(f"Best {title(minimize)} {turned(line['objective'], minimize):.6g} (trial {line['job_id']}):")
    values = configuration(line)
    width = max(map(len, values), default=0)
    for name, value in values.items():
        click.echo(
            f"  {name.ljust(width)}  {value:.6g}" if isinstance(value, float) else f"  {name.ljust(width)}  {value}"
        )
