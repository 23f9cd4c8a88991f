"""`deephyper-balsam server`: a whole Balsam in one folder, started and stopped."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deephyper_balsam.errors import InputError

if TYPE_CHECKING:
    from deephyper_balsam.sites.local import LocalStack, StackStatus

_DEFAULT_DIR = "balsam"
_directory = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default=_DEFAULT_DIR,
    show_default="./balsam",
    help="The folder that holds all of it.",
)


@click.group()
def server() -> None:
    """Run a Balsam server of your own on this machine: PostgreSQL, Balsam's API on 127.0.0.1, a site and its agent.

    It needs no root, no container and no installed database, and it lives in one folder.

    \b
    Example:
      deephyper-balsam server up --dir ./balsam
      eval "$(deephyper-balsam server env --dir ./balsam)"
      balsam site ls
      deephyper-balsam server down --dir ./balsam
    """


@server.command()
@_directory
@click.option("--site-name", default="local", show_default=True, help="The name of the Balsam site, when it is made.")
@click.option("--no-site", is_flag=True, help="Start the server alone, without a site.")
@click.option("--takeover", is_flag=True, help="Start although another machine, which is gone, is recorded to run it.")
def up(directory: Path, site_name: str, no_site: bool, takeover: bool) -> None:
    """Start it, or whatever of it does not run. The same command mends a stack after a crash or a reboot.

    \b
    Example:
      deephyper-balsam server up --dir ./balsam
    """
    stack = _stack(directory)
    _show(stack.up(site_name=site_name, site=not no_site, takeover=takeover))


@server.command()
@_directory
def down(directory: Path) -> None:
    """Stop all of it, evaluations that run included. The data stays, and `up` brings the same jobs back.

    \b
    Example:
      deephyper-balsam server down --dir ./balsam
    """
    stack = _existing(directory)
    stack.down()
    click.echo(f"Stopped. The data is in {stack.folder}.")


@server.command()
@_directory
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: url, env, running, processes, site, ...")
def status(directory: Path, as_json: bool) -> None:
    """Show what runs, and how to point Balsam's own commands at it.

    \b
    Example:
      deephyper-balsam server status --dir ./balsam --json
    """
    found = _existing(directory).status()
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found)


@server.command()
@_directory
def env(directory: Path) -> None:
    """Print the export lines that point Balsam's own commands at it.

    \b
    Example:
      eval "$(deephyper-balsam server env --dir ./balsam)"
    """
    for line in _exports(_existing(directory).env):
        click.echo(line)


@server.command()
@_directory
@click.option("-n", "--lines", type=click.IntRange(min=1), default=20, show_default=True, help="Lines of each log.")
@click.argument("name", required=False)
def logs(directory: Path, lines: int, name: str | None) -> None:
    """Show the end of the logs, or of the one called NAME (postgres, api, agent, ...).

    \b
    Example:
      deephyper-balsam server logs --dir ./balsam -n 50 agent
    """
    stack = _existing(directory)
    paths = {path.stem: path for path in sorted(stack.logs.glob("*.log"))}
    paths.update((path.stem, path) for path in sorted((stack.site_path / "log").glob("*.log")))
    if name is not None and name not in paths:
        raise InputError(f"There is no log {name!r} in {stack.logs}. Known: {', '.join(paths) or 'none yet'}.")
    for path in [paths[name]] if name is not None else paths.values():
        click.echo(f"== {path}")
        for line in path.read_text(errors="replace").splitlines()[-lines:]:
            click.echo(line)


def _stack(directory: Path) -> LocalStack:
    from deephyper_balsam.sites.local import LocalStack

    return LocalStack(directory)


def _existing(directory: Path) -> LocalStack:
    stack = _stack(directory)
    if not stack.exists:
        raise InputError(
            f"There is no Balsam server in {stack.folder}. Start one with "
            f"`deephyper-balsam server up --dir {shlex.quote(str(directory))}`, or name its folder with --dir."
        )
    return stack


def _exports(variables: dict[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _show(found: StackStatus) -> None:
    state = "runs" if found.running else "is stopped" if found.stopped else "runs in part: `server up` mends it"
    click.echo(f"The Balsam server in {found.folder} {state}.")
    if found.url:
        click.echo(f"  API       {found.url}")
    if found.site:
        click.echo(f"  site      {found.site.name} (id {found.site.id}) in {found.site.path}")
    for process in found.processes:
        click.echo(f"  {process.name:9} {f'pid {process.pid}' if process.running else 'stopped':12} log {process.log}")
    if found.launchers:
        click.echo(f"  launchers {found.launchers}")
    if found.running:
        click.echo("Point Balsam's own commands at it:")
        for line in _exports(dict(found.env)):
            click.echo(f"  {line}")
