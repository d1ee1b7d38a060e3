"""Contract of all layer methods: Captum's conventions, no trace, any dtype and dimension."""

import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from captum.attr import (
    Attribution,
    GradientAttribution,
    LayerAttribution,
    LayerGradCam,
    NoiseTunnel,
    PerturbationAttribution,
)
from captum.testing.attr.helpers import gen_test_utils, test_config
from captum.testing.helpers.basic_models import BasicModel_ConvNet
from torch import Tensor, nn
from torchvision.models import resnet18

from captum_ext.attr import LayerGroupCam, LayerScoreCam
from tests.methods import GRADIENT, MASKING, METHODS, NEEDS_GRADIENTS, OTHER
from tests.networks import ImageAndFactsNet, small_net

# --- Captum's generic configuration ---------------------------------------------------------------

Entry = dict[str, Any]


def our_entries() -> list[Entry]:
    """Entries for the masking CAMs and all others, on the ConvNet with weights that differ.

    As Captum ships it, its rows are all alike, so its softmax ignores the input: zero maps.
    """
    net = BasicModel_ConvNet()
    torch.manual_seed(2)
    for layer in (net.conv1, net.conv2, net.fc1, net.fc2):
        nn.init.normal_(layer.weight, std=0.3)
    inputs = 3 * torch.randn(4, 1, 10, 10)
    common = {"model": net, "layer": "conv2", "tolerance": 1e-6}
    return [
        {"name": "one target", "attribute_args": {"inputs": inputs, "target": 1}, **common},
        {"name": "list", "attribute_args": {"inputs": inputs, "target": [1, 0, 7, 3]}, **common},
        {
            "name": "tensor",
            "attribute_args": {"inputs": inputs, "target": torch.tensor([1, 0, 7, 3])},
            **common,
        },
        {
            "name": "tuples",
            "attribute_args": {"inputs": inputs, "target": [(1,), (0,), (7,), (3,)]},
            **common,
        },
    ]


GRADIENT_ENTRIES = [e for e in test_config.config if LayerGradCam in e["algorithms"]]
CASES = [(GRADIENT[name], entry) for name in GRADIENT for entry in GRADIENT_ENTRIES]
CASES += [(m, entry) for m in (GRADIENT | MASKING).values() for entry in our_entries()]
CASES += [(OTHER["Eigen-CAM"], entry) for entry in [*GRADIENT_ENTRIES, *our_entries()]]
IDS = [f"{i}-{entry['name']}" for i, (_, entry) in enumerate(CASES)]
generic = pytest.mark.parametrize(("method", "entry"), CASES, ids=IDS)


def build(method: Any, entry: Entry) -> tuple[Any, nn.Module, Entry]:
    model = entry["model"]
    layer = gen_test_utils.get_target_layer(model, entry["layer"])
    return method(model, layer), model, dict(entry["attribute_args"])


def slice_arguments(arguments: Entry, i: int) -> Entry:
    """The arguments of example `i` alone."""

    def cut(value: Any) -> Any:
        return value[i : i + 1] if isinstance(value, Tensor) and value.dim() else value

    sliced = {}
    for name, value in arguments.items():
        if name == "target" and isinstance(value, list):
            sliced[name] = value[i]
        elif name == "target" and isinstance(value, Tensor) and value.numel() > 1:
            sliced[name] = value[i].item()
        else:
            sliced[name] = tuple(cut(v) for v in value) if isinstance(value, tuple) else cut(value)
    return sliced


def test_the_configuration_has_all_entries_of_layer_grad_cam() -> None:
    assert len(GRADIENT_ENTRIES) == 7


@generic
def test_targets_of_a_batch_equal_each_example_alone(method: Any, entry: Entry) -> None:
    attribution, _, arguments = build(method, entry)
    inputs = arguments["inputs"]
    n = len(inputs[0] if isinstance(inputs, tuple) else inputs)
    batch = flat(attribution.attribute(**arguments))
    singles = [
        flat(build(method, entry)[0].attribute(**slice_arguments(arguments, i))) for i in range(n)
    ]
    for k, together in enumerate(batch):
        alone = torch.cat([single[k] for single in singles])
        tolerance = entry.get("tolerance", 1e-4)  # Captum's
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=tolerance)
        if "tolerance" in entry:
            assert alone.abs().max() >= 100 * tolerance, "maps of zeros prove nothing"


