"""A run in a process of its own: whatever it does to itself, its end is said and nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from gone import is_gone

from deephyper_balsam.node.supervise import OutputFilter, RunEnd, supervise

Began = Callable[[], None]


def python(code: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=60, **more)


def quiet(began: Began) -> dict[str, Any]:
    began()
    return {"said": os.getpid()}


def test_what_the_run_says_comes_back_from_another_process_and_nothing_is_left() -> None:
    before = set(psutil.Process().children())
    descriptors = psutil.Process().num_fds()
    ending = supervise(quiet, 60)
    assert ending.said is not None
    assert ending.said["said"] != os.getpid()
    assert set(psutil.Process().children()) <= before  # what had ended before may have been waited for
    assert psutil.Process().num_fds() == descriptors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGTERM])
def test_a_run_that_a_signal_kills_is_said_to_be_killed_by_it(number: int) -> None:
    def work(began: Began) -> dict[str, Any]:
        import faulthandler

        faulthandler.disable()
        os.kill(os.getpid(), number)
        return {}

    assert supervise(work, None) == RunEnd(signal=number)


def test_a_run_that_exits_is_said_to_have_exited() -> None:
    assert supervise(lambda began: os._exit(7), None) == RunEnd(status=7)


def test_a_run_over_its_time_that_does_not_react_is_ended_and_only_then() -> None:
    def work(began: Began) -> dict[str, Any]:
        time.sleep(1.0)  # what comes before the beginning does not count
        began()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        while True:
            time.sleep(1)

    began_at = time.monotonic()
    assert supervise(work, 0.3, grace_s=0.2) == RunEnd(timed_out=True)
    assert time.monotonic() - began_at > 1.4


def test_a_run_that_said_how_it_ended_and_does_not_leave_is_ended_and_its_word_counts() -> None:
    def work(began: Began) -> dict[str, Any]:
        import atexit

        atexit.register(time.sleep, 300)
        return {"objective": 1}

    assert supervise(work, None, grace_s=0.3) == RunEnd({"objective": 1})


def test_the_users_exit_functions_run_and_ours_do_not(tmp_path: Path) -> None:
    ended = python(
        f"""
        import atexit
        from deephyper_balsam.node.supervise import supervise
        atexit.register(print, "ours", flush=True)
        def work(began):
            atexit.register(open({str(tmp_path / "theirs")!r}, "w").write, "x")
            return {{}}
        supervise(work, None)
        """
    )
    assert ended.stdout == b"ours\n"
    assert (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    "start",
    [
        "subprocess.Popen(['bash', '-c', 'trap \"\" TERM; sleep 300'])",
        "subprocess.Popen(['setsid', 'sleep', '300'])",
        "subprocess.Popen(['bash', '-c', 'setsid sleep 300 & disown; exit 0']).wait()",
        "double_fork()",
    ],
)
def test_children_that_outlive_a_run_are_ended_daemons_included(tmp_path: Path, start: str) -> None:
    ended = python(
        f"""
        import contextlib, os, subprocess, time, psutil
        from deephyper_balsam.node.supervise import supervise
        def double_fork():
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(300)
                os._exit(0)
            os.wait()
        def work(began):
            before = set(psutil.pids())
            {start}
            time.sleep(0.3)
            mine = psutil.Process().cmdline()
            pids = []
            for p in psutil.Process().parent().children(recursive=True):  # daemons fall to the supervisor
                with contextlib.suppress(psutil.NoSuchProcess):
                    if p.pid not in before and ("300" in p.cmdline() or p.cmdline() == mine):
                        pids.append(p.pid)
            return {{"pids": pids}}
        print(*supervise(work, None).said["pids"])
        """
    )
    pids = ended.stdout.split()
    assert pids, ended
    assert all(is_gone(int(pid)) for pid in pids), ended


def test_the_end_of_the_allocation_ends_the_run_with_its_children_and_nothing_is_said(tmp_path: Path) -> None:
    code = f"""
        import os, subprocess, time
        from pathlib import Path
        from deephyper_balsam.node.supervise import supervise
        def work(began):
            child = subprocess.Popen(["setsid", "sleep", "300"])
            Path({str(tmp_path / "pids")!r}).write_text(f"{{os.getpid()}} {{child.pid}}\\n")
            time.sleep(300)
        supervise(work, None)
        print("said")
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (-signal.SIGTERM, b"")
    assert all(is_gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_a_supervisor_that_is_killed_takes_the_run_with_it(tmp_path: Path) -> None:
    code = f"""
        import os, time
        from pathlib import Path
        from deephyper_balsam.node.supervise import supervise
        def work(began):
            Path({str(tmp_path / "pid")!r}).write_text(f"{{os.getpid()}}\\n")
            time.sleep(300)
        supervise(work, None)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait(30)
    assert is_gone(int((tmp_path / "pid").read_text()))


# --- output ----------------------------------------------------------------------------------------------------------


def test_what_a_run_and_its_children_print_arrives_and_harms_nobody() -> None:
    ended = python(
        """
        import os, subprocess, sys
        from deephyper_balsam.node.supervise import supervise
        def work(began):
            print("héllo")
            sys.stdout.flush()
            os.write(1, b"\\xff\\xfe latin: \\xe9\\n")
            subprocess.run(["bash", "-c", "echo BALSAM-RETURN-VALUE gASV; echo BALSAM-EXCEPTION x >&2"])
            return {}
        supervise(work, None)
        print("BALSAM-RETURN-VALUE ours")
        """
    )
    text = ended.stdout.decode()
    assert text.startswith("héllo\n")
    assert "latin:" in text
    assert "BALSAM RETURN VALUE gASV\n" in text
    assert "BALSAM EXCEPTION x\n" in text
    assert text.count("BALSAM-RETURN-VALUE") == 1


def test_megabytes_of_output_do_not_stop_a_run_and_one_that_closes_its_output_ends_well() -> None:
    def loud(began: Began) -> dict[str, Any]:
        for _ in range(64):
            os.write(1, b"x" * 2**16)
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None  # type: ignore[assignment]
        return {"objective": 3}

    real = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        assert supervise(loud, 60) == RunEnd({"objective": 3})
    finally:
        os.dup2(real, 1)
        os.close(real)
        os.close(null)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_the_filter_sees_markers_and_characters_across_chunks(size: int) -> None:
    text = "a BALSAM-RETURN-VALUE é BALSAM-EXCEPTION\nBALSAM-RET done BALSAM-".encode()
    cleaner = OutputFilter()
    out = b"".join(cleaner.feed(text[start : start + size]) for start in range(0, len(text), size)) + cleaner.end()
    assert out.decode() == "a BALSAM RETURN VALUE é BALSAM EXCEPTION\nBALSAM-RET done BALSAM-"


def test_the_filter_keeps_no_more_than_the_limit_and_says_so_once() -> None:
    cleaner = OutputFilter(limit_bytes=10)
    out = b"".join(cleaner.feed("é".encode() * 3) for _ in range(100)) + cleaner.end()
    text = out.decode()
    assert text.startswith("é" * 5 + "\n(what the run printed beyond")
    assert text.count("left out") == 1
