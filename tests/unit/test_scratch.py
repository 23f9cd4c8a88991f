"""Private folders in /tmp: what a killed process left is removed by the next one, and nothing else is."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deephyper_balsam.common import scratch
from deephyper_balsam.common.process_id import ProcessId

GONE = {"pid": 1, "started": "long ago"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # As short as /tmp: pytest's own folder is too deep for a socket
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_LONGEST", 200)
    return tmp_path


def test_a_folder_is_its_owners_alone_whatever_the_umask(place: Path) -> None:
    before = os.umask(0)
    try:
        path = scratch.make()
    finally:
        os.umask(before)
    assert path.parent == place
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_what_a_killed_process_left_is_removed_by_the_next_one(place: Path) -> None:
    code = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from deephyper_balsam.common import scratch
scratch._LONGEST = 200
print(scratch.make(), flush=True)
time.sleep(600)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    (left / "deep").mkdir()
    mine = scratch.make()
    assert left.is_dir()  # it lives
    child.send_signal(signal.SIGKILL)
    child.wait(20)
    child.stdout.close()
    assert scratch.sweep() == [left]
    assert mine.is_dir()
    assert not left.exists()


def test_what_belongs_to_another_process_stays_as_long_as_that_lives(place: Path) -> None:
    path, more = scratch.make(), place / "more"
    more.mkdir()
    child = subprocess.Popen(["sleep", "600"])
    scratch.belongs_to(path, ProcessId.of(child.pid), also=[more])
    assert scratch.sweep() == []
    child.kill()
    child.wait(20)
    assert scratch.sweep() == [path]
    assert not more.exists()


def make_by_hand(place: Path, name: str, content: object) -> Path:
    path = place / name
    path.mkdir(mode=0o700)
    (path / "owner.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_is_not_known_to_be_ours_and_dead_is_left_alone(place: Path) -> None:
    here = scratch._where()
    victim = place / "victim"
    victim.mkdir()
    kept = [
        make_by_hand(place, "dhb-1", "no json"),
        make_by_hand(place, "dhb-2", {"where": here}),
        make_by_hand(place, "dhb-3", {"where": ["another machine"], "process": GONE}),
        make_by_hand(place, "dhb-4", {"where": here, "process": ProcessId.of(os.getpid()).to_dict()}),  # type: ignore[union-attr]
        make_by_hand(place, "dhb-5", []),
        make_by_hand(place, "other-6", {"where": here, "process": GONE}),
    ]
    (place / "dhb-7").mkdir()
    (place / "dhb-8").symlink_to(victim)
    (victim / "owner.json").write_text(json.dumps({"where": here, "process": GONE}))
    (place / "dhb-9").write_text("a file")
    gone = make_by_hand(place, "dhb-10", {"where": here, "process": GONE})
    assert scratch.sweep() == [gone]
    assert all(path.is_dir() for path in (*kept, place / "dhb-7", victim))
    assert (place / "dhb-9").is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving folders away takes root")
def test_what_another_account_wrote_makes_us_remove_nothing(place: Path) -> None:
    precious = place / "precious"
    precious.mkdir()
    forged = {"where": scratch._where(), "process": GONE, "also": [str(precious)]}
    path = make_by_hand(place, "dhb-1", forged)
    for one in (path, path / "owner.json"):
        os.chown(one, 65534, 65534)
    assert scratch.sweep() == []
    assert precious.is_dir()
    os.chown(path / "owner.json", 0, 0)  # root gave the folder to a server's account, and wrote this itself
    assert scratch.sweep() == [path]
