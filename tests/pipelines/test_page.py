"""The comparison's page in a real browser: what a person who opens it sees and does."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pipelines.compare import compare
from pipelines.config import Config
from pipelines.plots import COLOURS

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def address(studied: Config) -> str:
    return f"file://{compare(studied).uri}/index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI is root
        yield launched
        launched.close()


@pytest.fixture
def said() -> list[str]:
    """Everything that the page complains about, or asks of a network."""
    return []


@pytest.fixture
def opened(browser: Browser, address: str, said: list[str]) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda message: said.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: said.append(f"request: {request.url[:80]}") if request.url != address else None)
    page.goto(address)
    yield page
    page.close()


def column(page: Page, number: int) -> list[str]:
    return page.locator(f".figures tbody tr td:nth-child({number})").all_inner_texts()


def numbers(texts: list[str]) -> list[float]:
    return [float(text.split()[0]) for text in texts]


def paused(page: Page) -> list[bool]:
    return page.eval_on_selector_all("video", "all => all.map(video => video.paused)")


def test_all_clips_play_and_pause_together(opened):
    count = opened.locator("video").count()
    assert count == 3 * 9
    moving = (
        "[...document.querySelectorAll('video')].every(v => v.currentTime > 0.1 && v.videoWidth === 48 && !v.error)"
    )
    opened.wait_for_function(moving, timeout=30_000)
    opened.get_by_role("button", name="Pause all").click()
    assert paused(opened) == [True] * count
    opened.get_by_role("button", name="Play all").press("Enter")
    opened.wait_for_function("[...document.querySelectorAll('video')].every(v => !v.paused)")
    before = opened.eval_on_selector("video", "video => video.currentTime")
    opened.wait_for_function(f"document.querySelector('video').currentTime !== {before}")


def test_somebody_who_wants_less_motion_presses_play_first(browser, address):
    page = browser.new_page(reduced_motion="reduce")
    page.goto(address)
    assert all(paused(page))
    page.get_by_role("button", name="Play all").click()
    page.wait_for_function("document.querySelector('video').currentTime > 0")
    page.close()


def test_the_table_is_sorted_by_numbers_and_back_by_mouse_and_by_keyboard(opened):
    asis = column(opened, 6)
    frechet = opened.get_by_role("button", name="Frechet distance")
    frechet.click()
    found = numbers(column(opened, 6))
    assert found == sorted(numbers(asis))
    assert opened.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    frechet.focus()
    opened.keyboard.press("Enter")
    assert numbers(column(opened, 6)) == sorted(numbers(asis), reverse=True)
    opened.keyboard.press("Space")
    assert column(opened, 6) == asis
    assert opened.locator("th[aria-sort]").count() == 0


def test_numbers_are_not_sorted_as_words_and_holes_come_last(opened):
    opened.evaluate(
        """() => [...document.querySelector(".figures").tBodies[0].rows].forEach((row, i) => {
            row.cells[3].dataset.value = ["10", "9", "", "-1", "100", "1e-3", "2", "", "30"][i];
            row.cells[3].textContent = row.cells[3].dataset.value || "-"; })"""
    )
    error = opened.get_by_role("button", name="motion error")
    error.click()
    assert column(opened, 4) == ["-1", "1e-3", "2", "9", "10", "30", "100", "-", "-"]
    error.click()
    assert column(opened, 4) == ["100", "30", "10", "9", "2", "1e-3", "-1", "-", "-"]


def test_every_plot_has_something_drawn_in_it(opened):
    found = opened.eval_on_selector_all(
        "figure svg",
        """(all, colours) => all.map(svg => [...svg.querySelectorAll("path")].filter(path =>
            colours.some(c => (path.getAttribute("style") || "").includes("stroke: " + c)) &&
            path.getBoundingClientRect().width + path.getBoundingClientRect().height > 40).length)""",
        list(COLOURS),
    )
    rows, curves = 7, [2, 2, 1, 1]  # intervals of rows with several seeds; lines
    assert len(found) == 2 + 4 + 3
    assert all(count >= least for count, least in zip(found, [rows, rows, *curves, 8, 8, 3], strict=True)), found
    sizes = opened.eval_on_selector_all("figure svg", "all => all.map(svg => svg.getBoundingClientRect().height)")
    assert min(sizes) > 150


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_everything_can_be_reached(opened, width, scheme):
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)
    for fold in opened.locator("details:not([open]) > summary").all():
        fold.click()
    assert opened.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    beyond = """all => all.filter(e => !e.closest(".wide, pre, svg"))
        .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    assert opened.eval_on_selector_all("body *", beyond) == []
    assert opened.eval_on_selector("figure svg text", "e => getComputedStyle(e).fill") == opened.eval_on_selector(
        "body", "e => getComputedStyle(e).color"
    )


def test_the_page_asks_for_nothing_and_complains_of_nothing(opened, said):
    opened.wait_for_function("[...document.querySelectorAll('video')].every(v => v.readyState >= 2)", timeout=30_000)
    opened.get_by_role("button", name="motion score").click()
    assert [each for each in said if not each.startswith("request: data:")] == []
