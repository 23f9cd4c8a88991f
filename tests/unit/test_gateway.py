"""The gateway: Balsam's rows as they are, and every failure as an error that says whether trying again can help."""

from __future__ import annotations

import socket
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.common.wording import storable
from deephyper_balsam.errors import (
    BalsamError,
    InputError,
    NotLoggedInError,
    UnknownSiteError,
    UnreachableError,
)
from deephyper_balsam.store import gateway as module
from deephyper_balsam.store.encoding import pack, parse_time, unpack
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.record import check_name

pytest_plugins = ["balsam_fixtures"]


@pytest.fixture
def app_id(gateway: Gateway, site: VirtualSite) -> int:
    app = {"site_id": site.id, "name": "train", "serialized_class": "", "source_code": "", "description": "it trains"}
    return int(gateway.create_app({**app, "parameters": {}, "transfers": {}})["id"])


def make_jobs(app_id: int, count: int, search: str = "s") -> list[dict[str, object]]:
    return [
        {"app_id": app_id, "workdir": f"{search}/{n}", "tags": {"search": search, "trial": str(n)}, "data": {"n": n}}
        for n in range(count)
    ]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_site_is_found_by_name_or_id_and_an_unknown_one_is_answered_with_those_there_are(
    gateway: Gateway, site: VirtualSite, api: BalsamApi
) -> None:
    api.add_site("theta")
    assert gateway.site("lab")["id"] == gateway.site(str(site.id))["id"] == site.id
    with pytest.raises(UnknownSiteError, match=r"no Balsam site 'laboratory'.*: lab, theta\."):
        gateway.site("laboratory")


def test_without_any_site_the_message_says_none(gateway: Gateway) -> None:
    with pytest.raises(UnknownSiteError, match="are: none"):
        gateway.site("lab")


def test_applications_are_listed_by_site_and_name(
    gateway: Gateway, site: VirtualSite, app_id: int, api: BalsamApi
) -> None:
    other = api.add_site("theta")
    assert [app["name"] for app in gateway.apps()] == ["train"]
    assert gateway.apps(other) == []
    assert [app["id"] for app in gateway.apps(site.id, "train")] == [app_id]


def test_ids_of_created_jobs_come_in_the_order_given_whatever_the_order_of_the_answer(
    gateway: Gateway, app_id: int, api: BalsamApi
) -> None:
    ids = gateway.create_jobs(make_jobs(app_id, 30))
    assert [api.jobs[job_id]["data"]["n"] for job_id in ids] == list(range(30))


