"""Where local data is kept, and how it is made from what was shipped; PostgreSQL itself is in tests/live."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deephyper_balsam.errors import InputError
from deephyper_balsam.server.node_local import NodeLocal, place_of, remove
from deephyper_balsam.server.stack_state import State


def shipped(folder: Path, number: int, *, whole: bool = True) -> Path:
    base = folder / "shipped" / str(number)
    (base / ("base" if whole else "base.new") / "pg_wal").mkdir(parents=True)
    (base / ("base" if whole else "base.new") / "PG_VERSION").write_text(str(number))
    (base / "wal").mkdir()
    return base


@pytest.mark.parametrize("said", ["", "local", "node-local:", "node-local:/no where", "shared:/tmp"])
def test_another_place_is_refused(said: str) -> None:
    with pytest.raises(InputError, match=r"node-local"):
        place_of(said)


def test_the_place_is_the_one_that_is_named_or_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert place_of("node-local") == tmp_path
    assert place_of(f"node-local:{tmp_path.parent}") == tmp_path.parent


def test_the_newest_whole_base_counts_and_an_unfinished_segment_is_used_where_no_whole_one_is(tmp_path: Path) -> None:
    for number in (9, 10):
        shipped(tmp_path, number)
    shipped(tmp_path, 11, whole=False)
    wal = tmp_path / "shipped" / "10" / "wal"
    names = [f"0000000100000000000000{n:02X}" for n in (1, 2, 3)]
    for name, text in (
        (names[0], "one"),
        (names[1], "two"),
        (f"{names[1]}.partial", "t"),
        (f"{names[2]}.partial", "3"),
    ):
        (wal / name).write_text(text)
    (wal / "something else").write_text("x")
    NodeLocal(tmp_path).fill(tmp_path / "data")
    assert (tmp_path / "data" / "PG_VERSION").read_text() == "10"
    found = {path.name: path.read_text() for path in (tmp_path / "data" / "pg_wal").iterdir() if path.is_file()}
    assert found == {names[0]: "one", names[1]: "two", names[2]: "3"}


def test_data_that_was_in_the_stacks_folder_is_taken_along(tmp_path: Path) -> None:
    (tmp_path / "stack" / "postgres").mkdir(parents=True)
    (tmp_path / "stack" / "postgres" / "PG_VERSION").write_text("18")
    state = State(data=f"node-local:{tmp_path}", data_dir=str(tmp_path / "dhb-data-old" / "postgres"))
    (tmp_path / "dhb-data-old" / "postgres").mkdir(parents=True)
    assert NodeLocal(tmp_path / "stack").place(state, "password") is not None
    assert state.data_dir is not None
    assert (Path(state.data_dir) / "PG_VERSION").read_text() == "18"
    assert Path(state.data_dir).parent.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "dhb-data-old").exists()
    assert os.listdir(tmp_path / "stack") == ["postgres"], "it stays until its base is shipped"


def test_nothing_but_a_folder_that_was_made_for_local_data_is_removed(tmp_path: Path) -> None:
    (tmp_path / "precious" / "postgres").mkdir(parents=True)
    remove(tmp_path / "precious" / "postgres")
    remove(tmp_path / "none" / "postgres")
    assert (tmp_path / "precious" / "postgres").exists()
