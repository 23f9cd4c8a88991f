"""Another account of the machine attacks a stack that runs, or that is down: everything is refused, nothing changes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deephyper_balsam.common import processes
from deephyper_balsam.errors import InputError, NotLoggedInError, ServerError, UnreachableError
from deephyper_balsam.server import passwords
from deephyper_balsam.server.stack import LocalStack, Waits
from deephyper_balsam.store import sockets
from deephyper_balsam.store.gateway import Gateway

from .accounts import second_account
from .waiting import wait_for

pytestmark = pytest.mark.live

_NAME = "dhbstranger"


@pytest.fixture(scope="module")
def stranger() -> Iterator[pwd.struct_passwd]:
    """A second account without any right."""
    with second_account(_NAME) as made:
        yield made


def act(account: pwd.struct_passwd, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Let the stranger run a shell script."""
    return subprocess.run(
        ["/bin/bash", "-c", script, "bash", *arguments],
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        cwd="/",
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )


def folders(stack: LocalStack) -> list[Path]:
    state = stack.files.state()
    return [stack.folder, Path(state.api_dir or ""), Path(state.socket_dir or "")]


def ask(stack: LocalStack, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    connection = sockets.Connection(sockets.path_of(stack.url or "") or "")
    try:
        # A server that refuses a body closes before it has read it; its answer is there all the same
        with contextlib.suppress(BrokenPipeError):
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        raw = answer.read()
        return answer.status, raw.decode()
    finally:
        connection.close()


def test_a_stranger_reads_and_reaches_nothing_of_the_stack(stack: LocalStack, stranger: pwd.struct_passwd) -> None:
    for folder in folders(stack):
        assert folder.is_dir()
        for look in ('ls "$1"', 'find "$1" -type f', 'cat "$1"/*', 'touch "$1"/new', 'mv "$1" "$1.gone"'):
            assert act(stranger, look, str(folder)).returncode != 0, (look, folder)
    path = sockets.path_of(stack.url or "")
    connect = 'exec 2>&1; python3 -c "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])" "$1"'
    assert "Permission" in act(stranger, connect, str(path)).stdout


def test_no_secret_shows_among_the_processes(stack: LocalStack, stranger: pwd.struct_passwd) -> None:
    known = json.loads((stack.folder / "secrets.json").read_text(encoding="utf-8"))
    shown = act(stranger, "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '").stdout
    api = next(part.pid for part in stack.status().processes if part.name == "api")
    ours = " ".join(f"{key}={value}" for key, value in psutil.Process(api).environ().items())
    logs = "".join(log.read_text(encoding="utf-8", errors="replace") for log in stack.logs.glob("*.log"))
    for name in ("password", "signing_key", "challenge_key", "database_password"):
        assert known[name] not in shown + ours + logs, name


def test_nobody_registers_and_no_body_is_endless(stack: LocalStack) -> None:
    user = json.dumps({"username": "eve", "password": "eve"}).encode()
    assert ask(stack, "POST", "/auth/password/register", user, Content_Type="application/json")[0] == 404
    before = _memory(stack)
    for path in ("/jobs/", "/auth/password/login"):
        code, said = ask(stack, "POST", path, b"x" * 10_000_000, Content_Type="application/json")
        assert code == 413, said
        assert "65536 are allowed without a valid token" in said
    chunks = (b"x" * 60_000 for _ in range(100))
    connection = sockets.Connection(sockets.path_of(stack.url or "") or "")
    with contextlib.suppress(BrokenPipeError):
        connection.request("POST", "/jobs/", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert _memory(stack) - before < 50_000_000
    token = Gateway(stack.client_path)._client.token  # type: ignore[attr-defined]
    bearer = {"Authorization": f"Bearer {token}", "Content_Type": "application/json"}
    assert ask(stack, "POST", "/sites/", b"x" * 1_000_000, **bearer)[0] == 422
    assert Gateway(stack.client_path).sites()


def _memory(stack: LocalStack) -> int:
    pid = next(part.pid for part in stack.status().processes if part.name == "api")
    return int(psutil.Process(pid).memory_info().rss)


def test_endless_headers_are_refused(stack: LocalStack) -> None:
    made = sockets.connect(sockets.path_of(stack.url or "") or "", 30)
    with made:
        try:
            made.sendall(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000)
        except OSError:
            return  # it was cut meanwhile
        assert b" 400 " in made.recv(1000)


def test_a_wrong_password_is_logged_and_slower_each_time(stack: LocalStack) -> None:
    form = b"username=local&password=guess"
    kind = "application/x-www-form-urlencoded"
    for _ in range(3):
        assert ask(stack, "POST", "/auth/password/login", form, Content_Type=kind)[0] == 401
    said = (stack.logs / "api.log").read_text(encoding="utf-8")
    assert "A login as 'local' from this host, by the private socket, failed" in said
    assert "answered after 1.00 s" in said
    assert "guess" not in said


def test_a_token_ends_with_its_account(stack: LocalStack, tmp_path: Path) -> None:
    import psycopg2

    url = stack.database(stack.files.state()).url
    with psycopg2.connect(url) as connection, connection.cursor() as cursor:
        kept = passwords.hashed("hers")
        cursor.execute("INSERT INTO users (username, hashed_password) VALUES ('leaving', %s) RETURNING id", (kept,))
        user_id = cursor.fetchone()[0]
    import jwt

    key = stack.credentials.secrets()["signing_key"]
    claims = {"sub": user_id, "exp": 4e9, "username": "leaving"}
    token = jwt.encode(claims, key, algorithm="HS256")
    assert ask(stack, "GET", "/jobs/", Authorization=f"Bearer {token}")[0] == 401, "it says nothing of the password"
    token = jwt.encode({**claims, "mark": passwords.mark(kept, key)}, key, algorithm="HS256")
    for path in ("/jobs/", "/jobs/1", "/sites/"):
        assert ask(stack, "GET", path, Authorization=f"Bearer {token}")[0] in (200, 404)
    with psycopg2.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute("DELETE FROM users WHERE id = %s", (user_id,))
    wait_for(lambda: ask(stack, "GET", "/jobs/", Authorization=f"Bearer {token}")[0] == 401, "the token to be refused")
    for method, path in (("GET", "/jobs/1"), ("GET", "/sites/"), ("PATCH", "/jobs/"), ("DELETE", "/sites/1")):
        assert ask(stack, method, path, Authorization=f"Bearer {token}")[0] == 401, path


ENTER = """
import os, sys, psycopg2
uid, host, user, password = sys.argv[1:]
if int(uid) != os.geteuid():  # the modules are loaded: the account need not reach them
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
try:
    psycopg2.connect(host=host, user=user, password=password or None, dbname="balsam", connect_timeout=10).close()
except psycopg2.OperationalError as error:
    sys.exit(f"refused: {error}")
print("entered")
"""


def enter(uid: int, folder: str, user: str, password: str = "") -> str:
    """Try to enter the database as an account of the machine; return what came of it."""
    command = [sys.executable, "-c", ENTER, str(uid), folder, user, password]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd="/", env={**environment, "HOME": "/nonexistent"}
    )
    return ended.stdout + ended.stderr


def test_the_database_lets_nobody_in_without_its_password(stack: LocalStack, stranger: pwd.struct_passwd) -> None:
    folder = str(stack.files.state().socket_dir)
    known = stack.credentials.secrets()["database_password"]
    assert enter(os.geteuid(), folder, "postgres", known) == "entered\n", "the way of this test is wrong"
    owner = (stack.folder / "postgres").stat().st_uid  # the account that runs PostgreSQL on this machine
    for uid in sorted({os.geteuid(), owner}):
        for user, password in (("postgres", ""), ("postgres", "guess"), ("root", ""), (pwd.getpwuid(uid).pw_name, "")):
            said = enter(uid, folder, user, password)
            assert "refused:" in said, (uid, user)
            assert "password" in said, "it was the database that refused"
    for password in ("", "guess", known):  # a stranger does not even reach the socket
        said = enter(stranger.pw_uid, folder, "postgres", password)
        assert "refused:" in said
        assert "Permission denied" in said


@pytest.mark.parametrize("kind", ["theirs", "open", "link"])
def test_up_refuses_a_folder_that_a_stranger_prepared(stranger: pwd.struct_passwd, kind: str) -> None:
    shared = Path(tempfile.mkdtemp(prefix="dhb-shared-", dir="/tmp"))
    shared.chmod(0o1777)
    folder = shared / "balsam"
    try:
        secrets = '{"username": "local", "password": "his"}'
        if kind == "open":
            folder.mkdir()
            folder.chmod(0o777)
            act(stranger, 'echo "$2" > "$1"/secrets.json', str(folder), secrets)
        elif kind == "theirs":
            act(stranger, 'mkdir "$1" && echo "$2" > "$1"/secrets.json', str(folder), secrets)
        else:
            act(stranger, 'mkdir "$1.real" && ln -s "$1.real" "$1"', str(folder))
        before = sorted(path.name for path in shared.rglob("*"))
        with pytest.raises(InputError, match=r"belongs to dhbstranger|Other accounts may write"):
            LocalStack(folder).up()
        assert sorted(path.name for path in shared.rglob("*")) == before
    finally:
        shutil.rmtree(shared)


def test_all_is_private_under_an_open_umask_and_a_port_of_before_is_worth_nothing(
    stranger: pwd.struct_passwd,
) -> None:
    """The life of a stack under umask 000; while it is down a stranger takes the place of its socket."""
    top = Path(tempfile.mkdtemp(prefix="dhb-umask-", dir="/tmp"))
    before = os.umask(0)
    stack = LocalStack(top / "deep" / "balsam")
    try:
        stack.up(site=False)
        for path in (stack.folder.parent, *(item for item in stack.folder.rglob("*") if not item.is_symlink())):
            allowed = 0o755 if path == stack.folder.parent else 0o700
            assert path.stat().st_mode & 0o777 & ~allowed == 0, path
        gateway = Gateway(stack.client_path)
        assert gateway.sites() == []
        stack.down()
        api_dir = stack.files.state().api_dir
        listen = (
            'mkdir -m 755 "$1" && cd "$1" && python3 -c "import socket; s = socket.socket(socket.AF_UNIX); '
            "s.bind('api.sock'); s.listen(); s.settimeout(20); print('ready', flush=True); c = s.accept()[0]; "
            'print(c.recv(1000), flush=True)" & echo $!; wait'
        )
        theirs = subprocess.Popen(
            ["/bin/bash", "-c", listen, "bash", str(api_dir)],
            user=stranger.pw_uid,
            group=stranger.pw_gid,
            extra_groups=[],
            cwd="/",
            stdout=subprocess.PIPE,
            text=True,
        )
        assert theirs.stdout is not None
        child = int(theirs.stdout.readline())
        assert theirs.stdout.readline() == "ready\n"
        try:
            for one in (gateway, Gateway(stack.client_path)):
                with pytest.raises(UnreachableError, match="belongs to dhbstranger"):
                    one.sites()
            stack.up(site=False)
            assert stack.files.state().api_dir != api_dir
            assert gateway.sites() == [], "a client that runs finds the new place"
        finally:
            os.kill(child, 9)
            assert theirs.communicate(timeout=30)[0] == "", "he was sent something"
            shutil.rmtree(str(api_dir), ignore_errors=True)
    finally:
        os.umask(before)
        stack.down()
        shutil.rmtree(top)


def test_a_token_of_before_a_restart_of_the_api_is_refused_and_clients_go_on(stack: LocalStack) -> None:
    gateway = Gateway(stack.client_path)
    old = gateway._client.token  # type: ignore[attr-defined]
    api = next(part.pid for part in stack.status().processes if part.name == "api")
    process = psutil.Process(api)
    process.kill()
    processes.wait_gone([process], 10)
    with pytest.raises(UnreachableError):
        gateway.sites()
    with pytest.raises(UnreachableError, match="`deephyper-balsam server up` starts it"):
        Gateway(stack.client_path).sites()
    stack.up()
    assert ask(stack, "GET", "/sites/", Authorization=f"Bearer {old}")[0] == 401
    assert gateway.sites()
    lone = Gateway(stack.client_path)  # who has the token of before, and nothing else
    lone._client.credentials_path = Path("/nowhere/client.yml")  # type: ignore[attr-defined]
    lone._client.token = old  # type: ignore[attr-defined]
    with pytest.raises(NotLoggedInError):
        lone.sites()


def test_who_holds_the_lock_is_told_and_strangers_cannot(stack: LocalStack, stranger: pwd.struct_passwd) -> None:
    lock = stack.folder / "stack.lock"
    assert act(stranger, 'exec 9<"$1" && flock -n 9', str(lock)).returncode != 0
    said: list[str] = []
    waiting = LocalStack(stack.folder, say=said.append, waits=Waits(lock_s=4.0))
    with (
        stack.files.lock(),
        pytest.raises(ServerError, match=rf"process {os.getpid()} on {socket.gethostname()}, since"),
    ):
        waiting.up()
    assert len(said) == 1
    assert f"process {os.getpid()} on {socket.gethostname()}, since" in said[0]
    with lock.open(encoding="utf-8") as handle:  # a process that wrote nothing
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ServerError, match="another process"):
            waiting.up()


