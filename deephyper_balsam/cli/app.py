"""`deephyper-balsam app`: applications at Balsam's sites."""

from __future__ import annotations

import click

from deephyper_balsam.cli import Group
from deephyper_balsam.cli.common import echo_json, echo_table, json_option


@click.group(cls=Group)
def app() -> None:
    """Register run functions and shell commands as Balsam applications.

    \b
    Example:
      deephyper-balsam app register digits --site local
    """


@app.command()
@click.argument("target")
@click.option("--site", required=True, help="Name of the Balsam site.")
@json_option
def register(target: str, site: str, as_json: bool) -> None:
    """Register TARGET at a site: file.py:run, package.module:run, the YAML of a shell command, or a bundled name.

    \b
    Example:
      deephyper-balsam app register digits --site local
    """
    from deephyper_balsam.store.applications import register as register_at
    from deephyper_balsam.store.applications import resolve_run
    from deephyper_balsam.store.gateway import Gateway

    spec = resolve_run(target)
    app_id, name = register_at(Gateway(), spec, site)
    if as_json:
        echo_json({"id": app_id, "name": name, "site": site, "target": spec["target"]})
    else:
        click.echo(f"Application {name} (id {app_id}) is registered at site {site}; `balsam app ls` shows it.")


@app.command()
@json_option
def ls(as_json: bool) -> None:
    """List the applications of your sites, and those that come with the package.

    \b
    Example:
      deephyper-balsam app ls
    """
    from deephyper_balsam.store.applications import bundled
    from deephyper_balsam.store.gateway import Gateway

    gateway = Gateway()
    sites = {site["id"]: site["name"] for site in gateway.sites()}
    rows = [
        {"id": row["id"], "name": row["name"], "site": sites.get(row["site_id"]), "description": row["description"]}
        for row in gateway.apps()
    ]
    echo_table(rows, ("id", "name", "site", "description"), as_json, "No application is registered.")
    if not as_json:
        click.echo(f"\nReady to register: {', '.join(bundled())}")
