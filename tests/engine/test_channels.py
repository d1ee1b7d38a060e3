"""The dimension of the channels is traced through operations, and not guessed from widths."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import (
    convnext_tiny,
    densenet121,
    mobilenet_v3_small,
    shufflenet_v2_x0_5,
    swin_t,
)
from torchvision.models.vision_transformer import VisionTransformer

from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.channels import ChannelTracer
from captum_ext._engine.hooks import enter_mode
from captum_ext.attr import LayerAblationCam, LayerEigenCam, LayerHiResCam
from tests.methods import METHODS
from tests.networks import (
    ChannelsLastNet,
    Lambda,
    ScriptedNet,
    SmallNet,
    TwoTensorNet,
    small_net,
    small_swin,
)


def traced(function: Any, x: Tensor) -> set[int] | None:
    """The channels' dimensions in the result of `function`, for x (B, C, H, W)."""
    tracer = ChannelTracer()
    tracer.mark_inputs((x,))
    with torch.no_grad(), enter_mode(tracer) as lock, lock:
        result = function(x)
    dims = tracer.dims_of(result)
    return None if dims is None else set(dims)


linear = nn.Linear(6, 6)
over_rows = nn.Linear(4, 4)
OPERATIONS: dict[str, tuple[Any, set[int] | None]] = {
    "element by element": (lambda x: (x.relu_() + 1) * torch.rand(6, 1, 1), {1}),
    "convolution": (nn.Conv2d(6, 3, 3), {1}),
    "convolution without a batch": (lambda x: nn.Conv2d(6, 3, 3)(x[0]), {0}),
    "transposed convolution": (nn.ConvTranspose2d(6, 3, 3), {1}),
    "pooling without a batch": (lambda x: nn.functional.max_pool2d(x[0], 2), {0}),
    "rot90": (lambda x: x.rot90(1, (1, 2)), {2}),
    "rot90, of rows and columns": (lambda x: torch.rot90(x, k=3, dims=(2, 3)), {1}),
    "rot180": (lambda x: x.rot90(2, (1, 2)), {1}),
    "flip": (lambda x: x.flip(1, 2), {1}),
    "pooling": (lambda x: nn.functional.adaptive_avg_pool2d(x, 1), {1}),
    "permute": (lambda x: x.permute(0, 2, 3, 1), {3}),
    "permute, dimensions by keyword": (lambda x: x.permute(dims=(0, -2, -1, 1)), {3}),
    "transpose": (lambda x: x.transpose(1, 3), {3}),
    "movedim": (lambda x: x.movedim(1, -1), {3}),
    "mT": (lambda x: x.transpose(1, 3).mT, {2}),
    "permute, of one dimension": (lambda x: x + x.mean().reshape(1).permute(0), {1}),
    "T": (lambda x: x.T, None),
    "flatten": (lambda x: x.flatten(2), {1}),
    "flatten with the channels": (lambda x: x.flatten(1), None),
    "tokens": (lambda x: x.flatten(2).transpose(1, 2), {2}),
    "split": (lambda x: x.reshape(2, 3, 2, 4, 4), {1, 2}),
    "channel shuffle": (lambda x: x.view(2, 3, 2, 4, 4).transpose(1, 2).reshape(2, 6, 4, 4), {1}),
    "windows": (lambda x: x.permute(0, 2, 3, 1).reshape(2, 2, 2, 2, 2, 6), {5}),
    "index": (lambda x: x[:, None, ..., 0], {2}),
    "unbind": (lambda x: x.reshape(2, 3, 2, 4, 4).unbind(1)[0], {1}),
    "a mean, by axis": (lambda x: x.permute(0, 2, 1, 3).mean(axis=3), {2}),
    "a new tensor": (lambda x: x.new_zeros(2, 4, 4, 6), None),
    "sampling": (lambda x: nn.functional.grid_sample(x, x[:, :2].permute(0, 2, 3, 1)), {1}),
    "normalisation of rows": (lambda x: nn.functional.layer_norm(x, (4,)), {1}),
    "a sum over one part": (lambda x: x.reshape(2, 3, 2, 4, 4).sum(dim=1), {1}),
    "an index by a list": (lambda x: x[:, [0, 1]], {1}),
    "an index by a tensor": (lambda x: x[torch.tensor([0, 1]), ..., None], {1}),
    "an index by two": (lambda x: x[torch.tensor([0, 1]), [0, 1]], None),
    "linear over the channels": (lambda x: linear(x.permute(0, 2, 3, 1)), {3}),
    "linear over positions": (lambda x: over_rows(x), {1}),
    "layer normalisation": (lambda x: nn.functional.layer_norm(x.movedim(1, 3), (6,)), {3}),
    "over all dimensions": (lambda x: nn.functional.layer_norm(x, (6, 4, 4)), {1}),
    "attention": (
        lambda x: nn.functional.scaled_dot_product_attention(*[x.flatten(2).mT] * 3),
        {2},
    ),
    "einsum": (lambda x: torch.einsum("bchw->bhwc", x), None),
    "two that disagree": (lambda x: x[:, :4] + x[:, :4].permute(0, 2, 3, 1), None),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_moves_the_channels_as_expected(name: str) -> None:
    function, expected = OPERATIONS[name]
    assert traced(function, torch.rand(2, 6, 4, 4)) == expected


@pytest.mark.parametrize("at_input", [False, True])
def test_a_layer_without_a_batch_is_an_error_that_says_so(at_input: bool) -> None:
    class Conv(nn.Conv2d):
        """A convolution under another name."""

    net = nn.Sequential(
        Lambda(lambda x: x[0]), Conv(3, 4, 3), Lambda(lambda x: x.mean((1, 2))[None])
    )
    with pytest.raises(ValueError, match="`layer` Conv gives a tensor without a batch"):
        LayerHiResCam(net, "1").attribute(
            torch.rand(1, 3, 6, 6), target=0, attribute_to_layer_input=at_input
        )


MODELS = (mobilenet_v3_small, shufflenet_v2_x0_5, small_swin)
LARGE_MODELS = (convnext_tiny, densenet121, swin_t)


@pytest.mark.parametrize(
    "build",
    [*MODELS, *(pytest.param(build, marks=pytest.mark.slow) for build in LARGE_MODELS)],
    ids=lambda build: build.__name__,
)
def test_the_dimension_that_does_not_grow_with_the_image_has_the_channels(build: Any) -> None:
    """An independent check: with two image sizes, only the height and width of a layer differ."""
    model, shapes, runs = build().eval(), [], Counter[str]()
    images = [torch.randn(1, 3, 64, 64), torch.randn(1, 3, 96, 128)]
    for x in images:
        shapes.append({})

        def record(name: str, output: Any, shapes_by_name: dict[str, Any] = shapes[-1]) -> None:
            runs.update([name])
            shapes_by_name[name] = output.shape if isinstance(output, Tensor) else ()

        handles = [
            module.register_forward_hook(lambda m, a, y, name=name, record=record: record(name, y))
            for name, module in model.named_modules()
        ]
        with torch.no_grad():
            model(x)
        for handle in handles:
            handle.remove()
    n_checked = 0
    for name in list(shapes[0])[::7]:
        small, large = shapes[0][name], shapes[1][name]
        fixed = {i for i, n in enumerate(small) if i > 0 and n == large[i]}
        if runs[name] != 2 or len(small) < 3 or len(fixed) != 1:
            continue
        capture = LayerCapture(model, [model.get_submodule(name)], traces_channels=True)
        capture.activations((images[0],))
        assert capture.channel_dims == [[fixed]], name
        n_checked += 1
    assert n_checked > 5


def test_equal_widths_do_not_mislead_the_trace() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.LayerNorm([2, 3, 3]), nn.Flatten(), nn.Linear(18, 2))
    x = torch.rand(1, 1, 3, 3)
    for layer in ("0", "1"):
        assert LayerHiResCam(net, layer).attribute(x, target=1).shape == (1, 1, 3, 3)

    net = ChannelsLastNet()
    with pytest.raises(ValueError, match=r"channels last, of shape .*channels_last_to_first"):
        LayerHiResCam(net, "norm").attribute(torch.rand(1, 3, 4, 4), target=1)


