"""The page in a real browser: votes by key and click, a reload in the middle, votes saved and sent."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from bench.study.files import key_path, picture_path, read_key
from bench.study.server import make_app
from bench.study.votes import read_votes
from tests.bench.study.conftest import PROMPTS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page, errors = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.context.close()
    assert not errors


def vote(page, press) -> None:
    """Once both pictures can be seen, and a look that no double tap takes."""
    page.wait_for_selector("#pair:not(.waiting)")
    before = page.inner_text("#place")
    page.wait_for_timeout(260)
    press()
    page.wait_for_function("before => document.getElementById('place').innerText !== before", arg=before)


def shown(page) -> list[str]:
    page.wait_for_selector("#pair:not(.waiting)")
    return [page.get_attribute(f"#{side} img", "src") for side in ("first", "second")]


def test_a_rater_votes_reloads_and_saves(page, study: Path, tmp_path: Path) -> None:
    page.goto((study / "index.html").as_uri())
    assert page.inner_text("#count") == "6"
    page.click("#begin")
    seen = []
    for press in (
        lambda: page.keyboard.press("ArrowLeft"),
        lambda: page.keyboard.press("Space"),
        lambda: page.tap("#second"),
    ):
        seen.append(shown(page))
        assert page.inner_text("#prompt") in PROMPTS["markup"] + PROMPTS["other"]  # markup stands there as text
        vote(page, press)
    seen.append(shown(page))
    page.reload()
    assert page.inner_text("#place") == "4 of 6" and shown(page) == seen[3]
    vote(page, lambda: page.keyboard.press("Backspace"))
    assert page.inner_text("#place") == "3 of 6" and shown(page) == seen[2]
    vote(page, lambda: page.keyboard.press("ArrowRight"))
    while page.is_visible("#pair"):
        seen.append(shown(page))
        vote(page, lambda: page.click("#tie"))
    with page.expect_download() as download:
        page.click("#save")
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    key = read_key(key_path(study))
    votes = read_votes([saved], key.study, {name: item for name, (item, _) in key.pictures().items()})
    assert [one.choice for one in votes] == ["first", "tie", "second", "tie", "tie", "tie"]
    assert [f"pictures/{one.first}.png" for one in votes[:3]] == [first for first, _ in seen[:3]]
    pairs = [frozenset((one.first, one.second)) for one in votes]
    assert sorted(map(len, pairs)) == [1, 2, 2, 2, 2, 2] and len(set(pairs)) == 5  # one beside itself, one came again


@contextmanager
def served(study: Path, votes: Path) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    loop, runner = asyncio.new_event_loop(), web.AppRunner(make_app(study, votes))
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def wait(work) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(20)

    wait(runner.setup())
    wait(web.TCPSite(runner, "127.0.0.1", 0).start())
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        wait(runner.cleanup())
        loop.call_soon_threadsafe(loop.stop)


def test_votes_are_sent_and_a_missing_picture_loses_none(page, study: Path, tmp_path: Path) -> None:
    key, votes = read_key(key_path(study)), tmp_path / "votes.jsonl"
    with served(study, votes) as address:
        for model in (0, 1):
            picture_path(study, key.picture(1, model)).unlink()
        page.goto(address)
        page.click("#begin")
        while page.is_visible("#pair"):
            page.wait_for_selector("#pair:not(.waiting), #message button")
            if page.is_visible("#message button"):
                page.click("#message button")
            else:
                vote(page, lambda: page.keyboard.press("ArrowUp"))
        page.wait_for_selector("text=All 6 votes have arrived")
    lines = [json.loads(line) for line in votes.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    at = key.pictures()
    assert all((line["choice"] == "missing") == (at[line["first"]][0] == 1) for line in lines)
    assert {line["choice"] for line in lines} == {"first", "missing"}
