"""Against torchcam 0.5.0: equal where it follows the papers, and why where not.

Maps are compared at the layer's resolution, before the peer's ReLU and min-max.
"""

from collections.abc import Callable

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor

from captum_ext.attr import (
    LayerCam,
    LayerClassActivationMap,
    LayerGradCamPlusPlus,
    LayerScoreCam,
    LayerXGradCam,
)
from tests.parity import equations
from tests.parity.subjects import TARGETS, Subject, difference, paper_score_cam, resnet, vgg

methods = pytest.importorskip("torchcam.methods")

TOLERANCE = 1e-4
LAYERS = [resnet("layer4"), resnet("layer2"), vgg("features.27"), vgg("features.13")]


def peer_map(method: str, subject: Subject) -> Tensor:
    model = subject.model()
    with getattr(methods, method)(model, subject.layer) as cam:
        cam._relu = False  # signed maps say more
        scores = model(subject.inputs())
        return cam(TARGETS, scores, normalized=False)[0]


def our_map(method: type, subject: Subject) -> Tensor:
    model = subject.model()
    cam = method(model, model.get_submodule(subject.layer))
    return cam.attribute(subject.inputs(), target=TARGETS)[:, 0]


@pytest.mark.parametrize("subject", LAYERS, ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs", "equation"),
    [
        (LayerGradCam, "GradCAM", equations.grad_cam),
        (LayerXGradCam, "XGradCAM", equations.x_grad_cam),
        (LayerCam, "LayerCAM", equations.layer_cam),
    ],
)
def test_gradient_cams_agree_with_the_peer_and_the_paper(
    ours: type, theirs: str, equation: Callable[..., Tensor], subject: Subject
) -> None:
    peers = peer_map(theirs, subject)
    assert difference(our_map(ours, subject), peers) <= TOLERANCE
    assert difference(peers, equation(*subject.recorded())) <= TOLERANCE


@pytest.mark.parametrize("gain", [1.0, 1e5])
@pytest.mark.parametrize("subject", LAYERS, ids=str)
def test_peers_grad_cam_plus_plus_is_not_the_papers(subject: Subject, gain: float) -> None:
    """Its weights are the sums of [g]+ g^2: the division by equation 19's denominator is lost."""
    subject = Subject(subject.build, subject.layer, subject.size, gain)
    model = subject.model()
    with methods.GradCAMpp(model, subject.layer) as cam:
        scores = model(subject.inputs())
        (peers_weights,) = cam._get_weights(TARGETS, scores)
    a, g = subject.recorded()
    undivided = (g.double().clamp(min=0) * g.double() ** 2).sum((2, 3))
    torch.testing.assert_close(peers_weights.double(), undivided, rtol=1e-4, atol=0)

    ours = LayerGradCamPlusPlus(model, subject.layer).weights(a, g).flatten(1)
    paper = equations.grad_cam_plus_plus_weights(a, g)
    torch.testing.assert_close(ours.double(), paper, rtol=1e-4, atol=1e-12)

    def share(w: Tensor) -> Tensor:
        return w / w.sum(1, keepdim=True)

    # Not a matter of scale either: the weights' shares differ by far more than the tolerance.
    assert (share(undivided) - share(paper)).abs().sum(1).min() > 0.1
    paper_map = equations.grad_cam_plus_plus(a, g)
    assert difference(our_map(LayerGradCamPlusPlus, subject), paper_map) <= TOLERANCE


def test_class_activation_map_agrees_with_the_peer_and_is_grad_cam_times_cells() -> None:
    subject = resnet("layer4")
    ours = our_map(LayerClassActivationMap, subject)
    assert difference(ours, peer_map("CAM", subject)) <= TOLERANCE
    cells = ours[0].numel()
    assert difference(ours, cells * our_map(LayerGradCam, subject)) <= TOLERANCE


def test_score_cam_agrees_where_the_layer_is_as_large_as_the_input() -> None:
    subject = vgg("features.2", size=32, gain=100)
    assert difference(our_map(LayerScoreCam, subject), peer_map("ScoreCAM", subject)) <= TOLERANCE


def test_peers_score_cam_scales_masks_before_it_upsamples_them() -> None:
    """The paper scales the upsampled mask; scaled before, a mask need not reach 0 and 1."""
    subject = resnet("layer1", size=64, gain=10)
    paper = paper_score_cam(subject)
    scaled_first = paper_score_cam(subject, scale_first=True)
    assert difference(our_map(LayerScoreCam, subject), paper) <= TOLERANCE
    assert difference(peer_map("ScoreCAM", subject), scaled_first) <= TOLERANCE
    assert difference(scaled_first, paper) > 10 * TOLERANCE
