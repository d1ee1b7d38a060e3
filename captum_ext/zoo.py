"""Models and photographs by name, and the layer of a model to explain.

`load_model` and `load_image` need no download where they are called without arguments: the demo's
network and photograph come with the extra `demo`, `pip install "captum_ext[demo]"`.
"""

import io
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_ext import demo
from captum_ext._checks import closest, first_line
from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.modules import find_module
from captum_ext._errors import InputError as InputError
from captum_ext._tensor_files import find_damage, is_complete
from captum_ext.attr import (
    channels_last_to_first,
    suggest_layer,
    suggest_reshape_transform,
    tokens_to_grid,
)
from captum_ext.attr.layer.base import ReshapeTransform

if TYPE_CHECKING:
    from PIL.Image import Image

_LONGEST_SIDE = 4  # times the shorter side; the centre crop never contains more
_NESTED = ("state_dict", "model_state_dict", "model")
# torchvision renames these keys of the published DenseNets as it loads them.
_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


# --- photographs ----------------------------------------------------------------------------------


def load_image(path: str | Path | None = None) -> "Image":
    """The image at `path`, upright and in RGB; None is scikit-image's cup of coffee.

    Every mode is converted: transparency is laid on white, 16 bits become 8, and floats in [0, 1]
    are shares of white. Other integers and floats are stretched from their smallest to their
    largest value, with a warning. Formats are PNG, JPEG, BMP, GIF, TIFF, WebP, PPM, JPEG 2000 and
    AVIF.

    Raises:
        InputError: a file that is missing, no image, or of more than 50 megapixels (checked before
            the image is decoded); None without scikit-image.
    """
    from captum_ext._data.files import read_upright, unreadable_message

    if path is None:
        return demo.coffee_photograph()
    try:
        return read_upright(path)
    except OSError as error:
        message = str(error) if error.errno is None else unreadable_message(path, error)
        raise InputError(message) from error


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """A classifier's input from a PIL image: shorter side resized, centre crop, normalised.

    Equal to torchvision's `ImageClassification` preset, except for images more than four times as
    long as they are wide: their ends, which the crop drops, are dropped before the resizing.

    Attributes:
        resize: the shorter side, in pixels.
        crop: the side of the crop, in pixels.
        mean: of each channel of an image in [0, 1].
        std: of each channel of an image in [0, 1].
        interpolation: "bilinear" or "bicubic".
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def view(self, image: "Image") -> "Image":
        """The resized and cropped image that the network sees, (crop, crop)."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import center_crop
        from torchvision.transforms.functional import resize as resize_image

        from captum_ext._data.modes import to_rgb

        mode = InterpolationMode(self.interpolation)
        image = _without_ends(to_rgb(image))
        view: Image = center_crop(resize_image(image, [self.resize], mode), [self.crop])
        return view

    def __call__(self, image: "Image") -> Tensor:
        """The network's input, (1, 3, crop, crop) in float32."""
        from torchvision.transforms.functional import normalize, to_tensor

        x: Tensor = normalize(to_tensor(self.view(image)), self.mean, self.std)
        return x[None]


