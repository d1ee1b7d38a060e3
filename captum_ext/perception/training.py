"""Training of the decoder of Perception Visualization, by Lightning (the extra `train`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_ext._checks import check_size
from captum_ext._data.pictures import PictureDataset
from captum_ext._data.sizes import height_width
from captum_ext._engine.modules import parameter_dtype
from captum_ext._engine.state import eval_mode
from captum_ext._identity import model_digest
from captum_ext._training import DecoderModule, TrainingRun
from captum_ext.perception.decoder import PerceptionDecoder
from captum_ext.perception.encoder import LayerEncoder
from captum_ext.perception.losses import perception_loss


class PerceptionModule(DecoderModule):
    """What Lightning trains: the decoder, by the pictures that it makes of their latents.

    The gradient runs through the classifier to the decoder, and stops there: the classifier does
    not move, gets no gradient, and is in eval mode for the length of a step. It is not a submodule,
    and in no checkpoint.

    Args:
        encoder: the classifier up to a layer.
        decoder: made for it, see `PerceptionDecoder.reading`.
        weights: of pixels, latents and SSIM, see `perception_loss`.
        lr: of Adam. 1e-4 (authors).

    Raises:
        ValueError: a number out of range, weights that are not three, or all 0.
    """

    def __init__(
        self,
        encoder: LayerEncoder,
        decoder: PerceptionDecoder,
        *,
        weights: Sequence[float] = (0.2, 0.4, 0.4),
        lr: float = 1e-4,
    ) -> None:
        super().__init__(encoder.root, decoder)
        check_size("lr", lr, positive=True)
        if len(weights) != 3 or not any(weights):
            raise ValueError(f"`weights` must be three numbers, not all 0, got {weights!r}.")
        for weight in weights:
            check_size("weights", weight)
        self.encoder, self.lr = encoder, lr
        self.weights = (weights[0], weights[1], weights[2])

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions in [0, 1] of images as the classifier takes them."""
        return self._decoded(self.encoder(images), images)

    def _decoded(self, latents: Tensor, images: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        pictures: Tensor = self.decoder(latents.to(parameter_dtype(self.decoder)), size)
        return pictures

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of `PictureItem`: of those that could be read."""
        pixels, _, places, read = batch
        self.unread.update(places[~read].tolist())
        if not bool(read.any()):  # other processes wait for a gradient
            return 0 * torch.stack([weight.sum() for weight in self.decoder.parameters()]).sum()
        pictures = self.pictures(pixels[read] / 255)
        with eval_mode(self.encoder.root):
            images = self.encoder.images(pictures)
            with torch.no_grad():
                latents = self.encoder(images)
            found = self._decoded(latents, images)
            again = self.encoder(self.encoder.images(found)) if self.weights[1] else latents
        parts = perception_loss(pictures, found, latents, again, self.weights)
        return self.total_loss(parts, batch_idx)

    def pictures(self, pictures: Tensor) -> Tensor:
        """As the decoder gives them: grey where the classifier takes grey ones."""
        return self.encoder.pictures(self.encoder.images(pictures)).to(pictures)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """To the decoder's parameters that learn, and to no other."""
        loss.backward(
            inputs=[weight for weight in self.decoder.parameters() if weight.requires_grad]
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.decoder.parameters(), self.lr)


def fit_perception(
    encoder: LayerEncoder,
    data: Any,
    *,
    size: int | tuple[int, int] = 224,
    n_epochs: int = 250,
    batch_size: int = 64,
    widths: Sequence[int] | None = None,
    convolutions: Sequence[int] | None = None,
    checkpoints: str | Path | None = None,
    seed: int = 0,
    num_workers: int = 0,
    show_progress: bool = True,
    trainer: Mapping[str, Any] | None = None,
    **options: Any,
) -> PerceptionDecoder:
    """Train a decoder for a layer's latents; the classifier does not move by a bit.

    No labels are needed, and pictures of any kind will do: those that the classifier was trained
    with, or will explain. The last epoch's decoder is what it returns.

    Args:
        encoder: the classifier up to a layer.
        data: pictures: PIL images or tensors (3, H, W) or (1, H, W) of bytes or of floats in
            [0, 1], not normalised; or entries (picture, label, ...), as torchvision's `ImageFolder`
            and the data sets of this package have. Those that do not decode are left out and
            named; and counted, where one process trains.
        size: (H, W) that pictures are brought to, or one number for both.
        n_epochs: how often each picture is seen. 250 (authors, for VOC2012).
        batch_size: pictures in a step, of each device. 64 (authors).
        widths: of the decoder's blocks, see `PerceptionDecoder`, as for the next.
        convolutions: of each block.
        checkpoints: a folder. Each epoch is stored in it, and a run that was killed goes on from
            the last one, to the weights that it would have come to if `data` has the same pictures
            each time, not changed at random; one that is finished may go on to more epochs. Of the
            settings, only those of `trainer` may change. None stores nothing.
        seed: of all random numbers. Global random state stays as it was.
        num_workers: processes that read pictures. 0 where several devices train and a run that was
            killed must go on to the same weights: read ahead, its first epoch has another order.
        show_progress: whether to draw progress bars.
        trainer: arguments of Lightning's `Trainer`, such as ``{"devices": 2}``. As it comes, the
            device is the classifier's.
        **options: `weights` and `lr` of `PerceptionModule`.

    Returns:
        The decoder, in eval mode.

    Raises:
        TypeError, ValueError: an argument of another kind or out of range; a layer without height
            and width, or whose cells are not a power of two of pixels wide; a checkpoint of another
            run, or of another architecture.
        RuntimeError: inside `torch.inference_mode`.
        FloatingPointError: a loss that is not finite, with its epoch and batch. What was stored
            stays.

    Example:
        >>> encoder = LayerEncoder(model, "layer4")  # doctest: +SKIP
        >>> decoder = fit_perception(encoder, folder, checkpoints="run")  # doctest: +SKIP
        >>> decoder.save("decoder.pt", encoder)  # doctest: +SKIP
    """
    if not isinstance(encoder, LayerEncoder):
        raise TypeError(f"`encoder` must be a LayerEncoder, got {type(encoder)}.")
    run = TrainingRun(n_epochs, batch_size, checkpoints, seed, num_workers, show_progress, trainer)
    view, root = height_width("size", size), encoder.root
    pictures = PictureDataset(data, view, has_labels=False)
    with run.prepared(root) as device:
        blank = torch.zeros(1, encoder.channels, *view, device=device, dtype=parameter_dtype(root))
        decoder = PerceptionDecoder.reading(encoder, blank, widths, convolutions).to(device)
        module = PerceptionModule(encoder, decoder, **options)
        if checkpoints is not None:
            module.fingerprint = _fingerprint(module, pictures, batch_size, seed)
        run.fit(module, pictures)
    return decoder.to(device).eval()


def _fingerprint(
    module: PerceptionModule, pictures: PictureDataset, batch_size: int, seed: int
) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that was killed."""
    encoder, decoder = module.encoder, module.decoder
    return {
        "classifier": model_digest(encoder.root),
        **encoder.fingerprint(),
        "pictures": pictures.fingerprint(),
        "size": list(pictures.size),
        "channels": decoder.channels,
        "stride": decoder.stride,
        "widths": decoder.widths,
        "convolutions": decoder.convolutions,
        "weights": list(module.weights),
        "lr": module.lr,
        "batch_size": batch_size,
        "seed": seed,
    }
