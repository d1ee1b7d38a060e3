"""SESS: saliency enhancing with scaling and sliding (Tursun et al. 2022)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_ext._checks import check_choice, check_count, check_positive, check_range, warn
from captum_ext._compat import (
    TargetType,
    TensorOrTupleOfTensors,
    _format_output,
    _run_forward,
    log_usage,
)
from captum_ext._data.sizes import height_width
from captum_ext._engine.hooks import hooked
from captum_ext._engine.modules import Tensors
from captum_ext._engine.outputs import (
    Score,
    check_model_output,
    check_score,
    compute_log_scores,
    select_target,
)
from captum_ext._engine.precision import full_precision
from captum_ext._engine.state import preserve_state
from captum_ext._errors import ArgumentError
from captum_ext._repr import options_repr
from captum_ext.attr._arguments import checks_arguments
from captum_ext.attr._chain import UNSET, drop_unset
from captum_ext.attr.wrappers._fusion import WindowFusion, canvas_key
from captum_ext.attr.wrappers._image_wrapper import SIGNS, ImageWrapper, Offset
from captum_ext.attr.wrappers._routing import ArgumentRouter
from captum_ext.attr.wrappers._windows import (
    CropViews,
    Size,
    Window,
    count_windows,
    scaled_size,
    slide_windows,
)
from captum_ext.imaging import blur, lay_over, min_max, percentile

_FUSIONS = ("soft", "reference", "coverage", "weighted")
_POOLS = ("mean", "max")


class SESSWrapper(ImageWrapper):
    r"""Make the maps of any Captum attribution finer, by explaining windows of enlarged images.

    The images are resized to several scales, a window slides over each, and the model scores every
    window. The wrapped method explains the windows with the best scores. Each map :math:`h_i` in
    [0, 1] is weighted by the score :math:`p_i` of its window and laid back over the image
    (:math:`R`). At each pixel, the mean is taken over the maps that vote for it (equations (1) and
    (2) of the paper, with a threshold :math:`\theta`):

    .. math::
        f_i = \frac{p_i}{\max_j p_j} h_i, \qquad
        L = \frac{\sum_i R(f_i) [R(f_i) > \theta]}{\sum_i [R(f_i) > \theta]}

    Every argument of the wrapped method follows its image into the windows. Targets, and tensors
    with one entry for each example, are indexed by example. `baselines`, a `feature_mask` and
    tensors of the images' height and width are resized and cropped as the images are. For a method
    that draws its baselines (`GradientShap`), each call explains one window of all images. Options
    of the wrapped method in pixels (the windows of `Occlusion`) are pixels of the window.

    With `pre_filter_ratio=0`, `theta=0` and a Module as `forward_func`, score and map come from the
    same forward pass, if the first pass of the wrapped method runs on exactly the windows (CAMs,
    `Saliency`, `FeatureAblation`). Otherwise the scores need another pass. Memory does not grow
    with the number of windows. With `sign="positive"` maps are rectified before they are upsampled,
    as in the paper.

    Args:
        attribution_method: an instance of any attribution class of Captum or of this package.
        n_scales: the number of scales, from the window's longer side w in steps of 2 w / 7: 224,
            288, ..., 928 by default, as in the paper. A scale is the length of the shorter side.
        scales: the scales themselves, instead of `n_scales`; or "sqrt2", from w by factors of the
            square root of 2 up to the image's shorter side, and at least up to 4 w, for large
            images.
        window: side of the window, or (height, width), in pixels: the model's usual input size.
        step: from window to window, in pixels, one number or (down, across); None is the window's
            own size. The last window of a row is moved back to the image's edge.
        pre_filter_ratio: r in [0, 1), the share of windows that are not explained: those with the
            lowest scores. Of P windows, P - int(P r), and at least one, are kept.
        theta: the threshold of a vote in "soft" and "reference" fusion, below 1. 0 (paper).
        pool: "mean" or "max" over the maps. The maximum uses neither `theta` nor `fusion`.
        fusion: the denominator of the mean. By default "soft"; for signed maps "coverage".

            - "soft": the votes, each resized as its map is. It leaves no seams.
            - "reference": the number of resized maps above theta, equal to the authors' code up to
              rounding. At the edge of a window, a map fades over O / S pixels (output to scale),
              and still counts fully.
            - "coverage": the number of windows that see the pixel. Windows whose map is zero dilute
              the mean. Signed maps need this or "weighted".
            - "weighted": the sum of the weights of the windows that see the pixel.
        score: "softmax", "sigmoid" (several labels), "logit" (the raw output, for models that end
            in a softmax; below 0 it counts as 0), or a callable of the whole output.
        sign: "positive", "negative" or "absolute" maps are scaled to [0, 1] each; "signed" maps are
            divided by their largest absolute value.
        channel_reduction: of input attributions: "abs_sum" (paper), "sum", "max_abs" (the channel
            that is farthest from 0) or a callable to (B, 1, H, W).
        percentile: input attributions are clipped at it, 99 (paper); maps are not clipped.
        smooth: whether the fused map is blurred, at the resolution of the image.
        smooth_kernel: size of the Gaussian kernel, in pixels.
        smooth_sigma: standard deviation of the Gaussian, in pixels.
        antialias: whether images are smoothed where they shrink. False, as in the authors' code.
        align: where a unit of the layer is centred: "cell", in the middle of its cell, the usual
            assumption; "rf", at the centre of its receptive field (15.5 pixels up and left of
            the cell's centre in layer4 of a ResNet, at the centre in VGG); or an offset (y, x) from
            the cell's centre, in pixels.
        final_norm: whether the result is scaled to [0, 1] (in the paper, not in its code).
        max_patches: the most windows of one image; more are an error. Elongated images have many.
        internal_batch_size: the number of windows in one call of the model or the wrapped method.
            On a CPU, methods with gradients get at most 16, which is faster. Methods that take
            samples (NoiseTunnel, GradientShap) get fewer. The wrapped method's own
            `internal_batch_size`, if it has one, is set to this unless the caller passes it.
        show_progress: whether to draw a progress bar.

    Raises:
        TypeError: `attribution_method` is not an attribution.
        ValueError: an option that is unknown, out of range or contradicts another.

    Reference:
        O. Tursun et al., SESS: Saliency Enhancing with Scaling and Sliding, ECCV 2022,
        https://arxiv.org/abs/2207.01769. The number of windows is that of the code, on each axis
        ceil((S - w) / step) + 1; the paper's formula is an approximation.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum.attr import LayerGradCam
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> sess = SESSWrapper(LayerGradCam(net, conv), n_scales=3, window=16, pre_filter_ratio=0.5)
        >>> sess.attribute(torch.rand(2, 3, 20, 30), target=5).shape
        torch.Size([2, 3, 20, 30])
    """

    def __init__(
        self,
        attribution_method: Attribution,
        *,
        n_scales: int = 12,
        scales: Sequence[int] | str | None = None,
        window: int | Size = 224,
        step: int | Size | None = None,
        pre_filter_ratio: float = 0.0,
        theta: float = 0.0,
        pool: str = "mean",
        fusion: str | None = None,
        score: Score = "softmax",
        sign: str = "positive",
        channel_reduction: str | Callable[[Tensor], Tensor] = "abs_sum",
        percentile: float = 99.0,
        smooth: bool = True,
        smooth_kernel: int = 11,
        smooth_sigma: float = 5.0,
        antialias: bool = False,
        align: str | Offset = "cell",
        final_norm: bool = False,
        max_patches: int = 4096,
        internal_batch_size: int = 64,
        show_progress: bool = False,
    ) -> None:
        super().__init__(attribution_method, channel_reduction)
        fusion = _default_fusion(sign) if fusion is None else fusion
        self.window = height_width("window", window)
        self.step = self.window if step is None else height_width("step", step)
        self.n_scales, self.scales = n_scales, _check_scales(scales, self.window)
        self.pre_filter_ratio, self.theta = pre_filter_ratio, theta
        self.pool, self.fusion, self.score, self.sign = pool, fusion, score, sign
        self.percentile, self.antialias, self.final_norm = percentile, antialias, final_norm
        self.smooth, self.smooth_kernel, self.smooth_sigma = smooth, smooth_kernel, smooth_sigma
        self.align, self.max_patches = align, max_patches
        self.internal_batch_size, self.show_progress = internal_batch_size, show_progress
        self._check_options()

    def __repr__(self) -> str:
        height, width = self.window
        options: dict[str, Any] = {"window": height if height == width else self.window}
        if self.step == self.window:
            options["step"] = None
        if self.fusion == _default_fusion(self.sign):
            options["fusion"] = None
        return options_repr(self, **options)

    def _check_options(self) -> None:
        check_choice("sign", self.sign, SIGNS)
        check_choice("pool", self.pool, _POOLS)
        check_choice("fusion", self.fusion, _FUSIONS)
        check_score(self.score)
        self._check_align(self.align)
        for name in ("n_scales", "max_patches", "internal_batch_size", "smooth_kernel"):
            check_count(name, getattr(self, name))
        check_range("pre_filter_ratio", self.pre_filter_ratio, 0, 1, below=True)
        check_range("theta", self.theta, 0, 1, below=True)
        check_range("percentile", self.percentile, 0, 100)
        check_positive("smooth_sigma", self.smooth_sigma)
        if self.smooth_kernel % 2 == 0:
            raise ArgumentError(f"`smooth_kernel` must be odd, got {self.smooth_kernel}.")
        has_votes = self.fusion in ("soft", "reference")
        if self.sign == "signed" and (self.pool == "max" or has_votes):
            raise ArgumentError(
                f"`sign`='signed' goes with `fusion`='coverage' or 'weighted' and `pool`='mean', "
                f"got {self.fusion!r} and {self.pool!r}."
            )
        if self.theta and self.pool == "mean" and not has_votes:
            raise ArgumentError(
                f"`theta` has no effect in `fusion`={self.fusion!r}: leave it at 0."
            )
        if self.step[0] > self.window[0] or self.step[1] > self.window[1]:
            raise ArgumentError(
                f"`step` {self.step} is larger than the `window` {self.window}: pixels between two "
                f"windows would never be explained."
            )

    @overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensors,
        *,
        target: TargetType = ...,
        return_coverage: Literal[False] = ...,
        **kwargs: Any,
    ) -> TensorOrTupleOfTensors: ...
    @overload
    def attribute(
        self, inputs: TensorOrTupleOfTensors, *, return_coverage: Literal[True], **kwargs: Any
    ) -> tuple[TensorOrTupleOfTensors, Tensor]: ...
    @log_usage()
    @checks_arguments
    def attribute(
        self,
        inputs: Tensor | Tensors,
        *,
        target: TargetType = UNSET,
        additional_forward_args: Any = UNSET,
        return_coverage: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The fused map of each image, repeated over its channels.

        Args:
            inputs: images (B, C, H, W) of any size, normalised as the model wants them.
            target: as in Captum: of the scores, and of the wrapped method where it takes one.
            additional_forward_args: as in Captum: of the scores, and of the wrapped method.
            return_coverage: whether to return also how many explained windows see each pixel.
            **kwargs: all other arguments of the wrapped method.

        Returns:
            A tensor of the input's shape (a tuple of one for a tuple of one), 0 where no explained
            window has a vote; with `return_coverage`, this and a tensor (B, 1, H, W).

        Raises:
            AssertionError: a target that does not fit, or none where one is needed (as in Captum).
            ValueError: inputs that are not images; more than `max_patches` windows; scores or
                attributions that are not finite; attributions that cannot be laid over an image;
                arguments that are not shaped as the images are.
            TypeError: an argument that the wrapped method does not have.
        """
        arguments = drop_unset(
            target=target, additional_forward_args=additional_forward_args, **kwargs
        )
        images = self._checked_images(inputs, arguments)
        sizes = self._scaled_sizes(images)
        windows = self._slide_windows(sizes)
        crop_views = CropViews(sizes, self.window, self.antialias)
        router = ArgumentRouter(self._method, images, arguments, crop_views)
        with preserve_state(self.forward_func):
            fused, coverage = self._fuse(images, windows, sizes, router, return_coverage)
        if self.smooth:
            fused = blur(fused, self.smooth_kernel, self.smooth_sigma)
        if self.final_norm:
            fused = min_max(fused)
        empty = int((fused == 0).flatten(1).all(1).sum())
        if empty:
            warn(
                f"The map of {empty} of {len(images)} images is zero everywhere: no explained "
                f"window has a positive score and a map that is not flat and has values of the "
                f"sign {self.sign!r} above `theta`."
            )
        output = _format_output(isinstance(inputs, tuple), (self._expand_to_inputs(fused, images),))
        return (output, coverage) if return_coverage else output

    # --- scaling and sliding ---------------------------------------------------------------------

    def _scaled_sizes(self, images: Tensor) -> list[Size]:
        """The size of the images at each scale."""
        height, width = images.shape[2:]
        w = max(self.window)
        if self.scales is None:
            shorts: Iterable[int] = (w + round(2 * w / 7) * i for i in range(self.n_scales))
        elif self.scales == "sqrt2":
            largest = max(min(height, width), 4 * w)
            n = math.floor(2 * math.log2(largest / w) + 1e-9) + 1
            shorts = (round(w * 2 ** (i / 2)) for i in range(n))
        else:
            shorts = (int(s) for s in self.scales)
        return [scaled_size((height, width), short) for short in shorts]

    def _slide_windows(self, sizes: list[Size]) -> list[Window]:
        """All windows of an image."""
        counts = [count_windows(size, self.window, self.step) for size in sizes]
        n = sum(down * across for down, across in counts)
        if n > self.max_patches:
            raise ArgumentError(
                f"One image has {n} windows of {self.window} in steps of {self.step} at the sizes "
                f"{sizes[0]} to {sizes[-1]}, which is more than `max_patches` {self.max_patches}: "
                f"take fewer or smaller `scales`, or raise `max_patches`.",
                "max_patches",
            )
        return slide_windows(sizes, self.window, self.step)

    # --- scores, maps, fusion --------------------------------------------------------------------

    def _fuse(
        self,
        images: Tensor,
        windows: list[Window],
        sizes: list[Size],
        router: ArgumentRouter[Window],
        wants_coverage: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The fused maps (B, 1, H, W) and, if wanted, the coverage."""
        detector = _ProbabilityDetector()
        pairs = [(example, window) for example in range(len(images)) for window in windows]
        n_kept = max(1, len(windows) - int(len(windows) * self.pre_filter_ratio))
        scores = None
        if n_kept < len(windows) or (self.theta > 0 and self.pool == "mean"):
            scores = self._score_all(images, pairs, router, detector)
            best = scores.sort(dim=1, stable=True).indices[:, -n_kept:]
            # One copy to the host: the number of kept windows of each scale shapes the tensors.
            pairs = [
                (example, windows[i]) for example, row in enumerate(best.tolist()) for i in row
            ]
        key = canvas_key(self.pool, self.fusion)
        if router.one_view_per_call:
            pairs.sort(key=lambda pair: (key(pair[1]), pair[1], pair[0]))
        else:
            pairs.sort(key=lambda pair: (key(pair[1]), pair))
        peak = None if scores is None else scores.amax(1)
        options = (self.window, self.pool, self.fusion, self.theta)
        fusion = WindowFusion(images, sizes, *options, peak, wants_coverage)
        offset: Offset | None = None
        hooked_modules = [self.forward_func] if isinstance(self.forward_func, Module) else []
        batch_size = self._batch_size(images, router.arguments, self.internal_batch_size)
        for examples, views in self._chunks(
            pairs, batch_size, router.one_view_per_call, "attribution"
        ):
            arguments = router.route(examples, views)
            pictures = router.make_views(images, examples, views, False)
            if scores is None:
                first_pass = _FirstOutput(pictures)
                with hooked(hooked_modules, after=first_pass.keep) as lock, lock:
                    maps, is_map = self._explain(pictures.clone(), images, arguments, batch_size)
                output = first_pass.output
                logs = self._log_scores(images, examples, views, router, detector, output)
            else:
                maps, is_map = self._explain(pictures, images, arguments, batch_size)
                logs = scores[examples, [window.number for window in views]]
            if offset is None:
                first = router.route(examples[:1], views[:1])
                offset = self._unit_offset(self.align, pictures[:1], maps.shape[2:], first)
            fusion.add(self._normalize(maps, is_map, offset), logs, examples, views)
        if detector.saw_only_probabilities():
            warn(
                "`score`='softmax', but the model's output is a probability already, so that all "
                "windows weigh nearly the same: pass score='logit', or remove the model's softmax."
            )
        return fusion.result(), fusion.coverage

    def _score_all(
        self,
        images: Tensor,
        pairs: list[tuple[int, Window]],
        router: ArgumentRouter[Window],
        detector: "_ProbabilityDetector",
    ) -> Tensor:
        """The logarithms of the scores of all windows, (B, n)."""
        chunks = self._chunks(pairs, self.internal_batch_size, False, "scores")
        logs = [
            self._log_scores(images, examples, views, router, detector)
            for examples, views in chunks
        ]
        return torch.cat(logs).reshape(len(images), -1)

    def _log_scores(
        self,
        images: Tensor,
        examples: list[int],
        windows: list[Window],
        router: ArgumentRouter[Window],
        detector: "_ProbabilityDetector",
        output: Tensor | None = None,
    ) -> Tensor:
        """The logarithms (n,) of the windows' scores.

        Args:
            images: (B, C, H, W).
            examples: the image of each window.
            windows: n windows.
            router: of the wrapped method's arguments.
            detector: gets the model's output.
            output: of the model for these windows; None runs the model.
        """
        arguments = router.route(examples, windows, ("target", "additional_forward_args"))
        with torch.no_grad():
            if output is None:
                pictures = router.make_views(images, examples, windows, False)
                extra = arguments.get("additional_forward_args")
                try:
                    output = _run_forward(self.forward_func, pictures, None, extra)
                except Exception as error:
                    self._check_input_size(pictures, images, arguments, error)
                    raise
            check_model_output(output, len(windows))
            all_scores = compute_log_scores(output, self.score, images.dim())
            if self.score == "softmax":
                detector.add(full_precision(output))
            scores = select_target(all_scores, arguments.get("target"))
        if bool((scores.isnan() | (scores == math.inf)).any()):
            raise ArgumentError("`score`: the model's scores of the windows are not finite.")
        return scores

    def _normalize(self, maps: Tensor, is_map: Tensor, offset: Offset) -> Tensor:
        """The maps (n, 1, h', w') at the window's size, in [0, 1] or, signed, in [-1, 1]."""
        maps = lay_over(SIGNS[self.sign](maps), self.window, offset)
        limit = maps.abs().amax((2, 3), keepdim=True)
        if not self._method_returns_maps:
            limit = torch.where(is_map, limit, percentile(maps.abs(), self.percentile))
            maps = maps.clamp(-limit, limit)
        if self.sign == "signed":
            return maps / torch.where(limit == 0, 1, limit)
        return min_max(maps)


class _ProbabilityDetector:
    """Tells whether all outputs of a model are probabilities."""

    def __init__(self) -> None:
        self.flags: list[Tensor] = []

    def add(self, output: Tensor) -> None:
        sums_to_1 = (output.sum(1) - 1).abs() < 1e-3
        self.flags.append((output >= 0).all() & sums_to_1.all())

    def saw_only_probabilities(self) -> bool:
        return bool(self.flags) and bool(torch.stack(self.flags).all())


class _FirstOutput:
    """Keeps the first output of a model, if its input is exactly `pictures`.

    Args:
        pictures: (n, C, h, w).

    Attributes:
        output: the output, detached; None if there is none.
    """

    def __init__(self, pictures: Tensor) -> None:
        self.pictures, self.is_first = pictures, True
        self.output: Tensor | None = None

    def keep(self, index: int, args: Any, output: Any) -> None:
        """The hook of the model, as `hooked` calls it."""
        if not self.is_first:
            return
        self.is_first = False
        same = args and isinstance(args[0], Tensor) and args[0].shape == self.pictures.shape
        if same and isinstance(output, Tensor) and torch.equal(args[0], self.pictures):
            self.output = output.detach().clone()


def _default_fusion(sign: str) -> str:
    return "coverage" if sign == "signed" else "soft"


def _check_scales(scales: Any, window: Size) -> list[int] | str | None:
    if scales is None or (isinstance(scales, str) and scales == "sqrt2"):
        return scales
    scales = scales.tolist() if hasattr(scales, "tolist") else scales
    if isinstance(scales, str) or not isinstance(scales, Iterable):
        raise ArgumentError(f"`scales` must be integers, 'sqrt2' or None, got {scales!r}.")
    sides = [scale.item() if hasattr(scale, "item") else scale for scale in scales]
    if not sides:
        raise ArgumentError("`scales` must not be empty.")
    for side in sides:
        check_count("scales", side)
        if side < max(window):
            raise ArgumentError(f"`scales` must not be smaller than the `window` {window}: {side}.")
    return sides