@generic
def test_hooks_are_gone_after_success_bad_targets_and_errors(method: Any, entry: Entry) -> None:
    attribution, model, arguments = build(method, entry)

    def hooks() -> int:
        names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return sum(len(getattr(m, name)) for m in model.modules() for name in names)

    assert hooks() == 0
    attribution.attribute(**arguments)
    assert hooks() == 0
    with pytest.raises(AssertionError):
        attribution.attribute(**{**arguments, "target": (9, 9, 9, 9, 9)})
    assert hooks() == 0
    layer = attribution.layers[0]
    layer.forward = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        attribution.attribute(**arguments)
    del layer.forward
    assert hooks() == 0


@generic
def test_noise_tunnel_without_noise_changes_nothing(method: Any, entry: Entry) -> None:
    attribution, _, arguments = build(method, entry)
    plain = flat(attribution.attribute(**arguments))
    tunnel = NoiseTunnel(build(method, entry)[0])
    result = flat(tunnel.attribute(**arguments, stdevs=0.0, nt_samples=2))
    for a, b in zip(result, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=entry.get("tolerance", 1e-4))


def flat(maps: Any) -> list[Tensor]:
    return [maps] if isinstance(maps, Tensor) else list(maps)


# --- our own contract -----------------------------------------------------------------------------

all_methods = pytest.mark.parametrize("name", METHODS)


@all_methods
def test_methods_have_captums_base_classes(name: str) -> None:
    method = METHODS[name](small_net(), "relu2")
    assert isinstance(method, LayerAttribution)
    assert isinstance(method, Attribution)
    assert isinstance(method, GradientAttribution) == (name in GRADIENT)
    assert isinstance(method, PerturbationAttribution) == (name in MASKING)
    assert hasattr(type(method).attribute, "__wrapped__")


