"""How many short runs a second each launcher mode starts on one node of a local Balsam of its own; serial over mpi.

python -m tests.benchmarks.starts --places 8 --evals 100
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from deephyper_balsam.server.stack import LocalStack

PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("bowl")
problem.add_hyperparameter((-3.0, 3.0), "x")
"""
RUN = """
import time
def run(job):
    time.sleep(0.1)
    return -job["x"] ** 2
"""


def starts_a_second(folder: Path, stack: LocalStack, mode: str, places: int, evals: int) -> float:
    """Run a search in one mode and return its rate, by the first and the last start."""
    name = f"starts-{mode}"
    command = [sys.executable, "-m", "deephyper_balsam", "search", "run", name, "--problem", "problem.py"]
    command += ["--run", "run.py", "--site", "local", "--method", "random", "--seed", "1", "--nodes", "1"]
    command += ["--evals-per-node", str(places), "--job-mode", mode, "--max-evals", str(evals)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("BALSAM_")}
    subprocess.run(command, cwd=folder, env={**kept, **stack.env}, check=True, stdout=subprocess.DEVNULL)
    with (folder / name / "results.csv").open(encoding="utf-8") as file:
        begins = sorted(float(row["m:timestamp_start"]) for row in csv.DictReader(file) if row["m:timestamp_start"])
    return (len(begins) - 1) / (begins[-1] - begins[0])


def main() -> None:
    """Measure both modes and print their rates and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=8)
    parser.add_argument("--evals", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="starts-") as temporary:
        folder = Path(temporary)
        (folder / "problem.py").write_text(PROBLEM, encoding="utf-8")
        (folder / "run.py").write_text(RUN, encoding="utf-8")
        stack = LocalStack(folder / "balsam")
        stack.up()
        try:
            rates = [starts_a_second(folder, stack, mode, given.places, given.evals) for mode in ("serial", "mpi")]
        finally:
            stack.down()
    print(f"serial {rates[0]:.2f}, mpi {rates[1]:.2f} starts a second: {rates[0] / rates[1]:.2f} times")


if __name__ == "__main__":
    main()
