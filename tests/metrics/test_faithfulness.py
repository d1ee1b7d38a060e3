"""Insertion, deletion, average drop, increase in confidence and ROAD, by hand on a few pixels."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from captum_ext.imaging import min_max
from captum_ext.infill import gaussian
from captum_ext.metrics import (
    AverageDrop,
    Curve,
    Deletion,
    IncreaseInConfidence,
    Insertion,
    Overall,
    Road,
    RoadScores,
    average_drop,
    deletion,
    increase_in_confidence,
    insertion,
    linear_imputation,
    overall_score,
    road,
)
from tests.networks import ScaledHalves, SmallNet, WeightedSum, small_net

D = torch.float64
WEIGHTS = torch.tensor([[5.0, 1.0, 2.0], [-1.0, 0.0, 3.0]], dtype=D)
CURVES: dict[str, Callable[..., Curve]] = {"insertion": insertion, "deletion": deletion}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **CURVES,
    "overall": overall_score,
    "drop": average_drop,
    "increase": increase_in_confidence,
    "road": road,
}
for_every_function = pytest.mark.parametrize("name", FUNCTIONS)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape or (1, 1, 2, 3), dtype=D)


def numbers(result: Any) -> Tensor:
    """All numbers of a result, as one row."""
    if isinstance(result, Tensor):
        return result.reshape(-1).double()
    return torch.cat([numbers(part) for part in result])


def image_tensors(result: Any) -> list[Tensor]:
    """The tensors of a result that have an entry for each image."""
    if isinstance(result, Tensor):
        return [result]
    parts = [*result] if hasattr(result, "insertion") else [*result[:-1]]
    return [t for part in parts for t in image_tensors(part)]


def pictures(n: int = 3, side: int = 9, dtype: torch.dtype = D, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, side, side, generator=Generator().manual_seed(seed), dtype=dtype)


def maps(x: Tensor, seed: int = 1) -> Tensor:
    generator = Generator().manual_seed(seed)
    return torch.randn(len(x), *x.shape[2:], generator=generator, dtype=D).to(x.dtype)


# --- by hand -------------------------------------------------------------------------------------


def test_the_curves_of_a_linear_model_by_hand() -> None:
    model, x = WeightedSum(WEIGHTS), ones()
    options: dict[str, Any] = {"score": "logit", "step": 1, "baselines": 0}
    best = WEIGHTS[None]
    coming = insertion(model, x, best, **options)
    assert coming.scores.tolist() == [[0, 5, 8, 10, 11, 11, 10]]
    assert coming.auc.item() == pytest.approx((5 + 8 + 10 + 11 + 11 + 10 / 2) / 6)
    assert coming.shares.tolist() == pytest.approx([i / 6 for i in range(7)])
    going = deletion(model, x, best, **options)
    assert going.scores.tolist() == [[10, 5, 2, 0, -1, -1, 0]]
    assert going.auc.item() == pytest.approx((10 / 2 + 5 + 2 + 0 - 1 - 1) / 6)
    worst = insertion(model, x, -best, **options)
    assert worst.scores.tolist() == [[0, -1, -1, 0, 2, 5, 10]]
    both = overall_score(
        model, x, best, insertion_baselines=0, deletion_baselines=0, step=1, score="logit"
    )
    assert both.score.item() == pytest.approx(coming.auc.item() - going.auc.item())
    assert both.insertion.scores.tolist() == coming.scores.tolist()
    assert both.deletion.scores.tolist() == going.scores.tolist()


def test_baselines_fill_the_pixels_that_are_not_inserted() -> None:
    model, x = WeightedSum(WEIGHTS), ones()
    for baselines in (-2, torch.full((1, 1, 1, 1), -2.0), lambda x: -2 * x):
        curve = insertion(model, x, WEIGHTS[None], baselines=baselines, step=1, score="logit")
        assert curve.scores.tolist() == [[-20, -5, 4, 10, 13, 13, 10]]
    kept = deletion(
        model,
        x,
        WEIGHTS[None],
        baselines=lambda x, keep: keep.sum((1, 2, 3), keepdim=True) + 0 * x,
        step=1,
        score="logit",
    )
    # With k pixels kept, the others have the value k.
    hidden = [0, 5, 8, 10, 11, 11, 10]
    by_hand = [10 - h + (6 - i) * h for i, h in enumerate(hidden)]
    assert kept.scores.tolist() == [by_hand]


@pytest.mark.parametrize(
    ("step", "counts"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6]),
        (4, [0, 4, 6]),
        (6, [0, 6]),
        (0.5, [0, 3, 6]),
        (1.0, [0, 6]),
        (0.4, [0, 2, 5, 6]),
        (1 / 28, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_steps_in_pixels_and_in_shares(step: float, counts: list[int]) -> None:
    scores = [0, 5, 8, 10, 11, 11, 10]
    model = WeightedSum(WEIGHTS)
    curve = insertion(model, ones(), WEIGHTS[None], baselines=0, step=step, score="logit")
    assert curve.shares.tolist() == pytest.approx([c / 6 for c in counts])
    assert curve.scores.tolist() == [[scores[c] for c in counts]]
    area = sum((b - a) * (scores[a] + scores[b]) / 12 for a, b in pairwise(counts))
    assert curve.auc.item() == pytest.approx(area)


def test_the_default_step_is_the_literatures() -> None:
    x = ones(1, 1, 224, 224)
    curve = insertion(lambda x: x.mean((1, 2, 3)), x, x, baselines=0, score="logit")
    assert (curve.shares * 224**2).round().tolist() == list(range(0, 224**2 + 1, 1792))
    sess = partial(gaussian, sigma=50.0, kernel_size=51)
    blurred = insertion(lambda x: x.mean((1, 2, 3)), x, x, baselines=sess, score="logit")
    assert blurred.auc.item() == pytest.approx(1)


def test_drop_and_increase_by_hand() -> None:
    model, x = WeightedSum(WEIGHTS), ones(3, 1, 2, 3)
    best = WEIGHTS.clamp(min=0)
    spread = torch.tensor([[2.0, 0, 0], [0, 0, 1.0]], dtype=D) * 7 - 3  # scaled to 1 and 1/2
    attributions = torch.stack((best, spread, -WEIGHTS))
    marked = [(25 + 1 + 4 + 9) / 5, 5 + 1.5, (0 * 5 + 4 + 2 * 3 - 6 + 0 * 5 + 2 * 3) / 6]
    drop = average_drop(model, x, attributions, score="logit")
    assert drop.tolist() == pytest.approx([1 - s / 10 for s in marked])
    assert not increase_in_confidence(model, x, attributions, score="logit").any()
    without = torch.tensor([[1.0, 1, 1], [0, 0, 1]], dtype=D).expand(3, 2, 3)  # 11 > 10
    assert average_drop(model, x, without, score="logit").tolist() == [0, 0, 0]
    assert increase_in_confidence(model, x, without, score="logit").tolist() == [True] * 3
    other = average_drop(model, x, attributions, baselines=-1, score="logit")
    # x m + b (1 - m) = 2 m - 1
    assert other.tolist() == pytest.approx([1 - (2 * s - 10) / 10 for s in marked])


def test_a_drop_is_a_share_of_probabilities() -> None:
    model, x = small_net(dtype=D), pictures()
    attributions = maps(x)
    masked = x * min_max(attributions[:, None])
    with torch.no_grad():
        y, o = (model(inputs).softmax(1)[:, 2] for inputs in (x, masked))
    drop = average_drop(model, x, attributions, 2)
    torch.testing.assert_close(drop, (y - o).clamp(min=0) / y)
    assert increase_in_confidence(model, x, attributions, 2).tolist() == (y < o).tolist()


def test_a_flat_map_hides_everything_and_scale_and_shift_change_nothing() -> None:
    model, x = WeightedSum(WEIGHTS), ones()
    for value in (-3.0, 0.0, 5.0):
        flat = torch.full((1, 2, 3), value, dtype=D)
        assert average_drop(model, x, flat, score="logit").tolist() == [1]
        assert average_drop(model, x, flat, baselines=0.25, score="logit").tolist() == [0.75]
        assert not increase_in_confidence(model, x, flat, score="logit").any()
    attributions = maps(x)
    first = average_drop(model, x, attributions, score="logit")
    assert 0 < first.item() < 1
    torch.testing.assert_close(average_drop(model, x, 7 * attributions - 2, score="logit"), first)
    without = torch.tensor([[1.0, 1, 1], [0, 0, 1]], dtype=D)[None]
    for equal in (without, 7 * without - 2, without / 1024):
        assert increase_in_confidence(model, x, equal, score="logit").tolist() == [True]


def test_a_score_of_zero_has_no_drop_and_a_negative_score_raises_an_error() -> None:
    silent = WeightedSum(torch.zeros(2, 3, dtype=D))
    assert average_drop(silent, ones(), WEIGHTS[None], score="logit").tolist() == [0]
    assert increase_in_confidence(silent, ones(), WEIGHTS[None], score="logit").tolist() == [False]
    with pytest.raises(ValueError, match=r"`score` 'logit' is below 0"):
        average_drop(WeightedSum(-WEIGHTS), ones(), WEIGHTS[None], score="logit")


# --- which map is better -------------------------------------------------------------------------


def picture_and_weights() -> tuple[Tensor, Tensor, Tensor]:
    """An image of noise, the weights of a linear model of nine pixels, and its perfect map."""
    x = torch.randn(1, 1, 12, 12, generator=Generator().manual_seed(0), dtype=D)
    weights = torch.zeros(12, 12, dtype=D)
    weights[3:6, 5:8] = x[0, 0, 3:6, 5:8].sign()
    return x, weights, (x[0] * weights)


def test_perfect_constant_and_inverted_maps_are_ranked() -> None:
    x, weights, perfect = picture_and_weights()
    model = WeightedSum(weights)
    constant = torch.full_like(perfect, 0.3)
    options: dict[str, Any] = {"score": "logit", "step": 2}
    coming = [insertion(model, x, m, **options).auc for m in (perfect, constant, -perfect)]
    going = [deletion(model, x, m, **options).auc for m in (perfect, constant, -perfect)]
    assert coming[0] > coming[1] > coming[2]
    assert going[0] < going[1] < going[2]
    debiased = [road(model, x, m, score="logit").score for m in (perfect, constant, -perfect)]
    assert debiased[0] > debiased[1] > debiased[2]
    assert debiased[0].item() == pytest.approx(-debiased[2].item(), rel=0.2)


def test_perfect_inverted_and_constant_maps_by_hand() -> None:
    """The maps are the weights of a model of four pixels, their opposite, and a constant."""
    weights = torch.tensor([[4.0, 3.0, -1.0, -2.0]], dtype=D)
    model, x = WeightedSum(weights), ones(3, 1, 1, 4)
    maps = torch.stack((weights, -weights, torch.full_like(weights, 0.5)))
    options: dict[str, Any] = {"step": 1, "score": "logit"}
    result = overall_score(model, x, maps, insertion_baselines=0, deletion_baselines=0, **options)
    assert result.insertion.scores[:2].tolist() == [[0, 4, 7, 6, 4], [0, -2, -3, 0, 4]]
    assert result.deletion.scores[:2].tolist() == [[4, 0, -3, -2, 0], [4, 6, 7, 4, 0]]
    assert result.insertion.auc[:2].tolist() == [19 / 4, -3 / 4]
    assert result.deletion.auc[:2].tolist() == [-3 / 4, 19 / 4]
    assert result.score[:2].tolist() == [22 / 4, -22 / 4]
    # Scaled to [0, 1], the maps are (1, 5/6, 1/6, 0), its inverse, and zeros.
    drops = [0, (4 - (3 / 6 - 5 / 6 - 2)) / 4, 1]
    assert average_drop(model, x, maps, score="logit").tolist() == pytest.approx(drops)
    better = increase_in_confidence(model, x, maps, score="logit")
    assert better.tolist() == [True, False, False]

    ramp = torch.tensor([[[[8.0, 6.0, 4.0, 2.0, 0.0]]]], dtype=D)
    both = road(
        WeightedSum(torch.ones(1, 5, dtype=D)),
        ramp.repeat(2, 1, 1, 1),
        torch.cat((ramp, -ramp)),
        percentiles=[20, 40],
        noise=0,
        score="logit",
    )
    # 8 becomes 6, then 8 and 6 become 4; from the other end 0 becomes 2, then 2 and 0 become 4.
    assert torch.allclose(both.morf, torch.tensor([[18, 14], [22, 26]], dtype=D))
    assert torch.allclose(both.lerf, torch.tensor([[22, 26], [18, 14]], dtype=D))
    assert torch.allclose(both.score, torch.tensor([4.0, -4.0], dtype=D))


def test_a_constant_map_equals_a_map_of_its_random_order() -> None:
    """Weights that are powers of two show the order; a map of this order has the same curves."""
    model = WeightedSum(2.0 ** torch.arange(12, dtype=D).reshape(3, 4))
    x, constant = ones(1, 1, 3, 4), torch.full((1, 3, 4), 0.5, dtype=D)
    coming = insertion(model, x, constant, baselines=0, step=1, score="logit").scores[0]
    order = coming.diff().log2().round().long()
    assert sorted(order.tolist()) == list(range(12)) != order.tolist()
    explicit = torch.empty(12, dtype=D).scatter_(0, order, 12 - torch.arange(12.0, dtype=D))
    noisy = torch.randn(1, 1, 3, 4, dtype=D, generator=Generator().manual_seed(0))
    for function in (insertion, deletion, overall_score, road):
        flat = numbers(function(model, noisy, constant, score="logit"))
        assert torch.equal(
            numbers(function(model, noisy, explicit.view(1, 3, 4), score="logit")), flat
        )


def aucs_of_tied_pixels(values: Tensor) -> Tensor:
    """The AUCs of insertion for 300 random orders of the tied pixels."""
    model = WeightedSum(torch.arange(36.0, dtype=D).reshape(6, 6))
    aucs = [
        insertion(
            model,
            ones(1, 1, 6, 6),
            values,
            baselines=0,
            step=1,
            score="logit",
            generator=Generator().manual_seed(seed),
        ).auc
        for seed in range(300)
    ]
    return torch.cat(aucs)


def test_equal_pixels_come_in_random_order() -> None:
    """The weights rise in row-major order, so that a row-major order of pixels is far off."""
    constant = aucs_of_tied_pixels(torch.zeros(1, 6, 6))
    deviation = constant.std() / 300**0.5
    assert abs(constant.mean() - 630 / 2) < 4 * deviation
    assert deviation < 3
    half = torch.zeros(1, 6, 6)
    half[:, :, 3:] = 1
    right = sum(i for i in range(36) if i % 6 >= 3)
    expected = (right / 2 + (right + 630) / 2) / 2
    halves = aucs_of_tied_pixels(half)
    assert abs(halves.mean() - expected) < 4 * halves.std() / 300**0.5


def test_without_a_generator_the_order_is_fixed_and_not_row_major() -> None:
    model = WeightedSum(torch.arange(36.0, dtype=D).reshape(6, 6))
    state = torch.get_rng_state()
    runs = [
        insertion(model, ones(2, 1, 6, 6), torch.full((2, 6, 6), v), baselines=0, score="logit")
        for v in (0.0, 7.0)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0].scores, runs[1].scores)
    assert torch.equal(runs[0].scores[0], runs[0].scores[1])
    assert abs(runs[0].auc[0].item() - 315) < 40  # in row-major order it would be 210
    zeros = torch.zeros(1, 6, 6)
    signed = torch.where(torch.arange(36).reshape(1, 6, 6) < 18, -zeros, zeros)
    again = insertion(model, ones(1, 1, 6, 6), signed, baselines=0, score="logit")
    assert torch.equal(again.scores[0], runs[0].scores[0])


@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    levels=st.integers(1, 8),
    seed=st.integers(0, 10**6),
)
def test_only_the_order_of_pixels_counts(height: int, width: int, levels: int, seed: int) -> None:
    generator = Generator().manual_seed(seed)
    values = torch.randint(levels, (2, height, width), generator=generator).to(D)
    x = torch.randn(2, 1, height, width, generator=generator, dtype=D)
    model = WeightedSum(torch.randn(height, width, generator=generator, dtype=D))
    for function in (insertion, deletion, overall_score, road):
        first = numbers(function(model, x, values, score="logit"))
        for other in (values.exp(), values**3 - 5, values * 1e-30, (values / 8).bfloat16()):
            assert torch.equal(numbers(function(model, x, other, score="logit")), first)


def test_curves_equal_those_of_an_argsort() -> None:
    """The maps have no equal pixels."""
    x = pictures(2, 5)
    model, attributions = small_net(dtype=D), maps(x)
    curve = deletion(model, x, attributions, 1, step=3, baselines="mean")
    for i, values in enumerate(attributions):
        order = values.flatten().argsort(descending=True)
        means = x[i].mean((1, 2))
        for point, count in enumerate([*range(0, 25, 3), 25]):
            picture = x[i].clone().flatten(1)
            picture[:, order[:count]] = means[:, None]
            with torch.no_grad():
                score = model(picture.reshape(1, 3, 5, 5)).softmax(1)[0, 1]
            torch.testing.assert_close(curve.scores[i, point], score)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "logit", lambda o: o[:, :2] ** 2])
def test_curves_end_at_the_scores_of_the_image_and_of_the_baseline(score: Any) -> None:
    model, x = small_net(), pictures(dtype=torch.float32)
    functions = {"softmax": lambda o: o.softmax(1), "sigmoid": torch.sigmoid, "logit": lambda o: o}
    with torch.no_grad():
        of_image, of_baseline = (
            (score if callable(score) else functions[score])(model(i))[:, 1]
            for i in (x, torch.zeros_like(x))
        )
    inserted = insertion(model, x, maps(x), 1, baselines="zeros", score=score).scores
    deleted = deletion(model, x, maps(x), 1, score=score).scores
    for scores, expected in (
        (inserted[:, 0], of_baseline),
        (inserted[:, -1], of_image),
        (deleted[:, 0], of_image),
        (deleted[:, -1], of_baseline),
    ):
        torch.testing.assert_close(scores, expected)


# --- ROAD ----------------------------------------------------------------------------------------


def dense(image: Tensor, keep: Tensor) -> Tensor:
    """Impute an image (C, H, W) by a dense system, with an equation for each pixel."""
    _, height, width = image.shape
    matrix = torch.zeros(height * width, height * width, dtype=D)
    right = torch.zeros(height * width, len(image), dtype=D)
    for y in range(height):
        for x in range(width):
            p = y * width + x
            if keep[y, x]:
                matrix[p, p], right[p] = 1, image[:, y, x].to(D)
                continue
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    inside = 0 <= y + dy < height and 0 <= x + dx < width
                    if inside and (dy or dx):
                        weight = 1 / 6 if dy == 0 or dx == 0 else 1 / 12
                        matrix[p, p] += weight
                        matrix[p, p + dy * width + dx] -= weight
    return torch.linalg.solve(matrix, right).T.reshape(image.shape)


@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    channels=st.integers(1, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_the_imputation_equals_a_dense_solve(
    height: int, width: int, channels: int, share: float, seed: int
) -> None:
    generator = Generator().manual_seed(seed)
    images = torch.randn(2, channels, height, width, generator=generator, dtype=D)
    keep = torch.rand(2, 1, height, width, generator=generator) < share
    keep[:, 0, height // 2, 0] = True
    imputed = linear_imputation(images, keep.double())
    for image, kept, result in zip(images, keep[:, 0], imputed, strict=True):
        torch.testing.assert_close(result, dense(image, kept))
        assert torch.equal(result[:, kept], image[:, kept])
    single = linear_imputation(images.float(), keep.double())
    torch.testing.assert_close(single, imputed.float())


def test_images_without_a_kept_pixel_become_zeros() -> None:
    x = pictures(2, 4)
    keep = torch.zeros(2, 1, 4, 4)
    keep[1] = 1
    assert torch.equal(linear_imputation(x, keep), x * keep)
    curve = deletion(small_net(dtype=D), x, maps(x), 1, baselines=linear_imputation)
    of_zeros = deletion(small_net(dtype=D), x, maps(x), 1)
    torch.testing.assert_close(curve.scores[:, -1], of_zeros.scores[:, -1])


def test_road_by_hand() -> None:
    x, model = pictures(2, 5), small_net(dtype=D)
    attributions = maps(x)
    result = road(model, x, attributions, 2, percentiles=(20, 62, 99.9), noise=0)
    assert result.percentiles.tolist() == pytest.approx([20, 62, 99.9])
    for i, values in enumerate(attributions):
        order = values.flatten().argsort(descending=True)
        for scores, first in ((result.morf, order), (result.lerf, order.flip(0))):
            for point, count in enumerate((5, 16, 24)):
                keep = torch.ones(25, dtype=torch.bool)
                keep[first[:count]] = False
                imputed = dense(x[i], keep.reshape(5, 5))
                with torch.no_grad():
                    score = model(imputed[None]).softmax(1)[0, 2]
                torch.testing.assert_close(scores[i, point], score)
    torch.testing.assert_close(result.score, (result.lerf - result.morf).mean(1) / 2)


def test_only_removed_pixels_have_noise_of_the_given_size() -> None:
    batches: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        batches.append(x)
        return x.sum((1, 2, 3))

    x = torch.ones(1, 2, 40, 40, dtype=D)
    options: dict[str, Any] = {"percentiles": [50], "score": "logit"}
    road(model, x, maps(x), noise=0.3, **options)
    for picture in batches:
        removed = picture[0] != 1
        assert removed[0].sum() == removed[1].sum() == 800
        assert (picture[0][removed] - 1).std().item() == pytest.approx(0.3, rel=0.1)
        assert not torch.equal(picture[0, 0][removed[0]], picture[0, 1][removed[1]])
    first = road(model, x, maps(x), **options).morf
    assert torch.equal(road(model, x, maps(x), **options).morf, first)
    other = road(model, x, maps(x), generator=Generator().manual_seed(5), **options).morf
    assert not torch.equal(other, first)


# --- batches, chunks, targets --------------------------------------------------------------------


@for_every_function
def test_a_batch_equals_its_images(name: str) -> None:
    x, model = pictures(), small_net(dtype=D)
    attributions, target = maps(x).round(), torch.tensor([2, 0, 1])
    together = image_tensors(FUNCTIONS[name](model, x, attributions, target))
    singles = [
        image_tensors(
            FUNCTIONS[name](model, x[i : i + 1], attributions[i : i + 1], target[i].item())
        )
        for i in range(3)
    ]
    for values, *pieces in zip(together, *singles, strict=True):
        torch.testing.assert_close(values, torch.cat(pieces))


@for_every_function
@pytest.mark.parametrize("baselines", ["local", "noise"])
def test_chunks_change_nothing(name: str, baselines: str) -> None:
    x, model = pictures(), small_net(dtype=D)
    sizes: list[int] = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return model(x)

    options = {"baselines": baselines}
    if name == "overall":
        options = {"insertion_baselines": baselines, "deletion_baselines": baselines}
    function = partial(FUNCTIONS[name], **({} if name == "road" else options))
    at_once = numbers(function(model, x, maps(x), 1, internal_batch_size=1000))
    for size in (1, 4, 7):
        sizes.clear()
        pieces = numbers(function(watched, x, maps(x), 1, internal_batch_size=size))
        torch.testing.assert_close(pieces, at_once)
        assert max(sizes) == min(size, 6 if name in ("drop", "increase") else size)


@for_every_function
def test_targets_of_all_forms_are_accepted(name: str) -> None:
    x, model = pictures(), small_net(dtype=D)
    by_class = [numbers(FUNCTIONS[name](model, x, maps(x), t)) for t in range(3)]
    run = FUNCTIONS[name]
    for target in (1, (1,), torch.tensor(1), torch.tensor([1]), [1, 1, 1], [(1,)] * 3):
        assert torch.equal(numbers(run(model, x, maps(x), target)), by_class[1])
    mixed = [image_tensors(run(model, x, maps(x), t)) for t in (2, 0, 1)]
    for target in ([2, 0, 1], torch.tensor([2, 0, 1]), [(2,), (0,), (1,)]):
        for values, *singles in zip(
            image_tensors(run(model, x, maps(x), target)), *mixed, strict=True
        ):
            torch.testing.assert_close(values, torch.stack([singles[i][i] for i in range(3)]))


def test_targets_may_be_tuples_and_arguments_follow_their_image() -> None:
    x, scale = pictures(3, 8), torch.tensor([1.0, -2.0, 3.0], dtype=D)
    target = [(0, 1, 0), (2, 0, 0), (1, 1, 0)]
    curve = deletion(
        ScaledHalves(), x, maps(x), target, (scale, 0.5), score="logit", internal_batch_size=5
    )
    for i, (c, position, _) in enumerate(target):
        part = x[i, c].chunk(2, 1)[position].mean() * scale[i] + 0.5
        torch.testing.assert_close(curve.scores[i, 0], part)
    assert curve.scores[:, -1].tolist() == [0.5] * 3


# --- channels, dtypes ----------------------------------------------------------------------------


@for_every_function
def test_equal_channels_count_once_and_others_are_summed(name: str) -> None:
    x, model, run = pictures(), small_net(dtype=D), FUNCTIONS[name]
    attributions = maps(x)
    plain = numbers(run(model, x, attributions, 1))
    repeated = attributions[:, None].repeat(1, 3, 1, 1)
    parts = torch.stack(
        (attributions * 0.25, attributions * 0.75, torch.zeros_like(attributions)), 1
    )
    for equal in (
        attributions[:, None],
        repeated,
        (repeated,),
        parts,
        attributions.clone().requires_grad_(),
    ):
        torch.testing.assert_close(numbers(run(model, x, equal, 1)), plain)
    torch.testing.assert_close(numbers(run(model, (x,), attributions, 1)), plain)


@for_every_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_give_float32_results(name: str, dtype: torch.dtype) -> None:
    x, model, run = pictures(), small_net(dtype=D), FUNCTIONS[name]
    attributions = maps(x).to(dtype)
    for values in image_tensors(run(small_net(dtype=dtype), x.to(dtype), attributions, 1)):
        assert values.dtype in (torch.float32, torch.bool)
    if name != "increase":
        true = numbers(run(model, x, attributions, 1))
        half = numbers(run(small_net(dtype=dtype), x.to(dtype), attributions, 1))
        torch.testing.assert_close(half, true, atol=0.03, rtol=0)


# --- no trace ------------------------------------------------------------------------------------


def failing_model(model: SmallNet) -> Callable[[Tensor], Tensor]:
    calls: list[int] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle")
        return model(x.mul_(1))

    forward.__wrapped__ = model  # type: ignore[attr-defined]
    return forward


@for_every_function
@pytest.mark.parametrize("mode", ["eval", "train", "frozen", "no_grad", "inference"])
def test_metrics_leave_no_trace(name: str, mode: str, trace_free: Any, recwarn: Any) -> None:
    model, x = small_net(), pictures(dtype=torch.float32).requires_grad_()
    model.train(mode == "train").requires_grad_(mode != "frozen")
    attributions = maps(x.detach())
    outer = {"no_grad": torch.no_grad(), "inference": torch.inference_mode()}.get(mode)
    with outer or torch.enable_grad(), trace_free(model, x, attributions):
        FUNCTIONS[name](model, x, attributions, 1)
        with pytest.raises(RuntimeError, match="in the middle"):
            FUNCTIONS[name](failing_model(model), x, attributions, 1, internal_batch_size=2)
    assert any("train mode" in str(w.message) for w in recwarn) == (mode == "train")


@for_every_function
def test_a_model_that_writes_into_its_input_changes_nothing(name: str) -> None:
    x, model = pictures(), small_net(dtype=D)
    before, attributions = x.clone(), maps(x)
    plain = numbers(FUNCTIONS[name](model, x, attributions, 1))

    def overwriting(x: Tensor) -> Tensor:
        output = model(x.clone())
        x.zero_()
        return output

    assert torch.equal(numbers(FUNCTIONS[name](overwriting, x, attributions, 1)), plain)
    assert torch.equal(x, before)


# --- wrong arguments -----------------------------------------------------------------------------


def uncallable_model(*_: Any) -> Tensor:
    raise AssertionError("The model was called.")


NAN = torch.full((3, 9, 9), torch.nan)


@for_every_function
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"attributions": torch.ones(3, 1, 4, 5)}, ValueError, r"4 x 5.*9 x 9"),
        ({"attributions": torch.ones(2, 9, 9)}, ValueError, "2 maps.*3 images"),
        ({"attributions": NAN}, ValueError, "`attributions`.*finite"),
        (
            {"attributions": torch.where(torch.eye(9) > 0, NAN, 1)},
            ValueError,
            "`attributions`.*finite",
        ),
        ({"attributions": torch.ones(3, 0, 9)}, ValueError, "`attributions`"),
        ({"attributions": torch.ones(9)}, ValueError, "`attributions`"),
        ({"attributions": [1.0]}, TypeError, "`attributions`"),
        ({"inputs": torch.ones(0, 3, 9, 9)}, ValueError, "`inputs`"),
        ({"inputs": torch.ones(3, 9, 9)}, ValueError, "`inputs`"),
        ({"inputs": torch.full((3, 3, 9, 9), torch.inf)}, ValueError, "`inputs`.*finite"),
        ({"score": "odds"}, ValueError, "`score`"),
        ({"generator": 3}, TypeError, "`generator`"),
        ({"internal_batch_size": 0}, ValueError, "`internal_batch_size`"),
        ({"target": [1, 2]}, AssertionError, "`target` has 2 entries"),
    ],
)
def test_wrong_arguments_are_named(name: str, change: Any, error: Any, named: str) -> None:
    arguments = {"inputs": pictures(), "attributions": maps(pictures()), "target": 1} | change
    with pytest.raises(error, match=named):
        FUNCTIONS[name](uncallable_model, **arguments)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        *[("insertion", {"step": s}, "`step`") for s in (0, 82, 0.0, 1.5, True, "all")],
        *[("deletion", {"step": s}, "`step`") for s in (-1, float("nan"))],
        ("overall", {"insertion_baselines": "grey"}, "`baselines`"),
        ("drop", {"baselines": torch.ones(5)}, "`baselines`"),
        *[("road", {"percentiles": p}, "`percentiles`") for p in ((), (0,), (50, 100))],
        ("road", {"noise": -1}, "`noise`"),
    ],
)
def test_wrong_options_are_named(name: str, options: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FUNCTIONS[name](uncallable_model, pictures(), maps(pictures()), 1, **options)


@for_every_function
def test_outputs_that_are_not_scores_raise_an_error(name: str) -> None:
    x = pictures()
    run = partial(FUNCTIONS[name], inputs=x, attributions=maps(x))
    with pytest.raises(ValueError, match="needs two classes or more"):
        run(lambda x: x.sum((1, 2, 3)))
    with pytest.raises(ValueError, match="each of"):
        run(lambda x: x.sum(), score="logit")
    with pytest.raises(TypeError, match="floats"):
        run(lambda x: x.sum((1, 2, 3)).long(), score="logit")
    with pytest.raises(ValueError, match="not finite"):
        run(lambda x: x.sum((1, 2, 3)) * torch.nan, score="logit")
    with pytest.raises(AssertionError):
        run(small_net(dtype=D))  # four classes without a target


# --- torchmetrics --------------------------------------------------------------------------------


def result_of(name: str, model: nn.Module, x: Tensor) -> Any:
    return FUNCTIONS[name](model, x, maps(x), 1)


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (Insertion, "insertion"),
        (Deletion, "deletion"),
        (Overall, "overall"),
        (AverageDrop, "drop"),
        (IncreaseInConfidence, "increase"),
        (Road, "road"),
    ],
)
def test_classes_average_over_images_batches_and_processes(metric: Any, name: str) -> None:
    model = small_net(dtype=D)
    batches = [result_of(name, model, pictures(n, seed=n)) for n in (3, 1, 2)]
    ranks = [metric(), metric()]
    for i, batch in enumerate(batches):
        ranks[i % 2].update(batch)
    # torchmetrics sums the states of several processes like this.
    states = {k: sum(getattr(r, k) for r in ranks) for k in ("total", "count")}
    assert {f.__name__ for f in ranks[0]._reductions.values()} == {"dim_zero_sum"}
    merged = metric()
    for key, value in states.items():
        setattr(merged, key, value)
    merged._update_count = 1
    first = torch.cat([image_tensors(b)[0].double() for b in batches]).mean()
    computed = merged.compute()
    if merged.names:
        columns = {"combined": 0, "morf": 1, "lerf": 2} | {
            "score": 0,
            "insertion": 1,
            "deletion": 3,
        }
        for key, mean in computed.items():
            values = torch.cat(
                [image_tensors(b)[columns[key]].reshape(len(b[0]), -1) for b in batches]
            )
            assert mean.item() == pytest.approx(values.mean().item(), rel=1e-6)
        computed = computed[merged.names[0]]
    assert computed.item() == pytest.approx(first.item(), rel=1e-6)
    merged.reset()
    assert merged.count == 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize(
    ("metric", "wrong"),
    [
        (Insertion, torch.ones(2)),
        (Deletion, None),
        (Overall, Curve(torch.ones(2), torch.ones(2, 2), torch.ones(2))),
        (AverageDrop, torch.ones(2, 2)),
        (AverageDrop, torch.ones(2) > 0),
        (IncreaseInConfidence, torch.ones(2)),
        (Road, (1, 2, 3, 4)),
    ],
)
def test_classes_refuse_results_of_other_functions(metric: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match="`result` must be"):
        metric().update(wrong)
    means = metric().compute()
    assert torch.stack([*means.values()] if isinstance(means, dict) else [means]).isnan().all()


def test_the_old_keyword_of_update_works_with_a_warning() -> None:
    metric, old = AverageDrop(), AverageDrop()
    metric.update(result=torch.tensor([0.25, 0.5]))
    with pytest.warns(DeprecationWarning, match="`found` is now `result`"):
        old.update(found=torch.tensor([0.25, 0.5]))
    assert old.compute() == metric.compute()


def test_classes_refuse_nan() -> None:
    nan = torch.tensor([torch.nan])
    with pytest.raises(ValueError, match="finite"):
        AverageDrop().update(nan)
    with pytest.raises(ValueError, match="finite"):
        Road().update(RoadScores(nan, nan[None], nan[None], nan))


@pytest.mark.gpu
@for_every_function
def test_on_a_gpu_it_is_the_same(name: str) -> None:
    x, model = pictures(), small_net(dtype=D)
    on_cpu = numbers(FUNCTIONS[name](model, x, maps(x).round(), 1))
    on_gpu = FUNCTIONS[name](model.cuda(), x.cuda(), maps(x).round().cuda(), 1)
    assert all(t.is_cuda for t in image_tensors(on_gpu))
    torch.testing.assert_close(numbers(on_gpu).cpu(), on_cpu)
