"""`deephyper-balsam search submit`: driver and launcher inside one allocation, or several one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.cli.common import run_target
from deephyper_balsam.errors import InputError, SearchRunningError, SettingsError

if TYPE_CHECKING:
    from deephyper_balsam.gateway import Gateway, Row

Settings = dict[str, Any]

_COUNT = click.IntRange(min=1)
_SILENT_S = 150.0  # some agents refresh their site once a minute
_ALLOCATION = ("nodes", "wall_time_min", "queue", "project", "job_mode", "chain")
# Options of `search run` that have no meaning here, or another one
_NOT_OURS = (*_ALLOCATION, "max_allocations", "takeover", "dry_run")
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
    click.Option(["--dry-run"], is_flag=True, help="Check everything, print the script, submit nothing."),
)


def submit_command(
    run: click.Command, read: Callable[[Path | None, Settings], Settings], build: Callable[[str, Settings], Any]
) -> click.Command:
    """Return the command `submit`, which takes the options of `run`, read and built as there."""

    def submit(name: str, file: Path | None, dry_run: bool, **given: Any) -> None:
        """Search inside a batch allocation: Balsam's launcher and the search driver together, submitted through Balsam.

        Nothing needs to run on the login node but the site's agent. Everything is checked first, step by step; the
        first step that fails says why, and nothing is changed. When the allocation ends before the budget is used, the
        same line goes on; with --chain N the allocation itself asks for the next one, N in all at most, and none that
        follows two without a result. `search stop` ends the search and what waits in the queue.

        \b
        Example:
          deephyper-balsam search submit digits-1 --problem digits --site theta --max-evals 99 -n 8 -t 60 -q debug -A P
        """
        settings = read(file, given)
        plan = _check(name, settings, build, show_on_stderr=dry_run)
        if dry_run:
            _show_script(plan)
        else:
            _say_where(plan, _submit(plan))

    theirs = [option for option in run.params if option.name not in _NOT_OURS]
    return click.Command("submit", callback=submit, params=[*theirs, *_OPTIONS], help=submit.__doc__)


@dataclass(frozen=True)
class _Plan:
    """What is to be submitted: the search, its settings in the user's words, its site, and the BatchJob."""

    search: Any
    settings: Settings
    site: Row
    batch_job: dict[str, Any]

    @property
    def gateway(self) -> Gateway:
        gateway: Gateway = self.search.evaluator.gateway
        return gateway

    @property
    def node_hours(self) -> str:
        """What all its allocations cost at most."""
        hours = self.batch_job["num_nodes"] * self.batch_job["wall_time_min"] / 60 * self.settings["chain"]
        return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"


# --- the steps ----------------------------------------------------------------------------------------------------


def _check(name: str, settings: Settings, build: Callable[[str, Settings], Any], *, show_on_stderr: bool) -> _Plan:
    """Go through the steps and show each as it passes; the first that fails raises."""
    from deephyper_balsam.sites.chain import batch_job

    def passed(step: str, found: str) -> None:
        click.echo(f"ok  {step:9} {found}", err=show_on_stderr)

    if "," in settings["site"]:
        raise SettingsError(f"`search submit` runs at one site, its allocation's, but got --site {settings['site']}.")
    passed("problem", _problem(settings["problem"]))
    passed("run", _run(settings.get("run") or run_target(settings["problem"])))
    settings = {**settings, "log_dir": str(Path(settings.get("log_dir", ".")).absolute())}
    search = build(name, {key: value for key, value in settings.items() if key not in _NOT_OURS})
    evaluator = search.evaluator
    passed("name", _name(search, settings))
    site = evaluator.gateway.site(settings["site"])
    passed("site", _agent(evaluator.gateway, site))
    shape = _shape(site, settings)
    at_once = evaluator.lay_out(shape["nodes"], shape["wall_time_min"])
    passed("nodes", f"{shape['nodes']} for {shape['wall_time_min']} min: {at_once} evaluations at a time")
    chain = settings.get("chain", 1)
    passed("queue", _queue(site, shape, chain))
    passed("project", shape["project"])
    passed("template", _template(site))
    plan = {**settings, **shape, "chain": chain}
    return _Plan(search, plan, site, batch_job(site["id"], name, **shape, chain=chain - 1))


def _problem(target: str) -> str:
    from deephyper_balsam.apps import resolve_problem

    problem = resolve_problem(target)
    problem.check()
    return f"{problem.name}: {len(problem.hyperparameter_names)} hyperparameters, and legal configurations"


