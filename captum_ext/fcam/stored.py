"""What a training stores of its guide, and by what it knows its own files again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from captum_ext._data.pictures import PictureDataset
from captum_ext._identity import (
    atomic_write,
    check_same_run,
    json_value,
    model_digest,
    versioned_name,
)
from captum_ext.attr._chain import wrapped_method
from captum_ext.fcam.guides import guidance

if TYPE_CHECKING:
    from captum_ext.fcam.training import FCAMModule

SHARD = 512  # stored maps in a file


def cached_maps(
    module: "FCAMModule",
    pictures: PictureDataset,
    fingerprint: dict[str, Any],
    folder: Path,
    batch_size: int,
    num_workers: int = 0,
    show_progress: bool = False,
) -> Tensor:
    """The guide's maps of all whole pictures, (n, 1, h, w) in float16, from the folder or into it.

    They are stored `SHARD` at a time, so that a run that was killed goes on, and several processes
    may store the same ones at once.

    Raises:
        ValueError: the folder has maps of another run.
    """
    # Maps belong to these pixels, and not to names and labels alone.
    of_pictures = f"{pictures.fingerprint()}, {pictures.pixel_fingerprint()}"
    fingerprint = fingerprint | {"pictures": of_pictures}
    shards = []
    starts = range(0, len(pictures), SHARD)
    for start in tqdm(starts, desc="maps", disable=not show_progress):
        file = folder / f"maps-{start:08d}.pt"
        if file.is_file():
            saved = torch.load(file, weights_only=True)
            check_same_run(
                f"`cache` {folder} has the maps of another run", saved["fingerprint"], fingerprint
            )
        else:
            part = Subset(pictures, range(start, min(start + SHARD, len(pictures))))
            found = []
            for pixels, labels, _, read in DataLoader(part, batch_size, num_workers=num_workers):
                images = module.images(pixels.to(module.device))
                maps = guidance(
                    module.guide,
                    images,
                    labels.to(module.device),
                    rectify=module.rectify,
                    **module.guide_kwargs,
                )
                found.append(torch.where(read[:, None, None, None], maps.cpu(), 0).half())
            saved = {"fingerprint": fingerprint, "maps": torch.cat(found)}
            with atomic_write(file) as unfinished:
                torch.save(saved, unfinished)
        shards.append(saved["maps"])
    return torch.cat(shards)


def maps_fingerprint(module: "FCAMModule", pictures: PictureDataset) -> dict[str, Any]:
    """What the guide's maps depend on, as far as it can be known."""
    return {
        "classifier": model_digest(module.classifier),
        "guide": described("`guide`", module.guide, module.classifier),
        "rectify": module.rectify,
        "normalize": module.normalize.to_lists(),
        "guide_kwargs": repr(
            [
                (k, json_value(f"`guide_kwargs`: {k}", v))
                for k, v in sorted(module.guide_kwargs.items())
            ]
        ),
        "pictures": pictures.fingerprint(),
        "size": list(pictures.size),
    }


def run_fingerprint(module: "FCAMModule", batch_size: int) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that was killed, but for maps."""
    decoder, crf = module.decoder, module.crf
    return {
        "view": list(module.size),
        "channels": decoder.channels,
        "widths": decoder.widths,
        "center": decoder.has_center,
        "layers": decoder.layers,
        "flip": module.flip,
        "seeds": repr(sorted(vars(module.seeds).items())),
        "crf": repr(crf) if isinstance(crf, Module | None) else versioned_name("`crf`", crf),
        "weights": [module.crf_weight, module.size_weight],
        "warmup": module.warmup,
        "lr": module.lr,
        "seed": module.seed,
        "batch_size": batch_size,
        "stored_maps": module.maps is not None,
    }


def described(where: str, guide: Attribution, classifier: Module) -> str:
    """A guide with its layers, plain options and functions, and those of the method that it wraps.

    Args:
        where: the argument, as errors name it.
        guide: any attribution.
        classifier: that it explains.

    Raises:
        ValueError: a function that stored work cannot know again.
    """
    names = {module: name for name, module in classifier.named_modules()}
    options = []
    captums = type(guide).__module__.partition(".")[0] == "captum"
    for name, value in sorted(vars(guide).items()):
        if captums and name.startswith("_"):  # no options, and Occlusion's change as it is called
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if all(isinstance(one, int | float | str | None) for one in values):
            options.append(f"{name}={value!r}")
        elif name == "layer":
            options.append(f"layer={', '.join(names.get(one, '?') for one in values)}")
        for leaf in tree_leaves(value):
            if _is_option(name, leaf, guide):
                options.append(f"{name}={versioned_name(f'{where}: {name}', leaf)}")
    inner = wrapped_method(guide)
    within = [] if inner is None else [described(where, inner, classifier)]
    return f"{guide.get_name()}({', '.join(within + options)})"


def _is_option(name: str, leaf: Any, guide: Attribution) -> bool:
    """Whether it is a function that a guide was made with; not its model, nor its own methods.

    Captum's `gradient_func` is none: neurons' methods put another one there as they are called.
    """
    if not callable(leaf) or isinstance(leaf, Module) or name == "forward_func":
        return False
    if name == "gradient_func" and str(leaf.__module__).partition(".")[0] == "captum":
        return False
    return getattr(leaf, "__self__", None) is not guide
