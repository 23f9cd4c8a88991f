"""`deephyper-balsam server`: a whole Balsam in one folder, started and stopped."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.cli import Group
from deephyper_balsam.cli.server_backup import backup, restore
from deephyper_balsam.cli.stacks import directory, existing_stack, stack_in
from deephyper_balsam.cli.users import token, user
from deephyper_balsam.errors import InputError

if TYPE_CHECKING:
    from deephyper_balsam.server.stack import StackStatus


@click.group(cls=Group)
def server() -> None:
    """Run a Balsam server of your own on this machine: PostgreSQL, Balsam's API, a site and its agent.

    Other accounts of the machine cannot reach it.

    It needs no root, no container and no installed database, and it lives in one folder.

    \b
    Example:
      deephyper-balsam server up --dir ./balsam
      eval "$(deephyper-balsam server env --dir ./balsam)"
      balsam site ls
      deephyper-balsam server down --dir ./balsam
    """


server.add_command(user)
server.add_command(token)
server.add_command(backup)
server.add_command(restore)


@server.command()
@directory
@click.option("--site-name", help="The name of the Balsam site, when it is made. [default: that of its config]")
@click.option(
    "--config",
    help="What the site is made of: a name from `site configs`, or the path of a folder of your own. [default: local, "
    "which is this machine]",
)
@click.option("-A", "--project", help="What the site charges, where its config says YOUR_PROJECT.")
@click.option("-q", "--queue", help="Where it submits, where its config says YOUR_PARTITION or YOUR_QUEUE.")
@click.option("--no-site", is_flag=True, help="Start the server alone, without a site.")
@click.option("--takeover", is_flag=True, help="Do not wait for a sign of life of another host that ran it.")
@click.option(
    "--listen",
    metavar="auto|ADDRESS|INTERFACE|none",
    help="Let other hosts, such as compute nodes, reach it over TLS: auto takes the address that they would use. It "
    "stays so until none is given.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="The port for --listen [default: one that is free].")
@click.option(
    "--data",
    metavar="node-local[:FOLDER]|shared",
    help="Keep the database on a fast local disk of this host and ship its log to the server's folder, or keep it in "
    "that folder [default: as last time; at first shared].",
)
def up(directory: Path, no_site: bool, **options: Any) -> None:
    """Start it, or whatever of it does not run. The same command mends a stack after a crash or a reboot.

    \b
    Example:
      deephyper-balsam server up --dir ./balsam
      deephyper-balsam server up --dir ./balsam --listen auto --config slurm --project PROJECT --queue PARTITION
    """
    _show(stack_in(directory).up(site=not no_site, **options))


@server.command()
@directory
@click.option("--on-other-host", is_flag=True, help="Stop it also where another host runs it.")
def down(directory: Path, on_other_host: bool) -> None:
    """Stop all of it, evaluations that run included. The data stays, and `up` brings the same jobs back.

    \b
    Example:
      deephyper-balsam server down --dir ./balsam
    """
    stack = existing_stack(directory)
    stack.down(on_other_host=on_other_host)
    click.echo(f"Stopped. The data is in {stack.folder}.")


@server.command()
@directory
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: url, env, running, processes, site, ...")
def status(directory: Path, as_json: bool) -> None:
    """Show what runs, and how to point Balsam's own commands at it.

    \b
    Example:
      deephyper-balsam server status --dir ./balsam --json
    """
    found = existing_stack(directory).status()
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found)


@server.command()
@directory
def env(directory: Path) -> None:
    """Print the export lines that point Balsam's own commands at it, past any proxy.

    \b
    Example:
      eval "$(deephyper-balsam server env --dir ./balsam)"
    """
    for line in _exports(existing_stack(directory).env):
        click.echo(line)


@server.command()
@directory
@click.option("-n", "--lines", type=click.IntRange(min=1), default=20, show_default=True, help="Lines of each log.")
@click.argument("name", required=False)
def logs(directory: Path, lines: int, name: str | None) -> None:
    """Show the end of the logs, or of the one called NAME (postgres, api, agent, ...).

    \b
    Example:
      deephyper-balsam server logs --dir ./balsam -n 50 agent
    """
    stack = existing_stack(directory)
    paths = {path.stem: path for path in sorted(stack.logs.glob("*.log"))}
    paths.update((path.stem, path) for path in sorted((stack.site_path / "log").glob("*.log")))
    if name is not None and name not in paths:
        raise InputError(f"There is no log {name!r} in {stack.logs}. Known: {', '.join(paths) or 'none yet'}.")
    for path in [paths[name]] if name is not None else paths.values():
        click.echo(f"== {path}")
        for line in path.read_text(errors="replace").splitlines()[-lines:]:
            click.echo(line)


def _exports(variables: dict[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _show(found: StackStatus) -> None:
    if found.elsewhere is not None:
        click.echo(f"The Balsam server in {found.folder} was started on {found.elsewhere}: ask there what runs.")
        return
    state = "runs" if found.running else "is stopped" if found.stopped else "runs in part: `server up` mends it"
    click.echo(f"The Balsam server in {found.folder} {state}.")
    if found.url:
        click.echo(f"  API       {found.url}")
    if found.reason:
        click.echo(f"            {found.reason}; other hosts reach it over TLS with the files beside client.yml")
    if found.site:
        click.echo(f"  site      {found.site.name} (id {found.site.id}) in {found.site.path}")
    for process in found.processes:
        word = "stopped" if process.pid is None else f"pid {process.pid}"
        click.echo(f"  {process.name:9} {word:12} log {process.log}")
        if process.fault is not None:
            click.echo(f"  {'':9} it runs, but {process.fault}: `deephyper-balsam server up` starts it again")
    if found.launchers:
        click.echo(f"  launchers {found.launchers}")
    if found.running:
        click.echo("Point Balsam's own commands at it:")
        for line in _exports(dict(found.env)):
            click.echo(f"  {line}")
