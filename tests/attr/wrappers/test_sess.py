"""SESS against a loop over windows, against its identities, and on a toy example."""

import itertools
import math
import threading
import warnings
from typing import Any

import pytest
import torch
from captum.attr import (
    Attribution,
    FeatureAblation,
    GradientShap,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    LayerGradientXActivation,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum.log import log_usage
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext._errors import ArgumentError
from captum_ext.attr import LayerCam, SESSWrapper, UpsampleWrapper
from captum_ext.attr.wrappers._windows import scaled_size, slide_windows
from captum_ext.imaging import blur, min_max
from tests.networks import (
    BatchSizeRecorder,
    BlobDetector,
    BrightPixelDetector,
    pooled_net,
    small_net,
)


def window_starts(length: int, window: int, step: int) -> list[int]:
    result = [0]
    while result[-1] + window < length:
        result.append(min(result[-1] + step, length - window))
    return result


def by_window(
    net: nn.Module,
    base: Attribution,
    x: Tensor,
    target: int,
    scales: list[int],
    window: int,
    step: int,
    r: float = 0.0,
    theta: float = 0.0,
    pool: str = "mean",
) -> Tensor:
    """The authors' steps for one image (1, C, H, W), window by window, without smoothing."""
    height, width = x.shape[2:]
    patches, corners = [], []
    for s in scales:
        size = (s, s * width // height) if height <= width else (s * height // width, s)
        scaled = F.interpolate(x, size, mode="bilinear") if size != (height, width) else x
        for top, left in itertools.product(*(window_starts(n, window, step) for n in size)):
            patches.append(scaled[:, :, top : top + window, left : left + window])
            corners.append((size, top, left))
    with torch.no_grad():
        p = torch.stack([net(patch).softmax(1)[0, target] for patch in patches])
    order = sorted(range(len(p)), key=lambda i: (float(p[i]), i))[int(len(p) * r) :]
    total, count = torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])
    for i in order:
        h = F.relu(base.attribute(patches[i], target).detach().sum(1, keepdim=True))
        h = F.interpolate(h, (window, window), mode="bilinear")
        if h.max() == h.min():
            continue
        h = (h - h.min()) / (h.max() - h.min()) * p[i] / p.max()
        size, top, left = corners[i]
        canvas = x.new_zeros(1, 1, *size)
        canvas[:, :, top : top + window, left : left + window] = h
        m = F.interpolate(canvas, (height, width), mode="bilinear")
        if pool == "max":
            total = torch.maximum(total, m)
            count = torch.ones_like(count)
        else:
            total += m * (m > theta)
            count += m > theta
    return torch.where(count > 0, total / count.clamp(min=1), 0.0)


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "n", "step", "expected"),
    [
        ((224, 224), 12, 224, 122),
        ((224, 224), 12, 112, 303),
        ((224, 224), 5, 224, 22),
        ((224, 224), 6, 224, 31),
        ((224, 224), 10, 224, 81),
        ((375, 500), 6, 224, 39),
        ((500, 375), 10, 224, 103),
        ((375, 500), 12, 224, 157),
        ((2160, 3840), 6, 224, 49),
        ((2160, 3840), 10, 224, 134),
        ((2160, 3840), 12, 224, 202),
    ],
)
def test_window_counts_are_those_of_the_authors(
    size: tuple[int, int], n: int, step: int, expected: int
) -> None:
    sizes = [scaled_size(size, 224 + 64 * i) for i in range(n)]
    windows = slide_windows(sizes, (224, 224), (step, step))
    assert len(windows) == expected
    by_axis = sum(math.prod(math.ceil((s - 224) / step) + 1 for s in size) for size in sizes)
    assert by_axis == expected
    assert [w.number for w in windows] == list(range(expected))


def mean_recorder() -> BatchSizeRecorder:
    """A network with the image's mean as the first of two logits."""

    def logits(x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([mean, torch.zeros_like(mean)], 1)

    return BatchSizeRecorder(logits)


class Spy(Attribution):
    """Returns the pictures as their attributions, and records the arguments of each call."""

    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func)
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    @log_usage()
    def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append((inputs.clone(), kwargs))
        return inputs.clone()


@pytest.mark.parametrize(("r", "kept"), [(0.0, 303), (0.5, 152), (0.9, 31), (0.99, 4)])
def test_the_best_windows_are_kept(r: float, kept: int) -> None:
    model = mean_recorder()
    spy = Spy(model)
    x = torch.rand(2, 3, 14, 14)
    sess = SESSWrapper(spy, window=14, step=7, pre_filter_ratio=r)
    sess.attribute(x, target=0)
    assert sum(model.batch_sizes) == 2 * 303
    pictures = torch.cat([inputs for inputs, _ in spy.calls])
    assert len(pictures) == 2 * kept
    # The explained windows are those with the highest scores.
    alone = Spy(model)
    SESSWrapper(alone, window=14, step=7).attribute(x[:1], target=0)
    means = torch.cat([inputs for inputs, _ in alone.calls]).flatten(1).mean(1)
    kept_means = {round(float(p.mean()), 5) for p in pictures}
    assert {round(float(v), 5) for v in means.sort().values[-kept:]} <= kept_means


def test_equal_scores_keep_the_last_windows() -> None:
    model = mean_recorder()
    spy = Spy(lambda x: model(x) * 0)
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    SESSWrapper(spy, scales=[8], window=2, pre_filter_ratio=0.75).attribute(x, target=0)
    (((pictures, _)),) = spy.calls
    corners = sorted(pictures[:, 0, 0, 0].tolist())
    assert corners == [48.0, 50.0, 52.0, 54.0]


