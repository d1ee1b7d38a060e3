"""Feature visualisation: what the units of a network look for."""

__all__: list[str] = []
