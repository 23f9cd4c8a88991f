"""A search of many finished evaluations on a real Balsam server: how long its commands take, and to go on with it.

python -m tests.benchmarks.long --evaluations 100000

The evaluations are put into Balsam as if they had ended; what a driver copies into snapshots as a search grows,
the first one here copies at once.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import Search
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.applications import resolve_problem
from tests.benchmarks import load


def command_seconds(folder: Path, *words: str) -> float:
    """Run a command on the search and return how long it took."""
    began = time.monotonic()
    command = [sys.executable, "-m", "deephyper_balsam", "search", words[0], load.NAME, *words[1:]]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return time.monotonic() - began


def resume_seconds(folder: Path) -> tuple[float, float]:
    """Resume the search in an empty folder; how long it took until the first look, and until all was copied."""
    began = time.monotonic()
    search = Search.resume(load.NAME, log_dir=folder)
    took: list[float] = []

    def look(_progress: Progress) -> None:
        took.append(time.monotonic() - began)
        if not search.evaluator.copying:
            search.stop()

    search.search(on_progress=look)
    return took[0], took[-1]


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=100_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="long ") as name:
        folder = Path(name)
        stack = LocalStack(folder / "balsam")
        stack.up(site=False)
        os.environ["BALSAM_CLIENT_PATH"] = str(stack.client_path)
        try:
            gateway, site_id = load.make_site(stack)
            load.make_allocation(gateway, site_id, 16, 600, 1)
            evaluator = BalsamEvaluator("ackley", "virtual")
            search = Search(resolve_problem("ackley"), evaluator, load.NAME, "ambs", seed=0, log_dir=folder)
            load.prepare(search, gateway, given.evaluations, 60.0)
            print(f"{given.evaluations} evaluations, seconds:", flush=True)
            first, copied = resume_seconds(folder / "first")
            print(
                f"  the first driver: {first:.1f} until its first look, {copied:.1f} until all was copied",
                flush=True,
            )
            commands = (["status"], ["best"], ["results", "-o", "results.csv"], ["utilization"])
            for words in commands:
                print(f"  search {words[0]:12} {command_seconds(folder, *words):6.1f}", flush=True)
            print(f"  search {'resume':12} {resume_seconds(folder / 'again')[0]:6.1f}  (until its first look)")
            print(f"peak memory of the driver {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
        finally:
            stack.down()


if __name__ == "__main__":
    main()
