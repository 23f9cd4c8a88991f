"""Whatever is asked of our API, it answers and keeps what Balsam's own does; drawn requests, on real databases."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from .two_apis import Api, two_apis, without_times

pytestmark = pytest.mark.live

_STATES = (
    *("CREATED", "AWAITING_PARENTS", "READY", "STAGED_IN", "PREPROCESSED", "RUNNING", "RUN_DONE", "POSTPROCESSED"),
    *("STAGED_OUT", "JOB_FINISHED", "RUN_ERROR", "RUN_TIMEOUT", "RESTART_READY", "FAILED"),
)
_REQUESTS = 120


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Api, Api]]:
    with two_apis() as (ours, own):
        yield ours, own


class World:
    """What the requests of one test are drawn from: sites and applications of two users, and the jobs so far."""

    def __init__(self, both: tuple[Api, Api], seed: int) -> None:
        self.both, self.draw = both, random.Random(seed)
        self.jobs: list[int] = []
        self.sessions: list[int] = []
        self.transfers: list[int] = []
        stamp = time.time_ns()
        self.sites = [self.made("sites/", _site(f"site-{stamp}-{user}"), user)["id"] for user in ("ann", "bob")]
        self.apps = [
            self.made("apps/", _app(self.sites[who], name, slots), user)["id"]
            for who, user, name, slots in (
                (0, "ann", "plain", {}),
                (0, "ann", "staged", {"input": _slot("in"), "output": _slot("out")}),
                (1, "bob", "theirs", {}),
            )
        ]
        self.batch_jobs = [self.made("batch-jobs/", _batch_job(self.sites[0]))["id"]]
        self.foreign = [self.made("jobs/", [{"app_id": self.apps[2], "workdir": "theirs"}], "bob")[0]["id"]]
        self.workdirs = 0

    def ask(self, method: str, path: str, body: Any = None, user: str = "ann") -> tuple[int, Any]:
        """Ask both; what they answer must be alike."""
        ours, own = (api.ask(method, path, body, user) for api in self.both)
        said = f"{method} {path} {json.dumps(body)[:600]}"
        assert _comparable(path, ours) == _comparable(path, own), said
        return ours

    def made(self, path: str, body: Any, user: str = "ann") -> Any:
        status, answer = self.ask("POST", path, body, user)
        assert status in (200, 201), answer
        return answer

    # --- what is drawn -------------------------------------------------------------------------------------------

    def some_jobs(self, most: int = 4) -> list[int]:
        known = [*self.jobs, *self.foreign] if self.draw.random() < 0.1 else self.jobs
        chosen = self.draw.sample(known, min(len(known), self.draw.randint(1, most)))
        return [*chosen, 10**9] if self.draw.random() < 0.1 else chosen

    def new_job(self) -> dict[str, Any]:
        draw = self.draw
        self.workdirs += 1
        app = draw.choices(self.apps, (4, 4, 0.2))[0]
        job: dict[str, Any] = {"app_id": app, "workdir": f"w/{self.workdirs}", "tags": self.tags()}
        if app == self.apps[1]:
            transfers = {
                "input": {"location_alias": "here", "path": "/data/in"},
                "output": {"location_alias": "here", "path": "/data/out"},
                "unknown": {"location_alias": "here", "path": "/x"},
            }
            names = draw.choices(list(transfers), (5, 5, 0.2), k=draw.randint(0, 2))
            job["transfers"] = {name: transfers[name] for name in names}
        if self.jobs and draw.random() < 0.3:
            job["parent_ids"] = self.some_jobs(2)
        return job | self.fields()

    def fields(self) -> dict[str, Any]:
        draw = self.draw
        values = {
            "data": draw.choice([{}, {"a": [1, None, {"ü": 2.5}]}, {"t": "日本", "big": 2**63 - 1, "no": -1e-300}]),
            "num_nodes": draw.randint(1, 4),
            "gpus_per_rank": draw.choice([0, 0.5, 1.0]),
            "node_packing_count": draw.randint(1, 3),
            "wall_time_min": draw.randint(0, 60),
            "return_code": draw.choice([0, 1, -9]),
            "launch_params": draw.choice([{}, {"cpu": "none"}]),
            "serialized_parameters": draw.choice(["", "gASVAAAA"]),
        }
        return {key: value for key, value in values.items() if draw.random() < 0.3}

    def tags(self) -> dict[str, str]:
        return {key: self.draw.choice("xyz") for key in "abc" if self.draw.random() < 0.5}

    def change(self) -> dict[str, Any]:
        change = self.fields()
        if self.draw.random() < 0.7:
            change["state"] = self.draw.choice(_STATES)
            change["state_data"] = self.draw.choice([{}, {"message": "über"}])
        if self.draw.random() < 0.2:
            change["tags"] = self.tags()
        if self.draw.random() < 0.1:
            change["batch_job_id"] = self.batch_jobs[0]
        if self.draw.random() < 0.1:
            change["pending_file_cleanup"] = False
        if self.draw.random() < 0.1:
            change["workdir"] = f"moved/{self.draw.random()}"
        return change

    def query(self) -> str:
        draw = self.draw
        drawn: list[tuple[str, Any]] = [
            *(("id", one) for one in self.some_jobs(6)),
            *(("parent_id", one) for one in self.some_jobs(3)),
            ("app_id", draw.choice(self.apps)),
            ("site_id", draw.choice(self.sites)),
            ("batch_job_id", draw.choice([*self.batch_jobs, 10**9])),
            ("workdir__contains", draw.choice(["w/", "moved", "%", "_", "'"])),
            ("state__ne", draw.choice(_STATES)),
            *(("state", one) for one in draw.sample(_STATES, 3)),
            ("tags", f"{draw.choice('abc')}:{draw.choice('xyz')}"),
            ("tags", "nothing"),
            ("pending_file_cleanup", draw.choice(["true", "false"])),
            ("last_update_after", draw.choice(["2020-01-01", "2100-01-01T00:00:00Z", "never"])),
            ("last_update_before", "2100-01-01"),
            ("state", "NONE"),
        ]
        rare = ("never", "NONE")
        kept = {key for key, _ in drawn if draw.random() < 0.15}
        return urlencode([pair for pair in drawn if pair[0] in kept and (pair[1] not in rare or draw.random() < 0.2)])

    def page(self) -> str:
        draw = self.draw
        drawn = {
            "limit": draw.choice([0, 1, 2, 5, 100, 10**9]),
            "offset": draw.choice([0, 1, 3, 1000]),
            "ordering": draw.choice(["last_update", "-last_update", "id", "-id", "state", "-state", "workdir", "none"]),
        }
        return urlencode({key: value for key, value in drawn.items() if draw.random() < 0.4})

    # --- one step ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        kind = self.draw.choices(
            (
                self.create,
                self.patch,
                self.move,
                self.put,
                self.look,
                self.read,
                self.delete,
                self.session,
                self.transfer,
            ),
            (3, 6, 4, 2, 5, 3, 0.5, 3, 2),
        )[0]
        if self.jobs or kind == self.create:
            kind()

    def create(self) -> None:
        new = [self.new_job() for _ in range(self.draw.randint(1, 5))]
        if self.draw.random() < 0.05:
            new.append(dict(new[0]))
        status, answer = self.ask("POST", "jobs/", new)
        if status == 201:
            self.jobs += [row["id"] for row in answer]
            _, items = self.ask("GET", "transfers/?" + urlencode({"site_id": self.sites[0]}))
            self.transfers = [item["id"] for item in items["results"]]

    def patch(self) -> None:
        """The same columns in each row, as Balsam's own needs it; sometimes the same job twice, or a row without id."""
        ids = self.some_jobs()
        change = self.change()
        rows = [{"id": one, **change} for one in ids]
        for row in rows:
            if "data" in row:
                row["data"] = {**row["data"], "own": row["id"]}
        if self.draw.random() < 0.05:
            rows.append(dict(rows[0]))
        if self.draw.random() < 0.03:
            del rows[0]["id"]
        self.ask("PATCH", "jobs/", rows)

    def move(self) -> None:
        """A job on its way, as agents and launchers report it: where transfers and parents count."""
        for state in self.draw.choice(
            [("READY",), ("POSTPROCESSED",), ("STAGED_OUT",), ("RUNNING", "RUN_DONE", "POSTPROCESSED"), ("RUNNING",)]
        ):
            self.ask("PATCH", "jobs/", [{"id": self.draw.choice(self.jobs), "state": state, "state_data": {}}])

    def put(self) -> None:
        if self.draw.random() < 0.5:
            self.ask("PUT", f"jobs/{self.some_jobs(1)[0]}", self.change())
        else:
            self.ask("PUT", f"jobs/?{self.query() or 'tags=a:x'}", self.change())

    def look(self) -> None:
        self.ask("GET", f"jobs/?{self.query()}&{self.page()}", user=self.draw.choice(["ann", "ann", "bob"]))
        self.ask("GET", "events/?" + urlencode([("job_id", one) for one in self.some_jobs()]))

    def read(self) -> None:
        for one in self.some_jobs():
            self.ask("GET", f"jobs/{one}", user=self.draw.choice(["ann", "ann", "bob"]))

    def delete(self) -> None:
        if self.draw.random() < 0.7:
            self.ask("DELETE", f"jobs/{self.some_jobs(1)[0]}")
        else:
            self.ask("DELETE", f"jobs/?{self.query() or 'state=FAILED'}&tags=a:x&tags=b:y")
        _, left = self.ask("GET", f"jobs/?site_id={self.sites[0]}")
        self.jobs = [row["id"] for row in left["results"]]

    def session(self) -> None:
        if not self.sessions or self.draw.random() < 0.3:
            order = {"site_id": self.draw.choices(self.sites, (5, 1))[0]}
            if self.draw.random() < 0.5:
                order["batch_job_id"] = self.batch_jobs[0]
            status, answer = self.ask("POST", "sessions/", order)
            if status == 201:
                self.sessions.append(answer["id"])
            return
        one = self.draw.choice(self.sessions)
        spec = {
            "max_num_jobs": 2000,
            "filter_tags": self.draw.choice([{}, {"a": "x"}]),
            "states": self.draw.sample(_STATES, 4),
            **self.draw.choice([{}, {"max_aggregate_nodes": 3.5}, {"max_nodes_per_job": 1}, {"serial_only": True}]),
        }
        end = self.draw.random() < 0.3
        self.ask(*(("DELETE", f"sessions/{one}") if end else ("POST", f"sessions/{one}", spec)))
        if end:
            self.sessions.remove(one)
        self.ask("GET", "sessions/")

    def transfer(self) -> None:
        if self.transfers:
            state = self.draw.choice(["active", "done", "error", "pending"])
            self.ask("PATCH", "transfers/", [{"id": self.draw.choice(self.transfers), "state": state}])


