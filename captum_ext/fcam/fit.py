"""`fit_fcam`: a decoder for a classifier, in one call (the extra `train`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor

from captum_ext._checks import warn
from captum_ext._data.loading import CpuLoader
from captum_ext._data.pictures import PictureDataset
from captum_ext._data.pixels import IMAGENET_MEAN_STD, Normalize
from captum_ext._data.sizes import height_width
from captum_ext._engine.modules import Forward, parameter_dtype, root_module
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._training import TrainingRun
from captum_ext.fcam.attribution import FCAM
from captum_ext.fcam.crf import DenseCRFLoss
from captum_ext.fcam.decoder import FCAMDecoder
from captum_ext.fcam.guides import check_guide
from captum_ext.fcam.map_cache import cached_maps, maps_fingerprint, run_fingerprint
from captum_ext.fcam.seeding import SeedSampler
from captum_ext.fcam.training import FCAMModule
from captum_ext.fcam.views import BoxedPictures, collate_boxed

COLLAPSED_LOSS = 0.6  # a decoder that gives 1/2 everywhere has a loss of ln 2

# The paper's settings, for `fit_fcam(..., **PAPER)`. Its code weights the CRF loss, a sum over all
# pairs of 224 x 224 pixels, by 2e-9: that is 5.04 for the mean over pairs.
PAPER: Mapping[str, Any] = MappingProxyType(
    {
        "size": 224,
        "resize": 256,
        "seeds": SeedSampler(1, 1, n_minus=0.1, erosion=11),
        "crf": DenseCRFLoss(side=None),
        "crf_weight": 2e-9 * 224**4,
        "warmup": 0,
        "n_epochs": 50,
    }
)


def fit_fcam(
    classifier: Forward,
    data: Any,
    guide: Attribution,
    *,
    size: int | tuple[int, int] = 224,
    resize: int | tuple[int, int] | None = None,
    n_epochs: int = 5,
    batch_size: int = 32,
    layers: Sequence[str] | None = None,
    widths: Sequence[int] = (256, 128, 64, 32, 16),
    center: bool = False,
    cache: str | Path | None = None,
    checkpoints: str | Path | None = None,
    validation: Any = None,
    seed: int = 0,
    num_workers: int = 0,
    show_progress: bool = True,
    trainer: Mapping[str, Any] | None = None,
    **options: Any,
) -> FCAM:
    """Train an F-CAM decoder for a classifier. The classifier stays as it is, to the bit.

    Labels of whole images are all it needs. The pictures are seen `n_epochs` times; `FCAMModule`
    describes the training steps. The decoder of the last epoch is returned. With a `validation` set
    that has boxes, the decoder of the best epoch on it is returned instead, as in published
    results. That needs more than labels; nothing else is chosen by boxes.

    Args:
        classifier: the module.
        data: labelled pictures: torchvision's `ImageFolder`, a data set of this package, or any
            other whose entry i is (picture, label, ...). Pictures are PIL images or tensors
            (3, H, W) or (1, H, W) of bytes or of floats in [0, 1], not normalised. Pictures that
            do not decode are left out, named and counted.
        guide: the teacher: any Captum attribution of this classifier that gives maps.
        size: (H, W) of the classifier's images in pixels, or one number for both. 224.
        resize: (H, W) that pictures are resized to before crops of `size` are taken, or one number
            for both. None is `size`.
        n_epochs: how often each picture is seen. 5.
        batch_size: pictures in a step, on each device. 32.
        layers: names of the layers that the decoder reads. None takes `find_feature_layers`.
        widths: channels of the decoder's blocks; see `FCAMDecoder`.
        center: whether the decoder has a centre block; see `FCAMDecoder`.
        cache: a folder for the guide's maps of the whole pictures, which are computed once. Maps of
            crops are cropped out of them, so `data` must give the same pictures each time. During
            the training all maps are in memory, at the guide's own resolution. None explains each
            crop instead.
        checkpoints: a folder that each epoch is stored in. A run that was killed resumes from the
            last epoch, and arrives at the same weights as without the interruption. A finished run
            can be extended by more epochs. Of the settings, only those of `trainer` may change. The
            state of a `generator` of the guide is not stored. None stores nothing.
        validation: pictures with boxes: a data set of this package, or any other whose entry i is
            (picture, label, boxes), with boxes (n, 4) in the picture's own pixels, (x1, y1, x2,
            y2). Pictures are resized to `size` as a whole. They select the epoch with the best
            `MaxBoxAcc` (at IoU 0.5, as published). None selects the last epoch.
        seed: the seed of all random numbers. 0. Global random state stays as it was.
        num_workers: processes that read pictures. 0. Use 0 with several devices if a run that was
            killed must arrive at the same weights: workers read ahead, so that its first epoch
            would have another order.
        show_progress: whether to draw progress bars.
        trainer: arguments of Lightning's `Trainer`, such as ``{"devices": 2}``. By default it
            trains on the classifier's device.
        **options: options of `FCAMModule`. The default of `crf` is `DenseCRFLoss` with a `side` of
            a quarter of `size`, but at least 16 pixels.

    Returns:
        An `FCAM` of the classifier with the decoder, in eval mode.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range; the guide is of another model, or gives no seeds; a
            label is no class; `cache` or `checkpoints` are of another run; or a function (an option
            of the guide, its arguments, or `crf`) has no `version`, which `cache` and `checkpoints`
            need, see `evaluate`.
        RuntimeError: it is called inside `torch.inference_mode`.
        FloatingPointError: the loss is not finite; the epoch and the batch are named. Stored epochs
            stay.

    Example:
        >>> from captum.attr import LayerGradCam
        >>> guide = LayerGradCam(model, model.layer4)  # doctest: +SKIP
        >>> fcam = fit_fcam(model, folder, guide, checkpoints="run")  # doctest: +SKIP
        >>> fcam.attribute(x).shape  # doctest: +SKIP
        torch.Size([8, 3, 224, 224])
    """
    root = root_module(classifier)
    if root is None:
        raise ArgumentTypeError(
            f"`classifier` must be a torch.nn.Module, got {type(classifier)}.", "classifier"
        )
    run = TrainingRun(n_epochs, batch_size, checkpoints, seed, num_workers, show_progress, trainer)
    check_guide(guide, classifier)
    crop_size = height_width("size", size)
    picture_size = crop_size if resize is None else height_width("resize", resize)
    if picture_size[0] < crop_size[0] or picture_size[1] < crop_size[1]:
        raise ArgumentError(
            f"`resize` must be at least `size`, {crop_size}, got {picture_size}.", "resize"
        )
    boxed = None if validation is None else BoxedPictures(validation, crop_size)
    options = {"crf": DenseCRFLoss(side=crf_side(crop_size))} | options
    n_channels = Normalize(options.get("normalize", IMAGENET_MEAN_STD)).channels
    with run.prepared(root) as device:
        dtype = parameter_dtype(root)
        with torch.no_grad():
            blank = torch.zeros(1, n_channels, *crop_size, device=device, dtype=dtype)
            n_classes = _count_classes(root(blank))
            decoder = FCAMDecoder.reading(root, blank, layers, widths, center).to(device)
        pictures = PictureDataset(data, picture_size, n_classes)
        module = FCAMModule(root, decoder, guide, crop_size, seed=seed, **options).to(device)
        stores = cache is not None or checkpoints is not None
        fingerprint = maps_fingerprint(module, pictures) if stores else {}
        if cache is not None:
            module.maps = cached_maps(
                module, pictures, fingerprint, Path(cache), batch_size, num_workers, show_progress
            )
        if checkpoints is not None:
            module.fingerprint = fingerprint | run_fingerprint(module, batch_size)
            module.fingerprint["validation"] = 0 if boxed is None else len(boxed)
        validation_loader = boxed and CpuLoader(
            boxed, batch_size, collate_fn=collate_boxed, num_workers=num_workers
        )
        run.fit(module, pictures, validation_loader)
    _warn_if_collapsed(module.seed_loss)
    return FCAM(classifier, decoder.to(device).eval())


def crf_side(size: tuple[int, int]) -> int:
    """The default `side` of the CRF loss for crops of this size: a quarter, but at least 16."""
    return max(max(size) // 4, 16)


def _warn_if_collapsed(seed_loss: float) -> None:
    if seed_loss > COLLAPSED_LOSS:
        warn(
            f"The decoder has learned nothing, or has collapsed: in the last epoch its loss at the "
            f"seeds was {seed_loss:.2f} (a constant map has ln 2). More epochs, a longer `warmup`, "
            f"a lower `crf_weight` or another `seed` may help."
        )


def _count_classes(output: Any) -> int:
    if not isinstance(output, Tensor) or output.dim() != 2:
        result = tuple(output.shape) if isinstance(output, Tensor) else type(output)
        raise ArgumentError(
            f"`classifier` must give logits (N, classes), got {result}.", "classifier"
        )
    return output.shape[1]