@pytest.mark.parametrize(("window", "step"), [(4, 4), (4, 2), (4, 1), (5, 3), (7, 2), (1, 1)])
def test_windows_of_one_colour_never_share_a_pixel_of_a_resized_canvas(
    window: int, step: int
) -> None:
    for length in range(window, 5 * window + 3):
        windows = slide_windows([(length, length)], (window, window), (step, step))
        rows = {(w.y, w.colour[0]) for w in windows}
        for (a, ca), (b, cb) in itertools.combinations(sorted(rows), 2):
            assert ca != cb or b - a >= window + 1
        assert {w.y for w in windows} == set(window_starts(length, window, step))


# --- values --------------------------------------------------------------------------------------

NET = pooled_net()


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("theta", [0.0, 0.2])
@pytest.mark.parametrize("step", [8, 4])
@pytest.mark.parametrize("r", [0.0, 0.5])
@pytest.mark.parametrize("size", [(9, 13), (40, 22)])
def test_reference_fusion_equals_a_loop_over_windows(
    pool: str, theta: float, step: int, r: float, size: tuple[int, int]
) -> None:
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    base, scales = LayerGradCam(NET, NET[4]), [8, 10, 13, 21]
    expected = by_window(NET, base, x, 2, scales, 8, step, r, theta, pool)
    sess = SESSWrapper(
        base,
        scales=scales,
        window=8,
        step=step,
        pre_filter_ratio=r,
        theta=theta,
        pool=pool,
        fusion="reference",
        smooth=False,
    )
    assert expected.max() > 0.1
    for chunk in (64, 5):
        sess.internal_batch_size = chunk
        result = sess.attribute(x, target=2)
        torch.testing.assert_close(result, expected.expand_as(x), rtol=0, atol=1e-12)
    if pool == "max":
        soft = SESSWrapper(
            base, scales=scales, window=8, step=step, pre_filter_ratio=r, pool="max", smooth=False
        )
        torch.testing.assert_close(soft.attribute(x, target=2), result)


def test_one_window_of_the_images_size_gives_the_base_bit_for_bit() -> None:
    net = pooled_net(torch.float32)
    x = torch.rand(3, 3, 16, 16)
    base = LayerGradCam(net, net[4])
    small = F.relu(base.attribute(x, [0, 1, 3]).detach())
    expected = min_max(F.interpolate(small, (16, 16), mode="bilinear")).expand_as(x)
    for fusion in ("soft", "reference", "coverage", "weighted"):
        options: Any = {"scales": [16], "window": 16, "fusion": fusion}
        result = SESSWrapper(base, smooth=False, **options).attribute(x, target=[0, 1, 3])
        assert torch.equal(result, expected)
        smooth = SESSWrapper(base, **options).attribute(x, target=[0, 1, 3])
        assert torch.equal(smooth[:, :1], blur(expected[:, :1], 11, 5.0))
        # With a score that is no logarithm, too.
        score = SESSWrapper(base, smooth=False, score="sigmoid", **options)
        assert torch.equal(score.attribute(x, target=[0, 1, 3]), expected)
    larger = SESSWrapper(base, scales=[24], window=24, fusion="reference", smooth=False)
    scaled = F.interpolate(x, (24, 24), mode="bilinear")
    full = F.relu(base.attribute(scaled, [0, 1, 3]).detach())
    full = min_max(F.interpolate(full, (24, 24), mode="bilinear"))
    full = F.interpolate(full, (16, 16), mode="bilinear")
    result = larger.attribute(x, target=[0, 1, 3])
    torch.testing.assert_close(result[:, :1], full)


class ConstantMap(LayerGradCam):
    """A layer's map that is the same for every picture."""

    def __init__(self, net: nn.Module, value: Tensor) -> None:
        super().__init__(net, None)
        self.value = value

    @log_usage()
    def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        return self.value.to(inputs).expand(len(inputs), 1, *self.value.shape)


def test_soft_fusion_equals_reference_inside_windows_that_vote_everywhere() -> None:
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    ramp = torch.linspace(0.5, 1, 64).reshape(8, 8)
    ramp[3, 3] = 0  # min-max turns this pixel to 0, without a vote
    maps = {}
    for fusion in ("soft", "reference"):
        base = ConstantMap(NET, ramp)
        sess = SESSWrapper(base, scales=[8, 8], window=8, fusion=fusion, smooth=False)
        maps[fusion] = sess.attribute(x, target=1)
    torch.testing.assert_close(maps["soft"], maps["reference"], rtol=0, atol=1e-15)


def test_soft_fusion_has_no_seams() -> None:
    """Constant votes fuse to a constant, where the reference fades between windows."""
    x = torch.randn(1, 3, 90, 90, dtype=torch.float64)
    ones = torch.ones(8, 8)
    ones[0, 0] = 0
    same = SESSWrapper(ConstantMap(lambda x: x[:, :2, 0, 0] * 0, ones), scales=[16], window=8)
    same.smooth = False
    inner = (0, 0, slice(20, 85), slice(20, 85))
    soft = same.attribute(x, target=1)
    same.fusion = "reference"
    reference = same.attribute(x, target=1)
    # The corners without a vote are at 0 and 45 of each axis.
    seam = (0, 0, slice(55, 85), slice(40, 50))
    assert float(soft[seam].min()) == pytest.approx(1, abs=1e-12)
    assert float(reference[seam].min()) < 0.6
    assert float(soft[inner].max()) <= 1 + 1e-12


