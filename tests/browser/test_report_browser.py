"""The report in headless Chromium: it opens without an error; sorting, filtering, picking by mouse and keyboard."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from made_searches import made_search, odd_search

from deephyper_balsam.results.analysis.report import html

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE_MS = 60_000
NOTHING = "\N{EN DASH}"

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the path (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed (playwright)")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "small report.html"
    path.write_text(html(made_search(90), 0.0), encoding="utf-8")
    return path


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open a file, wait until all is drawn, and hold at the end that nothing was said in the console or asked for."""
    opened = []

    def opening(path: Path, width: int = 1400, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith("file:") else said.append(request.url))
        opened.append((page, said))
        page.goto(path.as_uri())
        page.wait_for_function("document.documentElement.dataset.drawn", timeout=PATIENCE_MS)
        return page

    yield opening
    for page, said in opened:
        page.close()
        assert [one for one in said if not one.startswith("data:")] == []


def count(page: Any) -> int:
    """How many trials the table says it shows."""
    return int(re.sub(r".* of ([\d,]+) trials", r"\1", page.text_content("#count")).replace(",", ""))


def picked(page: Any) -> tuple[int, int]:
    """How many trials are picked in the parallel coordinates, of how many."""
    numbers = re.findall(r"[\d,]+", page.text_content("#picked"))
    return int(numbers[0].replace(",", "")), int(numbers[-1].replace(",", ""))


