"""A search on one screen: a `SearchSnapshot` drawn into so many columns and rows, no line wider, no row too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from deephyper_balsam.common.objective import title, turned
from deephyper_balsam.common.wording import counted, pictured
from deephyper_balsam.driver.progress import duration
from deephyper_balsam.monitor.search_snapshot import AllocationView, Ended, Running, SearchSnapshot
from deephyper_balsam.trial import TrialState

_OLD_S = 10.0
_ROOMY = 100  # columns
_STATES = {"pending_submission": "asked for", "queued": "in the queue"}


def left(snapshot: SearchSnapshot) -> str:
    """Return what is left of the budgets, and how long that takes at the rate of the last minutes."""
    parts = []
    if snapshot.max_evals is not None:
        rest = max(0, snapshot.max_evals - snapshot.evaluated)
        parts.append(counted(rest, "evaluation"))
        if rest and snapshot.evaluations_per_min:
            parts[-1] += f" (about {duration(60 * rest / snapshot.evaluations_per_min)})"
    if snapshot.timeout_s is not None:
        parts.append(duration(snapshot.timeout_s - snapshot.elapsed_s))
    return " or ".join(parts)


def one_line(snapshot: SearchSnapshot) -> str:
    """Return the whole snapshot as one line of a log."""
    states, best = snapshot.states, snapshot.best
    line = (
        f"{duration(snapshot.elapsed_s):>6}  done {states[TrialState.DONE]}  running {states[TrialState.RUNNING]}  "
        f"waiting {states[TrialState.READY]}  failed {states[TrialState.FAILED]}  "
        f"best {'none' if best is None else f'{turned(best.objective, snapshot.minimize):.6g} (trial {best.number})'}  "
        f"{snapshot.evaluations_per_min:.1f}/min  left {left(snapshot)}"
    )
    return line + (f"  [{snapshot.notice}]" if snapshot.notice else "")


@dataclass(frozen=True)
class Screen:
    """Draws a snapshot into the screen that there is at the moment; what has an age grows older with `now`.

    `note` is what the one who shows it has to say: that Balsam does not answer, that the search is ending.
    """

    snapshot: SearchSnapshot
    now: float
    note: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or options.size.height
        rows = draw(self.snapshot, options.max_width, height, self.now, self.note)
        yield Text("\n", end="").join(rows)


def draw(snapshot: SearchSnapshot, width: int, height: int, now: float, note: str | None = None) -> list[Text]:
    """Return at most `height` rows of at most `width` columns each."""
    rows = _head(snapshot, width)
    if now - snapshot.at > _OLD_S:
        note = f"{note or ''} This is from {duration(now - snapshot.at)} ago."
    said = _said(snapshot, width, note)
    # What is left goes to four parts: the plot, runs beside results, failures, allocations
    free = height - len(rows) - len(said)
    few = 2 if free < 24 else 6
    parts = [_failures(snapshot, few), _allocations(snapshot, few)]
    below = [row for part in parts for row in part]
    free -= len(below)
    plot_rows = min(free // 2, 16) if free >= 9 else 0
    plot = _plot(snapshot, width, plot_rows, now)
    rows += plot
    rows += _beside(snapshot, width, free - len(plot), now)
    rows += below
    rows = rows[: height - len(said)] + said
    for row in rows:
        row.plain = pictured(row.plain)  # names, values and hosts come from elsewhere
        row.no_wrap = True
        row.truncate(width, overflow="ellipsis")
    return rows[:height]


# --- the parts, from above -------------------------------------------------------------------------------------------


def _head(snapshot: SearchSnapshot, width: int) -> list[Text]:
    states = snapshot.states
    busy = [] if snapshot.busy is None else [f"nodes {snapshot.busy:.0%} busy"]
    first = Text.assemble((snapshot.name, "bold"), "  ", snapshot.about)
    driven = f"driven {duration(snapshot.elapsed_s)}"
    driven += f" by {snapshot.driver}" if snapshot.driver and width >= _ROOMY else ""
    first = _apart(first, Text(driven), width)
    counts = Text("  ").join(
        [
            Text(f"{states[TrialState.DONE]} done", style="green"),
            Text(f"{states[TrialState.FAILED]} failed", style="red" if states[TrialState.FAILED] else ""),
            Text(f"{states[TrialState.RUNNING]} running", style="cyan"),
            Text(f"{states[TrialState.READY]} waiting"),
        ]
    )
    counts = _apart(counts, Text("  ".join([*busy, f"{snapshot.evaluations_per_min:.1f}/min"])), width)
    return [first, counts, _bar(snapshot, width), _best(snapshot)]


def _bar(snapshot: SearchSnapshot, width: int) -> Text:
    words = "complete" if snapshot.complete else f"left: {left(snapshot)}"
    shares = []
    if snapshot.max_evals:
        shares.append(snapshot.evaluated / snapshot.max_evals)
    if snapshot.timeout_s:
        shares.append(snapshot.elapsed_s / snapshot.timeout_s)
    share = min(1.0, max(shares, default=0.0))
    cells = max(0, width - len(words) - 8)
    full = int(share * cells)
    return Text.assemble(("━" * full, "green"), ("─" * (cells - full), "dim"), f" {share:>4.0%}  {words}")


def _best(snapshot: SearchSnapshot) -> Text:
    best = snapshot.best
    if best is None:
        return Text("no trial has an objective yet", style="dim")
    values = "  ".join(f"{key}={_value(value)}" for key, value in best.config.items())
    return Text.assemble(
        (f"best {turned(best.objective, snapshot.minimize):.6g}", "bold green"), f" (trial {best.number})  {values}"
    )


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(snapshot: SearchSnapshot, width: int, height: int, now: float) -> list[Text]:
    """Return the best objective over the time since the search began, as a line of box characters."""
    if height < 4 or not snapshot.steps:
        return []
    end = max([snapshot.steps[-1][0], *(one.at for one in snapshot.last[:1])]) if snapshot.complete else now
    begin = min(snapshot.begun_at, snapshot.steps[0][0])
    labels = 11
    columns, lines = width - labels, height - 2
    if columns < 10:
        return []
    values = _at_columns(snapshot.steps, begin, max(end, begin + 1.0), columns)
    known = [value for value in values if value is not None]
    top, low = known[-1], known[min(len(known) // 20, len(known) - 1)]  # the first steps may lie far below the others
    cells = [[" "] * columns for _ in range(lines)]
    before: int | None = None
    for column, value in enumerate(values):
        if value is None:
            continue
        row = 0 if top == low else round((lines - 1) * (top - max(value, low)) / (top - low))
        if snapshot.minimize and top != low:
            row = lines - 1 - row
        if before is None or before == row:
            cells[row][column] = "─"
        else:
            cells[before][column], cells[row][column] = ("╯", "╭") if row < before else ("╮", "╰")
            for between in range(min(row, before) + 1, max(row, before)):
                cells[between][column] = "│"
        before = row
    texts = [""] * lines
    ends = [f"{turned(end, snapshot.minimize):.5g}" for end in (top, low)]
    texts[0] = ends[0]
    if top != low:
        texts[0], texts[-1] = reversed(ends) if snapshot.minimize else ends
    rows = [_title(f"best {title(snapshot.minimize)} over time")]
    rows += [
        Text.assemble(f"{text[:9]:>9} ", ("┤" if text else "│", "dim"), ("".join(line), "green"))
        for text, line in zip(texts, cells, strict=True)
    ]
    until = duration(end - begin)
    axis = "└" + "─" * max(0, columns - len(until) - 1) + until
    return [*rows, Text.assemble(" " * (labels - 1), (axis, "dim"))]


def _at_columns(steps: Sequence[tuple[float, float]], begin: float, end: float, columns: int) -> list[float | None]:
    values: list[float | None] = []
    place = 0
    for column in range(columns):
        until = begin + (end - begin) * (column + 1) / columns
        while place < len(steps) and steps[place][0] <= until:
            place += 1
        values.append(steps[place - 1][1] if place else None)
    if place < len(steps) or values[-1] is None:  # a node's clock is ahead of ours
        values[-1] = steps[-1][1]
    return values


def _beside(snapshot: SearchSnapshot, width: int, height: int, now: float) -> list[Text]:
    """Return the running trials and, beside them, the last results."""
    if height < 2:
        return []
    gap = 2
    half = (width - gap) // 2
    running = [_title(f"running: {snapshot.states[TrialState.RUNNING]} (trial, age, where)")]
    running += [_running(run, now) for run in snapshot.running[: height - 1]]
    ended = [_title("ended (trial, objective, took, node)")]
    ended += [_ended(one, snapshot.minimize) for one in snapshot.last[: height - 1]]
    rows = []
    for number in range(max(len(running), len(ended))):
        one, other = (column[number] if number < len(column) else Text() for column in (running, ended))
        one.truncate(half, overflow="ellipsis", pad=True)
        rows.append(Text.assemble(one, " " * gap, other))
    return rows


def _running(run: Running, now: float) -> Text:
    where = run.host or (run.site if run.batch_job_id is None else f"{run.site}, BatchJob {run.batch_job_id}")
    nodes = f" {run.nodes:g} nodes" if run.nodes > 1 else ""
    return Text(f"{run.number:>5}  {duration(now - run.since):>6}  {where}{nodes}")


def _ended(one: Ended, minimize: bool) -> Text:
    took = "" if one.took_s is None else duration(one.took_s)
    if one.failure is not None:
        return Text.assemble(f"{one.number:>5}  ", (one_row(one.failure), "red"))
    objective = turned(one.objective or 0.0, minimize)
    return Text(f"{one.number:>5}  {objective:>11.6g}  {took:>6}  {one.host or ''}")


def _failures(snapshot: SearchSnapshot, most: int) -> list[Text]:
    if not snapshot.failures:
        return []
    count, reasons = snapshot.states[TrialState.FAILED], len(snapshot.failures)
    title = _title(f"failures: {count} for {counted(reasons, 'reason')}")
    return [title, *(Text(f"{times:>5}x {one_row(reason)}", style="red") for reason, times in snapshot.failures[:most])]


def _allocations(snapshot: SearchSnapshot, most: int) -> list[Text]:
    alive = sorted(snapshot.allocations, key=lambda one: (one.state != "running", one.site, one.id))
    running = [one for one in alive if one.state == "running"]
    said = f"{len(running)} running with {_nodes(sum(one.nodes for one in running))}" if running else "none is running"
    if len(alive) > len(running):
        said += f", {len(alive) - len(running)} to come"
    return [_title(f"allocations: {said}"), *map(_allocation, alive[:most])]


def _allocation(one: AllocationView) -> Text:
    if one.state != "running":
        state = f"{_STATES.get(one.state, one.state)}, for {one.wall_time_min} min"
    elif one.left_s is None:
        state = f"running, at most {one.wall_time_min} min left"
    else:
        state = f"running, {one.left_s / 60:.0f} of {one.wall_time_min} min left"
    return Text(f"  {one.site}  BatchJob {one.id}  {_nodes(one.nodes)}  {state}")


def _nodes(count: int) -> str:
    return counted(count, "node")


def _said(snapshot: SearchSnapshot, width: int, note: str | None) -> list[Text]:
    """Return what a person should know, in two rows each at most."""
    rows = []
    for words, style in ((note, "bold yellow"), (snapshot.notice, "yellow")):
        if words:
            text = one_row(words)
            rows += [
                Text(text[start : start + width], style=style) for start in range(0, min(len(text), 2 * width), width)
            ]
    return rows


# --- words ------------------------------------------------------------------------------------------------------------


def one_row(text: str) -> str:
    """Return a text without line ends and characters that a terminal obeys."""
    return pictured(" ".join(text.split()))


def _title(words: str) -> Text:
    return Text(words, style="bold")


def _apart(one: Text, other: Text, width: int) -> Text:
    """Return two texts at the two ends of a row; the first is cut where there is no room."""
    one.truncate(max(0, width - other.cell_len - 2), overflow="ellipsis", pad=True)
    return Text.assemble(one, "  ", other)
