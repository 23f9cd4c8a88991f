"""Follows a search from anywhere, through Balsam alone, and writes nothing: what `search watch` shows."""

from __future__ import annotations

from deephyper_balsam.common.objective import minimises
from deephyper_balsam.common.wording import counted
from deephyper_balsam.monitor.liveness import AgentLiveness
from deephyper_balsam.monitor.search_snapshot import AllocationView, SearchSnapshot, Tally, about
from deephyper_balsam.store.allocation_chain import ALIVE, SEARCH
from deephyper_balsam.store.change_poller import ChangePoller
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.node_time import left_s
from deephyper_balsam.store.notes import read_notes
from deephyper_balsam.store.record import SearchRecord
from deephyper_balsam.store.search_state import SearchState, make_state
from deephyper_balsam.store.trial_rows import trial_tags


class Follower:
    """Looks at one search again and again; each look asks only for the trials that changed since the last."""

    def __init__(self, gateway: Gateway, record: SearchRecord) -> None:
        self._gateway, self._record = gateway, record
        self._changes = ChangePoller(gateway, record.name)
        self._tally = Tally()
        self._sites: dict[int, Row] = {}
        self._site_of_app: dict[int, str] = {}
        self._began: dict[int, float] = {}  # BatchJob -> when it was seen to begin
        self._waited: set[int] = set()  # BatchJobs that were seen before they ran
        self._watch: AgentLiveness | None = None
        self._alive: set[int] = set()
        self._ended: list[Row] = []  # BatchJobs

    def look(self) -> SearchSnapshot:
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
        self._read_ended(batch_jobs)
        notes = list(read_notes(self._gateway, record.name))
        now = self._gateway.now()
        allocations = [self._allocation(row, now) for row in batch_jobs if self._may_run(row)]
        carriers = [row for row in batch_jobs if row["optional_params"].get(SEARCH) == record.name]
        state = make_state(record.name, settings, notes, tally.states, now, carriers)
        taken_up_at = max([record.created_at, *(lease.driving_since or 0.0 for lease in state.leases)])
        return SearchSnapshot(
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
            busy=tally.busy(now, [*batch_jobs, *self._ended], trial_tags(record.name)),
            evaluations_per_min=tally.per_min(now, taken_up_at),
            elapsed_s=state.driven_s,
            max_evals=state.budget.max_evals,
            timeout_s=state.budget.timeout_s,
            driver=None if state.driver is None else state.driver.where,
            complete=state.is_over,
            notice=self._notice(state),
            minimize=minimises(settings),
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
            self._watch = AgentLiveness(self._gateway, self._sites)
        self._watch.look(self._gateway.now())

    def _read_ended(self, alive: list[Row]) -> None:
        """Read the BatchJobs that ended, when others are alive than before or an end has not been told yet."""
        ids = {row["id"] for row in alive}
        untold = any(not row["end_time"] and self._tally.has_run_in(row["id"]) for row in self._ended)
        if self._sites and (ids != self._alive or untold or not self._ended):
            self._ended = [row for row in self._gateway.batch_jobs(self._sites) if row["id"] not in ids]
            self._alive = ids

    def _may_run(self, row: Row) -> bool:
        tags = trial_tags(self._record.name)
        return all(tags.get(key) == value for key, value in row["filter_tags"].items())

    def _allocation(self, row: Row, now: float) -> AllocationView:
        site = self._sites[row["site_id"]]
        rest_s: float | None = 60.0 * row["wall_time_min"]
        if row["state"] != "running":
            self._waited.add(row["id"])
        else:
            if row["id"] in self._waited:
                self._began.setdefault(row["id"], now)
            rest_s = left_s(row, site, now, self._began.get(row["id"]))
        return AllocationView(row["id"], site["name"], row["num_nodes"], row["state"], row["wall_time_min"], rest_s)

    def _notice(self, state: SearchState) -> str | None:
        said = [self._watch.notice] if self._watch is not None and not state.is_over else []
        driver, leases = state.driver, state.leases
        if driver is None and state.carriers:
            said.append(f"nobody drives it yet: BatchJob {state.carriers[0]['id']} will")
        elif driver is None and state.end is None:
            how = f"; the last driver: {leases[-1].why or 'lost, it gave no sign of life any more'}" if leases else ""
            said.append(f"nobody drives it{how}. {state.next_step}")
        elif driver is not None and self._gateway.now() - driver.seen_at > 20.0:
            said.append(f"the driver gave its last sign of life {self._gateway.now() - driver.seen_at:.0f} s ago")
        if state.is_over and state.additions:
            waiting = counted(len(state.additions), "added configuration waits", "added configurations wait")
            them = "it" if len(state.additions) == 1 else "them"
            said.append(f"{waiting}: {state.next_step} with {them}")
        return "; ".join(words for words in said if words) or None
