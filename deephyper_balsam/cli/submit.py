"""`deephyper-balsam search submit`: driver and launcher inside one allocation, or several one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.cli.common import run_target
from deephyper_balsam.cli.paths import absolute
from deephyper_balsam.cli.search_settings import build_search, settings_of
from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import InputError, SearchRunningError, SettingsError

if TYPE_CHECKING:
    from deephyper_balsam.driver.balsam_session import BalsamEvaluator
    from deephyper_balsam.driver.search import Search
    from deephyper_balsam.store.gateway import Gateway, Row
    from deephyper_balsam.store.record import SearchRecord
    from deephyper_balsam.store.search_state import SearchState

Settings = dict[str, Any]

_COUNT = click.IntRange(min=1)
_SILENT_S = 150.0  # some agents refresh their site once a minute
_ALLOCATION = ("nodes", "wall_time_min", "queue", "project", "job_mode", "chain")
# Options of `search run` that have no meaning here, or another one
NOT_OURS = (*_ALLOCATION, "max_allocations", "takeover", "dry_run")
_OPTIONS = (
    click.Option(["-n", "--nodes"], type=_COUNT, help="Nodes of the allocation."),
    click.Option(["-t", "--wall-time-min"], type=_COUNT, help="Its minutes."),
    click.Option(["-q", "--queue"], help="Its queue. [default: the site's, if it has only one]"),
    click.Option(["-A", "--project"], help="Who pays for it. [default: the site's, if it has only one]"),
    click.Option(
        ["-j", "--job-mode"], type=click.Choice(["mpi", "serial"]), help="Balsam's launcher mode. [default: mpi]"
    ),
    click.Option(
        ["--chain"],
        type=_COUNT,
        help="So many allocations at most, one after the other, each asked for by the one before while budget is left. "
        "[default: 1]",
    ),
    click.Option(
        ["--standalone"],
        is_flag=True,
        help="No Balsam runs outside: server, site and agent live in the allocation, too. It is submitted by the "
        "scheduler's own command.",
    ),
    click.Option(
        ["--config"], help="With --standalone: the machine, a name from `site configs` or a folder. [default: --site]"
    ),
    click.Option(
        ["--dir", "folder"],
        type=click.Path(path_type=Path),
        help="With --standalone: Balsam's folder, which all nodes see. [default: ./NAME.balsam]",
    ),
    click.Option(
        ["--spare-first-node"],
        is_flag=True,
        help="With --standalone: run no evaluation on the first node, where server and driver run.",
    ),
    click.Option(["--dry-run"], is_flag=True, help="Check everything, print the script, submit nothing."),
)


def submit_command(run: click.Command) -> click.Command:
    """Return the command `submit`, which takes the options of `run`."""

    def submit(
        name: str,
        file: Path | None,
        dry_run: bool,
        standalone: bool,
        config: str | None,
        folder: Path | None,
        spare_first_node: bool,
        **given: Any,
    ) -> None:
        """Search inside a batch allocation: Balsam's launcher and the search driver together, submitted through Balsam.

        Nothing needs to run on the login node but the site's agent; with --standalone not even that. Everything is
        checked first, step by step; the first step that fails says why, and nothing is changed. When the allocation
        ends before the budget is used, the same line goes on; with --chain N the allocation itself asks for the next
        one, N in all at most, and none that follows two without a result. `search stop` ends the search and what waits
        in the queue.

        \b
        Example:
          deephyper-balsam search submit digits-1 --problem digits --site theta --max-evals 99 -n 8 -t 60 -q debug -A P
          deephyper-balsam search submit digits-1 --problem digits --max-evals 99 -n 8 -t 60 -q debug -A P \\
            --standalone --config perlmutter-gpu --chain 3
        """
        if standalone:
            from deephyper_balsam.cli import submit_standalone

            machine = submit_standalone.config_of(config, file, given)
            settings = settings_of(file, {**given, "site": machine})
            words = ["--spare-first-node"] * spare_first_node
            submit_standalone.submit(name, settings, machine, folder, words, dry_run=dry_run)
            return
        if config is not None or folder is not None or spare_first_node:
            raise SettingsError(
                "--config, --dir and --spare-first-node are for --standalone. Without it, --site says where."
            )
        plan = _check(name, settings_of(file, given), show_on_stderr=dry_run)
        if dry_run:
            _show_script(plan)
        else:
            _say_where(plan, _submit(plan))

    theirs = [option for option in run.params if option.name not in NOT_OURS]
    return click.Command("submit", callback=submit, params=[*theirs, *_OPTIONS], help=submit.__doc__)


@dataclass(frozen=True)
class _Plan:
    """What is to be submitted: the search, its settings in the user's words, its site, and the BatchJob."""

    search: Search[BalsamEvaluator]
    settings: Settings
    site: Row
    batch_job: dict[str, Any]

    @property
    def gateway(self) -> Gateway:
        return self.search.evaluator.gateway

    @property
    def node_hours(self) -> str:
        """What all its allocations cost at most."""
        hours = self.batch_job["num_nodes"] * self.batch_job["wall_time_min"] / 60 * self.settings["chain"]
        return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"


