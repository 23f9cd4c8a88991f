"""`search watch` and the screen that it shares with `search run`: what fits, what is said, when it ends."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.cli import main
from deephyper_balsam.cli.progress import LiveView, ProgressView
from deephyper_balsam.cli.screen import Screen, draw, duration, one_line
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.search import Search
from deephyper_balsam.monitor.follower import Follower
from deephyper_balsam.monitor.search_snapshot import AllocationView, Best, Ended, Running, SearchSnapshot
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.lease import LeaseKeeper
from deephyper_balsam.store.record import find_record
from deephyper_balsam.trial import TrialState

pytest_plugins = ["balsam_fixtures", "watched_search"]

NOW = 1_000_000.0


def snapshot(**changes: Any) -> SearchSnapshot:
    """A search in its third hour: 60 trials run, 100 have failed for ten reasons, five allocations at two sites."""
    steps = [(NOW - 9000 + 300 * number, 0.5 + 0.02 * number) for number in range(20)]
    last = [
        Ended(900 - n, NOW - 10 * n, 61.0 + n, None if n % 4 == 0 else 0.7 + 0.001 * n, "OSError: no" * 9, "nid0001")
        for n in range(40)
    ]
    made = SearchSnapshot(
        name="digits-1",
        about="ambs on digits at theta,perlmutter",
        at=NOW,
        begun_at=NOW - 10000,
        states={
            TrialState.DONE: 800,
            TrialState.FAILED: 100,
            TrialState.RUNNING: 60,
            TrialState.READY: 12,
            TrialState.CANCELLED: 0,
        },
        best=Best(0.88, 417, {"learning_rate": 0.00123456, "units": 64, "activation": "relu", "é長い名前": "x" * 60}),
        steps=steps,
        running=[
            Running(900 + n, NOW - 3600 + 60 * n, 1, "theta", 12, "nid00042" if n == 1 else None) for n in range(60)
        ],
        last=[one if one.objective is None else replace(one, failure=None) for one in last],
        failures=[(f"ValueError: reason {n} [red]with\nmarkup" + " and more" * 20, 10) for n in range(10)],
        allocations=[AllocationView(10 + n, "theta", 8, "running", 60, 60.0 * (10 + n)) for n in range(4)]
        + [
            AllocationView(20, "perlmutter", 4, "queued", 120, 7200.0),
            AllocationView(21, "perlmutter", 1, "running", 30, None),
        ],
        busy=0.934,
        evaluations_per_min=12.34,
        elapsed_s=9900.0,
        max_evals=2000,
        timeout_s=None,
        driver="process 7 on login1",
    )
    return replace(made, **changes)


def shown(what: SearchSnapshot, width: int, height: int, note: str | None = None) -> list[str]:
    """Return the rows of the screen as a terminal of this size has them."""
    console = Console(
        record=True, width=width, height=height, file=io.StringIO(), force_terminal=True, legacy_windows=False
    )
    console.print(Screen(what, NOW, note), end="")
    return console.export_text().split("\n")


SIZES = [(80, 24), (200, 50), (120, 30), (80, 60), (40, 12), (20, 5), (300, 100)]
SNAPSHOTS = {
    "busy": {},
    "with a notice": {"notice": "no allocation is alive at theta: nothing starts until there is one. " * 5},
    "new": {
        "states": dict.fromkeys(TrialState, 0),
        "best": None,
        "steps": [],
        "running": [],
        "last": [],
        "failures": [],
        "allocations": [],
        "busy": None,
        "evaluations_per_min": 0.0,
        "elapsed_s": 0.0,
    },
    "complete": {"complete": True, "running": [], "driver": None},
    "flat": {"steps": [(NOW - 500, 1.0)]},
    "clocks apart": {"steps": [(NOW + 500, 1.0)], "running": [Running(1, NOW + 9, 1, "theta", None)]},
    "by time": {"max_evals": None, "timeout_s": 20000.0},
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", SNAPSHOTS)
@pytest.mark.parametrize("note", [None, "Balsam does not answer at http://x: refused Trying again. " * 4])
def test_no_row_is_wider_than_the_screen_and_none_is_too_many(kind: str, size: tuple[int, int], note: str) -> None:
    width, height = size
    rows = shown(snapshot(**SNAPSHOTS[kind]), width, height, note)  # type: ignore[arg-type]
    assert len(rows) <= height
    assert max(cell_len(row) for row in rows) <= width


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
def test_every_part_has_its_place(size: tuple[int, int]) -> None:
    text = "\n".join(shown(snapshot(notice="a notice"), *size, note="a note"))
    for part in (
        "digits-1  ambs on digits at theta,perlmutter",
        "driven 2h45m",
        "800 done  100 failed  60 running  12 waiting",
        "nodes 93% busy  12.3/min",
        "45%  left: 1100 evaluations (about 1h29m)",
        "best 0.88 (trial 417)  learning_rate=0.001235  units=64",
        "best objective over time",
        "0.88 ┤",
        "╭",
        "2h46m",
        "running: 60 (trial, age, where)",
        "900   1h00m  theta, BatchJob 12",
        "901  59m00s  nid00042",
        "ended (trial, objective, took, node)",
        "899        0.701   1m02s",
        "OSError: no",
        "failures: 100 for 10 reasons",
        "10x ValueError: reason 0 [red]with markup",
        "allocations: 5 running with 33 nodes, 1 to come",
        "perlmutter  BatchJob 21  1 node  running, at most 30 min left",
        "a notice",
        "a note",
    ):
        assert part in text, text


def test_a_large_screen_shows_more_of_everything() -> None:
    small, large = (shown(snapshot(), *size) for size in ((80, 24), (200, 50)))
    for what in ("theta, BatchJob 12", "ValueError: reason", "OSError"):
        assert sum(row.count(what) for row in large) > sum(row.count(what) for row in small) > 0, small
    text = "\n".join(large)
    assert "theta  BatchJob 10  8 nodes  running, 10 of 60 min left" in text
    assert "perlmutter  BatchJob 20  4 nodes  in the queue, for 120 min" in text


def test_ages_grow_while_balsam_does_not_answer_and_it_is_said() -> None:
    text = "\n".join(row.plain for row in draw(snapshot(), 100, 30, NOW + 60, "Balsam does not answer."))
    assert "900   1h01m" in text
    assert "Balsam does not answer. This is from 1m00s ago." in text
    assert "This is from 1m00s ago." in "\n".join(row.plain for row in draw(snapshot(), 100, 30, NOW + 60))


def test_one_line_holds_all_of_it() -> None:
    assert one_line(snapshot(notice="wait")) == (
        " 2h45m  done 800  running 60  waiting 12  failed 100  best 0.88 (trial 417)  12.3/min  "
        "left 1100 evaluations (about 1h29m)  [wait]"
    )


@pytest.mark.parametrize(
    ("seconds", "said"), [(-3, "0s"), (59.4, "59s"), (185, "3m05s"), (7800, "2h10m"), (273600, "3d04h")]
)
def test_durations_are_said_as_a_person_says_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_terminal_gets_its_own_screen_back() -> None:
    written = io.StringIO()
    with LiveView(Console(file=written, force_terminal=True, width=80, height=24, legacy_windows=False)) as view:
        view.show(snapshot())
        view.note("Ending the search.")
        view.show(snapshot())
    text = written.getvalue()
    assert text.index("\x1b[?1049h") < text.index("digits-1") < text.rindex("\x1b[?1049l")
    assert "Ending the search." in text


def test_in_a_log_a_notice_that_counts_seconds_is_no_news_and_another_one_is() -> None:
    written = io.StringIO()
    with LiveView(Console(file=written, width=80)) as view:
        for left_s in (30, 25, 20):
            view.show(snapshot(notice=f"stopping; running trials are waited for, {left_s} s at most"))
        view.show(snapshot(notice="Balsam does not answer"))
    lines = written.getvalue().splitlines()
    assert [line.partition("[")[2] for line in lines] == [
        "stopping; running trials are waited for, 30 s at most]",
        "Balsam does not answer]",
    ]


def test_a_driver_shows_its_own_search_and_a_reader_of_balsam_sees_the_same(
    site: VirtualSite, play: Callable[..., Any], client_yml: Path, gateway: Gateway, tmp_path: Path
) -> None:
    problem = HpProblem("parabola")
    problem.add_hyperparameter((-10.0, 10.0), "x")

    def score(config: dict[str, Any]) -> float:
        if config["x"] > 5:
            raise ValueError("too wide")
        return float(-(config["x"] ** 2))

    play(score)
    evaluator = BalsamEvaluator(lambda job: 0.0, "lab", allocation=AllocationRequest(2), client_path=client_yml)
    search = Search(problem, evaluator, "p", "random", seed=3, log_dir=tmp_path, poll_s=0.01)
    written = io.StringIO()
    with ProgressView(search, Console(file=written, force_terminal=True, width=120, height=40)) as view:
        search.search(max_evals=25, on_progress=view)
    text = written.getvalue()
    for part in (
        "random on parabola at lab",
        "too wide",
        "best objective over time",
        "left: 0 evaluations",
    ):
        assert part in text
    assert view._snapshot is not None
    seen = Follower(gateway, find_record(gateway, "p")).look()
    evaluator.gateway._client.session.close()
    for name in ("about", "best", "steps", "last", "failures", "max_evals", "begun_at"):
        assert getattr(seen, name) == getattr(view._snapshot, name), name
    assert (seen.evaluated, seen.complete, view._snapshot.complete) == (25, True, False)


# --- the command -----------------------------------------------------------------------------------------------------

Watch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], client_yml: Path) -> Watch:
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client_yml))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["search", "watch", *arguments], prog_name="deephyper-balsam")
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capfd.readouterr()

    return run


EVIL = "\x1b[2J\x1b]0;gone\x07\x9b31m\u202eback\r"


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
def test_the_screen_obeys_nothing_that_a_search_says(size: tuple[int, int]) -> None:
    evil = snapshot(
        name=EVIL,
        about=EVIL,
        best=Best(1.0, 3, {EVIL: EVIL}),
        running=[Running(1, NOW - 9.0, 1, EVIL, 12, EVIL)],
        last=[Ended(2, NOW, 1.0, None, EVIL, EVIL)],
        failures=[(EVIL, 3)],
        allocations=[AllocationView(1, EVIL, 1, EVIL, 60, None)],
        driver=EVIL,
        notice=EVIL,
    )
    text = "\n".join(shown(evil, *size, note=EVIL))
    assert "back" in text
    assert not set("\x1b\x07\x9b\u202e\r") & set(text)


def test_watch_shows_no_escape_sequence_of_a_run(
    watch: Watch, gateway: Gateway, site: VirtualSite, ids: list[int]
) -> None:
    keeper = LeaseKeeper.claim(gateway, "s", site.id)
    site.acquire(4)
    for job_id in ids[:4]:
        site.finish(job_id, None, EVIL, host=EVIL)
    keeper.leave("complete")
    code, out, err = watch("s")
    assert code == 0
    assert "failed 4" in out
    assert not set("\x1b\x07\x9b\u202e\r") & set(out + err)


def once(condition: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    """Do something in a thread as soon as a condition holds."""

    def wait() -> None:
        until = time.monotonic() + 60
        while not condition() and time.monotonic() < until:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def end_all(site: VirtualSite, numbers: list[int]) -> None:
    site.acquire(4)
    for job_id in numbers[:4]:
        site.finish(job_id, job_id / 10)


def test_without_a_terminal_it_prints_lines_until_the_search_is_complete(
    watch: Watch,
    site: VirtualSite,
    ids: list[int],
    api: BalsamApi,
) -> None:
    api.requests.clear()
    thread = once(lambda: len(api.asked("GET", "batch-jobs/")) > 2, lambda: end_all(site, ids))
    code, out, err = watch("s", "--every", "0.2")
    thread.join()
    assert code == 0, err
    first, *_, last, words = out.strip().split("\n")
    assert "done 0  running 0  waiting 5  failed 0  best none" in first
    assert "nobody drives it. deephyper-balsam search resume s goes on" in first
    assert "done 4  running 0  waiting 1" in last
    assert words == "The search s is complete: deephyper-balsam search best s"
    assert "\x1b" not in out
    assert {request.method for request in api.requests} == {"GET"}


def test_it_says_that_balsam_does_not_answer_and_goes_on_when_it_does(
    watch: Watch,
    site: VirtualSite,
    ids: list[int],
    api: BalsamApi,
) -> None:
    end_all(site, ids[:3])
    api.answer_after(1, 503, path="batch-jobs/")

    def finish() -> None:
        site.acquire(2)
        site.finish(ids[3], 9.0)

    once(lambda: any(request.status == 503 for request in api.requests), finish)
    code, out, _ = watch("s", "--every", "0.2")
    assert code == 0
    lines = out.strip().split("\n")
    away = next(number for number, line in enumerate(lines) if "answered 503" in line)
    assert lines[away].endswith("Trying again.")
    assert "best 9 (trial 3)" in lines[-2]
    assert away < len(lines) - 2


def test_follow_stays_when_the_search_is_complete_until_it_is_interrupted(
    watch: Watch,
    site: VirtualSite,
    ids: list[int],
    api: BalsamApi,
) -> None:
    end_all(site, ids)
    once(lambda: len(api.asked("GET", "batch-jobs/")) > 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    code, out, err = watch("s", "--every", "0.2", "--follow")
    assert (code, err) == (130, "Interrupted.\n")
    assert "done 4" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_else(
    number: signal.Signals,
    watch: Watch,
    gateway: Gateway,
    site: VirtualSite,
    ids: list[int],
    api: BalsamApi,
) -> None:
    LeaseKeeper.claim(gateway, "s", site.id)
    api.requests.clear()
    once(lambda: len(api.asked("GET", "batch-jobs/")) > 2, lambda: os.kill(os.getpid(), number))
    assert watch("s", "--every", "0.2")[0] == 130
    assert {request.method for request in api.requests} == {"GET"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_unknown_search_is_refused_and_the_known_named(watch: Watch, ids: list[int]) -> None:
    code, out, err = watch("t")
    assert (code, out) == (2, "")
    assert "no search 't'" in err
    assert "there are: s" in err


@pytest.mark.parametrize("every", ["nan", "0", "-1", "inf", "soon"])
def test_a_pause_that_is_none_is_refused(watch: Watch, ids: list[int], every: str) -> None:
    code, out, err = watch("s", "--every", every)
    assert (code, out) == (2, "")
    assert "--every" in err
