"""A replay behind a layer gives the same scores as full passes of the model."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import (
    densenet121,
    mobilenet_v3_small,
    resnet18,
    shufflenet_v2_x0_5,
    swin_t,
)

from captum_ext._engine.replay import LayerReplay
from tests.networks import (
    AutocastNet,
    DataDependentNet,
    TwoConvNet,
    narrow_vgg,
    small_net,
    small_swin,
    vision_transformer,
)


def drop_channel(a: Tensor, channel: Tensor) -> Tensor:
    numbers = torch.arange(a.shape[1]).reshape((1, -1) + (1,) * (a.dim() - 2))
    return torch.where(numbers == channel, 0, a)


def full_forward(
    model: nn.Module, layer: nn.Module, x: Tensor, target: Any, channel: int
) -> Tensor:
    """The scores without one channel, by a hook and a full forward pass."""
    handle = layer.register_forward_hook(lambda m, args, y: drop_channel(y, torch.tensor(channel)))
    with torch.no_grad():
        scores = model(x)[range(len(x)), target]
    handle.remove()
    return scores


@contextmanager
def slow_replay_warnings() -> Iterator[list[str]]:
    """Collects the warnings that a replay cannot run several edits at once."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if "several edits at once" in str(w.message)]


CASES: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "ResNet, last stage": (resnet18, "layer4", 64),
    "ResNet, inside a skip": (resnet18, "layer4.1.conv1", 64),
    "ResNet, beside a downsampling skip": (resnet18, "layer3.0.conv2", 64),
    "VGG": (narrow_vgg, "features.22", 64),
    "DenseNet, between concatenations": (densenet121, "features.denseblock4.denselayer3", 64),
    "MobileNet, with squeeze and excitation": (mobilenet_v3_small, "features.9.block.0", 64),
    "ShuffleNet, with channel shuffles": (shufflenet_v2_x0_5, "stage4.1", 64),
    "ViT": (vision_transformer, "encoder.layers.encoder_layer_0", 32),
    "Swin": (small_swin, "features.1.1", 32),
}
LARGE_CASES = {"Swin-T": (swin_t, "features.5.5", 64)}


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE_CASES)]
)
def test_a_replay_equals_full_passes(name: str) -> None:
    build, layer_name, size = (CASES | LARGE_CASES)[name]
    torch.manual_seed(0)
    model = build().eval().double()
    layer, x = model.get_submodule(layer_name), torch.randn(2, 3, size, size).double()
    target, channels = [3, 4], torch.tensor([0, 1, 4])
    with slow_replay_warnings() as messages:
        replay = LayerReplay(model, layer, (x,), target)
        scores = replay(drop_channel, channels)
    expected = torch.stack([full_forward(model, layer, x, target, int(k)) for k in channels])
    assert messages == []
    torch.testing.assert_close(replay.score, model(x)[range(2), target].detach())
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)
    effect = (expected - replay.score).abs().max() / replay.score.abs().max()
    assert effect > 1e-6, "an edit without effect proves nothing"


