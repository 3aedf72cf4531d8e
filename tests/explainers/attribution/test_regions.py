from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
from kornia.filters import gaussian_blur2d
from networks import images, small
from skimage.data import camera
from torch import Tensor
from torch.testing import assert_close

from explainers.attribution import regions
from explainers.attribution.regions import XRAI, dilated, ranked, segments
from explainers.attribution.scores import ClassScores

saliency = pytest.importorskip("saliency.core")


def photograph(channels: int) -> Tensor:
    grey = torch.from_numpy(camera()[::2, ::2][16:240, 16:240].copy()).float() / 255
    return grey.repeat(channels, 1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_segments_are_those_of_the_saliency_package(channels: int) -> None:
    image = photograph(channels)
    oracle = saliency.xrai._get_segments_felzenszwalb(image.permute(1, 2, 0).numpy())
    assert np.array_equal(segments(image).numpy(), np.stack(oracle))


def test_the_ranking_is_that_of_the_saliency_package() -> None:
    image = photograph(1)
    noise = torch.randn(1, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    attribution = gaussian_blur2d(noise, (15, 15), (4.0, 4.0))[0, 0]
    masks = segments(image)
    oracle = saliency.XRAI().GetMask(
        image.permute(1, 2, 0).numpy(),
        lambda *_: {},
        segments=list(masks.numpy()),
        base_attribution=attribution.numpy()[..., None],
    )
    assert_close(ranked(attribution, masks), torch.from_numpy(oracle).float())


def test_ranking_by_hand() -> None:
    attribution = torch.tensor([[4.0, 2.0, 1.0], [0.0, -1.0, 5.0]])
    masks = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 0]]])
    # first the pair of mean 3, then the column's other pixel and the diagonal, both 0; 5 is left
    expected = torch.tensor([[3.0, 3.0, 0.0], [0.0, 0.0, 5.0]])
    assert_close(ranked(attribution, masks.bool()), expected)


def test_dilation_by_hand() -> None:
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, 2, 2] = True
    assert dilated(mask, 1)[0].int().tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ]


def test_the_attribution_is_integrated_from_black_and_from_white(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regions, "SCALES", (250,))
    network, image, target = small(3), images(channels=3), torch.tensor([2, 0, 1])
    oracle = captum.attr.IntegratedGradients(ClassScores(network))
    lines = [oracle.attribute(image, baseline, target, n_steps=6) for baseline in (0.0, 1.0)]
    attribution = torch.stack(lines).mean(0).amax(1).float()
    expected = [ranked(a, segments(x)) for a, x in zip(attribution, image, strict=True)]
    assert_close(XRAI(network, steps=6).explain(image, target), torch.stack(expected))
