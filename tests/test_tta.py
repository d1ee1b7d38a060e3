"""Boxes of masks and crops, against values by hand and a few lines of plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import resized_crop

from captum_ext.metrics import boxes_to_masks
from captum_ext.tta import crop_tta, mask_boxes
from tests.networks import RaisingLayer, quadrants_net

D = torch.float64


def channel_means(x: Tensor) -> Tensor:
    """A linear model: its logits are the means of the channels."""
    return x.mean((2, 3))


def masks_of_boxes(*boxes: list[int], size: tuple[int, int] = (12, 10)) -> Tensor:
    """Masks (N, 1, H, W): 0.9 in the boxes, 0.5 elsewhere."""
    inside = boxes_to_masks([torch.tensor([box]) for box in boxes], size)
    return 0.5 + 0.4 * inside[:, None].to(D)


# --- boxes ---------------------------------------------------------------------------------------


def test_the_box_is_tight_half_open_and_strictly_above_the_threshold() -> None:
    masks = masks_of_boxes([2, 3, 7, 4], [0, 0, 10, 12], [9, 11, 10, 12], [4, 4, 4, 4])
    expected = [[2, 3, 7, 4], [0, 0, 10, 12], [9, 11, 10, 12], [0, 0, 0, 0]]
    assert mask_boxes(masks).tolist() == expected
    assert mask_boxes(masks[:, 0]).tolist() == expected
    assert mask_boxes(masks.repeat(1, 3, 1, 1)).tolist() == expected  # an attribution's channels
    assert mask_boxes(masks > 0.5).tolist() == expected
    assert mask_boxes(masks, 0.9).tolist() == [[0, 0, 0, 0]] * 4
    assert mask_boxes(masks, 0.4).tolist() == [[0, 0, 10, 12]] * 4
    assert mask_boxes(masks).dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"margin": 1}, [3, 4, 8, 7]),
        ({"margin": 3}, [1, 2, 10, 9]),
        ({"margin": 4}, [0, 1, 10, 10]),  # 11 wide would be wider than the mask
        ({"min_size": 2}, [4, 5, 7, 7]),
        ({"min_size": 5}, [3, 3, 8, 8]),
        ({"min_size": 6}, [3, 3, 9, 9]),  # 3 more to the left and right: 1 and 2
        ({"square": True}, [4, 4, 7, 7]),
        ({"square": True, "margin": 1, "min_size": 7}, [2, 2, 9, 9]),
        ({"min_size": 99}, [0, 0, 10, 12]),
    ],
)
def test_a_growing_box_keeps_its_centre(options: dict[str, Any], expected: list[int]) -> None:
    assert mask_boxes(masks_of_boxes([4, 5, 7, 6]), **options).tolist() == [expected]


def test_at_a_border_a_box_moves_inside() -> None:
    corners = masks_of_boxes([0, 0, 2, 1], [8, 11, 10, 12])
    assert mask_boxes(corners, margin=2).tolist() == [[0, 0, 6, 5], [4, 7, 10, 12]]
    assert mask_boxes(corners, square=True).tolist() == [[0, 0, 2, 2], [8, 10, 10, 12]]


@given(
    seed=st.integers(0, 10**6),
    margin=st.integers(0, 9),
    min_size=st.integers(1, 20),
    square=st.booleans(),
)
def test_a_grown_box_contains_the_tight_one(
    seed: int, margin: int, min_size: int, square: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(6, 13, 9, generator=generator) < 0.03
    tight = mask_boxes(masks)
    grown = mask_boxes(masks, margin=margin, min_size=min_size, square=square)
    for (x1, y1, x2, y2), (a1, b1, a2, b2) in zip(tight.tolist(), grown.tolist(), strict=True):
        if x2 == 0:
            assert (a1, b1, a2, b2) == (0, 0, 0, 0)
            continue
        assert 0 <= a1 <= x1 < x2 <= a2 <= 9
        assert 0 <= b1 <= y1 < y2 <= b2 <= 13
        sides = [max(side + 2 * margin, min_size) for side in (x2 - x1, y2 - y1)]
        sides = [max(sides)] * 2 if square else sides
        assert [a2 - a1, b2 - b1] == [min(sides[0], 9), min(sides[1], 13)]


def test_the_blur_comes_before_the_threshold() -> None:
    masks = torch.zeros(1, 1, 40, 40)
    masks[0, 0, 10:30, 10:30] = 1
    masks[0, 0, 2, 2] = 1  # the blur removes this speck
    assert mask_boxes(masks).tolist() == [[2, 2, 30, 30]]
    x1, y1, x2, y2 = mask_boxes(masks, sigma=2.0)[0].tolist()
    assert (x1, y1) == (10, 10)
    assert (x2, y2) == (30, 30)  # half of a blurred edge is at the edge


def test_wrong_masks_and_options_raise() -> None:
    masks = masks_of_boxes([1, 1, 3, 3])
    for shape in ((3, 4), (1, 0, 4), (1, 1, 1, 3, 4)):
        with pytest.raises(ValueError, match=r"`masks` must be \(B, C, H, W\)"):
            mask_boxes(torch.zeros(shape))
    with pytest.raises(ValueError, match="`masks` has values that are not finite"):
        mask_boxes(torch.full((1, 3, 4), torch.nan))
    for name, wrong in (
        ("threshold", float("nan")),
        ("threshold", "half"),
        ("sigma", -1.0),
        ("sigma", float("inf")),
        ("margin", -1),
        ("margin", 0.5),
        ("min_size", 0),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            mask_boxes(masks, **{name: wrong})
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            crop_tta(channel_means, torch.rand(1, 3, 12, 10), masks, **{name: wrong})


# --- predictions ---------------------------------------------------------------------------------


def test_the_mean_equals_one_computed_by_hand() -> None:
    # One bright channel in a twelfth of the image, all of the crop.
    images, masks = torch.zeros(1, 2, 6, 8, dtype=D), torch.zeros(1, 1, 6, 8, dtype=D)
    images[0, 1, 2:4, 3:5], masks[0, 0, 2:4, 3:5] = 12, 1
    logits = crop_tta(channel_means, images, masks, score="logit")
    assert logits.tolist() == [[0, (1 + 12) / 2]]
    sigmoids = crop_tta(channel_means, images, masks, score="sigmoid")
    torch.testing.assert_close(
        sigmoids, torch.tensor([[0.0, 1.0], [0.0, 12.0]], dtype=D).sigmoid().mean(0)[None]
    )
    softmax = crop_tta(channel_means, images, masks)
    torch.testing.assert_close(
        softmax, torch.tensor([[0.0, 1.0], [0.0, 12.0]], dtype=D).softmax(1).mean(0)[None]
    )
    by_callable = crop_tta(channel_means, images, masks, score=lambda output: output[:, 1])
    assert by_callable.tolist() == [6.5]


def test_an_image_without_a_box_has_its_own_prediction() -> None:
    network, images = quadrants_net(), torch.randn(3, 3, 12, 10, dtype=D)
    masks = masks_of_boxes([1, 2, 5, 6], [0, 0, 0, 0], [3, 3, 9, 11])
    alone = network(images).softmax(1)
    result = crop_tta(network, images, masks)
    assert torch.equal(result[1], alone[1])
    assert not torch.isclose(result[[0, 2]], alone[[0, 2]]).any()
    assert torch.equal(crop_tta(network, images, torch.full((3, 12, 10), 0.5)), alone)


@pytest.mark.parametrize(
    "box", [[0, 0, 3, 2], [6, 7, 10, 12], [9, 0, 10, 1], [0, 0, 10, 12], [2, 5, 9, 6]]
)
def test_the_crop_equals_torchvisions(box: list[int]) -> None:
    network, images = quadrants_net(), torch.randn(1, 3, 12, 10, dtype=D)
    x1, y1, x2, y2 = box
    crop = resized_crop(images, y1, x1, y2 - y1, x2 - x1, [12, 10])
    expected = (network(images) + network(crop)) / 2
    torch.testing.assert_close(
        crop_tta(network, images, masks_of_boxes(box), score="logit"), expected
    )
    # The box of the same mask at half the size: no pixel is lost.
    if all(edge % 2 == 0 for edge in box):
        half = masks_of_boxes([edge // 2 for edge in box], size=(6, 5))
        torch.testing.assert_close(crop_tta(network, images, half, score="logit"), expected)


def test_box_options_and_the_size_reach_the_crop() -> None:
    network, images = quadrants_net(), torch.randn(1, 3, 12, 10, dtype=D)
    crop = resized_crop(images, 3, 2, 5, 5, [7, 9])
    expected = (network(images) + network(crop)) / 2
    result = crop_tta(
        network,
        images,
        masks_of_boxes([3, 5, 6, 6]) - 0.2,
        score="logit",
        threshold=0.5,
        margin=1,
        square=True,
        size=(7, 9),
    )
    torch.testing.assert_close(result, expected)


def test_crops_come_from_the_originals() -> None:
    network = quadrants_net()
    originals = [torch.randn(3, 48, 30, dtype=D), torch.randn(3, 25, 7, dtype=D)]
    images = torch.cat([F.interpolate(o[None], (12, 10), mode="bilinear") for o in originals])
    masks = masks_of_boxes([2, 3, 7, 6], [2, 3, 7, 6])
    # 3 x 4 times, and 0.7 x 25 / 12 times: 1.4 to 4.9, and 6.25 to 12.5, widened to whole pixels.
    crops = [
        resized_crop(originals[0][None], 12, 6, 12, 15, [12, 10], antialias=True),
        resized_crop(originals[1][None], 6, 1, 7, 4, [12, 10], antialias=True),
    ]
    expected = (network(images) + network(torch.cat(crops))) / 2
    result = crop_tta(network, images, masks, originals=originals, score="logit")
    torch.testing.assert_close(result, expected)
    for source in (originals[0][None], tuple(originals[:1])):
        of_one_image = crop_tta(network, images[:1], masks[:1], originals=source, score="logit")
        torch.testing.assert_close(of_one_image, expected[:1])


def test_views_map_boxes_to_the_original() -> None:
    network = quadrants_net()
    original = torch.randn(1, 3, 60, 50, dtype=D)
    view = torch.tensor([[20, 10, 40, 34]])  # twice the image
    images = original[:, :, 10:34:2, 20:40:2]
    crop = resized_crop(original, 10 + 6, 20 + 4, 6, 10, [12, 10], antialias=True)
    expected = (network(images) + network(crop)) / 2
    options: dict[str, Any] = {"originals": original, "score": "logit"}
    result = crop_tta(network, images, masks_of_boxes([2, 3, 7, 6]), views=view, **options)
    torch.testing.assert_close(result, expected)
    # A view may reach outside the original (padding): that part is dropped, or there is no crop.
    outside = torch.tensor([[-20.0, -24.0, 20.0, 24.0]])
    crop = resized_crop(original, 0, 0, 12, 12, [12, 10], antialias=True)
    result = crop_tta(network, images, masks_of_boxes([2, 3, 8, 9]), views=outside, **options)
    torch.testing.assert_close(result, (network(images) + network(crop)) / 2)
    nothing = crop_tta(network, images, masks_of_boxes([0, 0, 5, 12]), views=outside, **options)
    assert torch.equal(nothing, network(images))


def test_a_batch_equals_its_images_and_each_crop_has_the_arguments_of_its_image() -> None:
    images = torch.randn(5, 3, 12, 10, dtype=D)
    masks = masks_of_boxes([0, 0, 3, 2], [0, 0, 0, 0], [4, 4, 9, 9], [9, 11, 10, 12], [2, 0, 3, 12])
    scale = torch.rand(5, 1, dtype=D)
    shared = torch.rand(7, dtype=D)
    network, sizes = quadrants_net(), []

    def model(x: Tensor, scale: Tensor, shared: Tensor, sign: int) -> Tensor:
        sizes.append(len(x))
        assert len(scale) == len(x)
        assert len(shared) == 7
        return network(x) * scale * sign

    extra = (scale, shared, -1)
    together = crop_tta(model, images, masks, additional_forward_args=extra)
    assert sizes == [5, 4]
    alone = [
        crop_tta(model, x[None], m[None], additional_forward_args=(s[None], shared, -1))
        for x, m, s in zip(images, masks, scale, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    sizes.clear()
    chunks = crop_tta(model, images, masks, additional_forward_args=extra, internal_batch_size=3)
    assert sizes == [3, 2, 3, 1]
    torch.testing.assert_close(chunks, together)


@pytest.mark.parametrize("flat", [True, False])
def test_models_with_one_logit_work(flat: bool) -> None:
    def model(x: Tensor) -> Tensor:
        logit = x.mean((1, 2, 3))
        return logit if flat else logit[:, None]

    images, masks = torch.randn(2, 3, 12, 10, dtype=D), masks_of_boxes([0, 0, 3, 2], [4, 4, 9, 9])
    crops = torch.stack([images[0, :, 0:2, 0:3].mean(), images[1, :, 4:9, 4:9].mean()])
    result = crop_tta(model, images, masks, score="sigmoid", size=(2, 3))
    exact = crop_tta(model, images[:1], masks[:1], score="sigmoid", size=(2, 3))
    assert result.shape == model(images).shape
    expected = (images[0].mean().sigmoid() + crops[0].sigmoid()) / 2
    assert exact.item() == pytest.approx(expected.item())
    torch.testing.assert_close(result[:1], exact)
    with pytest.raises(ValueError, match="`score` 'softmax' needs two classes or more"):
        crop_tta(model, images, masks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    network, images = quadrants_net().to(dtype), torch.randn(2, 3, 12, 10).to(dtype)
    masks = masks_of_boxes([0, 0, 7, 8], [4, 4, 9, 9]).to(dtype)
    dtypes = []

    def model(x: Tensor) -> Tensor:
        dtypes.append(x.dtype)
        return network(x)

    result = crop_tta(model, images, masks, originals=images.float())
    assert dtypes == [dtype, dtype]
    assert result.dtype == torch.float32
    full = crop_tta(network.double(), images.double(), masks)
    torch.testing.assert_close(result.double(), full, atol=1e-2, rtol=0)


# --- state ---------------------------------------------------------------------------------------


def test_the_model_is_left_unchanged(trace_free: Callable[..., Any]) -> None:
    network = quadrants_net().train()
    images = torch.randn(2, 3, 12, 10, dtype=D, requires_grad=True)
    masks = masks_of_boxes([0, 0, 3, 2], [4, 4, 9, 9])
    originals = torch.randn(2, 3, 24, 20, dtype=D)
    with (
        trace_free(network, images, masks, originals),
        pytest.warns(UserWarning, match="train mode"),
    ):
        result = crop_tta(network, images, masks, originals=originals)
    assert not result.requires_grad
    network.eval()
    network.add_module("broken", RaisingLayer(at_call=2))
    with (
        trace_free(network, images, masks, originals),
        pytest.raises(RuntimeError, match="in the middle"),
    ):
        crop_tta(network, images, masks, originals=originals)


def test_a_model_that_works_in_place_leaves_the_images() -> None:
    images, masks = torch.rand(2, 3, 12, 10), masks_of_boxes([0, 0, 3, 2], [0, 0, 10, 12])
    before = images.clone()
    changed = crop_tta(lambda x: x.mul_(2).mean((2, 3)), images, masks, score="logit")
    assert torch.equal(images, before)
    torch.testing.assert_close(changed, crop_tta(channel_means, images, masks, score="logit") * 2)
    with torch.inference_mode():
        inside = crop_tta(channel_means, images, masks, score="logit")
    torch.testing.assert_close(inside * 2, changed)


# --- wrong arguments -----------------------------------------------------------------------------


def uncallable(x: Tensor) -> Tensor:
    raise AssertionError("the model was called")


def test_wrong_arguments_raise_before_the_model_runs() -> None:
    images, masks = torch.rand(2, 3, 12, 10), masks_of_boxes([0, 0, 3, 2], [4, 4, 9, 9])

    def refused(message: str, error: type[Exception] = ValueError, **changed: Any) -> None:
        arguments: dict[str, Any] = {"images": images, "masks": masks, **changed}
        with pytest.raises(error, match=message):
            crop_tta(uncallable, **arguments)

    refused("`images` must be tensors of floats", TypeError, images=(images * 255).byte())
    refused("`images` must be tensors of floats", TypeError, images=images.numpy())
    refused(r"`images` must be \(N, C, H, W\)", images=images[0])
    refused(r"`images` must be \(N, C, H, W\)", images=images[:0], masks=masks[:0])
    refused("`masks` must be a tensor", TypeError, masks=masks.numpy())
    refused("`masks` must be 2, one for each image", masks=masks[:1])
    refused("`masks` has values that are not finite", masks=masks * torch.inf)
    refused(r"`originals` must be 2 tensors \(3, H', W'\)", originals=images[:1])
    refused(r"`originals` must be 2 tensors \(3, H', W'\)", originals=images[:, :1])
    refused(r"`originals` must be 2 tensors \(3, H', W'\)", originals=[images[:1], images[:1]])
    refused("`originals` must be tensors of floats", TypeError, originals=images.byte())
    refused("`originals` must be tensors of floats", TypeError, originals=[images[0], "a.png"])
    refused("`views` are parts of `originals`", views=torch.zeros(2, 4))
    view = torch.tensor([[0.0, 0, 5, 5]] * 2)
    refused(r"`views` must be a tensor \(2, 4\)", originals=images, views=view[0])
    refused(r"`views` must be a tensor \(2, 4\)", originals=images, views=view.tolist())
    for wrong in ([5, 0, 5, 5], [0, 6, 5, 5], [0, 0, torch.nan, 5], [10, 0, 15, 5], [-5, 0, 0, 5]):
        views = torch.stack((view[0], torch.tensor(wrong)))
        refused("`views` must be .* of the original", originals=images, views=views)
    refused("`score` must be one of", score="logits")
    refused("`size` must be", size=5.0)
    refused("`size` must be", size=(5, 0))
    refused("`size` must be", size=(5.0, 5))
    refused("`internal_batch_size` must be an integer", internal_batch_size=0)


def test_unusable_outputs_raise() -> None:
    images, masks = torch.rand(2, 3, 12, 10), masks_of_boxes([0, 0, 3, 2], [4, 4, 9, 9])
    for model in (lambda x: x, lambda x: x.mean(), lambda x: channel_means(x)[:1]):
        with pytest.raises(
            ValueError, match=r"`model` must give .* each of 2 (images|examples), got \("
        ):
            crop_tta(model, images, masks)
    for model in (lambda x: {"logits": channel_means(x)}, lambda x: channel_means(x).argmax(1)):
        with pytest.raises(TypeError, match="`model` must give a tensor of floats, got"):
            crop_tta(model, images, masks)
    for score in (lambda p: p.mean(), lambda p: (p,), lambda p: p[0]):
        with pytest.raises(ValueError, match="`score` must return"):
            crop_tta(channel_means, images, masks, score=score)
    with pytest.raises(ValueError, match="`model` gives predictions that are not finite"):
        crop_tta(lambda x: channel_means(x) / 0, images, masks)
    for name in ("images", "originals"):
        broken = images.clone()
        broken[1, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=f"`{name}` has values that are not finite"):
            crop_tta(channel_means, **{"images": images, "masks": masks, name: broken})


@pytest.mark.gpu
def test_a_gpu_gives_the_values_of_a_cpu() -> None:
    network, images = quadrants_net(), torch.randn(2, 3, 12, 10, dtype=D)
    masks, originals = (
        masks_of_boxes([0, 0, 3, 2], [4, 4, 9, 9]),
        torch.randn(2, 3, 48, 40, dtype=D),
    )
    expected = crop_tta(network, images, masks, originals=originals)
    for source in (originals, originals.cuda()):
        result = crop_tta(network.cuda(), images.cuda(), masks.cuda(), originals=source)
        assert result.is_cuda
        torch.testing.assert_close(result.cpu(), expected)
