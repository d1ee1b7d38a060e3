"""The methods of the command line, read from the classes; and the command `captum-ext methods`."""

import argparse
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from captum_ext.cli.output import table

if TYPE_CHECKING:
    from captum.attr import Attribution
    from torch import Tensor

    from captum_ext.attr._method_info import Paper
    from captum_ext.attr.layer.base import ReshapeTransform
    from captum_ext.zoo import LoadedModel

BATCH_SIZE = 16  # perturbed inputs in one forward pass: the fastest on a CPU, by a little
# RISE's paper has 8000 masks, which take minutes for each image on a CPU.
MOST_MASKS = 1000
# Methods that explain given features get the cells of a grid. RISE has as many along each side.
GRID = 7
_BEHIND = " of the part behind the layer"
# Methods with these required arguments need other data, or explain a neuron and not a class.
_UNKNOWN_ARGUMENTS = {"baselines", "neuron_selector"}
_LEFT_OUT = {
    "FeaturePermutation": "swaps features with those of other images in the batch",
    "LayerFeaturePermutation": "likewise",
    "ShapleyValues": "n features take n! passes",
}


@dataclass(frozen=True)
class Method:
    """A method of the command line: facts from its class, and the arguments of the commands.

    Attributes:
        cls: an attribution class of `captum_ext.attr` or of `captum.attr`, which is made of a
            model, or of a model and a layer.
    """

    cls: "type[Attribution]"

    @property
    def is_ours(self) -> bool:
        """True for a class of this package, False for one of Captum's."""
        return hasattr(self.cls, "title")

    @property
    def title(self) -> str:
        """The method's name in pictures."""
        return str(getattr(self.cls, "title", self.cls.__name__))

    @property
    def name(self) -> str:
        """The method's name on the command line."""
        return self.title.lower().replace(" ", "-") if self.is_ours else kebab(self.title)

    @property
    def at_layer(self) -> bool:
        """True if the method explains a layer, False if it explains the model as a whole."""
        return "layer" in self.options

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of the constructor."""
        return parameters_of(self.cls)

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of `attribute`."""
        return parameters_of(self.cls.attribute)

    @property
    def required(self) -> list[str]:
        """The arguments of `attribute` that have no default, besides the inputs."""
        return required_of(self.cls.attribute)[2:]  # without `self` and `inputs`

    @property
    def family(self) -> str:
        """The source of the weights; see `captum_ext.attr._method_info.MethodInfo`."""
        from captum.attr import GradientAttribution, PerturbationAttribution

        if self.is_ours:
            return str(self.cls.family)
        if issubclass(self.cls, GradientAttribution):
            return "gradient"
        return "masking" if issubclass(self.cls, PerturbationAttribution) else ""

    @property
    def needs_gradients(self) -> bool:
        return bool(getattr(self.cls, "needs_gradients", self.family == "gradient"))

    @property
    def zero_is_neutral(self) -> bool:
        """True if 0 stands for "no evidence" in a map, False if the map's smallest value does."""
        return bool(getattr(self.cls, "zero_is_neutral", True))

    @property
    def passes(self) -> str:
        """Forward passes for an image, K for the number of the layer's channels."""
        if "n_masks" in self._fixed_arguments():
            return str(MOST_MASKS)
        return str(getattr(self.cls, "passes", "")).replace(_BEHIND, "*").replace(" + ", "+")

    @property
    def paper(self) -> "Paper | None":
        """The source; None for Captum's methods, whose classes do not say."""
        return getattr(self.cls, "paper", None)

    @property
    def caption(self) -> str:
        """The method's name and year in pictures."""
        return f"{self.title} ({self.paper.year})" if self.paper else self.title

    @property
    def expected_errors(self) -> tuple[type[Exception], ...]:
        """The errors that the method raises on a model that it cannot explain.

        Captum's methods raise many types.
        """
        return (ValueError, RuntimeError, AssertionError) if self.is_ours else (Exception,)

    def attribution(
        self, loaded: "LoadedModel", layer: str, reshape_transform: "ReshapeTransform | None"
    ) -> "Attribution":
        """The attribution object of a model, at a layer if it explains one."""
        import torch

        from captum_ext.attr import UpsampleWrapper
        from captum_ext.attr._plain_gradients import warn_of_plain_gradients

        options: dict[str, Any] = {}
        if "generator" in self.options:
            options["generator"] = torch.Generator().manual_seed(0)
        if not self.at_layer:
            attribution: Attribution = self.cls(loaded.module, **options)
            warn_of_plain_gradients(attribution)
            return attribution
        module = loaded.module.get_submodule(layer)
        if "reshape_transform" in self.options:
            options["reshape_transform"] = reshape_transform
        cam = self.cls(loaded.module, module, **options)
        if reshape_transform is None or "reshape_transform" in self.options:
            return cam
        return UpsampleWrapper(cam, reshape_transform=reshape_transform)

    def attribute_arguments(self, x: "Tensor", batch_size: int = BATCH_SIZE) -> dict[str, Any]:
        """The arguments with which the commands call `attribute`.

        Args:
            x: an input, (1, C, H, W), of the size of all inputs.
            batch_size: inputs in one pass of a method that would take all at once.
        """
        arguments = self._fixed_arguments() | self.batching(batch_size)
        if "feature_mask" in self.arguments:
            arguments["feature_mask"] = grid_cells(x)
        return arguments

    def _fixed_arguments(self) -> dict[str, Any]:
        """Arguments that do not depend on the input: papers rectify, and masks are limited."""
        arguments: dict[str, Any] = {}
        if "relu_attributions" in self.arguments:
            arguments["relu_attributions"] = True
        masks = self.arguments.get("n_masks")
        if masks is not None and masks.default > MOST_MASKS:
            arguments["n_masks"] = MOST_MASKS
        return arguments

    def batching(self, batch_size: int = BATCH_SIZE) -> dict[str, Any]:
        """The argument that says how many perturbed inputs a forward pass has, if there is one."""
        # Captum's LayerFeatureAblation mixes targets up where a pass has several perturbations.
        if "perturbations_per_eval" in self.arguments and (self.is_ours or not self.at_layer):
            return {"perturbations_per_eval": BATCH_SIZE}
        internal = self.arguments.get("internal_batch_size")
        return {"internal_batch_size": batch_size} if internal and internal.default is None else {}


