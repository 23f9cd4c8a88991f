"""Targets: what is named is loaded, and what cannot be is said in one message that the user can act on."""

from __future__ import annotations

from pathlib import Path

import pytest

from deephyper_balsam.common.wording import storable
from deephyper_balsam.errors import TargetError
from deephyper_balsam.node.targets import load_object, own_traceback, reason, shorten

pytestmark = pytest.mark.usefixtures("modules_as_they_were")


def test_a_function_in_a_file_is_loaded_with_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_run.py").write_text("FACTOR = 3\n")
    (tmp_path / "my_run.py").write_text("from neighbour_of_run import FACTOR\ndef run(job):\n    return FACTOR * job\n")
    assert load_object(f"{tmp_path / 'my_run.py'}:run")(2) == 6


def test_an_attribute_of_an_attribute_is_found(tmp_path: Path) -> None:
    (tmp_path / "space.py").write_text("class Space:\n    class inner:\n        problem = 5\n")
    assert load_object(f"{tmp_path / 'space.py'}:Space.inner.problem") == 5


def test_a_module_is_found_through_the_search_path(tmp_path: Path) -> None:
    (tmp_path / "pack_of_mine").mkdir()
    (tmp_path / "pack_of_mine" / "__init__.py").write_text("")
    (tmp_path / "pack_of_mine" / "train.py").write_text("def run(job):\n    return 1.0\n")
    assert load_object("pack_of_mine.train:run", [str(tmp_path)])({}) == 1.0
    assert load_object("math:pi") == pytest.approx(3.14159, abs=1e-5)


def test_a_file_in_a_folder_with_spaces_and_quotes_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    (folder / "quoted_run.py").write_text("answer = 42\n")
    assert load_object(f"{folder / 'quoted_run.py'}:answer") == 42


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for name, value in (("one", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "twin_problem.py").write_text(f"value = {value}\n")
    assert [load_object(f"{tmp_path / name / 'twin_problem.py'}:value") for name in ("one", "other")] == [1, 2]


def test_what_a_file_defines_can_be_pickled(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "pickled_run.py").write_text("def run(job):\n    return 1.0\n")
    run = load_object(f"{tmp_path / 'pickled_run.py'}:run")
    assert pickle.loads(pickle.dumps(run)) is run


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"none\.py does not exist on .*; name a file that every node can read"):
        load_object(f"{tmp_path / 'none.py'}:run")


def test_a_module_that_does_not_exist_is_named() -> None:
    with pytest.raises(TargetError, match=r"importing no_such_module_at_all failed.*ModuleNotFoundError"):
        load_object("no_such_module_at_all:run")


def test_a_missing_attribute_is_answered_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "public.py").write_text("def train(job): ...\nunits = 3\n_hidden = 1\n")
    with pytest.raises(TargetError, match=r"has no 'run'; it defines train, units\."):
        load_object(f"{tmp_path / 'public.py'}:run")
    (tmp_path / "void.py").write_text("")
    with pytest.raises(TargetError, match=r"it defines nothing\."):
        load_object(f"{tmp_path / 'void.py'}:run")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import torch_of_tomorrow\n", "line 1: ModuleNotFoundError: No module named 'torch_of_tomorrow'"),
        ("def run(job)\n    return 1\n", "SyntaxError: expected ':' (broken_run.py, line 1)"),
        ("\n\nx = 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('')\n", "line 2: JSONDecodeError: Expecting value"),
        ("import sys\nsys.exit(2)\n", "line 2: SystemExit: 2"),
    ],
)
def test_an_import_that_raises_is_said_in_one_line_with_the_users_own(tmp_path: Path, source: str, words: str) -> None:
    file = tmp_path / "broken_run.py"
    file.write_text(source)
    with pytest.raises(TargetError) as caught:
        load_object(f"{file}:run")
    said = str(caught.value)
    assert said.startswith(f"{file}:run: importing {file} failed")
    assert words in said
    assert "\n" not in said
    assert "deephyper_balsam/node/targets.py" not in said


def test_after_a_failed_import_the_mended_file_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "mended_run.py"
    file.write_text("1 / 0\n")
    with pytest.raises(TargetError):
        load_object(f"{file}:value")
    file.write_text("value = 'now it works'\n")
    assert load_object(f"{file}:value") == "now it works"


def test_a_reason_is_one_line_of_bounded_length() -> None:
    assert reason(ValueError("a\n  b")) == "ValueError: a b"
    assert reason(KeyError()) == "KeyError"
    assert len(shorten("word " * 1000)) == 500
    assert shorten("word " * 1000).endswith("…")


def test_text_that_utf_8_cannot_hold_is_escaped() -> None:
    assert storable("caf\udce9 é ✓") == "caf\\udce9 é ✓"


def test_a_traceback_is_cut_at_its_beginning() -> None:
    try:
        raise ValueError("y" * 50_000 + "end")
    except ValueError as error:
        text = own_traceback(error)
    assert len(text) <= 20_000
    assert text.endswith("end\n")
