"""Sockets and files that only their owner reaches: what a stranger may have put in their place is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest
import requests
import yaml

from deephyper_balsam.common.private import (
    UntrustedError,
    open_own,
    private_folder,
    require_own,
    write_private,
)
from deephyper_balsam.errors import NotLoggedInError, UnreachableError
from deephyper_balsam.store import sockets
from deephyper_balsam.store.gateway import Gateway

STRANGER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another account")


def as_stranger(act: Callable[[], object]) -> int:
    """Do something as another account, in a process of its own; return its pid."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            act()
            code = 0
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def folder() -> Iterator[Path]:
    made = private_folder()
    yield made
    shutil.rmtree(made, ignore_errors=True)


class Server:
    """A server at a Unix socket that knows one token, and one account that gets the next."""

    def __init__(self, path: Path) -> None:
        self.token, self.password, self.life = "first", "secret", timedelta(hours=8)
        self.logins: list[str] = []
        self.delay_s = 0.0
        self.seen: list[str | None] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                served.seen.append(self.headers["Authorization"])
                known = self.headers["Authorization"] == f"Bearer {served.token}"
                self._answer(200 if known else 401, {"results": [], "count": 0})

            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                served.logins.append(form)
                time.sleep(served.delay_s)
                if served.password not in form:
                    return self._answer(401, {})
                served.token = f"token {len(served.logins)}"
                expiry = (now() + served.life).isoformat()
                return self._answer(200, {"access_token": served.token, "expiration": expiry})

            def _answer(self, status: int, body: Any) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        class UnixServer(ThreadingUnixStreamServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                pass  # a client that waited no longer

        self._server = UnixServer(str(path), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def now() -> datetime:
    return datetime.now(timezone.utc).replace(tzinfo=None)


def credentials(path: Path, root: str, token: str, expiry: datetime) -> Path:
    settings = {"api_root": root, "client_class": "deephyper_balsam.store.client.StackClient"}
    write_private(path, yaml.safe_dump({**settings, "token": token, "token_expiry": expiry}))
    write_private(path.with_suffix(".key"), json.dumps({"username": "local", "password": "secret"}))
    return path


@pytest.fixture
def served(folder: Path) -> Iterator[Server]:
    made = Server(folder / "api.sock")
    os.chmod(folder / "api.sock", 0o600)
    yield made
    made.close()


@pytest.fixture
def client_yml(served: Server, folder: Path, tmp_path: Path) -> Path:
    root = sockets.url_of(folder / "api.sock")
    return credentials(tmp_path / "client.yml", root, "first", now() + timedelta(hours=7))


def test_a_url_says_the_path_whatever_is_in_it(tmp_path: Path) -> None:
    for path in ("/tmp/a/api.sock", "/tmp/A b%/ü?#/s", str(tmp_path)):
        assert sockets.path_of(sockets.url_of(path)) == path
    assert sockets.path_of("http://127.0.0.1:1/x") is None


def test_a_private_folder_is_private_under_any_umask_and_keeps_its_name(folder: Path) -> None:
    before = os.umask(0)
    try:
        assert private_folder(folder) == folder
        shutil.rmtree(folder)
        assert private_folder(folder) == folder
        assert folder.stat().st_mode & 0o777 == 0o700
        write_private(folder / "secret", "x")
        assert (folder / "secret").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o711, 0o1777])