# --- the steps ----------------------------------------------------------------------------------------------------


def _check(name: str, settings: Settings, *, show_on_stderr: bool) -> _Plan:
    """Go through the steps and show each as it passes; the first that fails raises."""
    from deephyper_balsam.store.allocation_chain import batch_job

    def passed(step: str, found: str) -> None:
        click.echo(f"ok  {step:9} {found}", err=show_on_stderr)

    if "," in settings["site"]:
        raise SettingsError(f"`search submit` runs at one site, its allocation's, but got --site {settings['site']}.")
    passed("problem", check_problem(settings["problem"]))
    passed("run", check_run(settings.get("run") or run_target(settings["problem"])))
    settings = {**settings, "log_dir": str(Path(settings.get("log_dir", ".")).absolute())}
    search = build_search(name, {key: value for key, value in settings.items() if key not in NOT_OURS})
    evaluator = search.evaluator
    passed("name", _name(search, settings))
    site = evaluator.gateway.site(settings["site"])
    passed("site", _agent(evaluator.gateway, site))
    shape = check_shape(site, settings)
    at_once = evaluator.lay_out(shape["nodes"], shape["wall_time_min"])
    passed("nodes", f"{shape['nodes']} for {shape['wall_time_min']} min: {counted(at_once, 'evaluation')} at a time")
    chain = settings.get("chain", 1)
    passed("queue", _queue(site, shape, chain))
    passed("project", shape["project"])
    passed("template", _template(site))
    plan = {**settings, **shape, "chain": chain}
    return _Plan(search, plan, site, batch_job(site["id"], name, **shape, chain=chain - 1))


def check_problem(target: str) -> str:
    from deephyper_balsam.store.applications import resolve_problem

    problem = resolve_problem(target)
    problem.check()
    return f"{problem.name}: {counted(len(problem.hyperparameter_names), 'hyperparameter')}, and legal configurations"


def check_run(target: str) -> str:
    from deephyper_balsam.node.targets import split_target
    from deephyper_balsam.store.applications import resolve_run

    spec = resolve_run(target)
    if "payload" in spec or split_target(spec["target"])[0].rpartition(".")[2] == "__main__":
        raise SettingsError(
            f"--run {target} stands in __main__, which on a node is another program: put it into a file of its own and "
            "give file.py:run."
        )
    return str(spec["target"])


def _name(search: Search[BalsamEvaluator], settings: Settings) -> str:
    """Refuse a name that belongs to another search, or to one that is driven, waits in a queue, or is complete."""
    from deephyper_balsam.store.record import check_same, find_records

    gateway, name = search.evaluator.gateway, search.name
    records = find_records(gateway, name)
    if not records:
        return f"{name} is free"
    own = {**search.settings, **search.evaluator.settings}
    check_same(records[0], {key: value for key, value in own.items() if (key, value) != ("seed", None)})
    state = _state(gateway, records[0], settings)
    if state.driver is not None:
        raise SearchRunningError(
            f"The search {name!r} is being driven by {state.driver.where}. Stop it first: deephyper-balsam search stop "
            f"{name}"
        )
    for row in state.carriers:
        raise SearchRunningError(
            f"BatchJob {row['id']} with the driver of {name!r} is {row['state']} already. To have another: "
            f"deephyper-balsam search stop {name}, then submit again."
        )
    return f"{name} goes on: {_left(state)}"


