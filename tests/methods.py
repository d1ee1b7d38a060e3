"""The layer methods under test, and small networks to try them on."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import captum_ext.attr
from captum_ext.attr import (
    BaseLayerCam,
    LayerGroupCam,
    LayerScoreCam,
    LayerSmoothGradCamPlusPlus,
)

Method = Callable[..., Any]


def smooth(forward_func: Any, layer: Any, device_ids: Any = None, **options: Any) -> Any:
    """Smooth Grad-CAM++ with three samples and a generator of its own, new for each object."""
    generator = torch.Generator().manual_seed(0)
    options = {"n_samples": 3, "generator": generator, **options}
    return LayerSmoothGradCamPlusPlus(forward_func, layer, device_ids, **options)


CLASSES = {
    cls.title: cls
    for cls in (getattr(captum_ext.attr, name) for name in captum_ext.attr.__all__)
    if inspect.isclass(cls) and issubclass(cls, BaseLayerCam) and hasattr(cls, "title")
}
EVERY: dict[str, Method] = {
    **CLASSES,
    "Smooth Grad-CAM++": smooth,
    "Score-CAM increase": partial(LayerScoreCam, score="softmax", weighting="increase"),
    "Group-CAM": partial(LayerGroupCam, groups=3),
}
CLASSES["Score-CAM increase"] = LayerScoreCam
GRADIENT = {name: method for name, method in EVERY.items() if CLASSES[name].family == "gradient"}
MASKING = {name: method for name, method in EVERY.items() if CLASSES[name].family == "masking"}
OTHER = {name: method for name, method in EVERY.items() if CLASSES[name].family == "activation"}
NEEDS_GRADIENTS = {name for name in EVERY if CLASSES[name].needs_gradients}

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class SmallNet(nn.Module):
    """conv - norm - ReLU (in place) - conv - ReLU - GAP - linear, in 1 to 3 dimensions."""

    def __init__(self, dims: int = 2, channels: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = _CONV[dims](3, channels, 3, padding=1)
        self.norm = _NORM[dims](channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = _CONV[dims](channels, channels, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool = _POOL[dims](1)
        self.fc = nn.Linear(channels, classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.relu2(self.conv2(self.relu1(self.norm(self.conv1(x)))))
        return self.fc(self.pool(x).flatten(1))


def small_net(dims: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> SmallNet:
    torch.manual_seed(seed)
    net = SmallNet(dims).eval()
    nn.init.normal_(net.fc.weight)
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2.0)
    return net.to(dtype)


def pooled_net(dtype: torch.dtype = torch.float64, side: int = 4) -> nn.Sequential:
    """A network whose map is `side` times smaller than its input."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(side),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()
    nn.init.normal_(net[-1].weight)
    return net.to(dtype)
