"""Seeded models with random weights, what plain autograd says of them, and how far maps differ."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from tests.networks import narrow_vgg
from tests.parity import equations

TARGETS = [3, 5]


@lru_cache(maxsize=1)
def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet18().eval()


_vgg = lru_cache(maxsize=1)(narrow_vgg)


@dataclass(frozen=True)
class Subject:
    """A model, a layer of it, and a batch of two images with a target each."""

    build: Callable[[], nn.Module]
    layer: str
    size: int
    gain: float = 1.0

    def __str__(self) -> str:
        return f"{self.build.__name__.lstrip('_')}-{self.layer}"

    def model(self) -> nn.Module:
        """A model of one's own: peers switch modes, fill gradients and swap modules.

        `gain` scales the logits. Random weights give gradients of 1e-3, trained ones far larger
        ones; peers add an absolute epsilon to powers of them.
        """
        model = copy.deepcopy(self.build())
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        with torch.no_grad():
            head.weight.mul_(self.gain)
        return model

    def inputs(self) -> Tensor:
        return torch.randn(2, 3, self.size, self.size, generator=torch.manual_seed(1))

    @lru_cache(maxsize=8)  # noqa: B019 (subjects are small, and live as long as the module)
    def recorded(self) -> tuple[Tensor, Tensor]:
        """Activations of the layer, and the gradient of each image's target there."""
        model, kept = self.model(), {}

        def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
            kept["a"] = output
            return output.clone()  # the next layer may work in place

        model.get_submodule(self.layer).register_forward_hook(keep)
        scores = model(self.inputs())[range(2), TARGETS]
        (gradients,) = torch.autograd.grad(scores.sum(), kept["a"])
        return kept["a"].detach(), gradients


def resnet(layer: str, size: int = 112, gain: float = 1.0) -> Subject:
    return Subject(_resnet, layer, size, gain)


def vgg(layer: str, size: int = 64, gain: float = 1.0) -> Subject:
    return Subject(_vgg, layer, size, gain)


def paper_score_cam(subject: Subject, **options: bool) -> Tensor:
    """Score-CAM by the equation, with the scores of a float64 copy of the model."""
    model, x = subject.model().double(), subject.inputs()
    a, _ = subject.recorded()
    maps = []
    for example, activation, target in zip(x, a, TARGETS, strict=True):
        with torch.no_grad():
            w = equations.score_cam_weights(
                lambda masked, target=target: model(masked)[:, target],
                example,
                activation,
                **options,
            )
        maps.append(torch.einsum("k,kij->ij", w, activation.double()))
    return torch.stack(maps)


def difference(ours: Tensor, reference: Tensor) -> float:
    """The largest difference between two maps (B, h, w), where each reference spans [0, 1].

    Both are divided by the range of the reference: unlike after a min-max of each, a wrong scale
    or a shift shows.
    """
    a, b = ours.detach().double().flatten(1), reference.detach().double().flatten(1)
    span = b.amax(1) - b.amin(1)
    assert a.shape == b.shape
    assert bool((span > 0).all()), "flat maps prove nothing"
    return float(((a - b).abs().amax(1) / span).max())


def scaled(maps: Tensor) -> Tensor:
    """Each map (B, h, w) min-maxed, in float64."""
    maps = maps.detach().double()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)
