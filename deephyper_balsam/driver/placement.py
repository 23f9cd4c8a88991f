"""The sites of one search: what runs at each, where the next trial goes, and which of them is gone."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean

from deephyper_balsam.common.timing import USUAL, Timing
from deephyper_balsam.common.wording import counted
from deephyper_balsam.driver.latency import PipelineLatency
from deephyper_balsam.driver.live_table import LiveTable
from deephyper_balsam.driver.start_limits import StartLimit
from deephyper_balsam.driver.trial_resources import TrialResources
from deephyper_balsam.errors import BalsamError, NotLoggedInError, UnreachableError
from deephyper_balsam.monitor.liveness import AgentLiveness
from deephyper_balsam.store.allocations import Allocations, Work
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.trial import Resources, TrialState

logger = logging.getLogger(__name__)

_RECENT_RUNS = 200
_AHEAD_SHARE = 0.2  # of what has ended: what waits was chosen by a model that knows so much less, at most
_PATIENCE_RUNS, _DRAIN_RUNS = 5, 3  # mean durations that a trial waits before room is made for it, and for how long
_LOOK_S = 5.0
_LAUNCHER_MARGIN_S = 180.0  # launchers round their minutes, and some end early
_STANDS_DELAYS = 5.0  # pipeline delays, in which no trial that could begin does


@dataclass
class SearchSite:
    """One site of a search.

    Attributes
    ----------
    row
        Of the site, in Balsam.
    app_id
        Of the application that new trials are made for.
    app_ids
        Of all applications of the site: older trials may have another.
    allocations
        Its BatchJobs.
    limit
        How many minutes a launcher must have left there.
    durations_s
        Of the last runs there.
    delay
        From a run's end there to the start of the next.
    gone
        Its agent is silent, while that of another site is not: nothing new starts there.
    refused
        Why no allocation is asked for there any more, after its scheduler refused.
    stands_since
        Since when trials wait there although places are free and none has begun (seconds of `Placement`' clock).
    begun
        How many trials had begun there at the last look.
    said_stands
        Whether it was logged that nothing begins there.
    """

    row: Row
    app_id: int
    app_ids: set[int]
    allocations: Allocations
    limit: StartLimit
    durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_RUNS))
    delay: PipelineLatency = field(default_factory=PipelineLatency)
    gone: bool = False
    refused: str | None = None
    stands_since: float | None = None
    begun: int = 0
    said_stands: bool = False

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.row["name"])

    @property
    def capacity(self) -> int:
        """How many trials can run there at once now."""
        return 0 if self.gone else self.allocations.capacity

    @property
    def planned(self) -> int:
        """How many trials the allocations that wait there will run at once."""
        return 0 if self.gone else self.allocations.planned

    def backlog(self, ended: int) -> int:
        """Return how many should wait there: what completes during one pipeline delay (Little's law).

        Before anything ended, and early in a search of short runs, one wave: what waits was chosen by a model that does
        not know what has ended since, which matters less the more has ended.
        """
        closing = self.allocations.closing(self.limit.needed_s)  # a new run would be cut there, and none follows
        lasting = self.capacity - closing
        if not self.durations_s:
            return lasting - closing
        completing = math.ceil(lasting * self.delay.seconds / max(fmean(self.durations_s), 0.1))
        return min(completing, max(lasting, int(_AHEAD_SHARE * ended))) - closing

    def fits(self, needs: Resources) -> bool:
        """Return whether an allocation there may run an evaluation of this size."""
        largest = self.allocations.largest_nodes
        return largest is None or needs.num_nodes <= largest

    @property
    def notice(self) -> str | None:
        """What a person should know of its allocations, if there is something."""
        if self.refused is not None:
            return f"no allocation is asked for at {self.name} any more: {self.refused}"
        return None if self.gone else self.allocations.notice


class Placement:
    """The sites of one search, in the order in which they were named.

    Parameters
    ----------
    table
        Says how many trials wait and run at each.
    needs
        What evaluations get.
    since_begin
        Seconds since the search began, the clock of the table.
    """

    def __init__(
        self,
        gateway: Gateway,
        sites: Sequence[SearchSite],
        table: LiveTable,
        needs: TrialResources,
        since_begin: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
        timing: Timing = USUAL,
    ) -> None:
        self._timing = timing
        self._gateway, self._sites, self._table, self._needs = gateway, list(sites), table, needs
        self._since_begin, self._clock = since_begin, clock
        self._watch = AgentLiveness(gateway, {site.row["id"]: site.row for site in sites})
        self._by_app = {app_id: site for site in sites for app_id in site.app_ids}
        self._by_name = {site.name: site for site in sites}
        self._looked_at = -1e9

    def __iter__(self) -> Iterator[SearchSite]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def of_job(self, row: Row) -> SearchSite:
        """Return the site of a job."""
        return self._by_app.get(row["app_id"], self._sites[0])

    def named(self, name: str) -> SearchSite:
        """Return the site of a name."""
        return self._by_name[name]

    # --- looking -------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look at the sites and their BatchJobs again, where the last look is old enough.

        Raises
        ------
        BalsamError
            When the scheduler of the last site that is of use refuses.
        """
        for site in self._sites:
            self._bear(site, site.allocations.refresh)
        now = self._gateway.now()
        self._watch.look(now)
        silent = self._watch.silent.keys() & {site.row["id"] for site in self._sites}
        for site in self._sites:
            self._look_whether_it_stands(site)
            site.gone = site.row["id"] in silent and len(silent) < len(self._sites)
        if any(site.gone for site in self._sites) and self._clock() - self._looked_at >= _LOOK_S:
            self._looked_at = self._clock()
            for site in self._sites:
                if site.gone and self.under_way(site):
                    site.allocations.free_what_silent_launchers_hold(now)

    def _look_whether_it_stands(self, site: SearchSite) -> None:
        """Notice when trials wait at a site although places are free, and none begins."""
        running = self._table.count(TrialState.RUNNING, site=site.name)
        ended = self._table.count(TrialState.DONE, TrialState.FAILED, site=site.name)
        waiting = self._table.count(TrialState.READY, site=site.name)
        lasting = [  # in others a run that is as long as usual is not begun any more
            row
            for row in site.allocations.alive
            if row["state"] == "running" and site.allocations.left_s(row) > site.limit.needed_s + _LAUNCHER_MARGIN_S
        ]
        could = waiting and site.capacity > running and lasting and self._needs.fixed is not None
        if not could or running + ended != site.begun:
            site.stands_since, site.said_stands = None, False
        elif site.stands_since is None:
            site.stands_since = self._clock()
        site.begun = running + ended
        said = self._stands(site)
        if said is not None and not site.said_stands:
            logger.warning("%s", said)
            site.said_stands = True

    def _stands(self, site: SearchSite) -> str | None:
        """Return what to say of a site at which nothing begins for much longer than Balsam takes to begin a run."""
        if site.stands_since is None:
            return None
        stood_s = self._clock() - site.stands_since
        if stood_s < max(self._timing.stands_s, _STANDS_DELAYS * site.delay.seconds):
            return None
        waiting = self._table.count(TrialState.READY, site=site.name)
        free = site.capacity - self._table.count(TrialState.RUNNING, site=site.name)
        return (
            f"{counted(waiting, 'trial waits', 'trials wait')} at {site.name} and "
            f"{counted(free, 'place is', 'places are')} free, but none has begun for {stood_s:.0f} s: "
            "the site's agent or launcher does not work on them (a full disk, or a part of it that died). Look with "
            f"`deephyper-balsam site check {site.row['path']}` and in the site's log folder; what died is started "
            "again by `deephyper-balsam server up` for a local server, elsewhere by `balsam site stop` and `balsam "
            "site start`"
        )

    def _bear(self, site: SearchSite, call: Callable[[], None]) -> None:
        """Call; what one site refuses is borne while another may do the work."""
        try:
            call()
        except (UnreachableError, NotLoggedInError):
            raise
        except BalsamError as error:
            if not any(other is not site and other.refused is None and not other.gone for other in self._sites):
                raise
            site.refused = str(error)
            logger.warning("Site %s: %s The search goes on at the others.", site.name, error)

    @property
    def notice(self) -> str | None:
        """What a person should know about the sites and the allocations, if there is something."""
        standing = [] if self._watch.silent else [self._stands(site) for site in self._sites]
        said = [self._watch.notice, *(site.notice for site in self._sites), *standing]
        return "; ".join(notice for notice in said if notice) or None

    # --- how much to have under way, and where -------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """How many trials can run at once now, at all sites."""
        return sum(site.capacity for site in self._sites)

    @property
    def backlog(self) -> int:
        """How many more should wait, at all sites."""
        return sum(self._backlog(site) for site in self._sites)

    def _backlog(self, site: SearchSite) -> int:
        """Return how many should wait at a site; while nothing runs anywhere, what the queued ones will start with."""
        if site.capacity:
            return site.backlog(self._table.count(TrialState.DONE, TrialState.FAILED))
        return 0 if self.capacity or site.gone else site.planned or self._needs.wave

    def room(self, site: SearchSite) -> int:
        """Return how many trials a site is short of."""
        if self._must_make_room(site):
            return 0
        return max(0, site.capacity + self._backlog(site) - self.under_way(site))

    def _must_make_room(self, site: SearchSite) -> bool:
        """Return whether nothing new is submitted for a while, so that nodes become free together.

        Where configurations differ in size, a launcher starts the smallest first, and a large one would wait for ever
        behind small ones that keep coming.
        """
        since = self._table.waits_since(site.name) if self._needs.fixed is None else None
        if since is None or not site.durations_s:
            return False
        usual_s = fmean(site.durations_s)
        waited_s = self._since_begin() - since - site.delay.seconds
        return _PATIENCE_RUNS * usual_s < waited_s < (_PATIENCE_RUNS + _DRAIN_RUNS) * usual_s

    def under_way(self, site: SearchSite) -> int:
        """Return how many trials wait or run at a site."""
        return self._table.count(TrialState.READY, TrialState.RUNNING, site=site.name)

    def best_for(self, needs: Resources, placed: Mapping[str, int]) -> SearchSite | None:
        """Return where a trial goes; None when its configuration asks for more than any allocation has.

        First where something runs and has a free place, then where something runs and little waits, then where an
        allocation waits in the queue.

        Parameters
        ----------
        needs
            What the evaluation asks for.
        placed
            How many more were placed just now, by the site's name.
        """
        fitting = [site for site in self._sites if site.fits(needs)]
        if not fitting and self._needs.fixed is not None:
            fitting = self._sites  # no fault of this configuration: it waits for a larger allocation
        if len(fitting) < 2:
            return next(iter(fitting), None)

        def rank(site: SearchSite) -> tuple[bool, int, float, int]:
            under_way = self.under_way(site) + placed[site.name]
            waits_for = site.capacity + self._backlog(site) - under_way if site.capacity else -math.inf
            return not site.gone, max(0, site.capacity - under_way), waits_for, site.planned - under_way

        return max(fitting, key=rank)

    def idle(self) -> list[SearchSite]:
        """Return the sites at which trials wait and nothing runs, while something runs at another."""
        if not self.capacity:
            return []
        return [
            site for site in self._sites if not site.capacity and self._table.count(TrialState.READY, site=site.name)
        ]

    @property
    def room_where_runs(self) -> int:
        """How many trials the sites are short of at which something runs."""
        return sum(self.room(site) for site in self._sites if site.capacity)

    @property
    def largest_nodes(self) -> int:
        """How many nodes the largest allocation has, as far as is known."""
        return max(site.allocations.largest_nodes or 0 for site in self._sites)

    # --- allocations ---------------------------------------------------------------------------------------------

    def ensure(self, work: Work, avoid: Sequence[str]) -> None:
        """Ask for an allocation at each site that wants one, as far as those that run elsewhere leave work for it."""
        for site in self._sites:
            if site.gone or site.refused is not None:
                continue
            elsewhere = self.capacity - site.capacity
            if work.evaluations is not None and elsewhere and work.evaluations <= elsewhere:
                continue
            left = None if work.evaluations is None else work.evaluations - elsewhere
            site.allocations.avoid = avoid
            self._bear(site, partial(site.allocations.ensure, replace(work, evaluations=left)))

    @property
    def owned(self) -> bool:
        """Whether an allocation that we asked for is alive."""
        return any(site.allocations.owned for site in self._sites)

    def release(self) -> None:
        """End the allocations that we asked for; others' go on."""
        for site in self._sites:
            site.allocations.release()

    def leave(self) -> None:
        """Let the allocations that we asked for go on: what runs in them ends there."""
        for site in self._sites:
            site.allocations.leave()
