"""Another account, on the login host and on a compute node, attacks a server that compute nodes reach.

Each attack is refused, and at the end the jobs and sites of the victim are what they were.
"""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from live.accounts import second_account
from live.waiting import wait_for

from .lab import LOGIN, NODES, ClusterLab

pytestmark = [pytest.mark.live, pytest.mark.slurm]

NODE = NODES[0]

# Makes each request of a list, and prints the list of what they were answered with
ASK = """
import json, ssl, sys, urllib.error, urllib.request
root, requests = sys.argv[1:]
said = []
for method, path, token, body in json.loads(requests):
    kind = "application/x-www-form-urlencoded" if path.endswith("login") else "application/json"
    headers = {"Content-Type": kind, **({"Authorization": "Bearer " + token} if token else {})}
    request = urllib.request.Request(root + path, body.encode() or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30, context=ssl._create_unverified_context()) as answer:
            said.append(answer.status)
    except urllib.error.HTTPError as error:
        said.append(error.code)
print(json.dumps(said))
"""
CONNECT = """
import socket, sys
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
    print("connected")
except OSError as error:
    print(type(error).__name__)
"""
# Asks for work as a worker of Balsam's own would, and sends what is no message
SHOUT = """
import json, socket, sys
host, _, port = sys.argv[1].rpartition(":")
got = b""
request = {"source": "x", "started": [], "done": [], "error": [], "request_num_jobs": 9}
for words in (json.dumps(request).encode(), b"x" * 99):
    with socket.create_connection((host.strip("[]").replace("*", "") or "127.0.0.1", int(port)), 5) as made:
        made.settimeout(2)
        try:
            made.sendall(bytes([255, 0, 0, 0, 0, 0, 0, 0, 1, 127, 3, 0]) + b"NULL".ljust(20, b"\\0") + words)
            while more := made.recv(4096):
                got += more
        except OSError:
            pass
print("nothing" if len(got) <= 128 and b"{" not in got else got)
"""
# Answers as the server would, with a certificate of the stranger's own, and writes down all that he is sent
POSE = """
import socket, ssl, sys
address, port, certificate = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate)
listener = socket.create_server((address, int(port)))
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    try:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            print("got", wrapped.recv(65536), flush=True)
    except OSError as error:
        print("no handshake", flush=True)
"""


@pytest.fixture(scope="module")
def stranger() -> Iterator[pwd.struct_passwd]:
    if shutil.which("setpriv") is None:
        pytest.skip("acting as a second account needs setpriv")
    with second_account("dhbnet") as made:
        yield made


@pytest.fixture(scope="module")
def server(lab: ClusterLab, stranger: pwd.struct_passwd) -> Iterator[Path]:
    """The folder of a stack on the login host, with a site and an agent."""
    lab.folder.chmod(0o755)
    lab.shared.chmod(0o755)
    folder = lab.shared / "balsam"
    done = lab.on(LOGIN, "deephyper-balsam", "server", "up", "--dir", str(folder), "--listen", "auto")
    assert done.returncode == 0, done.stdout
    yield folder
    done = lab.on(LOGIN, "deephyper-balsam", "server", "down", "--dir", str(folder))
    assert done.returncode == 0, done.stdout


def slurm_site(lab: ClusterLab, server: Path, name: str) -> tuple[Path, dict[str, str]]:
    """Make a site for Slurm on the login host; return its folder, and the variables that lead to it."""
    site = lab.shared / f"{name}-site"
    variables = {"BALSAM_CLIENT_PATH": str(server / "client.yml"), "BALSAM_SITE_PATH": str(site)}
    words = ["--config", "slurm", "--name", name, "--project", "m1", "--queue", "regular"]
    done = lab.on(LOGIN, "deephyper-balsam", "site", "init", str(site), *words, **variables)
    assert done.returncode == 0, done.stdout
    return site, variables


def client(folder: Path) -> dict[str, str]:
    found: dict[str, str] = yaml.safe_load((folder / "client.yml").read_text())
    return found


def act(lab: ClusterLab, host: str, account: pwd.struct_passwd, *command: str) -> str:
    """Let the stranger run a command on a host; return what it printed."""
    words = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups", *command]
    return lab.on(host, *words, folder=Path("/")).stdout.strip()


