"""What the queues of each machine allow, also where it depends on the number of nodes, and who minds it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.common.bundled_files import folder
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.errors import InputError, SettingsError
from deephyper_balsam.sites import checks, pbs, queue_limits, slurm
from deephyper_balsam.sites.configs import site_configs
from deephyper_balsam.store.allocation_request import AllocationRequest

pytest_plugins = ["balsam_fixtures"]

ROOT = Path(__file__).resolve().parents[2]
DAY = 1440
# The facilities' own pages in August 2026: queue, nodes, the most minutes that so many nodes get (0: not so many nodes)
CORNERS = {
    "polaris-pbs": [
        *[("debug", 1, 60), ("debug", 2, 60), ("debug", 3, 0)],
        *[("debug-scaling", 1, 60), ("debug-scaling", 10, 60), ("debug-scaling", 11, 0)],
        *[("prod", 9, 0), ("prod", 10, 180), ("prod", 24, 180), ("prod", 25, 360), ("prod", 99, 360)],
        *[("prod", 100, DAY), ("prod", 496, DAY), ("prod", 497, 0)],
        *[("preemptable", 1, 3 * DAY), ("preemptable", 10, 3 * DAY), ("preemptable", 11, 0)],
        *[("capacity", 1, 7 * DAY), ("capacity", 4, 7 * DAY), ("capacity", 5, 0)],
    ],
    "aurora-pbs": [
        *[("debug", 2, 60), ("debug", 3, 0), ("debug-scaling", 256, 60), ("debug-scaling", 257, 0)],
        *[("prod", 255, 0), ("prod", 256, 720), ("prod", 1024, 720), ("prod", 1025, 1080), ("prod", 1999, 1080)],
        *[("prod", 2000, DAY), ("prod", 10624, DAY), ("prod", 10625, 0)],
        *[("capacity", 16, 7 * DAY), ("capacity", 17, 0)],
    ],
    "perlmutter-gpu": [("regular", 1, 2 * DAY), ("regular", 1794, 2 * DAY), ("regular", 1795, 0), ("debug", 8, 30)],
    "perlmutter-cpu": [("regular", 1, 2 * DAY), ("regular", 3072, 2 * DAY), ("regular", 3073, 0), ("debug", 8, 30)],
    "frontier": [
        *[("batch", 1, 120), ("batch", 91, 120), ("batch", 92, 360), ("batch", 183, 360), ("batch", 184, 720)],
        *[("batch", 9472, 720), ("batch", 9473, 0), ("extended", 64, DAY), ("extended", 65, 0)],
    ],
    "theta-knl-cobalt": [("default", 4010, DAY), ("default", 4011, 0), ("debug-flat-quad", 8, 60)],
}


def limits_of(config: str, queue: str) -> queue_limits.QueueLimits:
    return queue_limits.from_settings(queue, queue_limits.read_blocks(folder("site-configs") / config)[queue])


@pytest.mark.parametrize(
    ("config", "queue", "nodes", "most"), [(name, *corner) for name, corners in CORNERS.items() for corner in corners]
)
def test_a_queue_allows_what_its_facility_says(config: str, queue: str, nodes: int, most: int) -> None:
    limits = limits_of(config, queue)
    if not most:
        assert f"nodes, but got {nodes}" in (limits.complaint(nodes, 1) or "")
        return
    assert limits.complaint(nodes, most) is None
    assert f"at most {most} minutes" in (limits.complaint(nodes, most + 1) or "")


def test_every_queue_of_every_machine_is_held_by_a_corner() -> None:
    filled_in = {name for name in (config.name for config in site_configs()) if name not in ("local", "slurm")}
    assert set(CORNERS) == filled_in
    for name, corners in CORNERS.items():
        missing = set(queue_limits.read_blocks(folder("site-configs") / name)) - {corner[0] for corner in corners}
        assert missing <= {"debug-cache-quad"}, name


def test_what_a_queue_allows_is_said_in_words() -> None:
    assert limits_of("polaris-pbs", "prod").in_words == (
        "10 to 496 nodes; 10-24 nodes 180 min, 25-99 nodes 360 min, 100-496 nodes 1440 min"
    )
    assert limits_of("polaris-pbs", "capacity").in_words == "at most 4 nodes and 10080 min"
    assert limits_of("polaris-pbs", "prod").complaint(24, 181) == (
        "the queue prod allows at most 180 minutes for 24 nodes (10 to 496 nodes; 10-24 nodes 180 min, 25-99 nodes 360 "
        "min, 100-496 nodes 1440 min), but got 181"
    )


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"max_nodes": 5, "max_walltime": 60, "min_nodes": 6}, "min_nodes <= max_nodes"),
        ({"max_nodes": 5, "max_walltime": 60, "max_walltime_from_nodes": {1: 61}}, "at most max_nodes"),
        ({"max_nodes": 5, "max_walltime": 60, "max_walltime_from_nodes": {6: 60}}, "at most max_nodes"),
        ({"max_nodes": 5, "max_walltime": 60, "max_walltime_from_nodes": [60]}, "must be like"),
        ({"max_nodes": 5, "max_walltime": 60, "max_walltime_from_nodes": {"2": 60}}, "whole numbers, but got '2'"),
        ({"max_nodes": 5, "max_walltime": "1:00"}, "max_walltime must hold whole numbers, but got '1:00'"),
        ({"max_walltime": 60}, "max_nodes must hold whole numbers, but got None"),
    ],
)
def test_a_block_that_makes_no_sense_is_refused(block: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(said)):
        queue_limits.from_settings("q", block)


@pytest.fixture
def polaris(api: BalsamApi, site: VirtualSite, tmp_path: Path) -> dict[str, Any]:
    """The site as its agent reports it, which is without what only our settings know, and its folder."""
    path = tmp_path / "polaris"
    shutil.copytree(folder("site-configs") / "polaris-pbs", path)
    (path / ".balsam-site").write_text(str(site.id))
    blocks = queue_limits.read_blocks(path)
    row = api.sites[site.id]
    kept = ("max_nodes", "max_walltime", "max_queued_jobs")
    row["allowed_queues"] = {queue: {name: block[name] for name in kept} for queue, block in blocks.items()}
    row["path"] = str(path)
    return row


def evaluator(polaris: dict[str, Any], client_yml: Path, **request: Any) -> BalsamEvaluator:
    return BalsamEvaluator(
        "apps.ackley.run:run", polaris["name"], allocation=AllocationRequest(**request), client_path=client_yml
    )


def test_a_search_does_not_ask_for_what_the_queue_refuses(polaris: dict[str, Any], client_yml: Path) -> None:
    evaluator(polaris, client_yml, nodes=24, wall_time_min=180, queue="prod")
    for request, said in (
        ({"nodes": 24, "wall_time_min": 181, "queue": "prod"}, "at most 180 minutes for 24 nodes"),
        ({"nodes": 9, "wall_time_min": 60, "queue": "prod"}, "takes 10 to 496 nodes, but got 9"),
        ({"nodes": 5, "wall_time_min": 60, "queue": "capacity"}, "takes 1 to 4 nodes, but got 5"),
        (
            {"nodes": 5, "wall_time_min": 60, "queue": "prd"},
            "allows are debug, debug-scaling, prod, preemptable, capacity",
        ),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            evaluator(polaris, client_yml, **request)


def test_of_a_site_on_another_machine_what_its_agent_reports_is_minded(
    polaris: dict[str, Any], client_yml: Path
) -> None:
    (Path(polaris["path"]) / ".balsam-site").write_text("4711")  # some other site has this path here
    evaluator(polaris, client_yml, nodes=9, wall_time_min=1440, queue="prod")
    with pytest.raises(InputError, match="at most 1440 minutes, but got 1441"):
        evaluator(polaris, client_yml, nodes=9, wall_time_min=1441, queue="prod")


def test_site_check_shows_the_limits_and_finds_a_block_that_makes_no_sense(tmp_path: Path) -> None:
    from balsam.config import Settings

    shutil.copytree(folder("site-configs") / "polaris-pbs", tmp_path / "site")
    file = tmp_path / "site" / "settings.yml"
    text = file.read_text().replace("YOUR_PROJECT", "abc")
    file.write_text(text)
    found = checks._names(tmp_path / "site", Settings(**yaml.safe_load(text)))
    assert found.ok
    assert "prod (10 to 496 nodes; 10-24 nodes 180 min" in found.detail
    file.write_text(text.replace("{10: 180,", "{10: 3h,"))
    found = checks._names(tmp_path / "site", Settings(**yaml.safe_load(text)))
    assert not found.ok
    assert "max_walltime_from_nodes must hold whole numbers, but got '3h'" in found.detail


_SHAPE = re.compile(r"^deephyper-balsam search (?:run|submit) .*$", re.MULTILINE)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "machines").glob("*.md")), ids=lambda page: page.stem)
def test_the_commands_of_a_machines_page_ask_for_what_its_queues_take(page: Path) -> None:
    for line in _SHAPE.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        config = re.search(r"--site (\S+)", line)
        found = [re.search(rf"(?:{names}) (\S+)", line) for names in ("-n|--nodes", "-t|--wall-time-min", "-q|--queue")]
        if config is None or config[1] not in CORNERS or None in found:
            continue
        nodes, minutes, queue = (match[1] for match in found if match is not None)
        assert limits_of(config[1], queue).complaint(int(nodes), int(minutes)) is None, line


@pytest.mark.parametrize("config", ["polaris-pbs", "aurora-pbs"])
def test_alcfs_templates_reach_the_outside_by_the_proxy_and_the_inside_without(config: str) -> None:
    text = (folder("site-configs") / config / "job-template.sh").read_text()
    for name in ("http_proxy", "https_proxy"):
        assert f'{name}="http://proxy.alcf.anl.gov:3128"' in text
    for name in ("no_proxy", "NO_PROXY"):
        assert re.search(rf'{name}="localhost,127\.0\.0\.1,\*\.alcf\.anl\.gov', text)
    assert "grand" not in text


def test_on_aurora_an_evaluation_has_its_cores_on_one_socket() -> None:
    node = pbs.AuroraNode("n", "n")
    given = [node.assign(job, num_cpus=8, num_gpus=1, occupancy=1 / 12) for job in range(12)]
    firsts = [1, 9, 17, 25, 33, 41, 53, 61, 69, 77, 85, 93]  # ALCF's own list
    assert [part["cpu_ids"] for part in given] == [list(range(first, first + 8)) for first in firsts]
    assert [part["gpu_ids"][0] for part in given] == [f"{gpu}.{tile}" for gpu in range(6) for tile in range(2)]
    for job in (3, 8):
        node.free(job)
    again = node.assign(20, num_cpus=8, num_gpus=1, occupancy=1 / 12)
    assert (again["cpu_ids"], again["gpu_ids"]) == (list(range(25, 33)), ["1.1"])


@pytest.mark.parametrize("threads", [1, 7, 13, 17, 25, 26, 51])
def test_on_aurora_no_evaluation_of_a_sockets_size_spans_both(threads: int) -> None:
    node = pbs.AuroraNode("n", "n")
    jobs = 0
    while node.check_fit(threads, 0, 0.001):
        cores = node.assign(jobs, num_cpus=threads, occupancy=0.001)["cpu_ids"]
        assert len(cores) == threads
        assert max(cores) < 52 or min(cores) > 52
        assert not {0, 52} & set(cores)
        jobs += 1
    assert jobs == 2 * (51 // threads)


@pytest.mark.parametrize("threads", [52, 96, 102])
def test_on_aurora_a_large_evaluation_has_half_of_its_cores_on_each_socket(threads: int) -> None:
    node = pbs.AuroraNode("n", "n")
    assert node.check_fit(threads, 12, 1.0)
    cores = node.assign(1, num_cpus=threads, num_gpus=12, occupancy=1.0)["cpu_ids"]
    assert sum(core < 52 for core in cores) == threads // 2
    assert not node.check_fit(52, 0, 0.0)


def test_a_gpu_node_of_perlmutter_gives_the_nearest_gpu_with_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "nid000001")
    answer = type("Answer", (), {"code": 0, "output": "nid000001\n", "said": ""})
    monkeypatch.setattr(slurm, "run_command", lambda command, **_: answer)
    (node,) = slurm.PerlmutterGpuNode.get_job_nodelist()
    given = [node.assign(job, num_cpus=16, num_gpus=1, occupancy=1 / 4) for job in range(4)]
    assert [(part["cpu_ids"][0], part["gpu_ids"]) for part in given] == [(0, [3]), (16, [2]), (32, [1]), (48, [0])]
    settings = yaml.safe_load((folder("site-configs") / "perlmutter-gpu" / "settings.yml").read_text())
    assert settings["launcher"]["compute_node"].endswith(".PerlmutterGpuNode")
