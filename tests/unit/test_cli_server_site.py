"""`deephyper-balsam server` and `site`: what they print and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from deephyper_balsam.cli import main
from deephyper_balsam.sites import local
from deephyper_balsam.sites.processes import ProcessId


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a stack that ran once."""
    folder = tmp_path / "my stack"
    folder.mkdir()
    local._State(port=4711, processes={"api": ProcessId(1, "gone")}).write(folder / "stack.json")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("server",),
        *(("server", name) for name in ("up", "down", "status", "env", "logs")),
        ("site",),
        *(("site", name) for name in ("configs", "init", "check")),
    ],
    ids=" ".join,
)
def test_every_help_has_an_example(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert f"deephyper-balsam {command[0]}" in result.output


@pytest.mark.parametrize("command", ["down", "status", "env", "logs"])
def test_a_folder_without_a_stack_is_bad_input_that_says_what_to_do(command: str, tmp_path: Path) -> None:
    result = run("server", command, "--dir", str(tmp_path / "no where"))
    assert result.exit_code == 2
    assert "There is no Balsam server in" in result.output
    assert "server up --dir '" in result.output
    assert not (tmp_path / "no where").exists()


def test_status_as_json(stopped: Path) -> None:
    result = run("server", "status", "--dir", str(stopped), "--json")
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert found["url"] == "http://127.0.0.1:4711"
    assert found["env"]["BALSAM_CLIENT_PATH"] == str(stopped / "client.yml")
    assert found["running"] is False
    assert [item["name"] for item in found["processes"]] == ["postgres", "api"]
    assert found["site"] is None


def test_status_for_people(stopped: Path) -> None:
    result = run("server", "status", "--dir", str(stopped))
    assert result.exit_code == 0
    assert "is stopped" in result.output


def test_env_can_be_evaluated_by_a_shell(stopped: Path) -> None:
    result = run("server", "env", "--dir", str(stopped))
    assert f"export BALSAM_CLIENT_PATH='{stopped}/client.yml'" in result.output


def test_logs_show_the_end_of_one_or_all(stopped: Path) -> None:
    (stopped / "logs").mkdir()
    (stopped / "logs" / "api.log").write_text("one\ntwo\nthree\n")
    (stopped / "logs" / "agent.log").write_text("four\n")
    assert run("server", "logs", "--dir", str(stopped), "-n", "2", "api").output.splitlines()[1:] == ["two", "three"]
    assert "four" in run("server", "logs", "--dir", str(stopped)).output
    unknown = run("server", "logs", "--dir", str(stopped), "nope")
    assert unknown.exit_code == 2
    assert "Known: agent, api" in unknown.output


def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("server", "up", "--dir", str(tmp_path / "file" / "x"))
    assert result.exit_code == 2
    assert "Name a folder that you may write" in result.output


def test_a_server_that_cannot_start_ends_with_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    result = run("server", "up", "--dir", str(tmp_path / "x"))
    assert result.exit_code == 3
    assert "pip install 'deephyper-balsam[local]'" in result.output


def test_down_stops_what_is_stopped_already(stopped: Path) -> None:
    result = run("server", "down", "--dir", str(stopped))
    assert result.exit_code == 0
    assert "The data is in" in result.output


def test_site_configs() -> None:
    assert "local" in run("site", "configs").output
    found = json.loads(run("site", "configs", "--json").output)
    assert {"name", "path", "summary"} == set(found[0])


def test_site_init_with_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(tmp_path / "client.yml"))
    site = str(tmp_path / "site")
    unknown = run("site", "init", site, "--config", "nope", "--name", "n")
    assert (unknown.exit_code, "Known: " in unknown.output) == (2, True)
    assert run("site", "init", str(tmp_path), "--config", "local", "--name", "n").exit_code == 2
    assert run("site", "init", site, "--config", "local").exit_code == 2
    not_logged_in = run("site", "init", site, "--config", "local", "--name", "n")
    assert (not_logged_in.exit_code, "balsam login" in not_logged_in.output) == (3, True)
    (tmp_path / "client.yml").write_text("api_root: http://127.0.0.1:9\ntoken: x\n")
    unreachable = run("site", "init", site, "--config", "local", "--name", "n")
    assert (unreachable.exit_code, "127.0.0.1:9" in unreachable.output) == (3, True)
    assert not Path(site).exists()


def test_site_check_of_no_site_and_of_one_whose_server_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("site", "check", str(tmp_path)).exit_code == 2
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(tmp_path / "client.yml"))
    (tmp_path / ".balsam-site").write_text("1")
    result = run("site", "check", str(tmp_path))
    assert result.exit_code == 3
    assert "FAILED settings" in result.output
    found = json.loads(CliRunner().invoke(main, ["site", "check", str(tmp_path), "--json"]).stdout)
    assert {item["name"] for item in found} >= {"settings", "folders", "api"}
