"""FIDO against its optimisation written out by hand, its signs, and Captum's contract."""

import inspect
import random
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import NoiseTunnel
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from captum_ext.attr import FIDO, AugmentedSR, FIDOMasks, SESSWrapper
from captum_ext.attr._masked_scores import SDR, SSR, regulariser
from captum_ext.infill import Infill
from tests.networks import PatchMeans, SmallNet, small_net

TraceFree = Callable[..., AbstractContextManager[None]]
FEW: dict[str, Any] = {"n_steps": 3, "n_masks": 2}


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def images(n: int = 2, height: int = 12, width: int = 12, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, height, width, generator=seeded(5))


def fido(x: Tensor, net: Any = None, seed: int = 0, **arguments: Any) -> Any:
    method = FIDO(small_net() if net is None else net)
    return method.attribute(x, **{"target": 1, **FEW, "generator": seeded(seed), **arguments})


# --- values --------------------------------------------------------------------------------------


def by_hand(x: Tensor, net: nn.Module, target: int, fill: Tensor, **o: Any) -> dict[str, Tensor]:
    """One image, mask by mask, with the derivatives and AdamW written out."""
    height, width = x.shape[1:]
    logits = {name: torch.zeros(height, width, dtype=x.dtype) for name in ("ssr", "sdr")}
    moments = {name: [torch.zeros_like(v), torch.zeros_like(v)] for name, v in logits.items()}
    generator = seeded()
    for step in range(o["n_steps"]):
        gradients = {name: torch.zeros_like(v) for name, v in logits.items()}
        for _ in range(o["n_masks"]):
            uniform = torch.rand(2, height, width, generator=generator, dtype=x.dtype)
            for name, u in zip(("ssr", "sdr"), uniform, strict=True):
                z = torch.sigmoid((logits[name] + torch.log(u / (1 - u))) / o["temperature"])
                masked = ((1 - z) * x + z * fill)[None].requires_grad_()
                output = net(masked)
                p = output.softmax(1)[0, target]
                score = torch.log(p / (1 - p)) * (-1 if name == "ssr" else 1)
                (slope,) = torch.autograd.grad(score, masked)
                by_z = (slope[0] * (fill - x)).sum(0)
                gradients[name] += by_z * z * (1 - z) / o["temperature"] / o["n_masks"]
        for name in logits:
            theta = torch.sigmoid(logits[name])
            sizes = torch.full_like(theta, -o["l1"] if name == "ssr" else o["l1"])
            edges = torch.zeros_like(theta)
            for i in range(height):
                for j in range(width):
                    for a, b in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                        if 0 <= a < height and 0 <= b < width:
                            d = theta[i, j] - theta[a, b]
                            edges[i, j] += torch.sign(d) if o["tv_norm"] == "l1" else 2 * d
            weight = min(1, step / o["warmup"]) if o["warmup"] else 1
            by_theta = weight * (sizes + o["tv"] * edges)
            g = gradients[name] + by_theta * theta * (1 - theta)
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            rate = o["lr"] / (1 - 0.9 ** (step + 1))
            logits[name] -= rate * m / ((v / (1 - 0.999 ** (step + 1))).sqrt() + o["eps"])
    return logits