def test_layers_without_a_source_are_traced_from_the_image() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=3).eval()
    nn.init.normal_(vit.heads.head.weight)
    x = torch.rand(2, 3, 16, 16)
    for layer in (vit.encoder.dropout, vit.encoder.layers[1].mlp[1], vit.encoder.layers[0]):
        with pytest.raises(ValueError, match="tokens or channels last"):
            LayerHiResCam(vit, layer).attribute(x, target=1)
    net = small_net()
    for layer in ("relu1", "relu2"):
        assert LayerHiResCam(net, layer).attribute(x, target=1).shape == (2, 1, 16, 16)
    input_map = LayerHiResCam(net, "relu2").attribute(x, target=1, attribute_to_layer_input=True)
    assert input_map.shape == (2, 1, 16, 16)


def test_unknown_channels_are_an_error_with_advice() -> None:
    net, x = ScriptedNet().eval(), torch.rand(1, 3, 6, 6)
    with pytest.raises(ValueError, match=r"not known .* `reshape_transform=torch.nn.Identity\(\)`"):
        LayerHiResCam(net, "identity").attribute(x, target=1)
    method = LayerHiResCam(net, "identity", reshape_transform=nn.Identity())
    assert method.attribute(x, target=1).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_rejects_channels_last(name: str) -> None:
    permute, mean = Lambda(lambda x: x.permute(0, 2, 3, 1)), Lambda(lambda x: x.mean((1, 2)))
    net = nn.Sequential(nn.Conv2d(3, 4, 1), permute, nn.Linear(4, 4), mean)
    options = {"head": net[2]} if name == "CAM" else {}
    with pytest.raises(ValueError, match="tokens or channels last"):
        METHODS[name](net, net[2], **options).attribute(torch.rand(2, 3, 4, 4), target=[1, 2])