def _comparable(path: str, answer: tuple[int, Any]) -> tuple[int, Any]:
    status, body = answer
    body = without_times(body)
    if path.startswith("events/") and status == 200:
        body["results"] = sorted(({**one, "id": None} for one in body["results"]), key=json.dumps)
    if path.startswith("sessions/") and isinstance(body, list):  # acquired jobs come in no order
        body = sorted(body, key=lambda row: int(row["id"]))
    return status, body


def _without_ids(answer: tuple[int, Any]) -> tuple[int, Any]:
    """Return an answer without what the two databases number differently after requests that one of them refused."""
    status, body = answer
    rows = [{**row, "id": None, "app_id": None, "last_update": None} for row in body["results"]]
    return status, {**body, "results": rows}


def _site(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "path": f"/sites/{name}",
        "transfer_locations": {"here": "globus://00000000-0000-0000-0000-000000000000"},
    }


def _slot(direction: str) -> dict[str, Any]:
    return {"required": False, "direction": direction, "local_path": f"{direction}.dat"}


def _app(site_id: int, name: str, slots: dict[str, Any]) -> dict[str, Any]:
    words = {"site_id": site_id, "name": name, "serialized_class": "", "source_code": "", "description": ""}
    return {**words, "parameters": {}, "transfers": slots}