def test_windows_without_a_map_do_not_dilute() -> None:
    x = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    zero = SESSWrapper(ConstantMap(NET, torch.zeros(2, 2)), n_scales=2, window=12)
    with pytest.warns(UserWarning, match="zero everywhere"):
        result = zero.attribute(x, target=1)
    assert torch.equal(result, torch.zeros_like(x))

    class BrightOnly(LayerGradCam):
        """Gives maps only for bright windows."""

        @log_usage()
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
            ramp = torch.linspace(0.1, 1, 4).reshape(1, 1, 2, 2).to(inputs)
            return ramp * (inputs.mean((1, 2, 3), keepdim=True) > 0)

    x = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    x[..., 8:] = -1
    sess = SESSWrapper(BrightOnly(NET, None), scales=[16], window=8, step=4, smooth=False)
    result = sess.attribute(x, target=1)
    assert (result[0, 0, 2:, 2:8] > 0).all()


def test_scores_without_a_positive_one_give_zeros_and_a_warning() -> None:
    x = torch.randn(1, 3, 20, 20)
    base = ConstantMap(lambda x: -x[:, :2, 0, 0].abs() - 1, torch.rand(2, 2))
    for r in (0.0, 0.5):
        sess = SESSWrapper(base, n_scales=2, window=12, score="logit", pre_filter_ratio=r)
        with pytest.warns(UserWarning, match="zero everywhere: no explained window"):
            assert torch.equal(sess.attribute(x, target=1), torch.zeros_like(x))


def test_scaled_maps_and_repeated_calls_change_nothing() -> None:
    x = torch.randn(2, 3, 20, 30, dtype=torch.float64)
    base = LayerGradCam(NET, NET[4])
    options: Any = {"window": 12, "smooth": False}
    result = SESSWrapper(base, scales=[12, 18], **options).attribute(x, target=1)

    class Scaled(LayerGradCam):
        @log_usage()
        def attribute(self, *args: Any, **kwargs: Any) -> Any:
            return 37.0 * super().attribute(*args, **kwargs)

    scaled = SESSWrapper(Scaled(NET, NET[4]), scales=[12, 18], **options)
    torch.testing.assert_close(scaled.attribute(x, target=1), result)
    for fusion in ("soft", "reference", "coverage", "weighted"):
        once = SESSWrapper(base, scales=[12, 18], fusion=fusion, **options)
        twice = SESSWrapper(base, scales=[18, 12, 18, 12], fusion=fusion, **options)
        torch.testing.assert_close(twice.attribute(x, target=1), once.attribute(x, target=1))


def test_coverage_and_weighted_fusion_equal_a_loop() -> None:
    """The sums over windows are written out."""
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    base = LayerGradientXActivation(NET, NET[4])
    total, seen, weight = (torch.zeros(1, 1, 16, 16, dtype=torch.float64) for _ in range(3))
    cuts = [(y, z) for y in (0, 6, 8) for z in (0, 6, 8)]
    patches = torch.cat([x[:, :, y : y + 8, z : z + 8] for y, z in cuts])
    p = NET(patches).softmax(1)[:, 2].detach()
    h = base.attribute(patches, 2).detach().sum(1, keepdim=True)
    signed = F.interpolate(h, (8, 8), mode="bilinear")
    signed = signed / signed.abs().amax((1, 2, 3), keepdim=True)
    for (y, z), m, w in zip(cuts, signed, p / p.max(), strict=True):
        total[0, :, y : y + 8, z : z + 8] += m * w
        seen[:, :, y : y + 8, z : z + 8] += 1
        weight[:, :, y : y + 8, z : z + 8] += w
    options: Any = {"scales": [16], "window": 8, "step": 6, "sign": "signed", "smooth": False}
    result, coverage = SESSWrapper(base, **options).attribute(x, target=2, return_coverage=True)
    torch.testing.assert_close(result[:, :1], total / seen)
    torch.testing.assert_close(coverage, seen)
    assert (result < 0).any()
    result = SESSWrapper(base, fusion="weighted", **options).attribute(x, target=2)
    torch.testing.assert_close(result[:, :1], total / weight)


def test_uncovered_pixels_are_zero_and_have_no_coverage() -> None:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    sess = SESSWrapper(LayerGradCam(NET, NET[4]), scales=[32], window=8, pre_filter_ratio=0.8)
    sess.smooth = False
    result, coverage = sess.attribute(x, target=1, return_coverage=True)
    assert coverage.sum((1, 2, 3)).tolist() == [4 * 64, 4 * 64]  # 16 - int(12.8) windows
    assert set(coverage.unique().tolist()) == {0.0, 1.0}
    assert not result[:, :1][coverage == 0].any()


