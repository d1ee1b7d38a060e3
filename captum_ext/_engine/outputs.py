"""Scores of model outputs, and inputs made from the examples of a batch.

Methods that mask, crop or add noise run the model on many inputs made from each example. `Scorer`
scores a chunk of such inputs: it picks the target and the additional arguments of the example that
each input is made from, runs the model, and turns its output into one score for each input.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_ext._compat import TargetType, _format_additional_forward_args
from captum_ext._engine.faults import explained_faults
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.precision import full_precision
from captum_ext._engine.targets import (
    check_can_be_scores,
    check_on_host,
    check_target,
    select_entries,
)
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._repr import bounded_repr

Score = str | Callable[[Tensor], Tensor]
SCORES = ("logit", "sigmoid", "softmax")


# --- scores --------------------------------------------------------------------------------------


def check_score(score: Score) -> None:
    """Raise a ValueError unless `score` is a name in `SCORES` or a callable."""
    if not callable(score) and score not in SCORES:
        raise ArgumentError(
            f"`score` must be one of {SCORES} or a callable, got {bounded_repr(score)}.", "score"
        )


def compute_scores(output: Tensor, score: Score, n_dims: int) -> Tensor:
    """Compute scores from a model's output, in float32 or better.

    Args:
        output: logits, with classes in dimension 1.
        score: "logit" (the unchanged output), "softmax" or "sigmoid" (probabilities), or a callable
            that takes the output and returns a tensor of scores.
        n_dims: the number of dimensions of the model's input.

    Raises:
        ValueError: the softmax of a single logit, which is always 1, or of outputs whose dimension
            of the classes is not known; a callable that does not return a tensor.
    """
    if callable(score):
        scores = score(output)
        if not isinstance(scores, Tensor):
            raise ArgumentError(
                f"`score` must return a tensor of scores, got {type(scores)}.", "score"
            )
        return full_precision(scores)
    check_can_be_scores(output)
    output = full_precision(output)
    if score == "softmax":
        _check_softmax(output, n_dims)
        return output.softmax(1)
    return output.sigmoid() if score == "sigmoid" else output


def scoring_forward(forward_func: Forward, score: Score) -> Forward:
    """`forward_func` followed by `compute_scores`."""
    check_score(score)

    def forward(*args: Any) -> Tensor:
        return compute_scores(forward_func(*args), score, count_dims(args))

    forward.__wrapped__ = forward_func  # type: ignore[attr-defined]
    return forward


def count_dims(inputs: Sequence[Any]) -> int:
    """The most dimensions of the tensors among a model's inputs."""
    return max((x.dim() for x in inputs if isinstance(x, Tensor)), default=0)


def check_classes_first(output: Tensor, n_dims: int, option: str) -> None:
    """Raise a ValueError unless the output is known to have its classes in dimension 1.

    Outputs are (B, K), or have as many dimensions as the inputs: the segmentation (B, K, H, W) of
    images. A detector's (B, boxes, 5 + K) has other numbers in dimension 1.

    Args:
        output: of the model.
        n_dims: the number of dimensions of the model's input.
        option: the argument and its value, for the error.
    """
    if output.dim() not in (2, n_dims) and output.shape[2:].numel() > 1:
        raise ArgumentError(
            f"{option} needs classes in dimension 1, which is not known of outputs of shape "
            f"{tuple(output.shape)}: classes may be last, as a detector's are. Pass a "
            f"`forward_func` that returns (B, K), the classes of one box, such as "
            f"`lambda x: model(x)[:, box]`; or, for a score, "
            f"score=lambda output: output.softmax(-1)."
        )


def _check_softmax(output: Tensor, n_dims: int) -> None:
    if output.dim() < 2 or output.shape[1] < 2:
        raise ArgumentError(
            f"`score` 'softmax' needs two classes or more in dimension 1, got outputs of shape "
            f"{tuple(output.shape)}. For a single logit, use 'sigmoid' or 'logit'.",
            "score",
        )
    check_classes_first(output, n_dims, "`score` 'softmax'")


def check_one_score_per_example(score: Tensor) -> None:
    """Raise Captum's AssertionError if `score` has several numbers for one example."""
    if score.dim() and score[0].numel() != 1:
        raise AssertionError(
            f"Target not provided when necessary: there are several scores for each example, of "
            f"shape {tuple(score.shape[1:])}. `target` must select one: an int, or a tuple of ints "
            f"for outputs with more than one dimension."
        )


def check_model_output(output: Any, n: int, argument: str = "forward_func") -> None:
    """Raise an error unless `output` is a floating-point tensor with `n` entries.

    Args:
        output: the model's output.
        n: the number of examples.
        argument: the model's name in errors.
    """
    is_dense = isinstance(output, Tensor) and output.layout == torch.strided
    if not is_dense or not output.is_floating_point():
        received: Any = type(output)
        if isinstance(output, Tensor):
            received = output.dtype if is_dense else output.layout
        raise ArgumentTypeError(
            f"`{argument}` must give a tensor of floats, got {received}.", argument
        )
    if output.dim() == 0 or len(output) != n or not output.numel():
        raise ArgumentError(
            f"`{argument}` must give scores for each of {n} examples, got {tuple(output.shape)}.",
            argument,
        )


def compute_log_scores(output: Tensor, score: Score, n_dims: int) -> Tensor:
    """The logarithms of `compute_scores`, in float32 or better; -inf for scores of 0 and less."""
    if score == "sigmoid":
        return F.logsigmoid(full_precision(output))
    if score == "softmax":
        _check_softmax(output, n_dims)
        return full_precision(output).log_softmax(1)
    return compute_scores(output, score, n_dims).clamp(min=0).log()


