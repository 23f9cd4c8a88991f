"""The snapshot of a long search: what is read through it is what Balsam holds, whatever befalls."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.errors import UnreachableError
from deephyper_balsam.store import snapshots, trial_rows
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.snapshots import SnapshotWriter, read_rows, read_snapshot
from deephyper_balsam.trial import Resources, Trial

pytest_plugins = ["balsam_fixtures"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes of four trials, when there are three."""
    monkeypatch.setattr(snapshots, "_ROWS_A_NOTE", 4)
    monkeypatch.setattr(snapshots, "_EVERY_ROWS", 3)


class Story:
    """A search of which trials end, one a second; the driver has taken in what it was told."""

    def __init__(self, gateway: Gateway, site: VirtualSite, api: BalsamApi) -> None:
        self.gateway, self.site, self.api = gateway, site, api
        self.app_id = gateway.create_app({"site_id": site.id, "name": "a", "serialized_class": "", "source_code": ""})[
            "id"
        ]
        self.made = self.gathered = 0
        self.writer = SnapshotWriter(gateway, "s", site.id, read_snapshot(gateway, "s"))

    def end(self, count: int, gathered: bool = True) -> list[int]:
        numbers = range(self.made, self.made + count)
        self.made += count
        self.gateway.create_jobs(
            [trial_rows.trial_job(Trial(n, {"x": n}), "s", self.app_id, Resources(), 1.0, None) for n in numbers]
        )
        ids = self.site.acquire(count)
        for job_id in ids:
            self.api.let_pass(1)
            self.site.finish(job_id, float(job_id))
            if gathered:
                self.take_in(job_id)
        return ids

    def take_in(self, job_id: int) -> None:
        data = self.api.jobs[job_id]["data"]
        self.gateway.write_data({job_id: {**data, "gathered": {"order": self.gathered, "at": 1.0}}})
        self.gathered += 1

    def let_settle(self) -> None:
        self.api.let_pass(61)
        self.gateway.sites()  # any answer tells the server's time

    def settle(self, looks: int = 1) -> None:
        self.let_settle()
        for _ in range(looks):
            self.writer.look(self.gathered)

    @property
    def notes(self) -> int:
        return self.gateway.count_jobs({"kind": "snapshot", "snapshot": "s"})

    def direct(self) -> list[dict[str, Any]]:
        return [plain(row) for row in self.gateway.jobs({"search": "s"})]


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in snapshots._LEFT_OUT}


@pytest.fixture
def story(gateway: Gateway, site: VirtualSite, api: BalsamApi) -> Story:
    return Story(gateway, site, api)


def rows_asked(api: BalsamApi, since: int) -> int:
    """How many trials' jobs were handed out in the requests after the first `since`."""
    tagged = [one for one in api.asked("GET", "jobs/")[since:] if "search:s" in one.query.get("tags", [])]
    return sum(len(request.rows) for request in tagged)


def test_what_is_read_through_the_snapshot_is_what_balsam_holds(story: Story, api: BalsamApi) -> None:
    story.end(10)
    story.settle(looks=3)
    assert story.notes == 3
    story.end(2, gathered=False)
    story.gateway.create_jobs([trial_rows.trial_job(Trial(99, {"x": 0}), "s", story.app_id, Resources(), 1.0, None)])
    before = len(api.asked("GET", "jobs/"))
    snapshot = read_snapshot(story.gateway, "s")
    assert [plain(row) for row in snapshot.rows] == story.direct()
    assert snapshot.sound
    assert snapshot.until is not None
    assert rows_asked(api, before) - len(snapshot.rows) < 8  # of thirteen: three in full, one to count


def test_a_short_search_has_no_snapshot_and_costs_no_note(story: Story) -> None:
    story.end(2)
    story.settle(looks=3)
    assert story.notes == 0
    assert read_snapshot(story.gateway, "s").until is None


