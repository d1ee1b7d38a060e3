"""Metrics, image operations and losses over the range of floats.

Powers of two are exact. So a result that does not depend on the scale is the same to the last bit,
and one that follows the scale is a multiple.
"""

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from captum_ext import imaging, infill, metrics
from captum_ext.fcam import dense_crf_loss, local_crf_loss, partial_cross_entropy, size_loss
from captum_ext.perception.losses import (
    deep_similarity,
    perception_loss,
    structural_similarity,
)

EXPONENTS = range(-120, 101, 10)
DTYPES = {torch.float16: range(-8, 12), torch.bfloat16: range(-100, 101, 10)}
Operation = Callable[[Tensor], Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Multiples of 1/16, which are exact in half precision.
X = torch.randint(-64, 64, (3, 2, 9, 11), generator=seeded()) / 16
UNIT = torch.rand(3, 9, 11, generator=seeded(1))
IMAGES = torch.rand(3, 3, 9, 11, generator=seeded(2))
MASKS = torch.rand(3, 9, 11, generator=seeded(3)) < 0.3
MASKS[:, 0, 0] = True
BOXES = [torch.tensor([[1, 1, 6, 5]])] * 3
KEEP = (torch.rand(3, 1, 9, 11, generator=seeded(4)) < 0.5).float()
TURN = torch.tensor([[[0.9, 0.1, 1.0], [-0.1, 0.9, 2.0], [0.0, 0.0, 1.0]]])


def mean_net(x: Tensor) -> Tensor:
    return torch.stack([x.float().mean((1, 2, 3)), x.float()[:, :, ::2].mean((1, 2, 3))], 1)


def of_class(metric: Callable[[], metrics.PointingGame]) -> Operation:
    return lambda x: metric()(x, MASKS)["all"]


UNCHANGED: dict[str, Operation] = {
    "pointing_game": lambda x: metrics.pointing_game(x, MASKS, 2),
    "PointingGame": of_class(partial(metrics.PointingGame, 2)),
    "energy_pointing_game": lambda x: metrics.energy_pointing_game(x, MASKS),
    "EnergyPointingGame": of_class(metrics.EnergyPointingGame),
    "box_from_map": metrics.box_from_map,
    "in_top_k": lambda x: metrics.in_top_k(x.flatten(1), torch.tensor([3, 4, 5]), 20),
    "insertion": lambda x: metrics.insertion(mean_net, IMAGES, x, 0).auc,
    "deletion": lambda x: metrics.deletion(mean_net, IMAGES, x, 0).auc,
    "overall_score": lambda x: metrics.overall_score(mean_net, IMAGES, x, 0).score,
    "average_drop": lambda x: metrics.average_drop(mean_net, IMAGES, x, 0),
    "increase_in_confidence": lambda x: metrics.increase_in_confidence(mean_net, IMAGES, x, 0),
    "road": lambda x: metrics.road(mean_net, IMAGES, x, 0).score,
    "min_max": imaging.min_max,
}
SCALED: dict[str, Operation] = {
    "blur": lambda x: imaging.blur(x, 5, 2.0),
    **{mode: partial(imaging.resize, size=(20, 5), mode=mode) for mode in imaging.MODES},
    "antialias": lambda x: imaging.resize(x, (4, 5), antialias=True),
    "lay_over": lambda x: imaging.lay_over(x, (30, 30), (1.0, -2.0)),
    "warp": lambda x: imaging.warp(x, TURN, fill="border"),
    "percentile": lambda x: imaging.percentile(x, 33.0),
    "one_channel": imaging.one_channel,
    "gaussian": infill.gaussian,
    "channel_means": infill.channel_means,
    "local_mean": lambda x: infill.local_mean(x, KEEP),
    "linear_imputation": lambda x: metrics.linear_imputation(x, KEEP),
    "blend": lambda x: infill.blend(x, x.flip(0), (KEEP * 0.25)[:, None].to(x)),
    "absolute total_variation": lambda x: metrics.total_variation(x, "absolute"),
}
SQUARED: dict[str, Operation] = {
    "total_variation": metrics.total_variation,
    "deep_similarity": lambda x: deep_similarity(x, x.flip(0)),
}
# Their definition has masks, boxes, or thresholds of maps in [0, 1].
OF_NO_SCALE = {
    "best_box_iou",
    "box_ious",
    "boxes_to_masks",
    "center_gaussian",
    "mask_iou",
    "masks_to_boxes",
    "pixel_counts",
    "pixel_iou",
}


def test_every_function_of_the_metrics_is_here() -> None:
    functions = {name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))}
    assert functions == {
        *OF_NO_SCALE,
        *(functions & (UNCHANGED.keys() | SCALED.keys() | SQUARED.keys())),
    }


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_power_of_two_does_not_change_it(name: str) -> None:
    expected = UNCHANGED[name](X)
    assert bool(expected.isfinite().all())
    for exponent in EXPONENTS:
        assert torch.equal(UNCHANGED[name](X * 2.0**exponent), expected), exponent


