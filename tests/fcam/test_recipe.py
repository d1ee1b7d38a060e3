"""F-CAM localises objects better than its teacher, on pictures with known masks.

It takes a minute on one thread. `tests/benchmarks/fcam.py` is the complete benchmark.
"""

import warnings

import pytest
import torch
from captum.attr import LayerGradCam

from captum_ext.datasets import TexturedEllipses, train_classifier
from captum_ext.fcam import fit_fcam
from captum_ext.fcam.guides import guide_maps
from captum_ext.metrics import MaxBoxAcc, PxAP

torch.set_num_threads(1)


@pytest.mark.slow
def test_f_cam_localises_better_than_its_teacher():
    """The training sees labels only. The gains are at least 10 and 5 points."""
    train = TexturedEllipses(1000, 3000)
    network = train_classifier(train)
    scenes = TexturedEllipses(100, 3001).batch()
    x = (scenes.pixels / 255 - 0.5) / 0.25
    with torch.no_grad():
        assert (network(x).argmax(1) == scenes.targets).float().mean() > 0.9
    guide = LayerGradCam(network, network[4])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("error", "The decoder has learned nothing")
        fcam = fit_fcam(
            network,
            [(scene.image, scene.target) for scene in train],
            guide,
            size=64,
            layers=["0", "2", "4"],
            widths=(48, 24, 12),
            normalize=((0.5,) * 3, (0.25,) * 3),
            show_progress=False,
        )
    result = []
    for maps in (guide_maps(guide, x, scenes.targets, (64, 64)), fcam.foreground(x)):
        boxes, pixels = MaxBoxAcc((0.3, 0.5, 0.7), "all", "wsolevaluation"), PxAP()
        boxes.update(maps, [box[None] for box in scenes.boxes])
        pixels.update(maps, scenes.masks)
        result.append((100 * boxes.compute().item(), 100 * pixels.compute().item()))
    (v2, ap), (v2_fcam, ap_fcam) = result
    assert v2 > 50, "a guide that is worth beating"
    assert v2_fcam > v2 + 10
    assert ap_fcam > ap + 5
    # One forward pass gives one map for each picture, for any class.
    assert torch.equal(fcam.attribute(x[:2], target=0), fcam.attribute(x[:2], target=1))
    assert pytest.approx(1, abs=0.05) == fcam.foreground(x).flatten(1).amax(1).mean().item()