def cells(page: Any, column: str) -> list[str]:
    """The cells of a column on the page of the table that is shown."""
    heads = page.locator("#table thead th").all_text_contents()
    rows = page.locator("#table tbody tr").all()
    return [row.locator("td").nth(heads.index(column)).text_content() for row in rows]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_it_opens_without_an_error_and_fits_the_window(open_page: Open, small: Path, width: int, scheme: str) -> None:
    page = open_page(small, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for chart in page.locator("[data-chart]").all():
        box = chart.locator("svg, canvas").first.bounding_box()
        assert box["width"] > 100
        assert box["height"] > 60
    ink = page.evaluate("getComputedStyle(document.body).color")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
    title = page.locator("[data-chart] .role-title text").first
    assert page.evaluate("element => getComputedStyle(element).fill", title.element_handle()) == ink


def test_a_search_of_ten_thousand_trials_opens_and_is_picked_from(open_page: Open, tmp_path: Path) -> None:
    path = tmp_path / "big.html"
    path.write_text(html(made_search(10_000, workers=256), 0.0), encoding="utf-8")
    page = open_page(path)
    assert picked(page) == (10_000, 10_000)
    page.get_by_role("slider", name="learning_rate, highest").focus()
    page.keyboard.press("PageDown")
    page.wait_for_function("document.getElementById('picked').textContent.includes('picked')")
    assert 0 < picked(page)[0] < 10_000
    assert count(page) == picked(page)[0]


def test_a_heading_sorts_by_mouse_and_by_keyboard_and_empty_cells_stand_last(open_page: Open, small: Path) -> None:
    page = open_page(small)
    assert cells(page, "objective") == sorted(cells(page, "objective"), reverse=True)
    page.get_by_role("button", name="learning_rate", exact=True).click()
    shown = [float(cell) for cell in cells(page, "learning_rate")]
    assert shown == sorted(shown, reverse=True)
    assert page.locator("#table th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")
    shown = [float(cell) for cell in cells(page, "learning_rate")]
    assert shown == sorted(shown)
    page.get_by_role("button", name="momentum", exact=True).press("Enter")
    page.fill("#filter", "optimizer=adam")
    assert set(cells(page, "momentum")) == {NOTHING}
    page.fill("#filter", "")
    while page.get_by_role("button", name="Next").is_enabled():
        page.get_by_role("button", name="Next").click()
    assert cells(page, "momentum")[-1] == NOTHING


def test_the_filter_takes_words_and_conditions(open_page: Open, small: Path) -> None:
    made = made_search(90)
    page = open_page(small)
    assert count(page) == 92
    page.fill("#filter", "status=FAILED")
    assert count(page) == len(made.failed)
    page.fill("#filter", "learning_rate<0.001 gelu")
    lines = [line for line in made.lines if line["p:learning_rate"] < 0.001 and line["p:activation"] == "gelu"]
    assert count(page) == len(lines)
    page.fill("#filter", "momentum>=0.9")
    assert count(page) == len([line for line in made.lines if line.get("p:momentum", 0) >= 0.9])
    page.fill("#filter", "nowhere")
    assert page.text_content("#count") == "No trial holds all of that."


def test_trials_are_picked_with_the_keyboard_and_the_table_follows(open_page: Open, small: Path) -> None:
    made = made_search(90)
    page = open_page(small)
    assert picked(page) == (90, 90)
    end = page.get_by_role("slider", name="activation, lowest")
    end.focus()
    page.keyboard.press("ArrowUp")
    assert end.get_attribute("aria-valuetext") == "tanh"
    expected = [line for line in made.ended if line["p:activation"] != "relu"]
    page.wait_for_function(f"document.getElementById('picked').textContent.startsWith('{len(expected)} of')")
    assert count(page) == len(expected)
    page.get_by_role("slider", name="objective, lowest").focus()
    page.keyboard.press("ArrowUp")  # out of the place of those that failed
    done = [line for line in expected if line["objective"] is not None]
    page.wait_for_function(f"document.getElementById('picked').textContent.startsWith('{len(done)} of')")
    page.keyboard.press("Escape")
    page.wait_for_function(f"document.getElementById('picked').textContent.startsWith('{len(expected)} of')")
    page.get_by_role("button", name="Free all axes").press("Enter")
    page.wait_for_function("document.getElementById('picked').textContent === '90 trials'")
    assert count(page) == 92


def test_trials_are_picked_with_the_mouse_moved_and_freed(open_page: Open, small: Path) -> None:
    page = open_page(small)
    axis = page.locator("#parallel-plot .reach").nth(0)
    axis.scroll_into_view_if_needed()
    box = axis.bounding_box()
    x = box["x"] + box["width"] / 2

    def drag(start: float, end: float) -> None:
        page.mouse.move(x, box["y"] + start * box["height"])
        page.mouse.down()
        page.mouse.move(x, box["y"] + (start + end) / 2 * box["height"])
        page.mouse.move(x, box["y"] + end * box["height"])
        page.mouse.up()

    low, high = (page.get_by_role("slider", name=f"learning_rate, {side}") for side in ("lowest", "highest"))
    drag(0.3, 0.6)
    page.wait_for_function("document.getElementById('picked').textContent.includes('picked')")
    reach = [float(end.get_attribute("aria-valuetext")) for end in (low, high)]
    expected = [line for line in made_search(90).ended if reach[0] <= line["p:learning_rate"] <= reach[1]]
    assert 0 < len(expected) < 90
    assert abs(picked(page)[0] - len(expected)) <= 1  # the limits are said rounded
    assert count(page) == picked(page)[0]
    drag(0.45, 0.65)  # moves the whole
    moved = [float(end.get_attribute("aria-valuetext")) for end in (low, high)]
    assert moved[0] < reach[0]
    assert moved[1] < reach[1]
    assert moved[1] / moved[0] == pytest.approx(reach[1] / reach[0], rel=0.05)
    page.mouse.dblclick(x, box["y"] + 0.1 * box["height"])
    page.wait_for_function("document.getElementById('picked').textContent === '90 trials'")


def test_a_trials_number_shows_all_of_it_and_escape_closes(open_page: Open, small: Path) -> None:
    page = open_page(small)
    page.fill("#filter", "status=FAILED")
    page.locator("#table tbody button").first.press("Enter")
    dialog = page.get_by_role("dialog")
    assert "ValueError: <loss> is nan & gone" in dialog.text_content()
    assert "Traceback" in dialog.text_content()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_colours_follow_the_scheme_and_the_print_is_light(open_page: Open, small: Path) -> None:
    page = open_page(small, scheme="dark")
    fill = "element => getComputedStyle(element).fill"
    label = page.locator("[data-chart] .role-axis-label text").first.element_handle()
    dark = page.evaluate(fill, label)
    page.emulate_media(color_scheme="light")
    page.wait_for_function("([element, dark]) => getComputedStyle(element).fill !== dark", arg=[label, dark])
    light = page.evaluate(fill, page.locator("[data-chart] .role-axis-label text").first.element_handle())
    page.emulate_media(color_scheme="dark", media="print")
    page.wait_for_function(
        "light => getComputedStyle(document.querySelector('[data-chart] .role-axis-label text')).fill === light",
        arg=light,
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_names_that_every_javascript_object_has_are_drawn_and_copied(open_page: Open, tmp_path: Path) -> None:
    path = tmp_path / "odd.html"
    path.write_text(html(odd_search(), 0.0), encoding="utf-8")
    page = open_page(path)
    assert page.locator("[data-chart] > svg, [data-chart] svg.marks").count() == page.locator("[data-chart]").count()
    page.locator("#table tbody button").first.press("Enter")
    assert "__proto__" in page.get_by_role("button", name="Copy configuration as JSON").evaluate(
        "button => button.dataset.text"
    )


@pytest.mark.parametrize("width", [1400, 400])
def test_no_word_of_the_dialog_is_broken(open_page: Open, small: Path, width: int) -> None:
    page = open_page(small, width)
    page.locator("#table tbody button").first.press("Enter")
    broken = page.evaluate(
        """[...document.querySelectorAll('#trial dt')].filter((e) => {
          const range = document.createRange();
          range.selectNodeContents(e);
          return range.getClientRects().length > 1;
        }).map((e) => e.textContent)"""
    )
    assert broken == []


def test_everything_that_can_be_used_has_a_name(open_page: Open, small: Path) -> None:
    page = open_page(small)
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, [role=slider], [role=img], [role=region], a[href]')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length)))
        .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
