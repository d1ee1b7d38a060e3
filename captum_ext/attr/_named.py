"""What our attributions have in common that are no layer methods."""


class Named:
    """Goes by the name of its class; gives no futures, as most of Captum's own do not."""

    @classmethod
    def get_name(cls) -> str:
        return cls.__name__

    def attribute_future(self) -> None:
        raise NotImplementedError(f"attribute_future is not implemented for {self.get_name()}.")
