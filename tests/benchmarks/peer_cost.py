"""Processor seconds of a peer's tell and ask on the space of `cost.py`; runs in the peers' environment.

``python peer_cost.py PEER HISTORY [REPEATS]``, with the peers of `peers.py`.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from peers import PEERS
from tasks import Parameter, Task


def _loss(config: Mapping[str, Any]) -> float:
    total = sum((config[f"r{i}"] - 0.3) ** 2 for i in range(3))
    total += sum((np.log10(config[f"l{i}"]) + 2) ** 2 / 10 for i in range(2))
    return float(total + sum(((config[f"i{i}"] - 40) / 100) ** 2 for i in range(3)))


TASK = Task(
    "mixed10",
    (
        *(Parameter(f"r{i}", "real") for i in range(3)),
        *(Parameter(f"l{i}", "real", 1e-6, 1.0, log=True) for i in range(2)),
        *(Parameter(f"i{i}", "int", 1, 100) for i in range(3)),
        Parameter("c0", "cat", choices=("a", "b", "c")),
        Parameter("c1", "cat", choices=("u", "v", "w", "x")),
    ),
    _loss,
)


def main() -> None:
    """Tell a history of random points at once, then time single steps."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    name, history = sys.argv[1], int(sys.argv[2])
    repeats = int(sys.argv[3]) if len(sys.argv) > 3 else 10
    # As many workers as points: the peers then draw the whole history from their initial design.
    searcher = PEERS[name](TASK, 1, history)
    trials = searcher.ask(history)
    searcher.tell([(token, config, _loss(config)) for token, config in trials])
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        ((token, config),) = searcher.ask(1)
        loss = _loss(config)
        searcher.tell([(token, config, loss)])
        spent.append(time.process_time() - start)
    milliseconds = 1e3 * np.array(spent)
    print(f"{name}, {history} results: tell+ask {np.median(milliseconds):.0f} ms, mean {milliseconds.mean():.0f} ms")


if __name__ == "__main__":
    main()
