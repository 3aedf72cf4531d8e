"""The explorer: what it packs, and, in a browser, that its scores are the metrics'."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from playwright.sync_api import Page, expect
from torch import Tensor

from explainers.evaluation.explorer import Case, content_of, explorer, filters, pack
from explainers.evaluation.explorer import scores_of as scores_by_method
from explainers.evaluation.metrics import (
    binary_coverage,
    min_max,
    overlap,
    percentile_curve,
    percentile_iou,
    region_min_max,
    set_range,
    set_wide,
    tiles,
)
from explainers.evaluation.report import gallery_of, html_page

HEIGHT, WIDTH, TILE = 20, 28, 8
HOSTILE = "</script><script>alert(1)</script><b>"


def a_map(seed: int, scale: float) -> Tensor:
    """Values over many orders of magnitude, as maps have."""
    noise = torch.randn(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    return scale * (4 * noise).exp()


def a_mask(seed: int) -> Tensor:
    """Values near 0 or 1, as of a mask that was optimised."""
    noise = torch.randn(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (8 * noise).sigmoid()


def case(k: int) -> Case:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[4 : 10 + k, 6:20] = True
    generator = torch.Generator().manual_seed(k)
    image = torch.rand(3, HEIGHT, WIDTH, generator=generator)
    return Case(
        f"scan {k}" if k else HOSTILE,
        {"label": "ill" if k else HOSTILE, "age": str(40 + k), "p(ill)": str(k // 2)},
        image,
        None if k == 3 else mask,
        {"Single": a_map(k, 1 + k), "Mask": a_mask(k)},
        {"Single": (image, 1 - image)},
        {"Single": {"average_precision": [0.2, 0.9, 0.5][k]} if k < 3 else {}, "Mask": {}},
    )


CASES = [case(k) for k in range(4)]


def test_a_case_is_packed_without_loss() -> None:
    held = json.loads(zlib.decompress(base64.b64decode(pack(CASES[1]))))
    assert (held["height"], held["width"]) == (HEIGHT, WIDTH)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(held["mask"]), np.uint8))
    assert (bits[: HEIGHT * WIDTH].reshape(HEIGHT, WIDTH) == np.asarray(CASES[1].mask)).all()
    values = np.frombuffer(base64.b64decode(held["maps"][0]), "<f4").reshape(HEIGHT, WIDTH)
    assert (values == CASES[1].maps["Single"].numpy()).all()
    assert [pair is None for pair in held["generated"]] == [False, True]


def test_unknown_values_are_the_lowest() -> None:
    saliency = torch.tensor([[torch.nan, -1.0], [1.0, 0.0]])
    image = torch.zeros(3, 2, 2)
    [held] = content_of(Case("a", {}, image, None, {"map": saliency}))["maps"]
    assert np.frombuffer(base64.b64decode(held), "<f4").tolist() == [-1, -1, 1, 0]


def test_facts_with_few_values_may_be_filtered_by() -> None:
    assert filters(CASES) == {"label": [HOSTILE, "ill"]}
    assert filters(CASES[:2]) == {}
    assert explorer([]) == ""


def test_scores_in_the_form_that_is_shown() -> None:
    rows = [
        ("Single", "views", "smoothed", "iou_95", 0.5),
        ("Single", "plain", "smoothed", "iou_95", 0.1),
        ("Single", "views", "raw", "iou_95", 0.2),
        ("Slow", "plain", "smoothed", "iou_95", float("nan")),
        ("Random map", "views", "smoothed", "iou_95", 0.3),
    ]
    columns = ["method", "views", "smoothing", "metric", "value"]
    forms = {"Single": "views", "Slow": "plain"}
    found = scores_by_method(pd.DataFrame(rows, columns=columns), forms)
    assert found == {"Single": {"iou_95": 0.5}, "Slow": {}}


@pytest.fixture
def opened(browser: Page, tmp_path: Path) -> Page:
    page = tmp_path / "report.html"
    gallery = gallery_of(CASES, 2)
    page.write_text(html_page("Maps", {}, {}, gallery, None, explorer(CASES)))
    browser.goto(page.as_uri())
    browser.wait_for_function("document.querySelector('#x-facts').textContent")
    return browser


def told(page: Page, panel: int = 0) -> dict[str, float]:
    """What the page says of the region of a panel."""
    parts = page.locator("#explorer figure > output").nth(panel).inner_text().split(", ")
    return {name: float(value) for name, value in (part.rsplit(" ", 1) for part in parts)}


def scan(page: Page, k: int) -> None:
    """Go to an image and wait for it."""
    page.select_option("#x-cases", str(k))
    name = CASES[k].name
    page.wait_for_function(
        "name => document.querySelector('#x-facts').textContent.startsWith(name)", arg=name
    )


def threshold(page: Page, value: float) -> None:
    page.locator("#x-threshold").fill(str(value))


def scored(kept: Tensor, k: int) -> dict[str, float]:
    """The metrics of a region."""
    mask = torch.as_tensor(CASES[k].mask)[None]
    coverage = {name: float(value) for name, value in binary_coverage(kept, mask).items()}
    jaccard = float(overlap(kept, mask).jaccard)
    return {"share of the image": float(kept.double().mean()), "Jaccard": jaccard, **coverage}


@pytest.mark.parametrize("k", [0, 2])
def test_its_scores_are_the_metrics(opened: Page, k: int) -> None:
    scan(opened, k)
    mask = torch.as_tensor(CASES[k].mask)[None]
    for panel, name in enumerate(CASES[k].maps):
        saliency = CASES[k].maps[name][None]
        bounds = set_range([one.maps[name][None] for one in CASES])
        scaled = {"own": min_max(saliency), "set": set_wide(saliency, bounds)}
        local = region_min_max(saliency, tiles(HEIGHT, WIDTH, TILE))
        for percent in (0.5, 50, 95):
            threshold(opened, percent)
            opened.select_option("#x-scale", "percentile")
            iou = float(percentile_iou(saliency, mask, percent))
            assert told(opened, panel)["Jaccard"] == pytest.approx(iou, abs=5.1e-4)
            for scale, one in scaled.items():
                opened.select_option("#x-scale", scale)
                expected = scored(one >= percent / 100, k)
                assert told(opened, panel) == pytest.approx(expected, abs=5.1e-4)
            opened.locator("#x-tile").fill(str(TILE))
            opened.check("#x-local")
            expected = scored(local >= percent / 100, k)
            assert told(opened, panel) == pytest.approx(expected, abs=5.1e-4)
            opened.uncheck("#x-local")


def test_percentiles_of_each_tile(opened: Page) -> None:
    scan(opened, 1)
    threshold(opened, 90)
    opened.locator("#x-tile").fill(str(TILE))
    opened.check("#x-local")
    kept = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    saliency, numbers = CASES[1].maps["Single"], tiles(HEIGHT, WIDTH, TILE)
    for number in numbers.unique():
        inside = numbers == number
        kept[0] |= inside & (saliency >= saliency[inside].quantile(0.9))
    assert told(opened) == pytest.approx(scored(kept, 1), abs=5.1e-4)


def test_keys_filters_and_order(opened: Page) -> None:
    facts = opened.locator("#x-facts")
    opened.locator("#explorer canvas").first.click()
    assert facts.inner_text().startswith(HOSTILE)  # shown as text, run as nothing
    before = told(opened)
    opened.keyboard.press("ArrowDown")
    assert opened.inner_text("#x-shown") == "94.5 %"
    assert told(opened)["share of the image"] > before["share of the image"]
    opened.keyboard.press("ArrowRight")
    opened.wait_for_function("document.querySelector('#x-facts').textContent.startsWith('scan 1')")
    for key, box in (("w", "whole"), ("o", "outline"), ("l", "local")):
        checked = opened.is_checked(f"#x-{box}")
        opened.keyboard.press(key)
        assert opened.is_checked(f"#x-{box}") != checked
    opened.keyboard.press("b")
    opened.wait_for_function(
        "document.querySelector('#explorer figcaption:last-child').textContent === 'adversarial'"
    )
    opened.locator("#x-threshold").focus()  # keys are the same there
    opened.keyboard.press("ArrowRight")
    expect(facts).to_have_text(re.compile("^scan 2"))
    opened.select_option("#x-filters select[name=label]", "ill")
    assert opened.inner_text("#x-count") == "3 of 4 images"
    opened.select_option("#x-order", label="highest average_precision, Single")
    listed = opened.locator("#x-cases option").all_inner_texts()
    assert listed == ["scan 1 0.900", "scan 2 0.500", "scan 3"]


def test_keys_outside_scroll_the_page(opened: Page) -> None:
    opened.keyboard.press("ArrowDown")
    opened.wait_for_function("window.scrollY > 0")
    assert opened.inner_text("#x-shown") == "95 %"


def test_nothing_is_left_where_no_image_fits(opened: Page) -> None:
    opened.evaluate(
        "() => { const s = document.querySelector('#x-filters select');"
        " s.add(new Option('none', 'none')); s.value = 'none'; s.onchange(); }"
    )
    assert opened.inner_text("#x-count") == "0 of 4 images"
    assert opened.inner_text("#x-facts") == "no image"
    assert not opened.locator("#x-panels").is_visible()


def test_an_image_without_outline_and_a_narrow_window(opened: Page) -> None:
    opened.set_viewport_size({"width": 400, "height": 800})
    scan(opened, 3)
    assert set(told(opened)) == {"share of the image"}
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
    second = opened.locator("#explorer .pair").nth(1)
    assert not second.is_visible()  # Mask generates nothing


def test_the_curve_of_the_page_is_the_protocols(opened: Page) -> None:
    scan(opened, 1)
    mask = torch.as_tensor(CASES[1].mask)[None]
    curve = percentile_curve(CASES[1].maps["Single"][None], mask).iou[0]
    for percent in (10, 77, 99):
        threshold(opened, percent)
        assert told(opened)["Jaccard"] == pytest.approx(float(curve[percent]), abs=5.1e-4)
