"""Against grad-cam (pytorch_grad_cam) 1.5.7: equal where it follows the papers, and why where not.

Maps are compared at the layer's resolution, before the peer's ReLU, min-max and resizing.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext.attr import (
    BaseGradientCam,
    LayerAblationCam,
    LayerCam,
    LayerEigenCam,
    LayerGradCamPlusPlus,
    LayerHiResCam,
    LayerScoreCam,
    LayerXGradCam,
    UpsampleWrapper,
    tokens_to_grid,
)
from captum_ext.imaging import min_max
from tests.networks import ConvMeanLinear, vision_transformer
from tests.parity import equations
from tests.parity.subjects import (
    TARGETS,
    Subject,
    difference,
    paper_score_cam,
    resnet,
    scaled,
    vgg,
)

pgc = pytest.importorskip("pytorch_grad_cam")
from pytorch_grad_cam.ablation_layer import AblationLayer  # noqa: E402
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402

TOLERANCE = 1e-4
LAYERS = [resnet("layer4"), resnet("layer2"), vgg("features.27"), vgg("features.13")]


class MeanGradientCam(BaseGradientCam):
    """Grad-CAM from the package's template."""

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients.flatten(2).mean(2)[..., None, None]


def peer_map(
    method: type,
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    targets: list[int] = TARGETS,
    **options: Any,
) -> Tensor:
    """The peer's map of a full run, before it is rectified, scaled and resized."""
    raw = []

    class Recording(method):  # type: ignore[misc]
        def get_cam_image(self, *args: Any) -> Any:
            raw.append(super().get_cam_image(*args))
            return raw[-1]

    with Recording(model, [layer], **options) as cam:
        cam(x, [ClassifierOutputTarget(target) for target in targets])
    return torch.from_numpy(raw[0])


def both(ours: type, theirs: type, subject: Subject) -> tuple[Tensor, Tensor]:
    x = subject.inputs()
    model = subject.model()
    attribution = ours(model, model.get_submodule(subject.layer))
    model = subject.model()
    theirs_map = peer_map(theirs, model, model.get_submodule(subject.layer), x)
    return attribution.attribute(x, target=TARGETS)[:, 0], theirs_map


# --- gradient CAMs -------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", LAYERS, ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs", "equation"),
    [
        (LayerGradCam, "GradCAM", equations.grad_cam),
        (MeanGradientCam, "GradCAM", equations.grad_cam),
        (LayerXGradCam, "XGradCAM", equations.x_grad_cam),
        (LayerCam, "LayerCAM", equations.layer_cam),
        (LayerHiResCam, "HiResCAM", equations.hires_cam),
    ],
)
def test_gradient_cams_agree_with_the_peer_and_the_paper(
    ours: type, theirs: str, equation: Callable[..., Tensor], subject: Subject
) -> None:
    our_map, peers_map = both(ours, getattr(pgc, theirs), subject)
    paper = equation(*subject.recorded())
    assert difference(our_map, peers_map) <= TOLERANCE
    assert difference(our_map, paper) <= TOLERANCE
    assert difference(peers_map, paper) <= TOLERANCE


@pytest.mark.parametrize("subject", LAYERS, ids=str)
def test_grad_cam_plus_plus_agrees_where_gradients_are_large(subject: Subject) -> None:
    loud = Subject(subject.build, subject.layer, subject.size, gain=1e5)
    our_map, peers_map = both(LayerGradCamPlusPlus, pgc.GradCAMPlusPlus, loud)
    paper = equations.grad_cam_plus_plus(*loud.recorded())
    assert difference(our_map, peers_map) <= TOLERANCE
    assert difference(our_map, paper) <= TOLERANCE


@pytest.mark.parametrize("subject", LAYERS, ids=str)
def test_peers_grad_cam_plus_plus_fades_where_gradients_are_small(subject: Subject) -> None:
    """It adds 1e-6 to 2 g^2 + g^3 sum(A), which swallows gradients of 1e-3 and less."""
    our_map, peers_map = both(LayerGradCamPlusPlus, pgc.GradCAMPlusPlus, subject)
    a, g = (t.double() for t in subject.recorded())
    paper = equations.grad_cam_plus_plus(a, g)
    assert difference(our_map, paper) <= TOLERANCE
    assert difference(peers_map, paper) > 0.05

    alpha = g**2 / (2 * g**2 + g**3 * a.sum((2, 3), keepdim=True) + 1e-6)
    with_epsilon = torch.einsum("bkij,bkyx->byx", alpha * g.clamp(min=0), a)
    assert difference(peers_map, with_epsilon) <= TOLERANCE


