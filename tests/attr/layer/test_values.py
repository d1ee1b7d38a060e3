"""Maps against answers worked out by hand, and the identities between the methods, in float64."""

import math
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam, LayerGradientXActivation, NoiseTunnel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext.attr import (
    LayerAblationCam,
    LayerCam,
    LayerClassActivationMap,
    LayerEigenCam,
    LayerEigenGradCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerHiResCam,
    LayerScoreCam,
    LayerSharpenFocus,
    LayerSmoothGradCamPlusPlus,
    LayerTokenGradCam,
    LayerXGradCam,
)
from captum_ext.imaging import blur, min_max, resize
from tests.methods import GRADIENT, smooth
from tests.networks import FunctionsAroundLayer, small_net

D = torch.float64


def quadratic(a: Tensor) -> Tensor:
    """S_1 = sum a_0^2 / 2 - 3 sum a_1: the gradient is a_0 in channel 0, and -3 in channel 1."""
    s = (a[:, 0] ** 2).sum((1, 2)) / 2 - 3 * a[:, 1].sum((1, 2))
    return torch.stack([torch.zeros_like(s), s], 1)


# One example, two channels of 1 x 2 cells; the gradient is [[1, 2], [-3, -3]].
A = torch.tensor([[[[1.0, 2.0]], [[4.0, 8.0]]]], dtype=D)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # mean g+ = 1.5, 0
        (LayerSharpenFocus, [1.5 * 1, 1.5 * 2]),
        # g+ A
        (LayerCam, [1 * 1, 2 * 2]),
        # g A
        (LayerHiResCam, [1 * 1 - 3 * 4, 2 * 2 - 3 * 8]),
        # sum gA / sum A = 5/3, -3
        (LayerXGradCam, [5 / 3 * 1 - 3 * 4, 5 / 3 * 2 - 3 * 8]),
        # g / (2 + g sum A): 1/5 + 2/8 = 0.45
        (LayerGradCamPlusPlus, [0.45 * 1, 0.45 * 2]),
    ],
)
def test_gradient_cams_by_hand(method: Any, expected: list[float]) -> None:
    result = method(FunctionsAroundLayer(quadratic), "layer").attribute(A, target=1)
    torch.testing.assert_close(result, torch.tensor([[[expected]]], dtype=D), rtol=0, atol=1e-15)


def test_grad_cam_plus_plus_follows_the_papers_unreduced_equation() -> None:
    net, x = small_net(dtype=D), torch.randn(2, 3, 9, 7, dtype=D)
    a = LayerHiResCam(net, "conv2")  # only to read the gradient: A and g A
    g_a = a.attribute(x, target=[1, 2], attr_dim_summation=False)
    activation = net.conv2(net.relu1(net.norm(net.conv1(x)))).detach()
    g = g_a / activation
    alpha = g**2 / (2 * g**2 + activation.sum((2, 3), keepdim=True) * g**3)
    weights = (torch.where(g == 0, 0, alpha) * F.relu(g)).sum((2, 3), keepdim=True)
    expected = (weights * activation).sum(1, keepdim=True)
    result = LayerGradCamPlusPlus(net, "conv2").attribute(x, target=[1, 2])
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


def test_smooth_grad_cam_plus_plus_by_hand() -> None:
    """Score sum a^2 / 2, so the gradient of a noisy copy is that copy itself."""
    net = FunctionsAroundLayer(lambda a: (a**2).sum((2, 3)) / 2)
    a = torch.tensor([[[[1.0, 3.0]]]], dtype=D)
    method = LayerSmoothGradCamPlusPlus(
        net, "layer", n_samples=4, stdev_spread=0.5, generator=torch.Generator().manual_seed(3)
    )
    result = method.attribute(a, target=0)
    generator = torch.Generator().manual_seed(3)
    noise = torch.cat([torch.randn(1, 1, 1, 1, 2, generator=generator) for _ in range(4)])[:, 0, 0]
    g = a[0] + noise.double() * 0.5 * (3 - 1)
    d1, d2, d3 = g.mean(0), (g**2).mean(0), (g**3).mean(0)
    weight = (d2 / (2 * d2 + d3 * 4) * F.relu(d1)).sum()
    torch.testing.assert_close(result, weight * a, rtol=1e-12, atol=0)


