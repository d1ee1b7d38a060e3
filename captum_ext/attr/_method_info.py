"""Facts about a method, from which the command line and the tables are made."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from captum_ext._repr import options_repr
from captum_ext.attr._arguments import refuse_constructor_habits

Family = Literal["activation", "gradient", "masking", "learned"]


@dataclass(frozen=True)
class Paper:
    """The source of a method."""

    authors: str
    year: int
    url: str = ""


class MethodInfo:
    """Base of our attribution methods, with facts for the tables and the command line.

    Attributes:
        title: the method's name as its paper writes it; in lower case, with hyphens for spaces, it
            is the name on the command line.
        paper: the source.
        family: the source of the weights: "activation" (nothing but the activations, and weights of
            the model), "gradient", "masking" (scores of perturbed inputs), or "learned" (a decoder
            that was trained).
        passes: forward passes for one image, K for the number of the layer's channels.
        needs_gradients: False where `attribute` works inside `torch.inference_mode`.
        zero_is_neutral: False where a map's smallest value, and not 0, stands for "no evidence".
    """

    title: ClassVar[str]
    paper: ClassVar[Paper]
    family: ClassVar[Family]
    passes: ClassVar[str] = "1"
    needs_gradients: ClassVar[bool] = False
    zero_is_neutral: ClassVar[bool] = True

    if not TYPE_CHECKING:  # it would hide the constructors' arguments

        def __new__(cls, *args, **kwargs):
            refuse_constructor_habits(cls, kwargs)
            return super().__new__(cls)

    def __repr__(self) -> str:
        return options_repr(self)
