"""SESS: saliency enhancing with scaling and sliding (Tursun et al. 2022)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_ext._checks import check_choice, check_count, check_range, check_size, warn
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
from captum_ext.attr._chain import NOT_PASSED, passed
from captum_ext.attr.wrappers._following import Following
from captum_ext.attr.wrappers._fusion import Fusion, canvas_of
from captum_ext.attr.wrappers._template import (
    SIGNS,
    ImageWrapper,
    Offset,
)
from captum_ext.attr.wrappers._windows import (
    Cutter,
    Size,
    Window,
    all_windows,
    count_windows,
    scaled_size,
)
from captum_ext.imaging import blur, lay_over, min_max, percentile

_FUSIONS = ("soft", "reference", "coverage", "weighted")
_POOLS = ("mean", "max")


class SESSWrapper(ImageWrapper):
    r"""Make the maps of any Captum attribution finer, by explaining windows of enlarged copies.

    The images are resized to several scales, a window slides over each, and the model scores what
    it sees there. The wrapped method explains the best windows; each map :math:`h_i` in [0, 1] is
    weighed by its window's score, laid back over the image (:math:`R`), and all are averaged where
    they say something (equations (1) and (2) of the paper; T is a threshold, :math:`\theta`):

    .. math::
        f_i = \frac{p_i}{\max_j p_j} h_i, \qquad
        L = \frac{\sum_i R(f_i) [R(f_i) > \theta]}{\sum_i [R(f_i) > \theta]}

    Every argument of the wrapped method follows its image into the windows: targets and tensors
    with one entry for each example by example; `baselines`, a `feature_mask` and whatever else has
    the images' height and width are resized and cut as the images are. With a base that draws its
    baselines (`GradientShap`) the windows are explained place by place. What a base says in pixels
    (the windows of `Occlusion`) refers to the window, not the image.

    With nothing filtered, no `theta` and a Module as `forward_func`, score and map come from one
    forward pass where the base's first pass runs on just the windows (CAMs, `Saliency`,
    `FeatureAblation`); else a pass for the scores is added. Memory does not grow with the number
    of windows. With `sign="positive"` maps are rectified before they are upsampled, as in the
    paper.

    Args:
        attribution_method: an instance of any attribution class of Captum or of this package.
        n_scales: how many scales, from the window's longer side w in steps of 2 w / 7: 224, 288,
            ..., 928 by default, as in the paper. A scale is the length of the shorter side.
        scales: instead, the scales themselves; or "sqrt2", from w by factors of the square root of
            2 up to the image's shorter side, and at least up to 4 w, for large images.
        window: side of the window, or (height, width), in pixels: what the model is used to.
        step: from window to window, one number or (down, across); None is the window's own size.
            The last window of a row is moved back to the image's edge.
        pre_filter_ratio: r in [0, 1), the share of windows that is not explained: those of the
            lowest scores. Of P windows, P - int(P r), and at least one, are kept.
        theta: below 1; what is not above it does not count as a vote in "soft" and "reference"
            fusion.
        pool: "mean" or "max" over the maps. The maximum knows neither `theta` nor `fusion`.
        fusion: what the sum of the maps is divided by.
            "soft": by the votes, each resized as its map is. The default; without seams.
            "reference": by the number of resized maps above theta, the authors' code to rounding.
            Where windows meet, a map fades over O / S pixels (output to scale), and counts fully.
            "coverage": by the number of windows that see the pixel: silent windows dilute. The
            default of signed maps, and needed there.
            "weighted": by the sum of the weights of the windows that see the pixel.
        score: "softmax", "sigmoid" (several labels), "logit" (the output as it is, for models that
            end in a softmax; below 0 it counts as 0), or a callable of the whole output.
        sign: "positive", "negative" or "absolute" maps are scaled to [0, 1] each; "signed" ones
            divided by their largest absolute value.
        channel_reduction: of input attributions: "abs_sum" (the paper's), "sum", "max_abs" or a
            callable; see `ImageWrapper`.
        percentile: input attributions are clipped there, 99 as in the paper; maps are not.
        smooth: whether the fused map is blurred, at the resolution of the image.
        smooth_kernel: of the Gaussian, in pixels.
        smooth_sigma: in pixels.
        antialias: whether images are smoothed where they are made smaller; the authors do not.
        align: where a unit of the layer is centred: "cell", in the middle of its cell, as everyone
            takes it; "rf", where its receptive field is (in layer4 of a ResNet 15.5 pixels up and
            left of that, in VGG in the same place); or an offset (y, x) from there in pixels.
        final_norm: whether the result is scaled to [0, 1] (in the paper, not in its code).
        max_patches: more windows for one image than this are an error. Elongated images have many.
        internal_batch_size: windows in one call of the model or the wrapped method; on a CPU at
            most 16 of a method with gradients, which is faster, and fewer of one that takes samples
            (NoiseTunnel, GradientShap). A method that has an `internal_batch_size` of its own gets
            this one, if none is passed.
        show_progress: whether to draw a bar.

    Raises:
        TypeError: `attribution_method` is not an attribution.
        ValueError: an unknown option.

    Source: O. Tursun et al., SESS: Saliency Enhancing with Scaling and Sliding, ECCV 2022,
    https://arxiv.org/abs/2207.01769. The number of windows is the code's: on each axis
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
        if fusion is None:
            fusion = "coverage" if sign == "signed" else "soft"
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
        check_size("smooth_sigma", self.smooth_sigma, positive=True)
        if self.smooth_kernel % 2 == 0:
            raise ValueError(f"`smooth_kernel` must be odd, got {self.smooth_kernel}.")
        has_votes = self.fusion in ("soft", "reference")
        if self.sign == "signed" and (self.pool == "max" or has_votes):
            raise ValueError(
                f"`sign`='signed' goes with `fusion`='coverage' or 'weighted' and `pool`='mean', "
                f"got {self.fusion!r} and {self.pool!r}."
            )
        if self.theta and self.pool == "mean" and not has_votes:
            raise ValueError(f"`theta` has no meaning in `fusion`={self.fusion!r}: leave it at 0.")
        if self.step[0] > self.window[0] or self.step[1] > self.window[1]:
            raise ValueError(
                f"`step` {self.step} is larger than the `window` {self.window}: what lies between "
                f"two windows would never be seen."
            )

    @overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensors,
        *,
        target: TargetType = ...,
        additional_forward_args: Any = ...,
        return_coverage: Literal[False] = ...,
        **kwargs: Any,
    ) -> TensorOrTupleOfTensors: ...
    @overload
    def attribute(
        self, inputs: TensorOrTupleOfTensors, *, return_coverage: Literal[True], **kwargs: Any
    ) -> tuple[TensorOrTupleOfTensors, Tensor]: ...
    @log_usage()
    def attribute(
        self,
        inputs: Tensor | Tensors,
        *,
        target: TargetType = NOT_PASSED,
        additional_forward_args: Any = NOT_PASSED,
        return_coverage: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The fused map of each image, repeated over its channels.

        Args:
            inputs: images (B, C, H, W) of any size, normalised as the model wants them.
            target: as in Captum: of the scores, and of the wrapped method where it takes one.
            additional_forward_args: as in Captum: of the scores, and of the wrapped method.
            return_coverage: whether to return, too, how many explained windows saw each pixel.
            **kwargs: everything else, for the wrapped method.

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
        arguments = passed(target=target, additional_forward_args=additional_forward_args, **kwargs)
        images = self._check(inputs, arguments)
        sizes = self._sizes(images)
        windows = self._windows(sizes)
        cutter = Cutter(sizes, self.window, self.antialias)
        following = Following(self._base, images, arguments, cutter)
        with preserve_state(self.forward_func):
            fused, coverage = self._fuse(images, windows, sizes, following, return_coverage)
        if self.smooth:
            fused = blur(fused, self.smooth_kernel, self.smooth_sigma)
        if self.final_norm:
            fused = min_max(fused)
        empty = int((fused == 0).flatten(1).all(1).sum())
        if empty:
            warn(
                f"The map of {empty} of {len(images)} images is zero everywhere: no explained "
                f"window has a positive score, and a map that is not flat and has values of the "
                f"sign {self.sign!r} above `theta`."
            )
        output = _format_output(isinstance(inputs, tuple), (self._shaped(fused, images),))
        return (output, coverage) if return_coverage else output

    # --- scaling and sliding ---------------------------------------------------------------------

    def _sizes(self, images: Tensor) -> list[Size]:
        """The images' size at each scale."""
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

    def _windows(self, sizes: list[Size]) -> list[Window]:
        """All windows of an image."""
        counts = [count_windows(size, self.window, self.step) for size in sizes]
        n = sum(down * across for down, across in counts)
        if n > self.max_patches:
            raise ValueError(
                f"One image has {n} windows of {self.window} in steps of {self.step} at the sizes "
                f"{sizes[0]} to {sizes[-1]}, which is more than `max_patches` {self.max_patches}: "
                f"take fewer or smaller `scales`, or raise it."
            )
        return all_windows(sizes, self.window, self.step)

    # --- scores, maps, fusion --------------------------------------------------------------------

    def _fuse(
        self,
        images: Tensor,
        windows: list[Window],
        sizes: list[Size],
        following: Following[Window],
        wants_coverage: bool,
    ) -> tuple[Tensor, Tensor | None]:
        detector = _Probabilities()
        n = len(windows)
        kept = max(1, n - int(n * self.pre_filter_ratio))
        pairs = [(example, window) for example in range(len(images)) for window in windows]
        scores = None
        if kept < n or (self.theta > 0 and self.pool == "mean"):
            found = [
                self._log_scores(images, examples, places, following, detector)
                for examples, places in self._chunks(
                    pairs, self.internal_batch_size, False, "scores"
                )
            ]
            scores = torch.cat(found).reshape(len(images), n)
            best = scores.sort(dim=1, stable=True).indices[:, -kept:]
            # To the host, once: how many windows of which scale are kept is the shape of tensors.
            pairs = [
                (example, windows[i]) for example, row in enumerate(best.tolist()) for i in row
            ]
        canvas = canvas_of(self.pool, self.fusion)
        if following.one_place:
            pairs.sort(key=lambda pair: (canvas(pair[1]), pair[1], pair[0]))
        else:
            pairs.sort(key=lambda pair: (canvas(pair[1]), pair))
        peak = None if scores is None else scores.amax(1)
        options = (self.window, self.pool, self.fusion, self.theta)
        fusion = Fusion(images, sizes, *options, peak, wants_coverage)
        offset: Offset | None = None
        heard = [self.forward_func] if isinstance(self.forward_func, Module) else []
        size = self._at_once(images, following.arguments, self.internal_batch_size)
        for examples, places in self._chunks(pairs, size, following.one_place, "attribution"):
            arguments = following.at(examples, places)
            pictures = following.move(images, examples, places, False)
            if scores is None:
                first_pass = _FirstOutput(pictures)
                with hooked(heard, after=first_pass.keep) as lock, lock:
                    maps, is_map = self._maps(pictures.clone(), images, arguments, size)
                output = first_pass.output
                logs = self._log_scores(images, examples, places, following, detector, output)
            else:
                maps, is_map = self._maps(pictures, images, arguments, size)
                logs = scores[examples, [place.number for place in places]]
            if offset is None:
                first = following.at(examples[:1], places[:1])
                offset = self._offset(self.align, pictures[:1], maps.shape[2:], first)
            fusion.add(self._calibrated(maps, is_map, offset), logs, examples, places)
        if detector.found():
            warn(
                "`score`='softmax', but the model's output is a probability already, so that all "
                "windows weigh nearly the same: take score='logit', or leave the softmax away."
            )
        return fusion.result(), fusion.coverage

    def _log_scores(
        self,
        images: Tensor,
        examples: list[int],
        places: list[Window],
        following: Following[Window],
        detector: "_Probabilities",
        output: Tensor | None = None,
    ) -> Tensor:
        """The logarithms of the windows' scores, from the model's output if it is there already."""
        arguments = following.at(examples, places, ("target", "additional_forward_args"))
        with torch.no_grad():
            if output is None:
                pictures = following.move(images, examples, places, False)
                extra = arguments.get("additional_forward_args")
                try:
                    output = _run_forward(self.forward_func, pictures, None, extra)
                except Exception as error:
                    self._check_the_model_takes(pictures, images, arguments, error)
                    raise
            check_model_output(output, len(places))
            logs = compute_log_scores(output, self.score)
            if self.score == "softmax":
                detector.see(full_precision(output))
            found = select_target(logs, arguments.get("target"))
        if bool((found.isnan() | (found == math.inf)).any()):
            raise ValueError("`score`: the model's scores of the windows are not finite.")
        return found

    def _calibrated(self, maps: Tensor, is_map: Tensor, offset: Offset) -> Tensor:
        """The maps (n, 1, h', w') at the window's size, in [0, 1] or, signed, in [-1, 1]."""
        maps = lay_over(SIGNS[self.sign](maps), self.window, offset)
        limit = maps.abs().amax((2, 3), keepdim=True)
        if not self._is_spatial:
            limit = torch.where(is_map, limit, percentile(maps.abs(), self.percentile))
            maps = maps.clamp(-limit, limit)
        if self.sign == "signed":
            return maps / torch.where(limit == 0, 1, limit)
        return min_max(maps)


class _Probabilities:
    """Notices whether all outputs seen are probabilities."""

    def __init__(self) -> None:
        self.flags: list[Tensor] = []

    def see(self, output: Tensor) -> None:
        sums_to_1 = (output.sum(1) - 1).abs() < 1e-3
        self.flags.append((output >= 0).all() & sums_to_1.all())

    def found(self) -> bool:
        return bool(self.flags) and bool(torch.stack(self.flags).all())


class _FirstOutput:
    """Keeps what the model gives when it first runs, if it runs on `pictures`."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures, self.is_first = pictures, True
        self.output: Tensor | None = None

    def keep(self, index: int, args: Any, output: Any) -> None:
        if not self.is_first:
            return
        self.is_first = False
        same = args and isinstance(args[0], Tensor) and args[0].shape == self.pictures.shape
        if same and isinstance(output, Tensor) and torch.equal(args[0], self.pictures):
            self.output = output.detach().clone()


def _check_scales(scales: Any, window: Size) -> list[int] | str | None:
    if scales is None or (isinstance(scales, str) and scales == "sqrt2"):
        return scales
    if isinstance(scales, str) or not isinstance(scales, Iterable):
        raise ValueError(f"`scales` must be integers, 'sqrt2' or None, got {scales!r}.")
    found = [scale.item() if hasattr(scale, "item") else scale for scale in scales]
    if not found:
        raise ValueError("`scales` must be at least one, got none.")
    for scale in found:
        check_count("scales", scale)
        if scale < max(window):
            raise ValueError(f"`scales` must not be smaller than the `window` {window}: {scale}.")
    return found
