"""Each loss against its formula written out, in float64."""

import math

import pytest
import skimage.data
import torch
from torch.autograd import gradcheck

from captum_ext.fcam import (
    DenseCRFLoss,
    LocalCRFLoss,
    SizeLoss,
    crf,
    dense_crf_loss,
    local_crf_loss,
    log_barrier,
    partial_cross_entropy,
    size_loss,
)

WIDE = {"sigma_rgb": 60.0, "sigma_xy": 0.3}


def problem(n=2, size=(12, 12), channels=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(n, 1, *size, generator=generator, dtype=dtype)
    images = 255 * torch.rand(n, channels, *size, generator=generator, dtype=dtype)
    return p.requires_grad_(), images


def affinity(image, sigma_rgb, sigma_xy, radius=None):
    """The matrix A of one image (C, H, W), pair by pair, with sigma_xy in pixels."""
    _, height, width = image.shape
    at = [(y, x) for y in range(height) for x in range(width)]
    a = torch.zeros(len(at), len(at), dtype=torch.float64)
    for i, (y, x) in enumerate(at):
        for j, (v, u) in enumerate(at):
            if radius is None or (i != j and max(abs(y - v), abs(x - u)) <= radius):
                near = ((y - v) ** 2 + (x - u) ** 2) / (2 * sigma_xy**2)
                alike = (image[:, y, x] - image[:, v, u]).square().sum() / (2 * sigma_rgb**2)
                a[i, j] = torch.exp(-near - alike)
    return a


# --- seeds ---------------------------------------------------------------------------------------


def test_partial_cross_entropy_equals_a_sum_by_hand():
    logits = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    seeds = torch.full((2, 3, 4), -255)
    seeds[0, 0, 0], seeds[0, 2, 3], seeds[1, 1, 1] = 1, 0, 1
    loss = partial_cross_entropy(logits, seeds)
    log_p = logits.log_softmax(1)
    by_hand = -(log_p[0, 1, 0, 0] + log_p[0, 0, 2, 3] + log_p[1, 1, 1, 1]) / 3
    torch.testing.assert_close(loss, by_hand)
    (gradient,) = torch.autograd.grad(loss, logits)
    ignored = (seeds == -255)[:, None].expand_as(gradient)
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).all()


def test_without_seeds_partial_cross_entropy_and_its_gradient_are_zero():
    logits = torch.randn(2, 2, 3, 3, requires_grad=True)
    loss = partial_cross_entropy(logits, torch.full((2, 3, 3), -255))
    assert loss == 0
    loss.backward()
    assert (logits.grad == 0).all()


# --- size ----------------------------------------------------------------------------------------


def test_log_barrier_has_known_values():
    def at(z, t):
        return log_barrier(torch.tensor(z, dtype=torch.float64), t).item()

    assert at(-100.0, 1) == pytest.approx(-math.log(100))
    assert at(-0.25, 2) == pytest.approx(math.log(4) / 2)
    assert at(3.0, 10) == pytest.approx(30 - math.log(1 / 100) / 10 + 0.1)
    assert at(0.0, 1) == pytest.approx(1)


