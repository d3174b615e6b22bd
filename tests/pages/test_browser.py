"""The pages in a real browser: no errors, no requests, a slider that moves the picture, phones, the dark, no script."""

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from example_runs import run_folder, write_evaluation

from lowvram import pages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.executable() is None, reason="no Chromium on PATH"),
]
_VISIBLE = "[...document.querySelectorAll('.frame')].filter(f => f.getClientRects().length).map(f => f.dataset.said)"
_WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    with chromium.started(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_folder(tmp_path_factory.mktemp("runs") / "a-name-that-is-longer-than-a-phone-is-wide-by-far-and-more")
    write_evaluation(folder, 500, frechet_efficientnet_lite0=123.4)
    return pages.write(folder)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    return pages.compare([run_folder(folder / "a"), run_folder(folder / "b", "batch=32")], folder / "c.html")


def test_it_opens_without_errors_and_asks_for_nothing(browser: chromium.Browser, page: Path, comparison: Path) -> None:
    for path in (page, comparison):
        for settings in ({}, {"dark": True}, {"script": False}, {"width": 360}):
            browser.open(path, **settings)
            assert browser.messages == [], settings
            assert all(url.startswith(("file:", "data:")) for url in browser.requests)
            assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_the_checks_see_errors(browser: chromium.Browser, page: Path, tmp_path: Path) -> None:
    source = page.read_text().replace('"use strict";', '"use strict"; nothing();')
    (tmp_path / "broken.html").write_text(source.replace("<main>", '<main><img src="https://example.invalid/x.png">'))
    browser.open(tmp_path / "broken.html")
    said = " ".join(browser.messages)
    assert "Content Security Policy" in said  # of the script, whose hash is another, and of the picture
    assert browser.ask(f"{_VISIBLE}.length") == 3


def test_the_slider_moves_the_picture(browser: chromium.Browser, page: Path) -> None:
    browser.open(page)
    assert browser.ask(_VISIBLE) == ["16 kimg"]
    for value, said in ((0, "0 kimg"), (1, "8 kimg"), (2, "16 kimg")):
        move = f"(s => {{ s.value = {value}; s.dispatchEvent(new Event('input')) }})(document.querySelector('#when'))"
        browser.ask(move)
        assert browser.ask(_VISIBLE) == [said]
        assert browser.ask("document.querySelector('#said').textContent") == said
    browser.ask("document.querySelector('#when').focus()")
    for kind in ("rawKeyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="Home", code="Home", windowsVirtualKeyCode=36)
    assert browser.ask(_VISIBLE) == ["0 kimg"]


def test_without_script_all_is_there(browser: chromium.Browser, page: Path, comparison: Path) -> None:
    browser.open(page, script=False)
    assert browser.ask(_VISIBLE) == ["0 kimg", "8 kimg", "16 kimg"]
    assert browser.ask("document.querySelector('.player').getClientRects().length") == 0
    browser.open(comparison, script=False)
    shown = "['images', 'hours', 'energy'].filter(o => document.querySelector('.over-' + o).getClientRects().length)"
    assert browser.ask(shown) == ["images"]
    browser.ask("document.querySelector('#by-hours').scrollIntoView({behavior: 'instant'})")
    box = browser.ask("document.querySelector('#by-hours').getBoundingClientRect().toJSON()")
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=box["x"] + 5, y=box["y"] + 5, button="left", clickCount=1)
    assert browser.ask(shown) == ["hours"]


@pytest.mark.parametrize("script", [True, False])
def test_a_phone_scrolls_one_way(browser: chromium.Browser, page: Path, comparison: Path, script: bool) -> None:
    for path in (page, comparison):
        for width in (320, 360, 768):
            browser.open(path, width=width, script=script)
            browser.ask("document.querySelectorAll('details').forEach(d => { d.open = true })")
            assert browser.ask(_WIDER) <= 0, (path.name, width)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(browser: chromium.Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    low = browser.ask(
        """(() => {
          const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
          const light = colour => { const [r, g, b] = numbers(colour).map(v => v / 255).map(
            v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
          const ground = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor; if (numbers(c)[3] !== 0) return c } };
          const found = [];
          for (const e of document.querySelectorAll('body *')) {
            const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
            if (!own || e.closest('script')) continue;
            const style = getComputedStyle(e), ink = e.namespaceURI.endsWith('svg') ? style.fill : style.color;
            const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
            if ((a + .05) / (b + .05) < 4.5) found.push([e.tagName, e.textContent, ink, ground(e)]);
          }
          return found })()"""
    )
    assert low == []
