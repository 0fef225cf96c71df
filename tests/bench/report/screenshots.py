"""`python -m tests.bench.report.screenshots REPORT OUT`: the README's pictures of a report, and the page as it is looked at.

REPORT is a folder of `bench report`, OUT gets the README's pictures, at most 150 KB each; with `--all` also the whole page
on a desktop and a phone, light and dark, without JavaScript. Needs `chromium` on the PATH.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MOST_BYTES = 150_000
SIZES = {"desktop": (1180, 900), "phone": (390, 844)}
SHOWN = {"page": None, "side-by-side": "#pictures .masonry", "quality-latency": "#quality-latency"}


def open_page(browser: Browser, report: Path, size: str, scheme: str) -> Page:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, java_script_enabled=False
    )
    page = context.new_page()
    page.goto((report / "index.html").absolute().as_uri())
    return page


def save_small(png: bytes, path: Path) -> None:
    """As a PNG of few enough colours."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (256, 128, 64, 32):
        image.quantize(colours).save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            return
    raise SystemExit(f"{path} is {path.stat().st_size} bytes even in 32 colours")


def main(report: Path, out: Path, whole: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = open_page(browser, report, "desktop", "light")
        for name, selector in SHOWN.items():
            png = page.locator(selector).screenshot() if selector else page.screenshot()
            save_small(png, out / f"{name}.png")
        for size in SIZES if whole else ():
            for scheme in ("light", "dark"):
                open_page(browser, report, size, scheme).screenshot(path=out / f"{size}-{scheme}.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--all" in sys.argv)