@pytest.mark.parametrize("sign", ["positive", "negative", "absolute", "signed"])
def test_signs_and_reductions_of_input_attributions(sign: str) -> None:
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)

    class Identity(Attribution):
        @log_usage()
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
            return inputs

    expected = {"abs_sum": x.abs().sum(1, keepdim=True), "sum": x.sum(1, keepdim=True)}
    expected["max_abs"] = x.gather(1, x.abs().argmax(1, keepdim=True))
    rules = {
        "positive": lambda a: a.clamp(min=0),
        "negative": lambda a: (-a).clamp(min=0),
        "absolute": lambda a: a.abs(),
        "signed": lambda a: a,
    }
    for reduction, reduced in expected.items():
        if (reduction, sign) == ("abs_sum", "negative"):
            continue  # the map is zero, with a warning
        a = rules[sign](reduced)
        limit = a.abs().flatten().quantile(0.99)
        a = a.clamp(-limit, limit)
        a = a / limit if sign == "signed" else min_max(a)
        sess = SESSWrapper(
            Identity(NET),
            scales=[12],
            window=12,
            sign=sign,
            channel_reduction=reduction,
            smooth=False,
        )
        torch.testing.assert_close(sess.attribute(x, target=1)[:, :1], a)
        sess.channel_reduction = lambda a, r=reduction: {
            "abs_sum": a.abs().sum(1, keepdim=True),
            "sum": a.sum(1, keepdim=True),
            "max_abs": a.gather(1, a.abs().argmax(1, keepdim=True)),
        }[r]
        torch.testing.assert_close(sess.attribute(x, target=1)[:, :1], a)


def test_input_attributions_that_are_maps_stay_signed() -> None:
    """Equal channels are one map: its sign counts, and it is not clipped."""
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    windows: Any = {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4)}
    occluded = Occlusion(NET).attribute(x, target=1, **windows)
    assert (occluded < 0).any()
    sess = SESSWrapper(Occlusion(NET), scales=[12], window=12, smooth=False)
    result = sess.attribute(x, target=1, **windows)
    torch.testing.assert_close(result, min_max(F.relu(occluded)).to(x), rtol=1e-5, atol=1e-6)


def test_align_moves_units_off_the_centres_of_cells() -> None:
    """The maximum lies on the object with "rf", and 1.5 pixels down and right of it without."""
    net = BrightPixelDetector().double()
    x = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    x[..., 12, 20] = 1
    side = torch.arange(32, dtype=torch.float64)
    for align, off in (("cell", 1.5), ("rf", 0.0), ((-1.5, -1.5), 0.0), ((-0.5, 1.5), None)):
        sess = SESSWrapper(
            LayerGradCam(net, net.layer), scales=[32], window=32, align=align, smooth=False
        )
        result = sess.attribute(x, target=1, additional_forward_args=torch.ones(1))[0, 0]
        centre = [float((result * g).sum() / result.sum()) for g in (side[:, None], side)]
        offset = (off, off) if off is not None else (1.0, 3.0)
        assert centre == pytest.approx([12 + offset[0], 20 + offset[1]], abs=1e-9)
    with pytest.raises(ValueError, match="for a layer's output"):
        SESSWrapper(LayerGradCam(net, net.layer), window=32, align="rf").attribute(
            x, target=1, attribute_to_layer_input=True
        )


def test_an_upsample_wrapper_inside_changes_nothing() -> None:
    x = torch.randn(2, 3, 20, 30, dtype=torch.float64)
    options: Any = {"n_scales": 3, "window": 12}
    for base in (LayerGradCam(NET, NET[4]), LayerGradientXActivation(NET, NET[4]), Saliency(NET)):
        bare = SESSWrapper(base, **options).attribute(x, target=[0, 1])
        inside = SESSWrapper(UpsampleWrapper(UpsampleWrapper(base)), **options)
        assert torch.equal(inside.attribute(x, target=[0, 1]), bare)
        outside = UpsampleWrapper(SESSWrapper(base, **options))
        assert torch.equal(outside.attribute(x, target=[0, 1]), bare)
    several = UpsampleWrapper(LayerCam(NET, ["1", "4"]), fuse="mean")
    result = SESSWrapper(several, scales=[20], window=20, smooth=False).attribute(
        x[..., :20], target=1
    )
    expected = min_max(F.relu(several.attribute(x[..., :20], target=1)))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "options", [{"mode": "nearest"}, {"align_corners": True}, {"normalize": "minmax"}]
)
def test_an_upsample_wrapper_inside_keeps_its_options(options: Any) -> None:
    x = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    inside = UpsampleWrapper(LayerGradCam(NET, NET[4]), **options)
    result = SESSWrapper(inside, scales=[20], window=20, smooth=False).attribute(x, target=1)
    torch.testing.assert_close(result, min_max(F.relu(inside.attribute(x, target=1))))


def test_noise_tunnel_without_noise_changes_nothing() -> None:
    x = torch.randn(2, 3, 14, 14)
    net = pooled_net(torch.float32)
    sess = SESSWrapper(LayerGradCam(net, net[4]), n_scales=2, window=12)
    tunnel = NoiseTunnel(sess).attribute(x, nt_samples=3, stdevs=0.0, target=[1, 2])
    torch.testing.assert_close(tunnel, sess.attribute(x, target=[1, 2]))


# --- one pass for score and map ------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "logit"])
@pytest.mark.parametrize("fusion", ["soft", "reference", "coverage", "weighted"])
def test_one_pass_for_score_and_map_gives_the_result_of_two(score: str, fusion: str) -> None:
    """In one pass, weights are relative to the largest score so far, which rises several times."""
    net = pooled_net()
    net[-1].weight.data *= 5
    x = torch.randn(3, 3, 20, 30, dtype=torch.float64)
    base = LayerGradCam(net, net[4])
    options: Any = {"n_scales": 4, "window": 10, "score": score, "fusion": fusion}
    target = [0, 2, 3]
    one_pass = SESSWrapper(base, internal_batch_size=3, **options).attribute(x, target=target)
    # With a threshold, all windows are scored first. This one is below every vote.
    scored_first = SESSWrapper(base, **options)
    scored_first.theta = 1e-300
    torch.testing.assert_close(one_pass, scored_first.attribute(x, target=target))


