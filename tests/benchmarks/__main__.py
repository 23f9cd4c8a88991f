"""``python -m tests.benchmarks [--quick]``: cost, then quality; a part's own options are under its own module."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.benchmarks import cost, quality


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of hours")
    parser.add_argument(
        "--peer-python", help="interpreter of an environment with the peers; see tests/benchmarks/README.md"
    )
    parser.add_argument(
        "--peers", nargs="+", default=["optuna_tpe", "optuna_gp", "smac", "skopt", "deephyper_sampling"]
    )
    args = parser.parse_args()
    quick = ["--quick"] if args.quick else []
    cost.main(quick)
    names = ["ambs", "ambs_rf", "random", *(args.peers if args.peer_python else [])]
    with tempfile.TemporaryDirectory() as folder:
        # A quick look is thrown away; a long run can be continued.
        store = Path(folder) / "quality.jsonl" if args.quick else Path("benchmark-quality.jsonl")
        peers = ["--peer-python", args.peer_python] if args.peer_python else []
        workers = ["1"] if args.quick else ["1", "8", "64"]
        quality.main(["--names", *names, "--workers", *workers, "--store", str(store), *peers, *quick])


if __name__ == "__main__":
    main()