def ask(
    lab: ClusterLab, host: str, account: pwd.struct_passwd, root: str, *requests: tuple[str, str, str, str]
) -> set[int]:
    """Make requests (method, path, token, body) as the stranger; return with what they were answered."""
    said = act(lab, host, account, "/usr/bin/python3", "-c", ASK, root, json.dumps(requests))
    codes = json.loads(said)
    assert len(codes) == len(requests)
    return set(codes)


def belongings(lab: ClusterLab, folder: Path) -> str:
    """Return the victim's sites, jobs and applications as Balsam's own commands show them."""
    shown = []
    for kind in ("site", "job", "app"):
        done = lab.on(LOGIN, "balsam", kind, "ls", BALSAM_CLIENT_PATH=str(folder / "client.yml"))
        assert done.returncode == 0, done.stdout
        shown.append(done.stdout)
    return "\n".join(shown)


@pytest.mark.parametrize("host", [LOGIN, NODE])
def test_a_stranger_on_any_host_gets_nowhere_by_the_network(
    lab: ClusterLab, server: Path, stranger: pwd.struct_passwd, host: str
) -> None:
    before, root = belongings(lab, server), client(server)["api_root"]
    assert "://127." not in root
    user = json.dumps({"username": "eve", "password": "eve"})
    assert ask(lab, host, stranger, root, ("POST", "/auth/password/register", "", user)) == {404}
    forms = [f"username=local&password={guess}" for guess in ("local", "password")]
    assert ask(lab, host, stranger, root, *(("POST", "/auth/password/login", "", form) for form in forms)) == {401}
    requests = []
    for token in ("", "guess"):
        for path in ("/jobs/", "/sites/", "/apps/", "/batch-jobs/", "/sessions/", "/sites/1"):
            requests.append(("GET", path, token, ""))
        for method in ("POST", "PATCH", "DELETE"):
            requests.append((method, "/jobs/?id=1", token, "[]"))
        requests.append(("DELETE", "/sites/1", token, ""))
    assert ask(lab, host, stranger, root, *requests) == {401}
    assert belongings(lab, server) == before


@pytest.mark.parametrize("host", [LOGIN, NODE])
def test_a_stranger_on_any_host_reads_no_file_and_reaches_no_socket(
    lab: ClusterLab, server: Path, stranger: pwd.struct_passwd, host: str
) -> None:
    assert act(lab, host, stranger, "ls", str(server.parent)), "the way there is open"
    for look in (f"find {shlex.quote(str(server))} -type f", f"cat {server}/client.yml {server}/tls/ca.key"):
        assert "Permission denied" in act(lab, host, stranger, "bash", "-c", look)
    private = act(lab, host, stranger, "bash", "-c", "ls -d /tmp/dhb-* 2>/dev/null; true").split()
    if host == LOGIN:
        assert len(private) >= 2, "the sockets of PostgreSQL and of the API"
    for folder in private:
        assert "Permission denied" in act(lab, host, stranger, "ls", folder)
        for name in ("api.sock", ".s.PGSQL.5432"):
            path = f"{folder}/{name}"
            assert act(lab, host, stranger, "/usr/bin/python3", "-c", CONNECT, path) == "PermissionError"
    listening = lab.on(host, "ss", "-tlnH", folder=Path("/")).stdout if shutil.which("ss") else ""
    port = str(urlsplit(client(server)["api_root"]).port)
    if host == LOGIN and listening:
        ours = [line.split()[3] for line in listening.splitlines() if ":68" not in line.split()[3]]
        assert [one.rpartition(":")[2] for one in ours] == [port], listening