def _batch_job(site_id: int) -> dict[str, Any]:
    words = {"site_id": site_id, "num_nodes": 1, "wall_time_min": 10, "job_mode": "mpi", "project": "p", "queue": "q"}
    return {**words, "filter_tags": {}}


@pytest.mark.parametrize("seed", range(6))
def test_drawn_requests_are_answered_and_kept_alike(both: tuple[Api, Api], seed: int) -> None:
    world = World(both, seed)
    for _ in range(_REQUESTS):
        world.step()
    ours, own = (api.tables() for api in both)
    assert ours == own
    assert len(world.jobs) > 5  # it was about something


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_job_with_files_to_transfer_waits_for_them(both: tuple[Api, Api], direction: str) -> None:
    world = World(both, 0)
    name = {"in": "input", "out": "output"}[direction]
    job = {"app_id": world.apps[1], "workdir": "files", "transfers": {name: {"location_alias": "here", "path": "/f"}}}
    [row] = world.made("jobs/", [job])
    world.ask("PATCH", "jobs/", [{"id": row["id"], "state": "CREATED", "state_data": {}}])
    world.ask("PATCH", "jobs/", [{"id": row["id"], "state": {"in": "READY", "out": "POSTPROCESSED"}[direction]}])
    _, found = world.ask("GET", f"jobs/{row['id']}")
    assert found["state"] == {"in": "READY", "out": "POSTPROCESSED"}[direction]
    _, items = world.ask("GET", f"transfers/?job_id={row['id']}")
    assert [item["state"] for item in items["results"]] == ["pending"]


