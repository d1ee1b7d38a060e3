"""Augmented Grad-CAM: one fine map from the coarse maps of warped copies of an image."""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, Literal, overload

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from captum_ext._checks import check_choice, check_count, is_finite, warn
from captum_ext._compat import TargetType, TensorOrTupleOfTensors, _format_output, log_usage
from captum_ext._data.sizes import height_width
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.precision import without_autocast
from captum_ext._engine.state import preserve_state
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._repr import options_repr
from captum_ext.attr._arguments import checks_arguments
from captum_ext.attr._chain import UNSET, call_attribute, drop_unset, with_forward_func
from captum_ext.attr.wrappers._image_wrapper import SIGNS, ImageWrapper, Offset
from captum_ext.attr.wrappers._routing import ArgumentRouter, Arguments
from captum_ext.attr.wrappers._warped_copies import Fill, MeanOverCopies, SuperResolution, WarpViews
from captum_ext.attr.wrappers.super_resolution import (
    SOLVERS,
    Downsample,
    Observation,
    Size,
    cell_weights,
    euclidean,
)

_MODES = ("auto", "sr", "mean", "max", "single", "tta")
_NORMALIZATIONS = ("global", "per_map", "none")
_FILLS = ("zeros", "border", "reflection")
_PRESETS: dict[str | None, dict[str, Any]] = {
    None: {
        "n_augmentations": 32,
        "max_angle": 0.3,
        "max_shift": 0.13,
        "mode": "auto",
        "solver": "mfista",
        "tv": 2e-4,
        "l2": 2e-5,
        "downsample": "area",
        "normalize": "global",
    },
    "official": {
        "n_augmentations": 100,
        "max_angle": 0.5,
        "max_shift": 30 / 224,
        "mode": "sr",
        "solver": "adam",
        "tv": 1e-3,
        "l2": 1e-4,
        "downsample": "legacy",
        "normalize": "per_map",
    },
}
_LARGEST_GAIN = 32  # pixels of h for each cell; finer details would come from the prior alone


