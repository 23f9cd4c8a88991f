"""The launcher's parts, its job template, and how it treats the modes that it starts."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import psutil
import pytest

from deephyper_balsam.common.bundled_files import folder
from deephyper_balsam.launcher import main as launcher


def test_tags_may_hold_anything_but_need_an_equals_sign() -> None:
    assert launcher.parse_tags(["a=b c", "d=e=f", "g="]) == {"a": "b c", "d": "e=f", "g": ""}
    with pytest.raises(click.BadParameter, match="KEY=VALUE"):
        launcher.parse_tags(["a"])


def test_partitions() -> None:
    assert launcher.parse_partition("mpi:2:a=b:c=d") == {
        "job_mode": "mpi",
        "num_nodes": 2,
        "filter_tags": {"a": "b", "c": "d"},
    }
    assert launcher.parse_partition("serial:1")["filter_tags"] == {}
    for bad in ("mpi", "mpi:x", "other:1"):
        with pytest.raises(click.BadParameter, match="MODE:NUM_NODES"):
            launcher.parse_partition(bad)


def test_the_first_failure_is_the_launchers_exit_code() -> None:
    assert launcher.exit_code([0, 0]) == 0
    assert launcher.exit_code([0, 3, 4]) == 3
    assert launcher.exit_code([-9]) == 137


@pytest.mark.parametrize("mode", ["mpi", "serial"])
def test_the_modes_are_balsams_through_ours_which_keep_their_end(mode: str) -> None:
    assert launcher.mode_script(mode)[1].endswith(f"deephyper_balsam/launcher/{mode}_mode.py")


def test_a_mode_that_ends_ends_the_supervision_and_keeps_its_code() -> None:
    running = [subprocess.Popen(["bash", "-c", f"exit {code}"]) for code in (0, 5)]
    assert launcher.supervise(running, lambda: False) == [0, 5]


def test_a_stop_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = subprocess.Popen(["bash", "-c", f"trap 'exit 6' TERM; touch {ready}; while true; do sleep 0.05; done"])
    assert launcher.supervise([child], ready.exists) == [6]


def test_a_mode_that_ignores_the_stop_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launcher, "_STOP_GRACE_S", 0.3)
    ready = tmp_path / "ready"
    child = subprocess.Popen(["bash", "-c", f"trap '' TERM; touch {ready}; while true; do sleep 0.05; done"])
    assert launcher.supervise([child], ready.exists) == [-9]
    child.wait(5)


def render(monkeypatch: pytest.MonkeyPatch, site: str, **values: object) -> str:
    from balsam.site.script_template import ScriptTemplate

    monkeypatch.setenv("BALSAM_SITE_PATH", site)
    template = ScriptTemplate(folder("site-configs") / "local" / "job-template.sh")
    defaults = {"project": "local", "queue": "local", "num_nodes": 1, "wall_time_min": 7, "job_mode": "mpi"}
    return template.render(**{**defaults, **values})


def test_the_job_script_hands_every_word_to_the_launcher_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from balsam.schemas import JobMode

    site = tmp_path / 'it\'s a "site" $HOME `x`'
    site.mkdir()
    shows = tmp_path / "shows.py"
    shows.write_text(f"#!{sys.executable}\nimport os, sys\nprint(repr((os.getcwd(), sys.argv[1:])))")
    shows.chmod(0o755)
    text = render(
        monkeypatch,
        str(site),
        job_mode=JobMode.serial,
        filter_tags={"a b": "it's $x", "c": 'd"e'},
        partitions=" --part JobMode.mpi:1:k=v w --part serial:2",
    )
    script = tmp_path / "script.sh"
    script.write_text(text)
    environment = {"DEEPHYPER_BALSAM_PYTHON": str(shows), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cwd, arguments = eval(done.stdout)
    assert cwd == str(site)
    assert arguments == [
        *shlex.split("-m deephyper_balsam.launcher.main --loopback --poll-s 0.25 -j serial -t 7"),
        *("--tag", "a b=it's $x", "--tag", 'c=d"e', "--part", "mpi:1:k=v w", "--part", "serial:2"),
    ]


def test_the_job_script_needs_neither_tags_nor_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    text = render(monkeypatch, "/site", filter_tags={}, partitions="")
    assert text.rstrip().endswith("-j mpi -t 7")


def make_run(tmp_path: Path, command: str) -> object:
    from balsam.site.launcher import NodeSpec

    from deephyper_balsam.sites.local import LocalRun

    return LocalRun(
        cmdline=command,
        preamble=None,
        envs={},
        cwd=tmp_path,
        outfile_path=tmp_path / "job.out",
        node_spec=NodeSpec(node_ids=["n"], hostnames=["n"], cpu_ids=[[1000, 1023]]),
        ranks_per_node=1,
        threads_per_rank=1,
        threads_per_core=1,
        launch_params={},
        gpus_per_rank=0,
    )


def test_a_run_is_not_pinned_to_the_cpu_ids_that_it_was_given(tmp_path: Path) -> None:
    run = make_run(tmp_path, "echo done; exit 4")
    before = psutil.Process().cpu_affinity()
    run.start()
    assert run.wait(timeout=10) == 4
    assert psutil.Process().cpu_affinity() == before
    assert (tmp_path / "job.out").read_text() == "done\n"


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "], ids=["obeys", "ignores SIGTERM"])
def test_a_run_is_ended_with_every_process_that_it_started(tmp_path: Path, trap: str) -> None:
    from balsam.platform import TimeoutExpired

    run = make_run(tmp_path, f"({trap}touch ready; while true; do sleep 0.05; done) & sleep 66; true")
    run.start()
    deadline = time.monotonic() + 10
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    members = psutil.Process(run._process.pid).children(recursive=True)
    assert members
    run.terminate()
    try:
        run.wait(timeout=1)
    except TimeoutExpired:
        assert trap
        run.kill()
    _, alive = psutil.wait_procs(members, timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_node_takes_as_many_jobs_as_the_packing_count_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from balsam.site.launcher.node_manager import InsufficientResources, NodeManager

    from deephyper_balsam.sites.local import LocalNode

    manager = NodeManager(LocalNode.get_job_nodelist(), allow_node_packing=True)
    wanted = SimpleNamespace(num_nodes=1, ranks_per_node=1, threads_per_rank=2, threads_per_core=1, gpus_per_rank=0)
    for number in range(64):
        manager.assign(SimpleNamespace(id=number, node_packing_count=64, **vars(wanted)))
    with pytest.raises(InsufficientResources):
        manager.assign(SimpleNamespace(id=64, node_packing_count=64, **vars(wanted)))
    monkeypatch.setenv("DEEPHYPER_BALSAM_SCHEDULER_ID", "17")
    assert LocalNode.get_scheduler_id() == 17
    monkeypatch.delenv("DEEPHYPER_BALSAM_SCHEDULER_ID")
    assert LocalNode.get_scheduler_id() is None