@pytest.mark.parametrize("fusion", ["soft", "reference", "coverage", "weighted"])
def test_scores_of_very_different_size_are_fused(fusion: str) -> None:
    """The order of negligible and dominating windows changes nothing."""
    x = torch.linspace(1, 0, 30).expand(1, 3, 20, 30)
    counting = mean_recorder()
    base = ConstantMap(lambda x: 2000 * counting(x), torch.rand(3, 3))
    options: Any = {"scales": [20], "window": 10, "step": 5, "fusion": fusion, "smooth": False}
    maps = [
        SESSWrapper(base, internal_batch_size=n, **options).attribute(x, target=1)
        for n in (1, 4, 64)
    ]
    for result in maps[1:]:
        torch.testing.assert_close(result, maps[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "factor"),
    [(Saliency, 1), (lambda net: LayerGradCam(net, net[0]), 1), (IntegratedGradients, None)],
)
def test_score_and_map_share_a_pass(method: Any, factor: int | None) -> None:
    """A base whose first pass runs on exactly the windows needs no other pass for the scores."""
    counting = mean_recorder()
    net = nn.Sequential(nn.Identity(), counting)
    x = torch.rand(1, 3, 14, 14)
    SESSWrapper(method(net), n_scales=5, window=14).attribute(x, target=0)
    shared = sum(counting.batch_sizes)
    counting.batch_sizes.clear()
    SESSWrapper(
        method(lambda x: net(x)) if factor is None else method(net),
        n_scales=5,
        window=14,
        theta=1e-9,
    ).attribute(x, target=0)
    separate = sum(counting.batch_sizes)
    if factor is not None:
        assert shared == 22
        assert separate == 2 * 22
    else:
        assert shared == separate


def test_a_plain_function_is_scored_in_another_pass() -> None:
    net, x = pooled_net(), torch.randn(2, 3, 20, 30, dtype=torch.float64)
    of_module = SESSWrapper(LayerGradCam(net, net[4]), n_scales=3, window=12)
    of_function = SESSWrapper(LayerGradCam(lambda x: net(x), net[4]), n_scales=3, window=12)
    torch.testing.assert_close(
        of_function.attribute(x, target=[1, 2]), of_module.attribute(x, target=[1, 2])
    )


# --- arguments that follow their image -----------------------------------------------------------


def test_arguments_follow_their_image() -> None:
    """Tensors shaped like the images are cropped as they are; others are indexed by example."""
    x = torch.randn(3, 2, 12, 18)
    number = torch.arange(3.0)
    x[:, 1] = number[:, None, None]
    features = torch.arange(12 * 18).reshape(12, 18).expand(3, 1, 12, 18)
    x[:, 0] = torch.arange(12 * 18.0).reshape(12, 18)

    def model(
        x: Tensor, like: Tensor, number: Tensor, table: Tensor, flag: bool, ints: Tensor
    ) -> Tensor:
        assert torch.equal(like, x)
        assert torch.equal(x[:, 1, 0, 0], number)
        assert table.shape == (5, 2)
        assert flag is True
        assert len(ints) == len(x)
        return x[:, :, 0, 0]

    for r in (0.0, 0.4):
        spy = Spy(model)
        SESSWrapper(spy, scales=[12], window=6, step=4, pre_filter_ratio=r).attribute(
            x,
            target=[0, 1, 0],
            baselines=x,
            feature_mask=features,
            additional_forward_args=(x, number, torch.zeros(5, 2), True, features),
        )
        for pictures, arguments in spy.calls:
            of = pictures[:, 1, 0, 0].long()
            assert arguments["target"].tolist() == [[0, 1, 0][i] for i in of]
            assert torch.equal(arguments["baselines"], pictures)
            like, _, _, _, ints = arguments["additional_forward_args"]
            assert torch.equal(like, pictures)
            assert torch.equal(ints[:, 0], pictures[:, 0].long())
            # Features are renumbered from 0, in the order of their old numbers.
            assert torch.equal(
                arguments["feature_mask"].flatten(1), torch.arange(36).expand(len(pictures), 36)
            )


def test_one_baseline_and_one_feature_mask_serve_all_images() -> None:
    x = torch.randn(1, 2, 12, 18).repeat(3, 1, 1, 1)
    mask = torch.zeros(12, 18, dtype=torch.long)
    mask[:, 9:] = 7
    spy = Spy(lambda x: x[:, :, 0, 0])
    SESSWrapper(spy, scales=[12, 16], window=6).attribute(
        x, target=torch.tensor(1), baselines=(x[:1],), feature_mask=mask
    )
    for pictures, arguments in spy.calls:
        assert torch.equal(arguments["baselines"], pictures)
        assert arguments["feature_mask"].shape == (len(pictures), 1, 6, 6)
        for mask_of_picture in arguments["feature_mask"]:
            assert mask_of_picture.unique().tolist() in ([0], [0, 1])
        assert arguments["target"] == 1


