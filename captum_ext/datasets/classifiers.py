"""Small networks for the synthetic data, trained in a minute or two on a CPU."""

from typing import overload

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from captum_ext._checks import check_count
from captum_ext._engine.state import seeded_random
from captum_ext.datasets.fine_grained import PATTERNS, FineGrainedParts, normalized, stacked
from captum_ext.datasets.textured_ellipses import TEXTURES, TexturedEllipses


class SmallCNN(nn.Module):
    """Four convolutions, global average pooling and a linear layer, for `FineGrainedParts`.

    At 224 px the maps are 56, 28, 14 and 14 units wide, of 16, 32, 32 and 64 channels. One core of
    a CPU runs the network and its gradient in about 1.2 ms per picture. Batch normalisation and a
    ReLU follow every convolution. `last` is the last of these blocks, the layer for CAMs.

    Args:
        n_classes: the number of logits.

    Shape:
        - images: (N, 3, H, W), normalised as `FineGrainedParts.batch` gives them.
        - logits: (N, n_classes).

    Example:
        >>> logits = SmallCNN(8).eval()(torch.zeros(2, 3, 224, 224))
        >>> logits.shape
        torch.Size([2, 8])
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(3, 16, kernel_size=5, stride=4),
            _block(16, 32, kernel_size=3, stride=2),
            _block(32, 32, kernel_size=3, stride=2),
        )
        self.last = _block(32, 64, kernel_size=3, stride=1)
        self.head = nn.Linear(64, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.last(self.features(images)).mean((2, 3)))
        return logits


class TinyCNN(nn.Sequential):
    """Five convolutions, global average pooling and a linear layer, for `TexturedEllipses`.

    At 64 px the maps are 32, 16, 16, 8 and 8 units wide, of 16, 32, 32, 64 and 96 channels: the
    layers "0" to "4". Batch normalisation and a ReLU follow every convolution.

    Args:
        n_classes: the number of logits.

    Shape:
        - images: (N, 3, H, W), normalised as `FineGrainedParts.batch` gives them.
        - logits: (N, n_classes).

    Example:
        >>> TinyCNN(4).eval()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 4])
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__(
            _block(3, 16, kernel_size=3, stride=2),
            _block(16, 32, kernel_size=3, stride=2),
            _block(32, 32, kernel_size=3, stride=1),
            _block(32, 64, kernel_size=3, stride=2),
            _block(64, 96, kernel_size=3, stride=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, n_classes),
        )


def _block(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


@overload
def train_classifier(
    data: FineGrainedParts,
    *,
    n_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> SmallCNN: ...


@overload
def train_classifier(
    data: TexturedEllipses,
    *,
    n_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> TinyCNN: ...


def train_classifier(
    data: FineGrainedParts | TexturedEllipses,
    *,
    n_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> SmallCNN | TinyCNN:
    """Train a small network on the classes, by AdamW with one cycle of the learning rate.

    `FineGrainedParts` gets a `SmallCNN`. `TexturedEllipses` gets a `TinyCNN`, and its pictures are
    mirrored at random both ways, which keeps their classes. Pictures are kept as bytes (150 kB each
    at 224 px). Global random state stays the same.

    Args:
        data: the training set.
        n_epochs: passes over the pictures. None is 10 for beetles, 15 for ellipses.
        batch_size: pictures in a step; an epoch leaves out the incomplete last batch. None is 16
            for beetles, 32 for ellipses.
        lr: the highest learning rate. None is 5e-3.
        seed: the seed of the weights and of the order.
        show_progress: whether to draw a bar for drawing the pictures and one for the steps.

    Returns:
        The network, in eval mode.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> network = train_classifier(FineGrainedParts(4000, seed=0))  # doctest: +SKIP
        >>> test = FineGrainedParts(400, seed=1).batch()  # doctest: +SKIP
        >>> (network(test.images).argmax(1) == test.targets).float().mean()  # doctest: +SKIP
        tensor(0.9975)
    """
    ellipses = isinstance(data, TexturedEllipses)
    n_epochs = (15 if ellipses else 10) if n_epochs is None else n_epochs
    batch_size = (32 if ellipses else 16) if batch_size is None else batch_size
    lr = 5e-3 if lr is None else lr
    check_count("n_epochs", n_epochs)
    if not 2 <= batch_size <= len(data):
        raise ValueError(
            f"`batch_size` must be in [2, {len(data)}], the number of pictures, got {batch_size}."
        )
    pixels = torch.empty((len(data), 3, *data.size), dtype=torch.uint8, device="cpu")
    targets = torch.empty(len(data), dtype=torch.int64, device="cpu")
    for i, example in enumerate(tqdm(data, desc="drawing", disable=not show_progress)):
        pixels[i], targets[i] = stacked([example.image])[0], example.target
    generator = Generator().manual_seed(seed)
    with seeded_random(torch.device("cpu"), seed):
        network: SmallCNN | TinyCNN = (
            TinyCNN(len(TEXTURES)) if ellipses else SmallCNN(len(PATTERNS))
        )
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    n_steps = n_epochs * (len(data) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=n_steps)
    with tqdm(total=n_steps, desc="training", disable=not show_progress) as bar:
        for _ in range(n_epochs):
            order = torch.randperm(len(data), generator=generator, device="cpu")
            for batch in order.split(batch_size):
                if len(batch) < batch_size:
                    continue
                pictures = pixels[batch]
                if ellipses:
                    pictures = _mirror_at_random(pictures, generator)
                loss = cross_entropy(network(normalized(pictures)), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    return network.eval()


def _mirror_at_random(pictures: Tensor, generator: Generator) -> Tensor:
    for dim in (2, 3):
        coins = (
            torch.rand(
                (len(pictures), 1, 1, 1), generator=generator, dtype=torch.float32, device="cpu"
            )
            < 0.5
        )
        pictures = torch.where(coins, pictures.flip(dim), pictures)
    return pictures
