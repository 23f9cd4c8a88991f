"""Options that may differ between the sites of a search: ``--nodes 8``, or ``--nodes theta=8,perlmutter=4``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.errors import SettingsError

if TYPE_CHECKING:
    from deephyper_balsam.store.allocation_request import AllocationRequest


class PerSite(click.ParamType):  # type: ignore[type-arg]
    """One value for all sites, or ``site=value`` for each, with commas between them: then a dict.

    Parameters
    ----------
    kind
        Of the values.
    """

    def __init__(self, kind: click.ParamType) -> None:  # type: ignore[type-arg]
        self.kind = kind
        self.name = "|".join(kind.choices) if isinstance(kind, click.Choice) else kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value, or a dict from site to value."""
        if isinstance(value, Mapping):
            return {str(site): self.kind.convert(str(one), param, ctx) for site, one in value.items()}
        if "=" not in str(value):
            return self.kind.convert(value, param, ctx)
        parts = [part.partition("=") for part in str(value).split(",")]
        pairs = {site.strip(): one.strip() for site, _, one in parts}
        if not all(pairs) or not all(pairs.values()) or len(pairs) < len(parts):
            self.fail(f"{value!r}: one value for all sites, or site=value,site=value with each site once.", param, ctx)
        return {site: self.kind.convert(one, param, ctx) for site, one in pairs.items()}


def requests(
    settings: Mapping[str, Any],
    sites: Sequence[str],
    begun: Mapping[str, AllocationRequest | None] | None = None,
) -> dict[str, AllocationRequest | None]:
    """Return the allocation to ask for at each site.

    Parameters
    ----------
    settings
        The options; None, or absent: not given.
    sites
        The names of the search's sites.
    begun
        What the search asks for where an option is not given; None: it is new, and the defaults hold.

    Raises
    ------
    SettingsError
        An option names a site that the search has not, or changes what is not asked for.
    """
    from deephyper_balsam.store.allocation_request import AllocationRequest, check_sites

    names = [name for name in inspect.signature(AllocationRequest).parameters if settings.get(name) is not None]
    for name in names:
        if isinstance(settings[name], dict):
            check_sites(settings[name], sites, _option(name))
    made: dict[str, AllocationRequest | None] = {}
    for site in sites:
        before = (begun or {}).get(site)
        given = {name: value for name in names if (value := _at(settings[name], site)) is not None}
        values = {**(vars(before) if before is not None else {}), **given}
        made[site] = AllocationRequest(**values) if "nodes" in values else None
    useless = [name for name in names if not any(_at(settings[name], site) and made[site] for site in sites)]
    if begun is not None and useless:
        raise SettingsError(
            "This search asks for no allocations there; give --nodes too if it shall, beside "
            f"{', '.join(map(_option, useless))}."
        )
    return made


def _at(value: Any, site: str) -> Any:
    return value.get(site) if isinstance(value, dict) else value


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
