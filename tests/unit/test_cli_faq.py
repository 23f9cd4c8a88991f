"""An error that the FAQ answers says where; every quoted text finds its own entry."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from deephyper_balsam.cli import main
from deephyper_balsam.cli.faq import answer_to, entries

PAGE = (Path(__file__).parents[2] / "docs" / "faq.md").read_text(encoding="utf-8")
ENTRIES = list(entries(PAGE))


@pytest.mark.parametrize(("text", "anchor"), ENTRIES, ids=[text for text, _ in ENTRIES])
def test_a_message_with_the_text_of_an_entry_is_led_to_it(text: str, anchor: str) -> None:
    assert answer_to(text.replace("…", "something else"), PAGE) == anchor


def test_an_error_on_the_command_line_names_the_line_of_the_faq() -> None:
    said = CliRunner().invoke(main, ["problem", "show", "no/such/thing"])
    assert said.exit_code == 2
    assert said.stderr.startswith("Error: 'no/such/thing' names nothing to load")
    place, _, anchor = said.stderr.splitlines()[-1].removeprefix("See ").partition("#")
    assert Path(place).is_file()
    assert anchor in dict(zip([a for _, a in ENTRIES], ENTRIES, strict=True))


def test_an_error_that_the_faq_does_not_know_points_nowhere() -> None:
    assert answer_to("The moon is made of cheese.", PAGE) is None


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_the_shell(shell: str) -> None:
    said = CliRunner().invoke(main, ["completion", shell])
    assert said.exit_code == 0, said.output
    assert "_DEEPHYPER_BALSAM_COMPLETE" in said.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=said.stdout, text=True, check=True, timeout=60)