def test_smooth_without_noise_is_grad_cam_plus_plus_and_chunks_do_not_matter() -> None:
    net, x = small_net(dtype=D), torch.randn(2, 3, 8, 8, dtype=D)
    plain = LayerGradCamPlusPlus(net, "relu2").attribute(x, target=1)
    still = smooth(net, "relu2", stdev_spread=0.0, n_samples=5).attribute(x, target=1)
    torch.testing.assert_close(still, plain, rtol=1e-10, atol=1e-13)
    one, two = (
        smooth(net, "relu2", n_samples=5, samples_per_eval=n).attribute(x, target=[1, 0])
        for n in (1, 2)
    )
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)
    assert (one - plain).abs().max() > 1e-3


def test_smooth_maps_without_noise_have_the_derivatives_of_grad_cam_plus_plus() -> None:
    net, x = small_net(dtype=D), torch.randn(1, 3, 6, 6, dtype=D, requires_grad=True)
    graph = {"create_graph": True}
    derivatives = []
    still = smooth(net, "conv2", n_samples=1, stdev_spread=0.0)
    for method in (still, LayerGradCamPlusPlus(net, "conv2")):
        cam = method.attribute(x, target=1, grad_kwargs=graph)
        derivatives += torch.autograd.grad(cam.sum(), x)
    assert derivatives[0].abs().max() > 1e-3
    torch.testing.assert_close(derivatives[0], derivatives[1])


def test_score_cam_by_hand() -> None:
    """Two channels at the size of the input, so masks are the min-maxed channels themselves."""
    x = torch.tensor([[[[0.0, 2.0], [4.0, 1.0]], [[3.0, 3.0], [0.0, 6.0]]]], dtype=D)
    weight = torch.tensor([1.0, -0.5], dtype=D)
    net = FunctionsAroundLayer(lambda a: (a * weight[:, None, None]).sum((1, 2, 3))[:, None])
    masks = [x[:, 0] / 4, x[:, 1] / 6]
    scores = torch.stack([net(x * m[:, None])[0, 0] for m in masks])
    for weighting, weights in {
        "softmax": scores.softmax(0),
        "increase": scores - net(torch.full_like(x, 0.5))[0, 0],
        "score": scores,
    }.items():
        baseline = 0.5 if weighting == "increase" else 0
        if weighting == "increase":
            blended = [x * m[:, None] + 0.5 * (1 - m[:, None]) for m in masks]
            weights = torch.stack([net(b)[0, 0] for b in blended]) - net(torch.full_like(x, 0.5))
            weights = weights.flatten()
        result = LayerScoreCam(net, "layer", weighting=weighting).attribute(x, baseline, target=0)
        expected = (weights[:, None, None] * x[0]).sum(0)
        torch.testing.assert_close(result[0, 0], expected, rtol=1e-12, atol=0)


def test_group_cam_by_hand() -> None:
    net, x = small_net(dtype=D, seed=2), torch.randn(1, 3, 12, 12, dtype=D)
    weighted = LayerGradCam(net, net.relu1).attribute(x, 2, attr_dim_summation=False).detach()
    b = blur(x)
    softmax = lambda y: net(y).softmax(1)[0, 2].detach()  # noqa: E731
    expected, gains = torch.zeros(1, 1, 12, 12, dtype=D), []
    for group in ([0, 1], [2, 3], [4, 5]):
        m_l = F.relu(weighted[:, group].sum(1, keepdim=True))
        if m_l.max() > m_l.min():
            m = (m_l - m_l.min()) / (m_l.max() - m_l.min())
            gains.append(F.relu(softmax(x * m + b * (1 - m)) - softmax(b)).item())
            expected += gains[-1] * m_l
    assert sum(gain > 0 for gain in gains) >= 2, "one group alone would hide the weights"
    result = LayerGroupCam(net, "relu1", groups=3).attribute(x, target=2)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-14)
    by_tensor = LayerGroupCam(net, "relu1", groups=torch.tensor([0, 0, 1, 1, 2, 2]))
    torch.testing.assert_close(by_tensor.attribute(x, target=2), result, rtol=1e-12, atol=0)