def test_a_tolerance_of_any_size_takes_in_the_whole_image() -> None:
    assert metrics.pointing_game(X, MASKS, 1e200).all()


@pytest.mark.parametrize("contours", ["largest", "all"])
def test_boxes_at_shares_of_the_maximum_do_not_depend_on_it(contours: str) -> None:
    expected = metrics.box_ious(UNIT, BOXES, contours)
    for exponent in range(-120, 1, 8):
        ious = metrics.box_ious(UNIT * 2.0**exponent, BOXES, contours)
        assert torch.equal(ious, expected), exponent


@pytest.mark.parametrize("name", SCALED)
def test_it_scales_exactly(name: str) -> None:
    """Below 2^-100 some terms are denormal numbers, which are rounded."""
    expected = SCALED[name](X)
    for exponent in EXPONENTS:
        atol = 2.0**-140 if exponent < -100 else 0
        result = SCALED[name](X * 2.0**exponent)
        torch.testing.assert_close(result, expected * 2.0**exponent, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SQUARED)
def test_it_scales_with_the_square_where_a_float_holds_it(name: str) -> None:
    expected = SQUARED[name](X)
    for exponent in range(-80, 63):
        result = SQUARED[name](X * 2.0**exponent).double()
        exact = (expected.double() * 4.0**exponent).float().double()
        atol = 2.0**-143 if name == "deep_similarity" else 0
        torch.testing.assert_close(result, exact, rtol=0, atol=atol)


@pytest.mark.parametrize("exponent", [-60, -30, 30, 50])
def test_gradients_of_the_deep_similarity_follow_the_scale(exponent: int) -> None:
    def gradient(scale: float) -> Tensor:
        latents = (X * scale).requires_grad_()
        (result,) = torch.autograd.grad(deep_similarity(latents, -X * scale).sum(), latents)
        return result

    assert torch.equal(gradient(2.0**exponent), gradient(1.0) * 2.0**exponent)
    torch.testing.assert_close(gradient(1.0), 4 * X / X[0].numel())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*UNCHANGED, *SCALED])