def test_drawn_baselines_are_cropped_window_by_window() -> None:
    """GradientShap draws from a distribution that is cropped at the window of its call."""
    seen = []

    class RecordingShap(GradientShap):
        @log_usage()
        def attribute(self, inputs: Tensor, baselines: Any, **kwargs: Any) -> Any:
            seen.append((inputs.detach(), baselines))
            return super().attribute(inputs, baselines, **kwargs)

    net = pooled_net(torch.float32)
    x = torch.randn(1, 3, 16, 16).repeat(2, 1, 1, 1)
    distribution = x[:1].repeat(5, 1, 1, 1)
    sess = SESSWrapper(RecordingShap(net), scales=[16, 16], window=8, step=6)
    result = sess.attribute(x, baselines=distribution, target=1, stdevs=0.0)
    assert result.shape == x.shape
    assert len(seen) == 18
    for inputs, baselines in seen:
        assert len(inputs) == 2
        assert len(baselines) == 5
        torch.testing.assert_close(inputs[:1].expand_as(baselines), baselines)


def test_target_forms_are_equivalent() -> None:
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    sess = SESSWrapper(LayerGradCam(NET, NET[4]), n_scales=2, window=12)
    expected = sess.attribute(x, target=[1, 2])
    for target in (torch.tensor([1, 2]), [(1,), (2,)]):
        assert torch.equal(sess.attribute(x, target=target), expected)
    same = sess.attribute(x, target=1)
    for target in ((1,), torch.tensor(1), torch.tensor([1]), [1, 1]):
        assert torch.equal(sess.attribute(x, target=target), same)
    alone = torch.cat([sess.attribute(x[i : i + 1], target=i + 1) for i in range(2)])
    torch.testing.assert_close(alone, expected)
    alone = torch.cat([sess.attribute(x[i : i + 1], target=[i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, expected)
    one_score = SESSWrapper(LayerGradCam(lambda x: NET(x)[:, 1], NET[4]), score="sigmoid")
    one_score.window = one_score.step = (12, 12)
    assert one_score.attribute(x).shape == x.shape
    (of_tuple,) = sess.attribute((x,), target=1)
    assert torch.equal(of_tuple, same)


# --- a toy ---------------------------------------------------------------------------------------


def test_a_small_object_is_found_that_the_base_misses() -> None:
    model = BlobDetector()
    base = LayerGradCam(model, model.pool)
    for y, z in ((5, 40), (40, 9), (27, 27)):
        x = torch.zeros(1, 1, 64, 64)
        x[..., y : y + 4, z : z + 4] = 1  # a quarter of a cell: 0.25 of its mean
        x += 0.05 * torch.rand(1, 1, 64, 64)
        assert not UpsampleWrapper(base).attribute(x, target=1).any()
        result = SESSWrapper(base, scales=[64, 128, 192], window=64).attribute(x, target=1)
        row, column = divmod(int(result.argmax()), 64)
        assert y <= row < y + 4
        assert z <= column < z + 4


# --- state ---------------------------------------------------------------------------------------


def test_the_model_is_left_unchanged(trace_free: Any) -> None:
    net, x = small_net(), torch.randn(2, 3, 14, 14)
    sess = SESSWrapper(LayerCam(net, "relu2"), n_scales=2, window=12, pre_filter_ratio=0.5)
    with trace_free(net, x):
        sess.attribute(x, target=[1, 2])
    net.train()
    with trace_free(net, x), pytest.warns(UserWarning, match="train mode"):
        sess.attribute(x, target=[1, 2])
    net.eval()

    class BrokenError(Exception):
        pass

    def fail(module: nn.Module, args: Any) -> None:
        if len(args[0]) != 2 or args[0].shape[-1] == 12:
            raise BrokenError

    for r in (0.0, 0.5):
        sess.pre_filter_ratio = r
        handle = net.pool.register_forward_pre_hook(fail)
        with trace_free(net, x), pytest.raises(BrokenError):
            sess.attribute(x, target=1)
        handle.remove()


def test_gradient_modes_change_nothing() -> None:
    net, x = pooled_net(torch.float32), torch.randn(1, 3, 14, 14)
    net.requires_grad_(False)
    for base in (LayerCam(net, net[4]), IntegratedGradients(net), Saliency(net)):
        sess = SESSWrapper(base, n_scales=2, window=12)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = sess.attribute(x, target=1)
            with torch.no_grad():
                assert torch.equal(sess.attribute(x, target=1), expected)
            assert torch.equal(sess.attribute(x.clone().requires_grad_(), target=1), expected)
        assert not expected.requires_grad
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            sess.attribute(x, target=1)
    forward_only = SESSWrapper(LayerActivation(net, net[4]), n_scales=2, window=12, score="logit")
    forward_only.forward_func = lambda x: net(x)[:, 1].abs()
    with torch.inference_mode():
        assert forward_only.attribute(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_work(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 20, 20)
    expected = SESSWrapper(LayerCam(pooled_net(torch.float32), "4"), n_scales=2, window=12)
    actual = SESSWrapper(LayerCam(pooled_net(dtype), "4"), n_scales=2, window=12)
    result = actual.attribute(x.to(dtype), target=1)
    assert result.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        result.float(), expected.attribute(x, target=1), rtol=0, atol=tolerance
    )


def test_threads_share_a_wrapper() -> None:
    net, x = small_net(), torch.randn(2, 3, 14, 14)
    sess = SESSWrapper(LayerCam(net, "relu2"), n_scales=2, window=12)
    expected = sess.attribute(x, target=[1, 2])
    result: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: result.append(sess.attribute(x, target=[1, 2])))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(result) == 8
    for attributions in result:
        assert torch.equal(attributions, expected)


def test_attribution_properties_are_those_of_the_base() -> None:
    net = pooled_net()
    for multiplies in (True, False):
        ig = IntegratedGradients(net, multiply_by_inputs=multiplies)
        sess = SESSWrapper(ig)
        assert sess.forward_func is net
        assert sess.multiplies_by_inputs is multiplies
        assert not sess.has_convergence_delta()
    with pytest.raises(NotImplementedError):
        sess.attribute_future()
    with pytest.raises(ValueError, match="return_convergence_delta"):
        sess.attribute(torch.randn(1, 3, 9, 9), target=1, return_convergence_delta=True)


def test_repr_is_the_call_that_makes_the_wrapper() -> None:
    net = small_net()
    inner = SESSWrapper(LayerGradCam(net, net.relu2), n_scales=4, window=(12, 14))
    assert repr(UpsampleWrapper(inner, fuse="mean")) == (
        "UpsampleWrapper(SESSWrapper(LayerGradCam(SmallNet, layer='relu2'), n_scales=4, "
        "window=(12, 14)), fuse='mean')"
    )
    square = SESSWrapper(NoiseTunnel(Saliency(net)), window=12, step=6, sign="signed")
    assert repr(square) == (
        "SESSWrapper(NoiseTunnel(Saliency(SmallNet)), window=12, step=(6, 6), sign='signed')"
    )


# --- bad input -----------------------------------------------------------------------------------


def test_odd_sizes_work() -> None:
    sess = SESSWrapper(LayerGradCam(NET, NET[4]), n_scales=2, window=12)
    for size in ((3, 5), (1, 1), (12, 40), (7, 12)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about maps of zeros
            result = sess.attribute(x, target=1)
        assert result.shape == x.shape
        assert torch.isfinite(result).all()


def test_too_many_windows_raise_before_the_model_runs() -> None:
    model = mean_recorder()
    sess = SESSWrapper(Spy(model))
    with pytest.raises(ValueError, match=r"has \d+ windows of .* more than `max_patches` 4096"):
        sess.attribute(torch.rand(1, 3, 10, 2000), target=0)
    assert not model.batch_sizes
    sess = SESSWrapper(Spy(model), n_scales=1, window=8, max_patches=200)
    assert sess.attribute(torch.rand(1, 3, 2, 400), target=0).shape == (1, 3, 2, 400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_scales": 0}, "`n_scales` must be an integer of at least 1"),
        ({"scales": [200]}, "`scales` must not be smaller than the `window`"),
        ({"scales": []}, "`scales` must not be empty"),
        ({"scales": "log"}, "`scales` must be .*'log'"),
        ({"scales": [2.5]}, "`scales` must be an integer"),
        ({"window": 0}, "`window` must be an integer"),
        ({"window": (2, 3, 4)}, "`window` must be one or two numbers of pixels"),
        ({"step": 300}, "`step` .* is larger than the `window`"),
        ({"pre_filter_ratio": 1.0}, "`pre_filter_ratio` must be a number, at least 0 and below 1"),
        ({"pre_filter_ratio": -0.1}, "`pre_filter_ratio`"),
        ({"pre_filter_ratio": math.nan}, "`pre_filter_ratio`"),
        ({"pre_filter_ratio": None}, "`pre_filter_ratio`"),
        ({"theta": 1.0}, "`theta` must be a number, at least 0 and below 1"),
        ({"theta": 0.1, "fusion": "coverage"}, "`theta` has no effect"),
        ({"percentile": 101}, "`percentile` must be"),
        ({"pool": "sum"}, "`pool` must be one of"),
        ({"fusion": "exact"}, "`fusion` must be one of"),
        ({"score": "probability"}, "`score` must be one of"),
        ({"sign": "both"}, "`sign` must be one of"),
        ({"sign": "signed", "fusion": "soft"}, "`sign`='signed' goes with"),
        ({"sign": "signed", "pool": "max"}, "`sign`='signed' goes with"),
        ({"channel_reduction": "mean"}, "`channel_reduction` must be one of"),
        ({"smooth_kernel": 10}, "`smooth_kernel` must be odd"),
        ({"smooth_kernel": 3.0}, "`smooth_kernel` must be an integer"),
        ({"smooth_sigma": math.nan}, "`smooth_sigma` must be a number, greater than 0"),
        ({"align": (math.nan, 1.0)}, "`align` must be"),
        ({"align": ("a", 1)}, "`align` must be"),
        ({"scales": 24}, "`scales` must be integers"),
        ({"align": "rf"}, "`align`='rf' is for the units of one layer"),
        ({"align": "corner"}, "`align` must be"),
        ({"align": (1.0,)}, "`align` must be"),
        ({"internal_batch_size": 0}, "`internal_batch_size`"),
        ({"max_patches": 0}, "`max_patches`"),
    ],
)
def test_wrong_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        SESSWrapper(Saliency(NET), **options)
    assert caught.value.argument == message.split("`")[1]
    with pytest.raises(TypeError, match="`attribution_method`"):
        SESSWrapper(Saliency)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 3, 20), "`inputs` must be images"),
        (torch.randn(2, 3, 20, 20, 20), "`inputs` must be images"),
        (torch.zeros(2, 3, 20, 20, dtype=torch.long), "`inputs` must be images"),
        (torch.zeros(0, 3, 20, 20), "`inputs` must have at least one example"),
        ((torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 9)), "`inputs` must be one tensor"),
        (torch.full((1, 3, 20, 20), math.nan), "`inputs` has values that are not finite"),
    ],
)
def test_wrong_inputs_raise(inputs: Any, message: str) -> None:
    model = mean_recorder()
    with pytest.raises(ValueError, match=message):
        SESSWrapper(Saliency(model), window=12).attribute(inputs, target=0)
    assert not model.batch_sizes


