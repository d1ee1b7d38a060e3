"""Feature visualisation: what the units of a network look for."""

from captum_ext.features.activation_maximization import ActivationMaximization, PreferredInputs

__all__ = ["ActivationMaximization", "PreferredInputs"]