def test_many_jobs_are_created_in_batches(
    gateway: Gateway, app_id: int, api: BalsamApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BULK_ROWS", 10)
    assert len(set(gateway.create_jobs(make_jobs(app_id, 25)))) == 25
    assert [len(request.body) for request in api.asked("POST", "jobs/")] == [10, 10, 5]


def test_jobs_are_read_page_by_page_until_the_last(
    gateway: Gateway, app_id: int, api: BalsamApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.create_jobs(make_jobs(app_id, 20))
    monkeypatch.setattr(module, "_PAGE_ROWS", 10)
    assert [row["data"]["n"] for row in gateway.jobs({"search": "s"})] == list(range(20))
    assert [len(request.rows) for request in api.asked("GET", "jobs/")] == [10, 10, 0]


def test_jobs_are_selected_by_all_tags_states_ids_and_time_of_change(
    gateway: Gateway, app_id: int, api: BalsamApi
) -> None:
    ids = gateway.create_jobs(make_jobs(app_id, 3) + make_jobs(app_id, 2, "another"))
    assert [row["id"] for row in gateway.jobs({"search": "s"})] == ids[:3]
    assert [row["id"] for row in gateway.jobs({"search": "s", "trial": "1"})] == [ids[1]]
    assert [row["id"] for row in gateway.jobs({"search": "s"}, ids=[ids[0], ids[4]])] == [ids[0]]
    api.let_pass(60)
    api.change_job(ids[2], state="RUNNING")
    changed = next(gateway.jobs({"search": "s"}, states=["RUNNING"]))["last_update"]
    assert [row["id"] for row in gateway.jobs({"search": "s"}, changed_since=changed)] == [ids[2]]
    before = api.jobs[ids[1]]["last_update"].isoformat()
    assert [row["id"] for row in gateway.jobs({"search": "s"}, changed_until=before)] == ids[:2]
    assert gateway.count_jobs({"search": "s"}) == 3
    assert gateway.count_jobs({"search": "s"}, ["RUNNING"], changed) == 1


def test_data_is_replaced_whole_and_writing_none_asks_nothing(gateway: Gateway, app_id: int, api: BalsamApi) -> None:
    [job_id] = gateway.create_jobs(make_jobs(app_id, 1))
    gateway.write_data({job_id: {"b": [1, None]}})
    assert api.jobs[job_id]["data"] == {"b": [1, None]}
    asked = len(api.requests)
    gateway.write_data({})
    assert len(api.requests) == asked


def test_only_jobs_in_the_named_states_move(gateway: Gateway, app_id: int, api: BalsamApi) -> None:
    ids = gateway.create_jobs(make_jobs(app_id, 3))
    api.change_job(ids[0], state="RUNNING")
    assert gateway.move_jobs({"search": "s"}, ("STAGED_IN",), "FAILED", "because", ids[:2]) == 1
    assert [api.jobs[job_id]["state"] for job_id in ids] == ["RUNNING", "FAILED", "STAGED_IN"]
    [event] = gateway.events(to_state="FAILED")
    assert (event["job_id"], event["data"]) == (ids[1], {"message": "because"})


def test_moving_many_jobs_names_them_in_batches_that_fit_into_a_url(
    gateway: Gateway, app_id: int, api: BalsamApi
) -> None:
    ids = gateway.create_jobs(make_jobs(app_id, 450))
    assert gateway.move_jobs({"search": "s"}, ("STAGED_IN",), "FAILED", "because", ids) == 450
    assert [len(request.query["id"]) for request in api.asked("PUT", "jobs/")] == [200, 200, 50]


def test_events_come_oldest_first(gateway: Gateway, app_id: int, api: BalsamApi) -> None:
    [job_id] = gateway.create_jobs(make_jobs(app_id, 1))
    for state in ("PREPROCESSED", "RUNNING", "RUN_DONE"):
        api.let_pass(1)
        api.change_job(job_id, state=state)
    assert [event["to_state"] for event in gateway.events(job_id=job_id)] == [
        "STAGED_IN",
        "PREPROCESSED",
        "RUNNING",
        "RUN_DONE",
    ]


def test_an_allocation_can_be_asked_for_seen_and_ended(gateway: Gateway, site: VirtualSite) -> None:
    row = gateway.create_batch_job(
        {"site_id": site.id, "num_nodes": 2, "wall_time_min": 5, "queue": "q", "project": "p", "job_mode": "serial"}
    )
    assert (row["state"], row["num_nodes"]) == ("pending_submission", 2)
    gateway.end_batch_job(row["id"])
    assert [batch["state"] for batch in gateway.batch_jobs([site.id])] == ["pending_deletion"]
    assert gateway.batch_jobs([site.id], states=["running"]) == []


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_refused_login_says_balsam_login_and_names_the_file(gateway: Gateway, api: BalsamApi) -> None:
    api.token = "another"
    with pytest.raises(NotLoggedInError, match=r"does not accept the login in .*client\.yml\. Run `balsam login`.*401"):
        gateway.sites()


def test_after_a_new_login_reconnect_goes_on(gateway: Gateway, api: BalsamApi, client_yml: Path) -> None:
    api.token = "another"
    with pytest.raises(NotLoggedInError):
        gateway.sites()
    api.write_client_yml(client_yml)
    gateway.reconnect()
    assert gateway.sites() == []


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_in_trouble_may_be_asked_again(gateway: Gateway, api: BalsamApi, status: int) -> None:
    api.answer_next(status)
    with pytest.raises(UnreachableError, match=rf"GET .*/sites/ answered {status}"):
        gateway.sites()
    assert gateway.sites() == []


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refused_request_is_an_error_that_trying_again_does_not_cure(
    gateway: Gateway, api: BalsamApi, status: int
) -> None:
    api.answer_next(status)
    with pytest.raises(BalsamError, match=f"{status}") as caught:
        gateway.sites()
    assert not isinstance(caught.value, (UnreachableError, NotLoggedInError))


def test_the_servers_own_words_are_in_the_message(gateway: Gateway) -> None:
    with pytest.raises(BalsamError, match="Could not find one or more Apps"):
        gateway.create_jobs(make_jobs(999, 1))


def test_each_call_makes_one_attempt(gateway: Gateway, api: BalsamApi) -> None:
    api.answer_next(503, count=10)
    with pytest.raises(UnreachableError):
        gateway.sites()
    assert len(api.requests) == 1


def test_a_connection_that_closes_without_an_answer_is_unreachable(gateway: Gateway, api: BalsamApi) -> None:
    api.lose_next_answer()
    with pytest.raises(UnreachableError, match=f"does not answer at {api.url}"):
        gateway.sites()


def test_a_refused_connection_is_unreachable_and_the_message_is_short(api: BalsamApi, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        root = f"http://127.0.0.1:{unused.getsockname()[1]}"
        gateway = Gateway(api.write_client_yml(tmp_path / "client.yml", api_root=root))
        with pytest.raises(UnreachableError) as caught:
            gateway.sites()
    assert str(caught.value).startswith(f"Balsam does not answer at {root}: ")
    assert "Connection refused" in str(caught.value)
    assert "object at" not in str(caught.value)


def test_a_server_slower_than_the_time_limit_is_unreachable(
    gateway: Gateway, api: BalsamApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "_read_timeout_s", 0.1)
    api.be_slow(0.4)
    with pytest.raises(UnreachableError, match="timed out"):
        gateway.sites()


def test_an_answer_that_is_no_json_is_an_error_that_names_the_address(gateway: Gateway, api: BalsamApi) -> None:
    gateway._client.api_root = f"{api.url}/page"  # some other web server, or a proxy's page
    api.answer_with_page()
    with pytest.raises(BalsamError, match=rf"{api.url}/page/sites/.*no JSON"):
        gateway.sites()


def test_an_expired_token_is_noticed_before_anything_is_asked(api: BalsamApi, tmp_path: Path) -> None:
    past = datetime.now() - timedelta(days=2)
    gateway = Gateway(api.write_client_yml(tmp_path / "client.yml", token_expiry=past))
    with pytest.raises(NotLoggedInError, match=r"client\.yml has expired\. Run `balsam login`"):
        gateway.sites()
    assert api.requests == []


def test_missing_credentials_say_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(NotLoggedInError, match=r"no credentials at .*none\.yml.*balsam login.*server up"):
        Gateway(tmp_path / "none.yml")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "just text",
        "api_root: [",
        "token: x",
        "api_root: http://a\nclient_class: no.such.Client\n",
        "\x00",
    ],
    ids=["empty", "list", "text", "no yaml", "no api_root", "unknown client", "binary"],
)
def test_broken_credentials_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "client.yml").write_text(text)
    with pytest.raises(NotLoggedInError, match=r"The credentials at .*client\.yml cannot be read"):
        Gateway(tmp_path / "client.yml")


