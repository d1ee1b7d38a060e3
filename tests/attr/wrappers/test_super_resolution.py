"""The operators against their definitions; the solvers against closed forms and each other."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_ext.attr.wrappers import super_resolution
from captum_ext.attr.wrappers.super_resolution import (
    Observation,
    Solution,
    cell_weights,
    euclidean,
    solve,
)
from captum_ext.imaging import warp

D = torch.float64
DOUBLE = torch.zeros((), dtype=D)
DOWNSAMPLES = ("area", "bilinear", "gaussian", "legacy")


def average(size: tuple[int, int]) -> Any:
    return partial(F.adaptive_avg_pool2d, output_size=size)


def identity(x: Tensor) -> Tensor:
    return x


def random_transforms(
    copies: int, size: tuple[int, int], angle: float = 0.3, shift: float = 0.13, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random angles and shifts; the first copy is the image."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(copies, 3, generator=generator, dtype=D) * 2 - 1
    draws[0] = 0
    return draws[:, 0] * angle, draws[:, 1:] * shift * torch.tensor(size[::-1])


def random_warps(copies: int, size: tuple[int, int], **options: Any) -> Tensor:
    return euclidean(*random_transforms(copies, size, **options), size)


def translations(shifts: list[tuple[float, float]], size: tuple[int, int]) -> Tensor:
    return euclidean(torch.zeros(len(shifts), dtype=D), torch.tensor(shifts, dtype=D), size)


def blobs(size: int) -> Tensor:
    """Three smoothed discs of different heights, (1, size, size)."""
    y, x = torch.meshgrid(*[(torch.arange(size, dtype=D) + 0.5) / size] * 2, indexing="ij")
    discs = ((0.36, 0.40, 0.10, 1.0), (0.62, 0.66, 0.07, 0.8), (0.66, 0.32, 0.05, 0.6))
    return torch.stack(
        [
            a * torch.sigmoid((r - ((y - v) ** 2 + (x - u) ** 2).sqrt()) / 0.008)
            for v, u, r, a in discs
        ]
    ).amax(0, keepdim=True)


def psnr(result: Tensor, truth: Tensor) -> float:
    return float(10 * torch.log10(truth.max() ** 2 / (result - truth).square().mean()))


def gram(observation: Observation) -> Tensor:
    """K^T K, as a matrix."""
    n = observation.size[0] * observation.size[1]
    columns = observation(torch.eye(n, dtype=D).reshape(n, *observation.size))
    matrix = columns.transpose(0, 1).reshape(n, -1)
    return matrix @ matrix.mT


# --- A -------------------------------------------------------------------------------------------


def test_a_bright_pixel_moves_by_angle_and_shift() -> None:
    h = torch.zeros(1, 9, 9, dtype=D)
    h[0, 4, 6] = 1  # right of the centre
    quarter = torch.tensor([math.pi / 2, 0, 0, math.pi / 2, -math.pi / 2], dtype=D)
    shift = torch.tensor([[0, 0], [2, 0], [0, 2], [1, -1], [0, 0]], dtype=D)
    matrices = euclidean(quarter, shift, (9, 9))
    seen = Observation(matrices, (9, 9), (9, 9), (9, 9), like=DOUBLE, mask=False)(h)
    for copy, pixel in enumerate([(2, 4), (4, 8), (6, 6), (1, 5), (6, 4)]):
        expected = torch.zeros(9, 9, dtype=D)
        expected[pixel] = 1
        torch.testing.assert_close(seen[copy, 0], expected)


@pytest.mark.parametrize("size", [(12, 12), (9, 16), (2, 11)])
def test_h_is_warped_as_kornia_warps_the_images(size: tuple[int, int]) -> None:
    matrices, h = random_warps(5, size), torch.rand(2, *size, dtype=D)
    seen = Observation(matrices, size, size, size, like=DOUBLE, mask=False)(h)
    expected = warp(h[:, None].repeat(5, 1, 1, 1), matrices.repeat_interleave(2, 0))
    torch.testing.assert_close(seen.flatten(0, 1), expected[:, 0])


def test_two_steps_are_two_interpolations_in_their_order() -> None:
    size = (10, 14)
    angle, shift = random_transforms(4, size)
    steps = [euclidean(angle, 0 * shift, size), euclidean(0 * angle, shift, size)]
    h = torch.rand(1, *size, dtype=D)
    seen = Observation(steps, size, size, size, like=DOUBLE, mask=False)(h)
    expected = warp(warp(h.expand(4, 1, -1, -1), steps[0]), steps[1])
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(steps[1] @ steps[0], euclidean(angle, shift, size))


def test_a_finer_grid_covers_the_same_frame() -> None:
    angle, shift = random_transforms(6, (8, 12))
    coarse = euclidean(angle, shift, (8, 12))
    fine = euclidean(angle, 2 * shift, (16, 24))
    h = torch.rand(1, 16, 24, dtype=D)
    result = Observation(coarse, (8, 12), (16, 24), (4, 6), offset=(0.5, -1), like=DOUBLE)
    expected = Observation(fine, (16, 24), (16, 24), (4, 6), offset=(1, -2), like=DOUBLE)
    assert torch.equal(result.kept, expected.kept)
    torch.testing.assert_close(result(h), expected(h))


# --- D -------------------------------------------------------------------------------------------


def downsampled(
    h: Tensor, downsample: str, cells: tuple[int, int], offset: Any = (0.0, 0.0)
) -> Tensor:
    rows, columns = (
        cell_weights(downsample, h.shape[i + 1], cells[i], float(offset[i])) for i in (0, 1)
    )
    return rows @ h @ columns.mT


def test_cell_weights_of_each_downsample() -> None:
    h = torch.rand(1, 12, 20, dtype=D)
    torch.testing.assert_close(downsampled(h, "area", (3, 5)), F.avg_pool2d(h, 4))
    half_pixel = F.interpolate(h[None], (3, 5), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(downsampled(h, "bilinear", (3, 5)), half_pixel)
    torch.testing.assert_close(downsampled(h, "bilinear", (3, 5)), F.avg_pool2d(h[:, 1:, 1:], 2, 4))
    torch.testing.assert_close(downsampled(h, "legacy", (3, 5)), h[:, ::4, ::4])
    weights, x = cell_weights("gaussian", 96, 6)[2], torch.arange(96.0, dtype=D)
    assert float(weights @ x) == pytest.approx(39.5, abs=1e-3)
    assert float(weights @ (x - 39.5) ** 2) == pytest.approx(8**2, rel=1e-3)
    for downsample in DOWNSAMPLES:
        same = torch.eye(7, dtype=D)
        if downsample != "gaussian":
            torch.testing.assert_close(cell_weights(downsample, 7, 7), same)
        sums = cell_weights(downsample, 11, 4).sum(1)
        torch.testing.assert_close(sums, torch.ones(4, dtype=D))
    thirds = cell_weights("area", 4, 3) * 4
    torch.testing.assert_close(
        thirds, torch.tensor([[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 1, 3]], dtype=D)
    )


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_an_offset_equals_a_moved_image(downsample: str) -> None:
    """An offset of (-2, 3) equals an image that is moved by (2, -3)."""
    h = torch.zeros(1, 32, 32, dtype=D)
    h[:, 4:28, 4:28] = torch.rand(24, 24, dtype=D)
    off, still = (
        downsampled(moved, downsample, (8, 8), offset)
        for moved, offset in ((h, (-2, 3)), (h.roll((2, -3), (1, 2)), (0, 0)))
    )
    # The border cuts off the tails of "gaussian".
    inner = slice(2, -2) if downsample == "gaussian" else slice(None)
    torch.testing.assert_close(off[:, inner, inner], still[:, inner, inner], rtol=0, atol=1e-3)
    ones = downsampled(torch.ones_like(h), "area", (8, 8), (-2, 0))
    assert ones[0, :, 0].tolist() == [0.5, 1, 1, 1, 1, 1, 1, 1]


def test_mask_keeps_cells_that_see_only_the_image() -> None:
    matrices = translations([(0, 0), (4, 0), (3, -4)], (16, 16))
    kept = Observation(matrices, (16, 16), (16, 16), (4, 4), like=DOUBLE).kept[:, 0]
    expected = torch.ones(3, 4, 4, dtype=D)
    expected[1, :, 0] = 0
    expected[2, :, 0] = expected[2, 3] = 0
    assert torch.equal(kept, expected)
    off = Observation(matrices, (16, 16), (16, 16), (4, 4), offset=(-2, 0), like=DOUBLE)
    assert off.kept[0, 0].tolist() == [[0] * 4, *[[1] * 4] * 3]
    assert Observation(matrices, (16, 16), (16, 16), (4, 4), mask=False).kept.all()


# --- K -------------------------------------------------------------------------------------------

SHAPES = [((24, 24), (6, 6), (0, 0)), ((21, 34), (5, 7), (0, 0)), ((17, 30), (4, 3), (-1.5, 2.25))]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("name", [*DOWNSAMPLES, "callable"])
@pytest.mark.parametrize(("size", "cells", "offset"), SHAPES)
def test_transposed_is_the_adjoint(
    name: str, mask: bool, size: Any, cells: Any, offset: Any
) -> None:
    downsample: Any = average(cells) if name == "callable" else name
    angle, shift = random_transforms(7, size)
    two = [euclidean(angle, 0 * shift, size), euclidean(0 * angle, shift, size)]
    for matrices in (euclidean(angle, shift, size), two):
        observe = Observation(
            matrices,
            size,
            size,
            cells,
            downsample=downsample,
            offset=offset,
            mask=mask,
            like=DOUBLE,
        )
        h, q = torch.rand(3, *size, dtype=D), torch.rand(7, 3, *cells, dtype=D)
        transpose = observe.transposed(3)
        for _ in range(2):
            left, right = (observe(h) * q).sum(), (h * transpose(q)).sum()
            assert abs(left - right) <= 1e-10 * abs(left)
            q = q - 0.5
        assert observe.kept.any()
        assert mask != bool(observe.kept.all())


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("name", [*DOWNSAMPLES, "callable"])
def test_majorant_bounds_the_operator(name: str, mask: bool) -> None:
    downsample: Any = average((3, 4)) if name == "callable" else name
    options: Any = {"downsample": downsample, "mask": mask, "like": DOUBLE}
    size = (15, 20)
    observe = Observation(random_warps(12, size), size, size, (3, 4), **options)
    squared = gram(observe)
    above = torch.linalg.eigvalsh(observe.majorant.flatten().diag() - squared)
    assert above.min() > -1e-9
    largest = torch.linalg.matrix_norm(squared, 2)
    assert largest <= observe.majorant.max() <= 1.5 * largest


def test_chunks_and_grids_computed_again_change_nothing(monkeypatch: Any) -> None:
    size, cells = (18, 22), (4, 5)
    maps = torch.rand(9, 2, *cells, dtype=D)

    def solution() -> Solution:
        observe = Observation(random_warps(9, size), size, size, cells, like=DOUBLE)
        return solve(observe, maps, tv=0.01, l2=1e-3, max_iterations=5)

    unchunked = solution()
    monkeypatch.setattr(super_resolution, "_CPU_CHUNK", 2 * 18 * 22)
    torch.testing.assert_close(solution(), unchunked)
    monkeypatch.setattr(super_resolution, "_GRID_BUDGET", 0)
    torch.testing.assert_close(solution(), unchunked)


# --- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["mfista", "condat-vu"])
def test_without_a_prior_a_single_map_is_the_solution(solver: str) -> None:
    matrices, size = torch.eye(3, dtype=D)[None], (6, 7)
    maps = torch.randn(1, 2, *size, dtype=D)
    for downsample in ("area", "legacy", identity):
        observe = Observation(matrices, size, size, size, downsample=downsample, like=DOUBLE)
        options: Any = {"tv": 0.0, "solver": solver, "tolerance": 1e-12, "max_iterations": 200}
        torch.testing.assert_close(solve(observe, maps, l2=0.0, **options).h, maps[0])
        torch.testing.assert_close(solve(observe, maps, l2=0.5, **options).h, maps[0] / 1.5)
        raised = solve(observe, maps, l2=0.5, nonnegative=True, **options).h
        torch.testing.assert_close(raised, maps[0].clamp(min=0) / 1.5)


def test_total_variation_of_two_pixels_brings_them_together() -> None:
    """argmin 1/2 (a - 1)^2 + 1/2 (b - 0)^2 + w |a - b| is (1 - w, w), up to w = 1/2."""
    matrices = torch.eye(3, dtype=D)[None]
    for shape in ((1, 2), (2, 1)):
        observe = Observation(matrices, shape, shape, shape, like=DOUBLE)
        maps = torch.tensor([1.0, 0.0], dtype=D).reshape(1, 1, *shape)
        for w, expected in ((0.0, [1, 0]), (0.2, [0.8, 0.2]), (3.0, [0.5, 0.5])):
            solution = solve(observe, maps, tv=w, l2=0.0, tolerance=0, max_iterations=60)
            assert solution.h.flatten().tolist() == pytest.approx(expected, abs=1e-9)
            assert solution.history.shape[1] < 61, "it notices that it is at the optimum"


@pytest.mark.parametrize("downsample", ["area", "gaussian"])
def test_a_constant_map_gives_a_constant(downsample: str) -> None:
    size = (24, 32)
    observe = Observation(
        random_warps(10, size), size, size, (3, 4), downsample=downsample, like=DOUBLE
    )
    maps = observe(torch.full((1, *size), 0.7, dtype=D))
    solution = solve(observe, maps, tv=0.01, l2=0.0, tolerance=1e-9, max_iterations=300)
    torch.testing.assert_close(solution.h, torch.full_like(solution.h, 0.7), rtol=0, atol=5e-3)
    assert solution.history[0, -1] < 1e-4 * solution.history[0, 0]


@pytest.mark.parametrize("solver", ["mfista", "condat-vu"])
def test_decimations_at_all_shifts_recover_the_image(solver: str) -> None:
    """Shifts (0..s-1)^2 to the right and down: most pixels are read, each exactly once."""
    n, s = 24, 4
    shifts = [(float(i), float(j)) for i in range(s) for j in range(s)]
    options: Any = {"downsample": "legacy", "like": DOUBLE}
    cells = (n // s, n // s)
    observe = Observation(translations(shifts, (n, n)), (n, n), (n, n), cells, **options)
    counts = observe.transposed(1)(observe.kept)
    torch.testing.assert_close(counts, counts.round())
    assert float(counts.mean()) == pytest.approx(0.7656, abs=1e-3)
    truth, start = torch.rand(2, 1, n, n, dtype=D)
    result = solve(observe, observe(truth), tv=0.0, l2=0.0, start=start, solver=solver).h
    torch.testing.assert_close(result, torch.where(counts > 0.5, truth, start))


# --- recovery ------------------------------------------------------------------------------------


def masked_mean(maps: Tensor, matrices: Tensor, size: tuple[int, int]) -> Tensor:
    up = F.interpolate(maps, size, mode="bilinear")
    inverse = torch.linalg.inv(matrices)
    return warp(up, inverse).sum(0) / warp(torch.ones_like(up), inverse).sum(0)


@pytest.mark.parametrize(
    ("noise", "gain"), [pytest.param(0.0, 8.0, marks=pytest.mark.slow), (0.03, 5.0)]
)
def test_a_known_map_is_recovered(noise: float, gain: float) -> None:
    size, cells = (224, 224), (14, 14)
    truth = blobs(224)
    generator = torch.Generator().manual_seed(5)
    matrices = random_warps(64, size)
    observe = Observation(matrices, size, size, cells, mask=False, like=DOUBLE)
    maps = observe(truth)
    maps = maps + noise * torch.randn(maps.shape, generator=generator, dtype=D)
    result = {}
    for copies in (4, 16, 64):
        observe = Observation(matrices[:copies], size, size, cells, like=torch.zeros(()))
        few = maps[:copies].float()
        h = solve(observe, few, tv=2e-4 * copies, l2=2e-5 * copies).h
        result[copies] = psnr(h, truth)
    assert result[4] < result[16] < result[64]
    bicubic = psnr(F.interpolate(maps[:1], size, mode="bicubic")[:, 0], truth)
    assert result[64] >= bicubic + gain
    assert result[64] > psnr(masked_mean(maps, matrices, size), truth) + 3


# --- the solvers ---------------------------------------------------------------------------------


def scene(copies: int = 12, side: int = 48, n: int = 6, **options: Any) -> tuple[Any, Tensor]:
    """K, and noisy maps of two images."""
    size = (side, side)
    observe = Observation(random_warps(copies, size), size, size, (n, n), like=DOUBLE, **options)
    maps = observe(torch.cat([blobs(side), blobs(side).mT.flip(1) * 0.5]))
    generator = torch.Generator().manual_seed(1)
    return observe, maps + 0.03 * torch.randn(maps.shape, generator=generator, dtype=D)


@pytest.mark.parametrize(
    ("strength", "downsample"),
    [
        (2e-4, "area"),
        (1e-3, "legacy"),
        pytest.param(2e-4, "legacy", marks=pytest.mark.slow),
        pytest.param(1e-3, "area", marks=pytest.mark.slow),
    ],
)
def test_mfista_comes_near_the_optimum_in_few_steps(downsample: str, strength: float) -> None:
    observe, maps = scene(downsample=downsample)
    weights = {"tv": strength * 12, "l2": strength * 1.2}
    reference = solve(observe, maps, solver="condat-vu", max_iterations=2500, **weights)
    optimum = reference.history[:, -1]
    result = solve(observe, maps, **weights)
    assert (result.history.diff(dim=1) <= 0).all()
    assert (result.history[:, -1] <= 1.02 * optimum).all()
    official = solve(observe, maps, solver="adam", **weights)
    assert (result.history[:, -1] <= official.history[:, -1]).all()
    # The history has the values of F.
    for solution in (reference, result, official):
        assert solution.history.shape[0] == 2
        dx, dy = solution.h.diff(dim=2).abs(), solution.h.diff(dim=1).abs()
        f = ((observe(solution.h) - maps * observe.kept) ** 2).sum((0, 2, 3)) / 2
        f = f + weights["tv"] * (dx.sum((1, 2)) + dy.sum((1, 2)))
        f = f + weights["l2"] / 2 * (solution.h**2).sum((1, 2))
        torch.testing.assert_close(solution.history[:, -1], f)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_mfista_is_within_a_hundredth_in_fifteen_steps(nonnegative: bool) -> None:
    observe, maps = scene(32, 112, 7)
    options: Any = {"tv": 32 * 2e-4, "l2": 32 * 2e-5, "nonnegative": nonnegative, "tolerance": 0}
    long = solve(observe, maps, max_iterations=120, **options)
    within = long.history <= 1.01 * long.history[:, -1:]
    assert within[:, 15].all()
    assert bool((long.h < -1e-3).any()) != nonnegative


def test_adam_is_torchs() -> None:
    observe, maps = scene()
    start = torch.rand(2, 48, 48, dtype=D)
    h = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([h], lr=1e-3)
    for _ in range(20):
        optimiser.zero_grad()
        misfit = (observe(h) - maps * observe.kept).square().sum() / 2
        variation = h.diff(dim=1).abs().sum() + h.diff(dim=2).abs().sum()
        (misfit + 0.01 * variation + 0.002 / 2 * h.square().sum()).backward()
        optimiser.step()
    result = solve(observe, maps, tv=0.01, l2=0.002, solver="adam", start=start, max_iterations=20)
    torch.testing.assert_close(result.h, h.detach(), rtol=1e-6, atol=1e-9)
    assert result.history.shape == (2, 21)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_duality_gap_bounds_the_error_and_closes(nonnegative: bool) -> None:
    observe, maps = scene()
    options: Any = {"tv": 0.012, "l2": 0.012, "nonnegative": nonnegative, "tolerance": 0}
    optimum = solve(observe, maps, max_iterations=400, **options).history[:, -1]
    solution = solve(observe, maps, max_iterations=60, gap=True, **options)
    assert solution.gap is not None
    gap = solution.gap[:, 1:]
    assert (gap >= solution.history[:, 1:] - optimum[:, None] - 1e-9).all()
    assert (gap.diff(dim=1) <= 0).all()
    assert (gap[:, -1] <= 0.01 * solution.history[:, -1]).all()


@pytest.mark.parametrize("solver", ["mfista", "condat-vu", "adam"])
def test_a_batch_equals_its_images_and_scaled_maps_scale_h(solver: str) -> None:
    observe, maps = scene()
    maps = torch.cat([maps, 0 * maps[:, :1]], 1)
    options: Any = {"tv": 0.01, "l2": 1e-3, "solver": solver, "max_iterations": 25}
    options["tolerance"] = 1e-2
    batch = solve(observe, maps, **options)
    steps = []
    for i in range(3):
        alone = solve(observe, maps[:, i : i + 1], **options)
        steps.append(alone.history.shape[1])
        torch.testing.assert_close(batch.h[i], alone.h[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            batch.history[i, [*range(steps[i]), -1]], alone.history[0, [*range(steps[i]), -1]]
        )
    assert not batch.h[2].any()
    if solver == "mfista":
        assert len(set(steps)) == 3, "each stops when it is done"
        assert max(steps) == batch.history.shape[1]
        scaled = solve(observe, 8 * maps, **{**options, "tv": 0.08})
        torch.testing.assert_close(scaled.h[:2], 8 * batch.h[:2], rtol=1e-6, atol=1e-9)


def test_single_precision_and_inference_mode_leave_the_callers_tensors() -> None:
    observe, maps = scene()
    expected = solve(observe, maps, tv=0.01, l2=1e-3, tolerance=0, max_iterations=10)
    single = Observation(
        random_warps(12, (48, 48)), (48, 48), (48, 48), (6, 6), like=torch.zeros(())
    )
    start, few = torch.zeros(2, 48, 48), maps.float()
    before = few.clone()
    with torch.inference_mode():
        inferred = few.clone()
        result = solve(
            single, inferred, tv=0.01, l2=1e-3, start=start, tolerance=0, max_iterations=10
        )
    assert result.h.dtype == torch.float32
    torch.testing.assert_close(result.h.double(), expected.h, rtol=0, atol=1e-3)
    assert torch.equal(few, before)
    assert not start.any()
    assert not result.h.requires_grad
    assert torch.is_grad_enabled()


def test_without_kept_cells_h_is_zero() -> None:
    far = translations([(100, 0)], (8, 8))
    observe = Observation(far, (8, 8), (8, 8), (2, 2), like=DOUBLE)
    assert not observe.kept.any()
    solution = solve(observe, torch.rand(1, 1, 2, 2, dtype=D), tv=0.1, l2=0.0)
    assert not solution.h.any()


def test_wrong_options_raise() -> None:
    observe, maps = scene()
    for options, message in (
        ({"solver": "sgd"}, "`solver` must be one of"),
        ({"solver": "adam", "nonnegative": True}, "`nonnegative`"),
        ({"solver": "adam", "gap": True}, "`gap`"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(observe, maps, tv=0.1, l2=0.1, **options)
    with pytest.raises(ValueError, match="`downsample` must be 'area'"):
        cell_weights("nearest", 4, 2)
    with pytest.raises(ValueError, match=r"`downsample` must turn .* got \(1, 1, 8, 8\)"):
        Observation(random_warps(1, (8, 8)), (8, 8), (8, 8), (2, 2), downsample=identity)


@pytest.mark.gpu
def test_a_gpu_gives_the_values_of_a_cpu() -> None:
    observe, maps = scene()
    expected = solve(observe, maps, tv=0.01, l2=1e-3, gap=True)
    size, warps = (48, 48), random_warps(12, (48, 48)).cuda()
    observe_on_gpu = Observation(warps, size, size, (6, 6), like=DOUBLE.cuda())
    for solver in ("mfista", "condat-vu", "adam"):
        options: Any = {"tv": 0.01, "l2": 1e-3, "solver": solver, "max_iterations": 30}
        result = solve(observe_on_gpu, maps.cuda(), **options)
        torch.testing.assert_close(result.h.cpu(), solve(observe, maps, **options).h)
    result = solve(observe_on_gpu, maps.cuda(), tv=0.01, l2=1e-3, gap=True)
    torch.testing.assert_close(result.history.cpu(), expected.history)