def test_half_precision_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    tolerance = 4 * torch.finfo(dtype).eps
    for exponent in DTYPES[dtype]:
        x = X.to(dtype) * 2.0**exponent
        if name in UNCHANGED:
            assert torch.equal(UNCHANGED[name](x), UNCHANGED[name](X.to(dtype))), exponent
            continue
        expected = SCALED[name](x.double())
        largest = float(expected.abs().max())
        if largest < torch.finfo(dtype).max:
            result = SCALED[name](x).double()
            torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_largest_numbers_have_a_minimum_a_maximum_and_noise(dtype: torch.dtype) -> None:
    """Their difference is no number of the dtype."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([[[[-1.0, 1.0, 0.0, 0.5]]]], dtype=dtype) * largest
    torch.testing.assert_close(imaging.min_max(x), (x / largest + 1) / 2)
    noise = infill.Infill(x, "noise")
    noise.draw(seeded())
    assert bool(noise(slice(None), KEEP).isfinite().all())


# --- losses --------------------------------------------------------------------------------------

MAPS = torch.rand(2, 1, 16, 16, generator=seeded(5))
COLOURS = torch.rand(2, 3, 16, 16, generator=seeded(6)) * 255
COLOURS[:, :, 8:] = COLOURS[:, :, :1]  # equal colours stay neighbours at any sigma
CRF = {"dense": partial(dense_crf_loss, side=None), "local": local_crf_loss}


@pytest.mark.filterwarnings("ignore:`images` are in")
@pytest.mark.parametrize("name", CRF)
def test_the_crf_depends_on_colours_as_shares_of_sigma(name: str) -> None:
    expected = CRF[name](MAPS, COLOURS, sigma_rgb=16.0)
    for exponent in EXPONENTS:
        result = CRF[name](MAPS, COLOURS * 2.0**exponent, sigma_rgb=16 * 2.0**exponent)
        assert torch.equal(result, expected), exponent


@pytest.mark.parametrize("name", CRF)
@pytest.mark.parametrize("sigma", ["sigma_rgb", "sigma_xy"])
@pytest.mark.parametrize("exponent", [-1000, -700, -120, -60, -20, -10, -6, 0, 20, 100, 600, 1000])
def test_the_crf_takes_any_sigma(name: str, sigma: str, exponent: int) -> None:
    """Squares of the features overflowed, or their difference was rounding noise."""
    result = CRF[name](MAPS, COLOURS, **{sigma: 2.0**exponent})
    exact = CRF[name](MAPS.double(), COLOURS.double(), **{sigma: 2.0**exponent})
    torch.testing.assert_close(result.double(), exact, rtol=2e-3, atol=1e-30)


def test_a_sampled_crf_takes_any_sigma() -> None:
    exact = dense_crf_loss(MAPS.double(), COLOURS.double(), sigma_rgb=0.01, side=None)
    draws = seeded()
    losses = [
        dense_crf_loss(
            MAPS, COLOURS, sigma_rgb=0.01, side=None, n_anchors=64, generator=draws
        ).double()
        for _ in range(200)
    ]
    torch.testing.assert_close(torch.stack(losses).mean(), exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", CRF)
def test_the_crf_of_small_maps_is_their_share(name: str) -> None:
    for exponent in (-120, -60, -20, -1):
        maps = MAPS * 2.0**exponent
        result, exact = CRF[name](maps, COLOURS), CRF[name](maps.double(), COLOURS.double())
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("exponent", [-120, -60, -20, 0])
def test_other_losses_agree_with_float64(exponent: int) -> None:
    scale = 2.0**exponent
    logits = torch.randn(2, 2, 9, 11, generator=seeded()) * scale
    seeds = (torch.rand(2, 9, 11, generator=seeded(1)) < 0.5).long()
    pictures = torch.rand(2, 3, 12, 12, generator=seeded(2)) * scale
    others = pictures.flip(0)
    for loss, tensors in (
        (lambda z: partial_cross_entropy(z, seeds), (logits,)),
        (lambda p: size_loss(p, 2.0), (torch.rand(2, 2, 9, 11, generator=seeded(3)) * scale,)),
        (structural_similarity, (pictures, others)),
        (
            lambda x, y: perception_loss(x, y, x, y, (1.0, 1.0, 0.0))["pixel"],
            (pictures, others),
        ),
    ):
        result = loss(*tensors)
        exact = loss(*(t.double() for t in tensors))
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=2.0**-140)


@pytest.mark.parametrize("exponent", [-1000, -700, -60, 60, 600, 1000])
def test_a_centred_gaussian_has_its_maximum_at_the_centre(exponent: int) -> None:
    gaussian = metrics.center_gaussian((9, 9), 2.0**exponent)
    assert gaussian[4, 4] == 1
    assert gaussian[0, 0] == (0 if exponent < 0 else 1)
