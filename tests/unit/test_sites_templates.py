"""Every shipped site config, rendered as Balsam's agent does it, for short and long, small and large allocations."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import yaml
from balsam.config import Settings
from balsam.schemas import JobMode
from balsam.site.script_template import ScriptTemplate

from deephyper_balsam.launcher import inside
from deephyper_balsam.sites.configs import PLACEHOLDER, SiteConfig, fill_in, site_configs

CONFIGS = site_configs()
MACHINES = [config for config in CONFIGS if config.name != "local"]
PARTITIONS = " --part JobMode.mpi:1:search=a --part JobMode.serial:3:k=it's"


def render(config: SiteConfig, monkeypatch: pytest.MonkeyPatch, **values: object) -> str:
    monkeypatch.setenv("BALSAM_SITE_PATH", "/sites/it's a site")
    defaults = {"project": "P", "queue": "Q", "num_nodes": 1, "wall_time_min": 60, "job_mode": JobMode.mpi}
    return str(ScriptTemplate(config.path / "job-template.sh").render(**{**defaults, **values}))


def test_the_machines_that_are_described() -> None:
    assert {config.name for config in CONFIGS} == {
        *("local", "slurm", "perlmutter-cpu", "perlmutter-gpu", "frontier", "theta-knl-cobalt", "polaris-pbs"),
        "aurora-pbs",
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_template_is_a_script_for_every_allocation(
    config: SiteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripts = []
    for minutes, nodes, tags, parts in product(
        (1, 59, 60, 90, 1440), (1, 4000), ({}, {"a b": "it's"}), ("", PARTITIONS)
    ):
        text = render(
            config, monkeypatch, wall_time_min=minutes, num_nodes=nodes, filter_tags=tags, partitions=parts,
            job_mode=JobMode.serial,
        )  # fmt: skip
        assert "JobMode." not in text
        assert "{{" not in text
        assert "{%" not in text
        assert text.startswith("#!/bin/bash\n")
        assert f"-j serial -t {minutes}" in text
        assert ("--part 'mpi:1:search=a'" in text) == bool(parts)
        assert ("--tag 'a b=it'\\''s'" in text) == bool(tags)
        scripts.append(text)
    for number, text in enumerate(scripts):
        (tmp_path / f"{number}.sh").write_text(text)
        subprocess.run(["bash", "-n", str(tmp_path / f"{number}.sh")], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-S", "warning", *map(str, tmp_path.glob("*.sh"))], check=True)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_template_starts_the_driver_beside_the_launcher_when_a_batchjob_names_its_search(
    config: SiteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings(**yaml.safe_load(config.settings_text()))
    assert {"search", "chain"} <= set(settings.scheduler.optional_batch_job_params)
    scripts = []
    for minutes, parts in product((1, 59, 60, 90, 1440), ("", PARTITIONS)):
        text = render(
            config, monkeypatch, wall_time_min=minutes, partitions=parts, filter_tags={"search": "digits-1"},
            search="digits-1", chain="4",
        )  # fmt: skip
        command = shlex.split(text[text.rindex("exec ") :].replace("\\\n", " "))
        assert command[2:4] == ["-m", "deephyper_balsam.launcher.inside"]
        with inside.main.make_context("inside", command[4:]) as context:
            given = context.params
        assert (given["name"], given["chain"], given["options"]) == ("digits-1", 4, ())
        assert (given["wall_time_min"], given["job_mode"]) == (minutes, "mpi")
        assert given["tags"] == ("search=digits-1",)
        assert len(given["parts"]) == (2 if parts else 0)
        scripts.append(text)
        plain = render(config, monkeypatch, wall_time_min=minutes, filter_tags={"search": "digits-1"}, search="")
        assert "launcher.main" in plain
        assert "--chain" not in plain
    for number, text in enumerate(scripts):
        (tmp_path / f"{number}.sh").write_text(text)
        subprocess.run(["bash", "-n", str(tmp_path / f"{number}.sh")], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-S", "warning", *map(str, tmp_path.glob("*.sh"))], check=True)


@pytest.mark.parametrize("config", MACHINES, ids=lambda config: config.name)
def test_every_option_of_a_template_is_allowed_by_its_settings_and_directives_stand_before_commands(
    config: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(**yaml.safe_load(config.settings_text()))
    names = list(settings.scheduler.optional_batch_job_params)
    text = render(config, monkeypatch, **dict.fromkeys(names, "yes"))
    lines = text.splitlines()
    first_command = next(i for i, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    for prefix in ("#SBATCH", "#PBS", "#COBALT"):
        assert not any(line.lstrip().startswith(prefix) for line in lines[first_command:])
    for name in names:
        assert f'"{name}"' in (config.path / "job-template.sh").read_text()
        assert text != render(config, monkeypatch)


@pytest.mark.parametrize("config", MACHINES, ids=lambda config: config.name)
def test_a_site_is_made_from_names_that_its_user_gives(config: SiteConfig) -> None:
    text = config.settings_text()
    queue = "regular" if "YOUR_PARTITION" in text else None
    settings = yaml.safe_load(fill_in(text, "m1234", queue))
    assert settings["scheduler"]["allowed_projects"] == ["m1234"]
    assert not PLACEHOLDER.findall(str(settings))


def test_ninety_minutes_are_an_hour_and_a_half_for_pbs(monkeypatch: pytest.MonkeyPatch) -> None:
    polaris = next(config for config in CONFIGS if config.name == "polaris-pbs")
    times = {
        minutes: next(
            line for line in render(polaris, monkeypatch, wall_time_min=minutes).splitlines() if "walltime" in line
        )
        for minutes in (1, 90, 1440)
    }
    assert [line.partition("walltime=")[2] for line in times.values()] == ["00:01:00", "01:30:00", "24:00:00"]


def test_slurm_signals_the_launcher_in_time_unless_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    config = next(config for config in CONFIGS if config.name == "slurm")
    assert "#SBATCH --signal=B:TERM@60" in render(config, monkeypatch, wall_time_min=60)
    assert "--signal" not in render(config, monkeypatch, wall_time_min=2)
    assert "--gpus-per-node=4" in render(config, monkeypatch, gpus_per_node="4")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_every_script_of_the_project_satisfies_shellcheck() -> None:
    top = Path(__file__).parents[2]
    scripts = [top / ".ci" / "run", *top.glob("jobscripts/*.sh"), *top.glob("tests/**/*.sh")]
    assert len(scripts) > 4
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
