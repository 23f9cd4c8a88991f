"""The local stack's own decisions; what needs real servers is in tests/live."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deephyper_balsam.errors import InputError, ServerError
from deephyper_balsam.sites import local, postgres
from deephyper_balsam.sites.local import LocalStack, write_private
from deephyper_balsam.sites.processes import ProcessId, tail


def test_a_stack_that_was_never_started_has_nothing(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "none")
    assert not stack.exists
    assert stack.url is None
    assert stack.site() is None
    status = stack.status()
    assert status.stopped
    assert not status.running
    stack.down()
    assert not (tmp_path / "none").exists()


def test_it_says_how_to_point_balsam_at_it(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path)
    assert stack.env == {"BALSAM_CLIENT_PATH": str(tmp_path / "client.yml"), "BALSAM_SITE_PATH": str(tmp_path / "site")}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write in the folder .*file/stack"):
        LocalStack(tmp_path / "file" / "stack").up()


def test_a_missing_extra_is_told_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ServerError, match=r"uvicorn.*pip install 'deephyper-balsam\[local\]'"):
        LocalStack(tmp_path / "stack").up()
    assert not (tmp_path / "stack").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"processes": {"api": 3}}', '{"unknown": 1, "processes": {}}'])
def test_a_broken_state_file_counts_as_nothing_known(tmp_path: Path, text: str) -> None:
    (tmp_path / "stack.json").write_text(text)
    assert LocalStack(tmp_path).status().processes == ()


def test_processes_of_another_boot_do_not_look_alive(tmp_path: Path) -> None:
    state = local._State(port=1, processes={"api": ProcessId(os.getpid(), "other boot:1")})
    state.write(tmp_path / "stack.json")
    assert local._State.read(tmp_path / "stack.json") == state
    status = LocalStack(tmp_path).status()
    assert status.stopped
    assert status.to_dict()["url"] == "http://127.0.0.1:1"


def test_a_stack_that_another_machine_runs_is_left_alone(tmp_path: Path) -> None:
    state = local._State(port=1, processes={"api": ProcessId(1, "x")}, host="elsewhere")
    state.write(tmp_path / "stack.json")
    for act in (LocalStack(tmp_path).up, LocalStack(tmp_path).down):
        with pytest.raises(InputError, match=rf"runs on elsewhere, and this is {socket.gethostname()}.*--takeover"):
            act()


def test_a_start_that_fails_names_the_log_and_its_end_and_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(postgres, "_program", lambda name: broken)
    stack = LocalStack(tmp_path / "stack")
    with pytest.raises(ServerError, match=r"initdb ended with exit code 3.*postgres\.log(.|\n)*no such luck"):
        stack.up()
    assert stack.status().stopped
    assert not (stack.folder / "postgres").exists()


def test_private_files_are_private_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["secret"]


def test_damaged_secrets_are_not_made_anew(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path)
    first = stack._secrets()
    assert stack._secrets() == first
    assert LocalStack(tmp_path.parent)._secrets() != first
    (tmp_path / "secrets.json").write_text("{")
    with pytest.raises(ServerError, match=r"secrets\.json is damaged"):
        stack._secrets()
    (tmp_path.parent / "secrets.json").unlink()


def test_the_users_settings_do_not_leak_into_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BALSAM_DATABASE_URL", "balsam_auth_secret_key", "PGHOST", "DEEPHYPER_BALSAM_STACK"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "intern")
    found = LocalStack(tmp_path)._environment(MORE="y")
    assert found["DEEPHYPER_BALSAM_STACK"] == str(tmp_path)
    assert found["MORE"] == "y"
    assert found["NO_PROXY"] == "intern,127.0.0.1,localhost"
    assert not {"BALSAM_DATABASE_URL", "balsam_auth_secret_key", "PGHOST"} & set(found)


def test_a_sockets_path_is_short_even_where_the_temporary_folder_is_deep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(postgres.tempfile, "gettempdir", lambda: str(deep))
    path = postgres._socket_dir(None)
    try:
        assert len(os.fsencode(path / ".s.PGSQL.5432")) <= 107
        assert path.stat().st_mode & 0o777 == 0o700
    finally:
        path.rmdir()


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert tail(log) == f"Log: {log} (empty)"
    log.write_text("\n".join(str(n) for n in range(30)))
    assert tail(log, 2) == f"Log: {log}\n28\n29"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights")
def test_postgres_gives_up_the_rights_of_root_but_reaches_folders_that_only_root_may_enter(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "file").write_text("")
    script = "import json, os, sys; print(json.dumps([os.geteuid(), os.getgroups(), os.path.exists(sys.argv[1])]))"
    program = [sys.executable, "-S", "-c", script, str(closed / "file")]
    wrapper = Path(postgres.__file__).with_name("unprivileged.py")
    for keep, reaches in (("1", True), ("0", False)):
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(wrapper), "65534", "65534", keep, *program], capture_output=True, text=True
        )
        if done.returncode and keep == "0":
            continue  # Python itself lies where only root may enter
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [65534, [], reaches]
