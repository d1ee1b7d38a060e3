"""Infills of masked images."""

from functools import partial
from typing import Any

import pytest
import torch
from kornia.filters import GaussianBlur2d
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext.infill import Infill, gaussian, local_mean

ALL = slice(None)


def fill(images: Tensor, baselines: Any, keep: Tensor | None = None) -> Tensor:
    """The infill (N, C, H, W) for one mask of each image."""
    if keep is None:
        keep = torch.ones(len(images), 1, 1, *images.shape[2:])
    infill = Infill(images, baselines)
    infill.draw(torch.Generator().manual_seed(0))
    return infill(ALL, keep)[:, 0].expand_as(images)


def test_numbers_tensors_and_names_are_constant_infills() -> None:
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(fill(x, 0.25), torch.full_like(x, 0.25))
    assert torch.equal(fill(x, "zeros"), torch.zeros_like(x))
    colours = torch.randn(2, 3, 1, 1)
    assert torch.equal(fill(x, colours), colours.expand_as(x))
    assert torch.equal(fill(x, (x[:1],)), x[:1].expand_as(x))
    torch.testing.assert_close(fill(x, "mean"), x.mean((2, 3), keepdim=True).expand_as(x))


def test_blur_scales_with_the_image() -> None:
    """A point becomes a Gaussian of 10 pixels at 224, and of 5 at 112."""
    for side in (224, 112):
        x = torch.zeros(1, 1, side, side, dtype=torch.float64)
        x[..., side // 2, side // 2] = 1
        row = fill(x, None)[0, 0].sum(0)
        at = torch.arange(side) - side // 2
        deviation = (row * at**2).sum().sqrt().item()
        assert row.sum().item() == pytest.approx(1)
        assert deviation == pytest.approx(10 * side / 224, rel=0.01), "cut off at 3.2 deviations"
        torch.testing.assert_close(fill(x, "blur"), fill(x, None), rtol=0, atol=0)
        wide = torch.nn.functional.pad(x, (side, side, 0, 0))
        row = fill(wide, None)[0, 0, :, side:-side].sum(0)
        deviation = (row * at**2).sum().sqrt().item()
        assert deviation == pytest.approx(10 * side / 224, rel=0.01), "of the shorter side"


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (1, 64)])
def test_blur_works_on_tiny_images(size: tuple[int, int]) -> None:
    x = torch.randn(1, 3, *size)
    assert torch.isfinite(fill(x, None)).all()
    torch.testing.assert_close(fill(torch.ones_like(x), None), torch.ones_like(x))
    assert torch.isfinite(gaussian(x, 11.6, 75)).all()


def test_blur_commutes_with_normalisation() -> None:
    x = torch.rand(1, 3, 30, 30, dtype=torch.float64)
    mean, std = torch.rand(3, 1, 1).double(), torch.rand(3, 1, 1).double() + 0.1
    torch.testing.assert_close(fill((x - mean) / std, None), (fill(x, None) - mean) / std)


def test_local_mean_is_over_kept_pixels() -> None:
    """At 224 pixels it is the mean over the kept pixels of the 15 x 15 around, by hand."""
    x = torch.randn(1, 2, 224, 60)
    x = F.interpolate(x, (224, 224))
    keep = torch.rand(1, 1, 224, 224)
    keep[..., 100:140, 100:140] = 0.4
    result = local_mean(x, keep)
    for row, column in ((0, 0), (50, 111), (223, 100)):
        rows, columns = slice(max(0, row - 7), row + 8), slice(max(0, column - 7), column + 8)
        kept = keep[0, 0, rows, columns] > 0.5
        expected = (x[0, :, rows, columns] * kept).sum((1, 2)) / kept.sum()
        torch.testing.assert_close(result[0, :, row, column], expected, rtol=1e-4, atol=1e-4)
    assert (result[..., 110:130, 110:130] == 0).all(), "nothing is kept around"
    torch.testing.assert_close(fill(x, "local", keep[:, None]), result)


def test_local_mean_has_a_single_kept_pixel_but_none_that_is_half_masked() -> None:
    x, keep = torch.rand(1, 1, 224, 224) + 1, torch.full((1, 1, 224, 224), 0.5)
    keep[0, 0, 50, 60] = 0.6
    expected = torch.zeros_like(x)
    expected[..., 43:58, 53:68] = x[0, 0, 50, 60]
    torch.testing.assert_close(local_mean(x, keep), expected)


