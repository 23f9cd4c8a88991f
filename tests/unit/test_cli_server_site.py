"""`deephyper-balsam server` and `site`: what they print and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from deephyper_balsam.cli import main
from deephyper_balsam.common.processes import ProcessId
from deephyper_balsam.errors import InputError
from deephyper_balsam.server import stack
from deephyper_balsam.server.site_agent import NewSite
from deephyper_balsam.server.stack_state import State


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a stack that ran once."""
    folder = tmp_path / "my stack"
    folder.mkdir()
    State(api_dir="/tmp/dhb-x", processes={"api": ProcessId(1, "gone")}).write(folder / "stack.json")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("server",),
        *(("server", name) for name in ("up", "down", "status", "env", "logs", "user", "token")),
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
    assert found["url"] == "http+unix://%2Ftmp%2Fdhb-x%2Fapi.sock"
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
    monkeypatch.setattr(stack, "find_spec", lambda name: None)
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


USERS = {
    "add": ("user", "add", "ann"),
    "ls": ("user", "ls"),
    "remove": ("user", "remove", "ann", "--yes"),
    "revoke": ("token", "revoke", "ann"),
    "renew": ("token", "renew", "ann"),
    "revoke one's own": ("token", "revoke"),
    "renew one's own": ("token", "renew"),
}


@pytest.mark.parametrize("words", USERS.values(), ids=USERS)
def test_users_of_a_server_that_is_not_there_or_is_stopped(
    words: tuple[str, ...], tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = run("server", *words, "--dir", str(tmp_path / "none"))
    assert nowhere.exit_code == 2
    assert "There is no Balsam server in" in nowhere.output
    state = State.read(stopped / "stack.json")
    state.address, state.port = "127.0.0.1", 4711
    state.write(stopped / "stack.json")
    result = run("server", *words, "--dir", str(stopped))
    assert result.exit_code == 3
    assert "does not run: `deephyper-balsam server up --dir '" in result.output
    assert not (tmp_path / "ann.tar").exists()


@pytest.mark.parametrize("words", [("user", "add", "ann"), ("token", "renew", "ann")], ids=" ".join)
def test_users_of_a_server_that_listens_for_nobody_else_are_refused_with_what_to_do(
    words: tuple[str, ...], stopped: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("server", *words, "--dir", str(stopped))
    assert result.exit_code == 2
    assert "listens on its private socket alone" in result.output
    assert "--listen auto" in result.output


@pytest.mark.parametrize("name", ["", "ann b", "a/b", "ann\n", "a" * 65, ".ann"])
def test_a_bad_user_name_is_told_with_what_is_allowed(name: str, stopped: Path, tmp_path: Path) -> None:
    result = run("server", "user", "add", name, "-o", str(tmp_path / "x.tar"), "--dir", str(stopped))
    assert result.exit_code == 2
    assert "take 1 to 64 letters, digits" in result.output


def test_files_of_ones_own_are_written_nowhere_else(stopped: Path, tmp_path: Path) -> None:
    result = run("server", "token", "renew", "-o", str(tmp_path / "x.tar"), "--dir", str(stopped))
    assert result.exit_code == 2
    assert "-o is for another user's files" in result.output


def test_site_check_of_no_site_and_of_one_whose_server_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("site", "check", str(tmp_path)).exit_code == 2
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(tmp_path / "client.yml"))
    (tmp_path / ".balsam-site").write_text("1")
    result = run("site", "check", str(tmp_path))
    assert result.exit_code == 3
    assert "FAILED settings" in result.output
    found = json.loads(CliRunner().invoke(main, ["site", "check", str(tmp_path), "--json"]).stdout)
    assert {item["name"] for item in found} >= {"settings", "folders", "api"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config", "nowhere"), "There is no site config 'nowhere'"),
        (("--config", "perlmutter-gpu", "-A", "m1", "-q", "fast"), "fast is none of them: regular, debug"),
    ],
)
def test_a_site_that_cannot_be_made_is_refused_before_anything_starts(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = run("server", "up", "--dir", str(tmp_path / "stack"), *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "stack").exists()


def test_a_stack_keeps_the_machine_that_its_site_is_of(tmp_path: Path) -> None:
    made = stack.LocalStack(tmp_path / "stack")
    made.files.make()
    made.site_path.mkdir()
    (made.site_path / ".balsam-site").write_text("1")
    state = State(site_name="mine", site_config="slurm", folder=str(made.folder))
    with pytest.raises(InputError, match="site of the config slurm, and perlmutter-gpu is another"):
        made.agent.up(state, NewSite("perlmutter-gpu"), {}, restart=False)
    state.site_config = None  # a stack of an earlier version
    with pytest.raises(InputError, match="site of the config local"):
        made.agent.up(state, NewSite("slurm"), {}, restart=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-n", "2"), "name it with --config"),
        (("--config", "nowhere", "-A", "m1"), "There is no site config 'nowhere'"),
        (("--config", "slurm", "-A", "m1"), "-q says which"),
        (("--config", "perlmutter-cpu", "-q", "debug"), "-A says which"),
        (("--config", "perlmutter-cpu", "-A", "m1", "-q", "fast"), "fast is none of them"),
    ],
)
def test_quickstart_on_a_machine_says_what_it_lacks_before_anything_starts(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = run("quickstart", "--dir", str(tmp_path / "q"), "--problem", "ackley", *options)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "q").exists()