@all_methods
@pytest.mark.parametrize("error", [None, "model", "target"])
def test_a_call_leaves_no_trace(name: str, error: str | None, trace_free: Any) -> None:
    net = small_net()
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    x.grad = torch.randn_like(x)
    for i, p in enumerate(net.parameters()):
        p.requires_grad_(i % 2 == 0)
        p.grad = torch.full_like(p, i)
    net.fc.train()  # a flag of the user's
    method = METHODS[name](net, "relu2")
    calls = []

    def fail_on_the_second_call(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if error == "model" and len(calls) >= (2 if name in MASKING else 1):
            raise RuntimeError("halfway")

    net.pool.register_forward_pre_hook(fail_on_the_second_call)
    expected = {"model": RuntimeError, "target": (AssertionError, IndexError)}
    raises = pytest.raises(expected[error]) if error else nullcontext()
    with trace_free(net, x), raises:
        method.attribute(x, target="class 1" if error == "target" else [1, 2])


@all_methods
def test_frozen_parameters_no_grad_and_inference_mode(name: str) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    expected = METHODS[name](net, "relu2").attribute(x, target=[1, 2])
    assert not expected.requires_grad
    net.requires_grad_(False)
    with torch.no_grad():
        frozen = METHODS[name](net, "relu2").attribute(x, target=[1, 2])
    torch.testing.assert_close(frozen, expected, rtol=0, atol=0)
    with torch.inference_mode():
        if name in NEEDS_GRADIENTS:
            with pytest.raises(RuntimeError, match="inference_mode"):
                METHODS[name](net, "relu2").attribute(x, target=[1, 2])
        else:
            inside = METHODS[name](net, "relu2").attribute(x, target=[1, 2])
            torch.testing.assert_close(inside, expected, rtol=0, atol=0)


@all_methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_close(name: str, dtype: torch.dtype) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    expected = METHODS[name](net, "relu2").attribute(x, target=[1, 2])
    result = METHODS[name](net.to(dtype), "relu2").attribute(x.to(dtype), target=[1, 2])
    assert result.dtype == dtype
    close = torch.nn.functional.cosine_similarity(result.float().flatten(1), expected.flatten(1))
    assert close.min() > (0.97 if dtype == torch.bfloat16 else 0.99)


@all_methods
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_batch_equals_its_examples_in_one_to_three_dimensions(name: str, dims: int) -> None:
    net = small_net(dims)
    x = torch.randn(2, 3, *[9, 8, 7][:dims])
    result = METHODS[name](net, "relu2").attribute(x, target=[1, 2])
    assert result.shape == (2, 1, *x.shape[2:])
    assert result.abs().max() > 0
    alone = torch.cat(
        [METHODS[name](net, "relu2").attribute(x[i : i + 1], target=i + 1) for i in range(2)]
    )
    torch.testing.assert_close(result, alone, rtol=1e-4, atol=1e-6)


@all_methods
def test_flat_activations_give_flat_maps(name: str) -> None:
    net, x = small_net(), torch.zeros(2, 3, 9, 9)
    with torch.no_grad():  # a dead last stage
        net.conv2.weight.zero_()
        net.conv2.bias.fill_(-1.0)
    result = METHODS[name](net, "relu2").attribute(x, target=[1, 2])
    assert result.abs().max() == 0
    with torch.no_grad():
        net.conv2.bias.copy_(torch.arange(6.0))
    alive = METHODS[name](net, "relu2").attribute(torch.randn(2, 3, 9, 9), target=[1, 2])
    assert torch.isfinite(alive).all()
    torch.testing.assert_close(alive.amax((2, 3)), alive.amin((2, 3)))
    if name.startswith(("Score", "Group")):
        assert alive.abs().max() == 0, "a flat channel masks nothing, and so weighs nothing"


@all_methods
def test_a_list_of_layers_gives_a_list_of_maps(name: str) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    options = {"head": "fc"} if name == "CAM" else {}
    maps = METHODS[name](net, ["norm", "relu2"], **options).attribute(x, target=[1, 2])
    assert isinstance(maps, list)
    for layer, result in zip(["norm", "relu2"], maps, strict=True):
        alone = METHODS[name](net, layer, **options).attribute(x, target=[1, 2])
        torch.testing.assert_close(result, alone)
    with pytest.raises(ValueError, match="at least one layer"):
        METHODS[name](net, [])


@all_methods
def test_tuples_functions_bound_methods_and_extra_arguments(name: str) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    options = {"head": net.fc} if name == "CAM" else {}
    expected = METHODS[name](net, net.relu2, **options).attribute(x, target=1)
    scale = torch.tensor([[1.0], [1.0]])
    forwards: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (net.forward, {"inputs": (x,)}),
        (lambda y: net(y), {"inputs": x}),
        (lambda y, s, n: net(y) * s * n, {"inputs": x, "additional_forward_args": (scale, 1)}),
    ]
    if not name.startswith("Smooth"):  # which makes noise for each input
        forwards += [(lambda y, z: net(y + z), {"inputs": (x / 2, x / 2)})]
    for forward, arguments in forwards:
        result = METHODS[name](forward, net.relu2, **options).attribute(**arguments, target=1)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MASKING)
def test_the_size_of_chunks_does_not_change_masking_maps(name: str) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    maps = [
        METHODS[name](net, "relu1").attribute(x, target=[1, 2], perturbations_per_eval=n)
        for n in (1, 4, 100)
    ]
    torch.testing.assert_close(maps[0], maps[1])
    torch.testing.assert_close(maps[0], maps[2])


