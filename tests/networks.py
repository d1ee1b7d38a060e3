"""Small networks for the tests, and layers with one peculiarity each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer, VisionTransformer, get_model, vgg11_bn

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

VIT_LAYER = "encoder.layers.encoder_layer_1.ln_1"


# --- classifiers of convolutions -----------------------------------------------------------------


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
    """A seeded `SmallNet` whose classes differ, with statistics as if trained."""
    torch.manual_seed(seed)
    net = SmallNet(dims).eval()
    nn.init.normal_(net.fc.weight)
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2.0)
    return net.to(dtype)


def _gap_linear(channels: int, classes: int) -> list[nn.Module]:
    """Global average pooling and a linear layer."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def _stage(in_channels: int, out_channels: int, *layers: nn.Module) -> nn.Sequential:
    """A convolution that halves the picture, and the layers after it."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, 2, 1), *layers)


def pooled_net(dtype: torch.dtype = torch.float64, side: int = 4) -> nn.Sequential:
    """A network whose map is `side` times smaller than its input."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(side),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        *_gap_linear(8, 4),
    ).eval()
    nn.init.normal_(net[-1].weight)
    return net.to(dtype)


def named_net(channels: int = 3) -> nn.Sequential:
    """conv1 - relu1 - pool1 - conv2 - relu2 - gap - flat - fc; no ReLU is in place."""
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(channels, 6, 3, padding=1),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(6, 6, 3, padding=1),
        "relu2": nn.ReLU(),
        "gap": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "fc": nn.Linear(6, 4),
    }
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    nn.init.normal_(net.fc.weight)
    return net.eval()


def tiny_net() -> nn.Sequential:
    """One convolution with stride 2, and three classes."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    return nn.Sequential(conv, nn.ReLU(), *_gap_linear(4, 3)).eval()


def flat_net() -> nn.Sequential:
    """One convolution of pictures of 16 pixels, and a linear layer of all its units."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 5, stride=2)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)).eval()


def linear_net() -> nn.Sequential:
    """A linear classifier of grey pictures of 8 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def quadrants_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A linear layer of a convolution's means over the four quarters of the picture."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)]
    return nn.Sequential(*layers, *head).eval().to(dtype)


def net_with_ties() -> nn.Sequential:
    """Its layer "1" rounds, and so has many equal activations."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    return nn.Sequential(conv, RoundToQuarters(), *_gap_linear(5, 2)).double().eval()


def strided_net() -> nn.Sequential:
    """Two convolutions with stride 2; layer "4" is the last one before the pooling."""
    torch.manual_seed(0)
    return nn.Sequential(
        *_stage(3, 8, nn.BatchNorm2d(8), nn.ReLU()),
        *_stage(8, 12, nn.ReLU()),
        *_gap_linear(12, 4),
    ).eval()


def two_stage_net(seed: int = 0) -> nn.Sequential:
    """Two stages with stride 2, with batch norms that have seen data."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        _stage(3, 6, nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        _stage(6, 8, nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *_gap_linear(8, 4),
    )
    with torch.no_grad():
        model(torch.rand(16, 3, 32, 32))
    return model.eval()


def three_stage_net(seed: int = 0) -> nn.Sequential:
    """Three stages with stride 2 and a dropout, in train mode."""
    torch.manual_seed(seed)
    return nn.Sequential(
        _stage(3, 6, nn.BatchNorm2d(6), nn.ReLU()),
        _stage(6, 8, nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        _stage(8, 8, nn.Dropout(0.5), nn.ReLU()),
        *_gap_linear(8, 4),
    )


def dropout_net(seed: int = 0, channels: int = 3) -> nn.Sequential:
    """Two stages with stride 2, the second one with a dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        _stage(channels, 8, nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        _stage(8, 12, nn.Dropout(0.5), nn.ReLU()),
        *_gap_linear(12, 4),
    ).eval()


class ConvMeanLinear(nn.Module):
    """A convolution, the means of its channels, and a linear layer."""

    def __init__(self, channels: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, channels, 3), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


# --- torchvision's architectures -----------------------------------------------------------------


def torchvision_net(name: str, device: str = "cpu", **options: Any) -> nn.Module:
    """A torchvision classifier with random weights, in eval mode.

    On the device "meta" it has shapes and no values, and is there at once.
    """
    if name in {"googlenet", "inception_v3"}:
        options["init_weights"] = False  # its own initialisation takes minutes
    with torch.device(device):
        return get_model(name, weights=None, **options).eval()