class AugmentedSR(ImageWrapper):
    r"""Make the maps of any Captum attribution finer, by explaining warped copies of the images.

    L copies of each image are rotated and shifted, and the wrapped method explains each copy. The
    coarse maps :math:`g_l` are then explained by one fine map h:

    .. math::
        \min_h \tfrac12 \sum_{l=1}^L \|D A_l h - g_l\|^2 + \lambda L \, TV(h)
            + \tfrac{\mu}{2} L \|h\|^2

    :math:`A_l` warps h as the l-th copy was warped, D lowers it to the cells of a map, and TV is
    the anisotropic total variation. Cells that saw pixels from outside the image do not count. The
    problem is solved for signed maps, and `sign` is applied to h afterwards. The paper rectifies
    the maps before, which cuts each copy differently.

    Each argument of the wrapped method follows its image. Targets, and tensors with one entry for
    each example, are indexed by example. `baselines`, a `feature_mask` and tensors of the images'
    height and width are warped as the images are. The warps are drawn once, in the constructor, and
    are the same for all images and calls.

    Args:
        attribution_method: an instance of any attribution class of Captum or of this package.
        n_augmentations: L; the first copy is the image itself. 32, with the preset 100.
        max_angle: rotations are uniform in +- this, in radians. 0.3, with the preset 0.5; beyond
            0.3 the answers of networks change.
        max_shift: shifts are uniform in +- this fraction of the sides. 0.13; with the preset
            30 / 224.
        mode: how the maps are merged.

            - "auto": "sr" where cells are at least 2 x 2 pixels, and "mean" otherwise. The default.
            - "sr": the problem above.
            - "mean", "max": of the upsampled maps, warped back. Each pixel counts the copies in
              which it is visible.
            - "single": the upsampled map of the image, without copies.
            - "tta": the attributions of the mean of the model over the copies, mean_l f(A_l x).
              Gradients pass back through the adjoint of A_l. Use it for signed attributions of
              pixels, which "mean" would smear; IntegratedGradients stays complete. `sign` and
              `channel_reduction` have no effect.
        solver: "mfista", "condat-vu" or "adam" (the preset's); see `super_resolution.solve`.
        tv: lambda, for maps in [0, 1]. 2e-4, with the preset 1e-3.
        l2: mu. 2e-5, with the preset 1e-4.
        downsample: D.

            - "area": the mean over the cell. The default.
            - "bilinear", "gaussian": see `super_resolution.cell_weights`.
            - "legacy": TensorFlow 1 reads each cell at its upper left corner. The preset's.
            - an integer s or a pair (n, m): the maps are first averaged over cells of s x s pixels,
              or over n x m cells. For methods of the input whose maps have blocks, like `Occlusion`
              with strides.
            - a linear callable (N, 1, H, W) -> (N, 1, n, m), for maps of either size.
        align: where a unit of the layer is centred: "cell", in the middle of its cell; "rf", at the
            centre of its receptive field; or an offset (y, x) from the cell's centre, in pixels.
        normalize: "global" divides the maps by the largest magnitude in all copies of an image, and
            multiplies h by it. The default. "per_map" divides each map by its own magnitude, and
            leaves h unscaled (the preset's). "none" does neither.
        sign: "positive", "negative", "absolute" or "signed", of the result.
        channel_reduction: of input attributions: "abs_sum", "sum", "max_abs" (the channel that is
            farthest from 0) or a callable to (B, 1, H, W).
        fill: the pixels of a copy from outside the image: "zeros" (the mean colour of normalised
            images), "border", "reflection", a number, or a tensor that broadcasts to the images. A
            number or tensor also fills baselines, but not tensors with another number of channels.
        sr_size: size of h: one number or (height, width). By default that of the image, but at most
            32 pixels for each cell. The result is resized to the image.
        max_iterations: of the solver; see `super_resolution.SOLVERS`.
        tolerance: "mfista" ends where the objective falls by less than this fraction of itself.
        preset: "official" takes the authors' settings: those named above; 200 steps of Adam from 0
            with a learning rate of 1e-3; two interpolations (rotation, then shift) instead of one;
            `sign` applied to each map instead of h; and cells that saw pixels from outside the
            image count. Arguments that are passed override the preset.
        generator: of the random warps.
        internal_batch_size: the number of copies in one call of the wrapped method. On a CPU,
            methods with gradients get at most 16, which is faster. Methods that take samples
            (NoiseTunnel, GradientShap) get fewer. The wrapped method's own `internal_batch_size`,
            if it has one, is set to this unless the caller passes it.
        show_progress: whether to draw a progress bar.

    Raises:
        TypeError: `attribution_method` is not an attribution.
        ValueError: an option that is unknown or out of range; "tta" with a method that needs the
            module or a layer.

    Reference:
        P. Morbidelli, D. Carrera, B. Rossi, P. Fragneto, G. Boracchi, Augmented Grad-CAM: Heat-Maps
        Super Resolution Through Augmentation, ICASSP 2020.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum.attr import LayerGradCam
        >>> conv = nn.Conv2d(3, 4, 3, stride=4)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> sr = AugmentedSR(LayerGradCam(net, conv), n_augmentations=8)
        >>> sr.attribute(torch.rand(2, 3, 32, 32), target=5).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        attribution_method: Attribution,
        *,
        n_augmentations: int | None = None,
        max_angle: float | None = None,
        max_shift: float | None = None,
        mode: str | None = None,
        solver: str | None = None,
        tv: float | None = None,
        l2: float | None = None,
        downsample: Downsample | int | Size | None = None,
        align: str | Offset = "cell",
        normalize: str | None = None,
        sign: str = "positive",
        channel_reduction: str | Callable[[Tensor], Tensor] = "abs_sum",
        fill: Fill = "zeros",
        sr_size: int | Size | None = None,
        max_iterations: int | None = None,
        tolerance: float = 1e-4,
        preset: str | None = None,
        generator: torch.Generator | None = None,
        internal_batch_size: int = 64,
        show_progress: bool = False,
    ) -> None:
        super().__init__(attribution_method, channel_reduction)
        check_choice("preset", preset, _PRESETS)

        def with_preset(name: str, value: Any) -> Any:
            return _PRESETS[preset][name] if value is None else value

        self.n_augmentations: int = with_preset("n_augmentations", n_augmentations)
        self.max_angle: float = with_preset("max_angle", max_angle)
        self.max_shift: float = with_preset("max_shift", max_shift)
        self.mode: str = with_preset("mode", mode)
        self.solver: str = with_preset("solver", solver)
        self.tv: float = with_preset("tv", tv)
        self.l2: float = with_preset("l2", l2)
        self.downsample: Downsample | int | Size = with_preset("downsample", downsample)
        self.normalize: str = with_preset("normalize", normalize)
        self.max_iterations = SOLVERS.get(self.solver) if max_iterations is None else max_iterations
        self.align, self.sign, self.fill, self.tolerance = align, sign, fill, tolerance
        self.sr_size = None if sr_size is None else height_width("sr_size", sr_size)
        self.internal_batch_size, self.show_progress = internal_batch_size, show_progress
        self.preset = preset
        self._check_options()
        if self.mode == "tta":
            with_forward_func(attribution_method, attribution_method.forward_func)  # or raise
        if not isinstance(generator, torch.Generator | None):
            raise ArgumentTypeError(f"`generator` must be a torch.Generator, got {generator!r}.")
        device = torch.device("cpu") if generator is None else generator.device
        draws = torch.rand(
            self.n_augmentations, 3, generator=generator, device=device, dtype=torch.float64
        )
        draws = draws.cpu() * 2 - 1
        draws[0] = 0
        self.angles, self.shifts = draws[:, 0] * self.max_angle, draws[:, 1:] * self.max_shift

    def __repr__(self) -> str:
        defaults = _PRESETS[self.preset] | {"max_iterations": SOLVERS[self.solver]}
        as_default = [name for name, value in defaults.items() if getattr(self, name) == value]
        return options_repr(self, **dict.fromkeys(as_default))

    @property
    def returns_maps(self) -> bool:
        return self.mode != "tta"

    def _check_options(self) -> None:
        check_choice("mode", self.mode, _MODES)
        check_choice("solver", self.solver, SOLVERS)
        check_choice("normalize", self.normalize, _NORMALIZATIONS)
        check_choice("sign", self.sign, SIGNS)
        self._check_align(self.align)
        check_count("n_augmentations", self.n_augmentations)
        check_count("internal_batch_size", self.internal_batch_size)
        check_count("max_iterations", self.max_iterations or 0)
        if not is_finite(self.max_angle) or not 0 <= self.max_angle <= math.pi:
            raise ArgumentError(
                f"`max_angle` must be from 0 to pi: it is in radians. Got {self.max_angle!r}."
            )
        if not is_finite(self.max_shift) or not 0 <= self.max_shift < 1:
            raise ArgumentError(
                f"`max_shift` must be at least 0 and below 1: it is a fraction of the image's "
                f"side. Got {self.max_shift!r}."
            )
        for name in ("tv", "l2", "tolerance"):
            value = getattr(self, name)
            if not is_finite(value) or value < 0:
                raise ArgumentError(f"`{name}` must be at least 0 and finite, got {value!r}.")
        if isinstance(self.fill, Tensor):
            if not bool(torch.isfinite(self.fill).all()):
                raise ArgumentError("`fill` must be finite.")
        elif not is_finite(self.fill):
            check_choice("fill", self.fill, _FILLS)
        if isinstance(self.downsample, str):
            cell_weights(self.downsample, 1, 1)
        elif not callable(self.downsample):
            cells = height_width("downsample", self.downsample)
            self.downsample = self.downsample if isinstance(self.downsample, int) else cells

    @overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensors,
        *,
        target: TargetType = ...,
        return_history: Literal[False] = ...,
        **kwargs: Any,
    ) -> TensorOrTupleOfTensors: ...
    @overload
    def attribute(
        self, inputs: TensorOrTupleOfTensors, *, return_history: Literal[True], **kwargs: Any
    ) -> tuple[TensorOrTupleOfTensors, Tensor | None]: ...
    @log_usage()
    @checks_arguments
    def attribute(
        self,
        inputs: Tensor | Tensors,
        *,
        target: TargetType = UNSET,
        additional_forward_args: Any = UNSET,
        return_history: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The map of each image, repeated over its channels; in mode "tta", its attributions.

        Args:
            inputs: images (B, C, H, W) of any size, normalised as the model wants them.
            target: as in Captum, of the wrapped method where it takes one.
            additional_forward_args: as in Captum, of the wrapped method.
            return_history: whether to return also the solver's objective for each image: (B, n),
                before and after every iteration; None where "auto" chose "mean".
            **kwargs: all other arguments of the wrapped method.

        Returns:
            A tensor of the input's shape (a tuple of one for a tuple of one); with
            `return_history`, this and the history.

        Raises:
            AssertionError: a target that does not fit, or none where one is needed (as in Captum).
            ValueError: inputs that are not images; attributions that are not finite, or cannot be
                laid over an image; arguments that are not shaped as the images are.
            TypeError: an argument that the wrapped method does not have.
        """
        if return_history and self.mode not in ("sr", "auto"):
            raise ArgumentError(f"`return_history`: mode {self.mode!r} has no objective.")
        arguments = drop_unset(
            target=target, additional_forward_args=additional_forward_args, **kwargs
        )
        images = self._checked_images(inputs, arguments)
        warp_views = self._warp_views(images)
        history = None
        with preserve_state(self.forward_func):
            if self.mode == "tta":
                result = self._explain_mean(images, warp_views, arguments)
            else:
                result, history = self._explain_copies(images, warp_views, arguments)
        empty = int((result == 0).flatten(1).all(1).sum())
        if empty:
            sign = "" if self.mode == "tta" else f" of the sign {self.sign!r}"
            warn(
                f"The map of {empty} of {len(images)} images is zero everywhere: the wrapped "
                f"method found no evidence{sign} in any copy."
            )
        attributions = self._expand_to_inputs(result, images)
        output = _format_output(isinstance(inputs, tuple), (attributions,))
        return (output, history) if return_history else output

    # --- warped copies ---------------------------------------------------------------------------

    def _warp_views(self, images: Tensor) -> WarpViews:
        return WarpViews(self._matrices(images), self._checked_fill(images), images.shape[1])

    def _matrices(self, images: Tensor) -> list[Tensor]:
        """The matrices (L, 3, 3) of the copies, once for each interpolation."""
        size = (images.shape[2], images.shape[3])
        shifts = self.shifts * self.shifts.new_tensor([size[1], size[0]])
        if self.preset != "official":
            return [euclidean(self.angles, shifts, size)]
        no_angles, no_shifts = torch.zeros_like(self.angles), torch.zeros_like(shifts)
        return [euclidean(self.angles, no_shifts, size), euclidean(no_angles, shifts, size)]

    def _checked_fill(self, images: Tensor) -> Fill:
        """`fill`; a tensor is on the images' device, and a vector becomes (C, 1, 1)."""
        fill = self.fill
        if not isinstance(fill, Tensor):
            return fill
        fill = fill.reshape(-1, 1, 1) if fill.dim() == 1 else fill
        shape = images[:1].shape
        try:
            fits = torch.broadcast_shapes(fill.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ArgumentError(
                f"`fill` of shape {tuple(fill.shape)} does not broadcast to an image of "
                f"shape {tuple(shape)}."
            )
        return fill.to(images)

    # --- maps of copies --------------------------------------------------------------------------

    def _explain_copies(
        self, images: Tensor, warp_views: WarpViews, arguments: Arguments
    ) -> tuple[Tensor, Tensor | None]:
        """The maps (B, 1, H, W) of all modes but "tta", and the solver's objective, if any."""
        router = ArgumentRouter(self._method, images, arguments, warp_views)
        n_copies = 1 if self.mode == "single" else self.n_augmentations
        pairs = [(example, copy) for copy in range(n_copies) for example in range(len(images))]
        merger: SuperResolution | MeanOverCopies | None = None
        batch_size = self._batch_size(images, router.arguments, self.internal_batch_size)
        for examples, copies in self._chunks(
            pairs, batch_size, router.one_view_per_call, "attribution"
        ):
            pictures = warp_views(images, examples, copies, False)
            routed = router.route(examples, copies)
            maps, _ = self._explain(pictures, images, routed, batch_size)
            if self.preset == "official":
                maps = SIGNS[self.sign](maps)
            maps = self._downsample(maps, images)
            if merger is None:
                first = router.route(examples[:1], copies[:1])
                cells = (maps.shape[2], maps.shape[3])
                offset = self._unit_offset(self.align, pictures[:1].detach(), cells, first)
                merger = self._make_merger(images, warp_views.steps, offset, maps)
            merger.add(maps, examples, copies)
        assert merger is not None
        result, history = merger.result()
        return (result if self.preset == "official" else SIGNS[self.sign](result)), history

    def _downsample(self, maps: Tensor, images: Tensor) -> Tensor:
        """The maps (n, 1, h, w) on the grid that `downsample` needs."""
        if isinstance(self.downsample, str):
            return maps
        if callable(self.downsample):
            return self._downsample_by_callable(self.downsample, maps, images)
        if isinstance(self.downsample, tuple):
            n, m = self.downsample
        else:
            n, m = (max(1, round(side / self.downsample)) for side in images.shape[2:])
        if n > maps.shape[2] or m > maps.shape[3]:
            raise ArgumentError(
                f"`downsample` asks for {n} x {m} cells, but the maps have only {maps.shape[2]} x "
                f"{maps.shape[3]}."
            )
        rows = cell_weights("area", maps.shape[2], n).to(maps)
        columns = cell_weights("area", maps.shape[3], m).to(maps)
        with without_autocast(maps):
            downsampled: Tensor = rows @ maps @ columns.mT
        return downsampled

    def _downsample_by_callable(
        self, downsample: Callable[[Tensor], Tensor], maps: Tensor, images: Tensor
    ) -> Tensor:
        """The maps (n, 1, h, w), downsampled unless they have the callable's cells already."""
        lowered = downsample(maps.new_zeros(1, 1, *self._fine_size(images, None)))
        if not isinstance(lowered, Tensor):
            raise ArgumentError(
                f"`downsample` must return a tensor, got {type(lowered)}.", "downsample"
            )
        cells = lowered.shape[2:]
        if maps.shape[2:] == cells:
            return maps
        pooled = downsample(maps)
        if pooled.shape != (len(maps), 1, *cells) or len(cells) != 2:
            raise ArgumentError(
                f"`downsample` must turn maps into {tuple(cells)} cells, as it does images, but it "
                f"turned {tuple(maps.shape)} into {tuple(pooled.shape)}."
            )
        return pooled

    def _fine_size(self, images: Tensor, cells: Size | None) -> Size:
        """The size of h. With a callable D, which may know no other, it is that of the image."""
        height, width = images.shape[2:]
        if self.sr_size is not None:
            return self.sr_size
        if cells is None or callable(self.downsample):
            return height, width
        return min(height, _LARGEST_GAIN * cells[0]), min(width, _LARGEST_GAIN * cells[1])

    def _make_merger(
        self, images: Tensor, steps: Sequence[Tensor], offset: Offset, maps: Tensor
    ) -> SuperResolution | MeanOverCopies:
        """The object that puts the maps of all copies together, for maps of this size."""
        frame, cells = (images.shape[2], images.shape[3]), (maps.shape[2], maps.shape[3])
        if not self._uses_super_resolution(cells, frame):
            return MeanOverCopies(images, steps, offset, self.mode == "max")
        d = self.downsample
        observe = Observation(
            steps,
            frame,
            self._fine_size(images, cells),
            cells,
            downsample="area" if isinstance(d, int | tuple) else d,
            offset=offset,
            mask=self.preset != "official",
            like=maps,
        )
        options = {
            "tv": self.tv * self.n_augmentations,
            "l2": self.l2 * self.n_augmentations,
            "solver": self.solver,
            "max_iterations": self.max_iterations,
            "tolerance": self.tolerance,
        }
        return SuperResolution(images, observe, self.normalize, options)

    def _uses_super_resolution(self, cells: Size, frame: Size) -> bool:
        if self.mode == "sr" and cells == frame:
            warn(
                "`mode`='sr', but the maps are as fine as the images: there is no resolution to "
                "gain. Mode 'mean' gives nearly the same; where the maps have blocks, pass their "
                "size as `downsample`."
            )
        return self.mode == "sr" or (
            self.mode == "auto" and frame[0] * frame[1] >= 4 * cells[0] * cells[1]
        )

    # --- the mean of the model -------------------------------------------------------------------

    def _explain_mean(self, images: Tensor, warp_views: WarpViews, arguments: Arguments) -> Tensor:
        """The attributions (B, C, H, W) of mode "tta"."""
        mean = with_forward_func(
            self.attribution_method, self._mean_over_copies(images, warp_views)
        )
        x = images.clone().requires_grad_(self._needs_gradients)
        batch_size = self._batch_size(images, arguments, self.internal_batch_size)
        completed = self._complete_arguments(arguments, max(batch_size, len(images)))
        result = call_attribute(mean, x, **completed)
        while isinstance(result, tuple) and len(result) == 1:
            result = result[0]
        name = type(self.attribution_method).__name__
        if not isinstance(result, Tensor) or result.shape != images.shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else repr(type(result))
            raise ArgumentError(
                f"`attribution_method` {name} gave {got} for images of shape "
                f"{tuple(images.shape)}: mode 'tta' is for attributions of the input."
            )
        if not bool(torch.isfinite(result).all()):
            raise ArgumentError(
                f"`attribution_method` {name} gave attributions that are not finite."
            )
        return result.detach()

    def _mean_over_copies(self, images: Tensor, warp_views: WarpViews) -> Forward:
        """The function 1/L sum_l f(A_l x) of x.

        The backward pass runs each chunk of copies again, so that its memory is that of one chunk.
        """
        n, views_of_size = self.n_augmentations, {images.shape[2:]: warp_views}

        def forward(x: Tensor, *extra: Any) -> Tensor:
            copies_at_once = max(1, self.internal_batch_size // len(x))
            size = x.shape[2:]
            if size not in views_of_size:  # the wrapped method crops windows out of the images
                views_of_size[size] = self._warp_views(x)

            def warp(value: Any, copies: Sequence[int]) -> Any:
                examples = list(range(len(x))) * len(copies)
                views = [copy for copy in copies for _ in range(len(x))]
                router = ArgumentRouter(
                    self._method, x, {"additional_forward_args": value}, views_of_size[size]
                )
                return router.route(examples, views)["additional_forward_args"]

            def run(x: Tensor, *copies: int) -> Tensor:
                output = self.forward_func(warp(x, copies), *(warp(e, copies) for e in extra))
                if not isinstance(output, Tensor) or output.shape[:1] != (len(copies) * len(x),):
                    raise ArgumentError(
                        "`mode`='tta' averages outputs with one entry for each image in dimension "
                        "0; the model gives something else."
                    )
                total: Tensor = output.unflatten(0, (len(copies), len(x))).sum(0)
                return total

            chunks = [range(n)[i : i + copies_at_once] for i in range(0, n, copies_at_once)]
            runs_again = len(chunks) > 1 and torch.is_grad_enabled()
            call = partial(checkpoint, run, use_reentrant=False) if runs_again else run
            total: Tensor = reduce(torch.add, (call(x, *chunk) for chunk in chunks))
            return total / n

        return forward