def test_a_folder_that_others_may_enter_is_not_used(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    other = private_folder(folder)
    assert other != folder
    shutil.rmtree(other)
    with pytest.raises(UntrustedError, match="other accounts may"):
        sockets.listen(folder / "api.sock")
    with pytest.raises(UntrustedError, match="other accounts may"):
        sockets.connect(folder / "api.sock")


@as_root
def test_a_folder_that_a_stranger_made_under_our_name_is_left_alone(folder: Path) -> None:
    shutil.rmtree(folder)
    assert exit_code(as_stranger(lambda: os.mkdir(folder, 0o700))) == 0
    other = private_folder(folder)
    assert other != folder
    shutil.rmtree(other)
    with pytest.raises(UntrustedError, match=r"belongs to nobody \(uid 65534\) and this is root"):
        sockets.connect(folder / "api.sock")


@as_root
@pytest.mark.parametrize("place", ["folder", "link", "socket"])
def test_no_byte_is_sent_to_a_listener_of_a_stranger(folder: Path, tmp_path: Path, place: str) -> None:
    """His folder, a link of his to it, or a socket of his in our own folder."""
    theirs = private_folder()
    shutil.rmtree(theirs)
    received = theirs / "received"
    ready, told = os.pipe()

    def listen() -> None:
        theirs.mkdir(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(theirs / "api.sock"))
            os.chmod(theirs / "api.sock", 0o777)
            listener.listen()
            os.write(told, b"x")
            connection = listener.accept()[0]
            received.write_bytes(connection.recv(100))

    stranger = as_stranger(listen)
    os.read(ready, 1)
    try:
        _send_nothing(folder, theirs, tmp_path, place)
        if place == "socket":
            assert exit_code(stranger) == 0
            stranger = 0
            assert received.read_bytes() == b""
        else:
            assert not received.exists()
    finally:
        if stranger:
            os.kill(stranger, signal.SIGKILL)
            exit_code(stranger)
        if folder.is_symlink():
            folder.unlink()
        shutil.rmtree(theirs)


def _send_nothing(folder: Path, theirs: Path, tmp_path: Path, place: str) -> None:
    path = theirs / "api.sock"
    if place == "link":
        shutil.rmtree(folder)
        os.symlink(theirs, folder)
        path = folder / "api.sock"
    if place == "socket":  # as if he had found a way into our folder
        os.rename(theirs / "api.sock", folder / "api.sock")
        path = folder / "api.sock"
    yml = credentials(tmp_path / "client.yml", sockets.url_of(path), "secret token", now() + timedelta(hours=7))
    with pytest.raises(UnreachableError, match="nothing was sent"):
        Gateway(yml).sites()
    if place == "socket":  # the folder and the file pass by now, and the kernel still says who listens
        os.chown(path, 0, 0)
        path.chmod(0o600)
        with pytest.raises(UnreachableError, match=r"nobody \(uid 65534\) listens"):
            Gateway(yml).sites()


def test_a_server_that_is_down_is_told_with_what_starts_it(folder: Path, tmp_path: Path) -> None:
    root = sockets.url_of(folder / "api.sock")
    gateway = Gateway(credentials(tmp_path / "client.yml", root, "x", now() + timedelta(hours=7)))
    with pytest.raises(UnreachableError, match="server up"):
        gateway.sites()


@pytest.mark.parametrize("root", ["http://127.0.0.1:1", "ftp://x"])
def test_our_client_sends_no_token_to_an_address_that_cannot_prove_itself(tmp_path: Path, root: str) -> None:
    yml = credentials(tmp_path / "client.yml", root, "x", now() + timedelta(hours=7))
    with pytest.raises(NotLoggedInError, match=r"http\+unix"):
        Gateway(yml)


def test_proxies_and_netrc_count_for_nothing(
    client_yml: Path, served: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://proxy.invalid:3128")
    (tmp_path / ".netrc").write_text("default login eve password eve\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    assert Gateway(client_yml).sites() == []
    assert served.seen == ["Bearer first"]


def test_a_token_that_is_refused_is_renewed_once_and_for_all_others(client_yml: Path, served: Server) -> None:
    first, second = Gateway(client_yml), Gateway(client_yml)
    served.token = "keys were rotated"
    assert first.sites() == []
    assert second.sites() == []
    assert len(served.logins) == 1
    assert yaml.safe_load(client_yml.read_text(encoding="utf-8"))["token"] == served.token
    assert client_yml.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("left", [timedelta(hours=3), timedelta(seconds=-5)], ids=["nearly over", "over"])
def test_a_token_is_renewed_before_it_ends_and_after(
    client_yml: Path, served: Server, left: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("nobody may be asked"))
    settings = yaml.safe_load(client_yml.read_text(encoding="utf-8"))
    write_private(client_yml, yaml.safe_dump({**settings, "token_expiry": now() + left}))
    gateway = Gateway(client_yml)
    for _ in range(3):
        assert gateway.sites() == []
    assert len(served.logins) == 1
    assert served.seen == ["Bearer token 1"] * 3


def test_balsams_own_client_calls_renew_too(client_yml: Path, served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from balsam.config import ClientSettings

    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client_yml))
    client = ClientSettings.load_from_file().build_client()
    served.token = "keys were rotated"
    assert client.get("sites/")["count"] == 0
    client.refresh_auth()
    assert client.get("sites/")["count"] == 0


def test_an_account_that_the_server_refuses_is_not_tried_at_each_request(client_yml: Path, served: Server) -> None:
    served.password = "another"
    settings = yaml.safe_load(client_yml.read_text(encoding="utf-8"))
    write_private(client_yml, yaml.safe_dump({**settings, "token_expiry": now() + timedelta(hours=3)}))
    gateway = Gateway(client_yml)
    for _ in range(5):
        assert gateway.sites() == []
    assert len(served.logins) == 1


def test_a_client_finds_a_server_that_came_back_under_another_address(
    client_yml: Path, served: Server, folder: Path
) -> None:
    gateway = Gateway(client_yml)
    assert gateway.sites() == []
    (folder / "api.sock").rename(folder / "moved.sock")
    gateway._client.close_session()
    root = sockets.url_of(folder / "moved.sock")
    credentials(client_yml, root, "first", now() + timedelta(hours=7))
    assert gateway.sites() == []


def test_a_client_can_be_copied_to_another_process(client_yml: Path) -> None:
    import pickle

    from deephyper_balsam.store.client import StackClient

    made = StackClient(yaml.safe_load(client_yml.read_text(encoding="utf-8"))["api_root"], "first")
    assert isinstance(made.session, requests.Session)
    copied = pickle.loads(pickle.dumps(made))
    assert copied.session.get(f"{made.api_root}/sites/").status_code == 200


def test_what_others_may_write_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "client.key"
    path.write_text("{}")
    path.chmod(0o620)
    with pytest.raises(UntrustedError, match=r"other accounts may write in the key file .*0620"):
        require_own(path, path.stat(), "the key file")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder in which everybody may write, outside of every private one."""
    made = Path(tempfile.mkdtemp(prefix="dhb-shared-", dir="/tmp"))
    made.chmod(0o777)
    yield made
    shutil.rmtree(made)


def append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8", opener=open_own) as file:
        file.write(text)


@as_root
def test_what_a_stranger_planted_under_a_files_name_takes_nothing(shared: Path, tmp_path: Path) -> None:
    victim, log = tmp_path / "precious", shared / "log"
    victim.write_text("precious")

    def plant_file() -> None:
        log.write_text("his")
        log.chmod(0o666)

    for plant in (plant_file, lambda: log.symlink_to(victim), lambda: os.mkfifo(log)):
        assert exit_code(as_stranger(plant)) == 0
        append(log, "ours")
        assert log.read_text() == "ours"
        assert log.stat().st_uid == 0
        assert victim.read_text() == "precious"
        log.unlink()


@as_root
def test_a_link_that_a_stranger_exchanges_between_two_looks_is_not_followed(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, log = tmp_path / "precious", shared / "log"
    victim.write_text("precious")
    log.symlink_to(shared / "scratch")

    def exchange() -> None:
        log.unlink()
        log.symlink_to(victim)

    exchanged: list[int] = []

    def then_exchange(look: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **named: Any) -> Any:
            found = look(*args, **named)
            if not exchanged:
                exchanged.append(0)
                exchanged.append(exit_code(as_stranger(exchange)))
            return found

        return act

    for name in ("lstat", "fstat"):
        monkeypatch.setattr(os, name, then_exchange(getattr(os, name)))
    append(log, "ours")
    assert exchanged == [0, 0]
    assert victim.read_text() == "precious"


def test_a_link_of_our_own_is_followed_and_one_without_end_is_told(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "log").symlink_to("scratch/log")
    for _ in range(2):
        append(tmp_path / "log", "x")
    assert (tmp_path / "scratch" / "log").read_text() == "xx"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UntrustedError, match="without end"):
        append(tmp_path / "loop", "x")
    with pytest.raises(FileNotFoundError):
        open_own(str(tmp_path / "none"), os.O_RDONLY)


def test_a_token_of_another_process_that_is_refused_too_is_renewed(client_yml: Path, served: Server) -> None:
    """The server began anew, another process logged in, and the server began anew again."""
    gateway = Gateway(client_yml)
    settings = yaml.safe_load(client_yml.read_text(encoding="utf-8"))
    write_private(client_yml, yaml.safe_dump({**settings, "token": "second"}))
    served.token = "third"
    assert gateway.sites() == []
    assert served.seen == ["Bearer first", "Bearer second", "Bearer token 1"]


def test_a_login_waits_no_longer_than_the_request_that_needs_it(
    client_yml: Path, served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Gateway(client_yml)
    served.token, served.delay_s = "keys were rotated", 6
    session = gateway._client.session
    began = time.monotonic()
    with pytest.raises(requests.ReadTimeout):
        session.get(f"{gateway._client.api_root}/sites/", timeout=(2, 0.3))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "text", "7", "", "{1: 2}", "api_root: [1]", "client_class: 7", "a: b: c", "\xff"]
)
def test_credentials_that_are_no_mapping_are_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "client.yml"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(NotLoggedInError, match=r"client\.yml cannot be read"):
        Gateway(path)


@pytest.mark.usefixtures("in_time")
def test_a_key_file_that_is_a_pipe_or_open_to_others_renews_nothing(client_yml: Path, served: Server) -> None:
    key = client_yml.with_suffix(".key")
    key.chmod(0o666)
    served.token = "keys were rotated"
    with pytest.raises(NotLoggedInError):
        Gateway(client_yml).sites()
    key.unlink()
    os.mkfifo(key, 0o600)
    with pytest.raises(NotLoggedInError):
        Gateway(client_yml).sites()
    assert served.logins == []