@pytest.mark.parametrize("dropout", ["scd", "cd"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "tv_norm": "l1", "warmup": 2},
        {"temperature": 0.1, "tv_norm": "l2", "warmup": 0, "lr": 3.0, "eps": 0.01},
    ],
    ids=["t=1", "t=0.1"],
)
def test_masks_equal_the_optimisation_written_out(dropout: str, options: dict[str, Any]) -> None:
    options = {
        "n_steps": 4, "n_masks": 3, "l1": 0.02, "tv": 0.03, "lr": 10.0, "eps": 0.1, **options
    }  # fmt: skip
    net, x = small_net(dtype=torch.float64), images(2, 5, 7).double()
    fill = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    result, masks = fido(
        x, net, target=[1, 3], baselines=fill, dropout=dropout, return_masks=True, **options
    )
    for i, target in enumerate((1, 3)):
        expected = by_hand(x[i], net, target, fill[i], **options)
        for row, name in ((SSR, "ssr"), (SDR, "sdr")):
            torch.testing.assert_close(masks.logits[i, row], expected[name], rtol=1e-7, atol=1e-9)
        ssr, sdr = torch.sigmoid(-expected["ssr"]), torch.sigmoid(expected["sdr"])
        torch.testing.assert_close(masks.ssr[i, 0], ssr, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(masks.sdr[i, 0], sdr, rtol=1e-6, atol=1e-9)
        joint = (ssr * sdr).sqrt()
        torch.testing.assert_close(result[i], joint.expand(3, 5, 7), rtol=1e-6, atol=1e-9)


def test_the_regularisers_are_sums() -> None:
    """By hand, for theta of two rows by three columns, of SSR and of SDR."""
    theta = torch.tensor([[[[0.1, 0.5, 0.9], [0.2, 0.2, 0.4]], [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]]])
    size = (6 - 2.3) + 2.5
    absolute = (0.1 + 0.3 + 0.5 + 0.4 + 0.4 + 0 + 0.2) + (1 + 0 + 0.5 + 1 + 0.5 + 0 + 1)
    squared = (0.01 + 0.09 + 0.25 + 0.16 + 0.16 + 0 + 0.04) + (1 + 0 + 0.25 + 1 + 0.25 + 0 + 1)
    for difference, tv in ((torch.abs, absolute), (torch.square, squared)):
        result = regulariser(theta, (SSR, SDR), 0.3, 0.7, difference)
        assert result.tolist() == pytest.approx([0.3 * size + 0.7 * tv])
    twice = regulariser(theta.repeat(2, 1, 1, 1), (SSR, SDR), 0.3, 0.7, torch.abs)
    assert torch.equal(twice[0], twice[1]), "of each image"
    assert regulariser(theta[:, :1], (SSR,), 1.0, 0.0, torch.abs).item() == pytest.approx(3.7)
    assert regulariser(theta[:, 1:], (SDR,), 1.0, 0.0, torch.abs).item() == pytest.approx(2.5)


def test_the_first_step_has_no_regulariser() -> None:
    """The warm-up starts at 0, where the weights of the regulariser have no effect."""
    masks = [fido(images(), n_steps=1, l1=l1, tv=l1) for l1 in (0.0, 5.0)]
    assert torch.equal(*masks)
    assert not torch.equal(*[fido(images(), n_steps=2, l1=l1, tv=l1) for l1 in (0.0, 5.0)])
    assert not torch.equal(*[fido(images(), n_steps=1, l1=l1, warmup=0) for l1 in (0.0, 5.0)])


def test_the_loss_of_the_first_step() -> None:
    """All logits 0: theta is 1/2 everywhere, so the penalty is l1 / 2 for each pixel and region."""
    net, x = small_net(dtype=torch.float64), images(1, 6, 6).double()
    options = {"baselines": 0.0, "n_steps": 1, "n_masks": 3, "l1": 0.02}
    generator, expected = seeded(), 0.02 * 36 / 2 * 2
    for _ in range(3):
        uniform = torch.rand(2, 6, 6, generator=generator, dtype=x.dtype)
        for sign, u in zip((-1, 1), uniform, strict=True):
            p = net(x * (1 - u))[0].softmax(0)[1]  # z = sigmoid(log(u / (1 - u))) = u
            expected += sign * torch.log(p / (1 - p)).item() / 3
    _, masks = fido(x, net, warmup=0, return_masks=True, **options)
    assert masks.losses.tolist() == [[pytest.approx(expected, rel=1e-6)]]
    _, masks = fido(x, net, return_masks=True, **options)
    assert masks.losses.tolist() == [[pytest.approx(expected - 0.02 * 36, rel=1e-6)]], "ramp"


# --- signs ---------------------------------------------------------------------------------------


def images_with_patches() -> Tensor:
    x = 0.1 * torch.rand(2, 3, 32, 32, generator=seeded(1))
    x[0, :, 8:16, 8:16] += 1
    x[1, :, 20:28, 18:26] += 1
    return x


@pytest.mark.parametrize("dropout", ["scd", "cd"])
def test_both_regions_cover_the_object(dropout: str) -> None:
    x, net = images_with_patches(), PatchMeans()
    _, masks = fido(
        x, net, target=[0, 1], baselines="zeros", n_steps=60, n_masks=4, dropout=dropout,
        return_masks=True,
    )  # fmt: skip
    for i, (rows, columns) in enumerate(PatchMeans.patches):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[rows, columns] = True
        for name in ("ssr", "sdr", "joint"):
            result = getattr(masks, name)[i, 0]
            assert result[inside].min() > 0.6, name
            assert result[~inside].mean() < 0.5, name
            assert result[~inside].max() < result[inside].min(), name
        both = torch.stack([masks.ssr[i, 0], masks.sdr[i, 0]])
        assert (masks.joint[i, 0] >= both.amin(0) - 1e-6).all()
        assert (masks.joint[i, 0] <= both.amax(0) + 1e-6).all()
    kept, dropped = (masks.ssr > 0.5).float() * x, (masks.sdr <= 0.5).float() * x
    assert net(kept).argmax(1).tolist() == [0, 1], "SSR's region suffices"
    assert (net(dropped).argmax(1) != torch.tensor([0, 1])).all(), "SDR's region is needed"


def test_another_target_moves_the_mask() -> None:
    x = images_with_patches().amax(0, keepdim=True)  # both patches
    options: Any = {"baselines": 0, "n_steps": 60, "n_masks": 4}
    maps = [fido(x, PatchMeans(), target=k, **options)[0, 0] for k in (0, 1)]
    for k, (rows, columns) in enumerate(PatchMeans.patches):
        assert maps[k][rows, columns].mean() > 0.6
        assert maps[1 - k][rows, columns].mean() < 0.2, "the other class's patch speaks against it"


def test_maps_fall_below_a_half_where_nothing_matters() -> None:
    """A blurred constant image is unchanged, so that only the regulariser acts."""
    x = torch.full((1, 3, 12, 12), 0.7)
    _, masks = fido(x, n_steps=20, return_masks=True)
    for result in (masks.ssr, masks.sdr, masks.joint):
        assert ((result > 0.3) & (result < 0.5)).all()
        assert result.std() < 1e-3
    losses = masks.losses[:, 0]
    assert (losses[6:] < losses[5:-1]).all(), "size is all there is to gain"


def test_larger_weights_make_smaller_and_smoother_masks() -> None:
    """The learning rate is small enough for differences, whose slopes are constant, to settle."""
    x, net = images_with_patches()[:1], PatchMeans()
    common = {"target": 0, "baselines": 0, "n_steps": 100, "n_masks": 4, "lr": 1.0}

    def of(**options: Any) -> Tensor:
        return fido(x, net, **common, **options)[:, :1]

    def squares(m: Tensor) -> float:
        return (m.diff(dim=2).square().sum() + m.diff(dim=3).square().sum()).item()

    sizes = [of(l1=l1).sum().item() for l1 in (0.0, 1e-3, 1e-2)]
    assert sizes[0] > sizes[1] > sizes[2]
    for norm in ("l1", "l2"):
        edges = [squares(of(tv=tv, tv_norm=norm)) for tv in (0.0, 1e-2, 1e-1)]
        assert edges[0] > edges[1] > edges[2]


# --- equivalent runs -----------------------------------------------------------------------------


def test_a_single_objective_has_the_mask_of_joint() -> None:
    x = images()
    _, both = fido(x, return_masks=True)
    for row, name in ((SSR, "ssr"), (SDR, "sdr")):
        alone, masks = fido(x, objective=name, return_masks=True)
        torch.testing.assert_close(alone[:, :1], getattr(both, name))
        torch.testing.assert_close(masks.logits[:, 0], both.logits[:, row])
        others = {"ssr", "sdr", "joint"} - {name}
        assert all(getattr(masks, other) is None for other in others)


@pytest.mark.parametrize("baselines", [None, "mean", "local", "noise", 0.3, lambda x, keep: -x])
@pytest.mark.parametrize("mask_size", [None, (5, 4)])
def test_a_batch_equals_its_images(baselines: Any, mask_size: Any) -> None:
    x, targets = images(3).double(), [1, 0, 3]
    net = small_net(dtype=torch.float64)
    options = {"baselines": baselines, "mask_size": mask_size, "n_steps": 5}
    batch = fido(x, net, target=targets, **options)
    for i, target in enumerate(targets):
        alone = fido(x[i : i + 1], net, target=target, **options)
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-9, atol=1e-9)
    order = [2, 0, 1]
    permuted = fido(x[order], net, target=torch.tensor(targets)[order], **options)
    torch.testing.assert_close(permuted, batch[order], rtol=1e-9, atol=1e-9)


