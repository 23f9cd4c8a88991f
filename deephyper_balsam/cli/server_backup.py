"""`deephyper-balsam server backup` and `restore`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from deephyper_balsam.cli.stacks import directory, existing_stack


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@directory
@click.option("--with-data", is_flag=True, help="Take the files that runs wrote into the site's folder, too.")
def backup(target: Path, directory: Path, with_data: bool) -> None:
    """Write all that is needed to go on elsewhere into TARGET: a new file, or a folder for one. The server goes on.

    The file holds the database, the secrets and the site: keep it where only you can read it.

    \b
    Example:
      deephyper-balsam server backup ~/backups --dir ./balsam
    """
    from deephyper_balsam.server.backup import back_up

    path = back_up(existing_stack(directory), target, with_data=with_data)
    click.echo(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB). It holds secrets: only you may read it.")


@click.command()
@click.argument("source", metavar="BACKUP", type=click.Path(path_type=Path))
@directory
def restore(source: Path, directory: Path) -> None:
    """Make a server in a new folder from a BACKUP; `server up` starts it.

    What ran when the backup was made counts as cut, and runs again in the next allocation.

    \b
    Example:
      deephyper-balsam server restore ~/backups/balsam-20260102-030405.tar --dir ./balsam2
    """
    from deephyper_balsam.server.backup import restore as make

    found = make(source, directory, say=lambda line: click.echo(line, err=True))
    click.echo(f"Made {directory.absolute()} from the backup of {found.folder} on {found.host}, {found.made_at}.")
    click.echo(f"Start it: deephyper-balsam server up --dir {shlex.quote(str(directory))}")
    click.echo(
        "Where other hosts reached the old one, say --listen again. Do not let both run for one site of a cluster."
    )
