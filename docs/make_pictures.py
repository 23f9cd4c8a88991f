"""Make the pictures of docs/analysis.md: ``python docs/make_pictures.py``, some minutes, no Balsam needed.

It searches the bundled application `digits` by ask and tell, with two methods and three seeds each, and draws what it
found. With Chromium on the path and the extra `browser`, it takes the picture of the report too.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from threadpoolctl import threadpool_limits

from deephyper_balsam.node.targets import load_object
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.results.analysis.compare import compare_searches, comparison_figure
from deephyper_balsam.results.analysis.drawing import draw
from deephyper_balsam.results.analysis.figures import figure
from deephyper_balsam.results.analysis.report import html
from deephyper_balsam.results.analysis.trials import Trials
from deephyper_balsam.store.applications import resolve_problem, resolve_run
from deephyper_balsam.trial import Result

IMAGES = Path(__file__).with_name("images")
EVALUATIONS = 60


def searched(method: str, seed: int) -> Trials:
    """Search digits here, one evaluation after the other."""
    problem, run = resolve_problem("digits"), load_object(resolve_run("digits")["target"])
    optimizer = make_optimizer(method, problem, seed=seed, num_workers=2)
    lines, begun = [], time.time()
    while len(lines) < EVALUATIONS:
        (trial,) = optimizer.ask(1)
        start = time.time() - begun
        outcome = run(trial.config)
        objective = outcome["objective"] if isinstance(outcome, dict) else outcome
        end = time.time() - begun
        optimizer.tell([Result(trial.number, objective)])
        times = {"m:timestamp_submit": start, "m:timestamp_start": start, "m:timestamp_end": end}
        values = {f"p:{name}": value for name, value in trial.config.items()}
        lines.append({**values, "objective": objective, "job_id": trial.number, "job_status": "DONE", **times})
    optimizer.close()
    settings = {"problem": problem.to_dict(), "method": method, "options": {}, "seed": seed, "site": "local"}
    return Trials(f"{method}-{seed}", settings, lines, begun)


def picture_of(page: str) -> None:
    """Take the picture of a report's first screens, if there is a browser."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        file.write_text(page, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 1180, "height": 1280})
        opened.goto(file.as_uri())
        opened.wait_for_function("document.documentElement.dataset.drawn", timeout=120_000)
        opened.screenshot(path=IMAGES / "report.png")
        browser.close()


def main() -> None:
    """Search, and draw."""
    with threadpool_limits(1):
        searches = [searched(method, seed) for method in ("ambs", "random") for seed in range(3)]
    for kind in ("progress", "importance"):
        (IMAGES / f"{kind}.svg").write_bytes(draw(figure(searches[0], kind), ".svg"))
    (IMAGES / "compare.svg").write_bytes(draw(comparison_figure(compare_searches(searches)), ".svg"))
    picture_of(html(searches[0], time.time()))


if __name__ == "__main__":
    main()
