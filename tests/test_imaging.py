"""Image operations against closed forms, torch, torchvision, NumPy and Kornia."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kornia.filters import gaussian_blur2d
from torch.nn import functional as F

from captum_ext.imaging import blur, lay_over, min_max, percentile, resize, warp

D = torch.float64


@given(dims=st.integers(1, 3), size=st.integers(1, 9), new=st.integers(1, 20))
def test_resizing_keeps_constants_and_ramps_in_range(dims: int, size: int, new: int) -> None:
    flat = torch.full((1, 2, *[size] * dims), 3.5, dtype=D)
    torch.testing.assert_close(
        resize(flat, [new] * dims), flat.new_full((1, 2, *[new] * dims), 3.5)
    )
    x = torch.rand(1, 2, *[size] * dims, dtype=D)
    y = resize(x, [new] * dims)
    assert y.min() >= x.min() - 1e-12
    assert y.max() <= x.max() + 1e-12


def test_resize_is_linear_between_pixel_centres() -> None:
    x = torch.arange(4.0, dtype=D).reshape(1, 1, 4)
    assert resize(x, [8])[0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert resize(x, [7], align_corners=True)[0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert resize(x, [4]) is x


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest", "nearest-exact", "area"])
def test_resize_of_images_equals_torchs(mode: str, dtype: torch.dtype, autocast: bool) -> None:
    """Kornia gives the same bits in each mode, for odd sizes, up, down and to one pixel."""
    linear = mode in ("bilinear", "bicubic")
    for size, new in (((7, 5), (13, 9)), ((13, 9), (7, 5)), ((6, 8), (3, 20)), ((4, 4), (1, 1))):
        for channels_last in (False, True):
            x = torch.randn(2, 3, *size, dtype=D).to(dtype)
            x = x.to(memory_format=torch.channels_last) if channels_last else x
            for align in (False, True) if linear else (None,):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    result = resize(x, new, mode, bool(align))
                    theirs = F.interpolate(x, size=new, mode=mode, align_corners=align)
                theirs = theirs.to(dtype) if linear else theirs
                assert result.dtype == theirs.dtype
                assert torch.equal(result, theirs)


def test_import_does_not_load_kornia() -> None:
    code = "import sys, captum_ext.imaging; print('kornia' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_antialias_equals_torchvisions() -> None:
    from torchvision.transforms.functional import resize as theirs

    x = torch.rand(1, 3, 40, 30, dtype=D)
    torch.testing.assert_close(resize(x, (13, 11), antialias=True), theirs(x, [13, 11]))


def test_lay_over_moves_units_off_the_centres_of_cells() -> None:
    x = torch.rand(2, 1, 4, 3, dtype=D)
    torch.testing.assert_close(lay_over(x, (12, 9), (1e-12, 0.0)), resize(x, (12, 9)))
    # An offset of a whole pixel moves the map, and its edge is repeated.
    moved = lay_over(x, (12, 9), (2.0, -1.0))
    torch.testing.assert_close(moved[..., 2:, :-1], resize(x, (12, 9))[..., :-2, 1:])
    torch.testing.assert_close(moved[..., :2, :-1], moved[..., 2:3, :-1].expand(-1, -1, 2, -1))
    # A ramp over units at 32 i, as in a ResNet, is the ramp of the pixels between them.
    ramp = torch.arange(7, dtype=D).reshape(1, 1, 1, 7) * 32
    result = lay_over(ramp, (1, 224), (0.0, -15.5))[0, 0, 0]
    torch.testing.assert_close(result[:193], torch.arange(193, dtype=D))
    assert (result[193:] == 192).all()


@given(size=st.integers(1, 40), q=st.floats(0, 100), ties=st.booleans())
def test_percentile_equals_numpys(size: int, q: float, ties: bool) -> None:
    x = torch.rand(2, 1, size, 3, dtype=D)
    x = (x * 4).round() if ties else x
    expected = np.percentile(x.numpy(), q, axis=(2, 3), keepdims=True)
    torch.testing.assert_close(percentile(x, q), torch.from_numpy(expected))


def test_warp_moves_a_point_by_the_matrix() -> None:
    x = torch.zeros(1, 1, 7, 9, dtype=D)
    x[0, 0, 2, 3] = 1  # (x, y) = (3, 2)
    quarter = torch.tensor([[[0.0, 1, 1], [-1, 0, 7], [0, 0, 1]]], dtype=D)  # to (3, 4)
    for mode in ("bilinear", "nearest"):
        moved = warp(x, quarter, mode)
        torch.testing.assert_close(moved.nonzero()[:, 2:], torch.tensor([[4, 3]]))
        torch.testing.assert_close(moved.sum(), torch.tensor(1.0, dtype=D))
    half = torch.eye(3, dtype=D)[None].clone()
    half[0, 0, 2] = 0.5
    assert warp(x, half)[0, 0, 2, 3:5].tolist() == pytest.approx([0.5, 0.5])
    inverse = warp(warp(x, quarter), torch.linalg.inv(quarter))
    torch.testing.assert_close(inverse, x)


def test_warp_fills_pixels_from_outside() -> None:
    x = torch.arange(1.0, 9.0, dtype=D).reshape(1, 2, 2, 2)
    right = torch.eye(3)[None].clone()
    right[0, 0, 2] = 1.5
    assert warp(x, right)[0, 0].tolist() == [[0, 0.5], [0, 1.5]]
    assert warp(x, right, fill="border")[0, 0].tolist() == [[1, 1], [3, 3]]
    colour = torch.tensor([10.0, 20.0], dtype=D).reshape(2, 1, 1)
    assert warp(x, right, fill=colour)[0, 1].tolist() == [[20, 12.5], [20, 13.5]]
    assert warp(x, right, fill=4.0)[0, 0].tolist() == [[4, 2.5], [4, 3.5]]
    with pytest.raises(ValueError, match="`fill` must be one of"):
        warp(x, right, fill="mirror")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.long, torch.bool])
@pytest.mark.parametrize("shape", [(2, 1, 5, 6), (2, 3, 1, 4), (1, 1, 4, 1)])
def test_warp_by_the_identity_changes_nothing(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.rand(shape) * 1000).to(dtype)
    for mode in ("bilinear", "nearest"):
        moved = warp(x, torch.eye(3, dtype=D)[None], mode)
        assert moved.dtype == dtype
        assert torch.equal(moved, x)


def test_resize_raises_for_wrong_modes_and_sizes() -> None:
    with pytest.raises(ValueError, match="`mode` must be one of"):
        resize(torch.zeros(1, 1, 4), [8], "lanczos")
    for x, size, mode in (
        (torch.zeros(1, 1, 4), [8], "bicubic"),
        (torch.zeros(1, 1, 4, 4), [8], "bilinear"),
        (torch.zeros(1, 1), [], "bilinear"),
        (torch.zeros(1, 1, 4, 4), [0, 8], "bilinear"),
    ):
        with pytest.raises(ValueError, match="cannot be resized"):
            resize(x, size, mode)


@pytest.mark.parametrize(("kernel", "sigma"), [(51, 50.0), (5, 1.3)])
def test_blur_equals_kornias(kernel: int, sigma: float) -> None:
    x = torch.randn(2, 3, 60, 40, dtype=D)
    expected = gaussian_blur2d(x, (kernel, kernel), (sigma, sigma), "reflect")
    torch.testing.assert_close(blur(x, kernel, sigma), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "mode"), [(2, "edge"), (3, "edge"), (4, "reflect"), (5, "reflect")]
)
def test_blur_reflects_the_border_where_the_tensor_is_large_enough(size: int, mode: str) -> None:
    """A kernel of 7 pixels reaches 3 beyond the border; reflection needs 4 pixels for that."""
    x = torch.randn(size, dtype=D)
    weights = np.exp(-(np.arange(-3.0, 4.0) ** 2) / (2 * 1.5**2))
    padded = np.pad(x.numpy(), 3, mode=mode)
    expected = np.convolve(padded, weights / weights.sum(), mode="valid")
    torch.testing.assert_close(blur(x[None, None], 7, 1.5)[0, 0], torch.from_numpy(expected))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_blur_keeps_the_sum_of_an_impulse_and_takes_small_inputs(dims: int) -> None:
    x = torch.zeros(1, 1, *[15] * dims, dtype=D)
    x[(0, 0, *[7] * dims)] = 1
    y = blur(x, 7, 1.0)
    weights = torch.exp(-(torch.arange(-3.0, 4.0, dtype=D) ** 2) / 2)
    centre = (weights[3] / weights.sum()) ** dims
    torch.testing.assert_close(y[(0, 0, *[7] * dims)], centre)
    torch.testing.assert_close(y.sum(), torch.tensor(1.0, dtype=D))
    tiny = torch.full((1, 2, *[2] * dims), 4.0, dtype=D)
    torch.testing.assert_close(blur(tiny), tiny)
    with pytest.raises(ValueError, match="`kernel_size` must be odd"):
        blur(x, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_min_max_scales_each_map_to_0_1(dtype: torch.dtype) -> None:
    x = torch.tensor([[[-2.0, 0.0, 2.0], [7.0, 7.0, 7.0]]], dtype=dtype)
    assert min_max(x).tolist() == [[[0, 0.5, 1], [0, 0, 0]]]
    assert min_max(3 * x + 1).tolist() == [[[0, 0.5, 1], [0, 0, 0]]]
    if dtype == torch.float16:
        assert min_max(torch.tensor([[[-6e4, 6e4, 0.0]]], dtype=dtype)).tolist() == [[[0, 1, 0.5]]]
    nan = torch.tensor([[[float("nan"), 1.0]]], dtype=dtype)
    assert min_max(nan).isnan().any(), "rubbish in is not turned into a map"