def _without_ends(image: "Image") -> "Image":
    shorter = min(image.size)
    # An even number of pixels is cut off, so that the centre stays the same.
    width, height = (min(side, _LONGEST_SIDE * shorter + side % 2) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A classifier with its preprocessing, its classes' names and the layer to explain.

    Attributes:
        name: the name that `load_model` knows.
        module: the network in eval mode; it gives logits.
        preprocess: makes the module's input from a PIL image.
        categories: the classes' names, or their indices where no names are known.
        layer: the name of the layer to explain.
        reshape_transform: turns the layer's activations into maps; None where they are maps.
    """

    name: str
    module: Module
    preprocess: Preprocess
    categories: tuple[str, ...]
    layer: str
    reshape_transform: ReshapeTransform | None = None

    def __post_init__(self) -> None:
        self.module.eval()

    def __repr__(self) -> str:
        network, n = type(self.module).__name__, len(self.categories)
        return f"LoadedModel({self.name!r}, {network}, {n} classes, layer={self.layer!r})"

    def class_index(self, name: str) -> int:
        """The index of a class from its index in digits, or its name in any case.

        Raises:
            InputError: an index out of range, an unknown name, or a name of several classes.
        """
        n = len(self.categories)
        if re.fullmatch(r"[+-]?\d{1,18}", name):
            if 0 <= int(name) < n:
                return int(name)
            raise InputError(f"the target {name} is not a class: {self.name} has 0 to {n - 1}")
        matches = [i for i, known in enumerate(self.categories) if known.lower() == name.lower()]
        exact = [i for i in matches if self.categories[i] == name]
        if len(exact or matches) == 1:
            return (exact or matches)[0]
        if matches:
            several = ", ".join(f"{i} ({self.categories[i]})" for i in matches)
            raise InputError(f"the target {name!r} is the name of {several}: give the index")
        raise InputError(
            f"unknown target {name!r}. Closest: {closest(name.lower(), self.categories)}; or "
            f"give an index from 0 to {n - 1}"
        )


def model_names() -> tuple[str, ...]:
    """The names that `load_model` knows: the demo's network and torchvision's classifiers."""
    import torchvision.models

    return (demo.DEMO_MODEL, *torchvision.models.list_models(module=torchvision.models))


def load_model(name: str = demo.DEMO_MODEL, weights: str | Path | None = None) -> LoadedModel:
    """A trained ImageNet classifier, ready to be explained.

    Args:
        name: "efficientnet-lite0", whose weights come with the extra `demo`, or a classifier of
            torchvision, whose published weights are downloaded.
        weights: a file with a state dict to load instead, or with a checkpoint that contains one;
            it may come from a DataParallel. Its last layer decides the number of classes.

    Raises:
        InputError: an unknown name; weights that are missing, do not fit or cannot be downloaded;
            the extra `demo` is not installed.

    Example:
        >>> model = load_model()  # doctest: +SKIP
        >>> model.module(model.preprocess(load_image())).shape  # doctest: +SKIP
        torch.Size([1, 1000])
    """
    name, names = name.lower(), model_names()
    if name not in names:
        raise InputError(
            f"unknown model {name!r}. Closest: {closest(name, names)}; torchvision's classifiers "
            f"and {demo.DEMO_MODEL} are known"
        )
    state = None if weights is None else read_weights(weights)
    load = _load_efficientnet_lite0 if name == demo.DEMO_MODEL else _load_torchvision
    module, preprocess, categories = load(name, state, f"the weights file {str(weights)!r}")
    # Convolutions on a CPU are up to four times as fast in this order.
    module = module.eval().to(memory_format=torch.channels_last)
    return LoadedModel(
        name,
        module,
        preprocess,
        categories,
        suggest_layer(module),
        suggest_reshape_transform(module),
    )


_State = Mapping[str, Tensor]
_Parts = tuple[Module, Preprocess, tuple[str, ...]]


def _load_efficientnet_lite0(name: str, state: _State | None, origin: str) -> _Parts:
    if state is None:
        origin = str(demo.efficientnet_weights())
        state = read_weights(origin)
    net, n = _with_weights(name, demo.original_efficientnet, state, origin)
    preprocess = Preprocess(256, 224, (0.498,) * 3, (0.502,) * 3, "bicubic")
    return demo.plain_efficientnet(net), preprocess, _categories(n)


def _load_torchvision(name: str, state: _State | None, origin: str) -> _Parts:
    from torchvision.models import get_model, get_model_weights

    published = get_model_weights(name).DEFAULT
    preset = published.transforms()
    preprocess = Preprocess(
        preset.resize_size[0],
        preset.crop_size[0],
        tuple(preset.mean),
        tuple(preset.std),
        preset.interpolation.value,
    )
    if state is None:
        origin, state = "the published weights", _download(name, published)
    if name.startswith("densenet"):
        state = {_OLD_DENSENET_KEY.sub(r"\1\2", key): value for key, value in state.items()}
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options = {"image_size": preprocess.crop}
    if name in ("googlenet", "inception_v3"):
        # As torchvision builds them for its published weights.
        auxiliary = any(key.lower().startswith("aux") for key in state)
        options = {"aux_logits": auxiliary, "transform_input": True, "init_weights": False}
    net, n = _with_weights(
        name, lambda n: get_model(name, weights=None, num_classes=n, **options), state, origin
    )
    return net, preprocess, _categories(n)


def _categories(n: int) -> tuple[str, ...]:
    """The names of the 1000 classes of ImageNet; of another number of classes, their indices."""
    from torchvision.models import ResNet50_Weights

    if n == 1000:
        return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    return tuple(str(i) for i in range(n))


# --- the weights ---------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file or in the checkpoint there, without DataParallel's prefix.

    Raises:
        InputError: no file, a damaged one, or no state dict in it; code in the file is never run.
    """
    if not Path(path).is_file():
        raise InputError(f"the weights file {str(path)!r} does not exist or is not a file")
    with Path(path).open("rb") as file:
        damage = find_damage(file) if zipfile.is_zipfile(file) else ""
        if damage:
            raise InputError(f"the weights file {str(path)!r} is damaged: {damage}")
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types for files of other formats
            raise _no_weights(path) from error
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise _no_weights(path)
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise _no_weights(path)
    strange = [key for key, value in content.items() if not is_complete(value)]
    if strange:
        raise InputError(f"{strange[0]!r} in {str(path)!r} is not a dense tensor of real numbers")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    state = OrderedDict((key.removeprefix(prefix), value) for key, value in content.items())
    # The versions of the modules, without which torchvision refuses MNASNet's weights.
    versions = getattr(content, "_metadata", {})
    vars(state)["_metadata"] = {
        f"{key}.".removeprefix(prefix).rstrip("."): value for key, value in versions.items()
    }
    return state


def _no_weights(path: str | Path) -> InputError:
    return InputError(
        f"{str(path)!r} is not a file of weights: save one by torch.save(model.state_dict(), FILE)"
    )


def _download(name: str, published: Any) -> dict[str, Tensor]:
    progress = sys.stderr.isatty()
    try:
        with nullcontext() if progress else redirect_stdout(io.StringIO()):
            state: dict[str, Tensor] = published.get_state_dict(
                progress=progress, check_hash=True, map_location="cpu", weights_only=True
            )
    except Exception as error:  # the network, the disk, a broken file in the cache
        raise InputError(
            f"the published weights of {name} cannot be downloaded ({first_line(error)}): fetch "
            f"{published.url} elsewhere and give the file as `weights` (--weights FILE)"
        ) from error
    return state


def _with_weights(
    name: str, build: Callable[[int], Module], state: _State, origin: str
) -> tuple[Module, int]:
    """The network with the weights `state`, and the number of classes that they have."""
    net = build(1000)
    head = list(net.state_dict())[-1]
    n = len(state[head]) if head in state and state[head].dim() else 1000
    try:
        if n != 1000:
            with torch.device("meta"):  # a wrong number of classes may need any memory
                net = build(n)
            expected = net.state_dict()
            if any(state[key].shape != expected[key].shape for key in expected.keys() & state):
                raise ValueError("other shapes")
            net = build(n)
        net.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{origin} does not fit the model {name} ({_misfit(net, state, error)}): name the "
            f"model that it was saved from"
        ) from error
    return net, n