def test_an_infill_tensor_follows_its_image() -> None:
    x, b = images(3).double(), torch.randn(3, 3, 12, 12).double()
    net = small_net(dtype=torch.float64)
    batch = fido(x, net, baselines=b)
    alone = [fido(x[i : i + 1], net, baselines=b[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(batch, torch.cat(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
def test_chunks_change_nothing_and_bound_the_batch(size: int) -> None:
    x, net = images(3).double(), small_net(dtype=torch.float64)
    unchunked = fido(x, net, target=[0, 1, 2], n_masks=3, internal_batch_size=1000)
    seen: list[int] = []
    hook = net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    chunked = fido(x, net, target=[0, 1, 2], n_masks=3, internal_batch_size=size)
    hook.remove()
    torch.testing.assert_close(chunked, unchunked, rtol=1e-9, atol=1e-9)
    assert max(seen) <= size
    assert max(seen) - min(seen) <= max(3, size // 2), "passes are about equal"
    assert sum(seen) == 3 * 3 * 2 * 3  # steps, images, objectives, masks


@pytest.mark.parametrize("size", [4, (4, 4), (3, 8), (12, 12)])
def test_mask_size_sets_the_size_of_the_logits(size: Any) -> None:
    pair = (size, size) if isinstance(size, int) else size
    result, masks = fido(images(), mask_size=size, return_masks=True)
    assert masks.logits.shape == (2, 2, *pair)
    up = F.interpolate(torch.sigmoid(-masks.logits[:, :1]), (12, 12), mode="bilinear")
    torch.testing.assert_close(masks.ssr, up)
    torch.testing.assert_close(result[:, :1], (masks.ssr * masks.sdr).sqrt())
    if pair == (12, 12):
        assert torch.equal(result, fido(images()))


@pytest.mark.parametrize("channels", [1, 4, 6])
@pytest.mark.parametrize("size", [(9, 14), (7, 5), (1, 1), (2, 3)])
def test_any_channels_and_sizes_work(channels: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 5, 3, padding=1), nn.ReLU(), nn.Flatten(2))
    x = images(2, *size, channels=channels)
    result = fido(x, lambda x: net(x).mean(2))
    assert result.shape == x.shape
    assert ((result >= 0) & (result <= 1)).all()


def test_a_callback_sees_every_step() -> None:
    seen: list[tuple[int, FIDOMasks]] = []
    x = images()
    result, masks = fido(
        x, return_masks=True, callback=lambda step, masks: seen.append((step, masks))
    )
    assert [step for step, _ in seen] == [1, 2, 3]
    for steps, at in seen:
        assert torch.equal(at.joint[:, 0], fido(x, n_steps=steps)[:, 0])
        assert torch.equal(at.losses, masks.losses[:steps])
    assert torch.equal(seen[-1][1].logits, masks.logits)
    assert torch.equal(result[:, :1], masks.joint)


def test_named_settings_are_complete() -> None:
    """`attribute` accepts each, and the values and defaults are those of the sources."""
    x = images()
    for settings in (FIDO.RELEASED, FIDO.PAPER):
        assert torch.isfinite(fido(x, **{**settings, **FEW})).all()
    common = {"n_steps": 100, "n_masks": 8, "dropout": "scd", "tv": 1e-2, "lr": 10.0, "eps": 0.1}
    assert dict(FIDO.PAPER) == common | {
        "temperature": 0.1, "l1": 1e-3, "tv_norm": "l2", "warmup": 0
    }  # fmt: skip
    released = dict(FIDO.RELEASED)
    blurred = released.pop("baselines")
    assert released == common | {"temperature": 1.0, "l1": 5e-4, "tv_norm": "l1", "warmup": 5}
    parameters = inspect.signature(FIDO.attribute).parameters
    defaults = {name: parameters[name].default for name in FIDO.PAPER}
    assert defaults == common | {"temperature": 1.0, "l1": 5e-4, "tv_norm": "l1", "warmup": 5}
    point = torch.zeros(1, 1, 151, 151)
    point[..., 75, 75] = 1
    row = Infill(point, blurred)(slice(None), point)[0, 0, 0].sum(0)
    at = torch.arange(151) - 75.0
    kernel = torch.exp(-(at**2) / (2 * 11.6**2)) * (at.abs() <= 37)
    torch.testing.assert_close(row, kernel / kernel.sum(), rtol=1e-4, atol=1e-6)


# --- Captum's contract ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [2, torch.tensor(2), torch.tensor([2, 2]), [2, 2], (2,), [(2,), (2,)], np.int64(2).item()],
)
def test_target_forms_are_equivalent(target: Any) -> None:
    x = images()
    assert torch.equal(fido(x, target=target), fido(x, target=2))
    assert not torch.equal(fido(x, target=2), fido(x, target=0))


def test_dense_outputs_take_targets_with_positions() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3, padding=1)
    result = fido(images(), net, target=[(1, 2, 3), (0, 9, 9)])
    alone = fido(images()[1:], net, target=(0, 9, 9))
    torch.testing.assert_close(result[1:], alone)


def test_models_with_one_logit_have_two_classes() -> None:
    net = small_net()
    x = images()
    binary = fido(x, lambda x: net(x)[:, 1] - net(x)[:, 0], target=None)
    torch.testing.assert_close(binary, fido(x, lambda x: net(x)[:, :2], target=1))
    other = fido(x, lambda x: (net(x)[:, 1] - net(x)[:, 0])[:, None], target=0)
    torch.testing.assert_close(other, fido(x, lambda x: net(x)[:, :2], target=0))
    with pytest.raises(AssertionError, match="Target not provided"):
        fido(x, target=None)


@pytest.mark.parametrize("target", [4, [0, 4], torch.tensor([0, 4])])
def test_classes_out_of_range_raise(target: Any) -> None:
    with pytest.raises(AssertionError, match=r"`target` 4 is out of range .* from 0 to 3"):
        fido(images(), target=target)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 100])
@pytest.mark.parametrize(
    "target",
    [
        [1],
        [0, 1],
        [0, 1] * 4,
        [(0,), (1,)],
        torch.tensor([0, 1]),
        torch.tensor([[0], [1], [2], [3]]),
    ],
)
def test_a_wrong_number_of_targets_raises(target: Any, size: int) -> None:
    """That also holds if a chunk of the batch has as many images."""
    with pytest.raises(
        AssertionError, match=r"`target` (has \d entries|must be one number|is a tensor of)"
    ):
        fido(images(4), target=target, internal_batch_size=size)


def test_probabilities_and_log_probabilities_give_the_same() -> None:
    net, x = small_net(), images()
    expected = fido(x, net)
    softmax = FIDO(lambda x: net(x).softmax(1), outputs="probabilities")
    result = softmax.attribute(x, target=1, generator=seeded(), **FEW)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fido(x, lambda x: net(x).log_softmax(1)), expected)
    with pytest.warns(UserWarning, match="outputs='probabilities'") as caught:
        FIDO(lambda x: net(x).softmax(1)).attribute(x, target=1, **FEW)
    assert caught[0].filename == __file__
    nearly = FIDO(lambda x: net(x).softmax(1) * (1 + 1e-6), outputs="probabilities")
    again = nearly.attribute(x, target=1, generator=seeded(), **FEW)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"`outputs` is 'probabilities'"):
        FIDO(net, outputs="probabilities").attribute(x, target=1, **FEW)


