"""Layer capture: exact activations and gradients, and an unchanged model."""

import functools
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import densenet121, resnet18

from captum_ext._checks import warn
from captum_ext._engine.hooks import edit_layers
from captum_ext._engine.modules import find_module, root_module
from captum_ext._engine.outputs import scoring_forward
from captum_ext._engine.state import _buffers_of_modules, preserve_state
from captum_ext._errors import ArgumentError
from tests.captures import layer_activations, layer_gradients
from tests.networks import (
    FunctionsAroundLayer,
    Lambda,
    LinearProbe,
    NoGradConv,
    ReluTwiceNet,
    StatefulNet,
    small_net,
)


def sums(x: Tensor) -> Tensor:
    return x.sum((2, 3))


def autograd_reference(model: nn.Module, layer: nn.Module, x: Tensor, target: Any) -> Any:
    """Activation and gradient of a layer, by `Tensor.retain_grad`."""
    outputs: list[Tensor] = []

    def record(module: Any, args: Any, output: Tensor) -> Tensor:
        output.retain_grad()
        outputs.append(output)
        return output.clone()

    handle = layer.register_forward_hook(record)
    scores = model(x.clone().requires_grad_())
    handle.remove()
    (gradient,) = torch.autograd.grad(scores[range(len(x)), target].sum(), outputs[0])
    return outputs[0].detach(), gradient


@pytest.mark.parametrize("name", ["conv1", "norm", "relu1", "conv2", "relu2"])
def test_gradients_equal_autograd_at_every_layer(name: str) -> None:
    net, x = small_net(dtype=torch.float64), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    layer = net.get_submodule(name)
    (a,), (g,) = layer_gradients(net, [layer], (x,), [0, 3, 1])
    if layer is net.relu1 or layer is net.relu2:
        expected = autograd_reference(net, layer, x, [0, 3, 1])
    else:  # an in-place ReLU follows: compare with a network without
        net.relu1.inplace = net.relu2.inplace = False
        expected = autograd_reference(net, layer, x, [0, 3, 1])
    torch.testing.assert_close((a[0], g[0]), expected, rtol=0, atol=1e-12)


def test_a_pass_with_several_layers_equals_one_pass_per_layer() -> None:
    net, x = resnet18().eval(), torch.randn(2, 3, 64, 64)
    layers = [net.layer4, net.layer2, net.layer3[0].conv1, net.layer3]
    together = layer_gradients(net, layers, (x,), [5, 7])
    for i, layer in enumerate(layers):
        alone = layer_gradients(net, [layer], (x,), [5, 7])
        torch.testing.assert_close(together[0][i], alone[0][0], rtol=0, atol=0)
        torch.testing.assert_close(together[1][i], alone[1][0], rtol=1e-5, atol=1e-9)


def test_a_functional_in_place_relu_behind_the_layer_does_not_change_the_capture() -> None:
    net, x = densenet121().eval(), torch.randn(1, 3, 64, 64)
    (a,), (g,) = layer_gradients(net, [net.features], (x,), 3)
    assert (a[0] < 0).any(), "the captured activation must be the one before the ReLU"
    weight = net.classifier.weight[3].detach()[None, :, None, None] / a[0][0, 0].numel()
    torch.testing.assert_close(g[0], torch.where(a[0] > 0, weight, 0.0))


def test_frozen_parameters_change_nothing() -> None:
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    expected = layer_gradients(net, [net.conv2], (x,), 1)
    net.requires_grad_(False)
    with torch.no_grad():
        frozen = layer_gradients(net, [net.conv2], (x,), 1)
    torch.testing.assert_close(frozen, expected, rtol=0, atol=0)


def test_gradients_are_off_in_front_of_the_layer() -> None:
    net, modes = small_net(), {}
    for name, module in net.named_modules():
        if name:
            module.register_forward_pre_hook(
                lambda m, a, name=name: modes.__setitem__(name, torch.is_grad_enabled())
            )
    layer_gradients(net, [net.conv2], (torch.randn(1, 3, 8, 8),), 0)
    in_front = {"conv1", "norm", "relu1", "conv2"}
    assert modes == {name: name not in in_front for name in modes}


