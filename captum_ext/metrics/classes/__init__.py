"""The torchmetrics classes over the functions, which add up sums over batches and processes.

Each file has the classes over the functions of its namesake. `captum_ext.metrics` imports this
package, and torchmetrics with it, when a class is first used.
"""
# ruff: noqa: F403 (each file lists its public names in `__all__`; a new file needs one line here)

from captum_ext.metrics.classes.confidence import *
from captum_ext.metrics.classes.curves import *
from captum_ext.metrics.classes.localization import *
from captum_ext.metrics.classes.pixels import *
from captum_ext.metrics.classes.road import *
from captum_ext.metrics.classes.wsol import *