def test_group_cam_of_one_group_is_grad_cam() -> None:
    net, x = small_net(dtype=D), torch.randn(2, 3, 10, 10, dtype=D)
    single_group = LayerGroupCam(net, "relu2", groups=1, score=lambda y: y.softmax(1) + 1.0)
    grad_cam = F.relu(LayerGradCam(net, net.relu2).attribute(x, 1)).detach()
    result = single_group.attribute(x, baselines=0, target=1)
    scale = result.amax((2, 3), keepdim=True) / grad_cam.amax((2, 3), keepdim=True)
    torch.testing.assert_close(result, grad_cam * scale)


@pytest.mark.parametrize("groups", [4, 5, 64])
def test_groups_may_differ_in_size_and_be_more_than_channels(groups: int) -> None:
    net, x = small_net(dtype=D), torch.randn(1, 3, 10, 10, dtype=D)
    cam = LayerGroupCam(net, "relu2", groups=groups)
    parts = cam._group_maps(torch.ones(1, 6, 2, 2), torch.ones(1, 6, 2, 2))[0, :, 0, 0]
    assert len(parts) == min(groups, 6)
    assert parts.sum() == 6
    assert parts.max() - parts.min() <= 1
    assert torch.isfinite(cam.attribute(x, target=0)).all()


def test_ablation_cam_by_hand() -> None:
    """S = sum_k w_k mean A_k + b: S - S_k = w_k mean A_k, also with b in S."""
    net, x = small_net(dtype=D), torch.randn(2, 3, 8, 8, dtype=D)
    act = net.relu2(net.conv2(net.relu1(net.norm(net.conv1(x))))).detach()
    lost = net.fc.weight[2].detach() * act.mean((2, 3))
    score = net(x)[:, 2].detach()
    for divide, weights in ((True, lost / score[:, None]), (False, lost)):
        result = LayerAblationCam(net, "relu2", divide_by_score=divide).attribute(x, target=2)
        expected = (weights[:, :, None, None] * act).sum(1, keepdim=True)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("baseline", [None, 0.7, "min", "tensor"])
def test_ablation_cam_with_baselines_by_hand(baseline: Any) -> None:
    net, x = small_net(dtype=D), torch.randn(2, 3, 8, 8, dtype=D)
    act = net.conv2(net.relu1(net.norm(net.conv1(x)))).detach()
    assert (act < 0).any()
    fill = {None: 0.0, "min": act.amin((1, 2, 3), keepdim=True), "tensor": act.flip(3)}
    value = torch.as_tensor(fill.get(baseline, baseline), dtype=D).expand_as(act)
    tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc)
    score, weights = tail(act)[:, 1], []
    for k in range(6):
        ablated = act.clone()
        ablated[:, k] = value[:, k]
        weights.append((score - tail(ablated)[:, 1]) / score)
    expected = (torch.stack(weights, 1)[:, :, None, None] * act).sum(1, keepdim=True).detach()
    layer_baselines = value if baseline == "tensor" else baseline
    for per_eval in (1, 4, 99):
        result = LayerAblationCam(net, "conv2").attribute(
            x, layer_baselines, target=1, perturbations_per_eval=per_eval
        )
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


