"""What people did to the jobs of a search by Balsam's own commands: deleted them, ended them, gave them back.

The driver asks for jobs that changed, so one that is gone would never be heard of again. A count tells, with one small
request now and then; only when there are fewer jobs than trials are those that should wait or run looked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from deephyper_balsam.common.timing import USUAL, Timing
from deephyper_balsam.common.wording import counted
from deephyper_balsam.store import trial_data, trial_rows
from deephyper_balsam.store.gateway import WAITING_STATES, Gateway, Row
from deephyper_balsam.store.trial_data import Outcome

logger = logging.getLogger(__name__)

_OF_BALSAM = ("RUN_ERROR", "RUN_DONE", "POSTPROCESSED", "STAGED_OUT")
"""States from which Balsam itself brings a job to its end; from others it says why."""


class Reconciler:
    """Compares the jobs that a search should have with those that are there.

    Parameters
    ----------
    gateway
        Balsam's API.
    search
        The search's name.
    clock
        Any clock that only goes forward.
    timing
        How often to look.
    """

    def __init__(
        self,
        gateway: Gateway,
        search: str,
        clock: Callable[[], float] = time.monotonic,
        timing: Timing = USUAL,
    ) -> None:
        self._gateway, self._search, self._clock = gateway, search, clock
        self._tags = trial_rows.trial_tags(search)
        self._look_s = timing.deleted_jobs_s
        self._looked_at = clock()
        self._surplus = 0  # jobs with our tag that stand for no trial: somebody else's
        self._gone: set[int] = set()  # ids of jobs that are gone, of trials that have ended

    def missing(self, known: Mapping[int, int], open_numbers: Iterable[int]) -> list[int]:
        """Return the trials that should wait or run and whose job is gone.

        Parameters
        ----------
        known
            The id of each trial's job, by the trial's number.
        open_numbers
            The trials that wait or run, as far as it is known here.
        """
        if self._clock() - self._looked_at < self._look_s:
            return []
        lacking = self._lacking(len(known))
        gone: list[int] = []
        if lacking > 0:
            open_ids = {known[number]: number for number in open_numbers if number in known}
            there = {row["id"] for row in self._gateway.jobs(self._tags, states=trial_rows.NOT_FINAL_STATES)}
            doubtful = [job_id for job_id in open_ids if job_id not in there]  # they may have ended just now
            ended = {row["id"] for row in self._gateway.jobs(self._tags, ids=doubtful)} if doubtful else set()
            gone = sorted(open_ids[job_id] for job_id in doubtful if job_id not in ended)
            if lacking > len(gone):
                self._look_at_all(known, {known[number] for number in gone})
        self._looked_at = self._clock()
        return gone

    def _lacking(self, known: int) -> int:
        lacking = known + self._surplus - len(self._gone) - self._gateway.count_jobs(self._tags)
        self._surplus += max(0, -lacking)  # a second job of a trial is set aside later; others' stay
        return lacking

    def _look_at_all(self, known: Mapping[int, int], open_gone: set[int]) -> None:
        """Find out what is gone: trials that have ended, or jobs that stood for no trial."""
        there = {row["id"] for row in self._gateway.jobs(self._tags)}
        ids = set(known.values())
        gone = ids - there - open_gone
        self._surplus = len(there - ids)
        if gone - self._gone:
            logger.warning(
                "The jobs of %s deleted in Balsam: this driver still knows their "
                "results and has them in results.csv, but a later one will not",
                counted(len(gone - self._gone), "trial that has ended were", "trials that have ended were"),
            )
        self._gone = gone

    # --- ended, or given back, by hand -------------------------------------------------------------------------------

    def ended_by_hand(self, rows: Iterable[Row]) -> dict[int, Outcome]:
        """Return the outcomes of trials whose job somebody brought to its end, by the job's id.

        Balsam's own ends come from a run, or bring a message; `balsam job modify --state` brings none.
        """
        silent = [
            row["id"]
            for row in rows
            if row["state"] in trial_rows.FINAL_STATES
            and trial_data.is_untold(row)
            and not (row.get("serialized_return_value") or row.get("serialized_exception"))
        ]
        last: dict[int, Row] = {}
        for event in self._gateway.events(job_ids=silent) if silent else ():
            if event["to_state"] in trial_rows.FINAL_STATES:
                last[event["job_id"]] = event
        found: dict[int, Outcome] = {}
        for job_id, event in last.items():
            if event["data"] or event["from_state"] in _OF_BALSAM:
                continue
            why = f"ended by hand in Balsam ({event['from_state']} to {event['to_state']})"
            found[job_id] = trial_data.failed(why)
            logger.warning("Job %d was %s: its trial has failed", job_id, why)
        return found

    def edited(self, rows: Iterable[Row]) -> dict[int, Outcome]:
        """Return the outcomes of trials whose job somebody gave other parameters, by the job's id.

        What a launcher holds is left to it until the run has told its result: the run would write over this one.
        """
        found: dict[int, Outcome] = {}
        for row in rows:
            free = row["state"] in WAITING_STATES and not row.get("session_id")
            if trial_data.is_settled(row) or trial_rows.has_left(row):
                continue
            ended = trial_data.has_result(row) or row["state"] in trial_rows.FINAL_STATES
            if (free or ended) and trial_rows.is_edited(row):
                why = "the parameters of its job were changed in Balsam after it was submitted"
                found[row["id"]] = trial_data.failed(why)
                logger.warning(
                    "Trial %d has failed: %s (job %d). To evaluate a configuration of your own: `search add`",
                    trial_rows.trial_number(row),
                    why,
                    row["id"],
                )
        return found

    def finish_given_back(self, rows: Iterable[Row]) -> None:
        """Finish jobs that wait although their result was taken in: no node should be taken for them again."""
        back = [
            row
            for row in rows
            if row["state"] in WAITING_STATES and trial_data.is_gathered(row) and not row["session_id"]
        ]
        if not back:
            return
        last = {event["job_id"]: event for event in self._gateway.events(job_ids=[row["id"] for row in back])}
        by_hand = [row for row in back if last.get(row["id"], {}).get("from_state") in trial_rows.FINAL_STATES]
        if by_hand:  # from other states Balsam does it itself, where the result was here before the launcher's word
            logger.warning(
                "Trials %s%s were given back to the queue although they have ended: no trial is evaluated twice",
                ", ".join(str(trial_rows.trial_number(row)) for row in by_hand[:10]),
                " ..." if len(by_hand) > 10 else "",
            )
        trial_rows.finish_answered(self._gateway, self._search, back)
