"""Who owns a stack's folder: claims of two hosts, played by this process under two names."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deephyper_balsam.errors import InputError
from deephyper_balsam.server import sign_of_life
from deephyper_balsam.server.sign_of_life import Claims, LostError, Owner, Place, require, take
from deephyper_balsam.server.stack_state import Waits

WAITS = Waits(sign_s=0.05, gone_s=0.6, let_go_s=0.5)
On = Callable[..., None]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> On:
    """Play a host from now on."""

    def play(host: str, boot: str = "1", pids: str = "") -> None:
        monkeypatch.setattr(Place, "here", classmethod(lambda cls: Place(host, boot, pids)))
        monkeypatch.setattr(sign_of_life.socket, "gethostname", lambda: host)

    play("one")
    return play


def own(folder: Path, said: list[str] | None = None, **more: bool) -> Owner:
    return take(folder, WAITS, (said if said is not None else []).append, **more)


def test_a_folder_without_a_claim_is_taken_and_only_its_owner_may_read_the_claim(tmp_path: Path, on: On) -> None:
    owner = own(tmp_path)
    assert (owner.number, owner.is_new, owner.claim.host, owner.claim.pid) == (1, True, "one", os.getpid())
    assert (tmp_path / "alive").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "alive").iterdir()] == ["1.json"]
    assert (tmp_path / "alive" / "1.json").stat().st_mode & 0o777 == 0o600


def test_the_owner_stays_it_and_its_signs_of_life_change_the_file_alone(tmp_path: Path, on: On) -> None:
    owner = own(tmp_path)
    again = own(tmp_path)
    assert (again.number, again.is_new) == (1, False)
    texts = set()
    for _ in range(3):
        owner.beat()
        texts.add((tmp_path / "alive" / "1.json").read_text())
        time.sleep(0.002)
    assert len(texts) == 3
    assert [path.name for path in (tmp_path / "alive").iterdir()] == ["1.json"]


def test_a_host_that_gives_signs_of_life_is_named_and_not_taken_over(tmp_path: Path, on: On) -> None:
    owner = own(tmp_path)
    on("two")
    with (
        owner.kept(WAITS.sign_s),
        pytest.raises(InputError, match=rf"runs on one \(process {os.getpid()}\).*--on-other"),
    ):
        own(tmp_path)
    found = Claims(tmp_path).latest()
    assert found is not None
    assert found[0].number == 1


@pytest.mark.parametrize("ahead_s", [0.0, 86400.0, -86400.0])
def test_a_host_without_a_sign_of_life_is_taken_over_whatever_its_clock_said(
    tmp_path: Path, on: On, ahead_s: float
) -> None:
    own(tmp_path)
    path = tmp_path / "alive" / "1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "at": time.time() + ahead_s}))
    on("two")
    said: list[str] = []
    began = time.monotonic()
    owner = own(tmp_path, said)
    assert time.monotonic() - began >= WAITS.gone_s
    assert (owner.number, owner.is_new, owner.claim.host) == (2, True, "two")
    assert "taken over after 1 s" in said[0]
    assert "over from one" in said[-1]


def test_the_impatient_wait_only_until_the_other_host_has_stopped(tmp_path: Path, on: On) -> None:
    first = own(tmp_path)
    on("two")

    def stop_when_lost() -> None:
        while True:
            try:
                first.beat()
            except LostError:
                first.leave("taken over")
                return
            time.sleep(0.02)

    noticing = threading.Thread(target=stop_when_lost)
    noticing.start()
    began = time.monotonic()
    owner = own(tmp_path, takeover=True)
    assert time.monotonic() - began < WAITS.let_go_s
    noticing.join()
    assert owner.number == 2
    owner.beat()
    assert require(tmp_path).number == 2


def test_a_folder_that_was_given_back_is_taken_at_once(tmp_path: Path, on: On) -> None:
    own(tmp_path).leave("stopped")
    on("two")
    said: list[str] = []
    assert own(tmp_path, said).number == 2
    assert said == []
    on("one")
    with pytest.raises(InputError, match=r"run by two .*this is one"):
        require(tmp_path)


@pytest.mark.parametrize(("boot", "pids"), [("2", ""), ("1", "another container")])
def test_a_host_that_was_started_anew_waits_a_little_for_one_of_the_same_name(
    tmp_path: Path, on: On, boot: str, pids: str
) -> None:
    own(tmp_path)
    on("one", boot, pids)
    began = time.monotonic()
    assert own(tmp_path).number == 2
    assert 5 * WAITS.sign_s <= time.monotonic() - began < WAITS.gone_s


def test_a_process_of_this_host_that_was_killed_owns_nothing(tmp_path: Path, on: On) -> None:
    own(tmp_path)
    path = tmp_path / "alive" / "1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "started": "earlier"}))
    assert own(tmp_path).number == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"host": "a", "unknown": 1}'])
def test_a_claim_that_was_cut_while_it_was_written_holds_until_it_is_old(tmp_path: Path, on: On, text: str) -> None:
    own(tmp_path)
    (tmp_path / "alive" / "1.json").write_text(text)
    began = time.monotonic()
    assert own(tmp_path).number == 2
    assert time.monotonic() - began >= WAITS.gone_s


def test_of_many_that_try_at_once_one_becomes_the_owner(tmp_path: Path, on: On) -> None:
    claims = Claims(tmp_path)
    made = []
    together = threading.Barrier(8)

    def claim() -> None:
        together.wait()
        made.append(claims.make(1))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([one for one in made if one is not None]) == 1


def test_a_claim_that_was_made_on_an_old_look_at_the_folder_does_not_count(tmp_path: Path, on: On) -> None:
    claims = Claims(tmp_path)
    for number in (1, 2, 3):
        assert claims.make(number) is not None
    assert sorted(path.name for path in claims.folder.iterdir()) == ["2.json", "3.json"]
    assert claims.make(1) is None
