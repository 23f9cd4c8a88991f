"""``python -m tests.benchmarks [--quick]``: cost, scale, quality; each part is a module with options of its own."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.benchmarks import cost, quality, scale


def main() -> None:
    """Run all parts."""
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
    scale.main(quick)
    names = ["ambs", "ambs_rf", "random", *(args.peers if args.peer_python else [])]
    with tempfile.TemporaryDirectory() as folder:
        # A quick look is thrown away; a long run can be continued.
        store = Path(folder) / "quality.csv" if args.quick else Path("benchmark-quality.csv")
        peers = ["--peer-python", args.peer_python] if args.peer_python else []
        workers = ["1"] if args.quick else ["1", "8", "64"]
        quality.main(["--names", *names, "--workers", *workers, "--store", str(store), *peers, *quick])


if __name__ == "__main__":
    main()
