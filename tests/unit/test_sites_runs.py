"""How evaluations are launched on nodes: commands of `srun`, `aprun` and `mpiexec`, GPUs of ranks, nodes of a job."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from balsam.site.launcher import NodeSpec

from deephyper_balsam.sites import cobalt, pbs, runs, slurm
from deephyper_balsam.sites.scheduling import Answer


def make(cls: type, tmp_path: Path, **values: Any) -> Any:
    settings: dict[str, Any] = {
        "cmdline": "python 'my run.py' && echo done",
        "preamble": None,
        "envs": {},
        "cwd": tmp_path,
        "outfile_path": tmp_path / "job.out",
        "node_spec": NodeSpec(node_ids=["n1"], hostnames=["n1"], cpu_ids=[[0, 1, 2, 3]], gpu_ids=[[]]),
        "ranks_per_node": 2,
        "threads_per_rank": 2,
        "threads_per_core": 1,
        "launch_params": {},
        "gpus_per_rank": 0,
    }
    return cls(**{**settings, **values})


def test_srun_gets_launch_parameters_cpus_and_the_whole_command(tmp_path: Path) -> None:
    run = make(slurm.SlurmRun, tmp_path, launch_params={"mem": "4G", "hint": "nomultithread", "-m": "block"})
    words = shlex.split(run._build_cmdline())
    assert words[:2] == ["exec", "srun"]  # signals reach srun itself
    assert {"--nodes=1", "--nodelist=n1", "--ntasks=2", "--cpus-per-task=2", "--mem=4G"} < set(words)
    assert "--cpu-bind=mask_cpu:0x3,0xc" in words
    assert words[-3:] == ["bash", "-c", "python 'my run.py' && echo done"]
    bound = make(slurm.SlurmRun, tmp_path, launch_params={"cpu_bind": "cores"})._build_cmdline()
    assert bound.count("--cpu-bind") == 1
    assert "--cpu-bind=cores" in bound


def test_the_worker_of_serial_mode_is_given_its_whole_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "64")
    whole = NodeSpec(node_ids=["n1", "n2"], hostnames=["n1", "n2"])
    run = make(slurm.SlurmRun, tmp_path, node_spec=whole, ranks_per_node=1, threads_per_rank=1)
    words = shlex.split(run._build_cmdline())
    assert {"--cpus-per-task=64", "--cpu-bind=none", "--nodelist=n1,n2"} < set(words)
    polaris = shlex.split(
        make(pbs.PolarisRun, tmp_path, node_spec=whole, ranks_per_node=1, threads_per_rank=1)._build_cmdline()
    )
    assert polaris[polaris.index("--cpu-bind") + 1] == "none"


def test_a_step_is_given_the_gpus_of_its_job_unless_its_application_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert "--gpus-per-node=4" in shlex.split(make(slurm.SlurmRun, tmp_path)._build_cmdline())
    words = shlex.split(make(slurm.SlurmRun, tmp_path, launch_params={"gpus-per-task": 1})._build_cmdline())
    assert [word for word in words if word.startswith("--gpu")] == ["--gpus-per-task=1"]
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert "--gpu" not in make(slurm.SlurmRun, tmp_path)._build_cmdline()


@pytest.mark.parametrize(
    ("cls", "variable"),
    [
        (slurm.SlurmPinnedRun, "CUDA_VISIBLE_DEVICES"),
        (slurm.SlurmAmdPinnedRun, "ROCR_VISIBLE_DEVICES"),
        (pbs.AuroraPinnedRun, "ZE_AFFINITY_MASK"),
    ],
)
def test_a_run_of_serial_mode_sees_its_gpus_by_the_name_of_its_machine(
    cls: type, variable: str, tmp_path: Path
) -> None:
    spec = NodeSpec(node_ids=["n"], hostnames=["n"], cpu_ids=[[0]], gpu_ids=[["1.0", "1.1"]])
    run = make(cls, tmp_path, node_spec=spec, ranks_per_node=1, cmdline=f"echo ${variable}")
    run.start()
    assert run.wait(timeout=30) == 0
    assert (tmp_path / "job.out").read_text().strip() == "1.0,1.1"


def test_frontiers_runs_get_cores_beside_their_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "frontier1")
    monkeypatch.setattr(slurm, "run_command", lambda command, **_: Answer(0, "frontier1\n", ""))
    (node,) = slurm.FrontierNode.get_job_nodelist()
    given = [node.assign(job, num_cpus=7, num_gpus=1, occupancy=1 / 8) for job in range(8)]
    assert [(min(part["cpu_ids"]), max(part["cpu_ids"]), *part["gpu_ids"]) for part in given[:2]] == [
        (1, 7, 4),
        (9, 15, 5),
    ]
    assert (min(given[7]["cpu_ids"]), given[7]["gpu_ids"]) == (57, [1])


@pytest.mark.parametrize(
    ("cls", "local_rank", "variable"),
    [
        (slurm.SlurmRun, "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES"),
        (slurm.SlurmAmdRun, "SLURM_LOCALID", "ROCR_VISIBLE_DEVICES"),
        (pbs.PolarisRun, "PALS_LOCAL_RANKID", "CUDA_VISIBLE_DEVICES"),
        (pbs.AuroraRun, "PALS_LOCAL_RANKID", "ZE_AFFINITY_MASK"),
    ],
)
def test_each_rank_sees_its_own_gpus_alone(cls: type, local_rank: str, variable: str, tmp_path: Path) -> None:
    spec = NodeSpec(node_ids=["n"], hostnames=["n"], cpu_ids=[[0, 1]], gpu_ids=[["3", "2", "1", "0"]])
    run = make(cls, tmp_path, node_spec=spec, gpus_per_rank=2, cmdline=f"echo ${variable}")
    script = shlex.split(run._build_cmdline())[-1]
    seen = [
        subprocess.check_output(["bash", "-c", script], env={local_rank: rank, variable: "9"}, text=True).strip()
        for rank in ("0", "1")
    ]
    assert seen == ["3,2", "1,0"]


def test_mpiexec_binds_ranks_to_the_cpus_that_balsam_chose(tmp_path: Path) -> None:
    words = shlex.split(make(pbs.PolarisRun, tmp_path, launch_params={"pmi": "pmix"})._build_cmdline())
    assert words[1:8] == ["mpiexec", "-n", "2", "--ppn", "2", "--hosts", "n1"]
    assert words[8:12] == ["--cpu-bind", "list:0,1:2,3", "--depth", "2"]
    assert "--pmi=pmix" in words
    several = NodeSpec(node_ids=["a", "b"], hostnames=["a", "b"])
    words = shlex.split(make(pbs.PolarisRun, tmp_path, node_spec=several, ranks_per_node=4)._build_cmdline())
    assert words[words.index("--cpu-bind") + 1 : words.index("--cpu-bind") + 4] == ["depth", "--depth", "8"]


def test_on_aurora_ranks_are_bound_to_cores_and_never_to_those_of_the_system(tmp_path: Path) -> None:
    spec = NodeSpec(node_ids=["n"], hostnames=["n"], cpu_ids=[[41, 42, 43, 44, 53, 54, 55, 56]], gpu_ids=[[]])
    words = shlex.split(make(pbs.AuroraRun, tmp_path, node_spec=spec, ranks_per_node=2)._build_cmdline())
    assert words[words.index("--cpu-bind") + 1] == "list:41,42,43,44:53,54,55,56"
    several = NodeSpec(node_ids=["a", "b"], hostnames=["a", "b"])  # whole nodes
    words = shlex.split(make(pbs.AuroraRun, tmp_path, node_spec=several, ranks_per_node=12)._build_cmdline())
    ranks = [part.split(",") for part in words[words.index("--cpu-bind") + 1].removeprefix("list:").split(":")]
    assert [int(rank[0]) for rank in ranks] == [1, 9, 17, 25, 33, 41, 53, 61, 69, 77, 85, 93]
    assert {len(rank) for rank in ranks} == {8}
    worker = make(pbs.AuroraRun, tmp_path, node_spec=several, ranks_per_node=1)  # of serial mode
    words = shlex.split(worker._build_cmdline())
    assert words[words.index("--cpu-bind") + 1] == "none"


def test_aprun_is_started_in_place_of_the_shell(tmp_path: Path) -> None:
    words = shlex.split(make(cobalt.ThetaRun, tmp_path, preamble=["true"])._build_cmdline())
    assert words[:2] == ["exec", "aprun"]


def test_launch_parameters_become_options() -> None:
    assert runs.launch_options({"mem": "4G", "c": 2, "exclusive": "", "--x": 1, "cpu_bind": "no"}, ("cpu-bind",)) == [
        *("--mem=4G", "-c", "2", "--exclusive", "--x=1")
    ]


def test_cpu_ids_are_those_that_exist_cores_before_their_second_threads(tmp_path: Path) -> None:
    for cpu, siblings in {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}.items():
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert runs.cpu_ids([5, 0, 4, 1], tmp_path) == [0, 1, 4, 5]
    assert set(runs.cpu_ids()) == os.sched_getaffinity(0)


def test_a_pinned_run_has_its_cpus_and_the_launcher_keeps_all(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    first = min(before)
    spec = NodeSpec(node_ids=["n"], hostnames=["n"], cpu_ids=[[first, 4000]])
    code = 'python3 -c "import os; print(os.sched_getaffinity(0))"'
    run = make(runs.PinnedRun, tmp_path, node_spec=spec, ranks_per_node=1, cmdline=code)
    run.start()
    assert run.wait(timeout=30) == 0
    assert (tmp_path / "job.out").read_text().strip() == f"{{{first}}}"
    assert os.sched_getaffinity(0) == before


def until_ended(run: Any) -> int:
    deadline = time.monotonic() + 30
    while (code := run.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(code)


def test_a_run_that_a_signal_ended_counts_as_running_until_its_launcher_may_have_been_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.EndsWithAllocation, "held_s", 1e9)
    run = make(runs.PinnedRun, tmp_path, cmdline="kill -TERM $$")
    run.start()
    run._process.wait(30)
    assert run.poll() is None
    monkeypatch.setattr(runs.EndsWithAllocation, "held_s", 0.0)
    assert until_ended(run) in (-15, 143)  # the signal was for it alone
    failed = make(runs.PinnedRun, tmp_path, cmdline="exit 3")
    failed.start()
    assert until_ended(failed) == 3


def test_a_run_that_slurm_ends_with_its_job_is_left_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ["CANCELLED"]
    monkeypatch.setattr(runs, "run_command", lambda command, **_: Answer(0, f"JobId=1 JobState={state[0]} ", ""))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    run = make(slurm.SlurmPinnedRun, tmp_path, cmdline="exit 1")
    run.start()
    run._process.wait(30)
    assert run.poll() is None
    state[0] = "RUNNING"
    other = make(slurm.SlurmPinnedRun, tmp_path, cmdline="exit 1")
    other.start()
    assert until_ended(other) == 1


def test_the_nodes_of_a_slurm_job_with_their_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(RuntimeError, match="no Slurm job"):
        slurm.SlurmNode.get_job_nodelist()
    monkeypatch.setenv("SLURM_JOB_NODELIST", "nid[000001-000002]")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(slurm, "run_command", lambda command, **_: Answer(0, "nid000001\nnid000002\n", ""))
    nodes = slurm.SlurmNode.get_job_nodelist()
    assert [(node.node_id, node.hostname, node.idle_gpus) for node in nodes] == [
        ("nid000001", "nid000001", [0, 1, 2, 3]),
        ("nid000002", "nid000002", [0, 1, 2, 3]),
    ]
    assert slurm.SlurmNode.get_scheduler_id() == 77
    assert slurm.gpus_on_node({"SLURM_JOB_GPUS": "0,3"}) == 2
    assert slurm.gpus_on_node({}) == 0


def test_a_host_that_pbs_names_for_each_chunk_is_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "nodes"
    file.write_text("x3005c0s13b0n0.hsn\nx3005c0s13b0n0.hsn\nx3006c0s1b0n0.hsn\n")
    monkeypatch.setenv("PBS_NODEFILE", str(file))
    monkeypatch.setenv("PBS_JOBID", "1842.polaris-pbs-01")
    nodes = pbs.PolarisNode.get_job_nodelist()
    assert [node.hostname for node in nodes] == ["x3005c0s13b0n0.hsn", "x3006c0s1b0n0.hsn"]
    assert pbs.PolarisNode.get_scheduler_id() == 1842
    assert len(pbs.AuroraNode.get_job_nodelist()[0].idle_gpus) == 12
