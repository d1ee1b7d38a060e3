"""Maximally activating patches: the parts of pictures that activate units most."""

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
from captum_ext._errors import ArgumentError
from captum_ext._identity import model_digest
from captum_ext._layer_maps import LayerMaps, ReshapeTransform
from captum_ext.features._activating_patches import ActivatingPatches
from captum_ext.features._fields import clip_boxes, effective_boxes, field_boxes
from captum_ext.features._streaming import PassCheckpoint, PassState, stream_pictures
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
    r"""Find the `n` patches of a data set that activate each unit of a layer most.

    For unit k it takes the largest activation of each picture x,

    .. math:: a_k(x) = \max_{ij} A_k(x)_{ij}

    keeps the n pictures with the largest values, and crops the receptive field of the unit (i, j)
    of each maximum. Each picture runs once, and only the largest activations so far are kept, on
    the device. Ties go to the earlier picture, and in one picture to the earlier position, row by
    row. So a unit that is 0 everywhere gives the first pictures, with activations of 0.

    **Receptive fields.** For kernel k, dilation d, stride s and padding p of each layer on the way,
    starting from r = j = 1 and c = 0,

    .. math:: c += (d (k - 1) / 2 - p) j, \quad r += d (k - 1) j, \quad j \cdot\!= s,

    unit i sees the r pixels around the centre c + i j. Where branches meet, the union of their
    fields counts. No pixel outside of the box affects the unit. After attention, squeeze and
    excitation, or a norm over the map, a unit sees the whole image; the box is the whole image
    then, and `reason` of the result says why.

    Most pixels of a large field have little effect. The effective field is the part of it with at
    least the share `energy` of the squared gradient of the activation by the image; each side cuts
    off at most a quarter of the rest. It costs a forward and a backward pass for each patch.

    Args:
        forward_func: the model: a module, its bound method, or a function with a module as `layer`.
            It runs in the mode that it is in, on its own device.
        layer: a module or its dotted name, whose output is (B, C, h, w), or (B, C) of units that
            see the whole image.
        data: pictures of any size: a data set of this package, torchvision's `ImageFolder`, or any
            other whose entry i is a picture, (picture, ...), or has `image`. Pictures are PIL
            images or tensors (3, H, W) or (1, H, W) of bytes or of floats in [0, 1], not
            normalised. Pictures that do not decode are left out, named and counted.
        n: the number of patches of each unit. 9 (Zeiler & Fergus 2014).
        units: channels of the layer. None takes all.
        per_image: how many patches of a unit may be of one picture. 1.
        size: (H, W) that whole pictures are resized to, in pixels, or one number for both. 224.
        normalize: (mean, std) of each channel, as the model expects pictures; of one channel for
            models of grey pictures. ImageNet's.
        receptive_field: "analytic", "effective", or "image" for the whole image.
        energy: the share of squared gradients in an effective receptive field, in [0, 1]. 0.95.
        reshape_transform: turns the layer's output into (B, C, h, w), for token layers; see
            `captum_ext.attr.tokens_to_grid`. A `checkpoint` recognises your own function by its
            name and its attribute `version`: ``my_transform.version = "1"`` below its definition.
        batch_size: pictures in a forward pass. 32.
        num_workers: processes that read pictures. 0.
        shard: (i, k) takes the pictures i, i + k, i + 2 k, ... only, for one of k processes. The
            result's `merge` joins the results of all.
        checkpoint: a file that is written during the pass and at its end. A run that was killed
            resumes from it, with the same result. None writes nothing.
        checkpoint_every: the number of pictures from one writing of the file to the next. 1000.
        show_progress: whether to draw a progress bar.

    Returns:
        The patches, on the CPU.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; the layer gives no maps, or activations that are
            not finite; `checkpoint` is of another run; or pictures cannot be read: none at all, or
            one that an effective field needs again.
        RuntimeError: an effective receptive field is computed inside `torch.inference_mode`.

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
        >>> patches = maximally_activating_patches(resnet18().eval(), "layer1", data, n=3, size=64)
        >>> patches
        ActivatingPatches(layer='layer1', 64 units, 3 patches each)
        >>> patches.values.shape, patches.field.rows.size == 43
        (torch.Size([64, 3]), True)
        >>> len(patches.crops(data, unit=7))
        3
    """
    counts = {"n": n, "per_image": per_image, "batch_size": batch_size}
    for argument, count in (counts | {"checkpoint_every": checkpoint_every}).items():
        check_count(argument, count)
    check_choice("receptive_field", receptive_field, RECEPTIVE_FIELDS)
    check_range("energy", energy, 0, 1)
    channels = None if units is None else _check_units(units)
    pictures = PictureDataset(data, height_width("size", size), has_labels=False)
    shard_indices = _check_shard(shard, len(pictures))
    maps = LayerMaps(forward_func, layer, normalize=normalize, reshape_transform=reshape_transform)
    if receptive_field == "effective" and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "An effective receptive field needs gradients, which do not exist inside "
            "torch.inference_mode(): leave it first."
        )
    pass_checkpoint = None
    if checkpoint is not None:
        run = {
            "model": model_digest(forward_func), **maps.fingerprint(),
            "data": pictures.fingerprint(),
            "n": n, "per_image": per_image, "units": None if channels is None else list(channels),
            "size": list(pictures.size), "shard": list(shard),
        }  # fmt: skip
        pass_checkpoint = PassCheckpoint(Path(checkpoint), run, checkpoint_every)
    loading = (batch_size, num_workers, show_progress)
    with preserve_state(forward_func):
        blank = maps.images(torch.zeros(1, 3, *pictures.size, device=maps.device))
        example = maps.run_full_pass(blank)
        channels_of_rows = _channels_of_rows(channels, example.shape[1], maps.name)
        state = PassState(TopActivations(n, per_image), 0, [])
        if pass_checkpoint is not None:
            example = example[:, : len(channels_of_rows)]
            state = pass_checkpoint.read(state.top, example, shard_indices)
        field, reason = (None, None) if receptive_field == "image" else _field(maps, blank)
        top, unread = stream_pictures(
            maps, pictures, shard_indices, channels, state, pass_checkpoint, *loading
        )  # fmt: skip
        indices, positions = top.indices.cpu(), top.positions.cpu()
        boxes = _boxes(field, positions, pictures.size)
        if receptive_field == "effective":
            effective = effective_boxes(
                maps, pictures, channels_of_rows, indices, positions, energy, *loading
            ).cpu()
            # Without any gradient the effective box is the whole image: the field bounds it.
            low = effective[..., :2].maximum(boxes[..., :2])
            high = effective[..., 2:].minimum(boxes[..., 2:])
            boxes = torch.cat([low, high], -1)
    pictures.warn_of_unread(set(unread))
    names = tuple(pictures.name(index) for index in unread)
    return ActivatingPatches(
        maps.name, channels_of_rows, top.values.cpu(), indices, positions, boxes,
        pictures.size, n, field, reason, names,
    )  # fmt: skip