def test_maps_are_upsampled_and_scaled_as_the_peer_does() -> None:
    """ReLU, resize and min-max: the peer's final picture, from its call to its result."""
    subject = resnet("layer4", gain=1e3)  # the peer's min-max adds 1e-7, so small maps shrink
    x, model = subject.inputs(), subject.model()
    cam = UpsampleWrapper(LayerGradCam(model, model.get_submodule(subject.layer)))
    ours = min_max(cam.attribute(x, target=TARGETS, relu_attributions=True))
    model = subject.model()
    with pgc.GradCAM(model, [model.get_submodule(subject.layer)]) as peer:
        theirs = torch.from_numpy(peer(x, [ClassifierOutputTarget(t) for t in TARGETS]))
    assert difference(ours[:, 0], theirs) <= TOLERANCE


def test_vision_transformer_with_reshape_transform() -> None:
    def peers_transform(tokens: Tensor) -> Tensor:
        grid = tokens[:, 1:].reshape(len(tokens), 4, 4, -1)  # as in the peer's documentation
        return grid.transpose(2, 3).transpose(1, 2)

    x = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(1))
    model = vision_transformer(layers=3)
    layer = "encoder.layers.encoder_layer_2.ln_1"
    ours = MeanGradientCam(model, layer, reshape_transform=tokens_to_grid)
    our_map = ours.attribute(x, target=TARGETS)[:, 0]
    model = vision_transformer(layers=3)
    peers_map = peer_map(
        pgc.GradCAM, model, model.get_submodule(layer), x, reshape_transform=peers_transform
    )
    assert difference(our_map, peers_map) <= TOLERANCE


# --- Eigen-CAM -----------------------------------------------------------------------------------


def up_to_sign(maps: Tensor, reference: Tensor) -> float:
    """The difference after each map is turned to the sign of its reference."""
    maps, reference = maps.double(), reference.double()
    sign = (maps * reference).sum((1, 2), keepdim=True).sign()
    return difference(sign * maps, reference)


@pytest.mark.parametrize("subject", LAYERS, ids=str)
def test_eigen_cam_is_the_papers_and_the_peer_centres(subject: Subject) -> None:
    our_map, peers_map = both(LayerEigenCam, pgc.EigenCAM, subject)
    a, _ = subject.recorded()
    assert up_to_sign(our_map, equations.eigen_cam(a)) <= TOLERANCE
    assert up_to_sign(peers_map, equations.eigen_cam(a)) > 0.1
    assert up_to_sign(peers_map, equations.eigen_cam(a, center=True)) <= TOLERANCE


@pytest.mark.parametrize("subject", LAYERS, ids=str)
def test_centred_eigen_cam_agrees_with_the_peer(subject: Subject) -> None:
    model, x = subject.model(), subject.inputs()
    ours = LayerEigenCam(model, subject.layer, center=True).attribute(x, target=TARGETS)[:, 0]
    theirs = peer_map(pgc.EigenCAM, model, model.get_submodule(subject.layer), x)
    assert up_to_sign(ours, theirs) <= TOLERANCE


# --- Score-CAM -----------------------------------------------------------------------------------


def test_score_cam_agrees_where_the_layer_is_as_large_as_the_input() -> None:
    """There, nothing is resized, and how to resize is all that the two disagree on."""
    subject = vgg("features.2", size=32, gain=100)
    our_map, peers_map = both(LayerScoreCam, pgc.ScoreCAM, subject)
    a, _ = subject.recorded()
    assert difference(our_map, peers_map) <= TOLERANCE
    assert difference(our_map, paper_score_cam(subject)) <= TOLERANCE
    assert difference(a.mean(1), our_map) > 100 * TOLERANCE, "equal weights would pass, too"


def test_score_cam_and_peer_differ_in_align_corners_only() -> None:
    subject = resnet("layer1", size=64, gain=10)
    our_map, peers_map = both(LayerScoreCam, pgc.ScoreCAM, subject)
    half_pixel = paper_score_cam(subject)
    aligned = paper_score_cam(subject, align_corners=True)
    assert difference(our_map, half_pixel) <= TOLERANCE
    assert difference(peers_map, aligned) <= TOLERANCE
    assert difference(half_pixel, aligned) > 10 * TOLERANCE


def test_score_cam_and_peer_differ_in_flat_channels_by_a_factor_only() -> None:
    """The peer runs a flat channel on a black image and gives it its share of the softmax."""
    subject = vgg("features.2", size=32, gain=100)
    x, model, theirs = subject.inputs(), subject.model(), subject.model()
    for each in (model, theirs):
        batch_norm = each.get_submodule("features.1")
        with torch.no_grad():
            batch_norm.weight[7] = batch_norm.bias[7] = 0
    our_map = LayerScoreCam(model, subject.layer).attribute(x, target=TARGETS)[:, 0]
    peers_map = peer_map(pgc.ScoreCAM, theirs, theirs.get_submodule(subject.layer), x)
    assert difference(our_map, peers_map) > 10 * TOLERANCE
    assert difference(scaled(our_map), scaled(peers_map)) <= TOLERANCE