def test_ablation_cam_takes_the_smallest_activation_of_each_example() -> None:
    """Behind a ReLU, any negative value would give the same scores."""
    torch.manual_seed(0)
    conv, gap = nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(conv, gap, nn.Flatten(), nn.Linear(4, 3)).to(D)
    x = torch.randn(2, 3, 5, 5, dtype=D) * torch.tensor([1.0, 10.0]).reshape(2, 1, 1, 1)
    cam = LayerAblationCam(net, "0")
    alone = torch.cat([cam.attribute(example[None], "min", target=1) for example in x])
    torch.testing.assert_close(cam.attribute(x, "min", target=1), alone, rtol=1e-10, atol=0)


def test_eigen_cam_is_the_first_singular_component() -> None:
    net, x = small_net(dtype=D), torch.randn(2, 3, 5, 4, dtype=D)
    for layer, act in (
        ("conv1", net.conv1(x).detach()),  # 20 cells, 6 channels: the other Gram matrix
        ("pool", net.pool(net.relu2(net.conv2(net.relu1(net.norm(net.conv1(x)))))).detach()),
    ):
        for center in (False, True):
            result = LayerEigenCam(net, layer, center=center).attribute(x, target=0)
            for i in range(2):
                cells = act[i].flatten(1).T
                cells = cells - cells.mean(0) * center
                u, s, _ = torch.linalg.svd(cells, full_matrices=False)
                ours = result[i].flatten()
                assert (ours @ act[i].flatten(1).mean(0)).item() >= -1e-12
                torch.testing.assert_close(ours.abs(), (s[0] * u[:, 0]).abs(), atol=1e-9, rtol=1e-7)


def test_eigen_grad_cam_by_hand() -> None:
    """G = gA = [[1, 4], [-12, -24]] has the Gram matrix G G^T = [[17, -108], [-108, 720]].

    Its larger eigenvalue has the eigenvector v; the map v G is to correlate with [-11, -20].
    """
    eigenvalue = (737 + math.sqrt(703**2 + 4 * 108**2)) / 2
    v = torch.tensor([-108, eigenvalue - 17], dtype=D) / math.hypot(108, eigenvalue - 17)
    expected = v @ torch.tensor([[1, 4], [-12, -24]], dtype=D)
    for scale in (1, -1):  # the other sign of the score is the other sign of the map
        net = FunctionsAroundLayer(lambda x, scale=scale: scale * quadratic(x))
        result = LayerEigenGradCam(net, "layer").attribute(A, target=1)
        torch.testing.assert_close(result.flatten(), scale * expected, rtol=1e-15, atol=0)
    with pytest.raises(ValueError, match="not finite"):
        LayerEigenGradCam(FunctionsAroundLayer(quadratic), "layer").attribute(A / 0, target=1)


def test_cam_by_hand_with_linear_and_convolutional_heads() -> None:
    x = torch.randn(2, 3, 5, 4, dtype=D)
    conv = nn.Conv2d(3, 6, 1).to(D)
    linear = nn.Linear(6, 4).to(D)
    conv_head = nn.Conv2d(6, 4, 1).to(D)
    conv_head.weight.data = linear.weight.data[:, :, None, None].clone()
    gap = nn.AdaptiveAvgPool2d(1)
    rows = linear.weight.detach()[[3, 0]][:, :, None, None]
    expected = (rows * conv(x).detach()).sum(1, keepdim=True)
    for net in (
        nn.Sequential(conv, gap, nn.Flatten(), nn.Dropout(), linear).eval(),
        nn.Sequential(conv, conv_head, gap, nn.Flatten()),
    ):
        for target in ([3, 0], torch.tensor([3, 0]), [(3,), (0,)]):
            result = LayerClassActivationMap(net, "0").attribute(x, target)
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    alone = LayerClassActivationMap(net, "0").attribute(x, 3)[:1]
    torch.testing.assert_close(alone, expected[:1])


def test_cam_of_a_class_with_a_negative_score_is_no_error() -> None:
    """The check of the head allows errors in proportion to the terms, whatever their sign."""
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, -100.0)
    net = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    result = LayerClassActivationMap(net, "0").attribute(torch.ones(1, 2, 3, 3), 0)
    assert torch.equal(result, torch.full((1, 1, 3, 3), -200.0))


