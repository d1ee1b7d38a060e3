"""The score of FIDO: the log-odds of a class, stable where its probability saturates."""

import torch
from torch import Tensor

from captum_ext._compat import TargetType
from captum_ext._engine.outputs import check_one_score_per_example, select_target
from captum_ext._engine.precision import full_precision

OUTPUTS = ("logits", "probabilities")


def log_odds(
    output: Tensor, target: TargetType, outputs: str = "logits", *, is_checked: bool = False
) -> Tensor:
    r"""Log-odds of the target for each example, (B,), in float32 or better.

    .. math::
        s_c = \log \frac{p_c}{1 - p_c} = l_c - \log \sum_{j \neq c} e^{l_j}

    (Eq. 4 of Korsch et al., 2023.) Its derivative by l_c is 1, even where the probability is close
    to 1. A shift of all logits cancels, so that logarithms of probabilities give the same result.

    Args:
        output: (B, K), or (B, K, ...) with classes in dimension 1 and targets that are tuples, the
            class first. (B,), (B, 1) or (B, 1, ...) is the single logit of a model of two classes:
            target 1 or None is its class, with s = l, and target 0 is the other one, with s = -l.
        target: in any of Captum's forms.
        outputs: "logits" (also shifted ones, like log-probabilities) or "probabilities".
        is_checked: see `select_target`.

    Raises:
        AssertionError: a target that does not select one class for each example.
    """
    values = full_precision(output)
    if values.dim() == 1 or values.shape[1] == 1:
        return _single_log_odds(values, target, outputs, is_checked)
    if outputs == "probabilities":
        values = values.clamp(min=torch.finfo(values.dtype).tiny).log()
    n, n_classes, n_cells = len(values), values.shape[1], values[0, 0].numel()
    # Captum's selection from the indices of the values tells the class and cell of each target.
    indices = torch.arange(n_classes * n_cells, device=values.device)
    numbers = indices.reshape(1, *values.shape[1:]).expand_as(values)
    selected = select_target(numbers, target, is_checked=is_checked)
    target_class, cell = selected // n_cells, selected % n_cells
    rows = torch.arange(n, device=values.device)
    logits = values.reshape(n, n_classes, n_cells)[rows, :, cell]
    is_target = torch.arange(n_classes, device=values.device) == target_class[:, None]
    others = logits.masked_fill(is_target, -torch.inf).logsumexp(1)
    odds: Tensor = logits[rows, target_class] - others
    return odds


def _single_log_odds(values: Tensor, target: TargetType, outputs: str, is_checked: bool) -> Tensor:
    """The log-odds of a single output, which stands for class 1 of two."""
    if values.dim() == 1:
        values = values[:, None]
    if outputs == "probabilities":
        tiny = torch.finfo(values.dtype).tiny
        values = values.clamp(min=tiny).log() - (1 - values).clamp(min=tiny).log()
    if target is None:
        check_one_score_per_example(values)
        return values.reshape(-1)
    both = torch.cat((-values, values), 1)  # class 0 is the other one
    return select_target(both, target, is_checked=is_checked)
