"""The methods by their names, and the command `captum-ext methods`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from captum_ext.cli.output import table

if TYPE_CHECKING:
    from captum.attr import Attribution

    from captum_ext.attr.layer.base import ReshapeTransform
    from captum_ext.zoo import LoadedModel

PERTURBATIONS_PER_EVAL = 16  # the fastest on a CPU, by a little


@dataclass(frozen=True)
class Method:
    """One method of the command line.

    Attributes:
        name: on the command line.
        title: in the picture.
        class_name: in `captum_ext.attr`, or in `captum.attr` for Captum's own.
        family: "gradient", "masking" or "other".
        gradients: whether it needs gradients.
        passes: forward passes for an image; K is the number of the layer's channels.
        authors: of the paper.
        year: of the paper.
        rectify: whether `attribute` is asked for the positive part, as the papers do.
        seeded: whether it draws noise from a `generator`.
        at_layer: whether it is of a layer; else of the model alone.
        n_masks: how many are asked for, of a method that takes any number.
        has_zero: whether its values below zero speak against the target; else the smallest value
            is the zero of the picture.
    """

    name: str
    title: str
    class_name: str
    family: str
    gradients: bool
    passes: str
    authors: str
    year: int
    rectify: bool = True
    seeded: bool = False
    at_layer: bool = True
    n_masks: int | None = None
    has_zero: bool = True


# fmt: off
METHODS = (
    Method("cam", "CAM", "LayerClassActivationMap", "other", False,
           "1", "Zhou et al.", 2016),
    Method("grad-cam", "Grad-CAM", "LayerGradCam", "gradient", True,
           "1", "Selvaraju et al.", 2017),
    Method("grad-cam++", "Grad-CAM++", "LayerGradCamPlusPlus", "gradient", True,
           "1", "Chattopadhay et al.", 2018),
    Method("smooth-grad-cam++", "Smooth Grad-CAM++", "LayerSmoothGradCamPlusPlus", "gradient", True,
           "26", "Omeiza et al.", 2019, seeded=True),
    Method("sharpen-focus", "Sharpen Focus", "LayerSharpenFocus", "gradient", True,
           "1", "Wang et al.", 2019),
    Method("xgrad-cam", "XGrad-CAM", "LayerXGradCam", "gradient", True,
           "1", "Fu et al.", 2020),
    Method("hires-cam", "HiResCAM", "LayerHiResCam", "gradient", True,
           "1", "Draelos and Carin", 2020),
    Method("layer-cam", "LayerCAM", "LayerCam", "gradient", True,
           "1", "Jiang et al.", 2021),
    Method("eigen-cam", "Eigen-CAM", "LayerEigenCam", "other", False,
           "1", "Muhammad and Yeasin", 2020),
    Method("score-cam", "Score-CAM", "LayerScoreCam", "masking", False,
           "1 + K", "Wang et al.", 2020),
    Method("ablation-cam", "Ablation-CAM", "LayerAblationCam", "masking", False,
           "1 + K*", "Desai and Ramaswamy", 2020),
    Method("group-cam", "Group-CAM", "LayerGroupCam", "masking", True,
           "34", "Zhang et al.", 2021, rectify=False),
)
ON_REQUEST = (  # each takes as long as many of the others
    Method("rise", "RISE", "RISE", "masking", False,
           "1000", "Petsiuk et al.", 2018, rectify=False, at_layer=False, n_masks=1000,
           has_zero=False),
)
# fmt: on


def add_command(commands: Any) -> None:
    """Add `methods` to the subparsers of the command line."""
    commands.add_parser("methods", help="list the methods").set_defaults(run=methods)


def methods(arguments: argparse.Namespace) -> None:
    """Run `captum-ext methods`."""
    rows = [("method", "class", "family", "grad", "passes", "paper")]
    for one in (*METHODS, *ON_REQUEST):
        needed = "yes" if one.gradients else "no"
        paper = f"{one.authors} {one.year}"
        rows.append((one.name, one.class_name, one.family, needed, one.passes, paper))
    print(table(rows))
    print(
        "\ngrad: whether gradients are needed. passes: forward passes for an image, where K is\n"
        "the number of the layer's channels; * of the part behind the layer only. "
        f"{', '.join(one.name for one in ON_REQUEST)}:\n"
        "of the model, whatever its layers, and run where it is named only."
    )


def find_methods(
    names: Sequence[str] | None, image: str | None = None, at_layer: bool = False
) -> tuple[Method, ...]:
    """The methods with these names, in any case; None is all of a layer.

    Args:
        names: of methods.
        image: what was given before the names.
        at_layer: know those of a layer only.

    Raises:
        InputError: an unknown name.
    """
    among = METHODS if at_layer else (*METHODS, *ON_REQUEST)
    known = {_key(method.name): method for method in among}
    for name in names or ():
        if _key(name) not in known:
            from captum_ext._checks import closest
            from captum_ext._errors import InputError

            hint = "; an IMAGE goes in front of --method" if image is None else ""
            raise InputError(
                f"unknown method {name!r}. Closest: "
                f"{closest(name.lower(), [method.name for method in among])}{hint}"
            )
    return tuple(dict.fromkeys(known[_key(name)] for name in names)) if names else METHODS


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def arguments_of(method: Method) -> dict[str, Any]:
    """What its `attribute` is called with."""
    found: dict[str, Any] = {}
    if method.rectify:
        found["relu_attributions"] = True
    if method.family == "masking":
        found["perturbations_per_eval"] = PERTURBATIONS_PER_EVAL
    if method.n_masks is not None:
        found["n_masks"] = method.n_masks
    return found


def attribution(
    method: Method,
    loaded: "LoadedModel",
    layer: str,
    reshape_transform: "ReshapeTransform | None",
) -> "Attribution":
    """The method's attribution object.

    Grad-CAM is Captum's own where it can read the layer.
    """
    import captum.attr
    import torch

    import captum_ext.attr

    if not method.at_layer:
        return getattr(captum_ext.attr, method.class_name)(loaded.module)
    if method.name == "grad-cam" and reshape_transform is None:
        return captum.attr.LayerGradCam(loaded.module, loaded.module.get_submodule(layer))
    options: dict[str, Any] = {"reshape_transform": reshape_transform}
    if method.name == "grad-cam":
        return captum_ext.attr.LayerTokenGradCam(loaded.module, layer, **options)
    if method.seeded:
        options["generator"] = torch.Generator().manual_seed(0)
    return getattr(captum_ext.attr, method.class_name)(loaded.module, layer, **options)