@pytest.mark.parametrize("t", [1.0, 1.64, 10.0])
def test_log_barrier_is_continuous_with_its_slope(t):
    joint = -1 / t**2
    z = torch.tensor([joint - 1e-9, joint, joint + 1e-9], dtype=torch.float64, requires_grad=True)
    value = log_barrier(z, t)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert (value - value[1]).abs().max() < 1e-7
    torch.testing.assert_close(slope, torch.full_like(slope, t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("z", [-1e30, -5.0, -0.5, 0.0, 4.0, 1e5])
def test_log_barrier_has_finite_gradients(z):
    for t in (1.0, 3.0):
        value = torch.tensor([z], requires_grad=True)
        loss = log_barrier(value, t)
        (slope,) = torch.autograd.grad(loss.sum(), value)
        assert torch.isfinite(loss).all()
        assert slope >= 0
        assert torch.isfinite(slope).all()


def test_size_loss_equals_its_formula():
    """The constraint is on the sum of a region; on its mean, the barrier would be linear."""
    s = torch.rand(3, 1, 5, 7, dtype=torch.float64)
    probabilities = torch.cat((1 - s, s), 1)
    areas = probabilities.sum((2, 3))
    assert (areas > 1).all()
    torch.testing.assert_close(size_loss(probabilities), -areas.log().mean(0).sum() / 2)
    torch.testing.assert_close(size_loss(probabilities, 4.0), -areas.log().mean(0).sum() / 8)


def test_a_larger_region_lowers_the_size_loss():
    shares = (0.001, 0.01, 0.1, 0.3, 0.5)
    result = [
        size_loss(torch.tensor([1 - s, s]).reshape(1, 2, 1, 1).expand(-1, -1, 64, 64)).item()
        for s in shares
    ]
    assert result == sorted(result, reverse=True)
    assert result[0] - result[-1] > 1


def test_the_gradient_of_the_size_loss_enlarges_an_empty_region():
    logits = torch.tensor([200.0, -200.0]).reshape(1, 2, 1, 1).repeat(1, 1, 8, 8).requires_grad_()
    loss = size_loss(logits.softmax(1))
    assert torch.isfinite(loss)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all()


def test_the_schedule_sharpens_the_size_loss_up_to_t_max():
    loss = SizeLoss()
    for _ in range(50):
        loss.step()
    assert loss.t.item() == pytest.approx(1.01**50, rel=1e-5)
    again = SizeLoss()
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.t, loss.t)
    s = torch.rand(2, 2, 6, 6).softmax(1)
    assert torch.equal(again(s), size_loss(s, loss.t))
    for _ in range(500):
        loss.step()
    assert loss.t == 10


# --- colour --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 12), (5, 9), (1, 1)])
def test_dense_crf_equals_a_double_loop(size):
    p, images = problem(size=size)
    loss = dense_crf_loss(p, images, side=None, **WIDE)
    flat, by_hand = p.flatten(1), 0
    for values, image in zip(flat, images, strict=True):
        a = affinity(image, WIDE["sigma_rgb"], WIDE["sigma_xy"] * max(size))
        by_hand = by_hand + 2 * values @ a @ (1 - values) / len(values) ** 2 / len(flat)
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=0)
    result = torch.autograd.grad(loss, p)[0]
    torch.testing.assert_close(result, torch.autograd.grad(by_hand, p)[0], rtol=1e-10, atol=1e-16)


def test_dense_crf_equals_the_papers_form_up_to_a_constant():
    p, images = problem()
    q = torch.rand_like(p)
    matrices = [affinity(image, 60.0, 0.3 * 12) for image in images]

    def of_papers(p):
        total = 0
        for values, a in zip(p.flatten(1), matrices, strict=True):
            total = total - sum(s @ a @ s for s in (values, 1 - values)) / len(values) ** 2
        return total / len(p)

    ours = [dense_crf_loss(x, images, side=None, **WIDE) for x in (p, q)]
    torch.testing.assert_close(ours[0] - ours[1], of_papers(p) - of_papers(q))


def test_gradients_equal_finite_differences():
    p, images = problem(1, (4, 5))
    assert gradcheck(lambda p: dense_crf_loss(p, images, side=None, **WIDE), p)
    assert gradcheck(lambda p: dense_crf_loss(p, images, side=3, **WIDE), p)
    assert gradcheck(lambda p: local_crf_loss(p, images, radius=2, sigma_rgb=60.0), p)


def test_there_is_no_gradient_by_the_image_and_no_second_derivative():
    p, images = problem()
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(dense_crf_loss(p, images), p, create_graph=True)
    assert not dense_crf_loss(p.detach(), images).requires_grad
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), p)


def test_the_chunk_size_does_not_change_the_loss(monkeypatch):
    p, images = problem(3, (9, 11))
    energy = dense_crf_loss(p, images, side=None, **WIDE)
    gradient = torch.autograd.grad(energy, p)[0]
    monkeypatch.setattr(crf, "CPU_CHUNK", 700)  # two rows, of 99
    parts = dense_crf_loss(p, images, side=None, **WIDE)
    torch.testing.assert_close(parts, energy)
    torch.testing.assert_close(torch.autograd.grad(parts, p)[0], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (13, 7), (40, 40)])
def test_energies_are_never_negative(size, dtype):
    """Binary maps are tested too: their energy is 0 up to rounding."""
    for seed in range(5):
        p, images = problem(2, size, seed=seed, dtype=dtype)
        p = p.detach()
        for values in (p, (p > 0.5).to(dtype), torch.zeros_like(p), torch.ones_like(p)):
            assert 0 <= dense_crf_loss(values, images) <= 0.5
            assert 0 <= dense_crf_loss(values, images, side=None, **WIDE) <= 0.5
            assert local_crf_loss(values, images) >= 0


def test_energy_comes_from_uncertain_pixels_and_from_edges():
    size = (1, 1, 16, 16)
    flat = torch.full((1, 3, 16, 16), 90.0)
    half = torch.zeros(size)
    half[..., 8:] = 1
    for loss in (dense_crf_loss, local_crf_loss):
        for constant in (0.0, 1.0):
            assert loss(torch.full(size, constant), flat) == 0
        assert loss(torch.full(size, 0.5), flat) > 0
        assert loss(half, flat) > 0
        edged = flat.clone()
        edged[..., 8:] = 200.0
        assert loss(half, edged) < 1e-6 * loss(half, flat)  # the edge is where the colours change


