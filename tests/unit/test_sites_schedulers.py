"""Our schedulers: commands that are built, texts that are read, and what Balsam's agent is told; no scheduler runs."""

from __future__ import annotations

import json
import operator
import time
from pathlib import Path
from typing import Any

import pytest
from balsam.platform.scheduler import DelayedSubmitFail, SchedulerDeleteError
from balsam.platform.scheduler.scheduler import SchedulerNonZeroReturnCode, SchedulerSubmitError
from balsam.schemas import BatchJobState

from deephyper_balsam.sites import cobalt, pbs, scheduling, slurm
from deephyper_balsam.sites.scheduling import Answer, Job, Request, State, clock_min

ACCOUNT = "m1234_an_account_with_a_very_long_name_indeed"
REQUEST = Request(
    Path("/a site/qsubmit/qlaunch00001.sh"), ACCOUNT, "regular", 4000, 1440, {"BALSAM_SITE_PATH": "/a site"}
)


def test_clocks_of_schedulers_are_read_as_whole_minutes() -> None:
    assert [clock_min(text) for text in ("5", "4:55", "1:30:00", "2-00:00:30", "00:59:00", "1-00")] == [
        *(5, 5, 90, 2881, 59, 1440)
    ]
    with pytest.raises(ValueError):
        clock_min("UNLIMITED")


# ---- Slurm


def test_slurm_is_asked_for_the_queue_as_it_is_called_there_and_the_job_keeps_its_name() -> None:
    command = slurm.SlurmScheduler.submit_command(REQUEST)
    assert command[0] == "sbatch"
    assert command[-1] == str(REQUEST.script)
    assert {"--partition=regular", "--nodes=4000", "--time=1440", f"--account={ACCOUNT}"} < set(command)
    assert "--output=/a site/qsubmit/qlaunch00001.output" in command
    assert "--qos=regular" in slurm.SlurmQosScheduler.submit_command(REQUEST)
    assert slurm.parse_submit("12\n") == slurm.parse_submit("sbatch: a word of welcome\n12;cluster\n") == 12
    with pytest.raises(ValueError):
        slurm.parse_submit("")


def test_slurms_queue_is_read_whatever_is_long_unknown_or_broken_in_it() -> None:
    now = time.mktime(time.strptime("2026-11-25T04:21:20", "%Y-%m-%dT%H:%M:%S"))
    text = "\n".join(
        [
            f"101|RUNNING|2|1-00:00:00|4:55|2026-11-25T04:11:20|regular|(null)|{ACCOUNT}|x|y",
            f"102|PENDING|1|UNLIMITED|NOT_SET|N/A|gpu_ss11|gpu_regular|{ACCOUNT}|balsam-regular",
            "103|SUSPENDED|1|5:00|INVALID|2026-11-25T04:11:20|regular|debug|a|z",
            "104|A_NEW_STATE|1|5:00|5:00|2026-11-25T04:11:20|regular|(null)|a|z",
            "105_3|RUNNING|1|5:00|5:00|2026-11-25T04:11:20|regular|(null)|a|z",
            "garbage",
            "",
        ]
    )
    jobs = slurm.parse_queue(text, now)
    assert [(job.id, job.state, job.queue) for job in jobs] == [
        (101, State.RUNNING, "regular"),
        (102, State.QUEUED, "regular"),  # from the job's name: the cluster calls it gpu_regular
        (103, State.RUNNING, "debug"),
        (104, State.UNKNOWN, "regular"),
    ]
    assert (jobs[0].project, jobs[0].wall_time_min, jobs[0].time_remaining_min) == (ACCOUNT, 1440, 5)
    assert jobs[0].queued_time_min == 10
    assert jobs[1].wall_time_min == scheduling.UNLIMITED_MIN


SCONTROL = (
    "JobId=5808780 JobName=balsam-regular UserId=root(0) Account={account} QOS=(null) JobState={state} Reason=None "
    "ExitCode={code} RunTime=00:00:05 TimeLimit=00:05:00 SubmitTime=2026-11-25T04:11:20 StartTime=2026-11-25T04:11:21 "
    "EndTime=2026-11-25T04:11:26 Partition=regular NumNodes=2 NumCPUs=8 ReqB:S:C:T=0:0:*:* Command=/x/JobState=A y"
)


