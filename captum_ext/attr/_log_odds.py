"""The score of FIDO: the log-odds of a class, stable where its probability saturates."""

import torch
from torch import Tensor

from captum_ext._compat import TargetType, _select_targets
from captum_ext._engine.outputs import check_one_score_per_example
from captum_ext._engine.precision import full_precision

OUTPUTS = ("logits", "probabilities")


def log_odds(output: Tensor, target: TargetType, outputs: str = "logits") -> Tensor:
    r"""Log-odds of the target for each example, (B,), in float32 or better.

    .. math::
        s_c = \log \frac{p_c}{1 - p_c} = l_c - \log \sum_{j \neq c} e^{l_j}

    (Eq. 4 of Korsch et al., 2023.) Its derivative by l_c is 1, however sure the model is. Any shift
    of the logits cancels, so that logarithms of probabilities are as good.

    Args:
        output: (B, K), or (B, K, ...) with classes in dimension 1 and targets that are tuples, the
            class first. (B,), (B, 1) or (B, 1, ...) is the one logit of a model of two classes:
            target 1 or None is the class that it speaks for, with s = l, and 0 the other, -l.
        target: in any of Captum's forms.
        outputs: "logits", also shifted ones like log-probabilities, or "probabilities".

    Raises:
        AssertionError: a target that does not select one class for each example.
    """
    values = full_precision(output)
    if values.dim() == 1 or values.shape[1] == 1:
        return _of_one(values, target, outputs)
    if outputs == "probabilities":
        values = values.clamp(min=torch.finfo(values.dtype).tiny).log()
    n, classes, places = len(values), values.shape[1], values[0, 0].numel()
    # Where Captum finds the target of each example.
    numbers = torch.arange(classes * places, device=values.device)
    chosen = _select_targets(numbers.reshape(1, *values.shape[1:]).expand_as(values), target)
    check_one_score_per_example(chosen)
    at_class, at_place = chosen.reshape(-1) // places, chosen.reshape(-1) % places
    every = torch.arange(n, device=values.device)
    logits = values.reshape(n, classes, places)[every, :, at_place]
    is_target = torch.arange(classes, device=values.device) == at_class[:, None]
    others = logits.masked_fill(is_target, -torch.inf).logsumexp(1)
    odds: Tensor = logits[every, at_class] - others
    return odds


def _of_one(values: Tensor, target: TargetType, outputs: str) -> Tensor:
    """The log-odds of an output that speaks for class 1 of two."""
    if values.dim() == 1:
        values = values[:, None]
    if outputs == "probabilities":
        tiny = torch.finfo(values.dtype).tiny
        values = values.clamp(min=tiny).log() - (1 - values).clamp(min=tiny).log()
    if target is None:
        check_one_score_per_example(values)
        return values.reshape(-1)
    both = torch.cat((-values, values), 1)  # class 0 is the other one
    selected: Tensor = _select_targets(both, target)
    check_one_score_per_example(selected)
    return selected.reshape(-1)
