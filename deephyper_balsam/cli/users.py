"""`deephyper-balsam server user` and `server token`: who may use a server of one's own."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deephyper_balsam.cli import Group
from deephyper_balsam.cli.common import echo_table, json_option
from deephyper_balsam.cli.stacks import directory, existing_stack
from deephyper_balsam.errors import InputError

if TYPE_CHECKING:
    from deephyper_balsam.server.handover import Handover

_output = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    show_default="NAME.tar",
    help="Where to put what the user needs: an archive (.tar), a credentials file (.yml) with two files beside it, or "
    "a folder for the three.",
)


@click.group(cls=Group)
def user() -> None:
    """Give colleagues accounts of their own on this server. Each sees and changes her own sites and jobs alone.

    \b
    Example:
      deephyper-balsam server up --listen auto
      deephyper-balsam server user add ann -o ann.tar
      deephyper-balsam server user ls
    """


@user.command()
@click.argument("name")
@_output
@directory
def add(name: str, output: Path | None, directory: Path) -> None:
    """Make an account NAME, and write what its user needs to log in: give it to her as you would a password.

    The server must listen for others (`server up --listen auto`) and run.

    \b
    Example:
      deephyper-balsam server user add ann -o ann.tar
    """
    from deephyper_balsam.server.handover import Handover
    from deephyper_balsam.server.users import Users

    to = Handover(output or Path(f"{Path(name).name}.tar"))
    Users(existing_stack(directory)).add(name, to)
    click.echo(f"{name} may use the server now.")
    _say_what_to_do(to)


@user.command()
@directory
@json_option
def ls(directory: Path, as_json: bool) -> None:
    """List the users of this server with their sites and jobs.

    \b
    Example:
      deephyper-balsam server user ls --json
    """
    from deephyper_balsam.server.users import Users

    rows = [asdict(one) for one in Users(existing_stack(directory)).all()]
    if not as_json:
        for row in rows:
            row["state"] = "this server's own" if row["owner"] else "enabled" if row["enabled"] else "revoked"
    echo_table(rows, ["name", "state", "sites", "jobs", "sessions"], as_json, "There are no users.")


@user.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@directory
def remove(name: str, yes: bool, directory: Path) -> None:
    """Remove the user NAME from this server, with her sites, applications, jobs and batch jobs there.

    Her tokens are refused at once. What she has on disk stays, and so do her allocations: her agent and launchers get
    no more work and end, so let her stop them first. There is no way back; `server token revoke` locks her out and
    keeps everything.

    \b
    Example:
      deephyper-balsam server user remove ann
    """
    from deephyper_balsam.server.users import Users

    users = Users(existing_stack(directory))
    found = users.get(name)
    if not yes and not found.owner:
        click.echo(
            f"{name}: {found.sites} sites with {found.jobs} jobs, {found.sessions} agents and launchers at work. "
            "Removed, they cannot be had back.",
            err=True,
        )
        try:
            agreed = click.confirm("Remove them?", err=True)
        except click.Abort:
            agreed = False
        if not agreed:
            raise InputError(f"The user {name!r} was not removed. Answer y, or give --yes.")
    users.remove(name)
    click.echo(f"Removed {name} with {found.sites} sites and {found.jobs} jobs.")


@click.group(cls=Group)
def token() -> None:
    """Take back what lets a user in, or give it anew.

    \b
    Example:
      deephyper-balsam server token revoke ann
      deephyper-balsam server token renew ann -o ann.tar
    """


@token.command()
@click.argument("name", required=False)
@directory
def revoke(name: str | None, directory: Path) -> None:
    """Refuse every token and the password that NAME was given until now, at once. What is hers stays.

    She is locked out until `server token renew NAME`. Without NAME it is this server's own user, which gets another
    password and token at the same moment: your drivers, agents and launchers go on with those.

    \b
    Example:
      deephyper-balsam server token revoke ann
    """
    from deephyper_balsam.server.users import Users

    users = Users(existing_stack(directory))
    if name is None or name == users.own:
        _renew_own(directory)
        return
    users.revoke(name)
    click.echo(
        f"Every token and the password of {name} are refused now. `deephyper-balsam server token renew {name}` lets "
        "that user in again."
    )


@token.command()
@click.argument("name", required=False)
@_output
@directory
def renew(name: str | None, output: Path | None, directory: Path) -> None:
    """Give NAME another password, and write what she needs to log in. All that she was given before is refused.

    Without NAME it is this server's own user: your drivers, agents and launchers go on with the new one.

    \b
    Example:
      deephyper-balsam server token renew ann -o ann.tar
    """
    from deephyper_balsam.server.handover import Handover
    from deephyper_balsam.server.users import Users

    users = Users(existing_stack(directory))
    if name is None or name == users.own:
        if output is not None:
            raise InputError("-o is for another user's files: those of this server's own user are in its folder.")
        _renew_own(directory)
        return
    to = Handover(output or Path(f"{Path(name).name}.tar"), replace=True)
    users.renew(name, to)
    click.echo(f"{name} has another password, and all that was given before is refused.")
    _say_what_to_do(to)


def _renew_own(folder: Path) -> None:
    from deephyper_balsam.server.users import Users

    stack = existing_stack(folder)
    Users(stack).renew_own()
    click.echo(
        f"This server's own user has another password and token, in {stack.folder}. Those of before are refused."
    )


def _say_what_to_do(to: Handover) -> None:
    path = shlex.quote(str(to.path))
    click.echo(f"Written, readable for you alone: {path}. Whoever has it can log in: send it as you would a password.")
    click.echo("Whose account it is does, on any machine that reaches the server:")
    if to.credentials is None:
        name = shlex.quote(to.path.name)
        click.echo(f"  mkdir -m 700 ~/group-balsam && tar -xf {name} -C ~/group-balsam && rm {name}")
    else:
        click.echo("  copy the three files into ~/group-balsam (mode 700), owned by that account, each of mode 600")
    click.echo("  export BALSAM_CLIENT_PATH=~/group-balsam/client.yml")
