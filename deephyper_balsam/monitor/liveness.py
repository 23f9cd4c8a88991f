"""Whether things move at a site: its agent's signs of life."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from deephyper_balsam.sites.agent import Agent
from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Gateway, Row

logger = logging.getLogger(__name__)

_LOOK_S = 5.0
_SILENT_S = 30.0  # of an agent that is known to refresh its site every few seconds
_UNKNOWN_SILENT_S = 150.0  # of one whose habits are not known yet: some refresh once a minute


class AgentLiveness:
    """Looks at the sites of a search now and then; call `look` as often as you like.

    Attributes
    ----------
    silent
        What to say of each site whose agent is silent, by the site's id.
    """

    def __init__(self, gateway: Gateway, sites: Mapping[int, Row]) -> None:
        self._gateway = gateway
        self._names = {site_id: str(site["name"]) for site_id, site in sites.items()}
        self._looked_at = -1e9
        self._refreshed_at: dict[int, float] = {}
        self._period_s: dict[int, float] = {}
        self.silent: dict[int, str] = {}

    def look(self, now: float) -> None:
        """Look again if the last look is old enough; `now` is the server's clock."""
        if 0 <= now - self._looked_at < _LOOK_S:  # a clock that was put back is no reason to look no more
            return
        self._looked_at = now
        rows = [row for row in self._gateway.sites() if row["id"] in self._names]
        silent = {int(row["id"]): said for row in rows if (said := self._silence(row, now)) is not None}
        for site_id in silent.keys() - self.silent.keys():
            logger.warning("%s", silent[site_id])
        self.silent = silent

    @property
    def notice(self) -> str | None:
        """What a person should know, if there is something."""
        return "; ".join(self.silent.values()) or None

    def _silence(self, row: Row, now: float) -> str | None:
        """Return what to say if the site's agent is silent for longer than is its habit."""
        site_id, refreshed_at = int(row["id"]), parse_time(row["last_refresh"])
        before = self._refreshed_at.get(site_id)
        self._refreshed_at[site_id] = refreshed_at
        if before is not None and refreshed_at > before:
            self._period_s[site_id] = min(refreshed_at - before, 120.0)
        period_s = self._period_s.get(site_id)
        silent_s = now - refreshed_at
        if silent_s < (_UNKNOWN_SILENT_S if period_s is None else max(_SILENT_S, 4 * period_s)):
            return None
        said = f"the agent of site {self._names[site_id]} has given no sign for {silent_s:.0f} s"
        try:
            agent = Agent.read(Path(row["path"]))
        except (OSError, ValueError):
            agent = None
        if agent is not None and agent.lives:
            why = agent.fault or "the scheduler or Balsam may not answer it, or its disk may be full"
            return (
                f"{said}, though it runs (pid {agent.pid}): {why}. Nothing new starts there meanwhile; look with "
                f"`deephyper-balsam site check {row['path']}`"
                + ("; `deephyper-balsam server up` mends a local server" if agent.fault else "")
            )
        return (
            f"{said}: nothing new starts there until it runs again (if it does not run on its machine: `balsam site "
            "start` in the site's folder; `deephyper-balsam server up` for a local server)"
        )
