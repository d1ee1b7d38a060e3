"""Metrics of attributions: plain functions, and torchmetrics classes over them."""

from captum_ext.metrics.localization import (
    EnergyPointingGame,
    PointingGame,
    boxes_to_masks,
    energy_pointing_game,
    masks_to_boxes,
    pointing_game,
)
from captum_ext.metrics.masks import mask_iou, total_variation
from captum_ext.metrics.wsol import MaxBoxAcc, PxAP, box_ious

__all__ = [
    "EnergyPointingGame",
    "MaxBoxAcc",
    "PointingGame",
    "PxAP",
    "box_ious",
    "boxes_to_masks",
    "energy_pointing_game",
    "mask_iou",
    "masks_to_boxes",
    "pointing_game",
    "total_variation",
]
