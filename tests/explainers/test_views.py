from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.geometry.transform import warp_affine
from scipy import ndimage
from torch import Tensor
from torch.testing import assert_close

from explainers.views import Views, average_over_views, inverse, smooth, warp

NO_TARGET = torch.zeros(3, dtype=torch.long)


def images(count: int = 3, height: int = 24, width: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator)


def brightness(image: Tensor, target: Tensor) -> Tensor:
    """An explainer that moves with its image."""
    return image.mean(1)


def edges(image: Tensor, target: Tensor) -> Tensor:
    """An explainer that does not: it weighs columns, and depends on the target."""
    return (image.diff(dim=3, append=image[..., -1:]).abs().mean(1) + 0.1) * (1 + target)[
        :, None, None
    ]


class Fixed(Views):
    """Views whose transforms are given by the test."""

    given: Tensor
    __eq__, __hash__ = object.__eq__, object.__hash__  # what is given is no field

    def matrices(self, height: int, width: int) -> Tensor:
        return self.given


def fixed(*matrices: list[list[float]]) -> Views:
    views = Fixed(count=len(matrices))
    object.__setattr__(views, "given", torch.tensor(matrices))
    return views


def flips(height: int, width: int) -> dict[str, list[list[float]]]:
    return {
        "horizontal": [[-1.0, 0.0, width - 1], [0.0, 1.0, 0.0]],
        "vertical": [[1.0, 0.0, 0.0], [0.0, -1.0, height - 1]],
        "both": [[-1.0, 0.0, width - 1], [0.0, -1.0, height - 1]],
    }


def quarter(side: int) -> list[list[float]]:
    return [[0.0, -1.0, side - 1], [1.0, 0.0, 0.0]]  # (x, y) to (side - 1 - y, x): clockwise


# the transforms


def test_matrices_without_ranges_are_the_identity() -> None:
    still = Views(4, 0.0, 0.0, 0.0, 0.0, 0.0).matrices(24, 32)
    assert_close(still, torch.eye(3)[:2].expand(4, 2, 3))


def test_certain_flips_are_the_flips_by_hand() -> None:
    by_hand = flips(24, 32)
    for name, probabilities in {"horizontal": (1, 0), "vertical": (0, 1), "both": (1, 1)}.items():
        matrix = Views(1, 0.0, 0.0, 0.0, *probabilities).matrices(24, 32)[0]
        assert_close(matrix, torch.tensor(by_hand[name]))


def test_a_shift_is_a_share_of_each_side() -> None:
    moved = Views(200, 0.0, 0.25, 0.0, 0.0, 0.0).matrices(24, 32)
    assert_close(moved[:, :, :2], torch.eye(2).expand(200, 2, 2))
    largest = moved[:, :, 2].abs().amax(0)
    assert 0.9 * 8 < largest[0] <= 8
    assert 0.9 * 6 < largest[1] <= 6


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_matrices_stay_in_their_ranges(seed: int) -> None:
    linear = Views(20, 15.0, 0.08, 0.1, 0.5, 0.5, seed).matrices(24, 32)[:, :, :2]
    zoom = linear.det().abs().sqrt()
    angle = torch.rad2deg(torch.atan2(linear[:, 1, 0].abs(), linear[:, 0, 0].abs()))
    assert ((zoom > 0.9 - 1e-5) & (zoom < 1.1 + 1e-5)).all()
    assert (angle < 15 + 1e-3).all()


def test_rotation_and_zoom_keep_the_centre() -> None:
    matrices = Views(10, 40.0, 0.0, 0.3, 0.5, 0.5).matrices(24, 32)
    centre = torch.tensor([15.5, 11.5, 1.0])
    assert_close(matrices @ centre, centre[:2].expand(10, 2), atol=1e-4, rtol=0)


def test_the_draw_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = Views(seed=3).matrices(24, 32)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, Views(seed=3).matrices(24, 32))
    assert not torch.equal(first, Views(seed=4).matrices(24, 32))


def test_half_of_the_views_are_flipped() -> None:
    mirrored = Views(400, 0.0, 0.0, 0.0, 0.5, 0.2).matrices(24, 32)
    assert float((mirrored[:, 0, 0] < 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert float((mirrored[:, 1, 1] < 0).float().mean()) == pytest.approx(0.2, abs=0.08)


def test_inverse_undoes() -> None:
    matrices = Views(8).matrices(24, 32)
    bottom = torch.tensor([0.0, 0.0, 1.0]).expand(8, 1, 3)
    both = inverse(matrices) @ torch.cat([matrices, bottom], 1)
    assert_close(both, torch.eye(3)[:2].expand(8, 2, 3), atol=1e-4, rtol=0)


def test_warp_moves_pixels_by_hand() -> None:
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    right = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])  # T moves the content right by one
    expected = torch.tensor([[0.0, 0.0, 1.0, 2.0], [4.0, 4.0, 5.0, 6.0], [8.0, 8.0, 9.0, 10.0]])
    assert_close(warp(image, right)[0, 0], expected, atol=1e-4, rtol=0)
    outside = warp(image, right, "zeros")[0, 0]
    assert_close(outside[:, 0], torch.zeros(3), atol=1e-4, rtol=0)


