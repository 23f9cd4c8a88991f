"""A group's server: several accounts on one stack that other hosts reach, each kept to what is its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg2
import pytest
import requests
import yaml
from click.testing import CliRunner, Result

from deephyper_balsam.cli import main
from deephyper_balsam.errors import NotLoggedInError
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.gateway import Gateway

from .conftest import leftovers
from .waiting import wait_for

pytestmark = pytest.mark.live

_FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def group() -> Iterator[LocalStack]:
    """A server without a site that listens for other accounts."""
    folder = Path(tempfile.mkdtemp(prefix="live group "))
    made = LocalStack(folder / "balsam")
    try:
        made.up(site=False, listen="127.0.0.1")
        yield made
    finally:
        made.down()
        left = leftovers(made)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"the stack left processes behind: {left}"


def server(stack: LocalStack, *words: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, ["server", *words, "--dir", str(stack.folder)], input=answer)


def take_over(archive: Path, where: Path) -> Path:
    """What the colleague does with the archive; her credentials file is returned."""
    where.mkdir(mode=0o700)
    subprocess.run(["tar", "-xf", str(archive), "-C", str(where)], check=True)
    return where / "client.yml"


class Colleague:
    """A user of a group's server with what she was given."""

    def __init__(self, stack: LocalStack, name: str, folder: Path) -> None:
        self.stack, self.name = stack, name
        done = server(stack, "user", "add", name, "-o", str(folder / f"{name}.tar"))
        assert done.exit_code == 0, done.output
        self.client_path = take_over(folder / f"{name}.tar", folder / name)
        self.gateway = Gateway(self.client_path)
        assert self.gateway.sites() == []
        self.token = str(yaml.safe_load(self.client_path.read_text())["token"])
        self.key = json.loads(self.client_path.with_suffix(".key").read_text())

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Ask with the token of her first login; nothing renews it."""
        return ask(self.stack, method, path, body, self.token)

    def made(self, path: str, body: Any) -> Any:
        status, answer = self.ask("POST", path, body)
        assert status in (200, 201), answer
        return answer

    def logs_in(self) -> bool:
        """Whether her first password is good."""
        return log_in(self.stack, self.key)[0] == 200


def ask(stack: LocalStack, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
    """Ask over TLS, as from any host."""
    answer = requests.request(
        method,
        f"{stack.url}/{path}",
        json=body,
        headers={"Authorization": f"Bearer {token}"},
        verify=str(stack.client_path.with_suffix(".ca.pem")),
        timeout=60,
    )
    return answer.status_code, answer.json() if answer.content else None


def log_in(stack: LocalStack, account: dict[str, str]) -> tuple[int, float]:
    """The status of a login over TLS, and the seconds until it was there."""
    began = time.monotonic()
    answer = requests.post(
        f"{stack.url}/auth/password/login",
        data=urlencode(account),
        headers={"Content-Type": _FORM},
        verify=str(stack.client_path.with_suffix(".ca.pem")),
        timeout=60,
    )
    return answer.status_code, time.monotonic() - began


def is_refused(colleague: Colleague) -> None:
    """Every kind of route refuses her token: those of ours, and Balsam's own."""
    wait_for(lambda: colleague.ask("GET", "jobs/1")[0] == 401, "the token to be refused", 5)
    for method, path, body in (
        ("GET", "jobs/", None),
        ("GET", "sites/", None),
        ("GET", "auth/password/me", None),
        ("PATCH", "jobs/", [{"id": 1, "data": {}}]),
        ("PUT", "jobs/1", {"data": {}}),
        ("POST", "sites/", {"name": "x", "path": "/x"}),
        ("DELETE", "sites/1", None),
    ):
        assert colleague.ask(method, path, body)[0] == 401, (method, path)


