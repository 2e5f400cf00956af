"""The comparison's page in a real browser: what a person who opens it sees and does."""

import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pipelines.compare import compare
from pipelines.config import Config
from pipelines.page import render
from pipelines.plots import COLOURS
from pipelines.study import Arm, Study
from pipelines.table import tabulate

BEYOND = """all => all.filter(e => !e.closest(".wide, pre, svg"))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
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
    assert opened.eval_on_selector_all("body *", BEYOND) == []
    assert opened.eval_on_selector("figure svg text", "e => getComputedStyle(e).fill") == opened.eval_on_selector(
        "body", "e => getComputedStyle(e).color"
    )


def test_the_page_asks_for_nothing_and_complains_of_nothing(opened, said):
    opened.wait_for_function("[...document.querySelectorAll('video')].every(v => v.readyState >= 2)", timeout=30_000)
    opened.get_by_role("button", name="motion score").click()
    assert [each for each in said if not each.startswith("request: data:")] == []


LONG = "row-" + 60 * "of-a-name-without-end-" + "0"
HOSTILE = [
    LONG,
    "<script>alert(1)</script>",
    '"><img src=http://example.org/x onerror=alert(1)>',
    "$title ${table} & $1",
]
PARAMETERS = {"<b>p</b>": 300 * "v", "url": "http://example.org/</script><script>alert(1)</script>"}


@pytest.fixture(scope="module")
def crowded(studied: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Thirty rows of strangers with thirty metrics, and names that mean no good."""
    arms = {}
    for number, name in enumerate([*HOSTILE, *(f"row {i}" for i in range(26))]):
        arm = Arm(name, is_real=name == "real")
        for seed in range(2):
            metrics = {f"metric {i} {'m' * 3 * i}": 10.0 * i + number + seed for i in range(28)}
            metrics |= {"motion": 0.1 + 0.01 * number + 0.001 * seed, "fvd": 300 - number + seed}
            told = {"seed": str(seed), "number": str(number)} | ({} if number else PARAMETERS)
            data = SimpleNamespace(metrics=metrics, params=told, tags={"cil.videos": f"{studied.out}/videos/naive-11"})
            arm.runs[seed] = SimpleNamespace(data=data, info=SimpleNamespace(run_id="none", experiment_id="0"))
            arm.videos[seed] = [{"clip_id": str(i), "motion": 0.01 * number + 0.1 * i} for i in range(4)]
        arms[name] = arm
    of = Study("<script>alert(2)</script> \u202e of strangers", arms, [f"{name}: is there" for name in HOSTILE])
    path = tmp_path_factory.mktemp("crowded") / "index.html"
    path.write_text(render(studied, of, tabulate(of), []))
    return f"file://{path}"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_crowded_page_of_hostile_names_holds_still_and_says_what_it_leaves_out(browser, crowded, said, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark")
    page.on("console", lambda message: said.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: said.append(f"request: {request.url[:40]}") if request.url != crowded else None)
    page.goto(crowded)
    names = page.locator(".figures tbody th").all_inner_texts()
    assert names[: len(HOSTILE)] == HOSTILE
    assert page.locator(".figures thead th").count() == 2 + 30
    page.wait_for_function(
        "[...document.querySelectorAll('video')].every(v => v.currentTime > 0 && !v.error)", timeout=60_000
    )
    assert page.locator("video").count() == 3 * 30
    page.get_by_role("button", name="FVD").click()
    assert page.locator(".figures tbody th").all_inner_texts() == names[::-1]
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.eval_on_selector_all("body *", BEYOND) == []
    wide = "all => all.filter(e => e.getBoundingClientRect().width > 400).map(e => e.textContent.slice(0, 40))"
    assert page.eval_on_selector_all("th:first-child", wide) == []  # figures beside it can be seen
    outside = """all => all.flatMap(svg => [...svg.querySelectorAll("text")].filter(text => {
        const [a, b] = [svg.getBoundingClientRect(), text.getBoundingClientRect()];
        return b.left < a.left - 2 || b.right > a.right + 2 || b.bottom > a.bottom + 2 || b.top < a.top - 2;
    }).map(text => text.textContent))"""
    assert page.eval_on_selector_all("figure svg", outside) == []
    assert [each for each in said if not each.startswith("request: data:")] == []
    page.close()
