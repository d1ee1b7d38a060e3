"""`fit_fcam`: a decoder for a classifier, in one call (the extra `train`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.utils.data import DataLoader

from captum_ext._checks import warn
from captum_ext._data.pictures import PictureDataset
from captum_ext._data.pixels import IMAGENET_MEAN_STD, Normalize
from captum_ext._data.sizes import height_width
from captum_ext._engine.modules import Forward, parameter_dtype, root_module
from captum_ext._training import Fit
from captum_ext.fcam.attribution import FCAM
from captum_ext.fcam.crf import DenseCRFLoss
from captum_ext.fcam.decoder import FCAMDecoder
from captum_ext.fcam.guides import check_guide
from captum_ext.fcam.seeding import SeedSampler
from captum_ext.fcam.stored import cached_maps, maps_fingerprint, run_fingerprint
from captum_ext.fcam.training import FCAMModule
from captum_ext.fcam.views import Boxed, as_batch

COLLAPSED = 0.6  # ln 2 is the loss of a decoder that says 1/2 everywhere

# The paper's settings, for `fit_fcam(..., **PAPER)`: 5.04 is the weight of 2e-9 that its code gives
# to the sum over all pairs of 224 x 224 pixels.
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
    """Train a decoder for the classifier's maps; the classifier does not move by a bit.

    Labels of whole images are all it needs. It goes through the pictures `n_epochs` times, as
    `FCAMModule` describes; the last epoch's decoder is what it returns. Nothing is chosen by how
    well anything is localised, unless there is a `validation` set with boxes, as published figures
    are made with: it selects the epoch, and then more than labels was needed.

    Args:
        classifier: the module.
        data: labelled pictures: torchvision's `ImageFolder`, a data set of this package, or any
            other whose entry i is (picture, label, ...). Pictures are PIL images or tensors
            (3, H, W) or (1, H, W) of bytes or of floats in [0, 1], not normalised. Those that do
            not decode are left out, named and counted.
        guide: what teaches: any Captum attribution of this classifier that gives maps.
        size: (H, W) of what the classifier sees, or one number for both.
        resize: (H, W) that pictures are brought to, and views cropped out of. None is `size`.
        n_epochs: how often each picture is seen.
        batch_size: pictures in a step, of each device.
        layers: see `FCAMDecoder.reading`, as for the next two.
        widths: of the decoder's blocks.
        center: whether it has a centre block.
        cache: a folder in which the guide's maps of the whole pictures are stored, once; the views
            are cropped out of them, so `data` must give the same pictures each time. In training
            they are all in memory, at the guide's own resolution. None explains each view anew.
        checkpoints: a folder. Each epoch is stored in it, and a run that was killed goes on from
            the last one, to the weights that it would have come to; one that is finished may go on
            to more epochs. Of the settings, only those of `trainer` may change. (A `generator` that
            the guide was made with is not stored.) None stores nothing.
        validation: pictures with boxes: a data set of this package, or entry i is (picture, label,
            boxes), boxes being (n, 4) in the picture's own pixels, (x1, y1, x2, y2). The decoder of
            the epoch with the best `MaxBoxAcc` (IoU 0.5, as published) on them, brought to `size`
            whole, is what is returned. None returns that of the last.
        seed: of all random numbers. Global random state stays as it was.
        num_workers: processes that read pictures. 0 where several devices train and a run that was
            killed must go on to the same weights: read ahead, its first epoch has another order.
        show_progress: whether to draw progress bars.
        trainer: arguments of Lightning's `Trainer`, such as ``{"devices": 2}``. As it comes, the
            device is the classifier's.
        **options: of `FCAMModule`; `crf` is `DenseCRFLoss` at a quarter of `size`, but at
            least 16 pixels, unless it is given.

    Returns:
        An `FCAM` of the classifier.

    Raises:
        TypeError, ValueError: an argument of another kind or out of range; a guide of another
            model, or one that gives no seeds; a label that is no class; stored maps or a checkpoint
            of another run; with `cache` or `checkpoints`, a function (of the guide, its arguments,
            or `crf`) without a `version`, see `evaluate`.
        RuntimeError: inside `torch.inference_mode`.
        FloatingPointError: a loss that is not finite, with its epoch and batch. What was stored
            stays.

    Example:
        >>> from captum.attr import LayerGradCam
        >>> guide = LayerGradCam(model, model.layer4)  # doctest: +SKIP
        >>> fcam = fit_fcam(model, folder, guide, checkpoints="run")  # doctest: +SKIP
        >>> fcam.attribute(x).shape  # doctest: +SKIP
        torch.Size([8, 3, 224, 224])
    """
    root = root_module(classifier)
    if root is None:
        raise TypeError(f"`classifier` must be a torch.nn.Module, got {type(classifier)}.")
    run = Fit(n_epochs, batch_size, checkpoints, seed, num_workers, show_progress, trainer)
    check_guide(guide, classifier)
    view = height_width("size", size)
    whole = view if resize is None else height_width("resize", resize)
    if whole[0] < view[0] or whole[1] < view[1]:
        raise ValueError(f"`resize` must be at least `size`, {view}, got {whole}.")
    boxed = None if validation is None else Boxed(validation, view)
    options = {"crf": DenseCRFLoss(side=crf_side(view))} | options
    n_channels = Normalize(options.get("normalize", IMAGENET_MEAN_STD)).channels
    with run.around(root) as device:
        with torch.no_grad():
            blank = torch.zeros(1, n_channels, *view, device=device, dtype=parameter_dtype(root))
            n_classes = _n_classes(root(blank))
            decoder = FCAMDecoder.reading(root, blank, layers, widths, center).to(device)
        pictures = PictureDataset(data, whole, n_classes)
        module = FCAMModule(root, decoder, guide, view, seed=seed, **options).to(device)
        stores = cache is not None or checkpoints is not None
        fingerprint = maps_fingerprint(module, pictures) if stores else {}
        if cache is not None:
            module.maps = cached_maps(
                module, pictures, fingerprint, Path(cache), batch_size, num_workers, show_progress
            )
        if checkpoints is not None:
            module.settings = fingerprint | run_fingerprint(module, batch_size)
            module.settings["validation"] = 0 if boxed is None else len(boxed)
        judged = boxed and DataLoader(
            boxed, batch_size, collate_fn=as_batch, num_workers=num_workers
        )
        run.fit(module, pictures, judged)
    if module.seed_loss > COLLAPSED:
        warn(
            f"The decoder has learned nothing, or has collapsed: in the last epoch its loss at the "
            f"seeds was {module.seed_loss:.2f} (ln 2 is that of no knowledge). More epochs, a "
            f"longer `warmup`, a lower `crf_weight` or another `seed` may help."
        )
    return FCAM(classifier, decoder.to(device).eval())


def crf_side(size: tuple[int, int]) -> int:
    """To how many pixels a side the CRF reduces views of this size: a quarter, but at least 16."""
    return max(max(size) // 4, 16)


def _n_classes(output: Any) -> int:
    if not isinstance(output, Tensor) or output.dim() != 2:
        shown = tuple(output.shape) if isinstance(output, Tensor) else type(output)
        raise ValueError(f"`classifier` must give logits (N, classes), got {shown}.")
    return output.shape[1]