def test_a_colleague_gets_an_account_and_works_with_it(group: LocalStack, tmp_path: Path) -> None:
    ann = Colleague(group, "ann", tmp_path)
    site_id = ann.gateway.create_site("ann-site", "/ann")
    assert [site["id"] for site in ann.gateway.sites()] == [site_id]
    assert Gateway(group.client_path).sites() == [], "the owner of the server works as another user"
    listed = {row["name"]: row for row in json.loads(server(group, "user", "ls", "--json").output)}
    assert listed["ann"] == {
        "name": "ann",
        "owner": False,
        "enabled": True,
        "sites": 1,
        "jobs": 0,
        "sessions": 0,
    }
    assert listed["local"]["owner"]
    assert "this server's own" in server(group, "user", "ls").output
    again = server(group, "user", "add", "ann", "-o", str(tmp_path / "again.tar"))
    assert again.exit_code == 2
    assert "There is a user 'ann' already" in again.output
    assert not (tmp_path / "again.tar").exists()
    assert ann.gateway.sites(), "it changed nothing"
    for name in ("", "-x", "ann b", "ann\n", "a" * 65, "../ann", "ann;"):
        bad = server(group, "user", "add", "-o", str(tmp_path / "bad.tar"), "--", name)
        assert bad.exit_code == 2, name
        assert not (tmp_path / "bad.tar").exists()


def test_a_server_that_others_cannot_reach_takes_no_users(stack: LocalStack, tmp_path: Path) -> None:
    done = server(stack, "user", "add", "ann", "-o", str(tmp_path / "ann.tar"))
    assert done.exit_code == 2
    assert "server up --dir" in done.output
    assert "--listen auto" in done.output
    assert [row["name"] for row in json.loads(server(stack, "user", "ls", "--json").output)] == ["local"]


def test_files_that_cannot_be_written_make_no_account(group: LocalStack, tmp_path: Path) -> None:
    (tmp_path / "ann.key").mkdir()
    done = server(group, "user", "add", "unwritten", "-o", str(tmp_path / "ann.yml"))
    assert done.exit_code == 2
    assert "unwritten" not in server(group, "user", "ls").output


def test_what_was_revoked_lets_nobody_in_until_it_is_renewed(group: LocalStack, tmp_path: Path) -> None:
    eve = Colleague(group, "eve", tmp_path)
    eve.gateway.create_site("eve-site", "/eve")
    other = Colleague(group, "other", tmp_path)
    done = server(group, "token", "revoke", "eve")
    assert done.exit_code == 0
    is_refused(eve)
    assert not eve.logs_in()
    with pytest.raises(NotLoggedInError):
        eve.gateway.sites()
    assert other.ask("GET", "sites/")[0] == 200
    assert other.logs_in()
    assert {row["name"]: row["enabled"] for row in json.loads(server(group, "user", "ls", "--json").output)}["other"]
    assert "revoked" in server(group, "user", "ls").output
    renewed = server(group, "token", "renew", "eve", "-o", str(tmp_path / "eve.tar"))
    assert renewed.exit_code == 0, renewed.output
    again = Gateway(take_over(tmp_path / "eve.tar", tmp_path / "eve again"))
    assert [site["name"] for site in again.sites()] == ["eve-site"], "what is hers stayed"
    is_refused(eve)
    assert not eve.logs_in()
    token = str(yaml.safe_load((tmp_path / "eve again" / "client.yml").read_text())["token"])
    assert server(group, "token", "renew", "eve", "-o", str(tmp_path / "eve.tar")).exit_code == 0
    wait_for(lambda: ask(group, "GET", "jobs/", token=token)[0] == 401, "the token of before to be refused", 5)
    for words in (("revoke", "nobody"), ("renew", "nobody", "-o", str(tmp_path / "x.tar"))):
        unknown = server(group, "token", *words)
        assert unknown.exit_code == 2
        assert "There is no user 'nobody'. There are: " in unknown.output
    assert not (tmp_path / "x.tar").exists()