def narrow_vgg() -> nn.Module:
    """VGG-11 with a narrow classifier: 10 million parameters instead of 133."""
    torch.manual_seed(0)
    model = vgg11_bn()
    model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 32), nn.ReLU(), nn.Linear(32, 10))
    return model.eval()


def vision_transformer(
    image_size: int = 32, layers: int = 2, heads: int = 2, width: int = 32, classes: int = 10
) -> VisionTransformer:
    """A vision transformer with patches of 8 pixels.

    Its head is drawn anew because torchvision starts it at zero.
    """
    torch.manual_seed(0)
    net = VisionTransformer(image_size, 8, layers, heads, width, 2 * width, num_classes=classes)
    nn.init.normal_(net.heads.head.weight)
    return net.eval()


def small_vit() -> VisionTransformer:
    """A vision transformer of 3 x 3 patches, five classes and a class token that is not zero."""
    net = vision_transformer(image_size=24, heads=4, classes=5)
    nn.init.normal_(net.class_token)
    return net


def small_swin() -> SwinTransformer:
    """A Swin transformer of two stages, whose layers have their channels last."""
    torch.manual_seed(0)
    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5).eval()


# --- scores that can be computed by hand ---------------------------------------------------------


class WeightedSum(nn.Module):
    """One score for each image, sum(w x); `column` makes it (B, 1) instead of (B,)."""

    def __init__(self, weights: Tensor, column: bool = False) -> None:
        super().__init__()
        self.column = column
        self.register_buffer("weights", weights)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        scores = (x * self.weights).sum((1, 2, 3))
        return scores[:, None] if self.column else scores


class ScaledHalves(nn.Module):
    """Scores (B, C, 2, 1), the means of the left and the right half, with one scale an image."""

    def forward(self, x: Tensor, scale: Tensor, plus: float) -> Tensor:
        means = torch.stack([half.mean((2, 3)) for half in x.chunk(2, 3)], 2)
        return means[..., None] * scale[:, None, None, None] + plus


class PatchMeans(nn.Module):
    """Logit of class k: 8 times the mean of patch k. A third class is constant."""

    patches = ((slice(8, 16), slice(8, 16)), (slice(20, 28), slice(18, 26)))

    def forward(self, x: Tensor) -> Tensor:
        means = [x[:, :, rows, columns].mean((1, 2, 3)) for rows, columns in self.patches]
        return 8 * torch.stack([*means, 0.2 * torch.ones_like(means[0])], 1)


class BrightPixelDetector(nn.Module):
    """Finds the one bright pixel; its units look at every fourth pixel, the first at pixel 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 5, stride=4, padding=2, bias=False)
        tent = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])
        self.layer.weight.data = (tent[:, None] * tent).expand(1, 3, 5, 5).clone()

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        score = self.layer(x).sum((1, 2, 3)) * gain
        return torch.stack([score * 0, score], 1)


class BlobDetector(nn.Module):
    """Class 1 for cells of 8 pixels that are bright: smaller blobs escape it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(8)

    def forward(self, x: Tensor) -> Tensor:
        score = F.relu(self.pool(x) - 0.3).sum((1, 2, 3))
        return torch.stack([torch.ones_like(score), 20 * score], 1)


class UnshuffleNet(nn.Module):
    """Its layer holds the pixels of each 4 x 4 block as channels: nothing is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(4)
        self.head = nn.Linear(48, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unshuffle(x).mean((2, 3)))


# --- functions as modules ------------------------------------------------------------------------


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class FunctionsAroundLayer(nn.Module):
    """after(before(layer, x)), for every odd way to feed or to read `layer`."""

    def __init__(
        self,
        after: Callable[..., Any],
        before: Callable[..., Any] = lambda layer, x: layer(x),
        layer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layer = nn.Identity() if layer is None else layer
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(self.layer, x))


class TwoConvNet(nn.Module):
    """Two convolutions and a linear layer, run by a function of the network and the images."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], padding: int = 0) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=padding)
        self.fc, self.body = nn.Linear(4, 3), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class FunctionBetweenConvs(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


class FunctionBetweenConvAndLinear(nn.Module):
    """A function, as the layer `layer`, of a convolution's channels; a linear layer follows."""

    def __init__(self, function: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(3, 8, 5), Lambda(function)
        self.head = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.conv(x)).flatten(1))


# --- layers that watch or break ------------------------------------------------------------------