def test_a_tuple_gives_a_tuple_without_views() -> None:
    x = images()
    result = fido((x,))
    assert isinstance(result, tuple)
    assert torch.equal(result[0], fido(x))
    assert result[0].is_contiguous()
    assert not result[0].requires_grad
    again, masks = fido((x,), return_masks=True)
    assert torch.equal(again[0], result[0])
    assert not any(getattr(masks, name).requires_grad for name in vars(masks))
    assert FIDO(small_net()).multiplies_by_inputs is False
    assert FIDO(small_net()).has_convergence_delta() is False


def test_additional_arguments_follow_their_image() -> None:
    class Scaled(SmallNet):
        def forward(self, x: Tensor, scale: Tensor, shift: float, *, factor: int = 1) -> Tensor:
            return super().forward(x * scale[:, None, None, None] + shift)

    torch.manual_seed(0)
    net = Scaled().double().eval()
    nn.init.normal_(net.fc.weight)
    x, scale = images(3).double(), torch.tensor([1.0, 3.0, -2.0]).double()
    batch = fido(x, net, additional_forward_args=(scale, 0.5), internal_batch_size=2)
    for i in range(3):
        extra = (scale[i : i + 1], 0.5)
        alone = fido(x[i : i + 1], net, additional_forward_args=extra)
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def learned_logits(net: Any, x: Tensor) -> Tensor:
    """Masks from scores alone, because total variation amplifies rounding."""
    options = {"n_steps": 4, "n_masks": 32, "l1": 0.0, "tv": 0.0, "return_masks": True}
    logits: Tensor = fido(x, net, **options)[1].logits
    return logits


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_results_have_the_inputs_dtype(dtype: torch.dtype) -> None:
    x = images(1, 64, 64)
    result, masks = fido(x.to(dtype), small_net(dtype=dtype), return_masks=True)
    assert result.dtype == dtype
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    assert {masks.ssr.dtype, masks.logits.dtype, masks.losses.dtype} == {inner}
    if dtype != torch.float64:
        rounded = x.to(dtype)
        half = learned_logits(small_net(dtype=dtype), rounded)
        assert relative_error(half, learned_logits(small_net(), rounded.float())) < 0.05