@pytest.mark.parametrize("word", ["renew", "revoke"])
def test_the_owners_own_clients_go_on_when_their_token_is_revoked_or_renewed(group: LocalStack, word: str) -> None:
    gateway = Gateway(group.client_path)
    gateway.sites()
    token = str(yaml.safe_load(group.client_path.read_text())["token"])
    account = json.loads(group.client_path.with_suffix(".key").read_text())
    assert ask(group, "GET", "jobs/", token=token)[0] == 200
    done = server(group, "token", word)
    assert done.exit_code == 0, done.output
    wait_for(lambda: ask(group, "GET", "jobs/", token=token)[0] == 401, "the token to be refused", 5)
    assert log_in(group, account)[0] == 401
    assert gateway.sites() == []
    assert Gateway(group.client_path).sites() == []
    assert json.loads(group.client_path.with_suffix(".key").read_text()) != account
    group.up(site=False)
    assert Gateway(group.client_path).sites() == []


def test_a_removed_user_is_refused_at_once_and_nothing_of_hers_is_left(group: LocalStack, tmp_path: Path) -> None:
    leaving = Colleague(group, "leaving", tmp_path)
    world = things_of(leaving)
    kept = things_of(Colleague(group, "staying", tmp_path))
    before = tables(group)
    for answer in (None, "n\n"):
        refused = server(group, "user", "remove", "leaving", answer=answer)
        assert refused.exit_code == 2
        assert "1 sites with 1 jobs" in refused.output
    assert tables(group) == before
    for words in (("local", "--yes"), ("nobody", "--yes")):
        assert server(group, "user", "remove", *words).exit_code == 2
    assert tables(group) == before
    done = server(group, "user", "remove", "leaving", answer="y\n")
    assert done.exit_code == 0, done.output
    is_refused(leaving)
    assert not leaving.logs_in()
    after = tables(group)
    for table, ids in before.items():
        gone = {key for key, row in ids.items() if key not in after[table]}
        assert gone == {world[table]} if table in world else True, table
        assert table not in kept or kept[table] in after[table]
    # The name may be given again, and what was given before is worth nothing for it
    (tmp_path / "again").mkdir()
    again = Colleague(group, "leaving", tmp_path / "again")
    is_refused(leaving)
    assert again.ask("GET", "sites/") == (200, {"count": 0, "results": []})


def test_a_strangers_guesses_do_not_hold_up_a_good_login(group: LocalStack, tmp_path: Path) -> None:
    account = json.loads(group.client_path.with_suffix(".key").read_text())
    ends = threading.Event()
    tried: list[int] = []

    def guess() -> None:
        while not ends.is_set():
            tried.append(log_in(group, {**account, "password": "guess"})[0])

    strangers = [threading.Thread(target=guess) for _ in range(40)]
    for one in strangers:
        one.start()
    try:
        wait_for(lambda: len(tried) > 40, "the guesses")
        status, seconds = log_in(group, account)
    finally:
        ends.set()
        for one in strangers:
            one.join()
    assert status == 200
    assert seconds < 3
    assert set(tried) == {401}
    log = (group.logs / "api.log").read_text(encoding="utf-8")
    assert "A login as 'local' from 127.0.0.1, port " in log
    assert "answered after 4.00 s" in log
    assert "guess" not in log


# --- two users of one server -------------------------------------------------------------------------------------

_TABLES = ("users", "sites", "apps", "jobs", "batch_jobs", "sessions", "transfer_items", "log_events")


def tables(stack: LocalStack) -> dict[str, dict[int, Any]]:
    """Every row of the database by its number."""
    with psycopg2.connect(stack.database(stack.files.state()).url) as connection, connection.cursor() as cursor:
        found = {}
        for table in _TABLES:
            cursor.execute(f"SELECT id, row_to_json({table}) FROM {table}")
            found[table] = dict(cursor.fetchall())
        return found