class BatchSizeRecorder(nn.Module):
    """Runs a model and keeps the sizes of the batches that it was given."""

    def __init__(self, net: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net = net
        self.batch_sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batch_sizes.append(len(x))
        return self.net(x)


class CallCounter(nn.Module):
    """An identity that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class RaisingLayer(nn.Module):
    """An identity that raises at the n-th call."""

    def __init__(self, at_call: int = 1) -> None:
        super().__init__()
        self.calls = iter(range(1, at_call))

    def forward(self, x: Tensor) -> Tensor:
        if next(self.calls, None) is None:
            raise RuntimeError("in the middle")
        return x


class RoundToQuarters(nn.Module):
    """Activations that are multiples of 1/4."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 4).round() / 4


# --- networks with a peculiarity -----------------------------------------------------------------


class StatefulNet(nn.Module):
    """Its output depends on how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", None)
        self.register_buffer("wide", torch.ones(()).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = torch.ones(1)
        self.register_buffer("new", torch.ones(1))
        return self.norm(self.linear(x)) * self.calls


class NoGradConv(nn.Module):
    """A convolution that runs without gradients."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, kernel_size)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class LinearProbe(nn.Module):
    """A linear layer of a backbone that runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x).mean((2, 3))
        return self.head(x)


class AutocastNet(nn.Module):
    """`small_net` in bfloat16, by an autocast of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


class DataDependentNet(nn.Module):
    """Control flow that depends on the data, in front of or behind the layer `conv2`."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.fc, self.where = nn.Linear(4, 3), where

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.where == "in front" and x.mean().item() < 1e9:
            x = x * 2
        y = self.conv2(x)
        if self.where == "behind" and y[:, 0].abs().sum() > 0:
            y = y * 3
        if self.where == "in place":
            x.add_(1)
            return self.fc((y + x[:, :, 1:-1, 1:-1]).mean((2, 3)))
        if self.where == "numpy":
            return self.fc(torch.as_tensor(y.numpy()).mean((2, 3)))
        return self.fc(y.mean((2, 3)))


class DataDependentHead(nn.Module):
    """Control flow that depends on the convolution's output, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        return self.head(y if float(y.sum()) > 1e9 else 2 * y)


class ReluTwiceNet(nn.Module):
    """One ReLU that runs before and after the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.relu(x))).sum((2, 3))


class SharedReluNet(nn.Module):
    """One ReLU and one pooling for three convolutions: they have no output of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(c, d, 3, padding=1) for c, d in ((3, 4), (4, 5), (5, 6))
        )
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.pool(self.relu(conv(x)))
        return self.fc(x.mean((2, 3)))


class SqueezeExcitation(nn.Module):
    """A convolution with a gate that sees the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class BranchedNet(nn.Module):
    """Two branches, padding on one side, a dilated convolution, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 4, (5, 3), stride=(2, 1), padding=(2, 0), dilation=(1, 2))
        self.thin = nn.Conv2d(3, 4, 1, stride=(2, 1))
        self.down = nn.Conv2d(8, 4, 2, stride=2)
        self.layer = nn.AvgPool2d(3, 1, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (3, 0, 1, 0))
        x = torch.cat([self.wide(F.pad(x, (2, 2, 0, 0))), self.thin(x)], 1)
        x = self.down(x * torch.sigmoid(x.mean((2, 3), keepdim=True).detach()))
        x = self.layer(x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2))
        return self.head(x.mean((2, 3)))


class ChannelsLastNet(nn.Module):
    """A norm with the channels last, as many as rows and columns of a picture of 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2))


class ScriptedNet(nn.Module):
    """A scripted part hides the operations that made its output."""

    def __init__(self) -> None:
        super().__init__()
        self.part = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
        self.identity, self.fc = nn.Identity(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.identity(self.part(x).transpose(2, 3).relu()).mean((2, 3)))


class PoolAndInput(nn.Module):
    """A layer of two tensors: its pooled input, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.pool(x), x


class TwoTensorNet(nn.Module):
    """A network whose layer `down` has two tensors of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.fc = nn.Conv2d(3, 4, 3), PoolAndInput(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        small, large = self.down(self.conv(x))
        return self.fc(small.mean((2, 3)) + large.square().mean((2, 3)))


class TwoPictureNet(nn.Module):
    """`small_net` of a picture and of a smaller, grey one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.net = nn.Conv2d(4, 3, 1), small_net()

    def forward(self, x: Tensor, grey: Tensor) -> Tensor:
        return self.net(self.conv(torch.cat([x, F.interpolate(grey, x.shape[2:])], 1)))


class ImageAndFactsNet(nn.Module):
    """`small_net` of the images, plus a second input with one number a class."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor, facts: Tensor) -> Tensor:
        return self.net(x) + facts