# --- what cannot be said -----------------------------------------------------------------------------------------


_BAD_VALUES = {
    "half a surrogate pair": rb'"a\udcff"',
    "the other half": rb'"a\ud800"',
    "no UTF-8": b'"a\xff"',
    "an integer beyond 64 bits": b"1180591620717411303424",
    "a negative one": b"-9223372036854775809",
    "no number": b"NaN",
    "infinity": b"1e400",
    "lists in lists": b"[" * 400 + b"]" * 400,
    "many more": b"[" * 5000 + b"]" * 5000,
    "objects in objects": b'{"a":' * 252 + b"1" + b"}" * 252,
}
_PLACES = {
    "a value": b'{"v": %s}',
    "within": b'{"v": [1, {"w": %s}]}',
}


@pytest.fixture
def job_id(both: tuple[Api, Api]) -> int:
    world = World(both, 0)
    return int(world.made("jobs/", [{"app_id": world.apps[0], "workdir": "w"}])[0]["id"])


@pytest.mark.parametrize("place", _PLACES.values(), ids=_PLACES)
@pytest.mark.parametrize("value", _BAD_VALUES.values(), ids=_BAD_VALUES)
def test_what_no_answer_can_hold_is_refused_and_not_written(
    both: tuple[Api, Api], job_id: int, place: bytes, value: bytes
) -> None:
    ours = both[0]
    before = ours.tables()
    app_id = before["jobs"][-1]["app_id"]
    data = place % value
    new = b'[{"app_id": %d, "workdir": "bad", "data": %s}]' % (app_id, data)
    for method, path, body in (
        ("POST", "jobs/", new),
        ("PATCH", "jobs/", b'[{"id": %d, "data": %s}]' % (job_id, data)),
        ("PUT", f"jobs/{job_id}", b'{"data": %s}' % data),
        ("PUT", f"jobs/?id={job_id}", b'{"state": "FAILED", "state_data": %s}' % data),
    ):
        status, answer = ours.ask(method, path, body)
        assert status == 400, (method, path, status, answer)
        assert isinstance(answer["detail"], str)
    assert ours.tables() == before
    assert ours.ask("GET", "jobs/")[0] == 200


