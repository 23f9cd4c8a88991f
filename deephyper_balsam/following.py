"""Follows a search from anywhere, through Balsam alone, and writes nothing: what `search watch` shows."""

from __future__ import annotations

from deephyper_balsam.drivers import Life, at_the_wheel
from deephyper_balsam.evaluators.base import EXHAUSTED
from deephyper_balsam.evaluators.changes import Changes
from deephyper_balsam.gateway import Gateway, Row, parse_time
from deephyper_balsam.jobs import trial_tags
from deephyper_balsam.notes import read_notes
from deephyper_balsam.orders import Order, effective_budget
from deephyper_balsam.picture import Allocation, Picture, Tally, about
from deephyper_balsam.record import SearchRecord
from deephyper_balsam.sites.chain import ALIVE, SEARCH
from deephyper_balsam.watch import SiteWatch


class Follower:
    """Looks at one search again and again; each look asks only for the trials that changed since the last."""

    def __init__(self, gateway: Gateway, record: SearchRecord) -> None:
        self._gateway, self._record = gateway, record
        self._changes = Changes(gateway, record.name)
        self._tally = Tally()
        self._sites: dict[int, Row] = {}
        self._site_of_app: dict[int, str] = {}
        self._began: dict[int, float] = {}  # BatchJob -> when it was first seen to run
        self._waited: set[int] = set()  # BatchJobs that were seen before they ran
        self._watch: SiteWatch | None = None

    def look(self) -> Picture:
        """Return how the search stands now.

        Raises
        ------
        BalsamError
            Balsam does not answer, or refuses; the next look takes up what this one missed.
        """
        record, tally, settings = self._record, self._tally, self._record.settings
        self._read_sites()
        self._read_trials()
        batch_jobs = self._gateway.batch_jobs(self._sites, ALIVE) if self._sites else []
        notes = list(read_notes(self._gateway, record.name))
        now = self._gateway.now()
        allocations = [self._allocation(row, now) for row in batch_jobs if self._may_run(row)]
        lives = [Life.read(row) for row in notes if row["tags"]["kind"] == "driver"]
        orders = [Order.read(row) for row in notes if row["tags"]["kind"] == "order"]
        drove = [life for life in lives if life.driving_since is not None]
        driver = at_the_wheel(lives, now)
        max_evals, timeout_s = effective_budget(settings, drove, orders)
        elapsed_s = sum(life.drove_s for life in drove)
        used = (
            (max_evals is not None and tally.evaluated >= max_evals)
            or (timeout_s is not None and elapsed_s >= timeout_s)
            or bool(drove and drove[-1].why == EXHAUSTED)
        )
        carriers = [row["id"] for row in batch_jobs if row["optional_params"].get(SEARCH) == record.name]
        taken_up_at = max([record.created_at, *(life.driving_since or 0.0 for life in drove)])
        return Picture(
            name=record.name,
            about=about(settings["method"], settings["problem"].get("name"), record.sites),
            at=now,
            begun_at=record.created_at,
            states=tally.states,
            best=tally.best,
            steps=tally.steps,
            running=tally.running(allocations),
            last=tally.last,
            failures=tally.failures,
            allocations=allocations,
            busy=tally.busy(now, allocations),
            evaluations_per_min=tally.per_min(now, taken_up_at),
            elapsed_s=elapsed_s,
            max_evals=max_evals,
            timeout_s=timeout_s,
            driver=None if driver is None else driver.where,
            complete=used and driver is None and not carriers,
            notice=self._notice(driver, drove, carriers, used),
        )

    def _read_trials(self) -> None:
        rows = self._changes.read()
        if any(row["app_id"] not in self._site_of_app for row in rows):
            names = {site_id: str(site["name"]) for site_id, site in self._sites.items()}
            self._site_of_app = {app["id"]: names.get(app["site_id"], "") for app in self._gateway.apps()}
        for row in rows:
            if self._changes.is_new(row):
                self._tally.take(row, self._site_of_app.get(row["app_id"], ""))
                self._changes.note(row)
        self._changes.forget_old()

    def _read_sites(self) -> None:
        rows = {row["id"]: row for row in self._gateway.sites()}
        self._sites = {site_id: row for site_id, row in rows.items() if row["name"] in self._record.sites}
        if self._watch is None:
            self._watch = SiteWatch(self._gateway, self._sites)
        self._watch.look(self._gateway.now())

    def _may_run(self, row: Row) -> bool:
        tags = trial_tags(self._record.name)
        return all(tags.get(key) == value for key, value in row["filter_tags"].items())

    def _allocation(self, row: Row, now: float) -> Allocation:
        site = self._sites[row["site_id"]]
        left_s: float | None = 60.0 * row["wall_time_min"]
        if row["state"] == "running":
            left_s = self._left_s(row, site, now)
        else:
            self._waited.add(row["id"])
        return Allocation(row["id"], site["name"], row["num_nodes"], row["state"], row["wall_time_min"], left_s)

    def _left_s(self, row: Row, site: Row, now: float) -> float | None:
        """Return what is left of a running BatchJob's wall time: by its start, else by what its site's agent says."""
        wall_s = 60.0 * float(row["wall_time_min"])
        seen_at: float = self._began.setdefault(row["id"], now)
        if row["start_time"]:
            return max(0.0, parse_time(str(row["start_time"])) + wall_s - now)
        if row["id"] in self._waited:
            return max(0.0, seen_at + wall_s - now)
        told = (site.get("queued_jobs") or {}).get(str(row["scheduler_id"]), {}).get("time_remaining_min")
        return None if told is None else min(wall_s, 60.0 * float(told))

    def _notice(self, driver: Life | None, drove: list[Life], carriers: list[int], used: bool) -> str | None:
        said = [self._watch.notice] if self._watch is not None and (driver is not None or not used) else []
        if driver is None and carriers:
            said.append(f"nobody drives it yet: BatchJob {carriers[0]} will")
        elif driver is None and not used:
            how = f"; the last driver: {drove[-1].why or 'lost, it gave no sign of life any more'}" if drove else ""
            said.append(f"nobody drives it{how}. deephyper-balsam search resume {self._record.name} goes on")
        elif driver is not None and self._gateway.now() - driver.seen_at > 20.0:
            said.append(f"the driver gave its last sign of life {self._gateway.now() - driver.seen_at:.0f} s ago")
        return "; ".join(words for words in said if words) or None