def test_what_ended_lately_or_is_not_taken_in_is_not_copied(story: Story) -> None:
    story.end(3)
    late = story.end(1, gathered=False)
    story.end(4)
    story.settle(looks=2)
    assert story.notes == 1  # the first three: nothing after the one that is still open
    assert [plain(row) for row in read_rows(story.gateway, "s")] == story.direct()
    story.take_in(late[0])
    story.end(2)
    story.settle(looks=3)
    assert story.notes == 3
    story.end(3)
    story.writer.look(story.gathered)  # nothing of it has settled
    assert story.notes == 3
    assert [plain(row) for row in read_rows(story.gateway, "s")] == story.direct()


def test_one_that_changes_after_it_was_copied_is_read_as_it_is(story: Story) -> None:
    ids = story.end(5)
    story.settle(looks=2)
    story.api.change_job(ids[1], data={**story.api.jobs[ids[1]]["data"], "more": 1})
    snapshot = read_snapshot(story.gateway, "s")
    assert [plain(row) for row in snapshot.rows] == story.direct()
    assert snapshot.sound


def test_a_snapshot_that_does_not_hold_what_balsam_does_is_left_aside(
    story: Story, caplog: pytest.LogCaptureFixture
) -> None:
    ids = story.end(6)
    story.settle(looks=2)
    story.api.jobs[ids[0]]["tags"] = {"set_aside": "s", "trial": "0"}  # as if it had never been this search's
    snapshot = read_snapshot(story.gateway, "s")
    assert [plain(row) for row in snapshot.rows] == story.direct()
    assert not snapshot.sound
    assert "does not hold what Balsam does" in caplog.text
    again = SnapshotWriter(story.gateway, "s", story.site.id, snapshot)
    story.end(5)
    story.let_settle()
    again.look(99)
    assert story.notes == 2  # no second snapshot beside it


@pytest.mark.parametrize("rows", ["", "no base64 !", "AAAA", None])
def test_a_note_that_cannot_be_read_is_no_obstacle(story: Story, rows: str | None) -> None:
    story.end(4)
    story.settle()
    [note] = story.gateway.jobs({"kind": "snapshot"})
    data = {"until": note["data"]["until"]} | ({} if rows is None else {"rows": rows})
    story.api.change_job(note["id"], data=data)
    snapshot = read_snapshot(story.gateway, "s")
    assert [plain(row) for row in snapshot.rows] == story.direct()
    assert not snapshot.sound


def test_a_lost_answer_costs_a_note_and_no_trial(story: Story, api: BalsamApi) -> None:
    story.end(6)
    story.let_settle()
    api.lose_next_answer(method="POST", path="jobs/")
    with pytest.raises(UnreachableError):
        story.writer.look(story.gathered)
    for _ in range(2):
        story.writer.look(story.gathered)
    assert story.notes == 3  # the first one twice
    snapshot = read_snapshot(story.gateway, "s")
    assert snapshot.sound
    assert [plain(row) for row in snapshot.rows] == story.direct()


def test_trials_that_changed_in_one_moment_may_stand_in_two_notes(story: Story) -> None:
    ids = story.end(9)
    moment = story.api.jobs[ids[8]]["last_update"]
    for job_id in ids:
        story.api.jobs[job_id]["last_update"] = moment
    story.settle(looks=4)
    assert story.notes == 3
    snapshot = read_snapshot(story.gateway, "s")
    assert snapshot.sound
    assert [plain(row) for row in snapshot.rows] == story.direct()


def test_the_next_driver_goes_on_where_the_snapshot_ends(story: Story) -> None:
    story.end(5)
    story.settle(looks=2)
    assert story.notes == 2
    story.end(4)
    story.let_settle()
    story.writer = SnapshotWriter(story.gateway, "s", story.site.id, read_snapshot(story.gateway, "s"))
    story.settle()
    assert story.notes == 3
    story.settle(looks=3)
    assert story.notes == 3
    assert [plain(row) for row in read_rows(story.gateway, "s")] == story.direct()
