"""What a model returns, as scores; chunks in which targets and arguments follow their examples."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_ext._compat import TargetType, _format_additional_forward_args, _select_targets
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.precision import full_precision

Score = str | Callable[[Tensor], Tensor]
SCORES = ("logit", "sigmoid", "softmax")


# --- scores --------------------------------------------------------------------------------------


def check_score(score: Score) -> None:
    """Raise a ValueError unless `score` is one of the names or a callable."""
    if not callable(score) and score not in SCORES:
        raise ValueError(f"`score` must be one of {SCORES} or a callable, got {score!r}.")


def compute_scores(output: Tensor, score: Score) -> Tensor:
    """The scores of a model's output, in float32 or better.

    Args:
        output: logits, classes in dimension 1.
        score: "logit" (the output as it is), "softmax" or "sigmoid" (probabilities), or a callable
            of the whole output.

    Raises:
        ValueError: the softmax of a single logit, which is 1 whatever the model says.
    """
    if callable(score):
        scores = score(output)
        if not isinstance(scores, Tensor):
            raise ValueError(f"`score` must leave a tensor of scores, got {type(scores)}.")
        return full_precision(scores)
    output = full_precision(output)
    if score == "softmax":
        _check_several_classes(output)
        return output.softmax(1)
    return output.sigmoid() if score == "sigmoid" else output


def scoring_forward(forward_func: Forward, score: Score) -> Forward:
    """`forward_func` with its output turned into scores; see `compute_scores`."""
    check_score(score)

    def forward(*args: Any) -> Tensor:
        return compute_scores(forward_func(*args), score)

    forward.__wrapped__ = forward_func  # type: ignore[attr-defined]
    return forward


def _check_several_classes(output: Tensor) -> None:
    if output.dim() < 2 or output.shape[1] < 2:
        raise ValueError(
            f"`score` 'softmax' needs two classes or more in dimension 1, got outputs of shape "
            f"{tuple(output.shape)}: for one logit there are 'sigmoid' and 'logit'."
        )


def check_one_score_per_example(score: Tensor) -> None:
    """Raise the error that Captum raises where `target` leaves several numbers for one example."""
    assert score.dim() == 0 or score[0].numel() == 1, (
        "Target not provided when necessary, cannot take gradient with respect to multiple outputs."
    )


def check_model_output(output: Any, n: int, argument: str = "forward_func") -> None:
    """Raise an error unless the output of `argument` holds floats for each of `n` examples."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        shown = output.dtype if isinstance(output, Tensor) else type(output)
        raise TypeError(f"`{argument}` must give a tensor of floats, got {shown}.")
    if output.dim() == 0 or len(output) != n:
        raise ValueError(
            f"`{argument}` must give scores for each of {n} examples, got {tuple(output.shape)}."
        )


def compute_log_scores(output: Tensor, score: Score) -> Tensor:
    """The logarithms of the scores of an output, in float32 or better; -inf for what is below 0."""
    if score == "sigmoid":
        return F.logsigmoid(full_precision(output))
    if score == "softmax":
        _check_several_classes(output)
        return full_precision(output).log_softmax(1)
    return compute_scores(output, score).clamp(min=0).log()


# --- arguments that follow their examples --------------------------------------------------------


class ExampleArguments:
    """Target and additional arguments of the model, which follow their examples.

    A tensor or list with one entry for each example is picked by example; anything else is handed
    on as it is.

    Args:
        n_examples: B.
        target: in any of Captum's forms.
        additional_forward_args: as in Captum.
        device: of the inputs.

    Raises:
        AssertionError: a target that is not one for each example.
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
        self.extra = tuple(as_normal_tensor(value) for value in extra)

    def targets_for(self, examples: Tensor) -> TargetType:
        """The target of each of m entries, which are made of `examples` (m,)."""
        target: Any = self.target
        if isinstance(target, Tensor):
            return target[examples.to(target.device)]
        return [target[i] for i in examples.tolist()] if isinstance(target, list) else target

    def extra_args_for(self, examples: Tensor) -> tuple[Any, ...]:
        """The additional arguments, likewise."""

        def entries(value: Any) -> Any:
            is_tensor = isinstance(value, Tensor) and value.dim() > 0
            is_each = is_tensor and len(value) == self.n_examples
            return value[examples.to(value.device)] if is_each else value

        return tuple(entries(value) for value in self.extra)


class Scorer(ExampleArguments):
    """The scores of inputs that are made of a batch's examples: masked, cropped or noisy.

    Args:
        forward_func: the model.
        n_examples: see `ExampleArguments`, as for the next two.
        target: in any of Captum's forms.
        additional_forward_args: as in Captum.
        score: see `scoring_forward`.
        device: of the inputs.
        argument: the name of `forward_func` in errors.

    Raises:
        AssertionError: a target that is not one for each example.
        ValueError: an unknown score.
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
        super().__init__(n_examples, target, additional_forward_args, device)
        self.forward_func, self.score, self.argument = forward_func, score, argument

    def outputs(self, inputs: Tensors, examples: Tensor) -> Tensor:
        """What the model returns for inputs made of these examples, checked.

        Args:
            inputs: the model's inputs, m entries each.
            examples: (m,), int64: the example of each entry.
        """
        output = self.forward_func(*inputs, *self.extra_args_for(examples))
        check_model_output(output, len(examples), self.argument)
        checked: Tensor = output
        return checked

    def __call__(self, inputs: Tensors, examples: Tensor) -> Tensor:
        """The scores (m,), in float32 or better; see `outputs`."""
        output = self.outputs(inputs, examples)
        return select_target(compute_scores(output, self.score), self.targets_for(examples))


def select_target(scores: Tensor, target: TargetType) -> Tensor:
    """What `target` selects of the scores (m, ...), one number for each entry: (m,)."""
    if isinstance(target, Tensor):
        target = target.to(scores.device)
    selected: Tensor = _select_targets(scores, target)
    check_one_score_per_example(selected)
    return selected.reshape(-1)


def target_per_example(target: TargetType, n: int, device: torch.device | None = None) -> Any:
    """The target as None, an int, a tuple, a tensor (n,) on the device or a list of n tuples."""
    if isinstance(target, list):
        assert len(target) == n, f"Target list length {len(target)} is not that of inputs, {n}."
        if all(isinstance(t, int) for t in target):
            return torch.tensor(target, dtype=torch.int64, device=device)
    if isinstance(target, Tensor):
        if target.numel() == 1 and not target.is_floating_point():
            return int(target.item())
        assert target.shape == (n,), f"Tensor target dimension {tuple(target.shape)} is not valid."
        return target.to(device)
    return target


def as_normal_tensor(value: Any) -> Any:
    """`value`, or a copy of a tensor that inference mode made: no graph may hold that one."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


# --- chunks --------------------------------------------------------------------------------------


def default_batch_size(device: torch.device) -> int:
    """How many inputs the model gets at once where nothing else is said."""
    return 16 if device.type == "cpu" else 64


def even_chunk_size(count: int, most: int) -> int:
    """The size of as few chunks of at most `most` as there can be, about equal."""
    return math.ceil(count / math.ceil(count / max(most, 1)))
