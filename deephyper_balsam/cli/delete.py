"""`deephyper-balsam search delete`: a search and all its trials out of Balsam."""

from __future__ import annotations

import click

from deephyper_balsam.cli.common import echo_json, json_option
from deephyper_balsam.errors import BalsamError, InputError


@click.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def delete(name: str, yes: bool, as_json: bool) -> None:
    """Delete the search NAME from Balsam: trials, results, notes, snapshots. There is no way back.

    Its BatchJobs that were not submitted yet are deleted, others are asked to end. A search that is driven, or whose
    trials run, is refused. Files stay where they are; the command says where. After an interruption, run it again.

    \b
    Example:
      deephyper-balsam search results digits-1 -o digits-1.csv
      deephyper-balsam search delete digits-1
    """
    from deephyper_balsam.store.deletion import contents, delete_search, said
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.lease import current_lease, read_leases
    from deephyper_balsam.store.record import find_record

    gateway = Gateway()
    record = find_record(gateway, name)
    driver = current_lease(read_leases(gateway, name).get(name, []), gateway.now())
    if driver is not None:
        raise InputError(
            f"The search {name!r} is being driven by {driver.where}: stop it first, with "
            f"`deephyper-balsam search stop {name}`."
        )
    found = contents(gateway, record)
    if not yes:
        click.echo(f"{name}: {said(found)}. Deleted, they cannot be had back.", err=True)
        try:
            agreed = click.confirm("Delete them?", err=True)
        except click.Abort:
            agreed = False
        if not agreed:
            raise InputError(f"Nothing of {name!r} was deleted. Answer y, or give --yes.")
    shown = 0

    def progress(gone: int) -> None:
        nonlocal shown
        if gone - shown >= 1000:
            click.echo(f"{gone} of {found.jobs} jobs deleted ...", err=True)
            shown = gone

    try:
        delete_search(gateway, record, progress)
    except (BalsamError, KeyboardInterrupt):
        click.echo("Not all of it is deleted: run the same command again.", err=True)
        raise
    if as_json:
        counts = {key: getattr(found, key) for key in ("trials", "set_aside", "snapshots", "notes")}
        batch_jobs = {"batch_jobs_deleted": list(found.unsubmitted), "batch_jobs_ended": list(found.submitted)}
        left = [{"site": site, "folder": folder} for site, folder in found.folders]
        echo_json({"name": name, **counts, **batch_jobs, "left_on_disk": left})
        return
    click.echo(f"Deleted {name}: {said(found)}.")
    for batch_job_id in found.submitted:
        click.echo(f"BatchJob {batch_job_id} is asked to end.")
    for site, folder in found.folders:
        click.echo(f"Left on disk at {site}: {folder}")
    click.echo(f"Left on disk where it was run: the folder {name} with its results and log.")