def test_an_error_in_the_model_leaves_no_function_mode(trace_free: Any) -> None:
    net, x = small_net(), torch.rand(1, 3, 8, 8)
    for broken in (net.relu2, net.conv2, net.fc):
        forward = broken.forward
        broken.forward = lambda *args: 1 / 0  # type: ignore[assignment]
        for layer in (net.relu2, net.conv2):
            with trace_free(net, x), pytest.raises(ZeroDivisionError):
                LayerHiResCam(net, layer).attribute(x, target=1)
            with trace_free(net, x), pytest.raises(ZeroDivisionError):
                LayerAblationCam(net, layer).attribute(x, target=1)
        broken.forward = forward  # type: ignore[method-assign]


def test_channels_of_signals_and_volumes_are_traced() -> None:
    for dims in (1, 3):
        net, x = SmallNet(dims).eval(), torch.rand(1, 3, *[6] * dims)
        for layer in (net.conv2, net.relu2):
            assert LayerHiResCam(net, layer).attribute(x, target=1).shape == (1, 1, *[6] * dims)
        method = LayerHiResCam(net, net.conv1)
        input_map = method.attribute(x, target=1, attribute_to_layer_input=True)
        assert input_map.shape == (1, 1, *[6] * dims)


def test_layers_that_run_in_other_threads_are_traced() -> None:
    """Like replicas of DataParallel, marked by `device_ids`."""
    net, x = small_net(), torch.rand(2, 3, 8, 8)

    def in_another_thread(x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool, torch.no_grad():
            return pool.submit(net, x).result()

    for layer, forward in ((net.conv2, in_another_thread), (net.relu2, lambda x: net(x))):
        expected = LayerEigenCam(net, layer).attribute(x, target=1)
        method = LayerEigenCam(forward, layer, device_ids=[0])
        assert torch.equal(method.attribute(x, target=1), expected)


def test_layers_that_pass_tensors_through_are_traced_from_the_image() -> None:
    net, x = TwoTensorNet().eval(), torch.rand(2, 3, 6, 6)
    for name in ("HiResCAM", "Ablation-CAM", "Eigen-CAM"):
        small, large = METHODS[name](net, "down").attribute(x, target=[0, 1])
        assert (small.shape, large.shape) == ((2, 1, 2, 2), (2, 1, 4, 4))