def kebab(name: str) -> str:
    """A class name in lower case with hyphens: "InputXGradient" is "input-x-gradient"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function, or of a class's constructor, by name."""
    return inspect.signature(function).parameters


def required_of(function: Callable[..., Any]) -> list[str]:
    """The names of the parameters that must be given."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in parameters_of(function).items()
        if parameter.default is parameter.empty and parameter.kind not in variadic
    ]


def grid_cells(x: "Tensor") -> "Tensor":
    """The number of each pixel's cell in a grid of `GRID` x `GRID`, (1, 1, H, W)."""
    import torch

    row, column = (
        torch.arange(side, device=x.device) * min(GRID, side) // side for side in x.shape[2:]
    )
    columns = min(GRID, x.shape[3])
    return (row[:, None] * columns + column)[None, None]


# --- the list ------------------------------------------------------------------------------------


def all_methods() -> tuple[Method, ...]:
    """Our methods, those of a layer first, and then Captum's, by their names.

    A method is a public attribution class that is made of a model, or of a model and a layer, and
    that explains a target. Left out are classes of Captum that need other images or baselines, that
    explain a neuron, or that would never end.
    """
    import captum.attr

    import captum_ext.attr
    from captum_ext.attr._method_info import Family

    def order(method: Method) -> tuple[Any, ...]:
        if method.paper is None:
            return True, method.name
        family = get_args(Family).index(method.family)
        return False, not method.at_layer, family, method.paper.year, method.name

    classes = {
        cls: None
        for module in (captum_ext.attr, captum.attr)
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, captum.attr.Attribution)
    }
    return tuple(sorted((Method(cls) for cls in classes if _is_method(cls)), key=order))


def _is_method(cls: "type[Attribution]") -> bool:
    if inspect.isabstract(cls) or cls.__name__ in _LEFT_OUT or not hasattr(cls, "attribute"):
        return False
    method = Method(cls)
    if "target" not in method.arguments or _UNKNOWN_ARGUMENTS & {*method.required}:
        return False
    # Captum calls the model `forward_func`, or `model` where it must be a module.
    model, *others = required_of(cls)
    return model in ("forward_func", "model") and others in ([], ["layer"])


def default_methods() -> tuple[Method, ...]:
    """The methods that run where none is named: ours at a layer, which take seconds."""
    return tuple(method for method in all_methods() if method.is_ours and method.at_layer)


def find_methods(
    names: Sequence[str] | None, image: str | None = None, at_layer: bool = False
) -> tuple[Method, ...]:
    """The methods with these names or class names; None is the default ones.

    Upper and lower case, hyphens and underscores make no difference.

    Args:
        names: of methods.
        image: the argument in front of the names, which a hint is about where it is missing.
        at_layer: know only methods that explain a layer.

    Raises:
        InputError: an unknown name.
    """
    if names is None:
        return default_methods()
    methods = [method for method in all_methods() if method.at_layer or not at_layer]
    by_key = {name_key(method.cls.__name__): method for method in methods}
    by_key |= {name_key(method.name): method for method in methods}
    for name in names:
        if name_key(name) not in by_key:
            from captum_ext._checks import closest
            from captum_ext._errors import InputError

            hint = "; an IMAGE goes in front of --method" if image is None else ""
            raise InputError(
                f"unknown method {name!r}. Closest: "
                f"{closest(name.lower(), [method.name for method in methods])}{hint}"
            )
    return tuple(dict.fromkeys(by_key[name_key(name)] for name in names))


def name_key(name: str) -> str:
    """The name without upper case, hyphens and underscores, to compare names."""
    return name.lower().replace("-", "").replace("_", "")


# --- the command ---------------------------------------------------------------------------------


def add_command(commands: Any) -> None:
    """Add `methods` to the subparsers of the command line."""
    parser = commands.add_parser(
        "methods",
        help="list the methods by which the other commands explain images",
        description="List the methods by which the other commands explain images: this package's, "
        "and then Captum's.",
    )
    parser.set_defaults(run=print_methods)


def print_methods(arguments: argparse.Namespace) -> None:
    """Run `captum-ext methods`."""
    methods = all_methods()
    ours = [("method", "class", "family", "grad", "passes", "paper")]
    captums = [("method of Captum", "class", "family", "grad", "of")]
    for method in methods:
        gradients = "yes" if method.needs_gradients else "no"
        row = (method.name, method.cls.__name__, method.family, gradients)
        if method.paper:
            ours.append((*row, method.passes, f"{method.paper.authors} {method.paper.year}"))
        else:
            captums.append((*row, "a layer" if method.at_layer else "the model"))
    on_request = ", ".join(m.name for m in methods if m.is_ours and not m.at_layer)
    print(table(ours))
    print(
        "\ngrad: the method needs gradients. passes: forward passes for one image, with K the\n"
        "number of the layer's channels; *: only the part of the model behind the layer runs K\n"
        f"times. {on_request}: they explain the model as a whole, and run only if they are named.\n"
    )
    print(table(captums))
    print(
        "\nCaptum's methods run only if they are named. Those that remove features of the image\n"
        f"remove the cells of a grid of {GRID} x {GRID}."
    )
