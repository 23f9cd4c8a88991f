"""One driver at a time: claims, signs of lease, taking over, and what others read of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.common.process_id import ProcessId
from deephyper_balsam.common.timing import USUAL
from deephyper_balsam.errors import SearchRunningError, TakenOverError, UnreachableError
from deephyper_balsam.store import lease
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.lease import (
    FENCE_AFTER_S,
    GONE_AFTER_S,
    Lease,
    LeaseKeeper,
    current_lease,
    read_leases,
)
from deephyper_balsam.store.notes import write_note

pytest_plugins = ["balsam_fixtures"]


class Time:
    """A clock of one's own that moves the server's too."""

    def __init__(self, api: BalsamApi) -> None:
        self.api, self.now = api, 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.api.let_pass(seconds)


@pytest.fixture
def clock(api: BalsamApi) -> Time:
    return Time(api)


def elsewhere(gateway: Gateway, site: VirtualSite, driving: bool = True, **more: Any) -> int:
    """Note a driver on another host."""
    data = {"host": "login2", "pid": 4711, "started": "boot:1", "began_at": 1.0}
    if driving:
        data["driving_since"] = 1.0
    return write_note(gateway, site.id, "s", "driver", {**data, **more})


def claim(gateway: Gateway, site: VirtualSite, clock: Time, **options: Any) -> LeaseKeeper:
    return LeaseKeeper.claim(gateway, "s", site.id, clock=clock, sleep=clock.sleep, **options)


def driver(gateway: Gateway) -> Lease | None:
    return current_lease(read_leases(gateway, "s").get("s", []), gateway.now())


def test_a_driver_claims_gives_signs_of_life_and_leaves(gateway: Gateway, site: VirtualSite, clock: Time) -> None:
    assert driver(gateway) is None
    keeper = claim(gateway, site, clock, max_evals=40)
    found = driver(gateway)
    assert found is not None
    assert (found.host, found.pid, found.driving_since) == (socket.gethostname(), os.getpid(), 1000.0)
    assert found.is_here
    assert found.max_evals == 40
    clock.sleep(USUAL.heartbeat_s)
    keeper.beat()
    [lease] = read_leases(gateway)["s"]
    assert (lease.at, lease.drove_s) == (1005.0, 5.0)
    clock.sleep(3)
    keeper.leave("complete")
    assert driver(gateway) is None
    [lease] = read_leases(gateway)["s"]
    assert (lease.left_at, lease.why, lease.drove_s) == (1008.0, "complete", 8.0)


def test_a_claim_never_looks_like_work_or_like_a_trial(
    gateway: Gateway, site: VirtualSite, clock: Time, api: BalsamApi
) -> None:
    claim(gateway, site, clock)
    [job] = api.jobs.values()
    assert (job["state"], job["tags"]) == ("JOB_FINISHED", {"kind": "driver", "record": "s"})


def test_a_second_driver_is_refused_by_process_host_and_age_of_the_first(
    gateway: Gateway, site: VirtualSite, clock: Time
) -> None:
    elsewhere(gateway, site)
    clock.sleep(30)
    with pytest.raises(SearchRunningError, match=r"by process 4711 on login2 \(last sign of life 3[01] s ago\)"):
        claim(gateway, site, clock)
    first, second = read_leases(gateway)["s"]
    assert first.left_at is None
    assert second.driving_since is None
    assert second.left_at is not None
    assert driver(gateway) == first


def test_a_driver_without_a_sign_of_life_for_a_minute_is_gone(gateway: Gateway, site: VirtualSite, clock: Time) -> None:
    other = elsewhere(gateway, site)
    clock.sleep(GONE_AFTER_S + 1)
    keeper = claim(gateway, site, clock)
    assert keeper.lease.takes_over == (other,)
    assert driver(gateway) == read_leases(gateway)["s"][1]


def test_a_dead_process_of_this_machine_is_gone_at_once_and_a_living_one_is_not(
    gateway: Gateway, site: VirtualSite, clock: Time
) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        mark = ProcessId.of(process.pid)
        assert mark is not None
        here = {"host": socket.gethostname(), "pid": process.pid, "started": mark.started}
        elsewhere(gateway, site, **here)
        with pytest.raises(SearchRunningError):
            claim(gateway, site, clock)
        process.kill()
    claim(gateway, site, clock)


def test_another_process_with_the_pid_of_a_dead_driver_is_not_taken_for_it(
    gateway: Gateway, site: VirtualSite, clock: Time
) -> None:
    mark = ProcessId.of(os.getpid())
    assert mark is not None
    boot = mark.started.partition(":")[0]
    elsewhere(gateway, site, host=socket.gethostname(), pid=os.getppid(), started=f"{boot}:1")
    claim(gateway, site, clock)


def test_the_same_pid_on_another_machine_of_that_name_is_no_proof_of_death(
    gateway: Gateway, site: VirtualSite, clock: Time
) -> None:
    elsewhere(gateway, site, host=socket.gethostname(), pid=2**22 + 1, started="another-boot:1")
    with pytest.raises(SearchRunningError):
        claim(gateway, site, clock)


def test_of_two_that_are_deciding_the_later_withdraws(gateway: Gateway, site: VirtualSite, clock: Time) -> None:
    elsewhere(gateway, site, driving=False)
    with pytest.raises(SearchRunningError, match="being started by process 4711 on login2"):
        claim(gateway, site, clock)


@pytest.mark.parametrize("decision", [{"left_at": 1.0, "why": "withdrew"}, {"driving_since": 1.0}])
def test_of_two_that_are_deciding_the_earlier_waits_until_the_other_has_decided(
    gateway: Gateway,
    site: VirtualSite,
    clock: Time,
    api: BalsamApi,
    monkeypatch: pytest.MonkeyPatch,
    decision: dict[str, Any],
) -> None:
    """The other wrote its claim after ours; whether it had looked before, only its next word tells."""
    looks: list[float] = []
    later: list[int] = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            api.change_job(later[-1], data={**api.jobs[later[-1]]["data"], **decision})

    def write(*arguments: Any) -> int:
        mine = write_note(*arguments)
        later.append(elsewhere(gateway, site, driving=False))
        return mine

    monkeypatch.setattr(lease, "write_note", write)
    if "why" in decision:
        keeper = LeaseKeeper.claim(gateway, "s", site.id, clock=clock, sleep=look)
        assert keeper.lease.driving_since is not None
    else:
        with pytest.raises(SearchRunningError, match="being driven by process 4711"):
            LeaseKeeper.claim(gateway, "s", site.id, clock=clock, sleep=look)
    assert len(looks) == 3


def test_of_many_threads_that_claim_at_once_at_most_one_drives_and_mostly_one_does(
    client_yml: Path, site: VirtualSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if each were a process of its own
    monkeypatch.setattr(Lease, "is_here", property(lambda self: False))
    for number in range(10):
        won: list[LeaseKeeper] = []
        barrier = threading.Barrier(4)

        def go(search: str = f"s{number}", won: list[LeaseKeeper] = won, barrier: threading.Barrier = barrier) -> None:
            mine = Gateway(client_yml)
            barrier.wait()
            try:
                won.append(LeaseKeeper.claim(mine, search, site.id))
            except SearchRunningError:
                pass
            finally:
                mine._client.session.close()

        threads = [threading.Thread(target=go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1


def test_takeover_replaces_a_driver_that_gave_a_sign_of_life_a_moment_ago(
    gateway: Gateway, site: VirtualSite, clock: Time
) -> None:
    other = elsewhere(gateway, site)
    began_at = clock.now
    keeper = claim(gateway, site, clock, takeover=True)
    assert other in keeper.lease.takes_over
    assert clock.now - began_at >= 2 * USUAL.heartbeat_s  # time for the other to notice
    assert driver(gateway) == read_leases(gateway)["s"][1]


def test_a_driver_that_was_taken_over_stops_at_its_next_sign_of_life(
    gateway: Gateway, site: VirtualSite, clock: Time, api: BalsamApi
) -> None:
    keeper = claim(gateway, site, clock)
    elsewhere(gateway, site, takes_over=[keeper.lease.id])
    clock.sleep(USUAL.heartbeat_s)
    with pytest.raises(TakenOverError, match="was taken over by process 4711 on login2"):
        keeper.beat()


def test_a_driver_that_slept_looks_again_before_it_changes_anything(
    gateway: Gateway, site: VirtualSite, clock: Time
) -> None:
    keeper = claim(gateway, site, clock)
    keeper.fence()
    clock.sleep(FENCE_AFTER_S)
    keeper.fence()  # nobody came
    clock.sleep(GONE_AFTER_S * 100)
    elsewhere(gateway, site, driving=False)  # it may have found us dead, and be about to say so
    with pytest.raises(TakenOverError, match="without a sign of life from here"):
        keeper.fence()


def test_a_driver_that_slept_between_its_look_and_its_word_looks_again(
    gateway: Gateway, site: VirtualSite, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another may have found it gone meanwhile, and drive or be about to."""
    sign = LeaseKeeper._sign

    def slow(self: LeaseKeeper, lease: Lease) -> None:
        if lease.driving_since is not None and lease.left_at is None:
            clock.sleep(GONE_AFTER_S + 10)
            elsewhere(gateway, site, driving=False)
        sign(self, lease)

    monkeypatch.setattr(LeaseKeeper, "_sign", slow)
    with pytest.raises(TakenOverError):
        claim(gateway, site, clock)
    assert all(lease.left_at is not None for lease in read_leases(gateway)["s"] if lease.is_here)


