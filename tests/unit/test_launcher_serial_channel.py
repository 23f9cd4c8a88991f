"""Strangers at the door of serial mode: they listen where the master should, ask it for jobs, and send it rubbish."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from deephyper_balsam.launcher import main as launcher
from deephyper_balsam.launcher import serial_channel
from deephyper_balsam.launcher.serial_channel import (
    Channel,
    ChannelError,
    Keys,
    Report,
    channel_file,
    receive,
    secured,
)
from deephyper_balsam.launcher.serial_mode import sharing_master

REPORT = {"source": "n", "started": [], "done": [], "error": [], "request_num_jobs": 1}
SECRET = {"id": 1, "envs": {"TOKEN": "the launcher's own"}}


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "serial_mode.log"


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(subprocess.check_output(["mktemp", "-d", "/tmp/dhb-test-XXXX"], text=True).strip())
    yield made
    shutil.rmtree(made)


class BalsamMaster:
    """What of Balsam's serial master stands around `handle_request`."""

    def __init__(self, path: Path) -> None:
        self.context = secured(path).Context()
        self.socket = self.context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("tcp://*:0")
        self.active_ids: set[int] = set()
        self.num_outstanding_jobs = 0
        self.wanted: list[int] = []
        self.job_source = SimpleNamespace(want=self.wanted.append)
        self.told: list[Any] = []

    def update_job_states(self, *told: Any) -> None:
        self.told.append(told)

    def acquire_jobs(self, count: int) -> list[dict[str, Any]]:
        return [SECRET][:count]

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Any]]:
    """Run masters in threads of their own until the test ends."""
    monkeypatch.setattr("deephyper_balsam.launcher.serial_mode._QUIET_MS", 50)
    ends: list[Callable[[], None]] = []

    def serve(path: Path) -> Any:
        master = sharing_master(BalsamMaster)(path)
        over = threading.Event()

        def loop() -> None:
            while not over.is_set():
                master.handle_request()

        thread = threading.Thread(target=loop)
        thread.start()

        def end() -> None:
            over.set()
            thread.join(20)
            assert not thread.is_alive()
            master.close()

        ends.append(end)
        return master

    yield serve
    for end in ends:
        end()


def ask(path: Path, message: bytes | None = None, host: str = "127.0.0.1") -> dict[str, Any]:
    """What the master answers to a worker that has the launcher's private file."""
    context = secured(path).Context()
    client = context.socket(zmq.REQ)
    client.setsockopt(zmq.LINGER, 0)
    client.connect(f"tcp://{host}:0")
    try:
        client.send(json.dumps(REPORT).encode() if message is None else message)
        answer: dict[str, Any] = client.recv_json()
        return answer
    finally:
        client.close(linger=0)
        context.term()


def stranger_gets(endpoint: str, keys: Keys | None = None, wait_ms: int = 1500) -> bytes | None:
    """What the master answers to somebody who speaks the protocol but has no private file."""
    context = zmq.Context()
    client = context.socket(zmq.REQ)
    client.setsockopt(zmq.LINGER, 0)
    if keys is not None:
        client.curve_serverkey = keys.master_public.encode()
        client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
    try:
        client.connect(endpoint)
        client.send_json(REPORT)
        return client.recv() if client.poll(wait_ms) else None
    finally:
        client.close(linger=0)
        context.term()


def test_workers_with_the_private_file_get_jobs_and_strangers_get_nothing(
    log_file: Path, serving: Callable[[Path], Any]
) -> None:
    path = serial_channel.open_on_nodes(log_file)
    serving(path)
    assert ask(path) == {"new_jobs": [SECRET]}
    channel = Channel.read(path)
    endpoint = f"tcp://127.0.0.1:{channel.port}"
    assert stranger_gets(endpoint) is None  # without any key
    assert stranger_gets(endpoint, channel.keys) is None  # even if he knows whom he talks to
    assert ask(path) == {"new_jobs": [SECRET]}


def test_who_answers_at_the_masters_place_without_its_key_is_not_believed(log_file: Path) -> None:
    path = serial_channel.open_on_nodes(log_file)
    context = zmq.Context()
    forged = context.socket(zmq.REP)
    forged.curve_publickey, forged.curve_secretkey = zmq.curve_keypair()
    forged.curve_server = True
    port = forged.bind_to_random_port("tcp://127.0.0.1")
    with path.open("a") as file:
        file.write(json.dumps({"port": port}) + "\n")
    worker_context = secured(path).Context()
    worker = worker_context.socket(zmq.REQ)
    worker.setsockopt(zmq.LINGER, 0)
    try:
        worker.connect("tcp://127.0.0.1:0")
        worker.send_json(REPORT)
        assert not forged.poll(1500)  # he does not even learn what the worker says
    finally:
        for made in (worker, forged):
            made.close(linger=0)
        worker_context.term()
        context.term()


