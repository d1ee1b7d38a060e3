"""The layouts of the data sets' tests, for the damage that the fuzz does to them."""

from tests.datasets.test_coco import coco
from tests.datasets.test_folders import cub, open_images, photographs, voc, wsol

__all__ = ["coco", "cub", "open_images", "photographs", "voc", "wsol"]
