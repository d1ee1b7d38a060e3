"""A user's script as in the README, for `mypy`: every result has its exact type."""

from typing import assert_type

import numpy as np
from captum.attr import IntegratedGradients, LayerGradCam, NoiseTunnel, visualization
from torch import Tensor, nn

from captum_ext.attr import (
    FCAM,
    FIDO,
    RISE,
    AugmentedSR,
    BaseGradientCam,
    FIDOMasks,
    LayerAblationCam,
    LayerCam,
    LayerClassActivationMap,
    LayerEigenCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerScoreCam,
    LayerSmoothGradCamPlusPlus,
    RISEMaps,
    SESSWrapper,
    UpsampleWrapper,
)
from captum_ext.fcam import FCAMDecoder
from captum_ext.metrics import (
    Curve,
    Insertion,
    PointingGame,
    PxAP,
    RoadScores,
    average_drop,
    deletion,
    insertion,
    pointing_game,
    road,
)
from captum_ext.tta import crop_tta
from captum_ext.zoo import load_image, load_model


class Net(nn.Module):
    """A user's network with typed layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.relu, self.fc = nn.ReLU(), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.relu(self.conv2(self.conv1(x)))
        scores: Tensor = self.fc(maps.mean((2, 3)))
        return scores


class LayerMyCam(BaseGradientCam):
    """A user's method, as in the tutorial."""

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients.abs()


def readme() -> None:
    demo, photo = load_model(), load_image()
    x = demo.preprocess(photo)
    cam = UpsampleWrapper(LayerGradCamPlusPlus(demo.module, layer="features"))
    picture = np.asarray(demo.preprocess.view(photo))
    for maps in (NoiseTunnel(cam).attribute(x, nt_samples=8, target=967), cam.attribute(x)):
        explained = maps[0].permute(1, 2, 0).numpy()
        visualization.visualize_image_attr(explained, picture, "blended_heat_map")


def layers(net: Net, x: Tensor) -> None:
    assert_type(LayerGradCamPlusPlus(net, "conv1").attribute(x, target=1), Tensor)
    assert_type(LayerCam(net, net.conv1).attribute(x, 1, relu_attributions=True), Tensor)
    assert_type(LayerCam(net, ["conv1", "conv2"]).attribute(x), list[Tensor])
    assert_type(LayerCam(net, [net.conv1, net.conv2]).attribute(inputs=x), list[Tensor])
    assert_type(LayerCam(net, [net.conv1, net.relu]).attribute((x, x)), list[Tensor])
    assert_type(LayerCam(net, [net.conv1, "relu"]).attribute(x), list[Tensor])
    assert_type(LayerClassActivationMap(net, "relu", head=net.fc).attribute(x, 1), Tensor)
    assert_type(LayerSmoothGradCamPlusPlus(net, ["relu"], n_samples=3).attribute(x), list[Tensor])
    assert_type(LayerEigenCam(net, "relu", center=True).attribute(x, 1), Tensor)
    assert_type(LayerScoreCam(net, "relu", score="softmax").attribute(x, baselines=0), Tensor)
    assert_type(LayerGroupCam(net, ["relu"], groups=2).attribute(x, target=[1]), list[Tensor])
    assert_type(LayerAblationCam(net, net.relu).attribute(x, layer_baselines="min"), Tensor)
    assert_type(LayerMyCam(net, "relu").attribute(x, target=1), Tensor | list[Tensor])
    for several in LayerCam(net, ["conv1", "relu"]).attribute(x, target=1):
        several.mean()


def wrappers(net: Net, x: Tensor) -> None:
    cam = LayerCam(net, ["conv1", "relu"])
    upsampled = UpsampleWrapper(cam, fuse="mean", normalize="tanh")
    assert_type(upsampled.attribute(x, target=1, relu_attributions=True), Tensor)
    assert_type(upsampled.attribute((x, x), target=1), tuple[Tensor, ...])
    gradients = UpsampleWrapper(IntegratedGradients(net))
    with_delta = gradients.attribute(x, target=1, return_convergence_delta=True)
    assert_type(with_delta, tuple[Tensor, Tensor])
    sess = SESSWrapper(AugmentedSR(upsampled, n_augmentations=4), pre_filter_ratio=0.9)
    assert_type(sess.attribute(x, target=[1]), Tensor)
    assert_type(sess.attribute(x, target=1, return_coverage=True), tuple[Tensor, Tensor])
    sr = AugmentedSR(NoiseTunnel(LayerGradCam(net, net.relu)), mode="sr")
    assert_type(sr.attribute(x, target=1, nt_samples=2), Tensor)
    assert_type(sr.attribute(x, return_history=True), tuple[Tensor, Tensor | None])
    NoiseTunnel(sess).attribute(x, nt_samples=8, target=1)


def masks(net: Net, x: Tensor) -> None:
    fido = FIDO(net)
    assert_type(fido.attribute(x, target=1), Tensor)
    assert_type(fido.attribute((x,), baselines="mean", mask_size=56), tuple[Tensor, ...])
    both = fido.attribute(x, target=1, n_steps=30, return_masks=True)
    assert_type(both, tuple[Tensor, FIDOMasks])
    if both[1].joint is not None:
        assert_type(crop_tta(net, x, both[1].joint), Tensor)
    fido.attribute(x, target=3, **{**FIDO.RELEASED, "n_steps": 30})
    rise = RISE(net, score="sigmoid")
    assert_type(rise.attribute(x, target=[3, 7], n_masks=4000), Tensor)
    assert_type(rise.attribute((x, x), "blur", 3), tuple[Tensor, ...])
    assert_type(rise.estimate(x, targets=[0, 1, 2], tolerance=0.05), RISEMaps)
    fcam = FCAM(net, FCAMDecoder.reading(net, x).eval())
    assert_type(fcam.attribute(x), Tensor)
    assert_type(fcam.attribute((x,), target=1), tuple[Tensor, ...])


def metrics(net: Net, x: Tensor) -> None:
    attributions = UpsampleWrapper(LayerCam(net, "relu")).attribute(x, target=1)
    assert_type(average_drop(net, x, attributions, target=1), Tensor)
    assert_type(deletion(net, x, attributions, target=1, score="logit"), Curve)
    assert_type(road(net, x, attributions, target=1, noise=0.0), RoadScores)
    inserted = Insertion()
    inserted.update(insertion(net, x, attributions, target=1, step=0.1))
    print(inserted.compute())
    masks = attributions[:, 0] > 0
    assert_type(pointing_game(attributions, masks), Tensor)
    pointing, pixels = PointingGame(tolerance=15), PxAP()
    pointing.update(attributions, masks)
    pixels.update(attributions, masks)
    assert_type(pointing.compute()["all"], Tensor)
    assert_type(pixels.compute(), Tensor)
