"""The record of a search in Balsam: its settings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from balsam import schemas

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.errors import SearchExistsError, UnknownSearchError
from deephyper_balsam.store import record
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.record import SearchRecord

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