def test_warp_like_scipy() -> None:
    image, matrix = images(1), Views(1, 20.0, 0.1, 0.2).matrices(24, 32)
    back = inverse(matrix)[0].double().numpy()
    swap = back[::-1, [1, 0, 2]]  # scipy reads (row, column) and maps output to input
    expected = ndimage.affine_transform(
        image[0, 0].double().numpy(), swap[:, :2], swap[:, 2], order=1, mode="nearest"
    )
    assert_close(warp(image, matrix)[0, 0].numpy(), expected.astype(np.float32), atol=1e-4, rtol=0)


# the average


@pytest.mark.parametrize("name", ["horizontal", "vertical", "both"])
def test_flips_are_exact(name: str) -> None:
    image, view = images(), fixed(flips(24, 32)[name])
    assert_close(average_over_views(brightness, image, NO_TARGET, view), image.mean(1))
    axes = {"horizontal": [2], "vertical": [1], "both": [1, 2]}[name]
    flipped = edges(image.flip([axis + 1 for axis in axes]), NO_TARGET).flip(axes)
    assert_close(average_over_views(edges, image, NO_TARGET, view), flipped)


@pytest.mark.parametrize("side", [24, 31])
def test_quarter_turns_are_exact(side: int) -> None:
    image, view = images(3, side, side), fixed(quarter(side))
    assert_close(average_over_views(brightness, image, NO_TARGET, view), image.mean(1))
    turned = edges(image.rot90(-1, (2, 3)), NO_TARGET).rot90(1, (1, 2))
    assert_close(average_over_views(edges, image, NO_TARGET, view), turned)


def test_a_smooth_map_comes_back_from_rotation_and_zoom() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 3, 64), torch.linspace(0, 3, 64), indexing="ij")
    image = (0.5 + 0.25 * torch.sin(x) + 0.25 * torch.cos(2 * y)).expand(3, 3, 64, 64)
    views = Views(10, rotation=20.0, translation=0.0, zoom=0.15)
    averaged = average_over_views(brightness, image, NO_TARGET, views)
    assert_close(averaged, image.mean(1), atol=2e-3, rtol=0)


def slow_average(image: Tensor, target: Tensor, views: Views) -> Tensor:
    """Eq. 11, one view and one image at a time."""
    height, width = image.shape[2:]
    maps = []
    for x, y in zip(image, target, strict=True):
        total, count = torch.zeros(height, width), torch.zeros(height, width)
        for forward in views.matrices(height, width):
            whole = torch.eye(3)
            whole[:2] = forward
            there, back = forward[None], whole.inverse()[None, :2]
            ones = warp_affine(torch.ones(1, 1, height, width), there, (height, width))
            seen = (warp_affine(ones, back, (height, width))[0, 0] >= 0.999).float()
            moved = warp_affine(x[None], there, (height, width), padding_mode="border")
            explained = edges(moved, y[None])[None]
            total += seen * warp_affine(explained, back, (height, width))[0, 0]
            count += seen
        plain = edges(x[None], y[None])[0]
        maps.append(torch.where(count > 0, total / count, plain))
    return torch.stack(maps)


@pytest.mark.parametrize(
    "views", [Views(seed=1), Views(3, 40.0, 0.3, 0.3, seed=2), Views(1, 45.0, 0.4, 0.0, seed=5)]
)
def test_average_like_its_slow_rewrite(views: Views) -> None:
    image, target = images(), torch.tensor([0, 2, 1])
    averaged = average_over_views(edges, image, target, views)
    assert_close(averaged, slow_average(image, target, views), atol=1e-5, rtol=1e-4)


def test_pixels_seen_by_no_view_take_the_plain_map() -> None:
    image = images()
    right = fixed([[1.0, 0.0, 8.0], [0.0, 1.0, 0.0]])  # the last eight columns leave the image

    def marked(x: Tensor, target: Tensor) -> Tensor:
        plain = len(x) == 3 and torch.equal(x, image)
        return torch.full((len(x), 24, 32), 1.0 if plain else 7.0)

    averaged = average_over_views(marked, image, NO_TARGET, right)
    assert_close(averaged[:, :, :24], torch.full((3, 24, 24), 7.0))
    assert_close(averaged[:, :, 24:], torch.full((3, 24, 8), 1.0))


