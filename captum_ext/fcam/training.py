"""Training of an F-CAM decoder on a frozen classifier, by Lightning (the extra `train`)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from captum.attr import Attribution
from lightning import LightningModule
from torch import Generator, Tensor
from torch.nn import Module

from captum_ext._checks import check_size
from captum_ext._model import find_module, layer_activations
from captum_ext.fcam.decoder import FCAMDecoder
from captum_ext.fcam.guides import check_guide, guidance
from captum_ext.fcam.losses import SizeLoss, partial_cross_entropy
from captum_ext.fcam.seeding import SeedSampler
from captum_ext.fcam.views import View, hash_of, random_view
from captum_ext.imaging import resize
from captum_ext.metrics import MaxBoxAcc

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class FCAMModule(LightningModule):
    r"""What Lightning trains: the decoder, by seeds, colour and size.

    .. math:: L = L_{seeds} + w_{crf} E_{crf}(S_1) + w_{size} L_{size}(S)

    In each step the pictures are cropped and mirrored, the guide explains the label of each view
    (or its stored map is cropped and mirrored likewise), seeds are drawn from that map, and the
    decoder learns; the classifier does not, and is in eval mode for the length of the step. All
    random numbers come from the seed, the epoch, the number of the batch and of the process.

    Where the trainer is given pictures with boxes, `Boxed`, the decoder of the epoch with the best
    MaxBoxAcc on them (of equal ones, the first) is what is left in the end. Nothing else is chosen
    by them.

    The classifier and the guide are not submodules: they are in no checkpoint.

    Args:
        classifier: the module.
        decoder: made for it, see `FCAMDecoder.reading`.
        guide: any Captum attribution of this classifier that gives maps.
        size: (H, W) of the views.
        normalize: mean and standard deviation of each channel, as the classifier expects pictures.
        flip: whether views are mirrored every other time.
        seeds: how seeds are drawn.
        crf: a loss of the foreground (N, 1, H, W) and the pictures in 0 to 255; None is none.
        crf_weight: its weight.
        size_weight: the weight of the size loss. 0 is none.
        warmup: epochs without `crf`, in which it may win before the seeds are learned.
        lr: of SGD with Nesterov's momentum of 0.9 and a decay of 1e-4 (official code).
        seed: of all random numbers.
        rectify: see `guidance`.
        guide_kwargs: of the guide's `attribute`.
        maps: stored maps of all pictures, (n, 1, h, w); None makes them of each view.

    Raises:
        TypeError, ValueError: an argument of another kind or out of range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classifier: Module,
        decoder: FCAMDecoder,
        guide: Attribution,
        size: tuple[int, int],
        *,
        normalize: tuple[Sequence[float], Sequence[float]] = IMAGENET,
        flip: bool = True,
        seeds: SeedSampler | None = None,
        crf: Module | None = None,
        crf_weight: float = 50.0,
        size_weight: float = 0.1,
        warmup: int = 1,
        lr: float = 0.01,
        seed: int = 0,
        rectify: bool = True,
        guide_kwargs: Mapping[str, Any] | None = None,
        maps: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_guide(guide, classifier)
        for name, value in (
            ("crf_weight", crf_weight),
            ("size_weight", size_weight),
            ("warmup", warmup),
            ("lr", lr),
        ):
            check_size(name, value, positive=name == "lr")
        self.decoder = decoder
        self.crf, self.size_loss = crf, SizeLoss()
        self.seeds = seeds or SeedSampler()
        self.size, self.flip, self.lr, self.seed = size, flip, lr, seed
        self.crf_weight, self.size_weight, self.warmup = crf_weight, size_weight, warmup
        self.rectify, self.guide_kwargs, self.maps = rectify, dict(guide_kwargs or {}), maps
        for name, values in zip(("mean", "std"), normalize, strict=True):
            column = torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, column, persistent=False)
        self._frozen = (classifier, guide)
        assert decoder.layers is not None
        self._layers = (tuple(find_module(classifier, name) for name in decoder.layers),)
        self.localisation = MaxBoxAcc()
        self.best: dict[str, Any] = {}
        self.seed_losses: list[Tensor] = []
        self.settings: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 2, H, W) of images as the classifier takes them."""
        classifier, _ = self._frozen
        found, _ = layer_activations(classifier, self._layers[0], (images,))
        logits: Tensor = self.decoder(
            [tensors[0] for tensors in found], (images.shape[2], images.shape[3])
        )
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of `Item`."""
        pixels, labels, indices, read = batch
        device = pixels.device
        generator = Generator(device).manual_seed(
            hash_of(self.seed, self.current_epoch, self.global_rank, batch_idx)
        )
        view = random_view(len(pixels), tuple(pixels.shape[2:]), self.size, self.flip, generator)
        colors = view.of(pixels)
        images = (colors / 255 - self.mean) / self.std
        with evaluated(self._frozen[0]):
            maps = self.guidance(images, labels, indices, view, tuple(pixels.shape[2:]))
            logits = self(images)
        maps = torch.where(read[:, None, None, None], maps, 0)
        parts = {"seeds": partial_cross_entropy(logits, self.seeds(maps, generator))}
        kept = logits[read].softmax(1)
        if self.crf is not None and self.current_epoch >= self.warmup and len(kept):
            parts["crf"] = self.crf_weight * self.crf(kept[:, 1:], colors[read])
        if self.size_weight and len(kept):
            parts["size"] = self.size_weight * self.size_loss(kept)
        total = torch.stack(list(parts.values())).sum()
        if not bool(torch.isfinite(total)):
            shown = ", ".join(f"{name} {value.item():g}" for name, value in parts.items())
            raise FloatingPointError(
                f"The loss is not finite in epoch {self.current_epoch}, batch {batch_idx} "
                f"({shown}). A lower `lr` may help."
            )
        self.seed_losses.append(parts["seeds"].detach())
        self.log_dict({f"train_{name}": value for name, value in parts.items()}, prog_bar=True)
        return total

    def guidance(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        view: View,
        whole: tuple[int, ...],
    ) -> Tensor:
        """The coarse maps of a batch of views."""
        if self.maps is None:
            return guidance(
                self._frozen[1],
                images,
                labels,
                self.size,
                rectify=self.rectify,
                **self.guide_kwargs,
            )
        stored = self.maps[indices.to(self.maps.device)].to(images.device, torch.float32)
        return view.of(resize(stored, whole))

    def on_fit_start(self) -> None:
        """The classifier is no submodule, so nobody else brings it to the device."""
        self._frozen[0].to(self.device)

    def on_train_epoch_start(self) -> None:
        self.seed_losses = []

    def on_train_epoch_end(self) -> None:
        self.size_loss.step()

    def validation_step(self, batch: tuple[Tensor, list[Tensor]], batch_idx: int) -> None:
        """Of whole pictures with boxes."""
        pixels, boxes = batch
        read = [i for i, found in enumerate(boxes) if len(found)]
        if read:
            images = (pixels[read] / 255 - self.mean) / self.std
            with evaluated(self._frozen[0]):
                maps = self(images).softmax(1)[:, 1]
            self.localisation.update(maps, [boxes[i] for i in read])

    def on_validation_epoch_end(self) -> None:
        """Keep the decoder if it is the best so far."""
        score = self.localisation.compute().item()
        self.localisation.reset()
        self.log("val_MaxBoxAcc", score, prog_bar=True)
        if score > self.best.get("score", -1.0):
            weights = {
                name: w.detach().cpu().clone() for name, w in self.decoder.state_dict().items()
            }
            self.best = {"score": score, "epoch": self.current_epoch, "decoder": weights}

    def on_fit_end(self) -> None:
        if self.best:
            self.decoder.load_state_dict(self.best["decoder"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fcam_settings"], checkpoint["fcam_best"] = self.settings, self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of a run with other settings."""
        self.best = checkpoint.get("fcam_best", {})
        changed = changes(checkpoint.get("fcam_settings", {}), self.settings)
        if changed:
            raise ValueError(
                f"`checkpoints` has another run's: {changed}. Name another folder, or delete it."
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.decoder.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=1e-4
        )


@contextmanager
def evaluated(module: Module) -> Iterator[None]:
    """The module in eval mode, and then each part as it was."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def changes(saved: dict[str, Any], found: dict[str, Any]) -> str:
    """What is not as it was, in words."""
    changed = [name for name in found if saved.get(name) != found[name]]
    return "; ".join(f"{name} was {saved.get(name)!r} and is {found[name]!r}" for name in changed)