def test_the_dense_crf_does_not_depend_on_the_number_of_pixels():
    p, images = problem(2, (16, 16))
    large_p, large = (x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (p, images))
    at = [
        dense_crf_loss(*both, side=None, **WIDE).item() for both in ((p, images), (large_p, large))
    ]
    assert at[1] == pytest.approx(at[0], rel=0.02)
    # Averaging of areas reduces the large pair to the small one.
    torch.testing.assert_close(
        dense_crf_loss(large_p, large, side=16, **WIDE), dense_crf_loss(p, images, **WIDE)
    )


def test_reduction_keeps_the_aspect_ratio_and_passes_gradients():
    p, images = problem(1, (20, 40))
    loss = dense_crf_loss(p, images, side=10, **WIDE)
    small = torch.nn.functional.adaptive_avg_pool2d
    torch.testing.assert_close(
        loss, dense_crf_loss(small(p, (5, 10)), small(images, (5, 10)), side=None, **WIDE)
    )
    assert (torch.autograd.grad(loss, p)[0] != 0).all()


def sampled(p, images, n, **options):
    """Values and gradients of `n` draws of anchors, and the exact ones."""
    generator = torch.Generator().manual_seed(0)
    exact = dense_crf_loss(p, images, side=None, **options)
    gradient = torch.autograd.grad(exact, p)[0]
    values, gradients = [], []
    for _ in range(n):
        loss = dense_crf_loss(p, images, side=None, generator=generator, **options | ANCHORS)
        values.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, p)[0])
    return torch.stack(values), torch.stack(gradients), exact.detach(), gradient


ANCHORS = {"n_anchors": 64}


def test_anchors_give_unbiased_estimates():
    values, gradients, exact, gradient = sampled(*problem(2, (16, 16)), 400, **WIDE)
    assert (values.mean() - exact).abs() < 4 * values.std() / 400**0.5
    spread = (gradients - gradient).flatten(1).norm(dim=1).square().mean().sqrt()
    assert spread > 0.1 * gradient.norm()
    assert (gradients.mean(0) - gradient).norm() < 1.3 * spread / 400**0.5


@pytest.mark.parametrize("name", ["chelsea", "coffee", "astronaut"])
def test_anchors_have_the_stated_error_on_photographs(name, monkeypatch):
    monkeypatch.setitem(ANCHORS, "n_anchors", 512)
    photo = torch.tensor(getattr(skimage.data, name)()).permute(2, 0, 1)[None].float()
    images = torch.nn.functional.interpolate(photo, (56, 56), mode="area")
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 56)] * 2, indexing="ij")
    p = torch.sigmoid(3 - 6 * (x**2 + y**2).sqrt())[None, None].requires_grad_()
    values, gradients, exact, gradient = sampled(p, images, 30)
    assert (values / exact - 1).abs().mean() < 0.03
    off = (gradients - gradient).flatten(1).norm(dim=1) / gradient.norm()
    assert 0.05 < off.mean() < 0.15


def test_all_pixels_as_anchors_are_exact():
    p, images = problem(2, (6, 6))
    torch.testing.assert_close(
        dense_crf_loss(p, images, n_anchors=36, **WIDE), dense_crf_loss(p, images, **WIDE)
    )


@pytest.mark.parametrize("size", [(8, 8), (3, 10), (1, 6), (1, 1)])
def test_local_crf_equals_a_double_loop(size):
    p, images = problem(size=size)
    loss = local_crf_loss(p, images, radius=2, sigma_rgb=60.0, sigma_xy=1.5)
    by_hand = 0
    for values, image in zip(p.flatten(1), images, strict=True):
        a = affinity(image, 60.0, 1.5, radius=2)
        by_hand = by_hand + 2 * values @ a @ (1 - values) / len(values) / len(p)
    torch.testing.assert_close(loss, by_hand)
    result = torch.autograd.grad(loss, p)[0]
    torch.testing.assert_close(result, torch.autograd.grad(by_hand, p)[0])


@pytest.mark.parametrize("channels", [1, 4])
def test_images_may_have_any_number_of_channels(channels):
    p, images = problem(channels=channels, size=(5, 5))
    a = [affinity(image, 60.0, 1.5) for image in images]
    by_hand = [2 * x @ m @ (1 - x) / 625 for x, m in zip(p.flatten(1), a, strict=True)]
    torch.testing.assert_close(dense_crf_loss(p, images, **WIDE), sum(by_hand) / 2)


