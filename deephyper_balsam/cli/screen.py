"""A search on one screen: a `Picture` drawn into so many columns and rows, no line wider, no row too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from deephyper_balsam.picture import Allocation, Ended, Picture, Running
from deephyper_balsam.trial import TrialState

_OLD_S = 10.0
_ROOMY = 100  # columns
_STATES = {"pending_submission": "asked for", "queued": "in the queue"}


def duration(seconds: float) -> str:
    """Return `seconds` as a person says it: ``45s``, ``3m05s``, ``2h10m``, ``3d04h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def left(picture: Picture) -> str:
    """Return what is left of the budgets, and how long that takes at the rate of the last minutes."""
    parts = []
    if picture.max_evals is not None:
        rest = max(0, picture.max_evals - picture.evaluated)
        parts.append(f"{rest} evaluations")
        if rest and picture.evaluations_per_min:
            parts[-1] += f" (about {duration(60 * rest / picture.evaluations_per_min)})"
    if picture.timeout_s is not None:
        parts.append(duration(picture.timeout_s - picture.elapsed_s))
    return " or ".join(parts)


def one_line(picture: Picture) -> str:
    """Return the whole picture as one line of a log."""
    states, best = picture.states, picture.best
    line = (
        f"{duration(picture.elapsed_s):>6}  done {states[TrialState.DONE]}  running {states[TrialState.RUNNING]}  "
        f"waiting {states[TrialState.READY]}  failed {states[TrialState.FAILED]}  "
        f"best {'none' if best is None else f'{best.objective:.6g} (trial {best.number})'}  "
        f"{picture.evaluations_per_min:.1f}/min  left {left(picture)}"
    )
    return line + (f"  [{picture.notice}]" if picture.notice else "")


@dataclass(frozen=True)
class Screen:
    """Draws a picture into the screen that there is at the moment; what has an age grows older with `now`.

    `note` is what the one who shows it has to say: that Balsam does not answer, that the search is ending.
    """

    picture: Picture
    now: float
    note: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or options.size.height
        rows = draw(self.picture, options.max_width, height, self.now, self.note)
        yield Text("\n", end="").join(rows)