def test_large_gradients_do_not_overflow_in_fp16() -> None:
    """Gradients are scaled by 1024 to keep small ones; these are infinite with the scale."""
    x = images(1).half()
    result = learned_logits(lambda x: 1000 * x.mean((2, 3)), x)
    assert relative_error(result, learned_logits(lambda x: 1000 * x.mean((2, 3)), x.float())) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_affects_the_model_alone(dtype: torch.dtype) -> None:
    x, net = images(1, 64, 64), small_net()
    seen: list[torch.dtype] = []
    hook = net.fc.register_forward_hook(lambda m, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype):
        result = learned_logits(net, x)
    hook.remove()
    assert set(seen) == {dtype}
    assert result.dtype == torch.float32
    assert relative_error(result, learned_logits(net, x)) < 0.05


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [False, True])
def test_grad_modes_and_frozen_models_change_nothing(
    mode: Any, frozen: bool, trace_free: TraceFree
) -> None:
    net, x = small_net().requires_grad_(not frozen), images()
    expected = fido(x, net)
    with mode(), trace_free(net, x):
        assert torch.equal(fido(x, net), expected)
    assert torch.equal(fido(x.clone().requires_grad_(), net), expected)


@pytest.mark.parametrize("baselines", ["tensor", "mean", "local", "noise"])
def test_tensors_of_inference_mode_work(baselines: str) -> None:
    """Images, infill and arguments (also scalars) are tensors that autograd cannot save."""
    x, b = images(), torch.randn(2, 3, 12, 12)
    shift, scale = torch.tensor(0.25), torch.tensor([1.0, 2.0])

    def run(x: Tensor, b: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        net = small_net()

        def forward(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return net(x * shift) * scale[:, None]

        fill = b if baselines == "tensor" else baselines
        result: Tensor = fido(x, forward, baselines=fill, additional_forward_args=(shift, scale))
        return result

    expected = run(x, b, shift, scale)
    with torch.inference_mode():
        made = [t + 0 for t in (x, b, shift, scale)]
    assert torch.equal(run(*made), expected)


class InterruptedNet(SmallNet):
    """A network that raises `error`, if any, after three calls."""

    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.error is not None and self.calls > 3:
            raise self.error
        return y


@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("train", [False, True])
def test_the_model_is_left_unchanged(
    error: BaseException | None, train: bool, trace_free: TraceFree
) -> None:
    torch.manual_seed(0)
    net = InterruptedNet().train(train)
    net.conv1.eval()
    net.error = error
    for p in list(net.parameters())[::2]:
        p.grad = torch.randn_like(p)
    net.fc.bias.requires_grad_(False)
    x = images().requires_grad_()
    x.grad = torch.randn_like(x)
    with warnings.catch_warnings(), trace_free(net, x):
        warnings.simplefilter("ignore")
        if error is None:
            fido(x, net)
        else:
            with pytest.raises(type(error)):
                fido(x, net, n_steps=9)


def test_an_interrupt_in_the_callback_leaves_the_model_unchanged(trace_free: TraceFree) -> None:
    def interrupt(step: int, masks: FIDOMasks) -> None:
        raise KeyboardInterrupt

    net, x = small_net().train(), images()
    warned, stopped = (
        pytest.warns(UserWarning, match="train mode"),
        pytest.raises(KeyboardInterrupt),
    )
    with warned, trace_free(net, x), stopped:
        fido(x, net, callback=interrupt)


def test_train_mode_is_kept_with_one_warning(trace_free: TraceFree) -> None:
    """Batch statistics are used, with a warning, and the running ones are restored."""
    net = small_net().train()
    for forward in (net, lambda x: net(x)):
        with pytest.warns(UserWarning, match="train mode") as caught, trace_free(net):
            fido(images(), forward)
        assert len(caught) == 1
    with pytest.warns(UserWarning, match="train mode") as caught:
        SESSWrapper(FIDO(net), scales=[12], window=12).attribute(images(), target=1, **FEW)
    assert caught[0].filename == __file__, "through wrappers, too"


def test_a_model_that_works_in_place_leaves_the_inputs() -> None:
    class InPlace(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.1))

    torch.manual_seed(0)
    net = InPlace().eval()
    x = images()
    before = x.clone()
    result = fido(x, net)
    assert torch.equal(x, before)
    assert torch.equal(result, fido(x, lambda y: SmallNet.forward(net, y - 0.1)))


@pytest.mark.parametrize("baselines", [None, "noise"])
def test_random_numbers_come_from_the_generator(baselines: Any) -> None:
    x = images()

    def states() -> list[Any]:
        numpy = np.random.get_state()
        return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]]

    net = small_net()
    before = states()
    first = fido(x, net, seed=3, baselines=baselines)
    assert states() == before
    assert torch.equal(fido(x, net, seed=3, baselines=baselines), first)
    assert not torch.equal(fido(x, net, seed=4, baselines=baselines), first)
    torch.manual_seed(3)
    assert torch.equal(fido(x, net, generator=None, baselines=baselines), first)
    assert states() != before