def test_a_clock_that_was_put_back_does_not_silence_a_driver(gateway: Gateway, site: VirtualSite, clock: Time) -> None:
    keeper = claim(gateway, site, clock)
    clock.now -= 3600
    keeper.beat()
    assert read_leases(gateway)["s"][0].at == clock.now


def test_who_is_deciding_does_not_stop_a_driver_that_gave_its_signs(
    gateway: Gateway, site: VirtualSite, clock: Time
) -> None:
    keeper = claim(gateway, site, clock)
    elsewhere(gateway, site, driving=False)
    clock.sleep(USUAL.heartbeat_s)
    keeper.beat()


def test_an_earlier_driver_in_the_same_process_is_taken_over(gateway: Gateway, site: VirtualSite, clock: Time) -> None:
    first = claim(gateway, site, clock)
    second = claim(gateway, site, clock)
    assert first.lease.id in second.lease.takes_over
    clock.sleep(USUAL.heartbeat_s)
    second.beat()
    with pytest.raises(TakenOverError):
        first.beat()


def test_a_sign_of_life_that_did_not_arrive_is_given_again(
    gateway: Gateway, site: VirtualSite, clock: Time, api: BalsamApi
) -> None:
    keeper = claim(gateway, site, clock)
    clock.sleep(USUAL.heartbeat_s)
    api.answer_next(503, method="PATCH", path="jobs/")
    with pytest.raises(UnreachableError):
        keeper.beat()
    keeper.beat()
    assert read_leases(gateway)["s"][0].at == clock.now


def test_what_others_note_is_news_once(gateway: Gateway, site: VirtualSite, clock: Time) -> None:
    keeper = claim(gateway, site, clock)
    note = write_note(gateway, site.id, "s", "request", {"what": "stop"})
    write_note(gateway, site.id, "another", "request", {"what": "stop"})
    for _ in range(2):
        clock.sleep(USUAL.heartbeat_s)
        keeper.beat()
    assert [row["id"] for row in keeper.news] == [note]
