"""Processor seconds of `deephyper-balsam --help` and of `search status` on a search of 100 trials, on a local Balsam.

python -m tests.benchmarks.starting

Beside them, in turn with them: Python that does nothing, and Python that imports click. On a busy machine all of them
take longer; the ratio to click stays. All of it is compiled before, as on any machine where it was called once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.search import Search
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.applications import resolve_problem
from tests.benchmarks import load

CLICK = "import click"


def processor_seconds(words: Sequence[str], compiled: Path) -> float:
    """Run Python with these words; the processor time that it took, in it and in the kernel."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(compiled)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {child.returncode}.")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--times", type=int, default=9)
    given = parser.parse_args()
    commands = {
        "python": ["-c", "pass"],
        CLICK: ["-c", CLICK],
        "--help": ["-m", "deephyper_balsam", "--help"],
        "search status": ["-m", "deephyper_balsam", "search", "status", load.NAME],
    }
    with tempfile.TemporaryDirectory(prefix="starting-") as name:
        stack = LocalStack(Path(name) / "balsam")
        stack.up(site=False)
        os.environ["BALSAM_CLIENT_PATH"] = str(stack.client_path)
        try:
            gateway, site_id = load.make_site(stack)
            load.make_allocation(gateway, site_id, 16, 600, 1)
            search = Search(
                resolve_problem("ackley"), BalsamEvaluator("ackley", "virtual"), load.NAME, "random", log_dir=name
            )
            load.prepare(search, gateway, given.evaluations, 60.0)
            compiled = Path(name) / "compiled"
            rounds = [
                {what: processor_seconds(words, compiled) for what, words in commands.items()}
                for _ in range(1 + given.times)
            ][1:]
        finally:
            stack.down()
    least = {what: min(one[what] for one in rounds) for what in commands}
    for what, seconds in least.items():
        print(f"{what:14} {seconds:.2f} s, {seconds / least[CLICK]:.1f} times `{CLICK}`")


if __name__ == "__main__":
    main()
