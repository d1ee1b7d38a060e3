"""SESSWrapper(LayerGradCam) against the SESS of grad-cam (pytorch_grad_cam) 1.5.7."""

from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor

from captum_ext.attr import SESSWrapper
from captum_ext.imaging import min_max
from tests.parity.subjects import Subject, resnet, vgg

pytest.importorskip("pytorch_grad_cam")
from pytorch_grad_cam.sess import SESS
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

TOLERANCE = 1e-5


def photo(height: int, width: int) -> Tensor:
    """Smooth, as photographs are, and normalised."""
    torch.manual_seed(4)
    coarse = torch.randn(1, 3, 6, 8)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")


def both(subject: Subject, x: Tensor, target: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The peer's map and ours, both in [0, 1]."""
    model = subject.model()
    names = {"window": "window_size", "step": "step_size", "n_scales": "num_scales"}
    theirs = {names.get(name, name): value for name, value in options.items()}
    with SESS(model, [model.get_submodule(subject.layer)], **theirs) as peer:
        expected = torch.from_numpy(peer(x.clone(), [ClassifierOutputTarget(target)]))
    model = subject.model()
    ours = SESSWrapper(
        LayerGradCam(model, model.get_submodule(subject.layer)),
        fusion="reference",
        antialias=True,  # the default of torchvision's resize
        final_norm=True,
        **options,
    )
    result = ours.attribute(x, target=target)
    assert (result == result[:, :1]).all()
    return expected[:, None], result[:, :1]


@pytest.mark.parametrize("subject", [resnet("layer4"), vgg("features.27")], ids=str)
@pytest.mark.parametrize("size", [(96, 128), (150, 120)])
@pytest.mark.parametrize(
    "options",
    [
        {"n_scales": 4, "window": 96},
        {"n_scales": 3, "window": 96, "step": 48, "pre_filter_ratio": 0.5},
        {"scales": [96, 200], "window": 96, "theta": 0.3},
        {"n_scales": 3, "window": 96, "pool": "max"},
        {"n_scales": 3, "window": 96, "smooth": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_sess_agrees_with_the_peer(
    subject: Subject, size: tuple[int, int], options: dict[str, Any]
) -> None:
    if "vgg" in str(subject) and options["window"] == 96:
        options = {**options, "window": 64}
        options = {
            **options,
            **({"scales": [64, 140]} if "scales" in options else {}),
            **({"step": 32} if "step" in options else {}),
        }
    expected, result = both(subject, photo(*size), 3, **options)
    assert expected.max() > 0.99
    assert (expected - result).abs().max() <= TOLERANCE


def test_the_soft_fusion_of_the_default_is_close_and_not_the_same() -> None:
    """The reference counts one whole vote where only a part of a footprint has votes."""
    subject, x = resnet("layer4"), photo(96, 128)
    options: Any = {"n_scales": 6, "window": 96, "smooth": False}
    expected, _ = both(subject, x, 3, **options)
    model = subject.model()
    base = LayerGradCam(model, model.layer4)
    soft = min_max(SESSWrapper(base, antialias=True, **options).attribute(x, target=3)[:, :1])
    difference = (expected - soft).abs()
    assert float(difference.max()) > 100 * TOLERANCE
    assert float(difference.mean()) < 0.02


def test_a_batch_is_as_the_peers() -> None:
    subject, x = resnet("layer4"), torch.cat([photo(96, 128), photo(96, 128).flip(3)])
    targets = [3, 5]
    model = subject.model()
    with SESS(model, [model.layer4], num_scales=3, window_size=96) as peer:
        maps = peer(x.clone(), [ClassifierOutputTarget(target) for target in targets])
    model = subject.model()
    ours = SESSWrapper(
        LayerGradCam(model, model.layer4),
        n_scales=3,
        window=96,
        fusion="reference",
        antialias=True,
        final_norm=True,
    )
    result = ours.attribute(x, target=targets)[:, 0]
    assert (torch.from_numpy(maps) - result).abs().max() <= TOLERANCE
