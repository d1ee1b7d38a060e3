"""Maximally activating patches: the parts of a data set's pictures that units answer to most."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_ext._checks import check_choice, check_count, check_range
from captum_ext._data.pictures import PictureDataset
from captum_ext._data.pixels import IMAGENET_MEAN_STD
from captum_ext._data.sizes import height_width
from captum_ext._engine.modules import Forward
from captum_ext._engine.receptive_field import ReceptiveField, receptive_field
from captum_ext._engine.state import preserve_state
from captum_ext._identity import model_digest
from captum_ext.features._activating_patches import ActivatingPatches
from captum_ext.features._fields import clipped, effective_boxes, field_boxes
from captum_ext.features._layer_maps import LayerMaps, ReshapeTransform
from captum_ext.features._streaming import Store, streamed
from captum_ext.features._top_activations import TopActivations

RECEPTIVE_FIELDS = ("analytic", "effective", "image")


def maximally_activating_patches(
    forward_func: Forward,
    layer: Module | str,
    data: Any,
    *,
    n: int = 9,
    units: Sequence[int] | None = None,
    per_image: int = 1,
    size: int | tuple[int, int] = 224,
    normalize: tuple[Sequence[float], Sequence[float]] = IMAGENET_MEAN_STD,
    receptive_field: str = "analytic",
    energy: float = 0.95,
    reshape_transform: ReshapeTransform | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    show_progress: bool = False,
) -> ActivatingPatches:
    r"""The `n` patches of a data set that activate each unit of a layer most.

    For unit k it takes the largest activation of each picture,

    .. math:: a_k(x) = \max_{ij} A_k(x)_{ij}

    keeps the n pictures where it is largest, and crops the receptive field of the unit (i, j) that
    had it. Each picture is run once, and only the best so far are kept, on the device. Of equal
    activations the earlier picture comes first, and of one picture the earlier position, row by
    row; a unit that is 0 everywhere so shows the first pictures, with activations of 0.

    **Receptive fields.** Analytic, with a kernel of k, dilation d, stride s and padding p, from
    r = j = 1 and c = 0 on,

    .. math:: c += (d (k - 1) / 2 - p) j, \quad r += d (k - 1) j, \quad j \cdot\!= s,

    unit i has the centre c + i j, and sees the r pixels around it; where branches meet, what any
    of them sees. Nothing outside of the box has an effect on the unit. Where attention, squeeze and
    excitation or a norm over the map is on the way, a unit sees the whole image, and the box is
    that: `reason` of the result says so. Most of a large field has little effect. The effective one
    is the part of it with at least the share `energy` of the squared gradient of the activation
    with respect to the image; each side cuts off a quarter of the rest. It costs a forward and a
    backward pass for each patch.

    Args:
        forward_func: the model: a module, its bound method, or a function with a module as `layer`.
            It is run as it stands, on its own device.
        layer: a module or its name. It gives (B, C, h, w), or (B, C) of units that see everything.
        data: pictures of any size: a data set of this package, torchvision's `ImageFolder`, or any
            other whose entry i is a picture, (picture, ...), or has `image`. Pictures are PIL
            images or tensors (3, H, W) or (1, H, W) of bytes or of floats in [0, 1], not
            normalised. Those that do not decode are left out, named and counted.
        n: patches of each unit. 9 is customary (Zeiler & Fergus 2014).
        units: channels of the layer; None is all.
        per_image: how many patches of a unit may be of one picture.
        size: (H, W) that pictures are brought to, whole, or one number for both.
        normalize: (mean, std) of each channel; of one channel for models of grey images.
        receptive_field: "analytic", "effective", or "image" for the whole image.
        energy: of an effective receptive field, in [0, 1].
        reshape_transform: turns what the layer puts out into (B, C, h, w), for token layers; see
            `captum_ext.attr.tokens_to_grid`. A `checkpoint` knows one of your own by its name and
            an attribute `version`: ``my_transform.version = "1"`` below its definition.
        batch_size: pictures in a forward pass.
        num_workers: processes that read pictures.
        shard: (i, k) looks at the pictures i, i + k, i + 2 k, ... alone, for k processes: `merge`
            makes of their results what one process would have found.
        checkpoint: a file, written after every so many pictures and at the end. A run that was
            killed goes on from it, to the same result. None writes nothing.
        checkpoint_every: that many.
        show_progress: whether to draw a progress bar.

    Returns:
        The patches, on the CPU.

    Raises:
        TypeError, ValueError: an argument of another kind or out of range; a layer without maps;
            activations that are not finite; a checkpoint of another run; no picture that can be
            read, or one that only could be the first time.
        RuntimeError: an effective receptive field inside `torch.inference_mode`.

    Reference:
        Zeiler, Fergus, "Visualizing and Understanding Convolutional Networks",
        https://arxiv.org/abs/1311.2901. Receptive fields: Araujo et al., "Computing Receptive
        Fields of Convolutional Neural Networks", Distill 2019. Effective ones: Luo et al.,
        "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks",
        https://arxiv.org/abs/1701.04128

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from captum_ext.features import maximally_activating_patches
        >>> data = [(torch.rand(3, 80, 60), 0) for _ in range(5)]
        >>> found = maximally_activating_patches(resnet18().eval(), "layer1", data, n=3, size=64)
        >>> found.values.shape, found.field.rows.size == 43
        (torch.Size([64, 3]), True)
        >>> len(found.crops(data, unit=7))
        3
    """
    counts = {"n": n, "per_image": per_image, "batch_size": batch_size}
    for argument, count in (counts | {"checkpoint_every": checkpoint_every}).items():
        check_count(argument, count)
    check_choice("receptive_field", receptive_field, RECEPTIVE_FIELDS)
    check_range("energy", energy, 0, 1)
    chosen = None if units is None else _checked_units(units)
    pictures = PictureDataset(data, height_width("size", size), has_labels=False)
    places = _checked_shard(shard, len(pictures))
    maps = LayerMaps(forward_func, layer, normalize, reshape_transform)
    if receptive_field == "effective" and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "An effective receptive field is made of gradients, which do not exist inside "
            "torch.inference_mode(): leave it first."
        )
    store = None
    if checkpoint is not None:
        run = {
            "model": model_digest(forward_func), **maps.fingerprint(),
            "data": pictures.fingerprint(),
            "n": n, "per_image": per_image, "units": None if chosen is None else list(chosen),
            "size": list(pictures.size), "shard": list(shard),
        }  # fmt: skip
        store = Store(Path(checkpoint), run, checkpoint_every)
    with preserve_state(forward_func):
        blank = maps.images(torch.zeros(1, 3, *pictures.size, dtype=torch.uint8))
        rows = _rows(chosen, maps(blank).shape[1], maps.name)
        field, reason = (None, None) if receptive_field == "image" else _field(maps, blank)
        reading = (batch_size, num_workers, show_progress)
        top, unread = streamed(
            maps, pictures, places, chosen, TopActivations(n, per_image), store, *reading
        )
        found, positions = top.places.cpu(), top.positions.cpu()
        if field is None:
            height, width = pictures.size
            boxes = torch.tensor([0, 0, width, height]).expand(*found.shape, 4).clone()
        else:
            boxes = clipped(field_boxes(field, positions), pictures.size)
        if receptive_field == "effective":
            inner = effective_boxes(maps, pictures, rows, found, positions, energy, *reading).cpu()
            # No gradient at all says nothing: its box is the whole image.
            low, high = boxes[..., :2], boxes[..., 2:]
            boxes = torch.cat([inner[..., :2].maximum(low), inner[..., 2:].minimum(high)], -1)
    pictures.warn_of_unread(set(unread))
    names = tuple(pictures.name(place) for place in unread)
    return ActivatingPatches(
        maps.name, rows, top.values.cpu(), found, positions, boxes,
        pictures.size, n, field, reason, names,
    )  # fmt: skip


def _field(maps: LayerMaps, image: Tensor) -> tuple[ReceptiveField | None, str | None]:
    """The layer's receptive field; or None, and the reason for it."""
    transform = maps.reshape_transform
    try:
        field = receptive_field(
            maps.forward_func, maps.layer, image, exact=True, reshape_transform=transform
        )
    except ValueError as error:
        return None, str(error)
    return field, None