@pytest.mark.parametrize("text", [rb"a\udcff", b"a\xff", rb"a\u0000b"], ids=["surrogate", "no UTF-8", "NUL"])
def test_text_that_cannot_be_kept_is_refused_wherever_it_stands(
    both: tuple[Api, Api], job_id: int, text: bytes
) -> None:
    ours = both[0]
    before = ours.tables()
    app, site = before["jobs"][-1]["app_id"], before["sites"][0]["id"]
    word = b'"%s"' % text
    bodies: list[tuple[str, str, bytes]] = [
        ("POST", "jobs/", b'[{"app_id": %d, "workdir": %s}]' % (app, word)),
        ("POST", "jobs/", b'[{"app_id": %d, "workdir": "w", "tags": {"a": %s}}]' % (app, word)),
        ("POST", "jobs/", b'[{"app_id": %d, "workdir": "w", "tags": {%s: "a"}}]' % (app, word)),
        ("POST", "jobs/", b'[{"app_id": %d, "workdir": "w", "serialized_parameters": %s}]' % (app, word)),
        ("PATCH", "jobs/", b'[{"id": %d, "state": "FAILED", "state_data": {"message": %s}}]' % (job_id, word)),
        ("PATCH", "jobs/", b'[{"id": %d, "serialized_return_value": %s}]' % (job_id, word)),
        ("POST", "sites/", b'{"name": %s, "path": "/p"}' % word),
        ("POST", "sites/", b'{"name": "n", "path": %s}' % word),
        ("PUT", f"sites/{site}", b'{"path": %s}' % word),
        ("POST", "apps/", b'{"site_id": %d, "name": "N", "serialized_class": "", "source_code": %s}' % (site, word)),
    ]
    for method, path, body in bodies:
        status, answer = ours.ask(method, path, body)
        assert 400 <= status < 500, (method, path, body, answer)
    assert ours.tables() == before


def test_what_the_database_cannot_keep_is_the_clients_mistake_and_not_written(
    both: tuple[Api, Api], job_id: int
) -> None:
    ours = both[0]
    before = ours.tables()
    app = before["jobs"][-1]["app_id"]
    for method, path, body in (
        ("POST", "jobs/", [{"app_id": app, "workdir": "w" * 300}]),
        ("POST", "jobs/", [{"app_id": app, "workdir": "w", "num_nodes": 2**40}]),
        ("PATCH", "jobs/", [{"id": job_id, "batch_job_id": 10**9}]),
        ("PATCH", "jobs/", [{"id": job_id, "return_code": 2**33}]),
        ("GET", "jobs/?offset=" + "9" * 30, None),
        ("GET", "jobs/?limit=-1", None),
        ("GET", "jobs/?workdir__contains=%00", None),
        ("GET", "jobs/?tags=a:%00", None),
        ("GET", "sites/?name=%00", None),
    ):
        status, answer = ours.ask(method, path, body)
        assert status in (400, 422), (path, answer)
    assert ours.tables() == before


def test_a_row_that_cannot_be_said_is_handed_out_escaped(both: tuple[Api, Api], job_id: int) -> None:
    ours = both[0]
    deep = '{"a":' * 300 + "1" + "}" * 300
    bad = {
        rb'{"v": "a\udcff", "k\ud800": [1, "\udc00"]}'.decode(): {"v": "a\\udcff", "k\\ud800": [1, "\\udc00"]},
        '{"v": 1180591620717411303424}': {"v": 2.0**70},
        deep: None,
        '{"v": ' + "[" * 5000 + "]" * 5000 + "}": None,
        rb'{"v": "a\u0000"}'.decode(): {"v": "a\x00"},
    }
    for text, said in bad.items():
        ours.sql("UPDATE jobs SET data = %s::json WHERE id = %s", text, job_id)
        for path in (f"jobs/{job_id}", f"jobs/?id={job_id}", "jobs/?limit=5&ordering=-id"):
            status, answer = ours.ask("GET", path)
            assert status == 200, (text[:40], path, answer)
        if said is not None:
            assert ours.ask("GET", f"jobs/{job_id}")[1]["data"] == said
        status, _ = ours.ask("PATCH", "jobs/", [{"id": job_id, "state": "RUNNING", "state_data": {}}])
        assert status == 200