@all_methods
def test_a_missing_target_is_an_error_unless_there_is_one_output(name: str) -> None:
    net, x = small_net(), torch.randn(3, 3, 9, 9)
    if name == "Eigen-CAM":  # its map does not depend on the target
        eigen = METHODS[name](net, "relu2")
        assert torch.equal(eigen.attribute(x), eigen.attribute(x, target=1))
    else:
        with pytest.raises(AssertionError, match="Target not provided"):
            METHODS[name](net, "relu2").attribute(x)
    single_output = nn.Sequential(net, nn.Linear(4, 1)).eval()
    if name in ("Score-CAM increase", "Group-CAM"):
        with pytest.raises(ValueError, match="'softmax' needs two classes or more"):
            METHODS[name](single_output, net.relu2).attribute(x)
        sigmoid = METHODS[name](single_output, net.relu2, score="sigmoid")
        assert sigmoid.attribute(x).shape == (3, 1, 9, 9)
    elif name != "CAM":
        assert METHODS[name](single_output, net.relu2).attribute(x).shape == (3, 1, 9, 9)


@pytest.mark.parametrize("name", MASKING)
def test_batches_stay_within_perturbations_per_eval(name: str) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    sizes: list[int] = []
    real = nn.functional.linear

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if func is real:
                inner = torch._C._functorch.get_unwrapped(out) if is_batched(out) else out
                sizes.append(inner.numel() // 4)
            return out

    is_batched = torch._C._functorch.is_batchedtensor
    with Watch():
        METHODS[name](net, "relu1").attribute(x, target=1, perturbations_per_eval=2)
    assert max(sizes) == 2 * 2, "examples x perturbations"


def test_inputs_that_cannot_be_masked_are_passed_on() -> None:
    net, x, facts = ImageAndFactsNet().eval(), torch.randn(2, 3, 9, 9), torch.randn(2, 4)
    for method in (LayerScoreCam, LayerGroupCam):
        both = method(net, "net.relu2").attribute((x, facts), target=1)
        closed = method(lambda y: net(y, facts.repeat(len(y) // 2, 1)), net.net.relu2)
        torch.testing.assert_close(both, closed.attribute(x, target=1), rtol=1e-4, atol=1e-6)


def test_global_random_state_changes_only_without_a_generator() -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    state = torch.get_rng_state()
    kept = METHODS["Smooth Grad-CAM++"](net, "relu2").attribute(x, target=1)
    assert torch.equal(torch.get_rng_state(), state)
    again = METHODS["Smooth Grad-CAM++"](net, "relu2").attribute(x, target=1)
    assert torch.equal(kept, again)
    METHODS["Smooth Grad-CAM++"](net, "relu2", generator=None).attribute(x, target=1)
    assert not torch.equal(torch.get_rng_state(), state)


def test_eight_threads_with_all_methods_on_one_resnet(trace_free: Any) -> None:
    net, x = resnet18().eval().requires_grad_(False), torch.randn(1, 3, 32, 32)
    names = sorted(METHODS)
    net.layer4[1] = nn.Conv2d(512, 6, 1).eval().requires_grad_(False)  # few channels to mask
    net.fc = nn.Linear(6, 10)
    serial = {n: METHODS[n](net, "layer4").attribute(x, target=7) for n in names}
    wrong: list[Any] = []

    def work(first: int) -> None:
        torch.set_num_threads(1)
        for i in range(50):
            name = names[(first + i) % len(names)]
            try:
                result = METHODS[name](net, "layer4").attribute(x, target=7)
                wrong.extend([] if torch.equal(result, serial[name]) else [name])
            except Exception as error:
                wrong.append((name, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    with trace_free(net, x):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@all_methods
def test_memory_does_not_grow_from_call_to_call(name: str) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    method = METHODS[name](net, "relu2")

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    gc.freeze()  # objects from before the test are not counted
    try:
        method.attribute(x, target=1)
        before = tensors()
        for _ in range(3):
            method.attribute(x, target=1)
        assert tensors() == before
    finally:
        gc.unfreeze()


@all_methods
def test_train_mode_is_warned_of_and_leaves_no_trace(name: str, trace_free: Any) -> None:
    net, x = small_net().train(), torch.randn(4, 3, 9, 9)
    options = {"head": "fc"} if name == "CAM" else {}
    with trace_free(net, x), pytest.warns(UserWarning, match="train mode"):
        METHODS[name](net, "relu2", **options).attribute(x, target=1)


@all_methods
@pytest.mark.skipif(torch.cuda.is_available(), reason="DataParallel would take the devices")
def test_data_parallel_without_devices_is_the_module(name: str) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    options = {"head": "fc"} if name == "CAM" else {}
    expected = METHODS[name](net, "relu2", **options).attribute(x, target=1)
    parallel = nn.DataParallel(net)
    result = METHODS[name](parallel, "relu2", **options).attribute(x, target=1)
    torch.testing.assert_close(result, expected)


@pytest.mark.gpu
@all_methods
def test_maps_on_a_gpu_equal_those_on_the_cpu(name: str) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    expected = METHODS[name](net, "relu2").attribute(x, target=[1, 2])
    result = METHODS[name](net.cuda(), "relu2").attribute(x.cuda(), target=[1, 2])
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MASKING)
def test_bad_arguments_and_scores_of_the_masking_cams_are_errors(name: str) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="`perturbations_per_eval` must be an integer"):
            METHODS[name](net, "relu2").attribute(x, target=1, perturbations_per_eval=value)
    broken = nn.Sequential(net, nn.Softmax(1))
    with torch.no_grad():
        net.fc.bias[1] = float("inf")
    method = METHODS[name](broken, net.relu2)
    with pytest.raises(ValueError, match="not finite"):
        method.attribute(x, target=1)


def test_bad_arguments_are_named_in_the_error() -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    with pytest.raises(ValueError, match="`weighting` must be one of"):
        LayerScoreCam(net, "relu2", weighting="linear")
    with pytest.raises(ValueError, match="`score` must be one of"):
        LayerScoreCam(net, "relu2", score="prob")
    with pytest.raises(ValueError, match="`groups` must be an integer of at least 1"):
        LayerGroupCam(net, "relu2", groups=0)
    with pytest.raises(ValueError, match="`groups` must be the number of groups, or a vector"):
        LayerGroupCam(net, "relu2", groups=torch.zeros(6))
    with pytest.raises(ValueError, match="group of each of the 6 channels"):
        LayerGroupCam(net, "relu2", groups=torch.zeros(4, dtype=torch.long)).attribute(x, target=1)
    with pytest.raises(ValueError, match="`n_samples` must be"):
        METHODS["Smooth Grad-CAM++"](net, "relu2", n_samples=0)
    with pytest.raises(ValueError, match="`stdev_spread` must be a number, 0 or more"):
        METHODS["Smooth Grad-CAM++"](net, "relu2", stdev_spread=-1.0)
    with pytest.raises(ValueError, match="`layer_baselines` must be None, 'min'"):
        METHODS["Ablation-CAM"](net, "relu2").attribute(x, "max", target=1)
    with pytest.raises(ValueError, match="`layer_baselines` must be None"):
        METHODS["Ablation-CAM"](net, "relu2").attribute(x, {}, target=1)
    with pytest.raises(ValueError, match="`layer_baselines` has the shape"):
        METHODS["Ablation-CAM"](net, "relu2").attribute(x, torch.zeros(5), target=1)
    for method in (LayerScoreCam, LayerGroupCam):
        integers = torch.randint(0, 255, (2, 3, 9, 9))
        scaled = lambda y: net(y.float() / 255)  # noqa: E731
        with pytest.raises(ValueError, match="can mask only an input of floats"):
            method(scaled, net.relu2).attribute(integers, target=1)
        with pytest.raises(AssertionError, match="`baselines` must be a number, or a"):
            method(net, "relu2").attribute(x, torch.zeros(2, 2), target=1)
    with pytest.raises(ValueError, match="`layer` `fc` has the shape"):
        LayerScoreCam(net, "fc").attribute(x, target=1)
    with pytest.raises(TypeError, match="`reshape_transform` must be callable"):
        LayerScoreCam(net, "relu2", reshape_transform="tokens")  # type: ignore[arg-type]