def test_a_log_does_not_follow_what_a_stranger_planted(stranger: pwd.struct_passwd) -> None:
    """The folder of results lies in a directory in which everybody may write."""
    shared = Path(tempfile.mkdtemp(prefix="dhb-shared-", dir="/tmp"))
    shared.chmod(0o777)
    victim = Path(tempfile.mkdtemp(prefix="dhb-victim-", dir="/tmp")) / "precious"
    victim.write_text("precious", encoding="utf-8")
    script = (
        "import logging, sys; from pathlib import Path; from deephyper_balsam.driver.search_log import log_to\n"
        "with log_to(Path(sys.argv[1])): logging.getLogger('deephyper_balsam').warning('a line')"
    )
    try:
        for plant in ('ln -s "$2" "$1"', 'mkfifo "$1"'):
            log = shared / "search.log"
            assert act(stranger, plant, str(log), str(victim)).returncode == 0
            command = [sys.executable, "-c", script, str(log)]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert ended.returncode == 0, ended.stderr
            assert victim.read_text(encoding="utf-8") == "precious"
            assert log.is_file()
            assert not log.is_symlink()
            assert "a line" in log.read_text(encoding="utf-8")
            log.unlink()
    finally:
        shutil.rmtree(shared)
        shutil.rmtree(victim.parent)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_results_keep_the_users_umask(tmp_path: Path, umask: int, mode: int) -> None:
    from deephyper_balsam.results.table import write_whole

    before = os.umask(umask)
    try:
        write_whole(tmp_path / "results.csv", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "results.csv").stat().st_mode & 0o777 == mode