# --- targets and arguments of examples -----------------------------------------------------------


class ExampleArguments:
    """The target and the additional arguments of each example of a batch.

    A tensor with one entry for each example (for targets, a list too) is indexed by example. Other
    values are passed on unchanged.

    Args:
        n_examples: B.
        target: in any of Captum's forms.
        additional_forward_args: as in Captum.
        device: the device of the inputs.

    Raises:
        AssertionError: `target` has several entries, but not one for each example.
    """

    def __init__(
        self,
        n_examples: int,
        target: TargetType = None,
        additional_forward_args: Any = None,
        device: torch.device | None = None,
    ) -> None:
        self.n_examples = n_examples
        self.target = target_per_example(target, n_examples, device)
        extra = _format_additional_forward_args(additional_forward_args) or ()
        self.extra_args = tuple(as_normal_tensor(value) for value in extra)

    def targets_for(self, examples: Tensor) -> TargetType:
        """The targets of m inputs, made from the examples with the indices `examples` (m,)."""
        target: Any = self.target
        if isinstance(target, Tensor):
            return target[examples.to(target.device)]
        return [target[i] for i in examples.tolist()] if isinstance(target, list) else target

    def extra_args_for(self, examples: Tensor) -> tuple[Any, ...]:
        """The additional arguments of m inputs, made from `examples` (m,)."""

        def select(value: Any) -> Any:
            is_tensor = isinstance(value, Tensor) and value.dim() > 0
            has_examples = is_tensor and len(value) == self.n_examples
            return value[examples.to(value.device)] if has_examples else value

        return tuple(select(value) for value in self.extra_args)


class Scorer(ExampleArguments):
    """Scores inputs that are made from a batch's examples: masked, cropped or noisy ones.

    Args:
        forward_func: the model.
        n_examples: B.
        target: in any of Captum's forms.
        additional_forward_args: as in Captum.
        score: see `compute_scores`.
        device: the device of the inputs.
        argument: the name of `forward_func` in errors.

    Raises:
        AssertionError: `target` has several entries, but not one for each example.
        ValueError: an unknown `score`.
    """

    def __init__(
        self,
        forward_func: Forward,
        n_examples: int,
        target: TargetType = None,
        additional_forward_args: Any = None,
        score: Score = "logit",
        device: torch.device | None = None,
        argument: str = "forward_func",
    ) -> None:
        check_score(score)
        check_target(target)
        super().__init__(n_examples, target, additional_forward_args, device)
        self.forward_func, self.score, self.argument = forward_func, score, argument
        self.has_selected = False

    def outputs(self, inputs: Tensors, examples: Tensor) -> Tensor:
        """Run the model on m inputs, and check its output.

        Args:
            inputs: the model's inputs, each (m, ...).
            examples: (m,), int64: the index of the example that each input is made from.
        """
        with explained_faults(self.forward_func, inputs):
            output = self.forward_func(*inputs, *self.extra_args_for(examples))
        check_model_output(output, len(examples), self.argument)
        checked: Tensor = output
        return checked

    def __call__(self, inputs: Tensors, examples: Tensor) -> Tensor:
        """The scores (m,) of m inputs, in float32 or better; arguments as in `outputs`."""
        output = self.outputs(inputs, examples)
        return self.select(compute_scores(output, self.score, count_dims(inputs)), examples)

    def select(self, scores: Tensor, examples: Tensor) -> Tensor:
        """The targets' scores (m,) of scores (m, ...) of inputs that are made from `examples`."""
        if not self.has_selected:  # once, because it may synchronise with the device
            if not scores.is_cpu:
                check_on_host((self.n_examples, *scores.shape[1:]), self.target)
            self.has_selected = True
        return select_target(scores, self.targets_for(examples), is_checked=True)


def select_target(scores: Tensor, target: TargetType, *, is_checked: bool = False) -> Tensor:
    """Select the scores of the target, (m,), from scores (m, ...); see `select_entries`."""
    if isinstance(target, Tensor):
        target = target.to(scores.device)
    selected: Tensor = select_entries(scores, target, is_checked=is_checked)
    check_one_score_per_example(selected)
    return selected.reshape(-1)


def target_per_example(target: TargetType, n: int, device: torch.device | None = None) -> Any:
    """Reduce Captum's forms of a target to five: None, int, tuple, tensor (n,), list of n tuples.

    A tensor is moved to `device`.
    """
    if isinstance(target, list):
        if len(target) != n:
            raise AssertionError(
                f"`target` has {len(target)} entries for {n} examples, not one for each."
            )
        if all(isinstance(t, int) for t in target):
            return torch.tensor(target, dtype=torch.int64, device=device)
    if isinstance(target, Tensor):
        if target.numel() == 1 and not target.is_floating_point():
            return int(target.item())
        if target.shape != (n,):
            raise AssertionError(
                f"`target` must be one number, or one for each of {n} examples, got a tensor of "
                f"shape {tuple(target.shape)}."
            )
        return target.to(device)
    return target


def as_normal_tensor(value: Any) -> Any:
    """Clone an inference tensor, which autograd cannot save; return other values unchanged."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


# --- chunks --------------------------------------------------------------------------------------


def default_batch_size(device: torch.device) -> int:
    """The default number of inputs in one forward pass."""
    return 16 if device.type == "cpu" else 64


def even_chunk_size(count: int, max_size: int) -> int:
    """The chunk size that splits `count` items into equal chunks, as few as `max_size` allows."""
    return math.ceil(count / math.ceil(count / max(max_size, 1)))