def things_of(colleague: Colleague) -> dict[str, int]:
    """One of everything that a user may have; the number of each by its table."""
    name = f"{colleague.name}-{time.time_ns()}"
    where = {"here": "globus://00000000-0000-0000-0000-000000000000"}
    site = colleague.made("sites/", {"name": name, "path": f"/{name}", "transfer_locations": where})["id"]
    slot = {"required": False, "direction": "in", "local_path": "in.dat"}
    words = {"name": "app", "serialized_class": "", "source_code": "", "description": "", "parameters": {}}
    app = colleague.made("apps/", {**words, "site_id": site, "transfers": {"data": slot}})["id"]
    transfers = {"data": {"location_alias": "here", "path": "/data"}}
    job = colleague.made("jobs/", [{"app_id": app, "workdir": "w", "tags": {"k": "v"}, "transfers": transfers}])[0][
        "id"
    ]
    batch_job = colleague.made("batch-jobs/", _batch_job(site))["id"]
    assert colleague.ask("PUT", f"jobs/?id={job}", {"batch_job_id": batch_job}) == (200, 1)
    assert colleague.ask("PATCH", "jobs/", [{"id": job, "batch_job_id": batch_job}]) == (200, 1)
    session = colleague.made("sessions/", {"site_id": site, "batch_job_id": batch_job})["id"]
    transfer = colleague.ask("GET", f"transfers/?job_id={job}")[1]["results"][0]["id"]
    found = {"sites": site, "apps": app, "jobs": job, "batch_jobs": batch_job}
    return {**found, "sessions": session, "transfer_items": transfer}


def _batch_job(site: int) -> dict[str, Any]:
    words = {"num_nodes": 1, "wall_time_min": 10, "job_mode": "mpi", "project": "p", "queue": "q"}
    return {**words, "site_id": site, "filter_tags": {}}


def _attacks(hers: dict[str, int], mine: dict[str, int]) -> list[tuple[str, str, Any, set[int]]]:
    """What a user could try with the numbers of another's: method, path, body, and which answers refuse it."""
    no, bad, none_ = {404}, {400}, {200, 204}  # the last: it is about those of mine that it names, and there are none
    site, app, job, batch = hers["sites"], hers["apps"], hers["jobs"], hers["batch_jobs"]
    session, transfer = hers["sessions"], hers["transfer_items"]
    change = {"state": "FAILED", "data": {"changed": 1}}
    new_app = {"name": "new", "serialized_class": "", "source_code": "", "parameters": {}, "transfers": {}}
    acquire = {"max_num_jobs": 5, "filter_tags": {}, "states": ["READY", "STAGED_IN", "PREPROCESSED"]}
    new_job = {"app_id": mine["apps"], "workdir": "new"}
    return [
        *(("GET", f"{path}/{one}", None, no) for path, one in (("sites", site), ("apps", app), ("jobs", job))),
        *(("GET", f"{path}/{one}", None, no) for path, one in (("batch-jobs", batch), ("transfers", transfer))),
        ("POST", "apps/", {**new_app, "site_id": site}, no),
        ("PUT", f"apps/{app}", {"description": "changed"}, no),
        ("PUT", f"apps/{mine['apps']}", {"site_id": site}, no),
        ("DELETE", f"apps/{app}", None, no),
        ("PUT", f"sites/{site}", {"path": "/changed"}, no),
        ("DELETE", f"sites/{site}", None, no),
        ("POST", "jobs/", [{**new_job, "app_id": app}], no),
        ("POST", "jobs/", [new_job, {**new_job, "app_id": app, "workdir": "x"}], no),
        ("POST", "jobs/", [{**new_job, "parent_ids": [job]}], no),
        ("PATCH", "jobs/", [{"id": job, **change}], bad),
        ("PATCH", "jobs/", [{"id": mine["jobs"], **change}, {"id": job, **change}], bad),
        ("PATCH", "jobs/", [{"id": mine["jobs"], "batch_job_id": batch}], bad),
        ("PUT", f"jobs/{mine['jobs']}", {"batch_job_id": batch}, bad),
        ("PUT", f"jobs/?id={mine['jobs']}", {"batch_job_id": batch}, bad),
        ("PUT", f"jobs/{job}", change, bad),
        ("PUT", f"jobs/?id={job}", change, none_),
        ("PUT", f"jobs/?site_id={site}", change, none_),
        ("PUT", f"jobs/?batch_job_id={batch}", change, none_),
        ("DELETE", f"jobs/{job}", None, no),
        ("DELETE", f"jobs/?id={job}", None, none_),
        ("DELETE", f"jobs/?app_id={app}", None, none_),
        ("POST", "batch-jobs/", _batch_job(site), bad),
        ("PUT", f"batch-jobs/{batch}", {"state": "pending_deletion"}, no),
        ("PATCH", "batch-jobs/", [{"id": batch, "state": "pending_deletion"}], bad),
        ("DELETE", f"batch-jobs/{batch}", None, no),
        ("POST", "sessions/", {"site_id": site}, bad),
        ("POST", "sessions/", {"site_id": mine["sites"], "batch_job_id": batch}, bad),
        ("POST", f"sessions/{session}", acquire, no),
        ("PUT", f"sessions/{session}", None, no),
        ("DELETE", f"sessions/{session}", None, no),
        ("PUT", f"transfers/{transfer}", {"state": "done"}, no),
        ("PATCH", "transfers/", [{"id": transfer, "state": "done"}], bad),
    ]


