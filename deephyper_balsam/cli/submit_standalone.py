"""`search submit --standalone`: batch jobs that bring a whole Balsam with them, by the scheduler's own command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from deephyper_balsam.cli.common import run_target
from deephyper_balsam.cli.methods import of_method
from deephyper_balsam.cli.paths import absolute
from deephyper_balsam.cli.search_settings import check_resources, plain_settings
from deephyper_balsam.cli.standalone import default_folder
from deephyper_balsam.cli.submit import NOT_OURS, check_problem, check_run, check_shape
from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import BalsamError, InputError, SearchRunningError, SettingsError

_INSIDE = "-m deephyper_balsam.launcher.inside"  # what a site's job template calls for a driver in the allocation
_SCRIPTS = "scripts"


def config_of(config: str | None, file: Path | None, given: Mapping[str, Any]) -> str:
    """Return the machine's config: what was given for it, or as the site, here or in the file.

    Raises
    ------
    SettingsError
        When nothing was.
    """
    found = config or given.get("site")
    if found is None and file is not None and file.is_file():
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        found = content.get("site") if isinstance(content, dict) else None
    if found is None:
        raise SettingsError("`search submit --standalone` needs --config, the machine: see `site configs`.")
    return str(found)


def submit(
    name: str, settings: dict[str, Any], config: str, folder: Path | None, words: Sequence[str], *, dry_run: bool
) -> None:
    """Check everything, then submit one batch job, or several that start one after the other.

    Parameters
    ----------
    name
        The search.
    settings
        As for `search run`, with the shape of the allocation.
    config
        The machine.
    folder
        Balsam's folder; None: the usual one.
    words
        Further options for `standalone`.
    dry_run
        Show the script of the first and submit nothing.

    Raises
    ------
    InputError
        When something is wrong, or batch jobs for it are queued or run already.
    BalsamError
        When the scheduler refuses.
    """
    from deephyper_balsam.sites import queue_limits
    from deephyper_balsam.sites.configs import check_config
    from deephyper_balsam.store.record import check_name

    def passed(step: str, found: str) -> None:
        click.echo(f"ok  {step:9} {found}", err=dry_run)

    check_name(name)
    passed("problem", check_problem(settings["problem"]))
    passed("run", check_run(settings.get("run") or run_target(settings["problem"])))
    of_method(settings)
    check_resources(settings)
    asked = {what: settings.get(what) for what in ("project", "queue")}
    checked = check_config(config, **asked)
    machine = checked.settings.scheduler
    if machine is None or not hasattr(machine.scheduler_class, "submit_command"):
        raise InputError(f"The config {config} has no batch system to submit to. On this machine: `search run`.")
    site = checked.queues_and_projects()
    shape = check_shape(site, settings)
    queue_limits.check(site, shape["queue"], shape["nodes"], shape["wall_time_min"])
    passed("config", f"{config}: {counted(shape['nodes'], 'node')} for {shape['wall_time_min']} min")
    passed("queue", f"{shape['queue']}, charged to {shape['project']}")
    chain = settings.get("chain", 1)
    place = (folder or default_folder(name)).absolute()
    scripts = [
        _script(checked.template, place, name, shape, chain - 1 - number, ["--config", config, *_words(asked), *words])
        for number in range(chain)
    ]
    if dry_run:
        click.echo(scripts[0])
        click.echo("Nothing was submitted.", err=True)
        return
    _refuse_second(place, machine.scheduler_class, name)
    numbers = _submit(place, name, settings, shape, scripts, machine.scheduler_class)
    _say_where(place, name, settings, shape, numbers)


def _words(options: Mapping[str, str | None]) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]


def _script(template: Path, place: Path, name: str, shape: Mapping[str, Any], following: int, words: list[str]) -> str:
    """Return the machine's own job script, with all its directives and lines, that calls `standalone` at its end."""
    from deephyper_balsam.sites.configs import render_template
    from deephyper_balsam.store.allocation_chain import batch_job

    script = render_template(template, place, batch_job(0, name, **shape, chain=following))
    if _INSIDE not in script:
        raise SettingsError(
            f"The job template {template} does not start a driver: take its last lines from one of `site configs`."
        )
    return script.replace(_INSIDE, f"-m deephyper_balsam standalone {shlex.join(['--dir', str(place), *words])}")


def _refuse_second(place: Path, scheduler: Any, name: str) -> None:
    from deephyper_balsam.server.standalone import queued

    for number in queued(place):
        if not any(scheduler.has_ended(number) for _ in range(2)):
            end = shlex.join(scheduler.delete_command(number))
            raise SearchRunningError(
                f"Batch job {number} for the search {name!r} in {place} is queued or runs. Wait for it, or end it: "
                f"{end}"
            )


def _submit(
    place: Path,
    name: str,
    settings: dict[str, Any],
    shape: Mapping[str, Any],
    scripts: list[str],
    scheduler: Any,
) -> list[int]:
    from deephyper_balsam.common.private import write_private
    from deephyper_balsam.server.stack import LocalStack
    from deephyper_balsam.server.standalone import SEARCH_FILE, note_queued
    from deephyper_balsam.sites.scheduling import SubmitError

    LocalStack(place).files.make()
    (place / _SCRIPTS).mkdir(mode=0o700, exist_ok=True)
    left_out = {*NOT_OURS, "site"}
    plain = plain_settings({**settings, "log_dir": str(Path(settings.get("log_dir", ".")).absolute())})
    options = absolute({key: value for key, value in plain.items() if key not in left_out})
    write_private(place / SEARCH_FILE, yaml.safe_dump(options, sort_keys=False))
    numbers: list[int] = []
    try:
        for index, text in enumerate(scripts, 1):
            script = place / _SCRIPTS / f"{name}-{index}.sh"
            write_private(script, text)
            script.chmod(0o700)
            after = numbers[-1] if numbers else None
            wanted = (shape["project"], shape["queue"], shape["nodes"], shape["wall_time_min"])
            numbers.append(scheduler.submit(script, *wanted, cwd=place, after=after))
    except SubmitError as error:
        raise BalsamError(
            f"{'Only batch jobs ' + str(numbers) + ' were submitted' if numbers else 'Refused'}: {error}"
        ) from error
    finally:
        note_queued(place, numbers)
    return numbers


def _say_where(
    place: Path, name: str, settings: Mapping[str, Any], shape: Mapping[str, Any], numbers: list[int]
) -> None:
    hours = shape["nodes"] * shape["wall_time_min"] / 60 * len(numbers)
    each = f"{counted(shape['nodes'], 'node')} for {shape['wall_time_min']} min"
    follow = ", one after the other" if len(numbers) > 1 else ". The same line goes on where it ends; see --chain"
    listed = ", ".join(map(str, numbers))
    click.echo(
        f"\nSubmitted batch job{'s' * (len(numbers) > 1)} {listed}: {each}{follow}; {hours:.2g} node-hours at most."
    )
    folder = Path(settings.get("log_dir", ".")).absolute() / name
    here = shlex.quote(str(place))
    click.echo(f"Results: {folder}/results.csv\nLog:     {folder}/search.log")
    click.echo(f"Output:  {place / _SCRIPTS}/{name}-1.output\nWhile it runs:")
    click.echo(f'  eval "$(deephyper-balsam server env --dir {here})"')
    click.echo(f"  deephyper-balsam search status {name}")
    click.echo(f"Between and after its batch jobs, first: deephyper-balsam server up --dir {here}")
