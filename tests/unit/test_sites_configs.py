"""Site configs and new sites, against a Balsam of which only the API's answers are faked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.errors import (
    InputError,
    NotLoggedInError,
    SettingsError,
    UnknownSiteError,
    UnreachableError,
)
from deephyper_balsam.sites import checks, configs
from deephyper_balsam.sites.checks import check_site
from deephyper_balsam.sites.configs import (
    SiteConfig,
    forget_site,
    init_site,
    read_settings,
    site_config,
    site_configs,
)


class FakeGateway:
    """Sites in a list; made for every credentials file."""

    rows: list[dict[str, Any]]
    fails: Exception | None = None
    clock_ahead_s: float | None = None

    def __init__(self, client_path: object = None) -> None:
        pass

    def sites(self) -> list[dict[str, Any]]:
        if self.fails is not None:
            raise self.fails
        return list(self.rows)

    def create_site(self, name: str, path: str) -> int:
        self.rows.append({"id": len(self.rows) + 1, "last_refresh": "2026-01-01T00:00:00", "name": name, "path": path})
        return len(self.rows)

    def delete_site(self, site_id: int) -> None:
        self.rows[:] = [row for row in self.rows if row["id"] != site_id]


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> type[FakeGateway]:
    fake = type("Fake", (FakeGateway,), {"rows": []})
    monkeypatch.setattr(configs, "Gateway", fake)
    monkeypatch.setattr(checks, "Gateway", fake)
    return fake


@pytest.mark.parametrize("config", site_configs(), ids=lambda config: config.name)
def test_every_config_that_is_shipped_is_complete_and_balsam_accepts_its_settings(config: configs.SiteConfig) -> None:
    import yaml
    from balsam.config import Settings

    settings = Settings(**yaml.safe_load(config.settings_text()))
    assert (config.path / "job-template.sh").is_file()
    assert config.summary
    assert settings.filter_tags == {}


def test_local_is_known_and_an_unknown_name_is_answered_with_those_that_are(tmp_path: Path) -> None:
    assert site_config("local").name == "local"
    with pytest.raises(UnknownSiteError, match=r"'nope'.*local"):
        site_config("nope")
    with pytest.raises(UnknownSiteError):
        site_config(tmp_path)


def test_a_folder_in_the_form_of_balsams_own_configs_works(tmp_path: Path, gateway: type[FakeGateway]) -> None:
    import balsam.config

    own = Path(balsam.config.__file__).parent / "defaults" / "alcf_polaris"
    made = init_site(tmp_path / "site", own, "mine")
    assert "PBSScheduler" in (made.path / "settings.yml").read_text()


def test_a_new_site_is_written_and_reported(tmp_path: Path, gateway: type[FakeGateway]) -> None:
    made = init_site(tmp_path / "a site", "local", "mine")
    assert gateway.rows[0]["name"] == "mine"
    assert gateway.rows[0]["path"] == str(made.path)
    assert (made.path / ".balsam-site").read_text() == "1"
    assert (made.path / "settings.yml").stat().st_mode & 0o777 == 0o600
    assert (made.path / "job-template.sh").stat().st_mode & 0o777 == 0o700
    assert {path.name for path in made.path.iterdir() if path.is_dir()} == {"log", "qsubmit", "data"}


def test_what_cannot_be_made_changes_nothing(tmp_path: Path, gateway: type[FakeGateway]) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        init_site(tmp_path / "there", "local", "mine")
    with pytest.raises(InputError, match="Its parent must exist"):
        init_site(tmp_path / "no" / "parent", "local", "mine")
    with pytest.raises(InputError, match="must not be empty"):
        init_site(tmp_path / "site", "local", " ")
    with pytest.raises(UnknownSiteError):
        init_site(tmp_path / "site", "nope", "mine")
    gateway.rows.append({"id": 1, "name": "mine", "path": "/elsewhere"})
    with pytest.raises(InputError, match=r"'mine' already, in /elsewhere"):
        init_site(tmp_path / "site", "local", "mine")
    gateway.fails = UnreachableError("no answer")
    with pytest.raises(UnreachableError):
        init_site(tmp_path / "site", "local", "other")
    assert not (tmp_path / "site").exists()
    assert len(gateway.rows) == 1


@pytest.mark.parametrize(
    "text", ["- a list", "launcher: {compute_node: no.such.Node}", "a: [", "compute_node: x"], ids=str
)
def test_settings_that_balsam_cannot_use_are_refused_by_name(
    tmp_path: Path, gateway: type[FakeGateway], text: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "settings.yml").write_text(text)
    with pytest.raises(SettingsError, match=r"own/settings\.yml"):
        init_site(tmp_path / "site", own, "mine")
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("allowed_projects: [no]", r"`scheduler\.allowed_projects` is no without quotes.*write 'no'"),
        ("allowed_projects: [2020-01-01]", r"is 2020-01-01 without quotes"),
        ("allowed_projects: [010]", r"is 010 without quotes"),
        ("allowed_projects: [true]", r"is true without quotes"),
        ("allowed_projects:", r"`scheduler\.allowed_projects` is blank: write null"),
        ("allowed_queues: {on: {max_nodes: 1}}", r"the key scheduler\.allowed_queues\.on` is on without quotes"),
        (
            "allowed_queues: {a: {max_walltime: 12:00:00}}",
            r"max_walltime` is 12:00:00, which YAML reads as a number, 43200",
        ),
        ("allowed_queues: {a: {max_nodes: 010}}", r"max_nodes` is 010, which YAML reads as a number, 8"),
        ("optional_batch_job_params: {when: 2020-01-01}", r"when` is 2020-01-01 without quotes"),
        ("optional_batch_job_params: {module: 1.10}", r"module` is 1\.10 without quotes"),
        ("sync_period: 1\n    sync_period: 2", r"'sync_period' stands twice"),
    ],
)
def test_settings_that_yaml_reads_otherwise_than_they_are_written_are_refused(
    tmp_path: Path, gateway: type[FakeGateway], line: str, said: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "settings.yml").write_text(f"scheduler:\n    {line}\n")
    with pytest.raises(SettingsError, match=rf"own/settings\.yml.*{said}") as caught:
        init_site(tmp_path / "site", own, "mine")
    assert not (tmp_path / "site").exists()
    made = init_site(tmp_path / "good", "local", "mine")
    (made.path / "settings.yml").write_text((own / "settings.yml").read_text())
    found = next(item for item in check_site(made.path) if item.name == "settings")
    assert not found.ok
    assert " ".join(str(caught.value).split())[-40:] == found.detail[-40:]


@pytest.mark.parametrize("config", site_configs(), ids=lambda config: config.name)
def test_the_configs_that_come_with_the_package_are_read_as_they_are_written(config: SiteConfig) -> None:
    assert read_settings((config.path / "settings.yml").read_text(encoding="utf-8"), config.path)


def test_a_missing_template_is_named(tmp_path: Path, gateway: type[FakeGateway]) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "settings.yml").write_text((site_config("local").path / "settings.yml").read_text())
    with pytest.raises(SettingsError, match=r"lacks its job template .*job-template\.sh"):
        init_site(tmp_path / "site", own, "mine")


def test_missing_credentials_are_told(tmp_path: Path) -> None:
    with pytest.raises(NotLoggedInError, match="balsam login"):
        init_site(tmp_path / "site", "local", "mine", client_path=tmp_path / "none.yml")
    assert not (tmp_path / "site").exists()


def test_only_the_record_of_that_name_and_path_is_forgotten(gateway: type[FakeGateway]) -> None:
    gateway.rows.append({"id": 4, "name": "mine", "path": "/a"})
    assert not forget_site("mine", Path("/b"))
    assert forget_site("mine", Path("/a"))
    assert gateway.rows == []


def test_the_check_of_a_site_names_what_is_wrong(tmp_path: Path, gateway: type[FakeGateway]) -> None:
    with pytest.raises(InputError, match="is no Balsam site"):
        check_site(tmp_path)
    made = init_site(tmp_path / "site", "local", "mine")

    def state() -> dict[str, bool]:
        return {item.name: item.ok for item in check_site(made.path)}

    fine = {"settings": True, "folders": True, "template": True, "names": True, "commands": True}
    fine = {**fine, "packages": True, "api": True}
    assert state() == {**fine, "agent": False}
    (made.path / "balsam-service.pid").write_text("host\n1")
    assert state() == {**fine, "agent": False}  # silent since January
    gateway.rows[0]["last_refresh"] = "2999-01-01T00:00:00"
    assert state() == {**fine, "agent": True}
    (made.path / "data").rmdir()
    (made.path / "job-template.sh").unlink()
    gateway.rows[0]["path"] = "/elsewhere"
    assert state() == {**fine, "folders": False, "template": False, "api": False, "agent": True}
    gateway.rows.clear()
    assert not state()["api"]
    gateway.fails = UnreachableError("no answer")
    (made.path / "settings.yml").write_text("launcher: 3")
    found = {item.name: item.detail for item in check_site(made.path) if not item.ok}
    assert found["api"] == "no answer"
    assert set(found) == {"settings", "folders", "api"}


def test_the_check_looks_for_the_schedulers_commands(
    tmp_path: Path, gateway: type[FakeGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    import balsam.config

    made = init_site(tmp_path / "site", Path(balsam.config.__file__).parent / "defaults" / "alcf_polaris", "mine")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = next(item for item in check_site(made.path) if item.name == "commands")
    assert not found.ok
    assert "qsub" in found.detail


def test_the_check_names_projects_and_queues_that_nobody_filled_in(tmp_path: Path, gateway: type[FakeGateway]) -> None:
    made = init_site(tmp_path / "site", "slurm", "mine")

    def names() -> checks.Check:
        return next(item for item in check_site(made.path) if item.name == "names")

    assert not names().ok
    assert "YOUR_PARTITION, YOUR_PROJECT" in names().detail
    other = init_site(tmp_path / "other", "slurm", "other", project="m1234", queue="regular")
    found = next(item for item in check_site(other.path) if item.name == "names")
    assert (found.ok, found.detail) == (True, "queues regular (at most 100000 nodes and 43200 min); projects m1234")


def test_names_that_no_scheduler_takes_or_the_config_does_not_ask_for_are_refused(
    tmp_path: Path, gateway: type[FakeGateway]
) -> None:
    with pytest.raises(InputError, match="one word"):
        init_site(tmp_path / "site", "slurm", "mine", project="a b")
    with pytest.raises(InputError, match="names its queues itself, and fast is none of them: regular, debug"):
        init_site(tmp_path / "site", "perlmutter-cpu", "mine", project="m1", queue="fast")
    assert not (tmp_path / "site").exists()
    assert init_site(tmp_path / "site", "perlmutter-cpu", "mine", project="m1", queue="debug").path.is_dir()


def test_every_config_makes_a_site_without_questions(
    tmp_path: Path, gateway: type[FakeGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for config in site_configs():
        assert init_site(tmp_path / config.name, config, config.name).path.is_dir()


def test_the_check_imports_what_run_functions_need(tmp_path: Path, gateway: type[FakeGateway]) -> None:
    made = init_site(tmp_path / "site", "local", "mine")

    def packages(*names: str) -> checks.Check:
        return next(item for item in check_site(made.path, imports=names) if item.name == "packages")

    assert packages("json").ok
    assert not packages("no_such_package").ok
    assert "no_such_package (ModuleNotFoundError" in packages("json", "no_such_package").detail


@pytest.mark.parametrize(("skew_s", "ok"), [(0, True), (-300, False), (300, False)])
def test_the_check_compares_clocks_with_the_api(
    tmp_path: Path, gateway: type[FakeGateway], skew_s: int, ok: bool
) -> None:
    made = init_site(tmp_path / "site", "local", "mine")
    gateway.clock_ahead_s = skew_s
    found = {item.name: item for item in check_site(made.path)}
    assert found["clock"].ok is ok
    assert ok or ("ahead of" if skew_s < 0 else "behind") in found["clock"].detail


def test_the_check_tries_to_write_and_does_not_trust_permissions(
    tmp_path: Path, gateway: type[FakeGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = init_site(tmp_path / "site", "local", "mine")

    def full(dir: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", full)
    assert not next(item for item in check_site(made.path) if item.name == "folders").ok
