"""What stands in Balsam before the first trial of a search: its application at each site, and its record."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.placement import SearchSite
from deephyper_balsam.driver.start_limits import StartLimit
from deephyper_balsam.driver.trial_resources import TrialResources
from deephyper_balsam.sites import queue_limits
from deephyper_balsam.store import allocation_request, trial_rows
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.allocations import Allocations
from deephyper_balsam.store.applications import register
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.record import SearchRecord, create_record

logger = logging.getLogger(__name__)


def reach_sites(
    gateway: Gateway, requests: Mapping[str, AllocationRequest | None]
) -> tuple[list[Row], dict[str, AllocationRequest | None]]:
    """Return the sites' rows, and the allocation to ask for at each by the name that Balsam knows it by.

    Parameters
    ----------
    gateway
        Balsam's API.
    requests
        The same by the name that the user gave.

    Raises
    ------
    UnknownSiteError
        There is no such site.
    InputError
        A queue of the site does not take such an allocation.
    """
    rows = [gateway.site(name) for name in requests]
    for row, request in zip(rows, requests.values(), strict=True):
        if request is not None:
            queue_limits.check(row, request.queue, request.nodes, request.wall_time_min)
    return rows, {row["name"]: request for row, request in zip(rows, requests.values(), strict=True)}


def open_site(
    gateway: Gateway,
    row: Row,
    search: str,
    spec: dict[str, Any],
    needs: TrialResources,
    request: AllocationRequest | None,
    limit: StartLimit,
    timing: Timing,
) -> SearchSite:
    """Return a site as a search sees it; its application is registered there.

    Parameters
    ----------
    gateway
        Balsam's API.
    row
        The site in Balsam.
    search
        The search's name.
    spec
        Of the run function.
    needs
        What each evaluation gets.
    request
        The allocation to ask for there; None: none.
    limit
        What a launcher must have left to start a trial there.
    timing
        How often to look at its allocations.
    """
    app_id, app_name = register(gateway, spec, row["name"])
    logger.info("Application %s at site %s", app_name, row["name"])
    return SearchSite(
        row,
        app_id,
        {app["id"] for app in gateway.apps(row["id"])} | {app_id},
        Allocations(gateway, row, trial_rows.trial_tags(search), needs.slots, request, timing=timing),
        limit,
    )


def begin_record(
    gateway: Gateway,
    site_id: int,
    name: str,
    settings: Mapping[str, Any],
    requests: Mapping[str, AllocationRequest | None],
    now: float,
) -> SearchRecord:
    """Write down what a new search is; without a seed, one is drawn.

    Parameters
    ----------
    gateway
        Balsam's API.
    site_id
        Where its record stands.
    name
        The search's name.
    settings
        What it is, ``seed`` among them.
    requests
        The allocations that it asks for, by the site's name.
    now
        The time (epoch).
    """
    seed = settings.get("seed")
    settings = {
        **settings,
        "seed": secrets.randbits(31) if seed is None else seed,
        "allocation": allocation_request.to_record(dict(requests)),
    }
    return create_record(gateway, name, settings, site_id, now)
