"""Somebody's broken application at a site: its own jobs fail with the reason, and no launcher ends of it."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any, ClassVar

import dill
import pytest
from balsam._api.app import ApplicationDefinition
from balsam.schemas import DeserializeError
from balsam.site.launcher import _mpi_mode, _serial_mode_master

from deephyper_balsam.launcher.applications import tolerant, tolerate_applications


class Bomb:
    """What, when it is unpickled, raises something."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


class Good(ApplicationDefinition):  # type: ignore[misc]
    site = 1
    command_template = "echo {{ x }}"


class BadMethods(Good):
    site = 1
    command_template = "echo {{ x }}"

    def shell_preamble(self) -> str:
        raise KeyError("MODULEPATH")


class BadStart(Good):
    site = 1
    command_template = "echo {{ x }}"

    def __init__(self, job: Any) -> None:
        raise OSError("no licence")


def packed(value: Any) -> str:
    return base64.b64encode(dill.dumps(value)).decode()


BROKEN = {
    "a module that is not here": packed(Bomb("import no_such_module_here")),
    "no class": packed(7),
    "another class": packed(dict),
    "a program's end": packed(Bomb("import sys; sys.exit(3)")),
    "cut": packed(Good)[:40],
    "empty": "",
    "no base64": "%%%",
}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, on a Balsam that has all these applications at one site."""
    texts = {**BROKEN, "Good": packed(Good), "BadMethods": packed(BadMethods), "BadStart": packed(BadStart)}
    apps = [
        SimpleNamespace(id=number, name=name, serialized_class=text)
        for number, (name, text) in enumerate(texts.items(), 1)
    ]
    objects = SimpleNamespace(filter=lambda **_: apps, get=lambda id: apps[id - 1])

    class Definition:
        _app_id_cache: ClassVar[dict[int, Any]] = {}
        _App = SimpleNamespace(objects=objects)
        _set_client = staticmethod(lambda client: None)
        from_serialized = staticmethod(ApplicationDefinition.from_serialized)

    return SimpleNamespace(of=tolerant(Definition), ids={app.name: app.id for app in apps}, apps=objects)


JOB: Any = SimpleNamespace(id=5, get_parameters=lambda: {"x": 1}, threads_per_rank=1)


def test_a_launcher_starts_whatever_applications_the_site_has(loaded: Any) -> None:
    assert loaded.of.load_by_site(1) == {}  # and runs nothing of other people's


@pytest.mark.parametrize("name", BROKEN)
def test_a_job_of_an_application_that_cannot_be_read_fails_with_the_reason(loaded: Any, name: str) -> None:
    with pytest.raises(DeserializeError):
        loaded.of.load_by_id(loaded.ids[name])


def test_a_good_one_beside_them_makes_its_command(loaded: Any) -> None:
    app = loaded.of.load_by_id(loaded.ids["Good"])(JOB)
    assert app.job is JOB
    assert app.get_arg_str() == "echo 1"
    assert app.shell_preamble() == []


def test_an_application_whose_own_code_fails_costs_its_job_alone(loaded: Any) -> None:
    app = loaded.of.load_by_id(loaded.ids["BadMethods"])(JOB)
    with pytest.raises(DeserializeError, match=r"BadMethods failed in shell_preamble\(\): KeyError\('MODULEPATH'\)"):
        app.shell_preamble()
    make = loaded.of.load_by_id(loaded.ids["BadStart"])
    with pytest.raises(DeserializeError, match="no licence"):
        make(JOB)


def test_a_job_without_its_parameters_costs_itself_alone_in_both_modes(loaded: Any) -> None:
    """MPI mode knows such an error; serial mode's master died of it."""
    lacking: Any = SimpleNamespace(id=5, get_parameters=dict, threads_per_rank=1)
    app = loaded.of.load_by_id(loaded.ids["Good"])(lacking)
    with pytest.raises(DeserializeError, match="Missing required args"):
        app.get_arg_str()


def test_a_balsam_that_is_away_is_no_fault_of_an_application(loaded: Any) -> None:
    def away(**_: Any) -> Any:
        raise ConnectionError("no route")

    loaded.apps.get = away
    with pytest.raises(ConnectionError):
        loaded.of.load_by_id(1)


def test_both_modes_are_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_mpi_mode, _serial_mode_master):
        monkeypatch.setattr(module, "ApplicationDefinition", ApplicationDefinition)
    tolerate_applications()
    for module in (_mpi_mode, _serial_mode_master):
        assert module.ApplicationDefinition.load_by_site(1) == {}
