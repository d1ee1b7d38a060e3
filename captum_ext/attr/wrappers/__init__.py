"""Wrappers around any Captum attribution: one file for each.

Each import below makes a name public, here and in `captum_ext.attr`; the command line reads the
rest from the classes.
"""

from typing import TYPE_CHECKING

from captum_ext.attr.wrappers.augmented_sr import AugmentedSR as AugmentedSR
from captum_ext.attr.wrappers.sess import SESSWrapper as SESSWrapper
from captum_ext.attr.wrappers.upsample import UpsampleWrapper as UpsampleWrapper

if not TYPE_CHECKING:  # a type checker reads the imports; for it, unknown names stay errors
    __all__ = sorted(
        name
        for name, value in globals().items()
        if getattr(value, "__module__", "").startswith(__name__)
    )
