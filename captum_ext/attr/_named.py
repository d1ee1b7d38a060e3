"""Base of our attributions that are not layer methods."""

from captum_ext.attr._method_info import MethodInfo


class Named(MethodInfo):
    """Has the name of its class, and no futures, like most of Captum's own methods."""

    @classmethod
    def get_name(cls) -> str:
        return cls.__name__

    def attribute_future(self) -> None:
        raise NotImplementedError(f"attribute_future is not implemented for {self.get_name()}.")