@pytest.mark.parametrize(
    ("state", "code", "ours", "exit_code", "at_once"),
    [
        ("FAILED", "7:0", State.FAILED, 7, True),
        ("CANCELLED", "0:15", State.FINISHED, 143, False),
        ("TIMEOUT", "0:0", State.FINISHED, 0, False),
        ("COMPLETED", "0:0", State.FINISHED, 0, False),
        ("SUSPENDED", "0:0", State.RUNNING, 0, False),
        ("SOMETHING_NEW", "0:0", State.UNKNOWN, 0, False),
    ],
)
def test_one_job_of_slurm_is_read(state: str, code: str, ours: State, exit_code: int, at_once: bool) -> None:
    job = slurm.parse_job(SCONTROL.format(account=ACCOUNT, state=state, code=code))
    assert job is not None
    assert (job.id, job.state, job.exit_code, job.failed_at_once) == (5808780, ours, exit_code, at_once)
    assert (job.queue, job.project, job.num_nodes, job.wall_time_min) == ("regular", ACCOUNT, 2, 5)
    assert job.end_time is not None
    assert job.start_time is not None
    assert job.end_time - job.start_time == 5
    assert slurm.parse_job("no job here") is None


def test_sacct_is_read_where_there_is_one() -> None:
    text = "77|CANCELLED by 0|2026-11-25T04:11:21|Unknown|0:15\n"
    job = slurm.parse_history(text, 77)
    assert job is not None
    assert (job.state, job.end_time, job.start_time is None) == (State.FINISHED, None, False)
    assert slurm.parse_history("", 77) is None


def test_every_word_of_slurms_table_is_balsams_or_ours() -> None:
    for word, state in slurm.STATES.items():
        assert slurm.state_of(word) is state
        if state in (State.QUEUED, State.RUNNING):
            Job(1, state).status()


# ---- what the agent is told, whatever the scheduler says