def _run(target: str) -> str:
    from deephyper_balsam.apps import resolve_run

    spec = resolve_run(target)
    if "payload" in spec or spec["target"].partition(":")[0].rpartition(".")[2] == "__main__":
        raise SettingsError(
            f"--run {target} stands in __main__, which on a node is another program: put it into a file of its own and "
            "give file.py:run."
        )
    return str(spec["target"])


def _name(search: Any, settings: Settings) -> str:
    """Refuse a name that belongs to another search, or to one that is driven, waits in a queue, or is complete."""
    from deephyper_balsam.drivers import at_the_wheel, read_lives
    from deephyper_balsam.record import check_same, find_records
    from deephyper_balsam.sites import chain

    gateway, name = search.evaluator.gateway, search.name
    records = find_records(gateway, name)
    if not records:
        return f"{name} is free"
    own = {**search.settings, **search.evaluator.settings}
    check_same(records[0], {key: value for key, value in own.items() if (key, value) != ("seed", None)})
    driver = at_the_wheel(read_lives(gateway, name).get(name, []), gateway.now())
    if driver is not None:
        raise SearchRunningError(
            f"The search {name!r} is being driven by {driver.where}. Stop it first: deephyper-balsam search stop {name}"
        )
    for row in chain.find(gateway, [site["id"] for site in gateway.sites()], name, chain.ALIVE):
        raise SearchRunningError(
            f"BatchJob {row['id']} with the driver of {name!r} is {row['state']} already. To have another: "
            f"deephyper-balsam search stop {name}, then submit again."
        )
    return f"{name} goes on: {_used(gateway, records[0], settings)}"


def _used(gateway: Gateway, record: Any, settings: Settings) -> str:
    from deephyper_balsam.archive import read_rows
    from deephyper_balsam.jobs import read_state
    from deephyper_balsam.orders import effective_budget, read_orders
    from deephyper_balsam.trial import TrialState

    states = [read_state(row) for row in read_rows(gateway, record.name)]
    evaluated = sum(state in (TrialState.DONE, TrialState.FAILED) for state in states)
    max_evals, _ = effective_budget(settings, [], read_orders(gateway, record.name))
    if max_evals is not None and evaluated >= max_evals:
        raise InputError(
            f"The search {record.name!r} is complete: {evaluated} of {max_evals} evaluated. Give a larger --max-evals."
        )
    return f"{evaluated} evaluated" + ("" if max_evals is None else f" of {max_evals}")


def _agent(gateway: Gateway, site: Row) -> str:
    from deephyper_balsam.gateway import parse_time

    silent_s = gateway.now() - parse_time(site["last_refresh"])
    if silent_s > _SILENT_S:
        raise InputError(
            f"The agent of site {site['name']!r} was last heard of {silent_s / 60:.0f} min ago, so nothing would be "
            f"submitted. Start it: `balsam site start` in {site['path']}."
        )
    return f"{site['name']} in {site['path']}, its agent was heard of {max(0.0, silent_s):.0f} s ago"


def _shape(site: Row, settings: Settings) -> dict[str, Any]:
    """Return the allocation, as it was asked for and as far as the site leaves only one choice."""
    for option, name, what in (("-n", "nodes", "nodes"), ("-t", "wall_time_min", "minutes")):
        if name not in settings:
            raise SettingsError(f"`search submit` needs {option}, the allocation's {what}.")
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
    limits = site["allowed_queues"][queue]
    for option, asked, most in (
        ("-n", shape["nodes"], limits["max_nodes"]),
        ("-t", shape["wall_time_min"], limits["max_walltime"]),
    ):
        if asked > most:
            raise SettingsError(f"The site allows at most {option} {most} in the queue {queue}, but got {asked}.")
    if chain > 1 and limits["max_queued_jobs"] < 2:
        raise SettingsError(
            f"The site allows one job of yours at a time in the queue {queue}, but of a --chain the next one waits "
            "there while one runs. Leave --chain out, or choose another queue."
        )
    waiting = sum(job["queue"] == queue for job in (site.get("queued_jobs") or {}).values())
    if waiting >= limits["max_queued_jobs"]:
        raise InputError(
            f"The site allows {limits['max_queued_jobs']} jobs of yours in the queue {queue}, and {waiting} are there: "
            "wait until one has ended (`balsam queue ls`)."
        )
    return f"{queue}: at most {limits['max_nodes']} nodes and {limits['max_walltime']} min there"


def _template(site: Row) -> str:
    from deephyper_balsam.sites.chain import CHAIN, SEARCH

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
        asked_for={
            key: str(value) if isinstance(value, Path) else value
            for key, value in plan.settings.items()
            if key != "chain"
        },
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