def test_eight_threads_share_a_model(trace_free: TraceFree) -> None:
    """All threads run at the same time, and the network counts its calls."""
    net, x = small_net(), images()
    expected = [fido(x, net, target=k % 4) for k in range(8)]
    result: list[Tensor | None] = [None] * 8
    meeting = threading.Barrier(8)

    def wait(step: int, masks: FIDOMasks) -> None:
        if step == 2:
            meeting.wait(60)

    def run(k: int) -> None:
        result[k] = fido(x, net, target=k % 4, callback=wait)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    with trace_free(net, x):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for attributions, same in zip(result, expected, strict=True):
        assert attributions is not None
        torch.testing.assert_close(attributions, same)


def test_noise_tunnel_and_wrappers_work() -> None:
    x, net = images(), small_net()
    few = {**FEW, "target": [1, 2]}
    bare = fido(x, net, **few)
    noisy = NoiseTunnel(FIDO(net)).attribute(x, nt_samples=2, stdevs=0.0, generator=seeded(), **few)
    torch.testing.assert_close(noisy, bare)
    same = SESSWrapper(FIDO(net), scales=[12], window=12, smooth=False)
    in_one_window = same.attribute(x[:1], generator=seeded(), **{**few, "target": 1})
    low, high = bare[:1].amin(), bare[:1].amax()
    torch.testing.assert_close(in_one_window, (bare[:1] - low) / (high - low), rtol=1e-4, atol=1e-4)
    for wrapper in (same, AugmentedSR(FIDO(net), n_augmentations=2)):
        calls: list[int] = []
        hook = net.register_forward_pre_hook(
            lambda m, args, calls=calls: calls.append(len(args[0]))
        )
        result = wrapper.attribute(x, baselines="mean", generator=seeded(), **few)
        hook.remove()
        assert result.shape == x.shape
        assert sum(calls) >= 2 * 3 * 2 * 2, "n_steps and n_masks go through"
    with pytest.raises(ValueError, match="return_masks"):
        same.attribute(x, return_masks=True, **few)