def test_noise_stays_in_the_images_range_and_is_shared() -> None:
    x = torch.rand(2, 3, 64, 64) * torch.tensor([1.0, 5.0])[:, None, None, None] - 2
    result = fill(x, "noise")
    low, high = x.amin((2, 3)), x.amax((2, 3))
    assert (result.amin((2, 3)) >= low - 1e-5).all()
    assert (result.amax((2, 3)) <= high + 1e-5).all()
    unit = [(result[i] - low[i, :, None, None]) / (high - low)[i, :, None, None] for i in range(2)]
    torch.testing.assert_close(*unit, rtol=1e-4, atol=1e-4)
    grain = unit[0][:, 1:-1, 1:-1].flatten(1)
    assert 0.1 < grain.std(1).max() < 0.25, "a fifth of the range, less what is cut off"
    infill, generator = Infill(x, "noise"), torch.Generator().manual_seed(0)
    keep = torch.ones(2, 1, 1, 64, 64)
    infill.draw(generator)
    first = infill(ALL, keep)
    infill.draw(generator)
    assert not torch.equal(infill(ALL, keep), first)


def test_callables_get_images_or_images_and_masks() -> None:
    x = torch.randn(2, 3, 4, 4)
    calls: list[tuple[int, ...]] = []

    def of_images(images: Tensor) -> Tensor:
        calls.append(tuple(images.shape))
        return images.flip(3)

    def of_masks(images: Tensor, keep: Tensor) -> Tensor:
        calls.append(tuple(keep.shape))
        assert not torch.is_grad_enabled()
        filled = images * keep + 9
        images.zero_()
        keep.zero_()  # the callable may write to both
        return filled

    infill = Infill(x, of_images)
    keep = torch.rand(2, 3, 1, 4, 4).requires_grad_()
    for _ in range(2):
        torch.testing.assert_close(infill(ALL, keep).expand(2, 3, 3, 4, 4)[:, 1], x.flip(3))
    assert calls == [(2, 3, 4, 4)], "once"
    result = Infill(x, of_masks)(slice(1, 2), keep[1:])
    torch.testing.assert_close(result, (x[1:, None] * keep[1:].detach() + 9))
    assert calls[1:] == [(3, 1, 4, 4)]


@pytest.mark.parametrize(
    "function",
    [
        nn.Identity(),
        nn.Conv2d(3, 3, 3, padding=1),
        GaussianBlur2d((3, 3), (1.0, 1.0)),
        torch.zeros_like,
        partial(torch.full_like, fill_value=0.3),
        partial(torch.flip, dims=(3,)),
        lambda images, strength=0.5: images * strength,
        lambda *images: images[0],
    ],
)
def test_callables_of_images_work_in_every_form(function: Any) -> None:
    x = torch.randn(2, 3, 4, 4)
    result = fill(x, function)
    assert torch.equal(result, function(x))
    assert not result.requires_grad


def test_a_module_takes_images_and_masks() -> None:
    class Inpaint(nn.Module):
        def forward(self, images: Tensor, keep: Tensor) -> Tensor:
            return images * keep

    x, keep = torch.randn(2, 3, 4, 4), torch.rand(2, 1, 1, 4, 4)
    torch.testing.assert_close(fill(x, Inpaint(), keep), x * keep[:, 0])


@pytest.mark.parametrize(
    ("baselines", "error", "message"),
    [
        ("blurr", ValueError, "blurr"),
        (float("nan"), ValueError, "not finite"),
        (torch.zeros(5, 1, 1), ValueError, r"broadcast to the images \(2, 3, 4, 4\)"),
        (torch.zeros(1, 2, 3, 4, 4), ValueError, "broadcast"),
        ((0.0, 0.0), ValueError, "got a tuple of 2"),
        (True, TypeError, "bool"),
        ({"blur": 1}, TypeError, "dict"),
        (lambda images: images[:, :1, :2], ValueError, "broadcast"),
        (lambda images: None, ValueError, "NoneType"),
    ],
)
def test_wrong_infills_raise(baselines: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"`baselines`.*{message}"):
        Infill(torch.randn(2, 3, 4, 4), baselines)


def test_a_callable_of_masks_with_a_wrong_shape_raises() -> None:
    infill = Infill(torch.randn(2, 3, 4, 4), lambda images, keep: keep)
    with pytest.raises(ValueError, match=r"`baselines` must give images of shape \(2, 3, 4, 4\)"):
        infill(ALL, torch.ones(2, 1, 1, 4, 4))


def test_a_callable_of_masks_with_nan_raises() -> None:
    infill = Infill(torch.randn(2, 3, 4, 4), lambda images, keep: images * float("nan"))
    with pytest.raises(ValueError, match="`baselines` are not finite"):
        infill(ALL, torch.ones(2, 1, 1, 4, 4))
