"""`search submit` on the fake of Balsam's API: the steps, what each refuses, the script, what is recorded."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.cli import main
from deephyper_balsam.common.bundled_files import folder
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.lease import LeaseKeeper, read_leases
from deephyper_balsam.store.record import find_record

pytest_plugins = ["balsam_fixtures"]

FILE = """
from deephyper_balsam import HpProblem
problem = HpProblem("line")
problem.add_hyperparameter((-3.0, 3.0), "x")
def run(job):
    return job["x"]
"""
OPTIONS = ["--problem", "line.py", "--site", "lab", "--max-evals", "40", "-n", "8", "-t", "60"]
STEPS = ["problem", "run", "name", "site", "nodes", "queue", "project", "template"]


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def passed(self) -> list[str]:
        """The steps that were shown."""
        return [line.split()[1] for line in (self.out + self.err).splitlines() if line.startswith("ok ")]


Call = Callable[..., Said]


@pytest.fixture
def machine(api: BalsamApi, site: VirtualSite, tmp_path: Path) -> dict[str, Any]:
    """The site as its agent reports it, with a folder that can be read from here."""
    path = tmp_path / "a site"
    path.mkdir()
    for name in ("settings.yml", "job-template.sh"):
        shutil.copy(folder("site-configs") / "slurm" / name, path / name)
    row = api.sites[site.id]
    row["path"] = str(path)
    row["optional_batch_job_params"] = {"search": "", "chain": ""}
    row["allowed_projects"] = ["datascience"]
    row["allowed_queues"] = {
        "prod": {"max_nodes": 100, "max_walltime": 120, "max_queued_jobs": 2},
        "debug": {"max_nodes": 2, "max_walltime": 60, "max_queued_jobs": 1},
    }
    return row


@pytest.fixture
def submit(
    machine: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    client_yml: Path,
    tmp_path: Path,
    modules_as_they_were: None,
) -> Call:
    for name in [name for name in os.environ if name.startswith("BALSAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client_yml))
    work = tmp_path / "work"
    work.mkdir()
    (work / "line.py").write_text(FILE)
    monkeypatch.chdir(work)

    def call(*arguments: str, name: str = "line-1") -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["search", "submit", name, *arguments], prog_name="deephyper-balsam")
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        assert "Traceback" not in out + err
        return Said(ended.value.code, out, err)

    return call


def nothing_changed(api: BalsamApi) -> bool:
    return not [request for request in api.requests if request.method != "GET"]


def test_all_steps_pass_and_the_batchjob_carries_the_driver(
    submit: Call, api: BalsamApi, gateway: Gateway, site: VirtualSite, tmp_path: Path
) -> None:
    said = submit(*OPTIONS, "-q", "prod", "-j", "serial", "--evals-per-node", "2", "--chain", "3")
    assert said.code == 0, said.err
    assert said.passed == STEPS
    [row] = api.batch_jobs.values()
    assert row["optional_params"] == {"search": "line-1", "chain": "2"}
    assert (row["num_nodes"], row["wall_time_min"], row["job_mode"]) == (8, 60, "serial")
    assert (row["queue"], row["project"], row["filter_tags"]) == ("prod", "datascience", {"search": "line-1"})
    record = find_record(gateway, "line-1")
    assert record.settings["num_workers"] == 16  # the model is laid out for what the allocation runs at once
    assert record.settings["allocation"] is None  # the driver inside asks for none beside its own
    assert (record.settings["max_evals"], record.settings["asked_for"]["log_dir"]) == (40, str(tmp_path / "work"))
    [lease] = read_leases(gateway, "line-1")["line-1"]
    assert lease.why == f"submitted as BatchJob {row['id']}"
    looking = ("balsam queue ls", "search status line-1", "search watch line-1")
    for word in (f"BatchJob {row['id']}", *looking, "24 node-hours", "results.csv"):
        assert word in said.out


def test_the_record_is_there_before_the_allocation_can_begin(submit: Call, api: BalsamApi) -> None:
    assert submit(*OPTIONS, "-q", "prod").code == 0
    made = [request.path for request in api.requests if request.method == "POST"]
    assert made[-1].strip("/") == "batch-jobs"


def test_a_dry_run_prints_the_whole_script_and_submits_nothing(submit: Call, api: BalsamApi, tmp_path: Path) -> None:
    said = submit(*OPTIONS, "-q", "prod", "--chain", "2", "--dry-run")
    assert said.code == 0, said.err
    assert said.out.startswith("#!/bin/bash\n")
    assert said.out.rstrip().endswith("-j mpi -t 60 --tag 'search=line-1' --chain 1 'line-1'")
    assert f"export BALSAM_SITE_PATH='{tmp_path / 'a site'}'" in said.out
    assert said.passed == STEPS
    assert "Nothing was submitted" in said.err
    assert nothing_changed(api)


def test_a_dry_run_says_when_the_sites_folder_is_elsewhere(
    submit: Call, machine: dict[str, Any], api: BalsamApi
) -> None:
    machine["path"] = "/on/another/machine"
    said = submit(*OPTIONS, "-q", "prod", "--dry-run")
    assert (said.code, said.out) == (0, "")
    assert "/on/another/machine cannot be read from here" in said.err
    assert nothing_changed(api)


@pytest.mark.parametrize(
    ("words", "passed", "message"),
    [
        (["--problem", "nothing.py"], 0, "nothing.py does not exist"),
        (["--problem", "line.py:missing"], 0, "has no 'missing'"),
        (["--run", "line.py:walk"], 1, "has no 'walk'"),
        (["--run", "line.py:problem"], 1, "a function that takes a job is needed"),
        (["--site", "moon"], 2, "There is no Balsam site 'moon'"),
        (["--site", "lab,moon"], 0, "runs at one site"),
        (["-n", "101"], 5, "the queue prod takes 1 to 100 nodes, but got 101"),
        (["-t", "121"], 5, "the queue prod allows at most 120 minutes, but got 121"),
        (["-q", "night"], 4, "allows are prod, debug, but got 'night'"),
        (["-A", "astro"], 4, "allows are datascience, but got 'astro'"),
        (["--num-nodes-per-eval", "9"], 4, "An evaluation has 9 nodes, but the allocation has 8"),
        (["--eval-timeout", "7200"], 4, "no launcher would ever start one"),
        (["-q", "debug", "-n", "1", "--chain", "2"], 5, "one job of yours at a time in the queue debug"),
        (["--chain", "0"], 0, "Invalid value for '--chain'"),
        (["-j", "threads"], 0, "Invalid value for '-j'"),
    ],
)
def test_the_first_step_that_fails_says_why_and_nothing_is_changed(
    words: list[str], passed: int, message: str, submit: Call, api: BalsamApi
) -> None:
    said = submit(*OPTIONS, "-q", "prod", *words)
    assert said.code == 2
    assert message in said.err
    assert said.err.count("Error:") == 1
    assert said.passed == STEPS[:passed]
    assert nothing_changed(api)


@pytest.mark.parametrize("missing", ["-n", "-t", "--problem", "--site", "--max-evals"])
def test_what_is_missing_is_named(missing: str, submit: Call, api: BalsamApi) -> None:
    place = OPTIONS.index(missing)
    said = submit(*OPTIONS[:place], *OPTIONS[place + 2 :], "-q", "prod")
    assert said.code == 2
    assert missing in said.err
    assert nothing_changed(api)


def test_of_several_queues_one_must_be_named(submit: Call, api: BalsamApi) -> None:
    said = submit(*OPTIONS)
    assert said.code == 2
    assert "allows are prod, debug, and -q says which" in said.err
    assert nothing_changed(api)


def test_a_run_function_that_stands_in_main_is_refused(submit: Call, api: BalsamApi, tmp_path: Path) -> None:
    package = tmp_path / "work" / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(FILE)
    said = submit(*OPTIONS, "-q", "prod", "--run", "pack.__main__:run")
    assert said.code == 2
    assert "stands in __main__" in said.err
    assert nothing_changed(api)


def test_a_silent_agent_a_full_queue_and_an_old_site_are_refused(
    submit: Call, machine: dict[str, Any], api: BalsamApi
) -> None:
    api.silent_sites.add(machine["id"])
    api.let_pass(600)
    said = submit(*OPTIONS, "-q", "prod")
    assert (said.code, said.passed) == (2, STEPS[:3])
    assert "was last heard of 10 min ago" in said.err
    assert "balsam site start" in said.err
    api.silent_sites.clear()
    machine["queued_jobs"] = {"7": {"queue": "prod"}, "8": {"queue": "prod"}, "9": {"queue": "debug"}}
    said = submit(*OPTIONS, "-q", "prod")
    assert (said.code, said.passed) == (2, STEPS[:5])
    assert "allows 2 jobs of yours in the queue prod, and has 2: " in said.err
    machine["queued_jobs"] = {}
    machine["optional_batch_job_params"] = {"reservation": ""}
    said = submit(*OPTIONS, "-q", "prod")
    assert (said.code, said.passed) == (2, STEPS[:7])
    assert "Add search, chain" in said.err
    assert nothing_changed(api)


def test_a_search_that_waits_is_driven_or_is_another_one_is_not_submitted_again(
    submit: Call, api: BalsamApi, gateway: Gateway, site: VirtualSite
) -> None:
    assert submit(*OPTIONS, "-q", "prod").code == 0
    [batch_job_id] = api.batch_jobs
    said = submit(*OPTIONS, "-q", "prod")
    assert said.code == 2
    assert f"BatchJob {batch_job_id} with the driver of 'line-1' is pending_submission already" in said.err
    site.end_allocation(batch_job_id)
    said = submit(*OPTIONS, "-q", "prod", "--method", "random")
    assert said.code == 2
    assert "belongs to another search" in said.err
    keeper = LeaseKeeper.claim(gateway, "line-1", site.id, sleep=lambda seconds: None)
    said = submit(*OPTIONS, "-q", "prod")
    assert said.code == 2
    assert "is being driven by process" in said.err
    keeper.leave("the test is over")
    assert len(api.batch_jobs) == 1
    said = submit(*OPTIONS, "-q", "prod")
    assert said.code == 0, said.err
    assert "line-1 goes on: 0 of 40 evaluated" in said.out


def test_a_search_that_is_complete_is_not_submitted(
    submit: Call, api: BalsamApi, gateway: Gateway, site: VirtualSite
) -> None:
    from deephyper_balsam.store.trial_rows import trial_job
    from deephyper_balsam.trial import Resources, Trial

    assert submit(*OPTIONS, "-q", "prod").code == 0
    site.end_allocation(1)
    app_id = next(row["id"] for row in gateway.apps(site.id) if row["name"] == "line_run")
    gateway.create_jobs([trial_job(Trial(0, {"x": 0.5}), "line-1", app_id, Resources(), time.time(), None)])
    [job_id] = site.acquire(1)
    site.deliver(job_id)
    options = [word if word != "40" else "1" for word in OPTIONS]
    said = submit(*options, "-q", "prod")
    assert said.code == 2
    assert "is complete: 1 of 1 evaluated" in said.err


def test_options_may_come_from_a_file(submit: Call, api: BalsamApi, tmp_path: Path) -> None:
    asked = {"problem": "line.py", "site": "lab", "max_evals": 9, "nodes": 2, "wall_time_min": 30, "queue": "prod"}
    (tmp_path / "work" / "search.yaml").write_text(yaml.safe_dump({**asked, "chain": 2}))
    assert submit("--file", "search.yaml", "-n", "3").code == 0
    [row] = api.batch_jobs.values()
    assert (row["num_nodes"], row["wall_time_min"], row["optional_params"]["chain"]) == (3, 30, "1")


def test_when_balsam_refuses_the_allocation_the_search_is_free_for_the_next_try(
    submit: Call, api: BalsamApi, gateway: Gateway
) -> None:
    api.answer_next(500, method="POST", path="batch-jobs/")
    said = submit(*OPTIONS, "-q", "prod")
    assert said.code == 3
    [lease] = read_leases(gateway, "line-1")["line-1"]
    assert lease.why == "it could not be submitted"
    assert submit(*OPTIONS, "-q", "prod").code == 0


def test_status_names_what_waits_in_the_queue_and_stopping_takes_it_out(
    submit: Call, api: BalsamApi, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit(*OPTIONS, "-q", "prod").code == 0
    with pytest.raises(SystemExit):
        main(["search", "status", "line-1"], prog_name="deephyper-balsam")
    assert "BatchJob 1, which will drive, is pending_submission" in capfd.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["search", "stop", "line-1"], prog_name="deephyper-balsam")
    assert ended.value.code == 0
    assert "BatchJob 1 is taken out of the queue" in capfd.readouterr().out
    assert api.batch_jobs[1]["state"] == "pending_deletion"