def test_a_moment_outside_of_the_calendar_hides_no_list(both: tuple[Api, Api], job_id: int) -> None:
    ours = both[0]
    for state, moment in (("RUNNING", "0001-01-01T00:00:00+14:00"), ("RUN_DONE", "9999-12-31T23:59:59-14:00")):
        change = {"id": job_id, "state": state, "state_data": {}, "state_timestamp": moment}
        assert ours.ask("PATCH", "jobs/", [change])[0] == 200
        status, answer = ours.ask("GET", f"events/?job_id={job_id}")
        assert status == 200, answer
        assert state in [event["to_state"] for event in answer["results"]]


# --- large answers -----------------------------------------------------------------------------------------------


def test_a_large_page_is_the_same_in_pieces_and_its_memory_is_given_back(both: tuple[Api, Api]) -> None:
    world = World(both, 0)
    [row] = world.made("jobs/", [{"app_id": world.apps[0], "workdir": "large", "tags": {"large": "yes"}}])
    copies = """
        INSERT INTO jobs (app_id, workdir, tags, data, state, last_update, parent_ids, num_nodes)
        SELECT app_id, workdir || n, tags, json_build_object('n', n, 'text', repeat('päge', 5000)), 'FAILED',
               '2026-01-01', '{}', 1
        FROM jobs, generate_series(1, 3000) AS n WHERE jobs.id = %s
    """
    for api in both:
        api.sql(copies, row["id"])
    ours, balsams = both
    try:
        before, balsams_before = (api.resident_bytes("VmRSS") for api in both)
        page = "jobs/?tags=large:yes&ordering=-workdir"
        for path in (page, page + "&limit=1234&offset=7", page + "&limit=1500&offset=2900", page + "&offset=5000"):
            answers = [_without_ids(api.ask("GET", path)) for api in both]
            alike = answers[0] == answers[1]  # not in the assertion: it would show their difference
            assert alike, path
        answered = len(json.dumps(ours.ask("GET", page)[1], ensure_ascii=False).encode())
        assert answered > 60_000_000
        assert ours.resident_bytes("VmHWM") - before < answered
        deadline = time.monotonic() + 60
        balsams_keep = balsams.resident_bytes("VmRSS") - balsams_before
        while ours.resident_bytes("VmRSS") - before > 0.8 * balsams_keep and time.monotonic() < deadline:
            time.sleep(0.5)
        assert ours.resident_bytes("VmRSS") - before < 0.8 * balsams_keep
    finally:
        for api in both:
            api.sql('DELETE FROM jobs WHERE tags @> \'{"large": "yes"}\'')


def test_what_belongs_to_a_job_is_found_by_its_id_when_the_job_is_deleted(both: tuple[Api, Api]) -> None:
    for table in ("log_events", "transfer_items"):
        indexes = both[0].sql("SELECT indexdef FROM pg_indexes WHERE tablename = %s", table)
        assert any("(job_id)" in definition for (definition,) in indexes)


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"max_aggregate_nodes": 1.0}], ids=["serial", "mpi"])
def test_jobs_that_are_alike_start_in_the_order_in_which_they_were_made(
    both: tuple[Api, Api], shape: dict[str, float]
) -> None:
    ours = both[0]
    world = World(both, 0)
    app, tags = world.apps[0], {"line": "one"}
    made = world.made("jobs/", [{"app_id": app, "workdir": f"line {n}", "tags": tags} for n in range(9)])
    ids = [row["id"] for row in made]
    ready = [{"id": id_, "state": "PREPROCESSED", "state_data": {}} for id_ in ids]
    assert ours.ask("PATCH", "jobs/", ready) == (200, 9)
    for id_ in ids[:3]:  # what is changed moves to another place in the table
        assert ours.ask("PATCH", "jobs/", [{"id": id_, "data": {"changed": True}}]) == (200, 1)
    session = ours.made("sessions/", {"site_id": world.sites[0]})["id"]
    spec = {"max_num_jobs": 1, "states": ["PREPROCESSED"], "filter_tags": tags, **shape}
    try:
        started = [ours.made(f"sessions/{session}", spec)[0]["id"] for _ in ids]
        assert started == ids
    finally:
        assert ours.ask("DELETE", f"sessions/{session}")[0] == 204
        for api in both:
            api.sql('DELETE FROM jobs WHERE tags @> \'{"line": "one"}\'')