class Scripted:
    """Answers of a scheduler's commands, by the command's first words."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[list[str]] = []
        for module in (scheduling, slurm, pbs, cobalt):
            monkeypatch.setattr(module, "run_command", self)

    def __call__(self, command: list[str], **_: Any) -> Answer:
        self.asked.append(list(command))
        return self.answers.get(command[0], Answer(127, "", f"cannot run {command[0]}"))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    for scheduler in (slurm.SlurmScheduler, pbs.PBSScheduler, cobalt.CobaltScheduler):
        monkeypatch.setattr(scheduler, "_missed", {})
        monkeypatch.setattr(scheduler, "_ended", {})
    return Scripted(monkeypatch)


SQUEUE_ROW = "9|{state}|1|5:00|5:00|2026-11-25T04:11:20|regular|(null)|a|balsam-regular\n"
INVALID = Answer(1, "", "slurm_load_jobs error: Invalid job id specified\n")


def test_a_failing_sacct_or_scontrol_does_not_reach_the_agent(scripted: Scripted) -> None:
    scripted.answers = {"sacct": Answer(1, "", "Slurm accounting storage is disabled"), "scontrol": INVALID}
    times = slurm.SlurmScheduler.parse_logs(9, None)
    assert (times.start_time, times.end_time) == (None, None)
    scripted.answers = {"scontrol": Answer(1, "", "Unable to contact slurm controller")}
    assert slurm.SlurmScheduler.parse_logs(9, None).end_time is None


def test_a_job_that_the_queue_does_not_show_is_looked_up_before_it_counts_as_finished(scripted: Scripted) -> None:
    scheduler = slurm.SlurmScheduler
    running = Answer(0, SCONTROL.format(account="a", state="COMPLETING", code="0:0"), "")
    scripted.answers = {"squeue": Answer(0, "", ""), "scontrol": running}
    statuses = scheduler.get_statuses(user="u")
    assert 5808780 in statuses
    assert statuses[5808780].state == "queued"  # whatever Balsam holds: nothing to change
    scripted.answers["scontrol"] = Answer(0, SCONTROL.format(account="a", state="COMPLETED", code="0:0"), "")
    assert 5808780 not in scheduler.get_statuses(user="u")
    assert scheduler.parse_logs(5808780, None).end_time is not None


def test_a_job_that_nobody_knows_is_looked_up_once_more_and_a_silent_controller_proves_nothing(
    scripted: Scripted,
) -> None:
    scheduler = slurm.SlurmScheduler
    scripted.answers = {"squeue": Answer(0, "", ""), "scontrol": Answer(1, "", "Unable to contact slurm controller")}
    for _ in range(5):
        assert 9 in scheduler.get_statuses(user="u")
    scripted.answers["scontrol"] = INVALID
    first = scheduler.get_statuses(user="u")
    assert 9 in first
    assert 9 in first  # asked twice in one round, looked up once
    scripted.answers["squeue"] = Answer(0, SQUEUE_ROW.format(state="RUNNING"), "")
    assert 9 in scheduler.get_statuses(user="u")  # it is back: the count begins anew
    scripted.answers["squeue"] = Answer(0, "", "")
    assert 9 in scheduler.get_statuses(user="u")
    assert 9 not in scheduler.get_statuses(user="u")


def test_a_state_without_a_meaning_leaves_the_batch_job_as_it_is(scripted: Scripted) -> None:
    scripted.answers = {"squeue": Answer(0, SQUEUE_ROW.format(state="NEW_STATE"), "")}
    statuses = slurm.SlurmScheduler.get_statuses(user="u")
    assert 9 in statuses
    assert list(statuses) == []  # nothing that Balsam's schema would refuse
    for state in ("queued", "running", "pending_deletion", *BatchJobState):
        assert not operator.ne(state, statuses[9].state)  # as the agent asks


def test_a_batch_job_deleted_before_it_was_submitted_does_not_end_the_service(scripted: Scripted) -> None:
    scripted.answers = {"squeue": Answer(0, "", "")}
    statuses = slurm.SlurmScheduler.get_statuses(user="u")
    # As the agent asks: nothing to delete, nothing whose times are known, and done
    assert [None in statuses, None in statuses, statuses[None].state] == [False, True, "finished"]
    with pytest.raises(SchedulerDeleteError):
        slurm.SlurmScheduler.delete_job(None)
    with pytest.raises(SchedulerDeleteError, match="cannot run scancel"):
        slurm.SlurmScheduler.delete_job(9)


def test_a_scheduler_that_cannot_be_run_raises_only_what_the_agent_knows(scripted: Scripted, tmp_path: Path) -> None:
    for scheduler in (slurm.SlurmScheduler, pbs.PBSScheduler, cobalt.CobaltScheduler):
        with pytest.raises(SchedulerNonZeroReturnCode):
            scheduler.get_statuses(user="u")
        with pytest.raises(SchedulerSubmitError, match="cannot run"):
            scheduler.submit(tmp_path / "s.sh", "a", "q", 1, 5)
        assert scheduler.get_backfill_windows() == {}
        assert scheduler.discover_projects() == []
    scripted.answers = {"sbatch": Answer(0, "welcome", "")}
    with pytest.raises(SchedulerSubmitError, match="no job id"):
        slurm.SlurmScheduler.submit(tmp_path / "s.sh", "a", "q", 1, 5)


def test_a_script_that_failed_at_once_becomes_submit_failed(scripted: Scripted) -> None:
    scripted.answers = {"scontrol": Answer(0, SCONTROL.format(account="a", state="FAILED", code="127:0"), "")}
    with pytest.raises(DelayedSubmitFail, match="exit code 127"):
        slurm.SlurmScheduler.parse_logs(5808780, None)


def test_a_command_that_does_not_exist_is_an_answer(tmp_path: Path) -> None:
    answer = scheduling.run_command([str(tmp_path / "no such command")])
    assert answer.code == 127
    assert "no such command" in answer.said


# ---- PBS


def entry(**values: Any) -> dict[str, Any]:
    return {
        "Job_Name": "balsam-prod",
        "Job_Owner": "ada@login1",
        "job_state": "R",
        "queue": "medium",
        "project": "datascience",
        "qtime": "Wed Nov 25 03:50:00 2026",
        "stime": "Wed Nov 25 04:00:00 2026",
        "mtime": "Wed Nov 25 04:00:20 2026",
        "Resource_List": {"nodect": 2, "walltime": "01:30:00"},
        **values,
    }


def test_one_state_that_pbs_tells_and_we_do_not_know_costs_no_other_job() -> None:
    now = time.mktime(time.strptime("2026-11-25 04:10:00", "%Y-%m-%d %H:%M:%S"))
    found = {
        "1.pbs": entry(job_state="?"),
        "2[].pbs": entry(),
        "3.pbs": entry(),
        "4.pbs": entry(job_state="F", Exit_status=271),
        "5.pbs": entry(job_state="F", Exit_status=1),
        "6.pbs": {"job_state": "Q"},
    }
    jobs = {job.id: job for job in pbs.parse_jobs(json.dumps({"Jobs": found}), now)}
    assert {number: job.state for number, job in jobs.items()} == {
        1: State.UNKNOWN,
        3: State.RUNNING,
        4: State.FINISHED,
        5: State.FAILED,
        6: State.QUEUED,
    }
    assert (jobs[3].queue, jobs[3].wall_time_min, jobs[3].time_remaining_min, jobs[3].num_nodes) == ("prod", 90, 80, 2)
    assert jobs[5].failed_at_once
    assert not jobs[4].failed_at_once
    assert pbs.parse_jobs("", now) == []


def test_pbs_commands_and_ids() -> None:
    command = pbs.submit_command(REQUEST)
    assert command[:3] == ["qsub", "-N", "balsam-regular"]
    assert not any("select" in word for word in command)  # it stands in the template, with the machine's own words
    assert command[command.index("-v") + 1] == 'BALSAM_SITE_PATH="/a site"'
    assert pbs.environment_words({"A": "1,2", "B": "x"}) == 'A="1,2",B=x'
    assert pbs.parse_submit("1842.polaris-pbs-01\n") == 1842
    assert pbs.parse_queue("Job ID   Username\n------ ----\n1842.polari* ada  prod\n7[].pbs ada\n") == ["1842"]


def test_pbs_without_history_is_asked_without_it(scripted: Scripted) -> None:
    replies = iter(
        [
            Answer(35, "", "qstat: PBS is not configured to maintain job history"),
            Answer(153, "", "qstat: Unknown Job Id 9.pbs"),
        ]
    )
    pbs.run_command = lambda command, **_: next(replies)  # type: ignore[assignment]
    assert pbs.PBSScheduler.find(9) is None


# ---- Cobalt

QSTAT = """JobID   State     WallTime  Queue    Nodes  Project  TimeRemaining  QueuedTime  JobName
==========================================================================================
417001  running   01:00:00  default  128    datasci  00:40:00       00:05:10    balsam-default
417002  a_hold    01:00:00  default  128    datasci  N/A            00:05:10    N/A
417003  starting  24:00:00  debug    8      datasci  24:00:00       00:00:00
"""
COBALT_LOG = """Tue Feb 11 12:11:47 2020 +0000 (UTC) submitted with cwd set to: /x
Tue Feb 11 12:12:00 2020 +0000 (UTC) Info: COBALT_STARTTIME=1581423120
Tue Feb 11 12:12:10 2020 +0000 (UTC) Info: task completed normally with an exit code of {code}; initiating job removal
"""


def test_cobalts_queue_is_read_with_states_that_we_do_not_know() -> None:
    jobs = cobalt.parse_queue(QSTAT)
    assert [(job.id, job.state, job.queue) for job in jobs] == [
        (417001, State.RUNNING, "default"),
        (417002, State.UNKNOWN, "default"),
        (417003, State.RUNNING, "debug"),
    ]
    assert (jobs[0].num_nodes, jobs[0].wall_time_min, jobs[0].time_remaining_min) == (128, 60, 40)


def test_cobalts_log_tells_when_a_job_ended_and_how(scripted: Scripted, tmp_path: Path) -> None:
    script = tmp_path / "q.sh"
    cobalt.log_of(script).write_text(COBALT_LOG.format(code=0))
    scripted.answers = {"qstat": Answer(1, "", "")}
    times = cobalt.CobaltScheduler.parse_logs(5, script)
    assert str(times.start_time) == "2020-02-11 12:12:00"
    assert str(times.end_time) == "2020-02-11 12:12:10"
    cobalt.log_of(script).write_text(COBALT_LOG.format(code=1))
    with pytest.raises(DelayedSubmitFail):
        cobalt.CobaltScheduler.parse_logs(5, script)
    assert cobalt.parse_log("Tue Feb 11 12:11:47 2020 +0000 (UTC) submitted\n", 5) is None


def test_cobalt_says_nothing_of_a_user_without_jobs(scripted: Scripted) -> None:
    scripted.answers = {"qstat": Answer(1, "", "")}
    assert list(cobalt.CobaltScheduler.get_statuses(user="u")) == []
    assert cobalt.parse_submit("Job routed to queue default\n417001\n") == 417001
    assert cobalt.environment_words({"A": "x:y", "B": "z"}) == r"A=x\:y:B=z"