def test_the_environment_names_the_credentials(
    api: BalsamApi, client_yml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client_yml))
    assert Gateway().client_path == client_yml
    monkeypatch.delenv("BALSAM_CLIENT_PATH")
    monkeypatch.setenv("HOME", str(client_yml.parent))
    with pytest.raises(NotLoggedInError, match=r"\.balsam/client\.yml"):
        Gateway()


def test_rows_with_unequal_columns_in_one_patch_are_the_servers_error_and_change_nothing(
    gateway: Gateway, app_id: int, api: BalsamApi
) -> None:
    one, other = gateway.create_jobs(make_jobs(app_id, 2))
    with pytest.raises(UnreachableError, match="500"):
        gateway._call("PATCH", "jobs/", body=[{"id": one, "data": {}, "return_code": 0}, {"id": other, "data": {}}])
    assert [api.jobs[job_id]["data"] for job_id in (one, other)] == [{"n": 0}, {"n": 1}]


# --- words and names -------------------------------------------------------------------------------------------------


def test_times_with_and_without_zone_are_utc() -> None:
    assert parse_time("1970-01-01T00:01:00") == 60.0
    assert parse_time("1970-01-01T00:01:00.500000+00:00") == 60.5
    assert parse_time("1970-01-01T01:01:00+01:00") == 60.0
    assert parse_time("1970-01-01T00:01:00Z") == 60.0


