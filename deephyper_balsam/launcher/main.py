"""Balsam's launcher for one allocation: ``python -m deephyper_balsam.launcher.main -j mpi -t MIN --tag key=value``.

It does what ``balsam launcher`` does, with Balsam's own MPI and serial modes, and mends what breaks there: paths with
spaces, exit codes that are lost, a port that two serial launchers on one machine share and any stranger may use.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import click

from deephyper_balsam.common import scratch
from deephyper_balsam.common.loopback import pass_proxies_by
from deephyper_balsam.common.patching import require_version
from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import BalsamChangedError
from deephyper_balsam.launcher.serial_channel import ChannelError, open_on_nodes, open_on_one_machine

_STOP_GRACE_S = 12.0
_POLL_S = 0.2


class _Process(Protocol):
    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


def parse_tags(words: Sequence[str]) -> dict[str, str]:
    """Turn ``key=value`` words into a dict.

    Raises
    ------
    click.BadParameter
        When a word has no ``=``.
    """
    for word in words:
        if "=" not in word:
            raise click.BadParameter(f"a tag is KEY=VALUE, but got {word!r}")
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def parse_partition(text: str) -> dict[str, Any]:
    """Turn ``MODE:NUM_NODES[:KEY=VALUE...]`` into a dict with ``job_mode``, ``num_nodes`` and ``filter_tags``.

    Raises
    ------
    click.BadParameter
        When the text has another form.
    """
    mode, _, rest = text.partition(":")
    number, *tags = rest.split(":")
    if mode not in ("mpi", "serial") or not number.isdigit():
        raise click.BadParameter(f"a partition is MODE:NUM_NODES[:KEY=VALUE...], but got {text!r}")
    return {"job_mode": mode, "num_nodes": int(number), "filter_tags": parse_tags(tags)}


def mode_script(job_mode: str) -> list[str]:
    """Return the command that starts Balsam's mode, through ours, which keeps its end and polls faster."""
    spec = find_spec(f"deephyper_balsam.launcher.{job_mode}_mode")
    assert spec is not None
    assert spec.origin is not None
    return [sys.executable, spec.origin]