def test_who_answers_in_the_place_of_a_server_that_is_down_gets_no_token(
    lab: ClusterLab, server: Path, stranger: pwd.struct_passwd, tmp_path: Path
) -> None:
    """A man in the middle: at the server's own address and port, with a certificate of another authority for it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the stranger's certificate needs openssl")
    known = client(server)
    there = urlsplit(known["api_root"])
    theirs = lab.shared / "theirs"
    theirs.mkdir()
    shutil.chown(theirs, stranger.pw_uid, stranger.pw_gid)
    subject = ["-subj", "/CN=deephyper-balsam server", "-addext", f"subjectAltName=IP:{there.hostname}"]
    made = act(
        lab,
        LOGIN,
        stranger,
        *[openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject],
        *["-keyout", f"{theirs}/key.pem", "-out", f"{theirs}/cert.pem", "-days", "9"],
    )
    assert (theirs / "cert.pem").exists(), made
    both = theirs / "both.pem"
    both.write_text((theirs / "key.pem").read_text() + (theirs / "cert.pem").read_text())
    shutil.chown(both, stranger.pw_uid)
    assert lab.on(LOGIN, "deephyper-balsam", "server", "down", "--dir", str(server)).returncode == 0
    planted = json.loads((server / "stack.json").read_text())["api_dir"]  # where its socket was, which is gone
    assert act(lab, LOGIN, stranger, "ln", "-s", str(server.parent), planted) == ""
    posing = lab.start_on(
        LOGIN,
        *["setpriv", f"--reuid={stranger.pw_uid}", f"--regid={stranger.pw_gid}", "--clear-groups"],
        *["/usr/bin/python3", "-c", POSE, str(there.hostname), str(there.port), str(both)],
        folder=Path("/"),
    )
    try:
        assert posing.stdout is not None
        assert posing.stdout.readline() == "ready\n"
        for host in (LOGIN, NODE):
            done = lab.on(host, "deephyper-balsam", "search", "ls", BALSAM_CLIENT_PATH=str(server / "client.yml"))
            assert done.returncode == 3, done.stdout
            said = " ".join(done.stdout.split())
            assert "is not the server of this client.yml (its certificate is of another authority)" in said
    finally:
        os.killpg(posing.pid, 9)
        sent, _ = posing.communicate(timeout=30)
    assert "no handshake" in sent
    assert "got" not in sent
    assert known["token"] not in sent
    assert lab.on(LOGIN, "deephyper-balsam", "server", "up", "--dir", str(server)).returncode == 0
    assert client(server)["api_root"] == known["api_root"], "running clients find it again"
    assert json.loads((server / "stack.json").read_text())["api_dir"] != planted
    assert not (server.parent / "api.sock").exists()
    assert act(lab, LOGIN, stranger, "readlink", planted) == str(server.parent), "nothing was removed for him either"


def test_a_token_is_refused_on_any_host_once_it_was_revoked_or_its_user_removed(
    lab: ClusterLab, server: Path, stranger: pwd.struct_passwd
) -> None:
    before, root, place = belongings(lab, server), client(server)["api_root"], ("--dir", str(server))

    def call(*words: str) -> None:
        done = lab.on(LOGIN, "deephyper-balsam", "server", *words, *place)
        assert done.returncode == 0, done.stdout

    def with_token(token: str) -> set[int]:
        """Read one's own, change and delete the victim's."""
        requests = [("GET", "/jobs/", token, ""), ("GET", "/sites/", token, ""), ("DELETE", "/sites/1", token, "")]
        return {code for host in (LOGIN, NODE) for code in ask(lab, host, stranger, root, *requests)}

    given = lab.shared / "ann"
    given.mkdir()

    def log_in() -> str:
        done = lab.on(NODE, "balsam", "site", "ls", BALSAM_CLIENT_PATH=str(given / "client.yml"))
        assert done.returncode == 0, done.stdout
        return client(given)["token"]

    call("user", "add", "ann", "-o", str(given / "client.yml"))
    first = log_in()
    assert with_token(first) == {200, 404}, "her own lists, and a site that is none of hers"
    call("token", "revoke", "ann")
    assert with_token(first) == {401}
    call("token", "renew", "ann", "-o", str(given / "client.yml"))
    second = log_in()
    assert (with_token(first), with_token(second)) == ({401}, {200, 404})
    call("user", "remove", "ann", "--yes")
    assert with_token(second) == {401}
    assert belongings(lab, server) == before


def test_nothing_that_a_search_starts_on_a_node_is_open_to_a_stranger_there(
    lab: ClusterLab, server: Path, stranger: pwd.struct_passwd
) -> None:
    """Serial mode on two nodes: the master's port, the fork server's socket, the folders under /tmp, planted links."""
    place = lab.shared / "searched"
    place.mkdir()
    (place / "problem.py").write_text(
        "from deephyper_balsam import HpProblem\nproblem = HpProblem('p')\n"
        "problem.add_hyperparameter((-3.0, 3.0), 'x')\n"
        "def run(job):\n    import pathlib, time\n    go = pathlib.Path(__file__).with_name('go')\n"
        "    go.with_name(f'began-{job.id}').touch()\n"
        "    while not go.exists():\n        time.sleep(0.2)\n    return job['x']\n"
    )
    site, variables = slurm_site(lab, server, "searched")
    agent = lab.on(LOGIN, "bash", "-c", "balsam site start >/dev/null 2>&1", **variables)  # it keeps what it was given
    assert agent.returncode == 0, agent.stdout
    search = ["search", "run", "open", "--problem", "problem.py", "--run", "problem.py:run", "--method", "random"]
    search += ["--site", "searched", "--nodes", "2", "--wall-time-min", "20", "--job-mode", "serial"]
    search += ["--queue", "regular", "--project", "m1", "--max-evals", "4"]
    driver = lab.start_on(LOGIN, "deephyper-balsam", *search, folder=place, **variables)
    try:
        wait_for(lambda: len(list(place.glob("began-*"))) >= 2 or driver.poll() is not None, "two runs to begin", 240)
        keys = list((site / "log").glob("serial_mode_*.channel"))
        assert keys
        for node in NODES:
            for path in (*keys, server / "client.key"):
                assert "Permission denied" in act(lab, node, stranger, "cat", str(path))
            mine = lab.on(node, "bash", "-c", "ls -d /tmp/dhb-* /tmp/pymp-* 2>/dev/null; true", folder=Path("/"))
            for private in mine.stdout.split():
                assert "Permission denied" in act(lab, node, stranger, "ls", private), (node, private)
                assert "Permission denied" in act(lab, node, stranger, "touch", f"{private}/planted")
            listening = lab.on(node, "ss", "-tlnH", folder=Path("/")).stdout.splitlines()
            for line in listening:
                address = line.split()[3]
                if not address.endswith(":6818"):  # Slurm's own
                    said = act(lab, node, stranger, "/usr/bin/python3", "-c", SHOUT, address)
                    assert said == "nothing", (address, said)
    finally:
        (place / "go").touch()
        said, _ = driver.communicate(timeout=240)
        lab.on(LOGIN, "balsam", "site", "stop", **variables)
        lab.run("scancel", "--user=root")  # the launcher would hold its nodes until it was idle for long
    assert driver.returncode == 0, said
    assert "4 done" in said, "what the stranger sent ended nothing"


def test_the_host_whose_clock_or_trust_is_wrong_gets_one_clear_message(lab: ClusterLab, server: Path) -> None:
    """From a compute node: plain HTTP, another name than the certificate's, no authority."""
    known = client(server)
    there = urlsplit(known["api_root"])
    cases = {
        "speaks to https:// and": {"api_root": f"http://{there.netloc}"},
        "cannot be read (No such file": {},
    }
    for number, (message, changed) in enumerate(cases.items()):
        path = lab.shared / f"wrong-{number}.yml"
        path.write_text(yaml.safe_dump({**known, **changed}))
        done = lab.on(NODE, "deephyper-balsam", "search", "ls", BALSAM_CLIENT_PATH=str(path))
        assert done.returncode == 3, done.stdout
        assert message in " ".join(done.stdout.split())
        assert "Traceback" not in done.stdout
    plain = lab.on(NODE, "curl", "-s", f"http://{there.netloc}/auth/how") if shutil.which("curl") else None
    if plain is not None:
        assert "Use https://" in plain.stdout


def test_nodes_are_asked_whether_they_reach_it(lab: ClusterLab, server: Path) -> None:
    """`site check` within an allocation asks from all of its nodes."""
    site, variables = slurm_site(lab, server, "checked")
    output = lab.shared / "check.out"
    line = f"deephyper-balsam site check {shlex.quote(str(site))} || true"
    batch = ["sbatch", "-N", "3", "-t", "5", "-o", str(output), "--wrap", line]
    assert lab.on(LOGIN, *batch, **variables).returncode == 0
    wait_for(lambda: output.exists() and "nodes " in output.read_text(), "the check from within", 120)
    assert "ok     nodes      3 nodes of this allocation reach it" in output.read_text(), output.read_text()
