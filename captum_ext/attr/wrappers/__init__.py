"""Wrappers around any Captum attribution."""

from captum_ext.attr.wrappers.augmented_sr import AugmentedSR
from captum_ext.attr.wrappers.sess import SESSWrapper
from captum_ext.attr.wrappers.upsample import UpsampleWrapper

__all__ = ["AugmentedSR", "SESSWrapper", "UpsampleWrapper"]
