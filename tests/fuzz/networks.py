"""Networks that are drawn: the usual ways to make a map and a score, in 1 to 3 dimensions."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import Lambda

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}

BLOCKS = (
    "relu",
    "relu in place",
    "functional relu",
    "functional relu in place",
    "sigmoid",
    "conv",
    "strided conv",
    "pool",
    "batch norm",
    "group norm",
    "dropout",
    "residual",
    "residual in place",
    "concat",
)
LAYERS = ("tensor", "tuple", "dict")
HEADS = ("linear", "flat", "map", "column", "vector")


@dataclass(frozen=True)
class NetSpec:
    """The choices that make a network.

    Attributes:
        size: the spatial size of the inputs.
        channels: of the inputs.
        width: the channels of each layer.
        blocks: names in `BLOCKS`.
        layer_output: what the module `layer` returns, a name in `LAYERS`.
        head: a name in `HEADS`.
        classes: of the heads that have classes.
        seed: of the weights.
    """

    size: tuple[int, ...]
    channels: int
    width: int
    blocks: tuple[str, ...]
    layer_output: str
    head: str
    classes: int
    seed: int
    dtype: torch.dtype


class AddConv(nn.Module):
    """A residual block, with and without operations in place."""

    def __init__(self, conv: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.conv, self.in_place = conv, in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.in_place:
            y += x
            return y.relu_()
        return x + y.relu()


class ConvThenRelu(nn.Module):
    """A convolution whose output is rectified in place by a function."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x), inplace=True)


class ConcatBranches(nn.Module):
    """Two branches, side by side, and a convolution that mixes them."""

    def __init__(self, left: nn.Module, right: nn.Module, mix: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.mix = left, right, mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.left(x), self.right(x)], 1))


class LayerOutput(nn.Module):
    """Returns its input as a tensor, in a tuple of two sizes, or in a mapping."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]:
        if self.form == "tuple":
            return 2 * x, x[..., :1]
        return {"map": x} if self.form == "dict" else x * 1


class DrawnNet(nn.Module):
    """stem - blocks - layer - head; `facts` are added to the scores, `gain` multiplies them."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        dims = len(spec.size)
        self.spec = spec
        self.stem = CONVS[dims](spec.channels, spec.width, 3, padding=1)
        self.blocks = nn.Sequential(*(_block(kind, dims, spec.width) for kind in spec.blocks))
        self.layer = LayerOutput(spec.layer_output)
        self.eval()  # before the first pass: a norm in train mode needs more than one value
        n = 1 if spec.head in ("column", "vector") else spec.classes
        with torch.no_grad():
            side = self.blocks(self.stem(torch.zeros(1, spec.channels, *spec.size)))[0, 0].numel()
        features = spec.width * side if spec.head == "flat" else spec.width
        self.head = CONVS[dims](spec.width, n, 1) if spec.head == "map" else nn.Linear(features, n)
        nn.init.normal_(self.head.weight)
        self.eval().to(spec.dtype)

    def forward(self, x: Tensor, facts: Tensor | None = None, gain: Tensor | float = 1.0) -> Tensor:
        y = self.layer(self.blocks(self.stem(x)))
        if isinstance(y, tuple):
            y = y[0] + y[1]
        y = y["map"] if isinstance(y, dict) else y
        if self.spec.head in ("linear", "column", "vector"):
            y = y.flatten(2).mean(2)
        scores = self.head(y.flatten(1) if self.spec.head == "flat" else y)
        rows = (len(scores),) + (1,) * (scores.dim() - 1)
        if facts is not None:
            scores = scores + facts.reshape(rows)
        scores = scores * (gain.reshape(rows) if isinstance(gain, Tensor) else gain)
        return scores[:, 0] if self.spec.head == "vector" else scores

    def layer_names(self) -> list[str]:
        """The modules that have a map."""
        inner = [f"blocks.{name}" for name, _ in self.blocks.named_modules() if name]
        return ["layer", "stem", *inner]


def _block(kind: str, dims: int, width: int) -> nn.Module:
    conv = CONVS[dims]
    if kind == "batch norm":
        norm = BATCH_NORMS[dims](width)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        return norm
    if kind == "concat":
        branches = conv(width, 2, 1), conv(width, 3, 3, padding=1)
        return ConcatBranches(*branches, conv(5, width, 1))
    if kind.startswith("residual"):
        return AddConv(conv(width, width, 3, padding=1), "in place" in kind)
    simple = {
        "relu": nn.ReLU,
        "relu in place": lambda: nn.Sequential(conv(width, width, 1), nn.ReLU(inplace=True)),
        "functional relu": lambda: Lambda(F.relu),
        "functional relu in place": lambda: ConvThenRelu(conv(width, width, 1)),
        "sigmoid": nn.Sigmoid,
        "conv": lambda: conv(width, width, 3, padding=1),
        "strided conv": lambda: conv(width, width, 2, stride=2, padding=1),
        "pool": lambda: MAX_POOLS[dims](2, ceil_mode=True),
        "group norm": lambda: nn.GroupNorm(1, width),
        "dropout": nn.Dropout,
    }
    return simple[kind]()