def _misfit(net: Module, state: _State, error: Exception) -> str:
    """The first difference between a network and weights that it refused."""
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    for key in (key for key in expected if not key.endswith("num_batches_tracked")):
        if key not in shapes:
            return f"it has no {key!r}"
        if shapes[key] != expected[key]:
            return f"{key!r} has the shape {shapes[key]}, not {expected[key]}"
    unknown = [key for key in shapes if key not in expected]
    return f"the model has no {unknown[0]!r}" if unknown else first_line(error)


# --- layers --------------------------------------------------------------------------------------


def probabilities(loaded: LoadedModel, x: Tensor) -> Tensor:
    """The softmax of the model's output for one input (1, 3, H, W): (classes,), on the CPU.

    Raises:
        InputError: an output that is not finite.
    """
    with torch.no_grad():
        shares: Tensor = loaded.module(x)[0].float().softmax(0).cpu()
    if not bool(torch.isfinite(shares).all()):
        raise InputError(f"the output of {loaded.name} is not finite: its weights are broken")
    return shares


def find_layer(
    loaded: LoadedModel, x: Tensor, name: str | None = None
) -> tuple[str, ReshapeTransform | None]:
    """The layer called `name`, and the `reshape_transform` that its activation needs.

    Args:
        loaded: the model.
        x: an input of it, (1, 3, H, W): the layer is run once to see its activation's shape.
        name: None is the model's own.

    Raises:
        InputError: an unknown layer, or one whose activation is no map.
    """
    if name is None or name == loaded.layer:
        return loaded.layer, loaded.reshape_transform
    try:
        layer = find_module(loaded.module, name)
        capture = LayerCapture(loaded.module, [layer], traces_channels=True)
        activation = capture.activations((x,))[0][0][0]
    except (ValueError, TypeError) as error:
        raise InputError(str(error).replace("`layer`", "the layer")) from error
    if activation.dim() not in (3, 4):
        raise InputError(
            f"the layer {name!r} gives the shape {tuple(activation.shape)}, which is no map: name "
            f"one in front of it, such as {loaded.layer}"
        )
    try:
        capture.check_channels(x)
    except ValueError as error:
        if capture.channel_dims[0][0] != frozenset({activation.dim() - 1}):
            raise InputError(str(error).replace("`layer`", "the layer")) from error
        return name, tokens_to_grid if activation.dim() == 3 else channels_last_to_first
    return name, None
