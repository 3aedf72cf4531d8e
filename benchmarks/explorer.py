"""Size of a page with many explored images, and how fast a browser opens it and goes on.

python -m benchmarks.explorer   # needs the test extra and Chromium
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import auto_cli
from playwright.sync_api import sync_playwright

from explainers.evaluation.explorer import Case, explorer
from explainers.evaluation.report import html_page
from explainers.views import smooth


def cases(images: int, size: int, smoothing: float) -> list[Case]:
    """Images of noise, half of each a mask, each with two maps."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(size).expand(size, size) < size // 2
    found = []
    for k in range(images):
        maps = smooth(torch.rand(2, size, size, generator=generator), smoothing)
        image = torch.rand(1, size, size, generator=generator).expand(3, -1, -1)
        named = dict(zip(("one", "two"), maps, strict=True))
        found.append(Case(f"image {k}", {"label": str(k % 2)}, image, mask, named))
    return found


def main(images: int = 500, size: int = 224, smoothing: float = 0.05) -> None:
    """Print megabytes, and seconds to write, to open, to the next image and to move a threshold.

    Args:
        images: On the page.
        size: Of the images, pixels.
        smoothing: Of the maps of noise; 0 is what deflates worst.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        path, start = Path(folder) / "page.html", time.perf_counter()
        path.write_text(
            html_page("Explorer", {}, {}, {}, None, explorer(cases(images, size, smoothing)))
        )
        print(
            f"{path.stat().st_size / 2**20:.0f} MB, written in {time.perf_counter() - start:.1f} s"
        )
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page, start = chromium.new_page(), time.perf_counter()
        page.goto(path.as_uri())
        page.locator("#x-facts:not(:empty)").wait_for()
        print(f"opened in {time.perf_counter() - start:.2f} s")
        page.locator("#explorer canvas").first.click()
        for k in range(1, 4):
            start = time.perf_counter()
            page.keyboard.press("ArrowRight")
            page.locator("#x-facts", has_text=f"image {k} ").wait_for()
            print(f"next image in {time.perf_counter() - start:.2f} s")
        start = time.perf_counter()
        for _ in range(10):
            page.keyboard.press("ArrowDown")
        page.locator("#x-shown", has_text="90 %").wait_for()
        print(f"ten steps of the threshold in {time.perf_counter() - start:.2f} s")
        chromium.close()


if __name__ == "__main__":
    auto_cli(main)