def test_nobody_can_take_the_masters_port_before_it(log_file: Path, serving: Callable[[Path], Any]) -> None:
    """The port is chosen by the bind itself; until then there is none to take."""
    path = serial_channel.open_on_nodes(log_file)
    assert Channel.read(path).port is None
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        serving(path)
        assert Channel.read(path).port not in (None, taken.getsockname()[1])
        assert ask(path) == {"new_jobs": [SECRET]}


RUBBISH = [
    b"",
    b"\xff\xfe\x00",
    b"null",
    b"[]",
    b"{}",
    b"[" * 100_000,
    json.dumps({**REPORT, "request_num_jobs": -1}).encode(),
    json.dumps({**REPORT, "request_num_jobs": True}).encode(),
    json.dumps({**REPORT, "done": 3}).encode(),
    json.dumps({**REPORT, "started": ["1"]}).encode(),
    json.dumps({**REPORT, "error": [[1, 2]]}).encode(),
    json.dumps({**REPORT, "error": [5]}).encode(),
    json.dumps({**REPORT, "source": {}}).encode(),
]


@pytest.mark.parametrize("several_nodes", [True, False], ids=["nodes", "one machine"])
def test_a_message_that_is_no_workers_is_dropped_and_the_next_one_is_answered(
    several_nodes: bool,
    log_file: Path,
    folder: Path,
    serving: Callable[[Path], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened = serial_channel.open_on_nodes(log_file) if several_nodes else None
    path = opened or serial_channel.open_on_one_machine(log_file, folder)
    master = serving(path)
    for message in RUBBISH:
        assert ask(path, message)["new_jobs"] == []
    assert master.told == []
    assert len([line for line in caplog.messages if "was dropped" in line]) == len(RUBBISH)
    assert ask(path) == {"new_jobs": [SECRET]}


def test_a_message_of_several_parts_is_dropped_whole(folder: Path, log_file: Path) -> None:
    context = zmq.Context()
    ends = [context.socket(kind) for kind in (zmq.REP, zmq.REQ)]
    try:
        ends[0].bind(f"ipc://{folder}/x")
        ends[1].connect(f"ipc://{folder}/x")
        ends[1].send_multipart([json.dumps(REPORT).encode(), b"more"])
        assert receive(ends[0]) is None
        assert "refused" in ends[1].recv_json()
        ends[1].send_json(REPORT)
        assert receive(ends[0]) == Report("n", [], [], [], 1)
    finally:
        for end in ends:
            end.close(linger=0)
        context.term()


def test_a_worker_does_not_wait_for_a_master_that_is_dead(
    log_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serial_channel, "_ANSWER_LOOK_MS", 20)
    path = serial_channel.open_on_one_machine(log_file, folder)
    context = secured(path, lambda: False).Context()
    worker = context.socket(zmq.REQ)
    worker.setsockopt(zmq.LINGER, 0)
    worker.connect("tcp://here:0")
    worker.send_json(REPORT)
    with pytest.raises(ChannelError, match="ended without a word"):
        worker.recv_json()
    worker.close(linger=0)
    context.term()


# ---- the private file


def test_the_private_file_is_private_whatever_the_umask(log_file: Path) -> None:
    before = os.umask(0)
    try:
        path = serial_channel.open_on_nodes(log_file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Channel.read(path).keys is not None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_file_that_others_can_read_is_refused(mode: int, log_file: Path) -> None:
    path = serial_channel.open_on_nodes(log_file)
    path.chmod(mode)
    with pytest.raises(ChannelError, match=r"only its owner may read \(0600\)"):
        Channel.read(path)


@pytest.mark.usefixtures("in_time")
def test_a_pipe_in_the_files_place_holds_nobody(log_file: Path) -> None:
    os.mkfifo(channel_file(log_file), 0o600)
    with pytest.raises(ChannelError, match=r"only its owner may read \(0600\)"):
        Channel.read(channel_file(log_file))


def test_a_file_that_somebody_laid_there_before_is_neither_used_nor_followed(log_file: Path, tmp_path: Path) -> None:
    channel_file(log_file).write_text("his")
    with pytest.raises(FileExistsError):
        serial_channel.open_on_nodes(log_file)
    channel_file(log_file).unlink()
    channel_file(log_file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        serial_channel.open_on_nodes(log_file)
    with pytest.raises(ChannelError, match="cannot read"):
        Channel.read(channel_file(log_file))
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "text", ["", "{}\n", "x\n", '{"keys": {}}\n', '{"keys": 3}\n', '{"socket": "/s", "port": "x"}\n']
)
def test_a_broken_file_is_told_as_such(text: str, log_file: Path) -> None:
    path = channel_file(log_file)
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(ChannelError, match="is broken"):
        Channel.read(path)


def test_a_line_that_the_master_has_not_finished_is_not_read_yet(log_file: Path) -> None:
    path = serial_channel.open_on_nodes(log_file)
    with path.open("a") as file:
        file.write('{"port": 17')
    assert Channel.read(path).port is None


def test_a_library_without_curve_is_told_before_anything_starts(
    log_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq, "has", lambda what: False)
    with pytest.raises(ChannelError, match="built without CURVE"):
        serial_channel.open_on_nodes(log_file)
    assert not channel_file(log_file).exists()


def test_nothing_secret_stands_on_the_command_line_or_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class Run:
        def __init__(self, **values: Any) -> None:
            seen.update(values)

        def start(self) -> None:
            pass

    settings = SimpleNamespace(mpi_app_launcher=Run, serial_mode_startup_params={})
    site = SimpleNamespace(log_path=tmp_path, settings=SimpleNamespace(launcher=settings))
    nodes = [SimpleNamespace(node_id=f"n{i}", hostname=f"n{i}", gpu_ids=[]) for i in range(2)]
    private: list[Path] = []
    options = {"index": 0, "loopback": False, "poll_s": 1.0}
    launcher._start_mode(site, "serial", nodes, 5, {}, options, private)
    (path,) = private
    keys = Channel.read(path).keys
    assert keys is not None
    told = f"{seen['cmdline']} {seen['envs']}"
    assert not [key for key in vars(keys).values() if key in told]
    assert seen["cmdline"].split()[seen["cmdline"].split().index("--master-address") + 1] == "n0:0"


# ---- another account on the same machine


@pytest.fixture(scope="session")
def stranger() -> str:
    """The name of another account."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("another account takes root and setpriv")
    try:
        return pwd.getpwnam("nobody").pw_name
    except KeyError:
        pytest.skip("there is no account `nobody` here")


def as_stranger(name: str, code: str, *arguments: str) -> str:
    """What a program prints that runs as another account."""
    account = pwd.getpwnam(name)
    ids = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    # The interpreter of a virtual environment may lie where he cannot go: the system's own plays him
    python = shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or sys.executable
    done = subprocess.run(
        ["setpriv", *ids, python, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    if done.returncode == 127 or ("Permission denied: " in done.stderr and not done.stdout):
        pytest.skip(f"no Python that {name} can run: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_account_reaches_neither_socket_nor_keys(
    stranger: str, folder: Path, serving: Callable[[Path], Any]
) -> None:
    # Where he could go: a folder that is open to all
    shared = Path(subprocess.check_output(["mktemp", "-d", "/tmp/dhb-shared-XXXX"], text=True).strip())
    try:
        shared.chmod(0o755)
        path = serial_channel.open_on_one_machine(shared / "one.log", folder)
        serving(path)
        keys = serial_channel.open_on_nodes(shared / "nodes.log")
        assert ask(path) == {"new_jobs": [SECRET]}
        code = """
            import errno, socket, sys
            def tried(what):
                try:
                    what()
                    return "done"
                except OSError as error:
                    return errno.errorcode[error.errno]
            def connect():
                socket.socket(socket.AF_UNIX).connect(sys.argv[1])
            def bind():
                socket.socket(socket.AF_UNIX).bind(sys.argv[1] + "2")
            print(tried(connect), tried(bind), *(tried(lambda: open(name).read()) for name in sys.argv[2:]))
        """
        said = as_stranger(stranger, code, str(Channel.read(path).socket), str(path), str(keys))
        assert said == "EACCES EACCES EACCES EACCES"
    finally:
        shutil.rmtree(shared)


def test_another_account_that_speaks_to_the_port_gets_no_job_and_does_not_hang_the_master(
    stranger: str, log_file: Path, serving: Callable[[Path], Any]
) -> None:
    path = serial_channel.open_on_nodes(log_file)
    serving(path)
    port = Channel.read(path).port
    # ZMTP 3.0 greeting with the mechanism NULL, a READY, then a request: what worked against a master without keys
    code = """
        import json, socket, struct, sys
        greeting = b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00" + b"NULL".ljust(20, b"\\0") + b"\\x00" + bytes(31)
        def frame(flags, body):
            return bytes([flags, len(body)]) + body
        ready = b"\\x05READY\\x0bSocket-Type" + struct.pack(">I", 3) + b"REQ"
        request = json.dumps({"source": "n", "started": [], "done": [], "error": [], "request_num_jobs": 1}).encode()
        for first in (greeting, b"GET / HTTP/1.1\\r\\n\\r\\n", bytes(5000), b""):
            here = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=2)
            got = b""
            try:
                here.sendall(first)
                if first == greeting:
                    here.sendall(frame(4, ready) + frame(1, b"") + frame(0, request))
                while part := here.recv(4096):
                    got += part
            except OSError:
                pass
            print("TOKEN" in got.decode("latin-1"))
    """
    assert as_stranger(stranger, code, str(port)).split() == ["False"] * 4
    assert ask(path) == {"new_jobs": [SECRET]}
