"""Training of an F-CAM decoder on a frozen classifier, by Lightning (the extra `train`)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from captum.attr import Attribution
from torch import Generator, Tensor
from torch.nn import Module

from captum_ext._checks import check_size
from captum_ext._data.pixels import IMAGENET_MEAN_STD, Normalize
from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.modules import find_module, parameter_dtype
from captum_ext._engine.state import eval_mode, seeded_random
from captum_ext._identity import derive_seed
from captum_ext._training import DecoderModule
from captum_ext.fcam.decoder import FCAMDecoder
from captum_ext.fcam.guides import check_guide, guidance
from captum_ext.fcam.losses import SizeLoss, partial_cross_entropy
from captum_ext.fcam.seeding import IGNORED, SeedSampler
from captum_ext.fcam.views import View, random_view
from captum_ext.imaging import resize
from captum_ext.metrics import MaxBoxAcc


class FCAMModule(DecoderModule):
    r"""What Lightning trains: the decoder, by seeds, colour and size.

    .. math:: L = L_{seeds} + w_{crf} E_{crf}(S_1) + w_{size} L_{size}(S)

    In each step the pictures are cropped and mirrored, the guide explains the label of each view
    (or its stored map is cropped and mirrored likewise), seeds are drawn from that map, and the
    decoder learns; the classifier does not, and is in eval mode for the length of the step. All
    random numbers of a step, torch's global ones too, come from the seed, the epoch, the number of
    the batch and of the process.

    Where the trainer is given pictures with boxes, `Boxed`, the decoder of the epoch with the best
    MaxBoxAcc on them (of equal ones, the first) is what is left in the end. Nothing else is chosen
    by them.

    The classifier and the guide are not submodules: they are in no checkpoint.

    Args:
        classifier: the module.
        decoder: made for it, see `FCAMDecoder.reading`.
        guide: any Captum attribution of this classifier that gives maps.
        size: (H, W) of the views.
        normalize: mean and standard deviation of each channel, as the classifier expects pictures;
            of one channel where it takes grey ones.
        flip: whether views are mirrored every other time.
        seeds: how seeds are drawn.
        crf: a loss of the foreground (N, 1, H, W) and the pictures in 0 to 255; None is none. One
            of your own needs an `extra_repr`, by which a run that goes on knows its settings, or,
            if it is no module, a `version`.
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

    seeded: Tensor  # in this epoch: the sum of the seeds' losses, and how many batches had any

    def __init__(
        self,
        classifier: Module,
        decoder: FCAMDecoder,
        guide: Attribution,
        size: tuple[int, int],
        *,
        normalize: tuple[Sequence[float], Sequence[float]] = IMAGENET_MEAN_STD,
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
        super().__init__(classifier, decoder)
        check_guide(guide, classifier)
        for name, value in (
            ("crf_weight", crf_weight),
            ("size_weight", size_weight),
            ("warmup", warmup),
            ("lr", lr),
        ):
            check_size(name, value, positive=name == "lr")
        if crf is not None and not callable(crf):
            raise TypeError(f"`crf` must be a module or None, got {type(crf)}.")
        if seeds is not None and not isinstance(seeds, SeedSampler):
            raise TypeError(f"`seeds` must be a SeedSampler, got {type(seeds)}.")
        self.guide = guide
        self.crf, self.size_loss = crf, SizeLoss()
        self.seeds = seeds or SeedSampler()
        self.size, self.flip, self.lr, self.seed = size, flip, lr, seed
        self.crf_weight, self.size_weight, self.warmup = crf_weight, size_weight, warmup
        self.rectify, self.guide_kwargs, self.maps = rectify, dict(guide_kwargs or {}), maps
        self.normalize = Normalize(normalize)
        self.register_buffer("seeded", torch.zeros(2))
        assert decoder.layers is not None
        self._layers = (tuple(find_module(classifier, name) for name in decoder.layers),)
        self.localisation = MaxBoxAcc(convention="wsolevaluation")
        self.best: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 2, H, W) of images as the classifier takes them."""
        found, _ = LayerCapture(self.classifier, self._layers[0]).activations(images)
        kind = next(self.decoder.parameters()).dtype
        features = [tensors[0].to(kind) for tensors in found]
        logits: Tensor = self.decoder(features, (images.shape[2], images.shape[3]))
        return logits

    def images(self, pixels: Tensor) -> Tensor:
        """Bytes (N, 3, H, W) as the classifier takes them."""
        return self.normalize(pixels / 255).to(parameter_dtype(self.classifier))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of `PictureItem`."""
        seed = derive_seed(self.seed, self.current_epoch, self.global_rank, batch_idx)
        with seeded_random(self.device, seed), eval_mode(self.classifier):
            return self._loss(batch, batch_idx, Generator(self.device).manual_seed(seed))

    def _loss(self, batch: Sequence[Tensor], batch_idx: int, generator: Generator) -> Tensor:
        pixels, labels, places, read = batch
        whole = (pixels.shape[2], pixels.shape[3])
        view = random_view(len(pixels), whole, self.size, self.flip, generator)
        colors = view.of(pixels)
        images = self.images(colors)
        maps = self.guidance(images, labels, places, view, whole)
        logits = self(images)
        seeds = self.seeds(torch.where(read[:, None, None, None], maps, 0), generator)
        parts = {"seeds": partial_cross_entropy(logits, seeds)}
        kept = logits[read].softmax(1)
        if self.crf is not None and self.current_epoch >= self.warmup and len(kept):
            parts["crf"] = self.crf_weight * self.crf(kept[:, 1:], colors[read])
        if self.size_weight and len(kept):
            parts["size"] = self.size_weight * self.size_loss(kept)
        total = self.total(parts, batch_idx)
        with torch.no_grad():
            any_seeds = (seeds != IGNORED).any()
            self.seeded += torch.stack((parts["seeds"].float(), any_seeds.float()))
        self.unread.update(places[~read].tolist())
        return total

    def guidance(
        self,
        images: Tensor,
        labels: Tensor,
        places: Tensor,
        view: View,
        whole: tuple[int, int],
    ) -> Tensor:
        """The coarse maps of a batch of views."""
        if self.maps is None:
            return guidance(
                self.guide,
                images,
                labels,
                self.size,
                rectify=self.rectify,
                **self.guide_kwargs,
            )
        stored = self.maps[places.to(self.maps.device)].to(images.device, torch.float32)
        return view.of(resize(stored, whole))

    @property
    def seed_loss(self) -> float:
        """The mean of the last epoch; NaN before the first."""
        return (self.seeded[0] / self.seeded[1]).item()

    def on_train_epoch_start(self) -> None:
        self.seeded.zero_()

    def on_train_epoch_end(self) -> None:
        """Before the checkpoint is written.

        Raises:
            FloatingPointError: the last step has spoiled the decoder.
            ValueError: there was not one seed.
        """
        if not all(bool(torch.isfinite(weight).all()) for weight in self.decoder.parameters()):
            self.stop("after its last batch: weights are not finite")
        if self.seeded[1] == 0:
            raise ValueError(
                f"`guide` {self.guide.get_name()} gave no seed in epoch {self.current_epoch}: its "
                f"maps are flat or not finite, or no picture could be read."
            )
        self.size_loss.step()

    def validation_step(self, batch: tuple[Tensor, list[Tensor]], batch_idx: int) -> None:
        """Of whole pictures with boxes."""
        pixels, boxes = batch
        read = [i for i, found in enumerate(boxes) if len(found)]
        if read:
            with eval_mode(self.classifier):
                maps = self(self.images(pixels[read])).softmax(1)[:, 1]
            self.localisation.update(maps, [boxes[i] for i in read])

    def on_validation_epoch_end(self) -> None:
        """Keep the decoder if it is the best so far."""
        score = self.localisation.compute().item()
        self.localisation.reset()
        if math.isnan(score):
            raise ValueError("`validation`: none of its pictures can be read.")
        self.log("val_MaxBoxAcc", score, prog_bar=True)
        if score > self.best.get("score", -1.0):
            state = self.decoder.state_dict()
            weights = {name: weight.detach().cpu().clone() for name, weight in state.items()}
            self.best = {"score": score, "epoch": self.current_epoch, "decoder": weights}

    def on_fit_end(self) -> None:
        if self.best:
            self.decoder.load_state_dict(self.best["decoder"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["best"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.best = checkpoint["best"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.decoder.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
