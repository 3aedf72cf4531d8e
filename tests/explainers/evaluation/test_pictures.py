from __future__ import annotations

import matplotlib as mpl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.segmentation import find_boundaries
from torch import Tensor
from torch.testing import assert_close

from explainers.evaluation.pictures import (
    OUTLINE,
    TINT,
    heat,
    outlined,
    panel,
    rgb,
    tinted,
    unit_range,
)


def maps(count: int = 2, height: int = 20, width: int = 30) -> Tensor:
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(0))


def border(mask: Tensor) -> Tensor:
    """Where the outline was drawn over a black picture."""
    drawn = outlined(torch.zeros(len(mask), 3, *mask.shape[1:]), mask)
    inside = drawn.any(1)
    colour = torch.tensor(OUTLINE)[:, None, None].expand_as(drawn)
    assert_close(drawn, colour * inside[:, None])
    return inside


def test_the_outline_is_the_inner_border_by_hand() -> None:
    mask = torch.zeros(1, 5, 6, dtype=torch.bool)
    mask[0, 1:4, 1:5] = True
    expected = mask.clone()
    expected[0, 2, 2:4] = False
    assert torch.equal(border(mask), expected)


@given(seed=st.integers(0, 99), share=st.floats(0.1, 0.99))
@settings(max_examples=20, deadline=None)
def test_the_outline_like_scikit_image(seed: int, share: float) -> None:
    mask = torch.rand(1, 9, 11, generator=torch.Generator().manual_seed(seed)) < share
    expected = find_boundaries(mask[0].numpy(), connectivity=2, mode="inner")  # type: ignore[no-untyped-call]
    assert torch.equal(border(mask)[0], torch.from_numpy(expected))


def test_the_tint_covers_five_percent() -> None:  # 600 distinct pixels: 30 of them
    image, saliency = torch.rand(2, 1, 20, 30), maps()
    changed = (tinted(image, saliency) != rgb(image)).any(1)
    assert changed.sum((1, 2)).tolist() == [30, 30]
    for part, hit in zip(saliency, changed, strict=True):
        assert part[hit].min() > part[~hit].max()
    half = 0.5 * rgb(image) + 0.5 * torch.tensor(TINT)[:, None, None]
    assert_close(tinted(image, saliency), torch.where(changed[:, None], half, rgb(image)))


def test_ties_at_the_percentile_are_tinted() -> None:  # half of the pixels share the top value
    saliency = torch.arange(16.0).clamp(max=8).reshape(1, 4, 4)
    changed = (tinted(torch.zeros(1, 1, 4, 4), saliency) != 0).any(1)
    assert torch.equal(changed, saliency == 8)


def test_unit_range_of_each_map_by_hand() -> None:
    saliency = torch.tensor([[[2.0, 4.0], [3.0, 2.0]], [[7.0, 7.0], [7.0, 7.0]]])
    expected = torch.tensor([[[0.0, 1.0], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert_close(unit_range(saliency), expected)


def test_heat_like_matplotlib() -> None:
    saliency = 3 * maps() - 1
    for found, one in zip(heat(saliency), saliency, strict=True):
        colours = mpl.colormaps["inferno"](mpl.colors.Normalize()(one.numpy()))[..., :3]
        assert_close(found.permute(1, 2, 0), torch.from_numpy(colours).float(), atol=0.02, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_rgb_cuts_and_repeats(channels: int) -> None:
    image = torch.tensor([-0.5, 0.25, 1.5]).reshape(1, 1, 1, 3).expand(2, channels, 1, 3)
    assert_close(rgb(image), torch.tensor([0.0, 0.25, 1.0]).expand(2, 3, 1, 3))


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (3, 3)])
def test_a_panel_has_a_row_per_image(count: int, channels: int) -> None:
    image, similar, adversarial = torch.rand(3, count, channels, 20, 30).round()
    mask = torch.zeros(count, 20, 30, dtype=torch.bool)
    mask[:, 5:9, 5:9] = True
    picture = panel(image, similar, adversarial, maps(count), mask)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 22 * count + 2, 32 * 5 + 2)
    cells = picture[:, 2:, 2:].unfold(1, 20, 22).unfold(2, 30, 32)  # (3, rows, columns, h, w)
    for column, shown in enumerate((image, similar, adversarial)):
        assert torch.equal(cells[:, :, column].transpose(0, 1), (255 * rgb(shown)).byte())
    marked = outlined(tinted(image, maps(count)), mask)
    assert torch.equal(cells[:, :, 4].transpose(0, 1), (255 * marked).round().byte())