def test_values_survive_packing_and_what_is_broken_is_our_error() -> None:
    assert unpack(pack({"x": 1.5, "name": "a'b\n", "flag": True})) == {"x": 1.5, "name": "a'b\n", "flag": True}
    for broken in ("", "no base64", "AAAA"):
        with pytest.raises(BalsamError, match="cannot be decoded"):
            unpack(broken)


@pytest.mark.parametrize("name", ["a", "digits-1", "A.b_c-9", "9lives", "x" * 64])
def test_these_names_can_name_a_search(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "../a", ".a", "-a", "_a", "ä", "a:b", "a\n"])
def test_these_names_cannot(name: str) -> None:
    with pytest.raises(InputError, match="cannot name a search: 1 to 64 letters"):
        check_name(name)


# --- text that the database cannot keep ------------------------------------------------------------------------------

BAD = ("caf\udce9", "a\0b")


@pytest.mark.parametrize("text", BAD)
def test_text_that_balsam_cannot_keep_is_escaped_in_whatever_is_sent(
    gateway: Gateway, app_id: int, api: BalsamApi, text: str
) -> None:
    [job_id] = gateway.create_jobs([{**make_jobs(app_id, 1)[0], "data": {text: [text, {"k": text}]}}])
    escaped = storable(text)
    assert escaped != text
    assert api.jobs[job_id]["data"] == {escaped: [escaped, {"k": escaped}]}
    gateway.write_data({job_id: {"why": text}})
    gateway.retag_jobs({job_id: ({"search": "s", "note": text}, {"why": text})})
    assert api.jobs[job_id]["tags"]["note"] == escaped
    gateway.move_jobs({"search": "s"}, ("CREATED", "READY", "STAGED_IN"), "FAILED", text)
    assert list(gateway.jobs({"search": text})) == []
    for request in api.requests:
        assert text not in repr((request.body, request.query))


@pytest.mark.parametrize("text", BAD)
def test_a_path_or_name_that_would_have_to_be_escaped_is_refused_before_it_is_sent(
    gateway: Gateway, site: VirtualSite, app_id: int, api: BalsamApi, text: str
) -> None:
    count = len(api.requests)
    app = {"site_id": site.id, "name": "n", "description": f"run function {text}/run.py", "parameters": {}}
    for refused in (
        lambda: gateway.create_site("new", text),
        lambda: gateway.create_site(text, "/new"),
        lambda: gateway.move_site(site.id, text),
        lambda: gateway.create_app(app),
    ):
        with pytest.raises(InputError, match="no valid UTF-8"):
            refused()
    assert len(api.requests) == count


def test_numpys_numbers_are_sent_as_numbers_and_what_is_too_large_is_refused(
    gateway: Gateway, app_id: int, api: BalsamApi
) -> None:
    data = {"n": np.int64(3), "x": np.float32(0.5), "b": np.True_, "a": np.arange(2)}
    [job_id] = gateway.create_jobs([{**make_jobs(app_id, 1)[0], "data": data}])
    assert api.jobs[job_id]["data"] == {"n": 3, "x": 0.5, "b": True, "a": [0, 1]}
    with pytest.raises(InputError, match="64 bits"):
        gateway.write_data({job_id: {"n": 2**70}})
