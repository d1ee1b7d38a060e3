"""`fit_fcam`: a decoder for a classifier, in one call (the extra `train`)."""

import hashlib
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from captum.attr import Attribution
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from captum_ext._checks import check_count, warn
from captum_ext._model import Forward, root_module
from captum_ext.attr.fcam import FCAM, fingerprint
from captum_ext.fcam.decoder import FCAMDecoder
from captum_ext.fcam.guides import check_guide, guidance
from captum_ext.fcam.losses import DenseCRFLoss
from captum_ext.fcam.seeding import SeedSampler
from captum_ext.fcam.training import FCAMModule, changes, evaluated
from captum_ext.fcam.views import Boxed, Pictures, Shuffled, as_batch, hash_of

SHARD = 512  # stored maps in a file
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
            (3, H, W) of bytes or of floats in [0, 1], not normalised.
        guide: what teaches: any Captum attribution of this classifier that gives maps.
        size: (H, W) of what the classifier sees, or one number for both.
        resize: (H, W) that pictures are brought to, and views cropped out of. None is `size`.
        n_epochs: how often each picture is seen.
        batch_size: pictures in a step, of each device.
        layers: see `FCAMDecoder.reading`, as for the next two.
        widths: of the decoder's blocks.
        center: whether it has a centre block.
        cache: a folder in which the guide's maps of the whole pictures are stored, once; the views
            are cropped out of them. None explains each view anew.
        checkpoints: a folder. Each epoch is stored in it, and a run that was killed goes on from
            the last one, to the weights that it would have come to. None stores nothing.
        validation: pictures with boxes: entry i is (picture, label, boxes), boxes being (n, 4) in
            the picture's own pixels, (x1, y1, x2, y2). The decoder of the epoch with the best
            `MaxBoxAcc` (IoU 0.5) on them, brought to `size` whole, is what is returned. None
            returns that of the last.
        seed: of all random numbers. Global random state stays as it was.
        num_workers: processes that read pictures.
        show_progress: whether to draw progress bars.
        trainer: arguments of Lightning's `Trainer`, such as ``{"devices": 2}``. As it comes, the
            device is the classifier's.
        **options: of `FCAMModule`; `crf` is `DenseCRFLoss` at a quarter of `size`, but at
            least 16 pixels, unless it is given.

    Returns:
        An `FCAM` of the classifier.

    Raises:
        TypeError, ValueError: an argument of another kind or out of range; a guide of another
            model; a label that is no class; a checkpoint of another run.
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
    check_guide(guide, classifier)
    for name, count in (("n_epochs", n_epochs), ("batch_size", batch_size)):
        check_count(name, count)
    view = _pair("size", size)
    whole = view if resize is None else _pair("resize", resize)
    if whole[0] < view[0] or whole[1] < view[1]:
        raise ValueError(f"`resize` must be at least `size`, {view}, got {whole}.")
    device = next(root.parameters(), torch.empty(0)).device
    with evaluated(root), torch.no_grad():
        blank = torch.zeros(1, 3, *view, device=device)
        n_classes = root(blank).shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(hash_of(seed))
            decoder = FCAMDecoder.reading(root, blank, layers, widths, center)
    pictures = Pictures(data, whole, n_classes)
    options = {"crf": DenseCRFLoss(side=max(max(view) // 4, 16))} | options
    module = FCAMModule(root, decoder, guide, view, seed=seed, **options)
    if cache is not None:
        module.maps = cached_maps(module, pictures, Path(cache), batch_size, show_progress)
    loader = DataLoader(
        pictures,
        batch_size,
        sampler=Shuffled(len(pictures), seed),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    boxed = None if validation is None else Boxed(validation, view)
    judged = None
    if boxed is not None:
        judged = DataLoader(boxed, batch_size, collate_fn=as_batch, num_workers=num_workers)
    settings = {
        "max_epochs": n_epochs,
        "accelerator": "cpu" if device.type == "cpu" else "gpu",
        "devices": 1 if device.index is None else [device.index],
        "logger": False,
        "enable_progress_bar": show_progress,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": [],
        "enable_checkpointing": checkpoints is not None,
        "use_distributed_sampler": True,
        **(trainer or {}),
    }
    resumed = None
    if checkpoints is not None:
        module.settings = _settings(module, pictures, n_epochs, batch_size)
        module.settings["validation"] = 0 if boxed is None else len(boxed)
        saver = ModelCheckpoint(
            checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False
        )
        settings["callbacks"] = [*settings["callbacks"], saver]
        file = Path(checkpoints) / "last.ckpt"
        resumed = file if file.is_file() else None
    try:
        # Loaders draw a seed for their workers; `ddp_spawn` cannot send one with a generator.
        with _interruptible(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You defined a `validation_step`")
            torch.manual_seed(hash_of(seed))
            Trainer(**settings).fit(module, loader, judged, ckpt_path=resumed)
    finally:
        root.to(device)
    loss = torch.stack(module.seed_losses).mean().item() if module.seed_losses else 0.0
    if loss > COLLAPSED:
        warn(
            f"The decoder has learned nothing, or has collapsed: in the last epoch its loss at the "
            f"seeds was {loss:.2f} (ln 2 is that of no knowledge). More epochs, a longer `warmup`, "
            f"a lower `crf_weight` or another `seed` may help."
        )
    return FCAM(classifier, decoder.to(device).eval())


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt again: Lightning ends the process, and ignores the next one."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from ended
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def cached_maps(
    module: FCAMModule, pictures: Pictures, folder: Path, batch_size: int, show_progress: bool
) -> Tensor:
    """The guide's maps of all whole pictures, (n, 1, h, w) in float16, from the folder or into it.

    They are stored `SHARD` at a time, so that a run that was killed goes on.

    Raises:
        ValueError: the folder has maps of another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = _about_maps(module, pictures)
    classifier, guide = module._frozen
    device = next(classifier.parameters(), torch.empty(0)).device
    shards = []
    starts = range(0, len(pictures), SHARD)
    for start in tqdm(starts, desc="maps", disable=not show_progress):
        file = folder / f"maps-{start:08d}.pt"
        if file.is_file():
            saved = torch.load(file, weights_only=True)
            if saved["about"] != about:
                raise ValueError(
                    f"`cache` {folder} has the maps of another run: "
                    f"{changes(saved['about'], about)}. Name another folder, or delete it."
                )
        else:
            found = []
            part = Subset(pictures, range(start, min(start + SHARD, len(pictures))))
            for pixels, labels, _, read in DataLoader(part, batch_size):
                images = (pixels / 255 - module.mean) / module.std
                with evaluated(classifier):
                    maps = guidance(
                        guide,
                        images.to(device),
                        labels.to(device),
                        rectify=module.rectify,
                        **module.guide_kwargs,
                    )
                found.append(torch.where(read[:, None, None, None], maps.cpu(), 0).half())
            saved = {"about": about, "maps": torch.cat(found)}
            unfinished = file.with_suffix(".partial")
            torch.save(saved, unfinished)
            unfinished.replace(file)
        shards.append(saved["maps"])
    return torch.cat(shards)


def _about_maps(module: FCAMModule, pictures: Pictures) -> dict[str, Any]:
    """What the guide's maps depend on, as far as it can be known."""
    classifier, guide = module._frozen
    return {
        "classifier": _digest(fingerprint(classifier)),
        "guide": guide.get_name(),
        "layer": _layer_name(classifier, guide),
        "rectify": module.rectify,
        "normalize": [module.mean.flatten().tolist(), module.std.flatten().tolist()],
        "guide_kwargs": repr(sorted(module.guide_kwargs.items())),
        "pictures": len(pictures),
        "size": list(pictures.size),
    }


def _settings(
    module: FCAMModule, pictures: Pictures, n_epochs: int, batch_size: int
) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that was killed."""
    return _about_maps(module, pictures) | {
        "view": list(module.size),
        "channels": module.decoder.channels,
        "widths": module.decoder.widths,
        "layers": module.decoder.layers,
        "flip": module.flip,
        "seeds": repr(sorted(vars(module.seeds).items())),
        "crf": repr(module.crf),
        "weights": [module.crf_weight, module.size_weight],
        "warmup": module.warmup,
        "lr": module.lr,
        "seed": module.seed,
        "epochs": n_epochs,
        "batch_size": batch_size,
        "stored_maps": module.maps is not None,
    }


def _digest(digests: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def _layer_name(classifier: Module, guide: Attribution) -> str:
    layer = getattr(guide, "layer", None)
    layers = layer if isinstance(layer, list | tuple) else [layer]
    names = {module: name for name, module in classifier.named_modules()}
    return ", ".join(names.get(one, "") for one in layers if isinstance(one, Module))


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"`{name}` must be one or two numbers of pixels, got {value!r}.")
    for side in pair:
        check_count(name, side)
    return pair
