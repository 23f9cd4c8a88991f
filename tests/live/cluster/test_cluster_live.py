"""A Balsam of one's own on a cluster of several hosts: on the login host, inside an allocation, by one command."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from deephyper_balsam.common.bundled_files import folder
from live.waiting import wait_for

from .lab import ACCOUNT, LOGIN, NODES, QUEUE, ClusterLab

pytestmark = [pytest.mark.live, pytest.mark.slurm]

PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("bowl")
problem.add_hyperparameter((-3.0, 3.0), "x")
"""
# Notes each run as it begins and ends: what the search says is held against it
RUN = """
import os, pathlib, time
def note(word, job):
    line = f"{word} {job.id} {os.uname().nodename} {time.time()}\\n".encode()
    file = os.open(pathlib.Path(__file__).with_suffix(".notes"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line)
    os.close(file)
def take(limit):
    "Take one of as many places as the file says, whichever trial Balsam starts first; they are more once it is raised"
    for number in range(int(limit.read_text() or 0)):
        try:
            return limit.with_name(f"place.{number}").touch(exist_ok=False) is None
        except FileExistsError:
            pass
    return False
def run(job):
    note("began", job)
    limit = pathlib.Path(__file__).with_suffix(".limit")
    while limit.exists() and not take(limit):
        time.sleep(0.5)
    time.sleep(SECONDS)
    note("ended", job)
    return -job["x"] ** 2
"""
SEARCH = ("--problem", "problem.py", "--run", "run.py", "--method", "random", "--seed", "1")
CUTS = """
import collections, json, sys
from deephyper_balsam.store import cuts
from deephyper_balsam.store.gateway import Gateway
gateway = Gateway()
trials = {row["id"]: row["tags"]["trial"] for row in gateway.jobs({"search": sys.argv[1]}) if "trial" in row["tags"]}
found = cuts.read_cuts(gateway, list(trials))
print(json.dumps(collections.Counter(trials[event["job_id"]] for event in found)))
"""
_UNSEEN_S = 5.0  # a run that has just begun, and is cut, may not be known to run


class Place:
    """A user's folder on the cluster, with a problem whose evaluations take so many seconds."""

    def __init__(self, lab: ClusterLab, name: str, seconds: float) -> None:
        self.lab, self.folder = lab, lab.shared / name
        self.folder.mkdir()
        (self.folder / "problem.py").write_text(PROBLEM)
        (self.folder / "run.py").write_text(RUN.replace("SECONDS", str(seconds)))

    def call(self, *words: str, host: str = LOGIN, timeout_s: float = 600, **variables: str) -> str:
        done = self.lab.on(host, *words, folder=self.folder, timeout_s=timeout_s, **variables)
        assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}\n{self.logs()}"
        return done.stdout

    def cli(self, *words: str, **options: Any) -> str:
        return self.call("deephyper-balsam", *words, **options)

    @contextlib.contextmanager
    def balsam(self, directory: str, *options: str) -> Iterator[dict[str, str]]:
        """Run the server in a folder of this place on the login host; the variables that lead to it."""
        self.cli("server", "up", "--dir", directory, *options)
        try:
            found = json.loads(self.cli("server", "status", "--dir", directory, "--json"))
            assert found["url"].startswith("https://10."), found
            yield found["env"]
        finally:
            self.cli("server", "down", "--dir", directory)
            wait_for(lambda: not queue(self.lab), "the queue to be empty: nothing keeps nodes without a server", 60)

    def notes(self) -> list[tuple[str, int, str, float]]:
        """Return what the runs noted: word, trial, node and time."""
        path = self.folder / "run.notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(word, int(trial), node, float(at)) for word, trial, node, at in map(str.split, lines)]

    def check(self, name: str, env: dict[str, str], count: int, kills: list[float]) -> None:
        """Check that `count` trials were evaluated, none was lost, and none repeated unless it was cut."""
        rows = json.loads(self.cli("search", "results", name, "--json", **env))
        status = {row["job_id"]: row["job_status"] for row in rows}
        assert len(status) == len(rows)
        assert Counter(status.values())["DONE"] == count, (status, self.logs())
        assert set(status.values()) <= {"DONE", "CANCELLED"}  # withdrawn before they began, as an allocation ended
        cuts = {int(key): value for key, value in json.loads(self.call("python", "-c", CUTS, name, **env)).items()}
        began, ended = Counter[int](), Counter[int]()
        for word, trial, _, at in self.notes():
            if word == "ended":
                ended[trial] += 1
            elif not any(0 <= kill - at < _UNSEEN_S for kill in kills):
                began[trial] += 1
        for trial, word in status.items():
            assert (ended[trial] > 0) == (word == "DONE"), (trial, word, self.notes())
            assert max(ended[trial], began[trial]) - 1 <= cuts.get(trial, 0), (trial, self.notes(), cuts)

    def logs(self) -> str:
        kinds = ("*.out", "*/logs/*.log", "*/site/log/*", "*/site/qsubmit/*.output", "*/scripts/*.output")
        files = [path for kind in kinds for path in self.folder.glob(kind)]
        said = [f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files]
        return "\n".join([*said, self.lab.run("squeue").stdout, self.lab.run("sinfo").stdout])


