"""The largest activations equal those of a sort, in any order, in parts, and with ties."""

import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_ext.features import TopActivations

N_IMAGES = 5000


def quantised(n: int = N_IMAGES, channels: int = 3) -> Tensor:
    """Activations of six values, so that nearly all are ties; one channel is 0 everywhere."""
    maps = torch.randint(-2, 4, (n, channels, 3, 5)).double() / 2
    maps[:, -1] = 0
    return maps


def everything_sorted(maps: Tensor, n: int, per_image: int) -> tuple[Any, Any, Any]:
    """The result by Python's own sort, first of each image, then of all."""
    values, indices, positions = [], [], []
    width = maps.shape[3]
    for channel in maps.unbind(1):
        entries = []
        for index, cells in enumerate(channel.flatten(1).tolist()):
            best = sorted((-value, cell) for cell, value in enumerate(cells))[:per_image]
            entries += [(value, index, cell) for value, cell in best]
        best = sorted(entries)[:n]
        values.append([-value for value, _, _ in best])
        indices.append([index for _, index, _ in best])
        positions.append([[cell // width, cell % width] for _, _, cell in best])
    return values, indices, positions


def seen(top: TopActivations) -> tuple[Any, Any, Any]:
    return top.values.tolist(), top.indices.tolist(), top.positions.tolist()


def fed(
    maps: Tensor, batch_size: int = 64, indices: Tensor | None = None, **options: int
) -> TopActivations:
    top = TopActivations(**options)
    indices = torch.arange(len(maps)) if indices is None else indices
    for at in indices.split(batch_size):
        top.update(maps[at], at)
    return top


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize(("n", "per_image"), [(9, 1), (20, 3), (40, 100)])
def test_top_activations_equal_a_sort_of_all(batch_size: int, n: int, per_image: int) -> None:
    maps = quantised()
    result = seen(fed(maps, batch_size, n=n, per_image=per_image))
    assert result == everything_sorted(maps, n, per_image)


def test_a_flat_channel_gives_the_first_images() -> None:
    top = fed(torch.zeros(30, 1, 2, 2), n=4)
    assert seen(top) == ([[0.0] * 4], [[0, 1, 2, 3]], [[[0, 0]] * 4])
    assert fed(torch.zeros(30, 1, 2, 2), n=4, per_image=3).indices.tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("per_image", [1, 3])
def test_the_order_of_images_does_not_matter(per_image: int) -> None:
    maps, options = quantised(200), {"n": 9, "per_image": per_image}
    expected = everything_sorted(maps, 9, per_image)
    assert seen(fed(maps, 7, torch.randperm(200), **options)) == expected
    assert seen(fed(maps, 7, torch.arange(199, -1, -1), **options)) == expected


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("per_image", [1, 3])
@pytest.mark.parametrize("n_images", [5, 31])
def test_parts_are_merged_and_repeated_images_count_once(
    n_images: int, per_image: int, ties: bool
) -> None:
    maps = quantised(n_images) if ties else torch.rand(n_images, 2, 3, 5)
    options = {"n": 9, "per_image": per_image}
    expected = everything_sorted(maps, 9, per_image)
    # Four processes, whose sampler repeats some images to make the parts equal.
    indices = torch.cat([torch.arange(n_images), torch.arange(4), torch.arange(5)])
    parts = [fed(maps, 1, indices[i::4], **options) for i in range(4)]
    top = TopActivations(**options)
    for part in reversed(parts):
        before = seen(part)
        top.merge(part)
        assert seen(part) == before
    top.merge(TopActivations(**options))
    assert seen(top) == expected


def test_repeated_images_that_differ_by_rounding_count_once() -> None:
    maps = torch.tensor([[[[1.0, 1.0 - 1e-7]]], [[[0.5, 0.5]]]])
    top = fed(maps, n=3)
    top.update(maps[:1].flip(3), torch.tensor([0]))
    assert top.indices.tolist() == [[0, 1]]
    assert top.positions.tolist() == [[[0, 0], [0, 0]]]


def test_a_collector_goes_on_from_its_state() -> None:
    maps = quantised(100)
    top = TopActivations(5, 2)
    for at in torch.arange(100).split(9):
        file = io.BytesIO()
        torch.save(top.state_dict(), file)
        file.seek(0)
        top = TopActivations.from_state_dict(torch.load(file, weights_only=True))
        top.update(maps[at], at)
    assert seen(top) == everything_sorted(maps, 5, 2)


def test_a_state_is_a_copy() -> None:
    maps = torch.rand(8, 2, 3, 3)
    top = fed(maps, n=3)
    state, before = top.state_dict(), seen(top)
    top.update(maps + 1, torch.arange(8, 16))
    assert seen(TopActivations.from_state_dict(state)) == before != seen(top)


def test_fewer_images_than_n_give_fewer_activations() -> None:
    assert seen(TopActivations()) == ([], [], [])
    maps = torch.tensor([[[[3.0, 5.0]]], [[[4.0, 4.0]]]])
    assert seen(fed(maps, n=9)) == ([[5.0, 4.0]], [[0, 1]], [[[0, 1], [0, 0]]])
    two = fed(maps, n=9, per_image=7)
    assert two.values.tolist() == [[5.0, 4.0, 4.0, 3.0]]
    assert two.indices.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_activations_may_have_any_dtype(dtype: torch.dtype) -> None:
    maps = torch.randn(50, 2, 4, 4).to(dtype)
    top = fed(maps, 8, n=6, per_image=2)
    assert seen(top) == everything_sorted(maps, 6, 2)
    assert top.values.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_the_state_does_not_grow_with_the_images() -> None:
    top, sizes = TopActivations(4), []
    for i in range(50):
        top.update(torch.rand(8, 3, 6, 6), torch.arange(8 * i, 8 * i + 8))
        held = [x for x in vars(top).values() if isinstance(x, Tensor)]
        sizes.append(sum(x.untyped_storage().nbytes() for x in held))
    assert len(set(sizes)) == 1
    assert sizes[0] == 3 * 4 * (4 + 8)


def test_the_activations_are_not_changed() -> None:
    maps = torch.rand(4, 2, 3, 3, requires_grad=True)
    before = maps.detach().clone()
    top = fed(maps, n=5, per_image=4)
    assert torch.equal(maps, before)
    assert not top.values.requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    maps = torch.rand(4, 2, 3, 3)
    maps[2, 1, 0, 1] = maps[3, 0, 0, 0] = value
    top = fed(torch.rand(4, 2, 3, 3))
    before = seen(top)
    with pytest.raises(ValueError, match="of 2 images are not finite; the first has the index 12"):
        top.update(maps, torch.arange(10, 14))
    assert seen(top) == before


@pytest.mark.parametrize(
    ("maps", "indices", "message"),
    [
        (torch.rand(2, 3, 4), torch.arange(2), "`activations` must be (B, C, h, w) of floats"),
        (torch.ones(2, 3, 4, 4).long(), torch.arange(2), "`activations` must be (B, C, h, w)"),
        (torch.rand(0, 3, 4, 4), torch.arange(0), "`activations` must be (B, C, h, w)"),
        (torch.rand(2, 3, 4, 4), torch.arange(3), "`indices` must be int64 and (2,)"),
        (torch.rand(2, 3, 4, 4), torch.tensor([0.0, 1.0]), "`indices` must be int64 and (2,)"),
        (torch.rand(2, 3, 4, 4), torch.tensor([1, 1]), "`indices` must differ"),
        (torch.rand(2, 3, 4, 4), torch.tensor([1, -1]), "`indices` must differ and be 0 or more"),
        (torch.rand(2, 4, 4, 4), torch.arange(2), "have 4 channels of (4, 4), but earlier ones"),
        (torch.rand(2, 3, 4, 5), torch.arange(2), "of (4, 5), but earlier ones had 3 of (4, 4)"),
    ],
)
def test_invalid_activations_and_indices_are_refused(
    maps: Tensor, indices: Tensor, message: str
) -> None:
    top = fed(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match=re.escape(message)):
        top.update(maps, indices)


def test_invalid_collectors_and_merges_are_refused() -> None:
    for options in ({"n": 0}, {"n": 2.0}, {"per_image": 0}, {"per_image": True}):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            TopActivations(**options)
    top = fed(torch.rand(2, 3, 4, 4), n=3)
    with pytest.raises(
        ValueError, match="keeps 4 activations, 1 of an image; this collector keeps 3, 1"
    ):
        top.merge(TopActivations(4))
    with pytest.raises(ValueError, match="3 channels of \\(4, 5\\)"):
        top.merge(fed(torch.rand(2, 3, 4, 5), n=3))


@pytest.mark.gpu
def test_top_activations_are_equal_on_cpu_and_gpu() -> None:
    maps = quantised(300)
    for dtype in (torch.float32, torch.bfloat16):
        top = TopActivations(9, 2)
        for at in torch.arange(300).split(64):
            top.update(maps[at].to("cuda", dtype), at)
        assert top.values.is_cuda
        assert seen(top) == everything_sorted(maps, 9, 2)
    top.merge(TopActivations.from_state_dict(top.state_dict()))
    assert seen(top) == everything_sorted(maps, 9, 2)


def test_places_is_the_old_name_of_indices() -> None:
    top, maps = TopActivations(n=1), torch.rand(2, 1, 2, 2)
    with pytest.deprecated_call(match="`places` is now `indices`"):
        top.update(maps, places=torch.tensor([4, 5]))
    with pytest.deprecated_call(match="`places` is now `indices`"):
        assert torch.equal(top.places, top.indices)