def _boxes(field: ReceptiveField | None, positions: Tensor, size: tuple[int, int]) -> Tensor:
    """The receptive fields at these positions, clipped to the image; the whole image for None."""
    if field is not None:
        return clip_boxes(field_boxes(field, positions), size)
    return positions.new_tensor([0, 0, size[1], size[0]]).expand(*positions.shape[:-1], 4).clone()


def _field(maps: LayerMaps, image: Tensor) -> tuple[ReceptiveField | None, str | None]:
    """The layer's receptive field; or None, and the reason."""
    transform = maps.reshape_transform
    try:
        field = receptive_field(
            maps.forward_func, maps.layer, image, exact=True, reshape_transform=transform
        )
    except ValueError as error:
        return None, str(error)
    return field, None


def _channels_of_rows(
    units: tuple[int, ...] | None, n_channels: int, layer: str
) -> tuple[int, ...]:
    """The channel of each row of the result.

    Raises:
        ValueError: a unit is not below `n_channels`.
    """
    if units is None:
        return tuple(range(n_channels))
    if max(units) >= n_channels:
        raise ArgumentError(
            f"`units` must be below {n_channels}, the channels of `layer` `{layer}`, got "
            f"{max(units)}.",
            "units",
        )
    return units


def _check_units(units: Any) -> tuple[int, ...]:
    are_channels = isinstance(units, Sequence) and all(
        isinstance(u, int) and not isinstance(u, bool) and u >= 0 for u in units
    )
    if not are_channels or not units or len(set(units)) < len(units):
        raise ArgumentError(
            f"`units` must be channels, 0 or more and without repetition, or None, got {units!r}.",
            "units",
        )
    return tuple(units)


def _check_shard(shard: Any, n_pictures: int) -> range:
    """The indices of the pictures of a shard.

    Raises:
        ValueError: `shard` is not (i, k), or i is out of range.
    """
    first, step = shard if isinstance(shard, tuple) and len(shard) == 2 else (-1, 0)
    are_numbers = isinstance(first, int) and isinstance(step, int)
    if not are_numbers or not 0 <= first < min(step, n_pictures):
        raise ArgumentError(
            f"`shard` must be (i, k) with 0 <= i < k, and i below the {n_pictures} pictures of "
            f"`data`, got {shard!r}.",
            "shard",
        )
    return range(first, n_pictures, step)