def mode_arguments(wall_time_min: int, log_file: Path, filter_tags: dict[str, str], **more: Any) -> list[str]:
    """Return the arguments that both modes take, then `more` with underscores turned to dashes."""
    values = {
        "wall-time-min": wall_time_min,
        "log-filename": log_file,
        "filter-tags": json.dumps(filter_tags),
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def exit_code(codes: Sequence[int]) -> int:
    """Return the first code that is not 0, as a shell would show it (128 + the signal's number)."""
    return next((128 - code if code < 0 else code for code in codes if code), 0)


def _start_mode(
    site: Any,
    job_mode: str,
    nodes: list[Any],
    wall_time_min: int,
    tags: dict[str, str],
    options: Any,
    private: list[Path],
) -> Any:
    """Start a mode on its nodes; what it must not leave behind is added to `private`."""
    name = f"{job_mode}_mode_{datetime.now():%Y-%m-%d_%H%M%S}.{os.getpid()}-{options['index']}"
    log_file = Path(site.log_path) / f"{name}.log"
    out_file = Path(site.log_path) / f"{name}.out"
    env = {
        **os.environ,
        "BALSAM_LAUNCHER_NODES": str(len(nodes)),
        "BALSAM_JOB_MODE": job_mode,
        "DEEPHYPER_BALSAM_POLL_S": str(options["poll_s"]),
        "DEEPHYPER_BALSAM_LOOPBACK": "1" if options["loopback"] else "",
    }
    command = mode_script(job_mode)
    if job_mode == "mpi":
        command += mode_arguments(wall_time_min, log_file, tags, node_ids=json.dumps([node.node_id for node in nodes]))
    else:
        # The channel's file says where they meet: 0 is no port of theirs
        address = f"{nodes[0].hostname}:0"
        if options["loopback"]:
            private.append(scratch.make())
            private.append(open_on_one_machine(log_file, private[-1]))
        else:
            private.append(open_on_nodes(log_file))
        command += mode_arguments(wall_time_min, log_file, tags, master_address=address, num_workers=len(nodes))
    if job_mode == "mpi" or options["loopback"]:
        with out_file.open("wb") as output:
            return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    return _start_on_each_node(site, nodes, shlex.join(command), env, out_file)


def _start_on_each_node(site: Any, nodes: list[Any], command: str, env: dict[str, str], out_file: Path) -> Any:
    from balsam.site.launcher import NodeSpec

    settings = site.settings.launcher
    run = settings.mpi_app_launcher(
        cmdline=command,
        preamble=None,
        envs=env,
        cwd=Path.cwd(),
        outfile_path=out_file,
        node_spec=NodeSpec(node_ids=[node.node_id for node in nodes], hostnames=[node.hostname for node in nodes]),
        ranks_per_node=1,
        threads_per_rank=1,
        threads_per_core=1,
        launch_params=settings.serial_mode_startup_params,
        gpus_per_rank=len(nodes[0].gpu_ids),
    )
    run.start()
    return run


def nodes_for_runs(site: Any, spare_first_node: bool) -> list[Any]:
    """Return the allocation's nodes; without the first, where that is to be spared and there are others."""
    nodes: list[Any] = site.settings.launcher.compute_node.get_job_nodelist()
    return nodes[1:] if spare_first_node and len(nodes) > 1 else nodes


def supervise(running: Sequence[_Process], stop: Any) -> list[int]:
    """Wait for the modes to end, or for `stop` to become true; then end what runs. Return all exit codes."""
    codes: dict[int, int | None] = dict.fromkeys(range(len(running)))

    def look() -> bool:
        for index, process in enumerate(running):
            if codes[index] is None:
                codes[index] = process.poll()
        return all(code is not None for code in codes.values())

    while not look() and not stop():
        time.sleep(_POLL_S)
    for index, process in enumerate(running):
        if codes[index] is None:
            process.terminate()
    deadline = time.monotonic() + _STOP_GRACE_S
    while not look() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for index, process in enumerate(running):
        if codes[index] is None:
            process.kill()
            codes[index] = -signal.SIGKILL
    return [code or 0 for code in codes.values()]


def signals_received() -> list[int]:
    """Begin to listen for the signals that end a launcher, in place of ending at once.

    Returns
    -------
    list of int
        Their numbers are added to it as they come. SIGHUP is left ignored where it is (``nohup``).
    """
    received: list[int] = []
    heard = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    for number in (signal.SIGTERM, signal.SIGINT, *heard):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def launcher_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the launcher's options; `launcher_arguments` is the way back."""
    for option in (
        click.option("--loopback", is_flag=True, help="The allocation is this machine alone: listen on 127.0.0.1."),
        click.option("--spare-first-node", is_flag=True, help="Run nothing on the first of several nodes."),
        click.option(
            "--poll-s",
            type=click.FloatRange(min=0.05),
            default=1.0,
            show_default=True,
            help="Seconds between two looks.",
        ),
        click.option(
            "--part", "parts", multiple=True, metavar="MODE:NODES[:KEY=VALUE...]", help="One partition; repeat it."
        ),
        click.option(
            "--tag", "tags", multiple=True, metavar="KEY=VALUE", help="Run only jobs with this tag; all must match."
        ),
        click.option(
            "-t", "--wall-time-min", type=click.IntRange(min=1), required=True, help="Minutes of the allocation."
        ),
        click.option(
            "-j", "--job-mode", type=click.Choice(["mpi", "serial"]), required=True, help="Balsam's launcher mode."
        ),
    ):
        command = option(command)
    return command


def launcher_arguments(
    job_mode: str,
    wall_time_min: int,
    tags: Sequence[str],
    parts: Sequence[str],
    poll_s: float,
    loopback: bool,
    spare_first_node: bool,
) -> list[str]:
    """Return the words for a launcher with these options."""
    words = ["-j", job_mode, "-t", str(wall_time_min), "--poll-s", str(poll_s), *(["--loopback"] if loopback else [])]
    words += ["--spare-first-node"] if spare_first_node else []
    for option, values in (("--tag", tags), ("--part", parts)):
        words += [word for value in values for word in (option, value)]
    return words


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@launcher_options
def main(
    job_mode: str,
    wall_time_min: int,
    tags: tuple[str, ...],
    parts: tuple[str, ...],
    poll_s: float,
    loopback: bool,
    spare_first_node: bool,
) -> None:
    """Run Balsam jobs of the site in $BALSAM_SITE_PATH on the nodes of this allocation.

    \b
    Example:
      python -m deephyper_balsam.launcher.main -j mpi -t 60 --tag search=digits-1
    """
    received = signals_received()
    try:
        require_version()
    except BalsamChangedError as error:
        raise click.ClickException(str(error)) from error
    pass_proxies_by(os.environ)  # its modes and runs inherit it

    from balsam.config import SiteConfig

    site = SiteConfig()
    nodes = nodes_for_runs(site, spare_first_node)
    partitions = [parse_partition(part) for part in parts] or [
        {"job_mode": job_mode, "num_nodes": len(nodes), "filter_tags": parse_tags(tags)}
    ]
    wanted = sum(part["num_nodes"] for part in partitions)
    if wanted > len(nodes):
        raise click.UsageError(f"the partitions need {counted(wanted, 'node')}, but the allocation has {len(nodes)}")

    running: list[_Process] = []
    private: list[Path] = []
    first = 0
    try:
        for index, part in enumerate(partitions):
            chosen = nodes[first : first + part["num_nodes"]]
            first += part["num_nodes"]
            options = {"index": index, "loopback": loopback, "poll_s": poll_s}
            running.append(
                _start_mode(site, part["job_mode"], chosen, wall_time_min, part["filter_tags"], options, private)
            )
        codes = supervise(running, lambda: bool(received))
    except ChannelError as error:
        raise click.ClickException(str(error)) from error
    finally:
        for path in private:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    sys.exit(exit_code(codes))


if __name__ == "__main__":
    main()
