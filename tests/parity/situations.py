"""Situations that public bug reports tell of, each as a function that a layer method must survive.

A situation gets a `Method` of any library and raises where the method does not survive it. The
criterion is the same for all: mostly that the map equals the same method's map of a plain model.
"""

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.networks import Lambda, RaisingLayer

Explain = Callable[..., Tensor]  # explain(inputs, target, *additional_forward_args)


@dataclass(frozen=True)
class Method:
    """A layer method of one library; `open(model, layer)` gives `Explain` inside its block."""

    library: str
    name: str
    open: Callable[[nn.Module, nn.Module], AbstractContextManager[Explain]]

    def __str__(self) -> str:
        return f"{self.library}: {self.name}"

    def explain(self, model: nn.Module, inputs: Any, target: Any = 1, *extra: Any) -> Tensor:
        """The maps of the model's layer, as a user would ask for them once."""
        with self.open(model, unwrap(model).layer) as explain:
            return explain(inputs, target, *extra)


class Net(nn.Module):
    """conv - norm - ReLU - layer - `behind` - means - linear, in one to three dimensions."""

    def __init__(self, dims: int = 2, behind: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.stem = conv(3, 6, 3, padding=1)
        self.norm = norm(6)
        self.layer: nn.Module = conv(6, 6, 3, padding=1)
        self.behind = Lambda(behind)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        x = self.layer(torch.relu(self.norm(self.stem(x))))
        return self.fc(self.behind(x).flatten(2).mean(2)) * scale


class TwoInputs(Net):
    """A network of two pictures of one size."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x - y)


class Autocast(Net):
    """A network that runs under an autocast of its own."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def net(cls: type[Net] = Net, **options: Any) -> Net:
    """A seeded network whose classes differ, the same for all options."""
    torch.manual_seed(0)
    model = cls(**options).eval()
    nn.init.normal_(model.fc.weight)
    return model


def unwrap(model: nn.Module) -> Net:
    """The network in a `DataParallel`, or itself."""
    network = model.module if isinstance(model, nn.DataParallel) else model
    assert isinstance(network, Net)
    return network


def pictures(n: int = 2, *size: int) -> Tensor:
    return torch.randn(n, 3, *(size or (8, 8)), generator=torch.Generator().manual_seed(1))


def assert_alike(maps: Tensor, plain: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to `tolerance` times the range of `plain`, which is not flat."""
    assert maps.shape == plain.shape, f"shape {tuple(maps.shape)}, not {tuple(plain.shape)}"
    maps, plain = maps.detach().double(), plain.detach().double()
    span = plain.max() - plain.min()
    assert span > 0, "a flat map proves nothing"
    difference = (maps - plain).abs().max() / span
    assert difference <= tolerance, f"differs by {float(difference):.1e}"


def assert_correlated(maps: Tensor, plain: Tensor, at_least: float = 0.95) -> None:
    """For half precision, whose scores have two or three digits."""
    assert maps.shape == plain.shape, f"shape {tuple(maps.shape)}, not {tuple(plain.shape)}"
    pair = torch.stack([maps.detach().double().flatten(), plain.detach().double().flatten()])
    correlation = float(torch.corrcoef(pair)[0, 1])
    assert correlation >= at_least, f"correlation {correlation:.2f}"


def hooks_of(model: nn.Module) -> list[tuple[str, str, int]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(m, h, len(getattr(part, h))) for m, part in model.named_modules() for h in names]


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


# --- inputs and targets --------------------------------------------------------------------------


def non_square_inputs(method: Method) -> None:
    """Transposed weights and a transposed picture give the transposed map."""
    model = net()
    for conv in (model.stem, model.layer):
        conv.weight.data = conv.weight.data.transpose(2, 3).contiguous()
    maps = method.explain(model, pictures(2, 8, 12).transpose(2, 3).contiguous())
    assert_alike(maps.transpose(-1, -2), method.explain(net(), pictures(2, 8, 12)))


def signals(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#233 and #361."""
    maps = method.explain(net(dims=1), pictures(2, 9))
    assert maps.shape[-1] == 9
    assert maps.max() > maps.min()


def volumes(method: Method) -> None:
    maps = method.explain(net(dims=3), pictures(2, 4, 5, 6))
    assert maps.shape[-3:] == (4, 5, 6)
    assert maps.max() > maps.min()


def list_of_targets(method: Method) -> None:
    maps = method.explain(net(), pictures(), [1, 2])
    alone = [method.explain(net(), pictures(), target)[i] for i, target in enumerate((1, 2))]
    assert_alike(maps, torch.stack(alone))


def batch_equals_its_examples(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#264 and #322."""
    x = pictures(3)
    maps = method.explain(net(), x)
    assert_alike(maps, torch.cat([method.explain(net(), x[i : i + 1]) for i in range(3)]))


def empty_batch(method: Method) -> None:
    """No maps, or an error of arguments: not one from deep inside."""
    try:
        maps = method.explain(net(), pictures(0))
    except (AssertionError, TypeError, ValueError):
        return
    assert len(maps) == 0


def extra_forward_argument(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#501; a scale of 1 for each example changes nothing."""
    maps = method.explain(net(), pictures(), 1, torch.ones(2, 1))
    assert_alike(maps, method.explain(net(), pictures()))


def two_inputs(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#253, frgfm/torch-cam#151."""
    maps = method.explain(net(TwoInputs), (pictures(), torch.zeros(2, 3, 8, 8)))
    assert_alike(maps, method.explain(net(), pictures()))


# --- more than one use ---------------------------------------------------------------------------


def used_twice(method: Method) -> None:
    """The same object explains another batch in between."""
    model = net()
    with method.open(model, model.layer) as explain:
        first = explain(pictures(), 1).clone()
        explain(pictures(3, 12, 12), 2)
        assert_alike(explain(pictures(), 1), first)


def two_objects_at_once(method: Method) -> None:
    """frgfm/torch-cam#195: of one model and one layer."""
    model = net()
    plain = method.explain(net(), pictures()), method.explain(net(), pictures(3), 2)
    with method.open(model, model.layer) as one, method.open(model, model.layer) as other:
        maps = one(pictures(), 1).clone(), other(pictures(3), 2)
    for got, wanted in zip(maps, plain, strict=True):
        assert_alike(got, wanted)


def eight_threads(method: Method) -> None:
    """SeldonIO/alibi#593: one model serves eight threads, each with an object of its own."""
    model, batches = net(), [pictures(i % 3 + 1, 8 + i, 8) for i in range(8)]
    plain = [method.explain(net(), x) for x in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns often
    try:
        with ThreadPoolExecutor(8) as pool:
            maps = list(pool.map(lambda x: method.explain(model, x), batches * 8))
    finally:
        sys.setswitchinterval(interval)
    for got, wanted in zip(maps, plain * 8, strict=True):
        assert_alike(got, wanted)


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
    non_square_inputs,
    signals,
    volumes,
    list_of_targets,
    batch_equals_its_examples,
    empty_batch,
    extra_forward_argument,
    two_inputs,
    used_twice,
    two_objects_at_once,
    eight_threads,
]