class ConvolutionCounter(TorchFunctionMode):
    """Counts the convolutions that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.convolutions += func is torch.conv2d
        return func(*args, **(kwargs or {}))


def test_only_the_part_behind_the_layer_is_computed_again() -> None:
    net, x = resnet18().eval(), torch.randn(1, 3, 32, 32)
    with ConvolutionCounter() as counter:
        replay = LayerReplay(net, net.layer4[0], (x,), 0)
        assert counter.convolutions == 20 + 2, "a full pass, and a second pass behind the layer"
        for chunk in torch.arange(512).split(128)[:2]:
            replay(drop_channel, chunk)
    assert counter.convolutions == 22 + 2 * 2, "layer4[1] has two convolutions; two chunks"


@pytest.mark.parametrize("where", ["in front", "behind", "in place", "numpy"])
def test_data_dependent_models_are_exact_and_warn_when_slow(where: str) -> None:
    torch.manual_seed(0)
    model, x = DataDependentNet(where).eval().double(), torch.randn(1, 3, 8, 8).double()
    expected = torch.cat([full_forward(model, model.conv2, x, [1], k) for k in range(4)])
    with slow_replay_warnings() as messages:
        replay = LayerReplay(model, model.conv2, (x,), 1)
        chunks = [replay(drop_channel, chunk) for chunk in torch.arange(4).split(3)]
    torch.testing.assert_close(torch.cat(chunks)[:, 0], expected, rtol=0, atol=1e-12)
    assert len(messages) == (where != "in front"), messages
    assert (replay.tape is None) == (where == "in place"), "the others need no full passes"


def write_into_the_input(model: Any, x: Tensor) -> Tensor:
    y = model.conv2(model.conv1(x))
    x.add_(1)
    return model.fc(y.mean((2, 3))) + x.mean()


def write_into_input_and_result(model: Any, x: Tensor) -> Tensor:
    x.sub_(0.5)
    z = model.conv1(x)
    y = model.conv2(z)
    z.add_(1)
    return model.fc(y.mean((2, 3))) + z.mean()


def write_the_same_unless_edited(model: Any, x: Tensor) -> Tensor:
    """A second pass without an edit gives the same score. With an edit, the write changes z."""
    z = model.conv1(x)
    y = model.conv2(z)
    z.clamp_(max=float(y.amax()))
    return model.fc(y.mean((2, 3))) + z.mean()


def write_through_data(model: Any, x: Tensor) -> Tensor:
    z = model.conv1(x)
    y = model.conv2(z)
    z.data.mul_(2)
    return model.fc(y.mean((2, 3))) + z.mean()


def write_through_numpy(model: Any, x: Tensor) -> Tensor:
    z = model.conv1(x)
    numbers = z.detach().numpy()
    numbers += 1
    return model.fc(model.conv2(z).mean((2, 3))) + z.mean()


def grow_a_list(model: Any, x: Tensor) -> Tensor:
    z = model.conv1(x)
    numbers = z.mean((0, 2, 3)).tolist()
    numbers[0] += 1
    return model.fc(model.conv2(z).mean((2, 3))) + sum(numbers)


def count_calls(model: Any, x: Tensor) -> Tensor:
    model.calls = getattr(model, "calls", 0) + 1
    return model.fc(model.conv2(model.conv1(x)).mean((2, 3))) * (1 if model.calls % 2 else 2)


@pytest.mark.parametrize(
    "body",
    [
        write_into_the_input,
        write_into_input_and_result,
        write_the_same_unless_edited,
        write_through_data,
        write_through_numpy,
        grow_a_list,
    ],
)
def test_writes_that_change_a_second_pass_are_detected(body: Any) -> None:
    torch.manual_seed(0)
    model, x = TwoConvNet(body).eval().double(), torch.randn(1, 3, 8, 8).double()
    before = x.clone()
    run = lambda y: model(y.clone())  # noqa: E731
    expected = torch.stack([full_forward(run, model.conv2, x, [1], k) for k in range(4)])
    with slow_replay_warnings() as messages:
        replay = LayerReplay(model, model.conv2, (x,), 1)
        scores = torch.cat([replay(drop_channel, chunk) for chunk in torch.arange(4).split(2)])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    assert len(messages) == 1
    assert torch.equal(x, before)


def test_writes_are_detected_where_scores_are_small() -> None:
    """Passes are compared relative to the score, which may be a probability of 1e-6."""
    torch.manual_seed(0)
    body = lambda model, x: 1e-6 * write_through_data(model, x)  # noqa: E731
    model, x = TwoConvNet(body).eval().double(), torch.randn(1, 3, 8, 8).double()
    expected = torch.stack([full_forward(model, model.conv2, x, [1], k) for k in range(4)])
    with slow_replay_warnings() as messages:
        scores = LayerReplay(model, model.conv2, (x,), 1)(drop_channel, torch.arange(4))
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)
    assert len(messages) == 1


def test_a_model_whose_passes_differ_takes_full_passes() -> None:
    model, x = TwoConvNet(count_calls).eval(), torch.randn(1, 3, 8, 8)
    with slow_replay_warnings() as messages:
        replay = LayerReplay(model, model.conv2, (x,), 1)
    assert replay.tape is None
    assert messages


def keep_in_an_attribute(model: Any, x: Tensor) -> Tensor:
    model.last = model.conv2(model.conv1(x))
    return model.fc(model.last.mean((2, 3)))


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * 2


script = torch.jit.script(Scripted())


def keep_the_result_of_a_script(model: Any, x: Tensor) -> Tensor:
    model.last = script(model.conv2(model.conv1(x)))
    return model.fc(model.last.mean((2, 3)))


def catch_the_error_of_vmap(model: Any, x: Tensor) -> Tensor:
    y = model.conv2(model.conv1(x))
    try:
        scale = y.abs().max().item()
    except RuntimeError:
        scale = 1.0
    return model.fc(y.mean((2, 3))) * scale


def cast_constants(model: Any, x: Tensor) -> Tensor:
    z = model.conv1(x)
    y = model.conv2(z)
    return model.fc(
        y.mean((2, 3)) * model.fc.weight[0].to(y) + z.to(y).mean((2, 3)) + y.new_ones(1)
    )


def keep_in_a_list(model: Any, x: Tensor) -> Tensor:
    y = model.conv2(model.conv1(x))
    model.__dict__.setdefault("seen", []).append(y)
    return model.fc(y.mean((2, 3)))


@pytest.mark.parametrize("root", ["module", "function"])
@pytest.mark.parametrize("where", ["attribute", "list", "hook", "script"])
def test_a_model_never_keeps_tensors_of_vmap(where: str, root: str) -> None:
    bodies = {"attribute": keep_in_an_attribute, "list": keep_in_a_list}
    bodies["script"] = keep_the_result_of_a_script
    plain = lambda m, x: m.fc(m.conv2(m.conv1(x)).mean((2, 3)))  # noqa: E731
    model, x = TwoConvNet(bodies.get(where, plain)).eval(), torch.randn(1, 3, 8, 8)
    model.scale = torch.tensor(1.0)  # a tensor without a length
    forward = model if root == "module" else lambda y: model(y)
    kept: list[Tensor] = []
    if where == "hook":
        model.fc.register_forward_hook(lambda m, args, y: kept.append(args[0]))
    model(x)
    with slow_replay_warnings() as messages:
        replay = LayerReplay(forward, model.conv2, (x,), 1)
        scores = replay(drop_channel, torch.arange(4))
    expected = torch.stack([full_forward(model, model.conv2, x, [1], k) for k in range(4)])
    torch.testing.assert_close(scores, expected)
    kept += [model.last] if where in ("attribute", "script") else []
    kept += model.seen if where == "list" else []
    assert all(torch.isfinite(t.sum()) for t in kept)
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("body", "n_messages"), [(catch_the_error_of_vmap, 1), (cast_constants, 0)]
)
def test_caught_errors_and_cast_constants_do_not_change_the_scores(
    body: Any, n_messages: int
) -> None:
    torch.manual_seed(0)
    model, x = TwoConvNet(body).eval().double(), torch.randn(1, 3, 8, 8).double()
    with slow_replay_warnings() as messages:
        scores = LayerReplay(model, model.conv2, (x,), 1)(drop_channel, torch.arange(4))
    expected = torch.stack([full_forward(model, model.conv2, x, [1], k) for k in range(4)])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    assert len(messages) == n_messages


def test_hooks_that_keep_nothing_and_recomputed_weights_stay_fast() -> None:
    """A hook that keeps only shapes, and weights that old-style modules recompute in every pass."""
    torch.manual_seed(0)
    model, x = (
        TwoConvNet(lambda m, x: m.fc(m.conv2(m.conv1(x)).mean((2, 3)))).eval(),
        torch.randn(1, 3, 8, 8),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(model.fc)
    nn.utils.prune.l1_unstructured(model.conv1, "weight", 10)
    nn.utils.prune.l1_unstructured(model.fc, "bias", 1)
    shapes = []
    model.fc.register_forward_hook(lambda m, args, y: shapes.append(tuple(y.shape)))
    with slow_replay_warnings() as messages:
        replay = LayerReplay(model, model.conv2, (x,), 1)
        scores = replay(drop_channel, torch.arange(4))
    expected = torch.stack([full_forward(model, model.conv2, x, [1], k) for k in range(4)])
    torch.testing.assert_close(scores, expected)
    assert messages == []
    assert shapes


@torch.jit.script
def add_in_place(x: Tensor) -> Tensor:
    return x.add_(1.0)


def test_in_place_writes_of_scripts_are_detected() -> None:
    """Scripts run in every pass: a second addition in place would change the skip connection."""

    def body(model: Any, x: Tensor) -> Tensor:
        x = add_in_place(model.conv1(x))
        return (model.conv2(x) * x).mean((2, 3))

    torch.manual_seed(0)
    model, x = TwoConvNet(body, padding=1).eval().double(), torch.randn(1, 3, 8, 8).double()
    expected = torch.stack([full_forward(model, model.conv2, x, [1], k) for k in range(4)])
    with slow_replay_warnings() as messages:
        replay = LayerReplay(model, model.conv2, (x,), 1)
        scores = torch.cat([replay(drop_channel, chunk) for chunk in torch.arange(4).split(2)])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    assert messages


def test_additional_arguments_follow_their_examples() -> None:
    class Scaled(DataDependentNet):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x) * scale[:, None]

    torch.manual_seed(0)
    model, x = Scaled("behind").eval().double(), torch.randn(2, 3, 8, 8).double()
    scale = torch.tensor([2.0, 5.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="one edit after the other"):
        scores = LayerReplay(model, model.conv2, (x,), [0, 2], (scale,))(
            drop_channel, torch.arange(1, 4)
        )
    for i, target in enumerate([0, 2]):
        for k in range(3):
            inner = lambda y, i=i: model(y, scale[i : i + 1])  # noqa: E731
            alone = full_forward(inner, model.conv2, x[i : i + 1], [target], k + 1)  # type: ignore[arg-type]
            torch.testing.assert_close(scores[k, i], alone[0], rtol=0, atol=1e-12)


def test_errors_of_the_model_are_raised(trace_free: Any) -> None:
    net, x = small_net(), torch.randn(1, 3, 8, 8)
    replay = LayerReplay(net, net.conv2, (x,), 0)
    net.fc.forward = lambda *args: 1 / 0  # type: ignore[assignment]
    with (
        trace_free(net, x),
        pytest.warns(UserWarning, match="division by zero"),
        pytest.raises(ZeroDivisionError),
    ):
        replay(drop_channel, torch.arange(2))


def test_autocast_inside_the_model_applies_behind_the_layer() -> None:
    model, x = AutocastNet().eval(), torch.randn(1, 3, 8, 8)
    scores = LayerReplay(model, model.net.conv2, (x,), 1)(drop_channel, torch.arange(6))
    for k in range(6):
        expected = full_forward(model, model.net.conv2, x, [1], k)
        torch.testing.assert_close(scores[k], expected, rtol=1e-2, atol=1e-2)
    plain = LayerReplay(model.net, model.net.conv2, (x,), 1)(drop_channel, torch.arange(6))
    assert not torch.equal(scores, plain)


def test_layer_inputs_can_be_edited_in_inference_mode() -> None:
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    expected = LayerReplay(net, net.relu1, (x,), 1)(drop_channel, torch.arange(6))
    with torch.inference_mode():
        replay = LayerReplay(net, net.conv2, (x,), 1, at_input=True)
        scores = replay(drop_channel, torch.arange(6))
    torch.testing.assert_close(scores, expected)


def test_an_interrupt_at_the_end_of_vmap_leaves_no_level_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x = small_net(), torch.randn(1, 3, 8, 8)
    replay = LayerReplay(net, net.conv2, (x,), 1)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torch._functorch.vmap._vmap_decrement_nesting", interrupt)
        with pytest.raises(KeyboardInterrupt):
            replay(drop_channel, torch.arange(6))
    torch.ones(1).requires_grad_()  # would fail inside vmap
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
    assert replay(drop_channel, torch.arange(6)).shape == (6, 1)


def test_a_model_with_inference_tensors_stays_fast() -> None:
    """Inference tensors do not count writes."""
    torch.manual_seed(0)
    with torch.inference_mode():
        model, x = TwoConvNet(cast_constants).eval(), torch.randn(1, 3, 8, 8)
    with slow_replay_warnings() as messages:
        scores = LayerReplay(model, model.conv2, (x,), 1)(drop_channel, torch.arange(4))
    expected = [full_forward(model, model.conv2, x, [1], k) for k in range(4)]
    torch.testing.assert_close(scores, torch.stack(expected))
    assert messages == []