def _state(gateway: Gateway, record: SearchRecord, settings: Settings) -> SearchState:
    """Return how the search will stand with the budget that is given now."""
    from collections import Counter

    from deephyper_balsam.store import trial_rows
    from deephyper_balsam.store.driver_requests import effective_budget
    from deephyper_balsam.store.search_state import Budget, read_state
    from deephyper_balsam.store.snapshots import read_rows

    state = read_state(gateway, record, Counter(map(trial_rows.read_state, read_rows(gateway, record.name))))
    return replace(state, budget=Budget(*effective_budget(settings, [], state.requests)))


def _left(state: SearchState) -> str:
    """Return what is left to do of a search that goes on.

    Raises
    ------
    InputError
        Nothing is.
    """
    from deephyper_balsam.store.search_state import EndReason

    used = f"{state.evaluated} evaluated"
    if state.budget.max_evals is not None:
        used = f"{state.evaluated} of {state.budget.max_evals} evaluated"
    if state.end is EndReason.EVALUATIONS:
        raise InputError(f"The search {state.name!r} is complete: {used}. Give a larger --max-evals.")
    if state.end is EndReason.TIME:
        raise InputError(
            f"The search {state.name!r} is complete: it was driven for {state.driven_s:.0f} s, and its --timeout is "
            f"{state.budget.timeout_s:g} s. Give a larger --timeout."
        )
    if state.end is EndReason.SPACE:
        raise InputError(f"The search {state.name!r} is complete: {EndReason.SPACE.value}.")
    return used


def _agent(gateway: Gateway, site: Row) -> str:
    from deephyper_balsam.store.encoding import parse_time

    silent_s = gateway.now() - parse_time(site["last_refresh"])
    if silent_s > _SILENT_S:
        raise InputError(
            f"The agent of site {site['name']!r} was last heard of {silent_s / 60:.0f} min ago, so nothing would be "
            f"submitted. Start it: `balsam site start` in {site['path']}, where BALSAM_SITE_PATH names no other site."
        )
    return f"{site['name']} in {site['path']}, its agent was heard of {max(0.0, silent_s):.0f} s ago"


def check_shape(site: Row, settings: Settings) -> dict[str, Any]:
    """Return the allocation, as it was asked for and as far as the site leaves only one choice.

    Parameters
    ----------
    site
        `name`, `allowed_queues` and `allowed_projects`.
    settings
        As they were given.

    Raises
    ------
    InputError
        When something is missing, or the site does not allow it.
    """
    for option, name, what in (("-n", "nodes", "nodes"), ("-t", "wall_time_min", "minutes")):
        if name not in settings:
            raise SettingsError(f"`search submit` needs {option}, the allocation's {what}.")
    if settings.get("job_mode") == "serial" and settings.get("ranks_per_node", 1) > 1:
        raise SettingsError(
            f"An evaluation takes {settings['ranks_per_node']} ranks on a node, and job mode serial gives it 1: "
            "nothing would ever start. Ask for -j mpi, or for --ranks-per-node 1."
        )
    return {
        "nodes": settings["nodes"],
        "wall_time_min": settings["wall_time_min"],
        "queue": _choose("queue", "-q", settings, list(site["allowed_queues"]), site["name"]),
        "project": _choose("project", "-A", settings, site["allowed_projects"], site["name"]),
        "job_mode": settings.get("job_mode", "mpi"),
    }


def _choose(what: str, option: str, settings: Settings, allowed: list[str], site: str) -> str:
    chosen: str | None = settings.get(what) or (allowed[0] if len(allowed) == 1 else None)
    if chosen is None or chosen not in allowed:
        got = f"but got {chosen!r}" if chosen else f"and {option} says which"
        raise SettingsError(f"The {what}s that the site {site!r} allows are {', '.join(allowed) or 'none'}, {got}.")
    return chosen