def draw(picture: Picture, width: int, height: int, now: float, note: str | None = None) -> list[Text]:
    """Return at most `height` rows of at most `width` columns each."""
    rows = _head(picture, width)
    if now - picture.at > _OLD_S:
        note = f"{note or ''} This is from {duration(now - picture.at)} ago."
    said = _said(picture, width, note)
    # What is left goes to four parts: the plot, runs beside results, failures, allocations
    free = height - len(rows) - len(said)
    few = 2 if free < 24 else 6
    parts = [_failures(picture, few), _allocations(picture, few)]
    below = [row for part in parts for row in part]
    free -= len(below)
    plot_rows = min(free // 2, 16) if free >= 9 else 0
    plot = _plot(picture, width, plot_rows, now)
    rows += plot
    rows += _beside(picture, width, free - len(plot), now)
    rows += below
    rows = rows[: height - len(said)] + said
    for row in rows:
        row.no_wrap = True
        row.truncate(width, overflow="ellipsis")
    return rows[:height]


# --- the parts, from above -------------------------------------------------------------------------------------------


def _head(picture: Picture, width: int) -> list[Text]:
    states = picture.states
    busy = [] if picture.busy is None else [f"nodes {picture.busy:.0%} busy"]
    first = Text.assemble((picture.name, "bold"), "  ", picture.about)
    driven = f"driven {duration(picture.elapsed_s)}"
    driven += f" by {picture.driver}" if picture.driver and width >= _ROOMY else ""
    first = _apart(first, Text(driven), width)
    counts = Text("  ").join(
        [
            Text(f"{states[TrialState.DONE]} done", style="green"),
            Text(f"{states[TrialState.FAILED]} failed", style="red" if states[TrialState.FAILED] else ""),
            Text(f"{states[TrialState.RUNNING]} running", style="cyan"),
            Text(f"{states[TrialState.READY]} waiting"),
        ]
    )
    counts = _apart(counts, Text("  ".join([*busy, f"{picture.evaluations_per_min:.1f}/min"])), width)
    return [first, counts, _bar(picture, width), _best(picture)]


def _bar(picture: Picture, width: int) -> Text:
    words = "complete" if picture.complete else f"left: {left(picture)}"
    shares = []
    if picture.max_evals:
        shares.append(picture.evaluated / picture.max_evals)
    if picture.timeout_s:
        shares.append(picture.elapsed_s / picture.timeout_s)
    share = min(1.0, max(shares, default=0.0))
    cells = max(0, width - len(words) - 8)
    full = int(share * cells)
    return Text.assemble(("━" * full, "green"), ("─" * (cells - full), "dim"), f" {share:>4.0%}  {words}")


def _best(picture: Picture) -> Text:
    best = picture.best
    if best is None:
        return Text("no trial has an objective yet", style="dim")
    values = "  ".join(f"{key}={_value(value)}" for key, value in best.config.items())
    return Text.assemble((f"best {best.objective:.6g}", "bold green"), f" (trial {best.number})  {values}")


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(picture: Picture, width: int, height: int, now: float) -> list[Text]:
    """Return the best objective over the time since the search began, as a line of box characters."""
    if height < 4 or not picture.steps:
        return []
    end = max([picture.steps[-1][0], *(one.at for one in picture.last[:1])]) if picture.complete else now
    begin = min(picture.begun_at, picture.steps[0][0])
    labels = 11
    columns, lines = width - labels, height - 2
    if columns < 10:
        return []
    values = _at_columns(picture.steps, begin, max(end, begin + 1.0), columns)
    known = [value for value in values if value is not None]
    top, low = known[-1], known[min(len(known) // 20, len(known) - 1)]  # the first steps may lie far below the others
    cells = [[" "] * columns for _ in range(lines)]
    before: int | None = None
    for column, value in enumerate(values):
        if value is None:
            continue
        row = 0 if top == low else round((lines - 1) * (top - max(value, low)) / (top - low))
        if before is None or before == row:
            cells[row][column] = "─"
        else:
            cells[before][column], cells[row][column] = "╯", "╭"
            for between in range(row + 1, before):
                cells[between][column] = "│"
        before = row
    texts = [""] * lines
    texts[0] = f"{top:.5g}"
    if top != low:
        texts[-1] = f"{low:.5g}"
    rows = [_title("best objective over time")]
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


def _beside(picture: Picture, width: int, height: int, now: float) -> list[Text]:
    """Return the running trials and, beside them, the last results."""
    if height < 2:
        return []
    gap = 2
    half = (width - gap) // 2
    running = [_title(f"running: {picture.states[TrialState.RUNNING]} (trial, age, where)")]
    running += [_running(run, now) for run in picture.running[: height - 1]]
    ended = [_title("ended (trial, objective, took, node)")]
    ended += [_ended(one) for one in picture.last[: height - 1]]
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


def _ended(one: Ended) -> Text:
    took = "" if one.took_s is None else duration(one.took_s)
    if one.failure is not None:
        return Text.assemble(f"{one.number:>5}  ", (one_row(one.failure), "red"))
    return Text(f"{one.number:>5}  {one.objective:>11.6g}  {took:>6}  {one.host or ''}")


def _failures(picture: Picture, most: int) -> list[Text]:
    if not picture.failures:
        return []
    count, reasons = picture.states[TrialState.FAILED], len(picture.failures)
    title = _title(f"failures: {count} for {reasons} reason{'s' * (reasons > 1)}")
    return [title, *(Text(f"{times:>5}x {one_row(reason)}", style="red") for reason, times in picture.failures[:most])]


def _allocations(picture: Picture, most: int) -> list[Text]:
    alive = sorted(picture.allocations, key=lambda one: (one.state != "running", one.site, one.id))
    running = [one for one in alive if one.state == "running"]
    said = f"{len(running)} running with {_nodes(sum(one.nodes for one in running))}" if running else "none is running"
    if len(alive) > len(running):
        said += f", {len(alive) - len(running)} to come"
    return [_title(f"allocations: {said}"), *map(_allocation, alive[:most])]


def _allocation(one: Allocation) -> Text:
    if one.state != "running":
        state = f"{_STATES.get(one.state, one.state)}, for {one.wall_time_min} min"
    elif one.left_s is None:
        state = f"running, at most {one.wall_time_min} min left"
    else:
        state = f"running, {one.left_s / 60:.0f} of {one.wall_time_min} min left"
    return Text(f"  {one.site}  BatchJob {one.id}  {_nodes(one.nodes)}  {state}")


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count != 1)}"


def _said(picture: Picture, width: int, note: str | None) -> list[Text]:
    """Return what a person should know, in two rows each at most."""
    rows = []
    for words, style in ((note, "bold yellow"), (picture.notice, "yellow")):
        if words:
            text = one_row(words)
            rows += [
                Text(text[start : start + width], style=style) for start in range(0, min(len(text), 2 * width), width)
            ]
    return rows


# --- words ------------------------------------------------------------------------------------------------------------


def one_row(text: str) -> str:
    """Return a text without line ends and characters that move the cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))


def _title(words: str) -> Text:
    return Text(words, style="bold")


def _apart(one: Text, other: Text, width: int) -> Text:
    """Return two texts at the two ends of a row; the first is cut where there is no room."""
    one.truncate(max(0, width - other.cell_len - 2), overflow="ellipsis", pad=True)
    return Text.assemble(one, "  ", other)