def test_wrong_arguments_of_the_base_raise() -> None:
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    sess = SESSWrapper(IntegratedGradients(NET), n_scales=2, window=12)
    for target in ([1, 2, 3], torch.tensor([1, 2, 3]), torch.zeros(2, 1).long()):
        with pytest.raises(AssertionError):
            sess.attribute(x, target=target)
    with pytest.raises(AssertionError):
        sess.attribute(x)
    with pytest.raises((AssertionError, IndexError)):
        sess.attribute(x, target=17)
    with pytest.raises(ValueError, match="`baselines` must have the shape of the images"):
        sess.attribute(x, target=1, baselines=x[:, :, :5])
    with pytest.raises(ValueError, match="`feature_mask` must have the shape"):
        SESSWrapper(FeatureAblation(NET), window=12).attribute(
            x, target=1, feature_mask=torch.zeros(1, 1, 5, 5).long()
        )


def test_unusable_results_of_the_base_raise() -> None:
    x = torch.randn(2, 3, 20, 20)

    class FunctionAttribution(Attribution):
        def __init__(self, give: Any) -> None:
            super().__init__(lambda x: x[:, :2, 0, 0])
            self.give = give

        @log_usage()
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Any:
            return self.give(inputs)

    for give, message in (
        (lambda x: x * math.nan, "attributions that are not finite"),
        (lambda x: x[:1], "cannot be laid over them"),
        (lambda x: x.flatten(1), "cannot be laid over them"),
        (lambda x: x[..., :4], "an attribution of the input has its shape"),
        (lambda x: (x, x), "gave 2 maps for one image"),
    ):
        with pytest.raises(
            ValueError, match=f"`attribution_method` FunctionAttribution gave .*{message}|{message}"
        ):
            SESSWrapper(FunctionAttribution(give), n_scales=2, window=12).attribute(x, target=0)
    with pytest.raises(ValueError, match="`channel_reduction` must turn"):
        SESSWrapper(
            FunctionAttribution(lambda x: x), window=12, channel_reduction=lambda a: a
        ).attribute(x, target=0)