def _queue(site: Row, shape: Mapping[str, Any], chain: int) -> str:
    queue = shape["queue"]
    from deephyper_balsam.sites import queue_limits

    queue_limits.check(site, queue, shape["nodes"], shape["wall_time_min"])
    limits = site["allowed_queues"][queue]
    if chain > 1 and limits["max_queued_jobs"] < 2:
        raise SettingsError(
            f"The site allows one job of yours at a time in the queue {queue}, but of a --chain the next one waits "
            "there while one runs. Leave --chain out, or choose another queue."
        )
    waiting = sum(job["queue"] == queue for job in (site.get("queued_jobs") or {}).values())
    if waiting >= limits["max_queued_jobs"]:
        raise InputError(
            f"The site allows {counted(limits['max_queued_jobs'], 'job')} of yours in the queue {queue}, and "
            f"has {waiting}: wait until one has ended (`balsam queue ls`)."
        )
    known = queue_limits.of_site(site, queue)
    return f"{queue}: {known.in_words if known else 'unknown limits'}"


def _template(site: Row) -> str:
    from deephyper_balsam.store.allocation_chain import CHAIN, SEARCH

    lacking = [name for name in (SEARCH, CHAIN) if name not in (site.get("optional_batch_job_params") or {})]
    if lacking:
        raise InputError(
            f"The site {site['name']!r} was made before `search submit`: its job template does not start a driver. "
            f'Add {", ".join(lacking)} (each with the value "") to optional_batch_job_params in '
            f"{site['path']}/settings.yml, take the last lines of job-template.sh from a new site (`deephyper-balsam "
            "site init`), and start its agent again."
        )
    return "starts the driver beside the launcher"


# --- what follows the steps ---------------------------------------------------------------------------------------


def _show_script(plan: _Plan) -> None:
    from deephyper_balsam.sites.configs import render_script

    script = render_script(Path(plan.site["path"]), plan.batch_job)
    if script is None:
        click.echo(f"The site's folder {plan.site['path']} cannot be read from here: no script to show.", err=True)
    else:
        click.echo(script)
    click.echo("Nothing was submitted.", err=True)


def _submit(plan: _Plan) -> int:
    """Write the search's record, which is all that the driver inside needs, then ask for the allocation."""
    search, evaluator = plan.search, plan.search.evaluator
    evaluator.open(
        search.name,
        search.settings,
        max_evals=plan.settings.get("max_evals"),
        timeout_s=plan.settings.get("timeout"),
        # A search.yaml that `search run` understands, too
        asked_for=absolute(
            {
                key: str(value) if isinstance(value, Path) else value
                for key, value in plan.settings.items()
                if key != "chain"
            }
        ),
    )
    why = "it could not be submitted"
    try:
        batch_job_id = int(plan.gateway.create_batch_job(plan.batch_job)["id"])
        why = f"submitted as BatchJob {batch_job_id}"
    finally:
        evaluator.abandon(why)
    return batch_job_id


def _say_where(plan: _Plan, batch_job_id: int) -> None:
    name, site, nodes = plan.search.name, plan.site, plan.batch_job["num_nodes"]
    follow = plan.settings["chain"] - 1
    folder = Path(plan.settings["log_dir"]) / name
    asked = f"{nodes} node{'s' * (nodes > 1)} for {plan.batch_job['wall_time_min']} min at {site['name']}"
    most = f"{plan.node_hours} node-hours at most"
    most += f" with the {follow} that may follow." if follow else ". The same line goes on where it ends; see --chain."
    click.echo(f"\nSubmitted BatchJob {batch_job_id}: {asked}; {most}")
    commands = [("balsam queue ls", f"BatchJob {batch_job_id}, until it runs")]
    for word, what in (("status", "how it stands"), ("watch", "the same, live"), ("stop", "end it, and what follows")):
        if word in _siblings():
            commands.append((f"deephyper-balsam search {word} {name}", what))
    width = max(len(command) for command, _ in commands)
    for command, what in commands:
        click.echo(f"  {command.ljust(width)}  {what}")
    click.echo(f"Results: {folder}/results.csv\nLog:     {folder}/search.log")
    click.echo(f"Output:  {site['path']}/qsubmit/qlaunch{batch_job_id:05d}.output")


def _siblings() -> set[str]:
    parent = click.get_current_context().parent
    return set(parent.command.commands) if parent and isinstance(parent.command, click.Group) else set()
