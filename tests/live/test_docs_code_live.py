"""What needs a Balsam in the documentation, on a real one: Python blocks that say so, the commands of the tutorial."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from docs_blocks import PAGES, ROOT, blocks

pytestmark = [pytest.mark.live, pytest.mark.slow]

# A test has no time for all of the evaluations of an example
_FEWER = [(r"max_evals=\d+", "max_evals=4"), (r"--max-evals \d\d+", "--max-evals 3")]


def shortened(text: str) -> str:
    for pattern, few in _FEWER:
        text = re.sub(pattern, few, text)
    return text


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


LIVE = [page for page in PAGES if any(block.mark == "live" for block in blocks(page, "python"))]


@pytest.mark.parametrize("page", LIVE, ids=name_of)
def test_python_that_needs_a_balsam_runs_when_it_is_copied(
    page: Path, tmp_path: Path, balsam_env: dict[str, str]
) -> None:
    for block in blocks(page, "python"):
        if block.file:
            block.write(tmp_path)
    for number, block in enumerate(block for block in blocks(page, "python") if block.mark == "live"):
        script = tmp_path / f"copied_{number}.py"
        script.write_text(shortened(block.text), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, script.name], cwd=tmp_path, env=balsam_env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{name_of(page)}:{block.line}\n{done.stdout}{done.stderr}"
        assert list(tmp_path.glob("*/results.csv"))


@pytest.mark.long
def test_the_commands_of_the_tutorial_lead_to_results(tmp_path: Path) -> None:
    page = ROOT / "docs" / "tutorial.md"
    script = "\n".join(shortened(block.text) for block in blocks(page, "sh") if not block.mark)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BALSAM_")}
    environment = {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "Search mine-1: 3 done." in done.stdout
        assert (tmp_path / "mine" / "mine-1" / "report.html").is_file()
        assert (tmp_path / "mine" / "mine-2" / "results.csv").is_file()
    finally:
        subprocess.run(
            [sys.executable, "-m", "deephyper_balsam", "server", "down", "--dir", str(tmp_path / "mine" / "balsam")],
            capture_output=True,
        )


# --- the shell blocks of the pages --------------------------------------------------------------------------------

_OPTUNA = """number,value,params_num_layers,params_learning_rate,params_alpha,params_batch_size,params_optimizer
0,0.3,2,0.002,0.01,32,adam
"""
# Blocks that cannot be run here, by their beginning, and why
_NOT_HERE = {
    "make quickstart": "it installs; the rest of it is test_quickstart_leaves_its_files_and_no_process",
    "balsam queue submit": "it asks for 128 nodes, and the site has no queue of such a size",
}
# What a reader has, or would put in: a search of one's own in place of those that the page has for examples
_INSTEAD = {
    "howto": [
        ("quickstart-1", "mine-2"),
        ("mine-1 17", "mine-1 1"),
        # `search submit` asks for a site with an agent
        ("theta --max-evals 5000 -n 128 -t 180 -q default -A MyProject", "local --max-evals 9 -n 1 -t 180"),
    ],
    "results": [("NAME", "mine-2"), ("cancer-1", "mine-2")],
    "analysis": [("ambs-1 ambs-2 random-1", "mine-2 mine-3"), ("digits-1", "mine-2")],
}
_FEW = [
    # No supercomputer here: such a search is checked at a site without an agent, and not begun
    (r"(search run \S+)(?=[^\n]*(?:theta|search\.yaml))", r"\1 --dry-run"),
    (r"(search submit \S+)", r"\1 --dry-run"),
    (r"(search extend \S+ --max-evals) \d+", r"\1 5"),
    (r"--max-evals \d\d+", "--max-evals 2"),
    (r"--kind importance", "--kind progress"),  # importances need ten trials
    (r"--minutes 10", "--minutes 2"),
]


def _here(page: str, text: str) -> str:
    """Return a block as this machine can run it."""
    for word, ours in _INSTEAD.get(page, []):
        text = text.replace(word, ours)
    for pattern, few in _FEW:
        text = re.sub(pattern, few, text)
    return text


@pytest.mark.long
def test_the_shell_blocks_of_the_pages_run_in_their_order(tmp_path: Path, balsam_env: dict[str, str]) -> None:
    home = tmp_path / "home"  # some blocks write into the reader's
    home.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{balsam_env['PATH']}"
    environment = {**balsam_env, "PATH": path, "HOME": str(home)}
    failed: list[str] = []

    def bash(text: str, where: str) -> None:
        call = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(call, cwd=tmp_path, env=environment, input="y\n", capture_output=True, text=True)
        if done.returncode:
            failed.append(f"{where}\n{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    for site, config, project in (
        ("theta", "theta-knl-cobalt", "MyProject"),
        ("perlmutter", "perlmutter-cpu", "m1234"),
    ):
        bash(f"deephyper-balsam site init {site} --config {config} --name {site} --project {project}", site)
    (tmp_path / "optuna.csv").write_text(_OPTUNA, encoding="utf-8")
    try:
        for page in ("quickstart", "howto", "results", "analysis"):
            file = ROOT / "docs" / f"{page}.md"
            for block in blocks(file, "python", "yaml", "sh"):
                if block.file:
                    block.write(tmp_path)
                elif block.text.startswith("# search.yaml"):
                    (tmp_path / "search.yaml").write_text(block.text, encoding="utf-8")
                elif block.language == "sh" and not block.text.startswith(tuple(_NOT_HERE)) and not block.mark:
                    bash(_here(page, block.text), f"{name_of(file)}:{block.line}")
    finally:
        for record in [*tmp_path.glob("*/stack.json"), *tmp_path.glob("*/*/stack.json")]:
            down = [sys.executable, "-m", "deephyper_balsam", "server", "down", "--dir", str(record.parent)]
            subprocess.run(down, cwd=tmp_path, env=environment, capture_output=True)
    assert not failed, "\n\n".join(failed)
