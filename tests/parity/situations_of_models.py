"""Situations of models that public bug reports tell of, which a layer method must survive.

A situation gets a `Method` of any library and raises where the method does not survive it. The
criterion is the same for all: mostly that the map equals the same method's map of a plain model.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.networks import Lambda, RaisingLayer
from tests.parity.survival_subjects import (
    Autocast,
    Method,
    assert_alike,
    assert_correlated,
    hooks_of,
    net,
    pictures,
)

# --- gradients -----------------------------------------------------------------------------------


def frozen_parameters(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#80, meta-pytorch/captum#226, Project-MONAI/MONAI#3035."""
    model = net().requires_grad_(False)
    assert_alike(method.explain(model, pictures()), method.explain(net(), pictures()))


def partly_frozen_parameters(method: Method) -> None:
    """Flags stay as they were, the frozen ones and the others."""
    model = net()
    model.stem.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    assert_alike(method.explain(model, pictures()), method.explain(net(), pictures()))
    assert [p.requires_grad for p in model.parameters()] == flags


def frozen_backbone_without_graph(method: Method) -> None:
    """What lies before the layer runs under `no_grad`."""
    model = net()
    model.stem.forward = torch.no_grad()(model.stem.forward)
    assert_alike(method.explain(model, pictures()), method.explain(net(), pictures()))


def inside_no_grad(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#187 and #381: validation loops run under `no_grad`."""
    with torch.no_grad():
        maps = method.explain(net(), pictures())
        assert not torch.is_grad_enabled()
    assert_alike(maps, method.explain(net(), pictures()))


def inside_inference_mode(method: Method) -> None:
    """Works, or the error names the mode."""
    plain, message = method.explain(net(), pictures()), ""
    with torch.inference_mode():
        try:
            maps = method.explain(net(), pictures())
        except Exception as error:
            message = str(error)
    if message:
        assert "inference" in message.lower(), message
    else:
        assert_alike(maps, plain)


def gradients_of_the_caller(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#488: accumulated `.grad` survives."""
    model = net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    method.explain(model, pictures())
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())


def no_gradients_are_left(method: Method) -> None:
    """Parameters without `.grad` have none afterwards, and the input neither."""
    model, x = net(), pictures().requires_grad_()
    method.explain(model, x)
    assert x.grad is None
    assert x.requires_grad
    assert all(p.grad is None for p in model.parameters())


def maps_hold_no_graph(method: Method) -> None:
    """A list of kept maps does not keep every forward pass."""
    assert not method.explain(net(), pictures()).requires_grad


def gradients_checkpointed_behind_the_layer(method: Method) -> None:
    model = net(behind=lambda y: checkpoint(torch.relu, y, use_reentrant=False))
    assert_alike(method.explain(model, pictures()), method.explain(net(), pictures()))


# --- the model is left as it was -----------------------------------------------------------------


def error_in_the_middle(method: Method) -> None:
    """The model's own error comes through, and no hook is left."""
    model = net()
    model.behind = RaisingLayer()
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        method.explain(model, pictures())
    assert hooks_of(model) == before


def hooks_of_the_user(method: Method) -> None:
    """A hook that doubles the layer's output counts, and stays."""
    plain = net()
    plain.layer = nn.Sequential(plain.layer, Lambda(lambda y: 2 * y))
    model = net()
    model.layer.register_forward_hook(lambda module, args, output: 2 * output)
    before = hooks_of(model)
    assert_alike(method.explain(model, pictures()), method.explain(plain, pictures()))
    assert hooks_of(model) == before


def modes_of_the_modules(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#488: train mode, with one frozen norm."""
    model = net().train()
    model.norm.eval()
    flags = [m.training for m in model.modules()]
    method.explain(model, pictures())
    assert [m.training for m in model.modules()] == flags


def statistics_of_the_norms(method: Method) -> None:
    """Project-MONAI/MONAI#1710: an explanation in train mode does not train."""
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    method.explain(model, pictures())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def input_of_the_caller(method: Method) -> None:
    """The input keeps its values and needs no gradient afterwards."""
    x = pictures()
    method.explain(net(), x)
    assert not x.requires_grad
    assert torch.equal(x, pictures())


def copied_and_pickled_after_use(method: Method) -> None:
    model = net()
    method.explain(model, pictures())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hooks_of(twin) == hooks_of(net())
        assert torch.equal(twin(pictures()), model(pictures()))


def garbage_collected_after_use(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#88 and #78: no cycle keeps the model until a collection."""
    model = net()
    reference = weakref.ref(model)
    method.explain(model, pictures())
    gc.collect()
    gc.disable()
    try:
        method.explain(model, pictures())
        del model
        assert reference() is None
    finally:
        gc.enable()


# --- models --------------------------------------------------------------------------------------


def in_place_relu_behind_the_layer(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#147, meta-pytorch/captum#973, frgfm/torch-cam#72."""
    model = net(behind=torch.relu_)
    assert_alike(method.explain(model, pictures()), method.explain(net(), pictures()))


def in_place_residual_behind_the_layer(method: Method) -> None:
    model, plain = net(behind=lambda y: y.add_(1).relu_()), net(behind=lambda y: (y + 1).relu())
    assert_alike(method.explain(model, pictures()), method.explain(plain, pictures()))


def shared_relu(method: Method) -> None:
    """One module runs before and behind the layer."""
    model, relu = net(), nn.ReLU()
    model.norm, model.behind = nn.Sequential(model.norm, relu), relu
    assert_alike(method.explain(model, pictures()), method.explain(net(), pictures()))


def flat_activations(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#107 and #214, frgfm/torch-cam#36: no NaN."""
    model = net()
    nn.init.zeros_(model.layer.weight)
    nn.init.zeros_(model.layer.bias)
    assert bool(method.explain(model, pictures()).isfinite().all())


def data_parallel(method: Method) -> None:
    model = nn.DataParallel(net())
    assert_alike(method.explain(model, pictures()), method.explain(net(), pictures()))


def autocast(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#329."""
    maps = method.explain(net(Autocast), pictures())
    assert_correlated(maps, method.explain(net(), pictures()))


def bfloat16(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#96 and #442."""
    maps = method.explain(net().bfloat16(), pictures().bfloat16())
    assert_correlated(maps, method.explain(net(), pictures()))


def float64(method: Method) -> None:
    maps = method.explain(net().double(), pictures().double())
    assert_alike(maps, method.explain(net(), pictures()), 1e-3)


def channels_last(method: Method) -> None:
    model, x = net().to(memory_format=torch.channels_last), pictures()
    maps = method.explain(model, x.to(memory_format=torch.channels_last))
    assert_alike(maps, method.explain(net(), pictures()))


SITUATIONS: list[Callable[[Method], None]] = [
    frozen_parameters,
    partly_frozen_parameters,
    frozen_backbone_without_graph,
    inside_no_grad,
    inside_inference_mode,
    gradients_of_the_caller,
    no_gradients_are_left,
    maps_hold_no_graph,
    gradients_checkpointed_behind_the_layer,
    error_in_the_middle,
    hooks_of_the_user,
    modes_of_the_modules,
    statistics_of_the_norms,
    input_of_the_caller,
    copied_and_pickled_after_use,
    garbage_collected_after_use,
    in_place_relu_behind_the_layer,
    in_place_residual_behind_the_layer,
    shared_relu,
    flat_activations,
    data_parallel,
    autocast,
    bfloat16,
    float64,
    channels_last,
]