@pytest.mark.parametrize("height", [1e4, -1e4, 6e4])
@pytest.mark.parametrize("t", [0.1, 1.0])
@pytest.mark.parametrize("dropout", ["cd", "scd"])
def test_extreme_logits_stay_finite(height: float, t: float, dropout: str) -> None:
    net = small_net()
    scale = torch.tensor([0.0, height, 0.0, 0.0])
    _, masks = fido(
        images(), lambda x: net(x) * 100 + scale, temperature=t, dropout=dropout, n_steps=10,
        return_masks=True,
    )  # fmt: skip
    for result in (masks.ssr, masks.sdr, masks.joint, masks.losses):
        assert torch.isfinite(result).all()


def test_dataparallel_works_without_a_gpu() -> None:
    net, x = small_net(), images()
    torch.testing.assert_close(fido(x, nn.DataParallel(net)), fido(x, net))


def test_arguments_that_are_not_per_image_are_handed_on() -> None:
    net, x = small_net(), images(3)
    seen: list[Any] = []

    def forward(x: Tensor, *extra: Any) -> Tensor:
        seen.append(extra)
        return net(x)

    numbers, table, scalar = [0.1, 0.2, 0.3], torch.rand(5, 2), torch.tensor(2.0)
    fido(x, forward, additional_forward_args=(numbers, table, scalar, None), internal_batch_size=2)
    for extra in seen:
        assert extra[0] is numbers
        assert extra[1] is table
        assert extra[2] is scalar
        assert extra[3] is None


def test_channels_last_reaches_the_model() -> None:
    net, x = small_net(), images()
    seen: list[bool] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return net(x)

    result = fido(x.to(memory_format=torch.channels_last), forward)
    assert all(seen)
    torch.testing.assert_close(result, fido(x, net), rtol=1e-4, atol=1e-5)


def test_results_share_no_memory_with_the_optimisation() -> None:
    """Images of one channel get no view of the mask, and a callback may write to its masks."""
    net, x = small_net(), images(channels=1)
    expected, _ = fido(x, lambda x: net(x.expand(-1, 3, -1, -1)), return_masks=True)

    def scribble(step: int, masks: FIDOMasks) -> None:
        for value in vars(masks).values():
            value.zero_()

    result, masks = fido(
        x, lambda x: net(x.expand(-1, 3, -1, -1)), return_masks=True, callback=scribble
    )
    assert torch.equal(result, expected)
    assert (masks.losses != 0).any()
    masks.joint.zero_()
    assert torch.equal(result, expected)


def test_progress_is_shown_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    net, x = small_net(), images()
    result = fido(x, net, show_progress=True)
    assert "FIDO attribution" in capsys.readouterr().err
    assert torch.equal(result, fido(x, net))