def test_cam_needs_a_linear_head_behind_the_layer() -> None:
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="something else lies between"):
        LayerClassActivationMap(net, "conv2").attribute(x, 1)  # a ReLU is between
    assert LayerClassActivationMap(net, "conv2", head="fc").attribute(x, 1).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="reads 6 channels, but `layer` has 3"):
        LayerClassActivationMap(nn.Sequential(nn.Identity(), net), "0").attribute(x, 1)
    with pytest.raises(ValueError, match="must be linear or a 1 x 1 convolution"):
        LayerClassActivationMap(net, "relu2", head="conv1")
    with pytest.raises(ValueError, match="`head` is needed"):
        LayerClassActivationMap(lambda x: net(x), net.relu2)
    with pytest.raises(ValueError, match="no linear layer"):
        LayerClassActivationMap(nn.ReLU(), nn.ReLU())


# --- identities (sections 1 and 3 of the methods' papers), GAP + linear ---------------------------


def test_gap_and_linear_identities() -> None:
    net, x = small_net(dtype=D), torch.randn(3, 3, 8, 8, dtype=D)
    target = [0, 1, 3]
    get = lambda method: method(net, "relu2").attribute(x, target=target)  # noqa: E731
    cam, grad = get(LayerClassActivationMap), LayerGradCam(net, net.relu2).attribute(x, target)
    grad = grad.detach()
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)  # noqa: E731
    close(grad, cam / 64)
    close(get(LayerHiResCam), grad)
    close(get(LayerXGradCam), grad)
    score = net(x)[range(3), target].detach() - net.fc.bias[target].detach()
    close(grad.sum((1, 2, 3)), score)
    close(cam.mean((1, 2, 3)), score)
    close(get(LayerSharpenFocus), get(LayerCam))
    act = net.relu2(net.conv2(net.relu1(net.norm(net.conv1(x))))).detach()
    w = net.fc.weight[target].detach()
    close(get(LayerCam), (F.relu(w)[:, :, None, None] * act).sum(1, keepdim=True) / 64)
    plus = F.relu(w) / (2 + F.relu(w) * act.mean((2, 3)))
    close(get(LayerGradCamPlusPlus), (plus[:, :, None, None] * act).sum(1, keepdim=True))


def test_maps_agree_with_captums() -> None:
    net, x = small_net(dtype=D), torch.randn(2, 3, 8, 8, dtype=D)

    for options in ({}, {"relu_attributions": True}, {"attr_dim_summation": False}):
        for at_input in (False, True):
            ours = LayerTokenGradCam(net, "norm").attribute(
                x, [1, 2], attribute_to_layer_input=at_input, **options
            )
            captums = LayerGradCam(net, net.norm).attribute(
                x, [1, 2], attribute_to_layer_input=at_input, **options
            )
            torch.testing.assert_close(ours, captums.detach(), rtol=1e-12, atol=1e-15)
    hires = LayerHiResCam(net, "norm").attribute(x, 3)
    product = LayerGradientXActivation(net, net.norm).attribute(x, 3).sum(1, keepdim=True)
    torch.testing.assert_close(hires, product.detach(), rtol=1e-12, atol=1e-15)


def test_xgrad_conserves_and_equals_the_score_of_a_homogeneous_head() -> None:
    net, x = small_net(dtype=D), torch.randn(2, 3, 8, 8, dtype=D)
    net.conv2.bias = None
    nn.init.zeros_(net.fc.bias)
    x_grad, hires = (m(net, "relu1").attribute(x, target=1) for m in (LayerXGradCam, LayerHiResCam))
    torch.testing.assert_close(x_grad.sum((1, 2, 3)), hires.sum((1, 2, 3)))
    torch.testing.assert_close(hires.sum((1, 2, 3)), net(x)[:, 1].detach())


