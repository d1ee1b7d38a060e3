"""Metrics of attributions: plain functions, and torchmetrics classes over them."""

from captum_ext.metrics.boxes import (
    best_box_iou,
    box_from_map,
    boxes_to_masks,
    center_gaussian,
    in_top_k,
    masks_to_boxes,
)
from captum_ext.metrics.confidence import (
    AverageDrop,
    IncreaseInConfidence,
    average_drop,
    increase_in_confidence,
)
from captum_ext.metrics.curves import (
    Curve,
    Deletion,
    Insertion,
    Overall,
    OverallScore,
    deletion,
    insertion,
    overall_score,
)
from captum_ext.metrics.localization import (
    EnergyPointingGame,
    PointingGame,
    energy_pointing_game,
    pointing_game,
)
from captum_ext.metrics.masks import mask_iou, total_variation
from captum_ext.metrics.pixels import PxAP, PxIoU, pixel_counts, pixel_iou
from captum_ext.metrics.road import Road, RoadScores, linear_imputation, road
from captum_ext.metrics.wsol import MaxBoxAcc, box_ious

__all__ = [
    "AverageDrop",
    "Curve",
    "Deletion",
    "EnergyPointingGame",
    "IncreaseInConfidence",
    "Insertion",
    "MaxBoxAcc",
    "Overall",
    "OverallScore",
    "PointingGame",
    "PxAP",
    "PxIoU",
    "Road",
    "RoadScores",
    "average_drop",
    "best_box_iou",
    "box_from_map",
    "box_ious",
    "boxes_to_masks",
    "center_gaussian",
    "deletion",
    "energy_pointing_game",
    "in_top_k",
    "increase_in_confidence",
    "insertion",
    "linear_imputation",
    "mask_iou",
    "masks_to_boxes",
    "overall_score",
    "pixel_counts",
    "pixel_iou",
    "pointing_game",
    "road",
    "total_variation",
]
