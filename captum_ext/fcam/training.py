"""Training of an F-CAM decoder on a frozen classifier, by Lightning (the extra `train`)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from captum.attr import Attribution
from torch import Generator, Tensor
from torch.nn import Module

from captum_ext._checks import check_non_negative, check_positive, is_finite
from captum_ext._data.pixels import IMAGENET_MEAN_STD, Normalize
from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.modules import find_module, parameter_dtype
from captum_ext._engine.state import eval_mode, seeded_random
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._identity import derive_seed
from captum_ext._repr import bounded_repr
from captum_ext._tensor_files import misfit
from captum_ext._training import DecoderModule
from captum_ext.fcam.decoder import FCAMDecoder
from captum_ext.fcam.guides import check_guide, guide_maps
from captum_ext.fcam.losses import SizeLoss, partial_cross_entropy
from captum_ext.fcam.seeding import IGNORED, SeedSampler
from captum_ext.fcam.views import Crops, draw_crops
from captum_ext.imaging import resize
from captum_ext.metrics import MaxBoxAcc


class FCAMModule(DecoderModule):
    r"""The LightningModule that trains an F-CAM decoder on seeds, colour and size.

    .. math:: L = L_{seeds} + w_{crf} E_{crf}(S_1) + w_{size} L_{size}(S)

    (Eq. 3 of F-CAM, for a frozen classifier) with the decoder's softmax S, the partial
    cross-entropy at the seeds, the CRF loss of the foreground S_1 and the size loss.

    A training step crops and mirrors the pictures. The guide (the teacher) explains the label of
    each crop, or the stored map of the picture is cropped and mirrored with it. Seeds are drawn
    from that map, and the decoder learns from them. The classifier does not learn, and is in eval
    mode during the step. All random numbers of a step, torch's global ones included, depend only on
    the seed, the epoch, and the numbers of the batch and the process.

    If there are validation pictures with boxes, the decoder of the epoch with the best MaxBoxAcc
    on them is kept (of equally good epochs, the first). They have no other use.

    The classifier and the guide are not submodules, so no checkpoint contains them.

    Args:
        classifier: the frozen module.
        decoder: a decoder for this classifier; see `FCAMDecoder.reading`.
        guide: any Captum attribution of this classifier that gives maps.
        size: (H, W) of the crops.
        normalize: (mean, std) of each channel, by which pictures become the classifier's inputs; of
            one channel for models of grey pictures. ImageNet's.
        flip: whether to mirror crops, with probability 1/2. True.
        seeds: the sampler of seeds. None is `SeedSampler()`.
        crf: a loss of the foreground (N, 1, H, W) and the pictures in 0 to 255. None leaves this
            term out. A module of your own needs an `extra_repr`, and another callable a `version`:
            they identify its settings in a checkpoint.
        crf_weight: the weight of `crf`. 50.
        size_weight: the weight of the size loss. 0.1 (official code). 0 leaves this term out.
        warmup: number of epochs at the start without `crf`. 1, since `crf` may collapse the maps
            before the seeds are learned.
        lr: learning rate of SGD with Nesterov's momentum 0.9 and weight decay 1e-4 (official code).
            0.01.
        seed: the seed of all random numbers. 0.
        rectify: whether negative values of the guide's maps become 0. True; the authors do so for
            all methods but CAM.
        guide_kwargs: arguments of the guide's `attribute`.
        maps: stored maps of all pictures, (n, 1, h, w). None explains each crop.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or `guide` explains another model.

    Example:
        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import resnet18
        >>> from captum_ext.fcam import FCAMDecoder, FCAMModule
        >>> model = resnet18().eval()
        >>> decoder = FCAMDecoder.reading(model, torch.rand(1, 3, 64, 64))
        >>> module = FCAMModule(model, decoder, LayerGradCam(model, model.layer4), (64, 64))
        >>> module(torch.rand(2, 3, 64, 64)).shape  # logits; Trainer.fit(module, loader) trains it
        torch.Size([2, 2, 64, 64])
    """

    # In this epoch: the sum of the losses at seeds, and the number of batches that had seeds.
    seed_losses: Tensor

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
        ):
            check_non_negative(name, value)
        check_positive("lr", lr)
        if crf is not None and not callable(crf):
            raise ArgumentTypeError(f"`crf` must be a module or None, got {type(crf)}.", "crf")
        if seeds is not None and not isinstance(seeds, SeedSampler):
            raise ArgumentTypeError(f"`seeds` must be a SeedSampler, got {type(seeds)}.", "seeds")
        self.guide = guide
        self.crf, self.size_loss = crf, SizeLoss()
        self.seeds = seeds or SeedSampler()
        self.size, self.flip, self.lr, self.seed = size, flip, lr, seed
        self.crf_weight, self.size_weight, self.warmup = crf_weight, size_weight, warmup
        self.rectify, self.guide_kwargs, self.maps = rectify, dict(guide_kwargs or {}), maps
        self.normalize = Normalize(normalize)
        self.register_buffer("seed_losses", torch.zeros(2))
        assert decoder.layers is not None
        self._layers = (tuple(find_module(classifier, name) for name in decoder.layers),)
        self.localisation = MaxBoxAcc(convention="wsolevaluation")
        self.best: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 2, H, W) of images as the classifier takes them."""
        activations, _ = LayerCapture(self.classifier, self._layers[0]).activations(images)
        dtype = next(self.decoder.parameters()).dtype
        features = [tensors[0].to(dtype) for tensors in activations]
        logits: Tensor = self.decoder(features, (images.shape[2], images.shape[3]))
        return logits

    def images(self, pixels: Tensor) -> Tensor:
        """Images as the classifier takes them, of pictures (N, 3, H, W) in bytes."""
        return self.normalize(pixels.float() / 255).to(parameter_dtype(self.classifier))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of pictures: pixels, labels, indices, and which could be read."""
        seed = derive_seed(self.seed, self.current_epoch, self.global_rank, batch_idx)
        with seeded_random(self.device, seed), eval_mode(self.classifier):
            return self._loss(batch, batch_idx, Generator(self.device).manual_seed(seed))

    def _loss(self, batch: Sequence[Tensor], batch_idx: int, generator: Generator) -> Tensor:
        pixels, labels, indices, is_read = batch
        picture_size = (pixels.shape[2], pixels.shape[3])
        crops = draw_crops(len(pixels), picture_size, self.size, self.flip, generator)
        colors = crops.crop(pixels)
        images = self.images(colors)
        maps = self.guide_maps(images, labels, indices, crops, picture_size)
        logits = self(images)
        seeds = self.seeds(torch.where(is_read[:, None, None, None], maps, 0), generator)
        parts = {"seeds": partial_cross_entropy(logits, seeds)}
        probabilities = logits[is_read].softmax(1)
        if self.crf is not None and self.current_epoch >= self.warmup and len(probabilities):
            parts["crf"] = self.crf_weight * self.crf(probabilities[:, 1:], colors[is_read])
        if self.size_weight and len(probabilities):
            parts["size"] = self.size_weight * self.size_loss(probabilities)
        total = self.total_loss(parts, batch_idx)
        with torch.no_grad():
            any_seeds = (seeds != IGNORED).any()
            self.seed_losses += torch.stack((parts["seeds"].float(), any_seeds.float()))
        self.unread.update(indices[~is_read].tolist())
        return total

    def guide_maps(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        crops: Crops,
        picture_size: tuple[int, int],
    ) -> Tensor:
        """The guide's maps of a batch of crops, (N, 1, H, W), or their stored maps.

        Args:
            images: the crops (N, C, H, W), as the classifier takes them.
            labels: (N,), int64.
            indices: (N,), int64, of the pictures in the data set.
            crops: where the images are in their pictures.
            picture_size: (H, W) of the whole pictures.
        """
        if self.maps is None:
            return guide_maps(
                self.guide,
                images,
                labels,
                self.size,
                rectify=self.rectify,
                **self.guide_kwargs,
            )
        maps = self.maps[indices.to(self.maps.device)].to(images.device, torch.float32)
        return crops.crop(resize(maps, picture_size))

    @property
    def seed_loss(self) -> float:
        """The mean loss at the seeds in the last epoch; NaN before the first epoch."""
        return (self.seed_losses[0] / self.seed_losses[1]).item()

    def on_train_epoch_start(self) -> None:
        self.seed_losses.zero_()

    def on_train_epoch_end(self) -> None:
        """Check the decoder before the checkpoint is written, and sharpen the size loss.

        Raises:
            FloatingPointError: weights of the decoder are not finite after the last step.
            ValueError: no seed was drawn in the epoch.
        """
        if not all(bool(torch.isfinite(weight).all()) for weight in self.decoder.parameters()):
            self.raise_not_finite("after its last batch: weights are not finite")
        if self.seed_losses[1] == 0:
            raise ArgumentError(
                f"`guide` {self.guide.get_name()} gave no seeds in epoch {self.current_epoch}: its "
                f"maps are flat or not finite, or no picture could be read.",
                "guide",
                "no_seeds",
            )
        self.size_loss.step()

    def validation_step(self, batch: tuple[Tensor, list[Tensor]], batch_idx: int) -> None:
        """Score the maps of a batch of `BoxedPictures`; those without boxes could not be read."""
        pixels, boxes = batch
        readable = [i for i in range(len(boxes)) if len(boxes[i])]
        if readable:
            with eval_mode(self.classifier):
                maps = self(self.images(pixels[readable])).softmax(1)[:, 1]
            self.localisation.update(maps, [boxes[i] for i in readable])

    def on_validation_epoch_end(self) -> None:
        """Keep a copy of the decoder if it is the best so far.

        Raises:
            ValueError: no validation picture can be read.
        """
        score = self.localisation.compute().item()
        self.localisation.reset()
        if math.isnan(score):
            raise ArgumentError(
                "`validation`: none of its pictures can be read.", "validation", "unreadable"
            )
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

    def damage(self, checkpoint: Mapping[str, Any]) -> str:
        best = checkpoint.get("best")
        if not isinstance(best, dict) or (best and not is_finite(best.get("score"))):
            return f"its best epoch is {bounded_repr(best)}"
        wrong = misfit(best["decoder"], self.decoder.state_dict()) if best else ""
        return wrong or super().damage(checkpoint)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.decoder.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