def test_methods_differ_in_the_signs_of_the_gradient() -> None:
    a = torch.rand(2, 3, 4, 4, dtype=D)
    for sign in (1, -1):
        net = FunctionsAroundLayer(lambda y, s=sign: s * (y**2).sum((2, 3)))
        sharpen, layer_cam, plus = (
            m(net, "layer").attribute(a, target=0)
            for m in (LayerSharpenFocus, LayerCam, LayerGradCamPlusPlus)
        )
        if sign > 0:
            grad_cam = LayerGradCam(net, net.layer).attribute(a, 0).detach()
            torch.testing.assert_close(sharpen, grad_cam)
        else:
            assert all(m.abs().max() == 0 for m in (sharpen, layer_cam, plus))


def test_maps_of_single_cells() -> None:
    net, x = small_net(dtype=D), torch.randn(2, 3, 8, 8, dtype=D)
    get = lambda m: m(net, "pool").attribute(x, target=1)  # noqa: E731
    torch.testing.assert_close(get(LayerXGradCam), get(LayerHiResCam))
    torch.testing.assert_close(get(LayerSharpenFocus), get(LayerCam))
    assert (get(LayerCam) >= F.relu(get(LayerHiResCam)) - 1e-12).all()


def test_score_cam_of_a_constant_model_weighs_all_channels_alike() -> None:
    net = FunctionsAroundLayer(lambda a: 0 * a.sum((2, 3)) + 0.3)
    a = torch.randn(1, 5, 6, 6, dtype=D)
    result = LayerScoreCam(net, "layer").attribute(a, target=0)
    torch.testing.assert_close(result, a.mean(1, keepdim=True))


def test_scaled_logits_and_probabilities() -> None:
    net, x = small_net(dtype=D), torch.randn(2, 3, 8, 8, dtype=D)
    for name in ("Grad-CAM", "XGrad-CAM", "LayerCAM", "Sharpen Focus", "HiResCAM"):
        plain, scaled = (
            GRADIENT[name](f, net.relu1).attribute(x, target=1) for f in (net, lambda y: 7 * net(y))
        )
        torch.testing.assert_close(scaled, 7 * plain)
    soft = LayerHiResCam(lambda y: net(y).softmax(1), net.relu1).attribute(x, target=1)
    hard = LayerHiResCam(net, "relu1").attribute(x, target=1)
    assert F.cosine_similarity(soft.flatten(1), hard.flatten(1)).max() < 0.999


@pytest.mark.parametrize("name", GRADIENT)
def test_noise_tunnel_without_noise_changes_nothing(name: str) -> None:
    net, x = small_net(dtype=D), torch.randn(2, 3, 8, 8, dtype=D)
    plain = GRADIENT[name](net, "relu2").attribute(x, target=[1, 2])
    tunnel = NoiseTunnel(GRADIENT[name](net, "relu2"))
    result = tunnel.attribute(x, stdevs=0.0, nt_samples=3, target=[1, 2])
    if name == "Smooth Grad-CAM++":  # its own noise is drawn once, and shared
        assert result.shape == plain.shape
    torch.testing.assert_close(result, plain, rtol=1e-10, atol=1e-13)


@given(
    dims=st.integers(1, 3),
    channels=st.integers(1, 5),
    size=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_masks_and_weights_stay_in_their_ranges(
    dims: int, channels: int, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    a = torch.randn(2, channels, *[size] * dims, dtype=D)
    m = min_max(resize(a, [size + 3] * dims))
    flat = m.flatten(2)
    assert flat.min() >= 0
    assert flat.max() <= 1
    if size > 1:
        assert (flat.amax(2) == 1).all()
        assert (flat.amin(2) == 0).all()
    g, act = torch.randn_like(a).abs(), a.abs()
    method = LayerGradCamPlusPlus(FunctionsAroundLayer(quadratic), "layer")
    alpha = method.weights(act, g) / math.prod(a.shape[2:])
    assert (alpha >= 0).all()
    assert (alpha <= g.flatten(2).mean(2).reshape(alpha.shape) / 2 + 1e-12).all()
