"""What the situations share: a method of any library, its model and pictures, and the criteria."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.networks import Lambda

Explain = Callable[..., Tensor]  # explain(inputs, target, *additional_forward_args)


@dataclass(frozen=True)
class Method:
    """A layer method of one library; `open(model, layer)` gives `Explain` inside its block."""

    library: str
    name: str
    open: Callable[[nn.Module, nn.Module], AbstractContextManager[Explain]]

    def __str__(self) -> str:
        return f"{self.library}: {self.name}"

    def explain(self, model: nn.Module, inputs: Any, target: Any = 1, *extra: Any) -> Tensor:
        """The maps of the model's layer, as a user would ask for them once."""
        with self.open(model, unwrap(model).layer) as explain:
            return explain(inputs, target, *extra)


class Net(nn.Module):
    """conv - norm - ReLU - layer - `behind` - means - linear, in one to three dimensions."""

    def __init__(self, dims: int = 2, behind: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.stem = conv(3, 6, 3, padding=1)
        self.norm = norm(6)
        self.layer: nn.Module = conv(6, 6, 3, padding=1)
        self.behind = Lambda(behind)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        x = self.layer(torch.relu(self.norm(self.stem(x))))
        return self.fc(self.behind(x).flatten(2).mean(2)) * scale


class TwoInputs(Net):
    """A network of two pictures of one size."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x - y)


class Autocast(Net):
    """A network that runs under an autocast of its own."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def net(cls: type[Net] = Net, **options: Any) -> Net:
    """A seeded network whose classes differ, the same for all options."""
    torch.manual_seed(0)
    model = cls(**options).eval()
    nn.init.normal_(model.fc.weight)
    return model


def unwrap(model: nn.Module) -> Net:
    """The network in a `DataParallel`, or itself."""
    network = model.module if isinstance(model, nn.DataParallel) else model
    assert isinstance(network, Net)
    return network


def pictures(n: int = 2, *size: int) -> Tensor:
    return torch.randn(n, 3, *(size or (8, 8)), generator=torch.Generator().manual_seed(1))


def assert_alike(maps: Tensor, plain: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to `tolerance` times the range of `plain`, which is not flat."""
    assert maps.shape == plain.shape, f"shape {tuple(maps.shape)}, not {tuple(plain.shape)}"
    maps, plain = maps.detach().double(), plain.detach().double()
    span = plain.max() - plain.min()
    assert span > 0, "a flat map proves nothing"
    difference = (maps - plain).abs().max() / span
    assert difference <= tolerance, f"differs by {float(difference):.1e}"


def assert_correlated(maps: Tensor, plain: Tensor, at_least: float = 0.95) -> None:
    """For half precision, whose scores have two or three digits."""
    assert maps.shape == plain.shape, f"shape {tuple(maps.shape)}, not {tuple(plain.shape)}"
    pair = torch.stack([maps.detach().double().flatten(), plain.detach().double().flatten()])
    correlation = float(torch.corrcoef(pair)[0, 1])
    assert correlation >= at_least, f"correlation {correlation:.2f}"


def hooks_of(model: nn.Module) -> list[tuple[str, str, int]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(m, h, len(getattr(part, h))) for m, part in model.named_modules() for h in names]
