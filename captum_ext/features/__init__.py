"""Feature visualisation: preferred inputs of units, and the patches that activate them most."""

from captum_ext.features._activating_patches import ActivatingPatches
from captum_ext.features._top_activations import TopActivations
from captum_ext.features.activation_maximization import ActivationMaximization, PreferredInputs
from captum_ext.features.patches import maximally_activating_patches

__all__ = [
    "ActivatingPatches",
    "ActivationMaximization",
    "PreferredInputs",
    "TopActivations",
    "maximally_activating_patches",
]
