"""The base class of the wrappers."""

from captum.attr import Attribution

from captum_ext._errors import ArgumentTypeError
from captum_ext._repr import bounded_repr
from captum_ext.attr._mixin import AttributionMixin
from captum_ext.attr._plain_gradients import warn_of_plain_gradients


class BaseWrapper(AttributionMixin, Attribution):
    """Base of the attributions that are made of those of another method.

    Args:
        attribution_method: an instance of any attribution class of Captum or of this package.

    Raises:
        TypeError: `attribution_method` is not an attribution.
    """

    def __init__(self, attribution_method: Attribution) -> None:
        if not isinstance(attribution_method, Attribution):
            raise ArgumentTypeError(
                f"`attribution_method` must be an instance of a Captum attribution class, got "
                f"{bounded_repr(attribution_method)}: such as "
                f"{type(self).__name__}(LayerGradCam(model, model.layer4))."
            )
        super().__init__(attribution_method.forward_func)
        self.attribution_method = attribution_method
        warn_of_plain_gradients(attribution_method)

    @property
    def multiplies_by_inputs(self) -> bool:
        return bool(self.attribution_method.multiplies_by_inputs)
