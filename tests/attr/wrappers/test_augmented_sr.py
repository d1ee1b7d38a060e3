"""AugmentedSR against the problem it solves, against loops over the copies, and on toys."""

import math
import warnings
from typing import Any

import pytest
import torch
from captum.attr import (
    Attribution,
    Deconvolution,
    DeepLift,
    DeepLiftShap,
    FeatureAblation,
    GradientShap,
    GuidedBackprop,
    GuidedGradCam,
    IntegratedGradients,
    LayerActivation,
    LayerAttribution,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum.log import log_usage
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext.attr import SESSWrapper, UpsampleWrapper
from captum_ext.attr.wrappers.augmented_sr import AugmentedSR
from captum_ext.attr.wrappers.super_resolution import Observation, euclidean, solve
from captum_ext.imaging import warp
from tests.networks import pooled_net, small_net

D = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augmented(base: Attribution, **options: Any) -> AugmentedSR:
    return AugmentedSR(base, **{"n_augmentations": 6, "generator": seeded(), **options})


def cell_means(side: int = 16, *, up: int = 0, left: int = 0) -> LayerActivation:
    """A method whose map is the means of the image's cells, moved up and left by some pixels."""
    eye = nn.Sequential(nn.ZeroPad2d((left, -left, up, -up)), nn.AvgPool2d(side), nn.Flatten())
    return LayerActivation(eye, eye[1])


def matrices(sr: AugmentedSR, size: tuple[int, int]) -> Tensor:
    return euclidean(sr.angles, sr.shifts * torch.tensor([size[1], size[0]]), size)


def blob(size: tuple[int, int], y: float, x: float, sigma: float) -> Tensor:
    rows, columns = (torch.arange(n, dtype=D) for n in size)
    squared = (rows[:, None] - y) ** 2 + (columns - x) ** 2
    return torch.exp(-squared / (2 * sigma**2))[None, None]


def centroid(h: Tensor) -> list[float]:
    weight = h[0, 0].clamp(min=0).double()
    rows, columns = (torch.arange(n, dtype=D) for n in weight.shape)
    total = weight.sum()
    return [
        float((weight.sum(1) * rows).sum() / total),
        float((weight.sum(0) * columns).sum() / total),
    ]


class Spy(Attribution):
    """Returns the pictures as their attributions, and records the arguments of each call."""

    def __init__(self) -> None:
        super().__init__(lambda x: x.flatten(1))
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    @log_usage()
    def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append((inputs.clone(), kwargs))
        return inputs.clone()

    def seen(self, name: str | None = None) -> Any:
        result = [inputs if name is None else kwargs[name] for inputs, kwargs in self.calls]
        if isinstance(result[0], Tensor):
            return torch.cat(result)
        return [value for values in result for value in values]


class BlindMaps(LayerAttribution):
    """Means over cells of 8 x 8 pixels, and zeros for some pictures of each call."""

    def __init__(self, blind: list[int], factor: float = 1.0) -> None:
        super().__init__(lambda x: x, nn.Identity())
        self.blind, self.factor = blind, factor

    @log_usage()
    def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        maps = F.avg_pool2d(inputs, 8) * self.factor
        maps[self.blind] = 0
        return maps


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("downsample", ["area", "bilinear", "gaussian"])
def test_the_map_solves_the_problem_of_the_copies(downsample: str) -> None:
    size, net = (24, 32), pooled_net()
    x, base = torch.rand(2, 3, *size, dtype=D), LayerGradCam(net, net[3])
    sr = augmented(base, downsample=downsample, tv=3e-4, l2=1e-4, sign="signed", align=(0.5, -1.0))
    result, history = sr.attribute(x, return_history=True, target=[1, 3])
    moves = matrices(sr, size)
    maps = torch.stack([base.attribute(warp(x, m[None]), [1, 3]).detach()[:, 0] for m in moves])
    largest = maps.abs().amax((0, 2, 3))
    options: Any = {"downsample": downsample, "offset": (0.5, -1.0), "like": maps}
    observe = Observation(moves, size, size, (6, 8), **options)
    expected = solve(observe, maps / largest[:, None, None], tv=6 * 3e-4, l2=6e-4)
    h = expected.h * largest[:, None, None]
    torch.testing.assert_close(result, h[:, None].expand_as(x), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(history, expected.history)
    assert (result < 0).any()
    for sign, rectified in (
        ("positive", h.relu()),
        ("negative", (-h).relu()),
        ("absolute", h.abs()),
    ):
        sr.sign = sign
        torch.testing.assert_close(sr.attribute(x, target=[1, 3])[:, 0], rectified)


def test_a_blob_stays_in_place_except_with_the_official_preset() -> None:
    """Mode "legacy" reads the corner of a cell of 16; the network sees its centre, 7.5 px away."""
    x = blob((112, 112), 47.0, 66.0, 7.0)
    for options in ({}, {"normalize": "none"}, {"downsample": "bilinear"}, {"mode": "mean"}):
        y, u = centroid(augmented(cell_means(), n_augmentations=24, **options).attribute(x))
        assert abs(y - 47) < 1
        assert abs(u - 66) < 1
    official = augmented(cell_means(), n_augmentations=24, preset="official")
    y, u = centroid(official.attribute(x))
    assert y - 47 == pytest.approx(-7.5, abs=1)
    assert u - 66 == pytest.approx(-7.5, abs=1)


def test_details_finer_than_the_cells_are_resolved() -> None:
    """Two blobs in adjacent cells give one peak in the coarse map, and two in the fine map."""
    x = blob((96, 96), 48.0, 37.0, 3.0) + blob((96, 96), 48.0, 59.0, 3.0)
    plain = UpsampleWrapper(cell_means()).attribute(x)[0, 0, 48]
    fine = augmented(cell_means(), n_augmentations=32).attribute(x)[0, 0, 48]
    assert plain[48] >= min(plain[37], plain[59])
    assert fine[48] < 0.5 * min(fine[37], fine[59])


@pytest.mark.parametrize("align", [(-8.0, -4.0), "rf"])
def test_align_moves_units_off_the_centres_of_cells(align: Any) -> None:
    x, base = blob((96, 96), 40.0, 52.0, 7.0), cell_means(up=8, left=4)
    for mode in ("sr", "mean"):
        y, u = centroid(augmented(base, n_augmentations=16, mode=mode, align=align).attribute(x))
        assert abs(y - 40) < 1
        assert abs(u - 52) < 1
        y, u = centroid(augmented(base, n_augmentations=16, mode=mode).attribute(x))
        assert y - 40 == pytest.approx(8, abs=1)
        assert u - 52 == pytest.approx(4, abs=1)


@pytest.mark.parametrize("mode", ["mean", "max", "single"])
def test_mean_max_and_single_equal_maps_warped_back(mode: str) -> None:
    size, net = (20, 28), pooled_net()
    x, base = torch.rand(2, 3, *size, dtype=D), LayerGradCam(net, net[3])
    sr = augmented(base, mode=mode, sign="signed")
    result = sr.attribute(x, target=[1, 3])
    up = UpsampleWrapper(base)
    if mode == "single":
        torch.testing.assert_close(result, up.attribute(x, target=[1, 3]))
        return
    total, count, largest = 0, 0, torch.full((2, 1, *size), -math.inf, dtype=D)
    for m in matrices(sr, size):
        back = torch.linalg.inv(m)[None]
        g = up.attribute(warp(x, m[None]), target=[1, 3])[:, :1]
        visible = warp(torch.ones_like(g), back)
        moved = warp(g, back)
        total, count = total + moved, count + visible
        largest = torch.where(visible > 0.99, torch.maximum(largest, moved / visible), largest)
    expected = total / count if mode == "mean" else largest
    torch.testing.assert_close(result, expected.expand_as(x))


@pytest.mark.parametrize("mode", ["sr", "mean", "max", "single"])
def test_a_map_of_ones_stays_ones(mode: str) -> None:
    x = torch.ones(1, 1, 64, 48, dtype=D)
    ones = augmented(cell_means(8), n_augmentations=12, mode=mode, l2=0.0, fill=1.0).attribute(x)
    atol = 1e-2 if mode == "sr" else 1e-9
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=atol)


def test_downsample_averages_maps_of_blocks() -> None:
    """Occlusion in steps of 8 gives the block sums of a detector of bright pixels."""
    x = blob((64, 64), 21.0, 38.0, 5.0) + blob((64, 64), 42.0, 23.0, 4.0)
    base = Occlusion(lambda x: (x - 0.5).relu().flatten(1).sum(1))
    steps: Any = {"sliding_window_shapes": (1, 8, 8), "strides": (1, 8, 8)}
    truth = (x - 0.5).relu()
    plain = base.attribute(x, **steps) / 64
    errors = [(plain - truth).square().mean()]
    for downsample in (8, (8, 8), lambda maps: F.avg_pool2d(maps, 8)):
        sr = augmented(base, n_augmentations=24, downsample=downsample, internal_batch_size=24)
        errors.append((sr.attribute(x, **steps) / 64 - truth).square().mean())
    assert max(errors[1:]) < 0.25 * errors[0]
    torch.testing.assert_close(errors[1], errors[2])


def test_maps_of_full_size_are_averaged_unless_mode_is_sr() -> None:
    net, x = pooled_net(), torch.rand(2, 3, 16, 16, dtype=D)
    base = IntegratedGradients(net)
    auto = augmented(base)
    result, history = auto.attribute(x, return_history=True, target=[1, 3], n_steps=5)
    assert history is None
    total, count = 0, 0
    for m in matrices(auto, (16, 16)):
        g = base.attribute(warp(x, m[None]), target=[1, 3], n_steps=5).abs().sum(1, keepdim=True)
        back = torch.linalg.inv(m)[None]
        total, count = total + warp(g, back), count + warp(torch.ones_like(g), back)
    torch.testing.assert_close(result, (total / count).expand_as(x))
    with pytest.warns(UserWarning, match="there is no resolution to gain"):
        solved = augmented(base, mode="sr").attribute(x, target=[1, 3], n_steps=5)
    assert torch.isfinite(solved).all()
    pooled = augmented(base, downsample=4).attribute(x, target=[1, 3], n_steps=5)
    explicit = augmented(base, downsample=(4, 4)).attribute(x, target=[1, 3], n_steps=5)
    torch.testing.assert_close(pooled, explicit)
    assert not torch.allclose(pooled, result, rtol=0.05)


def test_sr_size_defaults_to_the_image_or_32_pixels_per_cell() -> None:
    net, x = nn.Sequential(nn.AvgPool2d(40), nn.Flatten()), torch.rand(1, 1, 80, 120)
    base = LayerActivation(net, net[0])
    result, with_sr_size = (augmented(base, sr_size=s).attribute(x) for s in (None, (64, 96)))
    torch.testing.assert_close(result, with_sr_size)
    coarse = augmented(base, sr_size=32).attribute(x)
    assert coarse.shape == x.shape
    assert not torch.allclose(coarse, result)


# --- the mean of the model -----------------------------------------------------------------------


@pytest.mark.parametrize("internal_batch_size", [64, 4])
def test_tta_is_complete(internal_batch_size: int) -> None:
    """The sum of the attributions is mean_l f(A_l x) - mean_l f(A_l x0)."""
    net, (x, x0) = pooled_net(), torch.rand(2, 2, 3, 16, 20, dtype=D)
    base = IntegratedGradients(net)
    sr = augmented(base, mode="tta", internal_batch_size=internal_batch_size)
    result = sr.attribute(x, target=[1, 3], baselines=x0, n_steps=200)
    assert base.forward_func is net
    means = [
        torch.stack([net(warp(image, m[None])) for m in matrices(sr, (16, 20))]).mean(0)
        for image in (x, x0)
    ]
    expected = (means[0] - means[1])[[0, 1], [1, 3]]
    torch.testing.assert_close(result.sum((1, 2, 3)), expected.detach(), rtol=1e-2, atol=1e-4)
    assert (result < 0).any()
    assert not torch.equal(result[:, 0], result[:, 1])


def test_tta_of_gradients_is_the_gradient_of_the_mean() -> None:
    net, x, grey = (
        pooled_net(),
        torch.rand(2, 3, 16, 16, dtype=D),
        torch.rand(2, 1, 16, 16, dtype=D),
    )

    def model(x: Tensor, grey: Tensor, factor: Tensor, power: float) -> Tensor:
        return net(x * grey) * factor[:, None] ** power

    factor = torch.tensor([0.5, 2.0], dtype=D)
    for method in (Saliency(model), NoiseTunnel(Saliency(model))):
        sr = augmented(method, mode="tta", internal_batch_size=4)
        extra: Any = {"stdevs": 0.0, "nt_samples": 2} if isinstance(method, NoiseTunnel) else {}
        result = sr.attribute(
            x, target=1, abs=False, additional_forward_args=(grey, factor, 2.0), **extra
        )
        leaf = x.clone().requires_grad_()
        moves = [m[None] for m in matrices(sr, (16, 16))]
        outputs = [model(warp(leaf, m), warp(grey, m), factor, 2.0)[:, 1].sum() for m in moves]
        (expected,) = torch.autograd.grad(sum(outputs) / 6, leaf)
        torch.testing.assert_close(result, expected)
    ablated = augmented(FeatureAblation(net), mode="tta").attribute(
        x, target=1, feature_mask=torch.zeros(1, 1, 16, 16, dtype=torch.long)
    )
    mean = sum(net(warp(x, m)) - net(0 * x) for m in moves) / 6
    torch.testing.assert_close(ablated[:, 0, 0, 0], mean[:, 1].detach())


def test_tta_attributions_are_not_maps() -> None:
    """SESS around mode "tta" reduces channels like those of the wrapped method."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)).to(D)
    x = torch.randn(1, 1, 12, 12, dtype=D)
    tta = augmented(IntegratedGradients(net), mode="tta")
    assert (tta.attribute(x, target=1, n_steps=4) < 0).any()
    sess = SESSWrapper(tta, scales=[12], window=12, percentile=100, smooth=False)
    result = sess.attribute(x, target=1, n_steps=4)
    size = tta.attribute(x, target=1, n_steps=4).abs()
    torch.testing.assert_close(result, (size - size.min()) / (size.max() - size.min()))


def test_tta_refuses_methods_that_need_the_module() -> None:
    calls = []
    net = pooled_net()
    net.register_forward_hook(lambda *_: calls.append(1))
    for base in (
        DeepLift(net),
        DeepLiftShap(net),
        GuidedBackprop(net),
        Deconvolution(net),
        GuidedGradCam(net, net[3]),
        LayerGradCam(net, net[3]),
        NoiseTunnel(DeepLift(net)),
        UpsampleWrapper(LayerGradCam(net, net[3])),
    ):
        with pytest.raises(ValueError, match=r"`attribution_method` .* needs the module itself"):
            augmented(base, mode="tta")
    assert not calls
    scalar = augmented(Saliency(lambda x: x.sum()), mode="tta")
    with pytest.raises(ValueError, match="`mode`='tta' averages outputs with one entry"):
        scalar.attribute(torch.rand(2, 3, 8, 8))


# --- every argument follows its image ------------------------------------------------------------


def test_arguments_follow_the_images() -> None:
    x, baselines = torch.rand(2, 2, 3, 8, 10)
    labels, grey = torch.randint(9, (2, 1, 8, 10)), torch.rand(2, 1, 8, 10)
    weight = torch.tensor([0.1, 0.2])
    colour = torch.tensor([0.5, 0.6, 0.7])
    spy = Spy()
    sr = augmented(spy, internal_batch_size=5, fill=colour)
    arguments: Any = {
        "target": [3, 5],
        "baselines": baselines,
        "additional_forward_args": (labels, grey, weight, "word"),
        "feature_mask": torch.arange(80).reshape(1, 1, 8, 10),
        "alpha": 4,
    }
    sr.attribute(x, **arguments)
    moves = matrices(sr, (8, 10))
    warps = moves.repeat_interleave(2, 0)
    twelve = [0, 1] * 6
    fill = colour[:, None, None]
    assert [len(inputs) for inputs, _ in spy.calls] == [5, 5, 2]
    torch.testing.assert_close(spy.seen(), warp(x[twelve], warps, fill=fill))
    torch.testing.assert_close(spy.seen("baselines"), warp(baselines[twelve], warps, fill=fill))
    assert spy.seen("target").tolist() == [3, 5] * 6
    extra = [kwargs["additional_forward_args"] for _, kwargs in spy.calls]
    assert torch.equal(torch.cat([e[0] for e in extra]), warp(labels[twelve], warps, "nearest"))
    torch.testing.assert_close(torch.cat([e[1] for e in extra]), warp(grey[twelve], warps))
    assert torch.equal(torch.cat([e[2] for e in extra]), weight[twelve])
    assert {e[3] for e in extra} == {"word"}
    assert {kwargs["alpha"] for _, kwargs in spy.calls} == {4}
    for (_, kwargs), start in zip(spy.calls, (0, 5, 10), strict=True):
        masks = kwargs["feature_mask"]
        assert masks.dtype == torch.long
        for mask, move in zip(masks, warps[start : start + 5], strict=True):
            pixels = warp(torch.arange(1, 81).reshape(1, 1, 8, 10), move[None], "nearest")[0]
            # The same partition, numbered without gaps.
            assert sorted(mask.unique().tolist()) == list(range(len(pixels.unique())))
            assert len(torch.stack([mask, pixels]).flatten(1).unique(dim=1).T) == len(
                pixels.unique()
            )


@pytest.mark.parametrize("fill", ["border", "reflection", 0.25, torch.rand(3, 8, 10)])
def test_fill_reaches_the_copies(fill: Any) -> None:
    spy, x = Spy(), torch.rand(1, 3, 8, 10)
    sr = augmented(spy, fill=fill)
    sr.attribute(x)
    expected = warp(x.expand(6, -1, -1, -1), matrices(sr, (8, 10)), fill=fill)
    torch.testing.assert_close(spy.seen(), expected)
    torch.testing.assert_close(spy.seen()[:1], x)


def test_drawn_baselines_are_warped_copy_by_copy() -> None:
    x, drawn = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 8, 8)
    seen = []

    class RecordingShap(GradientShap):
        def attribute(self, inputs: Tensor, baselines: Tensor, **kwargs: Any) -> Any:
            seen.append((inputs, baselines))
            return torch.ones_like(inputs)

    sr = augmented(RecordingShap(small_net()))
    sr.attribute(x, baselines=drawn, target=[1, 2])
    assert len(seen) == 6
    for (inputs, baselines), m in zip(seen, matrices(sr, (8, 8)), strict=True):
        torch.testing.assert_close(inputs.detach(), warp(x, m[None]))
        torch.testing.assert_close(baselines, warp(drawn, m[None]))


def test_batches_chunks_and_calls_change_nothing() -> None:
    net, x = pooled_net(), torch.rand(3, 3, 16, 20, dtype=D)
    base = LayerGradCam(net, net[3])
    for options in ({}, {"mode": "mean"}, {"mode": "max"}, {"preset": "official"}):
        options = {"sign": "absolute", **options}
        if "preset" in options:
            options = {**options, "max_iterations": 20}
        unchunked = augmented(base, **options).attribute(x, target=[1, 3, 0])
        chunked = augmented(base, internal_batch_size=4, **options)
        again = [chunked.attribute(x, target=[1, 3, 0]) for _ in range(2)]
        assert torch.equal(*again)
        torch.testing.assert_close(again[0], unchunked, rtol=1e-6, atol=1e-9)
        for i, target in enumerate([1, 3, 0]):
            alone = chunked.attribute(x[i : i + 1], target=target)
            torch.testing.assert_close(alone[0], unchunked[i], rtol=1e-6, atol=1e-9)
    (in_tuple,) = augmented(base).attribute((x,), target=[1, 3, 0])
    torch.testing.assert_close(in_tuple, augmented(base).attribute(x, target=[1, 3, 0]))


def test_solving_image_by_image_changes_nothing(monkeypatch: Any) -> None:
    from captum_ext.attr.wrappers import _warped_copies

    net, x = pooled_net(), torch.rand(3, 3, 16, 20, dtype=D)
    sr = augmented(LayerGradCam(net, net[3]), tolerance=0.01)
    together = sr.attribute(x, return_history=True, target=[1, 3, 0])
    monkeypatch.setattr(_warped_copies, "_PIXELS_AT_ONCE", 1)
    torch.testing.assert_close(sr.attribute(x, return_history=True, target=[1, 3, 0]), together)


def test_scaled_maps_give_a_scaled_result() -> None:
    x = torch.rand(2, 1, 32, 32, dtype=D)
    for mode in ("sr", "mean", "max"):
        result = [augmented(BlindMaps([], c), mode=mode).attribute(x) for c in (1.0, 40.0)]
        torch.testing.assert_close(result[1], 40 * result[0])
    unscaled = [
        augmented(BlindMaps([], c), normalize="per_map").attribute(x[:1]) for c in (1.0, 40.0)
    ]
    torch.testing.assert_close(unscaled[1], unscaled[0])
    fixed = [augmented(BlindMaps([], c), normalize="none").attribute(x) for c in (1.0, 40.0)]
    assert not torch.allclose(fixed[1], 40 * fixed[0], rtol=1e-3)


@pytest.mark.parametrize("normalize", ["global", "per_map", "none"])
def test_copies_without_evidence_give_zeros_and_a_warning(normalize: str) -> None:
    x = torch.rand(1, 1, 32, 40)
    for preset in (None, "official"):
        sr = augmented(BlindMaps([1, 4]), normalize=normalize, preset=preset)
        assert torch.isfinite(sr.attribute(x)).all()
        with pytest.warns(UserWarning, match="The map of 1 of 1 images is zero everywhere"):
            nothing = augmented(
                BlindMaps(list(range(6))), normalize=normalize, preset=preset
            ).attribute(x)
        assert not nothing.any()


# --- the copies ----------------------------------------------------------------------------------


def test_warps_are_drawn_once_within_their_ranges() -> None:
    base = cell_means()
    state = torch.get_rng_state()
    a, b, c = (AugmentedSR(base, generator=seeded(s), n_augmentations=400) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.angles, b.angles)
    assert torch.equal(a.shifts, b.shifts)
    assert not torch.equal(a.angles, c.angles)
    assert a.angles[0] == 0
    assert not a.shifts[0].any()
    assert 0.29 < a.angles.abs().max() <= 0.3
    assert 0.125 < a.shifts.abs().max() <= 0.13
    assert abs(a.angles.mean()) < 0.03
    x = torch.rand(1, 1, 32, 32)
    assert torch.equal(a.attribute(x), b.attribute(x))
    torch.manual_seed(5)
    first = AugmentedSR(base).angles
    torch.manual_seed(5)
    assert torch.equal(AugmentedSR(base).angles, first)


def test_arguments_override_the_official_preset() -> None:
    official = AugmentedSR(cell_means(), preset="official", generator=seeded())
    settings = vars(official)
    for name, value in (
        ("n_augmentations", 100),
        ("max_angle", 0.5),
        ("max_shift", 30 / 224),
        ("mode", "sr"),
        ("solver", "adam"),
        ("max_iterations", 200),
        ("tv", 1e-3),
        ("l2", 1e-4),
        ("downsample", "legacy"),
        ("normalize", "per_map"),
    ):
        assert settings[name] == value
    mine = AugmentedSR(cell_means(), preset="official", solver="mfista", tv=0.0, n_augmentations=3)
    assert (mine.solver, mine.tv, mine.n_augmentations, mine.max_angle) == ("mfista", 0.0, 3, 0.5)
    assert mine.max_iterations == 30
    # Images are rotated, then shifted, by two interpolations; maps are rectified first.
    spy, x = Spy(), torch.rand(1, 3, 8, 10, dtype=D) - 0.5
    sr = augmented(spy, preset="official", mode="mean", channel_reduction="sum")
    result = sr.attribute(x)
    size = (8, 10)
    rotated = warp(x.expand(6, -1, -1, -1), euclidean(sr.angles, 0 * sr.shifts, size))
    moved = warp(rotated, euclidean(0 * sr.angles, sr.shifts * torch.tensor([10, 8]), size))
    torch.testing.assert_close(spy.seen(), moved)
    assert not torch.allclose(moved, warp(x.expand(6, -1, -1, -1), matrices(sr, size)), atol=1e-3)
    back = torch.linalg.inv(matrices(sr, size))
    visible = warp(torch.ones(6, 1, 8, 10, dtype=D), back).sum(0)
    expected = warp(moved.sum(1, keepdim=True).relu(), back).sum(0) / visible
    torch.testing.assert_close(result, expected.expand_as(x))


def test_the_official_preset_solves_the_authors_problem() -> None:
    """Maps are divided by their maxima, cells outside the frame count, and Adam takes 200 steps."""
    size, net = (16, 24), pooled_net()
    x, base = torch.rand(1, 3, *size, dtype=D), LayerGradCam(net, net[3])
    sr = augmented(base, preset="official")
    result, history = sr.attribute(x, return_history=True, target=2)
    shifts = sr.shifts * torch.tensor([24, 16])
    steps = [euclidean(sr.angles, 0 * shifts, size), euclidean(0 * sr.angles, shifts, size)]
    moved = warp(warp(x.expand(6, -1, -1, -1), steps[0]), steps[1])
    maps = base.attribute(moved, 2).detach().relu()
    largest = maps.amax((2, 3), keepdim=True)
    maps = maps / torch.where(largest > 0, largest, 1)
    options: Any = {"downsample": "legacy", "mask": False, "like": maps}
    observe = Observation(steps, size, size, (4, 6), **options)
    expected = solve(observe, maps, tv=6e-3, l2=6e-4, solver="adam")
    torch.testing.assert_close(result[0, 0], expected.h[0], rtol=1e-5, atol=1e-8)
    assert history.shape == (1, 201)


def test_repr_has_the_options_that_differ_from_the_preset() -> None:
    base = Saliency(small_net())
    assert repr(AugmentedSR(base)) == "AugmentedSR(Saliency(SmallNet))"
    official = AugmentedSR(base, preset="official", tv=1.0, solver="mfista")
    assert repr(official) == (
        "AugmentedSR(Saliency(SmallNet), solver='mfista', tv=1.0, preset='official')"
    )


# --- nesting, dtypes, modes of torch -------------------------------------------------------------


def test_wrappers_nest() -> None:
    net, x = pooled_net(), torch.rand(2, 3, 20, 24, dtype=D)
    base = LayerGradCam(net, net[3])
    sr = augmented(base)
    plain = sr.attribute(x, target=[1, 3])
    tunnel = NoiseTunnel(sr).attribute(x, nt_samples=2, stdevs=0.0, target=[1, 3])
    torch.testing.assert_close(tunnel, plain)
    torch.testing.assert_close(augmented(UpsampleWrapper(base)).attribute(x, target=[1, 3]), plain)
    torch.testing.assert_close(UpsampleWrapper(sr).attribute(x, target=[1, 3]), plain)
    inside = augmented(NoiseTunnel(base)).attribute(x, target=[1, 3], nt_samples=2, stdevs=0.0)
    torch.testing.assert_close(inside, plain)
    for nested in (
        augmented(SESSWrapper(base, window=16, n_scales=2)),
        SESSWrapper(sr, window=16, n_scales=2),
        augmented(augmented(base, n_augmentations=3)),
    ):
        result = nested.attribute(x, target=[1, 3])
        assert result.shape == x.shape
        assert torch.isfinite(result).all()
        assert (result.amax((1, 2, 3)) > 0).all()
        assert torch.equal(result[:, 0], result[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sr", "mean", "tta"])
def test_every_dtype_works_frozen_and_without_grad(dtype: torch.dtype, mode: str) -> None:
    net, x = pooled_net(dtype), torch.rand(2, 3, 16, 16).to(dtype)
    reference = pooled_net(D)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    base, exact = (
        Saliency(n) if mode == "tta" else LayerGradCam(n, n[3]) for n in (net, reference)
    )
    options: Any = {"mode": mode, "sign": "absolute"}
    expected = augmented(exact, **options).attribute(x.double(), target=1)
    with torch.no_grad():
        result = augmented(base, **options).attribute(x, target=1)
    assert result.dtype == dtype
    assert not result.requires_grad
    assert torch.isfinite(result).all()
    error = (result.double() - expected).abs().max() / expected.abs().max()
    assert error < (0.3 if dtype == torch.bfloat16 else 1e-3)


def test_methods_without_gradients_work_in_inference_mode() -> None:
    net, x = pooled_net(), torch.rand(1, 3, 16, 16, dtype=D)
    forward_only = augmented(Occlusion(net), downsample=4)
    steps: Any = {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4), "target": 1}
    expected = forward_only.attribute(x, **steps)
    with torch.inference_mode():
        torch.testing.assert_close(forward_only.attribute(x, **steps), expected)
        with pytest.raises(RuntimeError, match=r"torch\.inference_mode"):
            augmented(LayerGradCam(net, net[3])).attribute(x, target=1)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["sr", "mean", "max", "tta"])
def test_a_gpu_gives_the_values_of_a_cpu(mode: str) -> None:
    x, result = torch.rand(2, 3, 16, 20, dtype=D), []
    for device in ("cpu", "cuda"):
        net = pooled_net().to(device)
        base = Saliency(net) if mode == "tta" else LayerGradCam(net, net[3])
        options: Any = {"mode": mode, "fill": torch.tensor([0.1, 0.2, 0.3])}
        result.append(augmented(base, **options).attribute(x.to(device), target=[1, 3]))
    assert result[1].device.type == "cuda"
    torch.testing.assert_close(result[1].cpu(), result[0], rtol=1e-6, atol=1e-9)
    drawn = torch.Generator("cuda").manual_seed(0)
    assert AugmentedSR(base, mode=mode, generator=drawn).angles.device.type == "cpu"


@pytest.mark.parametrize("mode", ["sr", "mean", "tta"])
def test_the_model_is_left_unchanged(trace_free: Any, mode: str) -> None:
    net, x = small_net(), torch.rand(2, 3, 8, 8)
    pooled = nn.Sequential(net.conv1, nn.AvgPool2d(4), net.conv2, nn.Flatten(), nn.LazyLinear(4))
    pooled(x)
    base = Saliency(pooled) if mode == "tta" else LayerGradCam(pooled, pooled[2])
    sr = augmented(base, mode=mode, internal_batch_size=5)
    with trace_free(pooled, x):
        sr.attribute(x, target=[1, 2])
    with trace_free(pooled, x), pytest.raises(AssertionError):
        sr.attribute(x, target=[1, 2, 3])
    handle = pooled[3].register_forward_hook(lambda *_: 1 / 0)
    with trace_free(pooled, x), pytest.raises(ZeroDivisionError):
        sr.attribute(x, target=[1, 2])
    handle.remove()
    pooled.train()
    with trace_free(pooled, x), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sr.attribute(x, target=[1, 2])


@pytest.mark.parametrize("size", [(2, 400), (400, 2), (1, 9), (3, 3), (37, 53)])
def test_odd_and_elongated_images_work(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    x = torch.rand(1, 1, *size)
    for mode in ("auto", "sr", "mean", "max"):
        result = augmented(LayerGradCam(net, net[0]), mode=mode, sign="absolute").attribute(
            x, target=1
        )
        assert result.shape == x.shape
        assert torch.isfinite(result).all()
        assert result.any()


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_augmentations": 0}, "`n_augmentations` must be an integer of at least 1"),
        ({"max_angle": 30.0}, "`max_angle` must be from 0 to pi: it is in radians. Got 30.0"),
        ({"max_angle": -0.1}, "`max_angle`"),
        ({"max_shift": 30}, "`max_shift` must be at least 0 and below 1"),
        ({"mode": "median"}, "`mode` must be one of .* got 'median'"),
        ({"solver": "sgd"}, "`solver` must be one of"),
        ({"tv": -1.0}, "`tv` must be at least 0"),
        ({"l2": math.nan}, "`l2` must be at least 0"),
        ({"tolerance": math.inf}, "`tolerance`"),
        ({"downsample": "nearest"}, "`downsample` must be 'area'"),
        ({"downsample": 0}, "`downsample` must be an integer"),
        ({"downsample": (4, 4, 4)}, "`downsample` must be one or two numbers"),
        ({"downsample": 2.5}, "`downsample` must be an integer"),
        ({"align": "corner"}, "`align` must be"),
        ({"normalize": "max"}, "`normalize` must be one of"),
        ({"sign": "both"}, "`sign` must be one of"),
        ({"channel_reduction": "l2"}, "`channel_reduction` must be one of"),
        ({"fill": "mirror"}, "`fill` must be one of"),
        ({"sr_size": (8, 0)}, "`sr_size` must be an integer"),
        ({"max_iterations": 0}, "`max_iterations` must be an integer"),
        ({"preset": "paper"}, "`preset` must be one of"),
        ({"internal_batch_size": 0}, "`internal_batch_size`"),
    ],
)
def test_wrong_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentedSR(cell_means(), **options)


def test_wrong_inputs_raise() -> None:
    net = pooled_net(torch.float32)
    spy, x = Spy(), torch.rand(2, 3, 8, 8)
    with pytest.raises(TypeError, match="`attribution_method` must be an instance"):
        AugmentedSR(net)  # type: ignore[arg-type]
    for inputs, message in (
        (torch.rand(2, 3, 8), "`inputs` must be images"),
        (torch.rand(2, 3, 8, 8, 8), "`inputs` must be images"),
        (torch.randint(9, (2, 3, 8, 8)), "`inputs` must be images"),
        ((x, x), "`inputs` must be one tensor of images, got a tuple of 2"),
        (x.log() / 0, "`inputs` has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            augmented(spy).attribute(inputs)
    for options, arguments, message in (
        ({"fill": torch.rand(2)}, {}, r"`fill` of shape \(2, 1, 1\) does not broadcast"),
        (
            {},
            {"baselines": torch.rand(2, 3, 4, 4)},
            "`baselines` must have the shape of the images",
        ),
        ({"mode": "mean"}, {"return_history": True}, "`return_history`: mode 'mean' has no"),
        ({}, {"return_convergence_delta": True}, "`return_convergence_delta`"),
    ):
        with pytest.raises(ValueError, match=message):
            augmented(spy, **options).attribute(x, **arguments)
    assert not spy.calls, "before any call"
    flat = nn.Flatten()
    broken = augmented(LayerActivation(nn.Sequential(flat), flat))
    with pytest.raises(ValueError, match="cannot be laid over them"):
        broken.attribute(x)
    infinite = augmented(BlindMaps([], math.inf))
    with pytest.raises(ValueError, match="gave attributions that are not finite"):
        infinite.attribute(x)
    cells = augmented(cell_means(2), downsample=lambda maps: maps[:, :, ::3, ::3])
    with pytest.raises(ValueError, match="`downsample` must turn maps into"):
        cells.attribute(x)
