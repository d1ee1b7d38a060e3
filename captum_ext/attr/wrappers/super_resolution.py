r"""The inverse problem of Augmented Grad-CAM: one fine map from many coarse ones.

One map h (H, W) explains the maps g_l (n, m) of L warped copies of an image:

    min_h  F(h) = 1/2 sum_l ||W_l^(1/2) (D A_l h - g_l)||^2 + lambda TV(h) + mu/2 ||h||^2    (1)

A_l warps h as the l-th copy was warped (bilinear, zeros outside), D lowers it to the cells of a
map, W_l keeps the cells that saw only pixels of the image, and TV(h) = sum |h_x| + |h_y| with
forward differences. The maps of a batch are solved together, and do not influence each other.

`Observation` is K = W^(1/2) D A, and `solve` minimises (1). Everything runs in torch, on the device
and in the precision of the maps, without random numbers.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_ext._engine.precision import without_autocast
from captum_ext._engine.state import set_inference_mode
from captum_ext._errors import ArgumentError
from captum_ext._repr import fields_repr

Downsample = str | Callable[[Tensor], Tensor]
Size = tuple[int, int]
Edges = tuple[Tensor, Tensor]

SOLVERS = {"mfista": 30, "condat-vu": 1000, "adam": 200}
"""The solvers, and the default of the most iterations of each."""

_INNER_STEPS = 100
_POWER_STEPS = 30
_FLOOR = 0.01
_GRID_BUDGET = 2**27  # numbers; larger grids are computed again in every iteration
_CPU_CHUNK = 2**19  # pixels: what stays in the cache is twice as fast as all copies at once
_CHUNK = 2**22


# --- the operators -------------------------------------------------------------------------------


def euclidean(angle: Tensor, shift: Tensor, size: Size) -> Tensor:
    """Rotation about the image's centre, then translation, as in the authors' code.

    M = T(dx, dy) C R(angle) C^-1, C the translation by ((W-1)/2, (H-1)/2). It maps pixels (x, y) of
    the image to those of its warped copy, as in Kornia's `warp_affine`.

    Args:
        angle: (L,), in radians, counter-clockwise in the picture.
        shift: (L, 2), (dx, dy) in pixels, right and down.
        size: (H, W) of the image.

    Returns:
        (L, 3, 3), of the dtype of `angle`.
    """
    matrix = torch.eye(3, dtype=angle.dtype, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 0, 1], matrix[:, 1, 0] = angle.sin(), -angle.sin()
    centre = angle.new_tensor([(size[1] - 1) / 2, (size[0] - 1) / 2])
    matrix[:, :2, 2] = centre - matrix[:, :2, :2] @ centre + shift
    return matrix


def cell_weights(
    downsample: str, size: int, cells: int, offset: float = 0.0, sigma: float = 0.5
) -> Tensor:
    """One axis of D: the weights of the pixels in each cell, (cells, size), in float64.

    Cell i is [i s, (i + 1) s] with s = size / cells, and pixel y is [y, y + 1].

    Args:
        downsample: "area" is the exact mean over the cell; "bilinear" interpolates at its centre;
            "gaussian" weighs all pixels by their distance to its centre; "legacy" interpolates at
            i s, half a cell before, as TensorFlow 1 did: for an integer s it reads the pixel i s.
        size: number of pixels.
        cells: number of cells.
        offset: shift of the cells, in pixels. The part of a cell outside the image weighs 0.
        sigma: standard deviation of "gaussian", in cells.

    Raises:
        ValueError: an unknown `downsample`.
    """
    pixel = torch.arange(size, dtype=torch.float64, device="cpu")
    cell = torch.arange(cells, dtype=torch.float64, device="cpu")[:, None]
    s = size / cells
    if downsample == "area":
        low, high = cell * s + offset, (cell + 1) * s + offset
        return (torch.minimum(pixel + 1, high) - torch.maximum(pixel, low)).clamp(min=0) / s
    centre = (cell + 0.5) * s - 0.5 + offset
    if downsample == "gaussian":
        inside = (centre >= -0.5) & (centre <= size - 0.5)
        return torch.softmax(-((pixel - centre) ** 2) / (2 * (sigma * s) ** 2), 1) * inside
    if downsample not in ("bilinear", "legacy"):
        raise ArgumentError(
            f"`downsample` must be 'area', 'bilinear', 'gaussian', 'legacy' or a callable, got "
            f"{downsample!r}."
        )
    position = centre if downsample == "bilinear" else cell * s + offset
    return (1 - (pixel - position).abs()).clamp(min=0)


class Observation:
    """The operator K = W^(1/2) D A, from a fine map h to the coarse maps of the warped copies.

    Args:
        matrices: (L, 3, 3) from pixels of the image to those of its copies (`euclidean`), or a
            sequence of such tensors in the order in which they act, each with an interpolation of
            its own.
        frame: (H, W) of the image, whose pixels are the units of `matrices` and `offset`.
        size: (H, W) of h, which covers the same frame.
        cells: (n, m) of the maps.
        downsample: a name for `cell_weights`, or a linear callable (N, 1, H, W) -> (N, 1, n, m).
        offset: (oy, ox) of the units of a map from the centres of their cells. A callable
            `downsample` ignores it.
        mask: whether only cells with D A_l 1 > 0.99 count. Otherwise all cells count, and h is 0
            outside the frame.
        like: a tensor of the device and the floating-point dtype to compute in.

    Attributes:
        kept: (L, 1, n, m), 1 where a cell counts and 0 elsewhere.
    """

    def __init__(
        self,
        matrices: Tensor | Sequence[Tensor],
        frame: Size,
        size: Size,
        cells: Size,
        *,
        downsample: Downsample = "area",
        offset: tuple[float, float] = (0.0, 0.0),
        mask: bool = True,
        like: Tensor | None = None,
    ) -> None:
        like = torch.zeros((), device="cpu") if like is None else like
        steps = [matrices] if isinstance(matrices, Tensor) else list(matrices)
        pixels = size[0] * size[1]
        chunk = max(1, (_CPU_CHUNK if like.device.type == "cpu" else _CHUNK) // pixels)
        self.size, self.cells, self.downsample = size, cells, downsample
        self.copies = len(steps[0])
        with set_inference_mode(False), torch.no_grad(), without_autocast(like):
            thetas = (_sampling(step, frame).to(like).split(chunk) for step in steps)
            self._thetas = list(zip(*thetas, strict=True))
            self._grids: list[list[Tensor]] | None = None
            if 2 * pixels * len(steps) * self.copies <= _GRID_BUDGET:
                self._grids = [self._make_grids(i) for i in range(len(self._thetas))]
            if not callable(downsample):
                self._rows, self._columns = (
                    cell_weights(downsample, s, n, o * s / f).to(like)
                    for s, n, o, f in zip(size, cells, offset, frame, strict=True)
                )
            self.kept = like.new_ones(self.copies, 1, *cells)
            if mask:
                self.kept = (self(like.new_ones(1, *size)) > 0.99).to(like)

    def _make_grids(self, i: int) -> list[Tensor]:
        shape = [len(self._thetas[i][0]), 1, *self.size]
        return [F.affine_grid(theta, shape, align_corners=False) for theta in self._thetas[i]]

    def _observe_chunk(self, h: Tensor, i: int) -> Tensor:
        """D A h for the i-th chunk of copies: the images of a batch are channels of one warp."""
        warped = h[None]
        for grid in self._make_grids(i) if self._grids is None else self._grids[i]:
            warped = warped.expand(len(grid), -1, -1, -1)
            warped = F.grid_sample(warped, grid, align_corners=False)
        if not callable(self.downsample):
            cells: Tensor = self._rows @ (warped @ self._columns.mT)
            return cells
        lowered = self.downsample(warped.flatten(0, 1)[:, None])
        shape = (*warped.shape[:2], *self.cells)
        if lowered.shape != (shape[0] * shape[1], 1, *self.cells):
            raise ArgumentError(
                f"`downsample` must turn (N, 1, {self.size[0]}, {self.size[1]}) into (N, 1, "
                f"{self.cells[0]}, {self.cells[1]}), got {tuple(lowered.shape)}."
            )
        return lowered.reshape(shape)

    def __call__(self, h: Tensor) -> Tensor:
        """K h, (L, B, n, m), for h (B, H, W)."""
        return torch.cat([self._observe_chunk(h, i) for i in range(len(self._thetas))]) * self.kept

    def transposed(self, batch: int) -> Callable[[Tensor], Tensor]:
        """K^T, (L, B, n, m) -> (B, H, W), for B = `batch`.

        It is the backward pass of K. As K is linear, the graph of one forward pass serves every
        call, if it fits into memory.
        """
        like = self.kept.new_zeros(batch, *self.size)

        def record(i: int) -> Edges:
            with set_inference_mode(False), torch.enable_grad():
                h = torch.zeros_like(like, requires_grad=True)
                return h, self._observe_chunk(h, i)

        chunks = range(len(self._thetas))
        recorded = None if self._grids is None else [record(i) for i in chunks]

        def transpose(q: Tensor) -> Tensor:
            q_chunks = (q * self.kept).split([len(theta) for theta, *_ in self._thetas])
            total = torch.zeros_like(like)
            for i in chunks:
                h, observed = record(i) if recorded is None else recorded[i]
                total += torch.autograd.grad(observed, h, q_chunks[i], retain_graph=True)[0]
            return total

        return transpose

    @cached_property
    def majorant(self) -> Tensor:
        """d, (1, H, W), with <h, K^T K h> <= sum d h^2 for every h.

        No entry of a named D is negative, so d = K^T K 1 is enough: 2 |h_i h_j| <= h_i^2 + h_j^2 in
        each product. It is at least a hundredth of its largest value, for pixels that few cells
        see. The entries of a callable D may be negative: then d is constant, 1.02 times the
        estimate of ||K||^2 after 30 power steps.
        """
        v = self.kept.new_ones(1, *self.size)
        transpose = self.transposed(1)
        if not callable(self.downsample):
            d = transpose(self(v))
            return d.clamp(min=_FLOOR * d.amax())
        tiny = torch.finfo(v.dtype).tiny
        v += torch.arange(v.numel(), device=v.device).sin().to(v).reshape(v.shape)
        for _ in range(_POWER_STEPS):
            v /= torch.linalg.vector_norm(v).clamp(min=tiny)
            v, last = transpose(self(v)), v
        return torch.full_like(v, 1.02 * float((v * last).sum()))


def _sampling(matrices: Tensor, frame: Size) -> Tensor:
    """Matrices (L, 2, 3) from coordinates in a copy to coordinates in the image.

    The edges (not the corner pixels) of the frame are at -1 and 1, so that one matrix serves every
    resolution, and a frame that is one pixel wide.
    """
    height, width = frame
    matrices = matrices.double()
    to_unit = matrices.new_tensor(
        [[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]]
    )
    theta: Tensor = to_unit @ torch.linalg.inv(to_unit @ matrices)
    return theta[:, :2]


# --- the objective -------------------------------------------------------------------------------


class Solution(NamedTuple):
    """The result of `solve`.

    Attributes:
        h: (B, H, W).
        history: (B, iterations + 1), F before the first iteration and after each.
        gap: (B, iterations + 1), an upper bound of F(h) - F*; None unless requested.
    """

    h: Tensor
    history: Tensor
    gap: Tensor | None = None

    def __repr__(self) -> str:
        return fields_repr(self)


class _Problem:
    """F for a batch of maps (L, B, n, m)."""

    def __init__(self, observe: Observation, maps: Tensor, tv: float, l2: float) -> None:
        self.observe, self.maps, self.tv, self.l2 = observe, maps * observe.kept, tv, l2
        self.transpose = observe.transposed(maps.shape[1])
        self.majorant = observe.majorant + l2
        self.majorant += self.majorant.amax() == 0

    def objective(self, h: Tensor, observed: Tensor) -> Tensor:
        """F, (B,), for h (B, H, W) and `observed` = K h."""
        misfit = (observed - self.maps).square().sum((0, 2, 3)) / 2
        x, y = (edges.abs().sum((1, 2)) for edges in _differences(h))
        return misfit + self.tv * (x + y) + self.l2 / 2 * h.square().sum((1, 2))

    def gradient(self, h: Tensor, observed: Tensor) -> Tensor:
        """K^T (K h - g) + mu h, of all but TV."""
        return self.transpose(observed - self.maps).add_(h, alpha=self.l2)

    def dual(self, observed: Tensor, p: Edges, nonnegative: bool) -> Tensor:
        """A lower bound of F*, (B,), for |p| <= lambda.

        -1/2 ||q||^2 - <q, g> - 1/(2 mu) ||K^T q + G^T p||^2 with q = K h - g and G the forward
        differences. With h >= 0 the last norm is of the negative part of its argument.
        """
        q = observed - self.maps
        slope = self.transpose(q) + _divergence(p)
        slope = slope.clamp(max=0) if nonnegative else slope
        fit = (q.square() / 2 + q * self.maps).sum((0, 2, 3))
        return -fit - slope.square().sum((1, 2)) / (2 * self.l2)


def _differences(h: Tensor) -> Edges:
    """G h: forward differences of h (B, H, W) in x and y."""
    return h[:, :, 1:] - h[:, :, :-1], h[:, 1:] - h[:, :-1]


def _divergence(p: Edges) -> Tensor:
    """G^T p, for p of the shapes of `_differences`."""
    x, y = p
    return F.pad(x, (1, 0)) - F.pad(x, (0, 1)) + F.pad(y, (0, 0, 1, 0)) - F.pad(y, (0, 0, 0, 1))


def solve(
    observation: Observation,
    maps: Tensor,
    *,
    tv: float,
    l2: float,
    solver: str = "mfista",
    start: Tensor | None = None,
    max_iterations: int | None = None,
    tolerance: float = 1e-4,
    nonnegative: bool = False,
    gap: bool = False,
) -> Solution:
    """Minimise (1).

    - "mfista": the monotone fast proximal gradient method of Beck and Teboulle, "Fast
      gradient-based algorithms for constrained total variation image denoising and deblurring
      problems" (IEEE TIP 2009). Each pixel has a step of its own (`majorant`) instead of 1/||K||^2,
      and the momentum starts again from 0 where F would grow. The proximal step of TV takes 100
      steps of their dual method, from the result of the previous proximal step.
    - "condat-vu": the primal-dual method of Condat (JOTA 2013) and Vu (2013), without an inner
      loop. Simple, and slow.
    - "adam": a subgradient in Adam, learning rate 1e-3, as in the authors' code. It changes a pixel
      by at most about 1e-3 in a step.

    Args:
        observation: K.
        maps: (L, B, n, m), in the dtype and on the device of `observation`.
        tv: lambda.
        l2: mu.
        solver: one of `SOLVERS`.
        start: (B, H, W), the first h; 0 by default.
        max_iterations: the most iterations; None is that of `SOLVERS`.
        tolerance: "mfista" stops an image when F falls by less than this fraction of itself.
        nonnegative: whether h >= 0 is required. Not for "adam".
        gap: whether to return the duality gap, for "mfista" alone. It costs one more K^T in each
            iteration. Without l2 it is infinite.

    Raises:
        ValueError: an unknown solver, or an option that it does not have.
    """
    if solver not in SOLVERS:
        raise ArgumentError(f"`solver` must be one of {list(SOLVERS)}, got {solver!r}.")
    if solver == "adam" and nonnegative:
        raise ArgumentError("`nonnegative` must be False for solver 'adam', got True.")
    if gap and solver != "mfista":
        raise ArgumentError(f"`gap` must be False for solver {solver!r}; only 'mfista' has it.")
    n = SOLVERS[solver] if max_iterations is None else max_iterations
    with set_inference_mode(False), torch.no_grad(), without_autocast(maps):
        problem = _Problem(observation, maps.clone(), tv, l2)
        h = maps.new_zeros(maps.shape[1], *observation.size) if start is None else start.clone()
        if solver == "mfista":
            return _mfista(problem, h, n, tolerance, nonnegative, gap)
        if solver == "condat-vu":
            return _condat_vu(problem, h, n, nonnegative)
        return _adam(problem, h, n)


def _mfista(
    problem: _Problem, x: Tensor, n: int, tolerance: float, nonnegative: bool, gap: bool
) -> Solution:
    proximal = _Proximal(x, problem.tv, problem.majorant, nonnegative)
    x = x.clamp(min=0) if nonnegative else x
    observed = problem.observe(x)
    value = problem.objective(x, observed)
    best = torch.full_like(value, -torch.inf)
    history, gaps = [value], [value - best]
    y, observed_y = x, observed
    t = torch.ones_like(value)
    active = torch.ones_like(value, dtype=torch.bool)
    for _ in range(n):
        z = proximal(y - problem.gradient(y, observed_y) / problem.majorant)
        observed_z = problem.observe(z)
        value_z = problem.objective(z, observed_z)
        if gap:
            best = torch.maximum(best, problem.dual(observed_z, proximal.dual, nonnegative))
        better = active & (value_z < value)
        # Where z is no better, the momentum starts again from 0. Without momentum, x has converged.
        active = active & torch.where(better, value - value_z > tolerance * value_z, t > 1)
        next_t = (1 + (1 + 4 * t**2).sqrt()) / 2
        momentum = ((t - 1) / next_t)[:, None, None]
        take = better[:, None, None]
        y = torch.where(take, z + momentum * (z - x), x)
        # K is linear, so that K y needs no pass of its own.
        observed_y = torch.where(take, observed_z + momentum * (observed_z - observed), observed)
        x, observed = torch.where(take, z, x), torch.where(take, observed_z, observed)
        t = torch.where(better, next_t, 1)
        value = torch.where(better, value_z, value)
        history.append(value)
        gaps.append(value - best)
        if not bool(active.any()):
            break
    return Solution(x, torch.stack(history, 1), torch.stack(gaps, 1) if gap else None)


class _Proximal:
    """argmin_x 1/2 sum d (x - v)^2 + lambda TV(x), with x >= 0 if required.

    x = v - G^T p / d, for the p with |p| <= lambda that 100 steps of the fast projected gradient
    method find from the last p:  p <- clip(r + s G(v - G^T r / d)),  r <- p + momentum. An edge
    between pixels i and j has a step of its own, s = 1 / (4 / d_i + 4 / d_j), which is 1/8 for
    d = 1: no row of s G (1 / d) G^T adds up to more than 1.

    Args:
        like: a tensor of the shape (B, H, W) of v.
        weight: lambda.
        metric: d, (1, H, W).
        nonnegative: whether x >= 0 is required.
    """

    def __init__(self, like: Tensor, weight: float, metric: Tensor, nonnegative: bool) -> None:
        self.weight, self.nonnegative, self.inverse = weight, nonnegative, 1 / metric
        x, y = _differences(like)
        self.dual: Edges = (torch.zeros_like(x), torch.zeros_like(y))
        e = 4 * self.inverse
        self.steps: Edges = (1 / (e[:, :, 1:] + e[:, :, :-1]), 1 / (e[:, 1:] + e[:, :-1]))
        times = [1.0]
        for _ in range(_INNER_STEPS):
            times.append((1 + (1 + 4 * times[-1] ** 2) ** 0.5) / 2)
        self.momenta = [(t - 1) / next_t for t, next_t in pairwise(times)]

    def _primal(self, v: Tensor, p: Edges, out: Tensor) -> Tensor:
        """Write v - G^T p / d, projected, to `out`."""
        x, y = p
        out.zero_()
        out[:, :, 1:] += x
        out[:, :, :-1] -= x
        out[:, 1:] += y
        out[:, :-1] -= y
        torch.addcmul(v, self.inverse, out, value=-1, out=out)
        return out.clamp_(min=0) if self.nonnegative else out

    def __call__(self, v: Tensor) -> Tensor:
        out = torch.empty_like(v)
        if not self.weight:
            return v.clamp(min=0) if self.nonnegative else v
        (px, py), (sx, sy) = self.dual, self.steps
        rx, ry = px.clone(), py.clone()
        for momentum in self.momenta:
            self._primal(v, (rx, ry), out)
            rx.addcmul_(sx, out[:, :, 1:]).addcmul_(sx, out[:, :, :-1], value=-1)
            ry.addcmul_(sy, out[:, 1:]).addcmul_(sy, out[:, :-1], value=-1)
            rx.clamp_(-self.weight, self.weight)
            ry.clamp_(-self.weight, self.weight)
            # r has become the new p. The memory of p holds the new r.
            torch.lerp(px, rx, 1 + momentum, out=px)
            torch.lerp(py, ry, 1 + momentum, out=py)
            px, rx, py, ry = rx, px, ry, py
        self.dual = (px, py)
        return self._primal(v, self.dual, out)


def _condat_vu(problem: _Problem, x: Tensor, n: int, nonnegative: bool) -> Solution:
    lipschitz = float(problem.majorant.amax())
    sigma = lipschitz / 4
    tau = 1 / (lipschitz / 2 + 8 * sigma)
    px, py = (torch.zeros_like(edges) for edges in _differences(x))
    history = []
    for _ in range(n):
        observed = problem.observe(x)
        history.append(problem.objective(x, observed))
        next_x = x - tau * (problem.gradient(x, observed) + _divergence((px, py)))
        if nonnegative:
            next_x.clamp_(min=0)
        dx, dy = _differences(2 * next_x - x)
        px = (px + sigma * dx).clamp_(-problem.tv, problem.tv)
        py = (py + sigma * dy).clamp_(-problem.tv, problem.tv)
        x = next_x
    history.append(problem.objective(x, problem.observe(x)))
    return Solution(x, torch.stack(history, 1))


def _adam(problem: _Problem, x: Tensor, n: int) -> Solution:
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    history = []
    for i in range(1, n + 1):
        observed = problem.observe(x)
        history.append(problem.objective(x, observed))
        dx, dy = _differences(x)
        gradient = problem.gradient(x, observed) + problem.tv * _divergence((dx.sign(), dy.sign()))
        first.lerp_(gradient, 1 - 0.9)
        second.lerp_(gradient.square(), 1 - 0.999)
        scale = (second / (1 - 0.999**i)).sqrt_().add_(1e-8)
        x = x - 1e-3 / (1 - 0.9**i) * first / scale
    history.append(problem.objective(x, problem.observe(x)))
    return Solution(x, torch.stack(history, 1))
