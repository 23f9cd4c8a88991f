"""`deephyper-balsam site`: the machines that are described, a new Balsam site from one, a look at a site's health."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote

import click

from deephyper_balsam.cli import Group
from deephyper_balsam.errors import BalsamError


@click.group(cls=Group)
def site() -> None:
    """Set up Balsam sites: the place on a machine where jobs run.

    \b
    Example:
      deephyper-balsam site init ./my-site --config local --name my-site
    """


@site.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: name, path, summary.")
def configs(as_json: bool) -> None:
    """List the machines that this installation describes.

    \b
    Example:
      deephyper-balsam site configs
    """
    from deephyper_balsam.sites.configs import site_configs

    found = site_configs()
    if as_json:
        click.echo(json.dumps([config.to_dict() for config in found], indent=2))
        return
    for config in found:
        click.echo(f"{config.name:20} {config.summary}")


@site.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--config", required=True, help="A name from `site configs`, or the path of a folder of your own.")
@click.option("--name", required=True, help="The site's name in Balsam.")
@click.option("--project", help="What to charge, where the config says YOUR_PROJECT.")
@click.option("--queue", help="Where to submit, where the config says YOUR_PARTITION or YOUR_QUEUE.")
def init(path: Path, config: str, name: str, project: str | None, queue: str | None) -> None:
    """Make a new Balsam site in the folder PATH, without questions, and report it to the Balsam you are logged in to.

    \b
    Example:
      deephyper-balsam site init ./my-site --config local --name my-site
    """
    from deephyper_balsam.sites.configs import init_site

    made = init_site(path, config, name, project=project, queue=queue)
    click.echo(f"Made the Balsam site {made.name} (id {made.id}) in {made.path}.")
    click.echo(f"Look through {made.path / 'settings.yml'}, then start its agent:")
    click.echo(f"  env BALSAM_SITE_PATH={quote(str(made.path))} balsam site start")  # it may name another site


@site.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--import", "imports", multiple=True, metavar="MODULE", help="What run functions import; repeat it.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: name, ok, detail.")
def check(path: Path, imports: tuple[str, ...], as_json: bool) -> None:
    """Check the Balsam site in PATH: settings, names to fill in, folders, commands, packages, the API, clock, agent.

    Within an allocation it also tries from every node whether it reaches the API.

    \b
    Example:
      deephyper-balsam site check ./my-site --import torch
    """
    from deephyper_balsam.sites.checks import check_site

    checks = check_site(path, imports=imports)
    if as_json:
        click.echo(json.dumps([item.to_dict() for item in checks], indent=2))
    else:
        for item in checks:
            click.echo(f"{'ok    ' if item.ok else 'FAILED'} {item.name:10} {item.detail}")
    failed = [item.name for item in checks if not item.ok]
    if failed:
        raise BalsamError(f"The site in {path} is not ready: {', '.join(failed)}.")