# --- Ablation-CAM --------------------------------------------------------------------------------


def paper_ablation_cam(
    logits_behind: Callable[[Tensor, int], Tensor], a: Tensor, value: float = 0.0
) -> Tensor:
    maps = []
    for index, target in enumerate(TARGETS):
        with torch.no_grad():
            w = equations.ablation_cam_weights(
                lambda ablated, i=index, t=target: logits_behind(ablated, i)[:, t], a[index], value
            )
        maps.append(torch.einsum("k,kij->ij", w, a[index].double()))
    return torch.stack(maps)


def peers_ablation_cam(subject: Subject) -> Tensor:
    model = subject.model()
    return peer_map(
        pgc.AblationCAM,
        model,
        model.get_submodule(subject.layer),
        subject.inputs(),
        ablation_layer=AblationLayer(),  # its default is one object for all
    )


def test_ablation_cam_agrees_where_activations_start_at_zero() -> None:
    subject = resnet("layer4", size=64)
    model = subject.model()
    ours = LayerAblationCam(model, subject.layer).attribute(subject.inputs(), target=TARGETS)
    a, _ = subject.recorded()
    assert a.min() == 0
    head = model.fc.double()
    paper = paper_ablation_cam(lambda ablated, i: head(ablated.mean((2, 3))), a)
    assert difference(ours[:, 0], paper) <= TOLERANCE
    assert difference(ours[:, 0], peers_ablation_cam(subject)) <= TOLERANCE


def test_ablation_cam_agrees_with_much_of_the_model_behind_the_layer() -> None:
    subject = vgg("features.6", size=32)
    model = subject.model()
    ours = LayerAblationCam(model, subject.layer).attribute(subject.inputs(), target=TARGETS)
    assert difference(ours[:, 0], peers_ablation_cam(subject)) <= TOLERANCE


def test_peer_does_not_ablate_to_zero_where_activations_are_negative() -> None:
    """The paper sets a channel to 0; the peer sets it to 1e7 below the smallest activation."""
    subject = resnet("layer4.1.conv2", size=64)
    model, x = subject.model(), subject.inputs()
    ours = LayerAblationCam(model, subject.layer).attribute(x, target=TARGETS)[:, 0]
    theirs = peers_ablation_cam(subject)
    a, _ = subject.recorded()
    assert a.min() < 0

    shortcut, _ = Subject(subject.build, "layer4.0", subject.size).recorded()
    model.double()
    block = model.layer4[1]

    def logits_behind(ablated: Tensor, i: int) -> Tensor:
        added = block.bn2(ablated) + shortcut[i].double()
        return model.fc(F.relu(added).mean((2, 3)))

    assert difference(ours, paper_ablation_cam(logits_behind, a)) <= TOLERANCE
    assert difference(theirs, paper_ablation_cam(logits_behind, a, value=-1e7)) <= TOLERANCE
    assert difference(theirs, paper_ablation_cam(logits_behind, a)) > 0.1


def test_peers_ablation_of_negative_activations_depends_on_the_batch_size() -> None:
    """In a chunk, each channel is set below the one before it, which is 1e7 below the last."""

    def weights(batch_size: int) -> Tensor:
        torch.manual_seed(0)
        net = ConvMeanLinear(8, 6)
        options = {"ablation_layer": AblationLayer(), "batch_size": batch_size}
        with pgc.AblationCAM(net, [net.conv], **options) as cam:
            a = net.conv(x).detach().numpy()
            targets = [ClassifierOutputTarget(TARGETS[0])]
            return torch.from_numpy(cam.get_cam_weights(x, net.conv, targets, a, None))[0]

    x = torch.randn(1, 3, 8, 8, generator=torch.manual_seed(1))
    one, four = weights(1), weights(4)
    ratio = torch.tensor([1.0, 2.0, 3.0, 4.0] * 2)
    torch.testing.assert_close(four / one, ratio, rtol=1e-4, atol=0)

    torch.manual_seed(0)
    net = ConvMeanLinear(8, 6)
    ours = LayerAblationCam(net, net.conv)
    torch.testing.assert_close(
        ours.attribute(x, target=3, perturbations_per_eval=1),
        ours.attribute(x, target=3, perturbations_per_eval=4),
        rtol=1e-5,
        atol=1e-6,
    )
