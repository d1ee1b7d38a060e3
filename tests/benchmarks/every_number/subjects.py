"""Networks, images and maps on fixed seeds, and helpers of the tables of rows."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

Calls = Iterator[tuple[str, Callable[[], Any]]]

TARGETS = [1, 3]
QUIET = {"show_progress": False}


# --- networks, images and maps -------------------------------------------------------------------


class Net(nn.Module):
    """conv - norm - ReLU - pool - conv - ReLU - GAP - linear, in 1 to 3 dimensions."""

    def __init__(self, dims: int = 2, branches: bool = False, bounded: bool = False) -> None:
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
        self.conv1, self.norm1, self.relu1 = conv(3, 6, 3, padding=1), norm(6), nn.ReLU(True)
        self.pool = getattr(nn, f"MaxPool{dims}d")(2)
        self.conv2, self.relu2 = conv(6, 8, 3, padding=1), nn.ReLU(True)
        self.gap = getattr(nn, f"AdaptiveAvgPool{dims}d")(1)
        self.fc = nn.Linear(8, 5)
        self.branches, self.bounded = branches, bounded

    def forward(self, x: Tensor, other: Tensor | None = None, gain: Tensor | None = None) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(x if other is None else x + other.square())))
        x = self.relu2(self.conv2(self.pool(x)))
        if self.branches and float(x.mean()) < -1:  # vmap cannot follow this
            x = -x
        x = self.fc(self.gap(x).flatten(1))
        x = x.tanh() if self.bounded else x
        return x if gain is None else x * gain[:, None]


def settle(model: nn.Module, x: Tensor, seed: int = 0, scale: float = 1.0) -> Any:
    """Batch norm as if trained on x, and a last layer whose answers differ."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(last.weight, std=scale)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


@cache
def net(dims: int = 2, dtype: torch.dtype = torch.float32, **options: bool) -> Any:
    torch.manual_seed(1)
    return settle(Net(dims, **options), torch.randn(16, 3, *[8] * dims)).to(dtype)


@cache
def resnet() -> Any:
    torch.manual_seed(2)
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    return settle(model, images(16, 64, seed=5), scale=0.1)


@cache
def transformer() -> Any:
    torch.manual_seed(3)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    return settle(model, images(16, 32, seed=5))


class Two(nn.Module):
    """A layer puts out two tensors, and another one takes them."""

    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.relu(), x.neg().relu()

    class Join(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a + b * b).mean((2, 3))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
        self.both, self.join = self.Both(), self.Join()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.join(*self.both(self.conv(x))))


@cache
def other_models() -> tuple[Any, Any]:
    """A small Swin transformer and a MobileNetV3."""
    torch.manual_seed(3)
    models = torchvision.models
    swin = models.SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=5)
    mobile = models.mobilenet_v3_small(weights=None, num_classes=5)
    return settle(swin, images(16, 32, seed=5)), settle(mobile, images(16, 64, seed=5))


def images(n: int = 2, *size: int, seed: int = 0) -> Tensor:
    """Cloudy pictures, as a network sees them."""
    height, width = (*size, size[-1], 32)[:2] if size else (32, 32)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 5, 5, generator=generator)
    fine = torch.randn(n, 3, height, width, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bilinear") + 0.2 * fine


def maps(n: int = 4, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth maps in [0, 1] with a few equal values, (n, side, side)."""
    x = images(n, side, seed=seed)[:, 0]
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (500 * (x - low) / (high - low)).round() / 500


# --- options --------------------------------------------------------------------------------------


def fixed() -> torch.Generator:
    """A generator; in the tables below it stands for a new one at each call."""
    return torch.Generator().manual_seed(7)


def late(package: str, name: str) -> Callable[..., Any]:
    """A function of the package, which is looked up when it is called."""

    def function(*args: Any) -> Any:
        return getattr(import_module(f"captum_ext.{package}"), name)(*args)

    function.__name__ = name
    return function


def anew(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fixed() if value is fixed else value for name, value in options.items()}


def in_words(options: Mapping[Any, Any]) -> str:
    def word(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"tensor {tuple(value.shape)}"
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return "tensors"
        return getattr(value, "__name__", None) or str(value)

    return ", ".join(f"{name}={word(value)}" for name, value in options.items()) or "defaults"
