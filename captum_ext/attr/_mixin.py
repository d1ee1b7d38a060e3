"""The part that our attributions other than layer methods have in common."""

from captum_ext.attr._method_info import MethodInfo


class AttributionMixin(MethodInfo):
    """Names a method by its class, and refuses futures, like most of Captum's own methods."""

    @classmethod
    def get_name(cls) -> str:
        return cls.__name__

    def attribute_future(self) -> None:
        raise NotImplementedError(f"attribute_future is not implemented for {self.get_name()}.")