def test_unusable_scores_of_the_model_raise() -> None:
    x = torch.rand(1, 3, 20, 20)

    def sess(model: Any, **options: Any) -> SESSWrapper:
        return SESSWrapper(Spy(model), n_scales=2, window=12, **options)

    for r in (0.0, 0.5):
        with pytest.raises(ValueError, match=r"`score`: the model's scores .* not finite"):
            sess(lambda x: x[:, :2, 0, 0] * math.nan, pre_filter_ratio=r).attribute(x, target=0)
        with pytest.raises(ValueError, match="`score` 'softmax' needs two classes or more"):
            sess(lambda x: x[:, :1, 0, 0], pre_filter_ratio=r).attribute(x, target=0)
        with pytest.warns(UserWarning, match="a probability already"):
            sess(lambda x: x[:, :2, 0, 0].softmax(1), pre_filter_ratio=r).attribute(x, target=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sess(lambda x: x[:, :2, 0, 0].softmax(1), score="logit").attribute(x, target=0)
        sess(lambda x: x[:, :2, 0, 0], score=lambda out: out.exp()).attribute(x, target=0)


def test_a_model_for_one_size_raises() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 20, 4))
    x = torch.randn(1, 3, 20, 20)
    for r in (0.0, 0.5):
        sess = SESSWrapper(Saliency(net), n_scales=2, window=12, pre_filter_ratio=r)
        with pytest.raises(ValueError, match="explains a model that needs whole images"):
            sess.attribute(x, target=1)
    assert SESSWrapper(Saliency(net), n_scales=2, window=20).attribute(x, target=1).shape == x.shape


def test_scales_by_sqrt2_end_at_the_image() -> None:
    sess = SESSWrapper(Saliency(NET), scales="sqrt2")
    large = sess._scaled_sizes(torch.empty(1, 3, 2160, 3840))
    assert [min(size) for size in large] == [224, 317, 448, 634, 896, 1267, 1792]
    assert len(sess._slide_windows(large)) == 252
    small = sess._scaled_sizes(torch.empty(1, 3, 100, 100))
    assert [size[0] for size in small] == [224, 317, 448, 634, 896]


@pytest.mark.parametrize(
    ("scales", "shorts"), [(None, [8, 10, 12]), ("sqrt2", [8, 11, 16, 23, 32])]
)
@pytest.mark.parametrize("window", [(4, 8), (8, 4)])
def test_scales_begin_at_the_longer_side_of_the_window(
    scales: Any, shorts: list[int], window: tuple[int, int]
) -> None:
    """No picture is smaller than a window."""
    x = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    by_rule = SESSWrapper(Saliency(NET), n_scales=3, scales=scales, window=window)
    assert by_rule._scaled_sizes(x) == [(short, short) for short in shorts]
    listed = SESSWrapper(Saliency(NET), scales=shorts, window=window)
    assert torch.equal(by_rule.attribute(x, target=0), listed.attribute(x, target=0))