def _looks(hers: dict[str, int]) -> list[str]:
    """Lists that name what is another's."""
    site, job, batch = hers["sites"], hers["jobs"], hers["batch_jobs"]
    return [
        f"sites/?id={site}",
        f"apps/?site_id={site}",
        f"apps/?id={hers['apps']}",
        *(f"jobs/?{name}={one}" for name, one in (("id", job), ("site_id", site), ("batch_job_id", batch))),
        f"jobs/?app_id={hers['apps']}",
        f"batch-jobs/?id={batch}",
        f"batch-jobs/?site_id={site}",
        f"sessions/?id={hers['sessions']}",
        f"transfers/?id={hers['transfer_items']}",
        f"transfers/?job_id={job}",
        f"events/?job_id={job}",
        f"events/?batch_job_id={batch}",
    ]


def test_one_user_reads_and_changes_nothing_of_anothers(group: LocalStack, tmp_path: Path) -> None:
    ada, ben = Colleague(group, "ada", tmp_path), Colleague(group, "ben", tmp_path)
    hers, mine = things_of(ada), things_of(ben)
    before = tables(group)
    attacks = _attacks(hers, mine)
    for method, path, body, refused in attacks:
        status, answer = ben.ask(method, path, body)
        assert status in refused, (method, path, body, status, answer)
        assert status != 200 or answer == 0, (method, path, answer)
        assert tables(group) == before, (method, path, body)
    for path in _looks(hers):
        assert ada.ask("GET", path)[1]["count"] == 1, path
        status, found = ben.ask("GET", path)
        assert (status, found["count"], found["results"]) == (200, 0, []), path
    for path in ("sites", "apps", "jobs", "batch-jobs", "sessions", "transfers", "events"):
        assert ben.ask("GET", f"{path}/")[1]["count"] == 1, path
    tried = {(method, _pattern(path)) for method, path, _, _ in attacks} | {
        ("GET", _pattern(path)) for path in _looks(hers)
    }
    routes = ask(group, "GET", "openapi.json")[1]["paths"]
    there = {(method.upper(), _pattern(path)) for path, methods in routes.items() for method in methods}
    missed = {one for one in there - tried if not one[1].startswith("auth/")}
    assert missed == {("POST", "sites/")}, "a route that no attack of this test is about"


def _pattern(path: str) -> str:
    """Return a route: its path with every number as one."""
    words = path.lstrip("/").partition("?")[0].split("/")
    return "/".join("N" if word.isdigit() or word.startswith("{") else word for word in words)
