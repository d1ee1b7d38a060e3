"""Training of the decoder of Perception Visualization, by Lightning (the extra `train`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_ext._checks import check_non_negative, check_positive
from captum_ext._data.pictures import PictureDataset
from captum_ext._data.sizes import height_width
from captum_ext._engine.modules import parameter_dtype
from captum_ext._engine.state import eval_mode
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._identity import model_digest
from captum_ext._training import DecoderModule, TrainingRun
from captum_ext.perception.decoder import PerceptionDecoder
from captum_ext.perception.encoder import LayerEncoder
from captum_ext.perception.losses import perception_loss


class PerceptionModule(DecoderModule):
    """The LightningModule that trains a decoder to reconstruct pictures from their latents.

    The loss is `perception_loss`. Its gradient goes through the classifier to the decoder. The
    classifier itself does not change, gets no gradients, and is in eval mode during a step. It is
    not a submodule, so no checkpoint contains it.

    Args:
        encoder: the classifier up to a layer.
        decoder: a decoder that was made for it; see `PerceptionDecoder.reading`.
        weights: of pixels, latents and SSIM; see `perception_loss`. (0.2, 0.4, 0.4) (authors).
        lr: learning rate of Adam. 1e-4 (authors).

    Raises:
        ValueError: a number is out of range, or `weights` are not three, or all 0.

    Example:
        >>> from torchvision.models import resnet18
        >>> from captum_ext.perception import LayerEncoder, PerceptionDecoder, PerceptionModule
        >>> encoder, x = LayerEncoder(resnet18().eval(), "layer2"), torch.rand(2, 3, 64, 64)
        >>> module = PerceptionModule(encoder, PerceptionDecoder.reading(encoder, x))
        >>> module(x).shape  # reconstructions; Trainer.fit(module, loader) trains the decoder
        torch.Size([2, 3, 64, 64])
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
        check_positive("lr", lr)
        if len(weights) != 3 or not any(weights):
            raise ArgumentError(
                f"`weights` must be three numbers, not all 0, got {weights!r}.", "weights"
            )
        for weight in weights:
            check_non_negative("weights", weight)
        self.encoder, self.lr = encoder, lr
        self.weights = (weights[0], weights[1], weights[2])

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions in [0, 1] of images as the classifier takes them."""
        return self._decode(self.encoder(images), images)

    def _decode(self, latents: Tensor, images: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        pictures: Tensor = self.decoder(latents.to(parameter_dtype(self.decoder)), size)
        return pictures

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of pictures: pixels, labels, indices, and which could be read."""
        pixels, _, indices, is_read = batch
        self.unread.update(indices[~is_read].tolist())
        if not bool(is_read.any()):  # other processes wait for a gradient
            return 0 * torch.stack([weight.sum() for weight in self.decoder.parameters()]).sum()
        pictures = self.pictures(pixels[is_read].float() / 255)
        with eval_mode(self.encoder.root):
            images = self.encoder.images(pictures)
            with torch.no_grad():
                latents = self.encoder(images)
            decoded = self._decode(latents, images)
            latents_of_decoded = latents
            if self.weights[1]:
                latents_of_decoded = self.encoder(self.encoder.images(decoded))
        parts = perception_loss(pictures, decoded, latents, latents_of_decoded, self.weights)
        return self.total_loss(parts, batch_idx)

    def pictures(self, pictures: Tensor) -> Tensor:
        """Pictures with the decoder's colours: grey for a model of grey pictures."""
        return self.encoder.pictures(self.encoder.images(pictures)).to(pictures)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Give gradients to the decoder's trainable parameters, and to no others."""
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
    """Train a decoder for a layer's latents. The classifier stays as it is, to the bit.

    No labels are needed. The pictures should be like those that the classifier was trained with or
    will explain. The decoder of the last epoch is returned.

    Args:
        encoder: the classifier up to a layer.
        data: pictures: PIL images or tensors (3, H, W) or (1, H, W) of bytes or of floats in
            [0, 1], not normalised; or entries (picture, label, ...), as torchvision's `ImageFolder`
            and the data sets of this package have. Pictures that do not decode are left out and
            named, and counted if one process trains.
        size: (H, W) that pictures are resized to, in pixels, or one number for both. 224.
        n_epochs: how often each picture is seen. 250 (authors, for VOC2012).
        batch_size: pictures in a step, on each device. 64 (authors).
        widths: channels of the decoder's blocks; see `PerceptionDecoder`.
        convolutions: convolutions of the decoder's blocks; see `PerceptionDecoder`.
        checkpoints: a folder that each epoch is stored in. A run that was killed resumes from the
            last epoch, and arrives at the same weights as without the interruption if `data` gives
            the same pictures each time, without random changes. A finished run can be extended
            by more epochs. Of the settings, only those of `trainer` may change. None stores
            nothing.
        seed: the seed of all random numbers. 0. Global random state stays as it was.
        num_workers: processes that read pictures. 0. Use 0 with several devices if a run that was
            killed must arrive at the same weights: workers read ahead, so that its first epoch
            would have another order.
        show_progress: whether to draw progress bars.
        trainer: arguments of Lightning's `Trainer`, such as ``{"devices": 2}``. By default it
            trains on the classifier's device.
        **options: `weights` and `lr` of `PerceptionModule`.

    Returns:
        The decoder, in eval mode.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range; the layer has no height and width, or its stride is no
            power of two; or `checkpoints` are of another run or another architecture.
        RuntimeError: it is called inside `torch.inference_mode`.
        FloatingPointError: the loss is not finite; the epoch and the batch are named. Stored epochs
            stay.

    Example:
        >>> encoder = LayerEncoder(model, "layer4")  # doctest: +SKIP
        >>> decoder = fit_perception(encoder, folder, checkpoints="run")  # doctest: +SKIP
        >>> decoder.save("decoder.pt", encoder)  # doctest: +SKIP
    """
    if not isinstance(encoder, LayerEncoder):
        raise ArgumentTypeError(
            f"`encoder` must be a LayerEncoder, got {type(encoder)}.", "encoder"
        )
    run = TrainingRun(n_epochs, batch_size, checkpoints, seed, num_workers, show_progress, trainer)
    picture_size, root = height_width("size", size), encoder.root
    pictures = PictureDataset(data, picture_size, has_labels=False)
    with run.prepared(root) as device:
        blank = encoder.images(torch.zeros(1, 3, *picture_size, device=device))
        decoder = PerceptionDecoder.reading(encoder, blank, widths, convolutions).to(device)
        module = PerceptionModule(encoder, decoder, **options)
        if checkpoints is not None:
            module.fingerprint = _run_fingerprint(module, pictures, batch_size, seed)
        run.fit(module, pictures)
    return decoder.to(device).eval()


def _run_fingerprint(
    module: PerceptionModule, pictures: PictureDataset, batch_size: int, seed: int
) -> dict[str, Any]:
    """The settings that a resumed run must share with the run that was killed."""
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
