"""`search report|plot|compare|results` on the fake of Balsam's API: what they write, and what they refuse."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import VirtualSite
from made_searches import made_search

from deephyper_balsam.cli import main
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.record import create_record
from deephyper_balsam.store.trial_rows import trial_job
from deephyper_balsam.trial import Resources, Trial

pytest_plugins = ["balsam_fixtures"]

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], client_yml: Path, tmp_path: Path) -> Call:
    for name in [name for name in os.environ if name.startswith("BALSAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BALSAM_CLIENT_PATH", str(client_yml))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["search", *arguments], prog_name="deephyper-balsam")
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(ended.value.code or 0), out, err

    return run


def put(gateway: Gateway, site: VirtualSite, name: str, count: int, seed: int = 0) -> None:
    """Put a search that was made up into Balsam: some trials done, one failed with its traceback, one waiting."""
    made = made_search(count, seed=seed, failing=False)
    create_record(gateway, name, dict(made.settings), site.id, 1000.0)
    app = gateway.create_app(
        {"site_id": site.id, "name": name.replace("-", "_"), "serialized_class": "x", "source_code": ""}
    )
    configs = [
        {key[2:]: value for key, value in line.items() if key.startswith("p:") and value is not None}
        for line in made.lines[: count + 1]
    ]
    trials = [Trial(number, config) for number, config in enumerate(configs)]
    ids = gateway.create_jobs([trial_job(trial, name, app["id"], Resources(), 1001.0, None) for trial in trials])
    site.acquire(count)
    for number, line in zip(ids[: count - 1], made.lines, strict=False):
        site.finish(number, line["objective"])
    site.finish(ids[count - 1], None, "diverged <here>")


def test_the_report_stands_in_the_searchs_folder(call: Call, gateway: Gateway, site: VirtualSite) -> None:
    put(gateway, site, "s", 12)
    code, out, _ = call("report", "s")
    assert code == 0
    assert out.startswith("Report written to s/report.html (")
    page = Path("s/report.html").read_text(encoding="utf-8")
    assert "diverged &lt;here&gt;" in page
    assert os.listdir("s") == ["report.html"]
    assert call("report", "s", "-o", "else where/r.html")[0] == 0
    assert Path("else where/r.html").stat().st_size == pytest.approx(len(page.encode()), rel=0.01)


@pytest.mark.parametrize(("suffix", "begin"), [("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<svg")])
def test_a_figure_is_written_by_its_suffix(
    call: Call, gateway: Gateway, site: VirtualSite, suffix: str, begin: bytes
) -> None:
    put(gateway, site, "s", 12)
    code, out, err = call("plot", "s", "--kind", "panels", "-o", f"figure.{suffix}")
    assert (code, out, err) == (0, "", f"Figure written to figure.{suffix}\n")
    assert Path(f"figure.{suffix}").read_bytes().startswith(begin)


def test_every_export_is_read_back_to_the_same_table(call: Call, gateway: Gateway, site: VirtualSite) -> None:
    put(gateway, site, "s", 12)
    for suffix in ("csv", "json", "parquet"):
        code, out, _ = call("results", "s", "-o", f"t.{suffix}")
        assert (code, out) == (0, f"13 rows written to t.{suffix}\n")
    frames: list[Any] = [pd.read_csv("t.csv"), pd.read_json("t.json", precise_float=True), pd.read_parquet("t.parquet")]
    assert len(frames[0]) == 13
    assert frames[0]["p:learning_rate"].tolist() == [
        line["p:learning_rate"] for line in made_search(12, failing=False).lines[:13]
    ]
    for frame in frames[1:]:
        assert set(frame.columns) == set(frames[0].columns)  # in JSON an inactive hyperparameter has no key
        pd.testing.assert_frame_equal(frame[frames[0].columns], frames[0], check_dtype=False, check_exact=True)


def test_deephypers_readers_find_failures_where_they_look(call: Call, gateway: Gateway, site: VirtualSite) -> None:
    put(gateway, site, "s", 12)
    assert call("results", "s", "--deephyper", "-o", "t.csv")[0] == 0
    frame = pd.read_csv("t.csv")
    assert len(frame) == 12  # without the one that waits
    failed = frame[frame["objective"].astype(str).str.startswith("F")]  # as deephyper.analysis.hpo does
    assert failed["objective"].tolist() == ["F_diverged <here>"]
    assert frame["m:timestamp_end"].notna().all()
    code, _, err = call("results", "s", "--deephyper", "--legacy")
    assert code == 2
    assert "not both" in err


def test_searches_are_compared_in_a_table_as_json_and_in_a_picture(
    call: Call, gateway: Gateway, site: VirtualSite
) -> None:
    put(gateway, site, "a-1", 12, seed=1)
    put(gateway, site, "a-2", 14, seed=2)
    code, out, err = call("compare", "a-1", "a-2", "-o", "c.svg")
    assert (code, err) == (0, "Figure written to c.svg\n")
    lines = out.splitlines()
    assert lines[0] == "After 12 evaluations each:"
    assert lines[1].split() == [
        "searches",
        "runs",
        "evaluated",
        "failed",
        "best",
        "median",
        "lowest",
        "highest",
        "rank",
    ]
    assert lines[2].startswith("ambs surrogate=RF")
    assert Path("c.svg").read_text(encoding="utf-8").startswith("<svg")
    code, out, _ = call("compare", "a-1", "a-2", "--json")
    assert '"names": [\n        "a-1",\n        "a-2"\n      ]' in out


REFUSED = [
    (("report", "gone"), r"There is no search 'gone'"),
    (("report", "s", "-o", "file/report.html"), r"file/report.html cannot be written: (File exists|Not a directory)"),
    (("plot", "s", "-o", "a.jpeg"), r"must end in one of .pdf, .png, .svg, but got 'a.jpeg'"),
    (("plot", "s", "--kind", "pie", "-o", "a.svg"), r"'pie' is not one of 'progress'"),
    (("plot", "s"), r"Missing option '-o'"),
    (("plot", "s", "-o", "file/a.svg"), r"file/a.svg cannot be written"),
    (("results", "s", "-o", "a.xlsx"), r"must end in one of .csv, .json, .parquet, but got 'a.xlsx'"),
    (("compare", "s"), r"two searches or more, but got 1"),
    (("compare", "s", "s"), r"two searches or more, but got 1"),
    (("compare", "s", "empty"), r"Search empty has no trial with an objective yet"),
    (("compare", "s", "gone"), r"There is no search 'gone'"),
    (("compare", "s", "empty", "-o", "a.gif"), r"must end in one of .pdf, .png, .svg, but got 'a.gif'"),
    (("report", "empty"), r"Search empty has no trial with an objective yet \(1 failed\)"),
    (("plot", "empty", "-o", "a.svg"), r"Search empty has no trial with an objective yet"),
    (("plot", "few", "--kind", "importance", "-o", "a.svg"), r"Importances need 10 trials with an objective"),
]


@pytest.mark.parametrize(
    ("words", "said"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_bad_input_gives_one_message_and_writes_nothing(
    call: Call, gateway: Gateway, site: VirtualSite, words: tuple[str, ...], said: str
) -> None:
    put(gateway, site, "s", 12)
    put(gateway, site, "empty", 1)
    put(gateway, site, "few", 5)
    Path("file").write_text("", encoding="utf-8")
    code, out, err = call(*words)
    assert code == 2
    assert out == ""
    assert err.count("Error: ") == 1

    assert re.search(said, err)
    assert os.listdir() == ["file"]


@pytest.mark.parametrize(
    ("module", "words", "extra"),
    [
        ("vl_convert", ("report", "s"), "report"),
        ("vl_convert", ("plot", "s", "-o", "a.svg"), "report"),
        ("vl_convert", ("compare", "s", "t", "-o", "a.svg"), "report"),
        ("pyarrow", ("results", "s", "-o", "a.parquet"), "parquet"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_the_way_to_install_it(
    call: Call, monkeypatch: pytest.MonkeyPatch, module: str, words: tuple[str, ...], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = call(*words)
    assert code == 2
    assert f"pip install 'deephyper-balsam[{extra}]'" in err
    assert os.listdir() == []
