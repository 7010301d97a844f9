"""The page in a real browser: Debian's Chromium, driven by Playwright. Skipped by name where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from htc_vlm.serve.app import PAGE, policy_of

from .conftest import QUESTION, Server, eventually, listening, png, scene

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_takes_nothing_from_other_hosts() -> None:
    """No CDN, no font, no build step; its policy names its own script and style by hash, and nothing inline besides."""
    text = PAGE.read_text(encoding="utf-8")
    assert "https://" not in text and text.count("http://") == text.count("http://www.w3.org/2000/svg") == 1
    for attribute in (" src=", " onclick=", " style=", "@import", "url("):
        assert attribute not in text.split("<script>")[0].replace("<link rel=\"icon\"", ""), attribute
    policy = policy_of(text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(Server()) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as engine:
        one = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A page that must stay silent: `page.complaints` are errors of its console and requests to other hosts."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    one = context.new_page()
    one.complaints = []
    one.on("console", lambda message: message.type in ("error", "warning") and one.complaints.append(message.text))
    one.on("pageerror", lambda error: one.complaints.append(str(error)))
    one.on("request", lambda request: request.url.startswith((address, "blob:", "data:")) or one.complaints.append(request.url))
    one.goto(address)
    yield one
    context.close()


def give_files(page: Any, folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / f"scene-{number}.png").write_bytes(png(number))
    page.set_input_files("#files", [str(folder / f"scene-{number}.png") for number in numbers])
    for number in numbers:
        page.get_by_text(f"scene-{number}.png", exact=True).wait_for()


def has_ended(times: list[str]) -> bool:
    return bool(times) and all(time.endswith(" ms") for time in times)


def answers(page: Any) -> list[str]:
    """The newest answer of each card, once all have ended. (`wait_for_function` needs an eval that the policy forbids.)"""
    eventually(lambda: has_ended(page.locator("dd small").all_text_contents()))
    return page.locator(".card").evaluate_all("cards => cards.map(card => card.querySelector('dd span').textContent)")


@pytest.mark.slow
def test_pictures_are_added_asked_and_answered(page: Any, tmp_path: Path, answerer: Any) -> None:
    """Two pictures, one question to both, one to the second alone, by keyboard. 6,144 bytes and a map of 6 x 6 each."""
    give_files(page, tmp_path, 0, 1)
    page.fill("#question", QUESTION)
    page.keyboard.press("Enter")
    right = [answerer.answer(str(i), lambda i=i: scene(i), [QUESTION], 16)[0] for i in (0, 1)]
    assert answers(page) == right
    card = page.locator(".card").nth(1)
    assert "1 token, 6,180 bytes kept" in card.inner_text() and " ms" in card.inner_text()
    card.get_by_role("button", name="Only this").focus()
    page.keyboard.press("Space")
    page.keyboard.type("what pattern is the background ?")
    page.keyboard.press("Enter")
    page.locator("dd").nth(2).wait_for()
    answers(page)
    assert page.locator(".card").nth(0).locator("dd").count() == 1
    assert page.locator(".card").nth(1).locator("dd").count() == 2
    assert page.complaints == []


@pytest.mark.slow
def test_a_dropped_file_is_added(page: Any) -> None:
    page.evaluate("""async data => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(data)], "dropped.png", {type: "image/png"}));
        dispatchEvent(new DragEvent("drop", {dataTransfer: files.dataTransfer || files, cancelable: true}));
    }""", list(png(2)))  # fmt: skip
    page.get_by_text("dropped.png", exact=True).wait_for()
    assert page.locator(".card img").count() == 1
    assert page.complaints == []


@pytest.mark.slow
def test_a_broken_picture_says_why(page: Any, tmp_path: Path) -> None:
    """Beside good ones, which are added all the same. Chromium logs the refused request itself."""
    (tmp_path / "broken.png").write_bytes(png(0)[:300])
    (tmp_path / "fine.png").write_bytes(png(3))
    page.set_input_files("#files", [str(tmp_path / "broken.png"), str(tmp_path / "fine.png")])
    page.get_by_text("fine.png", exact=True).wait_for()
    assert "broken.png" in page.inner_text("#errors") and "damaged" in page.inner_text("#errors")
    page.get_by_role("button", name="Dismiss").click()
    assert page.inner_text("#errors") == ""
    assert all("400 (Bad Request)" in line for line in page.complaints) and len(page.complaints) == 1


@pytest.mark.slow
def test_a_picture_of_the_store_is_asked_without_its_pixels(page: Any, tmp_path: Path, answerer: Any) -> None:
    give_files(page, tmp_path, 5)
    page.reload()
    page.get_by_text("Pictures of the store").click()
    page.get_by_role("button", name="scene-5.png").click()
    page.get_by_text("is not kept").wait_for()
    page.fill("#question", QUESTION)
    page.get_by_role("button", name="Ask all").click()
    assert answers(page) == [answerer.answer("5", lambda: scene(5), [QUESTION], 16)[0]]
    assert page.complaints == []


@pytest.mark.slow
def test_the_page_fits_a_phone(page: Any, tmp_path: Path) -> None:
    """Nothing is wider than 360 pixels, and fingers find the buttons."""
    page.set_viewport_size({"width": 360, "height": 640})
    give_files(page, tmp_path, 6, 7)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert min(box["height"] for box in (one.bounding_box() for one in page.locator("button:visible").all())) >= 44
