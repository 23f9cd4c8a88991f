"""The record of a search in Balsam: its settings, and one driver at a time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from balsam import schemas

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam import record
from deephyper_balsam.errors import SearchExistsError, SearchRunningError, UnknownSearchError
from deephyper_balsam.gateway import Gateway
from deephyper_balsam.record import Driver, SearchRecord

pytest_plugins = ["balsam_fixtures"]

SETTINGS = {"method": "ambs", "seed": 1, "options": {"kappa": 1.96}, "problem": {"name": "p"}, "run": ("a", 1)}


@pytest.fixture
def made(gateway: Gateway, site: VirtualSite) -> SearchRecord:
    return record.create_record(gateway, "s", dict(SETTINGS), site.id, 1000.0)


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_settings_are_found_again(gateway: Gateway, made: SearchRecord) -> None:
    found = record.find_record(gateway, "s")
    assert (found.name, found.job_id, found.created_at) == ("s", made.job_id, 1000.0)
    assert found.settings == {**SETTINGS, "run": ["a", 1]}


def test_the_record_is_a_job_that_never_looks_like_work(gateway: Gateway, made: SearchRecord, api: BalsamApi) -> None:
    job = api.jobs[made.job_id]
    assert (job["state"], job["tags"]) == ("JOB_FINISHED", {"kind": "search", "record": "s"})
    app = api.apps[job["app_id"]]
    assert app["name"] == "deephyper_search"
    definition = schemas.deserialize(app["serialized_class"])
    assert definition.site == 1


def test_searches_at_one_site_share_the_application_of_records(
    gateway: Gateway, made: SearchRecord, site: VirtualSite, api: BalsamApi
) -> None:
    record.create_record(gateway, "t", {}, site.id, 2000.0)
    assert len(api.apps) == 1
    assert [found.name for found in record.find_records(gateway)] == ["s", "t"]
    assert [found.name for found in record.find_records(gateway, "t")] == ["t"]


def test_an_unknown_search_is_answered_with_those_there_are(gateway: Gateway, made: SearchRecord) -> None:
    with pytest.raises(UnknownSearchError, match=r"no search 'digits' in this Balsam; there are: s\."):
        record.find_record(gateway, "digits")


def test_in_an_empty_balsam_there_are_none(gateway: Gateway) -> None:
    with pytest.raises(UnknownSearchError, match=r"there are: none\."):
        record.find_record(gateway, "digits")


def test_the_same_settings_are_the_same_in_whatever_python_type(made: SearchRecord) -> None:
    record.check_same(made, {"method": "ambs", "run": ["a", 1]})
    record.check_same(made, {})


def test_other_settings_are_refused_and_each_is_named(made: SearchRecord) -> None:
    with pytest.raises(SearchExistsError) as caught:
        record.check_same(made, {"method": "random", "seed": 1, "options": {}, "problem": {"name": "q"}, "new": 1})
    said = str(caught.value)
    assert "'s' belongs to another search of this Balsam, with another method, options, problem, new" in said
    assert '"method": "ambs"' in said
    assert '"name"' not in said  # a whole space would fill the screen


# --- the wheel -------------------------------------------------------------------------------------------------------


def test_a_driver_takes_the_wheel_gives_signs_of_life_and_leaves(gateway: Gateway, made: SearchRecord) -> None:
    me = Driver.here(1000.0)
    assert (me.host, me.pid) == (socket.gethostname(), os.getpid())
    assert record.read_driver(gateway, "s") is None
    record.take_the_wheel(gateway, "s", me)
    assert record.read_driver(gateway, "s") == me
    later, stop = record.beat(gateway, "s", me, 1010.0)
    assert (later.at, stop) == (1010.0, False)
    assert record.read_driver(gateway, "s") == later
    record.leave_the_wheel(gateway, "s", later)
    assert record.read_driver(gateway, "s") is None
    assert record.find_record(gateway, "s").created_at == 1000.0


def test_a_second_driver_is_refused_by_host_process_and_age_of_the_first(gateway: Gateway, made: SearchRecord) -> None:
    record.take_the_wheel(gateway, "s", Driver("login2", 4711, 1000.0))
    with pytest.raises(SearchRunningError, match=r"by process 4711 on login2 \(last sign of life 30 s ago\).*stop s"):
        record.take_the_wheel(gateway, "s", Driver.here(1030.0))
    assert record.read_driver(gateway, "s") == Driver("login2", 4711, 1000.0)


def test_a_driver_without_a_sign_of_life_for_a_minute_is_replaced(gateway: Gateway, made: SearchRecord) -> None:
    record.take_the_wheel(gateway, "s", Driver("login2", 4711, 1000.0))
    record.take_the_wheel(gateway, "s", Driver.here(1000.0 + record.GONE_AFTER_S))
    assert record.read_driver(gateway, "s") == Driver.here(1060.0)


def test_a_dead_driver_of_this_host_is_replaced_at_once(gateway: Gateway, made: SearchRecord) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    record.take_the_wheel(gateway, "s", Driver(socket.gethostname(), process.pid, 1000.0))
    record.take_the_wheel(gateway, "s", Driver.here(1001.0))
    assert record.read_driver(gateway, "s") == Driver.here(1001.0)


def test_a_living_driver_of_this_host_is_not(gateway: Gateway, made: SearchRecord) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        record.take_the_wheel(gateway, "s", Driver(socket.gethostname(), process.pid, 1000.0))
        with pytest.raises(SearchRunningError):
            record.take_the_wheel(gateway, "s", Driver.here(1001.0))
        process.kill()


def test_the_same_process_may_take_the_wheel_again(gateway: Gateway, made: SearchRecord) -> None:
    record.take_the_wheel(gateway, "s", Driver.here(1000.0))
    record.take_the_wheel(gateway, "s", Driver.here(1001.0))


def test_who_was_replaced_cannot_take_the_wheel_from_the_other_by_leaving(gateway: Gateway, made: SearchRecord) -> None:
    record.take_the_wheel(gateway, "s", Driver.here(2000.0))
    record.leave_the_wheel(gateway, "s", Driver("login2", 4711, 1000.0))
    assert record.read_driver(gateway, "s") == Driver.here(2000.0)


def test_a_request_to_stop_reaches_the_driver_with_its_next_beat(gateway: Gateway, made: SearchRecord) -> None:
    me = Driver.here(1000.0)
    record.take_the_wheel(gateway, "s", me)
    assert record.ask_to_stop(gateway, "s", 1001.0) == me
    assert record.beat(gateway, "s", me, 1005.0) == (Driver.here(1005.0), True)
    assert record.ask_to_stop(gateway, "s", 1006.0) == Driver.here(1005.0)


def test_nobody_is_asked_to_stop_where_nobody_drives(gateway: Gateway, made: SearchRecord) -> None:
    assert record.ask_to_stop(gateway, "s", 1001.0) is None
    record.take_the_wheel(gateway, "s", Driver("login2", 4711, 1000.0))
    assert record.ask_to_stop(gateway, "s", 1000.0 + record.GONE_AFTER_S) is None


def test_an_old_request_to_stop_does_not_end_the_next_life(gateway: Gateway, made: SearchRecord) -> None:
    for leaves in (True, False):
        me = Driver.here(1000.0)
        record.take_the_wheel(gateway, "s", me)
        record.ask_to_stop(gateway, "s", 1001.0)
        if leaves:
            record.leave_the_wheel(gateway, "s", me)
        record.take_the_wheel(gateway, "s", me)
        assert record.beat(gateway, "s", me, 1002.0)[1] is False


def test_a_record_that_was_deleted_meanwhile_is_named(gateway: Gateway, made: SearchRecord, api: BalsamApi) -> None:
    del api.jobs[made.job_id]
    with pytest.raises(UnknownSearchError, match="no search 's' in this Balsam any more"):
        record.beat(gateway, "s", Driver.here(1.0), 2.0)
