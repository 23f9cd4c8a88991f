"""`deephyper-balsam search show`: what a search was asked to do, or all that is known of one of its trials."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from deephyper_balsam.cli.common import echo_json, json_option

_INDENT = "  "
_MOST_RECORDS = 12


@click.command()
@click.argument("name")
@click.argument("trial", type=click.IntRange(min=0), required=False)
@json_option
def show(name: str, trial: int | None, as_json: bool) -> None:
    """Show the settings of the search NAME, or all that is known of its trial number TRIAL.

    Of a trial: its configuration, where it was asked from, its times, node and site, earlier tries and cuts, why it
    failed, with the traceback, and the end of what it printed.

    \b
    Example:
      deephyper-balsam search show digits-1
      deephyper-balsam search show digits-1 17
    """
    from deephyper_balsam.monitor.trial_view import view_trial
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.record import find_record

    gateway = Gateway()
    record = find_record(gateway, name)
    if trial is None:
        shown = {
            "name": name,
            "begun_at": record.created_at,
            "record_job_id": record.job_id,
            **record.settings,
        }
        lines = _search_lines(shown)
    else:
        shown = view_trial(gateway, record, trial)
        lines = _trial_lines(shown)
    if as_json:
        echo_json(shown)
        return
    for line in lines:
        click.echo(_plain(line))


def _search_lines(shown: Mapping[str, Any]) -> Iterator[str]:
    from deephyper_balsam.common.objective import minimises
    from deephyper_balsam.problem.hp_problem import HpProblem

    yield f"Search {shown['name']}, begun {_clock(shown['begun_at'])}"
    asked = shown.get("asked_for") or {}
    told = {
        "method": shown["method"],
        **shown.get("options", {}),
        "seed": shown.get("seed"),
        "site": shown["site"],
        "run": asked.get("run") or shown["run"].get("target") or shown["run"].get("command"),
        "max_evals": shown.get("max_evals"),
        "timeout": shown.get("timeout"),
        "eval_timeout": shown.get("eval_timeout"),
        **(shown.get("resources") or {}),
        **{key: value for key, value in asked.items() if key not in ("problem", "run")},
    }
    yield from _pairs({key: value for key, value in told.items() if value not in (None, {}, [])})
    yield ""
    problem = HpProblem.from_dict(shown["problem"])
    yield str(problem.minimized() if minimises(shown) else problem)


def _trial_lines(shown: Mapping[str, Any]) -> Iterator[str]:
    from deephyper_balsam.common.objective import title

    minimize = shown["minimize"]
    number = shown["loss" if minimize else "objective"]
    objective = "" if number is None else f", {title(minimize)} {number:.6g}"
    yield f"Trial {shown['trial']} of {shown['name']}: {shown['state']}{objective}"
    yield from _pairs(shown["configuration"])
    yield ""
    needs = ", ".join(f"{key} {value}" for key, value in shown["resources"].items())
    facts = {
        "asked from": shown["asked_from"],
        "asked at": _clock(shown["asked_at"]),
        "began at": _clock(shown["started_at"], shown["waited_s"], "after"),
        "ended at": _clock(shown["ended_at"], shown["ran_s"], "after"),
        "taken in at": _clock(shown["gathered_at"]),
        "time limit": None if shown["eval_timeout_s"] is None else f"{shown['eval_timeout_s']:g} s",
        "site": shown["site"],
        "node": shown["host"],
        "resources": needs,
        "Balsam": f"job {shown['balsam_job_id']} ({shown['balsam_state']})"
        + (f", BatchJob {shown['batch_job_id']}" if shown["batch_job_id"] else ""),
        "moved from": ", ".join(shown["moved_from"]) or None,
        "other jobs": ", ".join(map(str, shown["other_jobs"])) or None,
        "folder": shown["folder"],
    }
    yield from _pairs({key: value for key, value in facts.items() if value is not None})
    for earlier in shown["tries"]:
        where = f" on {earlier['host']}" if earlier.get("host") else ""
        yield f"{_INDENT}run once more after: {earlier.get('failure')}{where}"
    for cut in shown["cuts"]:
        yield f"{_INDENT}cut at {_clock(cut['at'])}: {cut['why']}"
    yield from _curve_lines(shown)
    if shown["metadata"]:
        yield "\nMetadata:"
        yield from _pairs(shown["metadata"])
    if shown["failure"]:
        yield f"\nFailed: {shown['failure']}"
    if shown["traceback"]:
        yield shown["traceback"].rstrip()
    yield ""
    if shown["output"]:
        kept = " (its folder cannot be read from here; this is what it left in Balsam)"
        yield f"The end of its output{kept if shown['output_from'] == 'balsam' else ''}:"
        yield shown["output"].rstrip("\n")
    elif shown["folder"] and shown["started_at"] is not None:
        yield f"It printed nothing that can be read from here; its files are at {shown['site']}: {shown['folder']}"


def _curve_lines(shown: Mapping[str, Any]) -> Iterator[str]:
    """Say what the run recorded, in a dozen lines at most, and what was decided at which rung from what."""
    from deephyper_balsam.common.objective import title, turned

    minimize, curve = shown["minimize"], shown["curve"]
    if not curve:
        return

    def value(kept: float) -> str:
        return f"{turned(kept, minimize):.6g}"

    yield f"\nRecorded: {title(minimize)} by budget"
    step = max(1, -(-len(curve) // _MOST_RECORDS))
    kept = [*curve[:-1:step], curve[-1]]
    yield from _pairs({f"{budget:g}": value(objective) for budget, objective in kept})
    for decision in shown["decisions"]:
        what = "stopped" if decision.get("stop") else "went on"
        others, cutoff = decision.get("n", 0), decision.get("cutoff")
        asked = f"{value(cutoff)} was needed" if cutoff is not None else "there were too few to compare with"
        with_what = f"at budget {decision['rung']:g} with {value(decision['value'])}"
        yield f"{_INDENT}{what} {with_what}: {asked} ({others} others)"


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, values), default=0)
    for name, value in values.items():
        yield (
            f"{_INDENT}{name.ljust(width)}  {value:.6g}"
            if isinstance(value, float)
            else (f"{_INDENT}{name.ljust(width)}  {value}")
        )


def _clock(moment: float | None, seconds: float | None = None, how: str = "") -> str | None:
    if moment is None:
        return None
    said = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    return said if seconds is None else f"{said}, {how} {seconds:.3g} s"


def _plain(text: str) -> str:
    """Return `text` without what would steer a terminal."""
    return "".join(one if one.isprintable() or one in "\n\t" else f"\\x{ord(one):02x}" for one in text)