@pytest.mark.parametrize("mode", ["mpi", pytest.param("serial", marks=pytest.mark.long)])
def test_a_server_on_the_login_host_serves_three_nodes(lab: ClusterLab, mode: str) -> None:
    place, name = Place(lab, f"login-{mode}", 0.1), f"login-{mode}"
    with place.balsam("D", "--listen", "auto", "--config", "slurm", "-A", ACCOUNT, "-q", QUEUE) as env:
        shape = ["--nodes", "3", "--evals-per-node", "2", "--wall-time-min", "30", "--job-mode", mode]
        asked = ["--queue", QUEUE, "--project", ACCOUNT, "--max-evals", "40"]
        said = place.cli("search", "run", name, *SEARCH, "--site", "slurm", *shape, *asked, **env)
        assert "40 done" in said, place.logs()
        place.check(name, env, 40, [])
        assert {node for _, _, node, _ in place.notes()} == set(NODES)


def queue(lab: ClusterLab) -> list[str]:
    """Return the batch jobs that are queued or run."""
    return lab.run("squeue", "-h", "-o", "%A").stdout.split()


def test_a_chain_of_allocations_with_all_in_them_ends_a_search_with_exactly_its_number(lab: ClusterLab) -> None:
    place = Place(lab, "chain", 0.5)
    limit = place.folder / "run.limit"
    limit.write_text("4")
    machine = ["--standalone", "--config", "slurm", "-n", "3", "-t", "3", "-q", QUEUE, "-A", ACCOUNT]
    said = place.cli(
        "search", "submit", "chain", *SEARCH, "--max-evals", "14", *machine, "--chain", "3", "--spare-first-node"
    )
    assert "Submitted batch jobs" in said
    wait_for(lambda: len(place.notes()) >= 8, "four evaluations", 300)
    found = json.loads(place.cli("server", "status", "--dir", "chain.balsam", "--json"))
    assert "4 done" in place.cli("search", "status", "chain", **found["env"])  # it is looked at from outside
    wait_for(lambda: len(queue(lab)) == 2, "the wall time of the first batch job", 400)
    limit.write_text("1000")
    wait_for(lambda: not queue(lab), "the end of all batch jobs", 400)
    with place.balsam("chain.balsam") as env:
        place.check("chain", env, 14, [])
    assert {node for _, _, node, _ in place.notes()} == set(NODES[1:])
    outputs = [path.read_text() for path in sorted(place.folder.glob("chain.balsam/scripts/*.output"))]
    assert ["the wall time is near" in text for text in outputs] == [True, False], place.logs()
    assert "14 done" in outputs[-1]  # and the third was withdrawn


@pytest.mark.long
def test_a_search_goes_on_each_time_the_first_node_of_its_allocation_dies(lab: ClusterLab) -> None:
    place, draw, kills = Place(lab, "kill", 5), random.Random(16), []
    script = str(folder("jobscripts") / "slurm-standalone.sh")
    options = ["kill", *SEARCH, "--max-evals", "16"]
    asked = ["-A", ACCOUNT, "-p", QUEUE, "-N", "2", "-t", "20"]
    for number in range(4):
        seen = len(place.notes())
        place.call("sbatch", "--no-requeue", *asked, "-o", f"{number}.out", script, *options)
        if number == 3:
            break
        wait_for(lambda seen=seen: len(place.notes()) > seen, "an evaluation of this allocation", 300)
        time.sleep(draw.uniform(0, 8))
        [first] = lab.run("squeue", "-h", "-o", "%B").stdout.split()
        kills.append(time.time())
        lab.kill_node(first)
        lab.boot_node(first)
        lab.wait_until_idle()
    wait_for(lambda: not queue(lab), "the end of all batch jobs", 900)
    with place.balsam("kill.balsam") as env:
        place.check("kill", env, 16, kills)
    assert "16 done" in (place.folder / "3.out").read_text(), place.logs()


def test_quickstart_on_a_cluster_needs_nothing_but_an_empty_folder(lab: ClusterLab) -> None:
    place = lab.shared / "quickstart"
    place.mkdir()
    asked = ["--config", "slurm", "-A", ACCOUNT, "-q", QUEUE, "-n", "2", "-t", "30", "--max-evals", "6"]
    done = lab.on(LOGIN, "deephyper-balsam", "quickstart", *asked, "--problem", "ackley", folder=place, timeout_s=600)
    assert done.returncode == 0, done.stdout
    assert "6 done" in done.stdout
    assert "server up" in done.stdout
    assert (place / "quickstart" / "quickstart-1" / "report.html").is_file()
    wait_for(lambda: not queue(lab), "the end of all batch jobs")