# --- errors --------------------------------------------------------------------------------------


class NanFromSecondCall:
    """A network with NaN outputs from the second call on."""

    calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.mean((2, 3)) * (1.0 if self.calls == 1 else float("nan"))


def uncallable(x: Tensor) -> Tensor:
    raise AssertionError("the model was called")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 8, 8), float("nan")), "not finite"),
        (torch.full((1, 3, 8, 8), float("inf")), "not finite"),
        ((torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)), "tuple of 2"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
        (np.zeros((1, 3, 8, 8)), "ndarray"),
    ],
)
def test_wrong_inputs_raise(inputs: Any, message: str) -> None:
    expected = TypeError if message == "ndarray" else ValueError
    with pytest.raises(expected, match=f"`inputs`.*{message}"):
        FIDO(uncallable).attribute(inputs, target=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("objective", "both"),
        ("dropout", "bernoulli"),
        ("tv_norm", "l3"),
        ("n_steps", 0),
        ("n_steps", 2.5),
        ("n_masks", 0),
        ("n_masks", True),
        ("internal_batch_size", 0),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("lr", -1.0),
        ("lr", "10"),
        ("eps", 0),
        ("l1", -1e-3),
        ("tv", float("inf")),
        ("warmup", -1),
        ("mask_size", 13),
        ("mask_size", (12, 13)),
        ("mask_size", 0),
        ("mask_size", (4, 4, 4)),
        ("mask_size", 4.0),
        ("baselines", "blurred"),
        ("baselines", torch.zeros(3, 5, 5)),
    ],
)
def test_wrong_options_raise(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        FIDO(uncallable).attribute(images(), target=0, **{name: value})


def test_wrong_generator_outputs_and_callback_raise() -> None:
    with pytest.raises(TypeError, match="`generator`"):
        FIDO(uncallable).attribute(images(), target=0, generator=3)
    with pytest.raises(ValueError, match="`outputs`"):
        FIDO(uncallable, outputs="softmax")
    with pytest.raises(TypeError, match="`callback`"):
        FIDO(uncallable).attribute(images(), target=0, callback=3)


@pytest.mark.parametrize(
    ("forward", "error", "message"),
    [
        (lambda x: x.mean(), ValueError, "each of 8 examples"),
        (lambda x: x[:1].flatten(1), ValueError, "each of 8 examples"),
        (lambda x: (x.mean((2, 3)),), TypeError, "tuple"),
        (lambda x: x.mean((2, 3)).argmax(1), TypeError, "int64"),
        (lambda x: x.detach().mean((2, 3)), ValueError, "no gradient"),
        (lambda x: x.mean((2, 3)) * float("nan"), ValueError, "not finite"),
        (lambda x: x.mean((2, 3)) * float("inf"), ValueError, "not finite"),
        (lambda x: (x.mean((2, 3)) * 0).sqrt(), ValueError, "not finite"),
        (lambda x: x.mean((2, 3)) + torch.tensor([0, -torch.inf, 0]), ValueError, "not finite"),
        (lambda x: small_net()(x.detach()), ValueError, "no gradient"),
        (NanFromSecondCall(), ValueError, "not finite"),
    ],
)
def test_models_without_scores_raise(forward: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"`forward_func`.*{message}"):
        fido(images(), forward)


@pytest.mark.gpu
def test_a_gpu_gives_the_values_of_a_cpu() -> None:
    x, net = images().double(), small_net(dtype=torch.float64)
    fill = torch.randn(2, 3, 12, 12).double()
    device = torch.Generator("cuda").manual_seed(0)
    result = fido(x.cuda(), net.cuda(), baselines=fill.cuda(), generator=device)
    assert result.is_cuda
    state = torch.get_rng_state()
    chunked = fido(
        x.cuda(), net, baselines=fill.cuda(), generator=device.manual_seed(0), internal_batch_size=3
    )
    torch.testing.assert_close(chunked, result, rtol=1e-8, atol=1e-8)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="`generator` must be on the device"):
        fido(x.cuda(), net)


@pytest.mark.gpu
def test_steps_do_not_wait_for_a_gpu() -> None:
    x, net = images().cuda(), small_net().cuda()

    def switch(step: int, masks: FIDOMasks) -> None:
        torch.cuda.set_sync_debug_mode("error" if step < 4 else "default")

    generator = torch.Generator("cuda").manual_seed(0)
    try:
        for baselines in (None, "noise", "local"):
            fido(
                x, net, target=[0, 1], baselines=baselines, n_steps=4, generator=generator,
                callback=switch,
            )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
