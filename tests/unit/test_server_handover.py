"""What a user gets is hers alone: three files in an archive, in a folder, or beside each other."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from deephyper_balsam.errors import InputError
from deephyper_balsam.server.handover import Handover


def write(to: Handover) -> None:
    before = os.umask(0)
    try:
        to.write("https://10.0.0.1:4711", "authority", "ann", "secret")
    finally:
        os.umask(before)


def check(credentials: Path) -> None:
    files = [credentials, credentials.with_suffix(".key"), credentials.with_suffix(".ca.pem")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600] * 3
    settings = yaml.safe_load(files[0].read_text())
    assert settings["api_root"] == "https://10.0.0.1:4711"
    assert settings["client_class"] == "deephyper_balsam.store.client.StackClient"
    assert settings["token"] is None
    assert json.loads(files[1].read_text()) == {"username": "ann", "password": "secret"}
    assert files[2].read_text() == "authority"


@pytest.mark.parametrize("name", ["ann.yml", "ann.yaml", "folder", "made before"])
def test_files_are_written_for_their_owner_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "made before").mkdir()
    write(Handover(tmp_path / name))
    check(tmp_path / name if "." in name else tmp_path / name / "client.yml")
    if name == "folder":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def test_an_archive_is_unpacked_by_tar(tmp_path: Path) -> None:
    write(Handover(tmp_path / "ann.tar"))
    assert [path.name for path in tmp_path.iterdir()] == ["ann.tar"]
    assert stat.S_IMODE((tmp_path / "ann.tar").stat().st_mode) == 0o600
    (tmp_path / "mine").mkdir()
    subprocess.run(["tar", "-xf", "ann.tar", "-C", "mine"], cwd=tmp_path, check=True, umask=0o077)
    check(tmp_path / "mine" / "client.yml")
    assert (tmp_path / "mine" / "client.yml").stat().st_uid == os.geteuid()


@pytest.mark.parametrize("name", ["ann.tar", "ann.yml", "folder"])
def test_what_is_there_is_not_replaced_unless_that_is_meant(tmp_path: Path, name: str) -> None:
    write(Handover(tmp_path / name))
    with pytest.raises(InputError, match=r"is there already\. Name another file"):
        Handover(tmp_path / name)
    write(Handover(tmp_path / name, replace=True))


@pytest.mark.parametrize("name", ["none/ann.tar", "none/ann.yml", "none/folder"])
def test_a_folder_that_is_not_there_is_told_before_anything_is_done(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        Handover(tmp_path / name)


@pytest.mark.parametrize("name", ["gone/ann.tar", "gone/ann.yml", "gone/folder"])
def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path: Path, name: str) -> None:
    (tmp_path / "gone").mkdir()
    to = Handover(tmp_path / name)
    (tmp_path / "gone").rmdir()
    with pytest.raises(InputError, match="cannot be written: No such file"):
        write(to)