def test_unseen_pixels_do_not_count() -> None:  # of two views only the second sees the right edge
    views = fixed([[1.0, 0.0, 8.0], [0.0, 1.0, 0.0]], flips(24, 32)["vertical"])
    values = iter([3.0, 5.0])
    maps = average_over_views(
        lambda x, _: torch.stack([torch.full((24, 32), next(values)) for _ in x]),
        images(1),
        NO_TARGET[:1],
        views,
    )
    assert_close(maps[:, :, :24], torch.full((1, 24, 24), 4.0))
    assert_close(maps[:, :, 24:], torch.full((1, 24, 8), 5.0))


@pytest.mark.parametrize("work_batch", [1, 4, 7, 1000])
def test_the_average_does_not_depend_on_the_work_batch(work_batch: int) -> None:
    image, target = images(), torch.tensor([0, 2, 1])
    sizes: list[int] = []

    def watched(x: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return edges(x, y)

    averaged = average_over_views(watched, image, target, Views(work_batch=work_batch))
    assert_close(averaged, average_over_views(edges, image, target, Views()))
    assert max(sizes) == min(work_batch, 30)
    assert sum(sizes) in (30, 33)  # ten views of three images, and the plain maps if needed


def test_every_image_has_the_same_views_whatever_its_batch() -> None:
    image, target = images(5), torch.arange(5)
    together = average_over_views(edges, image, target, Views())
    for k in range(5):
        alone = average_over_views(edges, image[k : k + 1], target[k : k + 1], Views())
        assert_close(alone[0], together[k])


@pytest.mark.parametrize("views", [None, Views(count=0)])
def test_no_views_is_the_plain_map(views: Views | None) -> None:
    image = images()
    assert torch.equal(average_over_views(edges, image, NO_TARGET, views), edges(image, NO_TARGET))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": -1}, "got -1 and 64"),
        ({"work_batch": 0}, "got 10 and 0"),
        ({"zoom": 1.0}, "zoom of the views must be in .*, but got 1.0"),
        ({"translation": -0.1}, "translation of the views must be in .*, but got -0.1"),
        ({"vertical_flip": 7}, r"vertical_flip of the views is a probability .*, but got 7"),
    ],
)
def test_wrong_views_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(**values)  # type: ignore[arg-type]


# smoothing


@pytest.mark.parametrize(("height", "width"), [(24, 24), (24, 32), (40, 11)])
@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.3])
def test_smooth_like_scipy(height: int, width: int, sigma: float) -> None:
    saliency = images(2, height, width).mean(1).double()
    pixels = sigma * min(height, width)
    radius = round(3 * pixels)
    for found, raw in zip(smooth(saliency, sigma), saliency, strict=True):
        expected = ndimage.gaussian_filter(raw.numpy(), pixels, mode="mirror", radius=radius)
        assert_close(found.numpy(), expected, atol=1e-6, rtol=0)


def test_smooth_by_hand() -> None:  # sigma 1 px, three sigmas: the kernel's values in the middle
    point = torch.zeros(1, 20, 20)
    point[0, 10, 10] = 1
    kernel = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    kernel /= kernel.sum()
    found = smooth(point, 0.05)[0]
    assert_close(found[7:14, 7:14].numpy(), np.outer(kernel, kernel).astype(np.float32))
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


@given(size=st.integers(1, 12), sigma=st.floats(0, 0.3), value=st.floats(-5, 5, width=32))
@settings(max_examples=30, deadline=None)
def test_smooth_preserves_a_constant_of_any_size(size: int, sigma: float, value: float) -> None:
    constant = torch.full((2, size, size + 3), value)
    assert_close(smooth(constant, sigma), constant, atol=1e-5, rtol=1e-5)


def test_no_smoothing_is_the_map_itself() -> None:
    saliency = images().mean(1)
    assert smooth(saliency, 0.0) is saliency


@pytest.mark.parametrize("sigma", [-0.1, 0.31, 5.0, float("nan")])
def test_smooth_refuses_other_sigmas(sigma: float) -> None:
    with pytest.raises(ValueError, match=rf"share of the image side in .*, but got {sigma}"):
        smooth(torch.zeros(1, 8, 8), sigma)


def test_what_inference_mode_has_laid_out_serves_gradients_too() -> None:
    view, image = Views(3, seed=11), images()
    with torch.inference_mode():
        expected = average_over_views(brightness, image, NO_TARGET, view).clone()
    free = image.clone().requires_grad_()
    average = average_over_views(brightness, free, NO_TARGET, view)
    assert_close(average, expected)
    (gradient,) = torch.autograd.grad(average.sum(), free)
    assert gradient.abs().sum() > 0