def _rows(units: tuple[int, ...] | None, n_channels: int, layer: str) -> tuple[int, ...]:
    """The channels that are looked at."""
    rows = tuple(range(n_channels)) if units is None else units
    if max(rows) >= n_channels:
        raise ValueError(
            f"`units` must be below {n_channels}, the channels of `layer` `{layer}`, got "
            f"{max(rows)}."
        )
    return rows


def _checked_units(units: Any) -> tuple[int, ...]:
    whole = isinstance(units, Sequence) and all(
        isinstance(u, int) and not isinstance(u, bool) and u >= 0 for u in units
    )
    if not whole or not units or len(set(units)) < len(units):
        raise ValueError(
            f"`units` must be channels, each once and 0 or more, or None, got {units!r}."
        )
    return tuple(units)


def _checked_shard(shard: Any, length: int) -> range:
    """The places of a shard."""
    first, step = shard if isinstance(shard, tuple) and len(shard) == 2 else (-1, 0)
    are_numbers = isinstance(first, int) and isinstance(step, int)
    if not are_numbers or not 0 <= first < min(step, length):
        raise ValueError(
            f"`shard` must be (i, k) with 0 <= i < k, and i below the {length} pictures of `data`, "
            f"got {shard!r}."
        )
    return range(first, length, step)