def test_losses_of_half_precision_are_sums_in_float32():
    p, images = problem(2, (16, 16), dtype=torch.float32)
    exact = dense_crf_loss(p, images, **WIDE)
    for dtype in (torch.float16, torch.bfloat16):
        small = p.detach().to(dtype).requires_grad_()
        loss = dense_crf_loss(small, images, **WIDE)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
        assert torch.autograd.grad(loss, small)[0].dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(dense_crf_loss(p, images, **WIDE), exact)


def test_bytes_are_valid_colours_and_images_in_0_to_1_give_a_warning(recwarn):
    p, images = problem()
    p = p.detach().float()
    as_bytes = images.to(torch.uint8)
    torch.testing.assert_close(
        dense_crf_loss(p, as_bytes, **WIDE), dense_crf_loss(p, as_bytes.float(), **WIDE)
    )
    dense_crf_loss(p, torch.zeros_like(as_bytes))
    dense_crf_loss(p, torch.zeros_like(images))
    assert not recwarn
    with pytest.warns(UserWarning, match="0 to 255"):
        dense_crf_loss(p, images / 255)
    with pytest.warns(UserWarning, match="0 to 255"):
        local_crf_loss(p, images / 255)


@pytest.mark.parametrize("loss", [dense_crf_loss, local_crf_loss])
def test_normalised_images_give_a_warning(loss):
    p, images = problem(dtype=torch.float32)
    mean = torch.tensor((0.485, 0.456, 0.406)).reshape(-1, 1, 1)
    with pytest.warns(UserWarning, match=r"-2\.\S+ to 2\.\S+: .* 0 to 255") as caught:
        loss(p, (images / 255 - mean) / 0.225)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="0 to 255"):
        loss(p, -images)


@pytest.mark.parametrize(
    ("make", "others"),
    [
        (
            DenseCRFLoss,
            {"sigma_rgb": 15.5, "sigma_xy": 0.3, "side": 31, "n_anchors": 512},
        ),
        (LocalCRFLoss, {"radius": 4, "sigma_rgb": 25.0, "sigma_xy": 6.1}),
        (SizeLoss, {"t": 2.0, "growth": 1.02, "t_max": 9.0}),
    ],
)
def test_reprs_differ_with_each_setting(make, others):
    """A resumed run is compared with the one before by these texts."""
    text = [repr(make()), *(repr(make(**{name: value})) for name, value in others.items())]
    assert len(set(text)) == len(text)
    assert repr(make()) == text[0]
    assert all(f"{name}={value}" in repr(make(**others)) for name, value in others.items())


def test_the_repr_of_a_schedule_does_not_change_with_its_steps():
    loss = SizeLoss()
    text = repr(loss)
    loss.step()
    assert repr(loss) == text


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (DenseCRFLoss, "sigma_rgb", (0.0, -1.0, float("nan"), "15", None)),
        (DenseCRFLoss, "sigma_xy", (0.0, float("inf"), True)),
        (DenseCRFLoss, "side", (0, -3, 8.0, True)),
        (DenseCRFLoss, "n_anchors", (0, 2.5)),
        (LocalCRFLoss, "radius", (0, 1.5, None)),
        (LocalCRFLoss, "sigma_rgb", (0.0,)),
        (LocalCRFLoss, "sigma_xy", (-6.0,)),
        (SizeLoss, "t", (0.0, float("nan"), 11.0)),
        (SizeLoss, "growth", (0.0, -1.0)),
        (SizeLoss, "t_max", (0.0, 0.5, "10")),
    ],
)
def test_settings_are_validated_by_the_constructor(make, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}`"):
            make(**{name: value})


def test_modules_equal_their_functions():
    p, images = problem()
    options = {"side": 6, "n_anchors": 9, **WIDE}
    result = [
        loss(p, images, generator=torch.Generator().manual_seed(0))
        for loss in (DenseCRFLoss(**options), lambda *a, **k: dense_crf_loss(*a, **k, **options))
    ]
    assert result[0] == result[1]
    local = {"radius": 3, "sigma_rgb": 9.0, "sigma_xy": 2.0}
    assert LocalCRFLoss(**local)(p, images) == local_crf_loss(p, images, **local)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"foreground": torch.rand(2, 2, 12, 12)}, "foreground"),
        ({"foreground": torch.rand(2, 12, 12)}, "foreground"),
        ({"images": torch.rand(2, 3, 11, 12)}, "images"),
        ({"images": torch.rand(1, 3, 12, 12)}, "images"),
        ({"sigma_rgb": 0.0}, "sigma_rgb"),
        ({"sigma_xy": float("nan")}, "sigma_xy"),
        ({"side": 0}, "side"),
        ({"n_anchors": 0}, "n_anchors"),
    ],
)
def test_invalid_arguments_are_refused(change, named):
    p, images = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=named):
        dense_crf_loss(**{"foreground": p, "images": images} | change)