def test_a_layer_that_the_model_runs_under_no_grad_has_gradients() -> None:
    net = LinearProbe()
    (_,), (g,) = layer_gradients(net, [net.backbone], (torch.randn(2, 3, 6, 6),), 2)
    expected = (net.head.weight[2].detach() / 16)[None, :, None, None].expand_as(g[0])
    torch.testing.assert_close(g[0], expected)


def test_create_graph_makes_the_result_differentiable() -> None:
    net = small_net(dtype=torch.float64)
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)

    def gradient_times_activation(x: Tensor) -> Tensor:
        (a,), (g,) = layer_gradients(net, [net.conv2], (x,), 1, grad_kwargs={"create_graph": True})
        return (a[0] * g[0]).sum()

    assert torch.autograd.gradcheck(gradient_times_activation, (x,))


def test_create_graph_gives_the_hessian_at_the_activations() -> None:
    """For y = tanh(w . a), the gradient is w (1 - y^2), its derivative -2 w w^T y (1 - y^2)."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Tanh()).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    for options in ({}, {"at_input": True}):
        layer = net[1] if options else net[0]
        (a,), (g,) = layer_gradients(
            net, [layer], (x,), 1, grad_kwargs={"create_graph": True}, **options
        )
        rows = [torch.autograd.grad(g[0][0, i], a[0], retain_graph=True)[0][0] for i in range(4)]
        w, y = net[1].weight[1], net(x)[0, 1]
        torch.testing.assert_close(g[0][0], w * (1 - y**2))
        torch.testing.assert_close(torch.stack(rows), -2 * torch.outer(w, w) * y * (1 - y**2))


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda y: (y, None, 2 * y), lambda out: out[0] + out[2]),
        (lambda y: [y, 2 * y], lambda out: out[0] + out[1]),
        (lambda y: {"a": y, "n": 7, "b": 2 * y}, lambda out: out["a"] + out["b"]),
    ],
)
def test_layers_with_several_tensors_have_gradients_for_each(pack: Any, unpack: Any) -> None:
    layer = Lambda(lambda x: pack(x + 1))
    net = FunctionsAroundLayer(lambda y: sums(y**2), lambda layer, x: unpack(layer(x)), layer)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    (a,), (g,) = layer_gradients(net, [net.layer], (x,), 0)
    first = torch.zeros_like(x)
    first[:, 0] = 2 * 3 * (x + 1)[:, 0]
    torch.testing.assert_close(a, (x + 1, 2 * (x + 1)))
    torch.testing.assert_close(g, (first, first))


def test_a_tensor_that_the_target_ignores_has_zero_gradient() -> None:
    layer = Lambda(lambda x: (x * 2, x * 3))
    net = FunctionsAroundLayer(sums, lambda layer, x: layer(x)[1], layer)
    _, (g,) = layer_gradients(net, [net.layer], (torch.randn(1, 2, 3, 3),), 0)
    assert g[0].abs().sum() == 0
    assert g[1].sum() == 9


def test_layer_inputs_are_captured_positional_and_by_keyword() -> None:
    layer = Lambda(lambda x, *, y, scale: scale * x * y)
    net = FunctionsAroundLayer(sums, lambda layer, x: layer(x, y=x + 1, scale=2), layer)
    x = torch.randn(2, 1, 3, 3)
    (a,), (g,) = layer_gradients(net, [net.layer], (x,), 0, at_input=True)
    torch.testing.assert_close(a, (x, x + 1))
    torch.testing.assert_close(g, (2 * (x + 1), 2 * x))


def test_a_later_write_into_an_alias_does_not_change_the_capture() -> None:
    net = FunctionsAroundLayer(lambda xy: xy[0].mul_(0) + xy[1], lambda layer, x: (x, layer(x)))
    x = torch.randn(2, 3)
    ((a,),), _ = layer_activations(net, [net.layer], (x,), 0)
    torch.testing.assert_close(a, x, rtol=0, atol=0)


def test_a_model_that_works_in_place_does_not_change_the_inputs() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.Flatten())
    x = torch.randn(2, 3, 5, 5)
    before = x.clone()
    layer_gradients(net, [net[1]], (x,), 0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("error_in", ["layer", "behind", "in front", "target"])
def test_an_error_leaves_no_trace_on_the_model(error_in: str, trace_free: Any) -> None:
    net, x = small_net(), torch.randn(2, 3, 8, 8, requires_grad=True)
    x.grad = torch.ones_like(x)
    broken = {"layer": net.conv2, "behind": net.fc, "in front": net.conv1}.get(error_in)
    if broken is not None:
        broken.forward = lambda *args: 1 / 0  # type: ignore[assignment]
    with (
        trace_free(net, x),
        pytest.raises((ZeroDivisionError, AssertionError)),
        preserve_state(net),
    ):
        layer_gradients(net, [net.conv2], (x,), "class 3" if broken is None else 1)


def test_train_mode_warns_once_and_its_buffers_are_restored(trace_free: Any) -> None:
    net, x = small_net().train(), torch.randn(4, 3, 8, 8)
    for forward in (net, net.forward, lambda x: net(x)):
        with trace_free(net), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with preserve_state(forward):
                for _ in range(3):
                    layer_activations(forward, [net.conv2], (x,))
        assert ["train mode" in str(w.message) for w in caught] == [True]


def test_eval_mode_and_stateless_train_mode_do_not_warn(no_warnings: None) -> None:
    for model in (small_net(), nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten())):
        with preserve_state(model):
            model(torch.randn(1, 3, 8, 8))


def test_a_layer_that_runs_twice_is_an_error(trace_free: Any) -> None:
    net, x = ReluTwiceNet(), torch.randn(1, 3, 4, 4)
    with trace_free(net, x), pytest.raises(ValueError, match="ReLU runs more than once"):
        layer_gradients(net, [net.relu], (x,), 0)


def test_layers_that_do_not_run_or_do_not_reach_the_target_are_errors() -> None:
    net, x = small_net(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="`Conv2d` did not run"):
        layer_gradients(net, [nn.Conv2d(1, 1, 1)], (x,), 0)
    side = FunctionsAroundLayer(sums, lambda layer, x: (layer(x), x)[1], nn.Conv2d(3, 1, 1))
    with pytest.raises(ValueError, match="does not depend on `layer` `layer`"):
        layer_gradients(side, [side.layer], (x,), 0)


def test_inference_mode_is_an_error_for_gradients_only() -> None:
    net, x = small_net(), torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="inference_mode"):
            layer_gradients(net, [net.conv2], (x,), 0)
        ((inside,),), _ = layer_activations(net, [net.conv2], (x,), 0)
        made_inside = torch.randn(1, 3, 8, 8)
    ((outside,),), _ = layer_activations(net, [net.conv2], (x,), 0)
    assert torch.equal(inside, outside)
    layer_gradients(net, [net.conv2], (made_inside,), 0)


def test_find_module_takes_names_and_modules_and_nothing_else() -> None:
    net = resnet18()
    assert find_module(net, "layer4.1.conv2") is net.layer4[1].conv2
    assert find_module(net.forward, "layer4") is net.layer4
    assert find_module(nn.DataParallel(net), "layer4") is net.layer4
    assert root_module(scoring_forward(net, "softmax")) is net
    assert root_module(functools.partial(net.forward)) is net
    wrapped = NoGradConv(1)
    assert find_module(wrapped.forward, "conv") is wrapped.conv
    with pytest.raises(
        ArgumentError, match=r"'layer5' is not in the model\. Closest: layer4, l"
    ) as caught:
        find_module(net, "layer5")
    assert caught.value.argument == "layer"
    with pytest.raises(ValueError, match="pass the module itself"):
        find_module(lambda x: net(x), "layer4")
    with pytest.raises(TypeError, match="dotted name"):
        find_module(net, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eager module"):
        find_module(torch.compile(net), "layer4")


def test_scoring_forward_computes_each_score() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.bfloat16)
    forward = {s: scoring_forward(lambda x: x, s)(logits) for s in ("logit", "softmax", "sigmoid")}
    assert all(value.dtype == torch.float32 for value in forward.values())
    torch.testing.assert_close(forward["softmax"], logits.float().softmax(1))
    torch.testing.assert_close(forward["sigmoid"], logits.float().sigmoid())
    assert scoring_forward(lambda x: x, lambda y: y[:, 1:])(logits).tolist() == [[1.0, 3.0]]
    with pytest.raises(ValueError, match="`score` must be one of"):
        scoring_forward(lambda x: x, "probability")


def test_eight_threads_on_one_model_equal_serial_calls() -> None:
    net = resnet18().eval()
    xs = [torch.randn(1, 3, 64, 64) for _ in range(8)]
    layers = [net.layer4, net.layer3, net.layer4[1].conv2, net.layer2] * 2
    serial = [layer_gradients(net, [layers[i]], (xs[i],), i) for i in range(8)]
    wrong, errors = [], []

    def work(i: int) -> None:
        torch.set_num_threads(1)
        try:
            for _ in range(50):
                (a,), (g,) = layer_gradients(net, [layers[i]], (xs[i],), i)
                ((a0,),), ((g0,),) = serial[i]
                wrong.extend([] if torch.equal(a[0], a0) and torch.equal(g[0], g0) else [i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, errors) == ([], [])


def test_hooks_do_not_act_in_other_threads() -> None:
    net, x = small_net(), torch.randn(1, 3, 8, 8)
    expected = net(x)

    def ruin(index: int, tensors: Any) -> Any:
        return tuple(t * 0 for t in tensors)

    seen = []
    for at_input in (False, True):
        with edit_layers([net.conv2], ruin, at_input=at_input) as lock, lock:
            thread = threading.Thread(target=lambda: seen.append(net(x)))
            thread.start()
            thread.join()
            assert not torch.equal(net(x), expected)
    assert all(torch.equal(y, expected) for y in seen)


@pytest.mark.gpu
def test_data_parallel_gathers_in_the_order_of_the_batch() -> None:
    n = torch.cuda.device_count()
    net = small_net().cuda()
    x = torch.randn(2 * n + 1, 3, 8, 8, device="cuda")
    target = torch.arange(len(x)) % 4
    expected = layer_gradients(net, [net.conv2], (x,), target.tolist())
    order = list(range(n))[::-1]
    parallel = nn.DataParallel(net.to(f"cuda:{order[0]}"), device_ids=order)
    gradients = layer_gradients(parallel, [net.conv2], (x.to(f"cuda:{order[0]}"),), target.tolist())
    torch.testing.assert_close(gradients, expected, check_device=False)


# --- preserve_state ------------------------------------------------------------------------------


def test_buffers_that_the_model_adds_or_replaces_are_restored(trace_free: Any) -> None:
    net, x = StatefulNet().eval(), torch.rand(2, 3)
    with trace_free(net), preserve_state(net):
        net(x)
    assert net.cache is None
    assert "new" not in net.state_dict()


def test_nested_calls_restore_their_own_buffers() -> None:
    net, x = StatefulNet().eval(), torch.rand(2, 3)
    with preserve_state(net):
        net(x)
        with preserve_state(net):
            net(x)
            net(x)
        assert net.calls == 1
    assert net.calls == 0


def test_no_snapshot_remains_when_the_warning_is_an_error() -> None:
    net = StatefulNet().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for forward in (net, lambda x: net(x)):
            with pytest.raises(UserWarning, match="train mode"), preserve_state(forward):
                forward(torch.rand(2, 3))
    assert not _buffers_of_modules
    net.eval()
    with preserve_state(net):
        net(torch.rand(2, 3))
    assert net.calls == 0


def test_the_last_thread_restores_the_buffers_of_before_the_first() -> None:
    net, x = StatefulNet().eval(), torch.rand(2, 3)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with preserve_state(net):
            net(x)
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with preserve_state(net):
        net(x)
        thread.start()
        inside.wait(60)
    assert net.calls == 2, "the other thread has not ended"
    leave.set()
    thread.join()
    assert net.calls == 0
    assert not _buffers_of_modules


def test_code_without_a_module_can_warn() -> None:
    """Code that `exec` runs has no `__name__`."""
    with pytest.warns(UserWarning, match="hello"):
        exec("warn('hello')", {"warn": warn})
