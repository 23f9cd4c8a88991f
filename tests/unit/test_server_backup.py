"""Backups of a stack: what is refused, and what a file may write where."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from deephyper_balsam.cli import main
from deephyper_balsam.common.process_id import ProcessId
from deephyper_balsam.errors import InputError
from deephyper_balsam.server import backup
from deephyper_balsam.server.backup import back_up, restore
from deephyper_balsam.server.sign_of_life import Claims, Place
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.server.stack_state import State
from deephyper_balsam.sites.local_batch import BatchJob, BatchJobs

MANIFEST = {
    "format": 1,
    "made_at": "2026-01-02T03:04:05+00:00",
    "host": "h",
    "folder": "/old",
    "site_name": "local",
    "site_config": "slurm",
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def stopped(tmp_path: Path) -> LocalStack:
    """A stack that ran once."""
    stack = LocalStack(tmp_path / "stack")
    stack.files.make()
    stack.files.save(State())
    return stack


def written(path: Path, **files: str | None) -> Path:
    """Write a backup with these files beside those that it must have; None: a link to /etc."""
    content = {"manifest.json": json.dumps({**MANIFEST, "with_data": False}), "secrets.json": "{}", "database.dump": ""}
    with tarfile.open(path, "w") as tar:
        for name, text in {**content, **files}.items():
            entry = tarfile.TarInfo(name)
            if text is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc"
                tar.addfile(entry)
                continue
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize("name", ["there.tar", "no where/x.tar", "stack/x.tar", "stack"])
def test_nothing_is_overwritten_and_no_backup_is_kept_in_what_it_is_of(
    tmp_path: Path, stopped: LocalStack, name: str
) -> None:
    (tmp_path / "there.tar").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"Name a new file|make it first|Name another place"):
        back_up(stopped, tmp_path / name)
    assert (tmp_path / "there.tar").read_text() == "precious"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stack_of_another_host_is_backed_up_there(
    tmp_path: Path, stopped: LocalStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Place, "here", classmethod(lambda cls: Place("login7")))
        assert Claims(stopped.folder).make(1) is not None
    with pytest.raises(InputError, match=r"was started on login7 .*Make the backup there"):
        back_up(stopped, tmp_path / "x.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["stack"]


@pytest.mark.parametrize("make", ["file", "full folder"])
def test_a_folder_that_holds_something_is_not_restored_into(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "there"
    if make == "file":
        folder.write_text("precious")
    else:
        folder.mkdir()
        (folder / "precious").write_text("")
    result = run("server", "restore", str(written(tmp_path / "x.tar")), "--dir", str(folder))
    assert result.exit_code == 2
    assert "nothing is overwritten" in result.output


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "There is no backup"),
        (b"", "is no backup"),
        (b"PK\x03\x04 something else", "is no backup"),
        ({"manifest.json": "{"}, "is no backup"),
        ({"manifest.json": "{}"}, "is no backup"),
        ({"manifest.json": json.dumps({"format": 2})}, "by a later version"),
    ],
)
def test_what_is_no_backup_is_told_and_nothing_is_made(tmp_path: Path, text: object, told: str) -> None:
    path = tmp_path / "x.tar"
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif isinstance(text, dict):
        written(path, **text)
    result = run("server", "restore", str(path), "--dir", str(tmp_path / "new"))
    assert result.exit_code == 2
    assert told in result.output
    assert not (tmp_path / "new").exists()


def test_a_backup_writes_nothing_outside_of_the_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    monkeypatch.setattr(backup, "_fill", lambda stack, dump: filled.append(dump.read_text()))
    names: dict[str, str | None] = {
        "../outside": "x",
        "site/../../outside": "x",
        "/site/outside": "x",
        "unknown": "x",
        "site/link": None,
        "site/.balsam-site": "7",
        "tls/ca.key": "key",
    }
    restore(written(tmp_path / "x.tar", **names), tmp_path / "new", print)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert "new/site/.balsam-site" in made
    assert "new/tls/ca.key" in made
    assert not [name for name in made if "outside" in name or "unknown" in name]
    assert os.readlink(tmp_path / "new" / "site" / "link") == "/etc"
    assert (tmp_path / "new" / "secrets.json").stat().st_mode & 0o777 == 0o600
    state = LocalStack(tmp_path / "new").files.state()
    assert (state.folder, state.site_name, state.site_config, state.processes) == ("/old", "local", "slurm", {})
    assert filled == [""]


def test_nothing_is_written_through_a_link_that_a_backup_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "_fill", lambda stack, dump: None)
    (tmp_path / "target").mkdir()
    monkeypatch.setattr(backup.os, "symlink", lambda to, path, link=os.symlink: link(tmp_path / "target", path))
    path = written(tmp_path / "x.tar", **{"site/a": None, "site/a/b": "x"})
    with pytest.raises(OSError):
        restore(path, tmp_path / "new", print)
    assert list((tmp_path / "target").iterdir()) == []
    assert sorted(one.name for one in tmp_path.iterdir()) == ["target", "x.tar"]


def test_the_batch_jobs_of_a_copy_are_no_processes_of_ours(tmp_path: Path) -> None:
    me = ProcessId.of(os.getpid())
    assert me is not None
    jobs = BatchJobs(tmp_path)
    jobs.ended.mkdir(parents=True)
    job = BatchJob(3, me, "script.sh", "p", "q", 1, 10, start_time=1000.0)
    job.write(jobs.folder / "3.json")
    assert jobs.running() == [job]
    jobs.close_all(1500.0)
    assert jobs.running() == []
    found = jobs.get(3)
    assert found is not None
    assert (found.end_time, found.exit_code) == (1500.0, None)
