"""Overlap and total variation of masks, by hand and against other libraries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kornia.losses import total_variation as kornia_variation
from torch import Tensor
from torchmetrics.functional.classification import binary_jaccard_index
from torchmetrics.functional.image import total_variation as torchmetrics_variation

from captum_ext.metrics import mask_iou, total_variation

D = torch.float64

# --- overlap -------------------------------------------------------------------------------------


def masks(*pictures: str) -> Tensor:
    """Masks from rows of "#" and ".", separated by spaces."""
    return torch.tensor([[[cell == "#" for cell in row] for row in p.split()] for p in pictures])


def test_the_overlap_by_hand() -> None:
    predicted = masks("##.. ##..", "#### ....", "#... ....", "#### ####")
    true = masks(".##. .##.", "#### ....", "...# ....", "..## ....")
    ious = mask_iou(predicted, true)
    assert ious.tolist() == pytest.approx([2 / 6, 1, 0, 2 / 8])
    torch.testing.assert_close(mask_iou(true[:, None], predicted), ious)


def test_the_overlap_of_two_empty_masks_is_zero() -> None:
    nothing, something = torch.zeros(1, 3, 4).bool(), torch.ones(1, 3, 4).bool()
    assert mask_iou(nothing, nothing).tolist() == [0]
    assert mask_iou(nothing, something).tolist() == [0]
    assert mask_iou(something, something).tolist() == [1]


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_the_overlap_equals_torchmetrics(height: int, width: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.rand(2, 4, 1, height, width, generator=generator) < share
    for predicted, true, iou in zip(*pair, mask_iou(*pair), strict=True):
        expected = binary_jaccard_index(predicted.int(), true.int())
        assert iou.item() == pytest.approx(expected.nan_to_num().item())


def test_wrong_masks_are_named() -> None:
    mask = torch.ones(2, 4, 5).bool()
    for wrong in (mask.float(), mask.int()):
        with pytest.raises(TypeError, match=f"`predicted` must be bool, got {wrong.dtype}"):
            mask_iou(wrong, mask)
        with pytest.raises(TypeError, match=f"`true` must be bool, got {wrong.dtype}"):
            mask_iou(mask, wrong)
    for shape in ((4, 5), (2, 3, 4, 5), (2, 0, 5)):
        with pytest.raises(ValueError, match=r"`true` must be \(B, H, W\)"):
            mask_iou(mask, torch.ones(shape).bool())
    for shape in ((1, 4, 5), (2, 1, 5, 4)):
        with pytest.raises(ValueError, match="must agree in their number"):
            mask_iou(mask, torch.ones(shape).bool())


# --- total variation -----------------------------------------------------------------------------


def test_the_variation_by_hand() -> None:
    maps = torch.tensor([[[1.0, 2.0, 1.0], [5.0, 1.0, 6.0]]], dtype=D)
    down, across = [4.0, -1.0, 5.0], [1.0, -1.0, -4.0, 5.0]
    assert total_variation(maps).tolist() == [sum(step**2 for step in down + across)] == [85]
    assert total_variation(maps, norm="absolute").tolist() == [21]


@pytest.mark.parametrize("norm", ["squared", "absolute"])
def test_each_pair_of_neighbours_counts_once(norm: str) -> None:
    spike = torch.zeros(2, 5, 6)
    spike[0, 2, 2] = spike[1, 0, 0] = 1  # four neighbours, two neighbours
    assert total_variation(spike, norm).tolist() == [4, 2]
    columns = torch.zeros(1, 5, 6)
    columns[..., ::2] = 1
    assert total_variation(columns, norm).tolist() == [5 * 5]
    # Nothing is divided, and nothing wraps around.
    assert total_variation(columns * 2 - 1, norm).tolist() == [25 * (4 if norm == "squared" else 2)]
    assert total_variation(torch.full((1, 1, 1), 7.0), norm).tolist() == [0]


def test_the_absolute_form_equals_kornia_and_torchmetrics() -> None:
    maps = torch.rand(4, 1, 7, 5, dtype=D)
    absolute = total_variation(maps, "absolute")
    torch.testing.assert_close(absolute, kornia_variation(maps)[:, 0])
    torch.testing.assert_close(absolute, torchmetrics_variation(maps, reduction="none"))
    assert (total_variation(maps) < absolute).all()  # since all steps are below 1


def test_equal_channels_count_once_and_others_are_summed() -> None:
    maps = torch.rand(3, 1, 6, 4, dtype=D)
    torch.testing.assert_close(
        total_variation(maps.repeat(1, 3, 1, 1)), total_variation(maps[:, 0]), rtol=0, atol=0
    )
    channels = torch.rand(3, 2, 6, 4, dtype=D)
    torch.testing.assert_close(total_variation(channels), total_variation(channels.sum(1)))


def test_a_batch_equals_its_maps() -> None:
    maps = torch.randn(5, 3, 9, 11)
    maps[2] = maps[2, :1]
    singles = torch.cat([total_variation(m[None]) for m in maps])
    torch.testing.assert_close(total_variation(maps), singles)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.bool])
def test_all_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    maps = torch.zeros(1, 300, 400)
    maps[..., ::2] = 1
    variation = total_variation(maps.to(dtype))
    assert variation.dtype == torch.float32
    assert variation.item() == 300 * 399


def test_wrong_maps_are_named() -> None:
    with pytest.raises(ValueError, match=r"`norm` must be one of .*got 'l1'"):
        total_variation(torch.rand(1, 3, 4), "l1")
    for shape in ((3, 4), (1, 1, 1, 3, 4), (1, 0, 4), (1, 0, 3, 4)):
        with pytest.raises(ValueError, match=r"`maps` must be \(B, C, H, W\) or \(B, H, W\)"):
            total_variation(torch.zeros(shape))
    for value in (torch.nan, torch.inf):
        maps = torch.rand(2, 3, 4)
        maps[1, 2, 2] = value
        with pytest.raises(ValueError, match="`maps` has values that are not finite"):
            total_variation(maps)


@pytest.mark.gpu
def test_on_the_device() -> None:
    maps = torch.rand(2, 1, 6, 5)
    for call in (total_variation, lambda m: mask_iou(m > 0.3, m > 0.6)):
        values = call(maps.cuda())
        assert values.is_cuda
        torch.testing.assert_close(values.cpu(), call(maps))
