"""Whether compute nodes reach Balsam's API: tried from within an allocation, with the site's own way to start ranks.

``python -m deephyper_balsam.sites.reach CLIENT FOLDER`` is what runs on each node: it writes what it found into a file
that has its host's name.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from deephyper_balsam.errors import DeepHyperBalsamError

_WAIT_S = 180.0


def allocation_of(settings: Any) -> int | None:
    """Return the id of the allocation that this process is in, by the site's kind of node; None outside of any.

    Parameters
    ----------
    settings
        Balsam's settings of the site.
    """
    if settings.scheduler is None:
        return None
    try:
        found = settings.launcher.compute_node.get_scheduler_id()
    except (KeyError, ValueError):
        return None
    return None if found is None else int(found)


def try_from_nodes(settings: Any, path: Path, client_path: Path, wait_s: float = _WAIT_S) -> tuple[bool, str]:
    """Ask the API from every node of the allocation that this process is in.

    Parameters
    ----------
    settings
        Balsam's settings of the site.
    path
        The site's folder, which nodes must see.
    client_path
        The credentials file, which nodes must see, too.
    wait_s
        Seconds for all of it.

    Returns
    -------
    tuple
        Whether all nodes reach it, and what was found.
    """
    from balsam.platform.app_run.app_run import TimeoutExpired
    from balsam.site.launcher.node_manager import NodeSpec

    nodes = settings.launcher.compute_node.get_job_nodelist()
    hosts = [str(node.hostname) for node in nodes]
    with tempfile.TemporaryDirectory(dir=path / "log", prefix="reach-") as folder:
        words = [sys.executable, "-m", __name__, str(client_path), folder]
        run = settings.launcher.mpi_app_launcher(
            shlex.join(words),
            None,
            {"BALSAM_CLIENT_PATH": str(client_path)},
            Path(folder),
            Path(folder) / "out",
            NodeSpec(node_ids=[str(node.node_id) for node in nodes], hostnames=hosts),
            1,
            1,
            1,
            {},
            0,
        )
        run.start()
        try:
            status = run.wait(timeout=wait_s)
        except TimeoutExpired:
            run.kill()
            status = None
        found = _read(Path(folder))
        output = " ".join(run.tail_output(5).split())
    failed = {host: error for host, error in found.items() if error is not None}
    if failed:
        host, error = next(iter(failed.items()))
        return False, f"{len(failed)} of {len(hosts)} nodes do not reach it; {host}: {error}"
    if len(found) < len(hosts):
        ended = f"did not end within {wait_s:.0f} s" if status is None else f"ended with {status}"
        return False, f"{len(found)} of {len(hosts)} nodes told that they reach it; the run on them {ended}: {output}"
    return True, f"{len(hosts)} nodes of this allocation reach it"


def _read(folder: Path) -> dict[str, str | None]:
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}


def main() -> int:
    """Ask the API from this node, and write down what came of it."""
    from deephyper_balsam.store.gateway import Gateway

    client_path, folder = sys.argv[1:]
    error = None
    try:
        gateway = Gateway(client_path)
        gateway.hurry()
        gateway.sites()
    except DeepHyperBalsamError as failure:
        error = str(failure)
    file = Path(folder, f"{socket.gethostname()}.json")
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(error), encoding="utf-8")
    temporary.rename(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
